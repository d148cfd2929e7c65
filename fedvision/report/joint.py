"""One page over several runs: each run's verdict, results and pictures, with a link to its own report."""

import os
from collections.abc import Sequence
from pathlib import Path

from fedvision.report.markup import Markup, joined, page, section, tag
from fedvision.report.page import FILE_NAME, single_cases, verdict
from fedvision.report.record import RunRecord, read_run
from fedvision.report.sections import results_table
from fedvision.storage import write_text


def write_joint_report(title: str, run_dirs: Sequence[Path], folder: Path) -> Path:
    """Write ``folder/report.html`` over finished runs whose own reports are written.

    Args:
        title: Of the page.
        run_dirs: Run folders, best below ``folder``, so that links keep working when it is moved.
        folder: Where the page goes.

    Raises:
        ConfigError: A folder is not a run folder.
        StorageError: A record is damaged, or the disk is full.
    """
    path = folder / FILE_NAME
    records = [read_run(run) for run in run_dirs]
    parts = [_run_section(record, folder) for record in records]
    write_text(path, page(title, tag("header", tag("h1", title)), *parts))
    return path


def _run_section(record: RunRecord, folder: Path) -> Markup:
    link = Path(os.path.relpath(record.folder / FILE_NAME, folder)).as_posix()
    return section(
        record.job.name,
        tag("p", joined([verdict(record), " ", tag("a", "Full report", href=link)])),
        results_table(record),
        single_cases(record),
    )
