"""HTML that is safe by construction, and the frame of a page that stands alone.

Guarantee: every string that is not ``Markup`` is escaped where it enters, so a site, case or reason can
have any name. A page holds its styles and pictures itself, has no script, and a policy in its head that
forbids the browser to fetch anything.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WITHOUT_END = frozenset({"img", "meta", "source", "br", "col"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its head.
        is_number: Set to the right, in figures of one width.
        note: Explains the head when the pointer rests on it.
    """

    title: str
    is_number: bool = False
    note: str = ""


def markup(value: object) -> Markup:
    """Return ``value`` as HTML: ``Markup`` as it is, everything else as escaped text."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def joined(parts: Iterable[object], between: str = "") -> Markup:
    """Return parts one after the other, with escaped text between."""
    return Markup(html.escape(between).join(markup(part) for part in parts))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """Return an element. An attribute named ``class_`` is ``class``; one that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _WITHOUT_END:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(content)}</{name}>")


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[object]],
    foot: Iterable[Sequence[object]] = (),
    caption: str = "",
) -> Markup:
    """Return a table in a frame that scrolls sideways on a narrow screen."""

    def line(cells: Sequence[object]) -> Markup:
        return tag(
            "tr",
            *(
                tag("td", cell, class_="number" if column.is_number else None)
                for column, cell in zip(columns, cells, strict=True)
            ),
        )

    head = tag(
        "tr",
        *(
            tag(
                "th",
                column.title,
                scope="col",
                title=column.note or None,
                class_="number" if column.is_number else None,
            )
            for column in columns
        ),
    )
    parts = [tag("thead", head), tag("tbody", *map(line, rows))]
    below = [line(cells) for cells in foot]
    if below:
        parts.append(tag("tfoot", *below))
    if caption:
        parts.insert(0, tag("caption", caption))
    return tag("div", tag("table", *parts), class_="scroll", tabindex="0")


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Return names with values, side by side."""
    return tag(
        "dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts"
    )


def section(title: str, *content: object, intro: object = "") -> Markup:
    """Return a section with its heading and a sentence or two below it."""
    return tag("section", tag("h2", title), tag("p", intro, class_="intro") if intro else "", *content)


def details(title: object, *content: object, is_open: bool = False) -> Markup:
    """Return content that the reader can unfold."""
    return tag("details", tag("summary", title), *content, open="" if is_open else None)


def data_uri(content: bytes, kind: str) -> str:
    """Return a file's bytes as a data URI, ``kind`` such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(description: str, content: bytes) -> Markup:
    """Return a PNG file as an image."""
    return tag("img", src=data_uri(content, "image/png"), alt=description, loading="lazy")


def themed_picture(description: str, light: bytes, dark: bytes) -> Markup:
    """Return an SVG figure that follows the reader's light or dark mode; printed, it is light."""
    kind = "image/svg+xml"
    return tag(
        "picture",
        tag(
            "source", media="screen and (prefers-color-scheme: dark)", srcset=data_uri(dark, kind), type=kind
        ),
        tag("img", src=data_uri(light, kind), alt=description),
        class_="figure",
    )


def page(title: str, *content: object) -> str:
    """Return a whole HTML document that stands alone."""
    style = resources.files("fedvision.report").joinpath("page.css").read_text(encoding="utf-8")
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag("body", tag("main", *content))
    return "<!doctype html>\n" + tag("html", tag("head", *head), body, lang="en") + "\n"
