"""Evidence against sites: signatures verified, and the lie shown again where the evidence holds all of it.

    norm       the sketch that the site signed is far over the bound
    sketch     the site's own report says another sketch than the one it sent
    pair, not opened    the reports of two sites contradict each other; who of them lied takes their keys

Of all other rules the messages show who said what; the rest was seen by the server only.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedvision.audit.claims import Claims
from fedvision.audit.sums import shown_by
from fedvision.errors import MessageError, ProtocolError, StorageError, VerificationError
from fedvision.secagg import messages
from fedvision.secagg.codec import decode
from fedvision.secagg.messages import Evidence, Masked, Report, Signed, Sketch
from fedvision.secagg.schedule import Consortium, read_signed
from fedvision.secagg.sketch import PROOF_SLACK, is_within
from fedvision.storage import read_json

NAME = re.compile(r"(train|validate|test)-(\d{4,})-(\d+)-site-(\d+)")
_KINDS = {
    getattr(kind, "KIND"): kind  # noqa: B009, set by a decorator that type checkers do not see
    for kind in vars(messages).values()
    if isinstance(kind, type) and hasattr(kind, "KIND") and kind is not Signed
}


@dataclass(frozen=True)
class Accusation:
    """A file of evidence whose signatures hold.

    Attributes:
        site: Name of the site.
        rule: What it broke.
        num_signatures: How many signatures it holds.
        is_shown: Whether the messages alone show the lie.
    """

    site: str
    rule: str
    num_signatures: int
    is_shown: bool


def check_evidence(claims: Claims, consortium: Consortium) -> list[Accusation]:
    """Check all evidence of a run, and that it is against exactly the sites that were expelled.

    Raises:
        VerificationError: A signature does not hold, the messages show no lie, or a site is out without
            evidence.
    """
    folder, expelled_path = claims.secagg / "evidence", claims.secagg / "expelled.json"
    found = {}
    for path in sorted(folder.glob("[!.]*")):
        found[path.name] = _check(consortium, path)
    try:
        expelled = read_json(expelled_path) if expelled_path.exists() else {}
    except StorageError:
        raise VerificationError(expelled_path, "format", "not JSON") from None
    accused = {item.site: item.rule for item in found.values()}
    if accused != expelled:
        raise VerificationError(expelled_path, "evidence", "not the sites and rules that the evidence names")
    told = {record.get("evidence"): (record.get("site"), record.get("rule")) for record in claims.expelled}
    if told != {name: (item.site, item.rule) for name, item in found.items()}:
        raise VerificationError(claims.record, "evidence", "`expelled` is not what the evidence says")
    return list(found.values())


def _check(consortium: Consortium, path: Path) -> Accusation:
    with shown_by(path):
        item = decode(path.read_bytes(), Evidence)
        match = NAME.fullmatch(path.name)
        if match is None or int(match[4]) != item.site:
            raise ProtocolError("name", "not the name of evidence against this site")
        if item.site not in consortium.charter.sites:
            raise ProtocolError("roster", f"site number {item.site} is not enrolled")
        said = [(entry.sender, _read(consortium, entry)) for entry in item.messages]
        is_of_all = item.rule == "norm" and consortium.charter.level == "gram"  # the products of all sites
        if not is_of_all and item.site not in {sender for sender, _ in said}:
            raise ProtocolError("sender", "the accused site has signed none of the messages")
        is_shown = _shows_lie(consortium, item, said)
    name = consortium.roster.member(item.site).name
    return Accusation(name, item.rule, len(said), is_shown)


def _read(consortium: Consortium, entry: Signed) -> object:
    kind = _KINDS.get(entry.body[3]) if len(entry.body) > 3 else None
    if kind is None:
        raise MessageError("a message of the evidence is of no known kind")
    return read_signed(consortium, entry, kind, entry.sender)


def _shows_lie(consortium: Consortium, item: Evidence, said: list[tuple[int, object]]) -> bool:
    """Whether the messages alone show the lie.

    Raises:
        ProtocolError: They should, and show none.
    """
    own = [message for sender, message in said if sender == item.site]
    sketches = [message for message in own if isinstance(message, Sketch)]
    reports = [message for _, message in said if isinstance(message, Report)]
    if len({getattr(message, "tau", b"") for _, message in said if hasattr(message, "tau")}) > 1:
        raise ProtocolError("session", "the messages are of several sessions")
    if item.rule == "norm" and sketches and sketches[0].values:
        values = np.frombuffer(sketches[0].values, "<u4").astype(np.uint32)
        lies = any(isinstance(message, Masked) for message in own)
        lies = lies and not is_within(values, consortium.encoding.norm_bound, PROOF_SLACK)
    elif item.rule == "sketch" and sketches and sketches[0].values:
        lies = any(report in own and report.own != sketches[0].values for report in reports)
    elif item.rule in ("pair", "not opened") and len(reports) == 2:
        lies = _contradict([sender for sender, m in said if isinstance(m, Report)], reports)
    else:
        return False
    if not lies:
        raise ProtocolError("evidence", f"the messages do not show what rule {item.rule} says")
    return item.rule in ("norm", "sketch")


def _contradict(senders: list[int], reports: list[Report]) -> bool:
    """Whether two reports say different things of the pair that their senders are."""
    (first, second), (one, two) = senders, reports
    claims = [{pair.site: pair.values for pair in report.pairs} for report in (one, two)]
    return claims[0].get(second) != claims[1].get(first)
