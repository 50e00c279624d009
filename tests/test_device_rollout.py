"""Collecting where the environments are tensors: the results of the ordinary way, by a step that a graph can hold."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import captured_on_the_cpu
from small_runs import EVERYTHING, Recorder, assert_same, member, shake_, snapshot, tiny, trainer
from torch.utils._python_dispatch import TorchDispatchMode

from hardy.device_rollout import DeviceCollector, count_episodes_
from hardy.envs import DriftSettings, EnvSettings, TensorEnv, make
from hardy.policy import ActorCritic, CriticSettings, PolicySettings
from hardy.population import MemberGenerators
from hardy.rollout import RECENT_EPISODES, CollectorState, collect, enter_scores_, start

TORCH = {"backend": "torch"}


def normalize(obs):
    """A fixed normaliser that is far from the identity."""
    return (obs - 0.3) * 1.7


def setting(task, members, device, memory="lstm", shared=True, limit=7, drift=None):
    seeds = list(range(members))
    env = make(EnvSettings(id=task, num_envs=5, max_episode_steps=limit, drift=drift, **TORCH), seeds, device=device)
    settings = PolicySettings(memory=memory, memory_size=5, encoder=(7,), shared_memory=shared)
    policy = ActorCritic(env.observation_space, env.action_space, settings, CriticSettings(quantiles=3), seeds)
    torch.manual_seed(0)
    shake_(policy)
    return env, policy.to(device=device, dtype=torch.float64), MemberGenerators(seeds, "action")


def here(tensors):
    return {name: value.cpu() for name, value in tensors.items()}


def fields(rollout):
    return here(vars(rollout))


@pytest.mark.parametrize("task", ["CartPole-v1", "PendulumNoVel-v1", "MountainCarNoVel-v0", "MountainCarContinuous-v0"])
@pytest.mark.parametrize(("memory", "shared"), [("lstm", True), ("gru", False), ("none", True)])
def test_rollouts_are_those_of_the_ordinary_way(task, memory, shared, device):
    """Truncations, terminations (the shaken policy drops its pole) and running episodes, over the border of rollouts too."""
    env, policy, noise = setting(task, 3, device, memory, shared, limit=13)
    env = Recorder(env)  # seen through arrays
    state = start(env, policy, 3)
    ordinary = [collect(env, policy, state, normalize, noise, 11) for _ in range(4)]
    other, policy, noise = setting(task, 3, device, memory, shared, limit=13)
    there = start(other, policy, 3)
    collector = DeviceCollector(other, policy, there, normalize, 11)
    found = [collector.collect(noise) for _ in range(4)]
    for mine, theirs in zip(found, ordinary, strict=True):
        assert_same(fields(mine), fields(theirs), 1e-10)
    assert_same(here(snapshot(there)), here(snapshot(state)), 1e-10)
    ends = torch.stack([theirs.truncated.sum() for theirs in ordinary]).sum(), state.episodes.sum()
    assert ends[0] >= 3
    assert ends[1] >= ends[0]


def test_terminations_and_truncations_occur_together_in_what_is_compared(device):
    env, policy, noise = setting("CartPole-v1", 3, device, limit=13)
    env = Recorder(env)
    state = start(env, policy, 3)
    seen = [collect(env, policy, state, normalize, noise, 11) for _ in range(4)]
    for name in ("terminated", "truncated"):
        assert sum(int(getattr(rollout, name).sum()) for rollout in seen) > 3, name


def test_a_rollout_does_not_change_when_the_next_one_is_collected():
    env, policy, noise = setting("CartPole-v1", 2, "cpu")
    collector = DeviceCollector(env, policy, start(env, policy, 2), normalize, 11)
    first = collector.collect(noise)
    kept = {name: value.clone() for name, value in fields(first).items()}
    collector.collect(noise)
    assert_same(fields(first), kept)


DRIFTS = [
    None,
    {"kind": "physics", "every": 20, "over": 10, "ranges": {"length": (0.3, 0.9), "gravity": (5.0, 15.0)}},
    {"kind": "permute", "every": 20, "over": 10},
]


@pytest.mark.parametrize("drift", DRIFTS, ids=["none", "physics", "permute"])
def test_a_step_replayed_without_python_gives_the_same_rollouts(monkeypatch, drift):
    """And asks the host for nothing: the recording refuses what a graph cannot hold."""
    chosen = None if drift is None else DriftSettings(**drift)
    parts = [setting("CartPole-v1", 3, "cpu", limit=13, drift=chosen) for _ in range(2)]
    states = [start(env, policy, 3) for env, policy, _ in parts]
    plain, replayed = (
        DeviceCollector(env, policy, state, normalize, 11) for (env, policy, _), state in zip(parts, states, strict=True)
    )
    expected = [plain.collect(parts[0][2]) for _ in range(4)]
    recordings = captured_on_the_cpu(monkeypatch)
    for step in range(4):
        assert_same(fields(replayed.collect(parts[1][2])), fields(expected[step]), 1e-12)
    assert_same(snapshot(states[1]), snapshot(states[0]), 1e-12)
    assert len(recordings) == 1
    if drift is not None:
        assert parts[1][0].changes.tolist() == [11] * 3


class LastFirst(TorchDispatchMode):
    """Scatters from the last entry to the first: a device promises no order."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.scatter_:
            target, dim, index, source = args
            return func(target, dim, index.flip(dim), source.flip(dim))
        return func(*args, **(kwargs or {}))


def counted(members, envs, outcomes, order=nullcontext):
    """Two states after these rewards and ends ``[P, E]``: counted step by step, and the ordinary way."""
    states = []
    for _ in range(2):
        recent = torch.full((members, RECENT_EPISODES), float("nan"))
        zeros = torch.zeros(members, envs)
        flags = torch.ones(members, envs, dtype=torch.bool)
        states.append(
            CollectorState(
                zeros.unsqueeze(-1), flags, zeros.unsqueeze(-1), zeros.clone(), zeros.long(), recent, recent.clone(),
                torch.zeros(members, dtype=torch.int64),
            )
        )  # fmt: skip
    for reward, ended in outcomes:
        with order():
            count_episodes_(states[0], torch.from_numpy(reward), torch.from_numpy(ended))
    rewards, ends = (np.stack(column).reshape(len(outcomes), -1) for column in zip(*outcomes, strict=True))
    enter_scores_(states[1], rewards, ends, np.ones_like(ends))
    return [snapshot(state) for state in states]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_episodes_are_counted_as_the_ordinary_way_counts_them(data):
    """Also where more end in one step than the window holds."""
    members, envs = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 60, 250]))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    chance = data.draw(st.sampled_from([0.02, 0.5, 1.0]))
    outcomes = [(rng.normal(size=(members, envs)).astype(np.float32), rng.random((members, envs)) < chance) for _ in range(9)]
    assert_same(*counted(members, envs, outcomes), 1e-6)


@pytest.mark.parametrize("order", [nullcontext, LastFirst])
def test_of_more_episodes_than_the_window_holds_the_newest_stay_in_whatever_order_a_device_writes(order):
    """Of one member all 250 end in the first step, of the other some 125 in each."""
    rng = np.random.default_rng(0)
    outcomes = [(rng.normal(size=(2, 250)).astype(np.float32), rng.random((2, 250)) < [[1 - step], [0.5]]) for step in (0, 1)]
    found, expected = counted(2, 250, outcomes, order)
    assert_same(found, expected, 1e-6)
    first = torch.from_numpy(outcomes[0][0][0])
    assert torch.equal(found["recent_returns"][0].sort().values, first[-RECENT_EPISODES:].sort().values)


# --------------------------------------------------------------------------------------------------------- a whole training


def run_of(seeds, device="cpu", dtype=torch.float64, **sections):
    changes = {"env": TORCH, "device": str(device), **sections}
    return trainer(tiny(EVERYTHING, changes), seeds, dtype)


def test_a_population_of_tensors_equals_its_members_alone(device):
    together = run_of([4, 9, 2], device)
    assert isinstance(together.env, TensorEnv)
    for _ in range(3):
        together.iterate(1000)
    for p, seed in enumerate((4, 9, 2)):
        alone = run_of([seed], device)
        for _ in range(3):
            alone.iterate(1000)
        assert_same(member(snapshot(together.state), p), snapshot(alone.state), 1e-10)


@pytest.mark.parametrize("env", ["CartPoleNoVel-v1", "PendulumNoVel-v1"])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, env, device):
    drift = {"kind": "permute", "every": 40} if env.startswith("Pendulum") else EVERYTHING["env"]["drift"]
    sections = {"env": {"id": env, "drift": drift, "max_episode_steps": 8, **TORCH}, "device": str(device)}
    runs = [trainer(tiny(EVERYTHING, sections), [4, 9], torch.float32) for _ in range(2)]
    for _ in range(2):
        runs[0].iterate(1000)
    path = tmp_path / "run.safetensors"
    runs[0].save(path, {})
    runs[1].iterate(1000)
    runs[1].restore(path)
    assert_same(snapshot(runs[1].state), snapshot(runs[0].state))
    for _ in range(2):
        ends = [run.iterate(1000) for run in runs]
    assert_same(snapshot(runs[1].state), snapshot(runs[0].state))
    assert_same(*({k: v for k, v in end.items() if isinstance(v, torch.Tensor)} for end in ends))


def test_an_exploit_rebuilds_restarts_and_goes_on():
    run = run_of([4, 9, 2], pbt={"after_exploit": "reset_env"})
    run.iterate(1000)
    before = snapshot(run.state)
    run.exploit_(np.array([0, 0, 2]))
    for name in ("obs", "episode_length"):
        now = getattr(run.state.collector, name)
        assert not torch.equal(now[1], before[f"collector.{name}"][1])
        assert torch.equal(now[2], before[f"collector.{name}"][2])
    assert run.state.collector.episode_length[1].eq(0).all()
    run.iterate(1000)
    assert all(value.isfinite().all() for value in run.state.parameters.values())


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("estimator", ["ema", "microbatch"])
def test_a_run_on_a_device_is_that_of_the_processor_to_rounding(device, backend, estimator):
    """Networks, memory, optimizer, update, population and environments of either kind, all together."""
    sections = {"env": {"backend": backend, "num_envs": 8}, "vgs": {"estimator": estimator}, "ppo": {"target_kl": None}}
    runs = [run_of([4, 9], where, **sections) for where in ("cpu", device)]
    for _ in range(2):
        metrics = [run.iterate(1000) for run in runs]
    assert_same(*(here(snapshot(run.state)) for run in runs), 1e-8)
    for name, value in metrics[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(metrics[1][name], value, atol=1e-7, rtol=1e-7, equal_nan=True, msg=name)


def test_metrics_arrive_on_the_processor(device):
    for value in run_of([4, 9], device).iterate(1000).values():
        assert not isinstance(value, torch.Tensor) or value.device.type == "cpu"
