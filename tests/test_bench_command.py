"""``hardy bench`` as its user sees it: files, output, errors, interrupts."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from rich.console import Console
from test_cli import Hardy

from benchmarks.processes import descendants
from hardy.bench import command, work
from hardy.bench.options import SECTIONS, Options
from hardy.bench.results import Part, load, measurement, ratio, save
from hardy.bench.timing import Say
from hardy.bench.worker import SectionTask

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hardy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hardy:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    return Hardy(tmp_path, monkeypatch, capsys)


def part(name: str, above: float = 2.0) -> Part:
    return Part(
        measurements=(measurement(name, "a", "ms", [above]),), ratios=(ratio(f"{name}: a over b", "higher", [above], [1.0]),)
    )


def pretend(monkeypatch: pytest.MonkeyPatch, *found: Part | BaseException) -> list[tuple[str, Options]]:
    """Let every section find this, without a process; what is raised ends it."""
    asked: list[tuple[str, Options]] = []

    def parts(name: str, options: Options, say: Say) -> Iterator[Part]:
        asked.append((name, options))
        for one in found:
            if isinstance(one, BaseException):
                raise one
            say("so far")
            yield one

    monkeypatch.setattr(command, "_parts", parts)
    return asked


# ----------------------------------------------------------------------------------------------------------- what it does


def test_plain_prints_the_speed_as_its_last_line(hardy: Hardy) -> None:
    sizes = ("--envs", "4", "--population", "2", "--threads", "1", "--seconds", "0.01")
    code, out, err = hardy("bench", "throughput", *sizes, "--plain")
    assert code == 0
    lines = out.splitlines()
    assert re.fullmatch(r"[1-9]\d*", lines[-1])
    assert lines[0].startswith("132867 weights")
    assert err == "training: N = 4, P = 2, 1 thread, 0.01 seconds or more\n"
    assert not (hardy.folder / "artifacts").exists()


def test_throughput_and_memory_are_measured_in_fresh_processes(hardy: Hardy) -> None:
    sizes = ("--envs", "4", "--population", "1", "--threads", "1", "--repeats", "1")
    code, out, err = hardy("bench", "throughput", *sizes, "--seconds", "0.01", "--out", "speed")
    assert code == 0, err
    (section,) = load(Path("speed/bench.json")).sections
    assert (section.name, section.complete, len(section.measurements), len(section.ratios)) == ("throughput", True, 2, 1)
    assert section.others is None or 0 <= section.others <= 1
    assert "results: speed" in out
    assert "throughput: N = 4, P = 1, 1 thread: repeat 1 of 1" in err
    assert {path.name for path in Path("speed").iterdir()} == {"bench.json", "bench.md", "throughput.png"}
    code, _, err = hardy("bench", "memory", *sizes, "--out", "memory")
    assert code == 0, err
    (section,) = load(Path("memory/bench.json")).sections
    imports, training = (found.median for found in section.measurements)
    assert training > imports > 10


def test_a_section_prints_its_tables_and_saves_them(hardy: Hardy) -> None:
    code, out, err = hardy("bench", "environments", "--envs", "2", "--seconds", "0.001", "--repeats", "2")
    assert code == 0, err
    (folder,) = Path("artifacts").iterdir()
    assert re.fullmatch(r"bench-\d{8}-\d{6}", folder.name)
    assert "| CartPole-v1, N = 2, Hardy" in out
    assert "Hardy over gymnasium SyncVectorEnv; Pendulum-v1, N = 2" in (folder / "bench.md").read_text()
    result = load(folder / "bench.json")
    assert all(len(found.repeats) == 2 for found in result.sections[0].measurements)
    assert result.machine.processor in out


def test_without_a_section_all_are_measured(hardy: Hardy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, part("one"), part("two"))
    code, out, _ = hardy("bench", "--threads", "2", "--envs", "8", "--envs", "16", "--out", "here")
    assert code == 0
    assert asked == [(name, Options(threads=2, envs=(8, 16))) for name in SECTIONS]
    result = load(Path("here/bench.json"))
    assert [(section.name, section.complete) for section in result.sections] == [(name, True) for name in SECTIONS]
    assert [len(section.measurements) for section in result.sections] == [2] * len(SECTIONS)
    assert [line for line in out.splitlines() if line.startswith("## ")] == [f"## {name}" for name in SECTIONS]


def test_the_help_is_quick_and_names_every_section_and_option(hardy: Hardy) -> None:
    out = hardy("bench", "--help").out
    for name in (*SECTIONS, "--envs", "--population", "--threads", "--seconds", "--repeats", "--plain", "--out", "--compare"):
        assert name in out
    script = "import hardy.cli, sys; sys.exit(any(name.startswith('hardy.bench') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_in_a_terminal_the_results_stay_on_the_standard_output(
    hardy: Hardy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(command, "Console", lambda **_: Console(file=terminal, force_terminal=True, width=80))
    pretend(monkeypatch, part("one"))
    code, out, err = hardy("bench", "optimizer", "--out", "here")
    assert (code, err) == (0, "")
    assert "one: a over b" in out and "so far" not in out
    assert "optimizer: so far" in terminal.getvalue()
    assert "one: a over b" not in terminal.getvalue()


def test_the_document_names_every_section_and_where_an_option_has_an_effect() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE) == list(SECTIONS)
    rows = dict(re.findall(r"^\| `--(\w+)[^|]*\|.*\| ([^|]*) \|$", text, flags=re.MULTILINE))
    for option in ("envs", "population", "threads", "seconds", "repeats"):
        named = re.findall(r"`(\w+)`", rows[option])
        documented = set(SECTIONS) - set(named) if rows[option].startswith("all") else set(named)
        assert documented == {name for name, options in SECTIONS.items() if option in options}, option


# ------------------------------------------------------------------------------------------------------------- comparison


def test_a_regression_is_reported_and_ends_with_status_1(hardy: Hardy, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, part("one", 2.0))
    assert hardy("bench", "optimizer", "--out", "old").code == 0
    pretend(monkeypatch, part("one", 1.9))
    code, out, _ = hardy("bench", "optimizer", "--out", "same", "--compare", "old/bench.json")
    assert (code, out.splitlines()[-1]) == (0, "No ratio of 1 got worse by more than 10%.")
    pretend(monkeypatch, part("one", 1.0))
    code, out, _ = hardy("bench", "optimizer", "--out", "new", "--compare", "old/bench.json")
    assert (code, out.splitlines()[-1]) == (1, "1 of 1 ratios got worse by more than 10%.")
    assert load(Path("new/bench.json")).sections


def test_two_saved_results_are_compared_without_measuring(hardy: Hardy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, speed in (("old", 2.0), ("new", 1.0)):
        pretend(monkeypatch, part("one", speed))
        hardy("bench", "optimizer", "--out", name)
    pretend(monkeypatch, AssertionError("nothing is measured"))
    code, out, err = hardy("bench", "--compare", "old/bench.json", "--new", "new/bench.json")
    assert (code, err) == (1, "")
    assert "0.500" in out and "REGRESSION" in out
    assert hardy("bench", "--compare", "new/bench.json", "--new", "old/bench.json").code == 0


def test_a_result_of_other_sections_is_refused_before_anything_is_measured(
    hardy: Hardy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, part("one"))
    hardy("bench", "optimizer", "--out", "old")
    asked = pretend(monkeypatch, part("one"))
    hardy.refuses("bench", "memory", "--compare", "old/bench.json", words=["--compare", "holds optimizer, and not memory"])
    assert asked == []
    assert hardy("bench", "--compare", "old/bench.json").code == 0  # all sections: one of them is in both


def test_results_without_a_common_ratio_are_refused(hardy: Hardy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        pretend(monkeypatch, part(name))
        hardy("bench", "optimizer", "--out", name)
    hardy.refuses("bench", "--compare", "one/bench.json", "--new", "two/bench.json", words=["have no ratio in common"])


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimzer"], ["SECTION optimzer", "did you mean 'optimizer'?"]),
        (["optimizer", "--envs", "8"], ["--envs: has no effect on optimizer, whose options are --threads"]),
        (["environments", "--threads", "2"], ["--threads: has no effect on environments"]),
        (["optimizer", "--repeats", "0"], ["--repeats = 0: must be a whole number >= 1"]),
        (["optimizer", "--seconds", "nan"], ["--seconds = NaN: must be a finite number"]),
        (["throughput", "--envs", "2"], ["--envs 2: must be at least 4"]),
        (["--compare", "nowhere.json"], ["nowhere.json: no such file"]),
        (["--compare", "tiny.yaml"], ["tiny.yaml: is no JSON"]),
        (["--new", "a.json"], ["--new: needs --compare"]),
        (["optimizer", "--new", "a", "--compare", "b"], ["SECTION optimizer: has no effect with --new"]),
        (["--new", "a", "--compare", "b", "--plain", "--out", "c"], ["--plain: has no effect", "--out: has no effect"]),
        (["--plain"], ["--plain: has no effect on all; it belongs to throughput"]),
        (["throughput", "--plain", "--repeats", "3"], ["--repeats: has no effect with --plain, which measures once"]),
        (["throughput", "--plain", "--out", "x"], ["--out: has no effect with --plain, which saves nothing"]),
        (["throughput", "--plain", "--envs", "8", "--envs", "9"], ["--envs 8, 9: only one with --plain"]),
        (["optimizer", "--out", "tiny.yaml"], ["--out tiny.yaml: cannot be written to"]),
    ],
)
def test_mistakes_are_refused(hardy: Hardy, arguments: list[str], words: list[str]) -> None:
    hardy.refuses("bench", *arguments, words=words)


def test_a_comparison_is_refused_with_plain(hardy: Hardy, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, part("one"))
    hardy("bench", "optimizer", "--out", "old")
    words = ["--compare: has no effect with --plain, which measures no ratio"]
    hardy.refuses("bench", "throughput", "--plain", "--compare", "old/bench.json", words=words)


def test_a_section_that_fails_says_why_and_keeps_what_was_found(hardy: Hardy, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('{\"say\": \"soon\"}'); sys.exit('no luck')"
    monkeypatch.setattr(command, "command", lambda task, settings: [sys.executable, "-c", script])
    code, _, err = hardy("bench", "optimizer", "--out", "here")
    assert code == 1
    assert "error: measuring optimizer failed with status 1:\nno luck" in err
    assert "optimizer: soon" in err
    pretend(monkeypatch, part("one"), command.BenchError("broken"))
    assert hardy("bench", "optimizer", "--out", "here").code == 1
    assert len(load(Path("here/bench.json")).sections[0].measurements) == 1


# -------------------------------------------------------------------------------------------------------------- interrupt


def test_ctrl_c_saves_what_was_measured(hardy: Hardy, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, part("one"))
    hardy("bench", "optimizer", "--out", "old")
    pretend(monkeypatch, part("one"), part("two"), KeyboardInterrupt())
    code, out, _ = hardy("bench", "optimizer", "--out", "here", "--compare", "old/bench.json")
    assert code == 130
    assert "interrupted; what was measured before is saved" in out
    (section,) = load(Path("here/bench.json")).sections
    assert (section.complete, [found.group for found in section.measurements]) == (False, ["one", "two"])
    assert "## optimizer (interrupted)" in Path("here/bench.md").read_text()


def test_ctrl_c_before_the_first_figure_says_so(hardy: Hardy, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, KeyboardInterrupt())
    code, out, _ = hardy("bench", "optimizer", "--out", "here")
    assert (code, list(Path("here").iterdir())) == (130, [])
    assert "nothing was measured" in out


def test_ctrl_c_ends_the_section_s_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(command.subprocess, "Popen", Watched)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(command._parts("environments", Options(seconds=600.0), interrupt))
    assert [process.returncode for process in started] == [130]


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), subprocess.TimeoutExpired("section", 1.0)])
def test_a_second_ctrl_c_ends_the_section_s_process_by_force_and_so_does_time(reason: BaseException) -> None:
    process = create_autospec(subprocess.Popen, instance=True)
    process.wait.side_effect = reason
    command._stop(process)
    process.terminate.assert_called_once_with()
    process.kill.assert_called_once_with()


def wait_for(found: Callable[[], object]) -> None:
    for _ in range(1200):
        if found():
            return
        time.sleep(0.05)
    raise AssertionError("it did not begin")


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_sigterm_ends_the_command_as_ctrl_c_does_and_with_it_what_it_started(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"}
    line = [
        sys.executable,
        "-c",
        "from hardy.cli import main; main()",
        "bench",
        "optimizer",
        "--seconds",
        "600",
        "--out",
        "here",
    ]
    with (
        open(tmp_path / "err", "w+") as err,
        subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=err, text=True) as process,
    ):
        wait_for(lambda: (tmp_path / "err").read_text().count("optimizer") > 1)  # its process speaks
        started = descendants(process.pid)
        process.terminate()
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith("nothing was measured\ninterrupted\n")
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert started and not any(is_running(pid) for pid in started)


def test_sigterm_ends_a_section_and_the_training_that_it_started() -> None:
    task = work.command("section", SectionTask(name="memory", options=Options(envs=(512,), population=(8,))))
    with subprocess.Popen(task, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: descendants(process.pid))
        started = descendants(process.pid)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert not any(is_running(pid) for pid in started)


# -------------------------------------------------------------------------------------------------------------- make bench


def make_bench(folder: Path, interrupted_at: int | None = None, missing: str = "missing") -> subprocess.CompletedProcess[str]:
    """``python -m benchmarks`` where neither sections nor libraries are run; one of the sizes may be interrupted.

    Args:
        missing: a library that could not be measured.
    """
    script = f"""
import pathlib
from unittest.mock import create_autospec
from benchmarks import __main__ as bench, throughput
from hardy.bench.machine import describe
from hardy.bench.results import Result
throughput.RESULTS = pathlib.Path({str(folder)!r})
bench.measure = lambda section, given, folder, show, say: (Result(date=section, machine=describe()), folder, False)
sizes = []
def library(name, *speeds):
    return {{"version": "1", "weights": 1, "remarks": "", "steps_per_second": speeds, "median": 3, "lowest": 2, "highest": 4}}
def compare(num_envs, *, population, progress, threads=2):
    sizes.append((num_envs, population))
    progress("a line")
    return {{
        "work": {{"num_envs": num_envs, "population": population, "threads": threads}},
        "libraries": {{
            "hardy": library("hardy", 2.0, 3.0, 4.0),
            "hardy-pure": library("hardy-pure", 1.5, 2.5, 3.5),
            "slow": library("slow", 1.0, 1.0),
        }},
        "ratios": {{}},
        "skipped": {{{missing!r}: "why"}},
        "interrupted": len(sizes) == {interrupted_at},
    }}
throughput.compare = create_autospec(throughput.compare, side_effect=compare)
bench.main()
"""
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True)


def test_make_bench_saves_the_sections_and_the_peers(tmp_path: Path) -> None:
    ran = make_bench(tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = load(tmp_path / "bench.json")
    assert found.date == "all"
    assert found.peers is not None
    assert [row["work"] for row in found.peers["rows"]] == [
        {"num_envs": envs, "population": members, "threads": 2} for envs, members in ((8, 1), (64, 1), (8, 8))
    ]
    assert ran.stdout.count("missing         left out: why") == 3
    (section,) = found.sections
    assert (section.name, section.complete, len(section.measurements)) == ("peers", True, 9)
    assert [one.name for one in section.ratios][4:] == [
        "hardy over slow; N = 8, P = 8, 2 threads",
        "hardy-pure over slow; N = 8, P = 8, 2 threads",
    ]
    assert section.ratios[0].repeats == (2.0, 3.0)
    assert "hardy over slow; N = 64, P = 1, 2 threads" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "peers.png").exists()
    assert save(found, tmp_path / "again").read_text() == (tmp_path / "bench.json").read_text()


def test_make_bench_fails_without_the_library_that_hardy_is_measured_by(tmp_path: Path) -> None:
    ran = make_bench(tmp_path, missing="sb3-contrib")
    assert ran.returncode == 1
    assert "sb3-contrib, which Hardy is measured by, was not measured: why" in " ".join(ran.stderr.split())
    assert (tmp_path / "bench.json").exists()


def test_an_interrupted_make_bench_keeps_the_peers_it_has(tmp_path: Path) -> None:
    ran = make_bench(tmp_path, interrupted_at=2)
    assert ran.returncode == 130, ran.stderr
    (section,) = load(tmp_path / "bench.json").sections
    assert (section.complete, len(section.ratios)) == (False, 4)
