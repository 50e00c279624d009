"""The compiled LSTM against `torch.nn.LSTM`: every instruction set, odd sizes, any number of threads, extreme numbers."""

from __future__ import annotations

import itertools
import shutil
import sysconfig

import pytest
import torch
from instruction_sets import LEVELS

from hardy.nn import compiled


@pytest.fixture(autouse=True)
def everything_in_parts(monkeypatch):
    monkeypatch.delenv("HARDY_COMPILED", raising=False)
    monkeypatch.setattr(compiled, "SMALLEST_PART", 1)


def test_the_library_is_built_where_there_is_a_compiler():
    compiler = sysconfig.get_config_var("CXX") or "c++"
    assert compiled.available() or shutil.which(compiler.split()[0]) is None, (
        "not built: pip install -e . (or python setup.py build_ext --inplace)"
    )


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("HARDY_COMPILED", "0")
    assert not compiled.available()
    assert not compiled.supports(torch.zeros(1))


def test_it_is_for_float32_on_the_cpu():
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert compiled.supports(single, single) == compiled.available()
    assert not compiled.supports(single, double)
    assert not compiled.supports(single, torch.zeros(1, device="meta"))


def draw(members, steps, envs, inputs, hidden, chance):
    """Inputs, state, is_first and weights; weights are large enough for gates to saturate now and then."""
    weights = [(members, 4 * hidden, inputs), (members, 4 * hidden, hidden), (members, 4 * hidden), (members, 4 * hidden)]
    return (
        torch.randn(members, steps, envs, inputs, requires_grad=True),
        torch.randn(members, envs, 2 * hidden),
        torch.rand(members, steps, envs) < chance,
        [(torch.randn(shape) / max(inputs, hidden) ** 0.5).requires_grad_() for shape in weights],
    )


def by_torch(x, state, is_first, weights):
    """Each episode's piece on its own through `torch.nn.LSTM`."""
    members, steps, envs, inputs = x.shape
    hidden = state.shape[-1] // 2
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    module = torch.nn.LSTM(inputs, hidden)
    output = torch.empty(members, steps, envs, hidden)
    for p, e in itertools.product(range(members), range(envs)):
        own = {name: weight[p] for name, weight in zip(names, weights, strict=True)}
        cuts = sorted({0, steps, *is_first[p, :, e].nonzero().flatten().tolist()})
        for begin, end in itertools.pairwise(cuts):
            start = torch.zeros_like(state[p, e]) if is_first[p, begin, e] else state[p, e]
            initial = tuple(start.view(2, 1, hidden))
            output[p, begin:end, e] = torch.func.functional_call(module, own, (x[p, begin:end, e], initial))[0]
    return output


if compiled.available():

    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize(
        ("members", "steps", "envs", "inputs", "hidden", "chance", "threads"),
        [
            (1, 7, 2, 3, 1, 0.2, 1),
            (3, 23, 5, 2, 5, 0.2, 2),
            (7, 11, 3, 17, 13, 0.1, 3),
            (1, 37, 3, 16, 16, 1.0, 3),
            (1, 5, 1, 64, 64, 0.0, 2),  # one row for two parts
            (2, 31, 7, 5, 100, 0.1, 5),
            (1, 139, 11, 67, 128, 0.05, 3),
        ],
    )
    def test_values_and_gradients_equal_torch(level, members, steps, envs, inputs, hidden, chance, threads):
        x, state, is_first, weights = draw(members, steps, envs, inputs, hidden, chance)
        output = compiled.lstm_layer(x, state, is_first, 0, weights, threads, level)
        expected = by_torch(x, state, is_first, weights)
        weight = torch.randn_like(output) / output[0].numel() ** 0.5
        found = torch.autograd.grad(output, [x, *weights], weight)
        wanted = torch.autograd.grad(expected, [x, *weights], weight)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

    def test_the_two_biases_have_gradients_of_their_own():
        x, state, is_first, weights = draw(1, 5, 2, 3, 7, 0.1)
        *_, one, other = torch.autograd.grad(compiled.lstm_layer(x, state, is_first, 0, weights, 1).sum(), weights)
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()

    def test_a_graph_that_is_kept_gives_the_same_gradient_again():
        x, state, is_first, weights = draw(2, 5, 2, 3, 7, 0.1)
        output = compiled.lstm_layer(x, state, is_first, 0, weights, 1)
        first, second = (torch.autograd.grad(output.sum(), [x, *weights], retain_graph=True) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    @pytest.mark.parametrize("level", LEVELS)
    def test_tensors_in_any_memory_order(level):
        x, state, is_first, weights = draw(3, 5, 2, 7, 11, 0.3)
        expected = compiled.lstm_layer(x, state, is_first, 0, weights, 1, level)
        strided = [tensor.mT.contiguous().mT for tensor in (x, state, is_first, *weights[:2])]
        assert not any(tensor.is_contiguous() for tensor in strided)
        found = compiled.lstm_layer(*strided[:3], 0, [*strided[3:], *weights[2:]], 1, level)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("level", LEVELS)
    def test_gates_are_accurate_from_tiny_to_huge(level):
        # One unit without memory: h = sigmoid(o) tanh(sigmoid(i) tanh(g)); gates not looked at are driven to 1.
        magnitude = torch.logspace(-7, 2, 2001)
        x = torch.cat([magnitude, -magnitude, torch.tensor([0.0, torch.inf, -torch.inf])])
        zero = [torch.zeros(1, 4, 1), torch.zeros(1, 4)]

        def gates(weight, bias):
            inputs, state = x.view(1, 1, -1, 1), torch.zeros(1, len(x), 2)
            weights = [torch.tensor(weight).view(1, 4, 1), zero[0], torch.tensor(bias).view(1, 4), zero[1]]
            # 0 * inf would be NaN: the driven gates get their value from the bias and see a finite input.
            return compiled.lstm_layer(
                inputs, state, torch.ones(1, 1, len(x), dtype=torch.bool), 0, weights, 1, level
            ).flatten()

        finite = x.isfinite()
        exact = x.double()
        found = gates([0.0, 0.0, 1.0, 0.0], [50.0, 0.0, 0.0, 50.0]).double()[finite]
        torch.testing.assert_close(found, exact[finite].tanh().tanh(), rtol=4e-7, atol=0)
        found = gates([0.0, 0.0, 0.0, 1.0], [50.0, 0.0, 50.0, 0.0]).double()[finite]
        torch.testing.assert_close(found, exact[finite].sigmoid() * torch.ones(()).double().tanh(), rtol=2e-7, atol=1e-37)
        found = gates([1.0, 1.0, 1.0, 1.0], [0.0] * 4)[-3:].tolist()
        assert found == pytest.approx([0.0, torch.ones(()).tanh().item(), 0.0], abs=1e-6)

    @pytest.mark.parametrize("level", LEVELS)
    def test_nan_stays_in_its_row(level):
        x, state, is_first, weights = draw(1, 11, 5, 3, 7, 0.0)
        clean = compiled.lstm_layer(x, state, is_first, 0, weights, 2, level)
        spoiled_x = x.detach().clone()
        spoiled_x[0, 4, 2] = torch.nan
        spoiled = compiled.lstm_layer(spoiled_x, state, is_first, 0, weights, 2, level)
        assert spoiled[0, 4:, 2].isnan().all()
        others = [0, 1, 3, 4]
        assert torch.equal(clean[:, :, others], spoiled[:, :, others])
        assert torch.equal(clean[0, :4, 2], spoiled[0, :4, 2])

    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize(("members", "steps", "envs"), [(2, 41, 7), (1, 131, 3), (1, 17, 1), (5, 7, 2), (9, 11, 3)])
    def test_threads_change_neither_values_nor_gradients(level, members, steps, envs):
        x, state, is_first, weights = draw(members, steps, envs, 13, 37, 0.1)
        inputs = [x, *weights]
        results = []
        for threads in (1, 2, 3, 17):
            output = compiled.lstm_layer(x, state, is_first, 0, weights, threads, level)
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        for other in results[1:]:
            assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))

    def test_work_is_cut_so_that_threads_end_together(monkeypatch):
        seen = []

        monkeypatch.setattr(compiled, "_lstm", lambda problem, what: seen.append((problem.parts, problem.threads)))
        monkeypatch.setattr(compiled, "SMALLEST_PART", 100 * 4 * 10 * 20)  # two environments' worth of what is below
        cases = {(1, 2, 8): (1, 1), (1, 3, 8): (1, 1), (1, 4, 8): (2, 2), (1, 64, 8): (8, 8), (3, 64, 2): (2, 2),
                 (4, 64, 2): (1, 2), (6, 64, 4): (2, 4), (8, 64, 2): (1, 2), (64, 4, 8): (1, 8)}  # fmt: skip
        for members, envs, threads in cases:
            x, state, is_first, weights = draw(members, 50, envs, 10, 10, 0.1)
            compiled.lstm_layer(x.detach(), state, is_first, 0, [weight.detach() for weight in weights], threads)
        assert seen == list(cases.values())

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [("weight", "weights of shapes"), ("is_first", "is_first of shape"), ("envs", "state of shape"), ("layer", "layer 1")],
    )
    def test_shapes_that_do_not_belong_together_are_refused(wrong, message):
        x, state, is_first, weights = draw(2, 5, 3, 7, 11, 0.1)
        if wrong == "weight":
            weights[0] = weights[0][:, :, :-1]
        is_first = is_first[:, 1:] if wrong == "is_first" else is_first
        state = state[:, 1:] if wrong == "envs" else state
        with pytest.raises(ValueError, match=message):
            compiled._check_shapes(x, state, is_first, int(wrong == "layer"), weights)
