"""One look at the data of several sites: cases with their labels, intensities, and how large labels are.

The picture is for the person who holds the data: it shows images, and nothing of it is ever sent. A row
is a site; the grey lines in a row are the other sites.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedvision.data.facts import CaseFacts
from fedvision.data.images import read_raw
from fedvision.data.manifest import SPLITS, Manifest
from fedvision.data.preprocessing import to_ras
from fedvision.errors import DataError
from fedvision.report.overview_table import label_sizes, label_unit
from fedvision.report.palette import CLASS_COLOURS, DARK, Theme, render, site_colours
from fedvision.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_CASES = 4
SHOWN_SITES = 16
_WIDTH, _ROW, _HEAD, _FOOT = 13.0, 1.95, 0.55, 0.55
_MAX_PIXELS = 400


def _chosen(facts: Sequence[CaseFacts]) -> list[CaseFacts]:
    """Return a few cases from few labels to many, those without any last in line."""
    known = [one for one in facts if one.problem is None]
    labelled = sorted((one for one in known if any(one.class_sizes)), key=lambda one: sum(one.class_sizes))
    pool = labelled if len(labelled) >= SHOWN_CASES else labelled + [o for o in known if o not in labelled]
    if len(pool) <= SHOWN_CASES:
        return pool
    return [pool[round(share * (len(pool) - 1))] for share in np.linspace(0.15, 0.95, SHOWN_CASES)]


def _best_slice(mask: NDArray[np.uint8]) -> int:
    """Return the index along the last axis where most of every class is seen."""
    share = np.zeros(mask.shape[2])
    for label in range(1, int(mask.max()) + 1):
        areas = (mask == label).sum((0, 1))
        share += areas / max(int(areas.sum()), 1)
    return int(share.argmax()) if share.any() else mask.shape[2] // 2


def _stretched(image: NDArray[Any]) -> NDArray[np.float32]:
    """Return an image (C, *S) for showing, in 0..1: shape (*S, 3) where C is 3, else (*S)."""
    shown = np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]
    values = shown.astype(np.float32)
    sparse = values[tuple(slice(None, None, 1 + n // 256) for n in shown.shape)]
    low, high = np.nanpercentile(sparse, (0.5, 99.5))
    return np.clip((values - low) / max(float(high - low), 1e-6), 0, 1)


def _slice(volume: NDArray[Any], index: int) -> NDArray[Any]:
    """Return a slice along the last axis with the first axis to the right and the second one up."""
    return np.flip(volume[:, :, index].swapaxes(0, 1), axis=0)


def _class_colour(label: int) -> str:
    return CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]


def _draw_mask(axes: Any, mask: NDArray[np.uint8]) -> None:
    rows, columns = mask.shape
    for label in range(1, int(mask.max()) + 1):
        inside = mask == label
        if inside.any() and not inside.all():
            x, y = np.arange(columns) + 0.5, np.arange(rows) + 0.5
            axes.contour(
                x, y, inside.astype(np.float32), levels=[0.5], colors=[_class_colour(label)], linewidths=1.0
            )


def _draw_case(axes: Any, manifest: Manifest, facts: CaseFacts) -> None:
    """Show one case: a picture as it is; a volume in the slice with most of its labels."""
    from matplotlib.patches import Rectangle

    case = facts.case
    axes.set_axis_off()
    try:
        raw = read_raw(manifest, case)
    except DataError:
        return
    image, mask, ratio = _stretched(raw.image), raw.label, 1.0
    boxes = np.array(case.boxes or ()).reshape(-1, 2 * manifest.spatial_dims)
    labels = np.array(case.box_labels or (), dtype=int)
    if manifest.spatial_dims == 3:
        spacing = facts.spacing_mm
        if mask is not None and raw.affine is not None:
            turned, mask, affine = to_ras(raw.image, mask, raw.affine)
            image = _stretched(turned)
            spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0))
        index = image.shape[2] // 2
        if mask is not None and mask.any():
            index = _best_slice(mask)
        elif len(boxes):
            index = int(np.clip((boxes[0, 2] + boxes[0, 5]) / 2, 0, image.shape[2] - 1))
        meets = (boxes[:, 2] <= index + 0.5) & (boxes[:, 5] >= index + 0.5) if len(boxes) else []
        height = image.shape[1]
        boxes = np.array([(b[0], height - b[4], b[3], height - b[1]) for b in boxes[meets]]).reshape(-1, 4)
        labels, ratio = labels[meets], spacing[1] / spacing[0]
        image = _slice(image, index)
        mask = None if mask is None else _slice(mask, index)
    step = 1 + (max(image.shape[:2]) - 1) // _MAX_PIXELS
    image, boxes = image[::step, ::step], boxes / step
    rows, columns = image.shape[:2]
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(0, columns, rows, 0), aspect=ratio)
    if mask is not None:
        _draw_mask(axes, mask[::step, ::step])
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=_class_colour(label), linewidth=1.0)
        )
    name = case.id if len(case.id) <= 22 else f"{case.id[:10]}…{case.id[-10:]}"
    axes.set_title(name, fontsize=7.5, fontweight="normal", pad=3, parse_math=False, color=DARK.muted)


def _histogram_bins(facts: Mapping[str, Sequence[CaseFacts]]) -> tuple[NDArray[np.float64], bool]:
    """Return edges that every site's intensities fit, and whether they are logarithmic.

    Scanners whose scales are far apart, such as 0..100 and 0..100 000, share only a logarithmic axis.
    """
    known = [one.percentiles for many in facts.values() for one in many if one.problem is None]
    if not known:
        return np.linspace(0, 1, 2), False
    low, high = min(p[0] for p in known), max(p[2] for p in known)
    tops = [
        float(np.median([o.percentiles[2] for o in many if o.problem is None] or [high]))
        for many in facts.values()
    ]
    if low >= 0 and min(tops) > 0 and max(tops) / min(tops) > 20:
        return np.geomspace(max(min(tops) / 50, 1e-6), high * 1.1, 61), True
    pad = 0.03 * (high - low) or 1.0
    return np.linspace(low - pad, high + pad, 61), False


def _densities(facts: Sequence[CaseFacts], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of a site's pixels in each bin, every case counting alike."""
    shares = [
        np.histogram(np.clip(one.intensities, edges[0], edges[-1]), edges)[0] / max(len(one.intensities), 1)
        for one in facts
        if one.problem is None
    ]
    return np.mean(shares, axis=0) if shares else np.zeros(len(edges) - 1)


def _short(value: float) -> str:
    """Return a number with k or M, for an axis."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _make_log(axes: Any, limits: tuple[float, float]) -> None:
    """Make the x axis logarithmic, its numbers in plain digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = np.log10(limits[1] / limits[0])
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _draw_intensities(
    axes: Any,
    site: str,
    shares: Mapping[str, NDArray[np.float64]],
    edges: NDArray[np.float64],
    is_log: bool,
    colour: str,
) -> None:
    # A large background would flatten all else: the scale follows the second highest bins.
    top = max(float(np.sort(one)[-3]) for one in shares.values()) * 1.15 or 1.0
    for other, share in shares.items():
        if other != site:
            axes.stairs(share, edges, color=DARK.fill, linewidth=0.8)
    axes.stairs(shares[site], edges, color=colour, fill=True, alpha=0.35)
    axes.stairs(shares[site], edges, color=colour, linewidth=1.2)
    axes.set_ylim(0, top)
    axes.set_xlim(edges[0], edges[-1])
    if is_log:
        _make_log(axes, (edges[0], edges[-1]))
    axes.set_yticks([])
    axes.grid(visible=False)


def _draw_labels(
    axes: Any, manifest: Manifest, sizes: NDArray[np.float64], limits: tuple[float, float]
) -> None:
    """Draw the size of each class: a dot a case and the median, or the number of boxes an image."""
    positions = np.arange(len(manifest.classes))[::-1]
    is_boxes = manifest.task == "detection"
    for number, position in enumerate(positions):
        colour, of_class = _class_colour(number + 1), sizes[:, number]
        if is_boxes:
            mean = of_class.mean() if len(of_class) else 0.0
            axes.barh(position, mean, color=colour, height=0.55)
            axes.annotate(
                f" {int(of_class.sum())}",
                (mean, position),
                va="center",
                fontsize=8,
                color=DARK.ink,
                parse_math=False,
            )
            continue
        present = of_class[of_class > 0]
        spread = 0.22 * np.sin(np.arange(len(present)) * 2.4)
        axes.scatter(present, position + spread, s=9, color=colour, alpha=0.65, linewidths=0)
        if present.size:
            middle = float(np.median(present))
            axes.plot([middle, middle], [position - 0.36, position + 0.36], color=DARK.ink, linewidth=1.4)
        if present.size < len(of_class):
            axes.annotate(
                f"none in {len(of_class) - present.size}",
                (1.0, position + 0.36),
                xycoords=("axes fraction", "data"),
                ha="right",
                fontsize=7,
                color=DARK.muted,
            )
    axes.set_yticks(positions, [name[:18] for name in manifest.classes], fontsize=8, parse_math=False)
    axes.set_ylim(-0.6, len(positions) - 0.4)
    axes.set_xlim(*limits)
    if not is_boxes:
        _make_log(axes, limits)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")


def _label_limits(sizes: Mapping[str, NDArray[np.float64]], is_boxes: bool) -> tuple[float, float]:
    """Return the axis that all sites share."""
    if is_boxes:
        return 0.0, 1.25 * max([1e-3, *(float(one.mean(0).max()) for one in sizes.values() if one.size)])
    positive = np.concatenate([one[one > 0] for one in sizes.values()] or [np.ones(1)])
    if not positive.size:
        return 0.1, 10.0
    return float(positive.min()) / 1.5, float(positive.max()) * 1.5


def overview_figure(
    manifests: Mapping[str, Manifest], facts: Mapping[str, Sequence[CaseFacts]], theme: Theme
) -> "Figure":
    """Draw the overview: a row a site, at most ``SHOWN_SITES``.

    Args:
        manifests: By site; of one task.
        facts: Of all or some cases of each site.
        theme: Colours.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    sites = list(manifests)[:SHOWN_SITES]
    first = manifests[sites[0]]
    colours = site_colours(manifests, theme)
    total = _HEAD + _ROW * len(sites) + _FOOT
    figure = Figure(figsize=(_WIDTH, total), facecolor=theme.page)
    figure.set_layout_engine("none")
    grid = figure.add_gridspec(
        len(sites),
        SHOWN_CASES + 2,
        width_ratios=(*[1.0] * SHOWN_CASES, 1.45, 1.45),
        left=0.105,
        right=0.985,
        top=1 - _HEAD / total,
        bottom=_FOOT / total,
        hspace=0.30,
        wspace=0.10,
    )
    edges, is_log = _histogram_bins({site: facts[site] for site in sites})
    shares = {site: _densities(facts[site], edges) for site in sites}
    sizes = {site: label_sizes(manifests[site], facts[site]) for site in sites}
    unit = label_unit(first, facts[sites[0]])
    limits = _label_limits(sizes, unit == "boxes")
    for row, site in enumerate(sites):
        manifest, is_last = manifests[site], row == len(sites) - 1
        panels = [figure.add_subplot(grid[row, column]) for column in range(SHOWN_CASES + 2)]
        for panel in panels[:SHOWN_CASES]:
            panel.set_axis_off()
        for panel, one in zip(panels, _chosen(facts[site]), strict=False):
            _draw_case(panel, manifest, one)
        _draw_intensities(panels[-2], site, shares, edges, is_log, colours[site])
        _draw_labels(panels[-1], manifest, sizes[site], limits)
        for panel, left in ((panels[-2], 0.012), (panels[-1], 0.055)):
            place = panel.get_position()
            panel.set_position((place.x0 + left, place.y0, place.width - left, place.height))
            panel.tick_params(labelsize=8, labelbottom=is_last, which="both")
        if row == 0:
            panels[-2].set_title("intensity, share of pixels", fontsize=9)
            title = "boxes an image, total" if unit == "boxes" else f"label, {unit}"
            panels[-1].set_title(title, fontsize=9)
        place = panels[0].get_position()
        counts = " / ".join(str(len(manifest.in_split(split))) for split in SPLITS)
        name = site if len(site) <= 17 else f"{site[:8]}…{site[-8:]}"
        at: dict[str, Any] = {"x": 0.008, "va": "center", "parse_math": False}
        middle = (place.y0 + place.y1) / 2
        figure.text(
            y=middle + 0.16 / total,
            s=name,
            fontsize=10.5 if len(name) <= 12 else 8.5,
            weight="bold",
            color=colours[site],
            **at,
        )
        figure.text(
            y=middle - 0.07 / total, s=f"{len(manifest.cases)} cases", fontsize=8.5, color=theme.ink, **at
        )
        figure.text(y=middle - 0.27 / total, s=counts, fontsize=8.5, color=theme.muted, **at)
    figure.legend(
        [
            Line2D([], [], color=_class_colour(number), linewidth=1.6)
            for number in range(1, len(first.classes) + 1)
        ],
        list(first.classes),
        loc="upper left",
        bbox_to_anchor=(0.1, 1 - 0.04 / total),
        ncols=len(first.classes),
        fontsize=9,
        labelcolor=theme.ink,
        frameon=False,
    )
    more = f"; {len(manifests) - len(sites)} more sites are not shown" if len(manifests) > len(sites) else ""
    note = f"below each site: cases in train / val / test; grey lines: the other sites{more}"
    figure.text(0.008, 0.12 / total, note, fontsize=8, color=theme.muted, va="center")
    return figure


def write_overview(
    manifests: Mapping[str, Manifest], facts: Mapping[str, Sequence[CaseFacts]], path: Path
) -> None:
    """Write the overview of several sites as a PNG.

    Raises:
        StorageError: The file cannot be written.
    """
    content = render(lambda theme: overview_figure(manifests, facts, theme), DARK, "png")
    assert content is not None, "the overview always has a figure"
    write_atomic(path, content)
