"""Measuring beside other libraries, without any of them: installing, limits, Ctrl-C, and what counts as the same work."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import peers, throughput
from benchmarks.peers import HARDY, LIBRARIES, PEERS, Library, SkippedError, interpreter
from benchmarks.processes import CommandError, call, cause
from benchmarks.throughput import Work, check, compare, measure, parse, ratio, report

SPEEDS = st.lists(st.floats(1.0, 1e6), min_size=1, max_size=6)
ABSENT = Library("absent", "absent", "peer_absent", ("hardy-peer-that-does-not-exist==1.0",), "", constrained=False)
WORK = Work(num_envs=8, threads=1, iterations=3, seed=0)


def reported(library: Library, work: Work, speed: float = 100.0) -> dict[str, Any]:
    """What a worker that did the work reports."""
    return {
        "steps": work.num_envs * work.num_steps * work.iterations * work.population,
        "episodes": 40,
        "updates": 16 * work.iterations * work.population,
        "observation_size": 2,
        "weight_change": 0.5,
        "weights": 132_867,
        "steps_per_second": speed,
        "versions": {library.package: "1.2.3"},
    }


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., dict[str, Any]]], None]:
    """Puts a function in place of a worker's run; no library is installed."""

    def replace(function: Callable[..., dict[str, Any]]) -> None:
        monkeypatch.setattr(throughput, "measure", function)
        monkeypatch.setattr(throughput, "interpreter", lambda library, reinstall: Path(sys.executable))

    return replace


def left(pids: list[int]) -> list[int]:
    """Those of the processes that run on although they had time to end: a killed one is not gone at once."""
    until = time.monotonic() + 30
    while time.monotonic() < until and any(alive(pid) for pid in pids):
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------------------- ratios


@given(SPEEDS, SPEEDS)
def test_the_ratio_lies_where_the_speeds_allow_it(ours: list[float], theirs: list[float]) -> None:
    result = ratio(ours, theirs)
    assert min(ours) / max(theirs) <= result["lowest"] <= result["median"] <= result["highest"] <= max(ours) / min(theirs)


@given(SPEEDS, st.floats(0.01, 100.0))
def test_a_library_of_constant_advantage_has_that_ratio_in_every_pair(theirs: list[float], factor: float) -> None:
    result = ratio([factor * speed for speed in theirs], theirs)
    assert list(result.values()) == pytest.approx([factor] * 3)


def test_ratios_are_of_pairs() -> None:
    assert ratio([10.0, 30.0, 20.0], [10.0, 5.0, 2.0]) == {"median": 6.0, "lowest": 1.0, "highest": 10.0}


def test_a_repeat_that_only_one_library_finished_belongs_to_no_pair() -> None:
    assert ratio([10.0, 1000.0], [5.0])["highest"] == 2.0
    with pytest.raises(ValueError, match="no pair"):
        ratio([1.0], [])


# ----------------------------------------------------------------------------------------------------------------- work


def test_the_common_work_is_that_of_the_published_comparison() -> None:
    work = Work(num_envs=8, threads=2, iterations=5, seed=0)
    assert (work.num_steps, work.hidden, work.epochs, work.minibatches, work.quantiles) == (128, 128, 4, 4, 1)
    assert work.warmup >= 1 and work.population == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 2048, "steps 2048 instead of 3072"),
        ("updates", 24, "updates 24 instead of 48"),
        ("observation_size", 4, "observation_size 4 instead of 2"),
        ("weight_change", 0.0, "weights changed by 0.0"),
        ("weight_change", float("nan"), "weights changed by nan"),
    ],
)
def test_other_work_is_refused(name: str, value: float, message: str) -> None:
    result = reported(HARDY, WORK)
    check(result, WORK)
    with pytest.raises(SkippedError, match=message):
        check(result | {name: value}, WORK)


def test_hardys_worker_does_the_common_work() -> None:
    work = Work(num_envs=4, threads=1, iterations=1, seed=0, population=2)
    result = measure(HARDY, work, Path(sys.executable), limit=120)
    assert result["weights"] == 132_867
    assert result["updates"] == 32
    assert result["steps"] == 1024
    assert 0 < result["episodes"] <= 1024
    assert result["steps_per_second"] == pytest.approx(1024 / result["seconds"])


def test_a_library_without_populations_is_asked_for_one_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def worker(command: list[str], *_: Any) -> str:
        asked.append(json.loads(command[-1]))
        return "noise\n" + json.dumps(reported(PEERS[0], Work(**asked[-1])))

    monkeypatch.setattr(throughput, "call", worker)
    several = dataclasses.replace(WORK, population=8)
    for library in (LIBRARIES["sb3-contrib"], LIBRARIES["agilerl"]):
        measure(library, several, Path("python"), 1.0)
    assert [work["population"] for work in asked] == [1, 8]


def test_every_library_has_a_worker_a_pinned_version_and_remarks() -> None:
    constraints = (peers.ROOT / "constraints.txt").read_text()
    for library in LIBRARIES.values():
        assert (peers.ROOT / "benchmarks" / f"{library.module}.py").is_file()
        assert library.remarks
        assert all("==" in requirement for requirement in library.requirements if requirement != "torch")
        assert all(
            "==" in needed or (library.constrained and f"\n{needed}==" in constraints) for needed in library.dependencies
        )
    assert list(LIBRARIES)[:3] == ["hardy", "hardy-pure", "sb3-contrib"]


def test_hardy_is_measured_without_its_compiled_libraries_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str | None] = []

    def worker(command: list[str], limit: float, folder: Path, environment: dict[str, str]) -> str:
        given.append(environment.get("HARDY_COMPILED"))
        return json.dumps(reported(HARDY, Work(**json.loads(command[-1]))))

    monkeypatch.setattr(throughput, "call", worker)
    for name in ("hardy", "hardy-pure"):
        measure(LIBRARIES[name], WORK, Path("python"), 1.0)
    assert given == [None, "0"]


# -------------------------------------------------------------------------------------------------------------- compare


def test_libraries_take_turns_and_each_repeat_has_a_seed_of_its_own(measured: Callable[..., None]) -> None:
    order: list[tuple[str, int]] = []

    def worker(library: Library, work: Work, *_: Any) -> dict[str, Any]:
        order.append((library.name, work.seed))
        return reported(library, work, speed={"hardy": 600.0, "hardy-pure": 300.0, "rllib": 100.0}[library.name] + work.seed)

    measured(worker)
    names = ["hardy", "hardy-pure", "rllib"]
    result = compare(8, repeats=2, steps=4096, libraries=names, progress=lambda line: None)
    assert order == [(name, seed) for seed in (0, 1) for name in names]
    assert result["work"]["iterations"] == 4
    assert result["libraries"]["rllib"]["steps_per_second"] == [100.0, 101.0]
    assert result["ratios"] == {
        "hardy": {"rllib": ratio([600.0, 601.0], [100.0, 101.0])},
        "hardy-pure": {"rllib": ratio([300.0, 301.0], [100.0, 101.0])},
    }
    assert json.loads(json.dumps(result)) == result
    assert "hardy: 5.98 times (5.95 to 6.00)   hardy-pure: 2.99 times (2.98 to 3.00)" in report(result)


def test_a_library_that_fails_is_left_out_from_there_on(measured: Callable[..., None]) -> None:
    def worker(library: Library, work: Work, *_: Any) -> dict[str, Any]:
        if library.name == "rllib" and work.seed == 1:
            raise SkippedError("no result within 3 s")
        return reported(library, work)

    measured(worker)
    result = compare(8, repeats=3, libraries=["hardy", "rllib", "agilerl"], progress=lambda line: None)
    assert result["skipped"] == {"rllib": "no result within 3 s"}
    assert [len(result["libraries"][name]["steps_per_second"]) for name in ("hardy", "rllib", "agilerl")] == [3, 1, 3]
    assert "left out: no result within 3 s" in report(result)


def test_ctrl_c_keeps_what_is_done(measured: Callable[..., None]) -> None:
    def worker(library: Library, work: Work, *_: Any) -> dict[str, Any]:
        if (library.name, work.seed) == ("rllib", 1):
            raise KeyboardInterrupt
        return reported(library, work)

    measured(worker)
    result = compare(8, repeats=3, libraries=["hardy", "rllib"], progress=lambda line: None)
    assert result["interrupted"]
    assert [len(row["steps_per_second"]) for row in result["libraries"].values()] == [2, 1]
    assert result["ratios"]["hardy"]["rllib"]["median"] == 1.0
    assert "interrupted" in report(result)


# ----------------------------------------------------------------------------------------------------------- installing


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of environments of the test's own, in which nothing but folders is made."""
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path / "environments")
    monkeypatch.setattr(peers, "_failed", {})

    def create(folder: Path, **_: Any) -> None:
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").unlink(missing_ok=True)
        (folder / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(peers.venv, "create", create)
    return tmp_path / "environments"


def test_a_library_that_cannot_be_installed_is_skipped_and_not_tried_again(
    environments: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for reinstall, installs in ((False, 1), (False, 0), (True, 1)):
        with pytest.raises(SkippedError, match=r"^not installed: .*hardy-peer-that-does-not-exist") as caught:
            interpreter(ABSENT, reinstall, ("--no-index",))
        assert "\n" not in str(caught.value)
        assert capsys.readouterr().out.count("installing hardy-peer-that-does-not-exist==1.0") == installs


def test_an_installation_is_kept_until_its_requirements_change(environments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(peers, "call", lambda command, *_: commands.append(command))
    assert interpreter(ABSENT) == interpreter(ABSENT) == environments / "absent" / "bin" / "python"
    assert len(commands) == 1
    interpreter(dataclasses.replace(ABSENT, requirements=("other==2.0",)))
    assert [command[-1] for command in commands] == ["hardy-peer-that-does-not-exist==1.0", "other==2.0"]
    constraints = (environments / "absent" / "constraints.txt").read_text()
    assert constraints.startswith("torch==") and constraints.count("==") == 1


def test_a_library_can_come_without_what_it_asks_for(environments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[tuple[list[str], Any]] = []
    monkeypatch.setattr(peers, "call", lambda command, limit, folder, given=None: installed.append((command, given)))
    library = dataclasses.replace(ABSENT, dependencies=("torch", "b==2"), pip_options=("--no-deps",), environment={"MINE": "7"})
    for version in ("2", "2", "3"):
        interpreter(dataclasses.replace(library, dependencies=("torch", f"b=={version}")))
    (first, given), (second, built), (third, _), _ = installed
    assert first[-2:] == ["torch", "b==2"] and "--no-deps" not in first and not given
    assert second[-2:] == ["--no-deps", ABSENT.requirements[0]] and built == {"MINE": "7"}
    assert third[-1] == "b==3"


def test_an_interrupted_installation_is_done_again(environments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "call", interrupt)
    with pytest.raises(KeyboardInterrupt):
        interpreter(ABSENT)
    assert not (environments / "absent" / "installed.json").exists()


def test_hardy_runs_in_the_environment_of_the_caller() -> None:
    assert interpreter(HARDY) == Path(sys.executable)


# ------------------------------------------------------------------------------------------------------------ processes

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def running(file: Path) -> list[int]:
    """The processes of `PARENT`, once both run."""
    for _ in range(600):
        if file.is_file() and len(file.read_text().split()) == 2:
            return [int(word) for word in file.read_text().split()]
        time.sleep(0.05)
    raise AssertionError("the command did not start")


def test_a_command_over_its_limit_leaves_nothing_running(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="not done within 5 s"):
        call([sys.executable, "-S", "-c", PARENT, str(tmp_path / "pids")], 5, tmp_path)
    assert left(running(tmp_path / "pids")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_a_command_and_all_it_started(tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import signal, sys; from pathlib import Path; from benchmarks.processes import call; "
        "[signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)]; "
        "call([sys.executable, '-S', '-c', sys.argv[1], sys.argv[2]], 600, Path('.'))"
    )
    command = [sys.executable, "-c", program, PARENT, str(tmp_path / "pids")]
    outer = subprocess.Popen(command, cwd=peers.ROOT, stderr=subprocess.PIPE, text=True)
    inner = running(tmp_path / "pids")
    assert all(alive(pid) for pid in inner)
    os.kill(outer.pid, number)
    _, complaints = outer.communicate(timeout=60)
    assert "KeyboardInterrupt" in complaints
    assert left(inner) == []


def test_a_failed_command_says_why_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"^ValueError: too small$"):
        call([sys.executable, "-c", "print('x'); raise ValueError('too small')"], 60, tmp_path)
    assert call([sys.executable, "-c", "import os; print(os.environ['MINE'])"], 60, tmp_path, {"MINE": "7"}) == "7\n"


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("a\nERROR: no network\nnote: see above", "ERROR: no network"),
        (
            "urllib.error.URLError: <urlopen error>\nerror: subprocess-exited-with-error\nx",
            "urllib.error.URLError: <urlopen error>",
        ),
        ("only\nthis", "this"),
        ("", ""),
    ],
)
def test_the_cause_is_the_line_that_says_most(output: str, line: str) -> None:
    assert cause(output) == line


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command_line_has_a_default_for_everything() -> None:
    given_nothing = parse([])
    assert (given_nothing.envs, given_nothing.threads, given_nothing.repeats, given_nothing.population) == ([8, 64], 2, 5, 1)
    assert given_nothing.only is None and not given_nothing.reinstall
    chosen = parse(["--only", "hardy", "agilerl", "--envs", "8", "--population", "8", "--limit", "60", "--reinstall"])
    assert (chosen.only, chosen.envs, chosen.population, chosen.limit, chosen.reinstall) == (
        ["hardy", "agilerl"],
        [8],
        8,
        60,
        True,
    )


@pytest.mark.parametrize("arguments", [["--only", "hardi"], ["--envs", "0"], ["--repeats", "two"], ["--limit", "-1"]])
def test_a_wrong_argument_is_refused_by_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    message = capsys.readouterr().err
    assert arguments[0] in message and arguments[1] in message
