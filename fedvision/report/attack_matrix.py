"""The lab's matrix as a table in the terminal, heat maps and a page: ``matrix.html``.

Everything is read from ``matrix.json``; the numbers are made elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvision.report.markup import Column, Markup, page, section, table, tag, themed_picture
from fedvision.report.notation import MISSING, is_number, metric_label, metric_text
from fedvision.report.palette import DARK, FIGURE_WIDTH, LIGHT, Theme, render
from fedvision.storage import read_json, write_atomic, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Matrix = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Map:
    """A heat map.

    Attributes:
        key: Of the rows in ``matrix.json``.
        title: Above the map.
        text: What it says, for the page.
        factor: From the number to what is shown.
        full: What has the strongest colour at least.
    """

    key: str
    title: str
    text: str
    factor: float
    full: float


MAPS = (
    Map(
        "damage",
        "Damage in points",
        "How far the final model is below that of the same seed without attack and without defence.",
        1.0,
        10.0,
    ),
    Map(
        "backdoor",
        "Backdoor success in %",
        "Share of test images in which the planted trigger does what it was made for.",
        100.0,
        100.0,
    ),
    Map(
        "false_exclusions",
        "Honest updates left out in %",
        "Share of the honest sites' updates, over all rounds, that were not taken.",
        100.0,
        30.0,
    ),
    Map(
        "caught",
        "Malicious updates left out in %",
        "Share of the malicious sites' updates, over all rounds, that were not taken.",
        100.0,
        100.0,
    ),
)


def write_matrix(folder: Path) -> Path:
    """Write ``matrix-KEY.png``, ``matrix-KEY.svg`` and ``matrix.html`` from ``folder/matrix.json``.

    Returns:
        The page, which stands alone.

    Raises:
        StorageError: ``matrix.json`` is absent or not JSON, or the disk is full.
    """
    data = read_json(folder / "matrix.json")
    for chosen in shown_maps(data):
        for kind in ("png", "svg"):
            write_atomic(folder / f"matrix-{chosen.key}.{kind}", _rendered(data, chosen, LIGHT, kind))
    path = folder / "matrix.html"
    write_text(path, matrix_html(data))
    return path


def shown_maps(data: Matrix) -> list[Map]:
    """Return the maps that have anything to show."""
    return [chosen for chosen in MAPS if any(is_number(row[chosen.key]) for row in data["rows"])]


def _rendered(data: Matrix, chosen: Map, theme: Theme, kind: str) -> bytes:
    content = render(lambda look: matrix_figure(data, chosen, look), theme, kind)
    assert content is not None
    return content


def _attacks(data: Matrix, chosen: Map) -> list[str]:
    """Return the attacks of a map, in the matrix's order, those with nothing to show left out."""
    return list(dict.fromkeys(row["attack"] for row in data["rows"] if is_number(row[chosen.key])))


def _columns(data: Matrix) -> list[tuple[str, float]]:
    """Return defence and share of each column: a defence's shares side by side."""
    rows = data["rows"]
    defences = list(dict.fromkeys(row["defence"] for row in rows))
    shares = sorted({row["malicious"] for row in rows if row["malicious"] > 0}) or [0.0]
    there = {(row["defence"], row["malicious"]) for row in rows}
    found = [(one, share) for one in defences for share in shares if (one, share) in there]
    return found or [(one, 0.0) for one in defences]


def _value(data: Matrix, attack: str, defence: str, share: float, chosen: Map) -> float | None:
    """Return what a cell shows; without an attack the share makes no difference."""
    for row in data["rows"]:
        fits_share = row["malicious"] == share or row["attack"] == "none"
        if row["attack"] == attack and row["defence"] == defence and fits_share:
            return chosen.factor * row[chosen.key] if is_number(row[chosen.key]) else None
    return None


def matrix_figure(data: Matrix, chosen: Map, theme: Theme) -> "Figure":
    """Draw a map of attacks by defence and share of malicious sites."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    attacks, columns = _attacks(data, chosen), _columns(data)
    figure = Figure(figsize=(FIGURE_WIDTH, 1.7 + 0.36 * max(len(attacks), 2)))
    axes = figure.subplots()
    ramp = LinearSegmentedColormap.from_list("ramp", theme.ramp)
    defences = list(dict.fromkeys(one for one, _ in columns))
    places = [at + 0.3 * defences.index(one) for at, (one, _) in enumerate(columns)]
    for line, attack in enumerate(attacks):
        for place, (defence, share) in zip(places, columns, strict=True):
            value = _value(data, attack, defence, share, chosen)
            part = None if value is None else min(max(value / chosen.full, 0.0), 1.0)
            colour = to_rgb(theme.page) if part is None else ramp(part)[:3]
            axes.add_patch(Rectangle((place - 0.48, line - 0.46), 0.96, 0.92, facecolor=colour))
            is_light = float(np.dot(colour, (0.299, 0.587, 0.114))) > 0.52
            ink = theme.muted if part is None else ("#15191e" if is_light else "#ffffff")
            text = MISSING if value is None else f"{value:.1f}" if chosen.factor == 1 else f"{value:.0f}"
            size = 9.5 if len(columns) <= 10 else 7.5
            axes.text(place, line, text, ha="center", va="center", color=ink, fontsize=size)
    for defence in defences:
        own = [place for place, (one, _) in zip(places, columns, strict=True) if one == defence]
        axes.text(
            (own[0] + own[-1]) / 2, -0.62, defence, ha="center", va="bottom", fontsize=9, color=theme.muted
        )
    axes.set_title(chosen.title, pad=24)
    axes.set_xlim(-0.6, places[-1] + 0.6)
    axes.set_ylim(max(len(attacks), 2) - 0.4, -0.6)
    axes.set_xticks(places, [f"{100 * share:.0f} %" for _, share in columns])
    axes.set_xlabel("malicious sites")
    axes.set_yticks(range(len(attacks)), attacks)
    axes.tick_params(labelcolor=theme.ink)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return figure


def _texts(row: Row, metric: str) -> list[str]:
    """Return a row's numbers as text, in the order of the tables' columns."""

    def per_cent(key: str) -> str:
        return f"{100 * row[key]:.0f} %" if is_number(row[key]) else MISSING

    def points(key: str) -> str:
        return f"{row[key]:+.1f}" if is_number(row[key]) else MISSING

    odd = [
        f"{row[key]} {word}"
        for key, word in (("expelled", "expelled"), ("thrown_away", "rounds lost"), ("failed", "failed"))
        if row[key]
    ]
    return [
        metric_text(row["score"], metric),
        points("damage"),
        points("worst_damage"),
        per_cent("backdoor"),
        per_cent("backdoor_clean"),
        per_cent("caught"),
        per_cent("false_exclusions"),
        ", ".join(odd),
    ]


def matrix_table(data: Matrix) -> "Table":
    """Return the matrix as a table for the terminal.

    Args:
        data: The content of ``matrix.json``.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    metric = str(data["metric"])
    title = Text(f"{data['job']['name']}: {metric_label(metric)} under attack", style="bold")
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("attack", "malicious", "defence"):
        shown.add_column(name, no_wrap=True)
    for name in (
        metric_label(metric), "damage", "worst", "backdoor", "clean model", "caught", "honest out", ""
    ):  # fmt: skip
        shown.add_column(name, justify="right")
    for row in data["rows"]:
        head = (row["attack"], f"{100 * row['malicious']:.0f} %", row["defence"])
        shown.add_row(*map(Text, (*head, *_texts(row, metric))))
    return shown


def cell_line(outcome: Row) -> str:
    """Return one line about a finished cell."""
    score = outcome["score"]
    text = f"{outcome['metric']} {score:.3f}" if is_number(score) else outcome["failure"] or "no score"
    shares = [one["share"] for one in outcome["backdoor"].values() if is_number(one["share"])]
    if shares and outcome["attack"] != "none":
        text += f", backdoor {100 * shares[0]:.0f} %"
    left_out = sum(map(len, outcome["excluded"].values()))
    head = f"{outcome['attack']} {100 * outcome['malicious']:.0f} % {outcome['defence']}"
    return f"{head} seed {outcome['seed']}: {text}, {left_out} updates left out, {outcome['seconds']:.0f} s"


def matrix_html(data: Matrix) -> str:
    """Return the matrix as an HTML document that stands alone.

    Args:
        data: The content of ``matrix.json``.
    """
    job, metric = data["job"], str(data["metric"])
    pictures: list[Markup] = []
    for chosen in shown_maps(data):
        described = f"{chosen.title}, attacks by defence and share of malicious sites"
        light, dark = (_rendered(data, chosen, theme, "svg") for theme in (LIGHT, DARK))
        pictures.append(section(chosen.title, themed_picture(described, light, dark), intro=chosen.text))
    seeds = ", ".join(map(str, data["seeds"]))
    return page(
        f"{job['name']}: attacks",
        tag(
            "header",
            tag("p", f"Attacks on {job['task']}", class_="kind"),
            tag("h1", str(job["name"])),
            tag("p", f"{_verdict(data['rows'])}.", class_="verdict"),
        ),
        *pictures,
        section(
            "All numbers",
            _number_table(data["rows"], metric),
            intro="Means over seeds; worst is the seed with the largest damage. "
            "Clean model: the same trigger on the model that was trained without it.",
        ),
        section(
            "What was run",
            tag(
                "p",
                f"{job['sites']} sites, {job['rounds']} rounds, secure aggregation at level {job['level']}, "
                f"seeds {seeds}. Each cell is the whole job in the real protocol. Malicious sites were shown "
                "the honest updates of every round before they answered, which no real attacker is.",
                class_="note",
            ),
        ),
        tag("footer", "Made by fedvision. No part of this page is fetched from elsewhere."),
    )


def _verdict(rows: Sequence[Row]) -> str:
    """Say in one line what did the most damage in spite of a defence."""
    defended = [
        row
        for row in rows
        if row["defence"] != "none" and row["attack"] != "none" and is_number(row["damage"])
    ]
    if not defended:
        return "No attack was run against a defence"
    worst = max(defended, key=lambda row: row["damage"])
    return (
        f"Most damage in spite of a defence: {worst['damage']:.1f} points by {worst['attack']} "
        f"at {100 * worst['malicious']:.0f} % against {worst['defence']}"
    )


def _number_table(rows: Sequence[Row], metric: str) -> Markup:
    columns = [
        Column("Attack"),
        Column("Malicious", is_number=True),
        Column("Defence"),
        Column(metric_label(metric), True, "mean over sites and seeds"),
        Column("Damage", True, "points below no attack without defence"),
        Column("Worst", True, "of the seeds"),
        Column("Backdoor", True, "share of images fooled"),
        Column("Clean model", True, "the same trigger on a model without it"),
        Column("Caught", True, "malicious updates left out"),
        Column("Honest out", True, "honest updates left out"),
        Column(""),
    ]
    return table(
        columns,
        (
            (row["attack"], f"{100 * row['malicious']:.0f} %", row["defence"], *_texts(row, metric))
            for row in rows
        ),
    )
