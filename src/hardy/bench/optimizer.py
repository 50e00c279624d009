"""Time of one optimizer step: Hardy's beside `torch.optim.AdamW` and beside the published UPGD written as a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from hardy.bench.options import Options
from hardy.bench.results import Part, count_threads, measurement, ratio
from hardy.bench.timing import Say, take_turns, under
from hardy.config import tunables
from hardy.optim import UPGD, UPGDW, AdaptiveUPGD, OptimizerSettings, PopulationOptimizer, VGSSettings
from hardy.parallel import set_threads
from hardy.population import MemberGenerators, expand

NETWORKS: dict[str, dict[str, tuple[int, ...]]] = {
    "979,024 weights": {"1": (784, 600), "2": (600, 600), "3": (600, 240), "4": (240, 10)},
    "132,995 weights": {
        "encoder": (128, 3),
        "core.ih": (512, 128),
        "core.hh": (512, 128),
        "actor": (2, 128),
        "critic": (1, 128),
    },
}
"""Matrices by name; each has a bias too. The second network has the size of the common work's."""
MEASURES = ("AdamW(foreach=True)", "AdamW(fused=True)")
PUBLISHED = "published UPGD, loop"


class PublishedUPGD(torch.optim.Optimizer):
    """UPGD (Elsayed & Mahmood 2024, Algorithm 1) parameter by parameter, one operation after the other.

    Args:
        step_factor: multiplies the gated step; with the published 2 a weight without utility moves by its whole gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-5,
        weight_decay: float = 0.001,
        beta_utility: float = 0.999,
        sigma: float = 0.001,
        step_factor: float = 2.0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "beta_utility": beta_utility, "sigma": sigma}
        super().__init__(params, {**defaults, "step_factor": step_factor})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Average the utilities of all parameters, then move each."""
        largest = torch.tensor(-torch.inf)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"], state["utility"] = 0, torch.zeros_like(parameter)
                state["step"] += 1
                beta = group["beta_utility"]
                state["utility"].mul_(beta).add_(-parameter.grad * parameter, alpha=1 - beta)
                largest = torch.maximum(largest, state["utility"].max())
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                corrected = state["utility"] / (1 - group["beta_utility"] ** state["step"])
                gate = 1 - torch.sigmoid(corrected / largest)
                noise = torch.randn_like(parameter) * group["sigma"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_((parameter.grad + noise) * gate, alpha=-group["step_factor"] * group["lr"])


def measure(options: Options, say: Say) -> Iterator[Part]:
    """One part for each network; all optimizers take turns."""
    threads = options.threads or 1
    set_threads(threads, recurrent=False)
    torch.manual_seed(0)
    for name, network in NETWORKS.items():
        group = f"{name}, {count_threads(threads)}"
        times = take_turns(steps_of(network), options.repeats or 5, options.seconds or 0.3, under(group, say))
        ratios = [
            ratio(f"{label} over {below}; {group}", "lower", seconds, times[below])
            for label, seconds in times.items()
            for below in (*MEASURES, *([PUBLISHED] if label == "UPGD" else []))
            if label not in (*MEASURES, PUBLISHED)
        ]
        found = [measurement(group, label, "ms", [1e3 * second for second in seconds]) for label, seconds in times.items()]
        yield Part(measurements=tuple(found), ratios=tuple(ratios))


def steps_of(network: dict[str, tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    """The step of every optimizer, by name, each with weights and gradients of its own."""
    return {
        "AdamW(foreach=True)": _ordinary(lambda p: torch.optim.AdamW(p, foreach=True), network),
        "AdamW(fused=True)": _ordinary(lambda p: torch.optim.AdamW(p, fused=True), network),
        PUBLISHED: _ordinary(PublishedUPGD, network),
        "UPGD": _ordinary(UPGD, network),
        "UPGD, sigma=0": _ordinary(lambda p: UPGD(p, sigma=0.0), network),
        "UPGDW": _ordinary(UPGDW, network),
        "AdaptiveUPGD": _ordinary(AdaptiveUPGD, network),
        "AdaptiveUPGD, clip, VGS": _population(1, network),
        "AdaptiveUPGD, clip, VGS, 8 members": _population(8, network),
    }


def shapes_of(network: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors, biases included."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in network.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def _ordinary(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], network: dict[str, tuple[int, ...]]
) -> Callable[[], object]:
    parameters = [nn.Parameter(0.05 * torch.randn(shape)) for shape in shapes_of(network).values()]
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    step: Callable[[], object] = make(parameters).step
    return step


def _population(members: int, network: dict[str, tuple[int, ...]]) -> Callable[[], object]:
    """The step inside a training with its default settings: AdaptiveUPGD, clip, VGS and noise."""
    settings, vgs = OptimizerSettings(), VGSSettings()
    weights = {name: 0.05 * torch.randn(members, *shape) for name, shape in shapes_of(network).items()}
    gradients = {name: 0.01 * torch.randn_like(weight) for name, weight in weights.items()}
    optimizer = PopulationOptimizer({name: weight.shape for name, weight in weights.items()}, settings, vgs)
    numbers = {f"optimizer.{k}": v for k, v in tunables(settings).items()} | {f"vgs.{k}": v for k, v in tunables(vgs).items()}
    hyper = {name: expand(value, members) for name, value in numbers.items()}
    state, noise = optimizer.init(weights), MemberGenerators(range(members), "noise")
    everyone = torch.ones(members, dtype=torch.bool)
    return lambda: optimizer.step_(weights, gradients, state, hyper, noise, everyone)
