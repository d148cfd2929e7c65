"""Two ends of a TLS connection in one process, and a small server that a site can check."""

import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from fedvision.secagg import certificates, issuing
from fedvision.secagg.enrolling import now_utc

NOW = now_utc()


class Party:
    """An authority, a server's or a site's files in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.key, self.certificate, self.authority = folder / "x.key", folder / "x.crt", folder / "ca.crt"

    def write(self, key: bytes, certificate: bytes, authority: bytes) -> "Party":
        """Write the three files."""
        self.key.write_bytes(key)
        self.key.chmod(0o600)
        self.certificate.write_bytes(certificate)
        self.authority.write_bytes(authority)
        return self


class Authority:
    """A federation's certificate authority that issues parties for tests."""

    def __init__(self, folder: Path, federation: str = "lung", made: Any = NOW) -> None:
        self.folder = folder
        key = issuing.new_tls_key()
        self.pair = (key, issuing.authority_certificate(key, federation, made))

    def server(self, *hosts: str, made: Any = NOW) -> Party:
        """Return a server with these names."""
        key = issuing.new_tls_key()
        certificate = issuing.server_certificate(self.pair, key, hosts, made)
        return self._party("server").write(key, certificate, self.pair[1])

    def site(self, name: str = "utrecht", made: Any = NOW) -> Party:
        """Return a site."""
        key = issuing.new_tls_key()
        request = issuing.make_request(key, name)
        certificate = issuing.site_certificate(self.pair, request, name, made)
        return self._party(name).write(key, certificate, self.pair[1])

    def _party(self, name: str) -> Party:
        number = len(list(self.folder.glob("*"))) if self.folder.exists() else 0
        return Party(self.folder / f"{number}-{name}")


def client(of: Party) -> ssl.SSLContext:
    """Return a site's context."""
    return certificates.client_context(of.authority, of.certificate, of.key)


def server(of: Party) -> ssl.SSLContext:
    """Return a server's context."""
    return certificates.server_context(of.authority, of.certificate, of.key)


def handshake(
    calling: ssl.SSLContext, called: ssl.SSLContext, host: str = "fl.example.org"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Connect two contexts in memory and let each read a byte of the other.

    Raises:
        ssl.SSLError: Either side refuses.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        calling.wrap_bio(to_client, to_server, server_hostname=host),
        called.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                continue
    assert not waiting
    for one, other in (ends, ends[::-1]):
        one.write(b"x")
        assert other.read(1) == b"x"
    return ends[0], ends[1]


@contextmanager
def https_server(
    context: ssl.SSLContext, accepted: Any = lambda fingerprint: True, ahead: timedelta = timedelta()
) -> Iterator[int]:
    """Serve GET on a loopback port; yields the port.

    Args:
        context: Of the server.
        accepted: Gets the fingerprint of a peer's certificate; 403 if it says no.
        ahead: How much the clock of this server is ahead.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            print_of_peer = certificates.peer_fingerprint(self.connection)  # type: ignore[arg-type]
            self.send_response_only(404 if accepted(print_of_peer) else 403)
            self.send_header("Date", format_datetime(now_utc() + ahead, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def get_request(self) -> Any:
            plain, address = super().get_request()
            plain.settimeout(5)
            try:
                return context.wrap_socket(plain, server_side=True), address
            except (ssl.SSLError, OSError):
                plain.close()
                raise

    running = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield running.server_address[1]
    finally:
        running.shutdown()
        running.server_close()
        thread.join()
