"""Real programs on hosts of their own, set up by the commands that people type, over a network that fails."""

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deployment import PORT, CommandFailed, Federation
from tests.hosts import Hosts, open_hosts
from tests.kill_points import Point, walk
from tests.packets import payload, tls_only

pytestmark = pytest.mark.slow
NUM_SITES, ROUNDS = 5, 5
NETWORK = {"channels": [96, 256], "strides": [2], "num_res_units": 0}
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
        made.wait(submit(made, "undisturbed"))
    return made, pcap


def submit(federation: Federation, name: str) -> str:
    """Submit the job of five rounds that all disturbances are tried on; only the name differs."""
    sketch = {"secure_aggregation__level": "sketch", "evaluation__every": ROUNDS}
    return federation.submit(seed=1, rounds=ROUNDS, name=name, model__args=NETWORK, **sketch)


@pytest.fixture(scope="module")
def federation(first: tuple[Federation, Path]) -> Federation:
    """A coordinator and five sites, connected; the tests of this module share it."""
    return first[0]


def check_as_undisturbed(federation: Federation, job: str) -> None:
    """Check a job that was disturbed: the same model, no round lost or done twice, nothing trained twice."""
    federation.wait(job)
    events = federation.events(job)
    closed = [(event["round"], event["num_sites"]) for event in events if event["event"] == "round"]
    assert closed == [(number, NUM_SITES) for number in range(1, ROUNDS + 1)]
    assert not [event for event in events if event["event"] in ("attempt", "thrown away", "expelled")]
    assert federation.trainings(job) == {name: [*range(1, ROUNDS + 1)] for name in federation.names}
    assert federation.model(job) == federation.model("0001-undisturbed")


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


def test_slow_and_lossy_sites_and_one_that_is_cut_off_give_the_same_model(federation: Federation) -> None:
    """The upload that is cut in the middle goes on, and does not begin anew."""
    hosts = federation.hosts
    hosts.require_network()
    first, second, cut = hosts.sites[:3]
    for site in (first, second):
        site.slow(delay_ms=50, mbit=20, loss_percent=1)
    job = submit(federation, "disturbed")
    federation.wait_for_round(job, 2)
    before = hosts.arrived_from(cut)
    cut.slow(delay_ms=5, mbit=4, loss_percent=0)
    size = 4 * federation.charter(job)["size"]
    federation.wait_until(
        lambda: hosts.arrived_from(cut) - before > 0.75 * size, "most of the upload has arrived"
    )
    cut.cut()
    time.sleep(3)
    cut.heal()
    federation.wait_for_round(job, 3)
    arrived = hosts.arrived_from(cut) - before
    for site in (first, second, cut):
        site.restore()
    check_as_undisturbed(federation, job)
    assert size > 800_000
    assert arrived < 1.6 * size, arrived / size  # begun anew, it would be 1.75 times at least


def everything(federation: Federation) -> None:
    """As after a power cut."""
    federation.kill_all_of_server()
    federation.start_server()


def supervisor(federation: Federation) -> None:
    federation.kill("server")
    federation.start_server()


def superlink_and_superexec(federation: Federation) -> None:
    federation.kill_part("fedvision_server.superlink")
    federation.kill_part("flower_superexec")


def serverapp(federation: Federation) -> None:
    federation.kill_part("flwr-serverapp")


def site_5(federation: Federation) -> None:
    federation.kill("site-5")
    federation.start_site(4)


KILLS = {
    Point(0, "hello"): everything,
    Point(0, "enrolled"): serverapp,
    Point(1, "train ready"): everything,
    Point(1, "train mask"): superlink_and_superexec,
    Point(1, "train beacon"): serverapp,
    Point(1, "train sketch"): everything,
    Point(2, "train accept"): supervisor,
    Point(3, "train unmask"): everything,
    Point(4, "train mask"): site_5,  # which is not held there
    Point(ROUNDS, "validate mask"): serverapp,
    Point(ROUNDS, "test"): everything,
}
"""What is killed (kill -9) at which message: the server, or a part of it, in each phase of a job."""
SOME = {point: KILLS[point] for point in (Point(1, "train sketch"), Point(3, "train unmask"))}


@pytest.mark.parametrize(
    "chosen",
    [SOME, pytest.param(KILLS, marks=[pytest.mark.long, pytest.mark.timeout(2400)])],
    ids=["two", "all"],
)
def test_a_server_that_is_killed_in_every_phase_loses_nothing(
    federation: Federation, chosen: dict[Point, Callable[[Federation], None]]
) -> None:
    """All phases take ten minutes: ``pytest -m long tests/federation/test_deployment.py``."""
    federation.hold(federation.names[0])
    job = submit(federation, f"killed-{len(chosen)}")
    kills = {point: functools.partial(what, federation) for point, what in chosen.items()}
    assert walk(federation, job, ROUNDS, [ROUNDS], kills) == list(chosen)
    check_as_undisturbed(federation, job)


def test_nobody_without_the_keys_submits_or_stops(federation: Federation) -> None:
    stranger = federation.sites[0] / "keys" / "identity.pem"
    for command in (("submit", federation.folder / "job.toml"), ("stop", "1")):
        with pytest.raises(CommandFailed, match="is not an operator's"):
            federation.server_command(*command, "--key", stranger)


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
    assert federation.trainings(job)["site-5"] == [1]
