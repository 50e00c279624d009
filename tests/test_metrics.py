"""The metrics files: what is written is read back, kills and resumes leave one clean history, every metric is explained."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hardy.metrics import METRICS, MetricsWriter, read_metrics

NAMED_BY_THE_PROJECT = (
    "rollout/ep_rew_mean rollout/ep_len_mean rollout/episodes train/value_loss train/policy_loss train/entropy train/approx_kl"
    " train/clip_fraction train/explained_variance train/grad_norm train/learning_rate train/skipped_updates vgs/scaling_factor"
    " vgs/normalized_variance upgd/noise_to_signal upgd/utility_max plasticity/dormant_fraction plasticity/effective_rank"
    " plasticity/weight_norm env/drift_changes eval/mean eval/low eval/high time/total_timesteps time/elapsed"
    " time/steps_per_second risk/cvar risk/lambda risk/violation"
    " adversary/epsilon adversary/robust_kl adversary/clean_grad_norm adversary/robust_grad_norm"
)
OF_A_POPULATION = (
    "pbt/score pbt/score_best pbt/score_mean pbt/score_std pbt/exploitation_count pbt/post_exploit_value_loss_ratio"
    " pbt/lineage_depth pbt/age pbt/hyperparam"
)


def test_the_registry_holds_exactly_the_metrics_that_users_were_promised() -> None:
    assert set(METRICS) == {*NAMED_BY_THE_PROJECT.split(), *OF_A_POPULATION.split()}
    assert {name for name, metric in METRICS.items() if metric.population} == set(OF_A_POPULATION.split())
    assert all(name == metric.name and metric.unit and metric.meaning and metric.healthy for name, metric in METRICS.items())


def test_every_metric_is_explained_and_nothing_else() -> None:
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert [re.match(r"`(.+?)`", section)[1] for section in sections] == list(METRICS)  # type: ignore[index]
    for section in sections:
        for part in ("What it is", "Healthy", "If not"):
            assert re.search(rf"^\*\*{part}\.\*\* \S", section, flags=re.MULTILINE), section


def test_one_agent_has_one_column_per_metric(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", members=1) as writer:
        row = writer.write(
            10, {"train/entropy": torch.tensor([0.1]), "time/elapsed": 2.5, "train/grad_norm": torch.tensor(3.0)}
        )
        assert row == {
            "time/total_timesteps": 10,
            "train/entropy": pytest.approx(0.1),
            "time/elapsed": 2.5,
            "train/grad_norm": 3.0,
        }
        assert read_metrics(tmp_path / "run")["time/total_timesteps"].tolist() == [10.0]  # on disk before the file is closed
        writer.write(2**40 + 1, {"train/entropy": math.nan, "eval/mean": -math.inf})
    read = read_metrics(tmp_path / "run")
    assert list(read) == [name for name, metric in METRICS.items() if not metric.population]
    assert read["time/total_timesteps"].tolist() == [10.0, 2.0**40 + 1]
    np.testing.assert_array_equal(read["train/entropy"].astype(np.float32), np.array([0.1, np.nan], dtype=np.float32))
    np.testing.assert_array_equal(read["eval/mean"], [np.nan, -np.inf])
    text = (tmp_path / "run" / "metrics.csv").read_text()
    assert text.splitlines()[1].startswith("10,2.5,,")


def test_a_population_has_a_column_per_member_and_the_mean_of_the_finite_ones(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, members=3) as writer:
        values = {
            "train/entropy": torch.tensor([1.0, math.nan, 4.0]),
            "time/elapsed": 7.0,
            "eval/low": torch.full((3,), math.nan),
        }
        row = writer.write(5, values)
    assert row["train/entropy"] == 2.5
    read = read_metrics(tmp_path)
    members = [read[f"train/entropy/member_{index}"][0] for index in range(3)]
    np.testing.assert_array_equal(members, [1.0, np.nan, 4.0])
    assert math.isnan(read["eval/low"][0])
    assert "time/elapsed/member_0" not in read
    assert len(read) == sum(4 if metric.per_member else 1 for metric in METRICS.values() if not metric.only_parts)
    of_one_number = {"score_best", "score_mean", "score_std", "exploitation_count"}
    assert {f"pbt/{name}/member_2" in read for name in of_one_number} == {False}
    assert all(f"{name}/member_2" in read for name in ("pbt/score", "pbt/lineage_depth", "pbt/age"))
    assert not any(name.startswith("pbt/hyperparam") for name in read)


@settings(deadline=None, max_examples=25)
@given(value=st.floats(width=32, allow_nan=False))
def test_a_float32_survives_the_file_exactly(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("exact")
    with MetricsWriter(folder, members=1) as writer:
        writer.write(1, {"train/grad_norm": value})
    assert np.float32(read_metrics(folder)["train/grad_norm"][0]) == np.float32(value)


def test_what_is_not_a_metric_is_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, members=2) as writer:
        with pytest.raises(ValueError, match=r"metric 'train/entrpy' is not registered \(did you mean 'train/entropy'\?\)"):
            writer.write(1, {"train/entrpy": 1.0})
        with pytest.raises(
            ValueError, match=r"metric 'train/entropy' has shape \[3\]: must be a number or one per member \[2\]"
        ):
            writer.write(1, {"train/entropy": torch.ones(3)})
        with pytest.raises(ValueError, match="metric 'pbt/hyperparam' has no value itself: give it parts"):
            writer.write(1, {"pbt/hyperparam": torch.ones(2)})
    assert len(read_metrics(tmp_path)["train/entropy"]) == 0


def test_a_single_agent_has_no_metrics_of_a_population(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, members=1) as writer:
        for name in ("pbt/score", "pbt/score_best", "pbt/hyperparam/optimizer.lr"):
            with pytest.raises(ValueError, match=f"metric '{name}' is that of a population: a single agent has none"):
                writer.write(1, {name: 1.0})
    assert len(read_metrics(tmp_path)["train/entropy"]) == 0


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_resumed_history_equals_an_uninterrupted_one(members: int, cut: int, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def write(folder: Path, steps: range, resume_step: int | None = None) -> None:
        with MetricsWriter(folder, members, resume_step) as writer:
            for step in steps:
                writer.write(
                    step, {"train/grad_norm": torch.arange(members) / 3 + step, "rollout/ep_rew_mean": torch.ones(members)}
                )

    write(whole, range(10, 60, 10))
    write(resumed, range(10, 50, 10))
    path = resumed / "metrics.csv"
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    write(resumed, range(30, 60, 10), resume_step=20)
    assert path.read_bytes() == (whole / "metrics.csv").read_bytes()
    write(resumed, range(10, 60, 10))  # without resuming, a new history
    assert path.read_bytes() == (whole / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match=f"was written by a population of {members}, not 2"):
        MetricsWriter(resumed, 2, 20)


def test_resuming_without_a_file_starts_one_and_keeps_the_columns_of_an_older_one(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 1, resume_step=3) as writer:
        writer.write(4, {})
    assert read_metrics(tmp_path)["time/total_timesteps"].tolist() == [4.0]
    (tmp_path / "metrics.csv").write_text("time/total_timesteps,eval/mean\n4,1\n")
    with MetricsWriter(tmp_path, 1, resume_step=4) as writer:
        writer.write(5, {"eval/mean": 2.0, "train/entropy": 3.0})
    assert (tmp_path / "metrics.csv").read_text() == "time/total_timesteps,eval/mean\n4,1\n5,2\n"


def test_a_half_written_row_is_neither_read_nor_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("time/total_timesteps,eval/mean\n4,1\n5,2")
    assert read_metrics(tmp_path)["eval/mean"].tolist() == [1.0]
    with MetricsWriter(tmp_path, 1, resume_step=5) as writer:
        writer.write(6, {"eval/mean": 3.0})
    assert path.read_text() == "time/total_timesteps,eval/mean\n4,1\n6,3\n"
    path.write_text("")
    assert read_metrics(tmp_path) == {}
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path)


def test_hyperparameters_of_the_members_go_to_tensorboard_as_parts(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, members=2) as writer:
        row = writer.write(
            5, {"pbt/hyperparam/optimizer.lr": torch.tensor([0.25, 0.75]), "pbt/score": torch.tensor([1.0, math.nan])}
        )
    assert row["pbt/hyperparam/optimizer.lr"] == 0.5
    read = read_metrics(tmp_path)
    assert read["pbt/score"].tolist() == [1.0]
    assert math.isnan(read["pbt/score/member_1"][0])
    events = EventAccumulator(str(tmp_path)).Reload()
    values = [events.Scalars(f"pbt/hyperparam/optimizer.lr/member_{index}")[0].value for index in range(2)]
    assert values == [0.25, 0.75]


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, members=2) as writer:
        writer.write(5, {"train/entropy": torch.tensor([1.0, 2.0])})
        writer.write(6, {"train/entropy": torch.tensor([3.0, 4.0])})
    with MetricsWriter(tmp_path, members=2, resume_step=5) as writer:
        writer.write(6, {"train/entropy": torch.tensor([5.0, 6.0])})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/entropy")] == [(5, 1.5), (6, 5.5)]
    assert [event.value for event in events.Scalars("train/entropy/member_1")] == [2.0, 6.0]
