"""MindSpore Hub's way in: `create_network(name, **kwargs)`, and `load_strictly`, which says what did not fit.

mindspore_hub executes this file by its path, after other repositories whose packages may have any name. So the package
is taken from the folder beside this file and not from sys.path, which stays as it is. Only one package can be called
localmim in a process: another copy of the same version that is loaded already is used, anything else is an error.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "src" / "localmim" / "__init__.py"


def load_package() -> None:
    """Puts this folder's localmim into sys.modules, unless it or its equal is there.

    Raises:
        ImportError: Another package of that name is loaded, or another version of this one.
    """
    loaded = sys.modules.get("localmim")
    where = getattr(loaded, "__file__", None)
    if where is not None:  # without a file it is only a folder of that name on sys.path, such as this repository's own
        version = re.search(r'__version__ = "(.+)"', PACKAGE.read_text(encoding="utf-8"))[1]
        other = getattr(loaded, "__version__", "of no version")
        if other != version:
            raise ImportError(
                f"localmim {other} is loaded already from {where}, and {PACKAGE.parent} is {version}: "
                "load it in a process of its own"
            )
        return
    spec = importlib.util.spec_from_file_location("localmim", PACKAGE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["localmim"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["localmim"]
        raise


load_package()

from localmim.hub import create_network, load_strictly  # noqa: E402

__all__ = ["create_network", "load_strictly"]
