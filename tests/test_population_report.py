"""The pictures of a population: who descends from whom, and the hyperparameters that won."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from hardy import population_report
from hardy.figures import BLUE, ORANGE, RED
from hardy.lineage import MemberRecord, PopulationWriter
from hardy.population_report import lineage_picture, schedule_picture

NAN = math.nan
Spaces = dict[str, Callable[[int, int], float]]
LR: Spaces = {"optimizer.lr": lambda exchange, member: 0.01 * (1 + member + exchange)}


def write_run(
    folder: Path,
    members: int = 3,
    exchanges: int = 3,
    parents: dict[tuple[int, int], tuple[int, str]] | None = None,
    scores: Callable[[int, int], float] = lambda exchange, member: 10.0 * exchange + member,
    spaces: Spaces = LR,
) -> Path:
    """A population that exchanges every 100 steps; ``parents`` holds (parent, event) of whoever was replaced."""
    with PopulationWriter(folder, list(spaces)) as writer:
        for exchange in range(exchanges + 1):
            records = []
            for member in range(members):
                parent, event = (parents or {}).get((exchange, member), (member, "kept" if exchange else "start"))
                values = {name: space(exchange, member) for name, space in spaces.items()}
                score = scores(exchange, member) if exchange else NAN
                records.append(MemberRecord(exchange, 100 * exchange, member, score, 1.0, parent, event, 0, 0, values, values))
            writer.write(records)
    return folder


# The weights of the best, member 2, came 0 → 1 → 2; member 0 was lost, and 1 then took the weights of 0.
PARENTS = {(1, 1): (0, "exploited"), (2, 2): (1, "exploited"), (2, 0): (1, "healed"), (3, 1): (0, "migrated")}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that were turned into pictures."""
    figures: list[Any] = []
    png = population_report.png
    monkeypatch.setattr(population_report, "png", lambda figure: (figures.append(figure), png(figure))[1])
    yield figures


def segments(axes: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Curves, lanes and the best lineage, each with their scores."""
    collections = [one for one in axes.collections if isinstance(one, LineCollection) and one.get_array() is not None]
    pairs = [list(zip(one.get_segments(), one.get_array(), strict=True)) for one in collections]
    return pairs[0], pairs[1], pairs[2]


def keys(legend: Any) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_each_line_has_the_score_that_it_reached_and_begins_where_its_weights_came_from(
    tmp_path: Path, drawn: list[Any]
) -> None:
    path = lineage_picture(write_run(tmp_path / "job", parents=PARENTS))
    assert path == tmp_path / "job" / "lineage.png"
    assert image.imread(path).shape[1] >= 1200
    axes = drawn[0].axes[0]
    assert axes.get_title(loc="left") == "job"
    curves, lanes, _ = segments(axes)
    # (from lane, at step) → (to lane), score at the exchange after; the last one was not scored any more
    ends = sorted((*map(float, curve[0]), float(curve[-1, 1]), float(score)) for curve, score in curves[:3])
    assert ends == [(100.0, 0.0, 1.0, 21.0), (200.0, 1.0, 0.0, 30.0), (200.0, 1.0, 2.0, 32.0)]
    assert curves[3][0][0].tolist() == [300, 0]
    assert np.ma.is_masked(curves[3][1])
    kept = sorted((*map(float, lane.ravel()), float(score)) for lane, score in lanes if lane[0, 0] == 0)
    assert kept == [(0, m, 100, m, 10.0 + m) for m in range(3)]
    for curve, _ in curves:  # where the curve ends, the member's own lane goes on
        assert [tuple(curve[-1])] == [tuple(lane[0]) for lane, _ in lanes if tuple(lane[0]) == tuple(curve[-1])]
    assert all(lane[0, 1] == lane[1, 1] for lane, _ in lanes)


def test_the_lineage_of_the_best_lies_on_top_from_the_start_to_the_end(tmp_path: Path, drawn: list[Any]) -> None:
    lineage_picture(write_run(tmp_path, parents=PARENTS))
    axes = drawn[0].axes[0]
    curves, lanes, best = segments(axes)
    assert [(float(line[0, 1]), float(line[-1, 1]), float(score)) for line, score in best] == [
        (0, 0, 10),
        (0, 1, 21),
        (1, 2, 32),
    ]
    band = next(line for line in axes.lines if line.get_color() == ORANGE).get_xydata()
    assert band[0].tolist() == [0, 0]
    assert band[-1].tolist() == [300, 2]
    assert (np.diff(band[:, 0]) >= 0).all()
    order = {id(one): one.get_zorder() for one in (*axes.lines, *axes.collections)}
    top = max(axes.collections, key=lambda one: one.get_zorder() if isinstance(one, LineCollection) else 0)
    assert top.get_segments()[0].tolist() == best[0][0].tolist()
    assert order[id(top)] > axes.lines[-1].get_zorder() > 3
    assert len(curves) == 4
    assert len(lanes) == 10


def test_the_legend_names_what_is_there_and_nothing_else(tmp_path: Path, drawn: list[Any]) -> None:
    lineage_picture(write_run(tmp_path / "a", parents=PARENTS))
    lineage_picture(write_run(tmp_path / "b"))
    assert keys(drawn[0].axes[0].get_legend()) == [
        "lineage of the best: member 2, score 32 ± 1",
        "copies another",
        "copies weights only",
        "was not finite",
        "no score",
    ]
    assert keys(drawn[1].axes[0].get_legend()) == ["lineage of the best: member 2, score 32 ± 1"]
    marks = {to_hex(one.get_facecolor()[0]): one.get_offsets().tolist() for one in drawn[0].axes[0].collections[-2:]}
    assert marks[RED] == [[200, 0]]
    assert sorted(marks.values()) == [[[200, 0]], [[300, 1]]]


def test_the_colour_bar_spans_the_scores_but_for_the_worst_of_the_start(tmp_path: Path, drawn: list[Any]) -> None:
    scores = lambda exchange, member: -1e9 if (exchange, member) == (1, 0) else 10.0 * exchange + member  # noqa: E731
    lineage_picture(write_run(tmp_path / "a", exchanges=20, scores=scores))
    lineage_picture(write_run(tmp_path / "b", scores=lambda exchange, member: 7.0))
    bar, equal = drawn[0].axes[1], drawn[1].axes[1]
    assert bar.get_ylabel() == "score"
    assert (bar.get_ylim()[0] > -100, bar.get_ylim()[1]) == (True, 202)
    assert equal.get_ylim() == (6.5, 7.5)


@pytest.mark.parametrize(("members", "exchanges"), [(2, 1), (2, 200), (64, 20)])
def test_pictures_of_any_size_lose_no_label(members: int, exchanges: int, tmp_path: Path, drawn: list[Any]) -> None:
    generator = np.random.default_rng(0)
    parents = {
        (exchange, int(member)): (int(generator.integers(members)), "exploited")
        for exchange in range(1, exchanges)
        for member in generator.choice(members, members // 4, replace=False)
    }
    names = ("optimizer.lr", "ppo.clip_range", "ppo.gamma", "a.rather.long.name.of.a.section", "ppo.ent_coef")
    spaces: Spaces = {name: lambda exchange, member: 10.0 ** -((exchange + member) % 5) for name in names}
    folder = write_run(tmp_path / ("job_" * 8 + "seed0"), members, exchanges, parents, spaces=spaces)
    for picture in (lineage_picture, schedule_picture):
        pixels = image.imread(picture(folder))[..., :3]
        edges = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
        assert (edges == 1).all()  # what is cut off would leave ink on the border
    lanes = [text.get_text() for text in drawn[0].axes[0].get_yticklabels()]
    assert lanes == [str(number) for number in range(0, members, 4 if members > 24 else 1)]
    assert max(drawn[0].get_size_inches()) <= 18


def test_a_population_that_has_hardly_begun_has_pictures_too(tmp_path: Path, drawn: list[Any]) -> None:
    PopulationWriter(tmp_path / "nothing", ["optimizer.lr"]).close()
    folders = [write_run(tmp_path / "begun", exchanges=0), write_run(tmp_path / "lost", scores=lambda *_: NAN)]
    for folder in (tmp_path / "nothing", *folders):
        assert lineage_picture(folder).exists()
        assert schedule_picture(folder).exists()
    begun, lost = drawn[2], drawn[4]
    assert len(segments(begun.axes[0])[1]) == 3
    assert [len(figure.axes) for figure in (begun, lost)] == [1, 1]  # no scores, no colour bar
    assert keys(lost.axes[0].get_legend()) == ["lineage of the best: member 0", "no score"]
    for picture in (lineage_picture, schedule_picture):
        with pytest.raises(FileNotFoundError):
            picture(tmp_path)


def test_schedules_show_every_member_as_steps_and_the_best_lineage_thick(tmp_path: Path, drawn: list[Any]) -> None:
    spaces = {**LR, "ppo.clip_range": lambda exchange, member: 0.2}
    path = schedule_picture(write_run(tmp_path / "job", exchanges=2, parents={(1, 1): (0, "exploited")}, spaces=spaces))
    assert path == tmp_path / "job" / "schedules.png"
    (figure,) = drawn
    assert figure.legends[0].get_title().get_text() == "job"
    assert keys(figure.legends[0]) == ["lineage of the best: member 2", "every member"]
    lr, clip = figure.axes
    assert [axes.get_title(loc="left") for axes in (lr, clip)] == ["optimizer.lr", "ppo.clip_range"]
    (line,) = lr.lines
    steps = [[0, 0.03], [100, 0.03], [100, 0.04], [200, 0.04], [200, 0.05], [200, 0.05]]
    np.testing.assert_allclose(line.get_xydata(), steps)
    assert (line.get_color(), line.get_linewidth() > 2) == (BLUE, True)
    (members,) = lr.collections
    np.testing.assert_allclose([one[0, 1] for one in members.get_segments()], [0.01, 0.02, 0.03])
    assert members.get_linewidths()[0] < 1
    assert line.get_zorder() > members.get_zorder()


def test_the_best_schedule_follows_the_weights_through_the_members(tmp_path: Path, drawn: list[Any]) -> None:
    schedule_picture(write_run(tmp_path, parents=PARENTS))
    values = drawn[0].axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(values[::2], [0.01, 0.03, 0.05, 0.06])  # 0, then 1, then 2 to the end


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ((0.1, 0.9), "linear"),
        ((0.1, 1.1), "log"),
        ((0.0, 5.0), "linear"),
        ((-1.0, 5.0), "linear"),
        ((0.9, 0.999), "logit"),
        ((0.9, 0.98), "linear"),
        ((0.9, 1.0), "linear"),
        ((0.5, 0.5), "linear"),
        ((0.01, math.nan, 1.0), "log"),
    ],
)
def test_an_axis_is_logarithmic_where_values_span_more_than_a_decade(
    values: tuple[float, ...], scale: str, tmp_path: Path, drawn: list[Any]
) -> None:
    schedule_picture(write_run(tmp_path, spaces={"ppo.gamma": lambda exchange, member: values[member % len(values)]}))
    assert drawn[0].axes[0].get_yscale() == scale


@pytest.mark.parametrize(("hyperparams", "panels", "labelled"), [(1, 1, 1), (2, 2, 2), (4, 4, 2), (5, 5, 3), (7, 7, 3)])
def test_there_is_one_panel_per_hyperparameter_and_steps_below_each_column(
    hyperparams: int, panels: int, labelled: int, tmp_path: Path, drawn: list[Any]
) -> None:
    spaces: Spaces = {f"ppo.number_{index}": lambda exchange, member: 0.5 for index in range(hyperparams)}
    schedule_picture(write_run(tmp_path, spaces=spaces))
    assert len(drawn[0].axes) == panels
    assert sum(axes.get_xlabel() == "environment steps" for axes in drawn[0].axes) == labelled
