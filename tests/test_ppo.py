"""The update of a population: who trains, on what, and how members stay out of one another's way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_runs import assert_same, member, shake_, snapshot, tiny, trainer

import hardy.ppo as ppo
from hardy.config import ConfigError
from hardy.minibatch import Progress
from hardy.population import leaves
from hardy.ppo import PPOSettings, make_batch, scheduled

LONG = 10_000


def caught(run):
    """The list that the rollouts of ``run`` are put into as they are trained on."""
    rollouts, update = [], run.ppo.update
    run.ppo.update = lambda rollout, *rest: (rollouts.append(rollout), update(rollout, *rest))[1]
    return rollouts


def gradients_of(run, rollout):
    batch = make_batch(rollout, run.state.hyper, normalize=True)
    return run.ppo._gradients(batch, run.state.hyper, run.state.optimizer)[0]


# ------------------------------------------------------------------------------------------------------------ target KL


def test_the_kl_stop_is_a_mask_of_the_members_alone():
    """A member with a huge lr stops; the other trains on, bit for bit as beside a member that does not stop."""
    settings = tiny(ppo={"target_kl": 0.004, "n_epochs": 5})
    steps = []
    states = {}
    for rate in (1e-6, 0.5):
        run = trainer(settings, [1, 2])
        run.state.hyper["optimizer.lr"].copy_(torch.tensor([1e-6, rate]))
        metrics = run.iterate(LONG)
        steps.append(run.state.optimizer.upgd.step[:, 0].tolist())
        states[rate] = snapshot(run.state)
        if rate == 0.5:
            assert metrics["train/approx_kl"][0] < 1e-3
    assert steps[0] == [10, 10]
    assert steps[1][0] == 10
    assert 1 <= steps[1][1] < 10
    assert_same(member(states[0.5], 0), member(states[1e-6], 0))
    alone = trainer(settings, [1])
    alone.state.hyper["optimizer.lr"].fill_(1e-6)
    alone.iterate(LONG)
    assert_same(member(states[0.5], 0), snapshot(alone.state), 1e-12)


def test_a_stopped_member_skips_the_step_that_would_exceed_and_stays_stopped(monkeypatch):
    """It draws no noise and no order any more, and trains again on the next rollout."""
    run = trainer(tiny(ppo={"target_kl": 0.01, "n_epochs": 3, "n_minibatches": 2}, optimizer={"sigma": 0.1}), [1, 2, 3])
    none = [0.0, 0.0, 0.0]
    kls = iter([none, [0.0150001, 0.0149999, 0.0], none, [0.0, 1.0, 0.0], none, [0.0, 0.0, torch.nan], *[none] * 6])
    real = run.ppo._gradients

    def with_kl(*args):
        gradients, metrics = real(*args)
        return gradients, {**metrics, "train/approx_kl": torch.tensor(next(kls), dtype=torch.float64)}

    monkeypatch.setattr(run.ppo, "_gradients", with_kl)
    shuffles = trainer(tiny(), [1, 2, 3]).state.generators["shuffle"]
    metrics = run.iterate(LONG)
    assert run.state.optimizer.upgd.step[:, 0].tolist() == [1, 3, 6]
    for epoch in range(3):
        shuffles.permutations(5, torch.tensor([epoch < 1, epoch < 2, True]))
    assert torch.equal(run.state.generators["shuffle"].get_state(), shuffles.get_state())
    assert metrics["train/approx_kl"][:2].tolist() == pytest.approx([0.0, 0.0149999 / 3])
    run.iterate(LONG)
    assert run.state.optimizer.upgd.step[:, 0].tolist() == [7, 9, 12]


def test_without_a_target_no_member_ever_stops():
    run = trainer(tiny(ppo={"n_epochs": 3}, optimizer={"lr": 0.5}), [1, 2])
    metrics = run.iterate(LONG)
    assert metrics["train/approx_kl"].min() > 0.01
    assert run.state.optimizer.upgd.step[:, 0].tolist() == [6, 6]


# ------------------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(("kind", "factor"), [("constant", 1.0), ("linear", 0.75), ("cosine", 0.853553)])
def test_schedules_multiply_the_base_and_never_write_to_it(kind, factor):
    hyper = {"optimizer.lr": torch.tensor([0.1, 0.2]), "ppo.clip_range": torch.tensor([0.3, 0.4]), "ppo.gamma": torch.ones(2)}
    base = {name: value.clone() for name, value in hyper.items()}
    current = scheduled(hyper, PPOSettings(lr_schedule=kind), 0.25)
    torch.testing.assert_close(current["optimizer.lr"], base["optimizer.lr"] * factor)
    assert torch.equal(current["ppo.clip_range"], base["ppo.clip_range"])
    current = scheduled(hyper, PPOSettings(clip_schedule=kind), 0.25)
    torch.testing.assert_close(current["ppo.clip_range"], base["ppo.clip_range"] * factor)
    assert torch.equal(current["optimizer.lr"], base["optimizer.lr"])
    for name, value in base.items():
        assert torch.equal(hyper[name], value)


def test_the_update_reads_the_base_that_the_state_holds_at_that_moment():
    run = trainer(tiny(ppo={"lr_schedule": "linear", "clip_schedule": "linear"}), [1, 2])
    base = run.state.hyper["optimizer.lr"]
    base.copy_(torch.tensor([0.01, 0.02]))
    length = 4 * run.steps_per_iteration
    rates = []
    for iteration in range(4):
        if iteration == 2:
            base.mul_(3)  # as an exploration between iterations would
        before = snapshot(run.state)
        rates.append(run.iterate(length)["train/learning_rate"].tolist())
        assert_same({k: v for k, v in snapshot(run.state).items() if k.startswith("hyper")},
                    {k: v for k, v in before.items() if k.startswith("hyper")})  # fmt: skip
    expected = [[0.01, 0.02], [0.0075, 0.015], [0.015, 0.03], [0.0075, 0.015]]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))
    before = snapshot(run.state)
    run.iterate(length)  # beyond the end of the run: the rate, and with it the step, is 0
    after = snapshot(run.state)
    assert_same({k: v for k, v in after.items() if k.startswith("parameters")},
                {k: v for k, v in before.items() if k.startswith("parameters")})  # fmt: skip
    assert not torch.equal(after["optimizer.upgd.step"], before["optimizer.upgd.step"])


NUMBERS = ("ppo.gamma", "ppo.gae_lambda", "ppo.clip_range", "ppo.ent_coef", "ppo.vf_coef", "optimizer.lr", "optimizer.sigma",
           "optimizer.max_grad_norm", "vgs.alpha")  # fmt: skip


def test_each_member_trains_with_its_own_hyperparameter():
    """Written into the state, each number reaches that member's update and nobody else's."""
    states = {}
    for name in (None, *NUMBERS):
        # Rewards unscaled: γ would otherwise reach the update through their scale alone.
        run = trainer(tiny(optimizer={"lr": 0.3}, ppo={"n_epochs": 3}, normalizer={"reward": False}), [1, 2])
        if name is not None:
            run.state.hyper[name][1] = run.state.hyper[name][1] * 0.1 + 0.01
        run.iterate(LONG)
        states[name] = {path: value for path, value in snapshot(run.state).items() if path.startswith("parameters")}
    for name in NUMBERS:
        assert_same(member(states[name], 0), member(states[None], 0))
        assert any(not torch.equal(states[name][path][1], value[1]) for path, value in states[None].items()), name


# ------------------------------------------------------------------------------------------------------------ members


def test_losses_are_summed_over_members_not_averaged():
    together = trainer(tiny(), [1, 2, 3])
    held = caught(together)
    together.iterate(LONG)
    shake_(together.policy, 0.1)
    found = gradients_of(together, held[0])
    for p, seed in enumerate([1, 2, 3]):
        alone = trainer(tiny(), [seed])
        for name, parameter in alone.state.parameters.items():
            parameter.copy_(together.state.parameters[name][p : p + 1])
        own = dataclasses.replace(held[0], **{f.name: getattr(held[0], f.name)[p : p + 1] for f in dataclasses.fields(held[0])})
        for name, gradient in gradients_of(alone, own).items():
            torch.testing.assert_close(found[name][p : p + 1], gradient, atol=1e-12, rtol=1e-12, msg=name)
            assert gradient.abs().max() > 0


def test_advantages_are_normalised_for_each_member_alone():
    run = trainer(tiny(), [1, 2, 3])
    held = caught(run)
    run.iterate(LONG)
    rollout = dataclasses.replace(held[0], reward=held[0].reward * torch.tensor([1.0, 100.0, 1.0]).view(3, 1, 1))
    batch, raw = (make_batch(rollout, run.state.hyper, normalize=choice) for choice in (True, False))
    assert raw.advantage[1].std() > 20 * raw.advantage[0].std()
    torch.testing.assert_close(batch.advantage.mean((1, 2)), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(batch.advantage.flatten(1).std(1, correction=0), torch.ones(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(raw.returns, raw.advantage + rollout.value)
    assert torch.equal(batch.returns, raw.returns)


def test_a_batch_of_chosen_environments_holds_those_of_each_member():
    run = trainer(tiny(), [1, 2, 3])
    held = caught(run)
    run.iterate(LONG)
    batch = make_batch(held[0], run.state.hyper, normalize=True)
    chosen = torch.tensor([[4, 0], [1, 3], [2, 2]])
    part = batch.environments(chosen)
    for name in (field.name for field in dataclasses.fields(batch)):
        whole, some = getattr(batch, name), getattr(part, name)
        for p, index in enumerate(chosen.tolist()):
            for position, e in enumerate(index):
                if name == "initial_state":
                    assert torch.equal(some[p, position], whole[p, e])
                else:
                    assert torch.equal(some[p, :, position], whole[p, :, e])
    assert torch.equal(batch.environments(slice(1, 3)).obs, batch.obs[:, :, 1:3])
    assert torch.equal(batch.environments(slice(1, 3)).initial_state, batch.initial_state[:, 1:3])


# ------------------------------------------------------------------------------------------------------------ failures


def spoil_reward(run, p):
    step = run.env.step

    def spoiled(actions):
        found = step(actions)
        found.reward.reshape(len(run.seeds), -1)[p, 1] = float("nan")
        return found

    run.env.step = spoiled


def spoil_weights(run, p):
    next(iter(run.state.parameters.values()))[p].fill_(float("nan"))


@pytest.mark.parametrize("spoil", [spoil_reward, spoil_weights])
@pytest.mark.parametrize("estimator", ["ema", "microbatch"])
def test_nan_in_one_member_leaves_the_others_bit_identical_and_is_counted(spoil, estimator):
    settings = tiny(env={"num_envs": 8}, vgs={"estimator": estimator}, optimizer={"sigma": 0.1})
    clean, hurt = trainer(settings, [1, 2, 3]), trainer(settings, [1, 2, 3])
    spoil(hurt, 1)
    for _ in range(2):
        clean.iterate(LONG)
        metrics = hurt.iterate(LONG)
        assert metrics["train/skipped_updates"].tolist() == [0, 4, 0]
        assert metrics["train/policy_loss"][[0, 2]].isfinite().all()
        assert metrics["train/policy_loss"][1].isnan()
    found, expected = snapshot(hurt.state), snapshot(clean.state)
    for p in (0, 2):
        assert_same(member(found, p), member(expected, p))
    assert found["optimizer.upgd.step"][1].eq(0).all()


@pytest.mark.parametrize("estimator", ["ema", "microbatch"])
def test_a_rollout_with_a_nan_reward_is_skipped_and_the_next_one_trains(estimator):
    """A single agent: its weights stay as they were, and nothing of the NaN is left behind."""
    run = trainer(tiny(env={"num_envs": 8}, vgs={"estimator": estimator}), [1])
    before = {name: value.clone() for name, value in run.state.parameters.items()}
    step = run.env.step
    spoil_reward(run, 0)
    metrics = run.iterate(LONG)
    assert metrics["train/skipped_updates"].tolist() == [4]
    assert_same(dict(run.state.parameters), before)
    run.env.step = step
    run.state.collector.episode_return.nan_to_num_()
    for _ in range(2):
        assert run.iterate(LONG)["train/skipped_updates"].tolist() == [0]
    for leaf in leaves(run.state):
        if leaf.path.startswith(("parameters", "optimizer", "observation", "reward")):
            assert leaf.tensor.isfinite().all(), leaf.path
    assert any(not torch.equal(value, before[name]) for name, value in run.state.parameters.items())


def test_a_skipped_or_stopped_update_leaves_no_microbatch_behind(monkeypatch):
    """Its recorded contributions do not count towards the next update's variance."""
    settings = tiny(
        env={"num_envs": 8}, vgs={"estimator": "microbatch"}, ppo={"target_kl": 1e-12, "n_epochs": 1}, optimizer={"lr": 0.1}
    )
    run = trainer(settings, [1])
    run.iterate(LONG)
    assert run.state.optimizer.upgd.step[0, 0] == 1  # the second minibatch exceeded the target
    assert run.state.optimizer.vgs.microbatches.tolist() == [0]
    assert run.state.optimizer.vgs.microbatch_squares.eq(0).all()


def test_metrics_are_means_over_the_minibatches_that_a_member_trained_on(monkeypatch):
    run = trainer(tiny(ppo={"n_epochs": 1, "n_minibatches": 5}), [1, 2])
    losses = []
    loss = ppo.loss
    monkeypatch.setattr(ppo, "loss", lambda *args: (losses.append(found := loss(*args)), found)[1])
    metrics = run.iterate(LONG)
    for name in ("train/policy_loss", "train/value_loss", "train/entropy", "train/approx_kl", "train/clip_fraction"):
        expected = torch.stack([parts[name] for _, parts in losses]).mean(0)
        torch.testing.assert_close(metrics[name], expected, atol=1e-12, rtol=1e-12)
    wanted = {"train/grad_norm", "train/explained_variance", "vgs/scaling_factor", "vgs/normalized_variance",
              "upgd/noise_to_signal", "upgd/utility_max", "plasticity/dormant_fraction"}  # fmt: skip
    assert wanted <= metrics.keys()
    assert all(metrics[name].shape == (2,) for name in wanted)


def test_unequal_microbatches_are_refused():
    """Parts of unequal size differ even where the gradient has no noise."""
    with pytest.raises(ConfigError, match=r"env.num_envs = 5 must be a multiple of .* = 4"):
        tiny(env={"num_envs": 5}, vgs={"estimator": "microbatch"})


def test_means_are_over_the_minibatches_that_a_member_trained_on():
    progress, every = Progress(3, torch.zeros(3)), torch.ones(3, dtype=torch.bool)
    stopped, broken = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    nan = torch.full((3,), torch.nan)
    for _ in range(2):  # begun anew, the second update knows nothing of the first
        progress.begin_()
        progress.add_({"a": torch.tensor([3.0, 2.0, 4.0])}, every, every)
        # What first appears later, or is missing later, counts as 0 where it is not there.
        progress.add_({"a": torch.tensor([3.0, torch.nan, 8.0]), "b": torch.tensor([6.0, torch.nan, 2.0])}, every, broken)
        progress.add_({"b": torch.tensor([3.0, 4.0, torch.nan])}, stopped, every)
        means = progress.mean()
        assert means["a"].tolist() == [2.0, 1.0, 6.0]
        assert means["b"].tolist() == [3.0, 2.0, 1.0]
        assert progress.skipped.tolist() == [0, 1, 0]
        assert progress.running.tolist() == stopped.tolist()
    progress.begin_()
    progress.add_({"a": nan, "b": nan}, every, ~every)
    assert all(mean.isnan().all() for mean in progress.mean().values())
