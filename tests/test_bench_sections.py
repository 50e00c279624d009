"""The sections of ``hardy bench``: what is measured is what is said, whatever the speed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hardy.bench import environments, machine, memory, optimizer, population, recurrence, scaling, throughput, timing, work
from hardy.bench.options import SECTIONS, Options, choose
from hardy.bench.results import Part
from hardy.bench.work import BenchError, Training, Work
from hardy.bench.worker import MEASURES
from hardy.config import ConfigError
from hardy.nn.recurrent import StackedRecurrent
from hardy.optim import UPGD
from hardy.parallel import available_cores, set_threads

TINY = {"threads": 1, "seconds": 1e-6, "repeats": 2, "hidden": 4}


def quiet(text: str) -> None:
    """Nobody listens."""


def parts(measure: Callable[..., Any], **options: Any) -> list[Part]:
    return list(measure(Options(**{**TINY, **options}), quiet))


@pytest.fixture(autouse=True)
def _one_thread_afterwards() -> Any:
    yield
    set_threads(1)


# ---------------------------------------------------------------------------------------------------------------- options


def test_every_section_is_measured() -> None:
    assert list(MEASURES) == list(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_an_option_without_effect_is_refused(section: str) -> None:
    values = {"envs": [4], "population": [2], "threads": 1, "seconds": 1.0, "repeats": 1}
    for name, value in values.items():
        if name in SECTIONS[section]:
            assert choose(section, {name: value})[0] == [section]
        else:
            with pytest.raises(ConfigError, match=f"--{name}: has no effect on {section}"):
                choose(section, {name: value})


def test_all_takes_every_option_and_measures_everything() -> None:
    chosen, options = choose("all", {"envs": [4], "population": [2, 3], "threads": 1, "seconds": 1.0, "repeats": None})
    assert chosen == list(SECTIONS)
    assert options == Options(envs=(4,), population=(2, 3), threads=1, seconds=1.0)


@pytest.mark.parametrize(
    ("section", "given", "said"),
    [
        ("optimiser", {}, r"SECTION optimiser: must be one of .*did you mean 'optimizer'"),
        ("population", {"envs": [8, 3]}, r"--envs 3: must be at least 4, since the work has 4 minibatches"),
        ("environments", {"envs": [0]}, r"--envs 0: must be at least 1$"),
        ("memory", {"population": [0]}, r"--population 0: must be at least 1$"),
        ("memory", {"population": [2, 1, 2]}, r"--population 2: is given twice"),
        ("optimizer", {"repeats": 0}, r"--repeats = 0: must be a whole number >= 1 and <= 1000$"),
        ("optimizer", {"seconds": float("nan")}, r"--seconds = NaN: must be a finite number"),
        ("optimizer", {"threads": 0}, r"--threads = 0: must be a whole number >= 1"),
    ],
)
def test_impossible_values_are_refused(section: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose(section, given)


def test_few_environments_are_allowed_where_there_are_no_minibatches() -> None:
    assert choose("recurrence", {"envs": [1]})[1].envs == (1,)


# --------------------------------------------------------------------------------------------------------- time and machine


def test_candidates_take_turns_and_the_first_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])
    log: list[str] = []

    def candidate(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            log.append(name)
            clock["now"] += seconds

        return call

    said: list[str] = []
    times = timing.take_turns({"a": candidate("a", 2.0), "b": candidate("b", 5.0)}, 2, 4.0, timing.under("here", said.append))
    assert log == ["a"] * 3 + ["b"] * 2 + ["a"] * 3 + ["b"] * 2
    assert times == {"a": [2.0, 2.0], "b": [5.0, 5.0]}
    assert said == ["here: repeat 1 of 2", "here: repeat 2 of 2"]


def test_the_limit_is_the_published_estimate() -> None:
    # 165 GFLOP/s, 132,867 weights, 26 operations a weight and step: about 48 thousand steps/s.
    assert machine.limit(165.0, 132_867, 4) == pytest.approx(165e9 / (26 * 132_867))
    assert machine.limit(165.0, 132_867, 4) == pytest.approx(48_000, rel=0.01)
    assert machine.product_flop() == 2 * 1024**3


def test_the_matrix_product_runs_on_the_threads_it_is_asked_for() -> None:
    machine.matrix_product(2)()
    assert torch.get_num_threads() == 2
    machine.matrix_product(1)()
    assert torch.get_num_threads() == 1


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found.cores == available_cores()
    assert found.memory_mib > 100
    assert {"hardy", "torch", "numpy", "python"} <= set(found.versions)


def test_what_others_take_is_the_rest_of_the_busy_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"busy": 100.0, "own": 7.0, "clock": 50.0}
    monkeypatch.setattr(machine, "_busy_seconds", lambda: now["busy"])
    monkeypatch.setattr(machine, "_own_seconds", lambda: now["own"])
    monkeypatch.setattr(machine.time, "monotonic", lambda: now["clock"])
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    load = machine.OthersLoad()
    now |= {"busy": 116.0, "own": 11.0, "clock": 60.0}  # 12 of 40 seconds
    assert load.share() == pytest.approx(0.3)
    monkeypatch.setattr(machine, "_busy_seconds", lambda: None)
    assert load.share() is None


def test_peak_memory_is_the_process_s_own() -> None:
    script = """
import numpy as np
from hardy.bench.work import peak_memory
before = peak_memory()
np.ones(200 * 2**17)
assert 190 <= peak_memory() - before <= 260, (before, peak_memory())
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# -------------------------------------------------------------------------------------------------------- the common work


def test_the_common_work_has_132_867_weights_and_its_settings() -> None:
    trainer = work.make(Work(num_envs=4, threads=1, num_steps=2))
    assert work.weights(trainer) == 132_867
    settings = trainer.settings
    assert (settings.ppo.n_epochs, settings.ppo.n_minibatches, settings.env.id) == (4, 4, "CartPoleNoVel-v1")
    assert (settings.policy.encoder, settings.policy.memory, settings.policy.memory_size) == ((128,), "lstm", 128)
    assert (settings.optimizer.name, settings.vgs.enabled, settings.normalizer.observation) == ("AdaptiveUPGD", True, True)
    assert next(iter(trainer.policy.parameters())).dtype == torch.float32
    assert Work(num_envs=4, threads=1).num_steps == 128


def test_the_weights_are_those_of_one_member() -> None:
    assert work.weights(work.make(Work(num_envs=4, population=3, threads=1, num_steps=2))) == 132_867


def test_speed_counts_whole_iterations_of_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = work.make(Work(num_envs=4, population=3, threads=1, num_steps=2, hidden=4))
    clock = {"now": 0.0}
    monkeypatch.setattr(work, "make", lambda _: trainer)
    monkeypatch.setattr(work.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(trainer, "iterate", lambda _: clock.update(now=clock["now"] + 2.0))
    # Three iterations of 2 s are needed for 5 s: 3 · (3 members · 4 environments · 2 steps) in 6 s.
    found = work.train(Work(num_envs=4, population=3, threads=1, num_steps=2, hidden=4, seconds=5.0))
    assert found.steps_per_second == pytest.approx(3 * 24 / 6)


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "command", lambda task, settings: [sys.executable, "-c", "import sys; sys.exit('no luck')"])
    with pytest.raises(BenchError, match=r"measuring training failed with status 1:\nno luck"):
        work.train_in_fresh_process(Work(num_envs=4, threads=1))


class Trained:
    """Stands for training in fresh processes: notes what was asked for, and is as fast and large as a formula says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
        self.asked: list[Work] = []
        for module in modules:
            monkeypatch.setattr(module, "train_in_fresh_process", self)

    def __call__(self, wanted: Work) -> Training:
        self.asked.append(wanted)
        speed = 1000.0 * wanted.threads * wanted.population / wanted.hidden
        return Training(steps_per_second=speed, weights=100, peak_mib=100.0 * wanted.population)


def test_throughput_takes_turns_and_gives_the_share_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(monkeypatch, throughput)
    monkeypatch.setattr(throughput, "seconds_per_call", lambda call, seconds: 2.0)  # 2 · 1024³ operations in 2 s
    (part,) = parts(throughput.measure, envs=(4, 8), population=(2,), seconds=3.0)
    assert [wanted.num_envs for wanted in trained.asked] == [4, 8, 4, 8]
    assert {(wanted.population, wanted.threads, wanted.seconds) for wanted in trained.asked} == {(2, 1, 3.0)}
    assert [found.name for found in part.measurements] == [
        "1 thread, N = 4, P = 2", "1 thread, N = 8, P = 2", "1 thread, matrix product",
    ]  # fmt: skip
    assert part.measurements[-1].median == pytest.approx(1024**3 / 1e9)
    assert [found.better for found in part.ratios] == ["higher"] * 2
    assert part.ratios[0].median == pytest.approx(500.0 / (1024**3 / (26 * 100)))


def test_throughput_trains_the_published_sizes_by_default() -> None:
    sizes = [(wanted.num_envs, wanted.population) for wanted in throughput.works(Options())]
    assert sizes == [(8, 1), (64, 1), (8, 8)]
    assert {wanted.threads for wanted in throughput.works(Options())} == {available_cores()}
    assert [(one.num_envs, one.population) for one in throughput.works(Options(population=(4,)))] == [(8, 4), (64, 4)]


def test_scaling_changes_one_thing_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(monkeypatch, scaling)
    monkeypatch.setattr(scaling, "available_cores", lambda: 6)
    hidden, unroll, threads = parts(scaling.measure, envs=(8,), repeats=1, hidden=128, threads=2)
    assert [found.label for found in hidden.measurements] == ["32", "64", "128", "256", "512"]
    assert [found.x for found in unroll.measurements] == [16, 32, 64, 128, 256, 512]
    assert [found.label for found in threads.measurements] == ["1", "2", "4", "6"]
    common = (8, 2, 128, 128)
    changed = [(one.num_envs, one.threads, one.num_steps, one.hidden) for one in trained.asked]
    assert all(sum(a != b for a, b in zip(one, common, strict=True)) <= 1 for one in changed)
    assert {found.name: found.median for found in threads.ratios} == {f"{n} over 1; threads, N = 8": n for n in (2, 4, 6)}
    assert [found.median for found in hidden.ratios] == [4.0, 2.0, 0.5, 0.25]
    assert [found.median for found in unroll.ratios] == [1.0] * 5


def test_threads_are_measured_where_there_is_little_to_do_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(monkeypatch, scaling)
    monkeypatch.setattr(scaling, "available_cores", lambda: 2)
    *_, many, few = parts(scaling.measure, repeats=1)
    assert [found.name for found in (*many.ratios, *few.ratios)] == ["2 over 1; threads, N = 64", "2 over 1; threads, N = 8"]
    assert {one.num_envs for one in trained.asked} == {64, 8}


def test_memory_is_compared_with_imports_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(monkeypatch, memory)
    monkeypatch.setattr(memory, "peak_of_imports", lambda: 50.0)
    (part,) = parts(memory.measure)
    assert [(one.num_envs, one.population, one.seconds) for one in trained.asked] == [(64, 1, 0.0), (64, 8, 0.0)] * 2
    assert [(found.label, found.median) for found in part.measurements] == [
        ("imports alone", 50.0), ("P = 1", 100.0), ("P = 8", 800.0),
    ]  # fmt: skip
    assert [(found.median, found.better) for found in part.ratios] == [(2.0, "lower"), (16.0, "lower")]


def test_a_population_is_measured_beside_one_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population, "take_turns", lambda calls, *_: {name: [float(name.split()[-1]) + 1] * 2 for name in calls})
    (part,) = parts(population.measure, envs=(4,), population=(3,))
    assert [found.name for found in part.measurements] == ["N = 4, 1 thread, P = 1", "N = 4, 1 thread, P = 3"]
    assert [found.median for found in part.measurements] == [4 * 128 / 2, 3 * 4 * 128 / 4]
    (cost,) = part.ratios
    assert (cost.name, cost.median, cost.better) == ("cost over one agent; P = 3, N = 4, 1 thread", 2.0, "lower")


def test_a_population_really_trains() -> None:
    (part,) = parts(population.measure, envs=(4,), population=(2,), repeats=1)
    assert all(found.median > 0 for found in (*part.measurements, *part.ratios))


# ------------------------------------------------------------------------------------------------------------- recurrence


def lstm_inputs(members: int, steps: int, envs: int, width: int) -> tuple[StackedRecurrent, Tensor, Tensor, Tensor]:
    layer = StackedRecurrent("lstm", width, width, 1, [torch.Generator().manual_seed(m) for m in range(members)])
    inputs, grad = torch.randn(2, members, steps, envs, width)
    return layer, inputs, torch.randn(members, envs, 2 * width), grad


def test_the_operations_are_those_of_the_matrix_products() -> None:
    steps, envs, inputs, hidden = 5, 3, 7, 11
    weight_ih, weight_hh = torch.randn(4 * hidden, inputs), torch.randn(4 * hidden, hidden)
    leaves = [weight_ih, weight_hh, x := torch.randn(steps, envs, inputs), h := torch.randn(envs, hidden)]
    for leaf in leaves:
        leaf.requires_grad_()
    cell = torch.zeros(envs, hidden)
    with FlopCounterMode(display=False) as counter:
        for step in range(steps):
            i, f, g, o = (x[step] @ weight_ih.T + h @ weight_hh.T).chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            h = o.sigmoid() * cell.tanh()
        torch.autograd.grad(h.sum(), leaves)
    assert counter.get_total_flops() == recurrence.flop(steps, envs, 1, inputs, hidden)
    assert recurrence.flop(steps, envs, 13, inputs, hidden) == 13 * recurrence.flop(steps, envs, 1, inputs, hidden)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_both_lstms_do_the_same_work(count: int) -> None:
    set_threads(2)
    layer, inputs, state, grad = lstm_inputs(2, 5, 3, 7)
    never = torch.zeros(2, 5, 3, dtype=torch.bool)
    ours = recurrence.hardy_lstm(layer, inputs, state, grad, never)()
    calls = recurrence.torch_lstm(layer, inputs, state, grad, parts=count, threads=1)()
    assert len(calls) == 2 * min(count, 3)
    for member in range(2):
        mine = calls[member * len(calls) // 2 : (member + 1) * len(calls) // 2]
        torch.testing.assert_close(torch.cat([call[0] for call in mine], dim=1), ours[0][member])
        for index in range(1, 5):
            torch.testing.assert_close(sum(call[index] for call in mine), ours[index][member], rtol=1e-4, atol=1e-5)


def test_episodes_start_one_after_the_other() -> None:
    starts = recurrence.episode_starts(128, 16, 22)
    for env in range(16):
        at = starts[:, env].nonzero()[:, 0]
        assert (at.diff() == 22).all()
        assert at[0] < 22
    assert starts[0].sum() == 1  # not all at once
    assert recurrence.episode_starts(128, 16, 400).sum() == 6  # a start every 25 steps, in one environment after the other


def test_hardy_s_lstm_is_given_the_resets() -> None:
    layer, inputs, state, grad = lstm_inputs(1, 6, 2, 3)
    starts = torch.zeros(1, 6, 2, dtype=torch.bool)
    without = recurrence.hardy_lstm(layer, inputs, state, grad, starts)()
    starts[0, 3] = True
    reset = recurrence.hardy_lstm(layer, inputs, state, grad, starts)()
    assert not torch.allclose(without[0], reset[0])


def test_the_recurrence_is_compared_with_torch_and_with_the_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "available_cores", lambda: 2)
    one, two = parts(recurrence.measure, envs=(2,), threads=None, repeats=1)
    names = ["matrix product", "torch.nn.LSTM, no resets", "Hardy, episodes of 22", "Hardy, episodes of 400"]
    assert [found.label for found in one.measurements] == names
    assert [found.label for found in two.measurements] == [*names[:2], "torch.nn.LSTM, no resets, shared out", *names[2:]]
    assert {found.group for found in two.measurements} == {"P = 1, N = 2, 2 threads"}
    assert (len(one.ratios), len(two.ratios)) == (4, 6)
    (ratio,) = [
        r for r in one.ratios if r.name == "Hardy, episodes of 400, over torch.nn.LSTM, no resets; P = 1, N = 2, 1 thread"
    ]
    speed = {found.label: found.median for found in one.measurements}
    assert ratio.median == pytest.approx(speed["Hardy, episodes of 400"] / speed["torch.nn.LSTM, no resets"])


def test_speed_is_operations_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "take_turns", lambda candidates, *_: {name: [0.5, 0.5] for name in candidates})
    (part,) = parts(recurrence.measure, envs=(3,), population=(2,), hidden=8)
    speed = {found.label: found.median for found in part.measurements}
    assert speed["matrix product"] == pytest.approx(2 * 1024**3 / 0.5e9)
    assert speed["Hardy, episodes of 22"] == pytest.approx(24 * 8 * 16 * 128 * 3 * 2 / 0.5e9)


# -------------------------------------------------------------------------------------------------------------- optimizer


def test_the_published_upgd_is_hardy_s_reference_without_noise() -> None:
    shapes = [(5, 3), (5,), (2, 5)]
    weights, gradients = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    numbers = {"lr": 0.05, "weight_decay": 0.1, "beta_utility": 0.9, "sigma": 0.0}
    moved = []
    for make in (lambda p: optimizer.PublishedUPGD(p, **numbers), lambda p: UPGD(p, **numbers, reference=True)):
        parameters = [nn.Parameter(weight.clone()) for weight in weights]
        step = make(parameters)
        for _ in range(3):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            step.step()
        moved.append([parameter.detach() for parameter in parameters])
    for published, ours, start in zip(*moved, weights, strict=True):
        torch.testing.assert_close(published, ours)
        assert not torch.equal(published, start)


def test_the_published_upgd_adds_noise_of_its_size() -> None:
    parameter = nn.Parameter(torch.zeros(20_000))
    parameter.grad = torch.zeros(20_000)
    parameter.data[0], parameter.grad[0] = 1.0, -1.0  # the largest utility; all others are 0, whose gate is a half
    optimizer.PublishedUPGD([parameter], lr=0.1, weight_decay=0.0, sigma=0.5).step()
    assert float(parameter.detach()[1:].std()) == pytest.approx(2 * 0.1 * 0.5 * 0.5, rel=0.03)


def test_every_optimizer_steps_and_is_compared() -> None:
    network = {"a": (5, 3), "b": (2, 5)}
    assert sum(torch.Size(shape).numel() for shape in optimizer.shapes_of(network).values()) == 15 + 5 + 10 + 2
    for step in optimizer.steps_of(network).values():
        step()


def test_the_networks_have_the_weights_they_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, network in optimizer.NETWORKS.items():
        count = sum(torch.Size(shape).numel() for shape in optimizer.shapes_of(network).values())
        assert name == f"{count:,} weights"
    monkeypatch.setattr(optimizer, "NETWORKS", {"few": {"a": (5, 3)}})
    (part,) = parts(optimizer.measure)
    assert {found.unit for found in part.measurements} == {"ms"}
    names = {found.name for found in part.ratios}
    assert {
        f"{ours} over {theirs}; few, 1 thread"
        for ours in ("UPGD", "AdaptiveUPGD")
        for theirs in ("AdamW(foreach=True)", "AdamW(fused=True)")
    } <= names
    assert "UPGD over published UPGD, loop; few, 1 thread" in names
    assert {found.better for found in part.ratios} == {"lower"}


# ----------------------------------------------------------------------------------------------------------- environments


def test_environments_are_stepped_beside_gymnasium() -> None:
    found = parts(environments.measure, envs=(3,))
    assert [[one.name for one in part.ratios] for part in found] == [
        [
            "Hardy over gymnasium SyncVectorEnv; CartPole-v1, N = 3",
            "Hardy over gymnasium's vector environment; CartPole-v1, N = 3",
        ],
        ["Hardy over gymnasium SyncVectorEnv; Pendulum-v1, N = 3"],
        ["Hardy over gymnasium SyncVectorEnv; MountainCar-v0, N = 3"],
        ["Hardy over gymnasium SyncVectorEnv; MountainCarContinuous-v0, N = 3"],
    ]
    assert all(one.unit == "steps/s" for part in found for one in part.measurements)


def test_environment_steps_are_those_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "take_turns", lambda calls, *_: {name: [0.25, 0.25] for name in calls})
    assert [one.median for part in parts(environments.measure, envs=(3,)) for one in part.measurements] == [12.0] * 9
