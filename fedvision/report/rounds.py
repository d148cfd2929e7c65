"""The table of rounds: who took part, who did not and why, and what came out."""

from fedvision.report.markup import Column, Markup, details, joined, table, tag
from fedvision.report.notation import (
    MISSING,
    aligned_texts,
    counted,
    duration_text,
    listed,
    metric_label,
    metric_text,
)
from fedvision.report.palette import MANY_SITES
from fedvision.report.record import TEST, Record, RunRecord

_OPEN_ROWS = 24
RULES = {
    "box": "a share that it gave or complained of was not the committed one",
    "share": "gave another share of a seed than it had got",
    "seed": "its shares did not fit its seed",
    "norm": "its update was longer than the clip norm allows",
    "sketch": "reported another sketch than it had sent",
    "mask-key": "its masks did not fit the keys that it revealed",
    "row": "its masked update did not fit its sketch and masks",
    "pair": "told a lie about the mask that it shares with another site",
    "not opened": "contradicted another site and did not open the key",
    "silent": "did not answer in a dispute",
    "deal": "dealt shares that do not fit its sketch",
    "products": "its products of shares were wrong",
}
"""Why a site was expelled, by the rule of the evidence."""


def rounds_table(record: RunRecord) -> Markup:
    """Return who took part in every round, what was refused and why, and what came out."""
    numbers = sorted((set(record.rounds) | set(record.train) | set(record.incidents)) - {TEST})
    norms = dict(
        zip(
            record.rounds,
            aligned_texts([entry.get("update_norm") for entry in record.rounds.values()]),
            strict=True,
        )
    )
    absences = {number: _absences(record, number) for number in numbers}
    is_secure = record.agreement is not None
    losses = record.mean_losses()
    name = metric_label(record.headline)
    columns = [
        Column("Round"),
        Column("In the sum" if is_secure else "Took part"),
        *(
            [Column("Left out, and why" if is_secure else "Refused or failed")]
            if any(absences.values())
            else []
        ),
        Column("Update norm", True, "L2 norm of the mean of the clipped updates"),
        *([Column("Training loss", True, "weighted mean over the sites of the sum")] if is_secure else []),
        Column(f"{name}, mean", True, "mean over sites, validation cases"),
        *(
            [Column("All cases", True, "every validation case counts the same")]
            if is_secure
            else [Column("Worst", is_number=True), Column("at")]
        ),
        Column("Time", is_number=True),
    ]
    rows = []
    for number in numbers:
        found = record.rounds.get(number)
        mean, worst, lowest = record.validation(number)
        kept = tag("span", "kept", class_="kept") if number == record.best_round else ""
        lost = "thrown away" if record.thrown_away(number) else "not finished"
        rows.append(
            [
                tag("span", number, kept, class_="site"),
                _took_part(record, number) if found or not is_secure else MISSING,
                *([absences[number]] if any(absences.values()) else []),
                norms[number] if found else tag("span", lost, class_="bad"),
                *([f"{losses[number]:.3f}" if number in losses else MISSING] if is_secure else []),
                metric_text(mean, record.headline),
                *(
                    [metric_text(record.pooled(number), record.headline)]
                    if is_secure
                    else [metric_text(lowest, record.headline), worst]
                ),
                duration_text(found.get("seconds")) if found else MISSING,
            ]
        )
    rounds = table(columns, rows)
    return rounds if len(rows) <= _OPEN_ROWS else details(f"Table of all {len(rows)} rounds", rounds)


def _took_part(record: RunRecord, number: int) -> Markup:
    accepted, asked = record.accepted(number), record.asked(number)
    if len(accepted) == asked:
        return tag("span", f"all {asked}", class_="site")
    if asked >= MANY_SITES:
        return tag("span", f"{len(accepted)} of {asked}", class_="site")
    return joined([tag("span", f"{len(accepted)} of {asked}:", class_="site"), f" {listed(accepted)}"])


def _absences(record: RunRecord, number: int) -> Markup:
    """Return what went wrong at which site, with the site's own words where they are on this machine."""
    words = _secure_absences(record, number) if record.agreement else _clear_absences(record, number)
    for site, entry in sorted(record.failed_validation.get(number, {}).items()):
        if entry.get("event") == "evaluate failed" or ("validate", number) not in record.sums:
            who = tag("b", site) if site else "the model"
            words.append(joined([who, f" could not be judged: {entry.get('reason', '')}"]))
    return joined(tag("div", word, class_="bad") for word in words)


def _own_words(record: RunRecord, site: str, number: int) -> str:
    own = record.refusals.get(site, {}).get(number, "")
    return f" (its own log: {own})" if own else ""


def _clear_absences(record: RunRecord, number: int) -> list[Markup]:
    words = []
    for entry in record.trained(number, accepted=False):
        site = str(entry["site"])
        reason = f"{entry.get('status', '')}: {entry.get('reason') or 'no reason given'}"
        words.append(joined([tag("b", site), " ", reason, _own_words(record, site, number)]))
    return words


def _secure_absences(record: RunRecord, number: int) -> list[Markup]:
    """Return who was not in a round's sums and why, and what else the server recorded of them."""
    assert record.agreement is not None
    incidents = record.incidents.get(number, [])
    words = []
    for one in incidents:
        if one["event"] == "expelled":
            words.append(
                joined([tag("b", str(one["site"])), f" expelled: {RULES.get(str(one['rule']), one['rule'])}"])
            )
        elif one["event"] in ("thrown away", "weight"):
            words.append(joined([str(one.get("reason", ""))]))
    since = {site: before for site, (before, _) in record.expelled().items()}
    out = [site for site, before in sorted(since.items()) if before < number]
    judged = record.sums.get(("validate", number))
    for site in record.agreement.sites:
        if since.get(site, TEST) <= number:
            continue
        if number not in record.rounds:
            if any(str(one.get("site")) == site for one in incidents):
                words.append(_left_out(record, "train", number, site, "did not take part"))
        elif site not in record.accepted(number):
            words.append(_left_out(record, "train", number, site, "left out"))
        elif judged is not None and site not in judged.accepted:
            words.append(_left_out(record, "validate", number, site, "not in the validation sum"))
    given_up = [one for one in incidents if one["event"] == "attempt"]
    if given_up:
        reason = str(given_up[-1].get("reason", ""))
        words.append(joined([f"{counted(len(given_up), 'attempt')} given up, the last because: {reason}"]))
    if out:
        words.append(joined([f"expelled before: {listed(out)}"]))
    return words


def _left_out(record: RunRecord, purpose: str, number: int, site: str, what: str) -> Markup:
    """Say why a site is not in a sum: the server's reason, the last step that went wrong, its own words."""
    found = record.sums.get((purpose, number))
    reason = found.left_out.get(site, "") if found else ""
    steps: list[Record] = [
        one
        for one in record.incidents.get(number, [])
        if one["event"] == "secure" and str(one.get("site")) == site
    ]
    if steps:
        last = steps[-1]
        step = f"{last.get('status', 'failed')} at step {last.get('step', '')}: {last.get('reason', '')}"
        reason = f"{reason}, {step}" if reason else step
    words = f" {what}: {reason or 'did not answer'}"
    return joined([tag("b", site), words, _own_words(record, site, number)])
