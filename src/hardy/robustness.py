"""What an attack on its observations costs a trained agent."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hardy.adversary import Attack, harm, noise_shape, perturb
from hardy.nn.distributions import ActionDistribution
from hardy.population import MemberGenerators, stream_seed
from hardy.rollout import Alter
from hardy.trainer import Trainer


def attacked_returns(
    trainer: Trainer, attack: Attack, epsilon: float, episodes: int, *, deterministic: bool = True, seed: int | None = None
) -> Float[np.ndarray, "P episodes"]:
    """Returns of whole episodes in which every observation is attacked, weights and statistics frozen.

    The episodes are those of ``trainer.evaluate`` with the same seed. The attack knows the policy, and the memory that the
    agent has at that step, which attacked observations have written.

    Args:
        epsilon: radius, in deviations of the normalised observations.
        deterministic, seed: as in ``trainer.evaluate``.
    """
    common = trainer.settings.seed if seed is None else seed
    noise = MemberGenerators([stream_seed(common, "attack", attack.name)] * len(trainer.seeds), "attack")
    alter = _observations_under(trainer, attack, epsilon, noise)
    return trainer.evaluate(episodes, deterministic=deterministic, seed=seed, alter=alter)


def _observations_under(trainer: Trainer, attack: Attack, epsilon: float, draws: MemberGenerators) -> Alter:
    policy, bounds = trainer.policy, trainer.observation_bounds()
    radius = torch.full((len(trainer.seeds),), epsilon, dtype=policy.dtype, device=policy.device)

    def alter(obs: Tensor, state: Tensor, is_first: Tensor) -> Tensor:
        def respond(changed: Tensor) -> tuple[ActionDistribution, Tensor]:
            distribution, critic, _ = policy.step(changed, state, is_first)
            return distribution, policy.values.mean(critic)

        noise = draws.normal_(torch.empty(noise_shape(obs.shape, attack), dtype=obs.dtype)).to(obs.device)
        return perturb(harm(attack, respond, obs), obs, radius, bounds, noise, attack)

    return alter
