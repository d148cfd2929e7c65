"""What private jobs cost a deployed site: limits, the ledger, the audit log, the command, take-over."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedvision.audit.log import read_log
from fedvision.privacy.ledger_lines import read_ledger
from fedvision.secagg import identity
from fedvision.wire.messages import Refusal
from fedvision_server.cli import main as server_main
from fedvision_server.home import ServerHome
from fedvision_server.queue import open_queue
from fedvision_sites.cli import main as site_main
from fedvision_sites.home import SiteHome
from tests.server_homes import make_home, write_job
from tests.test_private_run import DISTRIBUTED
from tests.test_site_link import NAMES, Stage, StandIn, hellos

Captured = pytest.CaptureFixture[str]
PRIVATE = DISTRIBUTED | {"secure_aggregation__weight_cap": None}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sites that allow what keeps to their policy, and a private job. Read only."""
    folder = tmp_path_factory.mktemp("federation")
    server = make_home(folder, NAMES)
    digits = identity.fingerprint(identity.parse_public(server.governance_pub.read_text())[1])
    for name in NAMES:
        kit, own = str(folder / f"{name}.kit.json"), folder / name
        assert site_main(["join", kit, "--home", str(own), "--governance", digits]) == 0
        change(SiteHome(own), automatic="true", smallest_cohort="3")
    job = write_job(folder / "job.toml", **PRIVATE)
    assert server_main(["submit", str(job), "--home", str(server.root)]) == 0
    return folder


def staged(template: Path, folder: Path) -> Stage:
    shutil.copytree(template, folder)
    server = ServerHome(folder / "server")
    (entry,) = open_queue(server).jobs()
    return Stage(server, {name: SiteHome(folder / name) for name in NAMES}, entry.id)


@pytest.fixture(autouse=True)
def in_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)


@pytest.fixture
def stage(template: Path, tmp_path: Path) -> Stage:
    return staged(template, tmp_path / "federation")


@pytest.fixture(scope="module")
def done(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A private job of two rounds that is finished. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1, raising=False)
        stage = staged(template, tmp_path_factory.mktemp("done") / "federation")
        assert stage.run(StandIn(stage.server, stage.sites))["state"] == "done"
    return stage


@pytest.fixture
def site(done: Stage, tmp_path: Path) -> SiteHome:
    """A copy of a site that took part."""
    return SiteHome(Path(shutil.copytree(done.sites["b"].root, tmp_path / "b", symlinks=True)))


def change(home: SiteHome, **keys: str) -> None:
    """Change keys of ``site.toml``."""
    lines = home.config.read_text(encoding="utf-8").splitlines()
    for key, value in keys.items():
        (at,) = (n for n, line in enumerate(lines) if line.startswith(f"{key} = "))
        lines[at] = f"{key} = {value}"
    home.config.write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(home: SiteHome, *words: str) -> int:
    return site_main(["privacy", "--home", str(home.root), *words])


def shown(home: SiteHome, capsys: Captured, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert command(home, "--json", *words) == 0
    return dict(json.loads(capsys.readouterr().out))


def kinds(home: SiteHome) -> list[str]:
    return [line.kind for line in read_log(home.audit)]


@pytest.mark.parametrize("key", ["largest_epsilon", "largest_epsilon_alone"])
def test_a_job_past_a_sites_limit_is_refused_with_a_code_and_no_number(stage: Stage, key: str) -> None:
    change(stage.sites["b"], **{key: "0.0625"})
    replies: list[RecordDict] = []

    def keep(name: str, reply: RecordDict) -> RecordDict:
        if name == "b":
            replies.append(reply)
        return reply

    grid = StandIn(stage.server, stage.sites, keep)
    refusal = dict(stage.link(grid, hello_s=30).ask(hellos(stage)))[2]
    assert isinstance(refusal, Refusal) and refusal.code == "privacy: privacy-limit"
    assert (refusal.site, refusal.round) == ("b", 0)
    (reply,) = replies
    sent = {key: value for key, value in reply["message"].items() if not key.startswith("seal.")}
    assert not reply.array_records and sent.keys() == {
        "format",
        "kind",
        "job_digest",
        "site",
        "round",
        "code",
    }
    (log,) = stage.sites["b"].jobs.glob("*/log.jsonl")
    assert "0.0625 allowed at this site" in log.read_text(encoding="utf-8")
    assert not stage.sites["b"].ledger.exists()


def test_a_limit_that_was_lowered_counts_from_the_next_request_on(stage: Stage) -> None:
    grid = StandIn(stage.server, stage.sites)
    link = stage.link(grid, hello_s=30)
    assert dict(link.ask(hellos(stage)))[2].site == "b"
    change(stage.sites["b"], largest_epsilon="0.0625")
    refusal = dict(link.ask(hellos(stage)))[2]
    assert isinstance(refusal, Refusal) and refusal.code == "privacy: privacy-limit"
    change(stage.sites["b"], largest_epsilon="1000")
    assert not isinstance(dict(link.ask(hellos(stage)))[2], Refusal)


def test_the_audit_log_says_once_that_a_job_began_to_spend(done: Stage) -> None:
    own = done.sites["b"]
    (line,) = [one for one in read_log(own.audit) if one.kind == "privacy-reserved"]
    first, second = read_ledger(own.ledger)
    fields = dict(line.fields)
    assert fields.pop("job") == first.line.content.job  # type: ignore[union-attr]
    assert (fields.pop("line"), fields.pop("digest")) == (1, first.digest.hex())
    assert 0 < float(str(fields.pop("epsilon"))) < float(str(fields.pop("epsilon_alone")))
    assert fields == {"data_set": "b", "delta": first.line.content.delta}  # type: ignore[union-attr]
    assert second.line.number == 2
    order = kinds(own)
    assert order.index("round-opened") < order.index("privacy-reserved") < order.index("released")


def test_the_command_shows_what_was_spent_the_limits_and_each_job(site: SiteHome, capsys: Captured) -> None:
    change(site, largest_epsilon="9.5")
    capsys.readouterr()
    assert command(site, "--jobs") == 0
    out = capsys.readouterr().out
    assert "if aggregation fails" in out and "9.5" in out and "no limit" in out and "tiny" in out
    content = shown(site, capsys, "--jobs")
    (together,), (alone,) = content["data_sets"], content["jobs"]
    assert together["rounds"] == 2 and 0 < together["epsilon"] < together["epsilon_alone"]
    assert alone["job"] == next(iter(read_ledger(site.ledger))).line.content.job  # type: ignore[union-attr]
    assert {key: alone[key] for key in together} == together
    assert (content["largest_epsilon"], content["largest_epsilon_alone"]) == (9.5, None)


def test_a_site_without_private_jobs_has_spent_nothing(stage: Stage, capsys: Captured) -> None:
    before = sorted(stage.sites["a"].root.rglob("*"))
    capsys.readouterr()
    assert command(stage.sites["a"]) == 0
    assert capsys.readouterr().out == "nothing was spent yet\n"
    assert sorted(stage.sites["a"].root.rglob("*")) == before
    assert command(stage.sites["a"], "--take-over", "--yes") == 2


def edited(home: SiteHome) -> str:
    home.ledger.write_bytes(home.ledger.read_bytes().replace(b'"steps":1', b'"steps":2', 1))
    return "ledger-chain"


def cut(home: SiteHome) -> str:
    home.ledger.write_bytes(home.ledger.read_bytes().splitlines(keepends=True)[0])
    return "old-ledger"


def deleted(home: SiteHome) -> str:
    home.ledger.unlink()
    return "old-ledger"


def without_marks(home: SiteHome) -> str:
    (home.guard / "privacy-ledger").unlink()
    return "lost-marks"


@pytest.mark.parametrize("damage", [edited, cut, deleted, without_marks])
def test_a_ledger_that_does_not_hold_is_told_with_its_rule(
    site: SiteHome, capsys: Captured, damage: Callable[[SiteHome], str]
) -> None:
    rule = damage(site)
    capsys.readouterr()
    assert command(site) == 1
    output = capsys.readouterr()
    assert f"(rule {rule})" in output.err and not output.out


def test_lost_marks_are_taken_over_after_a_yes_and_both_logs_say_so(
    site: SiteHome, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shown(site, capsys)
    last = [*read_ledger(site.ledger)][-1]
    without_marks(site)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert command(site, "--take-over") == 130
    assert command(site) == 1 and "privacy-taken-over" not in kinds(site)
    capsys.readouterr()
    assert command(site, "--take-over", "--yes") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "this ledger is the newest copy there is" in told and "The ledger has 2 lines" in told
    assert shown(site, capsys) == before
    *_, line = read_log(site.audit)
    assert line.kind == "privacy-taken-over"
    assert line.fields == {"lines": 2, "digest": last.digest.hex()}
    assert [*read_ledger(site.ledger)][-1].line.content.marked is None  # type: ignore[union-attr]


@pytest.mark.parametrize("damage", [edited, cut, deleted])
def test_a_ledger_that_was_changed_or_cut_cannot_be_taken_over(
    site: SiteHome, capsys: Captured, damage: Callable[[SiteHome], str]
) -> None:
    rule = damage(site)
    assert command(site, "--take-over", "--yes") == 1
    assert f"(rule {rule})" in capsys.readouterr().err
    assert "privacy-taken-over" not in kinds(site)


def test_a_ledger_that_holds_is_not_taken_over(site: SiteHome, capsys: Captured) -> None:
    before = site.ledger.read_bytes()
    assert command(site, "--take-over", "--yes") == 2
    assert "agree" in capsys.readouterr().err
    assert command(site, "--yes") == 2
    assert site.ledger.read_bytes() == before


def test_who_is_asked_about_a_job_is_told_what_it_costs_here(site: SiteHome, capsys: Captured) -> None:
    digest = shown(site, capsys, "--jobs")["jobs"][0]["job"]
    (reserved,) = (line.fields for line in read_log(site.audit) if line.kind == "privacy-reserved")
    change(site, largest_epsilon_alone="12.5")
    assert site_main(["jobs", digest[:12], "--home", str(site.root)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    together, alone = (f"{float(str(reserved[key])):.3g}" for key in ("epsilon", "epsilon_alone"))
    assert f"Epsilon {together} if secure aggregation holds, {alone} if it fails" in told
    assert "this site allows epsilon if secure aggregation fails 12.5" in told
    assert "this site's share of the noise" in told
