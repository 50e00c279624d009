"""PPO's loss in the compiled library against the one by PyTorch's operations: every instruction set, all kinds of critics."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from gymnasium.spaces import Box, Discrete
from instruction_sets import LEVELS
from small_runs import tiny, trainer

from hardy import ppo
from hardy.nn import compiled_loss
from hardy.ops.critic import CriticSettings
from hardy.parallel import set_threads
from hardy.policy import ActorCritic, PolicySettings

pytestmark = pytest.mark.skipif(not compiled_loss.available(), reason="Hardy was installed without its compiled library")
P, T, E, A = 3, 11, 7, 5
CRITICS = {
    "mean": {"quantiles": 1},
    "quantiles": {"quantiles": 5, "huber_threshold": 0.3},
    "twins": {"quantiles": 4, "twin": True},
    "no Huber": {"quantiles": 3, "huber_threshold": 0.0},
    "scalar": {"kind": "scalar"},
    "scalar twins": {"kind": "scalar", "twin": True},
}
SPACES = {"two": Discrete(2), "five": Discrete(A), "continuous": Box(-1, 1, (A,))}


@pytest.fixture(autouse=True)
def on_and_in_parts(monkeypatch):
    monkeypatch.delenv("HARDY_COMPILED", raising=False)
    monkeypatch.setattr(compiled_loss, "SMALLEST_PART", 1)
    yield
    set_threads(1)


@dataclasses.dataclass
class Case:
    """A minibatch, with the outputs of a policy that is asked for nothing else."""

    policy: ActorCritic
    leaves: dict[str, torch.Tensor]
    batch: ppo.Batch
    hyper: dict[str, torch.Tensor]
    steps: torch.Tensor

    def loss(self):
        self.policy.outputs = lambda *_: (self.leaves["outputs"], self.leaves["critic"])
        return ppo.loss(self.policy, self.batch, self.hyper, self.steps)

    def results(self):
        """Loss, parts and gradients by name, the members weighted."""
        total, parts = self.loss()
        weights = torch.linspace(0.5, 2.0, len(total), dtype=total.dtype)
        gradients = torch.autograd.grad((total * weights).sum(), list(self.leaves.values()))
        return {"loss": total.detach(), **parts, **dict(zip(self.leaves, gradients, strict=True))}

    def to(self, dtype):
        """The same in another precision."""

        def cast(tensor):
            return tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()

        batch = {field.name: cast(getattr(self.batch, field.name)) for field in dataclasses.fields(self.batch)}
        policy = make_policy(self.policy.action_space, self.policy.values.settings)
        leaves = {name: cast(leaf.detach()).requires_grad_() for name, leaf in self.leaves.items()}
        if "log_std" in leaves:
            leaves["log_std"] = policy.actor.log_std = torch.nn.Parameter(leaves["log_std"].detach())
        hyper = {name: cast(value) for name, value in self.hyper.items()}
        return Case(policy, leaves, ppo.Batch(**batch), hyper, cast(self.steps))


def make_policy(space, critic, members=P):
    return ActorCritic(Box(-1, 1, (2,)), space, PolicySettings(memory="none", encoder=(3,)), critic, range(members))


def make_case(space="two", critic="mean", targets=1, spread=0.3):
    """Random numbers; ratios around 1 by ``spread``."""
    policy = make_policy(SPACES[space], CriticSettings(**CRITICS[critic]))
    critic_size = policy.values.heads * policy.critic.output.weight.shape[1]
    leaves = {
        "outputs": torch.randn(P, T, E, policy.actor.output.weight.shape[1]).requires_grad_(),
        "critic": torch.randn(P, T, E, critic_size).requires_grad_(),
    }
    if policy.actor.log_std is not None:
        policy.actor.log_std.data.normal_(0, 0.3)
        leaves["log_std"] = policy.actor.log_std
    distribution = policy.distribution(leaves["outputs"].detach())
    drawn = torch.rand if distribution.noise_kind == "uniform" else torch.randn
    action = distribution.sample(drawn(distribution.noise_shape))
    batch = ppo.Batch(
        obs=torch.randn(P, T, E, 2),
        is_first=torch.zeros(P, T, E, dtype=torch.bool),
        initial_state=torch.zeros(P, E, 0),
        action=action,
        log_prob=(distribution.log_prob(action) + spread * torch.randn(P, T, E)).detach(),
        advantage=torch.randn(P, T, E),
        returns=torch.randn(P, T, E),
        targets=torch.randn(P, T, E, targets),
        critic=leaves["critic"].detach(),
        valid=torch.rand(P, T, E) < 0.8,
    )
    hyper = {
        "ppo.clip_range": torch.tensor([0.1, 0.2, 0.3]),
        "ppo.vf_coef": torch.tensor([0.5, 1.0, 2.0]),
        "ppo.ent_coef": torch.tensor([0.0, 0.1, 0.01]),
        "critic.value_clip": torch.zeros(P),
    }
    return Case(policy, leaves, batch, hyper, batch.valid.flatten(1).sum(1).float() + 4)


@pytest.fixture
def calls(monkeypatch):
    """The options of each call that the library got."""
    seen, real = [], compiled_loss.ppo_loss

    def counted(*args):
        seen.append(args[4])
        return real(*args)

    monkeypatch.setattr(compiled_loss, "ppo_loss", counted)
    return seen


def assert_near(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        scale = wanted[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            value.double() / scale, wanted[name] / scale, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("targets", [1, 4])
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("space", SPACES)
def test_loss_parts_and_gradients_are_those_of_the_definition(space, critic, targets, level, calls, monkeypatch):
    case = make_case(space, critic, targets)
    options = compiled_loss.Options
    monkeypatch.setattr(compiled_loss, "Options", lambda *args: options(*args, level=level))
    found = case.results()
    assert [call.level for call in calls] == [level]
    wanted = case.to(torch.float64).results()
    assert len(calls) == 1, "float64 is not the library's"
    assert_near(found, wanted, 2e-5 if space == "continuous" else 5e-6)


def test_it_is_one_with_the_path_without_the_library(monkeypatch, calls):
    case = make_case("five", "twins", 3)
    found = case.results()
    monkeypatch.setenv("HARDY_COMPILED", "0")
    wanted = case.results()
    assert len(calls) == 1
    assert_near(found, {name: value.double() for name, value in wanted.items()}, 5e-6)


def test_threads_and_other_members_change_nothing():
    case = make_case("continuous", "quantiles", 2)
    one = case.results()
    set_threads(3)
    for name, value in case.results().items():
        assert torch.equal(value, one[name]), name
    case.batch.advantage[1], case.leaves["critic"].data[1] = torch.nan, torch.nan
    for name, value in case.results().items():
        assert torch.equal(value[[0, 2]], one[name][[0, 2]]), name
        assert not value[1].isfinite().all() or name in ("train/entropy", "train/approx_kl", "train/clip_fraction"), name


def test_steps_that_are_not_valid_count_for_nothing_whatever_they_hold():
    case = make_case("five", "quantiles", 2)
    before = case.results()
    out = ~case.batch.valid
    for tensor in (case.batch.log_prob, case.batch.advantage, case.batch.targets):
        tensor[out] = torch.nan
    for leaf in case.leaves.values():
        leaf.data[out] = torch.nan
    for name, value in case.results().items():
        assert torch.equal(value, before[name]), name
    assert (case.results()["outputs"][out] == 0).all()


def test_a_step_that_is_not_finite_makes_its_members_loss_and_gradient_so():
    for field in ("log_prob", "advantage", "targets"):
        case = make_case("two")
        getattr(case.batch, field)[1, 4, 2], case.batch.valid[1, 4, 2] = torch.nan, True
        found = case.results()
        assert found["loss"].isfinite().tolist() == [True, False, True], field
        leaf = "critic" if field == "targets" else "outputs"
        assert found[leaf].isfinite().flatten(1).all(1).tolist() == [True, False, True], field
    case = make_case("two")
    case.leaves["outputs"].data[2, 0, 0, 1], case.batch.valid[2, 0, 0] = torch.nan, True
    assert case.results()["outputs"].isfinite().flatten(1).all(1).tolist() == [True, True, False]


@pytest.mark.parametrize("distance", [60.0, -60.0])
def test_a_huge_ratio_stays_finite(distance):
    """As the definition: beyond e^50 a ratio does not grow, and has no gradient."""
    case = make_case("two", spread=0.0)
    case.batch.log_prob.sub_(distance)
    found, wanted = case.results(), case.to(torch.float64).results()
    assert all(value.isfinite().all() for value in found.values())
    assert_near(found, wanted)


def test_a_forbidden_action_has_no_probability_and_no_entropy():
    case = make_case("five")
    case.leaves["outputs"].data[..., 3] = -torch.inf
    case.batch.action.clamp_(max=2)
    found, wanted = case.results(), case.to(torch.float64).results()
    assert (found["outputs"][..., 3] == 0).all()
    wanted["outputs"] = torch.where(wanted["outputs"].isnan(), 0.0, wanted["outputs"])
    assert_near(found, wanted)


def test_small_probabilities_are_right_relative_to_themselves():
    """A confident policy has little entropy left, but not none."""
    case = make_case("five", spread=0.01)
    case.hyper["ppo.ent_coef"].fill_(1.0)
    case.hyper["ppo.vf_coef"].zero_()
    case.batch.advantage.zero_()
    case.leaves["outputs"].data.copy_(torch.tensor([18.0, 0.0, 1.0, -1.0, 2.0]))
    found, wanted = case.results(), case.to(torch.float64).results()
    for name in ("train/entropy", "outputs"):
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=0.05, atol=0)


def test_an_action_beyond_all_measure_leaves_the_deviation_finite():
    case = make_case("continuous")
    case.batch.action[1, 2, 3], case.batch.valid[1, 2, 3] = 1e25, True
    assert all(case.results()[leaf].isfinite().all() for leaf in case.leaves)


def test_at_the_very_bound_of_the_clip_range_the_gradient_is_whole(monkeypatch):
    """On both paths: the ratio is 1, and so are both ends of a range of nothing."""
    case = make_case("two")
    case.leaves["outputs"].data.zero_()
    case.batch.log_prob.fill_(-math.log(2.0))
    whole = case.results()["outputs"].double()
    case.hyper["ppo.clip_range"].zero_()
    for switch in ("1", "0"):
        monkeypatch.setenv("HARDY_COMPILED", switch)
        assert_near({"outputs": case.results()["outputs"]}, {"outputs": whole})


def test_default_dtype_and_device_of_the_user_change_nothing():
    case = make_case("continuous", "twins", 2)
    found = case.results()
    with torch.device("meta"):
        elsewhere = case.loss()[0].detach()
    assert torch.equal(elsewhere, found["loss"])
    torch.set_default_dtype(torch.float64)
    try:
        again = case.results()
        skipped = trainer(tiny(), [1, 2], dtype=torch.float32).iterate(10_000)["train/skipped_updates"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert skipped.tolist() == [0, 0]
    for name, value in found.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize(
    ("critic", "reason"),
    [({"kind": "categorical"}, "its targets are projected"), ({"value_clip": 0.1}, "quantiles are held near the old ones")],
)
def test_what_it_does_not_know_is_left_to_pytorch(critic, reason, calls):
    run = trainer(tiny(critic=critic), [1], dtype=torch.float32)
    run.iterate(10_000)
    assert not calls, reason


def test_training_goes_through_it(calls):
    run = trainer(tiny(), [1, 2], dtype=torch.float32)
    metrics = run.iterate(10_000)
    assert len(calls) == run.settings.ppo.n_epochs * run.settings.ppo.n_minibatches
    assert metrics["train/entropy"].isfinite().all()


def test_shapes_that_do_not_belong_together_are_refused():
    case = make_case("two", "twins")
    given = compiled_loss.Given(
        *(case.batch.action, case.batch.log_prob, case.batch.advantage, case.batch.targets, case.batch.valid),
        *(case.hyper["ppo.clip_range"], case.hyper["ppo.vf_coef"], case.hyper["ppo.ent_coef"], case.steps),
    )
    options = compiled_loss.Options(critics=2, squared=False, kappa=1.0, most_log_ratio=50.0)
    outputs, critic = case.leaves["outputs"], case.leaves["critic"]
    with pytest.raises(ValueError, match="critic of shape"):
        compiled_loss._check_shapes(outputs, critic[:, 1:], None, given, options)
    with pytest.raises(ValueError, match="action of shape"):
        compiled_loss._check_shapes(outputs[:, 1:], critic[:, 1:], None, given, options)
    means = dataclasses.replace(given, action=torch.zeros(P, T, E, 2))
    with pytest.raises(ValueError, match="log_std of shape"):
        compiled_loss._check_shapes(outputs, critic, torch.zeros(P, 3), means, options)
    for wrong in (dataclasses.replace(options, critics=3), dataclasses.replace(options, squared=True)):
        with pytest.raises(ValueError, match="critic of shape"):
            compiled_loss._check_shapes(outputs, critic, None, given, wrong)
