"""The profile of a run: whose time a phase counts, what the table and the trace hold, and that results do not change."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import assert_same
from test_run import LINES, make_settings, train

from hardy import profiling
from hardy.checkpoint import load_tensors
from hardy.profiling import PHASES, REST, TRACED, WARM_UP, Profile, phase, timed

FIRST_COUNTED = WARM_UP + TRACED


class Hands:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    monkeypatch.setattr(time, "perf_counter", hands)
    return hands


def numbers(lines: list[str]) -> dict[str, tuple[float, str]]:
    """Milliseconds and share by phase."""
    split = [line.rsplit(maxsplit=2) for line in lines[1:] if line.endswith("%")]
    return {name: (float(milliseconds), share) for name, milliseconds, share in split}


def test_a_phase_does_not_count_the_phases_inside_it(tmp_path: Path, hands: Hands) -> None:
    with Profile(tmp_path / "trace.json", "cpu") as profile:
        for _ in range(FIRST_COUNTED + 2):
            with profile.iteration():
                hands.now += 0.001
                with phase("loss"):
                    hands.now += 0.002
                    with phase("forward"):
                        hands.now += 0.005
                    hands.now += 0.002
            hands.now += 100  # between two iterations
    lines = profile.table()
    assert lines[0].startswith("mean of 2 iterations ")
    assert numbers(lines) == {
        "forward": (5.0, "50.0%"), "loss": (4.0, "40.0%"), REST: (1.0, "10.0%"), "in all": (10.0, "100.0%")
    }  # fmt: skip


def test_the_table_leaves_out_warm_up_and_trace(tmp_path: Path, hands: Hands) -> None:
    with Profile(tmp_path / "trace.json", "cpu") as profile:
        for index in range(FIRST_COUNTED + 3):
            with profile.iteration(), phase("loss"):
                hands.now += 1000 if index < FIRST_COUNTED else 0.001 * (index - FIRST_COUNTED)
    assert numbers(profile.table())["loss"] == (1.0, "100.0%")


def test_a_trace_of_an_earlier_run_is_not_told_of(tmp_path: Path, hands: Hands) -> None:
    (tmp_path / "trace.json").write_text("{}")
    with Profile(tmp_path / "trace.json", "cpu") as profile, profile.iteration():
        hands.now += 0.001
    assert not any("trace" in line for line in profile.table())


def test_a_phase_ends_with_an_exception(tmp_path: Path, hands: Hands) -> None:
    def fail() -> None:
        with phase("loss"):
            raise RuntimeError

    with Profile(tmp_path / "trace.json", "cpu") as profile:
        for _ in range(FIRST_COUNTED + 1):
            with profile.iteration():
                with pytest.raises(RuntimeError):
                    fail()
                hands.now += 0.001
    assert numbers(profile.table())[REST] == (1.0, "100.0%")


def test_without_a_profile_a_timed_function_is_the_function_itself(tmp_path: Path) -> None:
    assert timed("loss", fact := len) is fact
    with Profile(tmp_path / "trace.json", "cpu"):
        assert timed("loss", len) is not len
        assert timed("loss", len)("four") == 4
    assert timed("loss", len) is len


def test_a_phase_that_is_not_in_the_table_is_an_error(tmp_path: Path) -> None:
    with Profile(tmp_path / "trace.json", "cpu"), pytest.raises(KeyError, match="lunch"), phase("lunch"):
        pass


SECTIONS: dict[str, Any] = {
    "population": {"size": 2},
    "pbt": {"interval": 32, "episodes": 2},
    "adversary": {"epsilon": 0.1},
    "vgs": {"estimator": "microbatch", "microbatches": 2},
}


def test_a_profiled_run_ends_with_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    plain = train(make_settings(tmp_path / "plain", 6, **SECTIONS))
    assert not (plain.folder / "trace.json").exists()
    assert not any("share" in line for line in LINES)
    profiled = train(make_settings(tmp_path / "profiled", 6, profile=True, **SECTIONS))
    one, other = (load_tensors(sorted((run.folder / "checkpoints").iterdir())[-1])[0] for run in (plain, profiled))
    assert_same(other, one)


def test_a_profiled_run_tells_where_its_time_went(tmp_path: Path) -> None:
    folder = train(make_settings(tmp_path, FIRST_COUNTED + 2, profile=True, **SECTIONS)).folder
    found = numbers(LINES)
    assert set(found) == {*PHASES, "in all"} - {"device step", "captured minibatch"}
    assert found["in all"][0] == pytest.approx(sum(found[name][0] for name in PHASES if name in found), abs=0.1)
    assert any(line.startswith(f"trace of {TRACED} iterations: {folder / 'trace.json'};") for line in LINES)
    trace = json.loads((folder / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("checkpoint") == TRACED
    assert names.count("environment step") == TRACED * 8
    assert {"forward", "backward", "optimizer"} <= set(names)


def test_a_run_too_short_for_a_table_says_so(tmp_path: Path) -> None:
    train(make_settings(tmp_path, WARM_UP + 1, profile=True))
    assert f"profile: no table after {WARM_UP + 1} iterations; {FIRST_COUNTED + 1} are the least" in "\n".join(LINES)
    trace = tmp_path / "job-seed0" / "trace.json"
    assert any(line.startswith(f"trace of 1 iteration: {trace};") for line in LINES)
    assert trace.exists()
    assert profiling.phase("loss") is profiling.phase("forward")  # nothing is measured any more
