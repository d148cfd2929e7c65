"""A folder that was lost and put back as the page says goes on; a file of a newer format is refused."""

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedvision.audit.chain import peer_heads, verify_log
from fedvision.errors import ConfigError, MessageError, ProtocolError, VerificationError
from fedvision.secagg import identity
from fedvision.secagg.codec import decode
from fedvision.secagg.roster import load_roster, save_signed, sign_document
from fedvision.secagg.site_state import Marks
from fedvision_server.cli import main as server_main
from fedvision_server.home import ServerHome
from fedvision_sites.cli import main as site_main
from fedvision_sites.decisions import decide
from fedvision_sites.home import SiteHome
from fedvision_sites.policy import Policy
from tests.deployment import Federation
from tests.federation.test_tutorial import search_path
from tests.homes import World
from tests.hosts import open_hosts
from tests.secagg_stages import bodies_of
from tests.server_homes import write_job
from tests.site_jobs import DATA, NOON, make_charter, make_job, make_roster
from tests.test_docs import ROOT, fences
from tests.test_secagg_vault import Clinics, clinics, enrolled  # noqa: F401

PAGE = ROOT / "docs" / "how-to" / "back-up-and-upgrade.md"
COPY_SERVER, RESTORE_SERVER, COPY_SITE, KEEP_GUARD, NEW_IDENTITY, REPLACE, JOIN = fences(PAGE, "sh")


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return search_path(tmp_path_factory.mktemp("installed") / "programs")


class Place(World):
    """A folder with ``server`` and one site ``site``, as on the page, and two more sites."""

    name = "utrecht"

    @property
    def server(self) -> ServerHome:
        return ServerHome(self.root / "server")

    def site(self, name: str) -> SiteHome:
        return SiteHome(self.root / ("site" if name == self.name else name))

    def do(self, block: str, path: str, answers: str = "") -> str:
        """Run a block of the page exactly as written."""
        environment = {**os.environ, "PATH": path, "COLUMNS": "200"}
        done = subprocess.run(
            ["bash", "-e", "-c", block], cwd=self.root, env=environment, input=answers, text=True,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path / "place", tmp_path / "data")
    made.root.mkdir()
    assert made.found() == 0
    for name in (made.name, "bergen", "cork"):
        made.member(name)
    return made


def submit(place: Place, name: str) -> str:
    job = write_job(place.root / f"{name}.toml", name=name)
    assert server_main(["submit", str(job), "--home", str(place.server.root)]) == 0
    return name


def standing(place: Place, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Return the state of each job in the queue."""
    capsys.readouterr()
    assert server_main(["status", "--json", "--home", str(place.server.root)]) == 0
    return {one["id"]: one["state"] for one in json.loads(capsys.readouterr().out)}


def test_a_restored_coordinator_has_its_queue_roster_and_keys(
    place: Place, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(place, "first")
    (place.server.flower / "superlink.db").write_bytes(b"not copied")
    place.do(COPY_SERVER, path)
    modes = {one.relative_to(place.root): one.stat().st_mode for one in place.server.root.rglob("*")}
    submit(place, "lost")
    roster = place.server.roster.read_bytes()

    place.do(RESTORE_SERVER, path)
    assert (place.root / "server.lost" / "flower").is_dir() and not place.server.flower.exists()
    for file in place.server.root.rglob("*"):
        assert file.stat().st_mode == modes[file.relative_to(place.root)]
    assert place.server.roster.read_bytes() == roster
    assert standing(place, capsys) == {"0001-first": "waiting"}
    log = identity.load(place.server.server_key)
    assert verify_log(place.server.audit, log.public).count > 0
    submit(place, "second")
    assert standing(place, capsys) == {"0001-first": "waiting", "0002-second": "waiting"}
    place.member("delft")
    assert server_main(["stop", "1", "--home", str(place.server.root)]) == 0


def test_what_is_done_again_after_a_restore_gives_the_same_rosters(place: Place, path: str) -> None:
    place.do(COPY_SERVER, path)

    def go_on() -> list[bytes]:
        assert place.revoke("bergen") == 0
        assert place.enrol("delft") == 0
        return [one.read_bytes() for one in sorted(place.server.rosters.iterdir())]

    assert place.init("delft") == 0
    seen = go_on()
    assert place.join("delft") == 0
    place.do(RESTORE_SERVER, path)
    assert place.enrol("delft") == 0
    assert place.join("delft") != 0  # another roster of a number that it has seen
    shutil.rmtree(place.root / "server.lost")
    place.do(RESTORE_SERVER, path)
    assert go_on() == seen
    assert place.join("delft") == 0


def test_a_restored_log_holds_and_differs_from_what_others_remember(place: Place, path: str) -> None:
    place.do(COPY_SERVER, path)
    submit(place, "lost")
    public = identity.load(place.server.server_key).public
    head = verify_log(place.server.audit, public)
    place.do(RESTORE_SERVER, path)
    submit(place, "other")
    verify_log(place.server.audit, public)
    with pytest.raises(VerificationError) as caught:
        verify_log(place.server.audit, public, {head.count: head.digest})
    assert caught.value.rule == "audit-known"


def decided(home: SiteHome, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a site says of its jobs."""
    capsys.readouterr()
    assert site_main(["jobs", "--home", str(home.root)]) == 0
    return capsys.readouterr().out


def test_a_restored_site_keeps_its_identity_its_decisions_and_the_marks_of_today(
    place: Place, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    home = place.site(place.name)
    own = identity.load(home.identity).public
    job, roster = make_job(), make_roster()
    decide(home.decisions, Policy(automatic=True), job, make_charter(job, roster), roster, DATA, NOON)
    place.do(COPY_SITE, path)
    before = decided(home, capsys)
    assert job.digest()[:12] in before
    old_kit = place.kit(place.name).read_bytes()
    assert place.revoke("bergen") == 0
    assert place.enrol(place.name) == 0 and place.join(place.name) == 0
    marks = {one.name: one.read_bytes() for one in home.guard.iterdir()}
    (home.jobs / "of-a-job").mkdir(parents=True)

    place.do(KEEP_GUARD, path)
    assert {one.name: one.read_bytes() for one in home.guard.iterdir()} == marks
    assert (home.jobs / "of-a-job").is_dir() and home.identity.stat().st_mode & 0o777 == 0o600
    assert identity.load(home.identity).public == own
    assert verify_log(home.audit, own).count > 0
    assert decided(home, capsys) == before
    newest = place.kit(place.name).read_bytes()
    place.kit(place.name).write_bytes(old_kit)
    assert place.join(place.name) != 0  # its mark knows of the newer roster, though the back-up does not
    place.kit(place.name).write_bytes(newest)
    assert place.join(place.name) == 0


def test_a_site_whose_disk_is_lost_comes_back_with_another_identity(place: Place, path: str) -> None:
    home = place.site(place.name)
    old = identity.load(home.identity).public
    place.do(COPY_SITE, path)
    shutil.rmtree(home.root)

    shown = place.do(NEW_IDENTITY, path)
    assert not home.guard.exists()
    new = identity.load(home.next_identity)
    assert new.public != old and identity.fingerprint(new.public).split()[0] in shown
    place.do(REPLACE, path, "y\n")
    place.do(JOIN, path)
    assert identity.load(home.identity).public == new.public
    governance = identity.load(place.server.governance).public
    member = next(one for one in load_roster(place.server.roster, governance).sites if one.name == place.name)
    assert member.key == new.public.hex()
    verify_log(home.audit, new.public)


def test_nothing_of_a_back_up_says_how_far_a_site_went(place: Place, path: str) -> None:
    home = place.site(place.name)
    (home.jobs / "of-a-job").mkdir(parents=True)
    place.do(COPY_SITE, path)
    shutil.rmtree(home.root)
    place.do(COPY_SITE.replace("--create", "--extract").partition(" --exclude")[0], path)
    assert home.config.exists() and not home.guard.exists() and not home.jobs.exists()


def test_a_site_with_an_old_guard_draws_other_masks_for_the_same_input(
    enrolled: Clinics,  # noqa: F811
    tmp_path: Path,
) -> None:
    clinic = enrolled.sites[2]
    shutil.copytree(clinic.config.guard, tmp_path / "old")
    kept: dict[int, bytes] = {}

    def mask() -> tuple[bytes, np.ndarray]:
        """Let the site mask in round 1; what the others answered at first is shown to it again."""
        one = enrolled.attempt(1, 1)
        for number in enrolled.sites:
            if number == 2 or number not in kept:
                kept[number] = enrolled.do(number, "ready", one.offer(), one.session)[0]
            one.add_ready(number, kept[number])
        return kept[2], enrolled.do(2, "mask", bodies_of(one, "mask")[2], one.session)[1]

    ready, masked = mask()
    with pytest.raises(ProtocolError):  # with the marks of today there is no second time
        mask()
    shutil.rmtree(clinic.config.guard)
    shutil.copytree(tmp_path / "old", clinic.config.guard)
    clinic.process = None
    again, other = mask()
    assert again != ready
    difference = other - masked  # of two masks, since the input is the same
    assert np.unique(difference).size > 0.99 * difference.size


def test_a_new_identity_is_in_no_job_of_the_old_one(enrolled: Clinics) -> None:  # noqa: F811
    clinic = enrolled.sites[2]
    for folder in (clinic.state / "secagg", clinic.config.guard):
        shutil.rmtree(folder)
    clinic.config.identity.unlink()
    (clinic.config.identity.parent / f"{clinic.name}.pub").unlink()
    identity.save(identity.generate(clinic.name), clinic.config.identity)
    for call in (lambda: enrolled.enrol(2), lambda: enrolled.process(2)):
        clinic.process = None
        with pytest.raises(ProtocolError) as caught:
            call()
        assert caught.value.rule == "roster"


def bump(path: Path, old: str = '"format": 1', new: str = '"format": 2') -> Path:
    """Write a file as a newer version would."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize("what", ["server.toml", "site.toml", "record", "request", "kit", "queue"])
def test_a_newer_format_is_refused_and_named(
    what: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    home, site = ["--home", str(place.server.root)], place.site(place.name)
    submit(place, "first")
    if what == "queue":
        with sqlite3.connect(place.server.jobs_db) as database:
            database.execute("PRAGMA user_version = 2")
        database.close()
    command: Callable[[], int] = {
        "server.toml": lambda: server_main(["roster", *home]),
        "site.toml": lambda: site_main(["jobs", "--home", str(site.root)]),
        "record": lambda: server_main(["roster", *home]),
        "request": lambda: place.enrol(place.name),
        "kit": lambda: place.join(place.name),
        "queue": lambda: server_main(["status", *home]),
    }[what]
    if what.endswith(".toml"):
        bump(place.server.config if what == "server.toml" else site.config, "format = 1", "format = 2")
    elif what != "queue":
        bump(
            {
                "record": place.server.sites / f"{place.name}.json",
                "request": site.request,
                "kit": place.kit(place.name),
            }[what]
        )
    capsys.readouterr()
    assert command() == 2
    shown = capsys.readouterr().err
    assert "format" in shown and "2" in shown and "Traceback" not in shown


def test_a_newer_roster_log_or_mark_is_refused(place: Place, tmp_path: Path) -> None:
    governance = identity.load(place.server.governance)
    roster = load_roster(place.server.roster, governance.public)
    newer = tmp_path / "roster.json"
    save_signed(newer, sign_document(roster.model_copy(update={"format": 2}), governance))
    with pytest.raises(ConfigError, match=r"document\.format.*got 2"):
        load_roster(newer, governance.public)
    bump(place.server.audit, '"format":1', '"format":2')
    with pytest.raises(VerificationError, match="the format is not 1"):
        verify_log(place.server.audit, identity.load(place.server.server_key).public)
    with pytest.raises(MessageError, match="format must be version 1"):
        decode(b"FV\x02" + bytes(20), Marks)


def connect_again(federation: Federation) -> None:
    """Start all programs, and wait until each site is connected once more."""
    before = {name: federation.log(name).count("connected to") for name in federation.names}
    federation.start_server()
    for index in range(len(federation.names)):
        federation.start_site(index)
    for name, times in before.items():
        federation.wait_for_line(name, "connected to", times=times + 1)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_federation_goes_on_after_its_server_and_a_site_are_lost(tmp_path: Path, path: str) -> None:
    (tmp_path / "place").mkdir()
    with open_hosts(3, "loopback") as hosts:  # also the test of what runs where namespaces are not permitted
        federation = Federation(hosts, tmp_path / "place")
        federation.sites[0] = federation.sites[0].rename(federation.folder / "site")
        place = Place(federation.folder)
        federation.start()
        first = federation.submit(rounds=1)
        federation.wait(first)
        model = federation.model(first)
        for name in list(federation.programs):
            assert federation.stop(name) == 0
        place.do(COPY_SERVER, path)
        place.do(COPY_SITE, path)
        connect_again(federation)
        federation.wait(federation.submit(rounds=1, name="lost"))
        for name in list(federation.programs):
            federation.stop(name)

        place.do(RESTORE_SERVER, path)
        shutil.rmtree(federation.sites[0])
        place.do(NEW_IDENTITY, path)
        place.do(REPLACE, path, "y\n")
        place.do(JOIN, path)
        connect_again(federation)
        checked = federation.site_command(0, "check")
        assert "problem" not in checked
        assert federation.status(first)["state"] == "done" and federation.model(first) == model
        again = federation.submit(rounds=1, name="again")
        federation.wait(again)
        for number in (1,):
            trained = [
                one["site"]
                for one in federation.events(again)
                if (one["event"], one.get("round"), one.get("status")) == ("train", number, "accepted")
            ]
            assert sorted(trained) == federation.names
        federation.server_command("audit-log", "verify")
        for index in range(3):
            federation.site_command(index, "audit-log", "verify")
        public = identity.load(federation.home / "keys" / "server.pem").public
        with pytest.raises(VerificationError, match=r"others remember|another head"):
            memory = peer_heads(federation.sites[1] / "audit.jsonl")["server"]
            verify_log(federation.home / "audit.jsonl", public, memory)
