"""Every row of "Gradient path" of the composition contract, on the population; each test names its row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardy.config import tunables
from hardy.optim import OptimizerSettings, PopulationOptimizer, VGSSettings
from hardy.population import MemberGenerators, expand

NAMES = ["AdaptiveUPGD", "UPGD", "UPGDW"]
SHAPES = {"actor.weight": (5, 7), "critic.weight": (3, 11)}


class Path:
    """Two members' weights, kept still, so that the size of every update can be read off."""

    def __init__(self, size: int = 2, shapes: dict[str, tuple[int, ...]] = SHAPES, **changes: Any) -> None:
        vgs = {"warmup_steps": 0, **changes.pop("vgs", {})}
        plain = {"lr": 0.1, "sigma": 0.0, "weight_decay": 0.0, "max_grad_norm": 1e9}
        sections = {"optimizer": OptimizerSettings(**{**plain, **changes}), "vgs": VGSSettings(**vgs)}
        generator = torch.Generator().manual_seed(3)
        self.shapes = shapes
        self.start = {n: torch.randn(size, *s, dtype=torch.float64, generator=generator) for n, s in shapes.items()}
        self.weights = {n: w.clone() for n, w in self.start.items()}
        self.optimizer = PopulationOptimizer(
            {n: w.shape for n, w in self.start.items()}, sections["optimizer"], sections["vgs"]
        )
        self.state = self.optimizer.init(self.weights)
        numbers = {f"{k}.{name}": v for k, section in sections.items() for name, v in tunables(section).items()}
        self.hyper = {name: expand(value, size, dtype=torch.float64) for name, value in numbers.items()}
        self.noise = MemberGenerators(range(size), "noise")
        self.active = torch.ones(size, dtype=torch.bool)
        self.metrics: dict[str, Tensor] = {}

    def move(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """What one update adds to the weights; they go back to the start."""
        self.metrics = self.optimizer.step_(self.weights, gradients, self.state, self.hyper, self.noise, self.active)
        moved = {n: w - self.start[n] for n, w in self.weights.items()}
        for n, w in self.weights.items():
            w.copy_(self.start[n])
        return moved


def draw(seed: int, size: int = 2, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(size, *s, dtype=torch.float64, generator=generator) for n, s in shapes.items()}


def alternating(updates: int) -> list[dict[str, Tensor]]:
    """Gradients of no signal at all: the factor is ``min_scale``."""
    fixed = draw(1)
    return [{n: g * (-1) ** t for n, g in fixed.items()} for t in range(updates)]


def assert_moves(got: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0, rtol: float = 1e-9) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], factor * value, rtol=rtol, atol=1e-15)


# V alone


def test_v_variance_is_over_updates_and_not_over_elements() -> None:
    path, gradients = Path(), draw(1)
    for _ in range(5):
        path.move(gradients)
    assert path.metrics["vgs/normalized_variance"].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert path.metrics["vgs/scaling_factor"].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.01])
def test_v_measures_the_raw_gradient_before_clip_and_scale(max_grad_norm: float) -> None:
    path = Path(max_grad_norm=max_grad_norm)
    for seed in range(20):
        path.move({n: (1 + seed) * g for n, g in draw(seed % 2).items()})
    # Sizes from 1 to 20 count as they came: equal norms, as after a clip, or shrunken ones would give other figures.
    raw = Path(vgs={"alpha": 0.0})
    for seed in range(20):
        raw.move({n: (1 + seed) * g for n, g in draw(seed % 2).items()})
    torch.testing.assert_close(path.metrics["vgs/normalized_variance"], raw.metrics["vgs/normalized_variance"])
    clipped = Path()
    for seed in range(20):
        clipped.move(draw(seed % 2))
    assert ((path.metrics["vgs/normalized_variance"] / clipped.metrics["vgs/normalized_variance"] - 1).abs() > 0.02).all()


@pytest.mark.parametrize("ratio", [0.09, 1.0])
def test_v_the_square_of_an_averaged_mean_still_holds_noise(ratio: float) -> None:
    shapes = {"w": (20_000,)}
    path, mean = Path(1, shapes, vgs={"beta": 0.9}), draw(0, 1, shapes)["w"]
    for seed in range(60):
        path.move({"w": mean + ratio**0.5 * draw(seed + 1, 1, shapes)["w"]})
    assert path.metrics["vgs/normalized_variance"].item() == pytest.approx(ratio, rel=0.05)
    assert path.state.vgs is not None
    mean_square = path.state.vgs.mean["w"].square().sum()
    uncorrected = ((path.state.vgs.second_moment - mean_square) / mean_square).item()
    assert abs(uncorrected / ratio - 1) > 0.05, "without the correction the bar is missed"


def test_v_tiny_signals_do_not_block_learning() -> None:
    path = Path(vgs={"min_scale": 0.01})
    for gradients in alternating(4):
        path.move({n: 1e-9 * g for n, g in gradients.items()})
    assert path.metrics["vgs/scaling_factor"].tolist() == [0.01, 0.01]
    assert path.metrics["vgs/normalized_variance"].isfinite().all()
    for _ in range(3):
        moved = path.move({n: torch.zeros_like(g) for n, g in draw(0).items()})
    assert all(m.isfinite().all() for m in moved.values())


@given(exponent=st.integers(-6, 6), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=10)
def test_v_the_factor_ignores_the_scale_of_the_loss(exponent: int, seed: int) -> None:
    one, other = Path(), Path()
    for step in range(4):
        gradients = draw(seed + step)
        one.move(gradients)
        other.move({n: 10.0**exponent * g for n, g in gradients.items()})
    torch.testing.assert_close(one.metrics["vgs/scaling_factor"], other.metrics["vgs/scaling_factor"], rtol=1e-9, atol=0)


# V × A, V × U, V × G


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.01])
@pytest.mark.parametrize("scale", [0.5, 0.01])
@pytest.mark.parametrize("name", NAMES)
def test_v_a_and_v_g_the_step_shrinks_by_the_factor(name: str, scale: float, max_grad_norm: float) -> None:
    scaled, plain = (Path(name=name, max_grad_norm=max_grad_norm, vgs={"min_scale": s}) for s in (scale, 1.0))
    for gradients in alternating(4):
        got, expected = scaled.move(gradients), plain.move(gradients)
    assert scaled.metrics["vgs/scaling_factor"].tolist() == pytest.approx([scale, scale])
    assert (scaled.metrics["train/grad_norm"] > max_grad_norm).all() == (max_grad_norm < 1)
    assert_moves(got, expected, scale)


@pytest.mark.parametrize("adaptive_noise", [True, False])
def test_v_u_fixed_noise_is_not_scaled_and_adaptive_noise_is(adaptive_noise: bool) -> None:
    ratios = []
    for scale in (1.0, 0.01):
        path = Path(shapes={"w": (200, 100)}, sigma=0.1, vgs={"min_scale": scale, "enabled": adaptive_noise})
        if not adaptive_noise:
            with pytest.warns(UserWarning, match="adaptive_noise=False with VGS on"):
                path = Path(shapes={"w": (200, 100)}, sigma=0.1, adaptive_noise=False, vgs={"min_scale": scale})
        fixed = draw(1, 2, path.shapes)["w"]
        for t in range(4):
            path.move({"w": fixed * (-1) ** t})
        ratios.append(path.metrics["upgd/noise_to_signal"])
    amplification = ratios[1] / ratios[0]
    torch.testing.assert_close(
        amplification, torch.full_like(amplification, 1.0 if adaptive_noise else 100.0), rtol=0.02, atol=0
    )


def test_v_u_the_warning_needs_noise_and_vgs() -> None:
    Path(adaptive_noise=False, sigma=0.0)
    Path(adaptive_noise=False, sigma=0.1, vgs={"enabled": False})


# V × microbatches


def test_v_microbatches_the_estimate_is_per_update_whatever_the_accumulation() -> None:
    shapes, ratios = {"w": (20_000,)}, {}
    mean = draw(0, 1, shapes)["w"]
    for parts in (2, 8):
        path = Path(1, shapes, vgs={"estimator": "microbatch"})
        for update in range(20):
            pieces = [mean / parts + draw(100 * update + i + 1, 1, shapes)["w"] / parts**0.5 for i in range(parts)]
            for piece in pieces:
                path.optimizer.observe_microbatch({"w": piece}, path.state)
            path.move({"w": torch.stack(pieces).sum(0)})
        ratios[parts] = path.metrics["vgs/normalized_variance"].item()
    assert ratios == pytest.approx({2: 1.0, 8: 1.0}, rel=0.05)
    with pytest.raises(RuntimeError, match="at least 2 recorded microbatches"):
        path.move({"w": mean})


# V × Q, T


@pytest.mark.parametrize("scope", ["module", "tensor", "global"])
def test_v_q_actor_and_critic_have_their_own_factor(scope: str) -> None:
    path, plain = Path(vgs={"scope": scope, "min_scale": 0.1}), Path(vgs={"enabled": False})
    quiet = draw(1)
    for gradients in alternating(4):
        both = {"actor.weight": quiet["actor.weight"], "critic.weight": gradients["critic.weight"]}
        got, expected = path.move(both), plain.move(both)
    suffix = "" if scope == "module" else ".weight"
    if scope == "global":
        factor = path.metrics["vgs/scaling_factor"]
        assert ((factor > 0.1) & (factor < 1)).all()
        return
    assert path.metrics[f"vgs/scaling_factor/actor{suffix}"].tolist() == [1.0, 1.0]
    assert path.metrics[f"vgs/scaling_factor/critic{suffix}"].tolist() == pytest.approx([0.1, 0.1])
    assert path.metrics[f"vgs/normalized_variance/critic{suffix}"].gt(1).all()
    torch.testing.assert_close(got["actor.weight"], expected["actor.weight"])
    torch.testing.assert_close(got["critic.weight"], 0.1 * expected["critic.weight"])


# U


def gates(moved: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: m / g for n, m in moved.items() for g in [gradients[n]]}


@given(exponent=st.integers(-6, 6))
@settings(deadline=None, max_examples=10)
def test_u_loss_scale_leaves_the_gate_unchanged(exponent: int) -> None:
    one, other = (Path(name="UPGDW", max_grad_norm=1e12, vgs={"enabled": False}) for _ in range(2))
    for seed in range(3):
        gradients = draw(seed)
        scaled = {n: 10.0**exponent * g for n, g in gradients.items()}
        got, expected = gates(other.move(scaled), scaled), gates(one.move(gradients), gradients)
    assert_moves(got, expected, rtol=1e-6)


def test_u_utility_is_that_of_the_clipped_unscaled_gradient() -> None:
    path = Path(name="UPGDW", max_grad_norm=0.5, vgs={"min_scale": 0.01})
    gradients = alternating(2)
    for each in gradients:
        path.move(each)
    last = gradients[-1]
    norm = torch.stack([g.flatten(1).norm(dim=1) for g in last.values()]).norm(dim=0)
    assert (path.metrics["train/grad_norm"] - norm).abs().max() < 1e-9
    for n, g in last.items():
        instant = -0.5 * g / norm[:, None, None] * path.start[n]
        torch.testing.assert_close(path.state.upgd.utility[n], 0.001 * instant - 0.999 * 0.001 * instant)


def test_u_eta_is_guarded_and_bias_corrected_from_the_first_update() -> None:
    path = Path(name="UPGDW", vgs={"enabled": False})
    gradients = {n: w.clone() for n, w in path.start.items()}  # every utility is −w² < 0
    moved = path.move(gradients)
    largest = torch.stack([w.square().flatten(1).amax(1) for w in path.start.values()]).amax(0)
    for n, w in path.start.items():
        expected = -0.1 * torch.sigmoid(w.square() / largest[:, None, None]) * w
        torch.testing.assert_close(moved[n], expected)
    still = Path(name="UPGDW", vgs={"enabled": False})
    for w in (*still.start.values(), *still.weights.values()):
        w.zero_()
    assert_moves(still.move(gradients), gradients, -0.05)


def test_u_frozen_parts_are_neither_perturbed_nor_decayed() -> None:
    path = Path(sigma=0.5, weight_decay=0.5, overrides={"critic": {"gating": "none", "noise": False}})
    gradients = draw(1)
    plain = Path(weight_decay=0.5, overrides={"critic": {"gating": "none"}})
    moved, expected = path.move(gradients), plain.move(gradients)
    torch.testing.assert_close(moved["critic.weight"], expected["critic.weight"])
    assert (moved["actor.weight"] - expected["actor.weight"]).abs().max() > 1e-3
    del gradients["critic.weight"]
    assert path.move(gradients)["critic.weight"].abs().max() == 0.0
