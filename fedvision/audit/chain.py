"""Checks that a party wrote the lines of an audit log in this order, and that others remember the same.

What a line holds and what the log promises: ``fedvision.audit.log``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

from fedvision.audit.lines import EMPTY, NEW_KEY, OLD_KEY, Head, read_log, torn_bytes
from fedvision.errors import StorageError, VerificationError
from fedvision.secagg.identity import verify


@dataclass(frozen=True)
class Checked:
    """What a log shows that holds.

    Attributes:
        start: The head before the first line that was checked; ``EMPTY`` for a log from its beginning.
        head: After the last line.
        party: Whose log it is; "" if it has no line.
        last: When the last line was written.
        num_keys: How many keys have signed it, one after another.
        torn_bytes: Length of an unfinished last line (power cut); it counts as not written.
    """

    start: Head
    head: Head
    party: str
    last: datetime | None
    num_keys: int
    torn_bytes: int


def check_log(
    path: Path | Sequence[Path], public: bytes, known: Mapping[int, bytes] | None = None
) -> Checked:
    """Check a log or some of its parts, and return what it shows; see ``verify_log``."""
    files = [path] if isinstance(path, Path) else list(path)
    if not files:
        raise StorageError("there is no file of an audit log to check")
    keys, num_lines = _keys(files, public)
    remaining = dict(known or {})
    start = head = EMPTY
    party, last, signer, is_pinned = "", None, 0, False
    for entry in islice(read_log(files), num_lines):
        if not party:
            party = entry.party
            if entry.count > 1:
                start = head = Head(entry.count - 1, entry.previous)
        if not verify(keys[signer], entry.signature, entry.covered):
            raise entry.wrong(
                "audit-signature",
                "the signature is not that of the key",
                "is it this party's key? if so, the line was changed" if head == start else "",
            )
        is_pinned |= keys[signer] == public
        if entry.party != party:
            raise entry.wrong("audit-party", "is of another party than the lines before")
        if entry.count != head.count + 1:
            raise entry.wrong(
                "audit-count",
                f"says that it is line {entry.count} of the log, but line {head.count + 1} comes here: "
                "one is missing, there twice, or moved",
            )
        if entry.previous != head.digest:
            raise entry.wrong("audit-previous", "does not continue the line before")
        head, last = entry.head, entry.time
        if remaining.pop(head.count, head.digest) != head.digest:
            raise entry.wrong("audit-known", "others remember another line in its place")
        if NEW_KEY in entry.fields:
            signer += 1
    if head != start and not is_pinned:
        raise VerificationError(files[-1], "audit-signature", "no line is signed by the key")
    _check_known(files, remaining, start, head)
    return Checked(start, head, party, last, len(keys), torn_bytes(files[-1]))


def _keys(files: Sequence[Path], public: bytes) -> tuple[list[bytes], int]:
    """Return the keys that sign a log one after another, as its own lines tell, and its number of lines.

    A key after ``public`` counts because the key before names it, signed. One before ``public`` counts
    because a line that ``public`` signed is chained to what the key before wrote.
    """
    keys: list[bytes] = []
    num_lines = 0
    for entry in read_log(files):
        num_lines += 1
        if NEW_KEY in entry.fields:
            old, new = (bytes.fromhex(str(entry.fields[name])) for name in (OLD_KEY, NEW_KEY))
            keys = keys or [old]
            if old != keys[-1]:
                raise entry.wrong("audit-signature", "replaces a key that was not this log's")
            keys.append(new)
    keys = keys or [public]
    if public not in keys:
        raise VerificationError(files[0], "audit-signature", "line 1: the key is none of those of this log")
    return keys, num_lines


def _check_known(files: Sequence[Path], remaining: Mapping[int, bytes], start: Head, head: Head) -> None:
    """Check the remembered heads that are not of a line that was read."""
    for count, digest in sorted(remaining.items()):
        if count > head.count:
            raise VerificationError(
                files[-1],
                "audit-known",
                f"ends with line {head.count} of the log, but others remember line {count}",
                "its end was cut off, or a back-up was restored, which a later line must tell",
            )
        if count < start.count:
            raise VerificationError(
                files[0],
                "audit-not-covered",
                f"begins with line {start.count + 1} of the log, and others remember line {count}",
                "check it together with its earlier parts",
            )
        if digest != start.digest:
            raise VerificationError(
                files[0], "audit-known", "line 1: others remember another line before this one"
            )


def verify_log(path: Path | Sequence[Path], public: bytes, known: Mapping[int, bytes] | None = None) -> Head:
    """Check every line: its spelling, its signature, and that it continues the line before.

    Guarantee: if this returns, the owner of ``public`` (or of a key that it handed over to, or took over
    from) wrote these lines in this order, from the first line of ``path`` to the head that is returned, and
    every head in ``known`` is one of this log's. A changed, removed, added, repeated or moved line is found.

    Not found: that the end is missing. A log whose last lines were cut off is a good shorter log; ``known``,
    what another party remembers, shows it. An unfinished last line counts as not there. Nor is it found that
    the owner of the key wrote what is not so, or rewrote all that is after the last head in ``known``.

    Args:
        path: One file, or parts of a log in order (``parts``). Where the first line is not the log's first
            (after ``rotate``), the check begins there and takes what came before as that line states it;
            ``check_log`` returns from where.
        public: The party's key, 32 bytes; where the log has had several keys, any of them that signed a line.
        known: Heads that others remember, digest by count, see ``peer_heads``.

    Returns:
        The head after the last line, ``EMPTY`` if there is none.

    Raises:
        StorageError: A file cannot be read.
        VerificationError: Names file, line and rule. ``audit-not-covered``: a head of ``known`` is from
            before the first line, in a part that was not given.
    """
    return check_log(path, public, known).head


def peer_heads(path: Path | Sequence[Path]) -> dict[str, dict[int, bytes]]:
    """Return the heads of other parties that a log remembers: digest by count, by name.

    The log itself is not verified: do that too, with its party's key. After ``verify_log(x, key_of_x,
    peer_heads(y)["x"])``, x has not rewritten what stood in its log when it told y the last of these heads.

    Raises:
        StorageError: A file cannot be read.
        VerificationError: A line is damaged, or a peer told two heads with one count: there are two versions
            of its log.
    """
    found: dict[str, dict[int, bytes]] = {}
    for entry in read_log(path):
        if entry.kind != "peer-head":
            continue
        peer, count = str(entry.fields["name"]), entry.fields["count"]
        digest = bytes.fromhex(str(entry.fields["digest"]))
        assert isinstance(count, int)
        if found.setdefault(peer, {}).setdefault(count, digest) != digest:
            raise entry.wrong(
                "audit-known",
                f"{peer} told another head for line {count} before: its log was rewritten",
                f"ask {peer}: it was changed, or a back-up was restored",
            )
    return found
