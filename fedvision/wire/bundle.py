"""The bundle that Flower wants for a run: names of installed code, and no code.

The server starts its runs with it. A site that takes part by Flower's own programs (``run --stock``) makes
the same bundle itself, runs a job with that one, and refuses runs that name another.
"""

import functools
import hashlib
import io
import zipfile

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
    "FLWR_LOG_LEVEL": "WARNING",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Set for all of Flower's programs: no request leaves for a host that is not ours."""


@functools.cache
def bundle() -> tuple[str, bytes]:
    """Return SHA-256 of the bundle, hexadecimal, and the bundle.

    It is the same with every version of Python, zlib and Flower: nothing in it is compressed.
    """
    line = f"pyproject.toml,{hashlib.sha256(PROJECT).hexdigest()},{len(PROJECT) * 8}"
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as file:
        for name, content in (("pyproject.toml", PROJECT), (".info/CONTENT", line.encode())):
            info = zipfile.ZipInfo(name)  # of 1980
            info.create_system = 3
            file.writestr(info, content)
    return hashlib.sha256(made.getvalue()).hexdigest(), made.getvalue()
