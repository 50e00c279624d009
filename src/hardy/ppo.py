"""Proximal policy optimisation (Schulman et al. 2017) of a whole population: the loss and the update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from hardy.adversary import AdversarySettings, harm, noise_shape, perturb
from hardy.config import Settings, tunable
from hardy.minibatch import CapturedMinibatch, Progress
from hardy.nn import compiled_loss
from hardy.nn.distributions import ActionDistribution
from hardy.ops.categorical import follow_
from hardy.ops.policy_loss import (
    MAX_LOG_RATIO,
    approx_kl,
    beyond_clip,
    clipped_surrogate,
    explained_variance,
    log_ratio,
    normalize_advantage,
)
from hardy.ops.returns import gae, sampled_returns
from hardy.ops.risk import Objective
from hardy.ops.schedules import ScheduleKind, ramp_factor, schedule_factor
from hardy.optim import OptimizerState, PopulationOptimizer, compiled
from hardy.parallel import pool
from hardy.policy import ActorCritic
from hardy.population import MemberGenerators, member_norm, member_sum, per_member
from hardy.profiling import phase, timed
from hardy.rollout import Rollout

Hyper = Mapping[str, Tensor]
Attacker = Callable[["Batch"], Tensor]
"""The sequences of a batch to attacked observations."""
CAPTURED = ("cuda",)
"""Types of devices on which a minibatch is a captured function."""
KL_TOLERANCE = 1.5
"""A member stops its update once its KL exceeds this many times the target, as in Stable-Baselines3."""


class PPOSettings(Settings):
    """Experience per update, and how it is used."""

    n_steps: int = Field(128, ge=1)
    """Steps of each environment between two updates."""
    n_epochs: int = Field(10, ge=1)
    n_minibatches: int = Field(4, ge=1)
    """Parts into which an epoch splits the environments; at most ``env.num_envs``, since sequences stay whole."""
    gamma: float = tunable(0.99, ge=0, le=1)
    gae_lambda: float = tunable(0.95, ge=0, le=1)
    clip_range: float = tunable(0.2, gt=0)
    ent_coef: float = tunable(0.0, ge=0)
    vf_coef: float = tunable(0.5, ge=0)
    normalize_advantage: bool = True
    target_kl: float | None = Field(None, gt=0)
    """A member whose KL exceeds 1.5 times this leaves the rest of the update out; ``null`` never stops."""
    lr_schedule: ScheduleKind = "constant"
    """Factor on ``optimizer.lr`` over the run."""
    clip_schedule: ScheduleKind = "constant"
    """Factor on ``ppo.clip_range`` over the run."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Whole sequences of some environments of every member, with what the loss needs of them."""

    obs: Float[Tensor, "P T E O"]
    is_first: Bool[Tensor, "P T E"]
    initial_state: Float[Tensor, "P E S"]
    action: Tensor
    log_prob: Float[Tensor, "P T E"]
    advantage: Float[Tensor, "P T E"]
    returns: Float[Tensor, "P T E"]
    targets: Float[Tensor, "P T E G"]
    """G samples of the return, which the critics are trained on; ``returns`` itself where G is 1."""
    critic: Float[Tensor, "P T E K"]
    """The critics' outputs when the data were collected."""
    valid: Bool[Tensor, "P T E"]

    def environments(self, chosen: Tensor | slice) -> Batch:
        """The same of some environments: a slice for all members, or for each its own indices ``[P, E']``, from 0 to E - 1."""
        members, steps, envs = self.valid.shape
        if isinstance(chosen, slice):

            def select(value: Tensor, outer: int) -> Tensor:
                return value[(slice(None),) * outer + (chosen,)]
        else:
            # One index for all members: a selection for each would be P times as many small operations.
            places = torch.arange(members * steps, device=chosen.device) * envs
            index = {1: places[:members, None] + chosen, 2: places.view(members, steps, 1) + chosen[:, None]}

            def select(value: Tensor, outer: int) -> Tensor:
                rows = index[outer]
                return value.flatten(0, outer).index_select(0, rows.flatten()).view(*rows.shape, *value.shape[outer + 1 :])

        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # Axes in front of the environments: members and, but for the states, steps.
        return Batch(**{name: select(value, 1 if name == "initial_state" else 2) for name, value in fields.items()})


def make_batch(
    rollout: Rollout,
    hyper: Hyper,
    *,
    normalize: bool,
    objective: Objective | None = None,
    draws: MemberGenerators | None = None,
) -> Batch:
    """Advantages and returns of a rollout, normalised per member over its valid steps if ``normalize``.

    Args:
        objective: what counts besides the mean of the return.
        draws: generators for samples of the return; used only where the objective asks for such targets.
    """
    outcome = (rollout.reward, rollout.terminated, rollout.truncated, rollout.valid)
    gamma, gae_lambda = hyper["ppo.gamma"], hyper["ppo.gae_lambda"]
    advantage, returns = gae(*outcome, rollout.value, rollout.next_value, gamma, gae_lambda)
    targets = returns.unsqueeze(-1)
    if objective is not None:
        if objective.samples_returns and draws is not None:
            own, following = (objective.critic.samples(outputs) for outputs in (rollout.critic, rollout.next_critic))
            uniform = draws.uniform_(torch.empty(own.shape, dtype=own.dtype)).to(own.device)
            targets = sampled_returns(*outcome, own, following, gamma, gae_lambda, uniform)
        advantage = objective.advantage(advantage, targets, rollout.critic, hyper)
    if normalize:
        advantage = normalize_advantage(advantage, rollout.valid)
    return Batch(
        obs=rollout.obs,
        is_first=rollout.is_first,
        initial_state=rollout.initial_state,
        action=rollout.action,
        log_prob=rollout.log_prob,
        advantage=advantage,
        returns=returns,
        targets=targets,
        critic=rollout.critic,
        valid=rollout.valid,
    )


def loss(
    policy: ActorCritic,
    batch: Batch,
    hyper: Hyper,
    steps: Float[Tensor, "P"],
    attacked: Float[Tensor, "P T E O"] | None = None,
) -> tuple[Float[Tensor, "P"], dict[str, Float[Tensor, "P"]]]:
    """PPO's loss of each member, and its parts.

    ``−min(r A, clip(r) A) + vf_coef · critic's loss − ent_coef · entropy`` (Schulman et al. 2017, eq. 9), averaged over valid
    steps only.

    Args:
        steps: number of valid steps each member's sums are divided by: those of the whole minibatch, of which ``batch`` may be
            a part, so that the losses of the parts add up to that of the whole.
        attacked: observations near the true ones. They add ``robust_kl_coef · KL(π(obs) ‖ π(attacked))`` of the same steps, in
            closed form and with gradient to both sides (Zhang et al. 2020, eq. 5 and 7; for a Gaussian it is the Mahalanobis
            form). The attacked sequences begin with the stored state and carry their own from there on.
    """
    with phase("forward"):
        outputs, critic = policy.outputs(batch.obs, batch.initial_state, batch.is_first)
    if attacked is None and (found := _compiled_loss(policy, outputs, critic, batch, hyper, steps)) is not None:
        total, measured = found
        return total, {f"train/{name}": value for name, value in measured._asdict().items()}
    distribution = policy.distribution(outputs)
    log_prob = distribution.log_prob(batch.action)
    if attacked is not None:
        with phase("adversary"):
            other, _ = policy(attacked, batch.initial_state, batch.is_first)
        under_attack = per_member(hyper["adversary.epsilon"] > 0, 3)
        chosen = under_attack & _first_share(hyper["adversary.adversarial_ratio"], batch.valid.shape[2])
        log_prob = torch.where(chosen, other.log_prob(batch.action), log_prob)

    ratio = log_ratio(log_prob, batch.log_prob)
    policy_loss = clipped_surrogate(ratio, batch.advantage, hyper["ppo.clip_range"])
    value_loss = policy.values.loss(critic, batch.targets, batch.critic, hyper["critic.value_clip"])
    entropy = distribution.entropy()
    each = torch.addcmul(policy_loss, per_member(hyper["ppo.vf_coef"], 3), value_loss)
    each = torch.addcmul(each, per_member(hyper["ppo.ent_coef"], 3), entropy, value=-1)
    parts = {"train/policy_loss": policy_loss, "train/value_loss": value_loss, "train/entropy": entropy}
    if attacked is not None:
        robust_kl = torch.where(under_attack, distribution.kl(other), 0.0)
        each = torch.addcmul(each, per_member(hyper["adversary.robust_kl_coef"], 3), robust_kl)
        parts["adversary/robust_kl"] = robust_kl
    parts["train/approx_kl"] = approx_kl(ratio)
    parts["train/clip_fraction"] = beyond_clip(ratio, hyper["ppo.clip_range"]).to(each.dtype)
    with torch.no_grad():  # all at once: at this size the number of calls is what counts
        sums = torch.where(batch.valid, torch.stack(list(parts.values())), 0.0).flatten(2).sum(2)
        averages = dict(zip(parts, (sums / steps).unbind(), strict=True))
    return member_sum(each, batch.valid) / steps, averages


def _compiled_loss(
    policy: ActorCritic, outputs: Tensor, critic: Tensor, batch: Batch, hyper: Hyper, steps: Tensor
) -> tuple[Tensor, compiled_loss.Parts] | None:
    """The loss from the compiled library, where it knows this critic and these types."""
    settings, log_std = policy.values.settings, policy.actor.log_std
    given = compiled_loss.Given(
        *(batch.action, batch.log_prob, batch.advantage, batch.targets, batch.valid),
        *(hyper["ppo.clip_range"], hyper["ppo.vf_coef"], hyper["ppo.ent_coef"], steps),
    )
    known = settings.kind != "categorical" and settings.value_clip == 0
    if not known or not compiled_loss.supports(outputs, critic, log_std, given):
        return None
    options = compiled_loss.Options(policy.values.heads, settings.kind == "scalar", settings.huber_threshold, MAX_LOG_RATIO)
    return compiled_loss.ppo_loss(outputs, critic, log_std, given, options, pool().threads)


def _first_share(ratio: Float[Tensor, "P"], envs: int) -> Bool[Tensor, "P 1 E"]:
    """This share of the environments, to the nearest whole number; which ones they are, the shuffling decides."""
    return (torch.arange(envs, device=ratio.device) + 0.5 < ratio[:, None] * envs).unsqueeze(1)


def scheduled(
    hyper: Hyper, settings: PPOSettings, progress: float, adversary: AdversarySettings | None = None
) -> dict[str, Tensor]:
    """The hyperparameters of this moment: schedules multiply the base, and never write to it."""
    current = dict(hyper)
    current["optimizer.lr"] = hyper["optimizer.lr"] * schedule_factor(settings.lr_schedule, progress)
    current["ppo.clip_range"] = hyper["ppo.clip_range"] * schedule_factor(settings.clip_schedule, progress)
    if adversary is not None:
        factor = ramp_factor(progress, adversary.warmup, adversary.ramp)
        current["adversary.epsilon"] = hyper["adversary.epsilon"] * factor
    return current


class PPO:
    """The update of a population from one rollout.

    Args:
        policy: the actor-critics; its parameters are written in place.
        optimizer: of the same parameters.
        objective: what counts besides the mean of the return.
        adversary: how observations are attacked, for members whose epsilon is above 0.
        microbatches: parts of a minibatch whose gradients are taken one by one; more than one only for the gradient scaler's
            microbatch estimator.
    """

    def __init__(
        self,
        policy: ActorCritic,
        optimizer: PopulationOptimizer,
        settings: PPOSettings,
        objective: Objective,
        adversary: AdversarySettings,
        microbatches: int,
    ) -> None:
        self.policy = policy
        self.parameters = {name: value for name, value in policy.named_parameters() if value.requires_grad}
        self.optimizer = optimizer
        self.settings = settings
        self.objective = objective
        self.adversary = adversary
        self.microbatches = microbatches
        self._captured: tuple[OptimizerState, CapturedMinibatch] | None = None

    def update(
        self,
        rollout: Rollout,
        state: OptimizerState,
        hyper: Hyper,
        generators: Mapping[str, MemberGenerators],
        bounds: Callable[[], tuple[Float[Tensor, "P O"], Float[Tensor, "P O"]]],
    ) -> dict[str, Float[Tensor, "P"]]:
        """All epochs over one rollout. Writes the parameters and ``state`` in place.

        Args:
            hyper: hyperparameters of this moment, schedules applied (see `scheduled`).
            generators: the members' own, for the order of the environments (``shuffle``), the optimizer's noise (``noise``)
                samples of the return (``target``) and the adversary (``attack``).
            bounds: lowest and highest normalised observation; asked for only where a member is attacked.

        Returns:
            Metrics, averaged over the minibatches that each member trained on.
        """
        normalize, draws = self.settings.normalize_advantage, generators["target"]
        with phase("returns"):
            whole = make_batch(rollout, hyper, normalize=normalize, objective=self.objective, draws=draws)
        members, _, envs = whole.valid.shape
        limits = bounds() if bool((hyper["adversary.epsilon"] > 0).any()) else None
        captured = self._captured_on(whole.obs, state) if limits is None else None
        minibatches = self.settings.n_epochs * self.settings.n_minibatches
        progress = Progress(members, whole.obs) if captured is None else captured.begin_(generators["noise"], minibatches)
        split: dict[str, Tensor] = {}
        for _ in range(self.settings.n_epochs):
            with phase("minibatches"):
                shuffled = whole.environments(generators["shuffle"].permutations(envs, progress.running).to(whole.obs.device))
            for part in _split(shuffled, self.settings.n_minibatches):
                if captured is not None:
                    with phase("captured minibatch"):  # a replay runs none of the phases inside it
                        captured(vars(part), hyper)
                    continue
                attack = self._attacker(hyper, limits, generators["attack"], progress.running)
                gradients, metrics = self._gradients(part, hyper, state, attack)
                if attack is not None and not split:
                    with phase("metrics"):
                        split = self._split_norms(part, hyper, gradients)
                self._apply(gradients, metrics, hyper, state, generators["noise"], progress)
                del gradients  # the next ones take their memory, which is still in a cache
            if not progress.running.any():
                break
        self._follow_returns(rollout, hyper)
        return {
            **progress.mean(),
            **split,
            "train/skipped_updates": progress.skipped.clone(),
            "train/explained_variance": explained_variance(rollout.value, whole.returns, whole.valid),
            "train/learning_rate": hyper["optimizer.lr"],
        }

    def _apply(
        self,
        gradients: dict[str, Tensor],
        metrics: dict[str, Tensor],
        hyper: Hyper,
        state: OptimizerState,
        noise: MemberGenerators | Int[Tensor, "P"],
        progress: Progress,
    ) -> None:
        """Step the members that have not reached their target, as far as their gradients are finite."""
        running = progress.running & self._within_target(metrics["train/approx_kl"])
        with phase("optimizer"):
            finite = _finite(gradients)
            # Called with nobody to train as well: it forgets the microbatches that were observed.
            stepped = self.optimizer.step_(self.parameters, gradients, state, hyper, noise, running & finite)
        with phase("metrics"):
            progress.add_({**metrics, **stepped}, running, finite)

    def _captured_on(self, like: Tensor, state: OptimizerState) -> CapturedMinibatch | None:
        """A whole minibatch without an adversary, whose draws no graph can hold, as one captured function, where it gains."""
        if like.device.type not in CAPTURED:
            return None
        if self._captured is None or self._captured[0] is not state:
            self._captured = state, CapturedMinibatch(functools.partial(self._train_on, state), like)
        return self._captured[1]

    def _train_on(
        self, state: OptimizerState, batch: Mapping[str, Tensor], hyper: Hyper, keys: Int[Tensor, "P"], progress: Progress
    ) -> None:
        """What is captured: a minibatch by the names of `Batch`."""
        gradients, metrics = self._gradients(Batch(**batch), hyper, state)
        self._apply(gradients, metrics, hyper, state, keys, progress)

    def _follow_returns(self, rollout: Rollout, hyper: Hyper) -> None:
        support = self.policy.values.support
        if support is None:
            return
        outcome = (rollout.reward, rollout.terminated, rollout.truncated, rollout.valid)
        gamma = hyper["ppo.gamma"]
        _, returns = gae(*outcome, rollout.value, rollout.next_value, gamma, torch.ones_like(gamma))
        follow_(support, returns, rollout.valid)

    def _within_target(self, kl: Float[Tensor, "P"]) -> Bool[Tensor, "P"]:
        if self.settings.target_kl is None:
            return torch.ones_like(kl, dtype=torch.bool)
        # NaN is no reason to stop: that step is skipped, and the next minibatch may be sound.
        return ~(kl > KL_TOLERANCE * self.settings.target_kl)

    def _attacker(
        self, hyper: Hyper, bounds: tuple[Tensor, Tensor] | None, draws: MemberGenerators, running: Bool[Tensor, "P"]
    ) -> Attacker | None:
        """What attacks the sequences of a batch, if any member is to be attacked; members that are not draw nothing."""
        epsilon, method = hyper["adversary.epsilon"], self.adversary.method
        members = running & (epsilon > 0)
        if bounds is None or not bool(members.any()):
            return None

        def attack(batch: Batch) -> Tensor:
            def respond(obs: Tensor) -> tuple[ActionDistribution, Tensor]:
                distribution, critic = self.policy(obs, batch.initial_state, batch.is_first)
                return distribution, self.policy.values.mean(critic)

            shape = noise_shape(batch.obs.shape, method)
            noise = draws.normal_(torch.zeros(shape, dtype=batch.obs.dtype), members).to(batch.obs.device)
            return perturb(harm(method, respond, batch.obs), batch.obs, epsilon, bounds, noise, method)

        return attack

    def _split_norms(self, batch: Batch, hyper: Hyper, gradients: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "P"]]:
        """Norms of the two parts of a gradient: what the adversary adds, and the rest."""
        steps = member_sum(batch.valid.to(batch.obs.dtype)).clamp(min=1)
        total, _ = loss(self.policy, batch, hyper, steps)
        clean = torch.autograd.grad(total.sum(), list(self.parameters.values()))
        added = [gradients[name] - part for name, part in zip(self.parameters, clean, strict=True)]
        return {
            "adversary/epsilon": hyper["adversary.epsilon"],
            "adversary/clean_grad_norm": member_norm(clean),
            "adversary/robust_grad_norm": member_norm(added),
        }

    def _gradients(
        self, batch: Batch, hyper: Hyper, state: OptimizerState, attack: Attacker | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of each member's mean loss over ``batch``, and the loss's parts."""
        steps = member_sum(batch.valid.to(batch.obs.dtype)).clamp(min=1)
        parts = list(_split(batch, self.microbatches))
        gradients: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for part in parts:
            attacked = None if attack is None else timed("adversary", attack)(part)
            with phase("loss"):
                total, measured = loss(self.policy, part, hyper, steps, attacked)
            # Summed over P: a mean would divide every member's gradient by the size of the population.
            with phase("backward"):
                found = torch.autograd.grad(total.sum(), list(self.parameters.values()))
            part_gradients = dict(zip(self.parameters, found, strict=True))
            if len(parts) > 1:
                with phase("VGS"):
                    self.optimizer.observe_microbatch(part_gradients, state)
            gradients = _add(gradients, part_gradients)
            metrics = _add(metrics, measured)
        return gradients, metrics


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    """``batch`` cut along its environments into parts whose sizes differ by one at most: no step is lost."""
    envs = batch.valid.shape[2]
    if parts == 1:
        yield batch
        return
    for part in range(parts):
        yield batch.environments(slice(envs * part // parts, envs * (part + 1) // parts))


def _add(total: dict[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: total[name] + value for name, value in more.items()} if total else dict(more)


def _finite(gradients: Mapping[str, Tensor]) -> Bool[Tensor, "P"]:
    """Members all of whose gradients are finite, and their squares too: norms and second moments are made of those."""
    tensors = list(gradients.values())
    squares = compiled.member_squares(tensors, pool().threads)
    return (member_norm(tensors).square() if squares is None else squares.float()).isfinite()
