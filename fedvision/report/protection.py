"""What left the sites, what the server saw of it, and by which rules: with secure aggregation and without."""

import shlex

from fedvision.report.markup import Column, Markup, joined, section, table, tag
from fedvision.report.notation import counted, duration_text, is_number, listed
from fedvision.report.record import TEST, RunRecord
from fedvision.report.rounds import RULES
from fedvision.report.sums import Agreement

_LEVELS = {
    "sum": "the server learned the sum of the updates and nothing of a single one",
    "sketch": "the server learned the sum of the updates, and of each single one a random sketch",
    "gram": "the server learned the sum of the updates, and of each pair of them one inner product",
}
_PROMISED = "What that promises to patients is said above; validation and test results are without noise."
_NAMED_SITES = 24
_SLACK = 8
"""Per cent by which an update may pass the norm check: the square root of 1.16."""


def secure_section(record: RunRecord) -> Markup:
    """Return how the sums of a run were made, and who was expelled; nothing for a run in the clear."""
    agreement = record.agreement
    if agreement is None:
        return Markup()
    charter, made = agreement.charter, [found for (kind, _), found in record.sums.items() if kind == "train"]
    sizes = sorted(len(found.accepted) for found in made)
    waiver = ", a waiver of the usual 5" if charter.smallest_cohort < 5 else ""
    events = [one["event"] for events in record.incidents.values() for one in events]
    thrown = [number for number in sorted(record.incidents) if record.thrown_away(number)]
    names = f": {listed(agreement.sites)}" if len(agreement.sites) <= _NAMED_SITES else ""
    rows: list[tuple[str, object]] = [
        ("Level", f"{charter.level}: {_LEVELS[charter.level]}"),
        ("Sites enrolled", f"{len(agreement.sites)}{names}"),
        ("Smallest sum allowed", f"{charter.quorum} sites{waiver}"),
        ("Smallest sum made", counted(sizes[0], "site") if sizes else "none yet"),
        ("Sites that must agree", f"{charter.threshold} of {len(agreement.sites)} to each sum"),
        ("Hides updates from", _hidden_from(charter.max_colluding)),
        ("Attempts given up", f"{events.count('attempt')}"),
        ("Rounds thrown away", listed([str(number) for number in thrown]) or "none"),
        ("Sites expelled", _expelled(record)),
    ]
    seconds = [one["sum_seconds"] for one in record.rounds.values() if is_number(one.get("sum_seconds"))]
    if seconds:
        rows.insert(
            7, ("Time for the sums", f"{duration_text(sum(seconds) / len(seconds))} a round, training apart")
        )
    return section(
        "Secure aggregation",
        table([Column("What"), Column("Value")], rows),
        intro=joined(
            [
                "From the charter, which governance signed, and from what the sites signed in every sum. ",
                tag("code", f"fedvision verify {shlex.quote(record.folder.name)}"),
                " checks it.",
            ]
        ),
    )


def _hidden_from(colluding: int) -> str:
    if not colluding:
        return "the server, if no site helps it"
    return f"the server, even if {counted(colluding, 'site')} {'helps' if colluding == 1 else 'help'} it"


def _expelled(record: RunRecord) -> object:
    out = record.expelled()
    if not out:
        return "none"
    words = []
    for site, (number, one) in out.items():
        when = "in the final test" if number == TEST else f"in round {number}"
        why = RULES.get(str(one["rule"]), one["rule"])
        text = f", {when}: {why}. Evidence: secagg/evidence/{one.get('evidence', '')}"
        words.append(tag("div", tag("b", site), text))
    return joined(words)


def privacy_section(record: RunRecord, num_parameters: int | None) -> Markup:
    """Return what left the sites and what did not, without sparing this version."""
    size = f"{num_parameters:,} numbers" if num_parameters else "one number a weight"
    agreement = record.agreement
    parts = _hidden(record, agreement, size) if agreement else _clear(record, size)
    simulated = (
        "This run was a simulation on one machine. The page was made there, from the server's record and "
        "from the sites' own folders, so it shows single cases that would stay at a hospital: mind who "
        "gets it."
        if record.site_folders
        else ""
    )
    lists = [
        tag("div", tag("h3", title), tag("ul", *(tag("li", item) for item in items)))
        for title, items in parts
    ]
    return section(
        "What left the sites",
        tag("div", *lists, class_="columns"),
        tag("p", simulated, class_="note") if simulated else "",
        intro=_protection(record),
    )


def _protection(record: RunRecord) -> str:
    if record.agreement is None:
        return (
            "Aggregation: plain FedAvg, clipped. The job switches secure aggregation off "
            "(aggregation.secure = false): the server sees the update of every single site, and updates can "
            "give away something about the images they were trained on. No noise is added, so there is no "
            "differential privacy guarantee. Clipping bounds how far one site can move the model in a round, "
            "nothing more."
        )
    level = record.agreement.charter.level
    if record.job.privacy.mode == "distributed":
        words = f"Aggregation: sums of clipped gradients with noise under masks, level {level}"
        return f"{words}: {_LEVELS[level]}. {_PROMISED}"
    words = f"Aggregation: FedAvg of clipped updates under masks, level {level}: {_LEVELS[level]}. "
    if record.job.privacy.mode == "local":
        return f"{words}Each site trains with noise. {_PROMISED}"
    return (
        f"{words}No noise is added, so there is no differential privacy guarantee: the sums, and the model, "
        "may still say something about the images."
    )


def _kept(record: RunRecord) -> list[str]:
    kept = [
        "images, labels, file names, patient names",
        "results of single cases, and the pictures of them",
        "how large an update was before clipping",
    ]
    if record.job.privacy.mode != "distributed":
        kept.append("the state of the optimiser")
    if record.job.privacy.is_on:
        kept.append("the training loss, which patients were drawn and how many, norms before clipping")
    return kept + (["the normalisation layers (FedBN)"] if record.job.model.local_normalisation else [])


def _clear(record: RunRecord, size: str) -> list[tuple[str, list[str]]]:
    """Return what a site sent and kept where nothing was hidden."""
    sent = [
        f"its update, every round: new weights minus global weights, {size}, scaled to an L2 norm of at most "
        f"{record.job.aggregation.clip_norm:g}, in the clear",
        "how many training cases and optimiser steps the update comes from, and the mean training loss",
        "sums over its validation and test cases, and how many cases and patients they are from",
    ]
    return [("Each site sent", sent), ("Each site kept", _kept(record))]


def _hidden(record: RunRecord, agreement: Agreement, size: str) -> list[tuple[str, list[str]]]:
    """Return what the server saw and did not see, what sites kept, and what is not hidden."""
    charter = agreement.charter
    releases = "test_by_site" in charter.releases
    is_private = record.job.privacy.is_on
    what = "updates" if record.job.privacy.mode != "distributed" else "clipped gradients with noise"
    seen = [
        f"every round the sum of the {what} ({size}, each scaled to an L2 norm of at most "
        f"{charter.clip_norm:g}"
        + (
            "), every site counting the same, and how many sites are in it"
            if is_private
            else " and weighted), the mean of the training losses, and the sum of the weights"
        ),
        "who was in each sum, who was not, and when a site answered",
        "after each judged round the validation results as a mean over sites and over all cases together",
        "whether a site has cases in each split",
    ]
    if charter.level == "sketch":
        words = (
            "of each update 2,048 random sums of its coordinates: they tell how long it is and how alike any "
        )
        seen.insert(1, words + "two are")
    elif charter.level == "gram":
        words = "how long each update is and how alike any two are, from random sums of their coordinates "
        seen.insert(1, words + "that no party saw in one piece")
    unseen = ["the update, the training loss and the number of training cases of a single site"]
    if is_private:
        unseen = [f"the {what} of a single site, its number of training cases, and any training loss"]
    if charter.level != "sum" and charter.weight_cap > 1:
        seen[1] += ". Of a clipped update that length is its weight, so the number of training cases"
        unseen = ["the update and the training loss of a single site"]
    if releases:
        seen.append(
            "after the last round each site's own sums over its test cases, and how many cases and patients "
            "they are from: the job releases them (secure_aggregation.release)"
        )
        unseen.append("validation results of a single site, and which site is worst")
    else:
        seen.append("after the last round the test results, as a mean over sites and over all cases together")
        unseen.append("results of a single site, which site is worst, and how many cases a site has")
    return [
        ("The server saw", seen),
        ("The server did not see", unseen),
        ("Each site kept", _kept(record)),
        ("What this does not protect from", _limits(record, agreement)),
    ]


def _limits(record: RunRecord, agreement: Agreement) -> list[str]:
    """Return against whom or what secure aggregation does not help in this run."""
    charter = agreement.charter
    smallest = charter.quorum
    others, colluding = len(agreement.sites) - 1, charter.max_colluding
    limits = [
        f"{others} sites that put their updates together: the rest of the sum is the last site's update",
        f"the server with more than {counted(colluding, 'site')} helping it"
        if colluding
        else "the server with a site helping it",
    ]
    if smallest < 5:
        limits.append(
            f"what a sum of only {smallest} sites says about each of them: the job allows such sums"
        )
    if charter.level == "sum":
        limits.append("a site that does not clip, or that lies: at level sum nobody can check it or find it")
    else:
        limits.append(f"a hostile update within the clip norm, which is checked to within {_SLACK} % or so")
    if record.site_folders:
        limits.append("anybody here: in a simulation one program makes all keys and plays all parties")
    return limits
