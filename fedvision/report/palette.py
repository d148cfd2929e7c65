"""Colours and the look of figures, for light and dark pages.

A site has one colour and one marker in every figure and table of a report. The eight site colours stay
apart for protan, deutan and tritan eyes (simulated after Machado et al. 2009, severity 1) and stand out
from the page; markers and labels repeat what colour says.
"""

import io
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
MANY_SITES = 9
"""From this many sites on, a figure shows the spread over sites, not one line each."""

FONTS = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
PNG_DPI = 200
FIGURE_WIDTH = 10.0
"""Inches of every figure: text keeps one size on the page."""

CLASS_COLOURS = ("#1bd494", "#ebd23a", "#6f9bff", "#f096d6", "#ee6024", "#d3eef7", "#bd6c48", "#9aa0a6")
MISSED_COLOUR = "#4aa3ff"
EXTRA_COLOUR = "#ff8a1f"
CONFUSED_COLOUR = "#e36bd0"


@dataclass(frozen=True)
class Theme:
    """The colours of a light or a dark page.

    Attributes:
        page: Background.
        ink: Text and the lines that matter most.
        muted: Axis labels and notes.
        rule: Grid and axis lines.
        fill: Areas such as bands and neutral bars.
        accent: The one colour that stands for the federation.
        warning: The one colour that says "look here", for the worst site.
        sites: Colours of sites, in order.
        ramp: Two ends of the heat map, low to high.
    """

    page: str
    ink: str
    muted: str
    rule: str
    fill: str
    accent: str
    warning: str
    sites: tuple[str, ...]
    ramp: tuple[str, ...]


LIGHT = Theme(
    page="#ffffff",
    ink="#15191e",
    muted="#5c6670",
    rule="#dfe3e8",
    fill="#c9d3df",
    accent="#1e68c8",
    warning="#c8401c",
    sites=("#1e68c8", "#c8401c", "#12a870", "#b868a8", "#d98a0e", "#16275f", "#5e2015", "#77716f"),
    ramp=("#f7f2ea", "#bcd3e8", "#5d97d2", "#1e5cb0", "#123a78"),
)
DARK = Theme(
    page="#12161b",
    ink="#eceff3",
    muted="#9aa5b1",
    rule="#2b323a",
    fill="#3a4653",
    accent="#5585ea",
    warning="#ee6024",
    sites=("#5585ea", "#ee6024", "#1bd494", "#f096d6", "#ebd23a", "#d3eef7", "#bd6c48", "#858a90"),
    ramp=("#1d242c", "#22405f", "#2f66a3", "#5b9be0", "#b9dcff"),
)


def site_colours(sites: Iterable[str], theme: Theme) -> dict[str, str]:
    """Return the colour of every site; after eight sites the colours start again."""
    return dict(zip(sites, itertools.cycle(theme.sites), strict=False))


def site_markers(sites: Iterable[str]) -> dict[str, str]:
    """Return the marker of every site; after eight sites the markers start again."""
    return dict(zip(sites, itertools.cycle(MARKERS), strict=False))


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        "figure.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "axes.edgecolor": theme.rule,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": theme.rule,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.color": theme.ink,
        "text.parse_math": False,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "legend.handlelength": 1.6,
        "font.family": ["DejaVu Sans"],
        "lines.solid_capstyle": "round",
        "svg.fonttype": "none",
        "svg.hashsalt": "fedvision",
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.w_pad": 0.12,
        "figure.constrained_layout.h_pad": 0.1,
    }


def render(draw: Callable[[Theme], "Figure | None"], theme: Theme, kind: str) -> bytes | None:
    """Draw a figure in a theme and return the file's bytes.

    Args:
        draw: Makes the figure, or None where there is nothing to show.
        theme: Colours of the page.
        kind: "png" (``PNG_DPI``) or "svg" (text stays text, in the fonts of the page).

    Returns:
        The bytes, the same for the same figure; None where ``draw`` gave none.
    """
    import matplotlib

    with matplotlib.rc_context(_settings(theme)):
        figure = draw(theme)
        if figure is None:
            return None
        content = io.BytesIO()
        if kind == "svg":
            figure.savefig(content, format="svg", metadata={"Date": None})
            svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", FONTS, content.getvalue().decode())
            return svg.encode()
        figure.savefig(content, format="png", dpi=PNG_DPI, metadata={"Software": None})
        return content.getvalue()
