"""``fedvision data``: make, check and look at the sites' data sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedvision.config import load_job
from fedvision.data.manifest import FILE_NAME, SPLITS, Manifest, find_manifests, load_manifest
from fedvision.errors import ConfigError, DataError

app = typer.Typer(
    help="Make, check and look at the data sets of the sites.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

IMPORT_HELP = """Make a manifest for each site from images and labels in a layout that you have.

FORMAT says how SOURCE, your data set, is laid out:

[bold]msd[/]     Medical Segmentation Decathlon or nnU-Net, with dataset.json
[bold]masks[/]   folders images/ and labels/ (or masks/), equal names; 2D or 3D
[bold]dsb[/]     Data Science Bowl 2018: a folder a case, masks/ with a file an object
[bold]coco[/]    COCO JSON, one file or one a split
[bold]voc[/]     Pascal VOC: Annotations/*.xml, JPEGImages, ImageSets
[bold]yolo[/]    YOLO text files, with data.yaml or classes.txt

Your files stay where they are; ROOT/SITE/manifest.json points to them.
Splits are by patient.
"""

IMPORT_EPILOG = """[bold]Examples[/]

One hospital, patient names in the file names (p017_0.nii.gz):

[dim]fedvision data import msd Task09 --out data --site utrecht --patient-pattern '^(p[0-9]+)_'[/]

Instance masks, sites and splits from a table:

[dim]fedvision data import masks nuclei --out data --classes nucleus --label-kind instance \
--sites-from manifest.csv:domain --split-from manifest.csv:split[/]

YOLO with a folder a hospital:

[dim]fedvision data import yolo bloodcells --out data --sites-from-folders[/]

A public set dealt to four artificial sites, to try a federation:

[dim]fedvision data import voc BCCD --out data --random-sites 4[/]
"""

CHECK_HELP = """Read every file and list what is wrong or odd. Exit status 2 if anything is wrong.

ROOT holds one folder a site, or is one site's folder.

Wrong: files that cannot be read, masks on another grid, unknown label values,
boxes without area, a patient or an image in two splits.

Odd: tiny sites, constant images, empty masks, unusual voxel sizes.
"""

SPLIT_HELP = """Make more sites out of those below ROOT, to try a federation that is larger than the data.

Each site's patients are dealt to parts; a patient keeps the split that they are in.
Sites get parts in proportion to their patients; a site that only tests stays whole.
OUT/sites is the new data.root. With --root-set, OUT/root-set holds patients at no site.
"""

SPLIT_EPILOG = """[bold]Examples[/]

[dim]fedvision data split data/nuclei --sites 10 --out data/nuclei-10[/]

[dim]fedvision data split data/nuclei --sites 10 --root-set 20 --out data/nuclei-10[/]
"""

SHOWN_FINDINGS = 60

Root = Annotated[
    Path, typer.Argument(metavar="ROOT", help="Folder with a folder a site, or one site's folder.")
]


def sites_at(root: Path) -> dict[str, Manifest]:
    """Return the manifests below a root, or the one of a single site's folder.

    Raises:
        DataError: There is none, or one is wrong.
    """
    if (root / FILE_NAME).is_file():
        manifest = load_manifest(root)
        return {manifest.site: manifest}
    return find_manifests(root)


def _print_sizes(manifests: Sequence[Manifest]) -> None:
    """Print how many cases and patients each site has."""
    table = Table("site", box=None, pad_edge=False)
    for column in ("cases", "patients", "train", "val", "test"):
        table.add_column(column, justify="right")
    for manifest in manifests:
        counts = [str(len(manifest.in_split(split))) for split in SPLITS]
        patients = len({case.patient for case in manifest.cases})
        table.add_row(manifest.site, str(len(manifest.cases)), str(patients), *counts)
    Console(highlight=False).print(table)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


@app.command("import", help=IMPORT_HELP, epilog=IMPORT_EPILOG)
def import_(
    format_name: Annotated[str, typer.Argument(metavar="FORMAT", help="msd, masks, dsb, coco, voc or yolo.")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The data set as you have it.")],
    out: Annotated[Path, typer.Option(metavar="ROOT", help="Where the folders of the sites are made.")],
    site: Annotated[
        str | None, typer.Option(metavar="NAME", help="All cases are of this site.", rich_help_panel="Sites")
    ] = None,
    sites_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv:COLUMN", help="The site of each case, from a table.", rich_help_panel="Sites"
        ),
    ] = None,
    sites_from_folders: Annotated[
        bool,
        typer.Option(
            "--sites-from-folders",
            help="The folders directly in SOURCE are the sites.",
            rich_help_panel="Sites",
        ),
    ] = False,
    random_sites: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Deal the patients to N artificial sites.", rich_help_panel="Sites"
        ),
    ] = None,
    patient_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv:COLUMN",
            help="The patient of each case, from a table.",
            rich_help_panel="Patients",
        ),
    ] = None,
    patient_pattern: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="The patient is the first group of this pattern in the case's name.",
            rich_help_panel="Patients",
        ),
    ] = None,
    split_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.csv:COLUMN", help="train, val or test for each case.", rich_help_panel="Splits"
        ),
    ] = None,
    fractions: Annotated[
        str | None,
        typer.Option(
            metavar="TRAIN,VAL,TEST",
            help="Draw splits by patient at each site (default: the source's own, else 0.7,0.1,0.2).",
            show_default=False,
            rich_help_panel="Splits",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of drawn splits and sites.", rich_help_panel="Splits")
    ] = 0,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Masks: names of the values 1, 2, ... Boxes: which classes, in which order (default: all).",
            show_default=False,
            rich_help_panel="Labels",
        ),
    ] = None,
    label_kind: Annotated[
        Literal["semantic", "binary", "instance"] | None,
        typer.Option(
            help="What a mask value is: a class, foreground, or one object. Found out if it can be.",
            rich_help_panel="Labels",
        ),
    ] = None,
    files: Annotated[
        Literal["reference", "copy", "link"],
        typer.Option(help="Leave files where they are, or copy or link them below ROOT."),
    ] = "reference",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace manifests that are there.")] = False,
) -> None:
    from fedvision.data.assignment import Assignment
    from fedvision.data.importing import import_data
    from fedvision.data.sources import SourceOptions
    from fedvision.data.splits import parse_fractions

    how = Assignment(
        site=site,
        sites_from=sites_from,
        sites_from_folders=sites_from_folders,
        random_sites=random_sites,
        patient_from=patient_from,
        patient_pattern=patient_pattern,
        split_from=split_from,
        fractions=None if fractions is None else parse_fractions(fractions),
        seed=seed,
    )
    options = SourceOptions(_names(classes), label_kind)
    imported = import_data(format_name, source, out, options, how, files=files, overwrite=overwrite)
    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    for note in imported.notes:
        messages.print(f"note: {note}", markup=False)
    _print_sizes(imported.manifests)
    first = imported.manifests[0]
    typer.echo(f"{first.task}, {first.spatial_dims}D, classes: {', '.join(first.classes)}")
    messages.print(f"next: fedvision data check {out}", markup=False)


@app.command("split", help=SPLIT_HELP, epilog=SPLIT_EPILOG)
def split(
    root: Root,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Absent or empty; the data sets go there.")],
    sites: Annotated[int, typer.Option(metavar="N", min=1, help="Sites that train afterwards.")] = 10,
    root_set: Annotated[
        int,
        typer.Option(
            "--root-set", metavar="N", min=0, help="First take N training patients off, for a root set."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Another seed deals otherwise.")] = 0,
) -> None:
    from fedvision.data.checks import check_sites
    from fedvision.data.splitting import divide, write_division

    found = divide(list(sites_at(root).values()), sites, root_set, seed)
    paths = write_division(found, out)
    written = {path.parent.name: load_manifest(path.parent) for path in paths}
    _print_sizes(list(written.values()))
    errors = [one for one in check_sites(written) if one.level == "error"]
    if errors:
        raise DataError(
            f"{errors[0].site}: {errors[0].case} {errors[0].text}", f"`fedvision data check {root}` lists all"
        )
    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    messages.print(f"data.root: {out / 'sites'}", markup=False)
    if found.root_set is not None:
        messages.print(f"data.root_set: {out / 'root-set'}", markup=False)


@app.command("check", help=CHECK_HELP)
def check(
    root: Root,
    job: Annotated[
        Path | None, typer.Option(metavar="JOB.toml", help="Also check that the data fit this job.")
    ] = None,
) -> None:
    from fedvision.data.checks import check_sites

    parsed = None if job is None else load_job(job)
    manifests = sites_at(root)
    if parsed is not None and parsed.data is not None and parsed.data.sites:
        named = {*parsed.data.sites, *parsed.data.held_out}
        absent = sorted(named - set(manifests))
        if absent and not (root / FILE_NAME).is_file():
            raise DataError(f"{root}: the job names {', '.join(absent)}, found {', '.join(manifests)}")
        manifests = {site: one for site, one in manifests.items() if site in named} or manifests
    findings = check_sites(manifests, parsed)
    num_errors = sum(one.level == "error" for one in findings)
    if findings:
        table = Table("", "site", box=None, pad_edge=False)
        table.add_column("case", overflow="fold")
        table.add_column("what", overflow="fold")
        for one in findings[:SHOWN_FINDINGS]:
            colour = "red" if one.level == "error" else "yellow"
            hint = f"\n[dim]{escape(one.hint)}[/]" if one.hint else ""
            level = f"[{colour}]{one.level}[/]"
            table.add_row(level, escape(one.site), escape(one.case), escape(one.text) + hint)
        Console(highlight=False).print(table)
        if len(findings) > SHOWN_FINDINGS:
            typer.echo(f"... and {len(findings) - SHOWN_FINDINGS} more")
    cases = sum(len(one.cases) for one in manifests.values())
    warnings = len(findings) - num_errors
    typer.echo(
        f"{cases} cases of {len(manifests)} site{'s' * (len(manifests) > 1)}: "
        f"{_counted(num_errors, 'error')}, {_counted(warnings, 'warning')}"
    )
    if num_errors:
        raise typer.Exit(DataError.exit_code)


def _counted(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'s' * (count != 1)}"


@app.command("show")
def show(
    root: Root,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where the picture goes.")] = Path(
        "overview.png"
    ),
    max_cases: Annotated[
        int, typer.Option(metavar="N", min=1, help="Cases read at each site, spread over its list.")
    ] = 200,
) -> None:
    """Print a table of the sites and draw cases with their labels, intensities and label sizes.

    ROOT holds one folder a site, or is one site's folder.
    The picture shows patients' images: it stays where the data are.
    """
    from fedvision.data.facts import gather_facts
    from fedvision.data.sources import first_names
    from fedvision.report.overview import write_overview
    from fedvision.report.overview_table import COLUMNS, summary_row

    if out.suffix.lower() != ".png":
        raise ConfigError(f"the picture is a PNG, got {out}", "--out overview.png")
    manifests = sites_at(root)
    facts = {}
    for site, manifest in manifests.items():
        step = max(1, -(-len(manifest.cases) // max_cases))
        facts[site] = gather_facts(manifest, manifest.cases[::step])
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        justify: Literal["left", "right"] = "right" if column in ("cases", "patients") else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for site, manifest in manifests.items():
        table.add_row(*map(escape, summary_row(manifest, facts[site])))
    Console(highlight=False).print(table)
    typer.echo(
        "split: cases in train/val/test; intensity: median (1st to 99th percentile); "
        "labels: median of the cases that have the class, or boxes in all"
    )
    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    unread = [f"{site}/{one.case.id}" for site, many in facts.items() for one in many if one.problem]
    if unread:
        messages.print(
            f"warning: {len(unread)} cases cannot be read ({first_names(unread)}); "
            f"`fedvision data check {root}` says why",
            markup=False,
        )
    write_overview(manifests, facts, out)
    typer.echo(f"picture: {out}")


@app.command("demo")
def demo(
    task: Annotated[
        Literal["segmentation", "detection"],
        typer.Argument(metavar="TASK", help="segmentation or detection."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The data go into FOLDER/TASK.")] = Path("demo"),
    sites: Annotated[int, typer.Option(min=1, max=4, help="How many sites.")] = 4,
    size: Annotated[
        Literal["tiny", "small", "large"], typer.Option(help="small: 12 to 20 training cases a site.")
    ] = "small",
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other patients.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Draw over a demo that is there.")] = False,
) -> None:
    """Draw a data set of several sites: MR-like heads (segmentation) or chest radiographs (detection).

    No patient is in it. Sites differ in scanner, resolution, noise, number of cases and findings.
    """
    from fedvision.data.demo import make_demo

    root = out / task
    if root.exists() and any(root.iterdir()) and not overwrite:
        raise DataError(f"{root} is not empty", "--overwrite draws over it, or choose another --out")
    make_demo(out, task, seed=seed, num_sites=sites, size=size)
    typer.echo(f"data: {root}")
    Console(stderr=True, soft_wrap=True).print(f"next: fedvision data show {root}", markup=False)
