"""The compiled step against the chain it replaces: every choice of structure, every instruction set, threads, members."""

from __future__ import annotations

import functools
import itertools
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from instruction_sets import LEVELS
from torch import Tensor

from hardy.config import tunables
from hardy.optim import UPGD, UPGDW, AdaptiveUPGD, OptimizerSettings, PopulationOptimizer, VarianceGradientScaler, VGSSettings
from hardy.optim import compiled as library
from hardy.optim.noise import KeyedNormal, standard_normal
from hardy.optim.transforms import Step, TensorOptions
from hardy.optim.upgd import upgd
from hardy.parallel import set_threads
from hardy.population import MemberGenerators, expand, leaves

NAMES = ("AdaptiveUPGD", "UPGD", "UPGDW")
CLASSES: dict[str, type] = {"AdaptiveUPGD": AdaptiveUPGD, "UPGD": UPGD, "UPGDW": UPGDW}
# More than one block of 4096, rows across blocks, odd rests, a scalar, and one tensor of a single number.
SHAPES = {"actor.weight": (67, 131), "actor.bias": (67,), "critic.weight": (2, 5), "critic.scale": (), "core.row": (9001,)}
VGS = {
    "off": {"enabled": False},
    "ema": {"warmup_steps": 1, "beta": 0.9, "alpha": 0.3},
    "microbatch": {"warmup_steps": 0, "estimator": "microbatch", "scope": "tensor", "alpha": 0.3},
    "global": {"warmup_steps": 2, "scope": "global", "beta": 0.4, "min_scale": 0.5},
}


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HARDY_COMPILED", raising=False)
    yield
    set_threads(1)


class Run:
    """A population through a few steps: inactive members, a missing gradient, numbers that differ between members."""

    def __init__(self, members: list[int], settings: dict[str, Any], vgs: dict[str, Any], dtype: torch.dtype = torch.float32):
        everyone = torch.Generator().manual_seed(1)
        weights = {n: (torch.randn(3, *s, generator=everyone) * 0.3)[members].to(dtype) for n, s in SHAPES.items()}
        self.weights, self.members, self.everyone, self.dtype = weights, members, everyone, dtype
        optimizer, scaler = OptimizerSettings(**settings), VGSSettings(**vgs)
        with warnings.catch_warnings(action="ignore"):  # fixed noise under VGS
            self.optimizer = PopulationOptimizer({n: w.shape for n, w in weights.items()}, optimizer, scaler)
        self.state = self.optimizer.init(weights)
        numbers = {f"optimizer.{k}": v for k, v in tunables(optimizer).items()}
        numbers |= {f"vgs.{k}": v for k, v in tunables(scaler).items()}
        self.hyper = {name: expand(value, len(members)) for name, value in numbers.items()}
        for name, values in {
            "optimizer.lr": [0.01, 0.03, 0.05], "optimizer.sigma": [0.05, 0.0, 0.1], "vgs.beta": [0.9, 0.8, 0.3],
            "optimizer.max_grad_norm": [0.5, 500.0, 60.0], "optimizer.step_factor": [1.0, 2.0, 1.5],
            "optimizer.weight_decay": [0.1, 0.0, 0.3],
        }.items():  # fmt: skip
            self.hyper[name] = torch.tensor(values)[members]
        self.noise = MemberGenerators(members, "noise")
        self.metrics: list[dict[str, Tensor]] = []

    def gradients(self, number: int) -> dict[str, Tensor]:
        """The same for a member in any population; without one tensor's in step 4."""
        every = {n: torch.randn(3, *s, generator=self.everyone) + 0.3 for n, s in SHAPES.items()}
        return {n: g[self.members].to(self.dtype) for n, g in every.items() if number != 4 or n != "actor.bias"}

    def step(self, gradients: dict[str, Tensor], active: list[bool]) -> None:
        if self.optimizer.vgs.enabled and self.optimizer.vgs.estimator == "microbatch":
            for share in (0.25, 0.75):
                self.optimizer.observe_microbatch({n: share * g + share - 0.5 for n, g in gradients.items()}, self.state)
        chosen = torch.tensor(active)
        found = self.optimizer.step_(self.weights, gradients, self.state, self.hyper, self.noise, chosen)
        self.metrics.append({name: value[chosen] for name, value in found.items()})

    def steps(self, count: int = 6) -> Run:
        for number in range(count):
            self.step(self.gradients(number), [number != 3 or member != 1 for member in self.members])
        return self

    def tensors(self) -> list[Tensor]:
        return [*self.weights.values(), *(leaf.tensor for leaf in leaves(self.state)), self.noise.get_state()]


def without_library(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setenv("HARDY_COMPILED", "0")
        return function()


def at_level(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    monkeypatch.setattr(library, "Call", functools.partial(library.Call, level=level))


def assert_same(found: Run, expected: Run) -> None:
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        if one.is_floating_point():
            scale = float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6 * scale)
        else:
            assert torch.equal(one, other)
    for one_step, other_step in zip(found.metrics, expected.metrics, strict=True):
        assert list(one_step) and set(one_step) == set(other_step)
        for name, value in one_step.items():
            torch.testing.assert_close(value, other_step[name], rtol=1e-4, atol=1e-7, msg=name)


def test_the_library_is_built_where_there_is_a_compiler() -> None:
    compiler = sysconfig.get_config_var("CXX") or "c++"
    assert library.available() or shutil.which(compiler.split()[0]) is None, (
        "not built: pip install -e . (or python setup.py build_ext --inplace)"
    )


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARDY_COMPILED", "0")
    assert not library.available()
    monkeypatch.setattr(library, "Call", None)  # calling it would fail
    Run([0, 1], {}, {}).steps(1)


def a_step(dtype: torch.dtype = torch.float32, **replaced: Any) -> Step:
    hyper = {name: torch.full((1, 1), 0.5, dtype=torch.float64) for name in ("lr", "sigma", "beta_utility", "step_factor")}
    given = {"weights": [torch.ones(1, 3, 5, dtype=dtype)], "gradients": [torch.ones(1, 3, 5, dtype=dtype)]}
    source = KeyedNormal(lambda: torch.tensor([1]))
    return Step(**{"names": ["w"], "hyper": hyper, "options": [TensorOptions()], "standard_normal": source} | given | replaced)


def test_it_is_for_float32_on_the_cpu_in_memory_without_gaps() -> None:
    def supported(step: Step) -> bool:
        return library.supports(step, upgd("UPGD").init({"w": step.weights[0]}))

    gaps = torch.ones(1, 5, 3).mT
    assert supported(a_step()) == library.available()
    assert supported(a_step(gradients=[gaps])) == library.available()
    assert not supported(a_step(weights=[gaps]))
    assert not supported(a_step(torch.float64))
    assert not supported(a_step(gradients=[torch.ones(1, 3, 5, dtype=torch.float64)]))
    assert not supported(a_step(weights=[torch.ones(1, 3, 5, device="meta")]))
    assert not supported(a_step(standard_normal=lambda tensors: [torch.randn_like(t) for t in tensors]))
    if library.available():
        state = upgd("UPGD").init({"w": torch.ones(1, 3, 5)})
        state.utility["w"] = gaps
        assert not library.supports(a_step(), state)


def test_other_dtypes_take_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "Call", None)  # calling it would fail
    Run([0, 1], {}, {}, torch.float64).steps(1)


if library.available():

    @pytest.mark.parametrize("vgs", VGS)
    @pytest.mark.parametrize("gating", ["global", "local", "none"])
    @pytest.mark.parametrize("name", NAMES)
    def test_it_equals_the_chain(name: str, gating: str, vgs: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for level, (protecting, adaptive) in enumerate(itertools.product([True, False], [True, False])):
            settings = {
                "name": name, "gating": gating, "protecting": protecting, "adaptive_noise": adaptive, "weight_decay": 0.1,
                "overrides": {"critic": {"gating": "none"}, "core": {"noise": False}, "actor.bias": {"gating": "global"}},
            }  # fmt: skip
            expected = without_library(monkeypatch, lambda s=settings: Run([0, 1, 2], s, VGS[vgs]).steps())
            with monkeypatch.context() as patch:
                at_level(patch, level % 3)
                assert_same(Run([0, 1, 2], settings, VGS[vgs]).steps(), expected)

    @pytest.mark.parametrize("reference", [True, False])
    @pytest.mark.parametrize("name", NAMES)
    def test_it_equals_the_chain_in_an_ordinary_optimizer(name: str, reference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        def run() -> list[Any]:
            torch.manual_seed(4)
            parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES.values()]
            scaler = (
                None if reference else VarianceGradientScaler({str(k): p for k, p in enumerate(parameters)}, warmup_steps=1)
            )
            groups = [
                {"params": parameters[:2], "sigma": 0.3},
                {"params": parameters[2:4], "gating": "local", "lr": 0.2, "weight_decay": 0.1},
                {"params": parameters[4:], "gating": "none", "sigma": 0.0, "beta_utility": 0.0},
            ]
            generator = torch.Generator().manual_seed(8)
            optimizer = CLASSES[name](groups, lr=0.1, reference=reference, gradient_scaler=scaler, generator=generator)
            for _ in range(5):
                for p in parameters:
                    p.grad = torch.randn_like(p)
                optimizer.step()
            states = [optimizer.state[p][key] for p in parameters for key in sorted(optimizer.state[p])]
            return [*(p.detach() for p in parameters), *states, *(torch.tensor(v) for v in optimizer.diagnostics.values())]

        expected = without_library(monkeypatch, run)
        for one, other in zip(run(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)

    @pytest.mark.parametrize("vgs", ["ema", "microbatch"])
    @pytest.mark.parametrize("level", LEVELS)
    def test_members_are_independent_bit_for_bit(level: int, vgs: str, monkeypatch: pytest.MonkeyPatch) -> None:
        at_level(monkeypatch, level)
        together = Run([0, 1, 2], {}, VGS[vgs]).steps()
        for member in range(3):
            alone = Run([member], {}, VGS[vgs]).steps()
            for one, other in zip(together.tensors(), alone.tensors(), strict=True):
                assert torch.equal(one[member], other[0])

    @pytest.mark.parametrize("gating", ["global", "local"])
    @pytest.mark.parametrize("members", [[0], [0, 1, 2]])
    def test_threads_change_nothing(members: list[int], gating: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "SMALLEST_PART", 1)
        runs = []
        for threads in (1, 2, 3, 5):
            set_threads(threads)
            runs.append(Run(members, {"gating": gating}, VGS["ema"]).steps())
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0].tensors(), other.tensors(), strict=True))
            for a, b in zip(runs[0].metrics, other.metrics, strict=True):
                assert all(torch.equal(value, b[name]) for name, value in a.items())

    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("members", [1, 3])
    def test_squares_are_summed_by_member(members: int, level: int) -> None:
        tensors = [torch.randn(members, *shape) for shape in ((3, 5), (1,), (97, 101), (0,))]
        found = library.member_squares(tensors, 2, level)
        assert found is not None
        torch.testing.assert_close(found, sum(t.double().flatten(1).square().sum(1) for t in tensors), rtol=1e-6, atol=0)
        for spoiled, wanted in ((torch.nan, torch.nan), (-torch.inf, torch.inf), (1e30, torch.inf)):
            tensors[2][0, -1, -1] = spoiled
            torch.testing.assert_close(
                library.member_squares(tensors, 2, level)[0].float(), torch.tensor(wanted), equal_nan=True
            )
            torch.testing.assert_close(library.member_squares(tensors, 2, level)[1:], found[1:], rtol=0, atol=0)

    def test_squares_are_of_float32_on_the_cpu_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
        whole = torch.ones(2, 6)
        assert library.member_squares([whole]) is not None
        for other in (whole.double(), whole[:, ::2], whole.to("meta")):
            assert library.member_squares([whole, other]) is None
        for nobody in ([], [whole[:0]]):
            assert library.member_squares(nobody) is None
        monkeypatch.setenv("HARDY_COMPILED", "0")
        assert library.member_squares([whole]) is None

    def test_threads_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []

        monkeypatch.setattr(library, "_upgd", lambda problem, what: seen.append(problem.threads))
        set_threads(3)
        for smallest in (10**9, 1):
            monkeypatch.setattr(library, "SMALLEST_PART", smallest)
            Run([0], {}, {}).steps(1)
        assert seen == [1, 3]

    def test_an_inactive_member_is_not_looked_at() -> None:
        run = Run([0, 1, 2], {}, VGS["ema"]).steps(1)
        before = [tensor[1].clone() for tensor in run.tensors()]
        gradients = run.gradients(1)
        for gradient in gradients.values():
            gradient[1] = torch.nan
        metrics = run.optimizer.step_(
            run.weights, gradients, run.state, run.hyper, run.noise, torch.tensor([True, False, True])
        )
        assert all(torch.equal(tensor[1], old) for tensor, old in zip(run.tensors(), before, strict=True))
        assert all(value[1].isnan() and value[[0, 2]].isfinite().all() for value in metrics.values())

    @pytest.mark.parametrize("sign", [1.0, 0.0, -1.0])
    @pytest.mark.parametrize("level", LEVELS)
    def test_no_positive_utility(level: int, sign: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """Gates follow U/max |U| where all utilities are negative, and are ½ where all are 0."""
        at_level(monkeypatch, level)
        p = torch.nn.Parameter(torch.tensor([1.0, 0.5, 0.25]))
        optimizer = UPGDW([p], lr=1.0, weight_decay=0.0, sigma=0.0)
        p.grad = -sign * torch.ones(3)
        optimizer.step()
        gate = torch.sigmoid(-sign * torch.tensor([1.0, 0.5, 0.25]))
        torch.testing.assert_close(p.detach(), torch.tensor([1.0, 0.5, 0.25]) + sign * gate)
        assert optimizer.diagnostics["upgd/utility_max"] == pytest.approx(max(sign, sign * 0.25))

    @pytest.mark.parametrize("level", LEVELS)
    def test_gates_are_accurate_from_tiny_to_huge(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
        at_level(monkeypatch, level)
        utility = torch.cat([torch.linspace(-40, 1, 5000), -torch.logspace(-6, 6, 1000)])
        p = torch.nn.Parameter(utility.clone())
        optimizer = UPGDW([p], lr=1.0, weight_decay=0.0, sigma=0.0, beta_utility=0.0)
        p.grad = -torch.ones_like(p)
        optimizer.step()
        # A weight of 0 would show the gate itself; take the start away in double precision, where it is not too large.
        near = utility.abs() < 1
        moved = p.detach().double() - utility.double()
        torch.testing.assert_close(moved[near], torch.sigmoid(-utility.double())[near], rtol=0, atol=1.5e-7)
        torch.testing.assert_close(p.detach(), utility + torch.sigmoid(-utility), rtol=3e-7, atol=3e-7)

    def test_a_gradient_that_is_not_finite_spoils_only_its_member() -> None:
        clean, spoiled = Run([0, 1, 2], {}, VGS["ema"]).steps(1), Run([0, 1, 2], {}, VGS["ema"]).steps(1)
        for run in (clean, spoiled):
            gradients = run.gradients(1)
            if run is spoiled:
                gradients["core.row"][1, 77] = torch.nan
            run.step(gradients, [True, True, True])
        for one, other in zip(spoiled.tensors(), clean.tensors(), strict=True):
            assert torch.equal(one[[0, 2]], other[[0, 2]])
        assert spoiled.weights["core.row"][1, 77].isnan()
        assert spoiled.metrics[-1]["train/grad_norm"].isnan().tolist() == [False, True, False]

    def test_gradients_in_any_memory_order_are_left_alone() -> None:
        gradient = torch.randn(1, 5, 3).mT
        before = gradient.clone()
        results = []
        for given in (gradient, gradient.contiguous()):
            step = a_step(gradients=[given], standard_normal=KeyedNormal(lambda: torch.tensor([1])))
            library.Call(step, upgd("UPGD").init({"w": step.weights[0]}), "UPGD")(step.gradients)
            results.append(step.weights[0])
        assert torch.equal(*results) and torch.equal(gradient, before)
        expected = standard_normal(torch.tensor([1]), [torch.empty(1, 3, 5)])[0]
        assert expected.shape == results[0].shape

    def test_memory_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library._upgd, "_found", lambda structure: 1)
        with pytest.raises(MemoryError, match="the step of 17856 weights"):
            Run([0], {}, {}).steps(1)

    def test_too_few_microbatches_are_refused_before_anything_happens() -> None:
        run = Run([0, 1], {}, VGS["microbatch"])
        before = [tensor.clone() for tensor in run.tensors()]
        with pytest.raises(RuntimeError, match="at least 2 recorded microbatches per update, got 0"):
            run.optimizer.step_(run.weights, run.gradients(0), run.state, run.hyper, run.noise, torch.tensor([True, True]))
        assert all(torch.equal(a, b) for a, b in zip(run.tensors(), before, strict=True))


@pytest.mark.parametrize("compiled_step", ["0", "1"])
def test_a_member_without_noise_takes_none_from_the_others(compiled_step, monkeypatch):
    monkeypatch.setenv("HARDY_COMPILED", compiled_step)
    run = Run([1, 2], {}, {}).steps(1)
    without, with_noise = run.metrics[0]["upgd/noise_to_signal"].tolist()
    assert without == 0
    assert with_noise == pytest.approx(0.1, rel=0.3)
