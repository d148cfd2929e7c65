"""The site's Flower ClientApp: unpacks and checks a message, hands it to ``work.Site``, packs the reply.

The text of an exception would be sent to the server word for word, so none leaves this module: whatever
goes wrong becomes a ``Refusal`` with a code, and the text goes to the site's own log.
"""

import logging
import traceback
from collections.abc import Callable, Sequence

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedvision.errors import MessageError
from fedvision.storage import append_line
from fedvision.wire.messages import Refusal, Request
from fedvision.wire.records import pack, unpack
from fedvision_sites.work import Site, SiteConfig

logger = logging.getLogger(__name__)

_sites: dict[SiteConfig, Site] = {}
MAX_WARM_SITES = 8


def warm_site(config: SiteConfig) -> Site:
    """Return this process's site, with what it kept from earlier messages."""
    site = _sites.pop(config, None) or Site(config)
    _sites[config] = site
    while len(_sites) > MAX_WARM_SITES:
        del _sites[next(iter(_sites))]
    return site


def answer(config: SiteConfig, content: RecordDict) -> RecordDict:
    """Answer one message, whatever it holds; never raises."""
    digest, number = "", 0
    try:
        request: Request = unpack(content, Request)
        digest, number = request.job_digest, getattr(request, "round", 0)
        return pack(warm_site(config).answer(request))
    except MessageError as error:
        logger.warning("message refused: %s", error)
        return pack(Refusal(digest, config.name, number, error.code))
    except Exception:  # the edge: nothing but a code may reach the server
        text = traceback.format_exc()
        logger.error("round %s failed: %s", number, text)
        append_line(config.state / "log.jsonl", {"round": number, "failed": text})
        return pack(Refusal(digest, config.name, number, "internal"))


def create_app(configs: Sequence[SiteConfig]) -> ClientApp:
    """Return the ClientApp of one site, or of all sites of a simulation.

    Args:
        configs: The sites. With several, Flower's ``partition-id`` of the node says which one is meant.
    """
    sites = tuple(configs)

    def handle(message: Message, context: Context) -> Message:
        config = sites[int(context.node_config.get("partition-id", 0))]
        return Message(answer(config, message.content), reply_to=message)

    return answering(handle)


def answering(handle: Callable[[Message, Context], Message]) -> ClientApp:
    """Return a ClientApp that answers every message of ours in the same way."""
    app = ClientApp()
    app.query("hello")(handle)
    app.query("secure")(handle)
    app.train("update")(handle)
    app.evaluate("statistics")(handle)
    return app


def _handle_stock(message: Message, context: Context) -> Message:
    from fedvision_sites import stock as program

    return Message(program.answer(message.content), reply_to=message)


stock = answering(_handle_stock)
"""For `fedvision-site run --stock`: one site, whose folder the environment names, see ``stock.py``."""
