"""Hardy's optional compiled library: where it is found, and how it is switched off."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from pathlib import Path

NEWEST_INSTRUCTIONS = 2
"""Of the levels of instruction sets: 0 for what every CPU has; newer ones are used only where they exist."""


def switched_on() -> bool:
    """Whether the compiled library may be used: not with ``HARDY_COMPILED=0`` in the environment."""
    return os.environ.get("HARDY_COMPILED") != "0"


def load(function: str, version: int) -> ctypes.CDLL | None:
    """The library, if it was built, with ``function(structure*) -> int`` ready to be called.

    Args:
        version: of the structure; a library is left alone if its ``function_version()`` is another.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_compiled{suffix}"
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                found, _ = getattr(library, f"{function}_version"), getattr(library, function)
            except (OSError, AttributeError):  # built for another machine, or not this library
                continue
            found.restype = ctypes.c_int64
            if found() == version:
                return library
    return None
