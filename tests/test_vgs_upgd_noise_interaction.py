"""VGS shrinks updates, UPGD adds noise to them: fixed noise drowns what VGS has shrunk, adaptive noise does not."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hardy.config import load_settings
from hardy.optim import UPGD, UPGDW, AdaptiveUPGD, OptimizerSettings, VarianceGradientScaler
from hardy.optim.transforms import Step, TensorOptions
from hardy.optim.upgd import perturb
from hardy.settings import RunSettings

CLASSES = [UPGD, UPGDW, AdaptiveUPGD]
CONFIGS = Path(__file__).parents[1] / "configs"
SIGMA = 0.05


def noise_to_signal(cls: type, scale: float, adaptive_noise: bool, size: int = 20_000, gradient_size: float = 1.0) -> float:
    """Realised RMS(noise)/RMS(update) of one update that VGS scales by ``scale``."""
    torch.manual_seed(0)
    start, gradient = torch.randn(size), gradient_size * torch.randn(size)
    moved = []
    for sigma in (0.0, SIGMA):
        p = nn.Parameter(start.clone())
        scaler = VarianceGradientScaler({"w": p}, min_scale=scale, warmup_steps=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "adaptive_noise=False with VGS on")
            optimizer = cls([p], lr=1.0, sigma=sigma, weight_decay=0.0, adaptive_noise=adaptive_noise, gradient_scaler=scaler)
        for sign in (1, -1):  # no signal, so the factor is the smallest
            p.data.copy_(start)
            p.grad = sign * gradient
            optimizer.step()
        assert scaler.scaling_factor == pytest.approx(scale)
        moved.append(p.detach() - start)
    clean, noisy = moved
    return float((noisy - clean).norm() / clean.norm())


@pytest.mark.parametrize("cls", CLASSES)
def test_fixed_noise_is_amplified_up_to_100_times(cls: type) -> None:
    base = noise_to_signal(cls, 1.0, adaptive_noise=False)
    for scale in (0.1, 0.01):
        assert noise_to_signal(cls, scale, adaptive_noise=False) / base == pytest.approx(1 / scale, rel=0.02)


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.1, 0.01])
@pytest.mark.parametrize("cls", CLASSES)
def test_adaptive_noise_keeps_the_ratio_at_every_scale(cls: type, scale: float) -> None:
    assert noise_to_signal(cls, scale, adaptive_noise=True, size=200_000) == pytest.approx(SIGMA, rel=0.01)
    base = noise_to_signal(cls, 1.0, adaptive_noise=True)
    assert noise_to_signal(cls, scale, adaptive_noise=True) == pytest.approx(base, rel=1e-3)


@pytest.mark.parametrize("protecting", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("size", [1, 10, 1000, 1_000_000])
def test_the_ratio_is_sigma_within_1_percent_for_tensors_of_every_size(size: int, scale: float, protecting: bool) -> None:
    members = max(1, 200_000 // size)
    torch.manual_seed(1)
    update, gate = torch.randn(members, size), 0.2 + 0.6 * torch.rand(members, size)
    hyper = {"sigma": torch.full((1, 1), SIGMA, dtype=torch.float64), "step_factor": torch.ones(1, 1, dtype=torch.float64)}
    option = TensorOptions(protecting=protecting)
    step = Step(["w"], [update], [update], hyper, [option], lambda tensors: [torch.randn_like(t) for t in tensors])
    step.gates = {0: gate}
    step.coefficient = step.coefficient * scale
    perturb(step)
    signal = (step.coefficient * update).square().mean(1)
    noise = (step.noise_coefficient * step.noise[0]).square().mean(1)
    # A single draw of one number is not its RMS: the mean over members is.
    assert float((noise / signal).mean().sqrt()) == pytest.approx(SIGMA, rel=0.01)


@pytest.mark.parametrize("cls", [UPGD, UPGDW])
def test_noise_follows_the_size_of_the_update_without_lag(cls: type) -> None:
    p = nn.Parameter(torch.ones(20_000))
    optimizer = cls([p], lr=1.0, sigma=SIGMA, weight_decay=0.0)
    gradient, sizes = torch.randn(20_000), []
    for size in (1.0, 1000.0, 1e-3, 0.0):
        p.data.fill_(1.0)
        p.grad = size * gradient
        optimizer.step()
        sizes.append(float((p.detach() - 1).norm()))
        assert optimizer.diagnostics["upgd/noise_to_signal"] == pytest.approx(SIGMA if size else 0.0, rel=0.02)
    assert sizes[1] / sizes[0] == pytest.approx(1000, rel=0.05)
    assert sizes[2] < 0.01 * sizes[0]
    assert sizes[3] == 0.0, "an update of zero gets no noise"


@pytest.mark.parametrize("cls", CLASSES)
def test_fixed_noise_with_vgs_warns_once(cls: type) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="adaptive_noise=False with VGS on") as caught:
        optimizer = cls([p], adaptive_noise=False, gradient_scaler=VarianceGradientScaler({"w": p}))
        for _ in range(3):
            p.grad = torch.ones(3)
            optimizer.step()
    assert len(caught) == 1
    cls([p], adaptive_noise=False)


def test_every_shipped_configuration_has_adaptive_noise() -> None:
    assert OptimizerSettings().adaptive_noise is True
    files = sorted(CONFIGS.glob("**/*.yaml"))
    assert files, f"no configuration under {CONFIGS}"
    for file in files:
        assert load_settings(RunSettings, file).optimizer.adaptive_noise is True, file.name


def losses_under_hard_scaling(adaptive_noise: bool, seed: int) -> Tensor:
    """Training loss of a regression on tiny, noisy minibatches, the last 80 of 120 updates."""
    torch.manual_seed(seed)
    x = torch.randn(64, 5)
    y = torch.tanh(x @ torch.randn(5, 2)) + 0.5 * torch.randn(64, 2)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    scaler = VarianceGradientScaler(model.named_parameters(), alpha=100.0, min_scale=0.01, warmup_steps=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adaptive_noise=False with VGS on")
        optimizer = UPGDW(model.parameters(), lr=0.3, sigma=0.1, adaptive_noise=adaptive_noise, gradient_scaler=scaler)
    losses = []
    for update in range(120):
        batch = torch.randint(0, 64, (2,))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if update >= 40:
            losses.append(nn.functional.mse_loss(model(x), y).detach())
    assert scaler.scaling_factor == pytest.approx(0.01, rel=0.5)
    return torch.stack(losses)


def test_training_under_hard_scaling_is_stable_and_steadier_than_with_fixed_noise() -> None:
    runs = {mode: torch.stack([losses_under_hard_scaling(mode, seed) for seed in range(3)]) for mode in (True, False)}
    assert all(losses.isfinite().all() for losses in runs.values())
    variance = {mode: float(losses.var(dim=1).mean()) for mode, losses in runs.items()}
    assert variance[True] < 0.5 * variance[False]
    assert runs[True].mean() < runs[False].mean()
