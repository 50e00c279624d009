"""`DistributionalPPO`, the object a user of the Python interface holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from hardy.checkpoint import (
    PICKLED,
    CheckpointError,
    flatten_state,
    load_tensors,
    read_member,
    restore_state_,
    save_tensors,
)
from hardy.config import ConfigError, nearest, settings_from_dict
from hardy.console import LiveView
from hardy.envs import make, make_from
from hardy.nn.normalizer import RunningMoments
from hardy.policy import ActorCritic, describe_space, space_from
from hardy.population import MemberGenerators
from hardy.rollout import reset_memory_
from hardy.settings import PopulationSettings, RunSettings
from hardy.trainer import ENVIRONMENT, Trainer, mean_over_members

POLICIES = {"MlpPolicy": "none", "MlpLstmPolicy": "lstm", "MlpGruPolicy": "gru"}
DEFAULT_MINIBATCHES = 4
"""With fewer environments, one for each: a minibatch holds whole sequences."""
PYTHON_ENV = "python"
"""Stands for the id where the environment was given as an object."""
EPISODE_STATE = ("collector.", "reward.running_return")
"""Leaves that belong to running episodes, and so never to a saved model."""
EnvLike = str | VectorEnv[Any, Any, Any] | Sequence[Callable[[], gymnasium.Env[Any, Any]]]
Section = Mapping[str, Any]
Spaces = tuple[gymnasium.Space[Any], gymnasium.Space[Any]]
"""Of observations and of actions."""


class DistributionalPPO:
    """Recurrent PPO with a distributional critic, a plasticity-keeping optimizer and variance-scaled gradients.

    Args:
        policy: "MlpLstmPolicy", "MlpGruPolicy" or "MlpPolicy" (no memory).
        env: an id (``hardy envs`` lists the built-in tasks), a ``gymnasium.vector.VectorEnv``, or a list of functions that each
            make one environment.
        optimizer: "AdaptiveUPGD", "UPGD" or "UPGDW", or its settings as a mapping (``{"name": "UPGDW", "lr": 1e-3}``).
        vgs: whether gradients are scaled by their measured variance, or the scaler's settings as a mapping.
        seed: of weights, environments, actions and noise.
        num_envs: environments, where ``env`` is an id.
        ppo, critic, normalizer, risk, adversary, policy_kwargs: settings of those parts, as in a configuration file.
        drift: makes the task change while it is being learnt, as in a configuration file.
        device: "cpu" or "cuda".
        threads: processor threads; by default every core the process may use.

    Raises:
        ConfigError: a setting is unknown or impossible.
        ValueError: an unknown policy or environment, or spaces that are not supported.
        TypeError: ``env`` is none of these.
    """

    def __init__(
        self,
        policy: str,
        env: EnvLike,
        *,
        optimizer: str | Section = "AdaptiveUPGD",
        vgs: bool | Section = True,
        seed: int = 0,
        num_envs: int = 8,
        ppo: Section | None = None,
        critic: Section | None = None,
        normalizer: Section | None = None,
        risk: Section | None = None,
        adversary: Section | None = None,
        policy_kwargs: Section | None = None,
        drift: Section | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        if not isinstance(policy, str) or policy not in POLICIES:
            raise ValueError(f"policy = {policy!r}: allowed are {', '.join(POLICIES)}{nearest(str(policy), POLICIES)}")
        memory = POLICIES[policy]
        if isinstance(policy_kwargs, Mapping) and policy_kwargs.get("memory", memory) != memory:
            raise ConfigError(
                [
                    f"policy.memory = {policy_kwargs['memory']!r}: policy = '{policy}' has '{memory}'; leave memory out of "
                    f"policy_kwargs and choose the policy: {', '.join(POLICIES)}"
                ]
            )
        described = {"num_envs": _plain_int(num_envs), **_described(env), "drift": drift}
        count = described["num_envs"]
        minibatches = min(DEFAULT_MINIBATCHES, max(count, 1)) if isinstance(count, int) else DEFAULT_MINIBATCHES
        settings = settings_from_dict(
            RunSettings,
            {
                "seed": _plain_int(seed),
                "device": device,
                "threads": _plain_int(threads),
                "env": described,
                "policy": _section(policy_kwargs, memory=memory),
                "optimizer": dict(optimizer) if isinstance(optimizer, Mapping) else {"name": optimizer},
                "vgs": dict(vgs) if isinstance(vgs, Mapping) else {"enabled": vgs},
                "ppo": _section(ppo, n_minibatches=minibatches),
                "critic": _section(critic),
                "normalizer": _section(normalizer),
                "risk": _section(risk),
                "adversary": _section(adversary),
            },
        )
        self._hold(_trainer(settings, env))

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """The model around a trainer of one member that exists already."""
        model = cls.__new__(cls)
        model._hold(trainer)
        return model

    def _hold(self, trainer: Trainer) -> None:
        self.trainer: Trainer | None = trainer
        self.settings = trainer.settings
        self.policy = trainer.policy
        self._observation = trainer.state.observation
        self._spaces: Spaces = (
            trainer.env.observation_space,
            trainer.env.action_space,
        )
        self._predict_noise = MemberGenerators([trainer.settings.seed], "predict")

    def learn(
        self,
        total_timesteps: int,
        *,
        progress_bar: bool = False,
        callback: Callable[[DistributionalPPO, Mapping[str, float]], bool | None] | None = None,
    ) -> Self:
        """Train for ``total_timesteps`` more environment steps, rounded up to whole rollouts.

        Args:
            total_timesteps: also the length that learning-rate and clip schedules span.
            callback: called with the model and the metrics after every iteration; returning False ends the training.

        Raises:
            ValueError: the model was loaded without an environment, or ``total_timesteps`` is not a positive whole number.
        """
        trainer = self._require_trainer("learn")
        end = trainer.timesteps + _positive("total_timesteps", total_timesteps)
        with LiveView(end, start=trainer.timesteps) if progress_bar else nullcontext() as view:
            while trainer.timesteps < end:
                metrics = mean_over_members(trainer.iterate(end))
                if view is not None:
                    view.update(trainer.timesteps, metrics)
                if callback is not None and callback(self, metrics) is False:
                    break
        return self

    @torch.no_grad()
    def predict(
        self,
        observation: np.ndarray,
        state: np.ndarray | None = None,
        episode_start: np.ndarray | bool | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Actions for one observation or a batch, and the memory to give back with the next ones.

        Args:
            observation: of the observation space's shape, or ``[n, *shape]``.
            state: memory ``[n, S]`` that the last call returned; ``None`` is the start of an episode.
            episode_start: ``[n]``; True where ``observation`` begins a new episode, so that the memory is reset before it.
            deterministic: the most probable action instead of a sample.

        Returns:
            The actions, with a batch axis if the observations have one, and the memory ``[n, S]`` (``None`` without memory).

        Raises:
            ValueError: a shape does not fit.
        """
        space, action_space = self._spaces
        shape = tuple(space.shape or ())
        given = np.asarray(observation)
        single = given.shape == shape
        if not single and given.shape[1:] != shape:
            raise ValueError(f"observation has shape {given.shape}: allowed are {shape} and (n, {', '.join(map(str, shape))})")
        obs = self.policy.flatten(given, 1)
        count = obs.shape[1]
        recurrent = self.policy.initial_state(1, count)
        if state is not None:
            if np.shape(state) != tuple(recurrent.shape[1:]):
                raise ValueError(f"state has shape {np.shape(state)}: {count} observations need {tuple(recurrent.shape[1:])}")
            recurrent = torch.as_tensor(state).to(recurrent).unsqueeze(0)
        starts = np.asarray(False if episode_start is None else episode_start, dtype=bool)
        if starts.shape not in ((), (count,)):
            raise ValueError(f"episode_start has shape {starts.shape}: {count} observations need ({count},)")
        distribution, _, recurrent = self.policy.step(
            self._normalize(obs), recurrent, torch.tensor(np.broadcast_to(starts, (count,)), device=obs.device).unsqueeze(0)
        )
        if deterministic:
            chosen = distribution.mode()
        else:
            chosen = distribution.sample(self.policy.draw_noise(self._predict_noise, count))
        action = chosen[0].cpu().numpy()
        if isinstance(action_space, gymnasium.spaces.Box):
            action = np.clip(action, action_space.low, action_space.high)
        elif isinstance(action_space, gymnasium.spaces.Discrete):
            action = action + int(action_space.start)
        return action.squeeze(0) if single else action, recurrent[0].cpu().numpy() if self.policy.state_size else None

    def _normalize(self, obs: Tensor) -> Tensor:
        settings = self.settings.normalizer
        return self._observation.normalize(obs, settings.clip_observation, settings.epsilon) if settings.observation else obs

    @property
    def lstm_states(self) -> Tensor | None:
        """Memory of the training environments ``[P, E, S]``; ``None`` where the model has no environment or no memory."""
        if self.trainer is None or self.policy.state_size == 0:
            return None
        return self.trainer.state.collector.recurrent

    def reset_lstm_states_to_initial(self) -> None:
        """Put the memory of the training environments back to the start of an episode, for collecting and for training.

        Whenever weights are replaced from outside, the memory that the old weights wrote must go: ``h = f(x, h_old; new)``
        belongs to neither policy. `load_parameters` calls this itself. Without memory nothing happens.
        """
        if self.trainer is not None and self.lstm_states is not None:
            reset_memory_(self.trainer.state.collector)

    def save(self, path: str | Path) -> Path:
        """Write the model to continue training later: weights, optimizer, statistics, random generators; no recurrent state."""
        trainer = self._require_trainer("save")
        tensors = {name: leaf for name, leaf in flatten_state(trainer.state).items() if not name.startswith(EPISODE_STATE)}
        save_tensors(_with_suffix(path), tensors, {**trainer.document(), "kind": "model"})
        return _with_suffix(path)

    def export_policy(self, path: str | Path) -> Path:
        """Write what `predict` needs and nothing else: weights, observation statistics, shapes."""
        return _write_policy(path, self.settings, self.policy, self._observation, self._spaces, 0)

    @classmethod
    def load(cls, path: str | Path, env: EnvLike | None = None, *, device: str | None = None) -> Self:
        """Read what `save` or `export_policy` wrote, or a checkpoint of a run.

        A policy alone, or a model whose environment was an object and is not given here, predicts but does not learn.

        Args:
            env: instead of the environment that the model was trained in.
            device: "cpu" or "cuda"; by default where the model was trained, or the processor where CUDA is missing.

        Raises:
            CheckpointError: the file is unreadable or no model, or holds several members.
            ConfigError: the model's settings do not fit the number of environments in ``env``.
            ValueError: ``env`` has other spaces than the model was trained on, or the file is a policy, which cannot learn.
        """
        path = _with_suffix(path)
        tensors, document = load_tensors(path)
        missing = [name for name in ("settings", "observation_space", "action_space") if name not in document]
        if missing:
            raise CheckpointError(f"{path}: a {document['kind']} file without {', '.join(missing)}; allowed is a saved model")
        if len(document.get("seeds", [0])) != 1:
            raise CheckpointError(f"{path}: holds a population of {len(document['seeds'])}; allowed is a single agent")
        described = document["settings"]
        if device is not None:
            described["device"] = device
        elif not torch.cuda.is_available():
            described["device"] = "cpu"
        if env is not None:
            described["env"] |= _described(env)
        settings = settings_from_dict(RunSettings, described)
        model = cls.__new__(cls)
        model._spaces = space_from(document["observation_space"]), space_from(document["action_space"])
        if env is not None and document["kind"] == "policy":
            raise ValueError(f"env is given, but {path} holds a policy alone, which cannot learn: load what save() wrote")
        source = settings.env.id if env is None and settings.env.id != PYTHON_ENV else env
        if source is not None and document["kind"] != "policy":
            trainer = _trainer(settings, source)
            model._require_spaces(trainer)
            kept = {name: leaf for name, leaf in tensors.items() if not name.startswith((*EPISODE_STATE, ENVIRONMENT))}
            restore_state_(trainer.state, {**_episode_state(trainer), **kept})
            trainer.iteration = document["iteration"]
            trainer.restart_episodes(document)
            return cls.of(trainer)
        model.trainer = None
        model.settings = settings
        model._predict_noise = MemberGenerators([settings.seed], "predict")
        model.policy = ActorCritic(*model._spaces, settings.policy, settings.critic, [settings.seed]).to(settings.device)
        model._observation = RunningMoments.create(1, (model.policy.observation_size,), settings.device)
        model._copy_policy(tensors)
        return model

    def load_parameters(self, source: str | Path | Mapping[str, Tensor]) -> None:
        """Replace the weights, and all that belongs to them, by those of a saved policy, model or checkpoint of the same shape.

        Observation and return statistics and the optimizer's state come along where the source holds them. The optimizer starts
        anew where it does not, since moments and utilities of other weights mean nothing. Hyperparameters stay; the memory of
        the training environments is reset (see `reset_lstm_states_to_initial`).

        Args:
            source: a file (see `hardy.checkpoint.read_member`), or tensors by dotted path, as
                `hardy.pbt.PBTScheduler.exploit_and_explore` returns them.

        Warns:
            UserWarning: a file lacks parts that training would need, as a policy does.

        Raises:
            CheckpointError: the file is unreadable, or the tensors belong to another shape or optimizer.
        """
        if isinstance(source, Mapping):
            tensors = source
        else:
            path = Path(source)
            tensors = read_member(path if path.suffix in PICKLED else _with_suffix(path)).parameters
        self._policy_fitting(tensors)
        if self.trainer is not None:
            self.trainer.adopt_(tensors)
        self._copy_policy(tensors)
        self.reset_lstm_states_to_initial()

    @property
    def hyperparams(self) -> dict[str, float]:
        """Every tunable number by its dotted path, as training uses it now; schedules multiply it."""
        return {name: float(value[0]) for name, value in self._require_trainer("hyperparams").state.hyper.items()}

    def set_hyperparams(self, values: Mapping[str, float]) -> None:
        """Change tunable numbers from the next iteration on.

        Raises:
            ValueError: a name is unknown or structural, or a value out of range; nothing is changed then.
        """
        trainer = self._require_trainer("set_hyperparams")
        scheduled = {name for change in trainer.settings.schedule for name in change.values}
        for name, value in values.items():
            trainer.settings.require_tunable(name, name, value)
            if name in scheduled:
                raise ValueError(f"{name} = {value}: the schedule of this run sets it")
        for name, value in values.items():
            trainer.state.hyper[name].fill_(value)

    @torch.no_grad()
    def _copy_policy(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self._policy_fitting(tensors).items():
            value.copy_(tensors[name])

    def _policy_fitting(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The policy's own tensors by their names in a file, which must hold all weights, and all or no statistics."""
        targets: dict[str, Tensor] = {f"parameters.{name}": value for name, value in self.policy.named_parameters()}
        if any(name.startswith("observation.") for name in tensors):
            targets |= {f"observation.{name}": getattr(self._observation, name) for name in ("mean", "var", "count")}
        wrong = [name for name, value in targets.items() if name not in tensors or tensors[name].shape != value.shape]
        if wrong:
            raise CheckpointError(f"the file is of another policy: {', '.join(wrong[:5])} missing or of another shape")
        return targets

    def _require_trainer(self, method: str) -> Trainer:
        if self.trainer is None:
            raise ValueError(f"{method}() needs an environment: this model was loaded without one; give env to load()")
        return self.trainer

    def _require_spaces(self, trainer: Trainer) -> None:
        given = trainer.env.observation_space, trainer.env.action_space
        for kind, theirs, ours in zip(("observation", "action"), given, self._spaces, strict=True):
            if theirs != ours:
                raise ValueError(f"env has {kind} space {theirs}: the model was trained with {ours}")


def export_policy(trainer: Trainer, path: str | Path, member: int = 0) -> Path:
    """Write the policy of one member of a population, for `DistributionalPPO.load` to read."""
    spaces = trainer.env.observation_space, trainer.env.action_space
    return _write_policy(path, trainer.settings, trainer.policy, trainer.state.observation, spaces, member)


def _write_policy(
    path: str | Path, settings: RunSettings, policy: ActorCritic, observation: RunningMoments, spaces: Spaces, member: int
) -> Path:
    row = slice(member, member + 1)
    tensors = {f"parameters.{name}": value.data[row] for name, value in policy.named_parameters()}
    tensors |= {f"observation.{name}": getattr(observation, name)[row] for name in ("mean", "var", "count")}
    document = {
        "kind": "policy",
        "settings": settings.model_copy(update={"population": PopulationSettings()}).model_dump(mode="json"),
        "observation_space": describe_space(spaces[0]),
        "action_space": describe_space(spaces[1]),
    }
    save_tensors(_with_suffix(path), tensors, document)
    return _with_suffix(path)


def _episode_state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in flatten_state(trainer.state).items() if name.startswith(EPISODE_STATE)}


def _plain_int(value: Any) -> Any:
    """A whole number of any kind, such as NumPy's, as Python's own; the settings judge everything else."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _section(given: Any, **defaults: Any) -> Any:
    """A section with its defaults; what is no section stays as it is, for the settings to refuse."""
    if given is None:
        return defaults
    return {**defaults, **given} if isinstance(given, Mapping) else given


def _positive(name: str, value: Any) -> int:
    """A whole number from 1 on; 1e6 counts as one."""
    number = int(value) if isinstance(value, float) and value.is_integer() else _plain_int(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{name} = {value!r}: must be a whole number, at least 1")
    return number


def _described(env: EnvLike) -> dict[str, Any]:
    if isinstance(env, str):
        return {"id": env}
    if isinstance(env, VectorEnv):
        return {"id": PYTHON_ENV, "num_envs": env.num_envs}
    if isinstance(env, Sequence):
        return {"id": PYTHON_ENV, "num_envs": len(env)}
    raise TypeError(
        f"env = {env!r}: must be an id, a gymnasium.vector.VectorEnv, or a list of functions that make environments"
    )


def _trainer(settings: RunSettings, env: EnvLike) -> Trainer:
    seeds = [settings.seed]
    if isinstance(env, str):
        return Trainer(settings, env=make(settings.env, seeds, device=settings.device))
    return Trainer(settings, env=make_from(env, seeds, drift=settings.env.drift))


def _with_suffix(path: str | Path) -> Path:
    return Path(path) if Path(path).suffix == ".safetensors" else Path(f"{path}.safetensors")
