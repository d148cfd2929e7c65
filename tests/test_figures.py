import io
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedvision.data.readers import Sample
from fedvision.report.example_boxes import _on_slice, boxes_figure
from fedvision.report.example_masks import _error_picture, masks_figure
from fedvision.report.example_panels import class_colour, cut
from fedvision.report.examples import draw_example
from fedvision.report.figures import clipping_figure, curves_figure, save_figures
from fedvision.report.outcome import froc_figure, results_figure
from fedvision.report.palette import (
    DARK,
    EXTRA_COLOUR,
    LIGHT,
    MISSED_COLOUR,
    Theme,
    render,
    site_colours,
)
from fedvision.report.record import RunRecord, read_run
from fedvision.storage import append_line, read_json, write_json
from fedvision.tasks import CaseResult
from tests.fake_run import detection_job, segmentation_job, write_run

# Machado et al. 2009, table 1, severity 1.0
_EYES = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def _linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(linear, 0, 1) / (0.9505, 1.0, 1.089)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return read_run(write_run(tmp_path_factory.mktemp("segmentation"), segmentation_job()))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    sites = tuple(f"site-{number:02d}" for number in range(64))
    return read_run(write_run(tmp_path_factory.mktemp("many"), segmentation_job(rounds=3), sites, ("x", "y")))


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("eyes", _EYES)
def test_site_colours_stay_apart_for_all_eyes_and_from_the_page(theme: Theme, eyes: str) -> None:
    seen = [_lab(np.array(_EYES[eyes]) @ _linear(colour)) for colour in theme.sites]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15
    light = [float(np.dot((0.2126, 0.7152, 0.0722), _linear(c))) for c in theme.sites]
    page = float(np.dot((0.2126, 0.7152, 0.0722), _linear(theme.page)))
    assert all((max(one, page) + 0.05) / (min(one, page) + 0.05) > 2.5 for one in light)


def test_a_line_shows_the_validation_of_its_site(segmentation: RunRecord) -> None:
    figure = curves_figure(segmentation, LIGHT)
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    expected = [segmentation.validate[number]["bergen"]["metrics"]["dice"] for number in range(1, 9)]
    assert list(lines["bergen"].get_ydata()) == expected
    means = [segmentation.rounds[number]["validation"]["mean_site"]["dice"] for number in range(1, 9)]
    assert list(lines["mean of sites"].get_ydata()) == means


def test_a_site_has_one_colour_in_every_figure(segmentation: RunRecord) -> None:
    curves = curves_figure(segmentation, DARK)
    results = results_figure(segmentation, DARK)
    clipping = clipping_figure(segmentation, DARK)
    assert curves is not None and results is not None and clipping is not None
    colour = site_colours(segmentation.sites, DARK)["coimbra"]
    for figure in (curves, clipping):
        assert {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}[
            "coimbra"
        ] == colour
    bar = results.axes[0].patches[2]
    assert matplotlib.colors.to_hex(bar.get_facecolor()) == colour


def test_the_clip_norm_and_the_norms_before_clipping_are_shown(segmentation: RunRecord) -> None:
    figure = clipping_figure(segmentation, LIGHT)
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert set(lines["clip norm"].get_ydata()) == {10.0}
    assert list(lines["dresden"].get_ydata()) == [
        entry["norm_before"] for entry in segmentation.clipping["dresden"].values()
    ]


def test_many_sites_are_shown_as_a_spread_without_their_names(many: RunRecord) -> None:
    for figure in (curves_figure(many, LIGHT), clipping_figure(many, LIGHT)):
        assert figure is not None
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert "all sites" in labels and not any(label.startswith("site-") for label in labels)
        assert len(figure.axes[0].get_lines()) < 8
    results = results_figure(many, LIGHT)
    assert results is not None
    names = [text.get_text().split()[0] for text in results.axes[0].texts]
    values = {site: result["metrics"]["dice"] for site, result in many.results.items()}
    assert names == [min(values, key=values.__getitem__), max(values, key=values.__getitem__)]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_short_run_has_whole_rounds_on_its_axis(tmp_path: Path, rounds: int) -> None:
    record = read_run(write_run(tmp_path, segmentation_job(rounds=rounds), ("a", "b"), ()))
    figure = curves_figure(record, LIGHT)
    assert figure is not None
    assert list(figure.axes[0].get_xticks()) == list(range(1, rounds + 1))
    assert figure.axes[0].get_xlim()[0] < 1 <= rounds < figure.axes[0].get_xlim()[1]


def test_a_run_without_rounds_has_no_figures(tmp_path: Path) -> None:
    assert save_figures(write_run(tmp_path, segmentation_job(), finished_rounds=0)) == {}


def test_figures_are_saved_as_png_files(tmp_path: Path) -> None:
    run = write_run(tmp_path, detection_job())
    saved = save_figures(run)
    assert set(saved) == {"curves", "results", "froc", "clipping"}
    for name, path in saved.items():
        assert path == run / "figures" / f"{name}.png"
        assert Image.open(path).width > 1500


def test_before_the_test_there_is_no_figure_of_results(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path, segmentation_job(), finished_rounds=2, tested=False))
    assert results_figure(record, LIGHT) is None
    assert froc_figure(record, LIGHT) is None
    assert curves_figure(record, LIGHT) is not None


def test_of_two_records_of_a_round_the_last_counts_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmentation_job(rounds=2))
    line = {"event": "validate", "round": 2, "site": "bergen", "num_cases": 8, "metrics": {"dice": 0.123}}
    append_line(run / "rounds.jsonl", line)
    with (run / "rounds.jsonl").open("a") as file:
        file.write('{"event": "validate", "round": 2, "site": "ber')
    record = read_run(run)
    assert record.series(record.validate, "bergen", "dice")[2] == 0.123
    assert len(record.validate[2]) == 4


def test_an_undefined_value_leaves_a_gap(tmp_path: Path) -> None:
    run = write_run(tmp_path, segmentation_job(rounds=3))
    line = {"event": "validate", "round": 2, "site": "bergen", "num_cases": 8, "metrics": {"dice": None}}
    append_line(run / "rounds.jsonl", line)
    content = read_json(run / "test.json")
    content["sites"]["bergen"]["metrics"]["dice"] = None
    write_json(run / "test.json", content)
    record = read_run(run)
    assert list(record.series(record.validate, "bergen", "dice")) == [1, 3]
    assert curves_figure(record, LIGHT) is not None
    results = results_figure(record, LIGHT)
    assert results is not None
    assert "bergen" not in [label.get_text() for label in results.axes[0].get_yticklabels()]


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path, segmentation_job(rounds=2), ("a$\\frac$", "b"), ()))
    content = render(lambda theme: results_figure(record, theme), LIGHT, "svg")
    assert content is not None and "a$\\frac$" in content.decode()


def test_a_figure_is_the_same_file_each_time(segmentation: RunRecord) -> None:
    files = {
        kind: [render(lambda theme: curves_figure(segmentation, theme), DARK, kind) for _ in range(2)]
        for kind in ("svg", "png")
    }
    assert files["svg"][0] == files["svg"][1]
    assert files["png"][0] == files["png"][1]


def _masks(truth: np.ndarray, found: np.ndarray, channels: int = 1) -> tuple[Sample, CaseResult]:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(size=(channels, *truth.shape)).astype(np.float32))
    spacing = (1.0, 1.5, 3.0)[: truth.ndim]
    sample = Sample("c", "p", image, torch.from_numpy(truth.astype(np.uint8)), None, None, spacing)
    values = {"dice/one": 0.9, "hd95_mm/one": 2.0, "dice/two": float("nan")}
    return sample, CaseResult("c", "p", np.zeros(1), 0.9, values, {"label": found.astype(np.uint8)})


def _boxes(dims: int, num: int) -> tuple[Sample, CaseResult]:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 20, (num, dims))
    boxes = np.concatenate([low, low + rng.uniform(2, 10, (num, dims))], axis=1).astype(np.float32)
    labels = rng.integers(1, 4, num)
    image = torch.from_numpy(rng.normal(size=(3, *(32, 40, 36)[:dims])).astype(np.float32))
    sample = Sample("c", "p", image, None, torch.from_numpy(boxes), torch.from_numpy(labels), (1.0,) * dims)
    prediction = {"boxes": boxes, "labels": labels, "scores": np.linspace(1, 0, num).astype(np.float32)}
    values = {"hits": 3.0, "misses": 1.0, "false_positives": 1.0}
    return sample, CaseResult("c", "p", np.zeros(1), 0.7, values, prediction)


@pytest.mark.parametrize("shape", [(40, 60), (20, 24, 16), (1, 30), (1200, 1000)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_example_of_masks_is_a_picture(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    truth = np.zeros(shape, np.uint8)
    truth[tuple(slice(n // 4, 1 + n // 2) for n in shape)] = 1
    sample, result = _masks(truth, np.roll(truth, 1, axis=-1), channels)
    path = tmp_path / "deep" / "worst.png"
    draw_example(sample, result, segmentation_job(classes=("one", "two"), dims=len(shape)), path, "a $x$ <b>")
    assert Image.open(path).width > 900


@pytest.mark.parametrize(("truth", "found"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("dims", [2, 3])
def test_an_example_without_borders_is_drawn(tmp_path: Path, truth: int, found: int, dims: int) -> None:
    shape = (12, 14, 10)[:dims]
    sample, result = _masks(np.full(shape, truth), np.full(shape, found))
    draw_example(sample, result, segmentation_job(classes=("one",), dims=dims), tmp_path / "x.png", "t")
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("num", [0, 1, 5, 60])
def test_an_example_of_boxes_is_a_picture(tmp_path: Path, dims: int, num: int) -> None:
    sample, result = _boxes(dims, num)
    draw_example(sample, result, detection_job(dims=dims), tmp_path / "x.png", "t")
    assert Image.open(tmp_path / "x.png").width > 900


def test_errors_have_the_colours_of_the_caption(tmp_path: Path) -> None:
    truth, found = np.zeros((30, 30), np.uint8), np.zeros((30, 30), np.uint8)
    truth[5:15, 5:15], found[15:25, 15:25] = 1, 1
    picture = _error_picture(np.zeros((30, 30)), truth, found)
    for colour, where in ((MISSED_COLOUR, truth == 1), (EXTRA_COLOUR, found == 1)):
        rgb = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        assert np.array_equal(np.all(np.isclose(picture, rgb), axis=-1), where)


def test_the_marks_keep_their_colours_in_the_file(tmp_path: Path) -> None:
    truth = np.zeros((200, 200), np.uint8)
    truth[5:10, 5:10] = 1
    sample, result = _masks(truth, np.zeros_like(truth), channels=3)
    draw_example(sample, result, segmentation_job(classes=("one",)), tmp_path / "x.png", "t")
    colours = {rgb for _, rgb in Image.open(tmp_path / "x.png").convert("RGB").getcolors(1 << 20)}
    for colour in (MISSED_COLOUR, class_colour(1)):
        assert tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5)) in colours


def test_the_caption_names_classes_with_their_numbers_and_skips_undefined_ones() -> None:
    truth = np.zeros((20, 20), np.uint8)
    truth[2:9, 2:9], truth[12:18, 12:18] = 1, 2
    sample, result = _masks(truth, truth)
    figure = masks_figure(sample, result, segmentation_job(classes=("one", "two")), "title")
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert texts[:2] == ["one: Dice 0.900, HD95 2.00 mm", "two"]
    assert "wrong class" in texts


def test_only_boxes_that_count_are_drawn_and_the_others_are_counted() -> None:
    sample, result = _boxes(2, 11)
    figure = boxes_figure(sample, result, detection_job(), "title")
    labels = [text.get_text() for text in figure.axes[1].texts]
    assert len(labels) == 8  # scores 1.0, 0.9, ..., 0.3
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert "prediction with score 0.3 or more (3 below)" in texts
    assert "3 found, 1 missed, 1 false positive" in [text.get_text() for text in figure.texts]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_box_of_a_volume_lies_on_its_voxels_in_every_slice(data: st.DataObject) -> None:
    grid = [data.draw(st.integers(3, 9)) for _ in range(3)]
    low = [data.draw(st.integers(0, n - 1)) for n in grid]
    high = [data.draw(st.integers(at + 1, n)) for at, n in zip(low, grid, strict=True)]
    axis = data.draw(st.integers(0, 2))
    volume = np.zeros(grid)
    volume[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 1
    rows, columns = np.nonzero(cut(volume, axis, low[axis]))
    box = _on_slice(np.array([[*low, *high]], dtype=float), axis, grid)[0]
    assert list(box) == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_drawing_an_example_changes_no_global_setting_of_matplotlib() -> None:
    before = dict(matplotlib.rcParams)
    truth = np.zeros((20, 20), np.uint8)
    truth[2:9, 2:9] = 1
    sample, result = _masks(truth, truth)
    figure = masks_figure(sample, result, segmentation_job(classes=("one",)), "title")
    figure.savefig(io.BytesIO(), format="png")
    assert dict(matplotlib.rcParams) == before
