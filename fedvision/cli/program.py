"""What every program of fedvision does: print an error as one line with its hint, and return its exit status.

Also what the two programs' set-up commands share: fingerprints for the telephone, and settings with comments.
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console

from fedvision import __version__
from fedvision.cli.job_file import toml_value
from fedvision.errors import ConfigError, FedvisionError

WIDTH = 100
TELEPHONE = """Call {owner} on a number that you had before, not one that came with the file. They read
the eight groups from their own screen, you read along. If one differs, it is another key: do not use it."""


def table_console() -> Console:
    """Return where tables are printed: as wide as the terminal, and wide enough where there is none."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def version_option(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Stand for a program's own options, before its commands: a typer callback."""


def run_app(app: typer.Typer, program: str, argv: list[str] | None) -> int:
    """Run a command line and return the exit status.

    0: done. 1: what was checked does not hold. 2: wrong input, or it cannot go on. 130: stopped by Ctrl-C.
    Where it is not 0, one line says why; only a bug shows a traceback.

    Args:
        app: The commands.
        program: Its name, as people type it.
        argv: Arguments; None for the process's own.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        status = app(args=argv, standalone_mode=False, prog_name=program)
        return int(status or 0)
    except FedvisionError as error:
        console.print(f"{program}: error: {error}", markup=False, style="red")
        if error.hint:
            console.print(f"hint: {error.hint}", markup=False)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        console.print(f"{program}: stopped", markup=False)
        return 130
    except Exception as error:
        import click

        if isinstance(error, click.ClickException):
            error.show()
            return error.exit_code
        raise


def note(text: str) -> None:
    """Print a line for people to stderr; results go to stdout."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def two_lines(public: bytes) -> str:
    """Return a key's fingerprint as two lines of four groups."""
    from fedvision.secagg.identity import fingerprint

    groups = fingerprint(public).split()
    return "  ".join(groups[:4]) + "\n" + "  ".join(groups[4:])


def compare_fingerprint(public: bytes, said: str | None, owner: str, ask: str, yes: bool = False) -> None:
    """Show a key's fingerprint and let a person say that it was compared.

    Args:
        public: The key, 32 bytes.
        said: What the owner read out, if it was given with the command: 40 digits.
        owner: Whom to call.
        ask: The question.
        yes: Do not ask.

    Raises:
        ConfigError: ``said`` is not the fingerprint.
        typer.Abort: The answer is no.
    """
    from fedvision.secagg.identity import fingerprint

    if said is not None:
        digits = re.sub(r"[\s.-]", "", said)
        if not re.fullmatch(r"[0-9]{40}", digits):
            raise ConfigError(
                "a fingerprint has 40 digits, in 8 groups of 5", "all eight groups must be compared"
            )
        if digits != fingerprint(public).replace(" ", ""):
            raise ConfigError(
                "the fingerprint is another one: this is not the key that its owner read out",
                "do not use the file; find out by telephone who sent it",
            )
        return
    typer.echo(two_lines(public))
    if yes:
        return
    note(TELEPHONE.format(owner=owner))
    if not sys.stdin.isatty():
        note("hint: give the fingerprint with the command to go on without a question, see --help")
    typer.confirm(ask, abort=True, err=True)


def commented(title: str, sections: Mapping[str, tuple[type[BaseModel], Mapping[str, Any]]]) -> str:
    """Return the text of a settings file in which every key is explained.

    Args:
        title: First line.
        sections: By name, "" for the keys before the first section: the model, and chosen values; a key that
            is left out gets its default.
    """
    lines = [f"# {title}", ""]
    for name, (model, values) in sections.items():
        if name:
            lines += [*_wrapped(" ".join((model.__doc__ or "").split())), f"[{name}]"]
        for key, field in model.model_fields.items():
            if _is_section(field.annotation):
                continue
            value = values[key] if key in values else field.get_default(call_default_factory=True)
            lines += _wrapped(field.description or "")
            lines += [f"{key} = {toml_value(value)}" if value is not None else f"# {key} =", ""]
    return "\n".join(lines).rstrip() + "\n"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def paragraphs(command: Callable[..., Any]) -> str:
    """Return a docstring with each paragraph on one line, so that the terminal's width breaks it."""
    parts = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(part.split()) for part in parts)
