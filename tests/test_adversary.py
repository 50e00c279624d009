"""Attacks on observations and the training against them: what they maximise, where they stay, what they leave alone."""

from __future__ import annotations

import dataclasses
import itertools

import gymnasium
import numpy as np
import pytest
import torch
from small_runs import EVERYTHING, assert_nan_stays_with_its_member, assert_same, member, shake_, snapshot, tiny, trainer

import hardy.adversary as adversary
import hardy.ppo as ppo
from benchmarks.together import FirstRatios
from hardy.adversary import ATTACKS, NORMS, AdversarySettings, Attack, harm, noise_shape, perturb
from hardy.config import ConfigError
from hardy.nn.distributions import Categorical, DiagonalGaussian
from hardy.ops.schedules import ramp_factor
from hardy.policy import ActorCritic, CriticSettings, PolicySettings
from hardy.population import member_norm, member_sum
from hardy.ppo import scheduled
from hardy.robustness import attacked_returns

LONG = 1000
EVERY_ATTACK = [Attack(name, norm, 4) for name in ATTACKS for norm in NORMS]
OPEN = (torch.full((3, 5), -torch.inf, dtype=torch.float64), torch.full((3, 5), torch.inf, dtype=torch.float64))


def ids(attack):
    return f"{attack.name}-{attack.norm}" if isinstance(attack, Attack) else str(attack)


def quadratic(obs):
    """Harm that grows away from 0.3 in every entry, more in some than in others."""
    return ((obs - 0.3).square() * torch.arange(1, 6, dtype=obs.dtype)).sum(-1)


def case(attack, epsilon=(0.5, 0.0, 0.1), bounds=OPEN, objective=quadratic):
    obs = torch.randn(3, 7, 2, 5, dtype=torch.float64)
    noise = torch.randn(noise_shape(obs.shape, attack), dtype=torch.float64)
    return obs, perturb(objective, obs, torch.tensor(epsilon, dtype=torch.float64), bounds, noise, attack)


def length(change, norm):
    return change.abs().amax(-1) if norm == "linf" else change.norm(dim=-1)


# ---------------------------------------------------------------------------------------------------------------- attacks


def test_harm_is_the_divergence_from_what_the_policy_does_at_the_true_observation() -> None:
    """Of the clean from the attacked side (Zhang et al. 2020, eq. 7), which is another number than the other way round."""
    clean, attacked = torch.tensor([[[0.0, 3.0]]]), torch.tensor([[[0.0, -1.0]]])
    measure = harm(Attack("pgd"), lambda obs: (Categorical(obs), obs[..., 0]), clean)
    here, there = clean.softmax(-1), attacked.softmax(-1)
    assert float(measure(attacked)) == pytest.approx(float((here * (here / there).log()).sum()))
    assert float(measure(attacked)) != pytest.approx(float((there * (there / here).log()).sum()))


@pytest.mark.parametrize("attack", EVERY_ATTACK, ids=ids)
def test_an_attack_stays_in_its_ball_moves_every_observation_and_is_nothing_at_epsilon_zero(attack) -> None:
    obs, found = case(attack)
    size = length(found - obs, attack.norm)
    assert (size[0] <= 0.5 + 1e-12).all()
    assert (size[2] <= 0.1 + 1e-12).all()
    assert (size[[0, 2]] > 0).all()
    assert torch.equal(found[1], obs[1])
    assert not found.requires_grad


@pytest.mark.parametrize("attack", [attack for attack in EVERY_ATTACK if attack.name != "random"], ids=ids)
def test_a_gradient_attack_does_nearly_the_most_harm_there_is(attack) -> None:
    obs, found = case(attack)
    weight = torch.arange(1, 6, dtype=torch.float64)
    if attack.norm == "linf":  # every entry away from 0.3: the exact worst case of this harm
        worst = quadratic(obs + torch.where(obs > 0.3, 0.5, -0.5))[0]
    else:
        direction = (obs - 0.3) * weight
        worst = quadratic(obs + 0.5 * direction / direction.norm(dim=-1, keepdim=True))[0]
    before, after = quadratic(obs)[0], quadratic(found)[0]
    # Its start and the noise cost SGLD a step or two of four.
    assert ((after - before) / (worst - before)).mean() > (0.6 if attack.name == "sgld" else 0.85)
    assert (after > before).double().mean() > 0.9


@pytest.mark.parametrize("attack", EVERY_ATTACK, ids=ids)
def test_an_attack_stays_within_the_bounds_and_leaves_what_is_outside_where_it_is(attack) -> None:
    low, high = torch.full((3, 5), -0.6, dtype=torch.float64), torch.full((3, 5), 0.4, dtype=torch.float64)
    obs, found = case(attack, bounds=(low, high), epsilon=(2.0, 0.0, 0.1))
    inside = (obs > -0.6) & (obs < 0.4)
    assert (found[inside] >= -0.6).all()
    assert (found[inside] <= 0.4).all()
    assert torch.equal(found[1], obs[1])
    assert (found <= torch.maximum(obs, high[:, None, None])).all()
    assert (found >= torch.minimum(obs, low[:, None, None])).all()


def test_sgld_takes_the_published_steps() -> None:
    """K signed steps of ε/K from s + sign(noise)·ε/K, the gradient disturbed by √(2·(ε/K)·1e-5)/(i+2)."""
    attack = Attack("sgld", "linf", 3)
    obs, epsilon = torch.randn(2, 4, 5, dtype=torch.float64), torch.tensor([0.3, 0.9], dtype=torch.float64)
    noise = torch.randn(noise_shape(obs.shape, attack), dtype=torch.float64)

    def faint(changed):  # a gradient as small as the noise, so that the noise decides some signs
        return 0.003 * quadratic(changed)

    found = perturb(faint, obs, epsilon, tuple(bound[:2] for bound in OPEN), noise, attack)
    assert noise.shape == (2, 5, 4, 5)
    undisturbed = 0
    for p, eps in enumerate(epsilon.tolist()):
        step = eps / 3
        s = obs[p] + noise[p, 0].sign() * step
        for i in range(3):
            gradient = 0.006 * (s - 0.3) * torch.arange(1, 6, dtype=torch.float64)
            disturbed = gradient + (2 * step * 1e-5) ** 0.5 / (i + 2) * noise[p, i + 2]
            undisturbed += int((gradient.sign() == disturbed.sign()).all())
            s = (s + step * disturbed.sign()).clamp(obs[p] - eps, obs[p] + eps)
        torch.testing.assert_close(found[p], s, atol=1e-12, rtol=0)
    assert undisturbed < 6


def test_random_attacks_fill_the_ball_evenly() -> None:
    for norm, share in (("linf", 0.5**2), ("l2", 0.5**2)):
        attack = Attack("random", norm)
        obs = torch.zeros(1, 20_000, 2, dtype=torch.float64)
        bounds = tuple(bound[:1, :2] for bound in OPEN)
        noise = torch.randn(noise_shape(obs.shape, attack), dtype=torch.float64)
        found = perturb(quadratic, obs, torch.ones(1, dtype=torch.float64), bounds, noise, attack)
        assert (length(found, norm) < 0.5).double().mean() == pytest.approx(share, abs=0.015)
        assert found.mean((0, 1)).abs().max() < 0.02


@pytest.mark.parametrize("attack", EVERY_ATTACK, ids=ids)
def test_nan_in_one_member_reaches_no_other(attack) -> None:
    obs = torch.randn(3, 7, 5, dtype=torch.float64)
    noise = torch.randn(noise_shape(obs.shape, attack), dtype=torch.float64)
    epsilon = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)

    def broken(changed):
        spoil = torch.tensor([0.0, torch.nan, 0.0], dtype=torch.float64)[:, None]
        return quadratic(changed) * (1 + spoil)

    clean, hurt = (perturb(objective, obs, epsilon, OPEN, noise, attack) for objective in (quadratic, broken))
    for p in (0, 2):
        assert torch.equal(clean[p], hurt[p])


def test_the_critic_attack_lowers_the_value_and_the_others_move_the_policy() -> None:
    weight = torch.randn(5, 4, dtype=torch.float64)

    def respond(obs):
        return Categorical(obs @ weight), obs.sum(-1)

    obs = torch.randn(3, 7, 2, 5, dtype=torch.float64)
    found = {}
    for name in ("critic", "pgd"):
        attack = Attack(name, "linf", 5)
        noise = torch.randn(noise_shape(obs.shape, attack), dtype=torch.float64)
        epsilon = torch.full((3,), 0.2, dtype=torch.float64)
        found[name] = perturb(harm(attack, respond, obs), obs, epsilon, OPEN, noise, attack)
    torch.testing.assert_close(found["critic"], obs - 0.2)
    clean = respond(obs)[0]
    assert (clean.kl(respond(found["pgd"])[0]) > clean.kl(respond(found["critic"])[0])).double().mean() > 0.8
    assert not clean.log_probs.requires_grad


# ------------------------------------------------------------------------------------------------------------ regulariser


def test_for_a_gaussian_the_divergence_is_the_mahalanobis_form() -> None:
    mean, other, log_std = (torch.randn(3, 7, 4, dtype=torch.float64) for _ in range(3))
    found = DiagonalGaussian(mean, log_std).kl(DiagonalGaussian(other, log_std))
    difference = other - mean
    expected = [
        0.5 * difference[index] @ torch.diag((2 * log_std[index]).exp()).inverse() @ difference[index]
        for index in itertools.product(range(3), range(7))
    ]
    torch.testing.assert_close(found.flatten(), torch.stack(expected))


@pytest.mark.parametrize("env", ["CartPoleNoVel-v1", "PendulumNoVel-v1"])
@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_the_regularisers_gradient_equals_finite_differences_through_the_memory(env, memory) -> None:
    """By the weights, along random directions, with the attacked observations held still as in training."""
    run, batch, steps = prepared(env=env, memory=memory)
    hyper = {**run.state.hyper, "adversary.epsilon": torch.tensor([0.3, 0.3], dtype=torch.float64)}
    attacked = batch.obs + 0.3 * torch.randn_like(batch.obs).sign()
    parameters = dict(run.policy.named_parameters())

    def regulariser():
        _, parts = ppo.loss(run.policy, batch, hyper, steps, attacked)
        return parts["adversary/robust_kl"]

    clean, _ = ppo.loss(run.policy, batch, hyper, steps)
    total, _ = ppo.loss(run.policy, batch, hyper, steps, attacked)
    gradients = [
        after - before
        for after, before in zip(
            torch.autograd.grad(total.sum(), list(parameters.values())),
            torch.autograd.grad(clean.sum(), list(parameters.values())),
            strict=True,
        )
    ]
    memory_weight = list(parameters).index("core.memory.weight_hh_l0")
    assert gradients[memory_weight].abs().max() > 1e-6
    for _ in range(4):
        directions = [torch.randn_like(value) for value in parameters.values()]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for value, direction in zip(parameters.values(), directions, strict=True):
                    value.add_(direction, alpha=sign * 1e-5)
            values.append(regulariser())
            with torch.no_grad():
                for value, direction in zip(parameters.values(), directions, strict=True):
                    value.add_(direction, alpha=-sign * 1e-5)
        expected = (values[0] - values[1]) / 2e-5
        found = sum((g * d).flatten(1).sum(1) for g, d in zip(gradients, directions, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def prepared(members=2, env="CartPoleNoVel-v1", memory="lstm", **sections):
    """A run whose weights have moved, the batch of its last rollout, and its number of valid steps."""
    run = trainer(tiny(sections, env={"id": env}, policy={"memory": memory}), range(members))
    shake_(run.policy)
    held, update = [], run.ppo.update
    run.ppo.update = lambda rollout, *rest: (held.append(rollout), update(rollout, *rest))[1]
    run.iterate(LONG)
    run.iterate(LONG)
    shake_(run.policy, 0.1)
    batch = ppo.make_batch(held[-1], run.state.hyper, normalize=True)
    return run, batch, member_sum(batch.valid.double())


def test_the_divergence_pulls_both_the_clean_and_the_attacked_side() -> None:
    """Detached on either side, the gradient would be another one."""
    run, batch, steps = prepared()
    attacked = batch.obs + 0.2
    hyper = {**run.state.hyper, "adversary.epsilon": torch.ones(2, dtype=torch.float64)}
    weight = run.policy.actor.output.weight
    total = torch.autograd.grad(ppo.loss(run.policy, batch, hyper, steps, attacked)[0].sum(), weight)[0]
    clean = torch.autograd.grad(ppo.loss(run.policy, batch, hyper, steps)[0].sum(), weight)[0]
    sides = []
    for detached in ((False, False), (True, False), (False, True)):
        pair = [run.policy(obs, batch.initial_state, batch.is_first)[0] for obs in (batch.obs, attacked)]
        for side, stop in zip(pair, detached, strict=True):
            side.log_probs = side.log_probs.detach() if stop else side.log_probs
        divergence = member_sum(pair[0].kl(pair[1]), batch.valid) / steps
        sides.append(torch.autograd.grad(divergence.sum(), weight)[0])
    torch.testing.assert_close(total - clean, sides[0], atol=1e-12, rtol=1e-8)
    assert not torch.allclose(sides[0], sides[1], rtol=1e-3)
    assert not torch.allclose(sides[0], sides[2], rtol=1e-3)


def test_at_epsilon_zero_the_loss_and_its_gradient_are_those_without_an_adversary() -> None:
    run, batch, steps = prepared(3)
    hyper = {**run.state.hyper, "adversary.epsilon": torch.tensor([0.0, 0.2, 0.0], dtype=torch.float64)}
    hyper["adversary.adversarial_ratio"] = torch.ones(3, dtype=torch.float64)
    attacked = batch.obs + 0.2  # whatever stands there for the others
    results = []
    for extra in ((), (attacked,)):
        total, parts = ppo.loss(run.policy, batch, hyper, steps, *extra)
        results.append((total.detach(), torch.autograd.grad(total.sum(), list(run.policy.parameters())), parts))
    for p in (0, 2):
        torch.testing.assert_close(results[0][0][p], results[1][0][p], atol=0, rtol=0)
        for one, other in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(one[p], other[p], atol=1e-14, rtol=0)
    assert results[0][0][1] != results[1][0][1]
    assert results[1][2]["adversary/robust_kl"][[0, 2]].tolist() == [0, 0]


def test_clean_and_attacked_sequences_carry_their_own_state_from_the_stored_one(monkeypatch) -> None:
    run, batch, steps = prepared()
    hyper = {**run.state.hyper, "adversary.epsilon": torch.ones(2, dtype=torch.float64)}
    attacked = batch.obs.clone()
    attacked[:, 0] += 3.0  # the first step alone
    seen, outputs = [], run.policy.outputs
    monkeypatch.setattr(run.policy, "outputs", lambda *args: (seen.append(args), outputs(*args))[1])
    initial = batch.initial_state.clone()
    _, parts = ppo.loss(run.policy, batch, hyper, steps, attacked)
    _, plain = ppo.loss(run.policy, batch, hyper, steps)
    assert len(seen) == 3
    for _, state, is_first in seen:
        assert torch.equal(state, initial)
        assert torch.equal(is_first, batch.is_first)
    for name, value in plain.items():
        assert torch.equal(parts[name], value), name  # surrogate, value, entropy and KL are clean
    pair = [run.policy(obs, initial, batch.is_first)[0] for obs in (batch.obs, attacked)]
    divergence = pair[0].kl(pair[1])
    assert (divergence[:, 1][~batch.is_first[:, 1]] > 0).all()  # the memory of the attacked step lives on in its own sequence
    torch.testing.assert_close(parts["adversary/robust_kl"], member_sum(divergence, batch.valid) / steps)


def test_the_attack_of_the_training_starts_from_the_stored_state_of_its_sequences(monkeypatch) -> None:
    run, batch, _ = prepared(adversary={"epsilon": 0.2, "steps": 3})
    everybody = torch.ones(2, dtype=torch.bool)
    attack = run.ppo._attacker(run.state.hyper, run.observation_bounds(), run.state.generators["attack"], everybody)
    seen, forward = [], run.policy.forward
    monkeypatch.setattr(run.policy, "forward", lambda *args: (seen.append(args), forward(*args))[1])
    found = attack(batch)
    assert len(seen) == 1 + 3  # the clean response, then a gradient at each step
    for _, state, is_first in seen:
        assert torch.equal(state, batch.initial_state)
        assert torch.equal(is_first, batch.is_first)
    assert batch.initial_state.abs().max() > 0
    assert torch.equal(seen[0][0], batch.obs)
    assert 0 < (found - batch.obs).abs().max() <= 0.2 + 1e-12


def test_the_adversarial_ratio_is_a_share_of_the_sequences_and_zero_keeps_the_surrogate_clean() -> None:
    run, batch, steps = prepared(3)
    hyper = {**run.state.hyper, "adversary.epsilon": torch.ones(3, dtype=torch.float64)}
    hyper["adversary.robust_kl_coef"] = torch.zeros(3, dtype=torch.float64)
    hyper["adversary.adversarial_ratio"] = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    attacked = batch.obs + 0.5
    mixed = batch.obs.clone()
    mixed[1, :, :2] = attacked[1, :, :2]  # 0.4 of 5 sequences
    mixed[2] = attacked[2]
    clean = run.policy(batch.obs, batch.initial_state, batch.is_first)[0]
    under = run.policy(mixed, batch.initial_state, batch.is_first)[0]
    expected = ppo.clipped_surrogate(
        ppo.log_ratio(under.log_prob(batch.action), batch.log_prob), batch.advantage, hyper["ppo.clip_range"]
    )
    total, parts = ppo.loss(run.policy, batch, hyper, steps, attacked)
    torch.testing.assert_close(parts["train/policy_loss"], member_sum(expected, batch.valid) / steps)
    plain = ppo.loss(run.policy, batch, hyper, steps)[1]
    assert torch.equal(parts["train/policy_loss"][0], plain["train/policy_loss"][0])
    assert torch.equal(parts["train/value_loss"], plain["train/value_loss"])
    torch.testing.assert_close(parts["train/entropy"], member_sum(clean.entropy(), batch.valid) / steps)
    assert total.isfinite().all()


# --------------------------------------------------------------------------------------------------------------- schedule


def test_epsilon_rises_after_the_warm_up_and_multiplies_the_base() -> None:
    assert [ramp_factor(at, 0.25, 0.5) for at in (0.0, 0.2, 0.25, 0.5, 0.75, 1.0, 2.0)] == [0, 0, 0, 0.5, 1, 1, 1]
    assert [ramp_factor(at, 0.5, 0.0) for at in (0.49, 0.5)] == [0, 1]
    run = trainer(tiny(adversary={"epsilon": 0.2, "warmup": 0.25, "ramp": 0.5}), [1, 2])
    base = run.state.hyper["adversary.epsilon"]
    base[1] = 0.4
    seen = []
    length_ = 4 * run.steps_per_iteration
    for _ in range(4):
        metrics = run.iterate(length_)
        seen.append(metrics["adversary/epsilon"].tolist() if "adversary/epsilon" in metrics else None)
    assert seen[:2] == [None, None]
    assert seen[2] == pytest.approx([0.1, 0.2])
    assert seen[3] == pytest.approx([0.2, 0.4])
    assert base.tolist() == [0.2, 0.4]
    hyper = scheduled(run.state.hyper, run.settings.ppo, 0.5, run.settings.adversary)
    assert hyper["adversary.epsilon"].tolist() == pytest.approx([0.1, 0.2])


# --------------------------------------------------------------------------------------------------- units and bounds


def test_epsilon_is_in_deviations_and_the_bounds_are_those_of_the_observation_space(monkeypatch) -> None:
    run = trainer(tiny(env={"id": "PendulumNoVel-v1"}, adversary={"epsilon": 5.0, "ramp": 0.0}), [1, 2])
    run.iterate(LONG)
    seen, real = [], adversary.perturb
    monkeypatch.setattr(ppo, "perturb", lambda *args: (seen.append((args, real(*args))), seen[-1][1])[1])
    moments = {name: getattr(run.state.observation, name).clone() for name in ("mean", "var")}
    run.iterate(LONG)
    (_, obs, epsilon, (low, high), _, _), attacked = seen[0]
    deviation = (moments["var"] + 1e-8).sqrt()
    torch.testing.assert_close(low, (-1 - moments["mean"]) / deviation)
    torch.testing.assert_close(high, (1 - moments["mean"]) / deviation)
    assert epsilon.tolist() == [5.0, 5.0]
    raw = attacked * deviation[:, None, None] + moments["mean"][:, None, None]
    assert raw.abs().max() <= 1 + 1e-6  # cosine and sine, whatever epsilon
    assert (attacked - obs).abs().max() > 1
    free = trainer(tiny(env={"id": "CartPole-v1"}), [1])
    free.iterate(LONG)
    assert free.observation_bounds()[1][0, [1, 3]].tolist() == [10, 10]  # no bound but the normaliser's
    assert free.observation_bounds()[0].shape == (1, 4)


def test_the_bounds_of_observations_are_found_only_where_some_member_is_attacked(monkeypatch) -> None:
    """Epsilon may become positive in a run, of one member alone, as where PBT tunes it."""
    run = trainer(tiny(adversary={"ramp": 0.0}), [1, 2])
    calls, real = [], run.observation_bounds
    monkeypatch.setattr(run, "observation_bounds", lambda: (calls.append(0), real())[1])
    run.iterate(LONG)
    assert not calls
    run.state.hyper["adversary.epsilon"][1] = 0.1
    assert run.iterate(LONG)["adversary/epsilon"].tolist() == pytest.approx([0.0, 0.1])
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------------ the gradient scaler

SETTINGS = {"adversary": {"epsilon": 0.3, "steps": 2, "ramp": 0.0}}


def test_the_scaler_measures_the_gradient_that_is_applied_and_the_split_is_reported(monkeypatch) -> None:
    """S × V: the statistics see clean and attacked part together, and so does nobody else."""
    change = {"ppo": {"n_epochs": 1, "n_minibatches": 1}, "optimizer": {"max_grad_norm": 1e9}}
    run = trainer(tiny(SETTINGS, change), [1, 2])
    shake_(run.policy)
    given, step = [], run.ppo.optimizer.step_
    monkeypatch.setattr(
        run.ppo.optimizer,
        "step_",
        lambda weights, gradients, *rest: (given.append(gradients), step(weights, gradients, *rest))[1],
    )
    batches, loss = [], ppo.loss
    monkeypatch.setattr(ppo, "loss", lambda policy, batch, hyper, steps, *attacked: (
        batches.append((snapshot_of(run), batch, hyper, steps, attacked)), loss(policy, batch, hyper, steps, *attacked)
    )[1])  # fmt: skip
    metrics = run.iterate(LONG)
    (applied,) = given
    weights, batch, hyper, steps, (attacked,) = batches[0]
    restore(run, weights)
    parameters = list(run.ppo.parameters.values())
    total = torch.autograd.grad(loss(run.policy, batch, hyper, steps, attacked)[0].sum(), parameters)
    clean = torch.autograd.grad(loss(run.policy, batch, hyper, steps)[0].sum(), parameters)
    for found, expected in zip(applied.values(), total, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(metrics["train/grad_norm"], member_norm(total))
    torch.testing.assert_close(metrics["adversary/clean_grad_norm"], member_norm(clean))
    added = [one - other for one, other in zip(total, clean, strict=True)]
    torch.testing.assert_close(metrics["adversary/robust_grad_norm"], member_norm(added))
    assert metrics["adversary/robust_grad_norm"].min() > 0
    second = run.state.optimizer.vgs.second_moment.sum(1)
    torch.testing.assert_close(second, member_norm(total).square())


def snapshot_of(run):
    return {name: value.clone() for name, value in run.state.parameters.items()}


def restore(run, weights):
    for name, value in weights.items():
        run.state.parameters[name].copy_(value)


# ------------------------------------------------------------------------------------------------------------ in training


@pytest.mark.parametrize(("attack", "iterations"), [("sgld", 2), ("pgd", 1), ("fgsm", 1), ("random", 1), ("critic", 2)])
def test_a_population_equals_its_members_alone_each_with_its_own_epsilon(attack, iterations) -> None:
    settings = tiny(EVERYTHING, adversary={"epsilon": 0.2, "attack": attack, "steps": 2, "ramp": 0.0}, ppo={"n_epochs": 4})

    def train(seeds, positions):
        run = trainer(settings, seeds)
        for row, position in enumerate(positions):
            run.state.hyper["adversary.epsilon"][row] *= position  # the first without an adversary
            run.state.hyper["optimizer.lr"][row] *= 3.0**-position  # so that members stop at different updates
            run.state.hyper["adversary.adversarial_ratio"][row] = 0.5 * (position == 2)
            run.state.hyper["adversary.robust_kl_coef"][row] *= 1 + position
        metrics = [run.iterate(LONG) for _ in range(iterations)]
        return snapshot(run.state), metrics

    together, metrics = train([11, 5, 8], range(3))
    assert len(together["optimizer.upgd.step"][:, 0].unique()) > 1  # members stopped at different updates
    for p, seed in enumerate([11, 5, 8]):
        alone, own = train([seed], [p])
        assert_same(member(together, p), alone, 1e-10)
        for mine, theirs in zip(metrics, own, strict=True):
            for name, value in theirs.items():
                if name.startswith("adversary/"):
                    torch.testing.assert_close(mine[name][p : p + 1], value, atol=1e-9, rtol=1e-9, equal_nan=True)


def test_a_member_without_an_adversary_trains_bit_for_bit_as_beside_members_without() -> None:
    plain, mixed = (trainer(tiny(adversary={"ramp": 0.0}), [1, 2]) for _ in range(2))
    mixed.state.hyper["adversary.epsilon"][1] = 0.3
    for run in (plain, mixed):
        run.iterate(LONG)
        run.iterate(LONG)
    first, second = ({k: v for k, v in snapshot(run.state).items() if not k.startswith("hyper")} for run in (plain, mixed))
    assert_same(member(second, 0), member(first, 0), 1e-12)
    weight = "parameters.actor.output.weight"
    assert not torch.allclose(first[weight][1], second[weight][1])


def test_nan_in_one_member_leaves_the_others_bit_identical() -> None:
    assert_nan_stays_with_its_member(tiny(SETTINGS))


ALL_PARTS = {
    "critic": {"kind": "quantile", "quantiles": 5, "twin": True, "huber_threshold": 0.05},
    "risk": {"weight": 0.3, "cvar_limit": 3.0, "cvar_alpha": 0.5},
    "adversary": {"epsilon": 0.2, "steps": 2, "ramp": 0.0},
}


@pytest.mark.parametrize("memory", ["lstm", "gru"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_with_everything_on_the_first_minibatch_has_ratio_one_and_the_rest_stays_finite(monkeypatch, memory, dtype, tolerance):
    run = trainer(tiny(EVERYTHING, ALL_PARTS, policy={"memory": memory}), range(3), dtype)
    shake_(run.policy)
    loss, update, ratios = ppo.loss, run.ppo.update, []
    fresh = True

    def watched(policy, batch, *rest):
        nonlocal fresh
        if fresh:
            with torch.no_grad():
                log_prob = policy(batch.obs, batch.initial_state, batch.is_first)[0].log_prob(batch.action)
            ratios.append(float((log_prob - batch.log_prob).expm1().abs().max()))
            fresh = False
        return loss(policy, batch, *rest)

    def updated(*arguments):
        nonlocal fresh
        fresh = True
        return update(*arguments)

    monkeypatch.setattr(ppo, "loss", watched)
    monkeypatch.setattr(run.ppo, "update", updated)
    for _ in range(3):
        metrics = run.iterate(LONG)
    assert len(ratios) == 3
    assert max(ratios) <= tolerance
    assert all(value.isfinite().all() for value in run.state.parameters.values())
    assert metrics["adversary/robust_kl"].min() > 0
    assert metrics["train/skipped_updates"].eq(0).all()


def test_with_everything_on_a_population_equals_its_members_alone() -> None:
    settings = tiny(EVERYTHING, ALL_PARTS)
    together = trainer(settings, [11, 5, 8])
    for _ in range(3):
        together.iterate(LONG)
    for p, seed in enumerate([11, 5, 8]):
        alone = trainer(settings, [seed])
        for _ in range(3):
            alone.iterate(LONG)
        assert_same(member(snapshot(together.state), p), snapshot(alone.state), 1e-10)


def test_training_against_the_adversary_makes_the_policy_change_less_under_attack() -> None:
    """Two members alike but for the coefficient, on the same observations, from the same weights."""
    run = trainer(tiny(adversary={"epsilon": 0.3, "steps": 3, "ramp": 0.0}, optimizer={"lr": 0.02}), [1, 2])
    shake_(run.policy, 0.5)
    for value in run.state.parameters.values():
        value[1] = value[0]
    run.state.hyper["adversary.robust_kl_coef"].copy_(torch.tensor([0.0, 10.0]))
    for _ in range(6):
        metrics = run.iterate(LONG)
    assert metrics["adversary/robust_kl"][1] < 0.3 * metrics["adversary/robust_kl"][0]


def test_the_benchmark_of_all_parts_sees_a_first_ratio_that_is_not_one_and_one_that_is_no_number(monkeypatch) -> None:
    monkeypatch.setattr(ppo.PPO, "update", lambda *_, **__: {})
    run = trainer(tiny(), [1, 2])
    run.ppo.__class__ = FirstRatios
    rollout = run._collect()
    for added, expected in ((0.0, 0.0), (0.5, np.expm1(0.5)), (torch.nan, torch.inf)):
        changed = rollout.log_prob.clone()
        changed[1, 2, 3] -= added
        run.ppo.update(dataclasses.replace(rollout, log_prob=changed))
        assert run.ppo.largest == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------------------------------- evaluation


def test_an_attacked_evaluation_sees_the_state_of_each_step_and_changes_nothing(monkeypatch) -> None:
    """The attack is given the memory that the agent acts with, reset where an episode starts, and acts from what it shows."""
    run = trainer(tiny(), [1])
    shake_(run.policy)
    run.iterate(LONG)
    before = snapshot(run.state)
    shown, stepped, real = [], [], adversary.perturb
    monkeypatch.setattr("hardy.robustness.perturb", lambda *args: (shown.append(real(*args)), shown[-1])[1])
    step = run.policy.step_outputs  # of the attack's responses and of the action alike
    monkeypatch.setattr(
        run.policy, "step_outputs", lambda obs, state, first: (stepped.append((obs, state, first)), step(obs, state, first))[1]
    )
    monkeypatch.setattr(run.policy, "stepper", lambda members, envs: run.policy.step_outputs)
    returns = attacked_returns(run, Attack("fgsm", "linf", 3), 0.2, 4)
    assert returns.shape == (1, 4)
    assert_same(snapshot(run.state), before)
    # Each step: the clean response, one gradient, the action.
    for index, found in enumerate(shown):
        clean, gradient, action = stepped[3 * index : 3 * index + 3]
        assert torch.equal(action[0], found)
        for other in (gradient, action):
            assert torch.equal(other[1], clean[1])
            assert torch.equal(other[2], clean[2])
        assert 0 < float((found - clean[0]).abs().max()) <= 0.2 + 1e-9
    assert stepped[3][1].abs().max() > 0
    assert not stepped[3][1].requires_grad


@pytest.mark.parametrize("attack", ATTACKS)
def test_at_radius_zero_the_attacked_evaluation_is_the_evaluation(attack) -> None:
    run = trainer(tiny(env={"id": "PendulumNoVel-v1"}), [1, 2])
    shake_(run.policy)
    natural = run.evaluate(3, seed=5)
    np.testing.assert_array_equal(attacked_returns(run, Attack(attack, "linf", 2), 0.0, 3, seed=5), natural)
    changed = attacked_returns(run, Attack(attack, "linf", 2), 0.5, 3, seed=5)
    assert not np.array_equal(changed, natural)
    np.testing.assert_array_equal(attacked_returns(run, Attack(attack, "linf", 2), 0.5, 3, seed=5), changed)


def test_a_gradient_attack_hurts_more_than_a_random_one() -> None:
    """On a policy whose action is the sign of the sum of what it sees, in a world that pays for the right sign."""
    env = gymnasium.spaces.Box(-1, 1, (10,), np.float32), gymnasium.spaces.Discrete(2)
    policy = ActorCritic(*env, PolicySettings(memory="none", encoder=()), CriticSettings(quantiles=1), [0]).double()
    with torch.no_grad():
        policy.actor.output.weight.copy_(torch.tensor([[[-1.0] * 10, [1.0] * 10]]))
    obs = 2 * torch.rand(1, 201, 10, dtype=torch.float64) - 1
    state, first = policy.initial_state(1, 201), torch.zeros(1, 201, dtype=torch.bool)
    right = (obs.sum(-1) > 0).long()
    bounds = tuple(torch.full((1, 10), end, dtype=torch.float64) for end in (-1.0, 1.0))

    def respond(changed):
        distribution, critic, _ = policy.step(changed, state, first)
        return distribution, policy.values.mean(critic)

    wrong = {}
    for name in ("random", "fgsm", "pgd", "sgld"):
        attack = Attack(name, "linf", 10)
        noise = torch.randn(noise_shape(obs.shape, attack), dtype=torch.float64)
        shown = perturb(harm(attack, respond, obs), obs, torch.tensor([0.3], dtype=torch.float64), bounds, noise, attack)
        wrong[name] = float((respond(shown)[0].mode() != right).double().mean())
    assert wrong["random"] < 0.2
    assert min(wrong["fgsm"], wrong["pgd"], wrong["sgld"]) > 1.5 * wrong["random"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"warmup": 0.5, "ramp": 0.75}, "must be at most 1 together"),
        ({"attack": "fsgm"}, r"one of fgsm, pgd, sgld, random, critic \(did you mean 'fgsm'\?\)"),
        ({"epsilon": -0.1}, "adversary.epsilon = -0.1: must be a finite number >= 0"),
    ],
)
def test_what_does_not_fit_is_refused(section, said) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny(adversary=section)


def test_without_epsilon_there_is_no_adversary_and_nothing_is_drawn() -> None:
    assert AdversarySettings().epsilon == 0
    run = trainer(tiny(), [1])
    before = run.state.generators["attack"].get_state()
    metrics = run.iterate(LONG)
    assert torch.equal(run.state.generators["attack"].get_state(), before)
    assert not [name for name in metrics if name.startswith("adversary/")]
    assert dataclasses.is_dataclass(run.state)
