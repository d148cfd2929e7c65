"""The site's program: asks the server for work, checks who asks, does it with the site's own code, answers.

One long-lived process. It runs what is installed at the site and nothing that it is sent: a message is data,
its seal is checked before its content is read, and Flower's code bundles are never fetched.

Rules:
- A request counts if the server of the pinned roster sealed it, for this site, with a number larger than any
  before it; the largest number is on disk before the work begins, so no request is done twice.
- Whatever goes wrong, the server learns a code (see ``wire.messages.Refusal``), never a text.
- A lost connection is made again, with growing pauses, for ever; a site is left running for months.
"""

import contextlib
import logging
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import httpx
from flwr.app import Message, RecordDict

from fedvision import __version__, health
from fedvision.audit.log import AuditLog
from fedvision.config import Job
from fedvision.data.manifest import Manifest
from fedvision.errors import FedvisionError, MessageError, StorageError
from fedvision.secagg import certificates, identity
from fedvision.secagg.codec import decode
from fedvision.secagg.messages import Documents
from fedvision.storage import append_line, read_json, write_json
from fedvision.wire.envelope import SERVER, Seal, open_seal, sealed
from fedvision.wire.messages import (
    EvaluateReply,
    HelloRequest,
    Refusal,
    Reply,
    Request,
    SecureReply,
    TrainRequest,
)
from fedvision.wire.records import pack, unpack
from fedvision_sites.budget import Budget
from fedvision_sites.decisions import Desk
from fedvision_sites.fleet import Fleet
from fedvision_sites.home import SiteHome, SiteSettings
from fedvision_sites.secure import SecureConfig
from fedvision_sites.setup import install_roster
from fedvision_sites.work import DENIED, Site, SiteConfig

logger = logging.getLogger(__name__)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
QUIET_S = 60.0
SILENT_S = 120.0
"""Without contact for so long a site is not well. While it trains, heartbeats are contact."""


class Worker:
    """Answers the server's requests for one site, one job at a time in memory.

    Args:
        home: The site's folder.
        settings: Of ``site.toml``.
        log: The site's audit log.
    """

    def __init__(self, home: SiteHome, settings: SiteSettings, log: AuditLog) -> None:
        self._home = home
        self._settings = settings
        self._log = log
        self._own = identity.load(home.identity)
        self._server, self._governance = public_key(home.server_pub), public_key(home.governance)
        self._desk = Desk(home, self._governance, log.append)
        self._number_file = home.guard / "last-request.json"
        self._number = read_number(self._number_file)
        self._site: Site | None = None
        self._policy = settings.policy
        self._server_head = ""
        self._refused_at = -QUIET_S
        self._started = time.time()
        self.fleet: Fleet | None = None
        self.num_answered = self.num_refused = 0

    @property
    def name(self) -> str:
        """The site's name."""
        return self._settings.site.name

    def answer(self, content: RecordDict) -> RecordDict | None:
        """Answer one record; None for one that is not the server's, which gets no answer at all."""
        try:
            seal, asked = open_seal(content, self._server)
            if (seal.sender, seal.receiver, seal.answers) != (SERVER, self.name, ""):
                raise MessageError("a request is for somebody else")
            if seal.number <= self._number:
                raise MessageError("a request was repeated")
        except MessageError as error:
            logger.warning("request refused: %s", error)
            self._note_refused()
            return None
        self._number = seal.number
        write_json(self._number_file, {"format": 1, "number": seal.number}, 0o600)
        reply = self._do(content, seal)
        head = self._log.head()
        back = Seal(self.name, SERVER, seal.number, asked, head.count, head.digest.hex())
        self.num_answered += 1
        return sealed(pack(reply), back, self._own)

    def _note_refused(self) -> None:
        """Write into the audit log that something was refused, at most once a minute."""
        self.num_refused += 1
        if time.monotonic() - self._refused_at > QUIET_S:
            self._refused_at = time.monotonic()
            self._log.append("refused", reason="message")

    def _do(self, content: RecordDict, seal: Seal) -> Reply:
        digest, number = "", 0
        try:
            request: Request = unpack(content, Request)
            digest, number = request.job_digest, getattr(request, "round", 0)
            if isinstance(request, HelloRequest | TrainRequest):
                self._note_round(request, seal)
            reply = self._site_for(digest).answer(request)
            self._note_release(reply)
            return reply
        except MessageError as error:
            logger.warning("message refused: %s", error)
            return Refusal(digest, self.name, number, error.code)
        except Exception:  # the edge: nothing but a code may reach the server
            text = traceback.format_exc()
            logger.error("round %s failed: %s", number, text)
            append_line(self._home.root / "log.jsonl", {"round": number, "failed": text})
            return Refusal(digest, self.name, number, "internal")

    def _note_round(self, request: HelloRequest | TrainRequest, seal: Seal) -> None:
        """Write where the server's log stands into this site's, once a round."""
        if isinstance(request, TrainRequest):
            self._log.append("round-opened", job=request.job_digest, round=request.round)
        if seal.log_head != self._server_head:
            self._server_head = seal.log_head
            self._log.append("peer-head", name=SERVER, count=seal.log_count, digest=seal.log_head)

    def _note_release(self, reply: Reply) -> None:
        """Write down what leaves with a reply, before it does."""
        if isinstance(reply, SecureReply) and reply.masked.size:
            self._log.append("released", job=reply.job_digest, round=reply.round, what="masked input")
        elif isinstance(reply, EvaluateReply):
            self._log.append("released", job=reply.job_digest, round=reply.round, what=f"{reply.split} sums")

    def _site_for(self, digest: str) -> Site:
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise MessageError("a job is named by 64 hexadecimal digits")
        config = self._config_for(digest)
        if self._site is None or self._site.config != config:
            self._site = Site(config)
        return self._site

    def _budget(self) -> Budget:
        """Return the policy's limits as they are now; while they cannot be read, no job may run."""
        with contextlib.suppress(FedvisionError):
            self._policy = self._home.settings().policy
        return Budget(self._home.ledger, self._policy.largest_epsilon, self._policy.largest_epsilon_alone)

    def _config_for(self, digest: str) -> SiteConfig:
        own = self._settings.site
        return SiteConfig(
            own.name,
            (own.data,),
            self._home.jobs / digest[:16],
            own.threads,
            int(own.cache_gb * 1e9),
            resampling_seed(self._home.keys / "resampling.seed"),
            SecureConfig(self._home.identity, self._governance, self._home.guard),
            self._decide,
            self._budget(),
            self._log.append,
        )

    def _decide(self, job: Job, documents: bytes, manifest: Manifest) -> str:
        """Return "" if a job may run, else a code; see ``work.Decide``.

        A job that is new here must come with a roster that is not older than the newest this site has seen.
        One that it has enrolled in goes on under its own.
        """
        is_new = not (self._home.jobs / job.digest()[:16] / "documents").exists()
        if documents and is_new:
            roster = install_roster(self._home, decode(documents, Documents).roster)
            if self._own.public.hex() not in {member.key for member in roster.sites}:
                return DENIED
        return self._desk.decide(job, documents, manifest)

    def health(self) -> health.Health:
        """Return how the site is; called from another thread."""
        contact = self.fleet.last_contact if self.fleet else 0.0
        metrics: dict[str, health.Values] = {
            "fedvision_info": {(__version__,): 1},
            "fedvision_start_time_seconds": self._started,
            "fedvision_audit_lines": self._log.head().count,
            "fedvision_disk_free_bytes": shutil.disk_usage(self._home.root).free,
            "fedvision_last_message_seconds": {(SERVER,): contact},
            "fedvision_messages_total": {("in",): self.num_answered, ("out",): self.num_answered},
            "fedvision_refused_total": {("message",): self.num_refused},
        }
        is_ok = time.time() - contact < SILENT_S
        return health.Health(is_ok, "connected" if is_ok else "no contact with the server", metrics)


def public_key(path: Path) -> bytes:
    """Return the key in a file of a public key."""
    return identity.parse_public(path.read_text(encoding="utf-8"), str(path))[1]


def resampling_seed(path: Path) -> int:
    """Return the site's own seed for bootstrap resamples; drawn at random once, never sent."""
    if not path.exists():
        write_json(path, int.from_bytes(os.urandom(6), "big"), 0o600)
    return int(read_json(path))


def read_number(path: Path) -> int:
    """Return the number of the last request that was answered, 0 before the first.

    Raises:
        StorageError: The file is damaged, or of a newer version.
    """
    if not path.exists():
        return 0
    found = read_json(path)
    number = found.get("number") if isinstance(found, dict) and found.get("format") == 1 else None
    if type(number) is not int or number < 0:
        raise StorageError(f"{path} is damaged, or of another version", "this is what keeps old requests out")
    return number


def serve(
    home: SiteHome,
    worker: Worker,
    stop: threading.Event,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Connect, answer, and connect again, until ``stop`` is set.

    Args:
        home: The site's folder.
        worker: Answers.
        stop: Ends it after the message at hand.
        tell: Is told in one line when the connection comes and goes.
    """
    settings = home.settings()
    context = certificates.client_context(certificate=home.tls_cert, key=home.tls_key, authority=home.ca_cert)
    node_key = certificates.read_private(home.node_key)
    pause = FIRST_PAUSE_S
    while not stop.is_set():
        try:
            with Fleet(settings.site.server, context, node_key, stop) as fleet:
                worker.fleet = fleet
                tell(f"connected to {settings.site.server}")
                pause = FIRST_PAUSE_S
                _answer_all(fleet, worker, stop, settings.site.poll_s)
        except httpx.HTTPStatusError as error:
            tell(f"the server answers {error.response.status_code}: {error.response.text[:200]!r}")
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            tell(f"no connection to {settings.site.server}: {reason_of(error)}")
        stop.wait(pause)
        pause = min(pause * 2, LONGEST_PAUSE_S)


def reason_of(error: BaseException) -> str:
    """Return an error's text on one line, or its type where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _answer_all(fleet: Fleet, worker: Worker, stop: threading.Event, poll_s: float) -> None:
    while not stop.is_set():
        started = time.monotonic()
        message = fleet.receive()
        if message is None:
            if time.monotonic() - started < poll_s:  # a server that does not hold such requests
                stop.wait(poll_s)
            continue
        started = time.monotonic()
        try:
            content = worker.answer(message.content)
        except (FedvisionError, OSError) as error:  # such as a full disk: this message stays unanswered
            logger.error("not answered: %s", error)
            if isinstance(error, StorageError):
                stop.wait(poll_s)
            continue
        if content is not None:
            fleet.send(Message(content, reply_to=message), time.monotonic() - started)
