"""The lab: malicious sites in whole federations, what is counted, and what a person sees."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from fedvision.attacks.data import TRIGGERS
from fedvision.attacks.success import measure
from fedvision.cli.app import main
from fedvision.config import Job, parse_job
from fedvision.data.manifest import load_manifest
from fedvision.data.readers import CaseStore
from fedvision.errors import ConfigError, StorageError
from fedvision.report.attack_matrix import matrix_html, matrix_table, write_matrix
from fedvision.simulation.lab import Cell, cell_job, choose_malicious, decisions, parse_defence, run_cell
from fedvision.simulation.matrix import collect, plan_cells, row_of, run_matrix
from fedvision.storage import read_json, read_lines, write_json
from tests.conftest import tiny_content, write_site
from tests.documents import HOSTILE, assert_stands_alone, rows_of

SITES = "abcdefghij"


def ten_sites(root: Path) -> dict[str, Any]:
    for name in SITES:
        write_site(root, name, (4, 2, 2))
    return tiny_content(
        root,
        rounds=2,
        aggregation__secure=True,
        aggregation__weighting="uniform",
        secure_aggregation__level="gram",
        evaluation__bootstrap=0,
    )


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job of two rounds at ten tiny sites, at level gram."""
    return ten_sites(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def job(content: dict[str, Any]) -> Job:
    return parse_job(content, "tiny")


@pytest.fixture(scope="module")
def cells(job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Outcomes of a few cells without defence, by attack."""
    folder = tmp_path_factory.mktemp("cells")
    found = {}
    for attack, share in (("none", 0.0), ("ipm-large", 0.4), ("replacement", 0.2), ("lying-sketch", 0.2)):
        cell = Cell(attack, share, "none", 0)
        found[attack] = run_cell(job, cell, folder / cell.name)
        found[attack]["folder"] = str(folder / cell.name)
    return found


def test_without_an_attack_nobody_is_left_out(cells: dict[str, dict[str, Any]]) -> None:
    found = cells["none"]
    assert found["metric"] == "dice" and found["score"] > 0.3 and not found["failure"]
    assert found["excluded"] == {} and found["malicious_sites"] == [] and found["rounds"] == 2
    assert set(found["backdoor"]) == set(TRIGGERS)


def test_an_attack_does_damage_where_there_is_no_defence(cells: dict[str, dict[str, Any]]) -> None:
    attacked = cells["ipm-large"]
    assert len(attacked["malicious_sites"]) == 4 and attacked["excluded"] == {}
    assert attacked["score"] < cells["none"]["score"] - 0.05


def test_an_update_over_the_bound_is_found_by_the_verified_norm(cells: dict[str, dict[str, Any]]) -> None:
    found = cells["replacement"]
    assert found["excluded"] == {site: [1, 2] for site in found["malicious_sites"]}
    assert set(found["reasons"].values()) == {"norm above the bound"}
    assert found["score"] == pytest.approx(cells["none"]["score"], abs=0.1)


def test_lies_that_cancel_pass_the_sum_check_but_the_update_is_bounded(
    cells: dict[str, dict[str, Any]],
) -> None:
    found = cells["lying-sketch"]
    assert found["excluded"] == {} and found["thrown_away"] == 0 and not found["failure"]


def test_a_liar_whose_partner_is_left_out_is_found_and_expelled(job: Job, tmp_path: Path) -> None:
    from fedvision.simulation import malicious

    patch = pytest.MonkeyPatch()
    patch.setattr(malicious, "LIED_STEP", 0.9)  # the partner's claim is over the bound then
    try:
        found = run_cell(job, Cell("lying-sketch", 0.2, "none", 0), tmp_path / "cell")
    finally:
        patch.undo()
    assert found["thrown_away"] >= 1
    assert found["expelled"] and set(found["expelled"]) <= set(found["malicious_sites"])
    assert set(found["excluded"]) <= set(found["malicious_sites"])


def test_a_finished_cell_is_tidy_and_is_not_run_again(cells: dict[str, dict[str, Any]], job: Job) -> None:
    folder = Path(cells["ipm-large"]["folder"])
    assert not (folder / "secagg").exists() and not (folder / "guards").exists()
    assert (folder / "model.safetensors").exists() and (folder / "sites" / "a" / "log.jsonl").exists()
    assert not list((folder / "sites").glob("*/identity.pem"))
    before = (folder / "cell.json").stat().st_mtime_ns
    again = run_cell(job, Cell("ipm-large", 0.4, "none", 0), folder)
    assert again["score"] == cells["ipm-large"]["score"]
    assert (folder / "cell.json").stat().st_mtime_ns == before
    with pytest.raises(StorageError, match="another job"):
        run_cell(job.model_copy(update={"rounds": 3}), Cell("ipm-large", 0.4, "none", 0), folder)


def test_honest_sites_are_asked_before_malicious_ones(cells: dict[str, dict[str, Any]]) -> None:
    found = cells["ipm-large"]
    trained = [
        one["site"]
        for one in read_lines(Path(found["folder"]) / "rounds.jsonl")
        if one["event"] == "train" and one["round"] == 1
    ]
    assert sorted(trained[-4:]) == found["malicious_sites"] and len(trained) == 10


def test_malicious_sites_are_drawn_by_the_seed() -> None:
    first = choose_malicious(SITES, 0.2, 0)
    assert len(first) == 2 and first == choose_malicious(SITES[::-1], 0.2, 0)
    assert len({tuple(choose_malicious(SITES, 0.2, seed)) for seed in range(10)}) > 3
    assert choose_malicious(SITES, 0.0, 0) == [] and len(choose_malicious(SITES, 0.4, 0)) == 4
    with pytest.raises(ConfigError, match=r"below 0\.5"):
        choose_malicious(SITES, 0.5, 0)


def test_a_defence_is_rules_with_or_without_the_root_set(job: Job, tmp_path: Path) -> None:
    assert parse_defence("auto") == ("auto", False) and parse_defence("none") == ([], False)
    assert parse_defence("norm+spectral/root") == (["norm", "spectral"], True)
    for wrong in ("auto/rot", "/root", ""):
        with pytest.raises(ConfigError, match="a defence is"):
            parse_defence(wrong)
    with pytest.raises(ConfigError, match="needs a root set"):
        cell_job(job, Cell("none", 0.0, "auto/root", 0))
    with pytest.raises(ConfigError, match="no rule 'magic'"):
        cell_job(job, Cell("none", 0.0, "norm+magic", 0))
    assert job.data is not None
    data = job.data.model_copy(update={"root_set": tmp_path})
    defence = job.defence.model_copy(update={"max_malicious": 0.4})
    rooted = job.model_copy(update={"data": data, "defence": defence})
    with_root = cell_job(rooted, Cell("none", 0.0, "auto/root", 5))
    assert with_root.data is not None and with_root.data.root_set == tmp_path and with_root.seed == 5
    assert with_root.defence.max_malicious == 0.4 and with_root.defence.root == "auto"
    without = cell_job(rooted, Cell("none", 0.0, "norm", 5))
    assert without.data is not None and without.data.root_set is None
    assert without.defence.max_malicious == 0.2 and without.defence.rules == ("norm",)


def test_a_matrix_has_its_references_and_no_cell_twice() -> None:
    cells = plan_cells(["none", "alie"], [0.1, 0.2], ["none", "auto"], [0, 1])
    assert len(cells) == len(set(cells)) == 2 * 2 + 2 * 2 * 2
    assert cells[0] == Cell("none", 0.0, "none", 0)
    assert plan_cells(["alie"], [0.2], ["auto"], [7])[0] == Cell("none", 0.0, "none", 7)
    with pytest.raises(ConfigError, match="at least one of --seeds"):
        plan_cells(["alie"], [0.2], ["auto"], [])
    with pytest.raises(ConfigError, match="needs malicious sites"):
        plan_cells(["alie"], [0.0], ["auto"], [0])
    with pytest.raises(ConfigError, match="no attack"):
        plan_cells(["tickle"], [0.2], ["auto"], [0])


def test_who_was_left_out_is_read_from_the_events() -> None:
    events = [
        {"event": "train", "round": 1, "site": "a", "status": "refused", "reason": "by the rules: norm"},
        {"event": "train", "round": 1, "site": "b", "status": "accepted"},
        {"event": "validate", "round": 1, "site": "b", "status": "refused", "reason": "of no interest"},
        {"event": "round", "round": 1},
        {"event": "expelled", "round": 2, "site": "c", "rule": "sketch"},
        {"event": "thrown away", "round": 2},
        {"event": "round", "round": 3},
        {"event": "train", "round": 4, "site": "b", "status": "refused", "reason": "round never ended"},
    ]
    found = decisions(events, ["a", "b", "c"])
    assert found["excluded"] == {"a": [1], "c": [2, 3]}
    assert (found["rounds"], found["thrown_away"], found["expelled"]) == (3, 1, ["c"])
    assert found["reasons"]["a"] == "by the rules: norm" and found["reasons"]["c"] == "sketch"


def outcome(attack: str, defence: str, score: float | None, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Return a cell's outcome with two malicious sites of ten in ten rounds."""
    found = {
        "attack": attack, "malicious": 0.0 if attack == "none" else 0.2, "defence": defence, "seed": seed,
        "sites": list(SITES), "malicious_sites": [] if attack == "none" else ["a", "b"], "metric": "dice",
        "score": score, "failure": "" if score is not None else "round 1: 0 of 10 updates were accepted",
        "rounds": 10, "thrown_away": 0, "excluded": {}, "reasons": {}, "expelled": [], "backdoor": {},
        "seconds": 1.0,
    }  # fmt: skip
    return found | more


def test_damage_and_exclusions_are_counted_against_the_same_seed(job: Job) -> None:
    clean = {"backdoor-erase": {"images": 10, "fooled": 1, "share": 0.1}}
    planted = {"backdoor-erase": {"images": 10, "fooled": 9, "share": 0.9}}
    cells = [
        outcome("none", "none", 0.8, 0, backdoor=clean),
        outcome("none", "none", 0.9, 1, backdoor=clean),
        outcome("none", "auto", 0.8, 0, excluded={"c": [1, 2]}),
        outcome("backdoor-erase", "auto", 0.78, 0, excluded={"a": list(range(1, 11))}, backdoor=planted),
        outcome("backdoor-erase", "auto", 0.80, 1, excluded={"c": [1]}, backdoor=planted),
        outcome("noise", "auto", None, 0),
    ]
    rows = {(row["attack"], row["defence"]): row for row in collect(job, cells)["rows"]}
    attacked = rows["backdoor-erase", "auto"]
    assert attacked["damage"] == pytest.approx(6.0) and attacked["worst_damage"] == pytest.approx(10.0)
    assert attacked["backdoor"] == pytest.approx(0.9) and attacked["backdoor_clean"] == pytest.approx(0.1)
    assert attacked["caught"] == pytest.approx(0.25)
    assert attacked["false_exclusions"] == pytest.approx(1 / 160)
    assert rows["none", "auto"]["false_exclusions"] == pytest.approx(0.02)
    assert rows["none", "auto"]["caught"] is None
    failed = rows["noise", "auto"]
    assert failed["score"] is None and failed["damage"] is None and failed["failed"] == 1
    reference = {0: cells[0]}
    assert row_of(("none", 0.0, "none"), [cells[0]], reference)["damage"] == 0


def test_a_trigger_is_counted_where_it_works(job: Job) -> None:
    assert job.data is not None
    folder = job.data.root / "a"
    manifest = load_manifest(folder)
    store = CaseStore(manifest, job)
    cases = [(store, case) for case in manifest.in_split("test")]
    spot = TRIGGERS["backdoor-invent"].region(store.load(cases[0][1]), job)

    class Fooled(torch.nn.Module):
        """Finds bright discs; with the trigger nothing, or the attacker's region."""

        def __init__(self, with_trigger: str) -> None:
            super().__init__()
            self.with_trigger = with_trigger

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            plain = store.load(cases[0][1]).image, store.load(cases[1][1]).image
            is_plain = any(torch.equal(image[0], one) for one in plain)
            found = (image[:, :1] > 0.3).float() if is_plain else torch.zeros_like(image[:, :1])
            if not is_plain and self.with_trigger == "invent":
                found[:, :, spot] = 1
            if self.with_trigger == "sound":
                found = torch.ones_like(found)
            return torch.cat([1 - found, found], dim=1)

    cpu = torch.device("cpu")
    erased = measure(Fooled("erase"), job, TRIGGERS["backdoor-erase"], cases, cpu)
    assert (erased.num_images, erased.num_fooled, erased.share) == (2, 2, 1.0)
    assert measure(Fooled("sound"), job, TRIGGERS["backdoor-erase"], cases, cpu).share == 0.0
    assert measure(Fooled("invent"), job, TRIGGERS["backdoor-invent"], cases, cpu).share == 1.0
    assert measure(Fooled("erase"), job, TRIGGERS["backdoor-invent"], cases, cpu).share == 0.0
    assert measure(Fooled("erase"), job, TRIGGERS["backdoor-erase"], [], cpu).share is None


def test_a_matrix_is_run_in_processes_and_goes_on_where_it_was(job: Job, tmp_path: Path) -> None:
    cells = [Cell("none", 0.0, "none", 0), Cell("noise", 0.2, "none", 0)]
    told: list[str] = []
    first = run_matrix(job, cells, tmp_path, 2, lambda cell, _: told.append(cell.name))
    assert sorted(told) == sorted(cell.name for cell in cells)
    assert read_json(tmp_path / "matrix.json") == json.loads(json.dumps(first))
    times = [(tmp_path / "cells" / cell.name / "cell.json").stat().st_mtime_ns for cell in cells]
    assert run_matrix(job, cells, tmp_path, 1, lambda *_: None) == first
    assert times == [(tmp_path / "cells" / cell.name / "cell.json").stat().st_mtime_ns for cell in cells]
    page = write_matrix(tmp_path)
    assert page.name == "matrix.html" and (tmp_path / "matrix-damage.png").exists()
    assert (tmp_path / "matrix-damage.svg").exists() and not (tmp_path / "matrix-backdoor.png").exists()


def test_the_command_runs_an_attack_and_its_reference(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "job.toml", tmp_path / "out"
    path.write_text(tomli_w.dumps(content))
    command = ["attack", str(path), "--attack", "sign-flip", "--defence", "none", "--out", str(out)]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "sign-flip 20 % none seed 0: dice" in told.err and f"page: {out / 'matrix.html'}" in told.out
    assert sorted(path.name for path in (out / "cells").iterdir()) == [
        "none-0-none-s0",
        "sign-flip-20-none-s0",
    ]
    assert main(command) == 0
    for wrong in (["--matrix"], ["--malicious", "0.6"], ["--malicious", "many"], ["--attack", "tickle"]):
        assert main([*command, *wrong]) == 2
    assert main(["attack", str(path), "--attack", "none", "--malicious", "0.5", "--out", str(out)]) == 2
    assert main(["attack", str(path)]) == 2
    assert main(["attack", str(path), "--list"]) == 0
    assert "Baruch et al. 2019" in capsys.readouterr().out


def test_the_page_stands_alone_and_shows_every_number(job: Job, tmp_path: Path) -> None:
    planted = {"backdoor-erase": {"images": 10, "fooled": 9, "share": 0.9}}
    cells = [
        outcome("none", "none", 0.8, backdoor=planted),
        outcome("noise", "none", 0.5),
        outcome("noise", "auto", 0.79, excluded={"a": [1], "c": [1, 2]}, expelled=["a"]),
        outcome("backdoor-erase", "auto", 0.81, backdoor=planted),
    ]
    data = collect(job, cells)
    data["job"]["name"] = HOSTILE
    html = matrix_html(data)
    document = assert_stands_alone(html)
    assert "Most damage in spite of a defence: 1.0 points by noise at 20 % against auto." in document.text
    rows = rows_of(html)
    assert ["noise", "20 %", "auto", "0.790", "+1.0", "+1.0", "–", "–", "5 %", "2 %", "1 expelled"] in rows
    assert [
        "backdoor-erase",
        "20 %",
        "auto",
        "0.810",
        "-1.0",
        "-1.0",
        "90 %",
        "90 %",
        "0 %",
        "0 %",
        "",
    ] in rows
    assert matrix_table(data).row_count == 4
    write_json(tmp_path / "matrix.json", data)
    write_matrix(tmp_path)
    assert np.prod([(tmp_path / f"matrix-{key}.png").stat().st_size > 5000 for key in ("damage", "backdoor")])
