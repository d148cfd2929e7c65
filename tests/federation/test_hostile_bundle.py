"""A server whose runs bring code, and sites that take part by Flower's own programs (``run --stock``)."""

import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_files

import fedvision_sites
from fedvision.audit.log import read_log
from fedvision.wire.bundle import PROJECT
from tests.deployment import PROGRAMS, Federation
from tests.hosts import open_hosts

pytestmark = pytest.mark.slow
HOSTILE_SERVER = """
import hashlib, sys
from pathlib import Path
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control.control_http_client import ControlHttpClient
content = Path(sys.argv.pop(1)).read_bytes()
start = ControlHttpClient.StartRun
def start_with_code(self, request):
    request.fab.CopyFrom(Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content))
    return start(self, request)
ControlHttpClient.StartRun = start_with_code
from fedvision_server.cli import run
run()
"""
AS_FLOWER_LOADS = """
import sys
from flwr.supercore.object_ref import load_app
load_app("fedvision_sites.app:stock", ValueError, sys.argv[1])
"""
FETCH = """
import sys, threading
from pathlib import Path
import httpx
from flwr.proto.fab_pb2 import GetFabRequest
from fedvision.secagg import certificates
from fedvision_sites.fleet import Fleet
from fedvision_sites.home import SiteHome
home = SiteHome(Path(sys.argv[1]))
tls = certificates.client_context(certificate=home.tls_cert, key=home.tls_key, authority=home.ca_cert)
key = certificates.read_private(home.node_key)
with Fleet(home.settings().site.server, tls, key, threading.Event()) as fleet:
    try:
        fleet._client.GetFab(GetFabRequest(node=fleet._node, hash_str=sys.argv[2], run_id=int(sys.argv[3])))
        print("fetched")
    except httpx.HTTPStatusError as error:
        print(error.response.status_code)
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator and three sites, of which the second and third are connected already."""
    with open_hosts(3) as hosts:
        made = Federation(hosts, tmp_path_factory.mktemp("federation"), counts=(2, 1, 1))
        made.start_server()
        for index in (1, 2):
            made.start_site(index)
        yield made


@pytest.fixture(scope="module")
def marker(federation: Federation) -> Path:
    """A file that is written when code of the hostile bundle runs."""
    return federation.folder / "marker"


@pytest.fixture(scope="module")
def bundle(federation: Federation, marker: Path) -> bytes:
    """A bundle like ours, with code that takes the place of a site's modules."""
    code = f"open({str(marker)!r}, 'a').write(__name__ + ' ')\n".encode()
    names = ("sitecustomize", "fedvision_sites/__init__", "fedvision_sites/app", "fedvision_sites/release")
    return build_fab_from_files({"pyproject.toml": PROJECT, **{f"{name}.py": code for name in names}})[0]


def run_again(federation: Federation, name: str, command: list[object]) -> None:
    """Stop a program if it runs, run another in its place, and wait until it is there."""
    line = "sites are served" if name == "server" else "connected to"
    before = federation.log(name).count(line)
    if name in federation.programs:
        federation.stop(name)
    hosts = federation.hosts
    host = hosts.server if name == "server" else hosts.sites[federation.names.index(name)]
    with (federation.folder / f"{name}.log").open("ab") as log:
        federation.programs[name] = host.popen(
            command, cwd=federation.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    federation.wait_for_line(name, line, 300, times=before + 1)


def run_site(federation: Federation, index: int, *options: str) -> None:
    command = [*PROGRAMS["fedvision-site"], "run", "--home", federation.sites[index], *options]
    run_again(federation, federation.names[index], command)


def installed() -> str:
    """Return a digest of the installed code of a site."""
    total = hashlib.sha256()
    for path in sorted(Path(fedvision_sites.__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


def test_a_site_by_flowers_own_programs_takes_part_in_a_whole_job(federation: Federation) -> None:
    run_site(federation, 0, "--stock")
    job = federation.submit(rounds=1)
    federation.wait(job, timeout_s=500)
    trained = [event for event in federation.events(job) if event["event"] == "train"]
    assert sorted((event["site"], event["status"]) for event in trained) == [
        (name, "accepted") for name in federation.names
    ]
    assert len(federation.model(job)) == 64
    kinds = {line.kind for line in read_log(federation.sites[0] / "audit.jsonl")}
    assert "allow" in kinds and "refused" not in kinds
    folder = federation.sites[0] / "flower"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not [path for path in folder.iterdir() if path.is_file() and path.stat().st_mode & 0o077]
    assert federation.stop("site-1") == 0


def test_code_that_a_run_brings_is_never_fetched_or_run(
    federation: Federation, bundle: bytes, marker: Path, tmp_path: Path
) -> None:
    before = installed()
    zipfile.ZipFile(io.BytesIO(bundle)).extractall(tmp_path)
    subprocess.run([sys.executable, "-c", AS_FLOWER_LOADS, str(tmp_path)])
    assert "fedvision_sites.app" in marker.read_text()  # so it would be seen if a site ran it
    marker.unlink()

    path = federation.folder / "hostile.fab"
    path.write_bytes(bundle)
    server = [sys.executable, "-c", HOSTILE_SERVER, path, "run", "--home", federation.home]
    run_again(federation, "server", server)
    run_site(federation, 0)
    job = federation.submit(rounds=1, name="hostile")
    federation.wait(job, timeout_s=500)
    assert (federation.home / "flower" / "apps").is_dir() and not marker.exists()

    home, digest = federation.sites[0], hashlib.sha256(bundle).hexdigest()
    run_site(federation, 0, "--stock")
    second = federation.submit(rounds=1, name="hostile-again")
    federation.wait_for_line(
        "site-1", "brings other code than this site has; none of it was fetched or run", 300
    )
    (refused,) = [line.fields for line in read_log(home / "audit.jsonl") if line.kind == "refused"]
    assert (refused["reason"], refused["digest"]) == ("bundle", digest)
    federation.stop("site-1")
    fetched = federation.hosts.sites[0].python(FETCH, home, digest, refused["flower_run"])
    assert fetched.stdout == "404\n", fetched.stderr
    federation.server_command("stop", second)
    federation.wait(second, "stopped")
    assert digest[:8] not in " ".join(path.name for path in (home / "flower").rglob("*"))
    assert not marker.exists()
    assert installed() == before
