"""Job folders of a deployment: what is refused, what is signed, and that nothing unsigned is believed."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedvision.audit.verify import verify_run
from fedvision.cli.app import main as library_main
from fedvision.config import load_job, parse_job
from fedvision.errors import ConfigError, StorageError
from fedvision.report.page import write_report
from fedvision.secagg import identity
from fedvision.secagg.identity import Identity, parse_public
from fedvision.secagg.roster import load_charter, save_signed, sign_document
from fedvision.simulation.one_process import LocalLink
from fedvision.storage import read_json, write_json
from fedvision.training.charter import make_charter
from fedvision_server.chartering import (
    check_for_deployment,
    check_still_enrolled,
    choose_cohort,
    current_roster,
    enrolled_sites,
    finish_draft,
    load_cohort,
    load_job_folder,
    make_job_folder,
    wanted_of,
)
from fedvision_server.cli import main as server_main
from fedvision_server.federation import Cohort
from fedvision_server.home import ServerHome
from fedvision_server.job_log import print_log
from fedvision_server.job_status import site_standings, standing
from fedvision_server.queue import DRAFT, Entry, open_queue
from fedvision_server.round import run_job
from fedvision_sites.secure import SecureConfig
from fedvision_sites.work import SiteConfig
from tests.server_homes import NAMES, full_disk, job_content, make_home


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation")
    make_home(folder)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A copy of a federation of four sites, to be changed."""
    return Path(shutil.copytree(template, tmp_path / "federation"))


@pytest.fixture
def home(folder: Path) -> ServerHome:
    return ServerHome(folder / "server")


def job(**changes: Any) -> Any:
    return parse_job(job_content(**changes), "job.toml")


def cohort_of(home: ServerHome, sites: str = "", held_out: str = "", **changes: Any) -> Cohort:
    roster = current_roster(home)
    return choose_cohort(
        job(**changes), roster, enrolled_sites(home, roster), sites.split(), held_out.split()
    )


def governance_of(home: ServerHome) -> Identity:
    return identity.load(home.governance)


def make_folder(home: ServerHome, is_signed: bool = True, held_out: str = "delft", **changes: Any) -> str:
    """Make a job's folder as `submit` does, and return its id."""
    found = job(**changes)
    job_id = open_queue(home).new_id(found.name)
    governance = governance_of(home) if is_signed else None
    cohort = cohort_of(home, "", held_out)
    make_job_folder(home, job_id, found, cohort, current_roster(home), governance)
    return job_id


def submitted(home: ServerHome, **changes: Any) -> Entry:
    job_id = make_folder(home, **changes)
    return open_queue(home).submit(identity.load(home.operator), job_id, wanted_of(home, job_id))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Who takes part.


def test_all_enrolled_sites_train_unless_something_else_is_said(home: ServerHome) -> None:
    assert cohort_of(home) == Cohort(NAMES, NAMES, NAMES, ())
    assert cohort_of(home, held_out="bergen").train == ("aachen", "cork", "delft")
    assert cohort_of(home, "delft aachen cork").train == ("aachen", "cork", "delft")
    chosen = cohort_of(home, "cork aachen", "delft bergen")
    assert (chosen.train, chosen.held_out) == (("aachen", "cork"), ("bergen", "delft"))


def test_the_sites_of_the_job_file_count_where_nothing_else_is_said(home: ServerHome) -> None:
    data = {"root": "/x", "sites": ["aachen", "bergen", "cork"], "held_out": ["delft"]}
    chosen = cohort_of(home, data=data)
    assert (chosen.train, chosen.held_out) == (("aachen", "bergen", "cork"), ("delft",))
    assert cohort_of(home, data={"root": "/x", "held_out": ["delft"]}).train == NAMES[:3]
    assert cohort_of(home, "bergen cork", "aachen", data=data) == Cohort(
        *[("bergen", "cork")] * 3, ("aachen",)
    )


@pytest.mark.parametrize(
    ("sites", "held_out", "text"),
    [
        ("aachen essen", "", "site essen is not enrolled"),
        ("", "essen", "site essen is not enrolled"),
        ("aachen aachen", "", "site aachen is named twice"),
        ("aachen bergen", "bergen", "site bergen is named twice"),
        ("aachen \x1b[31m", "", r"site \\x1b\[31m is not enrolled"),
    ],
)
def test_sites_that_cannot_take_part_are_named(
    home: ServerHome, sites: str, held_out: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        cohort_of(home, sites, held_out)


def test_a_revoked_site_does_not_take_part_even_before_governance_signed_a_new_roster(
    folder: Path, home: ServerHome
) -> None:
    home.governance.rename(folder / "governance.pem")
    assert server_main(["revoke", "cork", "--home", str(home.root), "--reason", "left", "--yes"]) == 0
    assert "cork" in {one.name for one in current_roster(home).sites}
    assert cohort_of(home).train == ("aachen", "bergen", "delft")
    with pytest.raises(ConfigError, match="site cork is not enrolled"):
        cohort_of(home, "aachen bergen cork")


def test_without_a_roster_nothing_can_be_submitted(tmp_path: Path) -> None:
    said = ["init", str(tmp_path / "server"), "--name", "liver", "--address", "127.0.0.1:9443"]
    assert server_main(said) == 0
    with pytest.raises(ConfigError, match="no site is enrolled yet"):
        current_roster(ServerHome(tmp_path / "server"))


# What a deployment asks of a job.


@pytest.mark.parametrize(
    ("changes", "text", "hint"),
    [
        ({"aggregation__secure": False}, "aggregation.secure is false", "aggregation.secure = true"),
        ({"secure_aggregation__weight_cap": None}, "weight_cap is missing", "weight_cap = 1000"),
        ({"secure_aggregation__smallest_cohort": 4}, "smallest_cohort is 4", "add sites"),
        ({"secure_aggregation__release": []}, "held_out sites report one by one", 'release = ["test"]'),
        ({"secure_aggregation__level": "gram"}, "at least 4 sites", 'level = "sketch"'),
    ],
)
def test_jobs_that_a_deployment_cannot_run_are_refused(
    home: ServerHome, changes: dict[str, Any], text: str, hint: str
) -> None:
    cohort = cohort_of(home, held_out="delft")
    with pytest.raises(ConfigError, match=text) as caught:
        check_for_deployment(job(**changes), cohort)
    assert hint in caught.value.hint


def test_two_sites_are_too_few(home: ServerHome) -> None:
    with pytest.raises(ConfigError, match="at least 3 sites"):
        check_for_deployment(job(), cohort_of(home, "aachen bergen"))


def test_uniform_weights_need_no_cap(home: ServerHome) -> None:
    uniform = job(aggregation__weighting="uniform", secure_aggregation__weight_cap=None)
    check_for_deployment(uniform, cohort_of(home))
    check_for_deployment(job(), cohort_of(home, held_out="delft"))
    charter = make_charter(uniform, current_roster(home), NAMES, 1)
    assert charter.weight_cap == 1


# The folder.


def test_a_job_folder_has_all_that_the_sites_check_and_no_secret(home: ServerHome) -> None:
    data = {"root": "/home/researcher/secret-study"}
    job_id = make_folder(home, data=data)
    folder = home.jobs / job_id
    files = tree(folder)
    assert sorted(files) == [
        "cohort.json",
        "environment.json",
        "job.toml",
        "secagg/charter.json",
        "secagg/governance.pub",
        "secagg/roster.json",
    ]
    everything = b"".join(files.values())
    assert b"secret-study" not in everything and b"PRIVATE" not in everything
    assert files["secagg/roster.json"] == home.roster.read_bytes()
    assert load_job(folder / "job.toml") == job(data=data).public()
    assert load_cohort(folder) == cohort_of(home, held_out="delft")
    roster = current_roster(home)
    charter = load_charter(folder / "secagg" / "charter.json", governance_of(home).public, roster)
    assert charter == make_charter(job(data=data), roster, NAMES[:3], 100)
    assert (charter.sites, charter.weight_cap, charter.job) == ((1, 2, 3), 100, job().digest())
    assert {"versions", "cores", "platform"} <= set(read_json(folder / "environment.json"))


def test_a_full_disk_leaves_no_folder(home: ServerHome) -> None:
    roster, governance = current_roster(home), governance_of(home)
    for size in (100, 700):  # too small for the first file, and for one of the next
        with full_disk(size), pytest.raises(StorageError, match="cannot write"):
            make_job_folder(home, "0009-full", job(), cohort_of(home), roster, governance)
        assert list(home.jobs.iterdir()) == []
    job_id = make_folder(home)
    assert list(home.jobs.iterdir()) == [home.jobs / job_id]
    with pytest.raises(StorageError, match="cannot make"):
        make_job_folder(home, job_id, job(), cohort_of(home), current_roster(home), governance_of(home))
    assert (home.jobs / job_id / "job.toml").exists()


def test_only_the_key_of_governance_signs(home: ServerHome) -> None:
    with pytest.raises(ConfigError, match="the governance key is not that of"):
        make_job_folder(
            home, "0001-x", job(), cohort_of(home), current_roster(home), identity.load(home.operator)
        )


# Governance on another machine.


@pytest.fixture
def vault(folder: Path, home: ServerHome) -> Path:
    """Where governance's key was moved to."""
    (folder / "vault").mkdir()
    return Path(shutil.move(home.governance, folder / "vault" / "governance.pem"))


def sign(home: ServerHome, vault: Path, job_id: str) -> Path:
    """Sign a draft with the command, as governance does."""
    draft, signed = home.jobs / job_id / DRAFT, vault.parent / "signed.json"
    roster = home.jobs / job_id / "secagg" / "roster.json"
    said = ["keys", "sign", str(draft), "--roster", str(roster), "--key", str(vault), "--yes", "--force"]
    assert library_main([*said, "--out", str(signed)]) == 0
    return signed


def test_a_draft_is_signed_elsewhere_and_put_into_its_folder(home: ServerHome, vault: Path) -> None:
    job_id = make_folder(home, is_signed=False)
    assert not (home.jobs / job_id / "secagg" / "charter.json").exists()
    with pytest.raises(ConfigError, match="charter"):
        wanted_of(home, job_id)
    finish_draft(home, job_id, sign(home, vault, job_id))
    finish_draft(home, job_id, vault.parent / "signed.json")  # killed before the queue had it: again
    wanted = wanted_of(home, job_id)
    assert (wanted.sites, wanted.held_out, wanted.job) == (NAMES[:3], ("delft",), job().digest())


def test_only_the_draft_itself_signed_by_governance_is_taken(home: ServerHome, vault: Path) -> None:
    job_id, other = make_folder(home, is_signed=False), make_folder(home, is_signed=False, seed=2)
    with pytest.raises(ConfigError, match="is not the charter of 0001-tiny"):
        finish_draft(home, job_id, sign(home, vault, other))
    with pytest.raises(ConfigError):
        finish_draft(home, job_id, home.jobs / job_id / DRAFT)
    roster = current_roster(home)
    charter = make_charter(job(), roster, NAMES[:3], 100)
    save_signed(vault.parent / "by-operator.json", sign_document(charter, identity.load(home.operator)))
    with pytest.raises(ConfigError, match="governance"):
        finish_draft(home, job_id, vault.parent / "by-operator.json")
    assert not (home.jobs / job_id / "secagg" / "charter.json").exists()
    with pytest.raises(ConfigError, match="0009-x does not wait for a charter"):
        finish_draft(home, "0009-x", sign(home, vault, job_id))


def test_a_draft_under_an_old_roster_is_not_finished(folder: Path, home: ServerHome, vault: Path) -> None:
    job_id = make_folder(home, is_signed=False)
    signed = sign(home, vault, job_id)
    shutil.copy2(vault, home.governance)
    assert server_main(["revoke", "delft", "--home", str(home.root), "--reason", "left", "--yes"]) == 0
    with pytest.raises(ConfigError, match="the roster was renewed since"):
        finish_draft(home, job_id, signed)


# Before it runs.


def test_what_was_signed_is_run(home: ServerHome) -> None:
    entry = submitted(home)
    found = load_job_folder(home, entry.id)
    assert found.job == job().public()
    assert found.cohort == Cohort(*[NAMES[:3]] * 3, ("delft",))
    assert found.numbers == (1, 2, 3, 4)
    assert found.keys.identity.public == identity.load(home.server_key).public
    assert found.keys.documents.roster == home.roster.read_bytes()
    assert "private" not in repr(found) and "BEGIN" not in repr(found)


def other_job(home: ServerHome, folder: Path) -> None:
    text = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(text.replace("rounds = 2", "rounds = 3"))


def other_job_and_charter(home: ServerHome, folder: Path) -> None:
    other = make_folder(home, seed=9)
    shutil.rmtree(folder)
    shutil.copytree(home.jobs / other, folder)


def other_sites(home: ServerHome, folder: Path) -> None:
    roster = current_roster(home)
    charter = make_charter(job(), roster, NAMES, 100)
    save_signed(folder / "secagg" / "charter.json", sign_document(charter, governance_of(home)))


def other_rules(home: ServerHome, folder: Path) -> None:
    charter = make_charter(job(), current_roster(home), NAMES[:3], 99)
    save_signed(folder / "secagg" / "charter.json", sign_document(charter, governance_of(home)))


def of_an_own_governance(home: ServerHome, folder: Path) -> None:
    own = identity.generate("governance")
    roster = current_roster(home)
    charter = make_charter(job(), roster, NAMES[:3], 100)
    (folder / "secagg" / "governance.pub").write_text(identity.public_line("governance", own.public) + "\n")
    save_signed(folder / "secagg" / "roster.json", sign_document(roster, own))
    save_signed(folder / "secagg" / "charter.json", sign_document(charter, own))


def no_charter(home: ServerHome, folder: Path) -> None:
    (folder / "secagg" / "charter.json").unlink()


@pytest.mark.parametrize(
    "change",
    [other_job, other_job_and_charter, other_sites, other_rules, of_an_own_governance, no_charter],
)
def test_a_folder_that_was_changed_after_it_was_signed_is_not_run(
    home: ServerHome, change: Callable[[ServerHome, Path], None]
) -> None:
    entry = submitted(home)
    change(home, home.jobs / entry.id)
    with pytest.raises(ConfigError, match=r"is not what was signed|governance key|cannot read"):
        load_job_folder(home, entry.id)


def test_who_is_held_out_is_what_the_operator_signed(home: ServerHome) -> None:
    entry = submitted(home)
    cohort = dataclasses.asdict(cohort_of(home, held_out="delft")) | {"held_out": []}
    write_json(home.jobs / entry.id / "cohort.json", cohort)
    assert load_job_folder(home, entry.id).cohort.held_out == ("delft",)


def test_another_key_of_the_server_is_noticed(home: ServerHome) -> None:
    entry = submitted(home)
    home.server_key.unlink()
    home.server_pub.unlink()
    identity.save(identity.generate("server"), home.server_key)
    with pytest.raises(ConfigError, match="without an operator's valid signature"):
        load_job_folder(home, entry.id)
    with pytest.raises(ConfigError, match="names another key for this server"):
        current_roster(home)


def test_a_job_that_nobody_signed_is_not_run(home: ServerHome) -> None:
    job_id = make_folder(home)
    with pytest.raises(ConfigError, match="there is no job"):
        load_job_folder(home, job_id)


@pytest.mark.parametrize("content", ["[]", "{}", '{"train": 1}', "{", '"x"'])
def test_a_damaged_cohort_is_said(home: ServerHome, content: str) -> None:
    job_id = make_folder(home)
    (home.jobs / job_id / "cohort.json").write_text(content)
    with pytest.raises(StorageError, match=r"cohort\.json"):
        load_cohort(home.jobs / job_id)


def test_a_job_does_not_go_on_with_a_site_that_was_revoked(home: ServerHome) -> None:
    entry = submitted(home)
    check_still_enrolled(home, entry.id)
    assert server_main(["revoke", "bergen", "--home", str(home.root), "--reason", "x", "--yes"]) == 0
    with pytest.raises(ConfigError, match="site bergen was revoked or has a new key"):
        check_still_enrolled(home, entry.id)


# A deployed job's folder is one like a simulation's.


def test_a_deployed_job_runs_and_its_folder_is_verified_and_reported(folder: Path, home: ServerHome) -> None:
    entry = submitted(home)
    ready = load_job_folder(home, entry.id)
    governance = governance_of(home).public
    configs = [
        SiteConfig(
            name,
            (folder / "data" / name,),
            folder / name / "jobs" / "state",
            1,
            1 << 26,
            7,
            SecureConfig(folder / name / "keys" / "identity.pem", governance, folder / name / "guard"),
        )
        for name in NAMES
    ]
    run = home.jobs / entry.id
    queue = open_queue(home)
    queue.set_running(entry.id, 1)
    run_job(ready.job, LocalLink(configs), run, ready.cohort, lambda event: None, ready.keys)
    entry = queue.set_done(entry.id)
    key = parse_public(home.governance_pub.read_text())
    found = verify_run(run, key, lambda what, done, total: None)
    assert found.failure is None and found.is_pinned
    assert {one.name: one.status for one in found.checks}["arithmetic"] == "passed"
    assert library_main(["verify", str(run), "--governance", str(home.governance_pub)]) == 0
    page = write_report(run).read_text()
    assert "delft" in page and "aachen" in page
    sites = {one.name: one for one in site_standings(home, entry)}
    assert [sites[name].rounds for name in NAMES] == [2, 2, 2, 0]
    assert sites["delft"].role == "held out" and sites["aachen"].last_round == 2
    stands = standing(home, entry)
    assert (stands.state, stands.round, stands.rounds) == ("done", 2, 2) and stands.last_event_at
    console = Console(file=io.StringIO(), force_terminal=False, highlight=False)
    print_log(home, queue, entry, False, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "round 1/2; Dice" in text and "round 2/2; Dice" in text and f"{entry.id}: done" in text
    assert json.loads((run / "test.json").read_text())["sites"].keys() == set(NAMES)
