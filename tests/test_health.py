"""Health and metrics: what is read there, and that nothing that is sent does harm."""

import contextlib
import http.client
import logging
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedvision import health
from fedvision.errors import ConfigError, StorageError
from fedvision.health import METRICS, Health, HealthServer, exposition, serve

WELL = Health(
    True,
    "2 of 3 sites online",
    {
        "fedvision_rounds_total": 7,
        "fedvision_round_seconds": 1.25,
        "fedvision_jobs": {("waiting",): 1, ("running",): 2.0},
    },
)
LINE = re.compile(r'[a-z_]+(\{[a-z_]+="([^"\\\n]|\\["\\n])*"(,[a-z_]+="([^"\\\n]|\\["\\n])*")*\})? (\S+)')


class Program:
    """What the server asks; its state can be changed."""

    def __init__(self) -> None:
        self.now: Health | Exception = WELL

    def state(self) -> Health:
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


@pytest.fixture
def program() -> Program:
    return Program()


@pytest.fixture
def server(program: Program) -> Iterator[HealthServer]:
    with serve("127.0.0.1", 0, program.state) as running:
        yield running


def get(server: HealthServer, path: str) -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10) as reply:
            return reply.status, reply.read().decode(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def exchange(server: HealthServer, content: bytes, timeout: float = 10) -> bytes:
    """Send bytes, and return everything that comes back."""
    reply = b""
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address, timeout) as one, contextlib.suppress(ConnectionError):
        one.sendall(content)
        with contextlib.suppress(OSError):  # Closed by the other side already.
            one.shutdown(socket.SHUT_WR)
        while more := one.recv(65_536):
            reply += more
    return reply


def assert_alive(server: HealthServer) -> None:
    assert get(server, "/health")[:2] == (200, "ok: 2 of 3 sites online\n")


def test_health_says_ok_or_why_not(server: HealthServer, program: Program) -> None:
    assert_alive(server)
    program.now = Health(False, "no message from the server for 600 s", {})
    assert get(server, "/health")[:2] == (503, "not ok: no message from the server for 600 s\n")


def test_metrics_are_in_prometheus_text_format(server: HealthServer) -> None:
    status, text, headers = get(server, "/metrics?name=x")
    assert status == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert text == (
        "# HELP fedvision_jobs Jobs, by state.\n"
        "# TYPE fedvision_jobs gauge\n"
        'fedvision_jobs{state="running"} 2\n'
        'fedvision_jobs{state="waiting"} 1\n'
        "# HELP fedvision_round_seconds How long the last closed round took.\n"
        "# TYPE fedvision_round_seconds gauge\n"
        "fedvision_round_seconds 1.25\n"
        "# HELP fedvision_rounds_total Rounds that were closed.\n"
        "# TYPE fedvision_rounds_total counter\n"
        "fedvision_rounds_total 7\n"
    )


def test_every_metric_that_is_listed_follows_prometheus_conventions() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"fedvision(_[a-z]+)+", name)
        assert name.endswith("_total") == (metric.type == "counter")
        assert all(re.fullmatch(r"[a-z]+", label) for label in metric.labels)
        assert metric.help.endswith(".") and "\n" not in metric.help and "\\" not in metric.help


@given(
    values=st.dictionaries(st.tuples(st.text(max_size=100)), st.floats(), max_size=5),
    number=st.floats() | st.integers(-(2**70), 2**70),
)
def test_any_value_and_label_gives_whole_lines(values: dict, number: float) -> None:
    text = exposition({"fedvision_jobs": values, "fedvision_rounds_total": number})
    assert text.endswith("\n")
    samples = [line for line in text[:-1].split("\n") if not line.startswith("# ")]
    assert len(samples) == len(values) + 1
    for line in samples:
        match = LINE.fullmatch(line)
        assert match, line
        float(match[5])
    assert float(samples[-1].split()[-1]) == pytest.approx(float(number), nan_ok=True, rel=1e-15)


def test_a_label_is_cut_to_a_length_and_is_always_utf_8() -> None:
    text = exposition({"fedvision_jobs": {("x" * 100,): 1, ("\ud800",): 2}})
    assert text.endswith(f'{{state="{"x" * 64}"}} 1\nfedvision_jobs{{state="?"}} 2\n')


@pytest.mark.parametrize(
    ("text", "metrics"),
    [
        ("two\nlines", {}),
        ("x" * 201, {}),
        ("Mül", {}),
        ("", {"fedvision_patients": 1}),
        ("", {"fedvision_jobs": 1}),
        ("", {"fedvision_rounds_total": {("a",): 1}}),
        ("", {"fedvision_jobs": {("a", "b"): 1}}),
        ("", {"fedvision_jobs": {(1,): 1}}),
    ],
)
def test_what_is_not_listed_cannot_be_shown(text: str, metrics: dict) -> None:
    with pytest.raises(ValueError):
        Health(True, text, metrics)


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PATCH", "X"]
)
def test_only_get_is_answered(server: HealthServer, method: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, "/metrics", body=b"secret=1" if method in ("POST", "PUT") else None)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    assert reply.status == 405 and reply.headers["Allow"] == "GET"
    assert content == (b"" if method == "HEAD" else b"GET /health or GET /metrics\n")
    assert_alive(server)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/healthz",
        "/health/",
        "/metrics/../health",
        "/%68ealth",
        "/../../etc/passwd",
        "/x" * 2000,
    ],
)
def test_other_paths_are_not_found_and_not_repeated(server: HealthServer, path: str) -> None:
    status, text, headers = get(server, path)
    assert (status, text) == (404, "GET /health or GET /metrics\n")
    assert "Server" not in headers and "Date" not in headers
    assert not any(path in value for value in headers.values() if len(path) > 1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1 extra\r\n\r\n",
        b"GET /" + b"secret" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X-Secret: secret\r\n" * 10_000 + b"\r\n",
        b"GET /secret\x1b[2J HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
        b"GET /secret HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"GET /secret HTTP/1.1\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"secret\0" * 2000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"secret" * 30,
    ],
)
def test_odd_requests_do_no_harm_and_are_not_repeated(
    server: HealthServer, content: bytes, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    reply = exchange(server, content)
    assert b"secret" not in reply and b"Python" not in reply and len(reply) < 400
    assert_alive(server)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=400)
    | st.binary(max_size=60).map(lambda b: b"GET /" + b + b" HTTP/1.1\r\n\r\n")
)
def test_arbitrary_bytes_get_a_short_answer_or_none(server: HealthServer, content: bytes) -> None:
    reply = exchange(server, content)
    assert len(reply) < 400
    assert reply == b"" or b"GET /health or GET /metrics\n" in reply or b"HTTP/1.0 200 OK\r\n" in reply


def test_an_answer_to_head_has_no_content(server: HealthServer) -> None:
    assert exchange(server, b"HEAD /health HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")


def test_several_requests_in_one_connection_get_one_answer(server: HealthServer) -> None:
    reply = exchange(server, b"GET /health HTTP/1.1\r\nConnection: keep-alive\r\n\r\n" * 50)
    assert reply.count(b"HTTP/1.0 200 OK") == 1


def test_many_at_once_are_answered_or_closed(server: HealthServer) -> None:
    answers: list[bytes] = []

    def ask() -> None:
        for _ in range(5):
            answers.append(exchange(server, b"GET /metrics HTTP/1.1\r\n\r\n"))

    before = threading.active_count()
    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    assert threading.active_count() <= before + 40 + health.MAX_CONNECTIONS
    for thread in threads:
        thread.join()
    assert len(answers) == 200
    good = [answer for answer in answers if answer]
    assert len(good) > 20
    assert all(answer.endswith(b"fedvision_rounds_total 7\n") for answer in good)
    assert_alive(server)


def test_who_holds_on_to_connections_is_cut_off(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "REQUEST_S", 0.5)
    before = threading.active_count()
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(60)]
    begin = time.monotonic()
    time.sleep(0.2)
    assert threading.active_count() <= before + health.MAX_CONNECTIONS
    # They drip bytes, so that each one comes before a time-out of one recv.
    for _ in range(6):
        for connection in held:
            with contextlib.suppress(OSError):
                connection.send(b"G")
        time.sleep(0.15)
    assert time.monotonic() - begin < 5
    assert threading.active_count() <= before
    assert caplog.text == ""
    for connection in held:
        connection.close()
    assert_alive(server)


def test_a_program_that_cannot_tell_is_not_well_and_only_the_code_is_sent(
    server: HealthServer, program: Program
) -> None:
    program.now = StorageError("cannot read /data/patient-7.nii", "hint")
    assert get(server, "/health")[:2] == (503, "not ok: error storage\n")
    assert get(server, "/metrics")[:2] == (200, "")


def test_a_bug_in_the_program_closes_the_connection_and_is_logged_by_its_kind(
    server: HealthServer,
    program: Program,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    program.now = KeyError("patient-7")
    assert exchange(server, b"GET /health HTTP/1.1\r\n\r\n") == b""
    deadline = time.monotonic() + 5
    while not caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "KeyError" in caplog.text and "patient" not in caplog.text
    assert capfd.readouterr().err == ""
    program.now = WELL
    assert_alive(server)


def test_the_program_is_asked_one_request_at_a_time() -> None:
    inside: list[int] = []

    def state() -> Health:
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.01)
        inside.pop()
        return WELL

    with serve("127.0.0.1", 0, state) as server:
        threads = [
            threading.Thread(target=lambda: exchange(server, b"GET /health HTTP/1.1\r\n\r\n"))
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert inside == []
        assert_alive(server)


def test_after_closing_nobody_listens_and_the_port_can_be_used_again() -> None:
    server = serve("127.0.0.1", 0, lambda: WELL)
    port = server.port
    assert server.address == "127.0.0.1"
    assert_alive(server)
    server.close()
    server.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    with serve("127.0.0.1", port, lambda: WELL) as again:
        assert_alive(again)


def test_a_port_in_use_or_a_foreign_address_is_an_error_with_a_hint(server: HealthServer) -> None:
    for address, port in (("127.0.0.1", server.port), ("192.0.2.1", 0), ("127.0.0.1", 70_000)):
        with pytest.raises(ConfigError, match="cannot listen on"):
            serve(address, port, lambda: WELL)


def test_loopback_of_ipv6_can_be_used() -> None:
    try:
        server = serve("::1", 0, lambda: WELL)
    except ConfigError:
        pytest.skip("no IPv6 here")
    with server, urllib.request.urlopen(f"http://[::1]:{server.port}/health", timeout=10) as reply:
        assert reply.read() == b"ok: 2 of 3 sites online\n"
