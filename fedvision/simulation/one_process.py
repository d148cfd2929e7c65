"""Carry a run's messages inside this process: for a single site, and for tests.

Requests are packed, unpacked and checked exactly as over Flower; only the transport is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedvision.wire.messages import Reply, Request
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

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        """Send each node its request; yield each reply. See ``fedvision_server.federation.Link``."""
        from fedvision_sites.app import answer

        for node, request in requests.items():
            yield node, unpack(answer(self._configs[node], pack(request)), Reply)
