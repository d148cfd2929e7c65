"""A coordinator's and sites' folders in tests, made by the two command lines themselves."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedvision.secagg import identity
from fedvision_server.cli import main as server_main
from fedvision_server.home import ServerHome
from fedvision_sites.cli import main as site_main
from fedvision_sites.home import SiteHome

ADDRESS = "localhost:19443"


class Killed(BaseException):
    """Stands for a kill -9."""


class World:
    """A folder with a coordinator ``srv`` and sites by name; commands are run as people type them."""

    def __init__(self, root: Path, data: Path = Path("/data")) -> None:
        self.root, self.data = root, data

    @property
    def server(self) -> ServerHome:
        return ServerHome(self.root / "srv")

    def site(self, name: str) -> SiteHome:
        return SiteHome(self.root / name)

    def kit(self, name: str) -> Path:
        return self.root / f"{name}.kit.json"

    def found(self, address: str = ADDRESS, *more: str) -> int:
        where = str(self.server.root)
        return server_main(["init", where, "--name", "lung", "--address", address, *more])

    def init(self, name: str, *more: str) -> int:
        data = str(self.data / name)
        return site_main(["init", str(self.site(name).root), "--name", name, "--data", data, *more])

    def renew(self, name: str, *more: str) -> int:
        return site_main(["init", str(self.site(name).root), "--renew", *more])

    def enrol(self, name: str, *more: str, request: Path | None = None) -> int:
        file = str(request or self.site(name).request)
        options = ["--home", str(self.server.root), "--out", str(self.kit(name)), "--yes", *more]
        return server_main(["enrol", file, *options])

    def revoke(self, name: str) -> int:
        return server_main(["revoke", name, "--reason", "a test", "--home", str(self.server.root), "--yes"])

    def join(self, name: str, kit: Path | None = None) -> int:
        words = ["join", str(kit or self.kit(name)), "--home", str(self.site(name).root)]
        return site_main([*words, "--governance", self.governance_digits()])

    def governance_digits(self) -> str:
        line = self.server.governance_pub.read_text()
        return identity.fingerprint(identity.parse_public(line)[1])

    def member(self, name: str) -> None:
        """Make a site and let it join."""
        assert self.init(name) == 0
        assert self.enrol(name) == 0
        assert self.join(name) == 0

    def copy(self, to: Path) -> "World":
        shutil.copytree(self.root, to)
        return World(to, self.data)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, point: int) -> Iterator[Callable[[], int]]:
    """Let the process die at its ``point``-th flush, rename or link, before it happens, and do nothing more.

    Yields:
        A function that returns how many such points were passed.
    """
    passed = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed >= point:
                raise Killed
            return real(*arguments, **options)

        return call

    def cleaning(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if passed >= point:
                raise Killed  # A killed process removes no temporary files.
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "rename", "link"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(os, "unlink", cleaning(os.unlink))
        yield lambda: passed
