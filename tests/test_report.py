import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvision.errors import ConfigError, StorageError
from fedvision.report.markup import Markup, page, tag
from fedvision.report.notation import aligned_texts, duration_text, interval_text, metric_label, metric_text
from fedvision.report.page import report_html, verdict, write_report
from fedvision.report.record import read_run
from fedvision.report.rounds import rounds_table
from fedvision.report.sections import clipping_words, results_table
from fedvision.storage import append_line, read_json, write_atomic, write_json
from tests.documents import HOSTILE, Document, assert_stands_alone, rows_of
from tests.fake_run import detection_job, segmentation_job, write_run


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a segmentation with its report. Read only."""
    run = write_run(tmp_path_factory.mktemp("home") / "my-run", segmentation_job())
    write_report(run)
    return run


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a detection with its report. Read only."""
    run = write_run(tmp_path_factory.mktemp("home") / "my-run", detection_job())
    write_report(run)
    return run


def read_report(run: Path) -> str:
    """Return the report that stands in a run folder."""
    return (run / "report.html").read_text(encoding="utf-8")


def test_the_report_of_a_segmentation_stands_alone_and_says_how_well_it_went(segmentation: Path) -> None:
    document = assert_stands_alone(read_report(segmentation))
    test = read_json(segmentation / "test.json")
    mean, worst = test["mean_site"]["dice"], test["worst_site"]
    assert "4 sites trained one UNet over 8 rounds to segment nucleus in 2D images" in document.text
    assert f"it reaches a Dice of {mean:.3f} on average over the sites" in document.text
    assert f"It does worst at {worst['site']} , with {worst['metrics']['dice']:.3f}" in document.text
    assert "At essen, which took no part in training, it reaches" in document.text
    assert "The job switches secure aggregation off" in document.text
    assert "the server sees the update of every single site" in document.text
    assert (segmentation / "figures" / "curves.png").exists()


def test_the_report_has_every_figure_for_light_and_dark_pages(detection: Path) -> None:
    document = Document(read_report(detection))
    dark = document.named("source")
    assert len(dark) == 4
    assert {source["media"] for source in dark} == {"screen and (prefers-color-scheme: dark)"}
    assert len({str(source["srcset"]) for source in dark}) == 4


def test_a_row_has_the_numbers_of_its_site(segmentation: Path) -> None:
    found = next(row for row in rows_of(read_report(segmentation)) if row[0] == "bergen")
    result = read_json(segmentation / "test.json")["sites"]["bergen"]
    metrics, (low, high) = result["metrics"], result["intervals"]["dice"]
    assert found == [
        "bergen",
        "trained",
        "19",
        "17",
        f"{metrics['dice']:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{metrics['hd95_mm']:.2f}",
        f"{metrics['asd_mm']:.2f}",
        f"{metrics['voxel_dice/nucleus']:.3f}",
        f"{metrics['missed/nucleus']:.3f}",
    ]


def test_classes_have_tables_of_their_own_and_an_absent_class_is_a_dash(detection: Path) -> None:
    html = read_report(detection)
    assert "Results by class" in Document(html).text
    rows = rows_of(html)
    head = rows.index(["Site", "red cell", "white cell", "platelet"])
    assert rows[head + 2][0] == "bergen"
    assert rows[head + 2][3] == "–"


def test_the_report_of_a_detection_has_sensitivities_at_fixed_false_positives(detection: Path) -> None:
    rows = rows_of(read_report(detection))
    head = rows.index(["Site", "1/8 FP", "1/4 FP", "1/2 FP", "1 FP", "2 FP", "4 FP", "8 FP"])
    metrics = read_json(detection / "test.json")["sites"]["amsterdam"]["metrics"]
    assert rows[head + 1][0] == "amsterdam"
    assert rows[head + 1][1] == f"{metrics['sensitivity@0.125fp']:.3f}"
    assert rows[head + 1][7] == f"{metrics['sensitivity@8fp']:.3f}"


def test_a_refused_update_is_told_with_its_reason_and_the_words_of_the_site(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmentation_job(), reason="the norm is 12, more than 10")
    line = {"event": "train", "round": 5, "site": "bergen", "status": "failed", "reason": "data"}
    append_line(run / "rounds.jsonl", line)
    append_line(
        run / "rounds.jsonl",
        {"event": "evaluate failed", "round": 6, "site": "coimbra", "split": "val", "reason": "internal"},
    )
    log = run / "sites" / "bergen" / "log.jsonl"
    log.write_text("".join(kept for kept in log.read_text().splitlines(True) if '"round": 5' not in kept))
    append_line(log, {"round": 5, "refused": "scan.nii: no such file", "hint": "h"})
    text = Document(rounds_table(read_run(run))).text
    assert "coimbra refused: the norm is 12, more than 10" in text
    assert "3 of 4: amsterdam, bergen and dresden" in text
    assert "bergen failed: data (its own log: scan.nii: no such file)" in text
    assert "coimbra could not be judged: internal" in text


def test_a_round_that_a_site_trained_after_a_failure_shows_no_failure(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmentation_job(rounds=2))
    log = run / "sites" / "bergen" / "log.jsonl"
    whole = log.read_text()
    log.write_text('{"round": 2, "refused": "out of memory"}\n' + whole)
    assert read_run(run).refusals["bergen"] == {}
    assert set(read_run(run).clipping["bergen"]) == {1, 2}


def test_what_clipping_did_is_said_in_words(segmentation: Path, tmp_path: Path) -> None:
    text = clipping_words(read_run(segmentation))
    assert "8 of 32 updates were larger than the clip norm of 10 and were scaled down to it" in text
    assert "The hardest cut kept 50 %: dresden, round 1. In the second half of the run nothing was" in text
    short = read_run(write_run(tmp_path, segmentation_job(rounds=2)))
    assert "Updates were still clipped in the second half of the run" in clipping_words(short)
    for log in short.clipping.values():
        for entry in log.values():
            entry["share_kept"] = 1.0
    assert "None of the 8 updates was larger than the clip norm of 10" in clipping_words(short)


def test_a_run_under_way_says_what_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmentation_job(), finished_rounds=2, tested=False)
    line = {"event": "train", "round": 3, "site": "bergen", "status": "accepted", "train_loss": 0.4}
    append_line(run / "rounds.jsonl", line)
    document = assert_stands_alone(report_html(read_run(run)))
    assert (
        "This run is not finished: 2 of 8 rounds are done, and the final test has not been made."
        in document.text
    )
    assert "On validation cases the best model so far, of round 2, reaches a mean Dice of" in document.text
    assert "3 all 1 not finished" in document.text


@pytest.mark.parametrize("absent", [("environment.json", "rounds.jsonl"), ("model.safetensors", "sites")])
def test_a_missing_file_leaves_a_gap_and_not_an_error(tmp_path: Path, absent: tuple[str, ...]) -> None:
    run = write_run(tmp_path / "run", segmentation_job(rounds=2))
    for name in absent:
        (run / name).rename(tmp_path / name)
    assert_stands_alone(report_html(read_run(run)))


def test_a_run_without_a_round_has_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmentation_job(), finished_rounds=0)
    assert "No site has trained yet." in Document(write_report(run).read_text(encoding="utf-8")).text


def test_a_test_without_summaries_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmentation_job(rounds=2))
    write_json(run / "test.json", {"round": 2, "headline": "dice", "sites": {}})
    assert "The final test has no result" in Document(report_html(read_run(run))).text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"job\.toml"):
        write_report(tmp_path)


def test_a_damaged_record_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmentation_job(rounds=2))
    (run / "test.json").write_text("{")
    with pytest.raises(StorageError, match=r"test\.json"):
        write_report(run)


def test_hostile_names_and_reasons_stay_text(tmp_path: Path) -> None:
    sites = ("amsterdam", HOSTILE, "</td></table><script>alert(2)</script>", "&lt;b&gt;")
    reason = "</details><script>alert(3)</script>"
    run = write_run(tmp_path, segmentation_job(rounds=3), sites, ("<svg/onload=alert(4)>",), reason=reason)
    write_json(
        run / "environment.json", {"machine": "<script>alert(5)</script>", "versions": {"<b>": HOSTILE}}
    )
    document = assert_stands_alone(report_html(read_run(run)))
    for text in (*sites, reason, "<svg/onload=alert(4)>", "<script>alert(5)</script>", "<b>"):
        assert text in document.text


def test_the_pictures_of_all_sites_are_inside_and_the_worst_site_is_unfolded(segmentation: Path) -> None:
    html = read_report(segmentation)
    document = Document(html)
    alts = [str(image["alt"]) for image in document.named("img")]
    pictures = [alt for alt in alts if " test case of " in alt]
    assert len(pictures) == 15
    assert pictures[:3] == [f"{rank} test case of amsterdam" for rank in ("worst", "median", "best")]
    unfolded = re.findall(r'<details open="">.*?</details>', html)
    assert len(unfolded) == 1
    assert "worst test case of dresden" in unfolded[0]


def test_of_many_sites_the_worst_are_shown_and_long_tables_are_folded(tmp_path: Path) -> None:
    sites = tuple(f"site-{number:02d}" for number in range(30))
    run = write_run(tmp_path, segmentation_job(rounds=30), sites, ())
    picture = (run / "sites" / "site-00" / "examples" / "worst.png").read_bytes()
    for site in sites[12:]:
        write_atomic(run / "sites" / site / "examples" / "worst.png", picture)
    document = Document(report_html(read_run(run)))
    values = {site: r["metrics"]["dice"] for site, r in read_json(run / "test.json")["sites"].items()}
    alts = [str(image["alt"]) for image in document.named("img")]
    shown = {alt.split()[-1] for alt in alts if " test case of " in alt}
    assert shown == set(sorted(values, key=values.__getitem__)[:8])
    assert "of the 8 worst of 30 sites" in document.text
    assert "Table of all 30 sites" in document.text
    assert "Table of all 30 rounds" in document.text


def test_the_report_does_not_tell_where_the_data_lies(segmentation: Path) -> None:
    html = read_report(segmentation)
    assert "/srv/private" not in html
    assert str(segmentation.parent) not in html
    assert "fedvision simulate my-run/job.toml --out again" in Document(html).text


def test_a_run_of_one_site_alone_says_who_trained(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmentation_job(), held_out=())
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    kept = [r for r in records if r["event"] != "train" or r["site"] == "bergen"]
    (run / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    record = read_run(run)
    assert "1 site trained one UNet" in verdict(record)
    assert {row[0]: row[1] for row in rows_of(results_table(record)) if row[1]} == {
        "Site": "Role",
        "bergen": "trained",
        "amsterdam": "tested only",
        "coimbra": "tested only",
        "dresdenworst": "tested only",
    }


def test_a_report_is_the_same_each_time(detection: Path) -> None:
    assert report_html(read_run(detection)) == read_report(detection)


@given(st.text("ab<>&;\"' \n") | st.text(), st.text("ab<>&;\"' \n") | st.text())
def test_text_comes_back_from_markup_as_it_went_in(content: str, attribute: str) -> None:
    html = tag("p", content, title=attribute)
    document = Document(html)
    assert document.named("p") == [{"title": attribute}]
    assert "".join(document.words).replace("\r\n", "\n").replace("\r", "\n") == content.replace(
        "\r\n", "\n"
    ).replace("\r", "\n")


def test_markup_goes_in_as_it_is() -> None:
    assert tag("p", Markup("<b>x</b>"), "<b>") == "<p><b>x</b>&lt;b&gt;</p>"
    assert_stands_alone(page("a & b", tag("p", "x")))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (273600, "3 d 04 h"),
        (None, "–"),
        (float("nan"), "–"),
        (-1, "–"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: object, text: str) -> None:
    assert duration_text(seconds) == text


def test_metrics_have_their_names_and_digits() -> None:
    assert metric_label("hd95_mm/left lung") == "HD95 (mm), left lung"
    assert metric_label("sensitivity@0.125fp") == "Sensitivity at 1/8 FP/image"
    assert metric_label("my_own") == "my_own"
    assert metric_text(0.87654, "dice") == "0.877"
    assert metric_text(2.345, "hd95_mm/x") == "2.35"
    assert metric_text(None, "dice") == metric_text(float("nan"), "dice") == metric_text(True, "dice") == "–"
    assert interval_text([0.1, 0.25], "dice") == "0.100 to 0.250"
    assert interval_text([0.1, None], "dice") == interval_text(None, "dice") == ""
    assert aligned_texts([12.5, 0.913, None]) == ["12.50", "0.91", "–"]
    assert aligned_texts([0.0, None]) == ["0", "–"]
