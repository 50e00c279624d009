"""The compiled library's instruction sets, of which a processor may lack the newer ones."""

from __future__ import annotations

import pytest
import torch

HERE = {"AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
"""The newest level that this processor has; above it a library takes an older one, and a test of it would test that again."""


def needs(level: int) -> pytest.MarkDecorator:
    """Skips where the processor lacks the instructions of a level."""
    return pytest.mark.skipif(level > HERE, reason=f"this processor has instructions of level {HERE}, not of {level}")


LEVELS = [pytest.param(level, marks=needs(level)) for level in (0, 1, 2)]
