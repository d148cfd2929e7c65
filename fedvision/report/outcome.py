"""The figures of the final test: results by site, and FROC."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedvision.report.lines import draw_sites, known_series
from fedvision.report.notation import (
    counted,
    false_positives,
    interval_text,
    is_number,
    metric_label,
    metric_text,
    rate_label,
)
from fedvision.report.palette import FIGURE_WIDTH, MANY_SITES, Theme, site_colours
from fedvision.report.record import MEAN, POOLED, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED_ROWS = 24


def results_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """Draw the headline on test data by site with 95 % intervals, and the mean, worst and pooled values.

    Returns:
        The figure; None before the final test. Only the values over sites where no site released its own.
    """
    from matplotlib.figure import Figure

    results = record.results
    values = {site: results[site]["metrics"].get(record.headline) for site in record.sites if site in results}
    values = {site: value for site, value in values.items() if is_number(value)}
    if not values and not any(is_number(s.metrics.get(record.headline)) for s in record.summaries.values()):
        return None
    if len(values) > _NAMED_ROWS:
        return _ranked_results(record, values, theme)
    rows = len(values) + len(record.summaries)
    figure = Figure(figsize=(FIGURE_WIDTH, 1.0 + 0.36 * rows))
    axes = figure.subplots()
    axes.set_title(f"Test: {metric_label(record.headline)} with 95 % interval")
    colours = site_colours(record.sites, theme)
    worst = record.worst_site
    many = len(values) >= MANY_SITES
    for row, (site, value) in enumerate(values.items()):
        held_out = results[site]["role"] == "held_out"
        colour = (theme.warning if site == worst else theme.fill) if many else colours[site]
        axes.barh(
            row,
            value,
            height=0.54,
            color="none" if held_out else colour,
            edgecolor=colour,
            hatch="////" if held_out else None,
            linewidth=1.2,
        )
        note = "worst site" if site == worst and not held_out else ""
        note = "held out: took no part in training" if held_out else note
        _interval(
            axes, row, value, results[site]["intervals"].get(record.headline), note, record.headline, theme
        )
    for row, summary in enumerate(record.summaries.values(), start=len(values)):
        value = summary.metrics.get(record.headline)
        if is_number(value):
            axes.barh(row + 0.25, value, height=0.54, color=theme.fill)
            interval = summary.intervals.get(record.headline)
            _interval(axes, row + 0.25, value, interval, "", record.headline, theme)
    mean = record.summaries[MEAN].metrics.get(record.headline) if MEAN in record.summaries else None
    if is_number(mean):
        axes.axvline(mean, color=theme.ink, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    axes.set_yticks(
        [*range(len(values)), *(row + 0.25 for row in range(len(values), rows))],
        [*values, *record.summaries],
    )
    axes.tick_params(axis="y", labelcolor=theme.ink, labelsize=10)
    axes.set_ylim(rows - 0.2, -0.6)
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    return figure


def _interval(
    axes: Any, row: float, value: float, interval: Any, note: str, metric: str, theme: Theme
) -> None:
    """Draw a bar's interval as a whisker and write the numbers at the right."""
    label = interval_text(interval, metric)
    if label:
        axes.plot(interval, [row, row], color=theme.ink, linewidth=1.5, solid_capstyle="butt")
        axes.plot(interval, [row, row], "|", color=theme.ink, markersize=7, markeredgewidth=1.5)
    at_right = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    axes.annotate(
        metric_text(value, metric), (1, row), xytext=(10, 0), fontsize=10, weight="bold", **at_right
    )
    axes.annotate(label, (1, row), xytext=(54, 0), fontsize=9.5, color=theme.muted, **at_right)
    if note:
        axes.annotate(
            note,
            (0, row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=theme.ink,
            bbox={"facecolor": theme.page, "edgecolor": "none", "alpha": 0.85, "pad": 1.6},
        )


def _ranked_results(record: RunRecord, values: dict[str, float], theme: Theme) -> "Figure":
    """Draw many sites as points from worst to best, with their intervals."""
    from matplotlib.figure import Figure

    results = record.results
    ranked = sorted(values, key=lambda site: values[site])
    figure = Figure(figsize=(FIGURE_WIDTH, 4.2))
    axes = figure.subplots()
    axes.set_title(
        f"Test: {metric_label(record.headline)} of {counted(len(values), 'site')}, from worst to best, "
        "with 95 % intervals"
    )
    worst = record.worst_site
    for place, site in enumerate(ranked, start=1):
        interval = results[site]["intervals"].get(record.headline)
        held_out = results[site]["role"] == "held_out"
        colour = theme.warning if site == worst else theme.accent
        if interval_text(interval, record.headline):
            axes.plot([place, place], interval, color=colour, alpha=0.55, linewidth=1.8)
        axes.plot(
            [place],
            [values[site]],
            "o",
            color=colour,
            markersize=5,
            markerfacecolor=theme.page if held_out else colour,
        )
    for site, dx, align in ((ranked[0], 8, "left"), (ranked[-1], -8, "right")):
        axes.annotate(
            f"{site} {metric_text(values[site], record.headline)}",
            (ranked.index(site) + 1, values[site]),
            xytext=(dx, -12 if site == ranked[0] else 12),
            textcoords="offset points",
            ha=align,
            fontsize=9.5,
            weight="bold",
        )
    for (label, summary), style in zip(record.summaries.items(), ((0, (2, 2)), "-"), strict=False):
        value = summary.metrics.get(record.headline)
        if is_number(value):
            text = f"{label} {metric_text(value, record.headline)}"
            axes.axhline(value, color=theme.ink, linewidth=1.2, linestyle=style, label=text, zorder=1)
    if any(results[site]["role"] == "held_out" for site in ranked):
        axes.plot(
            [], [], "o", color=theme.accent, markerfacecolor=theme.page, label="held-out site", markersize=5
        )
    axes.set_xlim(0, len(ranked) + 1)
    axes.set_xticks([])
    axes.set_xlabel("sites")
    figure.legend(loc="outside lower left", ncols=3)
    return figure


def froc_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """Draw sensitivity against false positives an image on test data, by site.

    Returns:
        The figure; None where the test has no such metrics.
    """
    from matplotlib.figure import Figure

    curves = {site: sensitivities(result["metrics"]) for site, result in record.results.items()}
    curves = known_series(curves, record)
    pooled = sensitivities(record.summaries[POOLED].metrics) if POOLED in record.summaries else {}
    if not curves and not pooled:
        return None
    figure = Figure(figsize=(FIGURE_WIDTH, 4.0))
    axes = figure.subplots()
    axes.set_title("Test: sensitivity against false positives per image (FROC)")
    rates = sorted({rate for curve in (*curves.values(), pooled) for rate in curve})
    place = {rate: position for position, rate in enumerate(rates)}
    draw_sites(
        axes,
        {site: {place[rate]: value for rate, value in curve.items()} for site, curve in curves.items()},
        record,
        theme,
    )
    if pooled:
        axes.plot(
            [place[rate] for rate in pooled if rate in place],
            [value for rate, value in pooled.items() if rate in place],
            color=theme.ink,
            linewidth=2.6,
            label=POOLED,
        )
    axes.set_xticks(range(len(rates)), [rate_label(rate) for rate in rates])
    axes.set_xlabel("false positives per image")
    axes.set_ylim(0, 1.02)
    figure.legend(loc="outside lower left", ncols=7, columnspacing=1.6)
    return figure


def sensitivities(metrics: Mapping[str, Any]) -> dict[float, float]:
    """Return sensitivity over classes by false positives an image, from the metrics of a site."""
    found = {false_positives(name): value for name, value in metrics.items() if "/" not in name}
    return {
        rate: float(value)
        for rate, value in sorted(found.items(), key=lambda item: item[0] or 0.0)
        if rate is not None and is_number(value)
    }
