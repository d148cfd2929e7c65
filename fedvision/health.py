"""Whether a program is well, and its numbers, over HTTP: ``GET /health`` and ``GET /metrics``.

    /health    200 "ok: ..." or 503 "not ok: ...", one line of text
    /metrics   Prometheus' text format 0.0.4

Rules:
- ``METRICS`` is the whole list of what can be read there: numbers, and names of parties, states and rules.
- A reply is never longer for what was asked, and repeats nothing of it. Neither says which software answers.
- There is no password, so the programs listen on loopback unless their configuration says otherwise.
- A request has ``REQUEST_S`` seconds and ``LARGEST_REQUEST`` bytes; ``MAX_CONNECTIONS`` are served at once,
  and the next are closed. So nobody can hold on to memory or threads.
"""

import io
import logging
import math
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal

from fedvision.errors import ConfigError, FedvisionError

logger = logging.getLogger(__name__)

REQUEST_S = 3.0
LARGEST_REQUEST = 8192
MAX_CONNECTIONS = 16
LARGEST_LABEL = 64
TEXT = re.compile(r"[ -~]{0,200}")
TEXT_TYPE = "text/plain; charset=utf-8"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Metric:
    """What a metric means.

    Attributes:
        type: A counter only grows while the program runs; a gauge is a state.
        help: In one sentence.
        labels: Names of what tells its values apart.
    """

    type: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


METRICS: Mapping[str, Metric] = {
    "fedvision_info": Metric("gauge", "1; the label is the installed version.", ("version",)),
    "fedvision_start_time_seconds": Metric("gauge", "When the program started, Unix time."),
    "fedvision_audit_lines": Metric("gauge", "Lines in the audit log."),
    "fedvision_disk_free_bytes": Metric("gauge", "Free space where the program keeps its state."),
    "fedvision_memory_bytes": Metric("gauge", "Resident memory, by process.", ("process",)),
    "fedvision_certificate_expiry_seconds": Metric(
        "gauge", "When a certificate expires, Unix time.", ("certificate",)
    ),
    "fedvision_last_message_seconds": Metric(
        "gauge", "When the last message of a party arrived, Unix time.", ("party",)
    ),
    "fedvision_messages_total": Metric("counter", "Messages, by direction: in, out.", ("direction",)),
    "fedvision_message_bytes_total": Metric(
        "counter", "Bytes of messages, by direction: in, out.", ("direction",)
    ),
    "fedvision_refused_total": Metric("counter", "Messages and requests refused, by rule.", ("rule",)),
    "fedvision_sites_enrolled": Metric("gauge", "Sites in the roster in force."),
    "fedvision_sites_online": Metric("gauge", "Sites that were heard of within the last minute."),
    "fedvision_jobs": Metric("gauge", "Jobs, by state.", ("state",)),
    "fedvision_rounds_total": Metric("counter", "Rounds that were closed."),
    "fedvision_attempts_failed_total": Metric("counter", "Attempts of a round that had to be repeated."),
    "fedvision_round_seconds": Metric("gauge", "How long the last closed round took."),
    "fedvision_children_restarted_total": Metric(
        "counter", "Restarts of the server's processes.", ("process",)
    ),
}
"""Every metric of both programs; each gives those that it has."""

Values = float | Mapping[tuple[str, ...], float]


@dataclass(frozen=True)
class Health:
    """How a program is at this moment.

    Attributes:
        is_ok: Whether it does its work; waiting for others is well.
        text: Why, in one line of ASCII; no path, no patient.
        metrics: Values by name, as ``METRICS`` lists them: a number, or one for each tuple of label values.

    Raises:
        ValueError: The text has several lines or odd characters, or a metric is not as listed.
    """

    is_ok: bool
    text: str
    metrics: Mapping[str, Values]

    def __post_init__(self) -> None:
        if not TEXT.fullmatch(self.text):
            raise ValueError("text must be one line of at most 200 ASCII characters")
        for name, values in self.metrics.items():
            if name not in METRICS:
                raise ValueError(f"METRICS must list {name}")
            labels = METRICS[name].labels
            if isinstance(values, Mapping) != bool(labels):
                raise ValueError(f"{name} must have the labels {labels}")
            if isinstance(values, Mapping):
                for key in values:
                    if len(key) != len(labels) or not all(isinstance(one, str) for one in key):
                        raise ValueError(f"{name} must have the labels {labels}")


def exposition(metrics: Mapping[str, Values]) -> str:
    """Return metrics in Prometheus' text format, version 0.0.4, sorted by name and labels."""
    lines = []
    for name in sorted(metrics):
        metric, values = METRICS[name], metrics[name]
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.type}"]
        if not isinstance(values, Mapping):
            lines.append(f"{name} {_number(values)}")
            continue
        for key in sorted(values):
            labels = ",".join(
                f'{label}="{_escaped(value)}"' for label, value in zip(metric.labels, key, strict=True)
            )
            lines.append(f"{name}{{{labels}}} {_number(values[key])}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(value: str) -> str:
    plain = value[:LARGEST_LABEL].encode("utf-8", "replace").decode()
    return plain.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


class HealthServer:
    """Answers in threads of its own until it is closed.

    Attributes:
        address: Where it listens.
        port: Where it listens; the one that the system chose, if 0 was asked for.
    """

    def __init__(self, listener: "_Listener") -> None:
        self._listener = listener
        self.address, self.port = listener.socket.getsockname()[:2]
        self._thread = threading.Thread(
            target=listener.serve_forever, args=(0.1,), name="health", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; a second call does nothing."""
        if self._thread.is_alive():
            self._listener.shutdown()
            self._thread.join()
        self._listener.server_close()

    def __enter__(self) -> "HealthServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(address: str, port: int, state: Callable[[], Health]) -> HealthServer:
    """Begin to answer.

    Guarantee: whatever is sent, the program goes on, and replies hold nothing but what ``state`` returned.

    Args:
        address: An address of this host, usually "127.0.0.1"; IPv6 without brackets.
        port: 0 for one that is free.
        state: Is asked for each request, one at a time, from another thread; to be quick. If it raises a
            ``FedvisionError``, the program is not well, and only the error's code is sent.

    Raises:
        ConfigError: The address is in use, or not this host's.
    """
    try:
        listener = (_Listener6 if ":" in address else _Listener)((address, port), _Handler)
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(
            f"cannot listen on {address} port {port} for health and metrics: {reason}", "choose another port"
        ) from None
    listener.state = state
    return HealthServer(listener)


class _Listener(socketserver.ThreadingTCPServer):
    """``http.server``'s own would look up the host's name, which may ask another host."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    state: Callable[[], Health]

    def __init__(self, *arguments: Any) -> None:
        self.free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.asking = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        kind = sys.exc_info()[0]
        if kind is not None and not issubclass(kind, OSError):
            logger.warning("health: a request ended with %s", kind.__name__)

    def health(self) -> Health:
        """Return how the program is."""
        with self.asking:
            try:
                return self.state()
            except FedvisionError as error:
                return Health(False, f"error {error.code}", {})


class _Listener6(_Listener):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.0"
    timeout = REQUEST_S

    def setup(self) -> None:
        """Read the whole request before it is parsed, so that nobody can drip it in for ever."""
        super().setup()
        end = time.monotonic() + REQUEST_S
        content = b""
        while b"\r\n\r\n" not in content and b"\n\n" not in content and len(content) < LARGEST_REQUEST:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.connection.settimeout(left)
            more = self.connection.recv(LARGEST_REQUEST - len(content))
            if not more:
                break
            content += more
        self.connection.settimeout(REQUEST_S)
        self.rfile = io.BufferedReader(io.BytesIO(content))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            health = self.server.health()
            word, status = ("ok", 200) if health.is_ok else ("not ok", 503)
            self._reply(status, f"{word}: {health.text}\n")
        elif path == "/metrics":
            self._reply(200, exposition(self.server.health().metrics), METRICS_TYPE)
        else:
            self.send_error(404)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Reply with a fixed text; the inherited one repeats what was asked."""
        # A method other than GET has no `do_...`: 501, which says less than that it is not allowed.
        self._reply(405 if code == 501 else code, "GET /health or GET /metrics\n")

    def _reply(self, status: int, text: str, content_type: str = TEXT_TYPE) -> None:
        content = text.encode()
        self.close_connection = True
        self.request_version = "HTTP/1.0"
        self.send_response_only(status)
        if status == 405:
            self.send_header("Allow", "GET")
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Write no access log: it would repeat what was asked."""
