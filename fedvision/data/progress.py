"""A progress bar for work over many files: on stderr, and only where a person is looking."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
Watch = Callable[[str, int, int], None]


def tracked(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield the items and show how many are done; silent where stderr is not a terminal.

    Args:
        items: Anything to go through, such as the results of a thread pool.
        what: A few words in front of the bar.
        total: How many there are.
    """
    with progress_bar() as progress:
        yield from progress.track(items, total=total, description=what)


@contextmanager
def watched(what: str) -> Iterator[Watch]:
    """Give a function that is told what is done, how much of it, and how much there is; it shows a bar.

    Args:
        what: Shown until it is told something else.
    """
    with progress_bar() as progress:
        bar = progress.add_task(what, total=None)

        def watch(text: str, done: int, total: int) -> None:
            progress.update(bar, description=text, completed=done, total=total)

        yield watch


def progress_bar() -> "Progress":
    """Return a bar on stderr that counts, with the time that is left; silent away from a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
