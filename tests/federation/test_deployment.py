"""Real programs on hosts of their own, set up by the commands that people type, over a network that fails."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment import PORT, CommandFailed, Federation
from tests.hosts import Hosts, open_hosts
from tests.packets import payload, tls_only

pytestmark = pytest.mark.slow
NUM_SITES = 5
HELLO = """
import socket, ssl, sys
address, port, newest, *files = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.maximum_version = getattr(ssl.TLSVersion, newest)
if files:
    context.load_cert_chain(*files)
with socket.create_connection((address, int(port)), timeout=5) as plain:
    with context.wrap_socket(plain) as connection:
        connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.0\\r\\nContent-Length: 0\\r\\n\\r\\n")
        print(connection.recv(12).decode())
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with open_hosts(NUM_SITES) as network:
        yield network


@pytest.fixture(scope="module")
def first(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    """A federation after its first job, and a capture of everything that passed until then."""
    made = Federation(hosts, tmp_path_factory.mktemp("federation"))
    pcap = made.folder / "first.pcap"
    with hosts.capture(pcap) if hosts.is_supported else contextlib.nullcontext():
        made.start()
        made.wait(made.submit(seed=2, rounds=2))
    return made, pcap


@pytest.fixture(scope="module")
def federation(first: tuple[Federation, Path]) -> Federation:
    """A coordinator and five sites, connected; the tests of this module share it."""
    return first[0]


@pytest.fixture(scope="module")
def undisturbed(federation: Federation) -> str:
    """The digest of the model of a job that nothing happened to, with all sites in each round."""
    job = federation.submit(seed=1)
    federation.wait(job)
    return federation.model(job)


def test_only_tls_is_on_the_wire_and_nobody_else_is_called(first: tuple[Federation, Path]) -> None:
    (federation, pcap), hosts = first, first[0].hosts
    hosts.require_network()
    assert tls_only(pcap) == []
    content = payload(pcap)
    assert len(content) > 100_000
    assert not [name for name in federation.names if name.encode() in content]
    assert hosts.server.outside_packets() == 0
    assert [site.outside_packets() for site in hosts.sites] == [0] * NUM_SITES


def test_a_site_finds_itself_well(federation: Federation) -> None:
    assert "certificates good on both sides" in " ".join(federation.site_command(0, "check").split())


@pytest.mark.parametrize("port", [9093, 9094])
def test_a_site_reaches_no_other_port_of_the_server(federation: Federation, port: int) -> None:
    federation.hosts.require_network()
    code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"
    site, server = federation.hosts.sites[0], federation.hosts.server
    assert "ConnectionRefusedError" in site.python(code, server.address, port).stderr
    assert site.python(code, server.address, PORT).returncode == 0


def say_hello(federation: Federation, newest: str, *files: Path) -> str:
    """Connect as a stranger from a site's host, and return the first bytes of the answer, or the error."""
    hosts = federation.hosts
    done = hosts.sites[0].python(HELLO, hosts.server.address, PORT, newest, *files)
    return str(done.stdout + done.stderr)


def test_the_port_wants_a_certificate_and_tls_1_3(federation: Federation) -> None:
    tls = federation.sites[0] / "tls"
    own = (tls / "site.crt", tls / "site.key")
    assert "HTTP/1.1 403" in say_hello(federation, "TLSv1_3", *own)  # known, but without its node key
    assert "HTTP/" not in say_hello(federation, "TLSv1_3")
    assert "SSL" in say_hello(federation, "TLSv1_2", *own)
    server_files = (federation.home / "tls" / "server.crt", federation.home / "tls" / "server.key")
    assert "HTTP/" not in say_hello(federation, "TLSv1_3", *server_files)  # a certificate of another purpose


def test_slow_and_lossy_sites_give_the_same_model(federation: Federation, undisturbed: str) -> None:
    federation.hosts.require_network()
    slow = federation.hosts.sites[:2]
    for site in slow:
        site.slow(delay_ms=50, mbit=20, loss_percent=1)
    job = federation.submit(seed=1, name="slow")
    federation.wait(job)
    for site in slow:
        site.restore()
    assert federation.model(job) == undisturbed


def test_a_site_that_is_cut_off_for_a_while_comes_back(federation: Federation, undisturbed: str) -> None:
    federation.hosts.require_network()
    job = federation.submit(seed=1, name="cut")
    federation.wait_for_round(job, 1)
    federation.hosts.sites[1].cut()
    federation.hosts.sites[1].heal()
    federation.wait(job)
    assert federation.model(job) == undisturbed


@pytest.mark.parametrize("name", ["server", "site-1"])
def test_a_killed_program_goes_on_where_it_was(federation: Federation, undisturbed: str, name: str) -> None:
    job = federation.submit(seed=1, name=f"killed-{name}")
    federation.wait_for_round(job, 1)
    federation.kill(name)
    federation.start()
    federation.wait(job)
    assert federation.model(job) == undisturbed


@pytest.mark.parametrize(
    "parts",
    [("fedvision_server.superlink", "flower_superexec"), ("flwr-serverapp",)],
    ids=["superlink and superexec", "serverapp"],
)
def test_a_killed_part_of_the_server_is_started_again(
    federation: Federation, undisturbed: str, parts: tuple[str, ...]
) -> None:
    job = federation.submit(seed=1, name=f"killed-{len(parts)}")
    federation.wait_for_round(job, 1)
    time.sleep(0.5)
    for part in parts:
        federation.kill_part(part)
    federation.wait(job)
    assert federation.model(job) == undisturbed


def test_an_upload_that_is_cut_in_the_middle_goes_on_and_does_not_begin_anew(federation: Federation) -> None:
    hosts = federation.hosts
    hosts.require_network()
    slow = hosts.sites[2]
    large = {"channels": [64, 192, 320], "strides": [2, 2], "num_res_units": 0}
    before = hosts.bytes_of(slow).sent
    slow.slow(delay_ms=5, mbit=16, loss_percent=0)
    job = federation.submit(seed=1, name="large", rounds=1, model__args=large)
    federation.wait_until(lambda: hosts.bytes_of(slow).sent - before > 1_500_000, "the upload is under way")
    slow.cut()
    time.sleep(3)
    slow.heal()
    federation.wait(job)
    slow.restore()
    (closed,) = [event for event in federation.events(job) if event["event"] == "round"]
    assert closed["num_sites"] == NUM_SITES
    charter = json.loads((federation.home / "jobs" / job / "secagg" / "charter.json").read_text())
    size = 4 * charter["document"]["size"]
    assert size > 3_500_000
    assert hosts.bytes_of(slow).sent - before < 1.7 * size


def test_nobody_without_the_keys_submits_or_stops(federation: Federation, tmp_path: Path) -> None:
    job = federation.submit(seed=3, rounds=1)
    stranger = federation.sites[0] / "keys" / "identity.pem"
    with pytest.raises(CommandFailed, match="operator"):
        federation.server_command("stop", job, "--key", stranger)
    federation.wait(job)


def test_an_old_request_is_not_enrolled_again(federation: Federation, tmp_path: Path) -> None:
    home = federation.sites[4]
    old = shutil.copy(home / "request.json", tmp_path / "old.json")
    first = federation.server_command("enrol", old, "--yes", "--out", tmp_path / "same.kit.json")
    assert first.startswith("kit:")  # the same request again: the same kit, and nothing changes
    federation.site_command(4, "init", home, "--renew", at_home=False)
    kit = tmp_path / "new.kit.json"
    federation.server_command("enrol", home / "request.json", "--out", kit)
    with pytest.raises(CommandFailed, match="old request"):
        federation.server_command("enrol", old, "--yes", "--out", tmp_path / "again.kit.json")
    federation.site_command(4, "join", kit)
    federation.stop("site-5")
    federation.start()


def test_a_revoked_site_is_shut_out_and_comes_back_with_a_new_key(
    federation: Federation, tmp_path: Path
) -> None:
    federation.server_command("revoke", "site-5", "--reason", "a test", "--yes")
    federation.wait_for_line("site-5", "answers 403")
    home = federation.sites[4]
    federation.site_command(4, "init", home, "--renew", "--new-identity", at_home=False)
    kit = tmp_path / "kit.json"
    federation.server_command("enrol", home / "request.json", "--yes", "--replace", "--out", kit)
    federation.site_command(4, "join", kit)
    federation.stop("site-5")
    federation.start()
    job = federation.submit(seed=4, rounds=1)
    federation.wait(job)
