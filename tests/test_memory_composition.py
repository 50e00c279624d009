"""The "Memory" rows of the composition contract: what must hold between the recurrent state and every other part."""

from __future__ import annotations

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from small_runs import EVERYTHING, TERMINATED, TRUNCATED, assert_same, scripted, shake_, snapshot, tiny, trainer

import hardy.ppo as ppo
from hardy import DistributionalPPO
from hardy.checkpoint import load_tensors
from hardy.envs import make_from
from hardy.ops.policy_loss import approx_kl, log_ratio

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class EnoughError(Exception):
    """The last first minibatch has been seen; the rest of its update would cost time only."""


class FirstMinibatches:
    """Largest |ratio − 1| and KL on the first minibatch that each update trains on."""

    def __init__(self, monkeypatch, run):
        self.run, self.ratio, self.kl = run, [], []
        loss, update = ppo.loss, run.ppo.update

        def watched_loss(policy, batch, *rest):
            if self.fresh:
                self.fresh = False
                with torch.no_grad():
                    log_prob = policy(batch.obs, batch.initial_state, batch.is_first)[0].log_prob(batch.action)
                self.ratio.append(float((log_prob - batch.log_prob).expm1().abs().max()))
                self.kl.append(float(approx_kl(log_ratio(log_prob, batch.log_prob)).max()))
                if len(self.kl) == self.count:
                    raise EnoughError
            return loss(policy, batch, *rest)

        def watched_update(*arguments):
            self.fresh = True
            return update(*arguments)

        monkeypatch.setattr(ppo, "loss", watched_loss)
        monkeypatch.setattr(run.ppo, "update", watched_update)

    def check(self, count, tolerance):
        self.count = count
        with pytest.raises(EnoughError):
            for _ in range(count):
                self.run.iterate(1000)
        assert len(self.ratio) == count
        assert max(self.ratio) <= tolerance
        assert max(self.kl) <= tolerance


SWITCH = (True, False)
COMBINATIONS = list(
    itertools.product(
        ("none", "lstm", "gru"), SWITCH, ("CartPoleNoVel-v1", "PendulumNoVel-v1"), SWITCH, SWITCH, SWITCH, (1, 3)
    )
)  # fmt: skip


def precision(combination):
    """Single or double, in turn, so that either meets every pair of choices."""
    chosen = sum(part in ("lstm", True, "PendulumNoVel-v1", 3) for part in combination[:-1]) + (combination[-1] == 3)
    return torch.float32 if chosen % 2 else torch.float64


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda parts: "-".join(map(str, parts)))
def test_first_minibatch_has_ratio_one_and_kl_zero(monkeypatch, combination):
    """In the first iteration, and after weights and normaliser have moved while memories and episodes run on."""
    memory, shared, env, layer_norm, normalise, vgs, members = combination
    settings = tiny(
        env={"id": env, "num_envs": 3, "max_episode_steps": 3},
        policy={"memory": memory, "shared_memory": shared, "layer_norm": layer_norm},
        ppo={"n_steps": 4, "n_epochs": 1, "n_minibatches": 1},
        optimizer={"lr": 0.03},
        normalizer={"observation": normalise, "reward": normalise},
        vgs={"enabled": vgs},
    )
    dtype = precision(combination)
    run = trainer(settings, range(members), dtype)
    shake_(run.policy)
    FirstMinibatches(monkeypatch, run).check(2, TOLERANCE[dtype])


def make_cartpole():
    return gymnasium.make("CartPole-v1", max_episode_steps=6)


def make_pendulum():
    return gymnasium.make("Pendulum-v1", max_episode_steps=6)


@pytest.mark.parametrize("mode", AutoresetMode, ids=lambda mode: mode.name)
@pytest.mark.parametrize("factory", [make_cartpole, make_pendulum])
@pytest.mark.parametrize(("members", "memory"), [(1, "gru"), (3, "lstm")])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_first_minibatch_in_every_autoreset_mode(monkeypatch, dtype, members, memory, factory, mode):
    env = make_from(SyncVectorEnv([factory] * (2 * members), autoreset_mode=mode), list(range(members)))
    settings = tiny(policy={"memory": memory}, env={"num_envs": 2}, optimizer={"lr": 0.03}, ppo={"n_epochs": 1})
    run = trainer(settings, range(members), dtype, env)
    FirstMinibatches(monkeypatch, run).check(2, TOLERANCE[dtype])
    env.close()


# Nine steps of episodes in every row, each row ending at the same step: the rollouts of all modes hold the same episodes.
ALIGNED = [
    [(3, TRUNCATED), (4, TERMINATED), (2, TRUNCATED)],
    [(2, TERMINATED), (4, TRUNCATED), (3, TERMINATED)],
    [(4, TERMINATED), (2, TERMINATED), (3, TRUNCATED)],
]


def aligned_batch(mode):
    """The batch of one rollout over the same nine steps of every row, and its policy, moved away from collecting."""
    env = scripted(ALIGNED, mode)
    settings = tiny(env={"num_envs": 3}, ppo={"n_steps": 11 if mode is AutoresetMode.NEXT_STEP else 9}, optimizer={"lr": 0.1})
    run = trainer(settings, [3], env=env)
    torch.manual_seed(0)
    shake_(run.policy, 0.5)
    # The same number for every action: the modes would otherwise draw at different steps.
    run.policy.draw_noise = lambda generators, *batch: torch.full((1, *batch), 0.37, dtype=torch.float64)
    held = []
    update = run.ppo.update

    def keep(rollout, *rest):
        held.append(rollout)
        return update(rollout, *rest)

    run.ppo.update = keep
    run.iterate(1000)
    return run, held[0], ppo.make_batch(held[0], run.state.hyper, normalize=True)


def test_every_autoreset_mode_trains_on_the_same_transitions():
    found = {mode: aligned_batch(mode) for mode in AutoresetMode}
    base_run, base_rollout, base = found[AutoresetMode.DISABLED]
    assert base.valid.all()
    steps = base.valid.sum((1, 2)).double()
    assert steps.tolist() == [27.0]
    base_loss, base_parts = ppo.loss(base_run.policy, base, base_run.state.hyper, steps)
    gradients = torch.autograd.grad(base_loss.sum(), list(base_run.policy.parameters()))
    for mode, (run, rollout, batch) in found.items():
        assert batch.valid.sum() == 27
        assert int((~batch.valid).sum()) == (6 if mode is AutoresetMode.NEXT_STEP else 0)
        for e in range(3):
            keep = batch.valid[0, :, e]
            for name in ("obs", "action", "log_prob", "advantage", "returns"):
                mine, theirs = getattr(batch, name)[0, keep, e], getattr(base, name)[0, :, e]
                torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
            assert torch.equal(rollout.terminated[0, keep, e], base_rollout.terminated[0, :, e])
            assert torch.equal(rollout.truncated[0, keep, e], base_rollout.truncated[0, :, e])
        loss, parts = ppo.loss(run.policy, batch, run.state.hyper, steps)
        torch.testing.assert_close(loss, base_loss, atol=1e-12, rtol=1e-12)
        assert_same(parts, base_parts, 1e-12)
        for mine, theirs in zip(torch.autograd.grad(loss.sum(), list(run.policy.parameters())), gradients, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
        # The whole iteration came out the same: normaliser, optimizer and weights saw no fake transition either.
        for part in ("parameters", "observation", "optimizer", "reward"):
            ours, wanted = ({k: v for k, v in snapshot(r.state).items() if k.startswith(part)} for r in (run, base_run))
            assert_same(ours, wanted, 1e-10)


def test_a_fake_transition_reaches_nothing_whatever_it_holds():
    run, rollout, batch = aligned_batch(AutoresetMode.NEXT_STEP)
    steps = batch.valid.sum((1, 2)).double()
    clean, _ = ppo.loss(run.policy, batch, run.state.hyper, steps)
    fake = ~rollout.valid
    for name in ("reward", "next_value", "value"):
        getattr(rollout, name)[fake] = float("nan")
    spoiled = ppo.make_batch(rollout, run.state.hyper, normalize=True)
    for name in ("log_prob", "returns"):
        getattr(spoiled, name)[fake] = 1e6
    assert torch.equal(ppo.loss(run.policy, spoiled, run.state.hyper, steps)[0], clean)


# ------------------------------------------------------------------------------------------ a reference, episode by episode


def reference_loss(run, rollout):
    """Loss of each member and its parts, from `torch.nn.LSTM` on each episode's piece and plain loops over steps."""
    hyper, totals = run.state.hyper, []
    for p in range(len(run.seeds)):
        number = {name: float(value[p]) for name, value in hyper.items()}
        weights = {name: parameter[p] for name, parameter in run.policy.named_parameters()}
        pieces = list(episode_pieces(rollout, p))
        steps = [step for piece in pieces for step in piece["advantage"]]
        mean = sum(steps) / len(steps)
        deviation = (sum((step - mean) ** 2 for step in steps) / len(steps)) ** 0.5
        policy_loss = value_loss = entropy = 0.0
        for piece in pieces:
            logits, quantiles = reference_outputs(weights, piece["obs"], piece["state"], run.settings.policy.memory_size)
            for k, t in enumerate(piece["steps"]):
                e = piece["env"]
                log_probs = logits[k] - logits[k].logsumexp(0)
                ratio = (log_probs[int(rollout.action[p, t, e])] - rollout.log_prob[p, t, e]).exp()
                advantage = (piece["advantage"][k] - mean) / (deviation + 1e-8)
                low, high = 1 - number["ppo.clip_range"], 1 + number["ppo.clip_range"]
                policy_loss = policy_loss - min(ratio * advantage, ratio.clamp(low, high) * advantage)
                entropy = entropy - (log_probs.exp() * log_probs).sum()
                target = float(rollout.value[p, t, e]) + piece["advantage"][k]
                for i, quantile in enumerate(quantiles[k]):
                    u, tau = target - quantile, (i + 0.5) / len(quantiles[k])
                    huber = 0.5 * u**2 if abs(u) <= 1 else abs(u) - 0.5
                    value_loss = value_loss + abs(tau - (1.0 if u < 0 else 0.0)) * huber / len(quantiles[k])
        policy_loss, value_loss, entropy = (total / len(steps) for total in (policy_loss, value_loss, entropy))
        loss = policy_loss + number["ppo.vf_coef"] * value_loss - number["ppo.ent_coef"] * entropy
        totals.append((loss, policy_loss, value_loss, entropy))
    return [torch.stack(values) for values in zip(*totals, strict=True)]


def episode_pieces(rollout, p):
    """Each stretch of one episode: its steps, observations, memory at its start, and advantages by their definition."""
    _, length, envs = rollout.reward.shape
    for e in range(envs):
        cuts = sorted({0, length, *rollout.is_first[p, :, e].nonzero().flatten().tolist()})
        for begin, end in itertools.pairwise(cuts):
            steps = [t for t in range(begin, end) if rollout.valid[p, t, e]]
            fresh = bool(rollout.is_first[p, begin, e])
            state = rollout.initial_state[p, e] if begin == 0 and not fresh else torch.zeros_like(rollout.initial_state[p, e])
            if steps:
                assert steps == list(range(begin, begin + len(steps)))
                yield {
                    "env": e, "steps": steps, "state": state, "obs": rollout.obs[p, steps, e],
                    "advantage": [reference_advantage(rollout, p, steps[k:], e) for k in range(len(steps))],
                }  # fmt: skip


GAMMA, LAMBDA = 0.9, 0.8


def reference_advantage(rollout, p, steps, e):
    total = 0.0
    for k, t in enumerate(steps):
        following = 0.0 if rollout.terminated[p, t, e] else float(rollout.next_value[p, t, e])
        error = float(rollout.reward[p, t, e]) + GAMMA * following - float(rollout.value[p, t, e])
        total += (GAMMA * LAMBDA) ** k * error
    return total


def reference_outputs(weights, obs, state, hidden):
    features = torch.tanh(obs @ weights["core.encoder.linears.0.weight"].T + weights["core.encoder.linears.0.bias"])
    lstm = torch.nn.LSTM(features.shape[1], hidden)
    own = {name.removeprefix("core.memory."): value for name, value in weights.items() if name.startswith("core.memory.")}
    initial = tuple(state.view(2, 1, 1, hidden))
    memory = torch.func.functional_call(lstm, own, (features.unsqueeze(1), initial))[0].squeeze(1)
    logits = memory @ weights["actor.output.weight"].T + weights["actor.output.bias"]
    quantiles = memory @ weights["critic.output.weight"].T + weights["critic.output.bias"]
    return logits, quantiles


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED], ids=lambda mode: mode.name)
def test_the_loss_equals_a_reference_computed_episode_by_episode(mode):
    scripts = [[(3, TRUNCATED), (5, TERMINATED)], [(4, TERMINATED), (2, TRUNCATED)]]
    settings = tiny(env={"num_envs": 2}, ppo={"n_steps": 7, "ent_coef": 0.3, "gamma": GAMMA, "gae_lambda": LAMBDA})
    run = trainer(settings, range(3), env=scripted(scripts, mode, members=3))
    shake_(run.policy, 0.5)
    held, update = [], run.ppo.update
    run.ppo.update = lambda rollout, *rest: (held.append(rollout), update(rollout, *rest))[1]
    run.iterate(1000)
    run.iterate(1000)  # the second rollout starts in the middle of episodes, with a memory that older weights wrote
    rollout = held[1]
    assert not rollout.is_first[:, 0].all()
    shake_(run.policy, 0.1)
    batch = ppo.make_batch(rollout, run.state.hyper, normalize=True)
    steps = batch.valid.sum((1, 2)).double()
    loss, parts = ppo.loss(run.policy, batch, run.state.hyper, steps)
    expected = reference_loss(run, rollout)
    assert parts["train/clip_fraction"].gt(0).any()
    found = [loss, parts["train/policy_loss"], parts["train/value_loss"], parts["train/entropy"]]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), atol=1e-10, rtol=1e-10)
    names = [name for name, _ in run.policy.named_parameters()]
    gradients = torch.autograd.grad(loss.sum(), list(run.policy.parameters()))
    wanted = torch.autograd.grad(expected[0].sum(), list(run.policy.parameters()))
    for name, mine, theirs in zip(names, gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("microbatches", "envs"), [(1, 7), (2, 12)])
def test_uneven_minibatches_count_every_valid_step_once_an_epoch(monkeypatch, microbatches, envs):
    scripts = [[(2 + row, TRUNCATED), (3, TERMINATED)] for row in range(envs)]
    settings = tiny(
        env={"num_envs": envs},
        ppo={"n_minibatches": 3, "n_epochs": 2},
        vgs={"estimator": "microbatch" if microbatches > 1 else "ema", "microbatches": 2},
    )
    run = trainer(settings, range(3), env=scripted(scripts, AutoresetMode.NEXT_STEP, members=3))
    whole, seen, loss, make_batch = [], [], ppo.loss, ppo.make_batch
    monkeypatch.setattr(ppo, "make_batch", lambda *args, **kw: (whole.append(make_batch(*args, **kw)), whole[-1])[1])
    monkeypatch.setattr(ppo, "loss", lambda policy, batch, hyper, steps, *rest: (
        seen.append((batch, steps)), loss(policy, batch, hyper, steps)
    )[1])  # fmt: skip
    run.iterate(1000)
    per_epoch = 3 * microbatches
    assert len(seen) == 2 * per_epoch
    assert sorted({batch.valid.shape[2] for batch, _ in seen}) == ([2, 3] if microbatches == 1 else [2])
    orders = []
    for epoch in (seen[:per_epoch], seen[per_epoch:]):
        for p in range(3):
            trained = torch.cat([batch.returns[p][batch.valid[p]] for batch, _ in epoch])
            expected = whole[0].returns[p][whole[0].valid[p]]
            assert len(expected.unique()) == len(expected)  # so each step is known by its return
            assert torch.equal(trained.sort().values, expected.sort().values)
            orders.append(tuple(trained.tolist()))
        divisors = torch.stack([steps for _, steps in epoch[::microbatches]])
        assert torch.equal(divisors.sum(0), whole[0].valid.sum((1, 2)).double())
    assert len(set(orders)) == 6  # another order for every member and every epoch


def test_microbatches_add_up_to_the_minibatch():
    settings = tiny(env={"num_envs": 8}, vgs={"estimator": "microbatch", "microbatches": 2}, ppo={"ent_coef": 0.1})
    scripts = [[(2 + row, TRUNCATED), (3, TERMINATED)] for row in range(8)]
    run = trainer(settings, range(3), env=scripted(scripts, AutoresetMode.NEXT_STEP, members=3))
    held, update = [], run.ppo.update
    run.ppo.update = lambda rollout, *rest: (held.append(rollout), update(rollout, *rest))[1]
    run.iterate(1000)
    shake_(run.policy, 0.1)
    batch = ppo.make_batch(held[0], run.state.hyper, normalize=True)
    found = {}
    for parts in (1, 2):
        run.ppo.microbatches = parts
        found[parts] = run.ppo._gradients(batch, run.state.hyper, run.state.optimizer)
    assert run.state.optimizer.vgs.microbatches.tolist() == [2, 2, 2]
    for one, two in zip(found[1], found[2], strict=True):
        assert_same(two, one, 1e-12)
    assert found[1][1]["train/clip_fraction"].gt(0).any()


# ------------------------------------------------------------------------------------------------ normaliser, evaluation, files


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED], ids=lambda mode: mode.name)
def test_the_normaliser_stands_still_within_an_iteration_and_moves_after_it(monkeypatch, mode):
    env = scripted([[(4, TRUNCATED)], [(3, TERMINATED)], [(5, TRUNCATED)]], mode, members=3)
    run = trainer(tiny(env={"num_envs": 3}, normalizer={"epsilon": 1e-6}), range(3), env=env)
    loss, update, frozen = ppo.loss, run.ppo.update, run.frozen_normalizer
    means, rollouts = [], []

    def note():
        means.append(run.state.observation.mean.clone())

    monkeypatch.setattr(ppo, "loss", lambda *args: (note(), loss(*args))[1])

    def frozen_normalizer():
        normalize = frozen()
        return lambda obs: (note(), normalize(obs))[1]

    run.frozen_normalizer = frozen_normalizer
    run.ppo.update = lambda rollout, *rest: (rollouts.append(rollout), update(rollout, *rest))[1]
    raw = []
    for _ in range(3):
        means.clear()
        before = {name: getattr(run.state.observation, name).clone() for name in ("mean", "var")}
        run.iterate(1000)
        assert len(means) > 11
        assert all(torch.equal(mean, before["mean"]) for mean in means)
        assert not torch.equal(run.state.observation.mean, before["mean"])
        rollout = rollouts[-1]
        expected = (rollout.raw_obs - before["mean"][:, None, None]) / (before["var"][:, None, None] + 1e-6).sqrt()
        torch.testing.assert_close(rollout.obs, expected.clamp(-10, 10), atol=1e-10, rtol=1e-10)
        raw.append([rollout.raw_obs[p][rollout.valid[p]] for p in range(3)])
    for p in range(3):
        seen = torch.cat([part[p] for part in raw])
        torch.testing.assert_close(run.state.observation.mean[p], seen.mean(0), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(run.state.observation.var[p], seen.var(0, correction=0), atol=1e-10, rtol=1e-10)


def test_switched_off_the_normaliser_changes_nothing():
    run = trainer(tiny(normalizer={"observation": False, "reward": False}))
    held, update = [], run.ppo.update
    run.ppo.update = lambda rollout, *rest: (held.append(rollout), update(rollout, *rest))[1]
    run.iterate(1000)
    assert torch.equal(held[0].obs, held[0].raw_obs)
    assert held[0].reward.eq(1).all()
    assert run.state.observation.count.eq(0).all()


def test_the_update_trains_on_scaled_rewards_and_the_scores_stay_in_the_environments_units():
    run = trainer(tiny(env={"id": "PendulumNoVel-v1"}))
    held, update = [], run.ppo.update
    run.ppo.update = lambda rollout, *rest: (held.append(rollout), update(rollout, *rest))[1]
    run.iterate(1000)
    metrics = run.iterate(1000)
    deviation = run.state.reward.moments.var.sqrt()
    assert held[1].reward.min() * deviation < -1
    assert float(metrics["rollout/ep_rew_mean"]) < -7
    assert held[1].reward.abs().max() <= 10
    assert float(deviation) > 2


def test_evaluating_changes_no_leaf_of_the_state_and_repeats_itself():
    run = trainer(tiny(EVERYTHING), range(3))
    run.iterate(1000)
    before, environment = snapshot(run.state), run.env.get_state()
    results = [run.evaluate(4, deterministic=deterministic) for deterministic in (True, False, True, False)]
    assert_same(snapshot(run.state), before)
    np.testing.assert_equal(run.env.get_state(), environment)
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[3])
    assert results[0].shape == (3, 4)


def test_the_memory_is_in_a_checkpoint_and_in_no_saved_policy_or_model(tmp_path):
    model = DistributionalPPO.of(trainer(tiny(), dtype=torch.float32))
    model.trainer.iterate(1000)
    memory = model.trainer.state.collector.recurrent
    assert memory.abs().max() > 0
    model.trainer.save(tmp_path / "checkpoint.safetensors", {})
    saved = load_tensors(tmp_path / "checkpoint.safetensors")[0]
    assert torch.equal(saved["collector.recurrent"], memory)
    for path in (model.save(tmp_path / "model"), model.export_policy(tmp_path / "policy")):
        tensors = load_tensors(path)[0]
        assert not [name for name in tensors if "collector" in name or "recurrent" in name or "running_return" in name]
        assert not [name for name, value in tensors.items() if value.shape == memory.shape]
