"""Broken, replayed, reordered and forged messages at both ends: refused, with nothing changed or told."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.errors import FedvisionError, MessageError, ProtocolError
from fedvision.secagg import identity, schedule
from fedvision.secagg.attempt import AttemptError, Disputed
from fedvision.secagg.codec import AtMost, Fixed, Unsigned, decode, encode, kind_of
from fedvision.secagg.dispute import Trial
from fedvision.secagg.messages import AckUpload, ReadyUpload, Signed, SketchUpload
from fedvision.secagg.server import SumRound
from tests.secagg_parties import Consort, Party, Vector, gather, true_sum
from tests.secagg_stages import LEVELS, STEPS, bodies_of, play, taker

NUM_SITES = 5
ALLOWED = (ProtocolError, MessageError, AttemptError, Disputed)


class Secrets:
    """Everything that no error text may hold, at all honest ends."""

    def __init__(self, consort: Consort) -> None:
        self._consort = consort

    def all(self) -> list[bytes]:
        found: list[bytes] = []
        for party in self._consort.parties.values():
            member, state = party.member, party.state
            found += [member.identity.private.private_bytes_raw(), *member.secrets.values()]
            found += [*member.pair_keys.values(), party.vector[:4].tobytes()]
            if state is not None:
                found += [state.seed, state.nonce, state.beacon, state.own_share, state.deal_seed]
                found += [item.key for item in state.seed_shares]
                if state.tau:
                    found += [schedule.self_key(state.seed, state.tau)]
                    found += [schedule.mask_key(pair, state.tau) for pair in member.pair_keys.values()]
        return [secret for secret in found if secret]

    def check(self, error: BaseException) -> None:
        """Search an error and what it came from for secrets, as bytes, in hexadecimal and as numbers."""
        while error is not None:
            texts = [str(error), repr(error), getattr(error, "hint", "")]
            for secret in self.all():
                forms = (repr(secret)[2:-1], secret.hex(), secret.hex(" "), str(list(secret))[1:-1])
                forms += (str(int.from_bytes(secret, "big")), str(int.from_bytes(secret, "little")))
                assert not any(form in text for form in forms for text in texts)
            error = typing.cast(BaseException, error.__cause__ or error.__context__)


def freeze(attempt: SumRound) -> tuple[Any, ...]:
    """Return everything in an attempt that its result depends on."""
    views = {
        field.name: {key: repr_of(value) for key, value in getattr(attempt.views, field.name).items()}
        for field in dataclasses.fields(attempt.views)
    }
    masked = {site: attempt.masked_input(site).tobytes() for site in attempt.views.masked}
    return (views, masked, attempt.accepted, dict(attempt.excluded), list(attempt.evidence))


def repr_of(value: Any) -> Any:
    return value.tobytes() if isinstance(value, np.ndarray) else value


# --- changes of bytes -------------------------------------------------------------------------------------


def broken(rng: np.random.Generator, data: bytes, others: list[bytes]) -> bytes:
    """Return other bytes than ``data``: a bit changed, cut, longer, huge, or another message altogether."""
    how = int(rng.integers(7))
    at = int(rng.integers(len(data)))
    if how == 0:
        return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    if how == 1:
        return data[:at]
    if how == 2:
        return data + rng.bytes(int(rng.integers(1, 40)))
    if how == 3:
        return data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]
    if how == 4:
        return rng.bytes(int(rng.integers(0, 200)))
    if how == 5:
        return data[:4] + rng.bytes(100_000)
    different = [other for other in others if other != data]
    return different[int(rng.integers(len(different)))] if different else b""


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_broken_bytes_change_nothing_at_either_end(level: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    consort = gather(NUM_SITES, level, size=12)
    secrets, seen = Secrets(consort), [b"", b"FV"]
    for number in (1, 2):
        attempt = consort.attempt(number)
        for step in STEPS[level]:
            bodies = (
                dict.fromkeys(consort.parties, attempt.offer())
                if step == "ready"
                else bodies_of(attempt, step)
            )
            seen += list(bodies.values())
            for site, body in bodies.items():
                party, take = consort.parties[site], taker(attempt, step)
                refused_by_site(party, step, broken(rng, body, seen), secrets)
                answer, masked = do(party, step, body)
                vectors = [masked] if step == "mask" else []
                refused_by_server(attempt, take, site, broken(rng, answer, seen), vectors, secrets)
                wrong_sender = int(rng.choice([i for i in (*consort.parties, 0, 9) if i != site]))
                refused_by_server(attempt, take, wrong_sender, answer, vectors, secrets)
                if step == "mask":
                    for other in (masked[:-1], masked.astype(np.uint64), masked ^ np.uint32(1), masked[None]):
                        refused_by_server(attempt, take, site, answer, [other], secrets)
                take(site, answer, *vectors)
                seen.append(answer)
        outcome = attempt.finish()
        assert outcome.fits
        assert np.array_equal(outcome.total, true_sum(consort, consort.parties))


def do(party: Party, step: str, body: bytes) -> tuple[bytes, Vector]:
    return (party.begin(body), np.zeros(0, np.uint32)) if step == "ready" else party.step(step, body)


def refused_by_site(party: Party, step: str, body: bytes, secrets: Secrets) -> None:
    before = (party.marks, party.state)
    with pytest.raises((ProtocolError, MessageError)) as caught:
        do(party, step, body)
    secrets.check(caught.value)
    assert (party.marks, party.state) == before


def refused_by_server(
    attempt: SumRound,
    take: Callable[..., None],
    site: int,
    answer: bytes,
    vectors: list[Vector],
    secrets: Secrets,
) -> None:
    before = freeze(attempt)
    with pytest.raises((ProtocolError, MessageError)) as caught:
        take(site, answer, *vectors)
    secrets.check(caught.value)
    assert freeze(attempt) == before


@pytest.mark.parametrize("level", LEVELS)
def test_an_answer_that_comes_twice_or_late_changes_nothing(level: str) -> None:
    consort = gather(NUM_SITES, level, size=12)
    attempt, secrets = consort.attempt(), Secrets(consort)
    sent: list[tuple[str, int, bytes, list[Vector]]] = []
    for step in STEPS[level]:
        bodies = (
            dict.fromkeys(consort.parties, attempt.offer()) if step == "ready" else bodies_of(attempt, step)
        )
        for earlier, site, answer, vectors in sent:
            if earlier == "ready":
                continue  # see the test below
            refused_by_server(attempt, taker(attempt, earlier), site, answer, vectors, secrets)
        for site, body in bodies.items():
            answer, masked = do(consort.parties[site], step, body)
            vectors = [masked] if step == "mask" else []
            taker(attempt, step)(site, answer, *vectors)
            sent.append((step, site, answer, vectors))
    assert np.array_equal(attempt.finish().total, true_sum(consort, consort.parties))


@pytest.mark.parametrize("what", ["ready", "masked"])
def test_a_late_ready_message_or_masked_input_is_refused(what: str) -> None:
    consort = gather(NUM_SITES, "sum", size=12)
    attempt, secrets = consort.attempt(), Secrets(consort)
    if what == "ready":
        play(consort, attempt, stop="accept")
        other = consort.parties[2]
        again = other.begin(consort.attempt(1, 2).offer())
        upload = decode(again, ReadyUpload)
        ready = decode(upload.ready.body, type(decode_any(upload.ready)))
        signed = other.member.sign(dataclasses.replace(ready, session=attempt.session))
        refused_by_server(
            attempt, attempt.add_ready, 2, encode(ReadyUpload(signed, upload.boxes)), [], secrets
        )
        return
    bodies = play(consort, attempt, stop="mask")
    late, masked = consort.parties[5].step("mask", bodies[5])
    for site in range(1, 5):
        answer, vector = consort.parties[site].step("mask", bodies[site])
        attempt.add_masked(site, answer, vector)
    attempt.accept()
    refused_by_server(attempt, attempt.add_masked, 5, late, [masked], secrets)


@pytest.mark.parametrize("level", LEVELS)
def test_an_answer_of_an_earlier_round_is_refused_by_the_server_and_convicts_nobody(level: str) -> None:
    consort = gather(NUM_SITES, level, size=12)
    earlier: dict[tuple[str, int], tuple[bytes, Vector]] = {}

    def note(site: int, step: str, answer: bytes, masked: Vector) -> tuple[bytes, Vector]:
        earlier[step, site] = (answer, masked)
        return answer, masked

    play(consort, consort.attempt(1), lie=note)
    attempt = consort.attempt(2)
    for step in STEPS[level]:
        play(consort, attempt, start="ready" if step == "ready" else step, stop=step)
        for site in consort.parties:
            answer, masked = earlier[step, site]
            with pytest.raises(ProtocolError) as caught:
                taker(attempt, step)(site, answer, *([masked] if step == "mask" else []))
            assert caught.value.rule == "session", step
        play_one(consort, attempt, step)
    assert attempt.evidence == []
    assert np.array_equal(attempt.finish().total, true_sum(consort, consort.parties))


def play_one(consort: Consort, attempt: SumRound, step: str) -> None:
    """Do one step with everybody honest."""
    bodies = dict.fromkeys(consort.parties, attempt.offer()) if step == "ready" else bodies_of(attempt, step)
    for site, body in bodies.items():
        answer, masked = do(consort.parties[site], step, body)
        taker(attempt, step)(site, answer, *([masked] if step == "mask" else []))


# --- changes of fields, with true signatures --------------------------------------------------------------


def bend(rng: np.random.Generator, value: Any, hint: Any) -> Any:
    """Return another value of a field's declared type; a message bends in one field."""
    bare, rule = hint, None
    if typing.get_origin(hint) is typing.Annotated:
        bare, rule = typing.get_args(hint)[:2]
    if isinstance(rule, Unsigned):
        limit = 256**rule.width
        return int(rng.choice([0, 1, limit - 1, (value + 1) % limit, int(rng.integers(limit))]))
    if isinstance(rule, Fixed):
        return bytes(rule.length) if rng.random() < 0.3 else rng.bytes(rule.length)
    if typing.get_origin(bare) is typing.Literal:
        return typing.get_args(bare)[int(rng.integers(len(typing.get_args(bare))))]
    if isinstance(rule, AtMost) and bare is bytes:
        length = int(rng.choice([0, 1, max(0, len(value) - 1), len(value), min(rule.limit, len(value) + 8)]))
        return rng.bytes(length)
    if isinstance(rule, AtMost):
        items, inner = list(value), typing.get_args(bare)[0]
        how = int(rng.integers(5))
        if not items or how == 0:
            return ()
        at = int(rng.integers(len(items)))
        if how == 1:
            del items[at]
        elif how == 2:
            items.insert(at, items[int(rng.integers(len(items)))])
        elif how == 3:
            items = [items[i] for i in rng.permutation(len(items))]
        else:
            items[at] = bend(rng, items[at], inner)
        return tuple(items)
    hints = typing.get_type_hints(bare, include_extras=True)
    field = dataclasses.fields(bare)[int(rng.integers(len(dataclasses.fields(bare))))].name
    return dataclasses.replace(value, **{field: bend(rng, getattr(value, field), hints[field])})


def decode_any(signed: Signed) -> Any:
    """Return the message inside, whatever it is."""
    kind = kind_of(signed.body)
    assert kind is not None
    return decode(signed.body, kind)


def bent_by_server(rng: np.random.Generator, consort: Consort, body: bytes) -> bytes:
    """Return the server's message, bent in one field, with the server's true signature."""
    message = decode_any(decode(body, Signed))
    other = bend(rng, message, type(message))
    return encode(schedule.sign(consort.consortium, consort.server, 0, other))


def bent_by_site(rng: np.random.Generator, consort: Consort, site: int, answer: bytes) -> bytes:
    """Return a site's answer, bent in one field and signed again by the site, wherever a signature stands."""
    member = consort.parties[site].member
    kind = kind_of(answer)
    assert kind is not None
    outer = decode(answer, kind)
    if isinstance(outer, Signed):
        message = decode_any(outer)
        return encode(member.sign(bend(rng, message, type(message))))
    fields = [name for name, value in vars(outer).items() if isinstance(value, Signed)]
    if rng.random() < 0.5 or isinstance(outer, AckUpload):
        name = fields[int(rng.integers(len(fields)))]
        message = decode_any(getattr(outer, name))
        return encode(dataclasses.replace(outer, **{name: member.sign(bend(rng, message, type(message)))}))
    assert isinstance(outer, ReadyUpload | SketchUpload)
    return encode(bend(rng, outer, type(outer)))


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_a_lying_server_signs_is_refused_or_harmless(level: str, seed: int) -> None:
    """A site raises nothing but refusals, and an honest server goes on with it when it refused."""
    rng = np.random.default_rng(seed)
    consort = gather(NUM_SITES, level, size=12)
    secrets, attempt = Secrets(consort), consort.attempt()
    for step in STEPS[level]:
        bodies = (
            dict.fromkeys(consort.parties, attempt.offer()) if step == "ready" else bodies_of(attempt, step)
        )
        for site, body in bodies.items():
            party = consort.parties[site]
            before = (party.marks, party.state)
            for _ in range(4):
                other = bent_by_server(rng, consort, body)
                try:
                    do(party, step, other)
                except ALLOWED as error:
                    secrets.check(error)
                    assert (party.marks, party.state) == before
                else:
                    assert party.state is not None
                    assert party.marks.step > before[0].step
                    party.marks, party.state = before
            answer, masked = do(party, step, body)
            taker(attempt, step)(site, answer, *([masked] if step == "mask" else []))
    assert np.array_equal(attempt.finish().total, true_sum(consort, consort.parties))


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_a_lying_site_signs_neither_stops_the_server_nor_changes_the_others_sum(
    level: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    consort = gather(NUM_SITES, level, size=12)
    secrets, attempt = Secrets(consort), consort.attempt()
    liar = int(rng.integers(1, NUM_SITES + 1))
    lied_at = STEPS[level][int(rng.integers(len(STEPS[level])))]
    gone = int(rng.integers(1, NUM_SITES + 1)) if rng.random() < 0.3 else 0

    def lie(site: int, step: str, answer: bytes, masked: Vector) -> tuple[bytes, Vector] | None:
        if site == gone != liar and step == "mask":
            return None
        if site != liar or step not in (lied_at, "dispute", "open"):
            return answer, masked
        if step == "mask" and rng.random() < 0.3:
            masked = [masked[:-1], masked[:0], masked ^ np.uint32(1)][int(rng.integers(3))]
        return bent_by_site(rng, consort, site, answer), masked

    try:
        play(consort, attempt, lie=lie)
        outcome = attempt.finish()
    except AttemptError as error:
        secrets.check(error)
        assert {item.site for item in error.evidence} <= {liar}
        return
    except Disputed:
        outcome = None
    if outcome is not None and outcome.fits:
        rest = outcome.total - true_sum(consort, [site for site in attempt.inside if site != liar])
        if liar not in attempt.inside:
            assert not rest.any()
        elif level != "sum":
            bound = 1.2 * consort.consortium.encoding.norm_bound
            assert np.linalg.norm(rest.view(np.int32).astype(float)) <= bound
    if outcome is None or not outcome.fits:
        trial = Trial(attempt, outcome)
        for site in trial.sites:
            sent = lie(site, "dispute", *consort.parties[site].step("dispute", trial.request()))
            assert sent is not None
            try:
                trial.add_report(site, sent[0])
            except ALLOWED as error:
                secrets.check(error)
        for one, two in trial.disputed_pairs():
            for site, peer in ((one, two), (two, one)):
                try:
                    answer, _ = consort.parties[site].step("open", trial.open_request(site, peer))
                    sent = lie(site, "open", answer, np.zeros(0, np.uint32))
                    assert sent is not None
                    trial.add_opening(site, peer, sent[0])
                except ALLOWED as error:
                    secrets.check(error)
        assert {item.site for item in trial.verdict()} == {liar}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_enrolments_are_refused_or_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    consort = gather(4)
    entries = list(consort.enrolments)
    liar = int(rng.integers(4))
    message = decode_any(entries[liar])
    how = int(rng.integers(3))
    if how == 0:
        entries[liar] = consort.parties[liar + 1].member.sign(bend(rng, message, type(message)))
    elif how == 1:
        stranger = identity.generate("stranger")
        entries[liar] = schedule.sign(consort.consortium, stranger, liar + 1, message)
    else:
        entries = [entries[i] for i in rng.permutation(4)][: int(rng.integers(2, 5))]
    try:
        publics = schedule.read_enrolments(consort.consortium, entries)
    except (ProtocolError, MessageError):
        return
    assert len(set(publics.values())) == 12
    assert set(publics) == set(consort.publics)


def test_a_wrong_member_in_an_error_is_a_number_only() -> None:
    """The texts of all rules name sites by number and sessions by round; the types say nothing more."""
    consort = gather(4)
    party = consort.parties[1]
    with pytest.raises(FedvisionError) as caught:
        party.begin(consort.attempt(1, 1, model=bytes(32)).offer())
    assert bytes(32).hex() not in str(caught.value)
