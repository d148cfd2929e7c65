"""Live progress of a run in the terminal; one plain line a round where there is no terminal.

Rules:
- ``observe`` may be called from any thread, with events in any order.
- What came from a site (its name, a reason) is shown as text: no markup, no control characters.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedvision.config import Job
from fedvision.report.notation import MISSING, counted, duration_text, is_number, metric_label, metric_text
from fedvision.report.record import headline_of

Event = dict[str, Any]

_LISTED_SITES = 12
_RECENT_ROUNDS = 5
_SHOWN_VALUES = 32
_REFRESHES_PER_S = 4
_BLOCKS = "▁▂▃▄▅▆▇█"


class Progress:
    """Shows the events of a run on a console while it is entered as a context.

    Args:
        job: What is trained.
        num_sites: Sites that train.
        console: Where to show it, usually on stderr.
        start_round: Rounds that were done before, of a run that goes on.
    """

    def __init__(self, job: Job, num_sites: int, console: Console, start_round: int = 0) -> None:
        self._job = job
        self._headline = headline_of(job)
        self._num_sites = num_sites
        self._console = console
        self._done = start_round
        self._current = start_round
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._durations: deque[float] = deque(maxlen=_RECENT_ROUNDS)
        self._sites: dict[str, Event | None] = {}
        self._validated: dict[str, float] = {}
        self._judged: set[str] = set()
        self._summing: float | None = None
        self._means: list[float] = []
        self._best: tuple[float, int] | None = None
        self._worst: tuple[str, float] | None = None
        self._num_tested = 0
        self._note = ""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        """Begin to show progress."""
        self._started = time.monotonic()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                self, console=self._console, refresh_per_second=_REFRESHES_PER_S, redirect_stdout=False
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def observe(self, event: Event) -> None:
        """Take note of an event of the run, see the rules of the module.

        Args:
            event: "start" with round and sites; a record of rounds.jsonl; "test"; "judged", of a site whose
                results go into a masked sum; or "note" with text. Others are passed over.
        """
        with self._lock:
            line = self._take(event)
        if line and self._live is None:
            self._console.print(Text(line), soft_wrap=True)

    def _take(self, event: Event) -> str:
        """Update the state; return the plain line of a round that ended, else ''."""
        kind, site = event.get("event"), str(event.get("site", ""))
        if kind == "start":
            self._current = int(event["round"])
            self._sites = {str(name): None for name in event["sites"]}
            self._validated, self._judged, self._summing = {}, set(), None
        elif kind == "train":
            self._sites[site] = event
            self._note_sum(all(record is not None for record in self._sites.values()))
        elif kind in ("validate", "test") and event.get("status") == "refused":
            self._note = f"{site} is not in the sum of the results: {event.get('reason', '')}"
        elif kind == "validate":
            value = event["metrics"].get(self._headline)
            if is_number(value):
                self._validated[site] = value
        elif kind == "judged":
            self._judged.add(site)
            self._num_tested += event.get("split") == "test"
            self._note_sum(len(self._judged) >= len(self._sites))
        elif kind == "round":
            return self._end_round(event)
        elif kind == "evaluate failed":
            self._note = f"{site or 'the model'} could not be judged: {event.get('reason', '')}"
        elif kind == "test":
            self._num_tested += 1
        elif kind in ("secure", "attempt", "expelled", "thrown away"):
            return self._take_incident(event)
        elif kind == "standing":
            self._note = f"{site} is now {event.get('standing', '')} for what its updates look like"
        elif kind == "repair":
            self._note = "looking for triggers in the model, on the root set: a minute or more"
            return self._note
        elif kind == "repaired":
            self._note = str(event.get("text", ""))
            return f"repair: {printable(self._note)}"
        elif kind in ("note", "weight"):
            self._note = str(event.get("text") or event.get("reason", ""))
        return ""

    def _note_sum(self, all_ready: bool) -> None:
        """Remember when the last site was ready, since when its input is added up under masks."""
        is_secure = self._job.aggregation.secure
        self._summing = time.monotonic() if all_ready and is_secure else None

    def _take_incident(self, event: Event) -> str:
        """Note what went wrong in a masked sum; return the plain line of a round that was thrown away."""
        kind, site, reason = event["event"], str(event.get("site", "")), str(event.get("reason", ""))
        if kind == "secure":
            self._note = f"{site} {event.get('status', 'failed')} at step {event.get('step', '')}: {reason}"
            if event.get("step") == "ready" and self._sites.get(site) is None:
                self._sites[site] = {**event, "site": site}
        elif kind == "attempt":
            self._summing = None
            self._note = f"attempt {event.get('attempt', '')} given up: {reason}"
        elif kind == "expelled":
            self._note = f"{site} is expelled, rule {event.get('rule', '')}"
            self._sites[site] = {"status": "expelled", "reason": f"rule {event.get('rule', '')}"}
        else:
            self._summing = None
            self._done = self._current = int(event["round"])
            self._note = reason
            return f"round {self._done}/{self._job.rounds}; thrown away; {printable(reason)}"
        return ""

    def _end_round(self, event: Event) -> str:
        self._summing = None
        number = self._done = self._current = int(event["round"])
        self._durations.append(float(event.get("seconds") or 0.0))
        parts = [f"round {number}/{self._job.rounds}"]
        validation = event.get("validation") or {}
        mean = (validation.get("mean_site") or {}).get(self._headline)
        worst = validation.get("worst_site") or {}
        lowest = (worst.get("metrics") or {}).get(self._headline)
        self._worst = (str(worst.get("site", "")), lowest) if is_number(lowest) else self._worst
        if is_number(mean):
            self._means.append(mean)
            is_best = bool(event.get("is_best"))
            self._best = (mean, number) if is_best else self._best
            text = f"{metric_label(self._headline)} {metric_text(mean, self._headline)}"
            if is_number(lowest):
                text += f", worst {printable(worst['site'])} {metric_text(lowest, self._headline)}"
            parts.append(text + (", best so far" if is_best else ""))
        parts.append(f"{event.get('num_sites', 0)} of {self._num_sites} sites")
        parts += [f"{printable(site)} {_outcome(record)}" for site, record in self._lost()]
        parts.append(duration_text(event.get("seconds")))
        return "; ".join(parts)

    def _lost(self) -> list[tuple[str, Event]]:
        """Return the sites whose update was refused or failed in this round."""
        return [
            (site, record)
            for site, record in sorted(self._sites.items())
            if record is not None and record.get("status") != "accepted"
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the present state; called by rich."""
        with self._lock:
            lines = list(self._lines(options))
        yield Group(*lines)

    def _lines(self, options: ConsoleOptions) -> Iterable[Any]:
        elapsed = time.monotonic() - self._started
        bar = Table.grid(padding=(0, 1))
        total = self._job.rounds
        bar.add_row(
            Text(self._job.name, style="bold"),
            ProgressBar(total=total, completed=self._done, width=max(10, min(40, options.max_width - 50))),
            Text(f"{self._done}/{counted(total, 'round')}"),
            Text(f"{duration_text(elapsed)}, {self._time_left()}", style="dim"),
        )
        yield bar
        yield from self._validation_lines(options)
        if self._done < self._job.rounds or not self._num_tested:
            yield from self._site_lines(options)
        if self._num_tested:
            yield Text(f"  final test: {counted(self._num_tested, 'site')} judged")
        if self._summing is not None:
            seconds = duration_text(time.monotonic() - self._summing)
            yield Text(f"  {self._sum_text()}: {seconds}", style="dim")
        if self._note:
            yield Text(f"  {printable(self._note)}", style="yellow")

    def _sum_text(self) -> str:
        """Say what is under way once every site has its input; the server tells no more until it is done."""
        if self._judged:
            return "adding up the masked results"
        is_last, every = self._current == self._job.rounds, self._job.evaluation.every
        then = ", then validation" if is_last or self._current % every == 0 else ""
        return f"adding up the masked updates{then}"

    def _time_left(self) -> str:
        left = self._job.rounds - self._done
        if left == 0:
            return "final test" if not self._num_tested else "final test under way"
        if not self._durations:
            return "time left not known yet"
        return f"about {duration_text(left * sum(self._durations) / len(self._durations))} left"

    def _validation_lines(self, options: ConsoleOptions) -> Iterable[Any]:
        if not self._means:
            return
        metric = self._headline
        line = Text(f"  {metric_label(metric)} ")
        line.append(metric_text(self._means[-1], metric), style="bold")
        line.append(f" mean {self._trend(options.ascii_only)}")
        if self._worst is not None:
            line.append(f"  worst {printable(self._worst[0])} {metric_text(self._worst[1], metric)}")
        if self._best is not None:
            line.append(
                f"  best {metric_text(self._best[0], metric)} in round {self._best[1]}", style="green"
            )
        if not options.ascii_only and len(self._means) > 1:
            line.append(f"  {sparkline(self._means[-_SHOWN_VALUES:])}", style="cyan")
        line.no_wrap = True
        line.overflow = "ellipsis"
        yield line

    def _trend(self, ascii_only: bool) -> str:
        """Return how the mean changed since the round before."""
        if len(self._means) < 2:
            return ""
        change = self._means[-1] - self._means[-2]
        if abs(change) < 0.0005:
            return "=" if ascii_only else "→"
        arrow = ("+" if change > 0 else "-") if ascii_only else ("▲" if change > 0 else "▼")
        return f"{arrow}{abs(change):.3f}"

    def _site_lines(self, options: ConsoleOptions) -> Iterable[Any]:
        """Draw who answered in this round: one line a site, or numbers where there are many."""
        if not self._sites:
            yield Text("  waiting for the sites", style="dim")
            return
        trained = [record for record in self._sites.values() if record and record.get("status") == "accepted"]
        waiting = sum(record is None for record in self._sites.values())
        heading = f"  round {self._current}: {len(trained)} of {len(self._sites)} trained"
        yield Text(heading + (f", {waiting} waiting" if waiting else ""))
        if len(self._sites) > _LISTED_SITES:
            for site, record in self._lost()[:_LISTED_SITES]:
                yield Text(
                    f"    {printable(site)} {_outcome(record)}",
                    style="red",
                    overflow="ellipsis",
                    no_wrap=True,
                )
            if self._validated or self._judged:
                yield Text(f"    {len(self._validated) + len(self._judged)} validated", style="dim")
            return
        rows = Table.grid(padding=(0, 2))
        for site, found in self._sites.items():
            style = "dim" if found is None else ("" if found.get("status") == "accepted" else "red")
            value = self._validated.get(site)
            judged = "judged" if site in self._judged else ""
            if value is not None:
                judged = f"{metric_label(self._headline)} {metric_text(value, self._headline)}"
            rows.add_row(
                "", Text(printable(site), style="bold"), Text(_outcome(found), style=style), Text(judged)
            )
        yield rows


def _outcome(record: Event | None) -> str:
    """Say what a site did in a round."""
    if record is None:
        return "waiting"
    if record.get("status") == "accepted" and "num_steps" not in record:
        return "trained"
    if record.get("status") == "accepted":
        loss = record.get("train_loss")
        text = f"loss {loss:.3f}" if is_number(loss) else f"loss {MISSING}"
        return f"trained, {text}, {duration_text(record.get('seconds'))}"
    return printable(f"{record.get('status', 'failed')}: {record.get('reason') or 'no reason given'}")


def printable(text: object) -> str:
    """Return text on one line without control characters, so that it cannot drive the terminal."""
    return "".join(character if character.isprintable() else " " for character in str(text))


def sparkline(values: list[float]) -> str:
    """Return values as a row of blocks, the lowest as the smallest block."""
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)
