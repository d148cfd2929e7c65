"""A job file with comments: every key, what it means, and its default.

The comments are the descriptions of the keys in ``fedvision.config``, so they cannot grow stale.
"""

import json
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedvision.config import Job

WIDTH = 100
NOTES = {
    "data.sites": "A site with test cases only belongs in `held_out`.",
    "aggregation.clip_norm": "How to choose it: run once; the report shows every site's norm before "
    "clipping. Their median costs little accuracy and bounds what one site can change; ten times that "
    "never clips.",
}
"""What a person who writes a first job should know beyond the description."""


def toml_value(value: Any) -> str:
    """Return a value as TOML on one line; a mapping becomes an inline table.

    Raises:
        ValueError: TOML has no such value.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    raise ValueError(f"no TOML for {type(value).__name__}")


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the words that a key may have, () if it is free."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return tuple(str(word) for word in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return tuple(word for part in typing.get_args(annotation) for word in _choices(part))
    return ()


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _explained(key: str, field: FieldInfo) -> list[str]:
    """Return the comment above a key: its description, its choices, and a note."""
    text = field.description or ""
    choices = [word for word in _choices(field.annotation) if word not in text]
    if len(choices) > 1:
        text += f" (one of {', '.join(_choices(field.annotation))})"
    note = NOTES.get(key, "")
    return _comment(text + (f". {note}" if note and text else note))


def _is_for(field: FieldInfo, kind: str) -> bool:
    """Whether a key has a meaning for a task, by the word that its description begins with."""
    first = (field.description or "").split(":")[0]
    return first == kind or first not in ("segmentation", "detection")


def _keys(
    model: type[BaseModel], prefix: str, values: Mapping[str, Any], examples: Mapping[str, Any], kind: str
) -> list[str]:
    """Return the lines of a section's keys: chosen values, else defaults; without either, commented out."""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        annotation = field.annotation
        if name in values and isinstance(values[name], Mapping) and _section_of(annotation) is not None:
            continue
        if _section_of(annotation) is not None or not _is_for(field, kind):
            continue
        value = values.get(name)
        if value is None and field.default is not PydanticUndefined:
            value = field.default
        lines += _explained(key, field)
        if value is not None:
            lines.append(f"{name} = {toml_value(value)}")
        else:
            lines.append(f"# {name} = {toml_value(examples[key])}")
        lines.append("")
    return lines


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key of the job holds, or None for a plain value."""
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def commented_job(content: Mapping[str, Any], examples: Mapping[str, Any]) -> str:
    """Return the text of a job file.

    Args:
        content: The chosen values, in the shape of the file; keys left out get their default.
        examples: For each key without value and default, as ``section.key``, what its commented line shows.
    """
    kind = content["task"]["kind"]
    lines = ["# A fedvision job: what is trained, how, and what leaves a site.", ""]
    lines += _keys(Job, "", content, examples, kind)
    for name, field in Job.model_fields.items():
        section = _section_of(field.annotation)
        if section is None:
            continue
        summary = " ".join((section.__doc__ or "").split())
        lines += ["", *_comment(summary), f"[{name}]"]
        lines += _keys(section, f"{name}.", content.get(name, {}), examples, kind)
    return "\n".join(lines).rstrip() + "\n"
