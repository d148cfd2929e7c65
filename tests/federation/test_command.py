"""The command as a user runs it: real processes, Flower's engine, kills and Ctrl-C."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from fedvision.config import dump_job
from fedvision.simulation.engine import SCRATCH_PREFIX, choose_parallel
from tests.conftest import write_site

COMMAND = [sys.executable, "-m", "fedvision"]


def fedvision(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


def write_job(tiny, tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(dump_job(tiny.changed(**changes)))
    return path


@pytest.mark.slow
def test_simulate_leaves_a_run_and_no_process_port_or_folder(tiny, tmp_path: Path) -> None:
    def scratch() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"))

    processes, folders = set(psutil.pids()), scratch()
    done = fedvision("simulate", write_job(tiny, tmp_path), "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"report: {tmp_path / 'run' / 'report.html'}"
    assert (tmp_path / "run" / "report.html").exists()
    assert "round 3/3" in done.stderr
    time.sleep(2)
    left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in processes and p.info["cmdline"]]
    assert not [
        p
        for p in left
        if "ray" in " ".join(p.info["cmdline"]) and str(tmp_path) in " ".join(p.info["cmdline"])
    ]
    assert scratch() - folders == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "signal_number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_run_that_is_stopped_or_killed_resumes_to_the_same_bytes(
    tiny, tmp_path: Path, signal_number: signal.Signals
) -> None:
    for name in "abc":
        shutil.rmtree(tiny.root / name)
        write_site(tiny.root, name, (3, 1, 1))
    job = write_job(tiny, tmp_path, rounds=6, training__steps=30)
    whole = fedvision("simulate", job, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*COMMAND, "simulate", str(job), "--out", str(tmp_path / "cut")],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "round 1/6" not in (line := process.stderr.readline()):
        assert line, "the run ended before its first round"
    os.killpg(process.pid, signal_number)
    _, errors = process.communicate(timeout=120)
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        assert f"--resume {tmp_path / 'cut'}" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    resumed = fedvision("simulate", "--resume", tmp_path / "cut")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("model.safetensors", "checkpoints/round-0006.safetensors", "test.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def check_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("fedvision: error:")]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_bad_input_gets_one_line_and_nothing_is_written(tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = write_job(tiny, tmp_path)
    check_refused(fedvision("simulate", tmp_path / "absent.toml", "--out", run), "absent.toml")
    text = job.read_text()
    job.write_text(text.replace("batch_size", "batchsize"))
    check_refused(
        fedvision("simulate", job, "--out", run), "unknown key `training.batchsize`", "`batch_size`"
    )
    job.write_text(text)
    image = tiny.root / "b" / "train1.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:60])
    check_refused(fedvision("simulate", job, "--out", run), "train1.png")
    image.write_bytes(whole)
    shutil.copytree(tiny.root / "a", tiny.root / "again")
    check_refused(fedvision("simulate", job, "--out", run), "two sites are named a")
    shutil.rmtree(tiny.root)
    tiny.root.mkdir()
    check_refused(fedvision("simulate", job, "--out", run), "manifest.json")
    check_refused(fedvision("simulate"), "give exactly one of")
    check_refused(fedvision("simulate", "--resume", run), "not a run folder")
    assert not run.exists()


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_what_was_finished(tiny, tmp_path: Path) -> None:
    """A file system of one megabyte that fills up in the middle of the run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small file system; test_storage covers the same error")
    try:
        job = write_job(tiny, tmp_path, rounds=3)
        (disk / "ballast").write_bytes(b"x" * (1 << 20))
        done = fedvision("simulate", job, "--out", disk / "run")
        check_refused(done, "no space left")
        names = [p for p in disk.rglob("*") if p.is_file() and p.name != "ballast"]
        assert all(
            p.stat().st_size == 0 or p.suffix in (".toml", ".json", ".jsonl", ".safetensors") for p in names
        )
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("sites", "cores", "gpus", "expected"),
    [
        (4, 2, 0, (2, 1)),
        (3, 2, 0, (1, 2)),
        (1, 8, 0, (1, 8)),
        (4, 16, 0, (4, 4)),
        (64, 2, 0, (2, 1)),
        (9, 2, 0, (2, 1)),
        (5, 4, 0, (1, 4)),
        (4, 16, 1, (1, 16)),
        (4, 16, 2, (2, 8)),
    ],
)
def test_sites_share_the_cores_without_one_left_over(
    sites: int, cores: int, gpus: int, expected: tuple[int, int]
) -> None:
    assert choose_parallel(sites, cores, gpus) == expected
