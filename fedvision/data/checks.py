"""What is wrong, or odd, with a data set, before a training run finds out.

An error is something that training or its numbers would suffer from; a warning is something that a person
should have looked at. A finding names case ids and files: it is for the screen of the site, never sent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedvision.config import Job
from fedvision.data.facts import CaseFacts, gather_facts
from fedvision.data.manifest import SPLITS, Case, Manifest, Split, find_manifests
from fedvision.data.sources import first_names
from fedvision.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

FEW_PATIENTS = 5
ODD_SPACING = 2.0
FEW_WARNINGS = 5


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        level: "error" or "warning".
        site: As in the manifest.
        case: Its id, or "" for the whole site.
        text: What is wrong, in one line.
        hint: What to do, or "".
    """

    level: Literal["error", "warning"]
    site: str
    case: str
    text: str
    hint: str = ""


def _patients_in_two_splits(manifest: Manifest) -> Iterable[Finding]:
    splits: dict[str, set[Split]] = {}
    for case in manifest.cases:
        splits.setdefault(case.patient, set()).add(case.split)
    for patient, found in splits.items():
        if len(found) > 1:
            names = " and ".join(split for split in SPLITS if split in found)
            yield Finding(
                "error",
                manifest.site,
                "",
                f"patient {patient} is in {names}",
                "a patient belongs in one split",
            )


def _split_sizes(manifest: Manifest, job: Job | None) -> Iterable[Finding]:
    site = manifest.site
    patients = {split: {case.patient for case in manifest.in_split(split)} for split in SPLITS}
    held_out = job is not None and job.data is not None and site in job.data.held_out
    if not patients["train"]:
        if not patients["test"]:
            yield Finding("error", site, "", "no training case and no test case")
        elif job is None:
            yield Finding(
                "warning", site, "", "no training case", "such a site can be named in data.held_out"
            )
        elif not held_out:
            yield Finding("error", site, "", "no training case", "name the site in data.held_out")
    elif len(patients["train"]) < FEW_PATIENTS and not held_out:
        yield Finding("warning", site, "", f"only {len(patients['train'])} patients to train on")
    if not patients["val"] and patients["train"] and not held_out:
        yield Finding(
            "warning", site, "", "no validation case", "the best model is then chosen without this site"
        )
    if not patients["test"]:
        yield Finding("warning", site, "", "no test case", "the final model is then not judged at this site")


def _box_faults(manifest: Manifest, facts: CaseFacts) -> Iterable[Finding]:
    """Compare a case's boxes with its picture."""
    case, dims = facts.case, manifest.spatial_dims

    def fault(level: Literal["error", "warning"], text: str) -> Finding:
        return Finding(level, manifest.site, case.id, text)

    if case.boxes is None:
        yield fault("error", "no `boxes`: a picture without objects has an empty list")
        return
    labels = case.box_labels or ()
    if len(labels) != len(case.boxes):
        yield fault("error", f"{len(case.boxes)} boxes but {len(labels)} box_labels")
    for label in sorted(set(labels)):
        if label > len(manifest.classes):
            yield fault("error", f"box label {label} is no class, there are {len(manifest.classes)}")
    edge = np.array(facts.shape[::-1] if dims == 2 else facts.shape, dtype=float)
    for box in case.boxes:
        if len(box) != 2 * dims:
            yield fault("error", f"box {list(box)} needs {2 * dims} numbers")
            continue
        low, high = np.array(box).reshape(2, dims)
        if (high <= low).any():
            yield fault("error", f"box {list(box)} has no area")
        elif facts.shape and ((low >= edge).any() or (high <= 0).any()):
            yield fault("error", f"box {list(box)} is outside the image of {facts.shape}")
        elif facts.shape and ((low < -0.5).any() or (high > edge + 0.5).any()):
            yield fault("warning", f"box {list(box)} reaches beyond the image of {facts.shape}; it is cut")


def _pixel_faults(manifest: Manifest, facts: CaseFacts) -> Iterable[Finding]:
    site, case = manifest.site, facts.case.id
    if facts.problem is not None:
        yield Finding("error", site, case, str(facts.problem), facts.problem.hint)
    elif not facts.is_finite:
        yield Finding("error", site, case, "the image holds a value that is not finite (NaN or infinity)")
    elif facts.is_constant:
        yield Finding("warning", site, case, "the image is constant", "it teaches nothing; take it out?")


def _odd_spacings(manifest: Manifest, facts: Sequence[CaseFacts]) -> Iterable[Finding]:
    known = [one for one in facts if one.has_spacing]
    if len(known) < 3:
        return
    # Axis orders differ between files; sorted sizes can be compared without turning the volumes.
    sizes = np.array([sorted(one.spacing_mm) for one in known])
    middle = np.median(sizes, axis=0)
    for one, size in zip(known, sizes, strict=True):
        if (np.maximum(size / middle, middle / np.maximum(size, 1e-9)) > ODD_SPACING).any():
            shown = " x ".join(f"{mm:g}" for mm in one.spacing_mm)
            usual = " x ".join(f"{mm:g}" for mm in middle)
            yield Finding(
                "warning",
                manifest.site,
                one.case.id,
                f"voxels of {shown} mm, most others are near {usual}",
                "is the header right? preprocessing.spacing_mm resamples",
            )


def _absent_classes(manifest: Manifest, facts: Sequence[CaseFacts]) -> Iterable[Finding]:
    readable = [one for one in facts if one.problem is None]
    train = [one.class_sizes for one in readable if one.case.split == "train"]
    for number, name in enumerate(manifest.classes):
        if train and not any(sizes[number] for sizes in train):
            yield Finding("warning", manifest.site, "", f"class {name} is in no training case")
    empty = [one.case.id for one in readable if not any(one.class_sizes)]
    if manifest.task == "segmentation" and empty:
        what = f"{len(empty)} of {len(readable)} masks are all background"
        yield Finding("warning", manifest.site, "", f"{what} ({first_names(empty)})")
    elif len(empty) * 2 > len(readable):
        what = f"{len(empty)} of {len(readable)} images have no box"
        yield Finding("warning", manifest.site, "", f"{what} ({first_names(empty)})")


def _duplicates(facts: Iterable[tuple[str, CaseFacts]]) -> Iterable[Finding]:
    """Find images with equal pixels, within a site and between sites."""
    groups: dict[str, list[tuple[str, Case]]] = {}
    for site, one in facts:
        if one.problem is None and not one.is_constant:
            groups.setdefault(one.fingerprint, []).append((site, one.case))
    for (first_site, first), *others in groups.values():
        for site, case in others:
            where = first.id if site == first_site else f"{first.id} at {first_site}"
            leaks = case.split != first.split
            text = f"the same image as {where}" + (
                f", but in {case.split} and not {first.split}" if leaks else ""
            )
            hint = "what is tested on must not be trained on" if leaks else ""
            yield Finding("error" if leaks else "warning", site, case.id, text, hint)


def _job_faults(manifest: Manifest, job: Job) -> Iterable[Finding]:
    task = job.task
    for key, wanted, found in (
        ("task.kind", task.kind, manifest.task),
        ("task.spatial_dims", task.spatial_dims, manifest.spatial_dims),
        ("task.classes", ", ".join(task.classes), ", ".join(manifest.classes)),
    ):
        if wanted != found:
            yield Finding("error", manifest.site, "", f"the job's {key} is {wanted}, the manifest's {found}")


def _findings_of_site(manifest: Manifest, facts: Sequence[CaseFacts], job: Job | None) -> list[Finding]:
    """Return everything that can be said of one site, but for duplicates."""
    found = [*_patients_in_two_splits(manifest), *_split_sizes(manifest, job)]
    if job is not None:
        found += _job_faults(manifest, job)
    for one in facts:
        boxes = list(_box_faults(manifest, one)) if manifest.task == "detection" else []
        found += boxes
        # A bad box also keeps the case from being read; once is enough.
        if not any(fault.level == "error" for fault in boxes):
            found += _pixel_faults(manifest, one)
    found += _odd_spacings(manifest, facts)
    found += _absent_classes(manifest, facts)
    channels = sorted({one.num_channels for one in facts if one.problem is None})
    if len(channels) > 1 and job is None:
        found.append(
            Finding(
                "warning",
                manifest.site,
                "",
                f"images have {' or '.join(map(str, channels))} channels",
                "task.in_channels = 1 or 3 turns pictures into grey or colour",
            )
        )
    return found


def _in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Sort errors before warnings, then by site."""
    return sorted(dict.fromkeys(findings), key=lambda one: (one.level != "error", one.site))


def check_site(manifest: Manifest, job: Job | None = None) -> list[Finding]:
    """Read every file of a site and return what is wrong, errors first; [] if nothing is.

    Args:
        manifest: Of the site.
        job: If given, the site must also fit it, and every case is preprocessed as it asks.
    """
    facts = gather_facts(manifest, manifest.cases, job)
    duplicates = _duplicates((manifest.site, one) for one in facts)
    return _in_order([*_findings_of_site(manifest, facts, job), *duplicates])


def check_sites(manifests: Mapping[str, Manifest], job: Job | None = None) -> list[Finding]:
    """Check several sites, and compare them with each other: for a simulation, where all are at hand.

    Args:
        manifests: By site name.
        job: As in ``check_site``.
    """
    found: list[Finding] = []
    facts: list[tuple[str, CaseFacts]] = []
    patients: dict[str, str] = {}
    first = next(iter(manifests.values()))
    for site, manifest in manifests.items():
        of_site = gather_facts(manifest, manifest.cases, job)
        facts += [(site, one) for one in of_site]
        found += _findings_of_site(manifest, of_site, job)
        shared = [
            p for p in {case.patient for case in manifest.cases} if patients.setdefault(p, site) != site
        ]
        if shared:
            text = f"{len(shared)} patient names are also at another site ({first_names(sorted(shared))})"
            found.append(Finding("warning", site, "", text, "are they the same people?"))
        for key in ("task", "spatial_dims", "classes"):
            mine, others = getattr(manifest, key), getattr(first, key)
            if job is None and mine != others:
                text = f"{key} is {mine}, at {first.site} it is {others}"
                found.append(Finding("error", site, "", text, "sites of one federation must agree"))
    return _in_order([*found, *_duplicates(facts)])


def check_sites_for_job(job: Job, console: "Console") -> None:
    """Check the sites of a job before anything is trained, and say what is odd.

    Args:
        job: With its data section.
        console: Where warnings go, at most ``FEW_WARNINGS`` of them.

    Raises:
        DataError: Something is wrong; the first error is told and the rest are counted.
    """
    assert job.data is not None, "the simulation reads jobs with a data section"
    manifests = find_manifests(job.data.root)
    named = {*job.data.sites, *job.data.held_out}
    chosen = {site: one for site, one in manifests.items() if site in named or not job.data.sites}
    findings = check_sites(chosen, job)
    errors = [one for one in findings if one.level == "error"]
    if errors:
        first = errors[0]
        where = f"site {first.site}, " + (f"case {first.case}: " if first.case else "")
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        hint = f"{first.hint}; " if first.hint else ""
        raise DataError(
            f"{where}{first.text}{more}", f"{hint}`fedvision data check {job.data.root}` lists everything"
        )
    for one in findings[:FEW_WARNINGS]:
        where = f"{one.site}/{one.case}" if one.case else one.site
        console.print(f"warning: {where}: {one.text}", style="yellow", markup=False, soft_wrap=True)
    if len(findings) > FEW_WARNINGS:
        console.print(f"warning: and {len(findings) - FEW_WARNINGS} more", style="yellow", markup=False)
