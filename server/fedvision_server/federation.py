"""The sites of a run as the server sees them: how they are reached, who does what, and their first hello."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedvision.config import Job
from fedvision.errors import RoundError
from fedvision.secagg.codec import encode
from fedvision.updates.layout import Layout
from fedvision.wire.messages import EMPTY, HelloReply, HelloRequest, Refusal, Reply, Request, as_vector
from fedvision_server.jobs import RunFolder
from fedvision_server.secure import SecureServer, ServerKeys

Observer = Callable[[dict[str, Any]], None]


class Link(Protocol):
    """What carries requests to sites and replies back."""

    def nodes(self) -> Sequence[int]:
        """Return the addresses of the sites that can be reached."""
        ...

    def ask(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        """Send each node its request and yield each reply as it comes, in any order.

        A site that fails to answer yields a ``Refusal``.
        """
        ...


@dataclass(frozen=True)
class Cohort:
    """Which sites do what in a run.

    Attributes:
        train: Send updates.
        validate: Their validation cases choose the best model.
        test: Judge the final model; mean, worst and pooled are over these.
        held_out: Judge the final model, and are reported apart: data that no training has seen.
    """

    train: tuple[str, ...]
    validate: tuple[str, ...]
    test: tuple[str, ...]
    held_out: tuple[str, ...] = ()


@dataclass
class Federation:
    """What a run needs at hand: fixed after ``meet``."""

    job: Job
    link: Link
    folder: RunFolder
    layout: Layout
    cohort: Cohort
    observe: Observer
    addresses: dict[str, int]
    sizes: dict[str, HelloReply]
    secure: SecureServer | None = None

    def tell(self, event: dict[str, Any]) -> None:
        """Write an event to ``rounds.jsonl`` and show it to whoever watches."""
        self.folder.record(event)
        self.observe(event)

    def ask(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Reply]]:
        """Ask each site and yield its name with a reply that is really its own."""
        names = {self.addresses[site]: site for site in requests}
        for node, reply in self.link.ask({self.addresses[site]: r for site, r in requests.items()}):
            site = names[node]
            request = requests[site]
            number = 0 if isinstance(request, HelloRequest) else request.round
            answered = 0 if isinstance(reply, HelloReply) else reply.round
            if isinstance(reply, Refusal) and not reply.site:
                yield site, dataclasses.replace(reply, site=site)
            elif reply.site != site or reply.job_digest != request.job_digest or answered != number:
                yield site, Refusal(request.job_digest, site, number, "message")
            else:
                yield site, reply


def meet(
    job: Job,
    link: Link,
    folder: RunFolder,
    layout: Layout,
    cohort: Cohort,
    observe: Observer,
    keys: ServerKeys | None,
) -> Federation:
    """Ask every site for its name and size, and with secure aggregation enrol those that train.

    Raises:
        RoundError: A site of the cohort is absent, refuses the job, or two have one name.
    """
    if job.aggregation.secure and keys is None:
        raise RoundError("the job wants secure aggregation, but the server has no charter and no key")
    documents = as_vector(encode(keys.documents)) if keys else EMPTY
    request = HelloRequest(job.to_json(), job.digest(), layout.digest, documents)
    addresses: dict[str, int] = {}
    sizes: dict[str, HelloReply] = {}
    refused: dict[str, str] = {}
    for node, reply in link.ask(dict.fromkeys(link.nodes(), request)):
        if isinstance(reply, Refusal):
            refused[reply.site] = reply.code
        elif isinstance(reply, HelloReply):
            if reply.site in addresses:
                raise RoundError(f"two sites are named {reply.site}")
            addresses[reply.site] = node
            sizes[reply.site] = reply
    needed = sorted({*cohort.train, *cohort.validate, *cohort.test, *cohort.held_out})
    for site in needed:
        if site in refused:
            raise RoundError(
                f"site {site} refuses the job ({refused[site]} error)", f"the log of {site} says why"
            )
        if site not in addresses:
            raise RoundError(f"site {site} does not answer")
    for site in cohort.train:
        if sizes[site].num_train == 0:
            raise RoundError(
                f"site {site} has no training case", "leave it out of data.sites, or list it in held_out"
            )
    federation = Federation(job, link, folder, layout, cohort, observe, addresses, sizes)
    if keys is not None and job.aggregation.secure:
        federation.secure = SecureServer(keys, folder.path, federation)
    return federation
