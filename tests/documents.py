"""Reads HTML pages in tests: their text and tables, and whether they stand alone."""

import re
from html.parser import HTMLParser

HOSTILE = '"><img src=x onerror=alert(1)>'
WITHOUT_END = {"img", "meta", "source", "br", "col"}
LINKS = {"src", "href", "srcset", "data", "action", "poster", "background"}


class Document(HTMLParser):
    """Reads a page: its text, its elements, and whether its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in WITHOUT_END:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]


def assert_stands_alone(html: str) -> Document:
    """Check that a page is well formed, runs nothing and fetches nothing."""
    document = Document(html)
    assert html.startswith("<!doctype html>")
    names = {name for name, _ in document.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in document.elements:
        assert not any(key.startswith("on") for key in attributes)
        for key in LINKS & set(attributes):
            assert str(attributes[key]).startswith("data:image/")
    assert not re.search(r"https?://|url\(|@import", html)
    policies = [m for m in document.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0]["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return document


def rows_of(html: str) -> list[list[str]]:
    """Return the cells of all table rows as text."""
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in cells]
