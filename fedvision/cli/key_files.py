"""A roster from the key files that a federation's parties sent, and what is new in it.

Rules:
- Sites get numbers in alphabetical order. A site of the previous roster keeps its number, and the number of
  a site that has just left is not given away.
- All files may lie in one folder: a key that is the server's or governance's is not taken for a site's.
- Two files that share a name or a key are an error, never a choice.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedvision.errors import ConfigError
from fedvision.secagg import identity
from fedvision.secagg.documents import Refused, content_of, validated
from fedvision.secagg.roster import MAX_SITES, Roster


@dataclass(frozen=True)
class NewRoster:
    """A roster to be signed.

    Attributes:
        roster: It.
        changes: Against the previous roster, by site name; the server's stands under ``""``.
        notes: What the person who signs should know beside that.
    """

    roster: Roster
    changes: Mapping[str, str]
    notes: tuple[str, ...]


def party(path: Path) -> tuple[str, bytes]:
    """Return name and public key of a ``.pub`` file or of one's own ``.pem``.

    Raises:
        ConfigError: It is no public key.
        StorageError: It is no private key, or others than this user can read it.
    """
    if path.suffix == ".pem":
        own = identity.load(path)
        return own.name, own.public
    return identity.parse_public(content_of(path).decode("ascii", "replace"), str(path))


def new_roster(
    files: Iterable[Path],
    governance_key: bytes,
    federation: str | None,
    server: Path | None,
    previous: Roster | None,
) -> NewRoster:
    """Return the roster of exactly the sites in ``files``.

    Args:
        files: Public keys and folders of them.
        governance_key: The key that will sign, 32 bytes.
        federation: Its name; None for the previous one's.
        server: The server's public key; None for the previous one's.
        previous: The verified roster that this one replaces.

    Raises:
        ConfigError: Something is missing, contradicts the previous roster, or is there twice.
    """
    if previous is None and (federation is None or server is None):
        raise ConfigError(
            "a first roster needs --federation NAME and --server SERVER.pub", "or --previous ROSTER"
        )
    if previous is not None and federation not in (None, previous.federation):
        raise ConfigError("--federation is not that of the previous roster", f"it is {previous.federation}")
    old = {} if previous is None else {one.name: one for one in previous.sites}
    server_key = b"" if previous is None else bytes.fromhex(previous.server)
    if server is not None:
        server_key = party(server)[1]
    keys, notes = _site_keys(files, {server_key: "the server's", governance_key: "governance's"})
    notes += [f"{name} leaves the federation" for name in sorted(old.keys() - keys.keys())]
    numbers = _numbers(keys, {name: one.number for name, one in old.items()})
    content = {
        "federation": federation if previous is None else previous.federation,
        "serial": 1 if previous is None else previous.serial + 1,
        "sites": [
            {"number": number, "name": name, "key": keys[name].hex()}
            for number, name in sorted((number, name) for name, number in numbers.items())
        ],
        "server": server_key.hex(),
    }
    try:
        roster = validated(Roster, content)
    except Refused as refused:
        raise ConfigError(refused.text, refused.hint) from None
    changes = {}
    if previous is not None:
        for one in roster.sites:
            if one.name not in old:
                changes[one.name] = "new"
            elif old[one.name].key != one.key:
                changes[one.name] = "NEW KEY"
        if roster.server != previous.server:
            changes[""] = "NEW KEY"
    return NewRoster(roster, changes, tuple(notes))


def _numbers(names: Iterable[str], old: Mapping[str, int]) -> dict[str, int]:
    """Return each name's number: the old one, or the next that is free."""
    free = iter(sorted(set(range(1, MAX_SITES + 1)) - set(old.values())))
    numbers = {}
    for name in sorted(names):
        number = old[name] if name in old else next(free, None)
        if number is None:
            raise ConfigError(
                f"there are {MAX_SITES} site numbers, and none is free",
                "sign without --previous, which numbers all sites anew",
            )
        numbers[name] = number
    return numbers


def _site_keys(files: Iterable[Path], others: Mapping[bytes, str]) -> tuple[dict[str, bytes], list[str]]:
    """Return the sites' keys by name, without those in ``others``, and a note for each of these."""
    paths: list[Path] = []
    for path in files:
        inside = sorted(path.glob("*.pub")) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"{path}: no .pub file in this folder")
        paths += inside
    keys: dict[str, bytes] = {}
    origin: dict[str, Path] = {}
    notes = []
    for path in paths:
        name, public = party(path)
        if public in others:
            notes.append(f"{path} is {others[public]} key, not a site's")
            continue
        for one, key in keys.items():
            same_name, same_key = one.casefold() == name.casefold(), key == public
            if same_name != same_key:
                shared = "name" if same_name else "key"
                raise ConfigError(
                    f"{origin[one]} and {path} have the same {shared}", "every site has its own name and key"
                )
        keys[name], origin[name] = public, path
    if not keys:
        raise ConfigError("no site's key given", "FILE... are .pub files, or folders of them")
    return keys, notes
