"""Carry a run's messages inside this process: for a single site, for tests, and for the lab.

Requests are packed, unpacked and checked exactly as over Flower; only the transport is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedvision.wire.messages import Reply, Request
from fedvision.wire.records import pack, unpack

if TYPE_CHECKING:
    from fedvision_sites.work import Site, SiteConfig


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


class SiteLink:
    """Asks sites that are there as objects; malicious ones last, so that they have seen all others.

    Every site keeps its cases and its network over the whole run. What goes wrong in a site beyond a refusal
    stops the run: a lab must not take a mistake of its own for a defence.

    Args:
        sites: Node i is ``sites[i]``.
        last: Nodes that are asked after all others.
    """

    def __init__(self, sites: Sequence["Site"], last: Sequence[int] = ()) -> None:
        self._sites = list(sites)
        self._last = frozenset(last)

    def nodes(self) -> list[int]:
        """Return the sites' addresses."""
        return list(range(len(self._sites)))

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        """Send each node its request; yield each reply. See ``fedvision_server.federation.Link``."""
        for node in sorted(requests, key=lambda node: (node in self._last, node)):
            asked = unpack(pack(requests[node]), Request)
            yield node, unpack(pack(self._sites[node].answer(asked)), Reply)
