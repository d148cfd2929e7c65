"""A job of real programs that is gone through message by message, to kill something at a chosen one.

One site is always held (SIGSTOP), another one at each message. So the server never has all answers, and the
job stands still at a message for as long as it takes to look at the disk and to kill. Nothing depends on how
quick the machine is.

    federation.hold("site-1")
    job = federation.submit(rounds=2, evaluation__every=2, secure_aggregation__level="sketch")
    walk(federation, job, 2, validated=[2], kills={Point(1, "train mask"): kill_and_start_again})

A point is reached when all sites but the one that is held have answered and, where the server keeps answers,
their answers are on its disk. After a kill the point is waited for once more.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fedvision.audit.lines import read_log
from fedvision.secagg.codec import decode, kind_of
from fedvision.storage import read_json
from fedvision_server.journal import FRAME, Closed, Outcome, Start
from tests.deployment import Federation

TRAINING = ("ready", "mask", "beacon", "sketch", "accept", "unmask")
VALIDATION = ("ready", "mask", "accept", "unmask")


class Point(NamedTuple):
    """A message of a job: the round, 0 for those before the first; and what is asked, as in ``points``."""

    round: int
    message: str


def points(rounds: int, validated: Collection[int]) -> Iterator[Point]:
    """Yield all messages of a job at level ``sketch``, in order."""
    yield Point(0, "hello")
    yield Point(0, "enrolled")
    for number in range(1, rounds + 1):
        yield from (Point(number, f"train {step}") for step in TRAINING)
        if number in validated:
            yield from (Point(number, f"validate {step}") for step in VALIDATION)
    yield Point(rounds, "test")


def walk(
    federation: Federation,
    job: str,
    rounds: int,
    validated: Collection[int],
    kills: Mapping[Point, Callable[[], None]],
) -> list[Point]:
    """Go through a job whose first site is held already; return the points at which something was killed.

    Raises:
        AssertionError: A point was not reached, or the job went on past it.
    """
    watch, names = Watch(federation, job), federation.names
    done: list[Point] = []
    ahead = list(points(rounds, validated))
    for index, point in enumerate(ahead):
        held, following = names[index % len(names)], names[(index + 1) % len(names)]
        watch.wait(point, {*names} - {held})
        if point in kills:
            kills[point]()
            watch.begin()
            watch.wait(point, {*names} - {held})
            done.append(point)
        if point != ahead[-1]:
            federation.hold(following)
        federation.let_go(held)
    return done


class Watch:
    """Says from the disk who has answered a message of a job."""

    def __init__(self, federation: Federation, job: str) -> None:
        self._federation = federation
        self._folder = federation.home / "jobs" / job
        self._digest = federation.charter(job)["job"]
        self._seen = 0
        self.begin()

    def begin(self) -> None:
        """Forget the answers that the server has only in memory: it was killed."""
        self._seen = sum(1 for _ in read_log(self._federation.home / "audit.jsonl"))

    def wait(self, point: Point, sites: set[str]) -> None:
        """Wait until exactly these sites have answered a message, and the job is nowhere else."""
        self._federation.wait_until(
            lambda: self.answered(point) >= sites, f"{self._folder.name} is at {point}: {sites} answered", 300
        )
        assert self.answered(point) == sites, point

    def answered(self, point: Point) -> set[str]:
        """Return who has answered a message; nobody while it is not under way."""
        secagg, kind, step = self._folder / "secagg", *point.message.partition(" ")[::2]
        if kind == "hello":
            return set() if (self._folder / "federation.json").exists() else self._heard()
        if kind == "enrolled":
            path = secagg / "enrolled.json"
            return set(read_json(path)) if path.exists() and not (secagg / "journal").exists() else set()
        if kind == "test":
            has = [(self._folder / name).exists() for name in ("model.safetensors", "test.json")]
            return self._tested() if has == [True, False] else set()
        sites = journalled(secagg / "journal", kind, point.round, step)
        return {self._federation.names[site - 1] for site in sites}

    def _heard(self) -> set[str]:
        """Return the sites whose replies came since ``begin``: the server notes the heads of their logs."""
        lines = list(read_log(self._federation.home / "audit.jsonl"))[self._seen :]
        return {str(line.fields["name"]) for line in lines if line.kind == "peer-head"}

    def _tested(self) -> set[str]:
        """Return the sites that have released their test results, by their own logs."""
        wanted = {"job": self._digest, "what": "test sums"}
        return {
            name
            for name, home in zip(self._federation.names, self._federation.sites, strict=True)
            if any(wanted.items() <= line.fields.items() for line in read_log(home / "audit.jsonl"))
        }


def journalled(path: Path, purpose: str, number: int, step: str) -> set[int]:
    """Return the sites whose answers to a step are on disk; nobody if the step is over or not begun."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return set()
    records = []
    while len(content) >= FRAME and len(content) >= FRAME + (length := int.from_bytes(content[:4], "big")):
        records.append(content[FRAME : FRAME + length])
        content = content[FRAME + length :]
    if not records or kind_of(records[-1]) not in (Outcome, Closed):
        return set()
    session = decode(records[0], Start).session
    if (session.purpose, session.round, session.attempt) != (purpose, number, 1):
        return set()
    found = [decode(one, Outcome) for one in records if kind_of(one) is Outcome]
    is_over = any(decode(one, Closed).step == step for one in records if kind_of(one) is Closed)
    return set() if is_over else {one.site for one in found if one.step == step and not one.code}
