"""Who is in which split and at which site: always by patient, never by case.

Patients are ordered by a hash of the seed and their name. So the outcome depends neither on the order of
the files nor on the version of a library.
"""

from collections.abc import Iterable, Sequence

from fedvision.data.manifest import SPLITS, Split
from fedvision.errors import ConfigError
from fedvision.seeds import derive_seed

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def split_named(text: str) -> Split | None:
    """Return the split that a folder's or a table's word means, or None."""
    return SPLIT_NAMES.get(text.strip().lower())


def parse_fractions(text: str) -> tuple[float, float, float]:
    """Read the shares of train, val and test, such as ``0.7,0.1,0.2``.

    Raises:
        ConfigError: There are not three numbers >= 0 with sum 1 and the first > 0.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or min(values) < 0 or values[0] == 0 or not abs(sum(values) - 1) <= 1e-6:
        raise ConfigError(
            f"fractions must be three numbers with sum 1 for train, val and test, got {text!r}",
            "for example --fractions 0.7,0.1,0.2",
        )
    return values[0], values[1], values[2]


def _shuffled(patients: Iterable[str], seed: int, purpose: str) -> list[str]:
    return sorted(set(patients), key=lambda patient: (derive_seed(seed, purpose, patient), patient))


def _counts(total: int, fractions: Sequence[float]) -> list[int]:
    """Return whole numbers near ``total * fractions`` with that sum; at least 1 each where it can be."""
    counts = [int(total * fraction) for fraction in fractions]
    by_remainder = sorted(range(len(fractions)), key=lambda k: counts[k] - total * fractions[k])
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    for k, fraction in enumerate(fractions):
        largest = counts.index(max(counts))
        if fraction > 0 and counts[k] == 0 and counts[largest] > 1:
            counts[largest] -= 1
            counts[k] += 1
    if counts[0] == 0 < fractions[0]:
        counts[counts.index(max(counts))] -= 1
        counts[0] += 1
    return counts


def split_patients(patients: Iterable[str], fractions: Sequence[float], seed: int) -> dict[str, Split]:
    """Divide patients into train, val and test.

    Guarantee: every patient is in exactly one split; the sizes are within one patient of the fractions,
    except that a split with a fraction > 0 gets a patient whenever there are enough, train first.

    Args:
        patients: Names, repeats allowed.
        fractions: Of train, val and test, sum 1.
        seed: Another seed gives another division.
    """
    ordered = _shuffled(patients, seed, "split")
    names: list[Split] = []
    for split, count in zip(SPLITS, _counts(len(ordered), fractions), strict=True):
        names += [split] * count
    return dict(zip(ordered, names, strict=True))


def spread_patients(patients: Iterable[str], num_sites: int, seed: int) -> dict[str, str]:
    """Deal patients to ``site-1``, ``site-2``, ...: sizes differ by one patient at most.

    Raises:
        ConfigError: There are fewer patients than sites.
    """
    ordered = _shuffled(patients, seed, "site")
    if not 1 <= num_sites <= len(ordered):
        raise ConfigError(f"cannot spread {len(ordered)} patients over {num_sites} sites")
    return {patient: f"site-{number % num_sites + 1}" for number, patient in enumerate(ordered)}
