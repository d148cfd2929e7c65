"""The bundle that Flower wants for a run: names of installed code, and no code.

The server starts its runs with it. A site that takes part by Flower's own programs (``run --stock``) makes
the same bundle itself, runs a job with that one, and refuses runs that name another.
"""

import functools
import hashlib

from flwr.cli.build import build_fab_from_files

NAME, VERSION = "fedvision/fedvision-job", "0.1.0"
PROJECT = b"""[project]
name = "fedvision-job"
version = "0.1.0"
description = "Runs a job of fedvision with the code that is installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedvision"

[tool.flwr.app.components]
serverapp = "fedvision_server.deployed:app"
clientapp = "fedvision_sites.app:stock"

[tool.flwr.app.config]
job = ""
"""
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Set for all of Flower's programs: no request leaves for a host that is not ours."""


@functools.cache
def bundle() -> tuple[str, bytes]:
    """Return SHA-256 of the bundle, hexadecimal, and the bundle."""
    content = build_fab_from_files({"pyproject.toml": PROJECT})[0]
    return hashlib.sha256(content).hexdigest(), content
