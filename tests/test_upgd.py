"""UPGD, UPGDW and AdaptiveUPGD as optimizers that anybody can use, and the gate that makes them UPGD."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hardy.optim import UPGD, UPGDW, AdaptiveUPGD

CLASSES = [UPGD, UPGDW, AdaptiveUPGD]


def moves(cls: type, weights: list[Tensor], gradients: list[Tensor], steps: int = 1, **arguments: Any) -> list[Tensor]:
    """What ``steps`` updates with constant gradients add to the weights."""
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = cls(parameters, **{"lr": 1.0, "weight_decay": 0.0, "sigma": 0.0, **arguments})
    for _ in range(steps):
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() - w for p, w in zip(parameters, weights, strict=True)]


def gates(weights: list[Tensor], gradients: list[Tensor], **arguments: Any) -> list[Tensor]:
    """The gate of every weight, read off one plain step."""
    return [-d / g for d, g in zip(moves(UPGDW, weights, gradients, **arguments), gradients, strict=True)]


def random_pair(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 3), (7,)]
    return tuple([torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes] for _ in range(2))  # type: ignore[return-value]


# The gate


def test_eta_is_the_largest_utility_of_all_globally_gated_weights() -> None:
    weights = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)]
    gradients = [torch.tensor([-1.0, -1.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)]
    got = gates(weights, gradients)
    torch.testing.assert_close(got[0], 1 - torch.sigmoid(torch.tensor([0.25, 0.5], dtype=torch.float64)))
    torch.testing.assert_close(got[1], 1 - torch.sigmoid(torch.tensor([1.0], dtype=torch.float64)))


def test_without_a_positive_utility_the_order_is_kept() -> None:
    (gate,) = gates([torch.tensor([1.0, 2.0, 4.0])], [torch.tensor([1.0, 1.0, 1.0])])
    torch.testing.assert_close(gate, torch.sigmoid(torch.tensor([0.25, 0.5, 1.0])))
    assert gate.diff().gt(0).all(), "the least useful weight moves most"


def test_without_any_utility_the_gate_is_one_half() -> None:
    (gate,) = gates([torch.zeros(3)], [torch.tensor([1.0, -2.0, 3.0])])
    torch.testing.assert_close(gate, torch.full((3,), 0.5))


@given(exponent=st.integers(-6, 6), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_gate_ignores_the_scale_of_the_loss(exponent: int, seed: int) -> None:
    weights, gradients = random_pair(seed)
    expected = gates(weights, gradients, steps=3, lr=1e-9)
    scaled = gates(weights, [g * 10.0**exponent for g in gradients], steps=3, lr=1e-9 * 10.0**-exponent)
    for a, b in zip(scaled, expected, strict=True):
        torch.testing.assert_close(a * 10.0**exponent, b, rtol=1e-6, atol=0)


def test_local_gating_normalises_along_the_last_axis_and_takes_scalars() -> None:
    weight, gradient = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), -torch.ones(2, 2)
    matrix, scalar = gates([weight, torch.tensor(2.0)], [gradient, torch.tensor(-5.0)], gating="local")
    torch.testing.assert_close(matrix, 1 - torch.sigmoid(torch.tensor([[0.6, 0.8], [0.0, 1.0]])))
    torch.testing.assert_close(scalar, 1 - torch.sigmoid(torch.tensor(1.0)))


@pytest.mark.parametrize("exponent", [-30, -36, -38, -44])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_first_gradient_next_to_nothing_leaves_finite_weights(exponent: int, sign: float) -> None:
    """Bias correction of the first step enlarges the inverse of η a thousand times, beyond float32."""
    gradients = [torch.tensor([sign * 10.0**exponent, 0.0]), torch.zeros(3)]
    for moved in moves(UPGDW, [torch.ones(2), torch.ones(3)], gradients):
        assert moved.isfinite().all()


def test_groups_choose_their_gating() -> None:
    shared, alone = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([100.0, 300.0]))
    optimizer = UPGDW(
        [{"params": [shared]}, {"params": [alone], "gating": "none"}], lr=1.0, weight_decay=0.0, sigma=0.0, step_factor=2.0
    )
    shared.grad, alone.grad = -torch.ones(2), -torch.ones(2)
    optimizer.step()
    # The ungated group takes the plain step, without the factor, and does not enter η.
    torch.testing.assert_close(alone.detach(), torch.tensor([101.0, 301.0]))
    expected = torch.tensor([1.0, 2.0]) + 2 * (1 - torch.sigmoid(torch.tensor([0.5, 1.0])))
    torch.testing.assert_close(shared.detach(), expected)


def test_non_protecting_gates_the_noise_only() -> None:
    weights, gradients = random_pair(1)
    for d, g in zip(moves(UPGDW, weights, gradients, protecting=False), gradients, strict=True):
        torch.testing.assert_close(d, -g)
    weight, gradient = torch.tensor([1.0] * 4000 + [0.0] * 4000), torch.tensor([-1.0] * 8000)
    (d,) = moves(UPGDW, [weight], [gradient], protecting=False, sigma=0.1)
    noise = d + gradient
    ratio = float(noise[:4000].std() / noise[4000:].std())
    assert ratio == pytest.approx(0.26894 / 0.5, rel=0.05)


# Decay


@pytest.mark.parametrize("cls", [UPGDW, AdaptiveUPGD])
def test_decay_is_decoupled(cls: type) -> None:
    weights, gradients = random_pair(2)
    plain = moves(cls, weights, gradients, lr=0.1)
    decayed = moves(cls, weights, gradients, lr=0.1, weight_decay=0.3)
    for a, b, w in zip(decayed, plain, weights, strict=True):
        torch.testing.assert_close(a, b - 0.03 * w)


def test_upgd_couples_the_decay_into_the_gradient_but_not_into_the_utility() -> None:
    weights, gradients = random_pair(3)
    gate = gates(weights, gradients)
    decayed = moves(UPGD, weights, gradients, weight_decay=0.3)
    for d, w, g, a in zip(decayed, weights, gradients, gate, strict=True):
        torch.testing.assert_close(d, -a * (g + 0.3 * w))


# What a torch optimizer has to do


def regression(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    return model, torch.randn(11, 5), torch.randn(11, 2)


@pytest.mark.parametrize("cls", CLASSES)
def test_closure_and_scheduler(cls: type) -> None:
    model, x, y = regression()
    optimizer = cls(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(float(optimizer.step(closure).detach()))
        scheduler.step()
    assert losses[2] < losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)


@pytest.mark.parametrize("cls", CLASSES)
def test_lr_may_be_a_tensor_and_is_read_at_every_step(cls: type) -> None:
    weights, gradients = random_pair(4)
    lr = torch.tensor(0.1, dtype=torch.float64)
    for a, b in zip(moves(cls, weights, gradients, lr=lr), moves(cls, weights, gradients, lr=0.1), strict=True):
        torch.testing.assert_close(a, b)
    p = nn.Parameter(torch.ones(3))
    optimizer = cls([p], lr=lr, sigma=0.0)
    p.grad = torch.ones(3)
    lr.zero_()
    optimizer.step()
    assert p.detach().equal(torch.ones(3))


@pytest.mark.parametrize("adaptive_noise", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_round_trip_continues_bit_for_bit_whatever_the_noise(cls: type, adaptive_noise: bool) -> None:
    model, x, y = regression()

    def train(target: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(target(x), y).backward()
            optimizer.step()

    first = cls(model.parameters(), lr=1e-2, sigma=0.0)
    train(model, first)
    twin = copy.deepcopy(model)
    second = cls(twin.parameters(), lr=1.0, sigma=0.0, adaptive_noise=adaptive_noise)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(model, first)
    train(twin, second)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", CLASSES)
def test_toggling_adaptive_noise_does_not_change_the_format_of_the_state(cls: type) -> None:
    keys = []
    for adaptive_noise in (True, False):
        p = nn.Parameter(torch.ones(3))
        optimizer = cls([p], adaptive_noise=adaptive_noise)
        p.grad = torch.ones(3)
        optimizer.step()
        state = optimizer.state_dict()
        keys.append(({k: (v.shape, v.dtype) for k, v in state["state"][0].items()}, set(state["param_groups"][0])))
    assert keys[0] == keys[1]


@pytest.mark.parametrize("cls", CLASSES)
def test_states_saved_before_an_option_existed_load(cls: type) -> None:
    p = nn.Parameter(torch.ones(3))
    saved = cls([p]).state_dict()
    for key in ("adaptive_noise", "gating", "protecting", "step_factor"):
        del saved["param_groups"][0][key]
    optimizer = cls([p], gating="local")
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["adaptive_noise"], group["gating"], group["protecting"], group["step_factor"]) == (True, "local", True, 1.0)
    p.grad = torch.ones(3)
    optimizer.step()
    assert not p.detach().equal(torch.ones(3))


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_and_pickles(cls: type) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = cls([p], lr=0.1, protecting=False, max_grad_norm=0.25, reference=True)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (twin.reference, twin.max_grad_norm) == (True, 0.25)
        (q,) = twin.param_groups[0]["params"]
        q.grad = torch.ones(3)
        twin.step()
        assert not q.detach().equal(torch.ones(3))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_group_added_later_is_trained(cls: type) -> None:
    early, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = cls([early], lr=0.1, sigma=0.0, weight_decay=0.0)
    early.grad = torch.ones(3)
    optimizer.step()
    optimizer.add_param_group({"params": [late], "lr": 0.5, "gating": "none"})
    early.grad, late.grad = torch.ones(3), torch.ones(2)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (early, late)] == [2, 1]
    # Its first update is bias-corrected by its own count, so all three classes take a full step.
    torch.testing.assert_close(late.detach(), torch.full((2,), 0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("cls", CLASSES)
def test_sparse_gradients_are_refused(cls: type) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=f"{cls.__name__} does not support sparse"):
        cls(embedding.parameters()).step()


@pytest.mark.parametrize("cls", CLASSES)
def test_noise_comes_from_the_generator_given(cls: type) -> None:
    weights, gradients = random_pair(5)

    def run(seed: int) -> list[Tensor]:
        return moves(cls, weights, gradients, sigma=0.1, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(1)[0], run(1)[0])
    assert not torch.equal(run(1)[0], run(2)[0])


@pytest.mark.parametrize("cls", CLASSES)
def test_empty_parameters_and_steps_without_gradients(cls: type) -> None:
    empty, idle = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(2))
    optimizer = cls([empty, idle])
    optimizer.step()
    empty.grad = torch.zeros(0)
    optimizer.step()
    assert not optimizer.state
    assert idle.detach().equal(torch.ones(2))


def test_diagnostics() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = UPGDW([p], sigma=0.0, max_grad_norm=1.0)
    p.grad = torch.tensor([-3.0, -4.0])
    optimizer.step()
    assert optimizer.diagnostics["train/grad_norm"] == pytest.approx(5.0)
    assert optimizer.diagnostics["upgd/utility_max"] == pytest.approx(1.6)
    assert optimizer.diagnostics["upgd/noise_to_signal"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"lr": -1.0}, "lr = -1.0"),
        ({"lr": torch.ones(2)}, "lr = "),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"sigma": float("nan")}, "sigma = nan"),
        ({"beta_utility": 1.0}, "beta_utility = 1.0"),
        ({"step_factor": 0.0}, "step_factor = 0.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm = 0.0"),
        ({"gating": "globl"}, "gating = 'globl'.*local, none.*did you mean 'global'"),
        ({"beta1": 1.5}, "beta1 = 1.5"),
        ({"eps": 0.0}, "eps = 0.0"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AdaptiveUPGD([nn.Parameter(torch.ones(2))], **arguments)
    if "lr" in arguments:
        with pytest.raises(ValueError, match=named):
            UPGD([nn.Parameter(torch.ones(2))]).add_param_group({"params": [nn.Parameter(torch.ones(2))], **arguments})


@pytest.mark.parametrize("name", ["adaptive_noise", "protecting"])
@pytest.mark.parametrize("value", ["yes", "no", 1, None])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_truth_value_is_true_or_false(cls: type, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} = {value!r}: must be True or False"):
        cls([{"params": [nn.Parameter(torch.ones(2))], name: value}])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"adaptive_noise": "yes"}, ValueError, "adaptive_noise = 'yes': must be True or False"),
        ({"protecting": "no"}, ValueError, "protecting = 'no': must be True or False"),
        ({"reference": "no"}, ValueError, "reference = 'no': must be True or False"),
        ({"generator": 3}, TypeError, "generator = 3: must be a Generator or None"),
        ({"gradient_scaler": 3}, TypeError, "gradient_scaler = 3: must be a VarianceGradientScaler or None"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_of_another_type_are_refused(
    cls: type, arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # outside the tests nothing checks the annotations
    with pytest.raises(error, match=message):
        cls([nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_restored_onto_the_device_goes_on(cls, device) -> None:
    """``torch.load(…, map_location=device)`` moves the step counts too, which are made on the CPU."""

    def stepped(optimizer, p, count):
        for _ in range(count):
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        return optimizer

    p, other = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    saved = stepped(cls([p], lr=0.1, sigma=0.0), p, 2).state_dict()
    moved = {k: v.to(device) for k, v in saved["state"][0].items()}
    restored = cls([other], lr=0.1, sigma=0.0)
    restored.load_state_dict({**saved, "state": {0: moved}})
    other.data.copy_(p.data)
    stepped(restored, other, 1)
    assert restored.state[other]["step"].item() == 3
    assert not torch.equal(other, p)
