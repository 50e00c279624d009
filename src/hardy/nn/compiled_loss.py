"""PPO's loss of a minibatch and its gradients in the compiled library, for float32 on the CPU.

One call instead of some hundred small operations forward and backward; `hardy.ppo.loss` says what it computes, and gives the
same results to rounding where this does not apply (see `hardy.nn.compiled` for where the library comes from).
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.compiled import NEWEST_INSTRUCTIONS, Function
from hardy.nn.compiled import empty

VERSION = 1
"""Of `_Loss`; a library built from sources of another version is not used."""
SMALLEST_PART = 20_000
"""Numbers looked at, of all members, below which a part is not worth a thread (measured)."""


class _Loss(ctypes.Structure):
    """What a call works on; mirrors `Loss` in `_recurrence.cpp`, which explains the fields."""

    _sizes = "members rows actions critics quantiles targets squared threads level"
    _tensors = (
        "actor critic log_std precision choices action old_log_prob advantage target valid clip_range value_weight "
        "entropy_weight steps grad_actor grad_critic grad_log_std parts"
    )
    _fields_ = [
        *((name, ctypes.c_int64) for name in _sizes.split()),
        *((name, ctypes.c_float) for name in ("kappa", "most_log_ratio")),
        *((name, ctypes.c_void_p) for name in _tensors.split()),
    ]


_loss = Function("hardy_loss", VERSION)
available = _loss.available


class Parts(NamedTuple):
    """What a loss is made of and what is measured beside it, ``[P]`` each, averaged like the loss."""

    policy_loss: Float[Tensor, "P"]
    value_loss: Float[Tensor, "P"]
    entropy: Float[Tensor, "P"]
    approx_kl: Float[Tensor, "P"]
    clip_fraction: Float[Tensor, "P"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the loss of one training keeps.

    Attributes:
        critics: number of critics, whose outputs stand side by side.
        squared: half the squared error of each critic's one output instead of the quantile Huber loss.
        kappa: threshold of the quantile Huber loss.
        most_log_ratio: beyond which the logarithm of a ratio does not grow.
        level: the newest instruction set to use, 0 for what every CPU has; newer ones are used only where they exist.
    """

    critics: int
    squared: bool
    kappa: float
    most_log_ratio: float
    level: int = NEWEST_INSTRUCTIONS


@dataclasses.dataclass(frozen=True)
class Given:
    """What was seen and done in the steps of a minibatch, and the weights of its loss."""

    action: Tensor
    """Choices ``[P, T, E]`` (int64), or components ``[P, T, E, A]``."""
    log_prob: Float[Tensor, "P T E"]
    advantage: Float[Tensor, "P T E"]
    targets: Float[Tensor, "P T E G"]
    valid: Bool[Tensor, "P T E"]
    clip_range: Float[Tensor, "P"]
    vf_coef: Float[Tensor, "P"]
    ent_coef: Float[Tensor, "P"]
    steps: Float[Tensor, "P"]


def supports(outputs: Tensor, critic: Tensor, log_std: Tensor | None, given: Given) -> bool:
    """Whether the library can be used: float32 (choices int64, ``valid`` bool) on the CPU."""
    others = (getattr(given, field.name) for field in dataclasses.fields(given) if field.name not in ("action", "valid"))
    wanted = torch.int64 if log_std is None else torch.float32
    return (
        available()
        and all(tensor.dtype is torch.float32 and tensor.is_cpu for tensor in (outputs, critic, *others))
        and (log_std is None or (log_std.dtype is torch.float32 and log_std.is_cpu))
        and (given.action.dtype, given.valid.dtype) == (wanted, torch.bool)
    )


def ppo_loss(
    outputs: Float[Tensor, "P T E A"],
    critic: Float[Tensor, "P T E K"],
    log_std: Float[Tensor, "P A"] | None,
    given: Given,
    options: Options,
    threads: int,
) -> tuple[Float[Tensor, "P"], Parts]:
    """PPO's loss of each member, and its parts without gradient.

    Args:
        outputs: the actor's: logits, or, with ``log_std``, means.
        critic: the critics' outputs side by side.
        log_std: of Gaussian actions.
        threads: at most that many; they change no result.

    Raises:
        ValueError: the shapes do not belong together.
        MemoryError: no memory for the working space.
    """
    _check_shapes(outputs, critic, log_std, given, options)
    total, *parts = _PPOLoss.apply(given, options, threads, outputs, critic, log_std)  # type: ignore[no-untyped-call]
    return total, Parts(*parts)


def _check_shapes(outputs: Tensor, critic: Tensor, log_std: Tensor | None, given: Given, options: Options) -> None:
    # The library follows bare addresses: what would be an error in PyTorch would be somebody else's memory here.
    rows, members = outputs.shape[:3], outputs.shape[:1]
    wanted = {
        "critic": (critic, (*rows, critic.shape[-1])),
        "action": (given.action, rows if log_std is None else outputs.shape),
        "targets": (given.targets, (*rows, given.targets.shape[-1])),
        **{name: (getattr(given, name), rows) for name in ("log_prob", "advantage", "valid")},
        **{name: (getattr(given, name), members) for name in ("clip_range", "vf_coef", "ent_coef", "steps")},
    }
    if log_std is not None:
        wanted["log_std"] = log_std, (*members, outputs.shape[-1])
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}: outputs of {tuple(outputs.shape)} want {tuple(shape)}")
    outputs_of_one = critic.shape[-1] / options.critics
    if outputs_of_one % 1 or (options.squared and outputs_of_one != 1):
        raise ValueError(f"critic of shape {tuple(critic.shape)}: {options} want other outputs")


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, given: Given, options: Options, threads: int, outputs: Tensor, critic: Tensor, log_std: Tensor | None
    ) -> tuple[Tensor, ...]:
        members, _, _, actions = outputs.shape
        rows = outputs.shape[1] * outputs.shape[2]
        looked_at = members * rows * (actions + critic.shape[3] * given.targets.shape[3])
        read = {
            "actor": outputs, "critic": critic, "old_log_prob": given.log_prob, "advantage": given.advantage,
            "target": given.targets, "valid": given.valid, "clip_range": given.clip_range, "value_weight": given.vf_coef,
            "entropy_weight": given.ent_coef, "steps": given.steps, "choices" if log_std is None else "action": given.action,
        }  # fmt: skip
        written = {"grad_actor": empty(*outputs.shape), "grad_critic": empty(*critic.shape)}
        if log_std is not None:
            read |= {"log_std": log_std, "precision": (-log_std).exp()}
            written["grad_log_std"] = empty(*log_std.shape)
        parts = torch.empty(members, len(Parts._fields), dtype=torch.float64, device="cpu")
        used = {name: tensor.contiguous() for name, tensor in read.items()} | written | {"parts": parts}
        problem = _Loss(
            *(members, rows, actions, options.critics, critic.shape[3] // options.critics, given.targets.shape[3]),
            *(options.squared, max(1, min(threads, looked_at // SMALLEST_PART)), options.level),
            *(options.kappa, options.most_log_ratio),
            **{name: tensor.data_ptr() for name, tensor in used.items()},
        )
        _loss(problem, lambda: f"the loss of outputs of shape {tuple(outputs.shape)}")
        ctx.save_for_backward(*written.values())
        found = parts.to(outputs.dtype).unbind(1)
        total = found[0] + given.vf_coef * found[1] - given.ent_coef * found[2]
        ctx.mark_non_differentiable(*found)
        return total, *found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = [grad * grad_outputs[0].view(-1, *([1] * (grad.ndim - 1))) for grad in ctx.saved_tensors]
        return None, None, None, *grads, *([None] * (3 - len(grads)))
