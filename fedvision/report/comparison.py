"""Federated, pooled and local models side by side: ``compare.png``, ``compare.html`` and a terminal table.

Everything is read from ``compare.json``; the numbers are made elsewhere.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvision.report.markup import Column, Markup, joined, page, section, table, tag, themed_picture
from fedvision.report.notation import (
    MISSING,
    duration_text,
    interval_text,
    is_number,
    listed,
    metric_explained,
    metric_label,
    metric_text,
)
from fedvision.report.palette import DARK, FIGURE_WIDTH, LIGHT, Theme, render
from fedvision.storage import read_json, write_atomic, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Comparison = dict[str, Any]
Row = dict[str, Any]

_WRITTEN_CELLS = 14
_WRITTEN_HELD_OUT = 4
_RANKED = ("mean_site", "worst_site", "pooled")
_KINDS = {
    "federated": "all sites train together, data stays in place",
    "pooled": "all data in one place: what a federation tries to reach",
    "local": "one site alone with its own data",
}


def write_comparison(folder: Path) -> Path:
    """Write ``compare.png`` and ``compare.html`` from ``folder/compare.json``.

    Returns:
        The page, which stands alone.

    Raises:
        StorageError: ``compare.json`` is absent or not JSON, or the disk is full.
    """
    data = read_json(folder / "compare.json")
    write_atomic(folder / "compare.png", _rendered(data, LIGHT, "png"))
    path = folder / "compare.html"
    write_text(path, comparison_html(data))
    return path


def _rendered(data: Comparison, theme: Theme, kind: str) -> bytes:
    content = render(lambda chosen: comparison_figure(data, chosen), theme, kind)
    assert content is not None
    return content


def _sites(data: Comparison, part: str) -> list[str]:
    """Return the sites of ``part`` ("test" or "held_out"), in the order of the first row that has them."""
    return list(dict.fromkeys(site for row in data["rows"] for site in row.get(part) or {}))


def _cell(row: Row, part: str, site: str) -> tuple[Any, Any]:
    """Return a model's value and interval at a site, None where there is none."""
    cell = (row.get(part) or {}).get(site) or {}
    return cell.get("value"), cell.get("interval")


def _headline(data: Comparison) -> str:
    return str(data["headline"])


def _best(rows: list[Row], key: str) -> float | None:
    """Return the largest value of a column, None where no model has one."""
    return max((row[key] for row in rows if is_number(row.get(key))), default=None)


def comparison_table(data: Comparison) -> "Table":
    """Return the comparison as a table for the terminal; the best of a column is bold.

    Args:
        data: The content of ``compare.json``.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    metric, rows = _headline(data), data["rows"]
    columns = {"mean_site": "mean of sites", "worst_site": "worst site", "pooled": "all cases"}
    if any(is_number(row.get("mean_other_sites")) for row in rows):
        columns["mean_other_sites"] = "other sites"
    held_out = _sites(data, "held_out")
    held_out = held_out if len(held_out) <= _WRITTEN_HELD_OUT else []
    title = Text(f"{data['job']['name']}: {metric_label(metric)} on test cases", style="bold")
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("model", no_wrap=True)
    for name in (*columns.values(), *(f"held out: {site}" for site in held_out)):
        shown.add_column(Text(name), justify="right")
    shown.add_column("time", justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for key in columns:
            is_best = key in _RANKED and is_number(row.get(key)) and row[key] == _best(rows, key)
            cells.append(Text(metric_text(row.get(key), metric), style="bold" if is_best else ""))
        cells += [Text(metric_text(_cell(row, "held_out", site)[0], metric)) for site in held_out]
        style = "bold" if row["kind"] == "federated" else ""
        shown.add_row(Text(str(row["model"]), style=style), *cells, Text(duration_text(row.get("seconds"))))
    return shown


def comparison_figure(data: Comparison, theme: Theme) -> "Figure":
    """Draw a heat map of models by sites, and beside it each model's mean and worst site."""
    from matplotlib.figure import Figure

    rows = data["rows"]
    figure = Figure(figsize=(FIGURE_WIDTH, 1.9 + 0.42 * max(len(rows), 2)))
    left, right = figure.subplots(1, 2, width_ratios=(2.1, 1))
    _draw_map(left, data, theme)
    _draw_bars(right, data, theme)
    for axes in (left, right):
        axes.set_ylim(len(rows) - 0.4, -0.6)
    return figure


def _draw_map(axes: Any, data: Comparison, theme: Theme) -> None:
    """Draw one cell a model and site, held-out sites apart at the right; a model's own site has a frame."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.patches import Rectangle

    metric, rows = _headline(data), data["rows"]
    columns = [("test", site) for site in _sites(data, "test")]
    gap = len(columns)
    columns += [("held_out", site) for site in _sites(data, "held_out")]
    places = [at + (0.35 if at >= gap else 0) for at in range(len(columns))]
    known = [v for row in rows for part, site in columns if is_number(v := _cell(row, part, site)[0])]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    ramp = LinearSegmentedColormap.from_list("ramp", theme.ramp)
    for at, row in enumerate(rows):
        for place, (part, site) in zip(places, columns, strict=True):
            value, _ = _cell(row, part, site)
            share = (value - low) / max(high - low, 1e-9) if is_number(value) else None
            colour = to_rgb(theme.page) if share is None else ramp(share)[:3]
            box = (place - 0.48, at - 0.46)
            is_own = part == "test" and row.get("site") == site
            axes.add_patch(
                Rectangle(
                    box,
                    0.96,
                    0.92,
                    facecolor=colour,
                    edgecolor=theme.ink if is_own else "none",
                    linewidth=1.6,
                )
            )
            if len(columns) <= _WRITTEN_CELLS:
                is_light = float(np.dot(colour, (0.299, 0.587, 0.114))) > 0.52
                ink = theme.muted if share is None else ("#15191e" if is_light else "#ffffff")
                size = 10 if len(columns) <= 8 else 8
                axes.text(
                    place, at, metric_text(value, metric), ha="center", va="center", color=ink, fontsize=size
                )
    axes.set_title(f"{metric_label(metric)} on each site's test cases")
    axes.set_xlim(-0.6, (places[-1] if places else 0) + 0.6)
    long = max((len(site) for _, site in columns), default=0) > 60 / max(len(columns), 1)
    axes.set_xticks(
        places, [site for _, site in columns], rotation=40 if long else 0, ha="right" if long else "center"
    )
    if gap < len(columns):
        middle = (places[gap] + places[-1]) / 2
        axes.text(middle, -0.62, "held out", ha="center", va="bottom", fontsize=9, color=theme.muted)
    axes.set_yticks(range(len(rows)), [str(row["model"]) for row in rows])
    axes.tick_params(labelcolor=theme.ink)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)


def _draw_bars(axes: Any, data: Comparison, theme: Theme) -> None:
    """Draw each model's mean over sites as a bar and its worst site as a mark on it."""
    metric, rows = _headline(data), data["rows"]
    for at, row in enumerate(rows):
        mean, worst = row.get("mean_site"), row.get("worst_site")
        if is_number(mean):
            colour = theme.accent if row["kind"] == "federated" else theme.fill
            axes.barh(at, mean, height=0.56, color=colour, label="mean of sites" if not at else None)
            label = metric_text(mean, metric)
            axes.annotate(
                label, (mean, at), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9.5
            )
        if is_number(worst):
            axes.plot(
                [worst, worst],
                [at - 0.36, at + 0.36],
                color=theme.warning,
                linewidth=2.4,
                solid_capstyle="butt",
            )
    axes.set_title("Mean over sites, and worst site")
    axes.plot([], [], color=theme.warning, linewidth=2.4, label="worst site")
    means = [row["mean_site"] for row in rows if is_number(row.get("mean_site"))]
    axes.set_xlim(0, 1.2 * max(means, default=1.0))
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.legend(*_worst_only(axes), loc="upper left", bbox_to_anchor=(0, -0.1), borderaxespad=0)


def _worst_only(axes: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    chosen = [at for at, label in enumerate(labels) if label == "worst site"]
    return [handles[at] for at in chosen], [labels[at] for at in chosen]


def comparison_html(data: Comparison) -> str:
    """Return the comparison as an HTML document that stands alone.

    Args:
        data: The content of ``compare.json``.
    """
    metric = _headline(data)
    description = f"{metric_label(metric)} of every model at every site, with mean and worst site"
    figure = themed_picture(description, _rendered(data, LIGHT, "svg"), _rendered(data, DARK, "svg"))
    name = str(data["job"]["name"])
    kinds = [tag("li", tag("strong", kind), f": {text}") for kind, text in _KINDS.items()]
    budget = str(data["budget"])
    return page(
        f"{name}: federated, pooled and local",
        tag(
            "header",
            tag("p", f"Comparison: {data['job']['task']}", class_="kind"),
            tag("h1", name),
            tag("p", f"{data['finding'][:1].upper()}{data['finding'][1:]}.", class_="verdict"),
        ),
        section(
            "Every model at every site",
            figure,
            tag("p", "A frame marks a model's own site, a red line its worst site.", class_="note"),
            _unknown(data),
            _summary_table(data),
            intro=metric_explained(metric),
        ),
        section("Values and 95 % intervals", _site_table(data), intro="A model's own site is marked."),
        section(
            "What is compared",
            tag("ul", *kinds),
            tag("p", f"Budget: {budget}.", class_="note"),
            intro="All models are judged on the same test cases, which none of them has trained on.",
        ),
        tag("footer", "Made by fedvision. No part of this page is fetched from elsewhere."),
    )


def _unknown(data: Comparison) -> Markup:
    """Say which models have no results by site, because the job releases sums over sites only."""
    hidden = [str(row["model"]) for row in data["rows"] if not row.get("test")]
    if not hidden:
        return Markup()
    text = f"No results by site for {listed(hidden)}: the job releases sums over all sites only."
    return tag("p", text, class_="note")


def _summary_table(data: Comparison) -> Markup:
    """Return one row a model: mean, worst, pooled, other sites, time."""
    metric, rows = _headline(data), data["rows"]
    columns = [
        Column("Model"),
        Column("Mean of sites", True, "every site counts the same"),
        Column("Worst site", is_number=True),
        Column("at"),
        Column("All cases", True, "every case counts the same"),
        Column("Other sites", True, "mean over the sites a local model has not trained on"),
        Column("Time", is_number=True),
    ]

    def best(row: Row, key: str) -> Markup:
        text = metric_text(row.get(key), metric)
        return tag("strong" if text != MISSING and row[key] == _best(rows, key) else "span", text)

    return table(
        columns,
        (
            (
                tag("strong" if row["kind"] == "federated" else "span", row["model"]),
                best(row, "mean_site"),
                best(row, "worst_site"),
                row.get("worst_site_name") or MISSING,
                best(row, "pooled"),
                metric_text(row.get("mean_other_sites"), metric),
                duration_text(row.get("seconds")),
            )
            for row in rows
        ),
    )


def _site_table(data: Comparison) -> Markup:
    """Return one row a site and one column a model, with intervals below the values."""
    metric, rows = _headline(data), data["rows"]
    columns = [Column("Site"), *(Column(str(row["model"]), is_number=True) for row in rows)]

    def cell(row: Row, part: str, site: str) -> Markup:
        value, interval = _cell(row, part, site)
        is_own = part == "test" and row.get("site") == site
        text = interval_text(interval, metric)
        return joined(
            [
                tag("span", "own ", class_="mark") if is_own else "",
                metric_text(value, metric),
                tag("div", text, class_="interval") if text else "",
            ]
        )

    lines = []
    for part, note in (("test", ""), ("held_out", "held out")):
        for site in _sites(data, part):
            name = joined([site, tag("div", note, class_="interval") if note else ""])
            lines.append((name, *(cell(row, part, site) for row in rows)))
    return table(columns, lines)
