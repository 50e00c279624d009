"""Hardy's optional compiled library: where it is found, and how it is switched off."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

NEWEST_INSTRUCTIONS = 2
"""Of the levels of instruction sets: 0 for what every CPU has; newer ones are used only where they exist."""


def switched_on() -> bool:
    """Whether the compiled library may be used: not with ``HARDY_COMPILED=0`` in the environment."""
    return os.environ.get("HARDY_COMPILED") != "0"


class Function:
    """A function ``name(structure*) -> int`` of the library, looked for when it is first asked for.

    Args:
        version: of the structure; the function of a library built from other sources, whose ``name_version()`` is another, is
            as good as none.
    """

    def __init__(self, name: str, version: int) -> None:
        self.name, self.version = name, version

    def available(self) -> bool:
        """Whether the library is there, fits this version and is not switched off."""
        return switched_on() and self._found is not None

    def __call__(self, structure: ctypes.Structure, what: Callable[[], str]) -> None:
        """Do what a structure says.

        Args:
            what: says for an error what that was.

        Raises:
            MemoryError: no memory for the working space.
        """
        assert self._found is not None
        if self._found(ctypes.byref(structure)):
            raise MemoryError(f"{what()} finds no memory for its working space")

    @functools.cached_property
    def _found(self) -> Callable[[Any], int] | None:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = Path(__file__).parent / f"_compiled{suffix}"
            if path.exists():
                try:
                    library = ctypes.CDLL(str(path))
                    version, found = getattr(library, f"{self.name}_version"), getattr(library, self.name)
                except (OSError, AttributeError):  # built for another machine, or not this library
                    continue
                version.restype = ctypes.c_int64
                if version() == self.version:
                    return cast("Callable[[Any], int]", found)
        return None
