"""Renew what the documentation shows of the demo: python docs/make_demo.py DEMO [COMPARISON].

DEMO is the folder of a finished ``fedvision simulate --demo``, COMPARISON that of a finished
``fedvision compare`` of its segmentation job. Made from their records, so that every number in the
documentation was measured:

- ``docs/images/report.png`` and ``examples.png``, with chromium; the report stands alone, nothing is fetched;
- the blocks between ``<!-- from the demo: NAME -->`` and ``<!-- end -->`` in the tutorial and the README.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from fedvision.config import load_job
from fedvision.report.comparison import comparison_table
from fedvision.report.notation import interval_text, metric_label, metric_text
from fedvision.report.progress import Progress
from fedvision.storage import read_json, read_lines

DOCS = Path(__file__).parent
PAGES = (DOCS.parent / "README.md", DOCS / "tutorials" / "first-federation.md")
BLOCK = re.compile(r"(<!-- from the demo: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHOWN = "demo"
"""The name of the demo's folder in the documentation."""

WIDTH = 1040
REPORT_TOP, REPORT_BOTTOM = 40, 1545  # from the heading to the figure of the results
EXAMPLES_WIDTH, GAP = 800, 16
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip


def draw_page(page: Path, target: Path) -> None:
    """Draw a report as a browser shows it, ``WIDTH`` pixels wide."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("make_demo: chromium is not installed")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={WIDTH},4000"]
        subprocess.run(  # noqa: S603, our own arguments
            [*command, f"--screenshot={target}", page.resolve().as_uri()], check=True, capture_output=True
        )


def save(picture: Image.Image, name: str) -> None:
    """Write a PNG into ``docs/images`` and say how large it is."""
    path = DOCS / "images" / name
    path.parent.mkdir(exist_ok=True)
    picture.convert("RGB").save(path, optimize=True)
    sys.stdout.write(f"{path.name}: {path.stat().st_size // 1000} kB\n")


def draw_images(demo: Path) -> None:
    """Write report.png and examples.png."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        draw_page(demo / "runs" / "demo-segmentation" / "report.html", shot)
        save(Image.open(shot).crop((0, REPORT_TOP, WIDTH, REPORT_BOTTOM)), "report.png")
    examples = [
        Image.open(demo / "runs" / f"demo-{kind}" / "sites" / "north" / "examples" / "median.png")
        for kind in ("segmentation", "detection")
    ]
    width, height = max(e.width for e in examples), sum(e.height for e in examples) + GAP
    together = Image.new("RGB", (width, height), "white")
    top = 0
    for example in examples:
        together.paste(example, (0, top))
        top += example.height + GAP
    together = together.resize((EXAMPLES_WIDTH, height * EXAMPLES_WIDTH // width))
    # The last bits of the images' noise would take most of the file.
    save(together.point(lambda value: value & 0xFC), "examples.png")


def fenced(text: str) -> str:
    """Return text as a block of terminal output."""
    return f"```text\n{text.rstrip()}\n```"


def terminal_output(demo: Path) -> str:
    """Return what the demo printed: its records once more through the same display."""
    shown = []
    for kind in ("segmentation", "detection"):
        run = demo / "runs" / f"demo-{kind}"
        console = Console(width=100, file=io.StringIO())
        with Progress(load_job(run / "job.toml"), len(_training_sites(run)), console) as progress:
            for event in read_lines(run / "rounds.jsonl"):
                progress.observe(event)
        shown.append(f"demo-{kind}\n{_printed(console)}\nreport: {SHOWN}/runs/demo-{kind}/report.html")
    return fenced("\n".join([*shown, f"report: {SHOWN}/report.html"]))


def _printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip().splitlines())


def _training_sites(run: Path) -> list[str]:
    return sorted({event["site"] for event in read_lines(run / "rounds.jsonl") if event["event"] == "train"})


def data_table(demo: Path) -> str:
    """Return what ``fedvision data show`` prints for the segmentation data."""
    with tempfile.TemporaryDirectory() as folder:
        root = (demo / "data" / "segmentation").resolve()
        command = [sys.executable, "-m", "fedvision", "data", "show", str(root), "--out", "heads.png"]
        printed = subprocess.run(  # noqa: S603, our own arguments
            command,
            check=True,
            cwd=folder,
            env={**os.environ, "COLUMNS": "110"},
            capture_output=True,
            text=True,
        ).stdout
    return fenced("\n".join(line.rstrip() for line in printed.splitlines()))


def results(demo: Path) -> str:
    """Return a table with the segmentation model's headline at every site."""
    test = read_json(demo / "runs" / "demo-segmentation" / "test.json")
    name = test["headline"]
    lines = [f"| site | test cases | {metric_label(name)} | 95 % interval |", "| --- | ---: | ---: | --- |"]

    def add(label: str, cases: object, metrics: Any, intervals: Any) -> None:
        value, interval = metric_text(metrics[name], name), interval_text(intervals.get(name), name)
        lines.append(f"| {label} | {cases} | {value} | {interval} |")

    for site, result in test["sites"].items():
        add(site, result["num_cases"], result["metrics"], result["intervals"])
    add("mean of sites", "", test["mean_site"], test["mean_site_intervals"])
    total = sum(result["num_cases"] for result in test["sites"].values())
    add("all cases", total, test["pooled"]["metrics"], test["pooled"]["intervals"])
    return "\n".join(lines)


def comparison(folder: Path) -> str:
    """Return what ``fedvision compare`` printed at its end."""
    data = read_json(folder / "compare.json")
    console = Console(width=100, file=io.StringIO())
    console.print(comparison_table(data))
    return fenced(
        f"{_printed(console)}\n{data['finding']}\ncomparison: runs/demo-segmentation-compare/compare.html"
    )


def main(demo: Path, compared: Path | None) -> None:
    """Renew pictures and blocks; without a comparison its block stays as it is."""
    draw_images(demo)
    made: dict[str, Callable[[], str]] = {
        "data-table": lambda: data_table(demo),
        "terminal-output": lambda: terminal_output(demo),
        "results": lambda: results(demo),
    }
    if compared is not None:
        made["comparison"] = lambda: comparison(compared)

    def renewed(match: re.Match[str]) -> str:
        make = made.get(match["name"])
        return match[0] if make is None else f"{match[1]}{make()}\n{match[3]}"

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(renewed, text), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python docs/make_demo.py DEMO [COMPARISON]")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None)
