"""Standard-normal numbers for a list of tensors, drawn in one call per member."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def standard_normal_like(tensors: Sequence[Tensor], fill_: Callable[[Tensor], object]) -> list[Tensor]:
    """Draw one flat buffer ``[P, total]`` and cut it into the tensors' shapes ``[P, ...]``.

    Args:
        tensors: the noise takes their shapes, devices and dtypes.
        fill_: fills the buffer in place; it lies on the CPU, so that the numbers do not depend on the device.
    """
    size, dtype = tensors[0].shape[0], tensors[0].dtype
    uniform = all(tensor.dtype == dtype for tensor in tensors)
    lengths = [tensor.numel() // size for tensor in tensors]
    buffer = torch.zeros(size, sum(lengths), dtype=dtype if uniform else torch.float32)
    fill_(buffer)
    parts = buffer.to(tensors[0].device).split(lengths, dim=1)
    noise = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    return noise if uniform else [part.to(tensor.dtype) for part, tensor in zip(noise, tensors, strict=True)]
