"""``report.html``: a run on one page that stands alone. Also of a run that is not finished."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvision.report.defence import defence_section
from fedvision.report.figures import FIGURES, save_record_figures
from fedvision.report.markup import (
    Markup,
    details,
    facts,
    joined,
    page,
    picture,
    section,
    tag,
    themed_picture,
)
from fedvision.report.notation import (
    MISSING,
    counted,
    duration_text,
    interval_text,
    is_number,
    listed,
    metric_explained,
    metric_label,
    metric_text,
)
from fedvision.report.palette import DARK, LIGHT, render
from fedvision.report.promise_section import promise_section
from fedvision.report.protection import privacy_section, secure_section
from fedvision.report.record import MEAN, POOLED, RunRecord, read_run
from fedvision.report.repair import repair_section
from fedvision.report.rounds import rounds_table
from fedvision.report.sections import (
    class_tables,
    clipping_words,
    froc_table,
    reproduce_section,
    results_table,
    site_label,
)
from fedvision.storage import write_text

FILE_NAME = "report.html"
_SHOWN_SITES = 8
_RANKS = ("worst", "median", "best")


def write_report(run_dir: Path) -> Path:
    """Write the figures and ``report.html`` of a run, from its files.

    Args:
        run_dir: The run folder; the run may be under way.

    Returns:
        The page.

    Raises:
        ConfigError: There is no valid ``job.toml``: this is not a run folder.
        StorageError: A record is damaged, or the disk is full.
    """
    record = read_run(run_dir)
    save_record_figures(record)
    path = run_dir / FILE_NAME
    write_text(path, report_html(record))
    return path


def report_html(record: RunRecord) -> str:
    """Return the report of a run as an HTML document."""
    job = record.job
    kind = f"Federated learning report: {job.task.spatial_dims}D {job.task.kind} with {job.model.name}"
    return page(
        f"{job.name}: federated learning report",
        tag(
            "header",
            tag("p", kind, class_="kind"),
            tag("h1", job.name),
            tag("p", verdict(record), class_="verdict"),
            _notice(record),
            facts(_key_facts(record)),
        ),
        _learning(record),
        _results(record),
        _clipping(record),
        single_cases(record),
        _rounds(record),
        defence_section(record),
        repair_section(record),
        secure_section(record),
        promise_section(record),
        privacy_section(record, record.num_parameters()),
        reproduce_section(record),
        tag(
            "footer",
            f"Made by fedvision from {record.folder.name}. No part of this page is fetched from elsewhere.",
        ),
    )


def verdict(record: RunRecord) -> Markup:
    """Say in plain words what was trained, by how many sites, how well, and where it is worst."""
    task, metric = record.job.task, record.headline
    if not record.training_sites:
        return joined(["No site has trained yet."])
    aim = "segment" if task.kind == "segmentation" else "detect"
    parts: list[object] = [
        f"{counted(len(record.training_sites), 'site')} trained one {record.job.model.name} over "
        f"{counted(record.rounds_done, 'round')} to {aim} {listed(task.classes)} "
        f"in {task.spatial_dims}D images, each on its own data. "
    ]
    if MEAN not in record.summaries:
        return joined([*parts, _validation_words(record)])

    def headline(metrics: Mapping[str, Any]) -> str:
        return metric_text(metrics.get(metric), metric)

    pooled = record.summaries[POOLED]
    interval = interval_text(pooled.intervals.get(metric), metric)
    parts += [
        f"On test cases that it had never seen it reaches a {metric_label(metric)} of ",
        tag("strong", headline(record.summaries[MEAN].metrics)),
        f" on average over the sites, and {headline(pooled.metrics)} over all cases together",
        f" (95 % interval {interval}). " if interval else ". ",
    ]
    worst = record.results.get(record.worst_site)
    if worst is not None and len(record.results) > 1:
        parts += [
            "It does worst at ",
            tag("strong", record.worst_site),
            f", with {headline(worst['metrics'])}. ",
        ]
    if not record.results:
        parts.append("Where it does worst is not known: no site released results of its own. ")
    held_out = {site: headline(record.results[site]["metrics"]) for site in record.held_out_sites}
    if len(held_out) == 1:
        parts += [
            f"At {site}, which took no part in training, it reaches {value}."
            for site, value in held_out.items()
        ]
    elif held_out:
        values = listed([f"{site} {value}" for site, value in held_out.items()])
        where = values if len(held_out) <= _SHOWN_SITES else "see the table below"
        parts.append(f"At the {len(held_out)} sites that took no part in training: {where}.")
    return joined(parts)


def _validation_words(record: RunRecord) -> str:
    best = record.best_round
    mean, worst, lowest = record.validation(best) if best is not None else (None, "", None)
    if mean is None:
        return "It has not been judged yet."
    text = f"On validation cases the best model so far, of round {best}, reaches a mean "
    text += f"{metric_label(record.headline)} of {metric_text(mean, record.headline)} over the sites"
    return text + (f", and {metric_text(lowest, record.headline)} at {worst}, the worst." if worst else ".")


def _notice(record: RunRecord) -> Markup:
    """Say what is missing in a run that is not finished."""
    done, wanted = record.rounds_done, record.job.rounds
    if record.test is None:
        missing = f"{done} of {wanted} rounds are done" if done < wanted else "all rounds are done"
        text = f"This run is not finished: {missing}, and the final test has not been made."
    elif not record.summaries:
        text = "The final test has no result: no site that trains has test cases, or none answered."
    else:
        return Markup()
    return tag("p", text, class_="notice")


def _key_facts(record: RunRecord) -> list[tuple[str, object]]:
    """Return the numbers that a reader looks for first."""
    name = metric_label(record.headline)
    if record.summaries:
        mean, pooled = record.summaries[MEAN], record.summaries[POOLED]
        worst = record.results.get(record.worst_site, {"metrics": {}, "intervals": {}})
        pairs = [
            _score(
                record, f"{name}, mean of sites", mean.metrics, mean.intervals, "every site counts the same"
            ),
            _score(record, f"{name}, worst site", worst["metrics"], {}, record.worst_site)
            if record.results
            else _fact(f"{name}, worst site", "hidden", "no site released its own"),
            _score(
                record, f"{name}, all cases", pooled.metrics, pooled.intervals, "every case counts the same"
            ),
        ]
        own = [result for result in record.results.values() if result["role"] != "held_out"]
        cases, patients = (sum(result[key] for result in own) for key in ("num_cases", "num_patients"))
        pairs.append(
            _fact("Test cases", f"{cases:,}", f"of {counted(patients, 'patient')}")
            if record.results
            else _fact("Test cases", "hidden", "in the sums of all sites")
        )
    else:
        best = record.best_round
        mean_so_far, site, lowest = record.validation(best) if best is not None else (None, "", None)
        pairs = [
            _score(
                record,
                f"{name}, validation",
                {record.headline: mean_so_far},
                {},
                "mean of sites, best so far",
            ),
            _score(record, f"{name}, worst site", {record.headline: lowest}, {}, site or "not judged yet")
            if record.agreement is None
            else _fact(f"{name}, worst site", "hidden", "sums of all sites only"),
        ]
    done, held_out = record.rounds_done, len(record.held_out_sites)
    kept = (
        f"kept: the model of round {record.best_round}"
        if record.best_round is not None
        else "no model judged yet"
    )
    seconds = [entry["seconds"] for entry in record.rounds.values() if is_number(entry.get("seconds"))]
    notes = [f"and {held_out} held out"] if held_out else []
    if record.agreement is not None and _lost(record)[0]:
        notes.append(f"{counted(_lost(record)[0], 'update')} left out")
    return [
        *pairs,
        _fact(
            "Sites that train",
            f"{len(record.training_sites)}",
            "; ".join(notes),
        ),
        _fact("Rounds", f"{done}" if done >= record.job.rounds else f"{done} of {record.job.rounds}", kept),
        _protection_fact(record),
        _fact("Time", duration_text(sum(seconds)) if seconds else MISSING, "all rounds, without the test"),
    ]


def _protection_fact(record: RunRecord) -> tuple[str, object]:
    """Return what the server saw of single updates; of a run in the clear, how many updates are in no sum."""
    if record.agreement is None:
        lost, asked = _lost(record)
        return _fact("Updates left out", f"{lost:,}", f"refused or failed, of {asked:,}")
    level = record.agreement.charter.level
    seen = {"sum": "sums only", "sketch": "sums and sketches", "gram": "sums and inner products"}[level]
    return _fact("Secure aggregation", level, f"the server saw {seen}")


def _lost(record: RunRecord) -> tuple[int, int]:
    """Return how many updates are in no model, and of how many."""
    numbers = record.train if record.agreement is None else record.rounds
    asked = sum(record.asked(number) for number in numbers)
    return asked - sum(len(record.accepted(number)) for number in numbers), asked


def _fact(name: str, value: str, note: str) -> tuple[str, object]:
    return name, joined([value, tag("small", note)])


def _score(
    record: RunRecord, name: str, metrics: Mapping[str, Any], intervals: Mapping[str, Any], note: str
) -> tuple[str, object]:
    interval = interval_text(intervals.get(record.headline), record.headline)
    return _fact(name, metric_text(metrics.get(record.headline), record.headline), interval or note)


def _figure(record: RunRecord, name: str, description: str) -> Markup:
    """Return a figure in both themes, nothing where the run has no data for it."""
    light, dark = (render(functools.partial(FIGURES[name], record), theme, "svg") for theme in (LIGHT, DARK))
    if light is None or dark is None:
        return Markup()
    return themed_picture(description, light, dark)


def _learning(record: RunRecord) -> Markup:
    name = metric_label(record.headline)
    figure = _figure(record, "curves", f"{name} on validation cases and training loss, by round and site")
    if not figure:
        return Markup()
    intro = f"{metric_explained(record.headline) or name}. Validation cases only."
    note: object = ""
    if record.agreement is not None:
        text = "The server knows the sums over sites only."
        if any(record.losses().values()):
            text += " The training losses of single sites come from their own records, which are never sent."
        note = tag("p", text, class_="note")
    return section("Learning", figure, note, intro=intro)


def _results(record: RunRecord) -> Markup:
    if not record.results and not record.summaries:
        return section("Results", intro="The final test has not been made, so there are no test results yet.")
    name = metric_label(record.headline)
    parts: list[object] = [
        _figure(record, "results", f"{name} on test cases by site, with 95 % intervals"),
        results_table(record),
        class_tables(record),
    ]
    froc = _figure(record, "froc", "sensitivity by false positives an image, by site")
    if froc:
        parts += [
            tag("h3", "Sensitivity at fixed false positives per image"),
            tag(
                "p",
                "All classes together; a box counts as found from an overlap (IoU) of 0.5.",
                class_="intro",
            ),
            froc,
            froc_table(record),
        ]
    resamples = record.job.evaluation.bootstrap
    intro = "Test cases, which neither trained the model nor chose it."
    if resamples:
        intro += f" Intervals: bootstrap over patients, {counted(resamples, 'resample')}."
    if not record.results:
        intro += " Results of single sites are not known: the job releases sums over all sites only."
    return section("Results at the sites" if record.results else "Results", *parts, intro=intro)


def _clipping(record: RunRecord) -> Markup:
    figure = _figure(
        record, "clipping", "norm of the updates before clipping and share kept, by round and site"
    )
    if not figure:
        return Markup()
    note = "From the sites' own records, which are never sent."
    return section("What clipping did", figure, tag("p", note, class_="note"), intro=clipping_words(record))


def single_cases(record: RunRecord) -> Markup:
    """Return the sites' pictures of their worst, median and best test case, the worst site's unfolded."""
    pictures: dict[str, list[Path]] = {}
    for site, folder in record.site_folders.items():
        found = [folder / "examples" / f"{rank}.png" for rank in _RANKS]
        if any(path.exists() for path in found):
            pictures[site] = [path for path in found if path.exists()]
    shown = _sites_to_show(record, list(pictures))
    if not shown:
        return Markup()
    first = record.worst_site if record.worst_site in shown else shown[0]
    parts = []
    for site in shown:
        value = record.results.get(site, {"metrics": {}})["metrics"].get(record.headline)
        score = f"{metric_label(record.headline)} {metric_text(value, record.headline)}, "
        note = tag("span", f"{score if record.results else ''}{record.role(site)}", class_="aside")
        pictures_of_site = (
            picture(f"{path.stem} test case of {site}", path.read_bytes()) for path in pictures[site]
        )
        parts.append(
            details(joined([site_label(record, site), note]), *pictures_of_site, is_open=site == first)
        )
    whose = "each site" if len(shown) == len(pictures) else f"the {len(shown)} worst of {len(pictures)} sites"
    intro = f"The worst, the median and the best test case of {whose}."
    return section("Single cases", *parts, intro=intro)


def _sites_to_show(record: RunRecord, sites: Sequence[str]) -> list[str]:
    """Return the sites whose cases are shown: all, or where there are many the worst ones, worst first."""
    if len(sites) <= _SHOWN_SITES:
        return [site for site in record.sites if site in sites]

    def headline(site: str) -> float:
        value = record.results.get(site, {"metrics": {}})["metrics"].get(record.headline)
        return float(value) if is_number(value) else 2.0

    return sorted(sites, key=headline)[:_SHOWN_SITES]


def _rounds(record: RunRecord) -> Markup:
    if not record.train and not record.rounds:
        return Markup()
    intro = "Who took part, what the server refused and why. A refused update is left out of the average."
    if record.agreement is not None:
        intro = "Whose updates are in the sum of each round, who was left out and why."
    return section("Rounds", rounds_table(record), intro=intro)
