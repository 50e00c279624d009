"""A population's step that repeats the call of the one before is the step made anew, whatever was changed in between."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from small_runs import tiny, trainer

from hardy.config import tunables
from hardy.optim import OptimizerSettings, PopulationOptimizer, VGSSettings
from hardy.optim import compiled as library
from hardy.parallel import set_threads
from hardy.population import MemberGenerators, expand, leaves

P = 3
SHAPES = {
    "core.weight": (P, 5, 7),
    "core.square": (P, 6, 6),
    "core.bias": (P, 5),
    "actor.weight": (P, 2, 5),
    "critic.weight": (P, 1, 5),
}


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """The calls that have been made, with the library switched on; none where it could not be built."""
    monkeypatch.delenv("HARDY_COMPILED", raising=False)
    calls, original = [], library.Call.__init__

    def counted(self, *args, **kwargs):
        calls.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(library.Call, "__init__", counted)
    yield calls
    set_threads(1)


class Run:
    """An optimizer with all that its steps are given."""

    def __init__(self, **vgs):
        torch.manual_seed(1)
        settings, scaler = OptimizerSettings(lr=0.1, sigma=0.3, max_grad_norm=1.0), VGSSettings(warmup_steps=1, **vgs)
        self.settings = settings, scaler
        self.weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        self.optimizer = PopulationOptimizer({name: w.shape for name, w in self.weights.items()}, settings, scaler)
        numbers = {f"optimizer.{k}": v for k, v in tunables(settings).items()}
        numbers |= {f"vgs.{k}": v for k, v in tunables(scaler).items()}
        self.hyper = {name: expand(value, P) for name, value in numbers.items()}
        self.state = self.optimizer.init(self.weights)
        self.noise = MemberGenerators([5, 6, 7], "noise")
        self.active = torch.ones(P, dtype=torch.bool)
        self.names = list(SHAPES)

    def step(self, seed):
        torch.manual_seed(seed)
        gradients = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        given = {name: gradients[name] for name in self.names}
        return self.optimizer.step_(self.weights, given, self.state, self.hyper, self.noise, self.active)


def assert_equal(one, other):
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name
    assert torch.equal(one.noise.get_state(), other.noise.get_state())
    for mine, theirs in zip(leaves(one.state), leaves(other.state), strict=True):
        assert torch.equal(mine.tensor, theirs.tensor), mine.path


def replace(run, field, value):
    setattr(run, field, value)


def move(tensors, name):
    """Another tensor in its place, whose memory is in use only by it."""
    tensors[name] = torch.full_like(tensors[name], 0.1)


def turn(weights, name):
    weights[name] = weights[name].transpose(1, 2)


def replace_options(optimizer):
    optimizer.options = [option._replace(gating="none") for option in optimizer.options]


CHANGES = {
    "nothing": lambda run: None,
    "lr in place": lambda run: run.hyper["optimizer.lr"].mul_(2),
    "lr as another tensor": lambda run: run.hyper.update({"optimizer.lr": torch.tensor([0.2, 0.1, 0.3])}),
    "sigma of one member": lambda run: run.hyper["optimizer.sigma"].copy_(torch.tensor([0.0, 0.3, 0.3])),
    "alpha": lambda run: run.hyper["vgs.alpha"].fill_(3.0),
    "active": lambda run: replace(run, "active", torch.tensor([True, False, True])),
    "active in place": lambda run: run.active.logical_and_(torch.tensor([False, True, True])),
    "weights elsewhere": lambda run: replace(run, "weights", {k: w.clone() for k, w in run.weights.items()}),
    "weights in place": lambda run: run.weights["core.weight"].mul_(0.5),
    "another state": lambda run: replace(run, "state", run.optimizer.init(run.weights)),
    "another source of noise": lambda run: replace(run, "noise", MemberGenerators([8, 9, 10], "noise")),
    "a gradient missing": lambda run: run.names.remove("core.bias"),
    "the last gradient missing": lambda run: run.names.remove("critic.weight"),
    "threads": lambda run: set_threads(2),
    "lr behind PyTorch's back": lambda run: run.hyper["optimizer.lr"].numpy().fill(0.3),
    "options": lambda run: replace_options(run.optimizer),
    "a moment elsewhere": lambda run: move(run.state.upgd.first_moment, "core.weight"),
    "the counts elsewhere": lambda run: replace(run.state.upgd, "step", run.state.upgd.step.clone()),
    "statistics elsewhere": lambda run: replace(run.state.vgs, "variance", 2 * run.state.vgs.variance),
    "another part of the state": lambda run: replace(run.state, "upgd", run.optimizer.init(run.weights).upgd),
    "a weight with other strides": lambda run: turn(run.weights, "core.square"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_between_two_steps_takes_effect(change):
    repeated, anew = Run(), Run()
    for run in (repeated, anew):
        for seed in (1, 2, 3, 4):
            if seed == 3:
                change(run)
            if run is anew:
                run.optimizer._prepared = None
            metrics = run.step(seed)
        set_threads(1)
        run.last = metrics
    assert_equal(repeated, anew)
    for name, value in repeated.last.items():
        assert torch.equal(value[repeated.active], anew.last[name][anew.active]), name


def test_switching_the_library_off_takes_effect(monkeypatch):
    run, chain = Run(), Run()
    for seed in (1, 2):
        run.step(seed)
    monkeypatch.setenv("HARDY_COMPILED", "0")
    before = library.Call.__call__
    monkeypatch.setattr(library.Call, "__call__", lambda *_: pytest.fail("the library was asked"))
    run.step(3)
    monkeypatch.setattr(library.Call, "__call__", before)
    for seed in (1, 2, 3):
        chain.step(seed)
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, chain.weights[name], rtol=1e-4, atol=1e-5)


def test_the_call_is_made_once_for_an_update(made):
    """Its schedules make new numbers for each update; minibatches and epochs share them."""
    run = trainer(tiny(ppo={"n_epochs": 3, "lr_schedule": "linear"}), [1, 2], dtype=torch.float32)
    for iteration in (1, 2):
        run.iterate(10_000)
        assert len(made) == (iteration if library.available() else 0)


def test_what_the_library_writes_to_is_held():
    """A state's tensor that was replaced is still there for the call that has its address, until there is a new call."""
    run = Run()
    run.step(1)
    before = weakref.ref(run.state.upgd.utility["core.weight"])
    move(run.state.upgd.utility, "core.weight")
    gc.collect()
    assert (before() is not None) == library.available()
    run.step(2)
    gc.collect()
    assert before() is None


def test_the_callers_mask_is_not_the_librarys():
    run, other = Run(), Run()
    for one in (run, other):
        one.step(1)
        mask = one.active
        one.active = torch.ones(P, dtype=torch.bool)
        if one is run:
            mask[1] = False
        one.step(2)
    assert_equal(run, other)


def test_names_of_the_same_tensor_keep_their_states_apart():
    run, anew = Run(), Run()
    for one in (run, anew):
        one.weights["core.square"] = one.weights["core.weight"] = torch.ones(P, 5, 7)
        one.optimizer = PopulationOptimizer({k: w.shape for k, w in one.weights.items()}, *one.settings)
        one.state = one.optimizer.init(one.weights)
        for name in ("core.weight", "core.square"):
            if one is anew:
                one.optimizer._prepared = None
            torch.manual_seed(1)
            one.optimizer.step_(one.weights, {name: torch.randn(P, 5, 7)}, one.state, one.hyper, one.noise, one.active)
    assert_equal(run, anew)


def test_hyperparameters_of_inference_mode_do():
    run, other = Run(), Run()
    with torch.inference_mode():
        run.hyper = {name: value.clone() for name, value in run.hyper.items()}
    for seed in (1, 2):
        run.step(seed)
        other.step(seed)
    assert_equal(run, other)


def test_an_optimizer_can_be_copied_between_two_steps():
    run = Run()
    run.step(1)
    other = copy.deepcopy(run)
    run.step(2)
    other.step(2)
    assert_equal(run, other)


@pytest.mark.parametrize("keys", [torch.tensor([3, 4, 5], dtype=torch.int32), torch.tensor([3, 9, 4, 9, 5])[::2]], ids=str)
def test_keys_of_any_kind_draw_the_same_noise(keys):
    run, other = Run(), Run()
    run.noise, other.noise = keys, torch.tensor([3, 4, 5])
    run.step(1)
    other.step(1)
    for name, weight in run.weights.items():
        assert torch.equal(weight, other.weights[name]), name


def test_microbatches_are_counted_before_every_step():
    run = Run(estimator="microbatch")
    contribution = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    for _ in range(2):
        run.optimizer.observe_microbatch(contribution, run.state)
    run.step(1)
    with pytest.raises(RuntimeError, match="at least 2 recorded microbatches"):
        run.step(2)


def test_gradients_are_not_kept():
    run = Run()
    gradients = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    kept = [weakref.ref(gradient) for gradient in gradients.values()]
    run.optimizer.step_(run.weights, gradients, run.state, run.hyper, run.noise, run.active)
    del gradients
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
