"""Reports, figures and progress of runs in which the server saw sums only."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedvision.errors import StorageError
from fedvision.report.figures import curves_figure, save_figures
from fedvision.report.joint import write_joint_report
from fedvision.report.outcome import results_figure
from fedvision.report.page import report_html, write_report
from fedvision.report.palette import LIGHT
from fedvision.report.progress import Progress
from fedvision.report.record import MEAN, POOLED, read_run
from fedvision.simulation.compare import finding
from fedvision.storage import append_line, read_json, read_lines
from tests.documents import HOSTILE, Document, assert_stands_alone, rows_of
from tests.fake_run import segmentation_job
from tests.secure_runs import make_disputed_run, make_run


@pytest.fixture(scope="module")
def open_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at level sum whose sites release their test results. Read only."""
    run = make_run(tmp_path_factory.mktemp("open"))
    write_report(run)
    return run


@pytest.fixture(scope="module")
def hidden_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which b and d lied and g could not train once; no site releases results. Read only."""
    run = make_disputed_run(tmp_path_factory.mktemp("hidden"), secure_aggregation__release=[])
    write_report(run)
    return run


def shown(run: Path) -> Document:
    return assert_stands_alone((run / "report.html").read_text(encoding="utf-8"))


def row(run: Path, first: str) -> list[str]:
    return next(cells for cells in rows_of((run / "report.html").read_text()) if cells[0].startswith(first))


def test_the_page_says_what_the_server_saw_and_what_not(open_test: Path) -> None:
    text = shown(open_test).text
    assert "level sum: the server learned the sum of the updates and nothing of a single one" in text
    assert "The server saw every round the sum of the updates" in text
    assert "The server did not see the update, the training loss and the number of training cases" in text
    assert "each site's own sums over its test cases" in text
    assert "in the clear" not in text
    assert "no differential privacy guarantee" in text


def test_a_run_in_the_clear_does_not_claim_more(tmp_path: Path) -> None:
    text = Document(report_html(read_run(make_run(tmp_path, aggregation__secure=False)))).text
    assert "the server sees the update of every single site" in text
    assert "The server did not see" not in text and "fedvision verify" not in text


def test_the_rounds_have_the_means_that_are_known_and_no_empty_columns(open_test: Path) -> None:
    head = row(open_test, "Round")
    assert head == ["Round", "In the sum", "Update norm", "Training loss", "Dice, mean", "All cases", "Time"]
    last = [e for e in read_lines(open_test / "rounds.jsonl") if e["event"] == "round"][-1]
    cells = row(open_test, "2")
    assert cells[1] == "all 3"
    assert cells[3] == f"{last['train_loss']:.3f}"
    assert cells[4] == f"{last['validation']['mean_site']['dice']:.3f}"
    assert cells[5] == f"{last['validation']['pooled']['dice']:.3f}"


def test_the_rules_of_the_sums_are_those_of_the_charter(open_test: Path, hidden_test: Path) -> None:
    assert row(open_test, "Sites enrolled")[1] == "3: a, b and c"
    assert row(open_test, "Smallest sum allowed")[1] == "3 sites, a waiver of the usual 5"
    assert row(open_test, "Sites that must agree")[1] == "3 of 3 to each sum"
    assert row(open_test, "Hides updates from")[1] == "the server, if no site helps it"
    assert row(open_test, "Sites expelled")[1] == "none"
    assert row(hidden_test, "Hides updates from")[1] == "the server, even if 3 sites help it"
    assert row(hidden_test, "Smallest sum made")[1] == "7 sites"
    assert row(hidden_test, "Rounds thrown away")[1] == "2"


def test_who_was_left_out_or_expelled_and_why_is_told(hidden_test: Path) -> None:
    first, second, third = (row(hidden_test, number) for number in "123")
    assert first[1] == "9 of 10" and "b expelled: its update was longer than the clip norm allows" in first[2]
    assert second[1] == "–" and "d expelled: reported another sketch than it had sent" in second[2]
    assert second[3] == "thrown away"
    assert third[1] == "7 of 10" and "expelled before: b and d" in third[2]
    assert "g left out: failed at step ready: data (its own log: scan-17.nii: cannot be read)" in third[2]
    assert "secagg/evidence/train-0002-1-site-4" in row(hidden_test, "Sites expelled")[1]
    assert read_run(hidden_test).role("b") == "expelled"


def test_results_that_no_site_releases_are_shown_over_sites_only(hidden_test: Path) -> None:
    text = shown(hidden_test).text
    test = read_json(hidden_test / "test.json")
    mean = f"{test['mean_site']['dice']:.3f}"
    assert test["sites"] == {}
    assert "Where it does worst is not known" in text
    assert f"it reaches a Dice of {mean} on average over the sites" in text
    assert row(hidden_test, "Over all sites")[:2] == ["Over all sites", "Dice"]
    assert row(hidden_test, "Mean of sites")[1] == mean
    assert "test results, as a mean over sites" in text
    assert "Role" not in text
    figure = results_figure(read_run(hidden_test), LIGHT)
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [MEAN, POOLED]


def test_at_level_sketch_the_page_says_what_a_sketch_gives_away(hidden_test: Path) -> None:
    text = shown(hidden_test).text
    assert "2,048 random sums of its coordinates" in text
    assert "that length is its weight, so the number of training cases" in text
    assert "the number of training cases of a single site" not in text


def test_the_curves_show_what_is_known_and_the_sites_own_losses(open_test: Path) -> None:
    record = read_run(open_test)
    figure = curves_figure(record, LIGHT)
    assert figure is not None
    left, right = ({line.get_label(): list(line.get_ydata()) for line in a.get_lines()} for a in figure.axes)
    assert left["mean of sites"] == [record.validation(n)[0] for n in (1, 2)]
    assert left["all cases pooled"] == [record.pooled(n) for n in (1, 2)]
    assert right["mean of sites"] == [record.rounds[n]["train_loss"] for n in (1, 2)]
    own = [entry["train_loss"] for entry in read_lines(open_test / "sites" / "b" / "log.jsonl")]
    assert right["b"] == own
    assert "come from their own records" in shown(open_test).text


def test_without_the_sites_folders_the_curves_show_the_means_alone(open_test: Path, tmp_path: Path) -> None:
    import shutil

    run = Path(shutil.copytree(open_test, tmp_path / "run", ignore=shutil.ignore_patterns("sites", "guards")))
    figure = curves_figure(read_run(run), LIGHT)
    assert figure is not None
    assert [line.get_label() for line in figure.axes[1].get_lines()] == ["mean of sites"]
    text = assert_stands_alone(report_html(read_run(run))).text
    assert "own records" not in text and "one program makes all keys" not in text


def test_every_figure_is_drawn(open_test: Path, hidden_test: Path) -> None:
    assert set(save_figures(open_test)) == {"curves", "results", "clipping"}
    assert set(save_figures(hidden_test)) == {"curves", "results", "clipping"}


def test_a_page_over_several_runs_takes_them_too(open_test: Path, hidden_test: Path, tmp_path: Path) -> None:
    path = write_joint_report("two", [open_test, hidden_test], tmp_path)
    assert "Where it does worst is not known" in Document(path.read_text()).text


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def test_a_run_under_way_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "judged" and event["round"] == 2:
            raise Killed

    with pytest.raises(Killed):
        make_run(tmp_path, observe=kill)
    text = assert_stands_alone(report_html(read_run(tmp_path / "run"))).text
    assert "1 of 2 rounds are done" in text
    assert "hidden sums of all sites only" in text
    assert "2 – not finished" in text


def test_a_damaged_transcript_is_an_error_that_names_the_file(open_test: Path, tmp_path: Path) -> None:
    import shutil

    run = Path(shutil.copytree(open_test, tmp_path / "run"))
    path = run / "secagg" / "transcripts" / "train-0002"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="train-0002 is damaged"):
        read_run(run)


def test_hostile_reasons_stay_text(open_test: Path, tmp_path: Path) -> None:
    import shutil

    run = Path(shutil.copytree(open_test, tmp_path / "run"))
    for event in (
        {"event": "secure", "round": 3, "step": HOSTILE, "site": "a", "status": "failed", "reason": HOSTILE},
        {"event": "attempt", "round": 3, "purpose": "train", "attempt": 1, "reason": HOSTILE},
        {"event": "expelled", "round": 3, "site": "b", "rule": HOSTILE, "evidence": HOSTILE},
        {"event": "thrown away", "round": 3, "reason": HOSTILE},
    ):
        append_line(run / "rounds.jsonl", event)
    assert assert_stands_alone(report_html(read_run(run))).text.count(HOSTILE) >= 6


def test_a_comparison_without_results_by_site_still_finds() -> None:
    def contender(kind: str, mean: float, test: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"kind": kind, "mean_site": mean, "test": test, "mean_other_sites": None, "site": None} | more

    seen = {"a": {"value": 0.7}, "b": {"value": 0.5}}
    table = [
        contender("federated", 0.8, {}),
        contender("pooled", 0.82, seen),
        contender("pooled", 0.9, seen),
        contender("local", 0.6, seen, mean_other_sites=0.5, site="a"),
    ]
    text = finding(table, "dice")
    assert "federated dice 0.800 on the mean site" in text
    assert text.endswith(
        "best local model (a) 0.500 on the other sites; no site released the federated one's"
    )


SITES = ["a", "b", "c"]


def watched(events: list[dict[str, Any]], is_terminal: bool = True) -> str:
    """Return what a display of these events leaves on the screen."""
    file = io.StringIO()
    job = segmentation_job()
    secure = job.aggregation.model_copy(update={"secure": True})
    console = (
        Console(file=file, width=120, force_terminal=True, color_system=None, _environ={})
        if is_terminal
        else Console(file=file, width=60)
    )
    with Progress(job.model_copy(update={"aggregation": secure}), 3, console) as progress:
        for event in events:
            progress.observe(event)
    return re.sub(r"\x1b\[\?25[hl]", "", file.getvalue().split("\x1b[2K")[-1]).rstrip()


def trained(*sites: str) -> list[dict[str, Any]]:
    start: dict[str, Any] = {"event": "start", "round": 1, "sites": SITES}
    return [start, *({"event": "train", "round": 1, "site": s, "status": "accepted"} for s in sites)]


def judged(*sites: str, split: str = "val") -> list[dict[str, Any]]:
    return [{"event": "judged", "round": 1, "site": site, "split": split} for site in sites]


def test_a_site_whose_numbers_are_hidden_is_shown_without_dashes() -> None:
    screen = watched(trained("a", "b"))
    assert "2 of 3 trained, 1 waiting" in screen
    assert "loss" not in screen and "–" not in screen
    assert "adding up" not in screen


def test_while_masked_inputs_are_added_up_the_display_says_so() -> None:
    assert "adding up the masked updates, then validation: " in watched(trained(*SITES))
    assert "adding up" not in watched([*trained(*SITES), *judged("a")])
    assert "adding up the masked results: " in watched([*trained(*SITES), *judged(*SITES)])


def test_what_goes_wrong_in_a_sum_is_shown() -> None:
    failed = {
        "event": "secure",
        "round": 1,
        "step": "ready",
        "site": "c",
        "status": "failed",
        "reason": "data",
    }
    screen = watched([*trained("a", "b"), failed])
    assert "c failed at step ready: data" in screen and "failed: data" in screen
    attempt = {"event": "attempt", "round": 1, "attempt": 2, "reason": "2 sites are ready"}
    assert "attempt 2 given up: 2 sites are ready" in watched([*trained(*SITES), attempt])
    refused = {"event": "validate", "round": 1, "site": "b", "status": "refused", "reason": "no masked input"}
    assert "b is not in the sum of the results: no masked input" in watched([*trained(*SITES), refused])
    lost = {"event": "evaluate failed", "round": 1, "split": "val", "reason": "a limb out of range"}
    assert "the model could not be judged: a limb out of range" in watched([*trained(*SITES), lost])


def test_a_thrown_away_round_is_a_line_and_an_expelled_site_is_named() -> None:
    expelled = {"event": "expelled", "round": 1, "site": "b", "rule": "norm", "evidence": "x"}
    thrown = {"event": "thrown away", "round": 1, "reason": "the sum does not fit"}
    assert watched([*trained(*SITES), expelled, thrown], is_terminal=False) == (
        "round 1/8; thrown away; the sum does not fit"
    )
    done = {"event": "round", "round": 1, "num_sites": 2, "validation": None, "seconds": 3.0}
    line = watched([*trained(*SITES), expelled, done], is_terminal=False)
    assert line == "round 1/8; 2 of 3 sites; b expelled: rule norm; 3.0 s"


def test_the_hidden_final_test_is_counted() -> None:
    assert "final test: 3 sites judged" in watched([*trained(*SITES), *judged(*SITES, split="test")])
