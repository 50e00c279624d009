"""`DistributionalPPO` as a user holds it: what it takes, what it gives back, what it saves, and what it survives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from safetensors import safe_open

from hardy import CheckpointError, ConfigError, DistributionalPPO, algorithm
from hardy.checkpoint import read_document, read_member, save_tensors
from hardy.population import leaves

PPO = {"n_steps": 8, "n_epochs": 2, "n_minibatches": 2}
SIZE = {"memory_size": 8, "encoder": [8]}
TASK = "CartPoleNoVel-v1"


def make_model(policy: str = "MlpLstmPolicy", env: Any = TASK, **kwargs: Any) -> DistributionalPPO:
    sections = {"ppo": {**PPO, **kwargs.pop("ppo", {})}, "policy_kwargs": {**SIZE, **kwargs.pop("policy_kwargs", {})}}
    return DistributionalPPO(policy, env, **{"num_envs": 4, "threads": 1, **sections, **kwargs})


def weights(model: DistributionalPPO) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.policy.named_parameters()}


def are_equal(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(value, two[name]) for name, value in one.items())


def learn(model: DistributionalPPO, steps: int) -> list[dict[str, float]]:
    """Train, and return the metrics of every iteration."""
    log: list[dict[str, float]] = []
    model.learn(steps, callback=lambda _, metrics: log.append(dict(metrics)))
    return log


class Walk(gymnasium.Env[NDArray[np.float32], Any]):
    """Random observations, episodes of 5 to 11 steps, and a diary of what came and went.

    Args:
        actions: the action space.
        broken: what is not a number in the seventh and the fourteenth step: "reward", "observation" or "infinite".
    """

    observation_space = Box(-1, 1, (3,), np.float32)

    def __init__(self, actions: gymnasium.Space[Any] | None = None, broken: str = "") -> None:
        self.action_space = Discrete(2) if actions is None else actions
        self.broken = broken
        self.total = 0
        self.received: list[Any] = []
        self.seen: list[tuple[NDArray[np.float32], bool]] = []
        """Every observation with whether it begins an episode; the last one of an episode is left out."""

    def observe(self) -> NDArray[np.float32]:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray[np.float32], Any]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(5, 12))
        obs = self.observe()
        self.seen.append((obs, True))
        return obs, {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, Any]:
        self.received.append(action)
        self.total += 1
        self.left -= 1
        obs, reward = self.observe(), float(self.np_random.uniform())
        if self.total <= 14 and self.total % 7 == 0:
            if self.broken == "observation":
                obs[1] = np.nan
            elif self.broken:
                reward = {"reward": np.nan, "infinite": np.inf}[self.broken]
        if self.left:
            self.seen.append((obs, False))
        return obs, reward, self.left == 0, False, {}


def walks(count: int, *args: Any) -> tuple[list[Walk], list[Callable[[], Walk]]]:
    """Environments, and the functions that hand them out."""
    made = [Walk(*args) for _ in range(count)]
    return made, [lambda env=env: env for env in made]  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------ construction


@pytest.mark.parametrize(
    "env",
    [
        TASK,
        "Acrobot-v1",
        [lambda: gymnasium.make("CartPole-v1")] * 4,
        lambda: SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 4, autoreset_mode=AutoresetMode.NEXT_STEP),
        lambda: SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 4, autoreset_mode=AutoresetMode.SAME_STEP),
    ],
    ids=["built-in", "gymnasium", "factories", "next-step", "same-step"],
)
def test_every_form_of_environment(env: Any) -> None:
    model = make_model(env=env() if callable(env) else env)
    before = weights(model)
    model.learn(64)
    assert model.trainer is not None and model.trainer.timesteps == 64
    assert not are_equal(before, weights(model))


def test_the_number_of_environments_is_that_of_the_object() -> None:
    model = make_model(env=[Walk] * 3, num_envs=4)
    assert model.settings.env.num_envs == 3
    assert model.lstm_states is not None and model.lstm_states.shape == (1, 3, 16)


@pytest.mark.parametrize("optimizer", ["UPGD", "UPGDW", "AdaptiveUPGD", {"name": "UPGDW", "lr": 1e-3, "gating": "local"}])
def test_optimizer_by_name_or_settings(optimizer: Any) -> None:
    model = make_model(optimizer=optimizer)
    given = {"name": optimizer} if isinstance(optimizer, str) else optimizer
    assert given.items() <= model.settings.optimizer.model_dump().items()
    log = learn(model, 64)
    assert log[-1]["upgd/noise_to_signal"] > 0


def test_vgs_by_switch_or_settings() -> None:
    off, settings = make_model(vgs=False), make_model(vgs={"alpha": 3.0, "warmup_steps": 0})
    assert not off.settings.vgs.enabled
    assert settings.settings.vgs.enabled and settings.settings.vgs.alpha == 3.0
    assert "vgs/scaling_factor" not in learn(off, 32)[-1]
    assert learn(settings, 96)[-1]["vgs/scaling_factor"] < 1


def test_the_seed_decides_everything() -> None:
    one, two, other = (make_model(seed=seed).learn(64) for seed in (4, 4, 5))
    assert are_equal(weights(one), weights(two))
    assert not are_equal(weights(one), weights(other))


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"policy": "MlpLstmPolcy"}, ValueError, ["policy", "MlpLstmPolcy", "MlpGruPolicy", "did you mean 'MlpLstmPolicy'"]),
        ({"env": "CartPoleNoVel-v2"}, ValueError, ["CartPoleNoVel-v2", "CartPoleNoVel-v1"]),
        ({"env": []}, ConfigError, ["env.num_envs = 0", "> 0"]),
        ({"env": [Walk]}, ConfigError, ["ppo.n_minibatches = 2", "env.num_envs = 1"]),
        (
            {"optimizer": "adaptiveUPGD"},
            ConfigError,
            ["optimizer.name", "adaptiveUPGD", "UPGDW", "did you mean 'AdaptiveUPGD'"],
        ),
        ({"optimizer": {"lr": -1.0}}, ConfigError, ["optimizer.lr = -1.0", "> 0"]),
        ({"optimizer": {"overrides": {"acter": {}}}}, ValueError, ["acter", "did you mean 'actor'"]),
        ({"vgs": {"alhpa": 1.0}}, ConfigError, ["vgs.alhpa", "did you mean 'alpha'"]),
        ({"ppo": {"n_steps": True}}, ConfigError, ["ppo.n_steps = true", "whole number >= 1"]),
        ({"ppo": {"gamma": 1.5}}, ConfigError, ["ppo.gamma = 1.5", "<= 1"]),
        ({"critic": {"quantiles": 0}}, ConfigError, ["critic.quantiles = 0", ">= 1"]),
        ({"policy_kwargs": {"memory": "rnn"}}, ConfigError, ["policy.memory", "rnn", "lstm"]),
        ({"vgs": {"estimator": "microbatch", "microbatches": 3}}, ConfigError, ["vgs.microbatches = 3", "at most 2"]),
        ({"drift": {"kind": "physics", "every": 10, "ranges": {"gravty": [1, 2]}}}, ValueError, ["gravty", "gravity"]),
        ({"device": "gpu"}, ConfigError, ["device", "gpu", "cuda"]),
        ({"threads": 100_000}, ConfigError, ["threads = 100000", "<= 1024"]),
        ({"seed": -1}, ConfigError, ["seed = -1", ">= 0"]),
        ({"policy_kwargs": {"memory": "gru"}}, ConfigError, ["policy.memory = 'gru'", "'MlpLstmPolicy' has 'lstm'"]),
    ],
)
def test_a_mistake_is_explained(kwargs: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        make_model(**kwargs)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"policy": None}, ValueError, ["policy = None: allowed are MlpPolicy, MlpLstmPolicy, MlpGruPolicy"]),
        ({"policy": ["MlpPolicy"]}, ValueError, ["policy = ['MlpPolicy']: allowed are"]),
        ({"num_envs": "8"}, ConfigError, ['env.num_envs = "8": must be a whole number > 0']),
        ({"num_envs": -1}, ConfigError, ["env.num_envs = -1: must be a whole number > 0"]),
        ({"vgs": None}, ConfigError, ["vgs.enabled = null: must be true or false"]),
        ({"vgs": "yes"}, ConfigError, ['vgs.enabled = "yes": must be true or false']),
        ({"optimizer": Walk}, ConfigError, ["optimizer.name = ", "Walk", "AdaptiveUPGD"]),
        ({"optimizer": None}, ConfigError, ["optimizer.name = null", "AdaptiveUPGD"]),
        ({"ppo": "x"}, ConfigError, ['ppo = "x": must be a section with the keys']),
        ({"critic": 0}, ConfigError, ["critic = 0: must be a section with the keys"]),
        ({"policy_kwargs": [3]}, ConfigError, ["policy = [3]: must be a section with the keys"]),
        ({"seed": 1.5}, ConfigError, ["seed = 1.5: must be a whole number >= 0"]),
        ({"threads": "2"}, ConfigError, ['threads = "2": must be a whole number >= 1']),
    ],
)
def test_an_argument_of_another_type_is_explained(kwargs: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    init = DistributionalPPO.__init__.__wrapped__  # type: ignore[attr-defined]  # without the checks that the tests add
    with pytest.raises(error) as raised:
        init(object.__new__(DistributionalPPO), **{"policy": "MlpPolicy", "env": TASK, **kwargs})
    for word in words:
        assert word in str(raised.value)


def test_a_number_of_numpy_is_a_number() -> None:
    init = DistributionalPPO.__init__.__wrapped__  # type: ignore[attr-defined]
    model = object.__new__(DistributionalPPO)
    init(model, "MlpPolicy", TASK, seed=np.int64(3), num_envs=np.int32(4), threads=np.int64(1))
    assert (model.settings.seed, model.settings.env.num_envs, model.settings.threads) == (3, 4, 1)


@pytest.mark.parametrize("env", [3, Walk()], ids=["number", "single"])
def test_an_environment_of_another_kind_is_explained(env: Any) -> None:
    described = algorithm._described.__wrapped__  # as users have it: without the checks that the tests add
    with pytest.raises(TypeError, match=r"env = .*: must be an id, a gymnasium.vector.VectorEnv, or a list of functions"):
        described(env)


# ---------------------------------------------------------------------------------------------------------------- learning


def test_learn_goes_on_where_it_stopped_and_rounds_up_to_rollouts() -> None:
    model = make_model()
    assert model.learn(1) is model
    assert model.trainer is not None and model.trainer.timesteps == 32
    model.learn(33)
    assert model.trainer.timesteps == 96


def test_the_callback_sees_every_iteration_and_may_stop_it() -> None:
    seen: list[float] = []

    def callback(model: DistributionalPPO, metrics: Mapping[str, float]) -> bool:
        assert model.trainer is not None and model.trainer.timesteps == metrics["time/total_timesteps"]
        seen.append(metrics["time/total_timesteps"])
        return len(seen) < 2

    make_model().learn(1000, callback=callback)
    assert seen == [32, 64]


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    make_model().learn(64, progress_bar=progress)
    assert ("64 / 64 steps (100%)" in capsys.readouterr().out) == progress


def test_learning_nothing_is_refused() -> None:
    model = make_model()
    learn_unchecked = DistributionalPPO.learn.__wrapped__  # type: ignore[attr-defined]  # without the tests' own checks
    for steps in (0, -1, "10", float("nan"), float("inf"), 1.5, None, True):
        with pytest.raises(ValueError, match=f"total_timesteps = {steps!r}: must be a whole number, at least 1"):
            learn_unchecked(model, steps)
    assert learn_unchecked(model, 3.2e1).trainer.timesteps == 32


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_envs": 1, "ppo": {"n_minibatches": 1}},
        {"ppo": {"n_steps": 1}},
        {"num_envs": 1, "ppo": {"n_steps": 1, "n_minibatches": 1}},
        {"num_envs": 3, "ppo": {"n_minibatches": 2}},
        {"policy": "MlpPolicy"},
        {"policy": "MlpPolicy", "policy_kwargs": {"shared_memory": False, "encoder": []}},
        {"policy": "MlpGruPolicy", "policy_kwargs": {"memory_layers": 2, "head": [5]}},
        {"policy_kwargs": {"shared_memory": False}},
        {"policy_kwargs": {"layer_norm": True, "encoder": []}},
        {"critic": {"quantiles": 1}},
        {"critic": {"huber_threshold": 0.0}},
        {"optimizer": {"gating": "local"}},
        {"optimizer": {"gating": "none"}},
        {"optimizer": {"protecting": False, "overrides": {"actor": {"noise": False}}}},
        {"vgs": {"estimator": "microbatch"}},
        {"vgs": {"scope": "tensor", "warmup_steps": 0}},
        {"ppo": {"target_kl": 1e-12}},
        {"ppo": {"gamma": 0.0, "gae_lambda": 0.0, "lr_schedule": "linear", "clip_schedule": "cosine"}},
        {"normalizer": {"observation": False, "reward": False}},
        {"optimizer": {"lr": 1e6}},
        {"env": "PendulumNoVel-v1", "vgs": {"estimator": "microbatch"}},
    ],
    ids=str,
)
def test_every_combination_trains(kwargs: dict[str, Any]) -> None:
    model = make_model(**kwargs)
    before = weights(model)
    assert model.trainer is not None
    log = learn(model, 2 * model.trainer.steps_per_iteration)
    after = weights(model)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert not are_equal(before, after)
    assert sum(metrics["train/skipped_updates"] for metrics in log) == 0


def test_a_tiny_target_stops_the_update_after_the_first_minibatches() -> None:
    free, strict = make_model(optimizer={"lr": 0.1}), make_model(optimizer={"lr": 0.1}, ppo={"target_kl": 1e-12})
    assert learn(strict, 32)[0]["train/approx_kl"] < learn(free, 32)[0]["train/approx_kl"]


def test_a_drifting_task_is_learnt_on() -> None:
    model = make_model(drift={"kind": "permute", "every": 40, "seed": 3})
    assert [metrics["env/drift_changes"] for metrics in learn(model, 96)] == [0, 1, 2]


@pytest.mark.parametrize("space", [Discrete(2), Box(-1, 1, (2,), np.float32)], ids=["discrete", "continuous"])
@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize("broken", ["reward", "observation"])
def test_what_is_not_a_number_is_skipped_and_counted(broken: str, policy: str, space: gymnasium.Space[Any]) -> None:
    model = make_model(policy, walks(4, space, broken)[1])
    log = learn(model, 4 * 24)
    frozen = weights(model)
    assert sum(metrics["train/skipped_updates"] for metrics in log) > 0
    assert all(bool(value.isfinite().all()) for value in frozen.values())
    assert all(bool(leaf.tensor.isfinite().all()) for leaf in leaves(model.trainer.state) if "recent" not in leaf.path)  # type: ignore[union-attr]
    # Once the numbers are sound again, so is the training.
    after = learn(model, 64)
    assert [metrics["train/skipped_updates"] for metrics in after] == [0, 0]
    assert all(np.isfinite(metrics["train/policy_loss"]) for metrics in after)
    assert not are_equal(frozen, weights(model))


def test_a_memory_that_is_not_a_number_does_not_outlive_its_rollout() -> None:
    class Endless(Walk):
        def reset(self, **kwargs: Any) -> tuple[NDArray[np.float32], Any]:
            obs, info = super().reset(**kwargs)
            self.left = 10**6
            return obs, info

    log = learn(make_model(env=[lambda: Endless(None, "observation")] * 4), 5 * 32)
    skipped = [metrics["train/skipped_updates"] for metrics in log]
    assert skipped[0] > 0 and skipped[1] > 0
    assert skipped[2:] == [0, 0, 0]  # though no episode has ended, which would have reset the memory


def test_an_infinite_reward_is_clipped() -> None:
    model = make_model(env=walks(4, None, "infinite")[1])
    log = learn(model, 4 * 24)
    assert sum(metrics["train/skipped_updates"] for metrics in log) == 0
    assert all(bool(value.isfinite().all()) for value in weights(model).values())


def test_gradients_whose_squares_overflow_are_skipped() -> None:
    model = make_model(ppo={"ent_coef": 1e30, "n_epochs": 4}, optimizer={"lr": 0.1})
    log = learn(model, 96)
    assert sum(metrics["train/skipped_updates"] for metrics in log) > 0
    assert all(bool(value.isfinite().all()) for value in weights(model).values())


# -------------------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy", "MlpGruPolicy"])
@pytest.mark.parametrize("space", [Discrete(3), Box(-2, 2, (2,), np.float32)], ids=["discrete", "continuous"])
def test_shapes_of_a_prediction(policy: str, space: gymnasium.Space[Any]) -> None:
    model = make_model(policy, walks(4, space)[1], policy_kwargs={"shared_memory": False})
    size = {"MlpPolicy": None, "MlpLstmPolicy": 32, "MlpGruPolicy": 16}[policy]
    for shape in ((), (1,), (5,)):
        state = None
        for _ in range(2):
            action, state = model.predict(np.zeros((*shape, 3), dtype=np.float32), state)
            assert action.shape == (*shape, *(space.shape or ()))
            assert (None if state is None else state.shape) == (None if size is None else ((shape or (1,))[0], size))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("space", [Discrete(3, start=5), Discrete(2, start=-1), Box(-0.1, 0.2, (2,), np.float32)])
def test_actions_are_in_the_space(space: Any, deterministic: bool) -> None:
    environments, factories = walks(4, space)
    model = make_model(env=factories, optimizer={"lr": 0.01}).learn(64)
    received = [action for env in environments for action in env.received]
    assert all(space.contains(action) for action in received)
    actions, _ = model.predict(np.random.default_rng(0).uniform(-1, 1, (50, 3)), deterministic=deterministic)
    assert actions.dtype == space.dtype
    assert all(space.contains(action) for action in actions)
    if not deterministic and isinstance(space, Discrete):
        assert set(actions.tolist()) == set(range(int(space.start), int(space.start + space.n)))


def test_the_most_probable_action_is_no_draw() -> None:
    model = make_model(env=[lambda: Walk(Box(-2, 2, (2,), np.float32))] * 4)
    obs = np.ones((6, 3), dtype=np.float32)
    one, two = (model.predict(obs, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    drawn, again = (model.predict(obs)[0] for _ in range(2))
    assert (drawn != again).all() and (drawn[0] != drawn[1]).all()


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "MlpGruPolicy"])
@pytest.mark.parametrize("shared", [True, False])
def test_passing_the_state_is_what_training_does(policy: str, shared: bool, tmp_path: Path) -> None:
    environments, factories = walks(2)
    model = make_model(policy, factories, policy_kwargs={"shared_memory": shared}).learn(64)
    before = DistributionalPPO.load(model.export_policy(tmp_path / "before"))
    assert model.lstm_states is not None
    state: np.ndarray | None = model.lstm_states[0].numpy().copy()
    first = [len(env.seen) - 1 for env in environments]
    model.learn(1)  # 8 steps with the weights and statistics of `before`, in which episodes end
    starts = 0
    for t in range(8):
        obs, is_first = zip(*[env.seen[begin + t] for env, begin in zip(environments, first, strict=True)], strict=True)
        _, state = before.predict(np.stack(obs), state, np.array(is_first))
        starts += sum(is_first)
    assert starts > 0
    np.testing.assert_allclose(state, model.lstm_states[0].numpy(), atol=1e-6)


def test_an_episode_start_forgets_its_own_row_only() -> None:
    model = make_model(env=walks(4)[1])
    obs = np.random.default_rng(1).uniform(-1, 1, (2, 3, 3)).astype(np.float32)
    _, state = model.predict(obs[0])
    _, fresh = model.predict(obs[1])
    _, going_on = model.predict(obs[1], state)
    assert fresh is not None and going_on is not None and np.abs(fresh - going_on).max(1).min() > 1e-4
    _, mixed = model.predict(obs[1], state, np.array([False, True, False]))
    np.testing.assert_array_equal(mixed, np.where([[False], [True], [False]], fresh, going_on))
    np.testing.assert_array_equal(model.predict(obs[1], state, True)[1], fresh)


def test_predicting_leaves_training_alone() -> None:
    one, two = make_model(), make_model()
    for model, asks in ((one, False), (two, True)):
        model.learn(32)
        if asks:
            model.predict(np.zeros((3, 2)), episode_start=True)
        model.learn(32)
    assert are_equal(weights(one), weights(two))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((np.zeros(3),), "observation has shape (3,): allowed are (2,) and (n, 2)"),
        ((np.zeros((2, 2, 2)),), "observation has shape (2, 2, 2)"),
        ((np.zeros((3, 2)), np.zeros((2, 16))), "state has shape (2, 16): 3 observations need (3, 16)"),
        ((np.zeros((3, 2)), None, np.zeros(2, dtype=bool)), "episode_start has shape (2,): 3 observations need (3,)"),
    ],
)
def test_a_shape_that_does_not_fit_is_explained(args: Any, words: str) -> None:
    with pytest.raises(ValueError) as raised:
        make_model().predict(*args)
    assert words in str(raised.value)


# ---------------------------------------------------------------------------------------------------------- save and load


def test_a_saved_model_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    class Countdown(Walk):
        """One episode lasts one rollout and holds no chance, so that nothing is under way when the model is saved."""

        def reset(self, **kwargs: Any) -> tuple[NDArray[np.float32], Any]:
            _, info = super().reset(**kwargs)
            self.left = 8
            return np.ones(3, dtype=np.float32), info

        def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, Any]:
            self.left -= 1
            return np.full(3, self.left / 8, dtype=np.float32), float(action), self.left == 0, False, {}

    model = make_model(env=[Countdown] * 4).learn(64)
    loaded = DistributionalPPO.load(model.save(tmp_path / "model"), env=[Countdown] * 4)
    assert loaded.trainer is not None and loaded.trainer.timesteps == 64
    model.learn(64)
    loaded.learn(64)
    for one, two in zip(leaves(model.trainer.state), leaves(loaded.trainer.state), strict=True):  # type: ignore[union-attr]
        if not one.path.startswith("collector."):
            assert torch.equal(one.tensor, two.tensor), one.path


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_the_same_path_saves_and_loads(tmp_path: Path, suffix: str) -> None:
    model, path = make_model().learn(32), str(tmp_path / f"agent.v1{suffix}")
    written = model.save(path)
    assert written == tmp_path / "agent.v1.safetensors"
    loaded = DistributionalPPO.load(path)
    assert loaded.settings == model.settings
    assert are_equal(weights(loaded), weights(model))
    other = make_model(seed=9)
    other.load_parameters(path)
    assert are_equal(weights(other), weights(model))


def test_a_saved_model_holds_no_recurrent_state(tmp_path: Path) -> None:
    model = make_model().learn(32)
    path = model.save(tmp_path / "model")
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
    assert {name.split(".")[0] for name in names} == {
        "parameters", "optimizer", "hyper", "observation", "reward", "risk", "timesteps", "generators",
    }  # fmt: skip
    assert not [name for name in names if "recurrent" in name or "running_return" in name]
    loaded = DistributionalPPO.load(path)
    assert loaded.lstm_states is not None and not loaded.lstm_states.any()


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy", "MlpGruPolicy"])
@pytest.mark.parametrize("space", [Discrete(3, start=5), Box(-2, 2, (2,), np.float32)], ids=["discrete", "continuous"])
def test_an_exported_policy_predicts_the_same(tmp_path: Path, policy: str, space: Any) -> None:
    model = make_model(policy, walks(4, space)[1], optimizer={"lr": 0.01}).learn(64)
    path = model.export_policy(tmp_path / "policy")
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
    assert {name.split(".")[0] for name in names} == {"parameters", "observation"}
    loaded = DistributionalPPO.load(path)
    assert loaded.trainer is None and loaded.lstm_states is None
    one_state = two_state = None
    for obs in np.random.default_rng(2).uniform(-1, 1, (4, 5, 3)):
        one, one_state = model.predict(obs, one_state, deterministic=True)
        two, two_state = loaded.predict(obs, two_state, deterministic=True)
        np.testing.assert_array_equal(one, two)
    if policy != "MlpPolicy":
        np.testing.assert_array_equal(one_state, two_state)
    assert space.contains(two[0])


def test_a_policy_does_not_learn_and_says_so(tmp_path: Path) -> None:
    path = make_model(env=[Walk] * 4).export_policy(tmp_path / "policy")
    loaded = DistributionalPPO.load(path)
    with pytest.raises(ValueError, match=r"learn\(\) needs an environment"):
        loaded.learn(32)
    with pytest.raises(ValueError, match=r"save\(\) needs an environment"):
        loaded.save(tmp_path / "other")
    with pytest.raises(ValueError, match="holds a policy alone"):
        DistributionalPPO.load(path, env=[Walk] * 4)


def test_a_model_of_environment_objects_learns_once_it_has_some(tmp_path: Path) -> None:
    path = make_model(env=[Walk] * 4).learn(32).save(tmp_path / "model")
    alone = DistributionalPPO.load(path)
    assert alone.trainer is None
    assert alone.predict(np.zeros(3))[0] in (0, 1)
    with pytest.raises(ValueError, match="loaded without one"):
        alone.learn(32)
    assert DistributionalPPO.load(path, env=[Walk] * 4).learn(32).trainer.timesteps == 64  # type: ignore[union-attr]


def test_a_loaded_model_takes_the_environment_it_is_given(tmp_path: Path) -> None:
    path = make_model(env="CartPole-v1").learn(32).save(tmp_path / "model")
    fewer = DistributionalPPO.load(path, env=[lambda: gymnasium.make("CartPole-v1")] * 2)
    assert fewer.settings.env.num_envs == 2
    assert fewer.learn(16).trainer.timesteps == 48  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"n_minibatches = 2: at most env.num_envs = 1"):
        DistributionalPPO.load(path, env=[lambda: gymnasium.make("CartPole-v1")])
    with pytest.raises(ValueError, match="env has observation space"):
        DistributionalPPO.load(path, env="CartPoleNoVel-v1")
    with pytest.raises(ValueError, match="env has action space"):
        twin = make_model(env=[lambda: Walk(Discrete(3))] * 4).save(tmp_path / "three")
        DistributionalPPO.load(twin, env=[lambda: Walk(Discrete(2))] * 4)
    assert DistributionalPPO.load(path, env="gymnasium:CartPole-v1").settings.env.id == "gymnasium:CartPole-v1"


def test_a_loaded_model_meets_the_task_as_it_had_become(tmp_path: Path) -> None:
    model = make_model(drift={"kind": "permute", "every": 40, "seed": 3}).learn(96)
    loaded = DistributionalPPO.load(model.save(tmp_path / "model"))
    for each in (model, loaded):
        assert each.trainer is not None and each.trainer.env.steps.tolist() == [96]  # type: ignore[attr-defined]


def test_a_model_trained_on_another_device_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model.trainer.settings = model.settings = model.settings.model_copy(update={"device": "cuda"})  # type: ignore[union-attr]
    paths = [model.save(tmp_path / "model"), model.export_policy(tmp_path / "policy")]
    for path in paths:
        assert read_document(path)["settings"]["device"] == "cuda"
        assert DistributionalPPO.load(path, device="cpu").settings.device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for path in paths:
        loaded = DistributionalPPO.load(path)
        assert (loaded.settings.device, loaded.policy.device.type) == ("cpu", "cpu")
        with pytest.raises(ConfigError, match="device = 'cuda': this machine has no CUDA device"):
            DistributionalPPO.load(path, device="cuda")


def test_a_file_of_hardy_that_is_no_model_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "note.safetensors", {"x": torch.zeros(1)}, {"kind": "note"})
    with pytest.raises(CheckpointError, match=r"note\.safetensors: a note file without settings, .*; allowed is a saved model"):
        DistributionalPPO.load(tmp_path / "note")


def test_what_cannot_be_loaded_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: no such file"):
        DistributionalPPO.load(tmp_path / "none")
    model = make_model()
    path = model.save(tmp_path / "model")
    assert read_document(path)["kind"] == "model"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        DistributionalPPO.load(path)
    larger = make_model(policy_kwargs={"memory_size": 9})
    before = weights(larger)
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"another policy: parameters\.core"):
        larger.load_parameters(path)
    assert are_equal(before, weights(larger))


# ------------------------------------------------------------------------------------- weights from elsewhere, hyperparameters


def state_of(model: DistributionalPPO) -> dict[str, torch.Tensor]:
    assert model.trainer is not None
    return {leaf.path: leaf.tensor.clone() for leaf in leaves(model.trainer.state)}


ADOPTED = ("parameters.", "optimizer.", "observation.", "reward.moments.")


@pytest.mark.parametrize("as_tensors", [False, True])
def test_loaded_parameters_bring_the_optimizer_and_the_statistics_that_belong_to_them(tmp_path: Path, as_tensors: bool) -> None:
    source, model = make_model(seed=1).learn(64), make_model(seed=2).learn(96)
    path = source.save(tmp_path / "source")
    before = state_of(model)
    model.load_parameters(read_member(path).parameters if as_tensors else path)
    after, theirs = state_of(model), state_of(source)
    for name, value in after.items():
        if name.startswith(ADOPTED):
            assert torch.equal(value, theirs[name]), name
        elif not name.startswith(("collector.recurrent", "collector.is_first")):
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert any(not torch.equal(before[name], after[name]) for name in after if name.startswith("optimizer."))


def test_with_weights_alone_the_optimizer_starts_anew(tmp_path: Path) -> None:
    path = make_model(seed=1).learn(64).export_policy(tmp_path / "policy")
    model, fresh = make_model(seed=2).learn(96), make_model(seed=2)
    kept = state_of(model)["reward.moments.var"]
    with pytest.warns(UserWarning, match="v1_policy_only lacks optimizer"):
        model.load_parameters(path)
    after, untouched = state_of(model), state_of(fresh)
    for name in after:
        if name.startswith("optimizer."):
            assert torch.equal(after[name], untouched[name]), name
    assert torch.equal(after["reward.moments.var"], kept)


def test_the_state_of_another_optimizer_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = make_model(optimizer="UPGDW").learn(32).save(tmp_path / "other")
    model = make_model().learn(32)
    before = state_of(model)
    with pytest.raises(CheckpointError, match=r"the state is of another optimizer: optimizer\."):
        model.load_parameters(path)
    for name, value in state_of(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_hyperparameters_are_seen_and_set() -> None:
    model = make_model()
    assert model.hyperparams["optimizer.lr"] == pytest.approx(4e-3)
    model.set_hyperparams({"optimizer.lr": 0.01, "ppo.gamma": 0.9})
    assert learn(model, 32)[0]["train/learning_rate"] == pytest.approx(0.01)
    assert model.hyperparams["ppo.gamma"] == pytest.approx(0.9)
    for values, message in (
        ({"ppo.gamma": 0.8, "optimizer.lrr": 0.1}, r"'optimizer.lrr' is no tunable number \(did you mean 'optimizer.lr'"),
        ({"ppo.gamma": 1.5}, r"ppo.gamma = 1.5: .*less than or equal to 1"),
        ({"ppo.gamma": float("nan")}, "ppo.gamma = nan"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_hyperparams(values)
        assert model.hyperparams["ppo.gamma"] == pytest.approx(0.9)
