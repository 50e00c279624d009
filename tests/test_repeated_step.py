"""A step that repeats the call of the one before is the step that a fresh optimizer takes, whatever was changed in between."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hardy.optim import UPGD, UPGDW, AdaptiveUPGD, VarianceGradientScaler
from hardy.optim import compiled as library

SHAPES = ((5, 7), (6, 6), (4,), ())
Change = Callable[[torch.optim.Optimizer], object]


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The calls that have been made, with the library switched on; none where it could not be built."""
    monkeypatch.delenv("HARDY_COMPILED", raising=False)
    calls: list[object] = []
    original = library.Call.__init__

    def counted(self: library.Call, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(library.Call, "__init__", counted)
    return calls


def prepared(cls: type = UPGD, **options: Any) -> torch.optim.Optimizer:
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.02, "gating": "local"}]
    return cls(groups, lr=0.1, weight_decay=0.1, beta_utility=0.8, sigma=0.3, max_grad_norm=5.0, **options)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def step(optimizer: torch.optim.Optimizer, seed: int, without: int | None = None) -> None:
    torch.manual_seed(seed)
    for k, parameter in enumerate(parameters_of(optimizer)):
        parameter.grad = None if k == without else torch.randn_like(parameter)
    optimizer.step()


def assert_equal(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for mine, theirs in zip(parameters_of(one), parameters_of(other), strict=True):
        assert torch.equal(mine, theirs)
        assert one.state[mine].keys() == other.state[theirs].keys()
        for name, value in one.state[mine].items():
            assert torch.equal(value, other.state[theirs][name]), name
    assert one.diagnostics == other.diagnostics


def turned(optimizer: torch.optim.Optimizer) -> None:
    """Weights at the same address, of the same shape, in another order."""
    square = parameters_of(optimizer)[1]
    square.data = square.data.t()


def shortened(optimizer: torch.optim.Optimizer) -> None:
    """Fewer weights, and utilities and moments with them, at the same addresses."""
    wide = parameters_of(optimizer)[0]
    wide.data, own = wide.data[:4], optimizer.state[wide]
    own.update({name: value[:4] for name, value in own.items() if name != "step"})


CHANGES: dict[str, Change] = {
    "nothing": lambda o: None,
    "lr": lambda o: o.param_groups[1].update(lr=0.5),
    "sigma": lambda o: o.param_groups[0].update(sigma=0.0),
    "gating": lambda o: o.param_groups[0].update(gating="none"),
    "protecting": lambda o: o.param_groups[0].update(protecting=False),
    "adaptive noise": lambda o: o.param_groups[1].update(adaptive_noise=False),
    "clip": lambda o: setattr(o, "max_grad_norm", 0.01),
    "no clip": lambda o: setattr(o, "max_grad_norm", None),
    "published": lambda o: setattr(o, "reference", True),
    "a step count": lambda o: o.state[parameters_of(o)[2]]["step"].fill_(40),
    "another step count": lambda o: o.state[parameters_of(o)[2]].update(step=torch.tensor(40.0)),
    "weights elsewhere": lambda o: setattr(parameters_of(o)[0], "data", torch.ones(SHAPES[0])),
    "fewer weights": shortened,
    "weights turned": turned,
    "utilities elsewhere": lambda o: o.state[parameters_of(o)[0]].update(utility=torch.ones(SHAPES[0])),
    "a state loaded": lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "another generator": lambda o: setattr(o, "generator", torch.Generator().manual_seed(9)),
    "one more group": lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(3))]}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("cls", [UPGD, AdaptiveUPGD])
def test_a_change_between_two_steps_takes_effect(cls: type, change: Change) -> None:
    one = prepared(cls)
    for seed in (2, 3):
        step(one, seed)
    fresh = copy.deepcopy(one)  # a copy starts without a call of its own
    for optimizer in (one, fresh):
        change(optimizer)
        for seed in (4, 5):
            step(optimizer, seed)
    assert_equal(one, fresh)


@pytest.mark.parametrize("cls", [UPGD, UPGDW, AdaptiveUPGD])
def test_the_call_is_made_once_while_nothing_changes(cls: type, made: list[object]) -> None:
    optimizer = prepared(cls)
    for seed in range(5):
        step(optimizer, seed)
    assert len(made) == (1 if library.available() else 0)
    assert [int(optimizer.state[p]["step"]) for p in parameters_of(optimizer)] == [5] * 4


def test_a_missing_gradient_counts_for_the_others_only() -> None:
    one = prepared()
    step(one, 2)
    fresh = copy.deepcopy(one)
    for optimizer in (one, fresh):
        for seed, without in ((3, None), (4, 1), (5, None), (6, 0), (7, 0), (8, None)):
            step(optimizer, seed, without)
            if optimizer is fresh:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it makes each call anew
    assert_equal(one, fresh)
    assert [int(one.state[p]["step"]) for p in parameters_of(one)] == [5, 6, 7, 7]


def test_gradients_with_gaps_are_read_where_they_are() -> None:
    one, other = prepared(), prepared()
    for optimizer in (one, other):
        step(optimizer, 2)
        torch.manual_seed(3)
        for parameter in parameters_of(optimizer):
            wide = torch.randn(*parameter.shape, 2)
            parameter.grad = wide[..., 0] if optimizer is one else wide[..., 0].clone()
        optimizer.step()
    assert_equal(one, other)


def scaler_of(layer: nn.Module) -> VarianceGradientScaler:
    return VarianceGradientScaler(layer.named_parameters(), warmup_steps=1, beta=0.5, alpha=1.0)


def with_scaler() -> UPGD:
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    return UPGD(layer.parameters(), lr=0.1, gradient_scaler=scaler_of(layer))


def test_the_scaler_s_factor_is_that_of_each_step() -> None:
    one, other = with_scaler(), with_scaler()
    factors = set()
    for seed in range(6):
        step(one, seed)
        step(other, seed)
        other.load_state_dict(copy.deepcopy(other.state_dict()))
        factors.add(one.diagnostics["vgs/scaling_factor"])
        assert_equal(one, other)
    assert len(factors) > 3


@pytest.mark.parametrize("begins_with", [True, False])
def test_a_scaler_may_come_and_go(begins_with: bool) -> None:
    one, other = with_scaler(), with_scaler()
    for optimizer in (one, other):
        held = optimizer.gradient_scaler
        for seed in range(9):
            optimizer.gradient_scaler = held if (seed // 3 % 2 == 0) == begins_with else None
            step(optimizer, seed)
            if optimizer is other:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it makes each call anew
    assert held is not None
    assert held.scaling_factor < 1
    assert_equal(one, other)


def test_what_the_library_cannot_take_is_left_to_the_chain(monkeypatch: pytest.MonkeyPatch, made: list[object]) -> None:
    optimizer = prepared()
    step(optimizer, 2)
    with monkeypatch.context() as off:
        off.setenv("HARDY_COMPILED", "0")
        off.setattr(library.Call, "__call__", lambda *_: pytest.fail("the library took the step"))
        before = parameters_of(optimizer)[0].detach().clone()
        step(optimizer, 3)
    assert not torch.equal(parameters_of(optimizer)[0], before)
    step(optimizer, 4)
    assert [int(optimizer.state[p]["step"]) for p in parameters_of(optimizer)] == [3] * 4
    assert len(made) == (2 if library.available() else 0)


def test_gradients_are_not_kept() -> None:
    optimizer = prepared()
    step(optimizer, 2)
    step(optimizer, 3)
    kept = [weakref.ref(parameter.grad) for parameter in parameters_of(optimizer)]
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4
