"""The dark figure that example pictures are drawn on: panels, captions, PNG."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvision.config import Job
from fedvision.report.notation import MISSING, metric_label, metric_text, split_metric
from fedvision.report.palette import CLASS_COLOURS, CONFUSED_COLOUR, EXTRA_COLOUR, MISSED_COLOUR
from fedvision.tasks import CaseResult

PAGE = "#0e1216"
INK = "#eef2f6"
MUTED = "#98a4b0"
DASHES = (0, (2.2, 1.4))

_DPI = 120
_WIDTH = 9.6
_SHOWN_CLASSES = 12

_MARKS = (PAGE, INK, MUTED, *CLASS_COLOURS, MISSED_COLOUR, EXTRA_COLOUR, CONFUSED_COLOUR)

Picture = NDArray[Any]
Entry = tuple[Any, str]


def display_range(image: Picture) -> tuple[float, float]:
    """Return the 0.5th and 99.5th percentile of an image of any shape, from a sparse grid of its values."""
    sparse = image[tuple(slice(None, None, 1 + n // 200) for n in image.shape)]
    low, high = np.percentile(sparse, (0.5, 99.5))
    return float(low), float(high)


def stretch(image: Picture, shown: tuple[float, float]) -> Picture:
    """Stretch the values in ``shown`` to 0..1 and cut off the others."""
    stretched: Picture = np.clip((image - shown[0]) / max(shown[1] - shown[0], 1e-6), 0, 1)
    return stretched


def picture_of(image: Picture) -> Picture:
    """Return a picture to show: colour, shape (rows, cols, 3), of 3 channels, else its first channel.

    Args:
        image: Shape (C, rows, cols).
    """
    chosen = np.moveaxis(image, 0, -1) if image.shape[0] == 3 else image[0]
    return stretch(chosen, display_range(chosen))


def class_colour(label: int) -> str:
    """Return the colour of class ``label``, 1 is the first."""
    return CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]


def class_entries(result: CaseResult, job: Job, present: Sequence[int]) -> list[Entry]:
    """Return the caption's entry of every class of a case: its colour, its name, and its numbers."""
    entries = []
    for label in list(present or [1])[:_SHOWN_CLASSES]:
        name = job.task.classes[label - 1]
        numbers = []
        for key, value in result.values.items():
            base, of_class = split_metric(key)
            if of_class == name and job.task.kind == "segmentation" and metric_text(value, base) != MISSING:
                unit = " mm" if base.endswith("_mm") else ""
                numbers.append(f"{metric_label(base).removesuffix(' (mm)')} {metric_text(value, base)}{unit}")
        entries.append((square(class_colour(label)), f"{name}: {', '.join(numbers)}" if numbers else name))
    return entries


def square(colour: str) -> Any:
    """Return a caption's mark for an area."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="none")


def line(colour: str, style: Any) -> Any:
    """Return a caption's mark for an outline."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, linewidth=1.6)


def make_panels(
    shape: tuple[int, int], aspect: float, title: str, score: str, captions: Sequence[Sequence[Entry]]
) -> tuple[Any, list[Any]]:
    """Return a dark figure with a title, a grid of empty panels and captions below.

    Args:
        shape: Rows and columns of panels.
        aspect: Height of a panel by its width; kept between 0.4 and 1.25.
        title: At the left above the panels.
        score: At the right above the panels.
        captions: Lines below the panels; a line that is too long goes on in the next.

    Returns:
        The figure, and the panels in reading order.
    """
    from matplotlib.figure import Figure

    rows, columns = shape
    margin, gap, head, above, line_height = 0.14, 0.1, 0.33, 0.22, 0.21
    width = (_WIDTH - 2 * margin - (columns - 1) * gap) / columns
    height = width * min(max(aspect, 0.4), 1.25)
    wrapped = [part for caption in captions for part in _wrapped(caption)]
    total = head + rows * (above + height) + 0.12 + line_height * len(wrapped) + 0.06
    figure = Figure(figsize=(_WIDTH, total), dpi=_DPI, facecolor=PAGE)
    text: dict[str, Any] = {"va": "top", "color": INK, "parse_math": False}
    figure.text(margin / _WIDTH, 1 - 0.11 / total, title, fontsize=11, weight="bold", **text)
    figure.text(1 - margin / _WIDTH, 1 - 0.11 / total, score, fontsize=11, ha="right", **text)
    for number, entries in enumerate(wrapped, start=1):
        _write_caption(
            figure, entries, (margin / _WIDTH, (0.06 + line_height * (len(wrapped) - number)) / total)
        )
    panels = []
    for row in range(rows):
        low = total - head - (row + 1) * (above + height)
        for column in range(columns):
            left = margin + column * (width + gap)
            axes = figure.add_axes((left / _WIDTH, low / total, width / _WIDTH, height / total))
            axes.set_axis_off()
            panels.append(axes)
    return figure, panels


def _wrapped(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Break a caption into lines of at most about 120 characters."""
    lines: list[list[Entry]] = [[]]
    for entry in entries:
        length = sum(len(text) + 5 for _, text in (*lines[-1], entry))
        if lines[-1] and length > 120:
            lines.append([])
        lines[-1].append(entry)
    return lines


def _write_caption(figure: Any, entries: Sequence[Entry], at: tuple[float, float]) -> None:
    legend = figure.legend(
        [handle for handle, _ in entries],
        [text for _, text in entries],
        loc="lower left",
        bbox_to_anchor=at,
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.5,
        handleheight=0.75,
        columnspacing=1.6,
        handletextpad=0.5,
        borderpad=0,
        borderaxespad=0,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def show(axes: Any, picture: Picture, caption: str, ratio: float = 1.0) -> None:
    """Show a picture in a panel, its first row at the top, with its corner at (0, 0).

    Args:
        axes: The panel.
        picture: Grey, shape (rows, cols), or colour, shape (rows, cols, 3), in 0..1.
        caption: Above the panel.
        ratio: Height of a pixel by its width.
    """
    rows, columns = picture.shape[:2]
    extent = (0, columns, rows, 0)
    axes.imshow(
        picture, cmap="gray", vmin=0, vmax=1, extent=extent, aspect=ratio, interpolation="antialiased"
    )
    axes.set_title(caption, color=MUTED, fontsize=9, loc="left", pad=4, parse_math=False)


def png_bytes(figure: Any) -> bytes:
    """Return the figure as a PNG of 256 colours: a third of the size, and the marks keep their colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    picture = Image.fromarray(pixels)
    marks = [int(colour[at : at + 2], 16) for colour in _MARKS for at in (1, 3, 5)]
    sparse = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.NEAREST)
    common = sparse.quantize(256 - len(_MARKS), Image.Quantize.MEDIANCUT).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette(common[: 768 - len(marks)] + marks)
    file = io.BytesIO()
    picture.quantize(palette=palette, dither=Image.Dither.NONE).save(file, "png", compress_level=5)
    return file.getvalue()


def cut(volume: Picture, axis: int, index: int) -> Picture:
    """Return a slice of a volume with its first axis to the right and its second one up."""
    plane = np.take(volume, index, axis=axis)
    turned: Picture = np.flip(plane.swapaxes(0, 1), axis=0)
    return turned


def zoom(axes: Any, shape: tuple[int, ...], low: Picture, high: Picture) -> None:
    """Zoom to a region with room around it: three times its size, at least 40 % of the slice, a full panel.

    Args:
        axes: The panel, as ``show`` left it.
        shape: Rows and columns of the slice.
        low: First column and row of the region.
        high: Last column and row of the region.
    """
    size = np.array([shape[1], shape[0]], dtype=float)
    side = np.minimum(np.maximum(3.0 * (high - low), 0.4 * size), size)
    figure, panel = axes.get_figure(), axes.get_position(original=True)
    height_by_width = panel.height * figure.get_figheight() / (panel.width * figure.get_figwidth())
    columns_by_row = axes.get_aspect() / height_by_width
    side = np.maximum(side, (side[1] * columns_by_row, side[0] / columns_by_row))
    start = np.where(side > size, (size - side) / 2, np.clip((low + high - side) / 2, 0, size - side))
    axes.set_xlim(start[0], start[0] + side[0])
    axes.set_ylim(start[1] + side[1], start[1])
