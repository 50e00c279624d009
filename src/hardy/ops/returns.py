"""Advantages and returns."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hardy.population import per_member


@torch.no_grad()
def gae(
    reward: Float[Tensor, "P T E"],
    terminated: Bool[Tensor, "P T E"],
    truncated: Bool[Tensor, "P T E"],
    valid: Bool[Tensor, "P T E"],
    value: Float[Tensor, "P T E"],
    next_value: Float[Tensor, "P T E"],
    gamma: Float[Tensor, "P"],
    gae_lambda: Float[Tensor, "P"],
) -> tuple[Float[Tensor, "P T E"], Float[Tensor, "P T E"]]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16), cut where an episode ends.

    With ``δ_t = r_t + γ V'_t − V_t``, where ``V'_t`` is ``next_value[t]`` or 0 at a termination::

        A_t = δ_t + γ λ A_{t+1}    while the episode goes on into t+1, else A_t = δ_t

    Args:
        reward: reward of the transition out of t.
        terminated: the transition out of t ended in a terminal state, whose value is 0 by definition.
        truncated: the transition out of t was the last of its episode for another reason.
        valid: False where a row is no transition of an episode (the reset step of NEXT_STEP autoreset).
        value: V(obs[t]).
        next_value: value of the state that followed the action: V(obs[t+1]) inside an episode, V(final observation) with
            the old episode's memory at a truncation, V(last observation) at the last step. Ignored at a termination.
        gamma: discount of each member.
        gae_lambda: λ of each member.

    Returns:
        advantage and returns (``advantage + value``), in the units of ``value`` and without gradient. Where not ``valid``,
        the advantage is 0 and the return is ``value``. NaN in entries that do not count reaches no other entry.
    """
    zero = torch.zeros_like(value)
    bootstrap = torch.where(terminated, zero, next_value)
    delta = torch.where(valid, reward + per_member(gamma, 3) * bootstrap - value, zero)
    advantage = _sum_back(delta, valid & ~(terminated | truncated), (gamma * gae_lambda)[:, None])
    return advantage, advantage + value


@torch.no_grad()
def sampled_returns(
    reward: Float[Tensor, "P T E"],
    terminated: Bool[Tensor, "P T E"],
    truncated: Bool[Tensor, "P T E"],
    valid: Bool[Tensor, "P T E"],
    own: Float[Tensor, "P T E G"],
    following: Float[Tensor, "P T E G"],
    gamma: Float[Tensor, "P"],
    gae_lambda: Float[Tensor, "P"],
    uniform: Float[Tensor, "P T E G"],
) -> Float[Tensor, "P T E G"]:
    """G samples of the return of each step, for fitting its distribution: SR(λ) (Nam, Kim & Park 2021,
    arXiv:2105.11366, algorithm 1).

    The λ-return as a mixture instead of an average: with probability λ a sample goes on into the next step of the episode,
    otherwise it ends in the predicted distribution of that step::

        G_t = r_t + γ (G_{t+1} with probability λ, else a sample of Z(s_{t+1}))

    Its mean over the draws is `gae`'s return; unlike that it keeps the spread of what lies beyond the end.

    Args:
        own, following: samples of the distributions that ``value`` and ``next_value`` of `gae` are the means of, ascending.
        uniform: numbers uniform in [0, 1), one for each decision.
        reward, terminated, truncated, valid, gamma, gae_lambda: as in `gae`.

    Returns:
        In the units of the reward, without gradient. Where not ``valid``, ``own``.
    """
    continues = (valid & ~(terminated | truncated)).unsqueeze(-1) & (uniform < per_member(gae_lambda, 4))
    continues[:, -1] = False  # there is no step to go on into
    bootstrap = torch.where(terminated.unsqueeze(-1) | continues, torch.zeros_like(following), following)
    ends = torch.where(valid.unsqueeze(-1), reward.unsqueeze(-1) + per_member(gamma, 4) * bootstrap, own)
    return _sum_back(ends, continues, gamma[:, None, None])


def _sum_back(
    own: Float[Tensor, "P T ..."], continues: Bool[Tensor, "P T ..."], decay: Float[Tensor, "P ..."]
) -> Float[Tensor, "P T ..."]:
    """``x_t = own_t + decay · x_{t+1}`` where it continues into t+1, else ``own_t``; 0 comes after the last step."""
    sums = torch.empty_like(own)
    following = torch.zeros_like(own[:, 0])
    # What does not continue is left out by `where`: 0 times NaN would not be.
    for own_t, goes_on, sum_t in reversed(list(zip(own.unbind(1), continues.unbind(1), sums.unbind(1), strict=True))):
        following = torch.where(goes_on, torch.addcmul(own_t, decay, following), own_t, out=sum_t)
    return sums
