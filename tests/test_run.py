"""A run and its folder: what it leaves, and that nothing stops it from going on exactly where it was."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hardy import CheckpointError, ConfigError, DistributionalPPO, run
from hardy import trainer as trainer_module
from hardy.checkpoint import load_tensors
from hardy.config import dump_settings, load_settings, settings_from_dict
from hardy.metrics import METRICS, MetricsWriter
from hardy.settings import RunSettings
from hardy.trainer import Trainer

ROOT = Path(__file__).parents[1]
ITERATION = 4 * 8
FOLDER = "job-seed0"
LINES: list[str] = []
"""What the runs of a test told the user."""


@pytest.fixture(autouse=True)
def _nothing_told() -> None:
    LINES.clear()


def make_settings(folder: Path, iterations: int = 4, **sections: Any) -> RunSettings:
    tiny: dict[str, Any] = {
        "total_timesteps": iterations * ITERATION,
        "artifacts_dir": str(folder),
        "threads": 1,
        "env": {"id": "CartPoleNoVel-v1", "num_envs": 4},
        "policy": {"memory_size": 8, "encoder": [8]},
        "ppo": {"n_steps": 8, "n_epochs": 1, "n_minibatches": 2},
        "evaluation": {"episodes": 3},
        "checkpoint": {"every": ITERATION},
    }
    return settings_from_dict(RunSettings, tiny | sections)


def train(settings: RunSettings) -> run.Outcome:
    return run.train(settings, "job", LINES.append)


def resume(folder: Path, *overrides: str) -> run.Outcome:
    return run.resume(folder, list(overrides), LINES.append)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, iterations: int, number: signal.Signals = signal.SIGINT) -> None:
    """Press Ctrl-C during an iteration, once."""
    iterate, left = Trainer.iterate, iter(range(iterations, -1_000_000, -1))

    def interrupted(self: Trainer, total_timesteps: int) -> Any:
        metrics = iterate(self, total_timesteps)
        if next(left) == 1:
            signal.raise_signal(number)
        return metrics

    monkeypatch.setattr(Trainer, "iterate", interrupted)


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv but for wall time."""
    with (folder / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("time/elapsed", "time/steps_per_second")} for row in csv.DictReader(file)
        ]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def assert_same_results(one: Path, two: Path) -> None:
    assert rows(one) == rows(two)
    assert checkpoints(one)[-1] == checkpoints(two)[-1]
    tensors = [load_tensors(folder / "checkpoints" / checkpoints(one)[-1])[0] for folder in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert summary(one)["evaluation"] == summary(two)["evaluation"]


# -------------------------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to look at; nothing writes to it."""
    return train(make_settings(tmp_path_factory.mktemp("artifacts"))).folder


def test_a_run_leaves_everything(finished: Path) -> None:
    events = [path for path in finished.iterdir() if path.name.startswith("events.out.tfevents")]
    assert len(events) == 1
    assert sorted(path.name for path in finished.iterdir() if path not in events) == [
        "checkpoints", "config.yaml", "learning_curve.png", "metrics.csv", "policy.safetensors", "summary.json",
    ]  # fmt: skip
    assert checkpoints(finished) == ["step_000000096.safetensors", "step_000000128.safetensors"]
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_configuration_is_fully_resolved_and_reloads_equal(finished: Path) -> None:
    settings = load_settings(RunSettings, finished / "config.yaml")
    assert settings == make_settings(finished.parent)
    assert (finished / "config.yaml").read_text() == dump_settings(settings)
    assert "gae_lambda: 0.95" in (finished / "config.yaml").read_text()


def test_the_metrics_of_every_iteration(finished: Path) -> None:
    *table, evaluated = rows(finished)
    assert [int(row["time/total_timesteps"]) for row in table] == [32, 64, 96, 128]
    losses = "value_loss policy_loss entropy approx_kl clip_fraction explained_variance grad_norm"
    asked = [f"train/{name}" for name in losses.split(" ")]
    asked += ["rollout/ep_rew_mean", "rollout/ep_len_mean", "vgs/scaling_factor", "vgs/normalized_variance"]
    asked += ["upgd/noise_to_signal", "upgd/utility_max"]
    for name in asked:
        assert all(row[name] != "" for row in table), name
    assert (
        table[0]["plasticity/dormant_fraction"] and table[0]["plasticity/effective_rank"] and table[0]["plasticity/weight_norm"]
    )
    assert not any(row["eval/mean"] for row in table)
    assert {name: value for name, value in evaluated.items() if value}.keys() == {
        "time/total_timesteps", "eval/mean", "eval/low", "eval/high",
    }  # fmt: skip
    assert evaluated["time/total_timesteps"] == "128"
    accumulator = EventAccumulator(str(finished))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    not_here = {"time/total_timesteps", "risk/lambda", "risk/violation"}  # without a limit, and without an adversary
    not_here |= {metric.name for metric in METRICS.values() if metric.population}
    assert {name for name in METRICS if name not in not_here and not name.startswith("adversary/")} <= tags
    events = accumulator.Scalars("train/value_loss")
    assert [event.step for event in events] == [32, 64, 96, 128]
    assert [event.value for event in events] == pytest.approx([float(row["train/value_loss"]) for row in table])


def test_the_summary(finished: Path) -> None:
    found = summary(finished)
    assert (found["status"], found["seed"], found["total_timesteps"]) == ("finished", 0, 128)
    last = rows(finished)[-1]
    assert found["evaluation"]["episodes"] == 3
    for name in ("mean", "low", "high"):
        assert found["evaluation"][name] == pytest.approx(float(last[f"eval/{name}"]))
    assert found["evaluation"]["low"] <= found["evaluation"]["mean"] <= found["evaluation"]["high"]


def test_the_policy_acts(finished: Path) -> None:
    model = DistributionalPPO.load(finished / "policy")
    action, state = model.predict(np.zeros((3, 2)), deterministic=True)
    newest = DistributionalPPO.load(finished / "checkpoints" / checkpoints(finished)[-1])
    again, same_state = newest.predict(np.zeros((3, 2)), deterministic=True)
    np.testing.assert_array_equal(action, again)
    np.testing.assert_array_equal(state, same_state)
    assert newest.trainer is not None and newest.trainer.timesteps == 128


def test_folders_are_numbered_and_never_reused(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "a" / "b")
    assert [run.new_folder(settings, "job").name for _ in range(3)] == ["job-seed0", "job-seed0-2", "job-seed0-3"]
    assert run.new_folder(make_settings(tmp_path, seed=7), "job").name == "job-seed7"


@pytest.mark.parametrize("how", ["file", "dangling"])
def test_a_place_where_no_folder_can_be_made(tmp_path: Path, how: str) -> None:
    place = tmp_path / "artifacts"
    if how == "file":
        place.write_text("here first")
    else:
        place.symlink_to(tmp_path / "missing" / "further")
    with pytest.raises(ConfigError, match=r"artifacts_dir = .*artifacts.*: no folder can be made there"):
        run.new_folder(make_settings(place), "job")


def test_old_checkpoints_go(tmp_path: Path) -> None:
    folder = train(make_settings(tmp_path, checkpoint={"every": ITERATION, "keep": 1})).folder
    assert checkpoints(folder) == ["step_000000128.safetensors"]
    sparse = train(make_settings(tmp_path, checkpoint={"every": 2 * ITERATION + 1, "keep": 9})).folder
    assert checkpoints(sparse) == ["step_000000096.safetensors", "step_000000128.safetensors"]


# -------------------------------------------------------------------------------------------------------------- evaluation


def test_the_same_seed_gives_the_same_evaluation(finished: Path) -> None:
    one, two, other = (run.evaluate(finished, 6, seed) for seed in (3, 3, 4))
    assert one == two
    assert one != other
    assert one.episodes == 6
    assert run.evaluate(finished, None, None) == run.evaluate(finished, 3, None)


def test_an_evaluation_without_a_seed_repeats_the_run_s_own(finished: Path) -> None:
    found = run.evaluate(finished, None, None)
    assert found.mean == pytest.approx(summary(finished)["evaluation"]["mean"])


def test_an_evaluation_changes_nothing(finished: Path) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}

    before = contents()
    run.evaluate(finished, 2, None)
    assert contents() == before


def test_the_interval_of_a_mean() -> None:
    found = run.summarise(np.array([1.0, 2.0, 3.0, 4.0]))
    # Student's t with three degrees of freedom: 3.182446; standard error: 1.290994 / 2
    assert (found.mean, found.episodes) == (2.5, 4)
    assert found.high - found.mean == pytest.approx(3.182446 * 1.2909944 / 2, rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


# ------------------------------------------------------------------------------------------------- interruption and resume

TASKS: dict[str, dict[str, Any]] = {
    "drifting physics": {
        "env": {
            "id": "CartPoleNoVel-v1", "num_envs": 4,
            "drift": {"kind": "physics", "every": 60, "over": 20, "ranges": {"gravity": [5, 15]}},
        },
        "ppo": {"n_steps": 8, "n_epochs": 2, "n_minibatches": 2, "lr_schedule": "linear"},
    },
    "permuted, continuous": {
        "env": {"id": "PendulumNoVel-v1", "num_envs": 4, "max_episode_steps": 13, "drift": {"kind": "permute", "every": 50}},
        "policy": {"memory": "gru", "memory_size": 5, "encoder": [3], "shared_memory": False},
        "vgs": {"estimator": "microbatch"},
    },
    "no memory": {
        "env": {"id": "MountainCarContinuous-v0", "num_envs": 4, "max_episode_steps": 20},
        "policy": {"memory": "none", "encoder": [4]},
    },
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_an_interrupted_run_ends_as_if_never_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    whole = train(make_settings(tmp_path / "whole", 8, **TASKS[task])).folder
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        outcome = train(make_settings(tmp_path / "cut", 8, **TASKS[task], checkpoint={"every": 10**6}))
    assert (outcome.status, outcome.evaluation) == ("interrupted", None)
    assert summary(outcome.folder)["status"] == "interrupted"
    assert checkpoints(outcome.folder) == ["step_000000128.safetensors"]
    assert (outcome.folder / "policy.safetensors").exists() and (outcome.folder / "learning_curve.png").exists()
    assert resume(outcome.folder).status == "finished"
    assert any("at 128 steps" in line for line in LINES)
    assert_same_results(whole, outcome.folder)
    assert summary(outcome.folder)["status"] == "finished"


class PowerCut(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("when", ["before the row", "before the checkpoint", "before the evaluation"])
def test_a_killed_run_ends_as_if_never_killed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    owner, name = {
        "before the row": (MetricsWriter, "write"),
        "before the checkpoint": (Trainer, "save"),
        "before the evaluation": (Trainer, "evaluate"),
    }[when]
    calls = 1 if when == "before the evaluation" else 3
    with monkeypatch.context() as patch:
        method, left = getattr(owner, name), iter(range(calls, 0, -1))

        def killed(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 1:
                raise PowerCut
            return method(*args, **kwargs)

        patch.setattr(owner, name, killed)
        with pytest.raises(PowerCut):
            train(make_settings(tmp_path / "cut"))
    cut = tmp_path / "cut" / FOLDER
    assert summary(cut)["status"] == "failed"
    if when == "before the evaluation":  # nothing of the training is lost
        assert checkpoints(cut)[-1] == "step_000000128.safetensors"
        assert summary(cut)["evaluation"]["mean"] is None
        (cut / "summary.json").unlink()  # as a kill leaves it
    assert resume(cut).status == "finished"
    assert_same_results(finished, cut)


def test_a_termination_signal_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    interrupt_after(monkeypatch, 1, signal.SIGTERM)
    outcome = train(make_settings(tmp_path))
    assert outcome.status == "interrupted" and checkpoints(outcome.folder) == ["step_000000032.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interruption_in_the_last_iteration_leaves_the_evaluation_for_later(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 4)
    outcome = train(make_settings(tmp_path))
    assert (outcome.status, outcome.evaluation, outcome.resumable) == ("interrupted", None, True)
    assert resume(outcome.folder).status == "finished"
    assert_same_results(finished, outcome.folder)
    with pytest.raises(ConfigError, match="is at 128 already"):
        resume(outcome.folder)


def test_an_evaluation_that_never_ends_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = trainer_module.evaluate

    def endless(env: Any, *args: Any, **kwargs: Any) -> Any:
        step, left = env.step, iter(range(3, -1000, -1))

        def never_over(actions: Any) -> Any:
            if next(left) == 1:
                signal.raise_signal(signal.SIGINT)
            taken = step(actions)
            nothing = np.zeros_like(taken.terminated)
            return dataclasses.replace(taken, terminated=nothing, truncated=nothing)

        env.step = never_over
        return evaluate(env, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "evaluate", endless)
    outcome = train(make_settings(tmp_path))
    assert (outcome.status, outcome.evaluation) == ("interrupted", None)
    assert run.STOPPING in LINES


def test_a_second_interruption_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Trainer.iterate

    def twice(self: Trainer, total_timesteps: int) -> Any:
        if self.timesteps:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return iterate(self, total_timesteps)

    monkeypatch.setattr(Trainer, "iterate", twice)
    outcome = train(make_settings(tmp_path))
    assert (outcome.status, outcome.resumable) == ("interrupted", True)
    assert LINES == [run.STOPPING]
    assert checkpoints(tmp_path / FOLDER) == ["step_000000032.safetensors"]
    assert summary(tmp_path / FOLDER)["status"] == "interrupted"
    assert "error" not in summary(tmp_path / FOLDER)
    sparse = train(make_settings(tmp_path, checkpoint={"every": 10**6}))
    assert (sparse.status, sparse.resumable) == ("interrupted", False)


def test_the_command_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(dump_settings(make_settings(tmp_path, 10**6, checkpoint={"every": 10**9})))
    command = [sys.executable, "-c", "from hardy.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"}
    with subprocess.Popen(
        [*command, "train", str(config)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = tmp_path / FOLDER / "metrics.csv"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == ""
    assert run.STOPPING in out
    assert f"continue with: hardy resume {tmp_path / FOLDER}" in out
    done = int(rows(tmp_path / FOLDER)[-1]["time/total_timesteps"])
    assert checkpoints(tmp_path / FOLDER) == [f"step_{done:09d}.safetensors"]
    total = done + 2 * ITERATION
    resumed = subprocess.run(
        [*command, "resume", str(tmp_path / FOLDER), f"total_timesteps={total}"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (resumed.returncode, resumed.stderr) == (0, "")
    table = rows(tmp_path / FOLDER)
    assert [int(row["time/total_timesteps"]) for row in table] == [*range(ITERATION, total + 1, ITERATION), total]
    assert summary(tmp_path / FOLDER)["status"] == "finished"


def cut_short(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def test_a_truncated_checkpoint_is_passed_over(finished: Path, tmp_path: Path) -> None:
    broken = train(make_settings(tmp_path / "broken")).folder
    cut_short(broken / "checkpoints" / checkpoints(broken)[-1])
    assert resume(broken).status == "finished"
    assert any("skipped" in line and "step_000000128" in line and "truncated" in line for line in LINES)
    assert any("at 96 steps" in line for line in LINES)
    assert_same_results(finished, broken)


def test_an_evaluation_says_which_checkpoint_it_passed_over(tmp_path: Path) -> None:
    folder = train(make_settings(tmp_path)).folder
    cut_short(folder / "checkpoints" / checkpoints(folder)[-1])
    with pytest.warns(UserWarning, match=r"skipped .*step_000000128.*truncated"):
        run.evaluate(folder, 2, None)


def test_without_a_usable_checkpoint_nothing_starts(tmp_path: Path) -> None:
    folder = train(make_settings(tmp_path, checkpoint={"every": 10**6})).folder
    (only,) = (folder / "checkpoints").iterdir()
    cut_short(only)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        resume(folder)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(CheckpointError, match="no usable checkpoint"):
        run.evaluate(folder, 2, None)


def test_a_finished_run_goes_on_only_if_it_gets_longer(tmp_path: Path) -> None:
    folder = train(make_settings(tmp_path)).folder
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"total_timesteps = 128: .* is at 128 already; give a larger number"):
        resume(folder)
    assert (folder / "config.yaml").read_text() == before
    assert resume(folder, f"total_timesteps={6 * ITERATION}").status == "finished"
    assert load_settings(RunSettings, folder / "config.yaml").total_timesteps == 192
    table = rows(folder)
    assert [int(row["time/total_timesteps"]) for row in table] == [32, 64, 96, 128, 128, 160, 192, 192]
    assert [bool(row["eval/mean"]) for row in table] == [False] * 4 + [True] + [False] * 2 + [True]
    assert_times_grow(folder)


def assert_times_grow(folder: Path) -> None:
    with (folder / "metrics.csv").open() as file:
        elapsed = [float(row["time/elapsed"]) for row in csv.DictReader(file) if row["time/elapsed"]]
    assert elapsed == sorted(elapsed)


def rates(folder: Path) -> list[float]:
    return [float(row["train/learning_rate"]) for row in rows(folder) if row["train/learning_rate"]]


def test_an_override_of_a_hyperparameter_takes_effect(tmp_path: Path) -> None:
    folder = train(make_settings(tmp_path, optimizer={"lr": 3e-4})).folder
    resume(folder, "total_timesteps=192", "optimizer.lr=0.125", "ppo.ent_coef=0.5")
    assert rates(folder) == pytest.approx([3e-4] * 4 + [0.125] * 2)
    tensors, _ = load_tensors(folder / "checkpoints" / checkpoints(folder)[-1])
    assert tensors["hyper.ppo.ent_coef"].tolist() == [0.5]


def test_a_hyperparameter_tuned_since_the_start_stays_tuned(tmp_path: Path) -> None:
    folder = train(make_settings(tmp_path, optimizer={"lr": 3e-4})).folder
    path = folder / "checkpoints" / checkpoints(folder)[-1]
    trainer = run.make_trainer(load_settings(RunSettings, folder / "config.yaml"))
    document = trainer.restore(path)
    trainer.state.hyper["optimizer.lr"].fill_(0.0625)
    trainer.save(path, {"elapsed": document["elapsed"]})
    resume(folder, "total_timesteps=192", "ppo.ent_coef=0.5")
    assert rates(folder) == pytest.approx([3e-4] * 4 + [0.0625] * 2)


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("seed=3", ConfigError, "seed = 3: .* began with seed 0"),
        ("policy.memory_size=9", CheckpointError, "does not fit"),
        ("env.num_envs=5", CheckpointError, "does not fit"),
        ("env.id=Acrobot-v1", CheckpointError, "does not fit"),
        ("env.id=CartPole-v1", CheckpointError, "does not fit"),
        ("env.drift={kind: permute, every: 50}", CheckpointError, "state of other environments: .*drifting task"),
        ("ppo.gama=0.9", ConfigError, "ppo.gama.*did you mean 'gamma'"),
    ],
)
def test_what_cannot_change_between(finished: Path, override: str, error: type[Exception], words: str) -> None:
    before = (finished / "config.yaml").read_text()
    with pytest.raises(error, match=words):
        resume(finished, "total_timesteps=1000", override)
    assert (finished / "config.yaml").read_text() == before


def test_environments_that_cannot_be_saved_start_anew_in_the_drifted_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acrobot = {"env": {"id": "Acrobot-v1", "num_envs": 4, "drift": {"kind": "permute", "every": 60}}}
    interrupt_after(monkeypatch, 3)
    folder = train(make_settings(tmp_path, **acrobot)).folder
    trainer = run.make_trainer(load_settings(RunSettings, folder / "config.yaml"))
    trainer.restore(folder / "checkpoints" / checkpoints(folder)[-1])
    assert trainer.env.steps.tolist() == [96]  # type: ignore[attr-defined]
    assert bool(trainer.state.collector.is_first.all())
    monkeypatch.undo()
    assert resume(folder).status == "finished"
    assert [row["env/drift_changes"] for row in rows(folder)] == ["0", "1", "1", "2", ""]


def test_a_gymnasium_task_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    def settings(env_id: str, **kwargs: Any) -> RunSettings:
        return make_settings(tmp_path, env={"id": env_id, "num_envs": 4, "kwargs": kwargs})

    with pytest.raises(ConfigError, match=r"env.id = 'Acrobot-v1', env.kwargs = .*gravity.*unexpected keyword"):
        train(settings("Acrobot-v1", gravity=3))
    gymnasium.register("NeedsMore-v0", entry_point="no_such_module:Env")
    try:
        with pytest.raises(ConfigError, match=r"env.id = 'NeedsMore-v0'.*no_such_module"):
            train(settings("NeedsMore-v0"))
    finally:
        del gymnasium.registry["NeedsMore-v0"]
    assert list(tmp_path.iterdir()) == []  # refused before anything was made


# --------------------------------------------------------------------------------------------------------------------- NaN


def break_weights(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """A weight that is not a number, from this iteration on."""
    iterate, left = Trainer.iterate, iter(range(iteration, -1_000_000, -1))

    def broken(self: Trainer, total_timesteps: int) -> Any:
        if next(left) == 1:
            self.state.parameters["core.encoder.linears.0.weight"][0, 0, 0] = np.nan
        return iterate(self, total_timesteps)

    monkeypatch.setattr(Trainer, "iterate", broken)


def test_a_single_agent_goes_back_to_its_last_good_state_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_weights(monkeypatch, 4)
    outcome = train(make_settings(tmp_path, iterations=6, checkpoint={"every": 2 * ITERATION, "keep": 9}))
    assert outcome.status == "finished"
    (line,) = [line for line in LINES if "not finite" in line]
    assert line.startswith("after 128 steps a weight or statistic is not finite: goes on with the weights of step 64")
    before, after = (load_tensors(outcome.folder / "checkpoints" / f"step_{step:09d}.safetensors")[0] for step in (64, 128))
    for name, value in after.items():
        if name.startswith(("parameters.", "optimizer.", "hyper.", "observation.", "reward.moments.")):
            assert torch.equal(value, before[name]), name
    assert int(after["timesteps"][0]) == 128 and after["collector.is_first"].all() and not after["collector.recurrent"].any()
    assert [row["train/skipped_updates"] for row in rows(outcome.folder)[:-1]] == ["0", "0", "0", "2", "0", "0"]


def test_with_nothing_to_go_back_to_the_run_fails_with_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_weights(monkeypatch, 1)
    with pytest.raises(
        run.DivergedError, match=r"after 32 steps .* not finite, and there is nothing to go back to .*optimizer.lr"
    ):
        train(make_settings(tmp_path))
    assert summary(tmp_path / FOLDER)["status"] == "failed"


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_a_run_of_a_missing_device_is_evaluated_and_goes_on_here(tmp_path, monkeypatch, backend) -> None:
    """With the environments that its checkpoint holds: a run on a graphics card had them there as tensors."""
    here = "torch" if backend == "auto" else "numpy"
    other = train(make_settings(tmp_path / "there", 2, env={"id": "CartPoleNoVel-v1", "num_envs": 4, "backend": here}))
    whole = train(make_settings(tmp_path / "whole", 4, env={"id": "CartPoleNoVel-v1", "num_envs": 4, "backend": here}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = other.folder / run.CONFIG
    text = config.read_text(encoding="utf-8").replace("device: cpu", "device: cuda")
    config.write_text(text.replace(f"backend: {here}", f"backend: {backend}"), encoding="utf-8")
    read = run.read_document

    def on_a_card(path: Path) -> dict[str, Any]:
        document = read(path)
        settings = document["settings"]
        moved = {**settings, "device": "cuda", "env": {**settings["env"], "backend": backend}}
        return {**document, "settings": moved}

    monkeypatch.setattr(run, "read_document", on_a_card)
    with pytest.raises(ConfigError, match="device = 'cuda': this machine has no CUDA device"):
        resume(other.folder)
    assert run.evaluate(other.folder, 3, None).episodes == 3
    resumed = resume(other.folder, "device=cpu", f"total_timesteps={4 * ITERATION}")
    kept = load_settings(RunSettings, config, [])
    assert (kept.device, kept.env.backend) == ("cpu", here)
    states = [load_tensors(run.latest_checkpoint(outcome.folder / run.CHECKPOINTS))[0] for outcome in (resumed, whole)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert torch.equal(states[0][name].nan_to_num(-7), value.nan_to_num(-7)), name
