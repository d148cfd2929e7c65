"""``fedvision-site check`` finds what would keep a site from running, against a TLS server on loopback."""

import shutil
import socket
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedvision.secagg import certificates, enrolling, issuing
from fedvision.secagg.enrolling import now_utc
from fedvision_server.site_records import load_records
from fedvision_sites import checks
from fedvision_sites.checks import Finding, check_home
from fedvision_sites.cli import main as site_main
from fedvision_sites.home import SiteHome
from fedvision_sites.setup import install_roster
from tests.conftest import write_site
from tests.homes import World, snapshot
from tests.tls_peers import https_server

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The site utrecht, with a data set, in a federation on localhost."""
    root = tmp_path_factory.mktemp("world")
    write_site(root / "data", "utrecht", (12, 4, 4))
    world = World(root / "homes", root / "data")
    world.root.mkdir()
    assert world.found("localhost:19443") == 0
    for name in ("mainz", "utrecht"):
        world.member(name)
    return world


@pytest.fixture
def world(joined: World, tmp_path: Path) -> World:
    return joined.copy(tmp_path / "world")


def serving(world: World, ahead: timedelta = timedelta()) -> AbstractContextManager[int]:
    """Serve with the federation's certificate; enrolled sites pass, as at the fleet port."""
    home = world.server
    context = certificates.server_context(home.ca_cert, home.tls_cert, home.tls_key)

    def accepted(fingerprint: str) -> bool:
        known = {one.fingerprint for one in load_records(home).values() if one.status == "enrolled"}
        return fingerprint in known

    return https_server(context, accepted, ahead)


def pointed_at(home: SiteHome, port: int, host: str = "localhost") -> None:
    text = home.config.read_text()
    home.config.write_text(text.replace("localhost:19443", f"{host}:{port}"))


def found(home: SiteHome, with_data: bool = False) -> dict[str, list[Finding]]:
    """Return what `check` finds, by subject."""
    subjects: dict[str, list[Finding]] = {}
    for one in check_home(home, now_utc(), with_data):
        subjects.setdefault(one.subject, []).append(one)
    return subjects


def problem(home: SiteHome, subject: str, *told: str) -> None:
    """Check that there is exactly one problem, of this subject, which says and advises so."""
    problems = [one for of in found(home).values() for one in of if one.level == "problem"]
    assert [one.subject for one in problems] == [subject], problems
    for text in told:
        assert text in f"{problems[0].text} {problems[0].hint}"


def test_a_good_site_passes_every_check(world: World, capsys: Captured) -> None:
    home = world.site("utrecht")
    with serving(world) as port:
        pointed_at(home, port)
        assert site_main(["check", "--home", str(home.root)]) == 0
        shown = capsys.readouterr().out
        assert "problem" not in shown
        for text in (
            "site utrecht",
            "certificates good",
            "within 1 s",
            "12 train",
            "GB free",
            "number 2 of 2",
        ):
            assert text in " ".join(shown.split())
        levels = {subject: {one.level for one in of} for subject, of in found(home, True).items()}
    assert levels.pop("GPU") <= {"ok", "warning"}
    assert levels.pop("disk") <= {"ok", "warning"}
    assert set(levels) == {
        "settings",
        "keys",
        "certificate",
        "roster",
        "server",
        "clock",
        "guard",
        "data set",
    }
    assert all(level == {"ok"} for level in levels.values()), levels


def test_a_check_changes_nothing(world: World) -> None:
    before = snapshot(world.root)
    found(world.site("utrecht"), True)
    assert snapshot(world.root) == before


def test_a_server_that_does_not_answer_is_told_with_the_firewall(world: World, capsys: Captured) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        pointed_at(world.site("utrecht"), taken.getsockname()[1], "127.0.0.1")
        problem(
            world.site("utrecht"), "server", "connection refused", "must allow outgoing TCP to 127.0.0.1:"
        )
        assert site_main(["check", "--no-data", "--home", str(world.site("utrecht").root)]) == 1


def test_a_server_of_another_federation_is_refused(world: World, tmp_path: Path) -> None:
    """Same name and address, another certificate authority: who took over the address gets no connection."""
    evil = World(tmp_path / "evil")
    evil.root.mkdir()
    assert evil.found("localhost:19443") == 0
    with serving(evil) as port:
        pointed_at(world.site("utrecht"), port)
        problem(
            world.site("utrecht"), "server", "self-signed certificate", "not the server of this federation"
        )


def test_a_server_under_another_name_is_refused(world: World) -> None:
    with serving(world) as port:
        pointed_at(world.site("utrecht"), port, "127.0.0.1")
        problem(world.site("utrecht"), "server", "ip address mismatch")


def test_a_server_with_old_tls_is_told(world: World) -> None:
    home = world.server
    context = certificates.server_context(home.ca_cert, home.tls_cert, home.tls_key)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with https_server(context) as port:
        pointed_at(world.site("utrecht"), port)
        problem(world.site("utrecht"), "server", "no TLS 1.3", "opens TLS")


@pytest.mark.parametrize("seconds", [-3600, -75, 75, 3600])
def test_a_clock_that_is_wrong_is_told(world: World, seconds: int) -> None:
    with serving(world, ahead=timedelta(seconds=seconds)) as port:
        pointed_at(world.site("utrecht"), port)
        where = "ahead of" if seconds < 0 else "behind"
        problem(world.site("utrecht"), "clock", f" s {where} the server's", "time synchronisation")


@pytest.mark.parametrize("seconds", [-50, 50])
def test_a_clock_that_is_a_little_off_will_do(world: World, seconds: int) -> None:
    with serving(world, ahead=timedelta(seconds=seconds)) as port:
        pointed_at(world.site("utrecht"), port)
        assert found(world.site("utrecht"))["clock"][0].level == "ok"


def test_a_revoked_site_is_told_by_the_server_and_by_the_roster(world: World) -> None:
    home = world.site("utrecht")
    with serving(world) as port:
        pointed_at(home, port)
        assert world.revoke("utrecht") == 0
        problem(home, "server", "does not know this certificate", "revoked")
        install_roster(home, world.server.roster.read_bytes())
        problems = {
            one.subject: one.text for of in found(home).values() for one in of if one.level == "problem"
        }
    assert set(problems) == {"server", "roster"}
    assert "roster 3 of lung is without this site" in problems["roster"]


def test_a_key_that_was_enrolled_without_this_site_is_told(world: World) -> None:
    home = world.site("utrecht")
    stranger = World(world.root / "stranger")
    stranger.root.mkdir()
    assert stranger.init("utrecht") == 0
    assert world.enrol("utrecht", "--replace", request=stranger.site("utrecht").request) == 0
    install_roster(home, world.server.roster.read_bytes())
    problems = [one.text for one in found(home)["roster"] if one.level == "problem"]
    assert problems == ["roster 3 of lung has another key for this site"]


def test_a_replaced_certificate_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator has issued another one, and this site has not taken over the kit yet."""
    home, then = world.site("utrecht"), now_utc() + timedelta(seconds=2)
    monkeypatch.setattr(enrolling, "now_utc", lambda: then)
    assert world.renew("utrecht") == 0
    assert "a renewal waits for its kit" in {one.text for one in found(home)["keys"]}
    assert world.enrol("utrecht") == 0
    with serving(world) as port:
        pointed_at(home, port)
        problem(home, "server", "does not know this certificate")
        home.config.write_text(home.config.read_text().replace(f"localhost:{port}", "localhost:19443"))
        assert world.join("utrecht") == 0
        pointed_at(home, port)
        assert {one.level for one in found(home)["server"]} == {"ok"}


@pytest.mark.parametrize(
    ("change", "subject", "told"),
    [
        (lambda home, world: home.identity.chmod(0o644), "keys", "chmod 600"),
        (lambda home, world: home.node_key.chmod(0o640), "keys", "chmod 600"),
        (lambda home, world: home.node_key.write_bytes(home.tls_key.read_bytes()), "keys", "P-384"),
        (lambda home, world: home.tls_cert.write_bytes(world.site("mainz").tls_cert.read_bytes()),
         "certificate", "it is for mainz"),
        (lambda home, world: home.tls_cert.write_bytes(home.ca_cert.read_bytes()),
         "certificate", "a certificate authority"),
        (lambda home, world: home.tls_key.write_bytes(issuing.new_tls_key()),
         "certificate", "does not belong"),
        (lambda home, world: home.trust_roster.write_text("{}"), "roster", "`kind` is missing"),
        (lambda home, world: home.trust_roster.write_text(
            home.trust_roster.read_text().replace("utrecht", "utrechT")), "roster", "`signature` is wrong"),
        (lambda home, world: home.trust_roster.unlink(), "roster", "there is none"),
        (lambda home, world: home.governance.unlink(), "roster", "governance's key is not known"),
        (lambda home, world: home.config.write_text(
            home.config.read_text().replace('name = "utrecht"', 'name = "mainz"')), "keys", "keeps its name"),
        (lambda home, world: home.config.write_text("[site]\n"), "settings", "`site.name` is missing"),
        (lambda home, world: home.config.unlink(), "settings", "init"),
    ],
)  # fmt: skip
def test_damage_is_told_with_what_to_do(
    world: World, change: Callable[[SiteHome, World], object], subject: str, told: str
) -> None:
    home = world.site("utrecht")
    with serving(world) as port:
        pointed_at(home, port)
        change(home, world)
        problems = [one for of in found(home).values() for one in of if one.level == "problem"]
    assert subject in {one.subject for one in problems}
    assert any(told in f"{one.text} {one.hint}" for one in problems if one.subject == subject), problems
    assert all(one.hint or one.subject in ("keys", "server", "certificate") for one in problems), problems


def test_a_certificate_near_its_end_warns_and_one_past_it_stops(world: World) -> None:
    home = world.site("utrecht")
    for days, level, told in ((600, "ok", ""), (700, "warning", "--renew"), (800, "problem", "expired")):
        then = now_utc() + timedelta(days=days)
        of = [one for one in check_home(home, then, False) if one.subject == "certificate"]
        assert [one.level for one in of] == [level]
        assert told in f"{of[0].text} {of[0].hint}"


def test_a_site_that_has_not_joined_is_told_what_to_do(world: World) -> None:
    assert world.init("lyon") == 0
    problems = [one for of in found(world.site("lyon")).values() for one in of if one.level == "problem"]
    assert {one.subject for one in problems} == {"certificate", "roster", "server", "data set"}
    assert all("join" in one.hint for one in problems if one.subject != "data set")


def test_a_data_set_with_an_error_stops_and_a_list_is_cut(world: World, tmp_path: Path) -> None:
    home = world.site("utrecht")
    data = tmp_path / "data"
    shutil.copytree(world.data / "utrecht", data)
    for number in range(5):
        (data / f"train{number}.png").write_bytes(b"no picture")
    home.config.write_text(home.config.read_text().replace(str(world.data / "utrecht"), str(data)))
    of = found(home, True)["data set"]
    assert [one.level for one in of if one.level != "warning"] == ["problem"] * (checks.SHOWN + 1)
    assert "fedvision data check" in of[checks.SHOWN].hint
    assert found(home, False)["data set"][0].level == "ok"
    shutil.rmtree(data)
    assert found(home, False)["data set"][0].level == "problem"


def test_a_full_disk_stops(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for free_gb, level in ((0.5, "problem"), (5, "warning"), (50, "ok")):
        usage = SimpleNamespace(free=free_gb * 1e9)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert found(world.site("utrecht"))["disk"][0].level == level
