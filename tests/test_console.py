"""What the terminal shows while a run trains: the live view, its plain lines, and the table of a population."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from rich.console import Console

from hardy.console import LiveView, print_error


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


METRICS = {
    "rollout/ep_rew_mean": 123.45,
    "rollout/ep_len_mean": 67.0,
    "train/value_loss": 0.01234,
    "train/policy_loss": -0.0056,
    "train/approx_kl": 0.0078,
    "vgs/scaling_factor": 0.91,
    "time/steps_per_second": 2345.6,
}


def test_plain_lines_come_every_five_seconds_and_at_the_end() -> None:
    output, clock = io.StringIO(), Clock()
    with LiveView(10_000, "job", console=Console(file=output, width=40), clock=clock) as view:
        for step in range(1000, 7000, 1000):
            clock.now += 2.0
            view.update(step, METRICS)
    lines = output.getvalue().splitlines()
    assert [line.partition(" · ")[0] for line in lines] == [f"{n:,} / 10,000 steps ({n // 100}%)" for n in (3000, 6000)]
    numbers = "return 123.5 · length 67.0 · value loss 0.01234 · policy loss -0.0056 · VGS factor 0.910 · KL 0.0078"
    assert lines[0].endswith(f"(30%) · steps/s 2,346 · time left 0:14 · {numbers}")
    assert "\x1b" not in output.getvalue()


def test_the_last_state_is_printed_however_short_the_run_and_never_twice() -> None:
    output, clock = io.StringIO(), Clock()
    with pytest.raises(KeyboardInterrupt), LiveView(100, console=Console(file=output), clock=clock) as view:
        view.update(10, {})
        raise KeyboardInterrupt
    assert output.getvalue() == "10 / 100 steps (10%) · steps/s – · time left –\n"
    with LiveView(100, console=Console(file=output), clock=clock) as view:
        clock.now += 5.0
        view.update(100, {})
    assert output.getvalue().splitlines()[1:] == ["100 / 100 steps (100%) · steps/s 20 · time left 0:00"]


def test_a_resumed_run_estimates_from_its_own_steps() -> None:
    output, clock = io.StringIO(), Clock()
    with LiveView(10_000, start=9000, console=Console(file=output), clock=clock) as view:
        clock.now += 10.0
        view.update(9001, {"rollout/ep_rew_mean": math.nan})
    assert "(90%) · steps/s 0 · time left 2:46:30 · return nan" in output.getvalue()


def test_a_population_shows_mean_and_best() -> None:
    output, clock = io.StringIO(), Clock()
    members = {f"rollout/ep_rew_mean/member_{index}": value for index, value in enumerate((math.nan, 1.0, 300.0))}
    with LiveView(10, console=Console(file=output), clock=clock) as view:
        view.update(5, METRICS | members)
    assert "return 123.5 · best return 300.0 · length 67.0" in output.getvalue()


def live(output: io.StringIO, clock: Clock, width: int = 100, **options: Any) -> LiveView:
    return LiveView(10_000, "job", console=Console(file=output, width=width, force_terminal=True, **options), clock=clock)


def test_a_terminal_is_redrawn_at_most_four_times_a_second() -> None:
    output, clock = io.StringIO(), Clock()
    with live(output, clock) as view:
        for step in range(1, 81):
            clock.now += 0.0625
            view.update(step, METRICS)
    text = output.getvalue()
    assert 20 <= text.count("/ 10,000 steps") <= 23  # start and end draw as well
    assert "80 / 10,000 steps (1%)" in text
    for part in ("job", "━", "steps/s", "2,346", "time left", "10:20", "123.5", "0.01234", "-0.0056", "0.910", "0.0078"):
        assert part in text


def test_no_color_and_dumb_terminals_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured, plain, dumb = io.StringIO(), io.StringIO(), io.StringIO()
    for output, name, value in ((coloured, "UNUSED", "1"), (plain, "NO_COLOR", "1"), (dumb, "TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with live(output, Clock()) as view:
                view.update(5000, METRICS)
    assert "\x1b[38;5" in coloured.getvalue()
    assert "\x1b[38;5" not in plain.getvalue()
    assert "━" in plain.getvalue()
    assert dumb.getvalue().startswith("5,000 / 10,000 steps (50%) · ")


def test_errors_go_to_the_standard_error_unwrapped(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("job.yaml: [bold]" + "x" * 200 + "\nsecond line")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: job.yaml: [bold]" + "x" * 200 + "\nsecond line\n"


def member(number: int, score: float, **more: str | float) -> dict[str, str | float]:
    return {"member": number, "score": score, "±": 1.25, "lr": 3e-4, "last exchange": "kept", **more}


def printed(rows: list[dict[str, str | float]]) -> list[str]:
    output = io.StringIO()
    LiveView(100, console=Console(file=output, width=40)).members(rows)
    return output.getvalue().splitlines()


def test_without_a_terminal_the_members_are_printed_once_best_first_and_aligned() -> None:
    rows = [member(0, 9.5), member(1, math.nan, **{"last exchange": "healed from 2"}), member(2, 212.25, lr=2.5e-3)]
    assert printed(rows) == [
        "       member  score      ±        lr  last exchange",
        "best        2  212.2  1.250  0.002500  kept",
        "            0    9.5  1.250  0.000300  kept",
        "worst       1      –  1.250  0.000300  healed from 2",
    ]


def test_a_table_is_printed_at_every_call_and_no_more_with_the_lines() -> None:
    output, clock = io.StringIO(), Clock()
    with LiveView(100, console=Console(file=output), clock=clock) as view:
        view.members([member(0, 1.0), member(1, 2.0)])
        view.members([member(0, 3.0), member(1, 2.0)])
        view.members([])
        clock.now += 5.0
        view.update(100, {})
    lines = output.getvalue().splitlines()
    assert [line.split()[:2] for line in lines if "kept" in line] == [
        ["best", "1"],
        ["worst", "0"],
        ["best", "0"],
        ["worst", "1"],
    ]
    assert len(lines) == 7
    assert lines[-1].startswith("100 / 100 steps")


def test_of_many_members_the_best_are_shown_and_the_rest_is_counted() -> None:
    lines = printed([member(number, float(number)) for number in range(64)])
    assert len(lines) == 18
    assert [int(line.removeprefix("best").split()[0]) for line in lines[1:-1]] == list(range(63, 47, -1))
    assert lines[-1] == "… and 48 more, the worst: member 0, score 0.00"
    assert len(printed([member(number, 1.0) for number in range(16)])) == 17
    assert printed([member(number, math.nan) for number in range(17)])[-1] == "… and 1 more, the worst: member 16, score –"


def test_where_no_member_has_a_score_none_is_the_best() -> None:
    lines = printed([member(0, math.nan), member(1, -math.inf)])
    assert "best" not in "".join(lines)
    assert lines[1].split()[:2] == ["0", "–"]
    assert printed([member(0, 5.0)])[1].split()[:2] == ["0", "5.000"]  # alone it is neither best nor worst


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((475.0, 12.25), ("475.0", "12.2")),
        ((0.2, 0.125), ("0.2000", "0.1250")),
        ((3e-2, 1e-5), ("0.03", "1e-05")),
        ((4e-6, 1e-6), ("4e-06", "1e-06")),
        ((123456.0, -54321.5), ("123456", "-54322")),
        ((3, 12), ("3", "12")),
        ((0.0, math.nan), ("0", "–")),
    ],
)
def test_numbers_of_one_column_have_equal_decimals_unless_they_span_orders_of_magnitude(
    values: tuple[float, float], shown: tuple[str, str]
) -> None:
    lines = printed([{"member": number, "value": value} for number, value in enumerate(values)])
    assert tuple(line.split()[-1] for line in lines[1:]) == shown
    assert len({len(line) for line in lines}) == 1


def test_in_a_terminal_the_table_stands_below_the_progress_until_it_is_replaced() -> None:
    output, clock = io.StringIO(), Clock()
    with live(output, clock) as view:
        view.members([member(0, 111.5), member(1, 222.5)])
        clock.now += 1.0
        output.truncate(0)
        view.update(50, METRICS)
        first = output.getvalue()
        view.members([member(0, 333.5), member(1, 444.5)])
    assert re.search(r"50 / 10,000 steps.*return.*best.*222\.5.*worst.*111\.5", first, flags=re.DOTALL)
    last = output.getvalue().rpartition("50 / 10,000 steps")[2]
    assert "444.5" in last
    assert "222.5" not in last


def test_best_and_worst_are_coloured_and_names_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    output = io.StringIO()
    with live(output, Clock()) as view:
        view.members([member(0, 1.0, **{"last exchange": "[red]kept"}), member(1, 3.0), member(2, 2.0)])
    last = output.getvalue().splitlines()
    assert [code for code in ("\x1b[32mbest", "\x1b[31mworst") if not any(line.startswith(code) for line in last)] == []
    assert "[red]kept" in output.getvalue()


@pytest.mark.parametrize(("height", "rows"), [(100, 16), (24, 16), (15, 8), (8, 1)])
def test_the_table_leaves_the_terminal_room_to_say_how_many_there_are(height: int, rows: int) -> None:
    output, clock = io.StringIO(), Clock()
    with live(output, clock, height=height) as view:
        view.update(5, METRICS)
        output.truncate(0)
        view.members([member(number, float(number)) for number in range(64)])
        text = output.getvalue()
    assert text.count("kept") == rows
    assert f"… and {64 - rows} more" in text
    assert text.count("\n") < height


@pytest.mark.parametrize(
    ("width", "shown", "note"), [(50, 5, ""), (49, 4, "no room for last exchange"), (26, 2, "no room for ±, lr, last e…")]
)
def test_a_column_that_a_terminal_has_no_room_for_is_named_and_no_number_is_cut(width: int, shown: int, note: str) -> None:
    output = io.StringIO()
    with live(output, Clock(), width=width, color_system=None) as view:
        view.members([member(0, 1.0), member(1, 2.0)])
    table = output.getvalue().rpartition("member")[2].splitlines()
    cells = ["1", "2.000", "1.250", "0.0003", "kept"]
    assert table[1].split() == ["best", *cells[:shown]]
    assert "".join(table[3:]).startswith(note)
    assert ("no room" in output.getvalue()) == bool(note)
