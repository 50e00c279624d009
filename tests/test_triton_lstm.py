"""The LSTM's Triton kernels, and when they are used: the stepped path and a plain loop in double precision are the oracles.

Without a CUDA device the kernels run in Triton's interpreter, one NumPy operation after the other.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hardy.nn import lstm_choice, recurrent, stepped
from hardy.nn.lstm_choice import Choice
from hardy.nn.recurrent import StackedRecurrent

pytest.importorskip("triton", reason="Triton, which PyTorch's builds for CUDA bring, is not installed")
with pytest.MonkeyPatch.context() as patch:
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")  # it counts while the kernels are defined
    from hardy.nn import triton_lstm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def problem(members, steps, envs, size, resets="random"):
    """The arguments of a layer, and a gradient by its output."""
    from_input = torch.randn(members, steps, envs, 4 * size)
    hidden, cell = torch.randn(2, members, envs, size)
    weight = torch.randn(members, 4 * size, size) / size**0.5
    is_first = {
        "random": torch.rand(members, steps, envs) < 0.3,
        "none": torch.zeros(members, steps, envs, dtype=torch.bool),
        "all": torch.ones(members, steps, envs, dtype=torch.bool),
        "start": (torch.arange(steps) == 0).view(1, -1, 1).expand(members, steps, envs),
    }[resets]
    tensors = (from_input, hidden, cell, is_first, weight, torch.randn(members, steps, envs, size))
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def looped(from_input, hidden, cell, is_first, weight):
    """One step after the other, left to automatic differentiation."""
    outputs = []
    for t in range(from_input.shape[1]):
        begins = is_first[:, t].unsqueeze(-1)
        hidden, cell = (torch.where(begins, torch.zeros_like(state), state) for state in (hidden, cell))
        gates = from_input[:, t] + torch.einsum("peh,pgh->peg", hidden, weight)
        enter, forget, candidate, leave = gates.chunk(4, dim=-1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return torch.stack(outputs, dim=1)


def results(layer, from_input, hidden, cell, is_first, weight, grad):
    """Output and gradients by the inputs and the weights."""
    from_input, weight = from_input.detach().requires_grad_(), weight.detach().requires_grad_()
    output = layer(from_input, hidden, cell, is_first, weight)
    return output.detach(), *torch.autograd.grad(output, (from_input, weight), grad)


def compare(given):
    found, steps = results(triton_lstm.lstm_layer, *given), results(stepped.lstm_layer, *given)
    exact = results(looped, *(tensor.double() if tensor.is_floating_point() else tensor for tensor in given))
    for one, other, third in zip(found, steps, exact, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
        torch.testing.assert_close(one.double(), third, **TOLERANCE)


# Members, steps, environments, hidden: the interpreter takes seconds for a large one.
@pytest.mark.parametrize(
    "sizes", [(3, 7, 1, 24), (3, 7, 5, 4), (3, 7, 17, 24), (1, 7, 5, 32), (1, 1, 17, 4), (3, 1, 1, 24)], ids=str
)
def test_values_and_gradients_equal_the_steps(sizes):
    compare(problem(*sizes))


@pytest.mark.parametrize("resets", ["none", "all", "start"])
def test_resets_that_come_never_always_and_at_the_start(resets):
    compare(problem(2, 5, 3, 7, resets))


def test_larger_blocks_of_environments_and_of_columns(monkeypatch):
    monkeypatch.setattr(triton_lstm, "PROGRAMS", 1)
    assert triton_lstm.blocks(1, 70, 33) == (64, 64, 8)
    compare(problem(1, 2, 70, 33))
    assert triton_lstm.blocks(1, 70, 256) == (16, 256, 8)


def test_blocks_grow_only_where_every_part_of_the_card_has_work():
    assert triton_lstm.blocks(1, 17, 4) == (16, 16, 4)
    assert triton_lstm.blocks(1, 1024, 64)[0] == 16
    assert triton_lstm.blocks(64, 32, 64)[0] == 16
    assert triton_lstm.blocks(64, 64, 64)[0] == 32
    assert triton_lstm.blocks(64, 4096, 64)[0] == 64
    assert triton_lstm.blocks(64, 4096, 128)[0] == 32


@pytest.mark.parametrize("scale", [1e-3, 0.2, 0.3, 3.0, 100.0])
def test_gates_are_as_exact_as_pytorchs_whatever_their_size(scale):
    """Of a single step from nothing: the candidate's tangent near 0 too, relative to itself."""
    size = 16
    from_input = scale * torch.randn(1, 1, 16, 4 * size, device=DEVICE)
    zeros, is_first = torch.zeros(1, 16, size, device=DEVICE), torch.ones(1, 1, 16, dtype=torch.bool, device=DEVICE)
    weight = torch.zeros(1, 4 * size, size, device=DEVICE)
    found = triton_lstm.lstm_layer(from_input, zeros, zeros, is_first, weight)
    expected = looped(from_input.double(), zeros.double(), zeros.double(), is_first, weight.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-36, rtol=2e-6 * max(1, scale))


def test_what_is_not_finite_ends_with_a_reset_and_stays_in_its_environment():
    *given, _ = problem(2, 6, 5, 9, "none")
    from_input, hidden, cell, is_first, weight = given
    is_first[:, 3] = True
    is_first[0, 0, 1] = True
    clean = triton_lstm.lstm_layer(*given)
    hidden[0, 1] = cell[0, 1] = torch.nan  # reset at once
    hidden[1, 2] = torch.nan
    cell[1, 4] = torch.inf
    from_input[0, 2, 3] = torch.nan
    spoiled = triton_lstm.lstm_layer(from_input, hidden, cell, is_first, weight)
    nan = torch.zeros_like(is_first)
    nan[1, :3, 2] = nan[0, 2, 3] = True
    assert spoiled[nan].isnan().all()
    nan[1, :3, 4] = True  # an infinite cell is a finite output, until it meets a gate of 0
    assert torch.equal(spoiled[~nan], clean[~nan])


def test_a_spoiled_state_leaves_no_trace_in_the_gradients_once_it_is_reset():
    given = problem(2, 4, 5, 9, "start")
    clean = results(triton_lstm.lstm_layer, *given)
    given[1].fill_(torch.nan)
    given[2].fill_(torch.inf)
    for one, other in zip(results(triton_lstm.lstm_layer, *given), clean, strict=True):
        assert torch.equal(one, other)


def test_members_do_not_see_one_another():
    given = problem(3, 5, 4, 7)
    together = results(triton_lstm.lstm_layer, *given)
    for member in range(3):
        alone = results(triton_lstm.lstm_layer, *(tensor[member : member + 1] for tensor in given))
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[member : member + 1], other, atol=1e-6, rtol=1e-6)


def test_tensors_need_not_lie_together_nor_at_even_addresses():
    given = problem(2, 5, 3, 7)
    expected = results(stepped.lstm_layer, *given)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in given]
    shifted = [torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape) for tensor in given]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert all(tensor.data_ptr() % 16 for tensor in shifted)
    for spread in (strided, shifted):
        for one, other in zip(results(triton_lstm.lstm_layer, *spread), expected, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)


def test_gradients_go_where_they_are_wanted_and_stop_at_the_state():
    from_input, hidden, cell, is_first, weight, _ = problem(1, 3, 2, 4)
    for tensor in (from_input, hidden, cell):
        tensor.requires_grad_()
    triton_lstm.lstm_layer(from_input, hidden, cell, is_first, weight).sum().backward()
    assert from_input.grad is not None
    assert hidden.grad is cell.grad is weight.grad is None


def test_what_the_kernels_cannot_take_is_refused():
    *given, _ = problem(1, 1, 1, 257)
    with pytest.raises(ValueError, match=r"257 .* at most 256"):
        triton_lstm.lstm_layer(*given)
    *given, _ = problem(1, 1, 1, 4)
    given[2] = given[2].double()
    with pytest.raises(ValueError, match=r"cell is of torch\.float64"):
        triton_lstm.lstm_layer(*given)


COMPILE = """
from triton import compile, next_power_of_2
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hardy.nn import triton_lstm

for kernel in (triton_lstm._forward, triton_lstm._backward):
    rows, columns, warps = triton_lstm.blocks(1, 8, 24)
    values = {"SIZE": 24, "ROWS": rows, "COLUMNS": columns, "PART": triton_lstm.PART, "PRECISION": "ieee"}
    kinds = {"is_first": "*u8", "steps": "i32", "envs": "i32", **dict.fromkeys(values, "constexpr")}
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    assert compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32), options=options).asm["cubin"]
"""


def test_the_kernels_compile_for_a_card(tmp_path):
    """To machine code, which needs no card; what the code does there, only a card could show."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-W", "error", "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


class Clock:
    """Says how long a way takes, in the order of being asked: the other one, the usual one."""

    def __init__(self, *seconds):
        self.left = list(seconds)

    def __call__(self, work):
        work()
        return self.left.pop(0)


def ways(other=lambda: [torch.ones(3)]):
    return lambda: (lambda: [torch.ones(3)], other)


@pytest.mark.parametrize(("other", "usual", "taken"), [(1.0, 2.0, True), (2.0, 1.0, False), (1.0, 1.0, False)])
def test_the_faster_of_two_equal_ways_is_taken_without_asking_again(other, usual, taken):
    choice = Choice("it", Clock(other, usual))
    for _ in range(3):
        assert choice.takes("a", ways(), False, 1e-4) is taken


def test_every_kind_of_call_is_tried_on_its_own():
    choice = Choice("it", Clock(1.0, 2.0, 2.0, 1.0))
    assert [choice.takes(key, ways(), False, 1e-4) for key in "abab"] == [True, False, True, False]


@pytest.mark.parametrize("wrong", [1.001, torch.nan, torch.inf])
def test_other_results_are_not_taken_however_fast_and_one_warning_says_so(wrong):
    choice = Choice("it", Clock())
    other = ways(lambda: [torch.tensor([1.0, wrong, 1.0])])
    with pytest.warns(RuntimeWarning, match="it gives other results, and is not used"):
        assert not choice.takes("a", other, False, 1e-4)
    assert not choice.takes("a", other, False, 1e-4)
    assert not choice.takes("b", other, False, 1e-4)


def test_rounding_is_no_other_result():
    assert Choice("it", Clock(1.0, 2.0)).takes("a", ways(lambda: [torch.tensor([1.0, 1.00005, 1.0])]), False, 1e-4)


def test_a_way_that_fails_is_not_taken_and_one_warning_has_the_reason():
    def fails():
        raise OSError("no C compiler")

    choice = Choice("it", Clock())
    with pytest.warns(RuntimeWarning, match=r"it fails \(OSError: no C compiler\), and is not used"):
        assert not choice.takes("a", ways(fails), False, 1e-4)
    assert not choice.takes("a", ways(fails), False, 1e-4)
    assert not choice.takes("b", fails, False, 1e-4)


def test_nothing_is_tried_while_a_graph_is_captured():
    choice = Choice("it", Clock(1.0, 2.0))
    assert not choice.takes("a", lambda: pytest.fail("tried"), True, 1e-4)
    assert choice.takes("a", ways(), False, 1e-4)
    assert choice.takes("a", lambda: pytest.fail("tried"), True, 1e-4)


@pytest.fixture
def taken(monkeypatch):
    """The kernels are tried on this machine's device, and said to be faster; which ways were taken."""
    calls, layers = [], {"steps": stepped.lstm_layer, "kernels": triton_lstm.lstm_layer}
    monkeypatch.setattr(lstm_choice, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(recurrent, "STEPPED", ("cpu", "cuda"))
    monkeypatch.setattr(lstm_choice, "_choice", Choice("it", Clock(*range(10))))
    monkeypatch.delenv("HARDY_COMPILED", raising=False)
    for module, name in ((stepped, "steps"), (triton_lstm, "kernels")):
        monkeypatch.setattr(module, "lstm_layer", lambda *given, name=name: calls.append(name) or layers[name](*given))
    return calls


def test_a_layer_tries_the_kernels_once_and_then_takes_them(taken):
    module = StackedRecurrent("lstm", 5, 7, 2, [torch.Generator().manual_seed(i) for i in range(2)]).to(DEVICE)
    given = torch.randn(2, 3, 5, 5, device=DEVICE), torch.zeros(2, 5, module.state_size, device=DEVICE)
    is_first = torch.zeros(2, 3, 5, dtype=torch.bool, device=DEVICE)
    with torch.no_grad():
        found = module(*given, is_first)
    assert taken == ["kernels", "steps", "kernels", "steps", "kernels", "kernels"]  # compared, timed, both layers
    taken.clear()
    module(*given, is_first).sum().backward()
    assert taken == ["kernels", "kernels"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARDY_COMPILED", "0")
        torch.testing.assert_close(module(*given, is_first), found, **TOLERANCE)
    assert taken[2:] == ["steps", "steps"]


def test_what_the_kernels_cannot_take_goes_step_by_step(taken):
    *given, _ = problem(1, 2, 3, 4)
    lstm_choice.lstm_layer(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in given))
    lstm_choice.lstm_layer(*problem(1, 1, 1, 257)[:-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lstm_choice.importlib.util, "find_spec", lambda name: None)
        lstm_choice.lstm_layer(*given)
        patch.undo()
        patch.setattr(lstm_choice, "capturing", lambda tensor: True)
        lstm_choice.lstm_layer(*given)
        patch.undo()
        patch.setattr(lstm_choice, "DEVICES", ())
        lstm_choice.lstm_layer(*given)
    assert taken == ["steps"] * 5


def test_the_trial_holds_states_resets_and_steps_without_and_ignores_what_is_not_finite(taken):
    *given, _ = problem(2, 7, 5, 4, "none")
    given[0][1] = torch.nan
    given[1].zero_()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepped, "lstm_layer", lambda *tensors: seen.append(tensors) or looped(*tensors))
        usual, other = lstm_choice.rivals(*given)
        expected = usual()
    ((from_input, hidden, cell, is_first, weight),) = seen
    assert all(tensor.isfinite().all() for tensor in expected)
    assert torch.equal(from_input[0], given[0][0]) and torch.equal(weight, given[4])
    assert hidden.std() > 0.5 and cell.std() > 1
    assert 0 < is_first.float().mean() < 0.5
    assert lstm_choice.agree(other(), expected, 1e-5)


def test_products_are_rounded_as_pytorch_is_told_to():
    script = """
import torch
from hardy.nn.lstm_choice import reduced_precision
assert not reduced_precision()
torch.backends.cuda.matmul.allow_tf32 = True
assert reduced_precision()
torch.backends.cuda.matmul.allow_tf32 = False
assert not reduced_precision()
torch.set_float32_matmul_precision("high")
assert reduced_precision()
"""
    newer = "torch.backends.cuda.matmul.fp32_precision = 'tf32'\nassert reduced_precision()\n"
    for lines in (script, script.split("torch.backends", 1)[0] + newer):
        done = subprocess.run([sys.executable, "-W", "error", "-c", lines], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_older_pytorch_has_one_setting(monkeypatch):
    for setting in (False, True):
        monkeypatch.setattr(torch.backends.cuda, "matmul", type("Settings", (), {"allow_tf32": setting}))
        assert lstm_choice.reduced_precision() is setting
