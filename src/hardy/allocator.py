"""Memory that a training frees on the CPU stays with the process: its next minibatch needs as much again."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of `mallopt`, from glibc's ``malloc.h``."""
_KEPT = 256 << 20
"""Bytes at the end of the heap that stay."""
_OWN_MAPPING = 32 << 20
"""Blocks of so many bytes go back to the system at once; glibc takes no larger number."""


def keep_freed_memory() -> None:
    """Let freed blocks be used again rather than given back, where the C library is glibc; elsewhere nothing changes.

    By itself it gives back the end of the heap as soon as a few MB are free there, so that every minibatch of some MB fetches
    the same pages anew, a fault each. The setting is the whole process's: for Hardy's own programs, not for a library's caller.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, _KEPT)
    mallopt(_MMAP_THRESHOLD, _OWN_MAPPING)
