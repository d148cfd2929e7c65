"""The network for tests is what it says: who reaches whom, cuts, slow links, captures, and no leftovers."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.hosts import MARK, Host, Hosts, Loopback, Unsupported, open_hosts, works
from tests.packets import PCAP_HEADER, directions, frames, payload, tls_only

PORT = 8443
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

SERVER = """
import socket, ssl, sys, threading
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
if len(sys.argv) > 3:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[3])
    listener = context.wrap_socket(listener, server_side=True)
print("ready", flush=True)
def answer(connection, address):
    connection.sendall(address[0].encode() + b"\\n")
    while chunk := connection.recv(1 << 16):
        connection.sendall(chunk)
while True:
    threading.Thread(target=answer, args=listener.accept(), daemon=True).start()
"""
CONNECT = """
import socket, ssl, sys, time
def connect(address, port, certificate=None):
    connection = socket.create_connection((address, int(port)), timeout=10)
    if certificate:
        context = ssl.create_default_context(cafile=certificate)
        connection = context.wrap_socket(connection, server_hostname="server")
    return connection
"""
ASK = (
    CONNECT
    + """
connection = connect(*sys.argv[2:])
lines = connection.makefile("rb")
seen_as = lines.readline().decode().strip()
connection.sendall(sys.argv[1].encode() + b"\\n")
print(seen_as, lines.readline().decode().strip())
"""
)
TIME = (
    CONNECT
    + """
connection = connect(*sys.argv[2:])
while connection.recv(1) != b"\\n":
    pass
pings = []
for _ in range(5):
    start = time.monotonic()
    connection.sendall(b".")
    connection.recv(1)
    pings.append(time.monotonic() - start)
start = time.monotonic()
left = int(sys.argv[1])
connection.sendall(bytes(left))
while left:
    left -= len(connection.recv(1 << 16))
print(min(pings), time.monotonic() - start)
"""
)


def serve(host: Host, *arguments: object) -> "subprocess.Popen[str]":
    """Start a server on a host that says what address a client has, and then echoes."""
    program = host.popen(
        [sys.executable, "-c", SERVER, host.address, PORT, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None and program.stdout.readline() == "ready\n"
    return program


def ask(site: Host, address: str, text: str = "hello", *arguments: object) -> str:
    """Send a line from a site and return the answer."""
    done = site.python(ASK, text, address, PORT, *arguments)
    assert done.returncode == 0, done.stderr
    return str(done.stdout.strip())


@pytest.fixture(scope="module", params=["root", "user"])
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    if not works(request.param):
        pytest.skip(f"no network namespaces by way of {request.param}")
    with open_hosts(2, request.param) as network:
        serve(network.server)
        yield network


@pytest.fixture
def one_way() -> Iterator[Hosts]:
    """A network of its own, by whatever way works here."""
    with open_hosts(2) as network:
        network.require_network()
        yield network


def test_a_site_reaches_the_server_under_its_own_address(hosts: Hosts) -> None:
    for site in hosts.sites:
        assert ask(site, hosts.server.address) == f"{site.address} hello"
    assert len({site.address for site in hosts.sites}) == 2


def test_a_site_reaches_nothing_else(hosts: Hosts) -> None:
    site, other = hosts.sites
    try_it = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=0.5)"
    listener = serve(other)
    for address in (other.address, "198.51.100.7"):
        before = site.outside_packets()
        assert "timed out" in site.python(try_it, address, PORT).stderr
        assert site.outside_packets() > before
    assert other.python(try_it, other.address, PORT).returncode == 0
    before = site.outside_packets()
    assert site.python(try_it, hosts.server.address, PORT).returncode == 0
    assert site.outside_packets() == before
    listener.kill()
    listener.communicate()


def test_a_cut_link_lets_nothing_through_and_a_healed_one_goes_on(hosts: Hosts) -> None:
    site, other = hosts.sites
    code = CONNECT + textwrap.dedent("""
        connection = connect(*sys.argv[1:])
        lines = connection.makefile("rb")
        lines.readline()
        for line in sys.stdin:
            connection.sendall(line.encode())
            print(lines.readline().decode(), end="", flush=True)
        """)
    with site.popen(
        [sys.executable, "-c", code, hosts.server.address, PORT],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as client:  # fmt: skip
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write("one\n")
        client.stdin.flush()
        assert client.stdout.readline() == "one\n"
        site.cut()
        received = hosts.bytes_of(site).received
        client.stdin.write("two\n")
        client.stdin.flush()
        assert ask(other, hosts.server.address) == f"{other.address} hello"
        time.sleep(0.5)
        assert hosts.bytes_of(site).received == received
        site.heal()
        assert client.stdout.readline() == "two\n"


def test_a_slow_link_has_the_delay_and_the_rate_and_is_quick_again(hosts: Hosts) -> None:
    site, other = hosts.sites

    def measure(host: Host, num_bytes: int) -> tuple[float, float]:
        ping, whole = host.python(TIME, num_bytes, hosts.server.address, PORT).stdout.split()
        return float(ping), float(whole)

    site.slow(delay_ms=50, mbit=20, loss_percent=0)
    ping, whole = measure(site, 1_000_000)
    assert 0.1 <= ping < 0.2
    assert 0.5 <= whole < 5  # 8 Mbit at 20 Mbit/s, and the way there and back
    assert measure(other, 0)[0] < 0.05
    site.slow(delay_ms=0, mbit=2, loss_percent=0)
    assert measure(site, 250_000)[1] >= 1
    site.restore()
    ping, whole = measure(site, 500_000)
    assert ping < 0.05 and whole < 1


def test_a_lossy_link_loses_its_share(hosts: Hosts) -> None:
    site, num = hosts.sites[0], 1000
    count = textwrap.dedent("""
        import socket, sys
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.bind((sys.argv[1], 5000))
        listener.settimeout(1)
        print("ready", flush=True)
        num = 0
        try:
            while listener.recv(100):
                num += 1
        except TimeoutError:
            print(num)
        """)
    send = textwrap.dedent("""
        import socket, sys, time
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for number in range(int(sys.argv[2])):
            sender.sendto(b"x", (sys.argv[1], 5000))
            time.sleep(0.0002)
        """)
    site.slow(delay_ms=5, mbit=100, loss_percent=10)
    site.python(TIME, 0, hosts.server.address, PORT)  # so that addresses of the link are known
    program = [sys.executable, "-c", count, hosts.server.address]
    with hosts.server.popen(program, stdout=subprocess.PIPE, text=True) as counter:
        assert counter.stdout is not None and counter.stdout.readline() == "ready\n"
        site.python(send, hosts.server.address, num)
        arrived = int(counter.stdout.read())
    site.restore()
    assert 0.05 < 1 - arrived / num < 0.16


def test_a_capture_has_every_byte_and_counters_count_them(hosts: Hosts, tmp_path: Path) -> None:
    before = [hosts.bytes_of(site) for site in hosts.sites]
    with hosts.capture(tmp_path / "all.pcap") as path:
        ask(hosts.sites[0], hosts.server.address, "a secret of the first")
        ask(hosts.sites[1], hosts.server.address, "a secret of the second" * 1000)
    assert payload(path).count(b"a secret of the first") == 2  # there and back
    assert payload(path).count(b"a secret of the second") == 2000
    first, second = (hosts.bytes_of(site) - old for site, old in zip(hosts.sites, before, strict=True))
    assert 200 < first.sent < 2_000 and 200 < first.received < 2_000
    assert 22_000 < second.sent < 26_000 and 22_000 < second.received < 26_000
    shout = "import socket, sys; out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    shout += "for _ in range(20): out.sendto(bytes(1000), (sys.argv[1], 9))"
    before = [hosts.bytes_of(hosts.sites[0])]
    hosts.sites[0].python(shout, hosts.server.address)
    one_way = hosts.bytes_of(hosts.sites[0]) - before[0]
    assert one_way.sent >= 20_000 > one_way.received + 5_000
    assert len(tls_only(path)) == 4  # two connections, each both ways
    assert all("no TLS record at byte 0" in line for line in tls_only(path))


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A key and a certificate for itself, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("server")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def write_pcap(path: Path, content: list[bytes]) -> Path:
    lengths = (b"\0" * 8 + len(frame).to_bytes(4, "little") * 2 for frame in content)
    path.write_bytes(PCAP_HEADER + b"".join(length + f for length, f in zip(lengths, content, strict=True)))
    return path


def test_tls_on_the_wire_is_told_from_anything_else(
    one_way: Hosts, certificate: Path, tmp_path: Path
) -> None:
    serve(one_way.server, certificate)
    site = one_way.sites[0]
    site.slow(delay_ms=1, mbit=100, loss_percent=3)  # so that parts come twice and out of order
    with one_way.capture(tmp_path / "tls.pcap") as path:
        answer = ask(site, one_way.server.address, "a secret " * 10_000, certificate)
    assert answer.startswith(f"{site.address} a secret")
    assert tls_only(path) == []
    assert len(payload(path)) > 2 * 9 * 10_000
    assert b"a secret" not in payload(path)

    whole = [*frames(path)]
    large = [place for place, frame in enumerate(whole) if len(frame) > 1000]
    greetings = [frame for frame in whole if frame[23] == 6 and frame[47] & 2]
    later = [frame for frame in whole if frame not in greetings]
    assert tls_only(write_pcap(tmp_path / "turned.pcap", [*greetings, *reversed(later)])) == []
    once = {whole[place][26:42]: place for place in large}  # addresses, ports, sequence number
    lost = sorted(once.values())[len(once) // 2]
    same = whole[lost][26:42]
    holed = [frame for frame in whole if frame[26:42] != same]
    assert any("gap" in line for line in tls_only(write_pcap(tmp_path / "holed.pcap", holed)))
    assert any("began before" in line for line in tls_only(write_pcap(tmp_path / "late.pcap", later)))
    datagram = whole[-1][:23] + b"\x11" + whole[-1][24:]
    assert any("not TCP" in line for line in tls_only(write_pcap(tmp_path / "udp.pcap", [*whole, datagram])))

    records = directions(path)[0][0].joined()[0]
    second = 5 + int.from_bytes(records[3:5], "big")
    header = records[second : second + 5]
    no_greeting = [frame.replace(records[:5], b"\x17" + records[1:5]) for frame in whole]
    assert any("at byte 0" in line for line in tls_only(write_pcap(tmp_path / "first.pcap", no_greeting)))
    spoilt = [frame.replace(header, b"\x18" + header[1:]) for frame in whole]
    assert any(f"at byte {second}" in line for line in tls_only(write_pcap(tmp_path / "type.pcap", spoilt)))


def test_a_connection_that_was_cut_in_the_middle_is_still_tls(
    one_way: Hosts, certificate: Path, tmp_path: Path
) -> None:
    serve(one_way.server, certificate)
    site = one_way.sites[0]
    site.slow(delay_ms=5, mbit=20, loss_percent=2)
    with (
        one_way.capture(tmp_path / "cut.pcap") as path,
        site.popen(
            [sys.executable, "-c", TIME, 10_000_000, one_way.server.address, PORT, certificate],
            stderr=subprocess.DEVNULL,
        ) as client,
    ):
        start = one_way.bytes_of(site).sent
        while one_way.bytes_of(site).sent - start < 500_000:
            time.sleep(0.02)
        site.cut()
        time.sleep(0.3)
        client.kill()
    assert len(payload(path)) > 200_000
    assert tls_only(path) == []


def test_no_program_is_left_at_the_end(tmp_path: Path) -> None:
    start = "import subprocess, time; subprocess.Popen(['sleep', '1000'], env={}); time.sleep(1000)"
    with open_hosts(1) as network:
        program = network.sites[0].popen([sys.executable, "-c", start])
        while not psutil.Process(program.pid).children():
            time.sleep(0.02)
        (child,) = psutil.Process(program.pid).children()
        if network.is_supported:  # elsewhere a program that drops its environment is not found
            assert MARK not in child.environ()
    assert program.wait() == -signal.SIGKILL
    if network.is_supported:
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    else:
        child.kill()


def test_what_a_killed_test_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import sys, time
        from tests.hosts import open_hosts
        with open_hosts(1) as network:
            inside = network.sites[0].popen(["sleep", "1000"])
            kept = [space.pid for space in network._spaces.values()]
            print(inside.pid, *kept, flush=True)
            time.sleep(1000)
        """)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout is not None
        left, *kept = map(int, test.stdout.readline().split())
        assert psutil.pid_exists(left)
        os.kill(test.pid, signal.SIGKILL)
    _, still = psutil.wait_procs([psutil.Process(pid) for pid in kept if psutil.pid_exists(pid)], timeout=10)
    assert still == []
    with open_hosts(1):
        psutil.wait_procs([psutil.Process(left)] if psutil.pid_exists(left) else [], timeout=10)
        assert not psutil.pid_exists(left)


def test_loopback_has_the_same_programs_and_says_what_it_cannot() -> None:
    with open_hosts(2, "loopback") as network:
        assert isinstance(network, Loopback) and not network.is_supported
        serve(network.server)
        assert re.fullmatch(r"127\.[\d.]+ hello", ask(network.sites[0], network.server.address))
        for doing in (
            network.sites[0].cut,
            network.sites[0].slow,
            network.sites[0].outside_packets,
            lambda: network.bytes_of(network.sites[0]),
            lambda: network.capture(Path("never")),
        ):
            with pytest.raises(Unsupported):
                doing()
        with pytest.raises(pytest.skip.Exception):
            network.require_network()


def test_a_way_that_does_not_work_is_unsupported_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    works.cache_clear()
    with open_hosts(1) as network:
        assert isinstance(network, Loopback)
    with pytest.raises(Unsupported), open_hosts(1, "user"):
        pass
    works.cache_clear()
