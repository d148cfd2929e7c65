"""The server's part of a deployed job: Flower's ServerApp, and the link to the sites' workers.

The ServerApp runs in a process of Flower's SuperExec. Its run configuration names the job; everything else
is read from the coordinator's folder. When it ends, ``outcome.json`` in the job's folder says how.

Rules:
- Sites are addressed by their numbers in the roster. Which Flower node is whose follows from the node keys
  that were enrolled, and is a routing hint only: a reply counts by its seal.
- A request is sealed for its site, and a reply must answer that very seal.
- A site that is away is waited for until the deadline; one whose worker was started again gets its request
  again, since Flower does not deliver a message twice.
"""

import fcntl
import hashlib
import logging
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.http_grid import HttpGrid

from fedvision.audit.log import AuditLog
from fedvision.errors import FedvisionError, MessageError, Stopped
from fedvision.secagg import identity
from fedvision.secagg.roster import Roster
from fedvision.storage import write_json
from fedvision.wire.envelope import SERVER, Seal, content_digest, open_seal, sealed
from fedvision.wire.messages import HelloRequest, Refusal, Reply, Request, SecureRequest, TrainRequest
from fedvision.wire.records import MESSAGE_TYPES, pack, unpack
from fedvision_server.control import HOME_VARIABLE
from fedvision_server.federation import Observer
from fedvision_server.fleet_grid import ParcelGrid
from fedvision_server.home import Deadlines, ServerHome
from fedvision_server.site_records import load_records

OPEN_BYTES = 1 << 30
"""Replies with vectors are fetched as many at a time as fit in this."""
logger = logging.getLogger(__name__)
POLL_S = 0.05
"""Between two looks for replies; the SuperLink holds each of them for a while (``fleet_bell``)."""
LOOK_S = 1.0
HELLO_S = 30.0


@dataclass
class Open:
    """A request that waits for its reply.

    Attributes:
        request: What is asked.
        deadline: When it is given up, on the monotonic clock.
        message_id: Flower's, "" while it is not sent.
        sent_at: Unix time, to tell a worker that was started since.
        number: Of the seal.
        answers: Digest of the seal.
    """

    request: Request
    deadline: float
    message_id: str = ""
    sent_at: float = 0.0
    number: int = 0
    answers: str = ""


class SiteLink:
    """Sends requests to the sites' workers; see ``federation.Link``.

    Args:
        grid: The way to the SuperLink.
        folder: The job's folder; a file ``stop`` in it ends the run.
        roster: Names and keys of the sites.
        node_keys: Flower node keys by the sites' numbers, PEM.
        sites: Numbers of the sites of the job.
        own: The server's key.
        log: The server's audit log.
        deadlines: From ``server.toml``.
    """

    def __init__(
        self,
        grid: ParcelGrid,
        folder: Path,
        roster: Roster,
        node_keys: Mapping[int, bytes],
        sites: Sequence[int],
        own: identity.Identity,
        log: AuditLog,
        deadlines: Deadlines,
    ) -> None:
        self._grid = grid
        self._folder = folder
        self._roster = roster
        self._node_keys = dict(node_keys)
        self._sites = list(sites)
        self._own = own
        self._log = log
        self._deadlines = deadlines
        self._number = 0
        self._looked_at = -LOOK_S
        self._online: dict[int, tuple[int, float]] = {}
        self._heads: dict[str, str] = {}
        self._vector_bytes = 1
        self._turn = 0

    @property
    def hello_s(self) -> int:
        """How long sites may take to answer a new job."""
        return self._deadlines.hello_s

    def nodes(self) -> list[int]:
        """Return the numbers of the job's sites, whether or not they are there."""
        return list(self._sites)

    def pause(self, seconds: float) -> None:
        """Wait, and look whether the run is to stop.

        Raises:
            Stopped: It is.
        """
        until = time.monotonic() + seconds
        while True:
            if (self._folder / "stop").exists():
                raise Stopped("stopped by an operator")
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, LOOK_S))

    def _look(self) -> None:
        """Learn which sites are there, and since when: node number and start by site."""
        if time.monotonic() - self._looked_at < LOOK_S:
            return
        self._looked_at = time.monotonic()
        numbers = {key: number for number, key in self._node_keys.items()}
        self._online = {
            numbers[node.public_key]: (node.node_id, unix_time(node.last_activated_at))
            for node in self._grid.get_nodes()
            if node.public_key in numbers
        }

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        """Send each site its request; yield each reply as it comes, or a ``Refusal`` at the deadline."""
        now = time.monotonic()
        waiting = {site: Open(request, now + self._patience(request)) for site, request in requests.items()}
        for request in requests.values():
            if isinstance(request, TrainRequest):
                self._vector_bytes = max(1, request.weights.nbytes)
        while waiting:
            self._look()
            self._send(waiting)
            came = False
            for site, reply in self._pull(waiting):
                came = True
                del waiting[site]
                yield site, reply
            for site in [site for site, item in waiting.items() if time.monotonic() > item.deadline]:
                yield site, refusal(waiting.pop(site).request, "deadline")
            if waiting and not came:
                self.pause(POLL_S)

    def _patience(self, request: Request) -> float:
        if isinstance(request, HelloRequest):
            return min(HELLO_S, self._deadlines.hello_s)  # who is away is asked again, see ``first_meeting``
        return self._deadlines.step_s if isinstance(request, SecureRequest) else self._deadlines.train_s

    def _send(self, waiting: Mapping[int, Open]) -> None:
        """Send the requests that are not on their way to the sites that are there, all at once."""
        batch: list[tuple[Open, Message]] = []
        packed: tuple[Request | None, RecordDict, bytes] = (None, RecordDict(), b"")
        for site, item in waiting.items():
            node, started = self._online.get(site, (0, 0.0))
            if item.message_id and started > item.sent_at:
                item.message_id = ""
            if node and not item.message_id:
                if packed[0] is not item.request:  # most often all sites get the same
                    record = pack(item.request)
                    packed = (item.request, record, content_digest(record))
                batch.append((item, self._message(site, node, item, packed[1], packed[2])))
        if batch:
            sent = self._grid.push_messages([message for _, message in batch])
            for (item, _), number in zip(batch, sent, strict=True):
                item.message_id, item.sent_at = number, time.time()

    def _message(self, site: int, node: int, item: Open, record: RecordDict, digest: bytes) -> Message:
        """Seal a request for a site, and note what its reply must answer."""
        self._number = max(self._number + 1, time.time_ns())
        head = self._log.head()
        name = self._roster.member(site).name
        seal = Seal(SERVER, name, self._number, "", head.count, head.digest.hex())
        item.number, item.answers = self._number, seal.digest(digest)
        kind = MESSAGE_TYPES[type(item.request)]
        return Message(sealed(record, seal, self._own, digest), dst_node_id=node, message_type=kind)

    def _pull(self, waiting: Mapping[int, Open]) -> Iterator[tuple[int, Reply]]:
        sent = {item.message_id: site for site, item in waiting.items() if item.message_id}
        if not sent:
            return
        most = max(1, OPEN_BYTES // self._vector_bytes)
        asked = list(sent)
        if len(asked) > most:  # others' turn the next time
            self._turn = (self._turn + most) % len(asked)
            asked = (asked[self._turn :] + asked[: self._turn])[:most]
        for message in list(self._grid.pull_messages(asked)):
            site = sent[message.metadata.reply_to_message_id]
            item = waiting[site]
            if message.has_error():  # the site went away, or Flower dropped the message
                item.message_id = ""
                self._looked_at = -LOOK_S
                continue
            yield site, self._read(site, item, message.content)

    def _read(self, site: int, item: Open, content: RecordDict) -> Reply:
        member = self._roster.member(site)
        try:
            seal, _ = open_seal(content, bytes.fromhex(member.key))
            if (seal.sender, seal.receiver, seal.answers) != (member.name, SERVER, item.answers):
                raise MessageError("a reply is from another site, or to another request")
            reply: Reply = unpack(content, Reply)
        except MessageError as error:
            self._log.append("refused", site=member.name, reason="message")
            logger.warning("the reply of %s is refused: %s", member.name, error)
            return refusal(item.request, "message")
        if self._heads.get(member.name) != seal.log_head and not isinstance(item.request, SecureRequest):
            self._heads[member.name] = seal.log_head
            self._log.append("peer-head", name=member.name, count=seal.log_count, digest=seal.log_head)
        return reply


def refusal(request: Request, code: str) -> Refusal:
    """Return what stands for the reply of a site that gave none."""
    return Refusal(request.job_digest, "", 0 if isinstance(request, HelloRequest) else request.round, code)


def unix_time(text: str) -> float:
    """Return an ISO time in seconds since 1970, 0 for none."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def run_in_folder(grid: ParcelGrid, home: ServerHome, job_id: str) -> None:
    """Run a job, from wherever its folder stands, and leave ``outcome.json``."""
    from fedvision_server.chartering import load_job_folder
    from fedvision_server.root_sets import served_root_set
    from fedvision_server.round import run_job

    folder = home.jobs / job_id
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the ServerApp of a Flower run before this one may still be ending
        try:
            started = load_job_folder(home, job_id)
            own, roster = started.keys.identity, started.keys.consortium.roster
            log = AuditLog(home.audit, own, SERVER)
            keys, deadlines = node_keys(home, roster), home.settings().deadlines
            link = SiteLink(grid, folder, roster, keys, started.numbers, own, log, deadlines)
            named = started.keys.consortium.charter.root_set
            root = served_root_set(home, named) if named else None
            run_job(started.job, link, folder, started.cohort, noted_in(log, job_id), started.keys, root)
            with (folder / "model.safetensors").open("rb") as file:
                log.append("released", job=job_id, model=hashlib.file_digest(file, "sha256").hexdigest())
        except Stopped as error:
            outcome = {"state": "stopped", "error": str(error), "hint": error.hint}
        except FedvisionError as error:
            outcome = {"state": "failed", "error": str(error), "hint": error.hint}
        except Exception:
            outcome = {"state": "crashed", "error": traceback.format_exc(), "hint": ""}
        else:
            outcome = {"state": "done", "error": "", "hint": ""}
        write_json(folder / "outcome.json", {"format": 1, **outcome})


def noted_in(log: AuditLog, job_id: str) -> Observer:
    """Return an observer that writes into the audit log what matters of a run's events."""

    def observe(event: dict[str, Any]) -> None:
        kind = event["event"]
        about: dict[str, Any] = {"job": job_id, "round": int(event.get("round", 0))}
        if kind == "start":
            log.append("round-opened", **about, sites=event["sites"])
        elif kind == "round":
            log.append("round-closed", **about, num_sites=event["num_sites"], level=event["level"])
        elif kind == "thrown away":
            log.append("round-closed", **about, num_sites=0, reason=event["reason"])
        elif kind == "expelled":
            log.append("expelled", **about, site=event["site"], rule=event["rule"])
        elif kind in ("train", "validate") and event.get("status") == "refused":
            log.append("excluded", **about, site=event["site"], reason=event["reason"])

    return observe


def node_keys(home: ServerHome, roster: Roster) -> dict[int, bytes]:
    """Return the Flower node keys of the sites of a roster, by their numbers."""
    keys = {(record.name, record.identity): record for record in load_records(home).values()}
    found = {member.number: keys.get((member.name, member.key)) for member in roster.sites}
    return {
        number: bytes.fromhex(record.node_key)
        for number, record in found.items()
        if record is not None and record.status == "enrolled"
    }


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job that the run configuration names."""
    assert isinstance(grid, HttpGrid)
    run_in_folder(
        ParcelGrid(grid), ServerHome(Path(os.environ[HOME_VARIABLE])), str(context.run_config["job"])
    )
