"""Times of the week at which jobs may run, by the clock on the wall: ``22:00-06:00``, ``sat 00:00-24:00``."""

import re
from dataclasses import dataclass
from datetime import datetime

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = "|".join(DAYS)
_SPAN = re.compile(
    rf"(?:({_DAY})(?:-({_DAY}))? )?([01][0-9]|2[0-3]):([0-5][0-9])-(?:([01][0-9]|2[0-3]):([0-5][0-9])|24:00)"
)


@dataclass(frozen=True)
class Span:
    """A time of the day on some days of the week.

    Attributes:
        days: On which it begins; 0 is Monday.
        start: Minute of the day.
        end: Minute of the day, up to 1440; below ``start`` it is of the next day.
    """

    days: frozenset[int]
    start: int
    end: int

    def holds(self, local: datetime) -> bool:
        """Whether the clock on the wall shows a time in it; its end is not in it."""
        minute, day = local.hour * 60 + local.minute, local.weekday()
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        yesterday = (day - 1) % 7
        return (day in self.days and minute >= self.start) or (yesterday in self.days and minute < self.end)


def parse_span(text: str) -> Span:
    """Return the span that is written as ``22:00-06:00``, ``sat 00:00-24:00`` or ``mon-fri 18:00-07:30``.

    Raises:
        ValueError: It is not written so, or is empty.
    """
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError('a span is "HH:MM-HH:MM" or "sat-sun HH:MM-HH:MM"')
    first, last, *clock = match.groups()
    start = 60 * int(clock[0]) + int(clock[1])
    end = 1440 if clock[2] is None else 60 * int(clock[2]) + int(clock[3])
    if start == end:
        raise ValueError("a span must not be empty; the whole day is 00:00-24:00")
    if first is None:
        return Span(frozenset(range(7)), start, end)
    begin = DAYS.index(first)
    length = (DAYS.index(last or first) - begin) % 7 + 1
    return Span(frozenset((begin + i) % 7 for i in range(length)), start, end)
