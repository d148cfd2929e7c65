"""What the rules said of each site's updates, round by round: a picture, and a table with the numbers."""

import functools
from typing import TYPE_CHECKING, Any

from fedvision.report.markup import Column, Markup, joined, section, table, tag, themed_picture
from fedvision.report.notation import MISSING, counted, is_number, listed
from fedvision.report.palette import DARK, FIGURE_WIDTH, LIGHT, Theme, render
from fedvision.report.record import Record, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORDS = {
    "norm": "the length of the update",
    "root_cosine": "the angle to the root set's update",
    "clones": "how much nearer its nearest neighbour is than usual",
    "opposition": "how far it goes against the others together",
    "spectral": "the direction in which the updates differ most",
    "multi_krum": "the distance to the nearest other updates (multi-Krum)",
    "geometric_median": "the distance to the geometric median",
    "nearest_neighbours": "the distance to the mean of nearest neighbours",
}


def defence_section(record: RunRecord) -> Markup:
    """Return how the rules judged the sites; nothing for a run that had none."""
    if not record.judgements:
        return Markup()
    light, dark = (render(functools.partial(defence_figure, record), theme, "svg") for theme in (LIGHT, DARK))
    rules = last_of(record)["rules"]
    named = listed([f"{rule} ({_WORDS[rule]})" if rule in _WORDS else str(rule) for rule in rules])
    intro = (
        f"Each round the server judged the updates by their norms and inner products, which is all that it "
        f"saw of them, by {named}. A score of 1 is the limit. A site above it is left out of the round's "
        "sum; evidence is kept over rounds: a site is warned, then quarantined, and a person decides then."
    )
    drawn = themed_picture("score of each site by round", light, dark) if light and dark else Markup()
    return section("Who was left out, and why", drawn, _table(record), intro=intro)


def last_of(record: RunRecord) -> Record:
    """Return the last judgement."""
    return record.judgements[max(record.judgements)]


def scores(record: RunRecord) -> dict[str, dict[int, Record]]:
    """Return what was said of each site by name and round, with ``badness``: the worst score in limits."""
    found: dict[str, dict[int, Record]] = {}
    for number, judgement in sorted(record.judgements.items()):
        for one in judgement["sites"]:
            name = str(judgement["names"].get(str(one["site"]), one["site"]))
            pairs = [
                *zip(one["scores"], judgement["limits"], strict=False),
                *zip(one["means"], judgement["mean_limits"], strict=False),
            ]
            is_held = not any(is_number(score) for score in one["scores"])  # in quarantine: not judged
            parts = [score / limit for score, limit in pairs if is_number(score) and is_number(limit)]
            parts = [] if is_held else parts
            found.setdefault(name, {})[number] = {**one, "badness": max(parts) if parts else None}
    return dict(sorted(found.items()))


def defence_figure(record: RunRecord, theme: Theme) -> "Figure | None":
    """Draw the score of each site by round; a cross is an update that was left out.

    Returns:
        The figure; None where nothing was judged.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    found = scores(record)
    if not found:
        return None
    numbers = sorted(record.judgements)
    grid = np.full((len(found), len(numbers)), np.nan)
    for row, rounds in enumerate(found.values()):
        for number, one in rounds.items():
            if is_number(one["badness"]):
                grid[row, numbers.index(number)] = min(one["badness"], 2.0)
    figure = Figure(figsize=(FIGURE_WIDTH, 1.4 + 0.3 * len(found)))
    axes = figure.subplots()
    axes.set_title("Worst score of each site, in units of its limit")
    colours = LinearSegmentedColormap.from_list("scores", [theme.ramp[0], theme.ramp[2], theme.warning])
    image = axes.imshow(grid, cmap=colours, vmin=0, vmax=2, aspect="auto")
    axes.set_yticks(range(len(found)), list(found))
    step = max(1, len(numbers) // 20)
    axes.set_xticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    axes.set_xlabel("round")
    axes.grid(visible=False)
    for row, rounds in enumerate(found.values()):
        for number, one in rounds.items():
            sign = "×" if one["excluded"] else ""
            sign = "Q" if one["excluded"] and one["badness"] is None else sign
            axes.text(numbers.index(number), row, sign, ha="center", va="center", color=theme.ink, fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_ticks([0, 1, 2], labels=["0", "1, the limit", "2 or more"])
    bar.outline.set_visible(False)
    axes.annotate(
        "× left out   Q in quarantine", (1.0, 1.02), xycoords="axes fraction", ha="right", color=theme.muted,
        fontsize=9,
    )  # fmt: skip
    return figure


def _table(record: RunRecord) -> Markup:
    rows = []
    for name, rounds in scores(record).items():
        last: Record = rounds[max(rounds)]
        out = [number for number, one in rounds.items() if one["excluded"]]
        reasons = [one["reason"] for one in rounds.values() if one["reason"]]
        rows.append(
            (
                name,
                f"{len(out)} of {len(rounds)}",
                _least(rounds, "cosine"),
                _least(rounds, "root_cosine"),
                _number(max((one["norm"] for one in rounds.values()), default=None)),
                _number(
                    max(
                        (one["badness"] for one in rounds.values() if one["badness"] is not None),
                        default=None,
                    )
                ),
                _number(last["momentum"]),
                tag("strong", last["standing"]) if last["standing"] != "good" else last["standing"],
                reasons[-1] if reasons else MISSING,
            )
        )
    columns = [
        Column("Site"),
        Column("Left out", True, "rounds"),
        Column("Least cosine", True, "with the robust centre of the updates"),
        Column("Least root cosine", True, "with the root set's update"),
        Column("Largest norm", True, "in clip norms"),
        Column("Worst score", True, "in units of its limit"),
        Column("Evidence", True, "momentum over rounds"),
        Column("Standing"),
        Column("Last reason"),
    ]
    num_out = sum(site["excluded"] for found in record.judgements.values() for site in found["sites"])
    note = f"{counted(num_out, 'update')} left out in {counted(len(record.judgements), 'round')}. "
    note += "Being left out is not a proof of an attack: look at the site's data first."
    return joined([table(columns, rows), tag("p", note, class_="note")])


def _least(rounds: dict[int, Record], key: str) -> str:
    return _number(min((one[key] for one in rounds.values() if is_number(one[key])), default=None))


def _number(value: Any) -> str:
    return f"{value:.2f}" if is_number(value) else MISSING
