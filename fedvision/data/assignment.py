"""Site, patient and split of every case that an importer found: what the user says, else the source.

Rules:
- A patient is in one split only; where the given splits say otherwise, nothing is imported.
- Without word on patients every case is its own patient, and that is said.
- A case that the given table, pattern or list says nothing about is an error, never a guess.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedvision.data.images import file_suffix
from fedvision.data.manifest import SPLITS, Split
from fedvision.data.sources import Found, Source, first_names
from fedvision.data.splits import split_named, split_patients, spread_patients
from fedvision.data.tables import values_from_table
from fedvision.errors import ConfigError, DataError
from fedvision.seeds import derive_seed

DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)


@dataclass(frozen=True)
class Assignment:
    """How the user wants cases to be given a site, a patient and a split.

    Attributes:
        site: All cases are of this site. Exactly one of the four ways to name sites is given.
        sites_from: ``FILE.csv:COLUMN`` with the site of each case.
        sites_from_folders: The folders directly in the source are the sites.
        random_sites: Patients are dealt to so many artificial sites.
        patient_from: ``FILE.csv:COLUMN`` with the patient of each case.
        patient_pattern: Regular expression on the case's name; its first group is the patient.
        split_from: ``FILE.csv:COLUMN`` with train, val or test for each case.
        fractions: Of train, val and test, drawn anew by patient at each site; None for the source's own
            splits, or ``DEFAULT_FRACTIONS`` if it has none.
        seed: Of random sites and splits.
    """

    site: str | None = None
    sites_from: str | None = None
    sites_from_folders: bool = False
    random_sites: int | None = None
    patient_from: str | None = None
    patient_pattern: str | None = None
    split_from: str | None = None
    fractions: tuple[float, float, float] | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise ``ConfigError`` unless the choices make sense together."""
        ways = (self.site, self.sites_from, self.sites_from_folders or None, self.random_sites)
        if sum(way is not None for way in ways) != 1:
            raise ConfigError(
                "say in exactly one way which site a case is of",
                "--site NAME, --sites-from FILE.csv:COLUMN, --sites-from-folders, or --random-sites N",
            )
        if self.patient_from is not None and self.patient_pattern is not None:
            raise ConfigError("give one of --patient-from and --patient-pattern")
        if self.split_from is not None and self.fractions is not None:
            raise ConfigError("give one of --split-from and --fractions")


@dataclass(frozen=True)
class Assigned:
    """What is now known of every case, one entry a case in the order of the source.

    Attributes:
        ids: Names of the cases, each once.
        patients: The patient of each case.
        sites: The site of each case, a valid name.
        splits: The split of each case.
        notes: What the user should know, the source's notes first.
    """

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    sites: tuple[str, ...]
    splits: tuple[Split, ...]
    notes: tuple[str, ...]


def _patients(
    found: Sequence[Found], ids: Sequence[str], how: Assignment, source: Path, notes: list[str]
) -> list[str]:
    if how.patient_from is not None:
        return values_from_table(how.patient_from, found, source)
    if how.patient_pattern is None:
        notes.append(
            "every case counts as a patient of its own; if a patient has several, give --patient-from or "
            "--patient-pattern, or scans of one patient may end up in two splits"
        )
        return list(ids)
    try:
        pattern = re.compile(how.patient_pattern)
    except re.error as error:
        raise ConfigError(f"--patient-pattern: {error}, got {how.patient_pattern!r}") from None
    if pattern.groups < 1:
        raise ConfigError(
            f"--patient-pattern needs a group in brackets, got {how.patient_pattern!r}",
            "such as '^(p[0-9]+)_'",
        )
    matches = [pattern.search(case.stem) for case in found]
    unmatched = [case.stem for case, match in zip(found, matches, strict=True) if not match or not match[1]]
    if unmatched:
        raise DataError(
            f"--patient-pattern matches {len(found) - len(unmatched)} of {len(found)} names, "
            f"not {first_names(unmatched)}"
        )
    return [match[1] for match in matches if match]


def _site_name(text: str) -> str:
    """Return a name that a site may have: other characters become hyphens."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", text.strip()).strip("-._")[:64]
    if not name:
        raise DataError(f"a site cannot be named {text!r}", "letters, digits, hyphen, dot and underscore")
    return name


def _sites(found: Sequence[Found], patients: Sequence[str], how: Assignment, source: Path) -> list[str]:
    if how.site is not None:
        return [_site_name(how.site)] * len(found)
    if how.random_sites is not None:
        sites = spread_patients(patients, how.random_sites, how.seed)
        return [sites[patient] for patient in patients]
    if how.sites_from is not None:
        raw = values_from_table(how.sites_from, found, source)
    else:
        raw = [case.relative.split("/")[0] for case in found]
        shallow = [case.relative for case in found if case.relative.count("/") < 1]
        telling = {
            name for name in raw if name.lower() in {"images", "imagestr", "jpegimages"} or split_named(name)
        }
        if shallow or telling:
            shown = shallow[0] if shallow else f"{sorted(telling)[0]}/"
            raise DataError(
                f"{source}: its folders are not sites: it holds {shown}",
                "with --sites-from-folders the first folder below the source is the site",
            )
    names = {text: _site_name(text) for text in dict.fromkeys(raw)}
    if len(set(names.values())) != len(names):
        twice = [text for text, name in names.items() if list(names.values()).count(name) > 1]
        raise DataError(f"the sites {first_names(twice)} would have one name, {names[twice[0]]}")
    return [names[text] for text in raw]


def _given_splits(
    found: Sequence[Found], how: Assignment, source: Path, notes: list[str]
) -> list[Split] | None:
    """Return the splits of a table or of the source; None if they are to be drawn."""
    if how.split_from is not None:
        words = values_from_table(how.split_from, found, source)
        splits = [split_named(word) for word in words]
        if None in splits:
            word = words[splits.index(None)]
            raise DataError(f"{how.split_from}: a split is train, val or test, got {word!r}")
        return [split for split in splits if split]
    known = [case.split for case in found if case.split]
    if how.fractions is not None or not known:
        return None
    without = [case.stem for case in found if case.split is None]
    if without:
        raise DataError(
            f"{source}: {len(without)} of {len(found)} cases are in no split of the source "
            f"({first_names(without)})",
            "give --split-from, or --fractions to draw all splits anew",
        )
    notes.append("splits are the source's own")
    missing = [split for split in SPLITS if split not in known]
    if missing:
        notes.append(f"the source has no {' and no '.join(missing)} split; --fractions draws all splits anew")
    return known


def _splits(
    found: Sequence[Found],
    patients: Sequence[str],
    sites: Sequence[str],
    how: Assignment,
    source: Path,
    notes: list[str],
) -> list[Split]:
    given = _given_splits(found, how, source, notes)
    if given is None:
        fractions = how.fractions or DEFAULT_FRACTIONS
        notes.append(
            f"splits drawn by patient, {'/'.join(f'{part:g}' for part in fractions)}, seed {how.seed}"
        )
        drawn = {
            site: split_patients(
                [p for p, s in zip(patients, sites, strict=True) if s == site],
                fractions,
                derive_seed(how.seed, "import", site),
            )
            for site in dict.fromkeys(sites)
        }
        return [drawn[site][patient] for site, patient in zip(sites, patients, strict=True)]
    seen: dict[tuple[str, str], Split] = {}
    torn = []
    for site, patient, split in zip(sites, patients, given, strict=True):
        if seen.setdefault((site, patient), split) != split:
            torn.append(patient)
    if torn:
        raise DataError(
            f"{source}: {len(set(torn))} patients would be in two splits ({first_names(torn)})",
            "--fractions draws splits by patient",
        )
    return given


def _case_ids(found: Sequence[Found]) -> list[str]:
    """Return the name of each case; names that are not single grow by the path below the source."""
    ids = [case.stem for case in found]
    longer = (
        lambda case: case.relative.removesuffix(file_suffix(case.image[0])),
        lambda case: case.relative,
    )
    for name in longer:
        count = Counter(ids)
        ids = [one if count[one] == 1 else name(case) for one, case in zip(ids, found, strict=True)]
    return ids


def assign(content: Source, how: Assignment, folder: Path) -> Assigned:
    """Decide site, patient and split of every case.

    Args:
        content: What the importer found.
        how: What the user said.
        folder: The source's folder, where tables are looked for.

    Raises:
        ConfigError: The choices contradict each other.
        DataError: A case has no site, patient or split, or a patient would be in two splits.
    """
    how.check()
    notes = list(content.notes)
    ids = _case_ids(content.found)
    patients = _patients(content.found, ids, how, folder, notes)
    sites = _sites(content.found, patients, how, folder)
    splits = _splits(content.found, patients, sites, how, folder, notes)
    return Assigned(tuple(ids), tuple(patients), tuple(sites), tuple(splits), tuple(notes))
