"""No mask is used twice, and what the server and its accomplices see leaves every honest input open."""

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.errors import MessageError, ProtocolError
from fedvision.secagg import schedule
from fedvision.secagg import site as steps
from fedvision.secagg.attempt import AttemptError
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.messages import (
    Accepted,
    AcceptedEntry,
    Ack,
    AckRoll,
    AckUpload,
    Masked,
    Reveal,
    Signed,
    Unmask,
)
from fedvision.secagg.roster import colluding_bound, threshold_for
from fedvision.secagg.server import SumRound
from fedvision.secagg.site_state import Marks, SiteSession
from fedvision.secagg.sketch import BUCKETS, ROWS, TABLES, _signed_maps
from tests.secagg_parties import Consort, Party, Vector, ask, gather, run
from tests.secagg_stages import LEVELS, STEPS, bodies_of, left_out, opened, server_says, site_says, taker

# --- every key once --------------------------------------------------------------------------------------


class Watch:
    """Notes what every key masks or encrypts. It looks on; nothing is changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks: dict[bytes, set[tuple[bytes, int]]] = {}
        self.seals: dict[bytes, list[bytes]] = {}
        self.derived: dict[bytes, set[tuple[bytes, ...]]] = {}
        add_masks, seal, expand = steps.add_masks, schedule.seal, schedule.expand

        def watch_masks(
            vector: Vector, keys: Sequence[bytes], signs: Sequence[int], threads: int = 1
        ) -> None:
            add_masks(vector, keys, signs, threads)
            for key, sign in zip(keys, signs, strict=True):
                self.masks.setdefault(key, set()).add((vector.tobytes(), sign))

        def watch_seal(
            pair: bytes, what: str, context: bytes, nonce: bytes, dealer: int, receiver: int, text: bytes
        ) -> bytes:
            key = schedule._seal_key(pair, what, context, nonce, dealer, receiver)
            self.seals.setdefault(key, []).append(text)
            return seal(pair, what, context, nonce, dealer, receiver, text)

        def watch_expand(key: bytes, label: str, *parts: bytes) -> bytes:
            found = expand(key, label, *parts)
            self.derived.setdefault(found, set()).add((key, label.encode(), *parts))
            return found

        monkeypatch.setattr(steps, "add_masks", watch_masks)
        monkeypatch.setattr(schedule, "seal", watch_seal)
        monkeypatch.setattr(schedule, "expand", watch_expand)

    def check(self) -> None:
        """Check that a key masks one vector at each of its two ends, and encrypts one text."""
        for uses in self.masks.values():
            assert len(uses) == len({sign for _, sign in uses}) <= 2
        for texts in self.seals.values():
            assert len(texts) == 1
        for origins in self.derived.values():
            assert len(origins) == 1
        assert not self.masks.keys() & self.seals.keys()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def restart(party: Party) -> None:
    """Read back what was stored."""
    party.marks = decode(encode(party.marks), Marks)
    if party.state is not None:
        party.state = decode(encode(party.state), SiteSession)


@pytest.mark.parametrize("level", LEVELS)
def test_no_key_comes_again_over_rounds_attempts_purposes_and_restarts(level: str, watch: Watch) -> None:
    consort = gather(5, level)
    rng = np.random.default_rng(1)
    for number in (1, 2, 3):
        for attempt in (1, 2):
            for purpose in ("train", "validate", "test"):
                one = consort.attempt(number, attempt, purpose)  # type: ignore[arg-type]
                if attempt == 1:
                    for party in consort.parties.values():
                        party.vector = rng.integers(0, 2**20, party.vector.size).astype(np.uint32)
                early = STEPS[one.level][2 : 4 if one.level == "sum" else 3]  # before a sketch has left
                stop = "" if attempt == 2 else early[int(rng.integers(len(early)))]
                play_and_restart(consort, one, stop)
    watch.check()
    masked_by = [key for key, uses in watch.masks.items() if len(uses) == 2]
    assert len(masked_by) == 18 * 10  # one for each pair and session
    assert len(watch.masks) == 18 * 15  # and one of each site's own


def play_and_restart(consort: Consort, attempt: SumRound, stop: str) -> None:
    """Do all steps before ``stop``; every site is restarted after each."""
    for step in STEPS[attempt.level]:
        if step == stop:
            return
        bodies = (
            dict.fromkeys(consort.parties, attempt.offer()) if step == "ready" else bodies_of(attempt, step)
        )
        ask(consort, step, bodies, taker(attempt, step), lambda site, step, a, m: (a, m), [])
        for party in consort.parties.values():
            restart(party)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_key_masks_two_vectors_whatever_is_restored_and_replayed(data: st.DataObject) -> None:
    """The server replays what it likes to sites whose whole machines are put back to earlier days."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Watch(monkeypatch)
        consort = gather(4, "sum", size=6)
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
        days: dict[int, list[tuple[Marks, SiteSession | None, Vector]]] = {i: [] for i in consort.parties}
        said: list[tuple[str, dict[int, bytes]]] = []
        for _ in range(int(rng.integers(3, 9))):
            number, again = int(rng.integers(1, 4)), int(rng.integers(1, 4))
            attempt = consort.attempt(number, again)
            said.append(("ready", dict.fromkeys(consort.parties, attempt.offer())))
            for site, party in consort.parties.items():
                if days[site] and rng.random() < 0.5:
                    party.marks, party.state, party.vector = days[site][int(rng.integers(len(days[site])))]
                days[site].append((party.marks, party.state, party.vector))
                party.vector = rng.integers(0, 2**20, party.vector.size).astype(np.uint32)
                try:
                    attempt.add_ready(site, party.begin(attempt.offer()))
                except ProtocolError:
                    party.vector = days[site][-1][2]
                    continue
                days[site].append((party.marks, party.state, party.vector))
            try:
                said.append(("mask", attempt.weave()))
            except AttemptError:
                continue
            for site, party in consort.parties.items():
                for step, bodies in rng.permutation(np.array(said, dtype=object)):
                    old = days[site][int(rng.integers(len(days[site])))]
                    if rng.random() < 0.5:
                        party.marks, party.state, party.vector = old
                    if site not in bodies:
                        continue
                    try:
                        party.begin(bodies[site]) if step == "ready" else party.step("mask", bodies[site])
                    except (ProtocolError, MessageError, AssertionError):
                        continue
                    days[site].append((party.marks, party.state, party.vector))
        watch.check()


def test_an_old_session_under_new_marks_is_of_another_step() -> None:
    consort = gather(4)
    party = consort.parties[1]
    party.begin(consort.attempt(1, 1).offer())
    old = party.state
    party.begin(consort.attempt(1, 2).offer())
    assert old is not None
    assert party.state is not None
    assert old.step < party.state.step == party.marks.step


def test_the_keys_of_a_pair_differ_by_session_model_cohort_and_charter() -> None:
    consort = gather(4)
    attempt = consort.attempt()
    for site, party in consort.parties.items():
        attempt.add_ready(site, party.begin(attempt.offer()))
    readies = list(attempt.views.ready.values())
    agreed, session = consort.consortium, attempt.session
    taus = {
        schedule.make_tau(agreed, session, attempt.model, readies),
        schedule.make_tau(agreed, session, bytes(32), readies),
        schedule.make_tau(agreed, session, attempt.model, readies[:-1]),
        *(
            schedule.make_tau(agreed, dataclasses.replace(session, **change), attempt.model, readies)
            for change in ({"purpose": "validate"}, {"purpose": "test"}, {"round": 2}, {"attempt": 2})
        ),
        schedule.make_tau(gather(4).consortium, session, attempt.model, readies),
    }
    assert len(taus) == 8
    pair = bytes(range(32))
    keys = {schedule.mask_key(pair, tau) for tau in taus} | {schedule.self_key(pair, tau) for tau in taus}
    assert len(keys) == 16


def test_pair_keys_differ_between_charters_and_pairs_and_agree_at_both_ends() -> None:
    consort = gather(5)
    keys = {}
    for site, party in consort.parties.items():
        for peer, key in party.member.pair_keys.items():
            ends = (min(site, peer), max(site, peer))
            assert keys.setdefault(ends, key) == key
    assert len(set(keys.values())) == len(keys) == 10
    other = gather(5).consortium
    member = consort.parties[1].member
    again = schedule.pair_key(other, 1, 2, member.secrets[2], member.publics[2, 1])
    assert again not in keys.values()


def test_a_share_sealed_for_another_session_dealer_receiver_or_use_does_not_open() -> None:
    pair, nonce, text = bytes(range(32)), bytes(range(1, 33)), bytes(range(2, 34))
    sealed = schedule.seal(pair, "share", b"context", nonce, 1, 2, text)
    assert schedule.unseal(pair, "share", b"context", nonce, 1, 2, sealed) == text
    for change in (
        (bytes(32), "share", b"context", nonce, 1, 2, sealed),
        (pair, "sketch-share", b"context", nonce, 1, 2, sealed),
        (pair, "share", b"contexT", nonce, 1, 2, sealed),
        (pair, "share", b"context", bytes(32), 1, 2, sealed),
        (pair, "share", b"context", nonce, 2, 1, sealed),
        (pair, "share", b"context", nonce, 1, 3, sealed),
        (pair, "share", b"context", nonce, 3, 2, sealed),
        (pair, "share", b"context", nonce, 1, 2, sealed[:-1]),
        (pair, "share", b"context", nonce, 1, 2, sealed + b"\0"),
        (pair, "share", b"context", nonce, 1, 2, sealed[:-1] + bytes([sealed[-1] ^ 1])),
        (pair, "share", b"context", nonce, 1, 2, b""),
    ):
        with pytest.raises(MessageError):
            schedule.unseal(*change)


# --- what the server can work out ------------------------------------------------------------------------


class Server:
    """A server with accomplices that shows every honest site what it likes, and notes what it is told.

    What it knows is a system of linear equations, one coordinate for all: the unknowns are the honest inputs,
    the masks of honest pairs, and the self masks of honest sites.
    """

    def __init__(self, consort: Consort, accomplices: Iterable[int]) -> None:
        self.consort = consort
        self.accomplices = frozenset(accomplices)
        self.honest = [site for site in consort.parties if site not in self.accomplices]
        self.columns: dict[tuple[Any, ...], int] = {("input", site): k for k, site in enumerate(self.honest)}
        self.rows: list[dict[tuple[Any, ...], int]] = []
        self.shares: dict[tuple[int, int], set[int]] = {}
        self.taus: dict[tuple[int, int], set[bytes]] = {}
        self.acks: dict[tuple[bytes, bytes], dict[int, Signed]] = {}
        self.digests: dict[bytes, dict[int, bytes]] = {}

    def masked(self, site: int, number: int, tau: bytes, cohort: Sequence[int], digest: bytes) -> None:
        """Note a masked input: input + self mask +- masks of its pairs."""
        row: dict[tuple[Any, ...], int] = {("input", site): 1, ("self", site, tau): 1}
        for peer in cohort:
            if peer != site and peer not in self.accomplices:
                ends = (min(site, peer), max(site, peer))
                row["pair", *ends, tau] = schedule.pair_sign(site, peer)
        self.rows.append(row)
        self.taus.setdefault((number, site), set()).add(tau)
        self.digests.setdefault(tau, {})[site] = digest

    def told(self, site: int, number: int, answer: bytes) -> None:
        """Note the mask keys or shares in an honest site's answer; check that they are what they must be."""
        member = self.consort.parties[site].member
        try:
            upload = decode(answer, AckUpload)
        except MessageError:
            for item in opened(answer, Unmask).shares:
                self.shares.setdefault((number, item.site), set()).add(site)
            return
        ack, reveal = decode(upload.ack.body, Ack), decode(upload.reveal.body, Reveal)
        self.acks.setdefault((ack.tau, ack.root), {})[site] = upload.ack
        for item in reveal.keys:
            assert item.key == schedule.mask_key(member.pair_keys[item.site], reveal.tau)
            if item.site not in self.accomplices:
                ends = (min(site, item.site), max(site, item.site))
                self.rows.append({("pair", *ends, reveal.tau): 1})

    def equations(self) -> np.ndarray:
        """Return everything that is known, one equation a row, the honest inputs in the first columns."""
        threshold = self.consort.consortium.charter.threshold
        rows = list(self.rows)
        for (number, site), holders in self.shares.items():
            if len(holders | self.accomplices) >= threshold:
                rows += [{("self", site, tau): 1} for tau in self.taus.get((number, site), ())]
        columns = dict(self.columns)
        for row in rows:
            for name in row:
                columns.setdefault(name, len(columns))
        matrix = np.zeros((len(rows), len(columns)))
        for index, row in enumerate(rows):
            for name, value in row.items():
                matrix[index, columns[name]] = value
        return matrix

    def known_of_inputs(self) -> np.ndarray:
        """Return a basis of all combinations of honest inputs alone that the equations give."""
        matrix, count = self.equations(), len(self.honest)
        if not len(matrix):
            return np.zeros((0, count))
        masks = matrix[:, count:]
        left, values, _ = np.linalg.svd(masks)
        rank = int((values > 1e-9).sum())
        found = left[:, rank:].T @ matrix[:, :count]
        _, values, right = np.linalg.svd(found)
        return right[: int((values > 1e-9).sum())]


@st.composite
def plots(draw: st.DrawFn) -> dict[str, Any]:
    """Draw what the server shows to whom."""
    num_sites = draw(st.integers(3, 9), label="n")
    accomplices = draw(
        st.lists(st.integers(1, num_sites), max_size=colluding_bound(num_sites), unique=True),
        label="accomplices",
    )
    return {
        "num_sites": num_sites,
        "accomplices": accomplices,
        "attempts": draw(st.integers(1, 2), label="attempts"),
        "two_cohorts": draw(st.booleans(), label="two cohorts"),
        "seed": draw(st.integers(0, 2**32), label="seed"),
    }


def subsets(rng: np.random.Generator, sites: Sequence[int], least: int, count: int) -> list[list[int]]:
    """Return some sets of sites to choose from, so that several sites are shown the same one."""
    found = [list(sites)]
    for _ in range(count):
        size = int(rng.integers(min(least, len(sites)), len(sites) + 1))
        found.append(
            sorted(
                int(i)
                for i in rng.choice(
                    found[-1 if rng.random() < 0.5 else 0], min(size, len(found[-1])), replace=False
                )
            )
        )
    return found


def scheme(plot: dict[str, Any]) -> Server:
    """Play a plot against honest sites, and return what the server has learnt."""
    rng = np.random.default_rng(plot["seed"])
    consort = gather(plot["num_sites"], size=4)
    server = Server(consort, plot["accomplices"])
    quorum = consort.consortium.quorum
    for number in range(1, plot["attempts"] + 1):
        attempt = consort.attempt(1, number)
        for site, party in consort.parties.items():
            try:
                attempt.add_ready(site, party.begin(attempt.offer()))
            except ProtocolError as error:
                assert error.rule == "answered"
        if len(attempt.views.ready) < quorum:
            break
        cohorts = subsets(rng, sorted(attempt.views.ready), quorum, 1 + plot["two_cohorts"])
        woven = []
        for cohort in cohorts:
            other = copy.copy(attempt)
            other.views = dataclasses.replace(
                attempt.views, ready={site: attempt.views.ready[site] for site in cohort}
            )
            woven.append((other.weave(), other.tau, cohort))
        shown: dict[int, tuple[bytes, list[int]]] = {}
        for site in server.honest:
            if site not in attempt.views.ready:
                continue
            bodies, tau, cohort = woven[int(rng.integers(len(woven)))] if plot["two_cohorts"] else woven[0]
            if site in bodies:
                answer, _ = consort.parties[site].step("mask", bodies[site])
                server.masked(site, number, tau, cohort, opened(answer, Masked).digest)
                shown[site] = (tau, cohort)
        pools = {tau: subsets(rng, cohort, quorum, 3) for tau, cohort in shown.values()}
        for _ in range(8 * len(shown)):
            site = int(rng.choice(list(shown)))
            tau, cohort = shown[site]
            party = consort.parties[site]
            if rng.random() < 0.6:
                inside = pools[tau][int(rng.integers(len(pools[tau])))]
                digests = server.digests[tau]
                entries = tuple(AcceptedEntry(i, digests.get(i, bytes(32))) for i in inside)
                message = Accepted(tau, entries, left_out(sorted(set(cohort) - set(inside))), b"")
                step, body = "accept", server_says(consort, message)
            else:
                assert party.state is not None
                root = party.state.root or bytes(32)
                inside = [item.peer for item in party.state.accepted]
                signed = dict(server.acks.get((tau, root), {}))
                signed |= {i: site_says(consort, i, Ack(tau, root)) for i in server.accomplices}
                roll = tuple(signed[i] for i in sorted(signed) if i in inside)
                step, body = "unmask", server_says(consort, AckRoll(tau, roll))
            try:
                answer, _ = party.step(step, body)
            except ProtocolError as error:
                assert error.rule in ("phase", "accepted-set", "quorum", "smallest-cohort")
                continue
            server.told(site, number, answer)
    return server


@settings(max_examples=150, deadline=None)
@given(plots())
def test_whatever_the_server_shows_it_learns_one_sum_of_many_honest_inputs_at_most(
    plot: dict[str, Any],
) -> None:
    server = scheme(plot)
    known = server.known_of_inputs()
    assert len(known) <= 1
    for vector in known:
        weights = vector / vector[np.abs(vector).argmax()]
        taken = np.abs(weights) > 1e-9
        assert np.allclose(weights[taken], 1)
        least = threshold_for(plot["num_sites"]) - colluding_bound(plot["num_sites"])
        assert taken.sum() >= max(2, least)


def test_schemes_do_open_sums() -> None:
    """The test above would say nothing about a server that never gets so far."""
    opened_sums = 0
    for seed in range(30):
        plot = {"num_sites": 7, "accomplices": [2, 6], "attempts": 1, "two_cohorts": False, "seed": seed}
        opened_sums += len(scheme(plot).known_of_inputs())
    assert opened_sums >= 3


@pytest.mark.parametrize("num_sites", [3, 5, 8])
def test_an_honest_round_with_accomplices_gives_the_sum_of_the_accepted_and_nothing_else(
    num_sites: int,
) -> None:
    consort = gather(num_sites, size=4)
    server = Server(consort, range(1, colluding_bound(num_sites) + 1))
    attempt = consort.attempt()

    def note(site: int, step: str, answer: bytes, masked: Vector) -> tuple[bytes, Vector] | None:
        if step == "mask" and site == num_sites > 4:
            return None
        if site in server.honest and step == "mask":
            digest = opened(answer, Masked).digest
            server.masked(site, 1, attempt.tau, attempt.cohort, digest)
        if site in server.honest and step in ("accept", "unmask"):
            server.told(site, 1, answer)
        return answer, masked

    run(consort, attempt, note)
    (known,) = server.known_of_inputs()
    expected = np.array([site in attempt.inside for site in server.honest], float)
    assert np.allclose(np.abs(known), expected / np.linalg.norm(expected))


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_that_the_server_sees_looks_like_an_input(level: str) -> None:
    size = 4000
    consort = gather(5, level, size=size)
    blobs: list[bytes] = []

    def note(site: int, step: str, answer: bytes, masked: Vector) -> tuple[bytes, Vector]:
        blobs.extend([answer, masked.tobytes()])
        return answer, masked

    attempt = consort.attempt()
    outcome = run(consort, attempt, note)
    vectors = [np.frombuffer(blob, "<u4") for blob in blobs if len(blob) == 4 * (size + 2)]
    assert len(vectors) == 5
    for party in consort.parties.values():
        own = party.vector
        lifted = own.view(np.int32).astype(float)
        for seen in vectors:
            assert abs(np.corrcoef(lifted, seen.view(np.int32).astype(float))[0, 1]) < 5 / size**0.5
            assert abs(np.corrcoef(lifted, (seen >> 31).astype(float))[0, 1]) < 5 / size**0.5
        for needle in (own[:4].tobytes(), own[-2:].tobytes(), own[100:104].astype(">u4").tobytes()):
            assert not any(needle in blob for blob in blobs)
    for seen in vectors:
        counts = np.bincount(seen >> 27, minlength=32)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 75  # chi-squared, 31 degrees
    for first in range(5):
        for second in range(first):
            assert abs(np.corrcoef(vectors[first], vectors[second])[0, 1]) < 5 / size**0.5
    assert outcome.fits


def sketch_matrix(size: int) -> np.ndarray:
    """Return the map of one beacon, shape (2048, size), with entries 1, -1 and 0."""
    ((_, signed),) = _signed_maps(size, bytes(range(32)))
    halves = signed.tocsr().astype(np.float64).toarray().reshape(TABLES, 2, BUCKETS, size)
    return (halves[:, 0] - halves[:, 1]).reshape(ROWS, size)


def test_a_sketch_leaves_every_coordinate_of_a_long_input_open() -> None:
    rows = sketch_matrix(10_000)
    loads = np.abs(rows).sum(axis=1)
    exposed = (np.abs(rows) / np.maximum(loads, 1)[:, None]).sum(axis=0)
    worst = rows[:, np.argsort(exposed)[-200:]]
    fixed = (worst * np.linalg.solve(rows @ rows.T + 1e-9 * np.eye(ROWS), worst)).sum(axis=0)
    assert fixed.max() < 0.6  # 1 would be a coordinate that the sketch tells


def test_a_sketch_of_a_short_input_tells_coordinates_exactly() -> None:
    assert np.linalg.matrix_rank(sketch_matrix(300)) == 300
    rows = np.abs(sketch_matrix(2600))
    alone = rows[rows.sum(axis=1) == 1].sum(axis=0) > 0
    assert alone.sum() > 20
