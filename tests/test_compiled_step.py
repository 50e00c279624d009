"""The compiled and the packed step of a policy against its layers: every instruction set, odd sizes, any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from instruction_sets import LEVELS
from small_runs import shake_, tiny, trainer

from hardy.nn import compiled_step
from hardy.nn.normalizer import FrozenNormalizer, RunningMoments
from hardy.nn.packed_step import PackedStep
from hardy.parallel import set_threads
from hardy.policy import ActorCritic, CriticSettings, PolicySettings
from hardy.population import MemberGenerators
from hardy.rollout import collect

P, E, O = 3, 7, 5  # noqa: E741
PATHS = ("packed", *LEVELS) if compiled_step.available() else ("packed",)


@pytest.fixture(autouse=True)
def everything_in_parts(monkeypatch):
    monkeypatch.delenv("HARDY_COMPILED", raising=False)
    monkeypatch.setattr(compiled_step, "SMALLEST_PART", 1)
    yield
    set_threads(1)


def policy_of(members=P, quantiles=3, twin=False, space=Discrete(2), **settings):  # noqa: B008
    given = {"memory_size": 11, "encoder": (13,), **settings}
    critic = CriticSettings(quantiles=quantiles, twin=twin)
    policy = ActorCritic(Box(-1, 1, (O,)), space, PolicySettings(**given), critic, range(members))
    shake_(policy)
    return policy


def draw(policy, members=P, envs=E):
    return (
        torch.randn(members, envs, O),
        torch.randn(members, envs, policy.state_size),
        torch.rand(members, envs) < 0.3,
    )


UNSUPPORTED = [{"memory": "gru"}, {"layer_norm": True}]


@pytest.mark.parametrize("settings", UNSUPPORTED)
def test_what_it_cannot_do_is_left_to_pytorch(settings):
    policy = policy_of(**settings)
    assert policy.stepper(P, E) == policy.step_outputs


def test_it_is_for_float32_and_can_be_switched_off(monkeypatch):
    policy = policy_of()
    assert isinstance(policy.stepper(P, E), compiled_step.CompiledStep) == compiled_step.available()
    assert isinstance(policy_of().double().stepper(P, E), PackedStep)
    monkeypatch.setenv("HARDY_COMPILED", "0")
    assert not compiled_step.available()
    assert isinstance(policy.stepper(P, E), PackedStep)


@pytest.fixture(params=PATHS, ids=str)
def level(request, monkeypatch):
    """Packed weights and PyTorch's operations, and every instruction set of the library."""
    if request.param == "packed":
        monkeypatch.setenv("HARDY_COMPILED", "0")
    else:
        monkeypatch.setattr(compiled_step.CompiledStep, "level", request.param)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(
    "settings",
    [
        {"quantiles": 1},
        {"twin": True, "head": (3,), "shared_memory": False},
        {"memory": "none", "encoder": ()},
        {"memory": "none", "head": (3, 19), "activation": "relu"},
        {"encoder": (), "memory_size": 1, "activation": "silu"},
        {"memory_layers": 2, "encoder": (17, 65), "activation": "elu", "head": (5,)},
        {"shared_memory": False, "memory_layers": 2, "memory_size": 33, "activation": "silu", "head": (9,)},
        {"shared_memory": False, "memory": "none", "quantiles": 67},
        {"memory_size": 128, "encoder": (128,), "quantiles": 1},
    ],
    ids=str,
)
def test_steps_equal_those_of_the_layers(settings):
    policy = policy_of(**settings)
    step = policy.stepper(P, E)
    obs, state, is_first = draw(policy)
    for _ in range(3):
        found = step(obs, state, is_first)
        with torch.no_grad():
            wanted = policy.step_outputs(obs, state, is_first)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        state, (obs, _, is_first) = wanted[2], draw(policy)


@pytest.mark.usefixtures("level")
def test_a_later_step_leaves_the_results_of_an_earlier_one_alone():
    policy = policy_of()
    step = policy.stepper(P, E)
    first = step(*draw(policy))
    kept = [tensor.clone() for tensor in first]
    others = step(*draw(policy))
    for tensor, copy, other in zip(first, kept, others, strict=True):
        assert torch.equal(tensor, copy)
        assert not torch.equal(tensor, other)


@pytest.mark.usefixtures("level")
def test_weights_are_those_of_the_moment_it_was_made():
    policy = policy_of()
    arguments = draw(policy)
    step = policy.stepper(P, E)
    before = step(*arguments)
    shake_(policy)
    assert all(torch.equal(one, other) for one, other in zip(step(*arguments), before, strict=True))
    assert not torch.equal(policy.stepper(P, E)(*arguments)[1], before[1])


@pytest.mark.usefixtures("level")
def test_nan_stays_in_its_row_and_ends_with_a_reset():
    policy = policy_of(activation="relu", head=(13,))
    step = policy.stepper(P, E)
    obs, state, is_first = draw(policy)
    clean = step(obs, state, torch.zeros_like(is_first))
    spoiled = obs.clone()
    spoiled[1, 4, 2] = torch.nan
    outputs = step(spoiled, state, torch.zeros_like(is_first))
    for found, wanted in zip(outputs, clean, strict=True):
        assert found[1, 4].isnan().all()
        found[1, 4] = wanted[1, 4]
        assert torch.equal(found, wanted)
    state[2, 3] = torch.nan
    is_first.zero_()[2, 3] = True
    assert all(found.isfinite().all() for found in step(obs, state, is_first))


CHOICES, MOVES = Discrete(4), Box(-1, 1, (3,))


def moments():
    """Statistics that clip about every third value of a standard-normal observation."""
    return RunningMoments(
        mean=0.3 * torch.randn(P, O).double(), var=torch.rand(P, O).double() + 0.1, count=torch.ones(P).double()
    )


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("space", [CHOICES, MOVES], ids=str)
@pytest.mark.parametrize("settings", [{}, {"memory": "none", "encoder": ()}, {"shared_memory": False, "head": (3,)}], ids=str)
def test_acting_is_normalising_stepping_and_drawing(space, settings):
    policy = policy_of(space=space, **settings)
    if policy.actor.log_std is not None:
        policy.actor.log_std.data.uniform_(-1, 1)
    normalize = moments().frozen(0.8)
    step = policy.stepper(P, E)
    act = policy.acting(step, normalize)
    drawn = []
    for _ in range(20):
        obs, state, is_first = draw(policy)
        noise = policy.draw_noise(MemberGenerators(range(P), str(len(drawn))), E)
        action, *found = act(obs, state, is_first, noise)
        wanted = step(normalize(obs), state, is_first)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        expected = policy.distribution(wanted[0]).sample(noise)
        assert action.dtype == expected.dtype
        torch.testing.assert_close(action, expected, atol=1e-6, rtol=1e-6)
        drawn.append((action, action.clone()))
    assert all(torch.equal(action, copy) for action, copy in drawn)  # no later step wrote into it
    if space is CHOICES:
        assert {int(choice) for action, _ in drawn for choice in action.flatten()} == {0, 1, 2, 3}


@pytest.mark.usefixtures("level")
def test_acting_with_observations_that_are_not_normalised_or_otherwise():
    policy = policy_of()
    step, (obs, state, is_first), noise = policy.stepper(P, E), draw(policy), torch.rand(P, E)
    plain = policy.acting(step, lambda obs: obs)(obs, state, is_first, noise)
    assert torch.equal(plain[1], step(obs, state, is_first)[0])
    doubled = policy.acting(step, lambda obs: 2 * obs)(obs, state, is_first, noise)
    assert torch.equal(doubled[1], step(2 * obs, state, is_first)[0])


@pytest.mark.usefixtures("level")
def test_no_forbidden_action_is_drawn_and_none_at_all_from_nan():
    policy = policy_of(space=CHOICES, encoder=())
    policy.actor.output.weight.data[0].zero_()
    policy.actor.output.bias.data[0] = torch.tensor([-torch.inf, 1000.0, 1001.0, -torch.inf])
    act = policy.acting(policy.stepper(P, E), moments().frozen(10.0))
    obs, state, is_first = draw(policy)
    for extreme, choice in ((0.0, 1), (1 - 2**-24, 2)):
        assert (act(obs, state, is_first, torch.full((P, E), extreme))[0][0] == choice).all()
    noise = torch.rand(P, E)
    clean = act(obs, state, is_first, noise)
    obs[1, 4, 2] = torch.nan
    spoiled = act(obs, state, is_first, noise)
    assert spoiled[1][1, 4].isnan().all() and spoiled[0][1, 4] == 0
    spoiled[0][1, 4] = clean[0][1, 4]
    assert torch.equal(spoiled[0], clean[0])


if compiled_step.available():

    @pytest.mark.parametrize("members", [1, 2, P])
    def test_threads_and_the_number_of_environments_do_not_change_the_values(members):
        policy = policy_of(members)
        obs, state, is_first = draw(policy, members)
        wanted = policy.stepper(members, E)(obs, state, is_first)
        for threads in (2, 3, 17):
            set_threads(threads)
            found = policy.stepper(members, E)(obs, state, is_first)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        alone = policy.stepper(members, 1)
        for env in range(E):
            found = alone(obs[:, env : env + 1], state[:, env : env + 1], is_first[:, env : env + 1])
            assert all(torch.equal(one[:, 0], other[:, env]) for one, other in zip(found, wanted, strict=True))

    def test_several_callers_at_once_get_their_own_values():
        set_threads(2)
        policy = policy_of()
        cases = [(policy.stepper(P, E), draw(policy)) for _ in range(4)]
        wanted = [step(*arguments) for step, arguments in cases]

        def repeat(index):
            step, arguments = cases[index]
            return all(
                torch.equal(one, other) for _ in range(200) for one, other in zip(step(*arguments), wanted[index], strict=True)
            )

        with ThreadPoolExecutor(4) as executor:
            assert all(executor.map(repeat, range(4)))

    def test_a_forked_process_finds_helpers_of_its_own():
        script = """
import os, signal, sys, torch
sys.path.insert(0, "tests")
import test_compiled_step as here
from hardy.nn import compiled_step
from hardy.nn.packed_step import PackedStep
compiled_step.SMALLEST_PART = 1
here.set_threads(2)
policy = here.policy_of()
step, arguments = policy.stepper(here.P, here.E), here.draw(policy)
wanted = step(*arguments)
child = os.fork()
if child == 0:
    signal.alarm(20)  # helpers that are not there would be waited for without end
    os._exit(not all(torch.equal(one, other) for one, other in zip(step(*arguments), wanted)))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
"""
        root = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("wrong", ["envs", "state", "is_first", "dtype"])
    def test_what_does_not_fit_is_refused(wrong):
        policy = policy_of()
        obs, state, is_first = draw(policy)
        obs = obs[:, 1:] if wrong == "envs" else obs.double() if wrong == "dtype" else obs
        state = state[..., 1:] if wrong == "state" else state
        is_first = is_first[1:] if wrong == "is_first" else is_first
        # Without the tests' own check of shapes, which users do not have.
        with pytest.raises(ValueError, match="are needed"):
            compiled_step.CompiledStep.__call__.__wrapped__(policy.stepper(P, E), obs, state, is_first)

    @pytest.mark.parametrize(
        "wrong", [torch.rand(P, E - 1), torch.rand(P, E, 1), torch.rand(P, E).double()], ids=["E", "A", "dtype"]
    )
    def test_noise_that_does_not_fit_is_refused(wrong):
        policy = policy_of()
        act = policy.acting(policy.stepper(P, E), moments().frozen(1.0))
        with pytest.raises(ValueError, match="noise has"):
            type(act).__call__.__wrapped__(act, *draw(policy), wrong)

    def test_statistics_and_deviations_that_do_not_fit_are_refused():
        policy = policy_of(space=MOVES)
        step, frozen = policy.stepper(P, E), moments().frozen(1.0)
        with pytest.raises(ValueError, match="normalize has"):
            policy.acting(step, RunningMoments.create(P, (O + 1,)).frozen(1.0))
        for shape in ((1, 3), (P, 2), (P, 4)):
            with pytest.raises(ValueError, match="log_std has"):
                step.acting(frozen, torch.zeros(shape))
        with pytest.raises(ValueError, match=r"log_std has .*float64"):
            step.acting(frozen, torch.zeros(P, 3).double())
        object.__setattr__(frozen, "mean", frozen.mean.float())
        with pytest.raises(ValueError, match=r"normalize has .*float32"):
            policy.acting(step, frozen)

    def test_observations_without_a_number():
        policy = ActorCritic(Box(-1, 1, (0,)), CHOICES, PolicySettings(memory_size=11), CriticSettings(), range(P))
        obs, state, is_first = torch.empty(P, E, 0), torch.zeros(P, E, policy.state_size), torch.ones(P, E, dtype=torch.bool)
        step, normalize = policy.stepper(P, E), RunningMoments.create(P, (0,)).frozen(1.0)
        found = policy.acting(step, normalize)(obs, state, is_first, torch.rand(P, E))
        assert all(torch.equal(one, other) for one, other in zip(found[1:], step(obs, state, is_first), strict=True))

    @pytest.mark.parametrize("space", [CHOICES, MOVES], ids=str)
    def test_threads_and_memory_order_do_not_change_the_actions(space):
        policy, statistics = policy_of(space=space), moments()
        normalize = statistics.frozen(1.0)
        arguments = (*draw(policy), policy.draw_noise(MemberGenerators(range(P), "action"), E))
        wanted = policy.acting(policy.stepper(P, E), normalize)(*arguments)
        for threads in (2, 3, 17):
            set_threads(threads)
            found = policy.acting(policy.stepper(P, E), normalize)(*arguments)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        strided = [tensor.mT.contiguous().mT for tensor in (*arguments, normalize.mean, normalize.inverse)]
        assert not any(tensor.is_contiguous() for tensor in strided)
        *strided_arguments, mean, inverse = strided
        found = policy.acting(policy.stepper(P, E), FrozenNormalizer(mean, inverse, 1.0))(*strided_arguments)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))

    def test_tensors_in_any_memory_order():
        policy = policy_of()
        step = policy.stepper(P, E)
        arguments = draw(policy)
        strided = [tensor.mT.contiguous().mT for tensor in arguments]
        assert not any(tensor.is_contiguous() for tensor in strided)
        assert all(torch.equal(one, other) for one, other in zip(step(*strided), step(*arguments), strict=True))

    def rollout(compiled, monkeypatch, env):
        monkeypatch.setenv("HARDY_COMPILED", str(int(compiled)))
        run = trainer(tiny(env={"id": env}), seeds=(3, 4), dtype=torch.float32)
        collector, generators = run.state.collector, run.state.generators["action"]
        return run, collect(run.env, run.policy, collector, run.frozen_normalizer(), generators, 11)

    @pytest.mark.parametrize("env", ["CartPoleNoVel-v1", "PendulumNoVel-v1"])
    def test_a_rollout_is_that_of_pytorch_and_what_training_sees(env, monkeypatch):
        _, wanted = rollout(False, monkeypatch, env)
        run, found = rollout(True, monkeypatch, env)
        for name, value in vars(wanted).items():
            torch.testing.assert_close(getattr(found, name), value, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            log_prob = run.policy(found.obs, found.initial_state, found.is_first)[0].log_prob(found.action)
        assert ((log_prob - found.log_prob).exp() - 1).abs().max() < 1e-5
