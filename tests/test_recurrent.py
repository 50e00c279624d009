"""Stacked recurrent layers: `torch.nn.LSTM` and `torch.nn.GRU` on each episode's piece are the oracle."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import captured_on_the_cpu

from hardy.graphs import Captured
from hardy.nn import compiled, recurrent, stepped
from hardy.nn.recurrent import StackedRecurrent, own_threads
from hardy.nn.reset_steps import lay_out
from hardy.parallel import WorkerPool, pool, set_threads

KINDS = ("lstm", "gru")


# Where the compiled library is missing, test_compiled.py says so; what PyTorch does is tested everywhere.
PATHS = ["torch", "compiled", "stepped"] if compiled.available() else ["torch", "stepped"]


@pytest.fixture(
    params=[(path, threads) for path in PATHS for threads in (1, 3) if path != "stepped" or threads == 1], ids=str, autouse=True
)
def path(request, monkeypatch):
    """Every way of running a sequence, on one thread and on several, however little there is to do."""
    path, threads = request.param
    monkeypatch.setenv("HARDY_COMPILED", str(int(path == "compiled")))
    monkeypatch.setattr(compiled, "SMALLEST_PART", 1)
    monkeypatch.setattr(recurrent, "WORTH_THREADS", 0)
    monkeypatch.setattr(recurrent, "STEPPED", ("cpu", "cuda") if path == "stepped" else ("cuda",))
    set_threads(threads)
    yield path
    set_threads(1)


stepped_only = pytest.mark.parametrize("path", [("stepped", 1)], indirect=True)


def make(kind, members, inputs, hidden, layers, dtype=torch.float32):
    return StackedRecurrent(kind, inputs, hidden, layers, [torch.Generator().manual_seed(i) for i in range(members)]).to(dtype)


def oracle(module, x, state, is_first):
    """Each member's, environment's and episode's piece on its own through PyTorch's module."""
    members, steps, envs, _ = x.shape
    output = []
    for p in range(members):
        single = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[module.kind](module.input_size, module.hidden_size, module.layers)
        weights = {name: value[p] for name, value in module.named_parameters()}
        columns = []
        for e in range(envs):
            cuts = sorted({0, steps, *is_first[p, :, e].nonzero().flatten().tolist()})
            pieces = []
            for begin, end in itertools.pairwise(cuts):
                fresh = bool(is_first[p, begin, e])
                start = torch.zeros_like(state[p, e]) if fresh else state[p, e]
                parts = start.view(-1, module.layers, 1, module.hidden_size)
                initial = tuple(parts) if module.kind == "lstm" else parts[0]
                pieces.append(torch.func.functional_call(single, weights, (x[p, begin:end, e].unsqueeze(1), initial))[0])
            columns.append(torch.cat(pieces))
        output.append(torch.cat(columns, dim=1))
    return torch.stack(output)


def looped(module, x, state, is_first):
    """One step of the module after the other."""
    outputs = []
    for t in range(x.shape[1]):
        state = torch.where(is_first[:, t].unsqueeze(-1), torch.zeros_like(state), state)
        output, state = module.step(x[:, t], state)
        outputs.append(output)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("members", "layers", "dtype"), [(1, 1, torch.float32), (3, 2, torch.float32), (7, 1, torch.float64)])
def test_values_and_gradients_equal_torch_on_each_episode(kind, members, layers, dtype, device):
    steps, envs, inputs, hidden = 23, 5, 11, 13
    module = make(kind, members, inputs, hidden, layers, dtype).to(device)
    x = torch.randn(members, steps, envs, inputs, dtype=dtype, device=device, requires_grad=True)
    state = torch.randn(members, envs, module.state_size, dtype=dtype, device=device)
    is_first = torch.rand(members, steps, envs, device=device) < 0.15
    output, expected = module(x, state, is_first), oracle(module, x, state, is_first)
    weight = torch.randn_like(output)
    found = torch.autograd.grad(output, [x, *module.parameters()], weight)
    wanted = torch.autograd.grad(expected, [x, *module.parameters()], weight)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance * 10)
    with torch.no_grad():
        torch.testing.assert_close(module(x, state, is_first), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("kind", "dtype"), [("lstm", torch.float32), ("lstm", torch.float64), ("gru", torch.float64)])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_sequence_equals_a_plain_loop_of_steps(kind, dtype, data):
    members, steps, envs = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 5)))
    chance = data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    module = make(kind, members, 2, 3, data.draw(st.integers(1, 3)), dtype)
    x = torch.randn(members, steps, envs, 2, dtype=dtype, generator=generator)
    state = torch.randn(members, envs, module.state_size, dtype=dtype, generator=generator)
    is_first = torch.rand(members, steps, envs, generator=generator) < chance
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    torch.testing.assert_close(module(x, state, is_first), looped(module, x, state, is_first), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("kind", "dtype"), [("lstm", torch.float32), ("gru", torch.float64)])
@pytest.mark.parametrize(("members", "envs"), [(1, 1024), (64, 2)])
def test_many_environments_and_many_members_equal_a_plain_loop_of_steps(kind, dtype, members, envs):
    """Values and gradients, against the loop in double precision."""
    module, exact = (make(kind, members, 3, 5, 2, precision) for precision in (dtype, torch.float64))
    exact.load_state_dict(module.state_dict())
    x = torch.randn(members, 7, envs, 3, dtype=dtype, requires_grad=True)
    state = torch.randn(members, envs, module.state_size, dtype=dtype)
    is_first = torch.rand(members, 7, envs) < 0.2
    output = module(x, state, is_first)
    given = x.detach().double().requires_grad_()
    expected = looped(exact, given, state.double(), is_first)
    weight = torch.randn_like(expected)
    found = torch.autograd.grad(output, [x, *module.parameters()], weight.to(dtype))
    wanted = torch.autograd.grad(expected, [given, *exact.parameters()], weight)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-11  # a weight's gradient is a sum over 7,168 steps
    for one, other in zip((output, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance)


def pieces_of(starts):
    """``(environment, begin, end)`` of each episode's part of a sequence."""
    steps, envs = starts.shape
    cuts = [sorted({0, steps, *starts[:, e].nonzero()[0].tolist()}) for e in range(envs)]
    return [(e, *piece) for e in range(envs) for piece in itertools.pairwise(cuts[e])]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_plan_takes_every_step_once_and_keeps_episodes_apart(data):
    steps, envs = data.draw(st.integers(1, 41)), data.draw(st.integers(1, 11))
    chance = data.draw(st.sampled_from([0, 0.03, 0.3, 1]))
    starts = np.random.default_rng(data.draw(st.integers(0, 999))).random((steps, envs)) < chance
    rows = lay_out(starts, torch.device("cpu"))
    inputs = 1 + torch.rand(steps, envs, 3)
    spread = rows.spread(inputs)
    assert torch.equal(rows.take(spread[..., :3]), inputs)
    constant, reset = spread[..., 3] > 0, spread[..., 4] > 0
    assert torch.equal(constant, spread[..., 0] > 0)
    assert torch.equal(constant, ~reset)
    assert int(constant.sum()) == steps * envs
    place = rows.place.view(steps, envs)
    at, row = place // rows.width, place % rows.width
    for e, begin, end in pieces_of(starts):
        assert torch.equal(at[begin:end, e], at[begin, e] + torch.arange(end - begin))
        assert (row[begin:end, e] == row[begin, e]).all()
        first = int(at[begin, e]), int(row[begin, e])
        if begin == 0:
            assert first == (0, e)  # where its state is
        elif first[0] == 0:
            assert first[1] >= envs  # a row that begins from zeros
        else:
            assert reset[first[0] - 1, first[1]]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_plan_is_about_as_short_as_it_can_be(data):
    """Never worse than a sequence to a row, and never more than a piece longer than a row's share of the steps."""
    steps, envs = data.draw(st.integers(1, 128)), data.draw(st.integers(1, 11))
    starts = np.random.default_rng(data.draw(st.integers(0, 999))).random((steps, envs)) < data.draw(st.floats(0, 0.3))
    rows = lay_out(starts, torch.device("cpu"))
    sequence_to_a_row = 8 * math.ceil((steps + int(starts[1:].sum(0).max(initial=0))) / 8)
    assert rows.length * (rows.width + 1.3) <= sequence_to_a_row * (envs + 1.3)
    assert envs <= rows.width <= max(envs, 8)
    pieces = pieces_of(starts)
    sizes = [end - begin for _, begin, end in pieces]
    if rows.length * (rows.width + 1.3) < sequence_to_a_row * (envs + 1.3):  # a list's schedule (Graham 1966)
        assert rows.length <= (sum(sizes) + len(pieces)) / rows.width + max(sizes) + 8


def test_sequences_stay_in_rows_of_their_own_where_longest_first_takes_more():
    begins = [[0, 6, 35], [0, 22], [0, 12], [0], [0, 3, 32], [0, 21], [0, 51, 59], [0, 14]]
    starts = np.zeros((64, 8), dtype=bool)
    for env, steps in enumerate(begins):
        starts[steps, env] = True
    rows = lay_out(starts, torch.device("cpu"))
    assert (rows.length, rows.width) == (72, 8)  # longest first: 88


def test_short_episodes_of_few_sequences_lie_side_by_side():
    starts = np.zeros((128, 2), dtype=bool)
    starts[::16] = True
    rows = lay_out(starts, torch.device("cpu"))
    assert (rows.length, rows.width) == (40, 8)  # two of the 16 pieces to a row
    whole = lay_out(np.zeros((128, 2), dtype=bool), torch.device("cpu"))
    assert (whole.length, whole.width) == (128, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_leaves_nothing_behind(kind):
    """Neither large weights nor a large state are felt across it, nor anything that is not finite."""
    module = make(kind, 2, 5, 7, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1e4)
    x, state = torch.randn(2, 9, 3, 5), torch.randn(2, 3, module.state_size)
    is_first = torch.zeros(2, 9, 3, dtype=torch.bool)
    is_first[:, 4] = True
    alone = module(x[:, 4:], state, is_first[:, 4:])
    for spoil in (1.0, torch.nan, torch.inf):
        for spoiled_x, spoiled_state in ((spoil, 1.0), (1.0, spoil)):
            before = x.clone()
            before[1, 2, 1] *= spoiled_x
            memory = state.clone()
            memory[1, 1] *= spoiled_state
            found = module(before, memory, is_first)
            assert torch.equal(found[:, 4:], alone)
            if math.isnan(spoil):
                begin = 2 if math.isnan(spoiled_x) else 0
                assert found[1, begin:4, 1].isnan().all()
                assert found[1, :begin, 1].isfinite().all()
                assert found[0].isfinite().all()


@pytest.mark.parametrize("path", [("torch", 1), ("torch", 3)], indirect=True)
def test_no_graph_is_made_without_gradients_nor_across_threads(path, monkeypatch):
    made, run = [], recurrent._run
    threads = pool().threads

    def watched(kind, rows, initial, *tensors):
        made.append((torch.is_grad_enabled(), {tensor.is_leaf for tensor in tensors}))
        return run(kind, rows, initial, *tensors)

    monkeypatch.setattr(recurrent, "_run", watched)
    module, x = make("gru", 2, 5, 7, 2), torch.randn(2, 11, 3, 5, requires_grad=True)
    given = x, torch.randn(2, 3, module.state_size), torch.rand(2, 11, 3) < 0.2
    module(*given)
    in_threads = threads > 1
    # What a thread records has leaves of its own; in the caller's thread it is part of the one graph.
    assert made and all(found == (True, {in_threads}) for found in made)
    made.clear()
    with torch.no_grad():
        assert not module(*given).requires_grad
    assert made and all(not enabled for enabled, _ in made)


@pytest.mark.parametrize("path", [("torch", 3)], indirect=True)
def test_gradients_asked_for_again_in_threads_are_refused_in_words(path):
    module = make("gru", 2, 5, 7, 1)
    total = module(torch.randn(2, 4, 3, 5), torch.randn(2, 3, 7), torch.zeros(2, 4, 3) > 0).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradients once"):
        total.backward()


def test_members_do_not_see_one_another():
    module = make("lstm", 3, 5, 7, 1)
    x, state = torch.randn(3, 11, 2, 5), torch.randn(3, 2, module.state_size)
    is_first = torch.rand(3, 11, 2) < 0.2
    clean = module(x, state, is_first)
    x[1] = float("nan")
    spoiled = module(x, state, is_first)
    assert torch.equal(clean[0], spoiled[0])
    assert torch.equal(clean[2], spoiled[2])
    assert spoiled[1].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_stops_at_the_stored_state(kind):
    module = make(kind, 1, 2, 3, 1)
    state = torch.randn(1, 2, module.state_size, requires_grad=True)
    module(torch.randn(1, 4, 2, 2), state, torch.zeros(1, 4, 2, dtype=torch.bool)).sum().backward()
    assert state.grad is None


@pytest.mark.parametrize("frozen", ["inputs", "weights", "everything"])
def test_what_needs_no_gradient_gets_none(frozen):
    module = make("lstm", 2, 5, 7, 1).requires_grad_(frozen == "inputs")
    x = torch.randn(2, 11, 3, 5, requires_grad=frozen == "weights")
    state = torch.randn(2, 3, module.state_size, requires_grad=True)
    output = module(x, state, torch.rand(2, 11, 3) < 0.2)
    assert output.requires_grad == (frozen != "everything")
    if output.requires_grad:
        output.sum().backward()
    assert (x.grad is not None) == (frozen == "weights")
    assert all((weight.grad is not None) == (frozen == "inputs") for weight in module.parameters())


def test_initial_weights_are_orthogonal_and_follow_the_members_own_seed():
    module, alone = make("lstm", 3, 8, 8, 1), make("lstm", 1, 8, 8, 1)
    for gate in module.weight_hh_l0[2].chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(8))
    assert torch.equal(module.weight_ih_l0[:1], alone.weight_ih_l0)
    assert not torch.equal(module.weight_ih_l0[0], module.weight_ih_l0[1])
    assert module.bias_ih_l0[:, 8:16].eq(1).all()
    assert module.bias_ih_l0.sum() == 3 * 8
    assert module.bias_hh_l0.eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_library_is_used_where_it_can_be(path, kind, monkeypatch):
    calls = []
    layer = compiled.lstm_layer
    monkeypatch.setattr(compiled, "lstm_layer", lambda *arguments: calls.append(0) or layer(*arguments))
    for dtype in (torch.float32, torch.float64):
        module = make(kind, 1, 2, 3, 2, dtype)
        module(
            torch.randn(1, 4, 2, 2, dtype=dtype), torch.randn(1, 2, module.state_size, dtype=dtype), torch.zeros(1, 4, 2) > 0
        )
    assert len(calls) == (2 if path == "compiled" and kind == "lstm" else 0)


def test_an_exception_in_a_worker_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        pool().map(lambda index: 1 // (2 - index), 3)


def test_results_of_workers_come_in_order():
    assert pool().map(lambda index: index * index, 17) == [index * index for index in range(17)]


def test_workers_and_caller_run_pytorch_on_one_thread():
    assert pool().map(lambda _: torch.get_num_threads(), 5) == [1] * 5
    assert torch.get_num_threads() == 1


def test_threads_below_one_are_refused():
    with pytest.raises(ValueError, match="threads = 0"):
        set_threads(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_shared_out_to_one_kind_of_threads(kind, path, monkeypatch):
    """Hardy's, unless PyTorch has several of its own, which would spin on the same cores."""
    workers = []
    monkeypatch.setattr(recurrent, "WorkerPool", lambda threads: workers.append(threads) or WorkerPool(threads))
    module, threads = make(kind, 2, 5, 7, 1), pool().threads
    given = torch.randn(2, 9, 3, 5), torch.randn(2, 3, module.state_size), torch.zeros(2, 9, 3) > 0
    for recurrences_own in (True, False):
        set_threads(threads, recurrent=recurrences_own)
        workers.clear()
        module(*given)
        in_the_caller = path == "torch" or (path == "compiled" and kind == "gru")
        assert workers == ([1] if in_the_caller and threads > 1 and not recurrences_own else [])


@pytest.mark.parametrize(("kind", "dtype"), list(itertools.product(KINDS, (torch.float32, torch.float64))))
def test_only_pytorchs_lstm_in_one_call_takes_pytorchs_threads(kind, dtype, path):
    in_one_call = path != "compiled" and kind == "lstm" and dtype is torch.float32 and torch.backends.mkldnn.is_available()
    assert own_threads(kind, dtype) is not in_one_call


@pytest.mark.parametrize(("recurrent", "torch_threads"), [(True, 1), (False, 3)])
def test_threads_go_to_the_recurrence_or_without_one_to_torch(recurrent, torch_threads):
    set_threads(3, recurrent=recurrent)
    assert pool().threads == 3
    assert torch.get_num_threads() == torch_threads


def test_a_fused_kernel_calculates_as_the_formulas_of_a_step(device):
    """On a CUDA device they are PyTorch's own kernels; on the CPU the formulas meet automatic differentiation."""
    members, envs, size = 3, 5, 7
    gates, recurrent_part = (torch.randn(members, envs, 4 * size, dtype=torch.float64, device=device) for _ in range(2))
    cell = torch.randn(members, envs, size, dtype=torch.float64, device=device)
    for tensor in (gates, cell):
        tensor.requires_grad_()
    enter, forget, candidate, leave = (gates + recurrent_part).chunk(4, dim=-1)
    following = enter.sigmoid() * candidate.tanh() + forget.sigmoid() * cell
    hidden = leave.sigmoid() * following.tanh()
    with torch.no_grad():
        found_hidden, found_following, active = stepped.cell_forward(gates, recurrent_part, cell)
    torch.testing.assert_close(found_hidden, hidden.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found_following, following.detach(), atol=1e-12, rtol=1e-12)
    grads = [torch.randn_like(cell) for _ in range(2)]
    wanted = torch.autograd.grad([hidden, following], [gates, cell], grads)
    with torch.no_grad():
        found = stepped.cell_backward(*grads, cell, found_following, active)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@stepped_only
def test_the_fused_kernels_are_there_with_the_arguments_that_are_given():
    forward = str(torch.ops.aten._thnn_fused_lstm_cell.default._schema)
    backward = str(torch.ops.aten._thnn_fused_lstm_cell_backward_impl.default._schema)
    assert "Tensor input_gates, Tensor hidden_gates, Tensor cx, Tensor? input_bias=None" in forward
    assert (
        "grad_hy, Tensor? grad_cy, Tensor cx, Tensor cy, Tensor workspace, bool has_bias) -> (Tensor, Tensor, Tensor)"
        in backward
    )


@pytest.mark.parametrize("kind", KINDS)
@stepped_only
def test_a_sequence_and_its_gradient_can_be_captured_on_a_device(kind, monkeypatch):
    recordings = captured_on_the_cpu(monkeypatch)
    module = make(kind, 3, 5, 7, 2, torch.float64)
    x, state = torch.randn(3, 11, 2, 5, dtype=torch.float64), torch.randn(3, 2, module.state_size, dtype=torch.float64)
    is_first, weights = torch.zeros(3, 11, 2, dtype=torch.bool), list(module.parameters())

    def work():
        return torch.autograd.grad(module(x, state, is_first).square().sum(), weights)

    captured = Captured(work, torch.device("cpu"))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x.normal_(generator=generator)
        state.normal_(generator=generator)
        is_first.copy_(torch.rand(3, 11, 2, generator=generator) < 0.2)
        for found, expected in zip(captured(), work(), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert len(recordings) == 1
