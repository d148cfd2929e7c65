"""Write the generated parts of the reference from the code: python docs/make_reference.py [--check].

A page holds text that people wrote, and blocks between ``<!-- generated: NAME -->`` and ``<!-- end -->``. The
blocks are made here from the models of the job file, of the manifest and of the two programs' settings, from
the commands, and from the messages of the demo. ``--check`` changes nothing, and fails if a block is not what
the code says.
"""

import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import numpy as np
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import fedvision_server.cli
import fedvision_sites.cli
from fedvision.cli.app import app
from fedvision.cli.job_file import toml_value
from fedvision.config import Job, Name, Reference, parse_job
from fedvision.data.manifest import Case, Manifest
from fedvision.secagg.enrolling import ADDRESS
from fedvision.secagg.roster import Hex32
from fedvision.tasks import initial_network, local_names, task_module
from fedvision.updates.layout import Layout, layout_of
from fedvision.wire.messages import (
    EMPTY,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Refusal,
    TrainReply,
    TrainRequest,
)
from fedvision_server.home import Address, Deadlines, Host, ServerSettings
from fedvision_sites.home import SiteSection, SiteSettings

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PLAIN = {str: "string", int: "integer", float: "number", bool: "`true` or `false`", Path: "path"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
PATTERNS = {
    typing.get_args(Name)[1].metadata[0].pattern: "name",
    typing.get_args(Reference)[1].metadata[0].pattern: "`package.module:function`",
    typing.get_args(Hex32)[1].metadata[0].pattern: "text of 64 hexadecimal digits",
    f"^$|{ADDRESS}": "`HOST:PORT`",
}
CHECKS = {
    typing.get_args(Address)[1].func: "`HOST:PORT`",
    typing.get_args(Host)[1].func: "DNS name or IP address",
}
"""What a function that checks a value asks for."""
PLURALS = {
    "list of ": "lists of ",
    "text of ": "texts of ",
    "DNS name or IP address": "DNS names or IP addresses",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _limits(metadata: Iterable[Any]) -> tuple[str, list[str]]:
    """Return what a field's constraints say: a name for its pattern, and its bounds."""
    pattern = ""
    bounds: list[str] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            inner, more = _limits(item.metadata)
            pattern, bounds = pattern or inner, bounds + more
            continue
        pattern = PATTERNS.get(getattr(item, "pattern", None), pattern)
        pattern = CHECKS.get(getattr(item, "func", None), pattern)
        for key, sign in BOUNDS.items():
            value = getattr(item, key, None)
            if value is not None:
                bounds.append(f"{sign} {value:,}")
        if getattr(item, "max_length", None):
            bounds.append(f"of at most {item.max_length} characters")
    return pattern, bounds


def type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Return a type and its range in words."""
    pattern, bounds = _limits(metadata)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return type_text(args[0], [*args[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(type_text(arg, metadata) for arg in args if arg is not type(None))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "always ") + ", ".join(f"`{toml_value(a)}`" for a in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"list of {len(args)} {_plural(args[0])}"
    if origin is tuple:
        least = next((item.min_length for item in metadata if hasattr(item, "min_length")), 0)
        return f"list of {_plural(args[0])}" + (f", at least {least}" if least else "")
    if origin is dict:
        return "table"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return " ".join([pattern or PLAIN[annotation], *([", ".join(bounds)] if bounds else [])])


def _plural(annotation: Any) -> str:
    text = type_text(annotation)
    for one, many in PLURALS.items():
        if text.startswith(one):
            return many + text.removeprefix(one)
    word, space, rest = text.partition(" ")
    return f"{word}s{space}{rest}"


def default_text(field: FieldInfo) -> str:
    """Return the default of a key as the file would have it."""
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "not set"
    return f"`{toml_value(field.default)}`"


def _rows(model: type[BaseModel]) -> list[list[str]]:
    return [
        [
            f"`{name}`",
            type_text(field.annotation, field.metadata),
            default_text(field),
            field.description or WORDS.get(f"{model.__name__}.{name}", ""),
        ]
        for name, field in model.model_fields.items()
        if _section(field.annotation) is None
    ]


def _section(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


WORDS = {
    "Manifest.format": "version of this file format",
    "Manifest.site": "the site's name in the federation",
    "Manifest.task": "what the labels are for; must be `task.kind` of the job",
    "Manifest.spatial_dims": "2 for pictures, 3 for volumes; as in the job",
    "Manifest.classes": "foreground classes; value k of a mask or box label is the k-th; as in the job",
    "Case.id": "the case's name, once in a manifest",
    "Case.patient": "whose image it is; all cases of a patient are in one split",
    "Case.split": "what the case is used for",
}
"""Descriptions of keys that have none in the code."""
HEAD = ("key", "type and range", "default", "meaning")


def job_keys() -> str:
    """Return every key of the job file, a table a section."""
    parts = ["### Top level\n", table(HEAD, _rows(Job))]
    for name, field in Job.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            parts += [f"\n### `[{name}]`\n", inspect.cleandoc(section.__doc__ or "") + "\n"]
            parts.append(table(HEAD, _rows(section)))
    return "\n".join(parts)


def manifest_keys() -> str:
    """Return every key of the manifest and of its cases."""
    cases = Manifest.model_fields["cases"]
    rows = [*_rows(Manifest), ["`cases`", "list of cases", default_text(cases), "see below"]]
    return "\n".join([table(HEAD, rows), "\n### A case\n", table(HEAD, _rows(Case))])


def server_keys() -> str:
    """Return every key of ``server.toml``."""
    return "\n".join(
        [table(HEAD, _rows(ServerSettings)), "\n### `[deadlines]`\n", *_section_lines(Deadlines)]
    )


def site_keys() -> str:
    """Return every key of ``site.toml`` but those of the policy."""
    return "\n".join([table(HEAD, _rows(SiteSettings)), "\n### `[site]`\n", *_section_lines(SiteSection)])


def _section_lines(section: type[BaseModel]) -> list[str]:
    return [inspect.cleandoc(section.__doc__ or "") + "\n", table(HEAD, _rows(section))]


def _plain(text: str) -> str:
    """Return a help text without the marks for bold and dim, each paragraph at the left margin."""
    bare = re.sub(r"\[(bold|dim|/)\]", "", text).replace("\\[", "[")
    first, _, rest = bare.strip().partition("\n")
    paragraphs = re.split(r"\n[ ]*\n", f"{first}\n{textwrap.dedent(rest)}")
    return "\n\n".join(textwrap.dedent(paragraph).strip("\n") for paragraph in paragraphs).strip()


def _value_text(param: click.Parameter) -> str:
    """Return what an option or argument takes, "" for a switch."""
    if isinstance(param, click.Option) and param.is_flag:
        return ""
    kind = param.type
    if isinstance(kind, click.Choice):
        return " or ".join(f"`{word}`" for word in kind.choices)
    if isinstance(kind, click.IntRange):
        bounds = [f"≥ {kind.min}"] if kind.min is not None else []
        bounds += [f"≤ {kind.max}"] if kind.max is not None else []
        return "integer " + ", ".join(bounds)
    return f"`{param.metavar or ('PATH' if 'path' in type(kind).__name__.lower() else 'TEXT')}`"


def _help_of(param: click.Parameter, command: click.Command) -> str:
    """Return the help of a parameter; an argument's is kept by typer only in its annotation."""
    text = getattr(param, "help", None)
    if text is None and command.callback is not None:
        hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
        for item in typing.get_args(hints.get(param.name or ""))[1:]:
            if isinstance(item, typer.models.ArgumentInfo):
                text = item.help
    return _plain(text or "").replace("\n", " ")


def _command(name: str, command: click.Command) -> list[str]:
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    options = [param for param in command.params if isinstance(param, click.Option)]
    options = [param for param in options if param.name != "help"]
    usage = " ".join([name, "[OPTIONS]", *(_argument_text(param) for param in arguments)])
    parts = [f"## `{name}`\n", f"```text\n{usage}\n\n{_plain(command.help or '')}"]
    parts.append((f"\n{_plain(command.epilog)}\n" if command.epilog else "") + "```\n")
    if arguments:
        rows = [[f"`{_argument_text(param)}`", _help_of(param, command)] for param in arguments]
        parts.append(table(("argument", "meaning"), rows) + "\n")
    if options:
        rows = []
        for param in options:
            names = " / ".join(f"`{one}`" for one in (*param.opts, *param.secondary_opts))
            rows.append([names, _value_text(param), _default_of(param), _help_of(param, command)])
        parts.append(table(("option", "takes", "default", "meaning"), rows) + "\n")
    return parts


def _default_of(param: click.Option) -> str:
    """Return what holds if an option is not given, "" for a switch and for nothing."""
    if param.required:
        return "required"
    if param.is_flag:
        both = (*param.opts, *param.secondary_opts)
        return f"`{both[0] if param.default else both[-1]}`" if param.secondary_opts else ""
    return "" if param.default is None else f"`{param.default}`"


def _argument_text(param: click.Argument) -> str:
    text = (param.metavar or (param.name or "").upper()).strip("[]")
    return text if param.required else f"[{text}]"


def cli_commands(name: str, commands: typer.Typer) -> str:
    """Return every command of a program with its arguments and options."""
    parts: list[str] = []

    def add(name: str, command: click.Command) -> None:
        if isinstance(command, click.Group):
            if command.invoke_without_command:
                parts.extend(_command(name, command))
            for word, inner in command.commands.items():
                add(f"{name} {word}", inner)
        else:
            parts.extend(_command(name, command))

    add(name, typer.main.get_command(commands))
    return "\n".join(parts).rstrip()


def message_sizes() -> str:
    """Return the size of every message of the demo's jobs, serialised as Flower sends it."""
    from flwr.common.serde import recorddict_to_proto

    from fedvision.data import demo_chests, demo_heads
    from fedvision.simulation.demo import SETTINGS
    from fedvision.wire.records import pack

    sizes: dict[str, list[str]] = {}
    tasks = {"segmentation": (3, demo_heads.CLASSES), "detection": (2, demo_chests.CLASSES)}
    for kind, settings in SETTINGS.items():
        dims, classes = tasks[kind]
        task = {"kind": kind, "spatial_dims": dims, "in_channels": 1, "classes": list(classes)}
        job = parse_job({"name": f"demo-{kind}", "task": task, **settings}, kind)
        for name, message in _messages(job).items():
            sizes.setdefault(name, []).append(f"{recorddict_to_proto(pack(message)).ByteSize():,}")
        sizes.setdefault("*weights of the model*", []).append(f"{_layout(job).size:,}")
    head = ("message", *(f"{kind} demo" for kind in SETTINGS))
    return table(head, ([name, *cells] for name, cells in sizes.items()))


def _layout(job: Job) -> Layout:
    network = initial_network(job)
    return layout_of(network, local_names(network, job))


def _messages(job: Job) -> dict[str, Any]:
    """Return one message of each kind, as a site named north with the demo's numbers of cases sends it."""
    layout = _layout(job)
    vector = np.zeros(layout.size, dtype=np.float32)
    statistics = np.zeros((1 + job.evaluation.bootstrap, task_module(job).statistics_size(job)))
    sent = (job.to_json(), job.digest(), layout.digest)
    return {
        "HelloRequest": HelloRequest(*sent, EMPTY),
        "HelloReply": HelloReply(job.digest(), "north", 20, 4, 8, EMPTY),
        "TrainRequest": TrainRequest(*sent, 1, "", EMPTY, vector),
        "TrainReply": TrainReply(job.digest(), "north", 1, 20, 20, 0.5, 2.5, vector),
        "EvaluateRequest": EvaluateRequest(*sent, 1, "val", False, "", EMPTY, vector),
        "EvaluateReply, validation": EvaluateReply(job.digest(), "north", 1, "val", 4, 4, statistics[:1]),
        "EvaluateReply, test": EvaluateReply(job.digest(), "north", 1, "test", 8, 7, statistics),
        "Refusal": Refusal(job.digest(), "north", 1, "data"),
    }


LEVELS = {4: "sum", 9: "sketch", 10: "gram"}
"""Numbers of sites, with the level that each has by default."""


def secure_message_sizes() -> str:
    """Return the size of a round's messages of secure aggregation, of the segmentation demo's network."""
    from flwr.common.serde import recorddict_to_proto

    from fedvision.data import demo_heads
    from fedvision.simulation.demo import SETTINGS
    from fedvision.wire.messages import SecureReply, SecureRequest, as_vector
    from fedvision.wire.records import pack

    task = {"kind": "segmentation", "spatial_dims": 3, "in_channels": 1, "classes": list(demo_heads.CLASSES)}
    job = parse_job({"name": "demo-segmentation", "task": task, **SETTINGS["segmentation"]}, "demo")
    length = _layout(job).size + 2  # mean loss and weight
    sizes: dict[str, dict[int, str]] = {}
    for num_sites, level in LEVELS.items():
        for step, (request, reply) in _secure_steps(num_sites, level).items():
            masked = np.zeros(length if step == "mask" else 0, np.uint32)
            sent = {
                f"{step}, to a site": SecureRequest(job.digest(), 1, "0" * 64, step, as_vector(request)),
                f"{step}, from a site": SecureReply(job.digest(), "north", 1, step, as_vector(reply), masked),
            }
            if step == "ready":  # asked for with the weights, in a TrainRequest
                del sent["ready, to a site"]
            for name, message in sent.items():
                size = recorddict_to_proto(pack(message)).ByteSize()
                sizes.setdefault(name, {})[num_sites] = f"{size:,}"
    head = ("step", *(f"{num_sites} sites, {level}" for num_sites, level in LEVELS.items()))
    order = ("ready", "mask", "beacon", "sketch", "hold", "accept", "unmask")
    names = sorted(sizes, key=lambda name: order.index(name.partition(",")[0]))
    return table(head, ([name, *(sizes[name].get(n, "") for n in LEVELS)] for name in names))


def _secure_steps(num_sites: int, level: str) -> dict[Any, tuple[bytes, bytes]]:
    """Return the body of each step's request to the first site and of its reply, from a real sum."""
    sys.path.insert(0, str(DOCS.parent))
    from tests.secagg_parties import gather, run

    consort = gather(num_sites, level)
    first, steps = consort.parties[1], {}
    begin, step = first.begin, first.step

    def begun(offer: bytes) -> bytes:
        answer = begin(offer)
        steps["ready"] = (offer, answer)
        return answer

    def stepped(name: str, body: bytes) -> tuple[bytes, Any]:
        answer, masked = step(name, body)
        steps[name] = (body, answer)
        return answer, masked

    first.begin, first.step = begun, stepped
    run(consort, consort.attempt())
    return steps


BLOCKS: dict[str, Callable[[], str]] = {
    "job-keys": job_keys,
    "manifest-keys": manifest_keys,
    "cli-commands": lambda: cli_commands("fedvision", app),
    "server-commands": lambda: cli_commands("fedvision-server", fedvision_server.cli.app),
    "site-commands": lambda: cli_commands("fedvision-site", fedvision_sites.cli.app),
    "server-keys": server_keys,
    "site-keys": site_keys,
    "message-sizes": message_sizes,
    "secure-message-sizes": secure_message_sizes,
}


def made_again(text: str) -> str:
    """Return a page with its generated blocks made from the code."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match['name']]()}\n{match[3]}", text)


def main(arguments: list[str]) -> int:
    """Write or check the pages; 0 if all is well, 1 if a page is out of date."""
    stale = []
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        fresh = made_again(text)
        if fresh != text:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(fresh, encoding="utf-8")
    what = "out of date, run python docs/make_reference.py" if "--check" in arguments else "written"
    sys.stdout.write(f"{', '.join(stale)}: {what}\n" if stale else "the reference is up to date\n")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
