"""The wiring of an exchange: what its parts are asked with, and what becomes of a member that fails."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import Recorder
from test_pbt_run import advance, small

from hardy import evolution as evolution_module
from hardy.envs import EnvStep
from hardy.evolution import Evolution
from hardy.lineage import MemberRecord
from hardy.pbt import Scores, Selection, explore, select


class Watched:
    """A population of four whose scores are given, with a record of what is asked of the parts."""

    EXCHANGES = np.array([[[1.0, 3.0], [5.0, 5.0], [9.0, 11.0], [2.0, 2.0]], [[4.0, 4.0], [8.0, 8.0], [6.0, 8.0], [9.0, 9.0]]])

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **pbt: Any) -> None:
        self.trainer = small(size=4, episodes=2, truncation=0.25, **pbt)
        self.evolution = Evolution(self.trainer)
        self.evolution.start()
        self.seeds: list[int] = []
        self.selected: list[dict[str, Any]] = []
        self.explored: list[dict[str, Any]] = []
        returns = iter(self.EXCHANGES)

        def evaluate(episodes: int, *, deterministic: bool, seed: int, stop: Any) -> Any:
            assert episodes == 2
            self.seeds.append(seed)
            return next(returns)

        def selecting(scores: Scores, rules: Any, **given: Any) -> Selection:
            self.selected.append({"scores": scores, **given})
            return select(scores, rules, **given)

        def exploring(values: Any, replaced: Any, rules: Any, **given: Any) -> Any:
            self.explored.append({"replaced": replaced.copy(), **given, "history": list(given["history"])})
            return explore(values, replaced, rules, **given)

        monkeypatch.setattr(self.trainer, "evaluate", evaluate)
        monkeypatch.setattr(evolution_module, "select", selecting)
        monkeypatch.setattr(evolution_module, "explore", exploring)

    def exchange(self) -> list[MemberRecord]:
        self.evolution.watch(self.trainer.iterate(10_000))
        return self.evolution.exchange()


def test_an_exchange_asks_each_part_with_the_scores_the_round_and_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    first, second = watched.exchange(), watched.exchange()
    # Mean and standard error of two episodes, by hand: deviation with n − 1, over √2.
    assert [record.score for record in first] == [2, 5, 10, 2]
    assert [record.standard_error for record in first] == pytest.approx([1, 0, 1, 0])
    scores = watched.selected[0]["scores"]
    assert scores.mean.tolist() == [2, 5, 10, 2] and scores.episodes == 2
    assert scores.standard_error.tolist() == pytest.approx([1, 0, 1, 0])
    assert len(set(watched.seeds)) == 2  # other episodes at every exchange
    for calls in (watched.selected, watched.explored):
        assert [(call["seed"], call["round"]) for call in calls] == [(0, 1), (0, 2)]
    (replaced,) = [record.member for record in first if record.parent != record.member]
    assert first[replaced].parent == 2 and replaced in (0, 3)
    # Gains count from the score of the weights that a member went on with: of the copy, from its parent's.
    begun = [10.0 if member == replaced else score for member, score in enumerate([2.0, 5.0, 10.0, 2.0])]
    history = {gain.member: gain for gain in watched.explored[1]["history"]}
    assert not watched.explored[0]["history"]
    for member, (score, start) in enumerate(zip([4.0, 8.0, 7.0, 9.0], begun, strict=True)):
        assert history[member].gain == score - start and history[member].round == 2
        assert history[member].hyperparams == second[member].before
    assert watched.explored[0]["replaced"].tolist() == [member == replaced for member in range(4)]
    assert watched.evolution.best_member == 3


def test_a_migrant_keeps_its_hyperparameters_and_does_not_explore(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    moved = Selection(np.array([2, 1, 2, 2]), np.array([True, False, False, False]))
    monkeypatch.setattr(evolution_module, "select", lambda scores, rules, **given: moved)
    records = watched.exchange()
    assert [record.event for record in records] == ["migrated", "kept", "kept", "exploited"]
    assert records[0].after == records[0].before and records[3].after != records[2].before
    assert watched.explored[0]["replaced"].tolist() == [False, False, False, True]
    weight = watched.trainer.state.parameters["actor.output.weight"]
    assert torch.equal(weight[0], weight[2]) and torch.equal(weight[3], weight[2])


def test_returns_that_are_not_finite_count_as_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watched, "EXCHANGES", np.array([[[1.0, 3.0], [math.inf, 5.0], [9.0, 11.0], [2.0, math.nan]]]))
    records = Watched(monkeypatch).exchange()
    assert [record.event for record in records] == ["kept", "healed", "kept", "healed"]
    assert {records[1].parent, records[3].parent} == {2}


class NoReward(Recorder):
    """Rewards of the second of three members that are not numbers, for ever; rows can begin anew."""

    resets_rows = True

    def step(self, actions: np.ndarray) -> EnvStep:
        step = self.env.step(actions)
        return dataclasses.replace(step, reward=np.where(np.arange(12) // 4 == 1, np.float32(np.nan), step.reward))

    def reset_rows(self, rows: np.ndarray) -> np.ndarray:
        self.begun = rows.copy()
        return self.env.reset_rows(rows)


def test_a_member_that_cannot_learn_is_healed_and_its_episodes_begin_anew() -> None:
    trainer = small(min_gap=1e9)
    trainer.env = env = NoReward(trainer.env)
    evolution = Evolution(trainer)
    evolution.start()
    records = advance(trainer, evolution, 2)
    assert [record.event for record in records] == ["kept", "healed", "kept"]
    assert env.begun.tolist() == [row // 4 == 1 for row in range(12)]
