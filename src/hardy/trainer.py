"""The training state of a population and the loop that advances it."""

from __future__ import annotations

import dataclasses
import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hardy.checkpoint import CheckpointError, flatten_state, load_tensors, restore_state_, save_tensors
from hardy.config import tunables
from hardy.device_rollout import DeviceCollector
from hardy.envs import BatchedEnv, Drift, TensorEnv, make
from hardy.nn.normalizer import ReturnNormalizer, RunningMoments
from hardy.nn.recurrent import own_threads
from hardy.ops.plasticity import dormant_fraction, effective_rank
from hardy.ops.risk import Objective, RiskState
from hardy.optim import OptimizerState, PopulationOptimizer
from hardy.parallel import available_cores, set_threads
from hardy.policy import ActorCritic, describe_space
from hardy.population import (
    ExploitRule,
    MemberGenerators,
    copied,
    expand,
    exploit_,
    kept,
    leaves,
    member_norm,
    nested,
    stream_seed,
    training_state,
)
from hardy.ppo import PPO, scheduled
from hardy.profiling import phase
from hardy.rollout import (
    Alter,
    CollectorState,
    Normalize,
    Rollout,
    burn_in_,
    collect,
    evaluate,
    reset_memory_,
    restart_,
    running_scores,
    start,
)
from hardy.settings import RunSettings

PLASTICITY_SAMPLES = 512
"""Steps of a rollout on which the plasticity measures are taken: their cost stays small."""
STREAMS = ("action", "shuffle", "noise", "target", "attack")
"""What each member draws from random generators of its own."""
PLASTICITY_EVERY = 10
"""Iterations between two such measurements."""
ENVIRONMENT = "environment/"
"""Prefix of the environments' arrays in a checkpoint."""
Metrics = dict[str, Tensor | float]


@training_state
class TrainingState:
    """All that a run is, but for the environments; every tensor starts with the population axis."""

    parameters: dict[str, Tensor] = copied()
    optimizer: OptimizerState = nested()
    hyper: dict[str, Tensor] = copied()
    """Every tunable number by its dotted path, ``[P]`` each."""
    observation: RunningMoments = nested()
    reward: ReturnNormalizer = nested()
    risk: RiskState = nested()
    collector: CollectorState = nested()
    timesteps: Tensor = kept()
    """``[P]`` environment steps taken."""
    generators: dict[str, MemberGenerators] = kept()


class Trainer:
    """A population in training.

    Args:
        settings: the run; all members start from the same hyperparameters.
        seeds: one seed per member; by default those of ``settings.population``.
        env: the environments, member after member, ``settings.env.num_envs`` each; by default made from ``settings.env``.
        dtype: precision of weights and state.

    Raises:
        ValueError: ``seeds`` are not different whole numbers from 0 on, or the parts do not fit the environments.
    """

    def __init__(
        self,
        settings: RunSettings,
        seeds: Sequence[int] | None = None,
        env: BatchedEnv | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.settings = settings
        self.seeds = settings.member_seeds if seeds is None else _checked_seeds(seeds)
        self.drift_seeds = settings.drift_seeds if seeds is None else self.seeds
        """Of members that are given their own seeds, each one's world changes in its own way."""
        self.iteration = 0
        set_threads(settings.threads or available_cores(), recurrent=own_threads(settings.policy.memory, dtype))
        members = len(self.seeds)
        self.env = make(settings.env, self.seeds, drift_seeds=self.drift_seeds, device=settings.device) if env is None else env
        self.policy = ActorCritic(
            self.env.observation_space, self.env.action_space, settings.policy, settings.critic, self.seeds
        ).to(device=settings.device, dtype=dtype)
        parameters = {name: parameter.data for name, parameter in self.policy.named_parameters()}
        trained = {name: parameters[name] for name, parameter in self.policy.named_parameters() if parameter.requires_grad}
        shapes = {name: parameter.shape for name, parameter in trained.items()}
        optimizer = PopulationOptimizer(shapes, settings.optimizer, settings.vgs)
        collector = start(self.env, self.policy, members)
        self.state = TrainingState(
            parameters=parameters,
            optimizer=optimizer.init(trained),
            hyper={
                name: expand(value, members, dtype=dtype, device=settings.device) for name, value in tunables(settings).items()
            },
            observation=RunningMoments.create(members, (self.policy.observation_size,), settings.device),
            reward=ReturnNormalizer.create(members, collector.is_first.shape[1], settings.device),
            risk=RiskState(torch.zeros(members, dtype=dtype, device=settings.device)),
            collector=collector,
            timesteps=torch.zeros(members, dtype=torch.int64),
            generators={name: MemberGenerators(self.seeds, name) for name in STREAMS},
        )
        objective = Objective(self.policy.values, settings.risk, self.state.risk)
        self.ppo = PPO(self.policy, optimizer, settings.ppo, objective, settings.adversary, settings.microbatches)
        self.recent: Rollout | None = None
        """The last rollout, which a burn-in replays."""
        self._on_device = (
            DeviceCollector(self.env, self.policy, collector, self.normalize, settings.ppo.n_steps)
            if isinstance(self.env, TensorEnv)
            else None
        )

    @property
    def timesteps(self) -> int:
        """Environment steps of one member so far."""
        return int(self.state.timesteps[0])

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps of one member in one iteration."""
        return self.settings.ppo.n_steps * self.state.collector.is_first.shape[1]

    def normalize(self, obs: Float[Tensor, "P ..."]) -> Float[Tensor, "P ..."]:
        """Observations as the policy sees them, by the statistics of this moment."""
        return self.frozen_normalizer()(obs)

    def frozen_normalizer(self) -> Normalize:
        """`normalize` for many calls, by the statistics of this moment."""
        settings = self.settings.normalizer
        if not settings.observation:
            return lambda obs: obs
        return self.state.observation.frozen(settings.clip_observation, settings.epsilon)

    def observation_bounds(self) -> tuple[Float[Tensor, "P O"], Float[Tensor, "P O"]]:
        """Lowest and highest observation there can be, as the policy would see them now."""
        space, members = self.env.observation_space, len(self.seeds)
        low, high = (self.policy.flatten(np.stack([bound] * members), members) for bound in (space.low, space.high))
        return self.normalize(low).squeeze(1), self.normalize(high).squeeze(1)

    def iterate(self, total_timesteps: int) -> Metrics:
        """One rollout and one update of every member.

        Args:
            total_timesteps: length of the run, to which the schedules refer.

        Returns:
            Metrics by name, one number for each member or one for all.

        Raises:
            ValueError: ``total_timesteps`` is not positive.
        """
        if total_timesteps < 1:
            raise ValueError(f"total_timesteps = {total_timesteps}: must be at least 1")
        began = time.perf_counter()
        state = self.state
        self._follow_schedule()
        with phase("rest of the rollout"):
            rollout = self.recent = self._collect()
        progress = self.timesteps / total_timesteps
        hyper = scheduled(state.hyper, self.settings.ppo, progress, self.settings.adversary)
        with phase("normalising"):
            trained_on = self._scale_rewards(rollout, hyper["ppo.gamma"])
        with phase("returns"):
            metrics: Metrics = dict(self._risk(trained_on, hyper))
        metrics |= self.ppo.update(trained_on, state.optimizer, hyper, state.generators, self.observation_bounds)
        if self.iteration % PLASTICITY_EVERY == 0:
            with phase("metrics"):
                metrics |= self._plasticity(rollout)
        if self.settings.normalizer.observation:
            with phase("normalising"):
                state.observation.update_(rollout.raw_obs.flatten(1, 2), rollout.valid.flatten(1, 2))
        state.timesteps += self.steps_per_iteration
        self.iteration += 1
        with phase("metrics"):
            metrics |= running_scores(state.collector)
        metrics["env/drift_changes"] = float(self.env.changes.max()) if isinstance(self.env, Drift) else 0.0
        metrics = _on_host(metrics)
        metrics["time/total_timesteps"] = float(self.timesteps)
        metrics["time/steps_per_second"] = len(self.seeds) * self.steps_per_iteration / (time.perf_counter() - began)
        return metrics

    def _collect(self) -> Rollout:
        noise = self.state.generators["action"]
        if self._on_device is not None:
            return self._on_device.collect(noise)
        steps = self.settings.ppo.n_steps
        return collect(self.env, self.policy, self.state.collector, self.frozen_normalizer(), noise, steps)

    def _follow_schedule(self) -> None:
        for change in self.settings.schedule:
            if change.step <= self.timesteps:
                for name, value in change.values.items():
                    self.state.hyper[name].fill_(value)

    def _scale_rewards(self, rollout: Rollout, gamma: Float[Tensor, "P"]) -> Rollout:
        settings = self.settings.normalizer
        if not settings.reward:
            return rollout
        # The policy never sees a reward, so the statistics may take this rollout in before it is scaled.
        self.state.reward.update_(rollout.reward, rollout.terminated | rollout.truncated, rollout.valid, gamma)
        scaled = self.state.reward.scale(rollout.reward, settings.clip_reward, settings.epsilon)
        return dataclasses.replace(rollout, reward=scaled)

    def _risk(self, rollout: Rollout, hyper: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CVaR from the starts of episodes in the units of the reward, and the step of the multipliers that follows from it."""
        objective, epsilon = self.ppo.objective, self.settings.normalizer.epsilon
        cvar = objective.cvar(rollout.critic, rollout.is_first & rollout.valid, hyper)
        # Without scaling, the statistics stay where they began: at 1.
        deviation = self.state.reward.deviation(epsilon).to(cvar.dtype)
        return objective.adapt_(self.state.reward.unscale(cvar, epsilon), deviation, hyper)

    @torch.no_grad()
    def _plasticity(self, rollout: Rollout) -> Metrics:
        envs = math.ceil(PLASTICITY_SAMPLES / rollout.obs.shape[1])
        features = self.policy.features(
            rollout.obs[:, :, :envs], rollout.initial_state[:, :envs], rollout.is_first[:, :, :envs]
        )
        own = features[:1] if self.settings.policy.shared_memory else features
        layers = [layer.flatten(1, 2)[:, :PLASTICITY_SAMPLES] for layer in own]
        return {
            # Each trunk against its own mean response; the trunks have equally many units.
            "plasticity/dormant_fraction": torch.stack([dormant_fraction(layer) for layer in layers]).mean(0),
            "plasticity/effective_rank": effective_rank(torch.cat(layers, dim=-1)),
            "plasticity/weight_norm": member_norm(list(self.ppo.parameters.values())),
        }

    def sound(self) -> Bool[np.ndarray, "P"]:
        """Members all of whose state that an exploit copies (weights, optimizer, statistics, hyperparameters) is finite."""
        copied_leaves = [leaf.tensor for leaf in leaves(self.state) if leaf.rule is ExploitRule.COPY]
        found = [tensor.isfinite().reshape(len(self.seeds), -1).all(1).cpu() for tensor in copied_leaves]
        return np.asarray(torch.stack(found).all(0).numpy())

    @torch.no_grad()
    def exploit_(
        self,
        source: Int[np.ndarray, "P"],
        keeps_hyperparams: Bool[np.ndarray, "P"] | None = None,
        restarts: Bool[np.ndarray, "P"] | None = None,
    ) -> None:
        """Let every member with ``source[p] != p`` become member ``source[p]``, between two iterations.

        The optimizer's state follows ``pbt.optimizer_exploit_strategy``. The memory that the old weights wrote goes, always:
        what stands in its place is the choice of ``pbt.after_exploit``. An environment whose observation is not finite begins a
        new episode where it can.

        Args:
            keeps_hyperparams: replaced members that keep their own hyperparameters.
            restarts: replaced members whose environments begin new episodes where they can, whatever the setting.
        """
        state, device = self.state, self.policy.device
        chosen = torch.from_numpy(source).to(device)
        replaced = chosen != torch.arange(len(chosen), device=device)
        if not replaced.any():
            return
        ongoing = ~state.collector.is_first
        own = {name: value.clone() for name, value in state.hyper.items()}
        exploit_(state, chosen)
        if self.settings.pbt.optimizer_exploit_strategy == "reset":
            fresh = self.ppo.optimizer.init(self.ppo.parameters)
            for leaf, new in zip(leaves(state.optimizer), leaves(fresh), strict=True):
                leaf.tensor[replaced] = new.tensor[replaced]
        if keeps_hyperparams is not None:
            keeping = torch.from_numpy(keeps_hyperparams).to(device)
            for name, value in state.hyper.items():
                value[keeping] = own[name][keeping]
        anew = torch.zeros_like(replaced) if restarts is None else torch.from_numpy(restarts).to(device)
        begun = self._begin_episodes(replaced, anew | (self.settings.pbt.after_exploit == "reset_env"))
        if self.settings.pbt.after_exploit == "burn_in" and self.recent is not None:
            burn_in_(state.collector, self.policy, self.recent, self.frozen_normalizer(), replaced[:, None] & ongoing & ~begun)

    @torch.no_grad()
    def fall_back_(self, path: Path) -> int:
        """Take weights, optimizer, statistics and hyperparameters from a checkpoint of this run; all else goes on.

        Returns:
            The step of the checkpoint.

        Raises:
            CheckpointError: the file is unreadable or belongs to another structure.
        """
        tensors, document = load_tensors(path, "checkpoint")
        for leaf in leaves(self.state):
            if leaf.rule is ExploitRule.COPY:
                if leaf.path not in tensors or tensors[leaf.path].shape != leaf.tensor.shape:
                    raise CheckpointError(f"{path}: {leaf.path} is missing or of another shape")
                leaf.restore_(tensors[leaf.path])
        reset_memory_(self.state.collector)
        return int(document["timesteps"])

    @torch.no_grad()
    def adopt_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the optimizer's state and the return statistics that belong to weights from elsewhere.

        An optimizer whose state is not given starts anew.

        Raises:
            CheckpointError: they are of another optimizer or shape; nothing is changed then.
        """
        fresh = self.ppo.optimizer.init(self.ppo.parameters)
        values = {leaf.path: leaf.tensor for leaf in leaves(fresh, "optimizer.")}
        others = ("parameters.", "observation.", "hyper.")
        copied_leaves = [leaf for leaf in leaves(self.state) if leaf.rule is ExploitRule.COPY]
        mine = {leaf.path: leaf for leaf in copied_leaves if not leaf.path.startswith(others)}
        for part in {name.partition(".")[0] for name in mine}:
            given = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
            own = {name: leaf.tensor for name, leaf in mine.items() if name.startswith(f"{part}.")}
            names = given.keys() | own.keys()
            wrong = [name for name in names if name not in given or name not in own or given[name].shape != own[name].shape]
            if given and wrong:
                raise CheckpointError(f"the state is of another optimizer: {', '.join(sorted(wrong)[:5])} do not fit")
            values |= given
        for name, value in values.items():
            mine[name].tensor.copy_(value)

    def _begin_episodes(self, replaced: Bool[Tensor, "P"], everywhere: Bool[Tensor, "P"]) -> Bool[Tensor, "P E"]:
        """New episodes for replaced members: everywhere, or else where an observation is not finite."""
        collector = self.state.collector
        broken = ~collector.obs.isfinite().all(-1)
        rows = replaced[:, None] & (everywhere[:, None] | broken)
        if not rows.any() or not self.env.resets_rows:
            return torch.zeros_like(rows)
        obs = self.policy.flatten(self.env.reset_rows(rows.flatten().cpu().numpy()), len(self.seeds))
        collector.obs[rows] = obs[rows]
        for counter in (collector.episode_return, collector.episode_length):
            counter[rows.to(counter.device)] = 0
        return rows

    def evaluate(
        self,
        episodes: int,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        alter: Alter | None = None,
    ) -> Float[np.ndarray, "P episodes"]:
        """Returns of whole episodes in fresh environments, weights and statistics frozen, physics as they are now.

        Args:
            seed: of the environments and samples, the same for all members; by default it follows from ``settings.seed``.
            stop: asked before every step.
            alter: what the policy is shown instead of each observation.

        Raises:
            KeyboardInterrupt: ``stop`` said so.
        """
        members = len(self.seeds)
        common = stream_seed(self.settings.seed, "evaluation") if seed is None else seed
        reached = self.env.steps if isinstance(self.env, Drift) else self.timesteps
        env = make(
            self.settings.env, [common] * members, episodes, drift_step=reached, drift_seeds=self.drift_seeds,
            device=self.settings.device,
        )  # fmt: skip
        try:
            noise = MemberGenerators([common] * members, "evaluation")
            limit = self.settings.evaluation.max_steps
            arguments = (env, self.policy, self.frozen_normalizer(), members, deterministic, noise)
            return evaluate(*arguments, max_steps=limit, stop=stop, alter=alter)
        finally:
            env.close()

    def restart_episodes(self, document: Mapping[str, Any]) -> None:
        """Start a new episode in every environment, a drifting task brought to where the run in ``document`` stood."""
        if isinstance(self.env, Drift):
            # A run whose task did not drift says nothing about it: its steps are then the nearest there is.
            self.env.set_steps(np.array(document.get("drift_steps") or self.state.timesteps.tolist()))
        restart_(self.state.collector, self.env, self.policy)
        self.recent = None
        self.state.reward.running_return.zero_()

    def document(self) -> dict[str, Any]:
        """What a saved file says about this run besides its tensors."""
        return {
            "seeds": self.seeds,
            "iteration": self.iteration,
            "timesteps": self.timesteps,
            "drift_steps": self.env.steps.tolist() if isinstance(self.env, Drift) else None,
            "settings": self.settings.model_dump(mode="json"),
            "observation_space": describe_space(self.env.observation_space),
            "action_space": describe_space(self.env.action_space),
        }

    def save(self, path: Path, document: Mapping[str, Any]) -> None:
        """Write the whole training state, environments included where they can be saved, to one file, atomically."""
        environment = self.env.get_state()
        arrays, rest = _split_arrays(environment or {})
        tensors = flatten_state(self.state)
        tensors |= {ENVIRONMENT + name: torch.from_numpy(array) for name, array in arrays.items()}
        saved = None if environment is None else rest
        save_tensors(path, tensors, {**document, **self.document(), "kind": "checkpoint", "environment": saved})

    def restore(self, path: Path) -> dict[str, Any]:
        """Continue from a checkpoint of the same structure; returns its document.

        Where the environments could not be saved, every environment starts a new episode.

        Raises:
            CheckpointError: the file is unreadable or belongs to another structure.
        """
        tensors, document = load_tensors(path)
        if document.get("kind") != "checkpoint":
            raise CheckpointError(f"{path}: a {document.get('kind')} file cannot be continued; allowed is a checkpoint")
        if document["seeds"] != self.seeds:
            raise CheckpointError(f"{path}: holds the seeds {document['seeds']}, the run has {self.seeds}")
        arrays = {name: tensors.pop(name).numpy() for name in list(tensors) if name.startswith(ENVIRONMENT)}
        restore_state_(self.state, tensors)
        self.recent = None
        self.iteration = document["iteration"]
        if document["environment"] is None:
            self.restart_episodes(document)
            return document
        named = {name.removeprefix(ENVIRONMENT): array for name, array in arrays.items()}
        try:
            self.env.set_state(_join_arrays(named, document["environment"]))
        except ValueError as error:
            raise CheckpointError(f"{path}: holds the state of other environments: {error}") from error
        return document


def _checked_seeds(seeds: Sequence[Any]) -> list[int]:
    try:
        checked = [operator.index(seed) for seed in seeds]
    except TypeError:
        checked = []
    if not checked or min(checked) < 0 or len(set(checked)) < len(checked):
        raise ValueError(f"seeds = {list(seeds)}: must be whole numbers >= 0, at least one, no two alike")
    return checked


def mean_over_members(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Each metric as one number: the mean over the members that have it, NaN where none does."""
    return {name: float(value.double().nanmean()) if isinstance(value, Tensor) else value for name, value in metrics.items()}


def _on_host(metrics: Metrics) -> Metrics:
    """The metrics on the CPU, all of a device's in one transfer."""
    away = {name: value for name, value in metrics.items() if isinstance(value, Tensor) and value.device.type != "cpu"}
    if not away:
        return metrics
    together = torch.stack([value.double() for value in away.values()]).cpu()
    return {**metrics, **{name: row.to(away[name].dtype) for name, row in zip(away, together, strict=True)}}


def _split_arrays(tree: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of nested mappings under their paths (``a/b``), and the mappings without them."""
    arrays: dict[str, np.ndarray] = {}
    rest: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif isinstance(value, Mapping):
            inner, rest[name] = _split_arrays(value)
            arrays |= {f"{name}/{path}": array for path, array in inner.items()}
        else:
            rest[name] = value
    return arrays, rest


def _join_arrays(arrays: Mapping[str, np.ndarray], rest: Mapping[str, Any]) -> dict[str, Any]:
    """What `_split_arrays` took apart."""
    joined: dict[str, Any] = dict(rest)
    for name, value in rest.items():
        if isinstance(value, Mapping):
            prefix = f"{name}/"
            inner = {path.removeprefix(prefix): array for path, array in arrays.items() if path.startswith(prefix)}
            joined[name] = _join_arrays(inner, value)
    return joined | {path: array for path, array in arrays.items() if "/" not in path}
