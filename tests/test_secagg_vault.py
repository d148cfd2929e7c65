"""What a site keeps on disk: private, whole, and never a way back to a mask that was used."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedvision_sites.vault
from fedvision.config import Job
from fedvision.errors import FedvisionError, MessageError, ProtocolError, StorageError
from fedvision.secagg import schedule
from fedvision.secagg.attempt import AttemptError
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.messages import EnrolmentRoll, Session, Signed
from fedvision.secagg.schedule import Consortium
from fedvision.secagg.server import SumRound
from fedvision.simulation.consortium import make_consortium, server_keys
from fedvision.simulation.run import make_plan, site_configs, start_run, weight_cap
from fedvision.storage import write_atomic
from fedvision.tasks import initial_network
from fedvision.updates.layout import Layout, flatten, layout_of, model_digest
from fedvision.wire.messages import SecureRequest, as_vector
from fedvision_server.secure import ServerKeys
from fedvision_sites.secure import SecureConfig, SecureSite, enrol
from tests.conftest import write_site
from tests.secagg_parties import MemoryStore, Vector
from tests.secagg_stages import STEPS, bodies_of, taker

NAMES = "abcde"


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@dataclasses.dataclass
class Clinic:
    """A site: its folders, and its process, which a kill ends."""

    name: str
    config: SecureConfig
    state: Path
    process: SecureSite | None = None

    def files(self) -> list[Path]:
        folders = (self.state / "secagg", self.config.guard)
        return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


@dataclasses.dataclass
class Clinics:
    """Five sites with their folders, the server's keys, and everything that ever left a site."""

    job: Job
    layout: Layout
    keys: ServerKeys
    sites: dict[int, Clinic]
    inputs: dict[int, Vector] = dataclasses.field(default_factory=dict)
    sent: dict[tuple[int, Session], set[bytes]] = dataclasses.field(default_factory=dict)
    refused: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)
    publics: dict[tuple[int, int], bytes] = dataclasses.field(default_factory=dict)

    @property
    def consortium(self) -> Consortium:
        return self.keys.consortium

    def process(self, number: int) -> SecureSite:
        """Return a site's process, a new one after a kill."""
        clinic = self.sites[number]
        if clinic.process is None:
            digest = self.consortium.digest.hex()
            clinic.process = SecureSite(clinic.config, clinic.name, clinic.state, digest, 1)
        return clinic.process

    def enrol(self, number: int) -> Signed:
        clinic = self.sites[number]
        clinic.process = None
        answer = enrol(
            clinic.config, clinic.name, clinic.state, self.job, self.layout, encode(self.keys.documents)
        )
        return decode(answer, Signed)

    def roll(self, entries: list[Signed]) -> bytes:
        message = EnrolmentRoll(tuple(entries))
        return encode(schedule.sign(self.consortium, self.keys.identity, 0, message))

    def enrol_all(self) -> None:
        """Enrol every site; one that is killed is started again."""
        entries = [self.alive(number, lambda number=number: self.enrol(number)) for number in self.sites]
        self.publics = schedule.read_enrolments(self.consortium, entries)
        for number in self.sites:
            self.alive(number, lambda number=number: self.process(number).save_roll(self.roll(entries)))

    def alive(self, number: int, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Killed:
            self.sites[number].process = None
            return work()

    def model(self) -> bytes:
        return model_digest(flatten(initial_network(self.job), self.layout))

    def attempt(self, number: int, attempt: int) -> SumRound:
        encoding = self.consortium.encoding
        session = Session("train", number, attempt)
        return SumRound(
            self.consortium,
            self.publics,
            self.keys.identity,
            session,
            self.model(),
            encoding.length,
            encoding.norm_bound,
            MemoryStore(),
        )

    def do(self, number: int, step: str, body: bytes, session: Session) -> tuple[bytes, Vector]:
        """Do a step at a site as ``fedvision_sites.work`` does."""
        process = self.process(number)
        if step == "ready":
            answer = process.repeated(body, self.model())
            if answer is not None:
                return answer, np.zeros(0, np.uint32)
            process.open_session(body)
            vector = process.pending(session, self.model())
            if vector is None:
                vector = self.inputs[number].copy()
                process.keep(session, self.model(), vector)
            return process.begin(body, self.model(), vector), np.zeros(0, np.uint32)
        charter = self.consortium.digest.hex()
        reply = process.answer(
            SecureRequest(self.job.digest(), session.round, charter, step, as_vector(body))  # type: ignore[arg-type]
        )
        return reply.body.tobytes(), reply.masked

    def run(self, attempt: SumRound, stop: str = "") -> SumRound:
        """Do an attempt up to a step; whoever refuses or is killed has dropped out."""
        for step in STEPS[attempt.level]:
            if step == stop:
                break
            bodies = (
                dict.fromkeys(self.sites, attempt.offer()) if step == "ready" else bodies_of(attempt, step)
            )
            take = taker(attempt, step)
            for number, body in bodies.items():
                try:
                    answer, masked = self.do(number, step, body, attempt.session)
                except Killed:
                    self.sites[number].process = None
                    continue
                except FedvisionError as error:
                    self.refused.append((number, step, getattr(error, "rule", error.code)))
                    continue
                if step == "mask":
                    self.sent.setdefault((number, attempt.session), set()).add(masked.tobytes())
                    take(number, answer, masked)
                else:
                    take(number, answer)
        return attempt

    def round(self, number: int, attempts: int = 4) -> SumRound | None:
        """Do a round until its sum is there; None if too many have unmasked it already."""
        for attempt in range(1, attempts):
            try:
                one = self.run(self.attempt(number, attempt))
                total = one.finish().total
            except AttemptError:
                continue
            truth = np.zeros_like(total)
            for site in one.inside:
                truth += self.inputs[site]
            assert np.array_equal(total, truth)
            return one
        return None

    def check_that_no_input_was_masked_twice(self) -> None:
        assert all(len(found) == 1 for found in self.sent.values())

    def read(self, number: int) -> None:
        """Read everything a site has, as its next start does."""
        self.sites[number].process = None
        process = self.process(number)
        process.open_session(self.attempt(9, 9).offer())
        assert process.member


@pytest.fixture
def clinics(tiny: Any, tmp_path: Path, request: Any) -> Clinics:
    for name in NAMES[3:]:
        write_site(tiny.root, name, (1, 0, 0))
    job = tiny.secure(getattr(request, "param", "sum"), rounds=20)
    plan, folder = dataclasses.replace(make_plan(job), threads=1), tmp_path / "run"
    start_run(plan, folder)
    make_consortium(plan, weight_cap(plan), folder)
    job = job.public()
    sites = {}
    for number, config in enumerate(site_configs(plan, folder), 1):
        assert config.secure is not None
        sites[number] = Clinic(config.name, config.secure, config.state)
    found = Clinics(job, layout_of(initial_network(job)), server_keys(folder), sites)
    rng = np.random.default_rng(0)
    encoding = found.consortium.encoding
    for number in sites:
        update = rng.normal(size=encoding.size).astype(np.float32)
        found.inputs[number] = encoding.encode(
            update / np.linalg.norm(update), 1, [0.5], bytes([number] * 32)
        )
    return found


@pytest.fixture
def enrolled(clinics: Clinics) -> Clinics:
    clinics.enrol_all()
    return clinics


every_level = pytest.mark.parametrize("clinics", ["sum", "sketch", "gram"], indirect=True)


@every_level
def test_everything_on_disk_is_for_its_owner_only_at_every_moment(enrolled: Clinics) -> None:
    level = enrolled.consortium.charter.level
    for number, stop in enumerate((*STEPS[level][1:], ""), 1):
        enrolled.run(enrolled.attempt(number, 1), stop)
        for clinic in enrolled.sites.values():
            assert {path.stat().st_mode & 0o777 for path in clinic.files()} == {0o600}
            names = {path.name.split("-")[0] for path in clinic.files()}
            assert {"enrolment", "session", "input"} < names


def at_write(
    monkeypatch: pytest.MonkeyPatch, clinic: Clinic, number: int, written: bool
) -> Callable[[], int]:
    """Kill a site at its ``number``-th write, before or after it is on disk; return a count of its writes."""
    seen = 0

    def write(path: Path, content: bytes | memoryview, mode: int = 0o644) -> None:
        nonlocal seen
        is_mine = clinic.state in path.parents or clinic.config.guard in path.parents
        seen += is_mine
        if is_mine and seen == number and not written:
            raise Killed
        write_atomic(path, content, mode)
        if is_mine and seen == number:
            raise Killed

    monkeypatch.setattr(fedvision_sites.vault, "write_atomic", write)
    return lambda: seen


@pytest.mark.parametrize(
    ("clinics", "written"),
    [("sum", False), ("sum", True), ("sketch", True), ("gram", False)],
    indirect=["clinics"],
    ids=["sum-before", "sum-after", "sketch-after", "gram-before"],
)
def test_a_site_killed_at_any_write_never_masks_twice_and_is_back_in_the_next_round(
    enrolled: Clinics, written: bool, tmp_path: Path
) -> None:
    folders = [tmp_path / "run" / "sites", tmp_path / "run" / "guards"]
    for folder in folders:
        shutil.copytree(folder, tmp_path / "before" / folder.name)
    level = enrolled.consortium.charter.level
    total = 1 + 2 * len(STEPS[level])  # the input; marks and session at each step
    for number in range(1 if level == "sum" else 6, total + 1):  # the first steps are those of level sum
        for folder in folders:
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "before" / folder.name, folder)
        enrolled.sent.clear()
        for clinic in enrolled.sites.values():
            clinic.process = None
        with pytest.MonkeyPatch.context() as monkeypatch:
            count = at_write(monkeypatch, enrolled.sites[2], number, written)
            first = enrolled.round(1)
            assert number <= count() <= total
        second = enrolled.round(2)
        assert first is not None
        assert second is not None
        assert second.inside == (1, 2, 3, 4, 5), number
        enrolled.check_that_no_input_was_masked_twice()


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (1, False),
        (1, True),
        (2, False),
        pytest.param(2, True),
        pytest.param(3, False),
        (3, True),
        (4, False),
        (4, True),
    ],
)
def test_a_site_killed_while_it_enrols_enrols_when_it_is_back(
    clinics: Clinics, monkeypatch: pytest.MonkeyPatch, number: int, written: bool
) -> None:
    count = at_write(monkeypatch, clinics.sites[2], number, written)
    clinics.enrol_all()
    assert count() >= 4
    first = clinics.round(1)
    assert first is not None
    assert first.inside == (1, 2, 3, 4, 5)


@every_level
def test_a_full_disk_stops_a_site_before_its_answer_leaves(
    enrolled: Clinics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes | memoryview, mode: int = 0o644) -> None:
        raise StorageError(f"cannot write {path.name}: no space left on device")

    level = enrolled.consortium.charter.level
    for number, step in enumerate(STEPS[level], 1):
        one = enrolled.attempt(number, 1)
        if step == "ready":
            bodies = dict.fromkeys(enrolled.sites, one.offer())
        else:
            enrolled.run(one, step)
            bodies = bodies_of(one, step)
        before = [path.read_bytes() for path in sorted(enrolled.sites[2].files())]
        with monkeypatch.context() as patched:
            patched.setattr(fedvision_sites.vault, "write_atomic", full)
            with pytest.raises(StorageError):
                enrolled.do(2, step, bodies[2], one.session)
        assert [path.read_bytes() for path in sorted(enrolled.sites[2].files())] == before


# --- the same request again -------------------------------------------------------------------------------


def contents(clinic: Clinic) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in clinic.files()}


@every_level
@pytest.mark.parametrize("is_killed", [False, True], ids=["alive", "killed"])
def test_the_same_request_is_answered_with_the_same_bytes_and_changes_nothing(
    enrolled: Clinics, is_killed: bool
) -> None:
    """Guarantee of ``SecureSite.answer``, at every step, by the same process and by a new one."""
    one, level = enrolled.attempt(1, 1), enrolled.consortium.charter.level
    clinic = enrolled.sites[2]
    for step in STEPS[level]:
        bodies = dict.fromkeys(enrolled.sites, one.offer()) if step == "ready" else bodies_of(one, step)
        take = taker(one, step)
        for number, body in bodies.items():
            answer, masked = enrolled.do(number, step, body, one.session)
            if number == 2:
                before = contents(clinic)
                for threads in (1, 2, 3):
                    if is_killed:
                        clinic.process = None
                    enrolled.process(2)._threads = threads
                    again, masked_again = enrolled.do(2, step, body, one.session)
                    assert again == answer
                    assert masked_again.dtype == np.uint32
                    assert np.array_equal(masked_again, masked), step
                assert contents(clinic) == before
            take(number, answer, masked) if step == "mask" else take(number, answer)
    assert one.finish().fits


@every_level
def test_anything_else_than_the_last_request_is_refused(enrolled: Clinics) -> None:
    one, level = enrolled.attempt(1, 1), enrolled.consortium.charter.level
    asked: list[tuple[str, bytes]] = []
    for step in STEPS[level]:
        bodies = dict.fromkeys(enrolled.sites, one.offer()) if step == "ready" else bodies_of(one, step)
        enrolled.do(2, step, bodies[2], one.session)
        before = contents(enrolled.sites[2])
        for earlier, body in asked:
            with pytest.raises(ProtocolError) as caught:
                enrolled.do(2, earlier, body, one.session)
            assert caught.value.rule in ("phase", "high-water", "sketched", "answered"), (step, earlier)
        for other in STEPS[level][1:]:
            if other != step:
                with pytest.raises((ProtocolError, MessageError)):
                    enrolled.do(2, other, bodies[2], one.session)
        damaged_body = bytes([*bodies[2][:-1], bodies[2][-1] ^ 1])
        with pytest.raises((ProtocolError, MessageError)):
            enrolled.do(2, step, damaged_body, one.session)
        assert contents(enrolled.sites[2]) == before
        asked.append((step, bodies[2]))
        take = taker(one, step)
        for number, body in bodies.items():
            answer, masked = enrolled.do(number, step, body, one.session)
            take(number, answer, masked) if step == "mask" else take(number, answer)


def test_an_offer_of_another_model_is_not_the_same_request(enrolled: Clinics) -> None:
    one = enrolled.attempt(1, 1)
    enrolled.do(2, "ready", one.offer(), one.session)
    assert enrolled.process(2).repeated(one.offer(), bytes(32)) is None
    assert enrolled.process(2).repeated(enrolled.attempt(1, 2).offer(), enrolled.model()) is None
    assert enrolled.process(2).repeated(one.offer(), enrolled.model()) is not None


def test_an_input_that_changed_is_never_masked_with_the_masks_of_before(enrolled: Clinics) -> None:
    one = enrolled.run(enrolled.attempt(1, 1), "mask")
    bodies = bodies_of(one, "mask")
    answer, masked = enrolled.do(2, "mask", bodies[2], one.session)
    (path,) = [path for path in enrolled.sites[2].files() if path.name.startswith("input-")]
    content = path.read_bytes()
    for wrong in (
        content[:-4],
        content + bytes(4),
        bytes([content[0] ^ 1]) + content[1:],
        bytes(len(content)),
    ):
        path.write_bytes(wrong)
        with pytest.raises(ProtocolError) as caught:
            enrolled.do(2, "mask", bodies[2], one.session)
        assert caught.value.rule == "input"
    path.unlink()
    with pytest.raises(ProtocolError) as caught:
        enrolled.do(2, "mask", bodies[2], one.session)
    assert caught.value.rule == "input"
    path.write_bytes(content)
    path.chmod(0o600)
    again, masked_again = enrolled.do(2, "mask", bodies[2], one.session)
    assert again == answer
    assert np.array_equal(masked_again, masked)


@pytest.mark.parametrize(
    ("clinics", "written"),
    [("gram", False), ("gram", True)],
    indirect=["clinics"],
    ids=["before", "after"],
)
def test_a_site_killed_at_any_write_loses_no_attempt_if_it_is_asked_again(
    enrolled: Clinics, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = enrolled.consortium.charter.level
    total = 1 + 2 * len(STEPS[level])  # the input; session and marks at each step
    for number in range(1, total + 1):
        with monkeypatch.context() as patched:
            count = at_write(patched, enrolled.sites[2], number, written)
            one = enrolled.attempt(number, 1)
            session = one.session
            for step in STEPS[level]:
                is_first = step == "ready"
                bodies = dict.fromkeys(enrolled.sites, one.offer()) if is_first else bodies_of(one, step)
                take = taker(one, step)
                for site, body in bodies.items():
                    answer, masked = enrolled.alive(
                        site,
                        lambda do=(site, step, body, session): enrolled.do(*do),
                    )
                    take(site, answer, masked) if step == "mask" else take(site, answer)
            assert count() >= number
        outcome = one.finish()
        assert one.inside == (1, 2, 3, 4, 5)
        assert outcome.fits


def snapshot(clinic: Clinic, to: Path) -> Path:
    shutil.copytree(clinic.state, to)
    return to


def restore(clinic: Clinic, source: Path) -> None:
    shutil.rmtree(clinic.state)
    shutil.copytree(source, clinic.state)
    clinic.process = None


@every_level
def test_a_restored_state_folder_is_refused_and_the_next_round_works(
    enrolled: Clinics, tmp_path: Path
) -> None:
    level = enrolled.consortium.charter.level
    clinic = enrolled.sites[2]
    for number, stop in enumerate(STEPS[level][1:]):
        one = enrolled.run(enrolled.attempt(2 * number + 1, 1), stop)
        old = snapshot(clinic, tmp_path / stop)
        bodies = bodies_of(one, stop)
        enrolled.do(2, stop, bodies[2], one.session)
        restore(clinic, old)
        with pytest.raises(ProtocolError) as caught:
            enrolled.do(2, stop, bodies[2], one.session)
        assert caught.value.rule == "old-state"
        with pytest.raises(ProtocolError) as caught:
            enrolled.do(2, "ready", enrolled.attempt(2 * number + 1, 1).offer(), one.session)
        assert caught.value.rule == "old-state"
        with pytest.raises(ProtocolError) as caught:
            enrolled.process(2).open_session(enrolled.attempt(2 * number + 1, 1).offer())
        assert caught.value.rule in ("high-water", "sketched", "answered")
        again = enrolled.round(2 * number + 2)
        assert again is not None
        assert again.inside == (1, 2, 3, 4, 5)
    enrolled.check_that_no_input_was_masked_twice()


def test_a_state_folder_of_long_ago_brings_no_round_back(enrolled: Clinics, tmp_path: Path) -> None:
    enrolled.run(enrolled.attempt(1, 1), "mask")
    old = snapshot(enrolled.sites[2], tmp_path / "old")
    for number in (2, 3):
        assert enrolled.round(number) is not None
    restore(enrolled.sites[2], old)
    for number, rule in ((1, "answered"), (2, "answered"), (3, "answered")):
        with pytest.raises(ProtocolError) as caught:
            enrolled.do(2, "ready", enrolled.attempt(number, 9).offer(), Session("train", number, 9))
        assert caught.value.rule == rule
    later = enrolled.round(4)
    assert later is not None
    assert 2 in later.inside
    enrolled.check_that_no_input_was_masked_twice()


def test_a_state_folder_without_the_roll_takes_the_same_roll_again(clinics: Clinics, tmp_path: Path) -> None:
    entries = [clinics.enrol(number) for number in clinics.sites]
    old = snapshot(clinics.sites[2], tmp_path / "old")
    clinics.publics = schedule.read_enrolments(clinics.consortium, entries)
    for number in clinics.sites:
        clinics.process(number).save_roll(clinics.roll(entries))
    assert clinics.round(1) is not None
    restore(clinics.sites[2], old)
    with pytest.raises(ProtocolError) as caught:
        clinics.do(2, "ready", clinics.attempt(2, 1).offer(), Session("train", 2, 1))
    assert caught.value.rule == "roster"
    assert clinics.enrol(2) == entries[1]
    clinics.process(2).save_roll(clinics.roll(entries))
    assert clinics.round(3) is not None


def test_a_site_without_its_marks_does_not_answer(enrolled: Clinics) -> None:
    one = enrolled.run(enrolled.attempt(1, 1), "accept")
    bodies = bodies_of(one, "accept")
    clinic = enrolled.sites[2]
    for path in clinic.config.guard.iterdir():
        path.unlink()
    for step, body, session in (
        ("accept", bodies[2], one.session),
        ("ready", enrolled.attempt(2, 1).offer(), Session("train", 2, 1)),
    ):
        clinic.process = None
        with pytest.raises(ProtocolError) as caught:
            enrolled.do(2, step, body, session)
        assert caught.value.rule == "lost-marks"
    with pytest.raises(ProtocolError) as caught:
        enrolled.run(enrolled.attempt(2, 1))
        raise ProtocolError(enrolled.refused[-1][2], "as it was refused")
    assert caught.value.rule == "lost-marks"


def test_a_site_without_its_state_folder_neither_answers_nor_enrols_again(enrolled: Clinics) -> None:
    one = enrolled.run(enrolled.attempt(1, 1), "accept")
    bodies = bodies_of(one, "accept")
    clinic = enrolled.sites[2]
    shutil.rmtree(clinic.state / "secagg")
    clinic.process = None
    with pytest.raises(ProtocolError) as caught:
        enrolled.do(2, "accept", bodies[2], one.session)
    assert caught.value.rule == "roster"
    with pytest.raises(ProtocolError) as caught:
        enrolled.enrol(2)
    assert caught.value.rule == "lost-state"
    assert enrolled.round(1) is not None


def damaged(content: bytes) -> Iterator[bytes]:
    """Yield wrong versions of a file."""
    yield b""
    yield content[:-1]
    yield content[: len(content) // 2]
    yield content + b"\0"
    yield b"XX" + content[2:]
    yield content[:2] + b"\xff" + content[3:]


@pytest.mark.parametrize(
    "name",
    [
        "enrolment",
        "session",
        pytest.param(
            "marks",
        ),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_answered(enrolled: Clinics, name: str) -> None:
    one = enrolled.run(enrolled.attempt(1, 1), "accept")
    bodies = bodies_of(one, "accept")
    clinic = enrolled.sites[2]
    guard = next(path for path in clinic.config.guard.iterdir() if "-" not in path.name)
    (path,) = [guard] if name == "marks" else [path for path in clinic.files() if path.name == name]
    content = path.read_bytes()
    for wrong in damaged(content):
        path.write_bytes(wrong)
        clinic.process = None
        with pytest.raises(StorageError) as caught:
            enrolled.do(2, "accept", bodies[2], one.session)
        assert str(path) in str(caught.value)
    path.write_bytes(content)
    clinic.process = None
    enrolled.do(2, "accept", bodies[2], one.session)


@pytest.mark.parametrize("name", ["enrolment", "session"])
def test_a_file_that_others_can_read_is_not_used(enrolled: Clinics, name: str) -> None:
    one = enrolled.run(enrolled.attempt(1, 1), "accept")
    bodies = bodies_of(one, "accept")
    clinic = enrolled.sites[2]
    (path,) = [path for path in clinic.files() if path.name == name]
    for mode in (0o604, 0o640, 0o644):
        path.chmod(mode)
        clinic.process = None
        with pytest.raises(StorageError, match="can be read by others"):
            enrolled.do(2, "accept", bodies[2], one.session)
    path.chmod(0o600)
    enrolled.do(2, "accept", bodies[2], one.session)


@pytest.mark.parametrize("clinics", ["sketch"], indirect=True)
def test_an_input_that_changed_on_disk_is_not_sketched(enrolled: Clinics) -> None:
    one = enrolled.run(enrolled.attempt(1, 1), "sketch")
    bodies = bodies_of(one, "sketch")
    clinic = enrolled.sites[2]
    (path,) = [path for path in clinic.files() if path.name.startswith("input-")]
    content = path.read_bytes()
    for wrong in (content[:-4], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(wrong)
        with pytest.raises((ProtocolError, StorageError)):
            enrolled.do(2, "sketch", bodies[2], one.session)
    path.unlink()
    with pytest.raises(ProtocolError) as caught:
        enrolled.do(2, "sketch", bodies[2], one.session)
    assert caught.value.rule == "input"


def test_an_input_that_was_cut_short_on_disk_leaves_its_site_out_only(enrolled: Clinics) -> None:
    one = enrolled.run(enrolled.attempt(1, 1), "mask")
    clinic = enrolled.sites[2]
    (path,) = [path for path in clinic.files() if path.name.startswith("input-")]
    path.write_bytes(path.read_bytes()[:-8])
    for number, body in bodies_of(one, "mask").items():
        answer, masked = enrolled.do(number, "mask", body, one.session)
        if number == 2:
            with pytest.raises(MessageError):
                one.add_masked(number, answer, masked)
        else:
            one.add_masked(number, answer, masked)
    assert sorted(one.views.masked) == [1, 3, 4, 5]


def test_the_inputs_of_other_rounds_are_removed(enrolled: Clinics) -> None:
    for number in (1, 2, 3):
        enrolled.round(number)
        for clinic in enrolled.sites.values():
            (path,) = [path.name for path in clinic.files() if path.name.startswith("input-")]
            assert path.startswith(f"input-train-{number:04d}-")


def test_a_second_attempt_masks_the_input_that_was_kept(enrolled: Clinics) -> None:
    enrolled.run(enrolled.attempt(1, 1), "accept")
    kept = {number: vector.copy() for number, vector in enrolled.inputs.items()}
    for number in enrolled.inputs:
        enrolled.inputs[number] = np.zeros_like(enrolled.inputs[number])
    again = enrolled.run(enrolled.attempt(1, 2))
    truth = np.zeros_like(kept[1])
    for number in again.inside:
        truth += kept[number]
    assert np.array_equal(again.finish().total, truth)
