"""Stacked linear layers, layer norms and perceptrons: PyTorch's own modules, one per member, are the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hardy.nn.linear import HIDDEN_GAIN, StackedLayerNorm, StackedLinear, StackedMLP

MODULES = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def shaken(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module.double()


def assert_equals_own_modules(module, x, own):
    """Values and all gradients of each member's rows equal those of ``own(member)``, a plain module with its weights."""
    x = x.requires_grad_()
    output = module(x)
    weight = torch.randn_like(output)
    gradients = torch.autograd.grad(output, [x, *module.parameters()], weight)
    for p in range(x.shape[0]):
        alone = own(p)
        expected = alone(x[p])
        torch.testing.assert_close(output[p], expected, atol=1e-12, rtol=1e-12)
        wanted = torch.autograd.grad(expected, [x, *alone.parameters()], weight[p])
        torch.testing.assert_close(gradients[0][p], wanted[0][p], atol=1e-12, rtol=1e-12)
        for found, gradient in zip(gradients[1:], wanted[1:], strict=True):
            torch.testing.assert_close(found[p], gradient, atol=1e-12, rtol=1e-12)


def copied(plain, weights, p):
    with torch.no_grad():
        for target, source in zip(plain.parameters(), weights, strict=True):
            target.copy_(source[p])
    return plain


@pytest.mark.parametrize("batch", [(), (2,), (2, 13), (2, 13, 17)])
def test_linear_equals_torch_for_every_member(batch):
    module = shaken(StackedLinear(5, 7, generators(0, 1, 2)))
    x = torch.randn(3, *batch, 5, dtype=torch.float64)
    assert_equals_own_modules(module, x, lambda p: copied(nn.Linear(5, 7).double(), [module.weight, module.bias], p))
    assert module(x).shape == (3, *batch, 7)


@pytest.mark.parametrize("batch", [(2,), (2, 13)])
def test_layer_norm_equals_torch_for_every_member(batch):
    module = shaken(StackedLayerNorm(5, 3))
    x = 4 + 3 * torch.randn(3, *batch, 5, dtype=torch.float64)
    assert_equals_own_modules(module, x, lambda p: copied(nn.LayerNorm(5).double(), [module.weight, module.bias], p))


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_perceptron_equals_torch_for_every_member(activation, layer_norm):
    module = shaken(StackedMLP(5, (7, 11), generators(0, 1, 2), activation, layer_norm))
    assert module.output_size == 11

    def own(p):
        layers = []
        for index, (inputs, outputs) in enumerate([(5, 7), (7, 11)]):
            linear = module.linears[index]
            layers.append(copied(nn.Linear(inputs, outputs).double(), [linear.weight, linear.bias], p))
            if layer_norm:
                norm = module.norms[index]
                layers.append(copied(nn.LayerNorm(outputs).double(), [norm.weight, norm.bias], p))
            layers.append(MODULES[activation]())
        return nn.Sequential(*layers)

    x = torch.randn(3, 2, 13, 5, dtype=torch.float64)
    if layer_norm:  # the stacked module lists its parameters kind by kind, the oracle layer by layer
        for p in range(3):
            torch.testing.assert_close(module(x)[p], own(p)(x[p]), atol=1e-12, rtol=1e-12)
    else:
        assert_equals_own_modules(module, x, own)


def test_no_layers_is_the_identity():
    module = StackedMLP(5, (), generators(0))
    x = torch.randn(1, 2, 5)
    assert module(x) is x
    assert module.output_size == 5
    assert not list(module.parameters())


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 7), (7, 5)])
def test_initial_weights_are_orthogonal_with_the_gain_and_biases_zero(inputs, outputs):
    module = StackedLinear(inputs, outputs, generators(0, 1), gain=0.3)
    small = min(inputs, outputs)
    for weight in module.weight:
        product = weight @ weight.T if outputs == small else weight.T @ weight
        torch.testing.assert_close(product, 0.09 * torch.eye(small), atol=1e-6, rtol=1e-6)
    assert module.bias.eq(0).all()
    hidden = StackedMLP(5, (5,), generators(0)).linears[0].weight[0]
    torch.testing.assert_close(hidden @ hidden.T, HIDDEN_GAIN**2 * torch.eye(5), atol=1e-5, rtol=1e-5)


def test_a_members_weights_follow_from_its_own_generator():
    together, alone = StackedMLP(5, (7, 3), generators(0, 1, 2)), StackedMLP(5, (7, 3), generators(2))
    for stacked, single in zip(together.parameters(), alone.parameters(), strict=True):
        assert torch.equal(stacked[2:], single)
    assert not torch.equal(together.linears[0].weight[0], together.linears[0].weight[1])


def test_members_do_not_see_one_another():
    module = StackedMLP(5, (7, 3), generators(0, 1, 2), layer_norm=True)
    x = torch.randn(3, 2, 5)
    clean = module(x)
    x[1] = float("nan")
    spoiled = module(x)
    assert torch.equal(clean[0], spoiled[0])
    assert torch.equal(clean[2], spoiled[2])
    assert spoiled[1].isnan().all()
