"""``package.module:function`` in a job file to the function itself.

Only code that is installed on this machine, or lies in the folder where the program was started, is
found; nothing that another party sent is ever executed.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedvision.errors import ConfigError


def resolve_reference(text: str) -> Callable[..., Any]:
    """Import ``package.module:function`` and return the function.

    The folder where the program was started is searched last, so that a file there cannot replace an
    installed module.

    Args:
        text: The reference as the job file gives it.

    Raises:
        ConfigError: The text has no colon, the module is absent or fails on import, or it has no such
            callable.
    """
    module_name, colon, attribute = text.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f"a reference must be `package.module:function`, got {text!r}")
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise ConfigError(
                f"{text}: no module named {error.name}",
                f"install it, or start in the folder that holds {error.name.split('.')[0]}.py",
            ) from None
        raise ConfigError(f"{text}: {module_name} cannot be imported: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{text}: {module_name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    value = getattr(module, attribute, None)
    if not callable(value):
        found = "is not callable" if value is not None else "is not in it"
        where = getattr(module, "__file__", None) or module_name
        raise ConfigError(f"{text}: {attribute} {found} ({where})")
    return value
