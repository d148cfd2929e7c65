"""The figures of a run: learning curves, clipping, results per site, FROC.

A figure shows one line or bar a site up to eight sites; from ``palette.MANY_SITES`` on it shows the
spread over sites and points at the worst one. The run folder keeps PNG files of the light theme; the
report draws the same figures as SVG in both themes.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvision.report.lines import draw_sites, known_series
from fedvision.report.notation import is_number, metric_label, metric_text
from fedvision.report.outcome import froc_figure, results_figure
from fedvision.report.palette import FIGURE_WIDTH, LIGHT, MANY_SITES, Theme, render
from fedvision.report.record import RunRecord, read_run
from fedvision.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_FLAT = 0.02


def _style_rounds(axes: Any, first: float, last: float) -> None:
    """Set up an axis of rounds: whole numbers, air around a single one."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    if last - first <= 12:
        axes.set_xticks(range(int(first), int(last) + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    pad = 0.5 if last - first < 3 else 0.02 * (last - first)
    axes.set_xlim(first - pad, last + pad)


def curves_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """Draw the headline on validation data and the training loss over the rounds.

    Returns:
        The figure; None where no site has trained yet.
    """
    from matplotlib.figure import Figure

    scores = {site: record.series(record.validate, site, record.headline) for site in record.sites}
    losses, scores = known_series(record.losses(), record), known_series(scores, record)
    is_judged = any(record.validation(number)[0] is not None for number in record.rounds)
    if not losses and not scores and not is_judged and not record.mean_losses():
        return None
    last = max([1, *record.train, *record.rounds])
    figure = Figure(figsize=(FIGURE_WIDTH, 4.3))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    left.set_title(f"Validation: {metric_label(record.headline)}")
    right.set_title("Training loss")
    if scores or is_judged:
        draw_sites(left, scores, record, theme, median=False)
        _draw_summary(left, record, theme)
    else:
        left.text(0.5, 0.5, "no validation yet", transform=left.transAxes, ha="center", color=theme.muted)
    if losses:
        draw_sites(right, losses, record, theme)
    means = record.mean_losses()
    if means:
        marker = "o" if len(means) == 1 else None
        right.plot(
            list(means),
            list(means.values()),
            color=theme.ink,
            linewidth=2.6,
            marker=marker,
            label="mean of sites",
        )
    for axes in (left, right):
        _style_rounds(axes, min(record.train, default=1), last)
    named = {label: handle for axes in (right, left) for handle, label in _legend_entries(axes)}
    handles, labels = list(named.values()), list(named)
    figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 7), columnspacing=1.6)
    return figure


def _legend_entries(axes: Any) -> list[tuple[Any, str]]:
    handles, labels = axes.get_legend_handles_labels()
    return list(zip(handles, labels, strict=True))


def _draw_summary(axes: Any, record: RunRecord, theme: Theme) -> None:
    """Draw the mean over sites, the worst site of each round, and mark the round whose model was kept."""
    found = {number: record.validation(number) for number in record.rounds}
    means = {number: mean for number, (mean, _, _) in found.items() if mean is not None}
    worst = {number: lowest for number, (_, _, lowest) in found.items() if lowest is not None}
    marker = "o" if len(means) == 1 else None
    if means:
        axes.plot(
            list(means),
            list(means.values()),
            color=theme.ink,
            linewidth=2.6,
            marker=marker,
            label="mean of sites",
        )
    if worst:
        axes.plot(
            list(worst),
            list(worst.values()),
            color=theme.warning if len(record.validate.get(max(worst), {})) >= MANY_SITES else theme.ink,
            linewidth=1.4,
            linestyle=(0, (2, 2)),
            marker="o" if len(worst) == 1 else None,
            markersize=9,
            markerfacecolor="none",
            label="worst site",
        )
    pooled = {number: record.pooled(number) for number in means} if record.agreement else {}
    pooled = {number: value for number, value in pooled.items() if value is not None}
    if pooled:
        axes.plot(
            list(pooled),
            list(pooled.values()),
            color=theme.ink,
            linewidth=1.4,
            linestyle=(0, (2, 2)),
            marker=marker,
            label="all cases pooled",
        )
    low, high = axes.get_ylim()
    if means and high - low < _FLAT:  # equal values: the axis would show their last digits
        axes.set_ylim((low + high - _FLAT) / 2, (low + high + _FLAT) / 2)
    best = record.best_round
    if best in means and best is not None:
        axes.axvline(best, color=theme.muted, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
        axes.plot([best], [means[best]], "o", markersize=9, markerfacecolor="none", color=theme.ink)
        late = best > (min(means) + max(means)) / 2
        axes.annotate(
            f"kept: round {best}, mean {metric_text(means[best], record.headline)}",
            (best, 0.05),
            xycoords=("data", "axes fraction"),
            xytext=(-7 if late else 7, 0),
            textcoords="offset points",
            ha="right" if late else "left",
            fontsize=9.5,
            color=theme.ink,
            bbox={"facecolor": theme.page, "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )


def clipping_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """Draw the norm of the updates before clipping against the clip norm, and the share that was kept.

    Returns:
        The figure; None where no site's own record is on this machine.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    norms = {site: _of_log(log, "norm_before") for site, log in record.clipping.items()}
    kept = {site: _of_log(log, "share_kept") for site, log in record.clipping.items()}
    norms, kept = known_series(norms, record), known_series(kept, record)
    if not norms:
        return None
    numbers = sorted({number for values in norms.values() for number in values})
    clip_norm = record.job.aggregation.clip_norm
    figure = Figure(figsize=(FIGURE_WIDTH, 3.9))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    left.set_title("Size of the updates before clipping (L2 norm)")
    draw_sites(left, norms, record, theme)
    left.axhline(clip_norm, color=theme.ink, linewidth=1.4, linestyle=(0, (5, 2)), label="clip norm")
    left.set_ylim(0)
    largest = max(value for values in norms.values() for value in values.values())
    if largest > 30 * clip_norm:
        left.set_yscale("log")
        left.set_ylim(min(clip_norm, *(min(values.values()) for values in norms.values())) / 2)
    elif largest < clip_norm:
        left.set_ylim(0, 1.08 * clip_norm)
    right.set_title("Share of the update kept")
    draw_sites(right, kept, record, theme)
    right.set_ylim(0, 1.04)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    for axes in (left, right):
        _style_rounds(axes, numbers[0], numbers[-1])
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 9), columnspacing=1.6)
    return figure


def _of_log(log: Mapping[int, Mapping[str, Any]], key: str) -> dict[float, float]:
    return {number: float(entry[key]) for number, entry in log.items() if is_number(entry.get(key))}


FIGURES = {
    "curves": curves_figure,
    "results": results_figure,
    "froc": froc_figure,
    "clipping": clipping_figure,
}


def save_figures(run_dir: Path) -> dict[str, Path]:
    """Draw every figure that the run has data for, as PNG files in ``run_dir/figures``.

    Returns:
        The files by name: curves, results, froc, clipping.

    Raises:
        ConfigError: This is not a run folder.
        StorageError: A record is damaged, or the disk is full.
    """
    record = read_run(run_dir)
    return save_record_figures(record)


def save_record_figures(record: RunRecord) -> dict[str, Path]:
    """Draw the figures of a run that was read already, see ``save_figures``."""
    saved: dict[str, Path] = {}
    for name, draw in FIGURES.items():
        content = render(functools.partial(draw, record), LIGHT, "png")
        if content is not None:
            saved[name] = record.folder / "figures" / f"{name}.png"
            write_atomic(saved[name], content)
    return saved
