"""``fedvision keys``: from a new key to a roster that every site accepts, and every way not to get there."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fedvision.cli.app import main
from fedvision.secagg.identity import fingerprint, load
from fedvision.secagg.roster import Roster, load_charter, load_roster, scale_for

GROUPS = re.compile(r"\d{5}  \d{5}  \d{5}  \d{5}")
SIGN = ["keys", "sign", "keys", "--federation", "lung-ct", "--server", "keys/coordinator.pub"]
SIGN += ["--key", "vault/consortium.pem"]
RENEW = ["keys", "sign", "keys", "--previous", "roster.json", "--key", "vault/consortium.pem"]
RENEW += ["--out", "next.json", "--yes"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def parties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Path:
    """Start in a folder with keys of three sites and the server, and governance's in a vault."""
    monkeypatch.chdir(tmp_path)
    for name in ("utrecht", "mainz", "lyon", "coordinator"):
        assert main(["keys", "new", name]) == 0
    assert main(["keys", "new", "consortium", "--kind", "governance", "--out", "vault"]) == 0
    capsys.readouterr()
    return tmp_path


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def governance_key() -> bytes:
    return load(Path("vault/consortium.pem")).public


def in_two_lines(path: str) -> list[str]:
    groups = fingerprint(load(Path(path)).public).split()
    return ["  ".join(groups[:4]), "  ".join(groups[4:])]


def refused(arguments: list[str], capsys: Captured) -> str:
    """Return what a command says on stderr, after it was seen to fail without a traceback."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "fedvision: error: " in error or "Usage:" in error
    assert "Traceback" not in error
    return error


def test_a_new_key_shows_its_fingerprint_and_what_to_do_next(capsys: Captured) -> None:
    assert main(["keys", "new", "aachen"]) == 0
    output = capsys.readouterr()
    assert "private key: keys/aachen.pem\npublic key: keys/aachen.pub\n" in output.out
    assert GROUPS.findall(output.out) == in_two_lines("keys/aachen.pem")
    assert "send keys/aachen.pub to governance" in output.err
    assert Path("keys/aachen.pem").stat().st_mode & 0o777 == 0o600
    assert "PRIVATE" not in output.out + output.err


def test_the_kind_of_a_key_changes_only_what_is_said(capsys: Captured) -> None:
    assert main(["keys", "new", "board", "--kind", "governance", "--out", "vault"]) == 0
    assert "give vault/board.pub to every site" in capsys.readouterr().err
    assert Path("vault/board.pub").read_text().startswith("fedvision-ed25519 ")


def test_a_key_is_never_overwritten(capsys: Captured) -> None:
    before = {path.name: path.read_bytes() for path in Path("keys").iterdir()}
    assert "keys/mainz.pem exists, and keys are never overwritten" in refused(
        ["keys", "new", "mainz"], capsys
    )
    Path("keys/mainz.pem").unlink()
    assert "keys/mainz.pub exists" in refused(["keys", "new", "mainz"], capsys)
    del before["mainz.pem"]
    assert {path.name: path.read_bytes() for path in Path("keys").iterdir()} == before


@pytest.mark.parametrize("name", ["a b", "../x", "", "ü", "x" * 65, ".x", "-x"])
def test_a_name_that_a_roster_cannot_hold_is_refused(name: str, capsys: Captured) -> None:
    assert "a name is 1 to 64" in refused(["keys", "new", "--", name], capsys)


def test_show_prints_the_same_groups_for_both_halves_of_a_key(capsys: Captured) -> None:
    assert main(["keys", "show", "keys/mainz.pub", "keys/mainz.pem"]) == 0
    output = capsys.readouterr()
    assert GROUPS.findall(output.out) == in_two_lines("keys/mainz.pem") * 2
    assert "call the owner on a number that you had before" in output.err


def test_show_prints_everybody_in_a_roster(capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    capsys.readouterr()
    assert main(["keys", "show", "roster.json"]) == 0
    names = ["keys/lyon.pem", "keys/mainz.pem", "keys/utrecht.pem", "keys/coordinator.pem"]
    expected = [line for name in [*names, "vault/consortium.pem"] for line in in_two_lines(name)]
    assert GROUPS.findall(capsys.readouterr().out) == expected


def test_show_refuses_what_is_no_key(capsys: Captured) -> None:
    Path("notes.txt").write_text("fedvision-ed25519 and much more\n")
    Path("odd.pub").write_bytes(b"\xff\xfe\x00")
    Path("open.pem").write_bytes(Path("keys/mainz.pem").read_bytes())
    Path("open.pem").chmod(0o644)
    Path("renamed.pub").write_bytes(Path("keys/mainz.pem").read_bytes())
    secret = Path("keys/mainz.pem").read_text().splitlines()[2]
    for name, told in {
        "notes.txt": "expected one line",
        "odd.pub": "expected one line",
        "absent.pub": "cannot read absent.pub",
        "keys": "cannot read keys",
        "open.pem": "others can read or change the private key (mode 0644)",
        "renamed.pub": "expected one line",
    }.items():
        error = refused(["keys", "show", "keys/mainz.pub", name], capsys)
        assert told in error and secret not in error


def test_a_roster_is_shown_asked_for_and_signed(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    answer(monkeypatch, "y\n")
    assert main(SIGN) == 0
    output = capsys.readouterr()
    assert "Did you compare every fingerprint by telephone" in output.err
    for name in ("lyon", "mainz", "utrecht", "coordinator"):
        for line in in_two_lines(f"keys/{name}.pem"):
            assert line in output.out
    assert "keys/coordinator.pub is the server's key, not a site's" in output.err
    roster = load_roster(Path("roster.json"), governance_key())
    assert [(one.number, one.name) for one in roster.sites] == [(1, "lyon"), (2, "mainz"), (3, "utrecht")]
    assert roster.federation == "lung-ct"
    assert bytes.fromhex(roster.server) == load(Path("keys/coordinator.pem")).public
    assert f"digest: {roster.digest().hex()}" in output.out


@pytest.mark.parametrize("text", ["n\n", "\n", ""])
def test_nothing_is_signed_without_a_yes(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    answer(monkeypatch, text)
    assert main(SIGN) == 130
    assert not Path("roster.json").exists()
    assert "hint: --yes signs without asking" in capsys.readouterr().err


def test_keys_may_be_given_one_by_one_and_governances_is_no_site(capsys: Captured) -> None:
    arguments = ["keys", "sign", "keys/mainz.pub", "keys/mainz.pub", "keys/lyon.pub", "vault/consortium.pub"]
    assert main([*arguments, *SIGN[3:], "--yes", "--out", "two.json"]) == 0
    assert "vault/consortium.pub is governance's key" in capsys.readouterr().err
    roster = load_roster(Path("two.json"), governance_key())
    assert [one.name for one in roster.sites] == ["lyon", "mainz"]


def test_a_renewed_roster_keeps_numbers_and_says_what_changed(capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    for path in ("keys/lyon.pub", "keys/lyon.pem", "keys/mainz.pub", "keys/mainz.pem"):
        Path(path).unlink()
    for name in ("aachen", "mainz"):
        assert main(["keys", "new", name]) == 0
    capsys.readouterr()
    assert main(RENEW) == 0
    output = capsys.readouterr()
    rows = {line.split()[2]: line for line in output.out.splitlines() if line.startswith("site ")}
    assert rows["aachen"].split()[-1] == "new" and rows["mainz"].rstrip().endswith("NEW KEY")
    assert rows["utrecht"].rstrip().endswith(in_two_lines("keys/utrecht.pem")[0])
    assert "note: lyon leaves the federation" in output.err
    roster = load_roster(Path("next.json"), governance_key())
    assert [(one.number, one.name) for one in roster.sites] == [(2, "mainz"), (3, "utrecht"), (4, "aachen")]


def test_a_new_server_is_told(capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    assert main(["keys", "new", "second", "--out", "server"]) == 0
    capsys.readouterr()
    Path("keys/coordinator.pub").unlink()
    assert main([*RENEW, "--server", "server/second.pub"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("server")]
    assert row.rstrip().endswith("NEW KEY")


def test_a_previous_roster_must_be_governances_own(capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    assert main(["keys", "new", "other", "--out", "vault"]) == 0
    capsys.readouterr()
    error = refused([word.replace("consortium", "other") for word in RENEW], capsys)
    assert "`governance` is not the accepted governance key" in error
    error = refused([*RENEW, "--federation", "heart-mr"], capsys)
    assert "--federation is not that of the previous roster" in error


def test_a_roster_needs_names_and_keys_of_its_own(capsys: Captured) -> None:
    Path("twice").mkdir()
    Path("twice/mainz.pub").write_text(Path("keys/lyon.pub").read_text().replace("lyon", "Mainz"))
    twice = ["keys", "sign", "keys/mainz.pub", "twice", *SIGN[3:]]
    assert "keys/mainz.pub and twice/mainz.pub have the same name" in refused(twice, capsys)
    same_key = ["keys", "sign", "keys/lyon.pub", "twice", *SIGN[3:]]
    assert "keys/lyon.pub and twice/mainz.pub have the same key" in refused(same_key, capsys)
    assert not Path("roster.json").exists()


def without(option: str) -> list[str]:
    at = SIGN.index(option)
    return SIGN[:at] + SIGN[at + 2 :]


def test_what_is_missing_for_a_roster_is_told(capsys: Captured) -> None:
    Path("empty").mkdir()
    assert "needs --federation NAME and --server" in refused(without("--federation"), capsys)
    assert "needs --federation NAME and --server" in refused(without("--server"), capsys)
    assert "--key" in refused(without("--key"), capsys)
    assert "empty: no .pub file" in refused(["keys", "sign", "empty", *SIGN[3:]], capsys)
    only_server = ["keys", "sign", "keys/coordinator.pub", *SIGN[3:]]
    assert "no site's key given" in refused(only_server, capsys)
    assert "--roster is for a charter" in refused([*SIGN, "--roster", "x.json"], capsys)
    assert "`federation`" in refused([*without("--federation"), "--federation", "a b"], capsys)
    public = [*without("--key"), "--key", "vault/consortium.pub", "--yes"]
    Path("vault/consortium.pub").chmod(0o600)
    assert "this is a public key" in refused(public, capsys)


def test_governance_cannot_be_the_server(capsys: Captured) -> None:
    same = [*without("--key"), "--key", "keys/coordinator.pem", "--yes"]
    assert "also the server's or a site's" in refused(same, capsys)


def test_a_signed_file_is_replaced_only_by_force(capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    before = Path("roster.json").read_bytes()
    assert "roster.json exists" in refused([*SIGN, "--yes"], capsys)
    assert main([*SIGN, "--yes", "--force"]) == 0
    assert Path("roster.json").read_bytes() == before  # the same keys, the same bytes


VERIFY = ["keys", "verify", "roster.json", "--governance", "vault/consortium.pub"]


def test_verify_says_who_is_in_it_and_what_it_proves(capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    capsys.readouterr()
    assert main(VERIFY) == 0
    output = capsys.readouterr().out
    assert "roster.json: the roster of lung-ct is good." in output
    assert "Proved: the owner of the key consortium signed exactly these keys." in output
    assert "Not proved: whose key that is." in output
    for name in ("keys/lyon", "keys/mainz", "keys/utrecht", "keys/coordinator", "vault/consortium"):
        assert all(line in output for line in in_two_lines(f"{name}.pem"))


def test_verify_refuses_a_roster_that_was_touched(capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    good = Path("roster.json").read_text()
    stranger = load(Path("keys/coordinator.pem")).public.hex()
    key = load(Path("keys/lyon.pem")).public.hex()
    for text, told in {
        good.replace(key, governance_key().hex()): "`signature` is wrong",
        good.replace('"lyon"', '"Lyon"'): "`signature` is wrong",
        good.replace(key, stranger): "also a site's",
        good + "\n": "spelling was changed",
        good[: len(good) // 2]: "no signed roster or charter",
        good.replace('"roster"', '"charter"'): "a charter is checked beside its roster",
        good.replace('"roster"', '"report"'): "no signed roster or charter",
    }.items():
        Path("roster.json").write_text(text)
        assert told in refused(VERIFY, capsys)
    Path("roster.json").write_text(good)
    assert main(VERIFY) == 0


def test_verify_accepts_one_governance_key(capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    other = ["keys", "verify", "roster.json", "--governance", "keys/lyon.pub"]
    assert "`governance` is not the accepted governance key" in refused(other, capsys)
    wrong = ["keys", "verify", "roster.json", "--governance", "roster.json"]
    assert "expected one line" in refused(wrong, capsys)
    assert "cannot read absent.json" in refused(
        ["keys", "verify", "absent.json", "--governance", "keys/lyon.pub"], capsys
    )
    assert "--roster is for a charter" in refused([*VERIFY, "--roster", "roster.json"], capsys)


def draft(**changes: Any) -> Roster:
    """Write an unsigned charter for the roster in this folder."""
    roster = load_roster(Path("roster.json"), governance_key())
    content = {
        "federation": "lung-ct",
        "roster": roster.digest().hex(),
        "job": "0a" * 32,
        "layout": "1b" * 32,
        "size": 1000,
        "initial_weights": "2c" * 32,
        "sites": [1, 2, 3],
        "max_colluding": 0,
        "threshold": 3,
        "smallest_cohort": 3,
        "smallest_cohort_waiver": True,
        "rounds": 10,
        "level": "sketch",
        "clip_norm": 2.5,
        "scale": scale_for(3),
        "weight_cap": 100,
    }
    Path("charter.json").write_text(json.dumps(content | changes))
    return roster


CHARTER = ["keys", "sign", "charter.json", "--roster", "roster.json", "--key", "vault/consortium.pem"]


def test_a_charter_is_shown_in_full_and_signed(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    roster = draft()
    capsys.readouterr()
    answer(monkeypatch, "y\n")
    assert main(CHARTER) == 0
    output = capsys.readouterr()
    assert "Do you sign this charter?" in output.err
    charter = load_charter(Path("charter.signed.json"), governance_key(), roster)
    for key, value in charter.model_dump().items():
        (row,) = [line for line in output.out.splitlines() if line.split(" ")[0] == key]
        assert isinstance(value, tuple) or str(value) in row
    assert "1 lyon, 2 mainz, 3 utrecht" in output.out
    assert "up to 0 sites that help it" in output.out


def test_a_signed_charter_verifies_beside_its_roster_only(capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    draft()
    assert main([*CHARTER, "--yes"]) == 0
    assert main(["keys", "new", "aachen"]) == 0 and main(RENEW) == 0
    capsys.readouterr()
    command = ["keys", "verify", "charter.signed.json", "--governance", "vault/consortium.pub"]
    assert main([*command, "--roster", "roster.json"]) == 0
    output = capsys.readouterr().out
    assert "the charter is good, and so is roster.json" in output
    assert GROUPS.findall(output) == in_two_lines("vault/consortium.pem")
    error = refused([*command, "--roster", "next.json"], capsys)
    assert "`roster` is not the digest of the roster" in error
    assert "a charter is checked beside its roster" in refused(command, capsys)
    assert "names no keys" in refused(["keys", "show", "charter.signed.json"], capsys)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"threshold": 2}, "threshold must be 3 (floor((n + m) / 2) + 1, n for 3 and 4) for 3 sites, got 2"),
        ({"scale": 2**30}, "scale must be 357913941 (floor(2^30/(n + 8z)), z the noise) for 3 sites"),
        ({"smallest_cohort_waiver": False}, "needs smallest_cohort_waiver = true"),
        ({"treshold": 3}, "unknown key `treshold`\nhint: did you mean `threshold`?"),
        ({"sites": [1, 2, 4]}, "the roster has no site number 4"),
        ({"federation": "heart-mr"}, "the charter is for heart-mr, the roster for lung-ct"),
    ],
)
def test_a_charter_that_breaks_a_rule_is_not_signed(
    changes: dict[str, Any], told: str, capsys: Captured
) -> None:
    assert main([*SIGN, "--yes"]) == 0
    draft(**changes)
    assert told in refused([*CHARTER, "--yes"], capsys)
    assert not Path("charter.signed.json").exists()


def test_options_of_the_other_document_are_refused(capsys: Captured) -> None:
    assert main([*SIGN, "--yes"]) == 0
    draft()
    assert "are for a roster" in refused([*CHARTER, "--federation", "x"], capsys)
    assert "--roster roster.json" in refused([*CHARTER[:3], *CHARTER[5:]], capsys)
    assert main([*CHARTER, "--yes"]) == 0
    capsys.readouterr()
    again = ["keys", "sign", "charter.signed.json", *CHARTER[3:]]
    assert "charter.signed.json: already signed" in refused(again, capsys)


def test_help_teaches_the_whole_procedure(capsys: Captured) -> None:
    for command, told in {
        (): "cannot invent a site",
        ("new",): "stays with you",
        ("show",): "compared by telephone",
        ("sign",): "with --previous every site of that roster keeps its number",
        ("verify",): "Exit status 2",
    }.items():
        assert main(["keys", *command, "--help"]) == 0
        assert told in " ".join(capsys.readouterr().out.replace("│", " ").split())
