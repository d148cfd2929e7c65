"""Values of many sites as lines: one line a site, or from ``palette.MANY_SITES`` on the spread over sites."""

from typing import Any

import numpy as np

from fedvision.report.palette import MANY_SITES, Theme, site_colours, site_markers
from fedvision.report.record import RunRecord

Series = dict[str, dict[float, float]]

_MARKED_VALUES = 15


def known_series(series: Series, record: RunRecord) -> Series:
    """Return the series that have values, in the order of the sites' colours."""
    return {site: series[site] for site in record.sites if series.get(site)}


def draw_sites(axes: Any, series: Series, record: RunRecord, theme: Theme, median: bool = True) -> None:
    """Draw one line a site, or the spread over sites where there are many, with or without its median."""
    if len(series) >= MANY_SITES:
        _draw_spread(axes, series, theme, median)
        return
    colours, markers = site_colours(record.sites, theme), site_markers(record.sites)
    for site, values in series.items():
        marked = len(values) <= _MARKED_VALUES
        axes.plot(
            list(values),
            list(values.values()),
            color=colours[site],
            marker=markers[site] if marked else None,
            markersize=4.5,
            linewidth=1.6,
            alpha=0.9,
            label=site,
        )


def _draw_spread(axes: Any, series: Series, theme: Theme, median: bool) -> None:
    """Draw the band from the lowest to the highest site, the middle half of the sites, and the median."""
    rounds = sorted({number for values in series.values() for number in values})
    at = [[values[number] for values in series.values() if number in values] for number in rounds]
    low, lower, middle, upper, high = (
        [float(np.quantile(values, share)) for values in at] for share in (0, 0.25, 0.5, 0.75, 1)
    )
    if len(rounds) == 1:
        rounds = [rounds[0] - 0.12, rounds[0] + 0.12]  # a band needs a width
        low, lower, middle, upper, high = (values * 2 for values in (low, lower, middle, upper, high))
    axes.fill_between(rounds, low, high, color=theme.fill, alpha=0.45, linewidth=0, label="all sites")
    axes.fill_between(rounds, lower, upper, color=theme.fill, linewidth=0, label="middle half of the sites")
    if median:
        axes.plot(rounds, middle, color=theme.accent, linewidth=1.8, label="median site")
