"""A server that lies: what each site refuses, by which rule, and that nothing is gained by trying."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from fedvision.errors import FedvisionError, ProtocolError
from fedvision.secagg import identity, schedule
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.documents import document_bytes
from fedvision.secagg.masking import add_masks
from fedvision.secagg.member import SiteMember
from fedvision.secagg.messages import (
    Accepted,
    AcceptedEntry,
    Ack,
    AckRoll,
    AckUpload,
    Beacon,
    BeaconRoll,
    Cohort,
    Dispute,
    Documents,
    Enrolment,
    Holding,
    Masked,
    MaskedRoll,
    Offer,
    OpenPair,
    PairPublic,
    Ready,
    Report,
    Session,
    Signed,
    Sketch,
)
from fedvision.secagg.roster import (
    Charter,
    colluding_bound,
    scale_for,
    sign_document,
    threshold_for,
)
from fedvision.secagg.schedule import Consortium
from fedvision.secagg.server import SumRound
from fedvision.secagg.site import begin
from fedvision.secagg.site_state import Marks
from fedvision_sites.secure import read_documents
from tests.secagg_parties import MODEL, Consort, ask, gather, honest, true_sum
from tests.secagg_stages import (
    LEVELS,
    SKETCHED,
    STEPS,
    bodies_of,
    entries_of,
    left_out,
    opened,
    play,
    reach,
    refuses,
    resay,
    server_says,
    site_says,
    taker,
)

every_level = pytest.mark.parametrize("level", LEVELS)
every_sketch = pytest.mark.parametrize("level", SKETCHED)
NUM_SITES = 7
QUORUM = threshold_for(NUM_SITES)


def sizes(level: str) -> Consort:
    return gather(NUM_SITES, level)


# --- one masked input ------------------------------------------------------------------------------------


@every_level
def test_a_second_masked_input_is_refused(level: str) -> None:
    consort = sizes(level)
    _, bodies = reach(consort, "mask")
    party = consort.parties[1]
    party.step("mask", bodies[1])
    refuses(party, "mask", bodies[1], "phase")


@every_level
def test_a_second_masked_input_for_another_cohort_is_refused(level: str) -> None:
    consort = sizes(level)
    _, bodies = reach(consort, "mask")
    smaller = opened(bodies[1], Cohort).entries[:-1]
    party = consort.parties[1]
    party.step("mask", bodies[1])
    refuses(party, "mask", resay(consort, bodies[1], Cohort, entries=smaller), "phase")


@every_level
def test_every_message_out_of_order_is_refused(level: str) -> None:
    consort = sizes(level)
    attempt, party = consort.attempt(), consort.parties[2]
    sent, before = {}, {}
    for step in STEPS[level][1:]:
        bodies = play(consort, attempt, stop=step) if step == "mask" else bodies_of(attempt, step)
        sent[step], before[step] = bodies[2], party.state
        play_one(consort, attempt, step, bodies)
    for step, state in before.items():
        for other, body in sent.items():
            if other != step:
                party.state = state
                with pytest.raises(ProtocolError) as caught:
                    party.step(other, body)
                again = (level, step, other) == ("sketch", "unmask", "accept")  # for a smaller set only
                assert caught.value.rule == ("accepted-set" if again else "phase"), (step, other)


# --- the accepted set -----------------------------------------------------------------------------------


@every_level
def test_the_overlap_attack_is_refused(level: str) -> None:
    consort = sizes(level)
    _, bodies = reach(consort, "accept")
    both = resay(consort, bodies[1], Accepted, excluded=left_out([3]))
    refuses(consort.parties[1], "accept", both, "overlap")


@every_level
@pytest.mark.parametrize("smallest_cohort", [3, 6])
def test_an_accepted_set_below_smallest_cohort_or_threshold_is_refused(
    level: str, smallest_cohort: int
) -> None:
    consort = gather(NUM_SITES, level, smallest_cohort=smallest_cohort)
    attempt, _ = reach(consort, "accept")
    needed = max(smallest_cohort, QUORUM)
    for count in (1, needed - 1):
        inside, outside = range(1, count + 1), range(count + 1, NUM_SITES + 1)
        small = Accepted(attempt.tau, entries_of(attempt, inside), left_out(outside), b"")
        refuses(consort.parties[1], "accept", server_says(consort, small), "smallest-cohort")
    inside, outside = range(1, needed + 1), range(needed + 1, NUM_SITES + 1)
    enough = Accepted(attempt.tau, entries_of(attempt, inside), left_out(outside), b"")
    consort.parties[1].step("accept", server_says(consort, enough))


@every_level
def test_an_accepted_set_that_grows_changes_or_comes_again_is_refused(level: str) -> None:
    consort = gather(9, level)
    attempt, _ = reach(consort, "accept")
    party = consort.parties[1]

    def said(*inside: int) -> bytes:
        outside = sorted(set(attempt.cohort) - set(inside))
        message = Accepted(attempt.tau, entries_of(attempt, inside), left_out(outside), b"")
        return server_says(consort, message)

    party.step("accept", said(1, 2, 3, 4, 5, 6, 7, 8))
    rule = "accepted-set" if level == "sketch" else "phase"
    for inside in ((1, 2, 3, 4, 5, 6, 7, 8), tuple(range(1, 10)), (1, 2, 3, 4, 5, 6, 7, 9)):
        refuses(party, "accept", said(*inside), rule)
    if level != "sketch":
        refuses(party, "accept", said(1, 2, 3, 4, 5, 6, 7), rule)
        return
    party.step("accept", said(1, 2, 3, 4, 5, 6, 7))
    refuses(party, "accept", said(1, 2, 3, 4, 5, 6, 7, 8), rule)
    refuses(party, "accept", said(1, 2, 3, 4, 5, 6, 7), rule)


@every_level
def test_an_accepted_set_that_is_not_the_cohort_split_in_two_is_refused(level: str) -> None:
    consort = sizes(level)
    _, bodies = reach(consort, "accept")
    whole = opened(bodies[1], Accepted).entries
    party = consort.parties[1]
    last = whole[-1]
    for entries, excluded in (
        (whole[:-1], ()),
        ((*whole, AcceptedEntry(8, bytes(32))), ()),
        (whole, left_out([8])),
        ((*whole, last), ()),
        (whole[::-1], ()),
        (whole[1:], left_out([1])),
    ):
        changed = resay(consort, bodies[1], Accepted, entries=entries, excluded=excluded)
        refuses(party, "accept", changed, "accepted-set")


@every_level
def test_another_hash_of_its_own_masked_input_is_refused(level: str) -> None:
    consort = sizes(level)
    _, bodies = reach(consort, "accept")
    entries = (AcceptedEntry(1, bytes(32)), *opened(bodies[1], Accepted).entries[1:])
    refuses(
        consort.parties[1], "accept", resay(consort, bodies[1], Accepted, entries=entries), "accepted-set"
    )


@every_sketch
def test_another_hash_of_anybodys_masked_input_is_refused_where_all_were_shown(level: str) -> None:
    consort = sizes(level)
    _, bodies = reach(consort, "accept")
    entries = (*opened(bodies[1], Accepted).entries[:-1], AcceptedEntry(7, bytes(32)))
    refuses(
        consort.parties[1], "accept", resay(consort, bodies[1], Accepted, entries=entries), "accepted-set"
    )


@every_sketch
@pytest.mark.parametrize("step", ["mask", "beacon", "sketch"])
def test_an_accepted_set_with_a_site_that_was_not_shown_is_refused(level: str, step: str) -> None:
    if (level, step) == ("sketch", "sketch"):
        pytest.skip("sites do not see each other's sketches at level sketch")
    consort = gather(9, level)
    attempt = consort.attempt()
    play(
        consort, attempt, stop="accept", lie=lambda site, at, *sent: None if (site, at) == (9, step) else sent
    )
    digests = {**dict.fromkeys(attempt.cohort, bytes(32)), **attempt.views.digests}
    entries = tuple(AcceptedEntry(site, digests[site]) for site in attempt.cohort)
    message = server_says(consort, Accepted(attempt.tau, entries, (), b""))
    refuses(consort.parties[1], "accept", message, "accepted-set")


@every_level
def test_an_ack_gives_the_keys_of_those_left_out_and_nothing_else(level: str) -> None:
    consort = sizes(level)
    attempt, _ = reach(consort, "accept")
    message = Accepted(attempt.tau, entries_of(attempt, range(1, 7)), left_out([7]), b"")
    answer, _ = consort.parties[1].step("accept", server_says(consort, message))
    member = consort.parties[1].member
    for peer, key in member.pair_keys.items():
        assert (schedule.mask_key(key, attempt.tau) in answer) == (peer == 7)
        assert key not in answer


# --- unmasking --------------------------------------------------------------------------------------------


def acks_of(consort: Consort, attempt: SumRound) -> list[Signed]:
    return [attempt.views.acks[site] for site in attempt.inside]


@every_level
def test_unmasking_without_enough_signatures_is_refused(level: str) -> None:
    consort = sizes(level)
    attempt, _ = reach(consort, "unmask")
    party = consort.parties[1]
    acks = acks_of(consort, attempt)
    for count in (0, 1, QUORUM - 1):
        few = server_says(consort, AckRoll(attempt.tau, tuple(acks[:count])))
        refuses(party, "unmask", few, "quorum")
    party.step("unmask", server_says(consort, AckRoll(attempt.tau, tuple(acks[:QUORUM]))))


@every_level
def test_unmasking_with_signatures_on_another_set_is_refused(level: str) -> None:
    consort = sizes(level)
    attempt, _ = reach(consort, "unmask")
    root = schedule.accepted_root(attempt.accepted[:-1])
    others = tuple(site_says(consort, site, Ack(attempt.tau, root)) for site in range(1, 7))
    refuses(consort.parties[1], "unmask", server_says(consort, AckRoll(attempt.tau, others)), "quorum")
    mixed = (*acks_of(consort, attempt)[:4], others[4])
    refuses(consort.parties[1], "unmask", server_says(consort, AckRoll(attempt.tau, mixed)), "quorum")
    foreign = tuple(
        site_says(consort, site, Ack(bytes(32), schedule.accepted_root(attempt.accepted)))
        for site in range(1, 7)
    )
    refuses(consort.parties[1], "unmask", server_says(consort, AckRoll(attempt.tau, foreign)), "quorum")


@every_level
def test_unmasking_with_signatures_of_outsiders_duplicates_or_forged_ones_is_refused(level: str) -> None:
    consort = sizes(level)
    attempt, _ = reach(consort, "accept")
    inside = range(1, 6)
    message = Accepted(attempt.tau, entries_of(attempt, inside), left_out([6, 7]), b"")
    root = schedule.accepted_root(message.entries)
    for site in inside:
        consort.parties[site].step("accept", server_says(consort, message))
    acks = [site_says(consort, site, Ack(attempt.tau, root)) for site in range(1, 8)]
    party = consort.parties[1]
    stranger = identity.generate("stranger")
    forged = schedule.sign(consort.consortium, stranger, 5, Ack(attempt.tau, root))
    outsider = schedule.sign(consort.consortium, stranger, 8, Ack(attempt.tau, root))
    server = schedule.sign(consort.consortium, consort.server, 0, Ack(attempt.tau, root))
    for entries, rule in (
        ([*acks[:4], acks[5]], "quorum"),
        ([*acks[:4], acks[6]], "quorum"),
        ([*acks[:4], acks[3]], "quorum"),
        ([*acks[:3], acks[4], acks[3]], "quorum"),
        ([*acks[:4], outsider], "quorum"),
        ([server, *acks[:4]], "quorum"),
        ([*acks[:4], forged], "signature"),
        ([*acks[:4], dataclasses.replace(acks[3], sender=5)], "signature"),
    ):
        refuses(party, "unmask", server_says(consort, AckRoll(attempt.tau, tuple(entries))), rule)
    party.step("unmask", server_says(consort, AckRoll(attempt.tau, tuple(acks[:5]))))


@every_level
def test_no_round_is_unmasked_twice(level: str) -> None:
    consort = sizes(level)
    _, bodies = reach(consort, "unmask")
    party = consort.parties[1]
    party.step("unmask", bodies[1])
    refuses(party, "unmask", bodies[1], "phase")
    for number, again in ((1, 1), (1, 2), (1, 100)):
        rule = "answered" if level == "sum" else "sketched"
        refuses(party, "ready", consort.attempt(number, again).offer(), rule)
    refuses(party, "ready", consort.attempt(1, 2, model=bytes(32)).offer(), "model")
    party.begin(consort.attempt(2, 1).offer())


@every_level
def test_an_unmasking_gives_shares_of_the_accepted_only(level: str) -> None:
    consort = sizes(level)
    attempt, _ = reach(consort, "accept")
    accepted = Accepted(attempt.tau, entries_of(attempt, range(1, 7)), left_out([7]), b"")
    message = server_says(consort, accepted)
    for site in range(1, 7):
        attempt_ack = consort.parties[site].step("accept", message)[0]
        attempt.views.acks[site] = decode(attempt_ack, AckUpload).ack
    held = {item.peer: item.key for item in consort.parties[1].state.seed_shares}
    roll = server_says(consort, AckRoll(attempt.tau, tuple(attempt.views.acks[site] for site in range(1, 7))))
    answer, _ = consort.parties[1].step("unmask", roll)
    for site, share in held.items():
        assert (share in answer) == (site != 7)


def test_two_sets_of_threshold_signatures_share_an_honest_site() -> None:
    for num_sites in range(3, 256):
        threshold, colluding = threshold_for(num_sites), colluding_bound(num_sites)
        assert 2 * threshold - num_sites > colluding
        assert threshold <= num_sites
        assert threshold - colluding >= 2  # no coalition opens a sum of one


@pytest.mark.parametrize("num_sites", [4, 5, 6, 7, 9])
def test_two_accepted_sets_are_never_both_opened(num_sites: int) -> None:
    """The colluding sites sign everything; the honest ones are shown one set or the other."""
    colluding = tuple(range(1, colluding_bound(num_sites) + 1))
    upright = tuple(range(len(colluding) + 1, num_sites + 1))
    whole, without = range(1, num_sites + 1), [i for i in range(1, num_sites + 1) if i != num_sites]
    if len(without) < threshold_for(num_sites):
        without = list(whole)  # no drop-out is tolerated; the digests differ instead
    for size in range(len(upright) + 1):
        consort = gather(num_sites)
        attempt, _ = reach(consort, "accept")
        first = Accepted(attempt.tau, entries_of(attempt, whole), (), b"")
        second = Accepted(attempt.tau, entries_of(attempt, without), left_out(set(whole) - set(without)), b"")
        if without == list(whole):
            entries = (AcceptedEntry(1, bytes(32)), *first.entries[1:])
            second = Accepted(attempt.tau, entries, (), b"")
        opened_sets = 0
        for message, sites in ((first, upright[:size]), (second, upright[size:])):
            root = schedule.accepted_root(message.entries)
            inside = [entry.site for entry in message.entries]
            signed = {}
            for site in (*colluding, *sites):
                if site not in inside:
                    continue
                if site not in colluding:
                    consort.parties[site].step("accept", server_says(consort, message))
                signed[site] = site_says(consort, site, Ack(attempt.tau, root))
            roll = server_says(consort, AckRoll(attempt.tau, tuple(signed[i] for i in sorted(signed))))
            answers = 0
            for site in sites:
                if site in inside:
                    try:
                        consort.parties[site].step("unmask", roll)
                        answers += 1
                    except ProtocolError as error:
                        assert error.rule == "quorum"
            opened_sets += answers > 0
        assert opened_sets <= 1


# --- keys --------------------------------------------------------------------------------------------------


def enrolments_with(consort: Consort, site: int, keys: dict[int, bytes]) -> list[Signed]:
    """Return the enrolments, one of them with other keys and a true signature."""
    entries = list(consort.enrolments)
    message = Enrolment(tuple(PairPublic(peer, keys[peer]) for peer in sorted(keys)))
    entries[site - 1] = site_says(consort, site, message)
    return entries


def keys_of(consort: Consort, site: int) -> dict[int, bytes]:
    return {peer: key for (owner, peer), key in consort.publics.items() if owner == site}


def rule_of(consort: Consort, entries: list[Signed]) -> str:
    with pytest.raises(ProtocolError) as caught:
        schedule.read_enrolments(consort.consortium, entries)
    return caught.value.rule


def test_enrolments_that_the_roster_does_not_bear_out_are_refused() -> None:
    consort = gather(4)
    entries = list(consort.enrolments)
    stranger = identity.generate("stranger")
    forged = schedule.sign(consort.consortium, stranger, 2, decode(entries[1].body, Enrolment))
    assert rule_of(consort, [entries[0], forged, *entries[2:]]) == "signature"
    assert rule_of(consort, entries[:-1]) == "roster"
    assert rule_of(consort, [*entries, dataclasses.replace(entries[0], sender=5)]) == "roster"
    assert rule_of(consort, [entries[1], entries[0], *entries[2:]]) == "roster"
    assert rule_of(consort, [entries[0], entries[0], *entries[2:]]) == "roster"
    assert rule_of(consort, [dataclasses.replace(entries[1], sender=1), *entries[1:]]) == "signature"
    served = schedule.sign(consort.consortium, consort.server, 0, decode(entries[0].body, Enrolment))
    assert rule_of(consort, [served, *entries[1:]]) == "roster"


def test_enrolments_with_swapped_or_duplicate_keys_are_refused() -> None:
    consort = gather(4)
    keys = keys_of(consort, 2)
    swapped = site_says(consort, 2, Enrolment(tuple(PairPublic(p, keys[p]) for p in (3, 1, 4))))
    assert rule_of(consort, [consort.enrolments[0], swapped, *consort.enrolments[2:]]) == "pair-key"
    fewer = {peer: key for peer, key in keys.items() if peer != 4}
    assert rule_of(consort, enrolments_with(consort, 2, fewer)) == "pair-key"
    own = {**keys, 2: bytes(range(32))}
    assert rule_of(consort, enrolments_with(consort, 2, own)) == "pair-key"
    twice = {**keys, 3: keys[1]}
    assert rule_of(consort, enrolments_with(consort, 2, twice)) == "duplicate-key"
    stolen = {**keys, 3: consort.publics[1, 3]}
    assert rule_of(consort, enrolments_with(consort, 2, stolen)) == "duplicate-key"


LOW_ORDER = tuple(
    (value | high).to_bytes(32, "little")
    for value in (
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        2**255 - 20,
        2**255 - 19,
        2**255 - 18,
    )
    for high in (0, 1 << 255)
)
"""Every 32-byte string whose X25519 product is zero: RFC 7748 ignores the last bit."""


def test_the_list_of_low_order_points_is_right() -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    for public in LOW_ORDER:
        with pytest.raises(ValueError):
            X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))


@pytest.mark.parametrize("public", LOW_ORDER, ids=lambda key: key.hex()[:8] + key.hex()[-2:])
def test_no_mask_is_made_with_a_key_of_low_order(public: bytes) -> None:
    consort = gather(4)
    changed = enrolments_with(consort, 2, {**keys_of(consort, 2), 1: public})
    with pytest.raises(ProtocolError) as caught:
        publics = schedule.read_enrolments(consort.consortium, changed)
        member = consort.parties[1].member
        own = SiteMember(consort.consortium, 1, member.identity, member.secrets, publics)
        offer = consort.attempt().offer()
        begin(own, Marks(0, ()), offer, MODEL, consort.parties[1].vector)
    assert caught.value.rule == "pair-key"
    assert "number 2" in str(caught.value)


@pytest.mark.parametrize("public", LOW_ORDER, ids=lambda key: key.hex()[:8] + key.hex()[-2:])
def test_a_key_of_low_order_is_refused_at_enrolment(public: bytes) -> None:
    consort = gather(4)
    assert rule_of(consort, enrolments_with(consort, 2, {**keys_of(consort, 2), 1: public})) == "pair-key"


def test_a_duplicate_key_in_another_spelling_is_refused() -> None:
    consort = gather(4)
    keys = keys_of(consort, 2)
    same = keys[1][:31] + bytes([keys[1][31] | 0x80])
    assert rule_of(consort, enrolments_with(consort, 2, {**keys, 3: same})) == "pair-key"


# --- sessions ---------------------------------------------------------------------------------------------


@every_level
def test_an_old_offer_round_or_attempt_is_refused(level: str) -> None:
    consort = sizes(level)
    party = consort.parties[1]
    offers = {(r, a): consort.attempt(r, a).offer() for r in (1, 2, 3) for a in (1, 2, 3)}
    party.begin(offers[1, 1])
    refuses(party, "ready", offers[1, 1], "high-water")
    party.begin(offers[2, 2])
    for old in ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2)):
        refuses(party, "ready", offers[old], "high-water")
    party.begin(offers[2, 3])
    party.begin(consort.attempt(1, 1, "validate").offer())
    refuses(party, "ready", offers[2, 3], "high-water")
    party.begin(offers[3, 1])


@every_level
def test_a_session_outside_of_the_charter_is_refused(level: str) -> None:
    consort = gather(5, level, rounds=3, max_attempts=2)
    for number, attempt in ((0, 1), (4, 1), (1, 0), (1, 3), (2**32 - 1, 2**16 - 1)):
        refuses(consort.parties[1], "ready", consort.attempt(number, attempt).offer(), "session")
    consort.parties[1].begin(consort.attempt(3, 2).offer())


@every_level
def test_an_offer_that_is_not_the_servers_is_refused(level: str) -> None:
    consort = sizes(level)
    message = Offer(Session("train", 1, 1), MODEL)
    party = consort.parties[1]
    stranger = identity.generate("stranger")
    refuses(party, "ready", encode(schedule.sign(consort.consortium, stranger, 0, message)), "signature")
    refuses(party, "ready", encode(site_says(consort, 2, message)), "sender")
    other = gather(NUM_SITES, level)
    foreign = schedule.sign(other.consortium, consort.server, 0, message)
    refuses(party, "ready", encode(foreign), "signature")


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 2.0},
        {"level": "sketch"},
        {"weight_cap": 11},
        {"metric_caps": (17.0,)},
        {"rounds": 99},
        {"max_attempts": 99},
        {"smallest_cohort": 4},
        {"initial_weights": "2" * 64},
        {"job": "3" * 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_message_under_another_charter_does_not_count(changes: dict[str, Any]) -> None:
    consort = gather(5)
    agreed = consort.consortium
    charter = Charter.model_validate({**agreed.charter.model_dump(), **changes})
    other = Consortium(agreed.roster, charter)
    message = Offer(Session("train", 1, 1), MODEL)
    offer = encode(schedule.sign(other, consort.server, 0, message))
    refuses(consort.parties[1], "ready", offer, "signature")


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 3},
        {"threshold": 5},
        {"scale": scale_for(5) + 1},
        {"scale": scale_for(4)},
        {"noise_multiplier": 1.0},
        {"norm_slack": 2.0},
        {"rules": ("none",)},
        {"smallest_cohort": 2},
        {"smallest_cohort": 4, "smallest_cohort_waiver": False},
        {"smallest_cohort": 6},
        {"sites": (1, 2)},
        {"sites": (1, 2, 3, 3, 4)},
        {"clip_norm": 0.0},
        {"clip_norm": float("inf")},
        {"level": "none"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_charter_that_breaks_the_guarantees_is_refused_though_governance_signed_it(
    changes: dict[str, Any],
) -> None:
    consort = gather(5)
    governance = identity.generate("governance")
    roster = document_bytes(sign_document(consort.consortium.roster, governance))
    content = {**consort.consortium.charter.model_dump(), **changes}
    charter = document_bytes(sign_document(Charter.model_construct(**content), governance))
    with pytest.raises(FedvisionError):
        read_documents(Documents(roster, charter), governance.public)


def test_a_round_on_the_first_model_needs_the_model_of_the_charter() -> None:
    consort = sizes("sum")
    other = bytes(32)
    attempt = consort.attempt(1, 1, model=other)
    with pytest.raises(ProtocolError) as caught:
        consort.parties[1].begin(attempt.offer(), other)
    assert caught.value.rule == "model"


@every_level
def test_an_offer_of_another_model_than_the_site_has_is_refused(level: str) -> None:
    consort = sizes(level)
    for number in (1, 2):
        refuses(consort.parties[1], "ready", consort.attempt(number, 1, model=bytes(32)).offer(), "model")


@every_level
def test_a_site_with_another_model_shares_no_cohort_with_the_others(level: str) -> None:
    consort = sizes(level)
    attempt = consort.attempt(2)
    other = consort.attempt(2, model=bytes(32))
    for site, party in consort.parties.items():
        one = other if site == 1 else attempt
        one.add_ready(site, party.begin(one.offer(), bytes(32) if site == 1 else MODEL))
    mixed_ready = dict(sorted({**attempt.views.ready, **other.views.ready}.items()))
    mixed_boxes = {**attempt.views.boxes, **other.views.boxes}
    for one in (attempt, other):
        one.views.ready, one.views.boxes = mixed_ready, mixed_boxes
    bodies = attempt.weave()
    for site, party in consort.parties.items():
        refuses(party, "mask", bodies[site], "session")


# --- cohorts ----------------------------------------------------------------------------------------------


@every_level
def test_a_cohort_that_is_not_in_order_is_refused(level: str) -> None:
    consort = sizes(level)
    _, bodies = reach(consort, "mask")
    party = consort.parties[2]
    whole = opened(bodies[2], Cohort).entries
    ready = decode(whole[0].ready.body, Ready)
    stranger = identity.generate("stranger")

    def first(message: object = ready, key: Any = None, sender: int = 1, **changes: object) -> Any:
        signer = key or consort.parties[1].member.identity
        signed = schedule.sign(consort.consortium, signer, sender, message)
        return dataclasses.replace(whole[0], ready=signed, **changes)

    wrong_box = dataclasses.replace(whole[0].box, share_hash=bytes(32))
    for entries, rule in (
        (whole[:4], "smallest-cohort"),
        ((whole[0], *whole[2:]), "own-entry"),
        ((whole[0], whole[0], *whole[1:]), "roster"),
        (whole[::-1], "roster"),
        (
            (*whole, dataclasses.replace(whole[0], ready=dataclasses.replace(whole[0].ready, sender=8))),
            "roster",
        ),
        ((first(key=stranger), *whole[1:]), "signature"),
        ((first(dataclasses.replace(ready, session=Session("train", 1, 2))), *whole[1:]), "session"),
        ((first(dataclasses.replace(ready, session=Session("test", 1, 1))), *whole[1:]), "session"),
        ((first(dataclasses.replace(ready, model=bytes(32))), *whole[1:]), "session"),
        ((first(box=wrong_box), *whole[1:]), "box"),
        ((first(box=whole[2].box, path=whole[2].path), *whole[1:]), "box"),
        ((first(path=whole[0].path[:-1]), *whole[1:]), "box"),
    ):
        refuses(party, "mask", resay(consort, bodies[2], Cohort, entries=entries), rule)
    theirs = opened(bodies[3], Cohort).entries
    refuses(party, "mask", resay(consort, bodies[2], Cohort, entries=theirs), "box")
    refuses(party, "mask", resay(consort, bodies[2], Cohort, session=Session("train", 1, 2)), "session")


@every_level
def test_its_own_ready_message_changed_by_nobody_else_than_itself_is_refused(level: str) -> None:
    consort = sizes(level)
    _, bodies = reach(consort, "mask")
    party = consort.parties[1]
    whole = opened(bodies[1], Cohort).entries
    again = dataclasses.replace(decode(whole[0].ready.body, Ready), nonce=bytes(32))
    entries = (dataclasses.replace(whole[0], ready=party.member.sign(again)), *whole[1:])
    refuses(party, "mask", resay(consort, bodies[1], Cohort, entries=entries), "own-entry")


@every_level
def test_messages_of_an_earlier_attempt_or_round_are_refused(level: str) -> None:
    consort = sizes(level)
    earlier: dict[str, bytes] = {}
    first = consort.attempt(1, 1)
    for step in STEPS[level][1:-1]:
        bodies = play(consort, first, start=step if earlier else "ready", stop=step)
        if step != "mask":
            bodies = bodies or bodies_of(first, step)
        earlier[step] = bodies[1]
        play_one(consort, first, step, bodies)
    for number, again in ((1, 2), (2, 1)) if level == "sum" else ((2, 1),):
        later = consort.attempt(number, again)
        bodies = play(consort, later, stop="mask")
        for step in STEPS[level][1:-1]:
            if step != "mask":
                bodies = bodies_of(later, step)
            refuses(consort.parties[1], step, earlier[step], "session")
            play_one(consort, later, step, bodies)


def play_one(consort: Consort, attempt: SumRound, step: str, bodies: Any) -> None:
    """Do one step with everybody honest."""
    notes: list[tuple[int, str, str]] = []
    ask(consort, step, bodies, taker(attempt, step), honest, notes)
    assert notes == []


def split_masks(consort: Consort) -> tuple[SumRound, SumRound, dict[int, np.ndarray]]:
    """Show the cohort of all seven to sites 1 to 4 and that of the first six to 5 to 7."""
    attempt, bodies = reach(consort, "mask")
    other = consort.attempt()
    entries = {site: opened(bodies[site], Cohort).entries for site in bodies}
    other.views.ready = {site: attempt.views.ready[site] for site in range(2, 8)}
    other.views.boxes = {site: attempt.views.boxes[site] for site in range(2, 8)}
    smaller = other.weave()
    masked = {}
    for site in entries:
        one, body = (attempt, bodies[site]) if site <= 4 else (other, smaller[site])
        answer, masked[site] = consort.parties[site].step("mask", body)
        one.add_masked(site, answer, masked[site])
    return attempt, other, masked


@every_level
def test_cohorts_shown_differently_give_noise_instead_of_a_sum(level: str) -> None:
    consort = gather(NUM_SITES, level, size=2000)
    attempt, other, masked = split_masks(consort)
    assert attempt.tau != other.tau
    total = np.zeros(consort.parties[1].vector.size, np.uint32)
    for site, vector in masked.items():
        total += vector
        tau = (attempt if site <= 4 else other).tau
        add_masks(total, [schedule.self_key(consort.parties[site].state.seed, tau)], [-1])
    truth = true_sum(consort, consort.parties).view(np.int32).astype(float)
    noise = total.view(np.int32).astype(float)
    assert abs(np.corrcoef(truth, noise)[0, 1]) < 0.12
    assert np.std(noise) > 0.9 * 2**32 / 12**0.5


@every_sketch
def test_cohorts_shown_differently_are_noticed_in_the_roll_of_masked_inputs(level: str) -> None:
    consort = sizes(level)
    attempt, other, _ = split_masks(consort)
    both = {**attempt.views.masked, **other.views.masked}
    roll = server_says(consort, MaskedRoll(attempt.tau, tuple(both[site] for site in sorted(both))))
    refuses(consort.parties[1], "beacon", roll, "session")
    few = server_says(consort, MaskedRoll(attempt.tau, tuple(attempt.views.masked.values())))
    refuses(consort.parties[1], "beacon", few, "smallest-cohort")
    refuses(consort.parties[5], "beacon", few, "session")


def test_cohorts_shown_differently_are_never_unmasked_at_level_sum() -> None:
    consort = sizes("sum")
    attempt, other, _ = split_masks(consort)
    acks: dict[int, list[Signed]] = {0: [], 1: []}
    for site, party in consort.parties.items():
        one = attempt if site <= 4 else other
        digests = {**attempt.views.digests, **other.views.digests}
        entries = tuple(AcceptedEntry(i, digests[i]) for i in sorted(one.views.ready))
        answer, _ = party.step("accept", server_says(consort, Accepted(one.tau, entries, (), b"")))
        acks[site > 4].append(decode(answer, AckUpload).ack)
    for site, party in consort.parties.items():
        one = attempt if site <= 4 else other
        for entries in (acks[0], acks[1], acks[0] + acks[1]):
            refuses(party, "unmask", server_says(consort, AckRoll(one.tau, tuple(entries))), "quorum")


# --- rolls, beacons, shares ------------------------------------------------------------------------------


@every_sketch
def test_a_roll_of_masked_inputs_that_is_not_in_order_is_refused(level: str) -> None:
    consort = sizes(level)
    attempt, bodies = reach(consort, "beacon")
    party = consort.parties[1]
    whole = opened(bodies[1], MaskedRoll).entries
    own = site_says(consort, 1, Masked(attempt.tau, bytes(32)))
    stranger = schedule.sign(
        consort.consortium, identity.generate("stranger"), 2, Masked(attempt.tau, bytes(32))
    )
    for entries, rule in (
        (whole[:4], "smallest-cohort"),
        (whole[1:], "own-entry"),
        ((own, *whole[1:]), "own-entry"),
        (whole[::-1], "roster"),
        ((whole[0], *whole), "roster"),
        ((whole[0], stranger, *whole[2:]), "signature"),
    ):
        refuses(party, "beacon", resay(consort, bodies[1], MaskedRoll, entries=entries), rule)


@every_sketch
def test_a_roll_of_beacons_with_changed_numbers_is_refused(level: str) -> None:
    consort = sizes(level)
    attempt, bodies = reach(consort, "sketch")
    party = consort.parties[1]
    whole = opened(bodies[1], BeaconRoll).entries
    number = decode(whole[1].body, Beacon).number
    changed = site_says(consort, 2, Beacon(attempt.tau, attempt.root, bytes(32)))
    other_root = site_says(consort, 2, Beacon(attempt.tau, bytes(32), number))
    other_tau = site_says(consort, 2, Beacon(bytes(32), attempt.root, number))
    body = bytearray(whole[1].body)
    body[-1] ^= 1
    tampered = dataclasses.replace(whole[1], body=bytes(body))
    own = site_says(consort, 1, Beacon(attempt.tau, attempt.root, bytes(32)))
    for entries, rule in (
        ((whole[0], changed, *whole[2:]), "beacon"),
        ((whole[0], other_root, *whole[2:]), "beacon"),
        ((whole[0], other_tau, *whole[2:]), "session"),
        ((whole[0], tampered, *whole[2:]), "signature"),
        ((own, *whole[1:]), "beacon"),
        (whole[1:], "own-entry"),
        (whole[:4], "smallest-cohort"),
        (whole[::-1], "roster"),
    ):
        refuses(party, "sketch", resay(consort, bodies[1], BeaconRoll, entries=entries), rule)


@every_sketch
def test_rolls_shown_differently_are_noticed_in_the_beacons(level: str) -> None:
    consort = sizes(level)
    attempt, bodies = reach(consort, "beacon")
    whole = opened(bodies[1], MaskedRoll).entries
    fewer = resay(consort, bodies[1], MaskedRoll, entries=whole[:-1])
    answers = {}
    for site in range(1, 7):
        answers[site] = decode(
            consort.parties[site].step("beacon", fewer if site < 4 else bodies[site])[0], Signed
        )
    roll = server_says(consort, BeaconRoll(attempt.tau, tuple(answers.values())))
    for site in range(1, 7):
        refuses(consort.parties[site], "sketch", roll, "beacon")


def test_a_roll_for_sketches_is_refused_where_the_charter_says_sum() -> None:
    consort = sizes("sum")
    attempt, _ = reach(consort, "accept")
    roll = server_says(consort, MaskedRoll(attempt.tau, tuple(attempt.views.masked.values())))
    refuses(consort.parties[1], "beacon", roll, "phase")


@every_sketch
def test_no_sketch_is_made_of_statistics(level: str) -> None:
    consort = sizes(level)
    attempt = consort.attempt(purpose="validate")
    play(consort, attempt, stop="accept")
    roll = server_says(consort, MaskedRoll(attempt.tau, tuple(attempt.views.masked.values())))
    refuses(consort.parties[1], "beacon", roll, "phase")


def test_shares_that_their_dealer_did_not_sign_are_refused() -> None:
    consort = sizes("gram")
    _, bodies = reach(consort, "hold")
    party = consort.parties[1]
    whole = opened(bodies[1], Holding).entries
    theirs = opened(bodies[2], Holding).entries
    other = decode(whole[1].sketch.body, Sketch)
    another_map = site_says(consort, 2, dataclasses.replace(other, beta=bytes(32)))
    another_sum = site_says(consort, 2, dataclasses.replace(other, tau=bytes(32)))

    def second(**changes: object) -> tuple[Any, ...]:
        return (whole[0], dataclasses.replace(whole[1], **changes), *whole[2:])

    for entries, rule in (
        (second(share=dataclasses.replace(whole[1].share, share_hash=bytes(32))), "box"),
        (second(share=theirs[1].share, path=theirs[1].path), "box"),
        (second(path=()), "box"),
        (second(sketch=another_map), "box"),
        (second(sketch=another_sum), "session"),
        (whole[1:], "own-entry"),
        (whole[:4], "smallest-cohort"),
        (whole[::-1], "roster"),
    ):
        refuses(party, "hold", resay(consort, bodies[1], Holding, entries=entries), rule)


# --- disputes ---------------------------------------------------------------------------------------------


def disputed(level: str) -> tuple[Consort, SumRound]:
    """Return an honest round that was unmasked."""
    consort = sizes(level)
    attempt, bodies = reach(consort, "unmask")
    play_one(consort, attempt, "unmask", bodies)
    return consort, attempt


@every_level
def test_a_dispute_before_the_shares_have_left_is_refused(level: str) -> None:
    for stop in STEPS[level][1:]:
        if level == "gram" and stop in ("hold", "accept", "unmask"):
            continue  # products may contradict each other
        consort = sizes(level)
        attempt, _ = reach(consort, stop)
        message = server_says(consort, Dispute(attempt.tau or bytes(32), attempt.beta or bytes(32)))
        refuses(consort.parties[1], "dispute", message, "phase")


def test_a_dispute_about_a_sum_without_sketches_is_refused() -> None:
    consort, attempt = disputed("sum")
    message = server_says(consort, Dispute(attempt.tau, bytes(32)))
    refuses(consort.parties[1], "dispute", message, "phase")


@every_sketch
def test_a_dispute_about_another_session_or_map_and_a_second_one_are_refused(level: str) -> None:
    consort, attempt = disputed(level)
    party = consort.parties[1]
    for tau, beta in ((bytes(32), attempt.beta), (attempt.tau, bytes(32))):
        refuses(party, "dispute", server_says(consort, Dispute(tau, beta)), "session")
    message = server_says(consort, Dispute(attempt.tau, attempt.beta))
    party.step("dispute", message)
    refuses(party, "dispute", message, "phase")


@every_sketch
def test_no_key_is_opened_without_a_disagreement(level: str) -> None:
    consort, attempt = disputed(level)
    message = server_says(consort, Dispute(attempt.tau, attempt.beta))
    reports = {}
    first = consort.parties[1]
    refuses(first, "open", server_says(consort, OpenPair(attempt.tau, attempt.views.ready[2])), "phase")
    for site, party in consort.parties.items():
        reports[site] = decode(party.step("dispute", message)[0], Signed)
    for peer in range(2, 8):
        asked = server_says(consort, OpenPair(attempt.tau, reports[peer]))
        refuses(first, "open", asked, "no-dispute")
    theirs = decode(reports[2].body, Report)
    stranger = identity.generate("stranger")
    others = tuple(item for item in theirs.pairs if item.site != 1)
    for signed, rule in (
        (reports[1], "roster"),
        (site_says(consort, 2, dataclasses.replace(theirs, tau=bytes(32))), "session"),
        (site_says(consort, 2, dataclasses.replace(theirs, beta=bytes(32))), "session"),
        (site_says(consort, 2, dataclasses.replace(theirs, pairs=others)), "roster"),
        (schedule.sign(consort.consortium, stranger, 2, theirs), "signature"),
        (schedule.sign(consort.consortium, consort.server, 0, theirs), "sender"),
        (dataclasses.replace(reports[2], sender=3), "signature"),
    ):
        refuses(first, "open", server_says(consort, OpenPair(attempt.tau, signed)), rule)
    refuses(first, "open", server_says(consort, OpenPair(bytes(32), reports[2])), "session")


@pytest.mark.parametrize("stop", ["hold", "accept", "unmask", ""])
def test_at_level_gram_a_site_opens_m_sketches_in_a_job_and_no_more(stop: str) -> None:
    consort = sizes("gram")
    most = consort.consortium.charter.max_colluding
    for number in range(1, most + 3):
        attempt = consort.attempt(number)
        play(consort, attempt, stop=stop)
        message = server_says(consort, Dispute(attempt.tau, attempt.beta))
        if number <= most:
            consort.parties[1].step("dispute", message)
        else:
            refuses(consort.parties[1], "dispute", message, "openings")


@every_sketch
def test_an_input_is_sketched_once(level: str) -> None:
    consort = sizes(level)
    _, bodies = reach(consort, "sketch")
    party = consort.parties[1]
    party.step("sketch", bodies[1])
    for again in (1, 2, 3):
        refuses(party, "ready", consort.attempt(1, again).offer(), "sketched")
    party.begin(consort.attempt(2, 1).offer())
