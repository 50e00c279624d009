"""Results of ``hardy bench``: what a file may hold, how two are compared, and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hardy.bench.compare import TOLERANCE, Change, compare
from hardy.bench.report import comparison_lines, picture, section_lines, table, write
from hardy.bench.results import (
    Machine,
    Measurement,
    Ratio,
    Result,
    SectionResult,
    count_threads,
    load,
    measurement,
    ratio,
    save,
)
from hardy.config import ConfigError

POSITIVE = st.floats(1e-3, 1e3)
MACHINE = Machine(processor="one", cores=2, memory_mib=100, system="any", compiled=True, versions={"hardy": "1"})


def ratio_of(name: str, median: float, better: Any = "higher") -> Ratio:
    return ratio(name, better, [median], [1.0])


def result_of(*ratios: Ratio, machine: Machine = MACHINE, section: str = "recurrence", **fields: Any) -> Result:
    measured = (measurement("group", "label", "ms", [1.0, 3.0, 2.0]),)
    found = SectionResult(name=section, complete=True, measurements=measured, ratios=ratios, **fields)
    return Result(date="2026-01-02T03:04:05+00:00", machine=machine, sections=(found,))


# ------------------------------------------------------------------------------------------------------------------ files


def test_median_and_spread_are_those_of_the_repeats() -> None:
    found = measurement("N = 8", "P = 2", "steps/s", [5.0, 1.0, 3.0, 9.0], x=2)
    assert (found.name, found.median, found.low, found.high, found.x) == ("N = 8, P = 2", 4.0, 1.0, 9.0, 2.0)


def test_a_ratio_is_taken_turn_by_turn() -> None:
    # A machine half as fast in the second turn and a third as fast in the last slows both alike.
    found = ratio("a over b", "higher", [6.0, 3.0, 2.0], [3.0, 1.5, 1.0])
    assert found.repeats == (2.0, 2.0, 2.0)
    assert ratio("a over b", "higher", [1.0, 9.0, 2.0], [1.0, 3.0, 1.0]).median == 2.0


def test_threads_are_counted_in_words() -> None:
    assert (count_threads(1), count_threads(2)) == ("1 thread", "2 threads")


def test_a_saved_result_loads_back(tmp_path: Path) -> None:
    result = result_of(ratio_of("a", 0.5), others=0.25).model_copy(update={"peers": {"rows": [{"speed": 3.5}]}})
    path = save(result, tmp_path / "new")
    assert path == tmp_path / "new" / "bench.json"
    assert load(path) == result


def test_a_file_whose_summary_is_not_that_of_its_repeats_is_refused(tmp_path: Path) -> None:
    path = save(result_of(ratio_of("a", 0.5)), tmp_path)
    document = json.loads(path.read_text())
    document["sections"][0]["measurements"][0]["median"] = 7.0
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"bench\.json: .*median, low and high are not those of its repeats"):
        load(path)


@pytest.mark.parametrize("number", [0.0, -1.0, float("inf"), float("nan")])
def test_a_ratio_by_which_nothing_can_be_divided_is_refused(tmp_path: Path, number: float) -> None:
    document = result_of(ratio_of("a", 2.0)).model_dump(mode="json")
    found = document["sections"][0]["ratios"][0]
    found |= {"repeats": [number], "median": number, "low": number, "high": number}
    (tmp_path / "bench.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"bench\.json: sections\.0\.ratios\.0\.median"):
        load(tmp_path / "bench.json")


def test_a_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="ratios: a name stands twice"):
        result_of(ratio_of("a", 1.0), ratio_of("a", 2.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no result of hardy bench"),
        ("{}", "is no result of hardy bench"),
        ('{"sections": []}', "date is missing"),
        ('{"sections": [], "format": 2}', "format = 2"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as refused:
        load(path)
    assert all(problem.startswith(str(path)) for problem in refused.value.problems)


def test_a_file_that_is_not_there_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    save(result_of(), tmp_path)
    with pytest.raises(ConfigError, match=r"benhc\.json: no such file \(did you mean 'bench\.json'\?\)"):
        load(tmp_path / "benhc.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------------------- comparison


@given(old=POSITIVE, new=POSITIVE, better=st.sampled_from(["higher", "lower"]))
def test_a_regression_is_a_change_for_the_worse_by_more_than_the_tolerance(old: float, new: float, better: str) -> None:
    bound = old * (1 - TOLERANCE) if better == "higher" else old * (1 + TOLERANCE)
    assume(abs(new - bound) > 1e-6 * bound)
    comparison = compare(result_of(ratio_of("a", old, better)), result_of(ratio_of("a", new, better)))
    assert [change.new.name for change in comparison.regressions] == (
        ["a"] if (new < bound if better == "higher" else new > bound) else []
    )


@given(old=POSITIVE, new=POSITIVE)
def test_what_is_worse_one_way_is_better_the_other(old: float, new: float) -> None:
    up, down = (Change("s", ratio_of("a", old, better), ratio_of("a", new, better)) for better in ("higher", "lower"))
    assert up.worse_by == -down.worse_by
    assert up.factor == pytest.approx(new / old)


@pytest.mark.parametrize(("better", "edge"), [("higher", 0.9), ("lower", 1.1)])
def test_exactly_ten_per_cent_is_no_regression(better: str, edge: float) -> None:
    old = result_of(ratio_of("a", 1.0, better))
    assert not compare(old, result_of(ratio_of("a", edge, better))).regressions
    worse = edge - 0.001 if better == "higher" else edge + 0.001
    assert compare(old, result_of(ratio_of("a", worse, better))).regressions


@given(medians=st.lists(POSITIVE, min_size=1, max_size=5))
def test_a_result_equals_itself(medians: list[float]) -> None:
    result = result_of(*(ratio_of(str(index), median) for index, median in enumerate(medians)))
    comparison = compare(result, result)
    assert [change.factor for change in comparison.changes] == [1.0] * len(medians)
    assert not comparison.regressions and not comparison.missing and not comparison.machines_differ


def test_absolute_speeds_do_not_decide() -> None:
    old, new = result_of(ratio_of("a", 2.0)), result_of(ratio_of("a", 2.0))
    slower = measurement("group", "label", "ms", [100.0])
    new = new.model_copy(update={"sections": (new.sections[0].model_copy(update={"measurements": (slower,)}),)})
    assert not compare(old, new).regressions


def test_only_ratios_of_the_same_section_name_and_direction_are_compared() -> None:
    old = result_of(ratio_of("a", 1.0), ratio_of("gone", 1.0), ratio_of("turned", 1.0))
    new = result_of(ratio_of("turned", 9.0, "lower"), ratio_of("a", 1.0), ratio_of("added", 1.0))
    comparison = compare(old, new)
    assert [change.new.name for change in comparison.changes] == ["a"]
    assert comparison.missing == ("recurrence: added", "recurrence: gone", "recurrence: turned")
    with pytest.raises(ConfigError, match="no ratio in common"):
        compare(old, result_of(ratio_of("a", 1.0), section="optimizer"))


def test_other_machines_are_told() -> None:
    other = MACHINE.model_copy(update={"cores": 4})
    comparison = compare(result_of(ratio_of("a", 1.0)), result_of(ratio_of("a", 1.0), machine=other))
    assert comparison.machines_differ
    assert any("different machines" in line for line in comparison_lines(comparison))


def test_a_result_without_the_compiled_library_is_told() -> None:
    pure = MACHINE.model_copy(update={"compiled": False})
    lines = comparison_lines(compare(result_of(ratio_of("a", 1.0)), result_of(ratio_of("a", 1.0), machine=pure)))
    assert "Only one of the results was measured with Hardy's compiled library." in lines
    assert not any("different machines" in line for line in lines)


def test_a_comparison_shows_old_new_and_what_got_worse() -> None:
    old = result_of(ratio_of("a", 2.0), ratio_of("b", 1.0, "lower"), ratio_of("c", 1.0))
    lines = comparison_lines(compare(old, result_of(ratio_of("a", 1.0), ratio_of("b", 0.5, "lower"))))
    (row,) = [line for line in lines if "recurrence: a" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "recurrence: a", "2.000", "1.000", "0.500", "higher", "REGRESSION",
    ]  # fmt: skip
    assert sum("REGRESSION" in line for line in lines) == 1
    assert lines[-1] == "1 of 2 ratios got worse by more than 10%."
    assert "lacks them: 1 ratios of recurrence." in lines[-2]
    assert comparison_lines(compare(old, old))[-1] == "No ratio of 3 got worse by more than 10%."


# ----------------------------------------------------------------------------------------------------------------- report


def test_a_table_is_aligned_markdown() -> None:
    assert table(["name", "n"], [["a", "1"], ["longer", "1,000"]]) == [
        "| name   |     n |",
        "|--------|------:|",
        "| a      |     1 |",
        "| longer | 1,000 |",
    ]


def test_a_busy_machine_and_an_interrupt_are_told() -> None:
    (section,) = result_of(ratio_of("a", 1.0), others=0.3).sections
    assert any("30% of the machine" in line for line in section_lines(section))
    assert not any("of the machine" in line for line in section_lines(section.model_copy(update={"others": 0.01})))
    assert section_lines(section.model_copy(update={"complete": False}))[0] == "## recurrence (interrupted)"


def test_numbers_are_shown_with_the_digits_that_matter() -> None:
    found = [measurement("g", str(value), "steps/s", [value]) for value in (123_456.7, 123.45, 12.345, 0.12345)]
    lines = section_lines(SectionResult(name="s", complete=True, measurements=tuple(found)))
    assert [line.split("|")[2].strip() for line in lines[4:8]] == ["123,457", "123.5", "12.35", "0.123"]


def panels(monkeypatch: pytest.MonkeyPatch, *measurements: Measurement) -> list[Any]:
    """The axes of the picture."""
    from hardy.bench import report

    kept: list[Any] = []
    real = report.png
    monkeypatch.setattr(report, "png", lambda figure: kept.append(figure) or real(figure))
    data = picture(SectionResult(name="s", complete=True, measurements=measurements))
    assert data.startswith(b"\x89PNG")
    return list(kept[0].axes)


def test_a_picture_has_a_panel_for_each_group_and_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = [measurement("N = 16", label, "steps/s", [value]) for label, value in (("a", 1.0), ("b", 100.0))]
    others = [measurement("N = 16", "c", "GFLOP/s", [5.0]), measurement("N = 2", "a", "steps/s", [2000.0])]
    axes = panels(monkeypatch, *speeds, *others)
    assert [one.get_title(loc="left") for one in axes] == ["s: N = 16", "s: N = 16", "s: N = 2"]
    assert [one.get_xlabel() for one in axes] == ["steps/s", "GFLOP/s", "steps/s"]
    assert [one.get_xscale() for one in axes] == ["log", "linear", "linear"]


def test_a_group_of_numbers_is_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    (axes,) = panels(monkeypatch, *(measurement("N = 8", f"P = {x}", "steps/s", [10.0 * x, 12.0 * x], x=x) for x in (4, 1, 2)))
    (line,) = [line for line in axes.get_lines() if len(line.get_xdata()) == 3 and line.get_linestyle() == "-"]
    assert list(line.get_xdata()) == [1, 2, 4]
    assert list(line.get_ydata()) == [11, 22, 44]


def test_the_folder_gets_tables_and_pictures(tmp_path: Path) -> None:
    write(result_of(ratio_of("a", 0.5)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.md", "recurrence.png"]
    text = (tmp_path / "bench.md").read_text()
    assert "one, 2 cores, 100 MiB, any." in text
    assert "| group, label |" in text and "| a " in text
