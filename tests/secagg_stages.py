"""Stops a masked sum at any step, and forges what a lying server or site would send there."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from fedvision.errors import ProtocolError
from fedvision.secagg import schedule
from fedvision.secagg.attempt import Disputed, MaskedSum
from fedvision.secagg.codec import decode, encode
from fedvision.secagg.messages import SERVER, AcceptedEntry, Exclusion, Signed
from fedvision.secagg.server import SumRound
from tests.secagg_parties import Consort, Lie, Party, ask, honest, try_liars

LEVELS = ("sum", "sketch", "gram")
SKETCHED = ("sketch", "gram")
STEPS = {
    "sum": ("ready", "mask", "accept", "unmask"),
    "sketch": ("ready", "mask", "beacon", "sketch", "accept", "unmask"),
    "gram": ("ready", "mask", "beacon", "sketch", "hold", "accept", "unmask"),
}
Bodies = Mapping[int, bytes]


def bodies_of(attempt: SumRound, step: str) -> Bodies:
    """Return what the server sends to each site at a step, once the step before is done."""
    views = attempt.views
    if step == "mask":
        return attempt.weave()
    if step == "beacon":
        return dict.fromkeys(views.masked, attempt.masked_roll())
    if step == "sketch":
        return dict.fromkeys(views.beacons, attempt.beacon_roll())
    if step == "hold":
        return attempt.hold()
    if step == "accept":
        message = attempt.accept()
        return dict.fromkeys(attempt.inside, message)
    return dict.fromkeys(views.acks, attempt.ack_roll())


def taker(attempt: SumRound, step: str) -> Callable[..., None]:
    """Return the server's method that takes the answers of a step."""
    names = {"mask": "masked", "hold": "products", "accept": "ack"}
    found: Callable[..., None] = getattr(attempt, f"add_{names.get(step, step)}")
    return found


def play(
    consort: Consort,
    attempt: SumRound,
    start: str = "ready",
    stop: str = "",
    lie: Lie = honest,
    refused: list[tuple[int, str, str]] | None = None,
    sites: Iterable[int] | None = None,
) -> Bodies:
    """Do the steps from ``start`` up to ``stop``, and return what the server would send at ``stop``.

    Without ``stop``, go to the last step and return nothing.
    """
    notes = [] if refused is None else refused
    steps = STEPS[attempt.level]
    who = list(consort.parties if sites is None else sites)
    for step in steps[steps.index(start) :]:
        bodies = dict.fromkeys(who, attempt.offer()) if step == "ready" else bodies_of(attempt, step)
        if step == stop:
            return bodies
        ask(consort, step, bodies, taker(attempt, step), lie, notes)
        while step == "accept" and attempt.needs_shrinking:
            ask(consort, step, dict.fromkeys(attempt.inside, attempt.shrink()), attempt.add_ack, lie, notes)
    return {}


def reach(consort: Consort, stop: str, **settings: Any) -> tuple[SumRound, Bodies]:
    """Begin an attempt and return it before a step, with what the server would send."""
    attempt = consort.attempt(**settings)
    return attempt, play(consort, attempt, stop=stop)


def finish(consort: Consort, attempt: SumRound, step: str, lie: Lie = honest) -> MaskedSum:
    """Do the steps from one on, all sites honest but for ``lie``, and return the sum."""
    play(consort, attempt, start=step, lie=lie)
    return attempt.finish()


def named(consort: Consort, attempt: SumRound, lie: Lie) -> tuple[dict[int, str], MaskedSum | None]:
    """Run an attempt with liars to its end and return who was found out, with the rule; and the sum.

    Raises:
        AttemptError: It cannot be finished.
    """
    outcome = None
    try:
        play(consort, attempt, lie=lie)
    except Disputed:
        found = try_liars(consort, attempt, None, lie)
    else:
        outcome = attempt.finish()
        found = {} if outcome.fits else try_liars(consort, attempt, outcome, lie)
    return {**{item.site: item.rule for item in attempt.evidence}, **found}, outcome


def server_says(consort: Consort, message: object) -> bytes:
    """Return any message with the server's true signature."""
    return encode(schedule.sign(consort.consortium, consort.server, SERVER, message))


def resay(consort: Consort, data: bytes, kind: type, **changes: object) -> bytes:
    """Return the server's message with some fields changed and a true signature."""
    return server_says(consort, dataclasses.replace(decode(decode(data, Signed).body, kind), **changes))


def opened(data: bytes, kind: type) -> Any:
    """Return the message inside a signed one."""
    return decode(decode(data, Signed).body, kind)


def site_says(consort: Consort, site: int, message: object) -> Signed:
    """Return any message with a site's true signature."""
    return consort.parties[site].member.sign(message)


def entries_of(attempt: SumRound, sites: Iterable[int]) -> tuple[AcceptedEntry, ...]:
    """Return an accepted set with the hashes that the server holds."""
    return tuple(AcceptedEntry(site, attempt.views.digests[site]) for site in sites)


def left_out(sites: Iterable[int]) -> tuple[Exclusion, ...]:
    """Return exclusions, with a reason that the sites cannot check."""
    return tuple(Exclusion(site, "no masked input") for site in sites)


def refuses(party: Party, step: str, body: bytes, rule: str) -> None:
    """Check that a site refuses a message by this rule and keeps its state and marks."""
    before = (party.marks, party.state)
    with pytest.raises(ProtocolError) as caught:
        if step == "ready":
            party.begin(body)
        else:
            party.step(step, body)
    assert caught.value.rule == rule, str(caught.value)
    assert (party.marks, party.state) == before
