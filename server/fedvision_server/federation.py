"""The sites of a run as the server sees them: how they are reached, who does what, and their first meeting.

    federation.json   name, address, sizes and enrolment of every site, once all have been met

Rules:
- Before the first round every site of the cohort must have said hello, since each needs a key of each other
  one. A site whose people have not decided yet is asked again, for as long as it takes.
- After that nobody is needed to be there: a server that was stopped goes on with what it has on disk, and a
  site that was away is asked again in the next step that concerns it.
"""

import base64
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedvision.config import Job
from fedvision.errors import RoundError, StorageError
from fedvision.secagg.codec import encode
from fedvision.storage import read_json, write_json
from fedvision.updates.layout import FloatVector, Layout
from fedvision.wire.messages import (
    EMPTY,
    HelloReply,
    HelloRequest,
    Refusal,
    Reply,
    Request,
    SecureReply,
    SecureRequest,
    as_vector,
)
from fedvision_server.jobs import RunFolder
from fedvision_server.secure import SecureServer, ServerKeys
from fedvision_server.steps import WAITING, is_away

Observer = Callable[[dict[str, Any]], None]
RootUpdate = Callable[[FloatVector, int], FloatVector]
"""The root set's clipped update of a round, from global weights and number, see ``training.root``."""
PAUSE_S = 5.0


class Link(Protocol):
    """What carries requests to sites and replies back.

    A link to sites that come and go has one method more, ``pause(seconds: float) -> None``, which waits, or
    raises ``Stopped``. With it the server waits for sites that do not answer; without it an absent site is
    an error, because it will stay absent.
    """

    def nodes(self) -> Sequence[int]:
        """Return the addresses of the sites that can be reached."""
        ...

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        """Send each node its request and yield each reply as it comes, in any order.

        A site that fails to answer yields a ``Refusal``: "unreachable", or "deadline" where it had a time to
        answer in.
        """
        ...


@dataclass(frozen=True)
class Cohort:
    """Which sites do what in a run.

    Attributes:
        train: Send updates.
        validate: Their validation cases choose the best model.
        test: Judge the final model; mean, worst and pooled are over these.
        held_out: Judge the final model, and are reported apart: data that no training has seen.
    """

    train: tuple[str, ...]
    validate: tuple[str, ...]
    test: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    @property
    def sites(self) -> list[str]:
        """All of them, sorted."""
        return sorted({*self.train, *self.validate, *self.test, *self.held_out})


@dataclass
class Federation:
    """What a run needs at hand: fixed after ``meet``, but for addresses."""

    job: Job
    link: Link
    folder: RunFolder
    layout: Layout
    cohort: Cohort
    observe: Observer
    addresses: dict[str, int]
    sizes: dict[str, HelloReply]
    hello: HelloRequest
    secure: SecureServer | None = None
    root_update: RootUpdate | None = None
    root_score: Callable[[FloatVector], float | None] | None = None

    def tell(self, event: dict[str, Any]) -> None:
        """Write an event to ``rounds.jsonl`` and show it to whoever watches."""
        self.folder.record(event)
        self.observe(event)

    @property
    def is_patient(self) -> bool:
        """Whether sites that do not answer may come back."""
        return hasattr(self.link, "pause")

    def pause(self) -> None:
        """Wait a moment before sites are asked again."""
        getattr(self.link, "pause", time.sleep)(PAUSE_S)

    def greet(self) -> None:
        """Find sites that are not where they were: ask those at unknown addresses who they are."""
        nodes = set(self.link.nodes())
        lost = {site for site, node in self.addresses.items() if node not in nodes}
        strangers = sorted(nodes - set(self.addresses.values()))
        if not lost or not strangers:
            return
        for node, reply in self.link.ask(dict.fromkeys(strangers, self.hello)):
            if isinstance(reply, HelloReply) and reply.site in lost:
                self.addresses[reply.site] = node
        save_meeting(self)

    def ask(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply]]:
        """Ask each site and yield its name with a reply that is really its own, once.

        A reply that does not fit is ignored as long as a right one may follow; at the end its site has
        refused with code "message".
        """
        names = {self.addresses[site]: site for site in requests}
        wrong: dict[str, Refusal] = {}
        left = set(requests)
        for node, reply in self.link.ask({self.addresses[site]: r for site, r in requests.items()}):
            site = names.get(node, "")
            if site not in left:
                continue
            request = requests[site]
            number = 0 if isinstance(request, HelloRequest) else request.round
            if isinstance(reply, Refusal) and not reply.site:
                left.discard(site)
                yield site, dataclasses.replace(reply, site=site)
            elif not is_answer(reply, request, site):
                wrong[site] = Refusal(request.job_digest, site, number, "message")
            else:
                left.discard(site)
                yield site, reply
        for site in sorted(left & wrong.keys()):
            yield site, wrong[site]


def is_answer(reply: Reply, request: Request, site: str) -> bool:
    """Whether a reply is of this site, and to this request as far as its head says."""
    asked = 0 if isinstance(request, HelloRequest) else request.round
    answered = 0 if isinstance(reply, HelloReply) else reply.round
    if reply.site != site or reply.job_digest != request.job_digest or answered != asked:
        return False
    if isinstance(reply, SecureReply):
        return reply.step == (request.step if isinstance(request, SecureRequest) else "ready")
    return isinstance(reply, Refusal) or isinstance(reply, HelloReply) == isinstance(request, HelloRequest)


def meet(
    job: Job,
    link: Link,
    folder: RunFolder,
    layout: Layout,
    cohort: Cohort,
    observe: Observer,
    keys: ServerKeys | None,
) -> Federation:
    """Ask every site for its name and size, and with secure aggregation enrol those that train.

    A federation that has met before is taken from disk, whoever is there.

    Raises:
        RoundError: A site of the cohort is absent, refuses the job, or two have one name.
    """
    if job.aggregation.secure and keys is None:
        raise RoundError("the job wants secure aggregation, but the server has no charter and no key")
    documents = as_vector(encode(keys.documents)) if keys else EMPTY
    hello = HelloRequest(job.to_json(), job.digest(), layout.digest, documents)
    federation = Federation(job, link, folder, layout, cohort, observe, {}, {}, hello)
    has_met = load_meeting(federation)
    if has_met:
        federation.greet()
    else:
        first_meeting(federation)
        for site in cohort.train:
            if federation.sizes[site].num_train == 0:
                raise RoundError(
                    f"site {site} has no training case", "leave it out of data.sites, or list it in held_out"
                )
    if keys is not None and job.aggregation.secure:
        federation.secure = SecureServer(keys, folder.path, federation)
    if not has_met:
        save_meeting(federation)
    if federation.secure:
        federation.secure.spread_enrolments()
    return federation


def first_meeting(federation: Federation) -> None:
    """Ask all sites for a hello, and those that are not ready for one again, until all have answered.

    Raises:
        RoundError: See ``meet``.
    """
    addresses, told, link = federation.addresses, list[str](), federation.link
    until = time.monotonic() + getattr(link, "hello_s", math.inf)
    while True:
        nodes, codes = link.nodes(), dict[str, str]()
        unknown = [node for node in nodes if node not in addresses.values()]
        for node, reply in link.ask(dict.fromkeys(unknown, federation.hello)):
            if isinstance(reply, Refusal):
                codes[reply.site] = reply.code
            elif isinstance(reply, HelloReply):
                if addresses.get(reply.site, node) != node and addresses[reply.site] in nodes:
                    raise RoundError(f"two sites are named {reply.site}")
                addresses[reply.site] = node
                federation.sizes[reply.site] = reply
        missing = [site for site in federation.cohort.sites if site not in addresses]
        for site in missing:
            code = codes.get(site, "")
            if code.partition(":")[0] == "denied":
                raise RoundError(f"site {site} denied the job", f"ask the people of {site} why")
            if code and not is_away(code):
                raise RoundError(f"site {site} refuses the job ({code} error)", f"the log of {site} says why")
            if code.partition(":")[0] != WAITING and not federation.is_patient:
                raise RoundError(f"site {site} does not answer")
        if not missing:
            return
        if time.monotonic() > until:
            raise RoundError(
                f"not everybody answered within deadlines.hello_s: {', '.join(missing)}",
                "submit the job again without them, or with more time in server.toml",
            )
        if missing != told:
            federation.tell({"event": "waiting", "round": 0, "sites": missing})
            told = missing
        federation.pause()


def _meeting_path(federation: Federation) -> Path:
    return federation.folder.path / "federation.json"


def save_meeting(federation: Federation) -> None:
    """Keep who was met, and where."""
    sites = {}
    for site, reply in sorted(federation.sizes.items()):
        sites[site] = {
            "address": federation.addresses[site],
            "num_train": reply.num_train,
            "num_val": reply.num_val,
            "num_test": reply.num_test,
            "enrolment": base64.b64encode(reply.enrolment.tobytes()).decode(),
        }
    write_json(_meeting_path(federation), {"format": 1, "job": federation.job.digest(), "sites": sites})


def load_meeting(federation: Federation) -> bool:
    """Fill in who was met before; return whether that was everybody of the cohort.

    Raises:
        StorageError: The file is damaged.
    """
    path = _meeting_path(federation)
    if not path.exists():
        return False
    try:
        content = read_json(path)
        if content["format"] != 1 or content["job"] != federation.job.digest():
            raise ValueError
        for site, found in content["sites"].items():
            enrolment = as_vector(base64.b64decode(found["enrolment"], validate=True))
            federation.addresses[site] = int(found["address"])
            federation.sizes[site] = HelloReply(
                content["job"], site, found["num_train"], found["num_val"], found["num_test"], enrolment
            )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(f"{path} is damaged, or of another job") from None
    return set(federation.cohort.sites) <= federation.sizes.keys()
