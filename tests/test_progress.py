import io
import re
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedvision.report.progress import Progress, printable, sparkline
from tests.fake_run import detection_job, segmentation_job

SITES = ["a", "b", "c"]


def _start(number: int, sites: list[str] = SITES) -> dict[str, Any]:
    return {"event": "start", "round": number, "sites": sites}


def _train(number: int, site: str, reason: str = "") -> dict[str, Any]:
    event = {"event": "train", "round": number, "site": site, "status": "refused" if reason else "accepted"}
    return event | ({"reason": reason} if reason else {"train_loss": 0.5, "seconds": 3.0, "num_steps": 5})


def _validate(number: int, site: str, value: float | None, metric: str = "dice") -> dict[str, Any]:
    return {"event": "validate", "round": number, "site": site, "num_cases": 2, "metrics": {metric: value}}


def _round(number: int, mean: float | None, is_best: bool = True, metric: str = "dice") -> dict[str, Any]:
    validation = None
    if mean is not None:
        worst = {"site": "b", "metrics": {metric: mean - 0.1}}
        validation = {"mean_site": {metric: mean}, "worst_site": worst, "pooled": {metric: mean}}
    return {
        "event": "round",
        "round": number,
        "num_sites": 3,
        "update_norm": 1.0,
        "validation": validation,
        "is_best": is_best,
        "seconds": 30.0,
    }


def _whole_round(number: int, mean: float) -> list[dict[str, Any]]:
    trained = [_train(number, site) for site in SITES]
    judged = [_validate(number, site, mean) for site in SITES]
    return [_start(number), *trained, *judged, _round(number, mean)]


def _plain(events: list[dict[str, Any]], **settings: Any) -> str:
    file = io.StringIO()
    with Progress(segmentation_job(), 3, Console(file=file, width=60), **settings) as progress:
        for event in events:
            progress.observe(event)
    return file.getvalue()


def _terminal(
    events: list[dict[str, Any]], num_sites: int = 3, start_round: int = 0, width: int = 120
) -> str:
    """Return the last state that is left on the screen, without the codes that draw it."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None, _environ={})
    with Progress(segmentation_job(), num_sites, console, start_round) as progress:
        for event in events:
            progress.observe(event)
    return re.sub(r"\x1b\[\?25[hl]", "", file.getvalue().split("\x1b[2K")[-1]).rstrip()


def test_without_a_terminal_there_is_one_plain_line_a_round_and_nothing_else() -> None:
    events = [*_whole_round(1, 0.5), {"event": "note", "text": "hello"}, *_whole_round(2, 0.6)]
    events.append({"event": "test", "round": 2, "site": "a", "num_cases": 3})
    assert _plain(events).splitlines() == [
        "round 1/8; Dice 0.500, worst b 0.400, best so far; 3 of 3 sites; 30 s",
        "round 2/8; Dice 0.600, worst b 0.500, best so far; 3 of 3 sites; 30 s",
    ]


def test_a_round_without_validation_and_an_undefined_metric_are_lines_too() -> None:
    lines = _plain([_start(1), _round(1, None), _start(2), _validate(2, "a", None), _round(2, float("nan"))])
    assert lines.splitlines() == ["round 1/8; 3 of 3 sites; 30 s", "round 2/8; 3 of 3 sites; 30 s"]


def test_the_plain_line_says_which_site_was_refused_and_why() -> None:
    line = _plain([_start(1), _train(1, "a"), _train(1, "c", "the update is not finite"), _round(1, 0.5)])
    assert "c refused: the update is not finite" in line


def test_the_headline_of_a_detection_job_is_shown() -> None:
    file = io.StringIO()
    with Progress(detection_job(), 3, Console(file=file)) as progress:
        progress.observe(_round(1, 0.3, metric="map"))
    assert "mAP 0.300" in file.getvalue()


def test_the_terminal_shows_who_trained_who_waits_and_who_was_refused() -> None:
    shown = _terminal([_start(1), _train(1, "a"), _train(1, "b", "norm is 12, more than 10")])
    assert "round 1: 1 of 3 trained, 1 waiting" in shown
    assert "trained, loss 0.500, 3.0 s" in shown
    assert "refused: norm is 12, more than 10" in shown
    assert "waiting" in shown.splitlines()[-1]


def test_the_terminal_shows_the_last_and_best_validation_with_trend_and_time_left() -> None:
    shown = _terminal(
        [*_whole_round(1, 0.5), *_whole_round(2, 0.62), _start(3), _round(3, 0.6, is_best=False)]
    )
    assert "Dice 0.600 mean ▼0.020" in shown
    assert "worst b 0.500" in shown
    assert "best 0.620 in round 2" in shown
    assert "3/8 rounds" in shown
    assert "about 2 min 30 s left" in shown


def test_a_resumed_run_goes_on_from_its_round() -> None:
    assert "5/8 rounds" in _terminal([_start(6)], start_round=5)
    assert "6/8 rounds" in _terminal(_whole_round(6, 0.5), start_round=5)


def test_many_sites_are_counted_and_only_the_refused_are_named() -> None:
    sites = [f"site-{number:02d}" for number in range(64)]
    trained = [_train(1, site) for site in sites[:40]]
    shown = _terminal([_start(1, sites), *trained, _train(1, "site-63", "late")], num_sites=64)
    assert "40 of 64 trained, 23 waiting" in shown
    assert "site-63 refused: late" in shown
    assert "site-07" not in shown


def test_the_final_test_is_shown() -> None:
    tests = [{"event": "test", "round": 8, "site": site, "num_cases": 3} for site in SITES]
    shown = _terminal([*_whole_round(8, 0.8), *tests])
    assert "final test: 3 sites judged" in shown


def test_a_note_and_a_site_that_could_not_be_judged_are_shown() -> None:
    assert "disk is nearly full" in _terminal([{"event": "note", "text": "disk is nearly full"}])
    failed = {"event": "evaluate failed", "round": 1, "site": "b", "split": "val", "reason": "data"}
    assert "b could not be judged: data" in _terminal([_start(1), failed])


@pytest.mark.parametrize("num_sites", [3, 64])
def test_what_a_site_sends_cannot_drive_the_terminal(num_sites: int) -> None:
    sites = ["[red]a[/]", "b\x1b[2J", *(f"s{n}" for n in range(num_sites - 2))]
    reason = "\x1b]0;owned\x07 [bold]x[/bold]\r\n"
    events = [_start(1, sites), _train(1, "[red]a[/]", reason), _train(1, "b\x1b[2J", reason), _round(1, 0.5)]
    for shown in (_terminal(events, num_sites), _plain(events)):
        assert "\x1b]0" not in shown and "\x1b[2J" not in shown and "\x07" not in shown
        assert "[red]a[/]" in shown and "[bold]x[/bold]" in shown
    assert len(_plain(events).splitlines()) == 1


def test_events_from_many_threads_are_all_counted() -> None:
    sites = [f"s{number}" for number in range(200)]
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None, _environ={})
    with Progress(segmentation_job(), 200, console) as progress:
        progress.observe(_start(1, sites))
        threads = [
            threading.Thread(
                target=lambda part: [progress.observe(_train(1, s)) for s in part], args=(sites[k::8],)
            )
            for k in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "200 of 200 trained" in file.getvalue().split("\x1b[2K")[-1]


def test_the_cursor_comes_back_after_an_error() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, _environ={})
    with pytest.raises(KeyboardInterrupt), Progress(segmentation_job(), 3, console):
        raise KeyboardInterrupt
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l")


def test_a_narrow_terminal_is_enough() -> None:
    shown = _terminal([*_whole_round(1, 0.5), *_whole_round(2, 0.6)], width=40)
    assert max(len(line) for line in shown.splitlines()) <= 40


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_a_sparkline_has_one_block_a_value_in_their_order(values: list[float]) -> None:
    blocks = sparkline(values)
    assert len(blocks) == len(values)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [blocks[k] for k in order] == sorted(blocks)


@given(st.text())
def test_printable_text_is_one_line_of_the_same_length(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert shown.isprintable()
