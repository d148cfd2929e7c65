"""The one way in which a judgement is written in a message, and its reading with every check."""

import json

from fedvision.defence.judge import Judgement, SiteJudgement
from fedvision.errors import DefenceError, MessageError


def write_judgement(judgement: Judgement) -> bytes:
    """Return a judgement as canonical JSON: sorted keys, no spaces, ASCII."""
    return json.dumps(judgement.to_json(), sort_keys=True, separators=(",", ":")).encode("ascii")


def read_judgement(data: bytes) -> dict[int, SiteJudgement]:
    """Return what a message says about each site, by number; nothing of an empty one.

    Raises:
        MessageError: It is no judgement.
    """
    if not data:
        return {}
    try:
        found = Judgement.from_json(json.loads(data.decode("ascii"), parse_constant=_refuse))
    except (ValueError, DefenceError, RecursionError):
        raise MessageError("a judgement is malformed") from None
    return {site.site: site for site in found.sites}


def _refuse(name: str) -> float:
    raise ValueError(name)
