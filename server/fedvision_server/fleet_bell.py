"""How requests for messages are held at the SuperLink, in place of Flower's polling."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class Bell:
    """Holds requests for messages until there is one, so that nobody has to ask again and again.

    A message that is not in one parcel is there once its objects are: the bell is rung at each of them, and
    is heard when it has been quiet for a moment. Who hung up is given nothing: Flower delivers once.
    """

    QUIET_S = 0.02
    EMPTY_BYTES = 8

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._rung_at = -math.inf
        self._changed = asyncio.Event()

    def ring(self) -> None:
        """Say that something has come."""
        self._rung_at = time.monotonic()
        self._changed.set()
        self._changed = asyncio.Event()

    async def answered(self, app: App, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request for messages on until the answer has one, or patience is over."""
        until = time.monotonic() + self._patience_s
        body = await body_of(receive)
        while True:
            changed = self._changed
            events = await answer_of(app, scope, body)
            length = sum(len(event.get("body", b"")) for event in events)
            if length > self.EMPTY_BYTES or time.monotonic() >= until:
                break
            gone, rung = asyncio.ensure_future(receive()), asyncio.ensure_future(changed.wait())
            left = until - time.monotonic()
            await asyncio.wait((gone, rung), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            has_left, has_rung = gone.done(), rung.done()
            gone.cancel()
            rung.cancel()
            if has_left:
                return
            if not has_rung:
                break
            while (left := self._rung_at + self.QUIET_S - time.monotonic()) > 0 and time.monotonic() < until:
                await asyncio.sleep(left)
        for event in events:
            await send(event)


async def answer_of(app: App, scope: Scope, body: bytes) -> list[Any]:
    """Return what an app answers to a request that was read."""
    events: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def keep(event: Any) -> None:
        events.append(event)

    await app(scope, receive, keep)
    return events


async def body_of(receive: Any) -> bytes:
    """Return the body of a request, whose length was checked."""
    parts, more = [], True
    while more:
        event = await receive()
        parts.append(event.get("body", b""))
        more = event.get("more_body", False)
    return b"".join(parts)
