"""A coordinator's folder with enrolled sites, made by the commands that people use."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from fedvision_server.cli import main as server_main
from fedvision_server.home import ServerHome
from fedvision_sites.cli import main as site_main
from tests.conftest import tiny_content, write_site

NAMES = ("aachen", "bergen", "cork", "delft")


def make_home(folder: Path, names: tuple[str, ...] = NAMES) -> ServerHome:
    """Make ``folder/server`` and, for each site, ``folder/NAME`` and its pictures in ``folder/data/NAME``."""
    home = folder / "server"
    said = ["init", str(home), "--name", "liver-ct", "--address", "127.0.0.1:9443"]
    assert server_main(said) == 0
    for name in names:
        data = write_site(folder / "data", name)
        assert site_main(["init", str(folder / name), "--name", name, "--data", str(data)]) == 0
        enrol(folder, name)
    return ServerHome(home)


def enrol(folder: Path, name: str) -> None:
    """Enrol a site that has made its request."""
    request, kit = folder / name / "request.json", folder / f"{name}.kit.json"
    said = ["enrol", str(request), "--home", str(folder / "server"), "--out", str(kit), "--yes"]
    assert server_main(said) == 0


def job_content(**changes: Any) -> dict[str, Any]:
    """Return the content of a job file that a deployment takes; ``section__key=value`` changes one key."""
    settings = {
        "aggregation__secure": True,
        "secure_aggregation__smallest_cohort": 3,
        "secure_aggregation__level": "sum",
        "secure_aggregation__weight_cap": 100,
        "rounds": 2,
    }
    content = tiny_content(Path("/data/of/the/researcher"), **(settings | changes))
    if "data" not in changes:
        del content["data"]
    return content


def write_job(path: Path, **changes: Any) -> Path:
    """Write a job file, see ``job_content``; a value of None leaves the key out."""
    content = job_content(**changes)
    for section in content.values():
        if isinstance(section, dict):
            for key in [key for key, value in section.items() if value is None]:
                del section[key]
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    return path


@contextlib.contextmanager
def full_disk(size_bytes: int) -> Iterator[None]:
    """Let every write beyond this size of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
