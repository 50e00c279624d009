"""The memory that old weights wrote must not reach new ones: ``h = f(x, h_old; new weights)`` belongs to neither policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hardy import DistributionalPPO
from hardy.config import settings_from_dict
from hardy.population import ExploitRule, exploit_, leaves
from hardy.settings import RunSettings
from hardy.trainer import Trainer

PPO = {"n_steps": 7, "n_epochs": 1, "n_minibatches": 1}
SIZE = {"memory_size": 5, "encoder": [3]}


def make_model(policy: str = "MlpLstmPolicy", seed: int = 0, num_envs: int = 3, **kwargs: Any) -> DistributionalPPO:
    given = {"policy_kwargs": SIZE, "env": "CartPoleNoVel-v1", **kwargs}
    return DistributionalPPO(policy, seed=seed, num_envs=num_envs, threads=1, ppo=PPO, **given)


def trained(**kwargs: Any) -> DistributionalPPO:
    """A model in the middle of its episodes: seven steps are too few for the pole to fall in every environment."""
    model = make_model(**kwargs).learn(1)
    memory = model.lstm_states
    assert memory is not None and memory.abs().sum() > 0
    return model


def collector(model: DistributionalPPO) -> Any:
    assert model.trainer is not None
    return model.trainer.state.collector


def next_step(policy: DistributionalPPO, running: DistributionalPPO) -> tuple[np.ndarray, np.ndarray | None]:
    """What ``policy`` does next in the training environments of ``running``, from the memory that lies there."""
    state = collector(running)
    return policy.predict(state.obs[0].numpy(), state.recurrent[0].numpy(), state.is_first[0].numpy(), deterministic=True)


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "MlpGruPolicy"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_the_memory_is_zero_afterwards(policy: str, shared: bool, num_envs: int) -> None:
    model = trained(policy=policy, num_envs=num_envs, policy_kwargs={**SIZE, "shared_memory": shared})
    memory = model.lstm_states
    assert memory is not None
    address, shape = memory.data_ptr(), memory.shape
    model.reset_lstm_states_to_initial()
    after = model.lstm_states
    assert after is not None
    assert after.data_ptr() == address and after.shape == shape
    assert shape[:2] == (1, num_envs)
    assert not after.any()
    assert collector(model).is_first.all()


def test_only_the_memory_changes() -> None:
    model = trained()
    before = {leaf.path: leaf.tensor.clone() for leaf in leaves(model.trainer.state)}  # type: ignore[union-attr]
    model.reset_lstm_states_to_initial()
    changed = {
        leaf.path
        for leaf in leaves(model.trainer.state)  # type: ignore[union-attr]
        if not torch.equal(leaf.tensor.nan_to_num(), before[leaf.path].nan_to_num())
    }
    assert changed == {"collector.recurrent", "collector.is_first"}


def test_twice_is_once() -> None:
    model = trained()
    model.reset_lstm_states_to_initial()
    once = {leaf.path: leaf.tensor.clone() for leaf in leaves(model.trainer.state)}  # type: ignore[union-attr]
    model.reset_lstm_states_to_initial()
    for leaf in leaves(model.trainer.state):  # type: ignore[union-attr]
        torch.testing.assert_close(leaf.tensor, once[leaf.path], rtol=0, atol=0, equal_nan=True)


def test_other_weights_behave_as_in_a_fresh_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = trained(seed=11).export_policy(tmp_path / "other")
    model, forgetful = trained(seed=2), trained(seed=2)
    fresh = DistributionalPPO.load(other)
    expected = fresh.predict(collector(model).obs[0].numpy(), deterministic=True)

    with pytest.warns(UserWarning, match="v1_policy_only lacks optimizer"):
        model.load_parameters(other)
    action, memory = next_step(model, model)
    np.testing.assert_array_equal(action, expected[0])
    np.testing.assert_array_equal(memory, expected[1])

    # The same without the reset: this is the mistake that the reset is there for.
    monkeypatch.setattr(DistributionalPPO, "reset_lstm_states_to_initial", lambda self: None)
    with pytest.warns(UserWarning, match="v1_policy_only lacks optimizer"):
        forgetful.load_parameters(other)
    _, stale = next_step(forgetful, forgetful)
    assert expected[1] is not None and stale is not None
    assert np.abs(stale - expected[1]).max() > 1e-3


def test_training_starts_from_the_reset_memory_too() -> None:
    model = trained()
    model.reset_lstm_states_to_initial()
    twin = trained()
    collector(twin).is_first.fill_(True)  # the flag alone has the effect: whatever lies in the memory is not read
    collector(twin).recurrent.fill_(123.0)
    model.learn(1)
    twin.learn(1)
    for (name, one), two in zip(model.policy.named_parameters(), twin.policy.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("how", ["no environment", "no memory", "neither"])
def test_none_stays_none(tmp_path: Path, how: str) -> None:
    model = make_model("MlpLstmPolicy" if how == "no environment" else "MlpPolicy").learn(1)
    if how != "no memory":
        model = DistributionalPPO.load(model.export_policy(tmp_path / "policy"))
    before = None if model.trainer is None else collector(model).is_first.clone()
    assert model.lstm_states is None
    model.reset_lstm_states_to_initial()
    assert model.lstm_states is None
    if before is not None:
        assert torch.equal(collector(model).is_first, before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_prediction_in_other_batch_sizes(count: int) -> None:
    model = trained(num_envs=3)
    observations = np.linspace(-0.1, 0.1, 2 * count, dtype=np.float32).reshape(count, 2)
    _, first = model.predict(observations, deterministic=True)
    assert first is not None and first.shape[0] == count
    action, going_on = model.predict(observations, first, deterministic=True)
    model.reset_lstm_states_to_initial()
    again, state = model.predict(observations, first, deterministic=True)  # a user's own memory is the user's
    np.testing.assert_array_equal(again, action)
    np.testing.assert_array_equal(state, going_on)
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[1], first)


# ------------------------------------------------------------------------------------------------- the exploit resets itself


@pytest.fixture
def population() -> Trainer:
    sections = {"env": {"id": "CartPoleNoVel-v1", "num_envs": 2}, "policy": SIZE, "ppo": PPO, "threads": 1}
    trainer = Trainer(settings_from_dict(RunSettings, sections), seeds=[3, 5, 7])
    trainer.state.hyper["optimizer.lr"].copy_(torch.tensor([1e-4, 2e-4, 3e-4]))
    for _ in range(5):
        trainer.iterate(1000)
    return trainer


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    return {leaf.path: leaf.tensor.clone() for leaf in leaves(trainer.state)}


def same(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.nan_to_num(nan=-7.0), two.nan_to_num(nan=-7.0)) if one.is_floating_point() else torch.equal(one, two)


def test_an_exploit_starts_the_replaced_memory_anew(population: Trainer) -> None:
    before = snapshot(population)
    addresses = {leaf.path: leaf.tensor.data_ptr() for leaf in leaves(population.state) if leaf.generators is None}
    assert before["collector.recurrent"][2].any() and not before["collector.is_first"][2].all()
    exploit_(population.state, torch.tensor([0, 1, 0]))
    state = population.state.collector
    assert not state.recurrent[2].any()
    assert state.is_first[2].all()
    rules = set()
    for leaf in leaves(population.state):
        old = before[leaf.path]
        rules.add(leaf.rule)
        assert same(leaf.tensor[:2], old[:2]), leaf.path
        if leaf.rule is ExploitRule.COPY:
            assert same(leaf.tensor[2], old[0]), leaf.path
        elif leaf.rule is ExploitRule.KEEP:
            assert same(leaf.tensor[2], old[2]), leaf.path
        else:
            assert leaf.initial is not None
            assert same(leaf.tensor[2], torch.full_like(old[2], leaf.initial)), leaf.path
        if leaf.generators is None:
            assert leaf.tensor.data_ptr() == addresses[leaf.path], leaf.path
    assert rules == {ExploitRule.COPY, ExploitRule.KEEP, ExploitRule.RESET}


def test_what_an_exploit_copies_differed_before(population: Trainer) -> None:
    # Otherwise the test above could not fail for it. Counts of steps and settings are the same for all members by nature.
    alike = {
        leaf.path for leaf in leaves(population.state) if leaf.rule is ExploitRule.COPY and same(leaf.tensor[0], leaf.tensor[2])
    }
    differing = {leaf.path for leaf in leaves(population.state) if leaf.rule is ExploitRule.COPY} - alike
    assert {path for path in differing if path.startswith("parameters.")} == {
        f"parameters.{name}" for name, _ in population.policy.named_parameters()
    }
    assert "hyper.optimizer.lr" in differing
    assert {"observation.mean", "observation.var", "reward.moments.var"} <= differing
    assert any(path.startswith("optimizer.") for path in differing)


def test_an_exploit_takes_effect_in_training(population: Trainer) -> None:
    twin_before = snapshot(population)
    exploit_(population.state, torch.tensor([0, 1, 0]))
    with torch.no_grad():
        state, policy = population.state.collector, population.policy
        _, _, memory = policy.step(population.normalize(state.obs), state.recurrent, state.is_first)
        zeros, starts = torch.zeros_like(state.recurrent), torch.ones_like(state.is_first)
        _, _, fresh = policy.step(population.normalize(state.obs), zeros, starts)
        stale_input = twin_before["collector.recurrent"], twin_before["collector.is_first"]
        _, _, stale = policy.step(population.normalize(state.obs), *stale_input)
    assert torch.equal(memory[2], fresh[2])
    assert not torch.allclose(stale[2], fresh[2], atol=1e-3)
    population.iterate(1000)
    assert all(bool(leaf.tensor.isfinite().all()) for leaf in leaves(population.state) if leaf.path.startswith("parameters"))
