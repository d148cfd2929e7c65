"""What was done to the model after the last round: the triggers found, and what took them away."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvision.report.markup import Column, Markup, details, joined, picture, section, table, tag
from fedvision.report.notation import MISSING, duration_text, is_number, metric_label, metric_text
from fedvision.report.record import RunRecord
from fedvision.storage import read_json

FILE_NAME = "repair.json"
_METHODS = {
    "none": "none: the model stays as it was",
    "finetune": "fine-tuning on the root set against the triggers that were found",
    "prune": "pruning of channels that the root set leaves quiet, then fine-tuning",
}
_TARGETS = {"erase": "makes the model miss what is there", "invent": "makes it find what is not there"}


def repair_section(record: RunRecord) -> Markup:
    """Return the repair of a run's model; nothing where none was made.

    Raises:
        StorageError: ``repair.json`` is damaged.
    """
    path = record.folder / FILE_NAME
    if not path.exists():
        return Markup()
    report = read_json(path)
    before, after = report.get("before") or {}, report.get("after") or {}
    parts: list[object] = [tag("p", str(report.get("text", "")), class_="note")]
    rows = [
        ("Method", _METHODS.get(str(report.get("method")), str(report.get("method")))),
        (f"{metric_label(record.headline)} before", metric_text(before.get("score"), record.headline)),
        (f"{metric_label(record.headline)} after", metric_text(after.get("score"), record.headline)),
        ("Root cases", f"{report.get('num_teaching', 0)} taught, {report.get('num_judging', 0)} judged"),
        ("Time", duration_text(report.get("seconds"))),
    ]
    parts.append(table([Column("What"), Column("Value")], rows))
    if before.get("success"):
        parts.append(_triggers(before["success"], after))
    pictures = _pictures(record.folder)
    if pictures:
        parts.append(details("An image with the strongest triggers", *pictures))
    return section(
        "Repair after the last round",
        *parts,
        intro="A search for triggers on the root set, and their removal. Measured on root cases that the "
        "repair did not train on, but that chose how much of it is kept: the final test at the sites is the "
        "independent judge. A sound model has weak spots too: a large patch that works proves "
        "nothing, a small one that works everywhere is a reason to ask where it came from. A trigger of a "
        "kind that was not searched for is not found.",
    )


def _triggers(before: Mapping[str, Any], after: Mapping[str, Any]) -> Markup:
    """Return how often each trigger works, before and after, and how often a new one does."""
    columns = [
        Column("Trigger"),
        Column("What it does"),
        Column("Size", True, "side of the patch, of the shortest side of a training crop"),
        Column("Before", True, "share of judging images on which it works"),
        Column("After", True, "the same trigger on the repaired model"),
        Column("New search", True, "a trigger searched for on the repaired model"),
    ]
    rows = []
    for name, value in before.items():
        target, kind, *size = str(name).split("-")
        words = next((text for key, text in _TARGETS.items() if target.startswith(key)), target)
        side = f"{size[0]} %" if size else "whole image"
        found = [(after.get(key) or {}).get(name) for key in ("success", "new_success")]
        rows.append((kind, words, side, *map(_percent, (value, *found))))
    return table(columns, rows, caption="Success of triggers")


def _percent(value: object) -> str:
    return f"{100 * value:.0f} %" if is_number(value) else MISSING


def _pictures(folder: Path) -> list[Markup]:
    """Return the pictures of triggers; a name in the record never becomes a path."""
    return [
        joined([picture(path.stem.replace("-", " "), path.read_bytes())])
        for path in sorted((folder / "repair").glob("*.png"))
    ]
