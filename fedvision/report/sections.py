"""The sections of ``report.html`` that are tables or lists: results, rounds, clipping, privacy, set-up."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from fedvision.config import dump_job
from fedvision.report.markup import Column, Markup, details, joined, section, table, tag
from fedvision.report.notation import (
    MISSING,
    counted,
    false_positives,
    interval_text,
    is_number,
    listed,
    metric_explained,
    metric_label,
    metric_text,
    rate_label,
    split_metric,
)
from fedvision.report.outcome import sensitivities
from fedvision.report.palette import DARK, LIGHT, MANY_SITES, site_colours
from fedvision.report.record import POOLED, Record, RunRecord

_OPEN_ROWS = 24


def site_label(record: RunRecord, site: str) -> Markup:
    """Return a site's name with the dot of its colour in the figures."""
    if len(record.sites) >= MANY_SITES or site not in record.sites:
        return tag("span", site, class_="site")
    colours = site_colours(record.sites, LIGHT)[site], site_colours(record.sites, DARK)[site]
    dot = tag("span", class_="dot", style=f"--light:{colours[0]};--dark:{colours[1]}")
    return tag("span", dot, site, class_="site")


def _final_metrics(record: RunRecord) -> list[str]:
    """Return the names of all final metrics, the headline first."""
    known = [result["metrics"] for result in record.results.values()]
    known = known or [summary.metrics for summary in record.summaries.values()]
    names = dict.fromkeys(name for metrics in known for name in metrics)
    return sorted(names, key=lambda name: name != record.headline)


def results_table(record: RunRecord) -> Markup:
    """Return the final metrics over all classes, or of the only class, one row a site; where no site released
    its own, only those over sites."""
    names = _final_metrics(record)
    overall = {name for name in names if "/" not in name}
    alone = {
        name for name in names if len(record.job.task.classes) == 1 and split_metric(name)[0] not in overall
    }
    others = [
        name
        for name in names
        if name in overall | alone and name != record.headline and false_positives(name) is None
    ]
    counted_columns = [Column("Role"), Column("Cases", is_number=True), Column("Patients", is_number=True)]
    columns = [
        Column("Site" if record.results else "Over all sites"),
        *(counted_columns if record.results else []),
        Column(metric_label(record.headline), True, metric_explained(record.headline)),
        Column("95 % interval"),
        *(Column(metric_label(split_metric(name)[0]), True, metric_explained(name)) for name in others),
    ]

    def numbers(metrics: Mapping[str, Any], intervals: Mapping[str, Any]) -> list[object]:
        interval = interval_text(intervals.get(record.headline), record.headline)
        return [
            metric_text(metrics.get(record.headline), record.headline),
            tag("span", interval, class_="interval"),
            *(metric_text(metrics.get(name), name) for name in others),
        ]

    rows = []
    for site in record.sites:
        result = record.results.get(site)
        if result is not None:
            worst = tag("span", "worst", class_="mark") if site == record.worst_site else ""
            counts = [f"{result['num_cases']:,}", f"{result['num_patients']:,}"]
            name = joined([site_label(record, site), worst])
            rows.append([name, record.role(site), *counts, *numbers(result["metrics"], result["intervals"])])
    own = [result for result in record.results.values() if result["role"] != "held_out"]
    totals = [f"{sum(result[key] for result in own):,}" for key in ("num_cases", "num_patients")]
    foot = []
    for label, found in record.summaries.items():
        counts = ["", *(totals if label == POOLED else ("", ""))] if record.results else []
        foot.append([label.capitalize(), *counts, *numbers(found.metrics, found.intervals)])
    shown = table(columns, rows, foot)
    return shown if len(rows) <= _OPEN_ROWS else details(f"Table of all {len(rows)} sites", shown)


def class_tables(record: RunRecord) -> Markup:
    """Return one table a metric with the sites' values by class; nothing where there is one class."""
    classes = record.job.task.classes
    names = _final_metrics(record)
    bases = list(dict.fromkeys(split_metric(name)[0] for name in names if "/" in name))
    if len(classes) < 2 or not bases:
        return Markup()
    tables = []
    for base in bases:
        columns = [Column("Site"), *(Column(name, is_number=True) for name in classes)]
        wanted = [f"{base}/{name}" for name in classes]
        rows = [
            [
                site_label(record, site),
                *(metric_text(record.results[site]["metrics"].get(w), w) for w in wanted),
            ]
            for site in record.sites
            if site in record.results
        ]
        foot = [
            [label.capitalize(), *(metric_text(summary.metrics.get(w), w) for w in wanted)]
            for label, summary in record.summaries.items()
        ]
        tables.append(table(columns, rows, foot, caption=metric_label(base)))
    return details("Results by class", *tables)


def froc_table(record: RunRecord) -> Markup:
    """Return sensitivity at fixed false positives an image, one row a site."""
    curves = {site: sensitivities(result["metrics"]) for site, result in record.results.items()}
    overall = {label: sensitivities(summary.metrics) for label, summary in record.summaries.items()}
    rates = sorted({rate for curve in (*curves.values(), *overall.values()) for rate in curve})
    columns = [
        Column("Site" if curves else "Over all sites"),
        *(
            Column(f"{rate_label(rate)} FP", True, f"at {rate_label(rate)} false positives an image")
            for rate in rates
        ),
    ]

    def numbers(curve: Mapping[float, float]) -> list[str]:
        return [metric_text(curve.get(rate), "sensitivity") for rate in rates]

    rows = [[site_label(record, site), *numbers(curves[site])] for site in record.sites if site in curves]
    foot = [[label.capitalize(), *numbers(curve)] for label, curve in overall.items()]
    return table(columns, rows, foot)


def clipping_words(record: RunRecord) -> str:
    """Say in plain words what clipping did to the updates of the run."""
    entries = [
        (float(entry["share_kept"]), site, number)
        for site, log in record.clipping.items()
        for number, entry in log.items()
        if is_number(entry.get("share_kept"))
    ]
    clipped = [entry for entry in entries if entry[0] < 1]
    limit = f"{record.job.aggregation.clip_norm:g}"
    if not clipped:
        return (
            f"None of the {counted(len(entries), 'update')} was larger than the clip norm of {limit}, so "
            "clipping changed nothing; it only bounds what a faulty or hostile site could do."
        )
    share, site, number = min(clipped)
    late = [entry for entry in clipped if entry[2] > record.rounds_done / 2]
    end = (
        "Updates were still clipped in the second half of the run: a larger clip norm may train faster, "
        "and lets one site move the model further."
        if late
        else "In the second half of the run nothing was clipped."
    )
    return (
        f"{len(clipped)} of {counted(len(entries), 'update')} were larger than the clip norm of {limit} and "
        f"were scaled down to it. The hardest cut kept {100 * share:.0f} %: {site}, round {number}. {end}"
    )


def reproduce_section(record: RunRecord) -> Markup:
    """Return the commands that make the run, and this page, again; and the whole set-up to unfold."""
    job = record.job
    run = shlex.quote(record.folder.name)
    lines = (
        (
            f"fedvision simulate {run}/job.toml --out again",
            "the same job" if job.privacy.is_on else "the same run",
        ),
        (f"fedvision simulate --resume {run}", "go on after an interruption"),
        (f"fedvision report {run}", "this page"),
        *([(f"fedvision verify {run}", "signatures and arithmetic")] if record.agreement else []),
        (f"fedvision compare {run}/job.toml", "against local and pooled training"),
    )
    width = max(len(command) for command, _ in lines)
    commands = "\n".join(f"{command:{width}}  # {what}" for command, what in lines)
    if job.data is not None:
        data = job.data.model_copy(update={"root": job.data.root.name})
        job = job.model_copy(update={"data": data})
    same = (
        "draws and noise come from the operating system, so the weights of another run differ"
        if job.privacy.is_on
        else "the same machine, versions and number of threads give the same weights, bit for bit"
    )
    intro = f"Seed {job.seed}; {same}. Digest of the job: {job.digest()[:16]}."
    return section(
        "How to get it again",
        tag("pre", tag("code", commands)),
        details("Job file", tag("pre", tag("code", dump_job(job)))),
        details(
            "Environment", table([Column("What"), Column("Value")], _environment_rows(record.environment))
        ),
        intro=intro,
    )


def _environment_rows(environment: Record) -> Iterable[tuple[str, str]]:
    """Return the recorded environment as names and values, flat."""
    for key, value in environment.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            yield from _environment_rows(value)
        elif key.endswith("_bytes") and is_number(value):
            yield name.removesuffix(" bytes"), f"{value / 2**30:.1f} GiB"
        else:
            shown = listed([str(item) for item in value]) if isinstance(value, list) else value
            yield name, MISSING if shown in (None, "") else str(shown)
