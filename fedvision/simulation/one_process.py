"""Carry a run's messages inside this process: for a single site, and for tests.

Requests are packed, unpacked and checked exactly as over Flower; only the transport is left out.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedvision.wire.messages import EvaluateReply, HelloReply, Refusal, Reply, Request, TrainReply
from fedvision.wire.records import pack, unpack

if TYPE_CHECKING:
    from fedvision_sites.work import SiteConfig


class LocalLink:
    """Asks sites one after the other, in this process. Node i is ``configs[i]``."""

    def __init__(self, configs: Sequence["SiteConfig"]) -> None:
        self._configs = list(configs)

    def nodes(self) -> list[int]:
        """Return the sites' addresses."""
        return list(range(len(self._configs)))

    def ask(self, request: Request, nodes: Sequence[int]) -> Iterator[tuple[int, Reply]]:
        """Send ``request`` to ``nodes``; yield each reply. See ``fedvision_server.round.Link``."""
        from fedvision_sites.app import answer

        for node in nodes:
            content = answer(self._configs[node], pack(request))
            yield node, unpack(content, HelloReply | TrainReply | EvaluateReply | Refusal)
