"""Attacks on what an agent observes: small changes of the normalised observations that do the most harm.

An attack is given what to maximise as a function of the observations; it knows nothing of the model behind it. For a recurrent
policy that function runs the policy from the stored state of that step, so that the attacked observations meet the memory
which the agent really has; a sequence of them carries its own state from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Self, get_args

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from hardy.config import Settings, tunable
from hardy.nn.distributions import ActionDistribution
from hardy.population import per_member

AttackName = Literal["fgsm", "pgd", "sgld", "random", "critic"]
Norm = Literal["linf", "l2"]
ATTACKS: tuple[str, ...] = get_args(AttackName)
NORMS: tuple[str, ...] = get_args(Norm)
Objective = Callable[[Tensor], Tensor]
"""Observations to what the attack maximises, one or more numbers for each of them or each member; members do not mix."""
Response = Callable[[Tensor], tuple[ActionDistribution, Tensor]]
"""Observations to the policy's action distribution and value there."""
_PGD_REACH = 2.5
"""Length of all steps of PGD together, in radii: enough to cross the ball and to correct (Madry et al. 2018, appendix)."""
_FGSM_START = 0.1
"""How far FGSM starts from the observation, in radii: a divergence has no gradient at the observation itself."""
_TEMPERATURE = 1e-5
"""Of the noise of SGLD, as published with state-adversarial PPO."""


class Attack(NamedTuple):
    """How observations are attacked."""

    name: AttackName
    norm: Norm = "linf"
    steps: int = 10


class AdversarySettings(Settings):
    """State-adversarial training (Zhang et al. 2020, arXiv:2003.08938): the policy is to change little around what it sees."""

    epsilon: float = tunable(0.0, ge=0)
    """Radius of the attack in deviations of the normalised observation; 0 trains without an adversary."""
    robust_kl_coef: float = tunable(1.0, ge=0)
    """Weight of the divergence between the policy at the attacked and at the true observation."""
    adversarial_ratio: float = tunable(0.0, ge=0, le=1)
    """Share of the sequences whose surrogate is taken at the attacked observations."""
    attack: AttackName = "sgld"
    norm: Norm = "linf"
    steps: int = Field(10, ge=1)
    """Gradient steps of ``sgld``, ``pgd`` and ``critic``."""
    warmup: float = Field(0.0, ge=0, le=1)
    """Share of the run before epsilon begins to rise from 0."""
    ramp: float = Field(0.75, ge=0, le=1)
    """Share of the run over which epsilon rises to its full size."""

    @property
    def method(self) -> Attack:
        """The attack of the training."""
        return Attack(self.attack, self.norm, self.steps)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.ramp > 1:
            raise ValueError(
                f"adversary.warmup = {self.warmup}, adversary.ramp = {self.ramp}: must be at most 1 together, or epsilon never "
                "reaches its full size"
            )
        return self


def noise_shape(shape: torch.Size, attack: Attack) -> tuple[int, ...]:
    """Shape of the standard normal numbers that `perturb` takes for observations of this shape: ``[P, draws, ...]``."""
    return (shape[0], 2 + attack.steps if attack.name == "sgld" else 2, *shape[1:])


def harm(attack: Attack, respond: Response, obs: Float[Tensor, "P *batch O"]) -> Objective:
    """What an attack maximises: how far the policy moves from what it does at ``obs``, or how low the value gets (``critic``).

    Args:
        respond: the policy's distribution and value at observations, from the stored state of that step or sequence.
    """
    if attack.name == "critic":
        return lambda changed: -respond(changed)[1]
    with torch.no_grad():
        clean = respond(obs)[0]
    return lambda changed: clean.kl(respond(changed)[0])


def perturb(
    objective: Objective,
    obs: Float[Tensor, "P *batch O"],
    epsilon: Float[Tensor, "P"],
    bounds: tuple[Float[Tensor, "P O"], Float[Tensor, "P O"]],
    noise: Float[Tensor, "P draws *batch O"],
    attack: Attack,
) -> Float[Tensor, "P *batch O"]:
    """Observations within ``epsilon`` of the true ones, and within the bounds, for which ``objective`` is large.

    ``random`` draws from the ball; ``fgsm`` takes one step of the radius along the gradient (Goodfellow et al. 2015); ``pgd``
    takes several from a random start (Madry et al. 2018), and so does ``critic``, whose objective is the negative value;
    ``sgld`` takes steps of ``epsilon/steps`` with a noise that dies away (Zhang et al. 2020, appendix). In ``linf`` steps
    follow the sign of the gradient, in ``l2`` its direction.

    Args:
        obs: normalised.
        epsilon: radius of each member, in units of the normalised observations.
        bounds: lowest and highest normalised observation there can be; an observation outside is left where it is.
        noise: standard normal numbers of `noise_shape`.

    Returns:
        Without gradient; exactly ``obs`` for a member whose ``epsilon`` is 0.
    """
    obs = obs.detach()
    radius = per_member(epsilon, obs.ndim)
    low, high = (bound.reshape(bound.shape[0], *([1] * (obs.ndim - 2)), bound.shape[-1]) for bound in bounds)
    low, high = torch.minimum(low, obs), torch.maximum(high, obs)

    def inside(found: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(obs + _into_ball(found - obs, radius, attack.norm), high), low)

    found = inside(obs + radius * _start(noise, attack))
    if attack.name == "random":
        return found
    total = {"fgsm": 1.0, "pgd": _PGD_REACH, "critic": _PGD_REACH, "sgld": 1.0}[attack.name]
    steps = 1 if attack.name == "fgsm" else attack.steps
    length = total / steps * radius
    for k in range(steps):
        gradient = _gradient(objective, found)
        if attack.name == "sgld":
            gradient = gradient + (2 * length * _TEMPERATURE).sqrt() / (k + 2) * noise[:, k + 2]
        found = inside(found + length * _unit(gradient, attack.norm))
    return found


def _gradient(objective: Objective, obs: Tensor) -> Tensor:
    with torch.enable_grad():
        variable = obs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(variable).sum(), variable)
    return gradient


def _start(noise: Tensor, attack: Attack) -> Tensor:
    """Where an attack begins, in radii from the observation."""
    if attack.name in ("sgld", "fgsm"):
        return _unit(noise[:, 0], attack.norm) * (1.0 / attack.steps if attack.name == "sgld" else _FGSM_START)
    if attack.norm == "linf":
        uniform: Tensor = 2 * torch.special.ndtr(noise[:, 0]) - 1
        return uniform
    # Uniform in the ball: a random direction, and a radius whose power of the dimension is uniform.
    share: Tensor = torch.special.ndtr(noise[:, 1, ..., :1]) ** (1.0 / noise.shape[-1])
    return _unit(noise[:, 0], attack.norm) * share


def _unit(direction: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return direction.sign()
    length: Tensor = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return direction / length.clamp(min=torch.finfo(direction.dtype).tiny)


def _into_ball(change: Tensor, radius: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return torch.maximum(torch.minimum(change, radius), -radius)
    length: Tensor = torch.linalg.vector_norm(change, dim=-1, keepdim=True)
    return change * (radius / length.clamp(min=torch.finfo(change.dtype).tiny)).clamp(max=1)
