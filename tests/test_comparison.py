from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from fedvision.errors import StorageError
from fedvision.report.comparison import comparison_html, comparison_table, write_comparison
from fedvision.storage import write_json
from tests.documents import HOSTILE, assert_stands_alone, rows_of


def comparison(
    sites: tuple[str, ...] = ("a", "b", "c"), held_out: tuple[str, ...] = ("x",)
) -> dict[str, Any]:
    """Return the content of a compare.json: the federated model is best at the worst site."""
    rows = []
    for kind, own, level in (
        ("federated", None, 0.87),
        ("pooled", None, 0.88),
        *(("local", s, 0.7) for s in sites),
    ):
        test = {
            site: {"value": level + (0.1 if site == own else 0), "interval": [level - 0.02, level + 0.03]}
            for site in sites
        }
        values = [cell["value"] for cell in test.values()]
        rows.append(
            {
                "model": f"local: {own}" if own else kind,
                "kind": kind,
                "site": own,
                "test": test,
                "held_out": {site: {"value": level - 0.05, "interval": None} for site in held_out},
                "mean_site": sum(values) / len(values),
                "worst_site": min(values),
                "worst_site_name": min(test, key=lambda site, test=test: test[site]["value"]),
                "pooled": level,
                "mean_other_sites": level if own else None,
                "seconds": 123.0,
            }
        )
    return {
        "job": {"name": "nuclei", "task": "segmentation"},
        "headline": "dice",
        "budget": "8 rounds of 20 steps",
        "rows": rows,
        "finding": "federated dice 0.870 on the mean site",
    }


def test_a_comparison_is_a_page_that_stands_alone_and_a_picture(tmp_path: Path) -> None:
    write_json(tmp_path / "compare.json", comparison())
    path = write_comparison(tmp_path)
    html = path.read_text(encoding="utf-8")
    document = assert_stands_alone(html)
    assert path == tmp_path / "compare.html"
    assert "Federated dice 0.870 on the mean site." in document.text
    assert "Budget: 8 rounds of 20 steps." in document.text
    rows = rows_of(html)
    assert ["federated", "0.870", "0.870", "a", "0.870", "–", "2 min 03 s"] in rows
    own = next(row for row in rows if row[0] == "b")
    assert own[4] == "own 0.8000.680 to 0.730"
    assert Image.open(tmp_path / "compare.png").width > 1500


def test_a_comparison_with_gaps_and_hostile_names_is_shown(tmp_path: Path) -> None:
    data = comparison((HOSTILE, "b"), ())
    for key in ("mean_site", "worst_site", "pooled", "seconds"):
        data["rows"][1][key] = None
    data["rows"][2]["test"]["b"] = {"value": None, "interval": None}
    del data["rows"][2]["held_out"]
    data["finding"] = f"finding {HOSTILE}"
    document = assert_stands_alone(comparison_html(data))
    assert f"Finding {HOSTILE}." in document.text
    assert f"local: {HOSTILE}" in document.text


def test_a_federated_model_whose_sites_release_no_results_has_dashes_and_a_note(tmp_path: Path) -> None:
    data = comparison(held_out=())
    data["rows"][0] |= {"test": {}, "worst_site": None, "worst_site_name": None}
    write_json(tmp_path / "compare.json", data)
    html = write_comparison(tmp_path).read_text(encoding="utf-8")
    document = assert_stands_alone(html)
    assert "No results by site for federated: the job releases sums over all sites only." in document.text
    assert ["federated", "0.870", "–", "–", "0.870", "–", "2 min 03 s"] in rows_of(html)


def test_a_comparison_of_many_sites_is_drawn(tmp_path: Path) -> None:
    write_json(tmp_path / "compare.json", comparison(tuple(f"site-{k}" for k in range(12)), ("x", "y", "z")))
    assert write_comparison(tmp_path).exists()


def test_the_table_on_the_terminal_has_a_line_a_model(tmp_path: Path) -> None:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(comparison_table(comparison(("a", "[red]b"))))
    lines = capture.get().splitlines()
    federated = next(line for line in lines if "federated" in line)
    assert federated.split() == ["federated", "0.870", "0.870", "0.870", "–", "0.820", "2", "min", "03", "s"]
    assert any("local: [red]b" in line for line in lines)


def test_a_comparison_without_its_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"compare\.json"):
        write_comparison(tmp_path)
