"""What a private run promised to patients, and what it has cost them by the sites' own ledgers."""

import math
from collections.abc import Sequence
from pathlib import Path

from fedvision.errors import VerificationError
from fedvision.privacy.accounting import epsilon
from fedvision.privacy.ledger_lines import checked_entries
from fedvision.privacy.spending import Spent, spent_by
from fedvision.report.markup import Column, Markup, section, table, tag
from fedvision.report.notation import MISSING
from fedvision.report.record import RunRecord
from fedvision.secagg.identity import verify

LEDGER = "privacy-ledger.jsonl"
_MODES = {
    "distributed": "distributed: a round is one gradient; each site adds its share of the noise under the "
    "mask, and the server takes the step",
    "local": "local: each site adds all of the noise, at every step of its training",
}
_INTRO = (
    "Differential privacy for each patient whose images train: whatever can be seen of the training would "
    "have been at most e^epsilon times less likely without any one of them, but for a chance of delta. All "
    "images of a patient count as one. Epsilon 1 is strong, above 20 it says little."
)
_NOT_COVERED = (
    "Not covered: validation and test results, which are exact sums over other patients; how many patients a "
    "site has; choices that people made after they had looked at results, such as the learning rate; and the "
    "same person at two sites, who counts at each alone. That a site drew, clipped and added noise as it "
    "should is its own word."
)


def promise_section(record: RunRecord) -> Markup:
    """Return what a private run promised to patients; nothing for another run.

    Raises:
        StorageError: A ledger cannot be read.
    """
    job = record.job
    if not job.privacy.is_on:
        return Markup()
    ledgers = {site: folder / LEDGER for site, folder in record.site_folders.items()}
    there = {site: path for site, path in ledgers.items() if path.exists()}
    shown = (
        [table(_COLUMNS, [row for site, path in there.items() for row in _rows(site, path)])] if there else []
    )
    where = (
        "From the ledgers of the sites, whose signatures were checked."
        if there
        else "What was spent stands in each site's own ledger, which is never sent: `fedvision-site privacy` "
        "shows it there."
    )
    return section(
        "What was promised to patients",
        table([Column("What"), Column("Value")], _terms(record)),
        *shown,
        tag("p", where, class_="note"),
        tag("p", _NOT_COVERED, class_="note"),
        intro=_INTRO,
    )


_COLUMNS = (
    Column("Site"),
    Column("Rounds", True, "that were reserved in the ledger"),
    Column("Epsilon", True, "if secure aggregation holds"),
    Column("If it fails", True, "with the site's own noise alone"),
    Column("At delta", True, "chance that the promise does not hold"),
)


def _terms(record: RunRecord) -> list[tuple[str, object]]:
    """Return the job's terms, as rows of a table."""
    wanted, agreement = record.job.privacy, record.agreement
    noise = f"{wanted.noise_multiplier:g} clip norms"
    if wanted.mode == "local":
        noise += " in each step of a site"
    elif agreement is not None:
        noise += f" in the sum of any {agreement.charter.num_honest} honest sites, the charter says"
    return [
        ("Mode", _MODES.get(wanted.mode, wanted.mode)),
        ("Clip norm of a patient", f"{wanted.clip_norm:g}, of all his images together"),
        ("Noise", noise),
        ("Patients drawn", f"{wanted.patients} on average at each site, each by chance, for each step"),
    ]


def _rows(site: str, path: Path) -> Sequence[Sequence[object]]:
    """Return the rows of a site's ledger; one that says so if it does not hold."""
    try:
        found = spent_by(checked_entries(path, verify), epsilon)
    except VerificationError as error:
        return [(site, f"the ledger does not hold ({error.rule})", MISSING, MISSING, MISSING)]
    return [_row(site, one) for one in found]


def _row(site: str, one: Spent) -> Sequence[object]:
    name = site if one.data_set == site else f"{site}, data set {one.data_set}"
    costs = [
        f"{cost:.3g}" if math.isfinite(cost) else "no bound" for cost in (one.epsilon, one.epsilon_alone)
    ]
    return (name, f"{one.rounds:,}", *costs, f"{one.delta:.2g}")
