"""A population from start to end: its folder, its exchanges, and that an interruption changes nothing."""

from __future__ import annotations

import csv
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import snapshot, tiny
from test_run import LINES, assert_same_results, interrupt_after, make_settings, resume, rows, summary, train

from hardy import ConfigError, DistributionalPPO, run
from hardy.checkpoint import CheckpointError, load_tensors, save_tensors
from hardy.config import load_settings, settings_from_dict
from hardy.evolution import Evolution, PopulationLostError
from hardy.lineage import MemberRecord, ancestry, best_member, read_population, schedule
from hardy.settings import RunSettings
from hardy.trainer import Trainer

ITERATION = 4 * 8
SPACES = {
    "optimizer.lr": {"low": 1e-3, "high": 0.1},
    "ppo.gamma": {"low": 0.9, "high": 0.995, "space": "log_one_minus"},
}


def make_population(folder: Path, iterations: int = 9, size: int = 3, **pbt: Any) -> RunSettings:
    section = {"interval": 2 * ITERATION, "episodes": 4, "min_gap": 0.0, "hyperparams": SPACES, "truncation": 0.34, **pbt}
    return make_settings(folder, iterations, population={"size": size}, pbt=section)


def small(**pbt: Any) -> Trainer:
    """A trainer alone, with the settings of `make_population`."""
    return Trainer(make_population(Path("unused"), **pbt))


def advance(trainer: Trainer, evolution: Evolution, iterations: int) -> list[MemberRecord]:
    """Train, exchanging where that is due; the records of the exchanges."""
    found = []
    for _ in range(iterations):
        evolution.watch(trainer.iterate(10_000))
        if evolution.due(10_000):
            found += evolution.exchange()
    return found


# -------------------------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A population that has trained; nothing writes to its folder."""
    return train(make_population(tmp_path_factory.mktemp("artifacts"))).folder


def test_a_population_leaves_everything_a_run_does_and_its_history(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith("events")}
    assert names == {
        "checkpoints", "config.yaml", "learning_curve.png", "lineage.png", "metrics.csv", "policy.safetensors",
        "population.csv", "schedule.yaml", "schedules.png", "summary.json",
    }  # fmt: skip
    for name in ("lineage.png", "schedules.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_one_row_per_member_and_exchange_tells_who_went_on_with_what(finished: Path) -> None:
    records = read_population(finished)
    assert [(record.exchange, record.step, record.member) for record in records] == [
        (exchange, step, member)
        for exchange, step in enumerate([0, 64, 128, 192, 256, 288])  # none at 288 steps but the final scores
        for member in range(3)
    ]
    assert {record.event for record in records[:3]} == {"start"} and {record.event for record in records[-3:]} == {"final"}
    assert any(record.event == "exploited" for record in records)
    for before, now in zip(records, records[3:], strict=False):
        assert now.before == before.after
        assert math.isfinite(now.score) and now.standard_error >= 0
        if now.parent == now.member:
            assert now.after == now.before and now.event in ("kept", "final")
            assert (now.age, now.depth) == (before.age + (now.event == "kept"), before.depth)
        else:
            parent = records[3 * now.exchange + now.parent]
            assert now.event == "exploited" and now.score < parent.score and now.age == 0
            assert now.depth == records[3 * (now.exchange - 1) + now.parent].depth + 1
            assert all(now.after[name] != parent.before[name] for name in SPACES)
        for name, space in SPACES.items():
            assert space["low"] * (1 - 1e-6) <= now.after[name] <= space["high"] * (1 + 1e-6)


def test_the_metrics_of_an_exchange(finished: Path) -> None:
    records, table = read_population(finished), rows(finished)
    exploits = 0
    for row in table[:-1]:
        step = int(row["time/total_timesteps"])
        here = [record for record in records if record.step == step and record.event != "final"]
        if not here:
            assert row["pbt/score_best"] == "" and row["pbt/exploitation_count"] == ""
            continue
        exploits += sum(record.parent != record.member for record in here)
        assert int(row["pbt/exploitation_count"]) == exploits
        assert float(row["pbt/score_best"]) == pytest.approx(max(record.score for record in here))
        assert float(row["pbt/score_mean"]) == pytest.approx(np.mean([record.score for record in here]))
        assert float(row["pbt/score_std"]) == pytest.approx(np.std([record.score for record in here]))
        for record in here:
            assert float(row[f"pbt/score/member_{record.member}"]) == pytest.approx(record.score)
            assert float(row[f"pbt/lineage_depth/member_{record.member}"]) == record.depth
            assert float(row[f"pbt/age/member_{record.member}"]) == record.age
    assert exploits
    assert float(table[-1]["pbt/score_best"]) == max(record.score for record in records[-3:])


def test_the_value_loss_after_an_exploit_is_compared_with_the_parents_before(finished: Path) -> None:
    records, table = read_population(finished), rows(finished)
    compared = 0
    for before, after in pairwise(table[:-1]):
        replaced = {
            record.member: record.parent
            for record in records
            if record.step == int(before["time/total_timesteps"]) and record.parent != record.member
        }
        for member in range(3):
            cell = after[f"pbt/post_exploit_value_loss_ratio/member_{member}"]
            if member not in replaced:
                assert cell in ("", "nan")
                continue
            loss = float(after[f"train/value_loss/member_{member}"])
            parents = float(before[f"train/value_loss/member_{replaced[member]}"])
            assert float(cell) == pytest.approx(loss / parents, rel=1e-5)
            compared += 1
    assert compared


def test_the_policy_is_that_of_the_member_that_scored_best(finished: Path) -> None:
    records = read_population(finished)
    best = best_member(records)
    assert summary(finished)["population"] == {
        "size": 3, "best_member": best, "exploits": sum(record.parent != record.member for record in records),
    }  # fmt: skip
    checkpoint = load_tensors(sorted((finished / "checkpoints").iterdir())[-1])[0]
    policy = load_tensors(finished / "policy.safetensors")[0]
    for name, value in policy.items():
        assert torch.equal(value, checkpoint[name][best : best + 1]), name
    model = DistributionalPPO.load(finished / "policy")
    assert model.settings.population.size == 1
    assert model.predict(np.zeros(2, np.float32))[0] in (0, 1)
    with pytest.raises(CheckpointError, match="population of 3"):
        DistributionalPPO.load(sorted((finished / "checkpoints").iterdir())[-1])


def test_a_run_of_the_best_member_is_evaluated(finished: Path) -> None:
    again = run.evaluate(finished, 20, 7)
    trainer = run.make_trainer(load_settings(RunSettings, finished / "config.yaml"))
    trainer.restore(sorted((finished / "checkpoints").iterdir())[-1])
    expected = trainer.evaluate(20, seed=7)[best_member(read_population(finished))]
    assert again.mean == pytest.approx(expected.mean())


# ---------------------------------------------------------------------------------------------------------------- schedule


def test_the_schedule_replays_the_best_members_hyperparameters_in_a_single_run(finished: Path, tmp_path: Path) -> None:
    records = read_population(finished)
    best = best_member(records)
    line = ancestry(records, best)
    settings = load_settings(RunSettings, finished / "schedule.yaml", [f"artifacts_dir={tmp_path}"])
    assert settings.population.size == 1 and settings.seed == line[0].member
    assert [(change.step, change.values) for change in settings.schedule] == schedule(records, best)
    table = rows(train(settings).folder)
    for row in table[:-1]:
        began = int(row["time/total_timesteps"]) - ITERATION
        current = [values for step, values in schedule(records, best) if step <= began][-1]
        assert float(row["train/learning_rate"]) == pytest.approx(current["optimizer.lr"], rel=1e-6)
    # Until the first exploit of its lineage it is the very member.
    first = next((after.step for before, after in pairwise(line) if before.member != after.member or after.age == 0), 288)
    with (finished / "metrics.csv").open() as file:
        whole = list(csv.DictReader(file))
    for row, all_members in zip(table[: first // ITERATION], whole, strict=False):
        for name in ("train/value_loss", "rollout/ep_rew_mean"):
            own = float(all_members[f"{name}/member_{line[0].member}"])
            assert float(row[name]) == pytest.approx(own, rel=1e-3, nan_ok=True), name


def test_a_schedule_changes_values_at_their_steps_and_is_multiplied_by_others() -> None:
    changes = [{"step": 0, "values": {"optimizer.lr": 0.01}}, {"step": 55, "values": {"optimizer.lr": 0.02, "ppo.gamma": 0.9}}]
    trainer = Trainer(tiny(schedule=changes, ppo={"lr_schedule": "linear"}))
    rates = [float(trainer.iterate(220)["train/learning_rate"]) for _ in range(3)]
    assert rates == pytest.approx([0.01, 0.02 * 0.75, 0.02 * 0.5])
    assert trainer.state.hyper["ppo.gamma"].tolist() == pytest.approx([0.9])


# ------------------------------------------------------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def whole_by_mode(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a population that was never interrupted, trained once for each ``after_exploit``."""

    @functools.cache
    def whole(mode: str) -> Path:
        return train(make_population(tmp_path_factory.mktemp(mode), after_exploit=mode)).folder

    return whole


@pytest.mark.parametrize(("iterations", "mode"), [(1, "burn_in"), (4, "reset_env"), (5, "burn_in")])
def test_an_interrupted_population_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_by_mode: Callable[[str], Path], iterations: int, mode: str
) -> None:
    whole = whole_by_mode(mode)
    with monkeypatch.context() as patched:
        interrupt_after(patched, iterations)
        stopped = train(make_population(tmp_path / "parts", after_exploit=mode))
    assert stopped.status == "interrupted"
    assert resume(stopped.folder).status == "finished"
    assert_same_results(whole, stopped.folder)
    assert (whole / "population.csv").read_bytes() == (stopped.folder / "population.csv").read_bytes()
    whole_schedule, schedule_after = ((folder / "schedule.yaml").read_text() for folder in (whole, stopped.folder))
    assert whole_schedule.replace(str(whole.parent), "") == schedule_after.replace(str(stopped.folder.parent), "")


def test_a_longer_run_goes_on_after_the_final_scores(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job-seed0"
    shutil.copytree(finished, folder)
    assert resume(folder, f"total_timesteps={12 * ITERATION}").status == "finished"
    records = read_population(folder)
    assert [record.step for record in records[::3]] == [0, 64, 128, 192, 256, 320, 384]
    assert [record.event == "final" for record in records[::3]] == [False] * 6 + [True]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("population.size=4", r"population.size = 4: .* began with 3 members, which cannot change any more"),
        ("pbt.hyperparams={optimizer.lr: {low: 0.001, high: 0.1}}", r"pbt.hyperparams: .* began with optimizer.lr, ppo.gamma"),
        ("seed=1", r"seed = 1: .* began with seed 0"),
        ("optimizer.lr=0.002", r"optimizer.lr = 0.002: the population tunes it, so it cannot be given"),
    ],
)
def test_what_a_population_is_cannot_change(finished: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resume(finished, override, "total_timesteps=1000")


# --------------------------------------------------------------------------------------------------------------- exchanges


def test_without_exchange_the_members_are_scored_and_go_their_own_ways() -> None:
    trainer = small(exchange=False)
    evolution = Evolution(trainer)
    drawn = evolution.start()
    records = advance(trainer, evolution, 5)
    assert len(records) == 6 and {record.event for record in records} == {"kept"}
    assert [record.after for record in evolution.finish()] == [record.after for record in drawn]
    assert evolution.exploits == 0
    alone = Trainer(trainer.settings)
    Evolution(alone).start()
    for _ in range(5):
        alone.iterate(10_000)
    for path, value in snapshot(alone.state).items():
        torch.testing.assert_close(value, snapshot(trainer.state)[path], rtol=0, atol=0, equal_nan=True, msg=path)


def test_members_may_all_start_from_the_configured_values() -> None:
    trainer = small(initial="configured", hyperparams={"optimizer.lr": {"low": 1e-3, "high": 0.1}})
    assert {record.after["optimizer.lr"] for record in Evolution(trainer).start()} == {float(np.float32(4e-3))}


def test_the_score_is_the_same_clean_evaluation_for_everybody_and_leaves_no_trace() -> None:
    """P × score: equal members have equal scores, whatever each one's training environments and drift are doing."""
    drift = {"kind": "physics", "every": 40, "ranges": {"gravity": [5.0, 15.0]}}
    still = make_population(Path("unused"), size=4).model_dump()
    trainer = Trainer(settings_from_dict(RunSettings, {**still, "env": {**still["env"], "drift": drift}}))
    evolution = Evolution(trainer)
    evolution.start()
    advance(trainer, evolution, 1)
    trainer.exploit_(np.array([0, 0, 2, 0]))
    before = snapshot(trainer.state)
    scores = [record.score for record in evolution.finish()]
    assert scores[1] == scores[3] == scores[0]
    for path, value in snapshot(trainer.state).items():
        torch.testing.assert_close(value, before[path], rtol=0, atol=0, equal_nan=True, msg=path)


def test_a_member_that_is_ill_is_healed_at_the_next_exchange_even_where_no_gap_is_wide_enough() -> None:
    trainer = small(min_gap=1e9)
    evolution = Evolution(trainer)
    evolution.start()
    trainer.state.hyper["optimizer.lr"][1] = math.nan
    records = advance(trainer, evolution, 2)
    assert [record.event for record in records] == ["kept", "healed", "kept"]
    assert math.isnan(records[1].score) and records[1].parent in (0, 2)
    assert all(math.isfinite(value) for value in records[1].after.values())
    assert trainer.sound().all()


def test_a_population_that_is_lost_altogether_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Trainer.iterate

    def break_everything(self: Trainer, total_timesteps: int) -> Any:
        self.state.parameters["core.encoder.linears.0.weight"].fill_(math.nan)
        return iterate(self, total_timesteps)

    monkeypatch.setattr(Trainer, "iterate", break_everything)
    with pytest.raises(PopulationLostError, match=r"after 64 steps no member has finite weights.*narrow pbt.hyperparams"):
        train(make_population(tmp_path))
    assert summary(tmp_path / "job-seed0")["status"] == "failed"


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize(
    "pbt",
    [
        {"select": "tournament", "explore": "perturb"},
        {"select": "welch", "explore": "resample", "significance": 0.4},
        {"explore": "pb2", "truncation": 0.5},
        {"frequencies": [1, 2]},
        {"optimizer_exploit_strategy": "reset", "after_exploit": "zero"},
    ],
    ids=lambda pbt: "-".join(map(str, pbt.values())),
)
def test_every_rule_runs_at_every_size(size: int, pbt: dict[str, Any]) -> None:
    trainer = small(size=size, **pbt)
    evolution = Evolution(trainer)
    evolution.start()
    records = advance(trainer, evolution, 7)
    assert len(records) == 3 * size
    again = Trainer(trainer.settings)
    twin = Evolution(again)
    twin.start()
    assert advance(again, twin, 7) == records  # seeded throughout
    stored = json.loads(json.dumps(evolution.document(), allow_nan=False))
    restored = Evolution(trainer)
    restored.restore(stored)
    assert restored.document() == evolution.document()


# ---------------------------------------------------------------------------------------------------------------- settings


def over(name: str, low: float, high: float, space: str = "log") -> dict[str, Any]:
    return {"pbt": {"hyperparams": {name: {"low": low, "high": high, "space": space}}}}


def at_start(**values: float) -> dict[str, Any]:
    return {"schedule": [{"step": 0, "values": {name.replace("__", "."): value for name, value in values.items()}}]}


UNKNOWN = r"'optimizer.lrr' is no tunable number \(did you mean 'optimizer.lr'\?\); allowed are .*optimizer.beta1, .*ppo.gamma"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (over("optimizer.lrr", 1, 2), UNKNOWN),
        (over("ppo.n_steps", 1, 2), r"pbt.hyperparams.ppo.n_steps.low: 'ppo.n_steps' is no tunable number"),
        (over("ppo.gamma", 0.9, 1.5, "linear"), r"pbt.hyperparams.ppo.gamma.high = 1.5: .*less than or equal to 1"),
        (over("optimizer.lr", 2.0, 1.0), "low = 2, high = 1: low must be below high"),
        (over("optimizer.lr", 0, 1.0), "low = 0: must be > 0 where space = 'log'"),
        (over("ppo.gamma", 0.5, 1, "log_one_minus"), "high = 1: must be < 1"),
        ({"pbt": {**over("optimizer.lr", 0.1, 1)["pbt"], "initial": "configured"}}, "lr = 0.004 lies outside 0.1 to 1"),
        (at_start(ppo__gama=0.9), r"values.ppo.gama: 'ppo.gama' is no tunable number \(did you mean 'ppo.gamma'"),
        (at_start(ppo__gamma=2.0), r"schedule.0.values.ppo.gamma = 2: .*less than or equal to 1"),
        ({**at_start(ppo__gamma=0.9), "population": {"size": 2}}, "schedule: population.size = 2"),
        ({"pbt": {"hyperparams": {}}}, "pbt.hyperparams"),
        ({"population": {"size": 0}}, r"population.size = 0: must be a whole number >= 1"),
    ],
)
def test_impossible_populations_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**section)


def test_pb2_without_its_library_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    with pytest.raises(ConfigError, match=r"pbt.explore = 'pb2': needs scikit-learn.*pip install 'hardy\[pb2\]'"):
        tiny(population={"size": 2}, pbt={"explore": "pb2"})
    tiny(pbt={"explore": "pb2"})  # a single agent does not explore


def test_the_seeds_of_members_are_those_of_single_runs_and_their_world_is_one() -> None:
    settings = tiny(seed=5, population={"size": 3})
    assert settings.member_seeds == [5, 6, 7] and settings.drift_seeds == [5, 5, 5]
    assert Trainer(settings).seeds == [5, 6, 7]


# ------------------------------------------------------------------------------------------------ what a user may break


def test_a_population_that_is_lost_after_its_last_exchange_is_not_called_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "sound", lambda self: np.zeros(3, dtype=bool))
    with pytest.raises(PopulationLostError, match="after 96 steps no member"):
        train(make_population(tmp_path, iterations=3, interval=10_000))
    assert summary(tmp_path / "job-seed0")["status"] == "failed"


def test_an_interrupted_population_is_evaluated_as_its_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The history may be ahead of the newest checkpoint: whoever was best later need not have been best then."""
    folder = train(make_population(tmp_path)).folder
    step = 128
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    with monkeypatch.context() as patched:
        interrupt_after(patched, step // ITERATION)
        stopped = train(make_population(tmp_path / "stopped")).folder
    shutil.copy(folder / "population.csv", stopped / "population.csv")
    asked: list[int] = []
    best = run.best_member

    def noting(records: Any) -> int:
        asked.append(max(record.step for record in records))
        return best(records)

    monkeypatch.setattr(run, "best_member", noting)
    run.evaluate(stopped, 3, None)
    assert asked == [step]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "history of the population cannot be read"),
        (lambda path: path.write_text("exchange,step\n"), "does not begin with the start of the run"),
        (lambda path: path.write_bytes(path.read_bytes()[:300] + b"\xff\n"), "population.csv: is damaged"),
    ],
    ids=["missing", "empty", "garbled"],
)
def test_a_damaged_history_is_named(finished: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = tmp_path / "job-seed0"
    shutil.copytree(finished, folder)
    damage(folder / "population.csv")
    with pytest.raises(CheckpointError, match=message):
        run.evaluate(folder, 3, None)


def test_without_its_beginning_a_history_gives_no_schedule(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job-seed0"
    shutil.copytree(finished, folder)
    (folder / "population.csv").unlink()
    assert resume(folder, f"total_timesteps={12 * ITERATION}").status == "finished"
    assert not (folder / "schedule.yaml").exists()
    assert any("no schedule.yaml" in line for line in LINES)


def test_files_that_cannot_be_continued_are_named(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job-seed0"
    shutil.copytree(finished, folder)
    (folder / "metrics.csv").write_text("time/total_timesteps\n")
    with pytest.raises(CheckpointError, match=r"metrics\.csv: was written by a population of 1, not 3"):
        resume(folder, f"total_timesteps={12 * ITERATION}")
    (path,) = [path for path in (folder / "checkpoints").iterdir() if path.name == "step_000000288.safetensors"]
    tensors, document = load_tensors(path)
    save_tensors(path, tensors, {name: value for name, value in document.items() if name != "evolution"})
    with pytest.raises(CheckpointError, match="a Hardy that did not train populations"):
        resume(folder, f"total_timesteps={12 * ITERATION}")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"population": {"size": 2}, "pbt": {"frequencies": [1, 2, 3]}},
            r"at most population.size = 2 of them",
        ),
        ({**over("vgs.alpha", 0.01, 1), "vgs": {"enabled": False}}, "vgs.alpha has no effect with vgs.enabled = false"),
        ({**over("optimizer.beta1", 0.5, 0.9), "optimizer": {"name": "UPGD"}}, "no effect with optimizer.name = 'UPGD'"),
        (over("risk.weight", 0.1, 1), "risk.weight has no effect with risk.weight = 0 and risk.cvar_limit = null"),
        (over("critic.value_clip", 0.1, 1), "critic.value_clip has no effect with critic.value_clip = 0"),
        (over("adversary.robust_kl_coef", 0.1, 1), "adversary.robust_kl_coef has no effect with adversary.epsilon = 0"),
        (over("optimizer.lr", 1e-60, 1e-50), "a float32, as which values are kept, has no such range"),
        (over("optimizer.lr", 1e39, 1e45), "a float32, as which values are kept, has no such range"),
        (
            {"schedule": [{"step": 9, "values": {"ppo.gamma": 0.9}}] * 2},
            "schedule: the steps are .*: they must increase",
        ),
    ],
)
def test_what_could_not_work_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**section)
