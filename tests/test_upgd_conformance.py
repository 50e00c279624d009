"""What every optimizer has to do, for one model and for a population."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hardy.config import tunables
from hardy.optim import UPGD, UPGDW, AdaptiveUPGD, OptimizerSettings, PopulationOptimizer, VarianceGradientScaler, VGSSettings
from hardy.optim.population_optimizer import OptimizerState
from hardy.population import MemberGenerators, expand, exploit_, leaves

NAMES = ["AdaptiveUPGD", "UPGD", "UPGDW"]
CLASSES: dict[str, type] = {"AdaptiveUPGD": AdaptiveUPGD, "UPGD": UPGD, "UPGDW": UPGDW}
SHAPES = {"actor.weight": (5, 7), "actor.bias": (5,), "critic.weight": (2, 5), "critic.scale": ()}


class Population:
    """A population of P copies of a few tensors, with everything a step needs."""

    def __init__(self, size: int, optimizer: dict[str, Any], vgs: dict[str, Any], dtype: torch.dtype = torch.float64) -> None:
        settings, vgs_settings = OptimizerSettings(**optimizer), VGSSettings(**vgs)
        generator = torch.Generator().manual_seed(7)
        self.parameters = {n: torch.randn(size, *s, generator=generator, dtype=dtype) for n, s in SHAPES.items()}
        self.optimizer = PopulationOptimizer({n: p.shape for n, p in self.parameters.items()}, settings, vgs_settings)
        self.state = self.optimizer.init(self.parameters)
        numbers = {f"optimizer.{k}": v for k, v in tunables(settings).items()}
        numbers |= {f"vgs.{k}": v for k, v in tunables(vgs_settings).items()}
        self.hyper = {name: expand(value, size, dtype=dtype) for name, value in numbers.items()}
        self.noise = MemberGenerators(list(range(size)), "noise")
        self.everyone = torch.ones(size, dtype=torch.bool)

    def step(self, gradients: dict[str, Tensor], active: Tensor | None = None) -> dict[str, Tensor]:
        chosen = self.everyone if active is None else active
        return self.optimizer.step_(self.parameters, gradients, self.state, self.hyper, self.noise, chosen)

    def rows(self, members: list[int]) -> list[Tensor]:
        """Parameters, state and generators of some members."""
        tensors = [*self.parameters.values(), *(leaf.tensor for leaf in leaves(self.state)), self.noise.get_state()]
        return [tensor[members].clone() for tensor in tensors]


def random_gradients(size: int, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(size, *s, generator=generator, dtype=dtype) for n, s in SHAPES.items()}


def one_face(name: str, size: int, dtype: torch.dtype) -> tuple[list[Tensor], Callable[[dict[str, Tensor]], None]]:
    """A population, or one model (``size`` 0), as tensors and a function that steps them."""
    if size:
        settings = {"name": name, "lr": 0.1, "sigma": 0.01, "max_grad_norm": 100.0}
        population = Population(size, settings, {"enabled": False}, dtype)

        def step_population(gradients: dict[str, Tensor]) -> None:
            population.step(gradients)

        return list(population.parameters.values()), step_population
    parameters = {n: torch.nn.Parameter(torch.randn(s, dtype=dtype)) for n, s in SHAPES.items()}
    optimizer = CLASSES[name](parameters.values(), lr=0.1, sigma=0.01)

    def step_model(gradients: dict[str, Tensor]) -> None:
        for key, p in parameters.items():
            p.grad = gradients[key]
        optimizer.step()

    return list(parameters.values()), step_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_descends_a_quadratic_and_keeps_dtype_and_storage(name: str, size: int, dtype: torch.dtype) -> None:
    tensors, step = one_face(name, size, dtype)
    addresses = [t.data_ptr() for t in tensors]
    before = sum(float(t.detach().square().sum()) for t in tensors)
    for _ in range(60):
        step(dict(zip(SHAPES, (t.detach().clone() for t in tensors), strict=True)))
    after = sum(float(t.detach().square().sum()) for t in tensors)
    assert after < 0.3 * before
    assert [t.data_ptr() for t in tensors] == addresses
    assert {t.dtype for t in tensors} == {dtype}


@pytest.mark.parametrize("name", NAMES)
def test_golden_values(name: str) -> None:
    weight, gradient = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)
    p = torch.nn.Parameter(weight.clone())
    p.grad = gradient.clone()
    CLASSES[name]([p], lr=0.1, sigma=0.0, weight_decay=0.5).step()
    gate = torch.tensor([1 / (1 + 2.718281828459045), 0.5, 0.5], dtype=torch.float64)  # U/η = (1, 0, 0)
    if name == "AdaptiveUPGD":
        expected = 0.95 * weight - 0.1 * gate * torch.tensor([-3 / 3.00001, 0.0, 4 / 4.00001], dtype=torch.float64)
    elif name == "UPGDW":
        expected = 0.95 * weight - 0.1 * gate * gradient
    else:
        expected = weight - 0.1 * gate * torch.tensor([-2.5, 1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("adaptive_noise", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_population_of_three_equals_three_ordinary_optimizers(name: str, adaptive_noise: bool) -> None:
    settings = {"name": name, "lr": 0.02, "sigma": 0.05, "weight_decay": 0.1, "adaptive_noise": adaptive_noise}
    population = Population(3, settings, {"enabled": adaptive_noise, "warmup_steps": 2, "alpha": 0.1, "beta": 0.9})
    lrs = [0.02, 0.05, 0.1]
    population.hyper["optimizer.lr"] = torch.tensor(lrs, dtype=torch.float64)
    models, optimizers = [], []
    for member, lr in enumerate(lrs):
        model = {n: torch.nn.Parameter(p[member].clone()) for n, p in population.parameters.items()}
        scaler = VarianceGradientScaler(model, alpha=0.1, warmup_steps=2, beta=0.9) if adaptive_noise else None
        optimizers.append(
            CLASSES[name](
                model.values(), lr=lr, sigma=0.05, weight_decay=0.1, beta_utility=0.999, adaptive_noise=adaptive_noise,
                max_grad_norm=0.5, generator=population.noise.generators[member].clone_state(), gradient_scaler=scaler,
            )
        )  # fmt: skip
        models.append(model)
    for seed in range(6):
        gradients = random_gradients(3, seed)
        metrics = population.step(gradients)
        for member, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for key, p in model.items():
                p.grad = gradients[key][member].clone()
            optimizer.step()
            for key, value in optimizer.diagnostics.items():
                assert float(metrics[key][member]) == pytest.approx(value, rel=1e-9)
    for member, model in enumerate(models):
        for key, p in model.items():
            torch.testing.assert_close(population.parameters[key][member], p.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["ema", "microbatch"])
@pytest.mark.parametrize("name", NAMES)
def test_an_inactive_member_keeps_every_bit_and_a_nan_disturbs_nobody(name: str, estimator: str) -> None:
    vgs = {"warmup_steps": 0, "estimator": estimator}
    disturbed, clean = (Population(3, {"name": name, "sigma": 0.05}, vgs) for _ in range(2))

    def update(population: Population, gradients: dict[str, Tensor], active: Tensor | None = None) -> None:
        if estimator == "microbatch":
            for share in (0.25, 0.75):
                part = {n: share * g for n, g in gradients.items()}
                population.optimizer.observe_microbatch(part, population.state)
        population.step(gradients, active)

    for population in (disturbed, clean):
        update(population, random_gradients(3, 0))
    before = disturbed.rows([1])
    gradients = random_gradients(3, 1)
    update(clean, gradients)
    for g in gradients.values():
        g[1] = torch.nan
    update(disturbed, gradients, torch.tensor([True, False, True]))
    assert all(torch.equal(a, b) for a, b in zip(disturbed.rows([1]), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(disturbed.rows([0, 2]), clean.rows([0, 2]), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(clean.rows([1]), before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_is_copied_by_an_exploit_and_storage_stays(name: str) -> None:
    population = Population(3, {"name": name, "sigma": 0.05}, {"warmup_steps": 0})
    addresses = [leaf.tensor.data_ptr() for leaf in leaves(population.state)]
    for seed in range(2):
        population.step(random_gradients(3, seed), torch.tensor([True, seed == 0, True]))
    exploit_(population.state, torch.tensor([0, 2, 2]))
    found = list(leaves(population.state))
    assert {leaf.path.split(".")[0] for leaf in found} == {"upgd", "vgs"}
    assert all(torch.equal(leaf.tensor[1], leaf.tensor[2]) for leaf in found)
    assert [leaf.tensor.data_ptr() for leaf in found] == addresses
    assert population.state.upgd.step.tolist()[1] == [2] * len(SHAPES)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_gradient_keeps_its_value_and_state(name: str) -> None:
    population = Population(2, {"name": name, "weight_decay": 0.1, "sigma": 0.1}, {"warmup_steps": 0})
    population.step(random_gradients(2, 0))
    gradients = random_gradients(2, 1)
    idle = "actor.bias"
    del gradients[idle]
    column = list(SHAPES).index(idle)
    state = population.state
    assert state.vgs is not None
    kept = [population.parameters[idle], state.upgd.utility[idle], state.vgs.mean[idle]]
    kept += [matrix[:, column] for matrix in (state.upgd.step, state.vgs.steps, state.vgs.second_moment, state.vgs.variance)]
    before, other = [t.clone() for t in kept], population.parameters["actor.weight"].clone()
    population.step(gradients)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    assert not torch.equal(population.parameters["actor.weight"], other)
    assert state.upgd.step[:, 0].tolist() == [2, 2]
    assert population.step({}) == {}


def test_overrides_choose_gating_and_noise_by_prefix() -> None:
    overrides = {
        "critic": {"gating": "none"},
        "critic.scale": {"gating": "local", "noise": False},
        "actor.bias": {"noise": False},
    }
    population = Population(1, {"overrides": overrides}, {})
    options = dict(zip(SHAPES, population.optimizer.options, strict=True))
    assert {n: (o.gating, o.noise) for n, o in options.items()} == {
        "actor.weight": ("global", True),
        "actor.bias": ("global", False),
        "critic.weight": ("none", True),
        "critic.scale": ("local", False),
    }
    with pytest.raises(ValueError, match=r"'critc'; prefixes are actor, actor\.bias.*did you mean 'critic'"):
        Population(1, {"overrides": {"critc": {}}}, {})


def test_what_does_not_fit_is_refused() -> None:
    population = Population(2, {}, {})
    with pytest.raises(ValueError, match="same P"):
        PopulationOptimizer({"a": torch.Size([2]), "b": torch.Size([3])}, OptimizerSettings(), VGSSettings())
    with pytest.raises(ValueError, match="in this order, with P = 2"):
        population.optimizer.init({n: p[:1] for n, p in population.parameters.items()})
    del population.hyper["vgs.alpha"]
    with pytest.raises(KeyError, match=r"vgs\.alpha"):
        population.step(random_gradients(2, 0))
    with pytest.raises(RuntimeError, match="estimator = 'microbatch'"):
        population.optimizer.observe_microbatch(random_gradients(2, 0), population.state)


def test_members_without_sigma_draw_nothing() -> None:
    population = Population(3, {"sigma": 0.1}, {})
    population.hyper["optimizer.sigma"][1] = 0.0
    before = population.noise.get_state()
    metrics = population.step(random_gradients(3, 0))
    after = population.noise.get_state()
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [False, True, False]
    assert float(metrics["upgd/noise_to_signal"][1]) == 0.0
    assert float(metrics["upgd/noise_to_signal"][0]) > 0.0


def test_vgs_off_leaves_no_statistics() -> None:
    population = Population(2, {}, {"enabled": False})
    assert isinstance(population.state, OptimizerState)
    assert population.state.vgs is None
    assert not any(name.startswith("vgs") for name in population.step(random_gradients(2, 0)))
