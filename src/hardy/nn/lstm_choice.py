"""Which way a sequence of the LSTM takes on a CUDA device: the kernels of `hardy.nn.triton_lstm` or `hardy.nn.stepped`.

The stepped path is the reference and always there. The kernels take its place for a shape once they have shown, in the first
call of that shape, that they compile, give the same results and gradients, and are faster. So the choice may differ between two
cards, or between two runs where both ways take about as long, and with it the rounding. ``HARDY_COMPILED=0`` in the environment
keeps to the stepped path.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.compiled import switched_on
from hardy.graphs import WARMUP, Captured
from hardy.nn import stepped

Work: TypeAlias = Callable[[], Sequence[Tensor]]
LARGEST = 256
"""Widest hidden state of the kernels: the four gates of a wider one do not fit into a program's registers."""
DEVICES = ("cuda",)
"""Types of devices for which there are kernels."""
TOLERANCE = {False: 1e-4, True: 2e-2}
"""Greatest difference that counts as rounding, relative to a tensor's largest entry: in float32, and where products may be
rounded to TensorFloat-32, which has 10 bits."""
REPETITIONS = 5


def lstm_layer(
    from_input: Float[Tensor, "P T E G"],
    hidden: Float[Tensor, "P E H"],
    cell: Float[Tensor, "P E H"],
    is_first: Bool[Tensor, "P T E"],
    weight_hh: Float[Tensor, "P G H"],
) -> Float[Tensor, "P T E H"]:
    """What `hardy.nn.stepped.lstm_layer` computes, by the fastest way that computes it on this device.

    Warns:
        RuntimeWarning: once, if the kernels fail or give other results.
    """
    given = (from_input, hidden, cell, is_first, weight_hh)
    if supports(from_input, hidden, cell, weight_hh):
        key = (from_input.shape, hidden.shape[-1], from_input.device, reduced_precision())
        if _choice.takes(key, lambda: rivals(*given), capturing(from_input), TOLERANCE[reduced_precision()]):
            from hardy.nn import triton_lstm

            return triton_lstm.lstm_layer(*given)
    return stepped.lstm_layer(*given)


def supports(from_input: Tensor, *others: Tensor) -> bool:
    """Whether the kernels can be tried on such tensors, the last of them ``weight_hh [P, 4 H, H]``."""
    return (
        from_input.device.type in DEVICES
        and all(tensor.dtype is torch.float32 for tensor in (from_input, *others))
        and others[-1].shape[-1] <= LARGEST
        and from_input.numel() > 0
        and switched_on()
        and importlib.util.find_spec("triton") is not None
    )


def capturing(tensor: Tensor) -> bool:
    """Whether what is done with this tensor goes into a CUDA graph instead of being done."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def reduced_precision() -> bool:
    """Whether PyTorch may round the factors of a product of float32 to TensorFloat-32."""
    # The older setting raises an error when it is read after the newer one, which PyTorch before 2.9 does not have, was set.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return bool(torch.backends.cuda.matmul.allow_tf32) if newer is None else newer == "tf32"


def rivals(
    from_input: Float[Tensor, "P T E G"],
    hidden: Float[Tensor, "P E H"],
    cell: Float[Tensor, "P E H"],
    is_first: Bool[Tensor, "P T E"],
    weight_hh: Float[Tensor, "P G H"],
) -> tuple[Work, Work]:
    """Forward and backward pass by the stepped path and by the kernels: the output, its gradients by inputs and weights.

    Inputs and weights are the given ones, without what is not finite. The states are made up, and resets are added: a run
    begins with states of zeros, and its first sequences may hold no reset.
    """
    from hardy.nn import triton_lstm

    inputs, weight = (
        torch.nan_to_num(tensor.detach(), posinf=0.0, neginf=0.0).requires_grad_() for tensor in (from_input, weight_hh)
    )
    state = _wave(hidden, 1.3), 2 * _wave(cell, 1.9)
    resets = is_first | (_wave(is_first, 1.7) > 0.8)
    grad = _wave(from_input[..., : hidden.shape[-1]], 2.3)

    def work(layer: Callable[..., Tensor]) -> Sequence[Tensor]:
        with torch.enable_grad():
            output = layer(inputs, *state, resets, weight)
        return output.detach(), *torch.autograd.grad(output, (inputs, weight), grad)

    return lambda: work(stepped.lstm_layer), lambda: work(triton_lstm.lstm_layer)


def _wave(like: Tensor, pace: float) -> Tensor:
    """Numbers between −1 and 1 in this shape without any pattern along an axis, and without drawing random ones."""
    steps = torch.arange(like.numel(), dtype=torch.float64, device=like.device)
    return steps.mul_(pace).sin_().to(torch.float32).view(like.shape)


def cuda_seconds(work: Work) -> float:
    """Shortest time of a call in a captured graph: there neither way pays for Python, in which the stepped one has more."""
    device = work()[0].device
    captured = Captured(work, device)
    best = float("inf")
    with torch.cuda.device(device):  # streams and events are those of the card in use
        for _ in range(WARMUP + 1):
            captured()
        for _ in range(REPETITIONS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            captured()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1000)
    return best


class Choice:
    """Whether another way to the same results is taken, tried once for each kind of call.

    Args:
        name: of the other way, for the warning.
        seconds: the clock, which calls what it is given as often as it likes and returns the time of one call.
    """

    def __init__(self, name: str, seconds: Callable[[Work], float]) -> None:
        self._name = name
        self._seconds = seconds
        self._decided: dict[Hashable, bool] = {}
        self._warned = False

    def takes(self, key: Hashable, rivals: Callable[[], tuple[Work, Work]], capturing: bool, tolerance: float) -> bool:
        """Whether to take the other way for calls of this kind: where it gives the same results in less time.

        Args:
            key: what a decision depends on.
            rivals: makes the usual way and the other one; called only where there is something to decide.
            capturing: a graph is being captured, so that nothing can be tried: what is undecided then stays so, and usual.
            tolerance: greatest difference, relative to a tensor's largest entry.

        Warns:
            RuntimeWarning: once, if the other way fails or gives other results.
        """
        if key not in self._decided:
            if capturing:
                return False
            self._decided[key] = self._better(rivals, tolerance)
        return self._decided[key]

    def _better(self, rivals: Callable[[], tuple[Work, Work]], tolerance: float) -> bool:
        try:
            usual, other = rivals()
            if agree(other(), usual(), tolerance):
                return self._seconds(other) < self._seconds(usual)
            reason = "gives other results"
        # Whatever goes wrong, from a missing C compiler to too little memory for both: the usual way may still do.
        except Exception as error:
            reason = f"fails ({type(error).__name__}: {error})"
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self._name} {reason}, and is not used: this work runs slower", RuntimeWarning, stacklevel=4)
        return False


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Whether no entry differs by more than ``tolerance`` times the largest of its tensor. NaN differs from everything."""
    return all(
        bool((one - other).abs().max() <= tolerance * other.abs().max()) for one, other in zip(found, expected, strict=True)
    )


_choice = Choice("the Triton kernel of the LSTM", cuda_seconds)
