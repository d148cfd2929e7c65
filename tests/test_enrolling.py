"""From two empty folders to a site in a federation, every way not to get there, and kills on the way."""

import contextlib
import io
import json
import os
import sys
import tomllib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvision.audit.log import parts, verify_log
from fedvision.cli.key_files import new_roster
from fedvision.errors import ConfigError, FedvisionError, MessageError, ProtocolError
from fedvision.secagg import certificates, enrolling, identity, issuing
from fedvision.secagg.documents import Refused
from fedvision.secagg.enrolling import now_utc, read_kit, read_request, sign_kit, sign_request, time_text
from fedvision.secagg.roster import Roster, check_succession, load_roster, sign_document
from fedvision_server.cli import main as server_main
from fedvision_server.enrolling import enrol, examine
from fedvision_server.rosters import governance_key, latest_roster
from fedvision_server.rosters import install_roster as put_in_force
from fedvision_server.site_records import load_records
from fedvision_sites.cli import main as site_main
from fedvision_sites.setup import install_roster, join, known_roster
from tests.homes import Killed, World, killed_at, snapshot

JUNK = st.binary(max_size=200) | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(
    lambda value: json.dumps({"kind": "site-kit", "document": value, "signature": "00"}).encode()
)
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush nothing to disk: no power is cut here, and it takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A coordinator, the sites mainz and utrecht that joined in this order, and lyon that only asks."""
    world = World(tmp_path_factory.mktemp("world"))
    assert world.found() == 0
    for name in ("mainz", "utrecht"):
        world.member(name)
    assert world.init("lyon") == 0
    return world


@pytest.fixture
def world(founded: World, tmp_path: Path) -> World:
    return founded.copy(tmp_path / "world")


def roster_of(world: World) -> Roster:
    return load_roster(world.server.roster, governance_key(world.server))


def numbers(world: World) -> dict[str, int]:
    return {one.name: one.number for one in roster_of(world).sites}


def log_holds(world: World, site: str | None = None) -> None:
    home = world.server if site is None else world.site(site)
    key = world.server.server_pub if site is None else world.site(site).identity_pub
    verify_log(home.audit, identity.parse_public(key.read_text())[1])


def later(monkeypatch: pytest.MonkeyPatch, seconds: int = 2) -> None:
    """Move the clock of documents on."""
    then = now_utc() + timedelta(seconds=seconds)
    monkeypatch.setattr(enrolling, "now_utc", lambda: then)


def refusal(capsys: Captured, status: int, *told: str) -> str:
    """Check what a command said when it refused, in one line with a hint."""
    assert status == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "error: " in error
    for text in told:
        assert text in error
    return error


def test_a_site_joins_in_four_commands(tmp_path: Path, capsys: Captured) -> None:
    world = World(tmp_path)
    assert world.found() == 0
    founded = capsys.readouterr()
    assert world.init("utrecht") == 0
    asked = capsys.readouterr()
    assert world.enrol("utrecht") == 0
    enrolled = capsys.readouterr()
    assert world.join("utrecht") == 0
    joined = capsys.readouterr()
    digits = "  ".join(world.governance_digits().split()[:4])
    assert digits in founded.out
    own = identity.load(world.site("utrecht").identity)
    line = "  ".join(identity.fingerprint(own.public).split()[:4])
    assert line in asked.out and line in enrolled.out
    assert "joined lung: site 1 of roster 1, 1 sites" in joined.out
    for output in (founded, asked, enrolled, joined):
        assert "next: " in output.err
        assert "PRIVATE" not in output.out + output.err
    settings = world.site("utrecht").settings()
    assert (settings.site.name, settings.site.server) == ("utrecht", "localhost:19443")
    assert roster_of(world) == known_roster(world.site("utrecht"))
    log_holds(world)
    log_holds(world, "utrecht")


def test_every_private_key_is_for_its_owner_only_and_in_no_file_that_travels(world: World) -> None:
    secrets = []
    for folder in (world.server.root, world.site("utrecht").root):
        for name in ("keys", "tls"):
            assert (folder / name).stat().st_mode & 0o777 == 0o700
        for path in folder.rglob("*"):
            if path.is_file() and b"PRIVATE KEY" in path.read_bytes():
                assert path.stat().st_mode & 0o777 == 0o600, path
                secrets += [one for one in path.read_text().splitlines() if len(one) > 40 and " " not in one]
    assert len(secrets) >= 8
    travels = [world.kit("utrecht"), world.site("utrecht").request, world.server.roster]
    travels += [*world.server.sites.iterdir(), world.server.audit, world.site("utrecht").audit]
    for path in travels:
        assert not any(secret in path.read_text() for secret in secrets), path


def test_settings_explain_every_key_and_are_read_back(world: World) -> None:
    for path in (world.server.config, world.site("utrecht").config):
        lines = path.read_text().splitlines()
        keys = [number for number, line in enumerate(lines) if " = " in line and not line.startswith("#")]
        assert len(keys) > 8
        assert all(lines[number - 1].startswith("# ") for number in keys)
    settings = world.server.settings()
    assert settings.operators == (identity.load(world.server.operator).public.hex(),)
    assert settings.deadlines.step_s == 600


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("control_port =", "contrl_port ="), "did you mean `control_port`?"),
        (('"localhost:19443"', '"localhost"'), "expected HOST:PORT"),
        (("control_port = 9093", "control_port = 19443"), "must differ"),
        (("step_s = 600", "step_s = 0"), "`deadlines.step_s`"),
        (("operators = [", 'operators = ["00", '), "`operators.0`"),
    ],
)
def test_a_wrong_setting_of_the_server_is_told(
    world: World, capsys: Captured, change: tuple[str, str], told: str
) -> None:
    text = world.server.config.read_text()
    assert change[0] in text
    world.server.config.write_text(text.replace(*change))
    refusal(capsys, server_main(["roster", "--home", str(world.server.root)]), "server.toml", told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("threads =", "thread ="), "did you mean `threads`?"),
        (("largest_rounds = 500", "largest_rounds = 0"), "`policy.largest_rounds`"),
        (("largest_rounds =", "largest_round ="), "did you mean `largest_rounds`?"),
        (("[site]", "[site"), "not TOML"),
        (('"localhost:19443"', '"localhost:port"'), "`site.server`"),
    ],
)
def test_a_wrong_setting_of_a_site_is_told(world: World, change: tuple[str, str], told: str) -> None:
    home = world.site("utrecht")
    text = home.config.read_text()
    assert change[0] in text
    home.config.write_text(text.replace(*change))
    with pytest.raises(ConfigError) as error:
        home.settings()
    assert told in f"{error.value} {error.value.hint}"


def test_init_touches_no_folder_with_something_in_it(world: World, tmp_path: Path, capsys: Captured) -> None:
    before = snapshot(world.root)
    refusal(capsys, world.found(), "the folder of a federation already")
    refusal(capsys, world.init("srv"), "is not empty")
    refusal(capsys, world.init("utrecht"), "has joined a federation already", "--renew")
    where = str(world.site("lyon").root)
    refusal(capsys, site_main(["init", where, "--name", "lyon", "--data", "/other"]), "another data set")
    refusal(capsys, site_main(["init", where, "--name", "nancy", "--data", "/x"]), "the key of lyon")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    words = ["--name", "lung", "--address", "a.example:1"]
    refusal(capsys, server_main(["init", str(other), *words]), "it has thesis.txt")
    refusal(capsys, site_main(["init", str(other), "--name", "x", "--data", "."]), "it has thesis.txt")
    assert snapshot(world.root) == before
    assert snapshot(other) == {"thesis.txt": b"x"}


@pytest.mark.parametrize("address", ["10.1.2.3:443", "[2001:db8::1]:9443", "fl-1.example.org:9443"])
def test_an_address_goes_from_the_founding_to_the_site(tmp_path: Path, address: str) -> None:
    world = World(tmp_path)
    assert world.found(address) == 0
    world.member("utrecht")
    assert world.site("utrecht").settings().site.server == address
    names = certificates.parse_certificate(world.server.tls_cert.read_bytes()).extensions
    assert address.rpartition(":")[0].strip("[]") in str(names)


def test_what_cannot_be_a_name_or_an_address_makes_no_folder(tmp_path: Path, capsys: Captured) -> None:
    new = str(tmp_path / "new")
    for address in ("example.org", "example.org:0", "a b:1", "https://x:1", ":9443", "x:70000"):
        refusal(capsys, server_main(["init", new, "--name", "x", "--address", address]), "address")
    refusal(capsys, server_main(["init", new, "--name", "a b", "--address", "x:1"]), "federation")
    refusal(capsys, server_main(["init", new, "--name", "x", "--address", "x:1", "--also", "a b"]), "names")
    refusal(capsys, site_main(["init", new, "--name", "a b", "--data", "."]), "name")
    refusal(capsys, site_main(["init", new, "--name", "Server", "--data", "."]), "another party's")
    refusal(capsys, site_main(["init", new, "--name", "x"]), "--name and --data are needed")
    assert not (tmp_path / "new" / "site.toml").exists() and not (tmp_path / "new" / "server.toml").exists()


def test_the_same_request_gives_the_same_kit(world: World) -> None:
    kit, before = world.kit("utrecht").read_bytes(), snapshot(world.server.root)
    assert world.enrol("utrecht") == 0
    assert world.kit("utrecht").read_bytes() == kit
    assert snapshot(world.server.root) == before
    joined = snapshot(world.site("utrecht").root)
    assert world.join("utrecht") == 0
    assert snapshot(world.site("utrecht").root) == joined
    asked = snapshot(world.site("lyon").root)
    assert world.init("lyon") == 0
    assert snapshot(world.site("lyon").root) == asked


def test_numbers_follow_the_order_of_enrolment_and_are_never_given_again(world: World) -> None:
    assert numbers(world) == {"mainz": 1, "utrecht": 2}
    assert world.revoke("utrecht") == 0
    assert numbers(world) == {"mainz": 1}
    assert world.enrol("lyon") == 0
    assert numbers(world) == {"mainz": 1, "lyon": 3}
    assert roster_of(world).serial == 4
    assert sorted(path.name for path in world.server.rosters.iterdir()) == [
        f"000{serial}.json" for serial in (1, 2, 3, 4)
    ]
    log_holds(world)


def test_enrolment_asks_and_no_changes_nothing(
    world: World, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["enrol", str(world.site("lyon").request), "--home", str(world.server.root)]
    words += ["--out", str(world.kit("lyon"))]
    before = snapshot(world.server.root)
    for answer in ("n\n", ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        assert server_main(words) == 130
    digits = identity.fingerprint(identity.load(world.site("utrecht").identity).public)
    refusal(capsys, server_main([*words, "--fingerprint", digits]), "the fingerprint is another one")
    refusal(capsys, server_main([*words, "--fingerprint", digits[:20]]), "a fingerprint has 40 digits")
    assert snapshot(world.server.root) == before
    digits = identity.fingerprint(identity.load(world.site("lyon").identity).public)
    assert server_main([*words, "--fingerprint", digits]) == 0
    assert world.join("lyon") == 0


def test_a_kit_overwrites_nothing_but_a_kit_of_the_same_site(world: World, capsys: Captured) -> None:
    before = snapshot(world.server.root)
    for content in ("my thesis", world.kit("mainz").read_text()):
        world.kit("lyon").write_text(content)
        refusal(capsys, world.enrol("lyon"), "is not a kit of lyon")
        assert world.kit("lyon").read_text() == content
    assert snapshot(world.server.root) == before


def test_any_changed_byte_of_a_request_is_refused(world: World) -> None:
    content = world.site("lyon").request.read_bytes()
    read_request(content)
    for place in range(0, len(content), 3):
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        with pytest.raises(Refused):
            read_request(changed)
    for changed in (content[:-1], content + b"\n", content.replace(b"  ", b" ", 1), b"{}", b"[]", b""):
        with pytest.raises(Refused):
            read_request(changed)


def test_any_changed_byte_of_a_kit_is_refused(world: World) -> None:
    content = world.kit("utrecht").read_bytes()
    read_kit(content)
    for place in range(0, len(content), 7):
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        with pytest.raises(Refused):
            read_kit(changed)


@given(JUNK)
def test_arbitrary_bytes_are_refused_and_nothing_else(content: bytes) -> None:
    for read in (read_request, read_kit):
        with pytest.raises(Refused):
            read(content)


def forged(world: World, **changes: str) -> Path:
    """Return lyon's request with other fields, signed again by lyon: what a hostile site can make."""
    home = world.site("lyon")
    request = read_request(home.request.read_bytes()).model_copy(update=changes)
    path = world.root / "forged.json"
    path.write_bytes(sign_request(request, identity.load(home.identity)))
    return path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "mainz"}, "the certificate request bears another name"),
        ({"name": "server"}, "another party's"),
        ({"name": "a b"}, "`document.name`"),
        ({"node_key": "-----BEGIN PUBLIC KEY-----\n"}, "not an EC P-384 public key"),
        ({"version": "x" * 50}, "`document.version`"),
        ({"created": "2030-02-30T00:00:00Z"}, "`document.created`"),
    ],
)
def test_a_forged_field_is_refused(
    world: World, capsys: Captured, changes: dict[str, str], told: str
) -> None:
    before = snapshot(world.server.root)
    refusal(capsys, world.enrol("lyon", request=forged(world, **changes)), "forged.json: ", told)
    assert snapshot(world.server.root) == before


def request_with(name: str, identity_key: identity.Identity, created: str = "", **fields: str) -> bytes:
    """Return a request with new keys but for what is given."""
    tls, node = issuing.new_tls_key(), issuing.new_node_key()
    content = {
        "name": name,
        "identity": identity_key.public.hex(),
        "certificate_request": issuing.make_request(tls, name).decode(),
        "node_key": certificates.node_public(node).decode(),
        "version": "1",
        "created": created or time_text(now_utc()),
    }
    return sign_request(enrolling.EnrolmentRequest.model_validate(content | fields), identity_key)


def test_a_key_of_another_party_is_refused(world: World, capsys: Captured) -> None:
    lyon = world.root / "forged.json"
    home = world.site("mainz")
    node = certificates.node_public(home.node_key.read_bytes()).decode()
    tls = issuing.make_request(home.tls_key.read_bytes(), "lyon").decode()
    fresh = identity.generate("lyon")
    for content, told in (
        (request_with("lyon", identity.load(home.identity)), "that of site mainz"),
        (request_with("lyon", identity.load(world.server.governance)), "that of the governance"),
        (request_with("lyon", identity.load(world.server.server_key)), "that of the server"),
        (request_with("lyon", identity.load(world.server.operator)), "that of the operator"),
        (request_with("lyon", fresh, node_key=node), "the node key of lyon is that of site mainz"),
        (request_with("lyon", fresh, certificate_request=tls), "the TLS key of lyon is that of site mainz"),
        (request_with("Mainz", fresh), "there is a site mainz already"),
        (request_with("lyon", fresh, time_text(now_utc() + timedelta(days=3))), "has not come yet"),
    ):
        lyon.write_bytes(content)
        before = snapshot(world.server.root)
        refusal(capsys, world.enrol("lyon", "--replace", request=lyon), told)
        assert snapshot(world.server.root) == before


def test_a_stranger_cannot_take_a_name(world: World, capsys: Captured) -> None:
    stranger = world.root / "stranger.json"
    stranger.write_bytes(request_with("mainz", identity.generate("mainz")))
    before = snapshot(world.server.root)
    error = refusal(capsys, world.enrol("mainz", request=stranger), "mainz is enrolled with another key")
    assert "hint: if the site lost its key" in error and "revoke mainz" in error
    assert snapshot(world.server.root) == before


def test_a_renewed_certificate_needs_no_new_roster(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    home, old_kit = world.site("utrecht"), world.kit("utrecht").read_bytes()
    old = load_records(world.server)["utrecht"]
    later(monkeypatch)
    running = home.tls_key.read_bytes(), home.tls_cert.read_bytes()
    assert world.renew("utrecht") == 0
    assert (home.tls_key.read_bytes(), home.tls_cert.read_bytes()) == running  # It runs on.
    request = home.request.read_bytes()
    assert world.renew("utrecht") == 0
    assert home.request.read_bytes() == request
    assert world.enrol("utrecht") == 0
    new = load_records(world.server)["utrecht"]
    assert (new.number, new.identity, new.since) == (old.number, old.identity, old.since)
    assert new.fingerprint != old.fingerprint
    assert roster_of(world).serial == 2
    assert world.join("utrecht") == 0
    assert certificates.fits(home.tls_cert.read_bytes(), home.tls_key.read_bytes())
    assert home.tls_key.read_bytes() != running[0] and not home.next_tls_key.exists()
    world.kit("utrecht").write_bytes(old_kit)
    assert world.join("utrecht") == 2  # Its certificate is for the key that is gone.


def test_a_replayed_request_is_refused(
    world: World, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.site("utrecht").request.read_bytes()
    later(monkeypatch)
    assert world.renew("utrecht") == 0
    assert world.enrol("utrecht") == 0
    replayed = world.root / "replayed.json"
    replayed.write_bytes(first)
    before = snapshot(world.server.root)
    for more in ((), ("--replace",)):
        refusal(
            capsys, world.enrol("utrecht", *more, request=replayed), "an old request is not enrolled again"
        )
    assert snapshot(world.server.root) == before


def test_a_replaced_key_keeps_its_number_and_the_old_one_never_counts_again(
    world: World, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = world.site("utrecht")
    old_request, old = home.request.read_bytes(), identity.load(home.identity)
    later(monkeypatch)
    assert world.renew("utrecht", "--new-identity") == 0
    assert identity.load(home.identity).public == old.public
    refusal(capsys, world.enrol("utrecht"), "is enrolled with another key", "--replace")
    assert world.enrol("utrecht", "--replace") == 0
    assert (numbers(world)["utrecht"], roster_of(world).serial) == (2, 3)
    assert world.join("utrecht") == 0
    new = identity.load(home.identity)
    assert new.public != old.public and new.name == "utrecht"
    assert roster_of(world).member(2).key == new.public.hex()
    assert not home.next_identity.exists() and not list(home.keys.glob("next.*"))
    log_holds(world, "utrecht")
    assert "key-change" in home.audit.read_text()
    replayed = world.root / "replayed.json"
    replayed.write_bytes(old_request)
    refusal(capsys, world.enrol("utrecht", "--replace", request=replayed), "never counts again")
    replayed.write_bytes(request_with("lyon", old))
    refusal(capsys, world.enrol("lyon", request=replayed), "the key of lyon is that of site utrecht")


def test_a_lost_key_ends_its_audit_log_and_begins_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = world.site("utrecht")
    old_log = home.audit.read_bytes()
    home.identity.unlink()
    later(monkeypatch)
    assert world.renew("utrecht", "--new-identity") == 0
    assert world.enrol("utrecht", "--replace") == 0
    assert world.join("utrecht") == 0
    log_holds(world, "utrecht")
    assert (home.root / "audit-of-lost-key-1" / "audit.jsonl").read_bytes() == old_log


def test_a_revoked_site_is_out_and_comes_back_only_with_a_new_key_and_number(
    world: World, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch)
    assert world.revoke("utrecht") == 0
    record = load_records(world.server)["utrecht"]
    assert (record.status, record.reason, record.number) == ("revoked", "a test", 2)
    assert set(numbers(world)) == {"mainz"}
    before = snapshot(world.server.root)
    assert world.revoke("utrecht") == 0
    assert snapshot(world.server.root) == before
    refusal(capsys, world.enrol("utrecht", "--replace"), "was revoked, and its key never counts again")
    assert world.renew("utrecht") == 0
    refusal(capsys, world.enrol("utrecht", "--replace"), "was revoked, and its key never counts again")
    assert world.renew("utrecht", "--new-identity") == 0
    refusal(capsys, world.enrol("utrecht"), "was revoked", "--replace")
    assert world.enrol("utrecht", "--replace") == 0
    assert numbers(world) == {"mainz": 1, "utrecht": 3}
    assert world.join("utrecht") == 0
    assert [one.number for one in load_records(world.server)["utrecht"].former] == [2]
    assert world.enrol("lyon") == 0
    assert numbers(world) == {"mainz": 1, "utrecht": 3, "lyon": 4}
    words = ["revoke", "nobody", "--reason", "x", "--home", str(world.server.root), "--yes"]
    refusal(capsys, server_main(words), "there is no site nobody")


def test_the_last_site_is_shut_out_though_a_roster_needs_one(world: World, capsys: Captured) -> None:
    assert world.revoke("utrecht") == 0
    assert world.revoke("mainz") == 0
    assert "it was the last site" in capsys.readouterr().err
    assert {one.status for one in load_records(world.server).values()} == {"revoked"}
    assert world.enrol("lyon") == 0
    assert numbers(world) == {"lyon": 3}


def test_a_kit_of_another_site_is_refused(world: World, capsys: Captured) -> None:
    before = snapshot(world.site("utrecht").root)
    refusal(capsys, world.join("utrecht", world.kit("mainz")), "the kit is for mainz")
    assert snapshot(world.site("utrecht").root) == before


def test_a_kit_for_a_key_that_the_site_does_not_have_is_refused(world: World, capsys: Captured) -> None:
    """Somebody else enrolled under the site's name, and the coordinator did not call."""
    stranger = world.root / "lyon-2.json"
    stranger.write_bytes(request_with("lyon", identity.generate("lyon")))
    assert world.enrol("lyon", request=stranger) == 0
    before = snapshot(world.site("lyon").root)
    refusal(capsys, world.join("lyon"), "the kit is for another identity key than this site's")
    assert snapshot(world.site("lyon").root) == before


def test_an_old_kit_is_refused_also_after_a_restore(
    world: World, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, old_kit = world.site("utrecht"), world.kit("utrecht").read_bytes()
    old_roster = home.trust_roster.read_bytes()
    assert world.enrol("lyon") == 0
    assert world.enrol("utrecht") == 0
    assert world.join("utrecht") == 0
    after = snapshot(home.root)
    world.kit("utrecht").write_bytes(old_kit)
    refusal(capsys, world.join("utrecht"), "serial 2", "serial 3", "newest kit", "rule roster-old")
    home.trust_roster.write_bytes(old_roster)  # A back-up of all but guard was restored.
    refusal(capsys, world.join("utrecht"), "serial 2", "has seen serial 3", "rule roster-old")
    with pytest.raises(ProtocolError, match="roster-old"):
        install_roster(home, old_roster)
    assert world.enrol("utrecht") == 0
    assert world.join("utrecht") == 0
    assert {**snapshot(home.root), "audit.jsonl": b""} == {**after, "audit.jsonl": b""}


def test_a_site_takes_newer_rosters_of_its_governance_only(world: World, tmp_path: Path) -> None:
    home = world.site("utrecht")
    with pytest.raises(ProtocolError, match="has not joined"):
        install_roster(world.site("lyon"), world.server.roster.read_bytes())
    assert world.revoke("utrecht") == 0
    newest = world.server.roster.read_bytes()
    assert install_roster(home, newest).serial == 3
    assert home.trust_roster.read_bytes() == newest
    after = snapshot(home.root)
    assert install_roster(home, newest).serial == 3
    with pytest.raises(ProtocolError, match="roster-old"):
        install_roster(home, (world.server.rosters / "0002.json").read_bytes())
    governance = identity.load(world.server.governance)
    twin = roster_of(world).model_copy(update={"server": identity.generate("x").public.hex()})
    other = roster_of(world).model_copy(update={"federation": "another", "serial": 9})
    from fedvision.secagg.documents import document_bytes

    for wrong, rule in ((twin, "roster-two"), (other, "roster-federation")):
        with pytest.raises(ProtocolError, match=rule):
            install_roster(home, document_bytes(sign_document(wrong, governance)))
    with pytest.raises(MessageError):
        forger = identity.generate("governance")
        newer = roster_of(world).model_copy(update={"serial": 9})
        install_roster(home, document_bytes(sign_document(newer, forger)))
    assert snapshot(home.root) == after


def test_another_governance_is_refused_for_ever(world: World, tmp_path: Path, capsys: Captured) -> None:
    """Another federation of the same name enrols the site: no kit of it is taken."""
    evil = World(tmp_path / "evil")
    assert evil.found() == 0
    request = world.site("utrecht").request
    assert evil.enrol("utrecht", request=request) == 0
    before = snapshot(world.site("utrecht").root)
    words = ["join", str(evil.kit("utrecht")), "--home", str(world.site("utrecht").root)]
    refusal(capsys, site_main([*words, "--governance", evil.governance_digits()]), "another governance")
    refusal(capsys, site_main([*words, "--governance", world.governance_digits()]), "fingerprint is another")
    assert snapshot(world.site("utrecht").root) == before


def test_the_first_governance_counts_only_after_it_was_compared(
    world: World, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world.enrol("lyon") == 0
    words = ["join", str(world.kit("lyon")), "--home", str(world.site("lyon").root)]
    before = snapshot(world.site("lyon").root)
    for answer in ("n\n", ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        assert site_main(words) == 130
    assert "  ".join(world.governance_digits().split()[:4]) in capsys.readouterr().out
    assert snapshot(world.site("lyon").root) == before
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert site_main(words) == 0


def resigned(world: World, **changes: object) -> bytes:
    """Return utrecht's kit with other fields, signed by the server: what a taken-over server can make."""
    kit = read_kit(world.kit("utrecht").read_bytes()).kit.model_copy(update=changes)
    return sign_kit(kit, identity.load(world.server.server_key))


def test_a_kit_agrees_with_itself_whoever_signed_it(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other")
    assert other.found() == 0
    other.member("utrecht")
    theirs = read_kit(other.kit("utrecht").read_bytes()).kit
    mainz = read_kit(world.kit("mainz").read_bytes()).kit
    expired = issuing.site_certificate(
        (world.server.ca_key.read_bytes(), world.server.ca_cert.read_bytes()),
        read_request(world.site("utrecht").request.read_bytes()).certificate_request.encode(),
        "utrecht",
        now_utc(),
    ).decode()
    read_kit(resigned(world, certificate=expired))
    for changes, told in (
        ({"number": 1}, "does not have the site with this number"),
        ({"name": "nobody"}, "does not have the site with this number"),
        ({"federation": "other"}, "is not the roster's"),
        ({"certificate": mainz.certificate}, "bears another name"),
        ({"certificate": theirs.certificate}, "not issued by this federation's"),
        ({"authority": theirs.authority}, "not issued by this federation's"),
        ({"governance": theirs.governance}, "`document.roster`"),
        ({"roster": theirs.roster}, "`document.roster`"),
        ({"certificate": mainz.authority}, "`document.certificate`"),
    ):
        with pytest.raises(Refused, match="document") as error:
            read_kit(resigned(world, **changes))
        assert told in f"{error.value.public} {error.value.text}"
    forger = identity.generate("server")
    kit = read_kit(world.kit("utrecht").read_bytes()).kit
    forged = kit.model_copy(update={"server_key": forger.public.hex()})
    with pytest.raises(Refused, match="not that of the server in the roster"):
        read_kit(sign_kit(forged, forger))


def test_an_expired_certificate_is_not_joined(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch, 800 * 24 * 3600)
    with pytest.raises(Refused, match=r"`document\.certificate` is wrong") as error:
        read_kit(world.kit("utrecht").read_bytes())
    assert "expired" in error.value.text


def test_comments_and_settings_survive_a_join(world: World, capsys: Captured) -> None:
    home = world.site("lyon")
    text = home.config.read_text().replace("threads = ", "# my note\nthreads = 3 # was ")
    home.config.write_text(text)
    home.config.chmod(0o640)
    assert world.enrol("lyon") == 0
    assert world.join("lyon") == 0
    changed = home.config.read_text()
    assert changed == text.replace('server = ""', 'server = "localhost:19443"')
    assert home.config.stat().st_mode & 0o777 == 0o640
    home.config.write_text(
        "".join(line for line in changed.splitlines(True) if not line.startswith("server"))
    )
    refusal(capsys, world.join("lyon"), "no line `server = ...` to change", 'server = "localhost:19443"')


def test_governance_on_another_machine_signs_what_the_records_say(
    world: World, tmp_path: Path, capsys: Captured
) -> None:
    vault = tmp_path / "vault"
    vault.mkdir()
    world.server.governance.rename(vault / "governance.pem")
    home = ["--home", str(world.server.root)]
    assert world.enrol("lyon") == 0
    draft = world.server.rosters / "0003.draft.json"
    assert f"draft: {draft}" in capsys.readouterr().out
    assert not world.kit("lyon").exists()
    assert roster_of(world).serial == 2
    sign = ["roster", "sign", str(draft), "--key", str(vault / "governance.pem"), "--yes"]
    signed = str(tmp_path / "signed.json")
    previous = ["--previous", str(world.server.roster)]
    assert server_main([*sign, *previous, "--out", signed]) == 0
    shown = capsys.readouterr().out
    assert "lyon" in shown and "new" in shown
    assert world.revoke("utrecht") == 0  # Meanwhile: what was signed is out of date.
    refusal(capsys, server_main(["roster", "install", signed, *home]), "not the roster", "0003.draft.json")
    signed = str(tmp_path / "signed-2.json")
    assert server_main([*sign, *previous, "--out", signed]) == 0
    assert "utrecht leaves the federation" in capsys.readouterr().err
    install = ["roster", "install", signed, *home, "--out", str(world.root)]
    assert server_main(install) == 0
    assert numbers(world) == {"mainz": 1, "lyon": 3}
    assert not draft.exists()
    assert world.join("lyon") == 0
    after, kit = snapshot(world.server.root), world.kit("lyon").read_bytes()
    assert server_main(install) == 0
    assert world.enrol("lyon") == 0
    assert (snapshot(world.server.root), world.kit("lyon").read_bytes()) == (after, kit)
    log_holds(world)
    forger = tmp_path / "forger"
    identity.save(identity.generate("forger"), forger / "forger.pem")
    forged = [*sign[:4], str(forger / "forger.pem"), "--yes", "--out", str(tmp_path / "forged.json")]
    draft.write_text(json.dumps(roster_of(world).model_copy(update={"serial": 4}).model_dump(mode="json")))
    assert server_main(forged) == 0
    with pytest.raises(ConfigError, match="not the accepted governance key"):
        put_in_force(world.server, tmp_path / "forged.json")


def test_the_roster_lists_every_site_ever_enrolled(world: World, capsys: Captured) -> None:
    assert world.revoke("utrecht") == 0
    capsys.readouterr()
    assert server_main(["roster", "--home", str(world.server.root)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "lung, roster 3" in shown and "mainz" in shown and "utrecht" in shown
    assert "revoked" in shown and "a test" in shown
    for name in ("mainz", "utrecht"):
        line = identity.fingerprint(identity.load(world.site(name).identity).public).split()
        assert " ".join(line[:4]) in shown


def test_the_servers_certificate_is_renewed_with_the_names_of_its_settings(world: World) -> None:
    home = world.server
    old, key = home.tls_cert.read_bytes(), home.tls_key.read_bytes()
    home.config.write_text(home.config.read_text().replace("names = []", 'names = ["10.1.2.3"]'))
    assert server_main(["renew", "--home", str(home.root)]) == 0
    assert home.tls_cert.read_bytes() != old and home.tls_key.read_bytes() == key
    assert server_main(["renew", "--new-key", "--home", str(home.root)]) == 0
    assert home.tls_key.read_bytes() != key
    assert home.tls_key.stat().st_mode & 0o777 == 0o600
    assert certificates.fits(home.tls_cert.read_bytes(), home.tls_key.read_bytes())
    certificates.check_certificate(home.tls_cert.read_bytes(), home.ca_cert.read_bytes(), "server", now_utc())


def test_succession_of_rosters() -> None:
    def roster(serial: int, federation: str = "lung") -> Roster:
        keys = [identity.generate("x").public.hex() for _ in range(2)]
        sites = [{"number": 1, "name": "mainz", "key": keys[0]}]
        content = {"federation": federation, "serial": serial, "sites": sites, "server": keys[1]}
        return Roster.model_validate(content)

    first, second = roster(1), roster(2)
    assert check_succession(first, second)
    assert not check_succession(first, first)
    for known, offered, rule in (
        (second, first, "roster-old"),
        (second, roster(2), "roster-two"),
        (first, roster(2, "other"), "roster-federation"),
    ):
        with pytest.raises(ProtocolError) as error:
            check_succession(known, offered)
        assert error.value.rule == rule
    assert "serial" not in roster(0).model_dump(mode="json")  # As before there were serials.
    assert roster(3).model_dump(mode="json")["serial"] == 3


def test_rosters_made_from_key_files_are_numbered_too(tmp_path: Path) -> None:
    for name in ("mainz", "coordinator"):
        identity.save(identity.generate(name), tmp_path / f"{name}.pem")
    governance = identity.generate("governance").public
    files, server = [tmp_path / "mainz.pub"], tmp_path / "coordinator.pub"
    first = new_roster(files, governance, "lung", server, None).roster
    assert first.serial == 1
    assert new_roster(files, governance, None, None, first).roster.serial == 2
    before_serials = first.model_copy(update={"serial": 0})
    assert check_succession(before_serials, new_roster(files, governance, None, None, before_serials).roster)


def every_kill(
    start: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[World], int]
) -> list[World]:
    """Kill a command at each of its writes in turn, run it again, and return the worlds that result."""
    worlds = []
    for point in range(1, 200):
        world = start.copy(tmp_path / f"killed-{point}")
        with killed_at(monkeypatch, point) as passed:
            with contextlib.suppress(Killed):
                command(world)
            is_through = passed() < point
        if is_through:
            break
        assert command(world) == 0
        assert command(world) == 0
        worlds.append(world)
    assert len(worlds) >= 3
    return worlds


def test_init_of_a_server_may_be_killed_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = World(tmp_path / "start")
    start.root.mkdir()

    def found(world: World) -> int:
        return 0 if world.server.config.exists() else world.found()

    for number, world in enumerate(every_kill(start, tmp_path, monkeypatch, found)):
        home = world.server
        assert certificates.fits(home.tls_cert.read_bytes(), home.tls_key.read_bytes())
        assert governance_key(home) == identity.load(home.governance).public
        if number % 8 == 0:
            world.member("utrecht")


def test_init_of_a_site_may_be_killed_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = World(tmp_path / "start")
    start.root.mkdir()
    assert start.found() == 0
    for world in every_kill(start, tmp_path, monkeypatch, lambda world: world.init("utrecht")):
        assert world.enrol("utrecht") == 0
        assert world.join("utrecht") == 0


@pytest.mark.parametrize("what", ["new", "renewal", "new key", "revoked"])
def test_enrolment_may_be_killed_at_any_write(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    name = "lyon" if what == "new" else "utrecht"
    if what in ("renewal", "new key"):
        later(monkeypatch)
        assert world.renew(name, *(["--new-identity"] if what == "new key" else [])) == 0

    def command(one: World) -> int:
        if what == "revoked":
            return one.revoke(name)
        return one.enrol(name, *(["--replace"] if what == "new key" else []))

    after = {"new": ({"mainz": 1, "utrecht": 2, "lyon": 3}, 3), "renewal": ({"mainz": 1, "utrecht": 2}, 2)}
    after |= {"new key": ({"mainz": 1, "utrecht": 2}, 3), "revoked": ({"mainz": 1}, 3)}
    for one in every_kill(world, tmp_path, monkeypatch, command):
        assert (numbers(one), roster_of(one).serial) == after[what]
        assert latest_roster(one.server, governance_key(one.server)) == roster_of(one)
        log_holds(one)
        if what != "revoked":
            assert one.join(name) == 0


@pytest.mark.parametrize("what", ["first", "renewal", "new key", "lost key"])
def test_a_join_may_be_killed_at_any_write(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    name = "lyon" if what == "first" else "utrecht"
    if what != "first":
        later(monkeypatch)
        if what == "lost key":
            world.site(name).identity.unlink()
        assert world.renew(name, *([] if what == "renewal" else ["--new-identity"])) == 0
    assert world.enrol(name, *(["--replace"] if "key" in what else [])) == 0
    for one in every_kill(world, tmp_path, monkeypatch, lambda one: one.join(name)):
        home = one.site(name)
        assert certificates.fits(home.tls_cert.read_bytes(), home.tls_key.read_bytes())
        assert known_roster(home) == roster_of(one)
        assert not home.next_tls_key.exists() and not home.next_identity.exists()
        assert home.settings().site.server == "localhost:19443"
        log_holds(one, name)
        assert len(parts(home.audit)) == 1


def test_the_help_teaches_ten_commands_in_order(capsys: Captured) -> None:
    order = ["server init", "site init", "server enrol", "site join", "server run", "site check", "site run"]
    order += ["server submit", "site allow", "server status"]
    for main in (server_main, site_main):
        main(["--help"])
        shown = capsys.readouterr().out
        places = [shown.index(f"{number}  fedvision-{words}") for number, words in enumerate(order, 1)]
        assert places == sorted(places)


def test_both_programs_are_installed() -> None:
    content = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    scripts = content["project"]["scripts"]
    assert scripts["fedvision-server"] == "fedvision_server.cli:run"
    assert scripts["fedvision-site"] == "fedvision_sites.cli:run"


def test_the_libraries_below_the_commands_refuse_by_themselves(world: World) -> None:
    """A caller that forgets ``examine`` or the question is still refused."""
    stranger = read_request(request_with("mainz", identity.generate("mainz")))
    with pytest.raises(ConfigError, match="another key"):
        examine(world.server, stranger, False, now_utc())
    with world.server.locked(), pytest.raises(ConfigError, match="another key"):
        enrol(world.server, stranger, False, now_utc())

    def disagree(key: bytes) -> None:
        raise FedvisionError("no")

    assert world.enrol("lyon") == 0
    before = snapshot(world.site("lyon").root)
    with pytest.raises(FedvisionError, match="no"):
        join(world.site("lyon"), enrolling.kit_of_file(world.kit("lyon")), disagree)
    assert snapshot(world.site("lyon").root) == before
