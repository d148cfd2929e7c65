"""Sites that lie: exactly the liars are named, an honest site never, and lying gains nothing."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.errors import ProtocolError
from fedvision.secagg import schedule, shamir
from fedvision.secagg.attempt import AttemptError, MaskedSum
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.dispute import Trial
from fedvision.secagg.member import box_leaf, input_bytes, seed_hash, vector_digest
from fedvision.secagg.merkle import merkle_root
from fedvision.secagg.messages import (
    AckUpload,
    Beacon,
    Box,
    Complaint,
    Evidence,
    Masked,
    MaskKey,
    Opening,
    PairSketch,
    Products,
    Ready,
    ReadyUpload,
    Report,
    Reveal,
    SeedShare,
    Signed,
    Sketch,
    SketchUpload,
    Unmask,
)
from fedvision.secagg.server import SumRound
from fedvision.secagg.site_state import pairs
from fedvision.secagg.sketch import sketch, sketches_of_masks, squared_norm
from tests.secagg_parties import Consort, Lie, Vector, gather, resign, true_sum, try_liars
from tests.secagg_stages import named, play, reach

NUM_SITES = 7
LIAR = 3
NORM_SLACK = 1.16
Sent = tuple[bytes, Vector] | None
LieAt = Callable[[int, bytes, Vector], Sent]

over_levels = pytest.mark.parametrize("level", ["sketch", "gram"])


def lying(lies: Mapping[int, Mapping[str, LieAt]]) -> Lie:
    """Return a lie made of one function for each liar and step."""

    def lie(site: int, step: str, answer: bytes, masked: Vector) -> Sent:
        found = lies.get(site, {}).get(step)
        return found(site, answer, masked) if found else (answer, masked)

    return lie


def silent(site: int, answer: bytes, masked: Vector) -> Sent:
    """Send nothing."""
    return None


def integers(values: Vector) -> np.ndarray:
    """Return words as signed numbers, float64."""
    return values.view(np.int32).astype(np.float64)


def words(values: np.ndarray) -> Vector:
    """Return whole numbers modulo 2**32."""
    return (np.rint(values).astype(np.int64) % 2**32).astype(np.uint32)


class Liars:
    """What each kind of lie sends, with the liar's true signature."""

    def __init__(self, consort: Consort) -> None:
        self.consort = consort

    def shifted_input(self, shift: Vector) -> LieAt:
        """Mask another input than the one that is sketched later."""

        def at(site: int, answer: bytes, masked: Vector) -> Sent:
            if masked.size == 0:  # the liar complains about another liar
                return answer, masked
            sent, party = masked + shift, self.consort.parties[site]
            digest = vector_digest(sent)
            assert party.state is not None
            party.state = dataclasses.replace(party.state, masked=pairs({site: digest}))
            return resign(self.consort, site, answer, Masked, digest=digest), sent

        return at

    def sketch(self, change: Callable[[Vector], Vector]) -> LieAt:
        """Sketch something else, in the clear."""

        def at(site: int, answer: bytes, masked: Vector) -> Sent:
            upload = decode(answer, SketchUpload)
            values = np.frombuffer(decode(upload.sketch.body, Sketch).values, "<u4").astype(np.uint32)
            again = resign(
                self.consort, site, encode(upload.sketch), Sketch, values=input_bytes(change(values))
            )
            return encode(SketchUpload(decode(again, Signed), ())), masked

        return at

    def message(self, kind: type, change: Callable[[Any], dict[str, Any]]) -> LieAt:
        """Change fields of a signed message."""

        def at(site: int, answer: bytes, masked: Vector) -> Sent:
            found = decode(decode(answer, Signed).body, kind)
            return resign(self.consort, site, answer, kind, **change(found)), masked

        return at

    def report(self, change: Callable[[Report], dict[str, Any]]) -> LieAt:
        """Change the report about one's masks."""
        return self.message(Report, change)

    def reveal(self, change: Callable[[Reveal], dict[str, Any]]) -> LieAt:
        """Change the mask keys that come with an ack."""

        def at(site: int, answer: bytes, masked: Vector) -> Sent:
            upload = decode(answer, AckUpload)
            found = decode(upload.reveal.body, Reveal)
            again = resign(self.consort, site, encode(upload.reveal), Reveal, **change(found))
            return encode(AckUpload(upload.ack, decode(again, Signed))), masked

        return at

    def boxes(self, change: Callable[[dict[int, Box]], dict[int, Box]], **changes: Any) -> LieAt:
        """Change the sealed shares, and sign them as they are."""

        def at(site: int, answer: bytes, masked: Vector) -> Sent:
            upload = decode(answer, ReadyUpload)
            boxes = tuple(change({box.receiver: box for box in upload.boxes}).values())
            root = merkle_root([box_leaf(box) for box in boxes])
            again = resign(self.consort, site, encode(upload.ready), Ready, boxes_root=root, **changes)
            return encode(ReadyUpload(decode(again, Signed), boxes)), masked

        return at

    def complaint(self, accused: int, secret: bytes | None = None) -> LieAt:
        """Complain about a box that is sound."""

        def at(site: int, answer: bytes, masked: Vector) -> Sent:
            party = self.consort.parties[site]
            assert party.state is not None
            key = party.member.secrets[accused] if secret is None else secret
            message = Complaint(party.state.session, accused, key)
            return encode(party.member.sign(message)), np.zeros(0, np.uint32)

        return at


def small_shift(consort: Consort) -> Vector:
    """Return a shift that stays within the norm bound."""
    size = next(iter(consort.parties.values())).vector.size
    return words(np.random.default_rng(5).normal(size=size) * 2**16)


def verdict(
    consort: Consort, lies: Mapping[int, Mapping[str, LieAt]]
) -> tuple[dict[int, str], MaskedSum | None, SumRound]:
    attempt = consort.attempt()
    found, outcome = named(consort, attempt, lying(lies))
    return found, outcome, attempt


# --- what is sent instead of the input --------------------------------------------------------------------


@over_levels
@pytest.mark.parametrize("factor", [1.6, 2.0, 100.0])
def test_a_norm_over_the_bound_is_left_out_with_evidence_and_the_others_add_up(
    level: str, factor: float
) -> None:
    consort = gather(NUM_SITES, level)
    bound = consort.consortium.encoding.norm_bound
    vector = integers(consort.parties[LIAR].vector)
    consort.parties[LIAR].vector = words(vector / np.linalg.norm(vector) * bound * factor)
    found, outcome, attempt = verdict(consort, {})
    assert found == {LIAR: "norm"}
    assert attempt.excluded == {LIAR: "norm above the bound"}
    assert outcome is not None
    assert outcome.fits
    assert np.array_equal(outcome.total, true_sum(consort, set(consort.parties) - {LIAR}))


@over_levels
def test_a_norm_a_little_over_the_bound_is_left_out_and_nobody_is_convicted(level: str) -> None:
    """A sketch may be wrong by that much about a vector with two large coordinates."""
    consort = gather(NUM_SITES, level)
    bound = consort.consortium.encoding.norm_bound
    vector = integers(consort.parties[LIAR].vector)
    consort.parties[LIAR].vector = words(vector / np.linalg.norm(vector) * bound * 1.25)
    found, outcome, attempt = verdict(consort, {})
    assert found == {}
    assert attempt.excluded == {LIAR: "norm above the bound"}
    assert outcome is not None
    assert np.array_equal(outcome.total, true_sum(consort, set(consort.parties) - {LIAR}))


@over_levels
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_entries_near_half_of_the_ring_are_found(level: str, count: int) -> None:
    consort = gather(NUM_SITES, level)
    consort.parties[LIAR].vector[:count] += np.uint32(1 << 31)
    found, outcome, _ = verdict(consort, {})
    assert found == {LIAR: "norm"}
    assert outcome is not None
    assert np.array_equal(outcome.total, true_sum(consort, set(consort.parties) - {LIAR}))


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.999, 1.001, 2.0])
def test_an_under_or_over_reported_sketch_is_found(factor: float) -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    consort.parties[LIAR].vector = words(integers(consort.parties[LIAR].vector) / 4)
    lie = tell.sketch(lambda values: words(integers(values) * factor))
    found, outcome, _ = verdict(consort, {LIAR: {"sketch": lie}})
    assert outcome is not None
    assert not outcome.fits
    assert found == {LIAR: "sketch"}


def test_a_masked_input_beyond_the_bound_with_a_small_sketch_is_found() -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    shift = np.zeros(consort.parties[LIAR].vector.size, np.uint32)
    shift[4] = 1 << 31
    found, outcome, _ = verdict(consort, {LIAR: {"mask": tell.shifted_input(shift)}})
    assert outcome is not None
    assert not outcome.fits
    assert found == {LIAR: "row"}


def test_two_entries_of_half_the_ring_in_two_sites_cancel_and_add_nothing() -> None:
    """Each is found by its norm; with false sketches they are accepted, and their sum is what is sketched."""
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    shift = np.zeros(consort.parties[1].vector.size, np.uint32)
    shift[7] = 1 << 31
    lies = {site: {"mask": tell.shifted_input(shift)} for site in (2, 5)}
    found, outcome, _ = verdict(consort, lies)
    assert found == {}
    assert outcome is not None
    assert outcome.fits
    assert np.array_equal(outcome.total, true_sum(consort, consort.parties))


# --- coalitions --------------------------------------------------------------------------------------------


def test_a_coalition_that_redistributes_is_accepted_and_stays_within_its_joint_bound() -> None:
    consort = gather(NUM_SITES, "sketch", size=3000)
    bound = consort.consortium.encoding.norm_bound
    tell = Liars(consort)
    rng = np.random.default_rng(0)
    moved = words(rng.normal(size=2048) * bound / 100)
    lies = {
        2: {"sketch": tell.sketch(lambda values: values + moved)},
        6: {"sketch": tell.sketch(lambda values: values - moved)},
    }
    for site in lies:
        consort.parties[site].vector = words(integers(consort.parties[site].vector) * 0.5)
    found, outcome, attempt = verdict(consort, lies)
    assert found == {}
    assert outcome is not None
    assert outcome.fits
    joint = outcome.total - true_sum(consort, set(consort.parties) - set(lies))
    claimed = sum(np.sqrt(squared_norm(attempt.views.values[site])) for site in lies)
    assert claimed <= 2 * bound * NORM_SLACK**0.5
    assert np.linalg.norm(integers(joint)) <= 1.1 * claimed


def test_a_coalition_that_moves_more_than_its_bound_is_left_out_by_norm() -> None:
    consort = gather(NUM_SITES, "sketch", size=3000)
    tell = Liars(consort)
    bound = consort.consortium.encoding.norm_bound
    moved = words(np.random.default_rng(0).normal(size=2048) * bound / 10)
    lies = {
        2: {"sketch": tell.sketch(lambda values: values + moved)},
        6: {"sketch": tell.sketch(lambda values: values - moved)},
    }
    found, outcome, _ = verdict(consort, lies)
    assert found == {2: "norm", 6: "norm"}
    assert outcome is not None
    assert np.array_equal(outcome.total, true_sum(consort, set(consort.parties) - set(lies)))


def pair_change(peer: int, change: Vector) -> Callable[[Report], dict[str, Any]]:
    """Return a change of the sketch of one pair's mask."""

    def changed(found: Report) -> dict[str, Any]:
        pairs = tuple(
            PairSketch(item.site, input_bytes(np.frombuffer(item.values, "<u4").astype(np.uint32) + change))
            if item.site == peer
            else item
            for item in found.pairs
        )
        return {"pairs": pairs}

    return changed


def fix_row(consort: Consort, attempt: SumRound, site: int, peer: int, sent: Vector) -> Vector:
    """Return what a liar adds to its claim about one pair so that its row adds up to the sketch it sent."""
    party = consort.parties[site]
    assert party.state is not None
    keys, signs = party.member.mask_keys([i for i in attempt.cohort if i != site], attempt.tau)
    row = sketch(attempt.masked_input(site), attempt.beta, attempt.apart)
    row -= sketches_of_masks(
        [schedule.self_key(party.state.seed, attempt.tau)], attempt.length, attempt.beta, attempt.apart
    )[0]
    for key, sign in zip(keys, signs, strict=True):
        mask = sketches_of_masks([key], attempt.length, attempt.beta, attempt.apart)[0]
        row = row - mask if sign > 0 else row + mask
    missing = row - sent
    return missing if schedule.pair_sign(site, peer) > 0 else np.uint32(0) - missing


def dispute_with(
    lies_before: Mapping[int, Mapping[str, LieAt]],
    lies_after: Callable[[Consort, SumRound], Mapping[int, Mapping[str, LieAt]]],
    consort: Consort,
) -> dict[int, str]:
    """Run a round with lies that make its sum wrong, then the dispute with others; return who is named."""
    attempt = consort.attempt()
    play(consort, attempt, lie=lying(lies_before))
    outcome = attempt.finish()
    assert not outcome.fits
    return try_liars(consort, attempt, outcome, lying(lies_after(consort, attempt)))


@pytest.mark.parametrize("second_moves", [False, True])
def test_two_that_lie_about_their_common_pair_are_not_both_saved(second_moves: bool) -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    before = {LIAR: {"mask": tell.shifted_input(small_shift(consort))}}

    def after(consort: Consort, attempt: SumRound) -> Mapping[int, Mapping[str, LieAt]]:
        tell = Liars(consort)
        sent = attempt.views.values
        change = fix_row(consort, attempt, LIAR, 5, sent[LIAR])
        lies: dict[int, dict[str, LieAt]] = {
            LIAR: {"dispute": tell.report(pair_change(5, change))},
            5: {"dispute": tell.report(pair_change(LIAR, change))},
        }
        if second_moves:  # the other liar moves the contradiction on to an honest site

            def moved(found: Report) -> dict[str, Any]:
                first = dataclasses.replace(found, **pair_change(LIAR, change)(found))
                onward = change if schedule.pair_sign(5, LIAR) < 0 else np.uint32(0) - change
                return pair_change(1, onward if schedule.pair_sign(5, 1) > 0 else -onward)(first)

            lies[5] = {"dispute": tell.report(moved)}
        return lies

    found = dispute_with(before, after, consort)
    assert set(found) == {5}
    assert found[5] in ("row", "pair")


@pytest.mark.parametrize("honest_opens_only", [False, True])
def test_a_row_that_is_mended_with_an_honest_sites_pair_is_found_by_opening_the_key(
    honest_opens_only: bool,
) -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    before = {LIAR: {"mask": tell.shifted_input(small_shift(consort))}}

    def after(consort: Consort, attempt: SumRound) -> Mapping[int, Mapping[str, LieAt]]:
        change = fix_row(consort, attempt, LIAR, 1, attempt.views.values[LIAR])
        lies: dict[str, LieAt] = {"dispute": Liars(consort).report(pair_change(1, change))}
        if honest_opens_only:
            lies["open"] = silent
        return {LIAR: lies}

    assert dispute_with(before, after, consort) == {LIAR: "pair"}


@pytest.mark.parametrize("peer", [1, 6])
@pytest.mark.parametrize("changes", [{"secret": bytes(range(32))}, {"peer": 2}, {"tau": bytes(32)}])
def test_a_false_opening_frames_nobody(peer: int, changes: dict[str, Any]) -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    attempt = consort.attempt()
    play(consort, attempt, lie=lying({LIAR: {"mask": tell.shifted_input(small_shift(consort))}}))
    trial = Trial(attempt, attempt.finish())
    mend = tell.report(pair_change(peer, fix_row(consort, attempt, LIAR, peer, attempt.views.values[LIAR])))
    for site in trial.sites:
        answer, masked = consort.parties[site].step("dispute", trial.request())
        sent = mend(site, answer, masked) if site == LIAR else (answer, masked)
        assert sent is not None
        trial.add_report(site, sent[0])
    assert trial.disputed_pairs() == [(min(LIAR, peer), max(LIAR, peer))]
    member = consort.parties[LIAR].member
    true = Opening(attempt.tau, peer, member.secrets[peer])
    with pytest.raises(ProtocolError) as caught:
        trial.add_opening(LIAR, peer, encode(member.sign(dataclasses.replace(true, **changes))))
    assert caught.value.rule in ("pair-key", "session")
    opened, _ = consort.parties[peer].step("open", trial.open_request(peer, LIAR))
    with pytest.raises(ProtocolError):
        trial.add_opening(LIAR, peer, opened)  # what another site opened
    trial.add_opening(peer, LIAR, opened)
    assert {item.site: item.rule for item in trial.verdict()} == {LIAR: "pair"}
    trial.add_opening(LIAR, peer, encode(member.sign(true)))
    assert {item.site: item.rule for item in trial.verdict()} == {LIAR: "pair"}


def test_two_liars_who_contradict_each_other_and_open_nothing_are_both_out() -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    before = {LIAR: {"mask": tell.shifted_input(small_shift(consort))}}

    def after(consort: Consort, attempt: SumRound) -> Mapping[int, Mapping[str, LieAt]]:
        change = fix_row(consort, attempt, LIAR, 5, attempt.views.values[LIAR])
        tell = Liars(consort)
        return {LIAR: {"dispute": tell.report(pair_change(5, change)), "open": silent}, 5: {"open": silent}}

    assert dispute_with(before, after, consort) == {LIAR: "not opened", 5: "not opened"}


def test_an_honest_site_that_loses_its_report_is_not_named_beside_a_proven_liar() -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    before = {LIAR: {"mask": tell.shifted_input(small_shift(consort))}}
    found = dispute_with(before, lambda consort, attempt: {1: {"dispute": silent}}, consort)
    assert found == {LIAR: "row"}


def test_a_liar_who_keeps_silent_in_the_dispute_is_named() -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    before = {LIAR: {"mask": tell.shifted_input(small_shift(consort))}}
    found = dispute_with(before, lambda consort, attempt: {LIAR: {"dispute": silent}}, consort)
    assert found == {LIAR: "silent"}


def test_lying_pair_sketches_beside_another_liar_are_both_named() -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    before = {LIAR: {"mask": tell.shifted_input(small_shift(consort))}}
    ones = np.ones(2048, np.uint32)

    def after(consort: Consort, attempt: SumRound) -> Mapping[int, Mapping[str, LieAt]]:
        return {6: {"dispute": Liars(consort).report(pair_change(1, ones))}}

    found = dispute_with(before, after, consort)
    assert found[LIAR] == "row"
    assert set(found) == {LIAR, 6}


# --- mask keys of those left out --------------------------------------------------------------------------


def with_a_drop_out(lies: dict[int, dict[str, LieAt]]) -> dict[int, dict[str, LieAt]]:
    return {7: {"mask": silent}, **lies}


def false_key(found: Reveal) -> dict[str, Any]:
    return {"keys": (MaskKey(found.keys[0].site, bytes(range(32))), *found.keys[1:])}


def test_a_wrong_mask_key_is_found_in_the_dispute() -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    found, outcome, _ = verdict(consort, with_a_drop_out({LIAR: {"accept": tell.reveal(false_key)}}))
    assert outcome is not None
    assert not outcome.fits
    assert found == {LIAR: "mask-key"}


def test_a_wrong_mask_key_with_a_fitting_report_is_found_in_the_row() -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    before = with_a_drop_out({LIAR: {"accept": tell.reveal(false_key)}})

    def after(consort: Consort, attempt: SumRound) -> Mapping[int, Mapping[str, LieAt]]:
        values = sketches_of_masks([bytes(range(32))], attempt.length, attempt.beta, attempt.apart)[0]

        def fitting(found: Report) -> dict[str, Any]:
            pairs = tuple(
                PairSketch(7, input_bytes(values)) if item.site == 7 else item for item in found.pairs
            )
            return {"pairs": pairs}

        return {LIAR: {"dispute": Liars(consort).report(fitting)}}

    assert dispute_with(before, after, consort) == {LIAR: "row"}


def test_mask_keys_for_other_sites_than_those_left_out_are_no_ack() -> None:
    consort = gather(8, "sketch")
    tell = Liars(consort)
    refused: list[tuple[int, str, str]] = []
    attempt = consort.attempt()
    lies = {
        2: {"accept": tell.reveal(lambda found: {"keys": ()})},
        LIAR: {"accept": tell.reveal(lambda found: {"keys": (*found.keys, MaskKey(8, bytes(32)))})},
        8: {"mask": silent},
    }
    with pytest.raises(AttemptError, match="inputs may be added"):
        play(consort, attempt, lie=lying(lies), refused=refused)
    assert {(2, "accept", "server: accepted-set"), (LIAR, "accept", "server: accepted-set")} <= set(refused)


def test_a_mask_key_that_is_the_liars_own_self_key_does_not_stop_the_server() -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)

    def own_key(found: Reveal) -> dict[str, Any]:
        state = consort.parties[LIAR].state
        assert state is not None
        return {"keys": (MaskKey(7, schedule.self_key(state.seed, found.tau)),)}

    found, _, _ = verdict(consort, with_a_drop_out({LIAR: {"accept": tell.reveal(own_key)}}))
    assert set(found) == {LIAR}


@over_levels
def test_one_mask_key_for_two_sites_left_out_does_not_stop_the_server(level: str) -> None:
    consort = gather(9, level)
    tell = Liars(consort)
    same = tell.reveal(lambda found: {"keys": tuple(MaskKey(k.site, bytes(32)) for k in found.keys)})
    found, _, _ = verdict(consort, {8: {"mask": silent}, 9: {"mask": silent}, LIAR: {"accept": same}})
    assert set(found) == {LIAR}


def test_two_sites_with_one_seed_do_not_stop_the_server() -> None:
    consort = gather(NUM_SITES, "sum")
    seed = bytes(range(32))
    lies: dict[int, dict[str, LieAt]] = {}
    for site in (2, 5):
        lies[site] = {"ready": deal_seed(consort, seed), "mask": other_self_mask(consort, seed)}
    _, outcome, _ = verdict(consort, lies)
    assert outcome is not None


def deal_seed(consort: Consort, seed: bytes, shares: dict[int, bytes] | None = None) -> LieAt:
    """Deal shares of a chosen seed, sealed and committed as they should be."""
    charter = consort.consortium.charter

    def at(site: int, answer: bytes, masked: Vector) -> Sent:
        member = consort.parties[site].member
        dealt = shares or shamir.split(seed, charter.threshold, charter.sites)
        ready = decode(decode(answer, ReadyUpload).ready.body, Ready)
        context = schedule.session_bytes(ready.session)
        boxes = {}
        for peer, share in dealt.items():
            sealed = b""
            if peer != site:
                pair = member.pair_keys[peer]
                sealed = schedule.seal(pair, "share", context, ready.nonce, site, peer, share)
            boxes[peer] = Box(peer, schedule.share_hash(site, peer, share), sealed)
        party = consort.parties[site]
        made = Liars(consort).boxes(lambda _: boxes, seed_hash=seed_hash(seed))(site, answer, masked)
        assert made is not None
        assert party.state is not None
        signed = decode(made[0], ReadyUpload).ready
        party.state = dataclasses.replace(party.state, ready=signed, seed=seed, own_share=dealt[site])
        return made

    return at


def other_self_mask(consort: Consort, seed: bytes) -> LieAt:
    """Nothing to do: the state already holds the chosen seed."""
    return lambda site, answer, masked: (answer, masked)


# --- boxes, seeds and shares ------------------------------------------------------------------------------


def garbage(receiver: int, **changes: Any) -> Callable[[dict[int, Box]], dict[int, Box]]:
    def change(boxes: dict[int, Box]) -> dict[int, Box]:
        return {**boxes, receiver: dataclasses.replace(boxes[receiver], **changes)}

    return change


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
@pytest.mark.parametrize(
    "changes",
    [{"sealed": bytes(48)}, {"sealed": b""}, {"sealed": bytes(17)}, {"share_hash": bytes(32)}],
    ids=["ciphertext", "nothing", "short", "hash"],
)
def test_a_garbage_share_convicts_its_dealer(level: str, changes: dict[str, bytes]) -> None:
    consort = gather(NUM_SITES, level)
    tell = Liars(consort)
    attempt = consort.attempt()
    lie = lying({LIAR: {"ready": with_state(consort, tell.boxes(garbage(5, **changes)))}})
    with pytest.raises(AttemptError) as caught:
        play(consort, attempt, lie=lie)
    assert [(item.site, item.rule) for item in caught.value.evidence] == [(LIAR, "box")]


def with_state(consort: Consort, lie: LieAt) -> LieAt:
    """Keep the forged ready message as the liar's own, so that the liar itself goes on."""

    def at(site: int, answer: bytes, masked: Vector) -> Sent:
        made = lie(site, answer, masked)
        party = consort.parties[site]
        assert made is not None
        assert party.state is not None
        party.state = dataclasses.replace(party.state, ready=decode(made[0], ReadyUpload).ready)
        return made

    return at


def test_the_next_attempt_without_the_dealer_is_exact() -> None:
    consort = gather(NUM_SITES, "sum")
    tell = Liars(consort)
    lie = lying({LIAR: {"ready": with_state(consort, tell.boxes(garbage(5, sealed=bytes(48))))}})
    with pytest.raises(AttemptError):
        play(consort, consort.attempt(), lie=lie)
    again = consort.attempt(attempt=2)
    others = sorted(set(consort.parties) - {LIAR})
    play(consort, again, sites=others)
    assert np.array_equal(again.finish().total, true_sum(consort, others))


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
@pytest.mark.parametrize(
    "secret", [None, bytes(range(32)), bytes(32)], ids=["true key", "false key", "zeros"]
)
def test_a_complaint_about_a_sound_box_convicts_the_complainer(level: str, secret: bytes | None) -> None:
    consort = gather(NUM_SITES, level)
    attempt = consort.attempt()
    with pytest.raises(AttemptError) as caught:
        play(consort, attempt, lie=lying({LIAR: {"mask": Liars(consort).complaint(1, secret)}}))
    assert [(item.site, item.rule) for item in caught.value.evidence] == [(LIAR, "box")]


def test_a_complaint_about_another_session_or_nobody_is_refused_and_convicts_nobody() -> None:
    consort = gather(NUM_SITES, "sum")
    attempt, _ = reach(consort, "mask")
    party = consort.parties[LIAR]
    assert party.state is not None
    nothing = np.zeros(0, np.uint32)
    for session, accused in (
        (dataclasses.replace(party.state.session, attempt=2), 1),
        (party.state.session, LIAR),
        (party.state.session, 8),
        (party.state.session, 0),
    ):
        message = Complaint(session, accused, party.member.secrets[1])
        with pytest.raises(ProtocolError) as caught:
            attempt.add_masked(LIAR, encode(party.member.sign(message)), nothing)
        assert caught.value.rule == "session"
    stranger = encode(consort.parties[2].member.sign(Complaint(party.state.session, 1, bytes(32))))
    with pytest.raises(ProtocolError) as caught:
        attempt.add_masked(LIAR, stranger, nothing)
    assert caught.value.rule == "sender"
    assert attempt.evidence == []


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
def test_a_garbage_share_at_unmasking_is_evidence_and_the_sum_is_exact(level: str) -> None:
    consort = gather(NUM_SITES, level)
    tell = Liars(consort)
    lie = tell.message(Unmask, lambda found: {"shares": (SeedShare(1, bytes(32)), *found.shares[1:])})
    found, outcome, _ = verdict(consort, {LIAR: {"unmask": lie}})
    assert found == {LIAR: "share"}
    assert outcome is not None
    assert outcome.fits
    assert np.array_equal(outcome.total, true_sum(consort, consort.parties))


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
def test_shares_that_are_not_of_the_committed_seed_convict_their_dealer(level: str) -> None:
    consort = gather(NUM_SITES, level)
    charter = consort.consortium.charter
    other = shamir.split(bytes(range(32)), charter.threshold, charter.sites)
    attempt = consort.attempt()
    lie = deal_seed(consort, bytes(range(1, 33)), other)
    with pytest.raises(AttemptError) as caught:
        play(consort, attempt, lie=lying({LIAR: {"ready": lie}}))
        attempt.finish()
    assert [(item.site, item.rule) for item in caught.value.evidence] == [(LIAR, "seed")]


def test_shares_that_lie_on_no_polynomial_convict_their_dealer_or_change_nothing() -> None:
    consort = gather(NUM_SITES, "sum")
    charter = consort.consortium.charter
    seed = bytes(range(1, 33))
    for wrong in charter.sites:
        shares = shamir.split(seed, charter.threshold, charter.sites)
        shares[wrong] = bytes(32)
        attempt = consort.attempt(number=wrong)
        try:
            play(consort, attempt, lie=lying({LIAR: {"ready": deal_seed(consort, seed, shares)}}))
            outcome = attempt.finish()
        except AttemptError as error:
            assert [(item.site, item.rule) for item in error.evidence] == [(LIAR, "seed")]
        else:
            assert np.array_equal(outcome.total, true_sum(consort, consort.parties))


# --- beacons and silence ----------------------------------------------------------------------------------


@over_levels
@pytest.mark.parametrize("how", ["late", "false"])
def test_a_beacon_number_that_is_late_or_false_leaves_its_site_out(level: str, how: str) -> None:
    consort = gather(NUM_SITES, level)
    tell = Liars(consort)
    late = silent if how == "late" else tell.message(Beacon, lambda found: {"number": bytes(32)})
    found, outcome, attempt = verdict(consort, {LIAR: {"beacon": late}})
    assert found == {}
    assert attempt.excluded == {LIAR: "no beacon"}
    assert outcome is not None
    assert outcome.fits
    assert np.array_equal(outcome.total, true_sum(consort, set(consort.parties) - {LIAR}))
    number = consort.parties[LIAR].state
    assert number is not None
    with pytest.raises(ProtocolError) as caught:
        attempt.add_sketch(LIAR, b"")
    assert caught.value.rule == "phase"


def test_products_of_other_dealings_are_no_products() -> None:
    consort = gather(NUM_SITES, "gram")
    lie = Liars(consort).message(Products, lambda found: {"basis": bytes(32)})
    refused: list[tuple[int, str, str]] = []
    attempt = consort.attempt()
    play(consort, attempt, lie=lying({LIAR: {"hold": lie}}), refused=refused)
    assert refused == [(LIAR, "hold", "server: session")]
    outcome = attempt.finish()
    assert outcome.fits
    assert attempt.evidence == []
    assert np.array_equal(outcome.total, true_sum(consort, attempt.inside))


# --- whatever liars do ------------------------------------------------------------------------------------


def random_lies(consort: Consort, rng: np.random.Generator, liars: list[int]) -> dict[int, dict[str, LieAt]]:
    """Return a few lies for each liar, of every kind there is."""
    tell = Liars(consort)
    size = consort.parties[1].vector.size
    bound = consort.consortium.encoding.norm_bound
    charter = consort.consortium.charter

    def noise(count: int) -> Vector:
        scale = float(rng.choice([1.0, bound / 1000, bound, 2.0**31]))
        return words(np.clip(rng.normal(size=count) * scale, -(2.0**31), 2.0**31 - 1))

    def one_of(options: list[LieAt]) -> LieAt:
        return options[int(rng.integers(len(options)))]

    lies: dict[int, dict[str, LieAt]] = {}
    for site in liars:
        peer = int(rng.choice([i for i in charter.sites if i != site]))
        shift, moved, pair = noise(size), noise(2048), noise(2048)
        shares = shamir.split(rng.bytes(32), charter.threshold, charter.sites)
        options: dict[str, list[LieAt]] = {
            "ready": [
                with_state(consort, tell.boxes(garbage(peer, sealed=rng.bytes(48)))),
                deal_seed(consort, rng.bytes(32), shares),
                silent,
            ],
            "mask": [
                tell.shifted_input(shift),
                tell.shifted_input(shift),
                tell.complaint(peer),
                tell.complaint(peer, rng.bytes(32)),
                silent,
            ],
            "beacon": [tell.message(Beacon, lambda found: {"number": bytes(32)}), silent],
            "sketch": [tell.sketch(lambda values, moved=moved: values + moved), silent],  # type: ignore[misc]
            "accept": [
                tell.reveal(
                    lambda found: {"keys": tuple(MaskKey(k.site, rng.bytes(32)) for k in found.keys)}
                ),
                silent,
            ],
            "unmask": [
                tell.message(
                    Unmask,
                    lambda found: {"shares": (SeedShare(found.shares[0].site, bytes(32)), *found.shares[1:])},
                ),
                silent,
            ],
            "dispute": [
                tell.report(pair_change(peer, pair)),
                tell.report(lambda found, moved=moved: {"own": input_bytes(moved)}),  # type: ignore[misc]
                silent,
            ],
            "open": [tell.message(Opening, lambda found: {"secret": rng.bytes(32)}), silent],
        }
        chance = float(rng.choice([0.15, 0.4]))
        lies[site] = {step: one_of(ways) for step, ways in options.items() if rng.random() < chance}
    return lies


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_liars_do_only_liars_are_named_and_honest_inputs_add_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    consort = gather(NUM_SITES, "sketch")
    who = sorted(int(i) for i in rng.choice(range(1, NUM_SITES + 1), size=rng.integers(1, 3), replace=False))
    lies = random_lies(consort, rng, who)
    attempt = consort.attempt()
    try:
        found, outcome = named(consort, attempt, lying(lies))
    except AttemptError as error:
        assert {item.site for item in error.evidence} <= set(who)
        assert error.evidence
        return
    assert set(found) <= set(who), (found, lies)
    assert outcome is not None
    if not outcome.fits:
        assert found
        return
    upright = [site for site in attempt.inside if site not in who]
    assert set(upright) == set(consort.parties) - set(who)
    inside = [site for site in attempt.inside if site in who]
    joint = integers(outcome.total - true_sum(consort, upright))
    bound = consort.consortium.encoding.norm_bound * NORM_SLACK**0.5
    assert np.linalg.norm(joint) <= 1.15 * bound * len(inside)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["sum", "gram"]))
def test_whatever_liars_do_at_other_levels_only_liars_are_named(seed: int, level: str) -> None:
    rng = np.random.default_rng(seed)
    consort = gather(NUM_SITES, level)
    who = sorted(int(i) for i in rng.choice(range(1, NUM_SITES + 1), size=rng.integers(1, 3), replace=False))
    lies = random_lies(consort, rng, who)
    for chosen in lies.values():
        chosen.pop("sketch", None)  # a dealing cannot be changed by adding to it
    attempt = consort.attempt()
    try:
        found, outcome = named(consort, attempt, lying(lies))
    except AttemptError as error:
        assert {item.site for item in error.evidence} <= set(who)
        return
    assert set(found) <= set(who), (found, lies)
    if outcome is not None and not outcome.fits:
        assert found


# --- what lies do to the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["sum", "sketch", "gram"])
@pytest.mark.parametrize("left", [1, 1000, 10**6])
def test_a_negative_weight_does_not_blow_up_the_mean_update(level: str, left: int) -> None:
    """Six small sites, and a liar well inside of the norm bound who makes their weights almost vanish."""
    consort = gather(NUM_SITES, level)
    encoding = consort.consortium.encoding
    update = np.zeros(encoding.size, np.float32)
    for site in range(1, NUM_SITES):
        update[site] = 1.0
        consort.parties[site].vector = encoding.encode(
            update / np.linalg.norm(update), 1, [1.0], bytes([site] * 32)
        )
    tails = [integers(consort.parties[site].vector)[-2:] for site in range(1, NUM_SITES)]
    vector = np.zeros(encoding.length)
    vector[-2:] = -np.sum(tails, axis=0)
    vector[-1] += left
    assert np.linalg.norm(vector) < 0.5 * encoding.norm_bound
    consort.parties[NUM_SITES].vector = words(vector)
    found, outcome, _ = verdict(consort, {})
    assert found == {}
    assert outcome is not None
    decoded = encoding.decode(outcome.total)
    assert np.linalg.norm(decoded.mean_update) <= encoding.clip_norm * (1 + 1e-6)


def test_no_evidence_names_more_than_its_author() -> None:
    consort = gather(NUM_SITES, "sketch")
    tell = Liars(consort)
    attempt = consort.attempt()
    lie = lying({LIAR: {"mask": tell.shifted_input(small_shift(consort))}})
    play(consort, attempt, lie=lie)
    outcome = attempt.finish()
    trial = Trial(attempt, outcome)
    for site in attempt.inside:
        trial.add_report(site, consort.parties[site].step("dispute", trial.request())[0])
    (proof,) = trial.verdict()
    assert isinstance(proof, Evidence)
    assert proof.site == LIAR
    for signed in proof.messages:
        assert signed.sender == LIAR
        schedule.read_signed(consort.consortium, signed, type(decode_any(signed)))


def decode_any(signed: Signed) -> Any:
    from fedvision.secagg.codec import kind_of

    kind = kind_of(signed.body)
    assert kind is not None
    return decode(signed.body, kind)
