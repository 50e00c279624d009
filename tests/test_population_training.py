"""A population is so many single agents: leaf by leaf, whatever is switched on, through exploits, files and failures."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_runs import EVERYTHING, Primes, assert_same, member, rollout_shapes, snapshot, tiny, trainer

from hardy import DistributionalPPO
from hardy.checkpoint import CheckpointError
from hardy.envs import make_from
from hardy.population import ExploitRule, MemberGenerators, exploit_, leaves
from hardy.trainer import Trainer

LONG = 1000
SEEDS = (11, 5, 8, 2, 13, 1, 7)
FACTORS = {"optimizer.lr": 1.4, "ppo.gamma": 0.97, "ppo.clip_range": 0.8, "optimizer.sigma": 1.6, "vgs.alpha": 0.7,
           "ppo.ent_coef": 1.5, "optimizer.max_grad_norm": 0.9, "ppo.gae_lambda": 0.98, "vgs.beta": 0.95}  # fmt: skip


def train(settings, seeds, positions, iterations, dtype):
    """Members of ``positions`` in the population, each with hyperparameters that follow from its position."""
    run = trainer(settings, seeds, dtype)
    for name, factor in FACTORS.items():
        for row, position in enumerate(positions):
            run.state.hyper[name][row] *= factor**position
    metrics = [run.iterate(LONG) for _ in range(iterations)]
    return snapshot(run.state), metrics


@pytest.mark.parametrize(
    ("size", "iterations", "estimator", "dtype", "tolerance"),
    [
        (3, 5, "ema", torch.float64, 1e-10),
        (3, 3, "microbatch", torch.float64, 1e-10),
        (7, 2, "ema", torch.float64, 1e-10),
        (3, 1, "ema", torch.float32, 1e-5),
    ],
)
def test_a_population_equals_its_members_alone_leaf_by_leaf(size, iterations, estimator, dtype, tolerance):
    envs = 5 if estimator == "ema" else 8  # the microbatches must be equal
    settings = tiny(EVERYTHING, env={"num_envs": envs}, vgs={"estimator": estimator}, ppo={"n_epochs": 3})
    seeds, positions = SEEDS[:size], range(size)
    together, metrics = train(settings, seeds, positions, iterations, dtype)
    updates = together["optimizer.upgd.step"][:, 0]
    if iterations > 1:
        assert len(updates.unique()) > 1  # members stopped at different updates
    for p in positions:
        alone, own = train(settings, seeds[p : p + 1], [p], iterations, dtype)
        assert_same(member(together, p), alone, tolerance)
        for mine, theirs in zip(metrics, own, strict=True):
            for name, value in theirs.items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(
                        mine[name][p : p + 1], value, atol=100 * tolerance, rtol=100 * tolerance, equal_nan=True, msg=name
                    )


@pytest.mark.parametrize("memory", ["none", "gru"])
@pytest.mark.parametrize("optimizer", ["UPGD", "UPGDW"])
def test_so_does_one_with_continuous_actions_and_separate_memories(memory, optimizer):
    settings = tiny(
        env={"id": "PendulumNoVel-v1"}, policy={"memory": memory, "shared_memory": False},
        optimizer={"name": optimizer, "lr": 0.01, "gating": "local"}, vgs={"scope": "tensor"},
    )  # fmt: skip
    together, _ = train(settings, SEEDS[:3], range(3), 2, torch.float64)
    for p in range(3):
        alone, _ = train(settings, SEEDS[p : p + 1], [p], 2, torch.float64)
        assert_same(member(together, p), alone, 1e-10)


def test_equal_seeds_give_equal_members_and_other_seeds_others():
    state, _ = train(tiny(EVERYTHING), [4, 9], [0, 0], 2, torch.float64)
    moved, _ = train(tiny(EVERYTHING), [9, 4], [0, 0], 2, torch.float64)
    assert_same(member(state, 0), member(moved, 1), 1e-10)
    for part in ("parameters.core.memory", "collector.obs", "generators", "observation.mean"):
        for path, value in state.items():
            assert not path.startswith(part) or not torch.equal(value[0], value[1]), path


# ------------------------------------------------------------------------------------------------------------------ axes


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(("memory", "shared"), [("lstm", True), ("gru", False), ("none", True)])
def test_every_axis_has_its_place(continuous, memory, shared):
    """P 3, T 11, E 5, O 13, A 17, Q 23, encoder 19, memory 7: no two equal, so no broadcast passes by accident."""
    settings = tiny(
        env={"num_envs": 5}, critic={"quantiles": 23},
        policy={"memory": memory, "memory_size": 7, "encoder": [19], "head": [29], "shared_memory": shared, "layer_norm": True},
    )  # fmt: skip
    run = trainer(settings, range(3), env=Primes(15, continuous))
    held, update = [], run.ppo.update
    run.ppo.update = lambda rollout, *rest: (held.append(rollout), update(rollout, *rest))[1]
    for _ in range(2):
        metrics = run.iterate(LONG)
    action = (17,) if continuous else ()
    state = {"lstm": 14, "gru": 14, "none": 0}[memory]
    assert {name: tuple(value.shape) for name, value in vars(held[1]).items()} == rollout_shapes(
        3, 11, 5, 13, action, state, 23
    )
    for leaf in leaves(run.state):
        assert leaf.tensor.shape[0] == 3, leaf.path
        assert leaf.tensor.isfinite().all() or leaf.path.startswith("collector.recent"), leaf.path
    for name, value in metrics.items():
        assert not isinstance(value, torch.Tensor) or value.shape == (3,), name
    shapes = {name: tuple(value.shape) for name, value in run.state.parameters.items()}
    assert shapes["critic.output.weight"] == (3, 23, 29)
    assert shapes["actor.output.weight"] == (3, 17, 29)
    trunk = "core" if shared else "actor.trunk"
    assert shapes[f"{trunk}.encoder.linears.0.weight"] == (3, 19, 13)
    if memory != "none":
        gates = 4 if memory == "lstm" else 3
        assert shapes[f"{trunk}.memory.weight_ih_l0"] == (3, gates * 7, 19)
        assert shapes[f"{trunk}.memory.weight_hh_l0"] == (3, gates * 7, 7)


# ---------------------------------------------------------------------------------------------------------------- exploit

RULES = {
    "parameters.": ExploitRule.COPY, "optimizer.": ExploitRule.COPY, "hyper.": ExploitRule.COPY,
    "observation.": ExploitRule.COPY, "reward.moments.": ExploitRule.COPY, "reward.running_return": ExploitRule.RESET,
    "collector.obs": ExploitRule.KEEP, "collector.is_first": ExploitRule.RESET, "collector.recurrent": ExploitRule.RESET,
    "collector.episode_return": ExploitRule.KEEP, "collector.episode_length": ExploitRule.KEEP,
    "collector.recent_": ExploitRule.RESET, "collector.episodes": ExploitRule.KEEP, "timesteps": ExploitRule.KEEP,
    "generators.": ExploitRule.KEEP, "risk.": ExploitRule.COPY,
}  # fmt: skip
INITIAL = {"collector.is_first": 1.0, "collector.recurrent": 0.0, "reward.running_return": 0.0, "collector.recent_": torch.nan}


def rule_of(path):
    (prefix,) = [prefix for prefix in RULES if path.startswith(prefix)]
    return prefix, RULES[prefix]


def exploited(source):
    run = trainer(tiny(EVERYTHING, env={"max_episode_steps": 6}), SEEDS[:3])
    for name, value in run.state.hyper.items():
        value.mul_(torch.tensor([1.0, 0.9, 0.8]))
        assert len(value.unique()) == 3 or value.eq(0).all(), name
    for _ in range(2):
        run.iterate(LONG)
    return run, snapshot(run.state), torch.tensor(source)


@pytest.mark.parametrize("source", [[0, 0, 2], [2, 0, 2], [1, 0, 2]])
def test_after_an_exploit_every_leaf_of_the_training_state_obeys_its_rule(source):
    run, before, chosen = exploited(source)
    addresses = {leaf.path: leaf.tensor.data_ptr() for leaf in leaves(run.state) if leaf.generators is None}
    exploit_(run.state, chosen)
    for leaf in leaves(run.state):
        prefix, rule = rule_of(leaf.path)
        assert leaf.rule is rule, leaf.path
        if leaf.generators is None:
            assert leaf.tensor.data_ptr() == addresses[leaf.path], leaf.path
        for p, origin in enumerate(source):
            expected = before[leaf.path][origin if rule is ExploitRule.COPY else p]
            if rule is ExploitRule.RESET and origin != p:
                expected = torch.full_like(expected, INITIAL[prefix])
            assert torch.equal(leaf.tensor[p].double().nan_to_num(-7), expected.double().nan_to_num(-7)), leaf.path
    for name, parameter in run.policy.named_parameters():
        assert parameter.data_ptr() == addresses[f"parameters.{name}"]  # the policy uses the very tensors of the state


def test_a_clone_acts_as_its_parent_and_goes_its_own_way():
    run, before, source = exploited([0, 0, 2])
    distinct = [path for path, value in before.items() if not torch.equal(value[0].nan_to_num(), value[1].nan_to_num())]
    assert {rule_of(path)[0] for path in distinct} >= {"parameters.", "optimizer.", "hyper.", "observation.", "collector.obs"}
    exploit_(run.state, source)
    policy, state = run.policy, run.policy.initial_state(3, 5)
    obs = torch.randn(1, 5, 2, dtype=torch.float64).repeat(3, 1, 1)
    values = policy.step(run.normalize(obs), state, torch.ones(3, 5, dtype=torch.bool))[1]
    torch.testing.assert_close(values[1], values[0], atol=1e-12, rtol=1e-12)
    assert not torch.allclose(values[2], values[0])
    run.iterate(LONG)
    assert any(not torch.equal(value[0], value[1]) for value in run.state.parameters.values())
    assert all(value.isfinite().all() for value in run.state.parameters.values())


# ----------------------------------------------------------------------------------------------------------- save, restore


@pytest.mark.parametrize(("env", "dtype"), [("CartPoleNoVel-v1", torch.float32), ("PendulumNoVel-v1", torch.float64)])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, env, dtype):
    drift = {"kind": "permute", "every": 40} if env.startswith("Pendulum") else EVERYTHING["env"]["drift"]
    settings = tiny(EVERYTHING, env={"id": env, "drift": drift, "max_episode_steps": 8})
    whole = trainer(settings, SEEDS[:3], dtype)
    for _ in range(4):
        uninterrupted = whole.iterate(LONG)
    first = trainer(settings, SEEDS[:3], dtype)
    for _ in range(2):
        first.iterate(LONG)
    path = tmp_path / "run.safetensors"
    first.save(path, {"note": "x"})
    saved = snapshot(first.state)
    first.iterate(LONG)  # what is in the file does not follow the run
    second = trainer(settings, SEEDS[:3], dtype)
    second.iterate(LONG)
    addresses = {leaf.path: leaf.tensor.data_ptr() for leaf in leaves(second.state) if leaf.generators is None}
    assert second.restore(path)["note"] == "x"
    assert_same(snapshot(second.state), saved)
    assert addresses == {leaf.path: leaf.tensor.data_ptr() for leaf in leaves(second.state) if leaf.generators is None}
    assert second.iteration == 2
    for _ in range(2):
        resumed = second.iterate(LONG)
    assert_same(snapshot(second.state), snapshot(whole.state))
    np.testing.assert_equal(second.env.get_state(), whole.env.get_state())
    assert resumed.keys() == uninterrupted.keys()
    for name, value in uninterrupted.items():
        if name != "time/steps_per_second":
            torch.testing.assert_close(resumed[name], value, atol=0, rtol=0, equal_nan=True, msg=name)


def test_where_environments_cannot_be_saved_new_episodes_begin(tmp_path):
    def gym_trainer():
        factories = [lambda: gymnasium.make("CartPole-v1")] * 5
        return trainer(tiny(), [3], env=make_from(factories, [3]))

    run = gym_trainer()
    run.iterate(LONG)
    run.save(tmp_path / "run.safetensors", {})
    saved = snapshot(run.state)
    assert saved["reward.running_return"].abs().sum() > 0
    other = gym_trainer()
    other.iterate(LONG)
    other.restore(tmp_path / "run.safetensors")
    found = snapshot(other.state)
    assert found["collector.is_first"].all()
    for name in ("collector.recurrent", "collector.episode_return", "collector.episode_length", "reward.running_return"):
        assert found[name].eq(0).all(), name
    new = {f"collector.{name}" for name in ("obs", "is_first", "recurrent", "episode_return", "episode_length")}
    new.add("reward.running_return")
    assert_same({k: v for k, v in found.items() if k not in new}, {k: v for k, v in saved.items() if k not in new})
    other.iterate(LONG)


def test_a_checkpoint_of_other_members_environments_shapes_or_kind_is_refused(tmp_path):
    run = trainer(tiny(), [1, 2])
    run.save(tmp_path / "two.safetensors", {})
    with pytest.raises(CheckpointError, match=r"holds the seeds \[.*\], the run has \["):
        trainer(tiny(), [1, 2, 3]).restore(tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"memory|recurrent"):
        trainer(tiny(policy={"memory_size": 6}), [1, 2]).restore(tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="state of other environments"):
        trainer(tiny(env=EVERYTHING["env"]), [1, 2]).restore(tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"holds the seeds \[1, 2\], the run has \[2, 1\]"):
        trainer(tiny(), [2, 1]).restore(tmp_path / "two.safetensors")
    policy = DistributionalPPO.of(trainer(tiny(), [1])).export_policy(tmp_path / "policy")
    with pytest.raises(CheckpointError, match="a policy file cannot be continued"):
        trainer(tiny(), [1]).restore(policy)


@pytest.mark.parametrize("seeds", [["a"], [1.5], [1, 1], [-1], []], ids=str)
def test_seeds_are_different_whole_numbers(seeds):
    with pytest.raises(ValueError, match=r"seeds = .*: must be whole numbers >= 0, at least one, no two alike"):
        Trainer.__init__.__wrapped__(object.__new__(Trainer), tiny(), seeds)  # without the checks that the tests add


def test_a_seed_of_numpy_is_a_seed():
    run = object.__new__(Trainer)
    Trainer.__init__.__wrapped__(run, tiny(), [np.int64(3)])
    assert json.dumps(run.document()["seeds"]) == "[3]"


def test_a_run_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="total_timesteps = 0: must be at least 1"):
        trainer(tiny()).iterate(0)


# ----------------------------------------------------------------------------------------------------- drift, plasticity


def test_an_evaluation_plays_the_physics_that_training_reached(monkeypatch):
    run = trainer(tiny(env={"drift": {"kind": "physics", "every": 40, "ranges": {"gravity": [5.0, 15.0]}}}), [3, 8])
    run.iterate(LONG)
    met = []
    monkeypatch.setattr("hardy.trainer.evaluate", lambda env, *args, **kwargs: met.append(env) or np.zeros((2, 4)))
    run.evaluate(4)
    (twin,) = met
    here, there = (env._env._physics["gravity"].reshape(2, -1)[:, 0].tolist() for env in (run.env, twin))
    assert there == here
    assert len({9.8, *here}) == 3


def test_the_drift_counts_the_steps_that_were_played(tmp_path, monkeypatch):
    """Where the vector environment spends a step on each reset, fewer of them than the rollouts have."""

    def next_step_trainer():
        factories = [lambda: gymnasium.make("CartPole-v1", max_episode_steps=4)] * 5
        vector = SyncVectorEnv(factories, autoreset_mode=AutoresetMode.NEXT_STEP)
        settings = tiny(env={"id": "CartPole-v1", "drift": {"kind": "permute", "every": 46}})
        return trainer(settings, [3], env=make_from(vector, [3], drift=settings.env.drift))

    run = next_step_trainer()
    metrics = run.iterate(LONG)
    assert run.timesteps == 55
    assert run.env.steps.tolist() == [45]  # 2 of 11 steps of each environment were resets
    assert metrics["env/drift_changes"] == 0
    met = []
    monkeypatch.setattr("hardy.trainer.evaluate", lambda env, *args, **kwargs: met.append(env) or np.zeros((1, 4)))
    run.evaluate(4)
    assert met[0].steps.tolist() == [45]
    run.save(tmp_path / "run.safetensors", {})
    other = next_step_trainer()
    other.restore(tmp_path / "run.safetensors")
    assert other.env.steps.tolist() == [45]


def test_dormant_units_are_counted_in_each_memory_against_its_own_response(monkeypatch):
    run = trainer(tiny(policy={"memory": "none", "encoder": [4], "shared_memory": False}))
    rollout = torch.ones(1, 11, 5, 4, dtype=torch.float64)
    rollout[..., 0] = 0.0
    weak = torch.full_like(rollout, 1e-3)  # would all be dormant beside the other's units
    features = run.policy.features
    monkeypatch.setattr(
        run.policy, "features", lambda *args: (rollout, weak) if not torch.is_grad_enabled() else features(*args)
    )
    assert run.iterate(LONG)["plasticity/dormant_fraction"].tolist() == [0.125]


def test_streams_of_a_member_are_independent():
    run = trainer(tiny(), [1, 2])
    states = [generators.get_state() for generators in run.state.generators.values()]
    states.append(MemberGenerators([1, 2], "init").get_state())
    for i, one in enumerate(states):
        assert not torch.equal(one[0], one[1])
        for other in states[i + 1 :]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize(("memory", "torch_threads"), [("lstm", 1), ("none", 2)])
def test_threads_are_used_with_and_without_a_memory(memory, torch_threads):
    trainer(tiny(threads=2, policy={"memory": memory}), [1])
    assert torch.get_num_threads() == torch_threads
