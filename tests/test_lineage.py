"""population.csv: exact numbers, one clean history whatever the kill, and the way back from a winner to the start."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardy.lineage import EVENTS, MemberRecord, PopulationWriter, ancestry, best_member, read_population, schedule

NAMES = ("optimizer.lr", "ppo.gamma")
NAN = math.nan


def record(exchange: int, member: int, parent: int | None = None, **values: object) -> MemberRecord:
    """A record at step 100 per exchange, whose learning rate is ``after`` from here on."""
    after = float(str(values.pop("after", 0.5)))
    parent = member if parent is None else parent
    event = "start" if exchange == 0 else "kept" if parent == member else "exploited"
    made = MemberRecord(
        exchange=exchange,
        step=100 * exchange,
        member=member,
        score=NAN if exchange == 0 else float(member),
        standard_error=NAN if exchange == 0 else 0.5,
        parent=parent,
        event=event,
        age=0,
        depth=0,
        before={"optimizer.lr": 0.25, "ppo.gamma": 0.9},
        after={"optimizer.lr": after, "ppo.gamma": 0.9},
    )
    return dataclasses.replace(made, **values)  # type: ignore[arg-type]


def write(folder: Path, exchanges: Sequence[Sequence[MemberRecord]], resume_step: int | None = None) -> Path:
    with PopulationWriter(folder, NAMES, resume_step) as writer:
        for records in exchanges:
            writer.write(records)
    return folder / "population.csv"


def history(exchanges: range, members: int = 3) -> list[list[MemberRecord]]:
    return [[record(exchange, member, after=exchange + member / 3) for member in range(members)] for exchange in exchanges]


# Member 0 copies 2 at the second exchange, and 1 copies 0 at the third: the weights of 1 came 2 → 0 → 1.
FAMILY = [
    *(record(0, member, after=member) for member in range(3)),
    *(record(1, member, after=member) for member in range(3)),
    *(record(2, member, parent, after=after) for member, parent, after in ((0, 2, 20.0), (1, 1, 1.0), (2, 2, 2.0))),
    *(record(3, member, parent, after=after) for member, parent, after in ((0, 0, 20.0), (1, 0, 30.0), (2, 1, 31.0))),
]

numbers = st.floats(allow_nan=True, allow_infinity=True)
paths = st.text("a_.,\"'/ ", min_size=1)


@settings(deadline=None, max_examples=50)
@given(
    score=numbers,
    error=numbers,
    before=numbers,
    after=numbers,
    event=st.sampled_from(EVENTS),
    path=st.text("a_.,\"'/ ", min_size=1),
)
def test_every_number_is_read_back_exactly(
    score: float, error: float, before: float, after: float, event: str, path: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("exact")
    written = MemberRecord(3, 2**40 + 1, 5, score, error, 7, event, 11, 13, {path: before}, {path: after})
    with PopulationWriter(folder, [path]) as writer:
        writer.write([written])
    (read,) = read_population(folder)
    assert repr(read) == repr(written)  # unlike ==, a NaN equals itself


def test_the_file_is_a_table_that_people_can_read(tmp_path: Path) -> None:
    numpy_scalars = {"score": np.float64(0.1), "standard_error": np.float64(0.2), "age": 4, "depth": 2}
    path = write(tmp_path, [[record(0, 0)], [record(1, 0, 1, **numpy_scalars)]])
    assert path.read_text().splitlines() == [
        "exchange,step,member,score,standard_error,parent,event,age,depth,"
        "optimizer.lr/before,optimizer.lr/after,ppo.gamma/before,ppo.gamma/after",
        "0,0,0,nan,nan,0,start,0,0,0.25,0.5,0.9,0.9",
        "1,100,0,0.1,0.2,1,exploited,4,2,0.25,0.5,0.9,0.9",
    ]


def test_an_exchange_is_on_the_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with PopulationWriter(tmp_path, NAMES) as writer:
        assert read_population(tmp_path) == []
        writer.write([record(1, 0), record(1, 1)])
        assert read_population(tmp_path) == [record(1, 0), record(1, 1)]


def test_what_does_not_fit_the_file_is_refused(tmp_path: Path) -> None:
    with PopulationWriter(tmp_path, NAMES) as writer:
        with pytest.raises(ValueError, match=r"event = 'exploted': allowed are start, .*\(did you mean 'exploited'\?\)"):
            writer.write([record(1, 0), record(1, 1, event="exploted")])
        with pytest.raises(ValueError, match=r"after has ppo\.gamma: must have optimizer\.lr, ppo\.gamma"):
            writer.write([record(1, 0, after=1), dataclasses.replace(record(1, 1), after={"ppo.gamma": 0.9})])
        with pytest.raises(ValueError, match=r"before has none: must have optimizer\.lr, ppo\.gamma"):
            writer.write([dataclasses.replace(record(1, 0), before={})])
    assert read_population(tmp_path) == []


@pytest.mark.parametrize("cut", [0, 1, 30, 120])
def test_a_resumed_history_equals_an_uninterrupted_one(cut: int, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", history(range(6)))
    resumed = write(tmp_path / "resumed", history(range(5)))
    resumed.write_bytes(resumed.read_bytes()[: resumed.stat().st_size - cut])
    write(tmp_path / "resumed", history(range(3, 6)), resume_step=299)
    assert resumed.read_bytes() == whole.read_bytes()
    write(tmp_path / "resumed", history(range(6)))  # without resuming, a new history
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_row_whose_last_number_was_cut_short_is_not_continued(tmp_path: Path) -> None:
    whole = write(tmp_path, history(range(2))).read_bytes()
    path = tmp_path / "population.csv"
    path.write_bytes(whole[:-1])
    write(tmp_path, [], resume_step=100)
    assert path.read_bytes() == whole[: whole.rindex(b"\n", 0, -1) + 1]


def test_a_run_that_goes_on_forgets_the_scores_of_its_former_end(tmp_path: Path) -> None:
    final = [record(3, member, event="final", step=250) for member in range(3)]
    path = write(tmp_path, [*history(range(3)), final])
    write(tmp_path, history(range(3, 5)), resume_step=250)
    assert path.read_bytes() == write(tmp_path / "whole", history(range(5))).read_bytes()


def test_resuming_begins_a_file_where_there_is_none_or_not_even_a_head(tmp_path: Path) -> None:
    path = write(tmp_path, history(range(1)), resume_step=100)
    text = path.read_bytes()
    for head in (b"", b"exchange,step,mem"):
        path.write_bytes(head)
        write(tmp_path, history(range(1)), resume_step=100)
        assert path.read_bytes() == text


def test_a_history_of_other_hyperparameters_is_not_continued(tmp_path: Path) -> None:
    path = write(tmp_path, history(range(2)))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"the hyperparameters optimizer\.lr, ppo\.gamma, not ppo\.ent_coef"):
        PopulationWriter(tmp_path, ["ppo.ent_coef"], resume_step=100)
    assert path.read_bytes() == before


def test_a_row_cut_short_is_left_out_and_a_missing_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, history(range(2), members=2))
    whole = path.read_bytes()
    for cut in (1, 5, 40):
        path.write_bytes(whole[:-cut])
        assert [(r.exchange, r.member) for r in read_population(tmp_path)] == [(0, 0), (0, 1), (1, 0)]
    path.write_bytes(whole + b"2,200\n")
    assert len(read_population(tmp_path)) == 4
    path.write_bytes(b"")
    assert read_population(tmp_path) == []
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_population(tmp_path)


def test_ancestry_follows_the_weights_back_to_the_start() -> None:
    assert [(r.exchange, r.member) for r in ancestry(FAMILY, 1)] == [(0, 2), (1, 2), (2, 0), (3, 1)]
    assert [(r.exchange, r.member) for r in ancestry(FAMILY, 0)] == [(0, 2), (1, 2), (2, 0), (3, 0)]
    assert [(r.exchange, r.member) for r in ancestry(FAMILY[::-1], 2)] == [(0, 1), (1, 1), (2, 1), (3, 2)]
    with pytest.raises(ValueError, match="member = 3: allowed are 0, 1, 2"):
        ancestry(FAMILY, 3)
    with pytest.raises(ValueError, match="member = 0: allowed are none, for there is no record"):
        ancestry([], 0)


def test_ancestry_passes_over_the_row_that_a_kill_cut_short() -> None:
    assert [(r.exchange, r.member) for r in ancestry(FAMILY[:-1], 2)] == [(0, 2), (1, 2), (2, 2)]


@settings(deadline=None)
@given(data=st.data(), members=st.integers(1, 5), exchanges=st.integers(1, 6))
def test_along_any_lineage_the_parent_of_one_is_the_member_of_the_one_before(
    data: st.DataObject, members: int, exchanges: int
) -> None:
    slots = st.integers(0, members - 1)
    parents = data.draw(st.lists(st.lists(slots, min_size=members, max_size=members), min_size=exchanges, max_size=exchanges))
    records = [record(0, m) for m in range(members)]
    weights = [f"first {m}" for m in range(members)]  # what an index copy does to the weights themselves
    for exchange, row in enumerate(parents, start=1):
        records += [record(exchange, m, parent) for m, parent in enumerate(row)]
        weights = [weights[parent] for parent in row]
    for member in range(members):
        line = ancestry(records, member)
        assert [r.exchange for r in line] == list(range(exchanges + 1))
        assert line[-1].member == member
        assert f"first {line[0].member}" == weights[member]
        assert all(later.parent == earlier.member for earlier, later in itertools.pairwise(line))


def test_schedule_is_what_the_ancestors_trained_with_and_tells_changes_only() -> None:
    entries = [(step, values["optimizer.lr"]) for step, values in schedule(FAMILY, 1)]
    assert entries == [(0, 2.0), (200, 20.0), (300, 30.0)]
    assert schedule(FAMILY, 1)[0][1] == {"optimizer.lr": 2.0, "ppo.gamma": 0.9}
    assert [step for step, _ in schedule(FAMILY, 0)] == [0, 200]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(1.0, 0.1), (3.0, 0.1), (2.0, 0.1)], 1),
        ([(NAN, NAN), (-math.inf, 0.0), (-5.0, 9.0)], 2),
        ([(1.0, 0.1), (math.inf, 0.1), (NAN, 0.1)], 0),
        ([(2.0, 0.3), (2.0, NAN), (2.0, 0.2)], 2),
        ([(2.0, 0.2), (2.0, 0.3), (2.0, NAN)], 0),
        ([(2.0, 0.2), (2.0, 0.1), (2.0, 0.1)], 1),
        ([(NAN, NAN), (NAN, NAN), (NAN, NAN)], 0),
    ],
)
def test_the_best_has_the_highest_finite_score_of_the_last_exchange(scores: list[tuple[float, float]], best: int) -> None:
    first = [record(1, member, score=1000.0 * (member == 2)) for member in range(3)]
    last = [record(2, member, score=score, standard_error=error) for member, (score, error) in enumerate(scores)]
    assert best_member(first + last[::-1]) == best


def test_a_population_without_records_has_no_best() -> None:
    with pytest.raises(ValueError, match="records is empty"):
        best_member([])
