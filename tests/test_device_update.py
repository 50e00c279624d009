"""An update as a device runs it: no question to the host, and the same numbers from a replay without Python."""

from __future__ import annotations

import pytest
import torch
from replay import captured_on_the_cpu
from small_runs import EVERYTHING, assert_same, member, snapshot, tiny, trainer

from hardy import graphs, ppo
from hardy.graphs import Captured, CapturedCalls, may_ask
from hardy.nn import recurrent
from hardy.optim.noise import standard_normal
from hardy.population import per_member
from hardy.profiling import TRACED, WARM_UP, Profile

TORCH = {"env": {"backend": "torch"}}
CASES = {
    "everything": {},
    "unequal minibatches and gru": {"policy": {"memory": "gru", "memory_layers": 2}, "ppo": {"n_minibatches": 3}},
    "no memory, UPGD, noise of fixed size": {
        "policy": {"memory": "none"}, "vgs": {"enabled": False},
        "optimizer": {"name": "UPGD", "gating": "local", "adaptive_noise": False},
    },
    "microbatches": {
        "env": {"num_envs": 8}, "vgs": {"estimator": "microbatch", "scope": "tensor"}, "optimizer": {"name": "UPGDW"},
    },
    "categorical twins, continuous actions": {
        "env": {"id": "PendulumNoVel-v1", "drift": None}, "critic": {"kind": "categorical", "twin": True, "atoms": 5},
        "optimizer": {"overrides": {"actor": {"gating": "none", "noise": False}, "critic": {"gating": "local"}}},
    },
    "risk and clipped values": {"risk": {"weight": 0.5}, "critic": {"value_clip": 0.2, "huber_threshold": 0.05}},
    "no noise": {"optimizer": {"sigma": 0.0}},
}  # fmt: skip


def as_on_a_device(monkeypatch):
    monkeypatch.setattr(ppo, "CAPTURED", ("cpu", "cuda"))
    monkeypatch.setattr(recurrent, "STEPPED", ("cpu", "cuda"))
    return captured_on_the_cpu(monkeypatch)


def iterate(run, times):
    for _ in range(times):
        metrics = run.iterate(1000)
    return {name: value for name, value in metrics.items() if isinstance(value, torch.Tensor)}


@pytest.mark.filterwarnings("ignore:adaptive_noise=False")
@pytest.mark.parametrize("case", CASES)
def test_a_captured_update_trains_as_the_ordinary_one(monkeypatch, case):
    """Every part that has a switch; the recording refuses what a graph cannot hold, and what Python alone decides is frozen."""
    # A member that stops early draws no more keys, but for a captured update: see below.
    settings = tiny(EVERYTHING, TORCH, CASES[case], ppo={"target_kl": None})
    ordinary = trainer(settings, [4, 9, 2])
    expected = iterate(ordinary, 3)
    recordings = as_on_a_device(monkeypatch)
    captured = trainer(settings, [4, 9, 2])
    found = iterate(captured, 3)
    assert len(recordings) == 1 + len({part for part in _sizes(settings)})
    assert_same(found, expected, 1e-9)
    states = [snapshot(run.state) for run in (captured, ordinary)]
    for state in states:  # members that add no noise draw keys as well
        state.pop("generators.noise" if case == "no noise" else "none", None)
    assert_same(*states, 1e-9)


def test_a_profile_names_what_a_replay_took(monkeypatch, tmp_path):
    as_on_a_device(monkeypatch)
    run = trainer(tiny(EVERYTHING, TORCH, ppo={"target_kl": None}), [4])
    with Profile(tmp_path / "trace.json", "cpu") as profile:
        for _ in range(WARM_UP + TRACED + 2):
            with profile.iteration():
                run.iterate(1000)
    phases = {line.rsplit(maxsplit=2)[0] for line in profile.table()}
    assert {"device step", "captured minibatch"} <= phases
    assert not phases & {"policy step", "environment step", "forward", "loss", "backward", "optimizer"}


def _sizes(settings):
    envs, parts = settings.env.num_envs, settings.ppo.n_minibatches
    return [envs * (part + 1) // parts - envs * part // parts for part in range(parts)]


def test_members_of_a_captured_population_equal_single_runs_and_some_stop_early(monkeypatch):
    as_on_a_device(monkeypatch)
    settings = tiny(EVERYTHING, TORCH, ppo={"n_epochs": 3})
    together = trainer(settings, [4, 9, 2])
    iterate(together, 3)
    assert len(together.state.optimizer.upgd.step[:, 0].unique()) > 1
    for p, seed in enumerate((4, 9, 2)):
        alone = trainer(settings, [seed])
        iterate(alone, 3)
        assert_same(member(snapshot(together.state), p), snapshot(alone.state), 1e-9)


def test_a_captured_member_that_is_not_finite_skips_and_leaves_the_others_alone(monkeypatch):
    as_on_a_device(monkeypatch)
    runs = [trainer(tiny(TORCH), [1, 2, 3]) for _ in range(2)]
    for run in runs:
        iterate(run, 2)
    next(iter(runs[1].state.parameters.values()))[1].fill_(torch.nan)
    before = snapshot(runs[1].state.optimizer)
    found = [iterate(run, 1) for run in runs]
    assert found[1]["train/skipped_updates"].tolist() == [0, 4, 0]
    clean, hurt = (snapshot(run.state) for run in runs)
    for p in (0, 2):
        assert_same(member(hurt, p), member(clean, p))
    for path, value in snapshot(runs[1].state.optimizer).items():
        assert torch.equal(value[1], before[path][1]), path


def scripted(monkeypatch, run, kls, broken):
    """Minibatch after minibatch these KLs ``[P]`` are found, and gradients and all other metrics are NaN of ``broken`` members.

    By operations on tensors alone, so that a replay follows the script as well.
    """
    turn, real = torch.zeros(1, dtype=torch.int64), run.ppo._gradients

    def gradients_and_metrics(*args):
        hurt, kl = (script.index_select(0, turn).squeeze(0) for script in (broken, kls))
        turn.add_(1)
        gradients, metrics = (
            {n: v.masked_fill(per_member(hurt, v.ndim), torch.nan) for n, v in t.items()} for t in real(*args)
        )
        return gradients, {**metrics, "train/approx_kl": kl}

    monkeypatch.setattr(run.ppo, "_gradients", gradients_and_metrics)
    return run


def test_a_captured_member_that_stops_or_is_not_finite_trains_as_an_ordinary_one(monkeypatch):
    """A stop lasts to the end of the update, and minibatches on which a member did not train are in none of its means."""
    settings = tiny(TORCH, ppo={"target_kl": 0.01, "n_epochs": 3}, optimizer={"sigma": 0.0})
    kls = torch.zeros(6, 3, dtype=torch.float64)
    kls[:, 1:] = torch.arange(1, 7)[:, None] / 1000
    broken = torch.zeros(6, 3, dtype=torch.bool)
    kls[1, 0] = 1.0  # stops member 0, whose later KLs are low again
    broken[4, 0] = broken[2, 1] = True  # the one after its stop, the other among minibatches that it trains on
    script = (kls.repeat(3, 1), broken.repeat(3, 1))
    ordinary = scripted(monkeypatch, trainer(settings, [4, 9, 2]), *script)
    updates = [iterate(ordinary, 1) for _ in range(3)]
    recordings = as_on_a_device(monkeypatch)
    captured = scripted(monkeypatch, trainer(settings, [4, 9, 2]), *script)
    for update, expected in enumerate(updates, 1):
        found = iterate(captured, 1)
        assert_same(found, expected, 1e-9)
        assert captured.state.optimizer.upgd.step[:, 0].tolist() == [update, 5 * update, 6 * update]
        assert found["train/skipped_updates"].tolist() == [0, 1, 0]
        assert found["train/approx_kl"].tolist() == pytest.approx([0.0, 0.0036, 0.0035])
        assert all(found[name].isfinite().all() for name in ("train/value_loss", "train/entropy", "train/grad_norm"))
    assert len(recordings) == 3
    states = [snapshot(run.state) for run in (captured, ordinary)]
    for state in states:  # which of a captured member's keys are used is known on the device only: all are drawn
        del state["generators.noise"]
    assert_same(*states, 1e-9)


def test_under_an_adversary_the_update_is_not_captured_and_trains(monkeypatch):
    recordings = as_on_a_device(monkeypatch)
    run = trainer(tiny(TORCH, adversary={"epsilon": 0.1, "ramp": 0.0}), [1])
    metrics = iterate(run, 2)
    assert metrics["adversary/epsilon"].item() == pytest.approx(0.1)
    assert len(recordings) == 1  # the rollout's


def test_noise_of_all_members_at_once_is_that_of_each_in_turn():
    keys = torch.tensor([0, 12345, 2**63 - 1])
    tensors = [torch.empty(3, 5, 7), torch.empty(3, 70_000), torch.empty(3)]
    expected = standard_normal(keys, tensors)
    with graphs.without_asking():
        for one, other in zip(standard_normal(keys, tensors), expected, strict=True):
            assert torch.equal(one, other)


def test_tensors_may_be_asked_on_the_processor_outside_a_capture():
    assert may_ask(torch.zeros(1))
    assert not may_ask(torch.zeros(1, device="meta"))
    with graphs.without_asking():
        assert not may_ask(torch.zeros(1))
    assert may_ask(torch.zeros(1))


def test_each_call_does_its_work_once_and_returns_its_result(device):
    total = torch.zeros(3, device=device)
    add = Captured(lambda: total.add_(1) * 2, device)
    for call in range(1, 7):
        assert add().tolist() == [2.0 * call] * 3
    assert total.tolist() == [6.0] * 3


def test_arguments_are_copied_and_each_shape_has_a_function_of_its_own(device):
    total = torch.zeros(2, device=device)
    calls = CapturedCalls(lambda given: total.add_(given["x"].sum(0) * given["scale"]), device)
    expected = torch.zeros(2, device=device)
    for call in range(12):
        x = torch.full((1 + call % 2, 2), float(call), device=device)
        scale = torch.tensor([1.0, 2.0], device=device)
        expected += x.sum(0) * scale
        assert torch.equal(calls({"x": x, "scale": scale}), expected)
        x.fill_(torch.nan)


REFUSED = {
    "looks at a value": lambda x: x.sum().item(),
    "follows from values": lambda x: x[x > 0],
    "draws random numbers": lambda x: x.normal_(),
    "brings numbers from the host": lambda x: x + torch.tensor([1.0]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_the_stand_in_for_a_graph_refuses_what_a_graph_cannot_hold(monkeypatch, reason):
    captured_on_the_cpu(monkeypatch)
    x = torch.ones(1)
    captured = Captured(lambda: REFUSED[reason](x), torch.device("cpu"))
    for _ in range(graphs.WARMUP):
        captured()
    with pytest.raises(RuntimeError, match=reason):
        captured()
