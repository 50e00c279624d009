"""Checkpoint files: exact round trips, atomic writes, refusals that say what is wrong, nothing that unpickles."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardy import checkpoint
from hardy.checkpoint import (
    CheckpointError,
    checkpoint_path,
    flatten_state,
    latest_checkpoint,
    load_tensors,
    package_version,
    prune_checkpoints,
    read_document,
    restore_state_,
    save_tensors,
    write_json_atomic,
    write_text_atomic,
)
from hardy.population import copied, kept, nested, reset_to, training_state


@training_state
class Inner:
    step: Tensor = copied()
    moments: dict[str, Tensor] = copied()


@training_state
class Outer:
    memory: Tensor = reset_to(0.0)
    rng: Tensor = kept()
    inner: Inner = nested()


def make_state(value: float = 0.0) -> Outer:
    moments = {"a.weight": torch.full((2, 3, 5), value), "b": torch.full((2,), value, dtype=torch.float64)}
    inner = Inner(step=torch.full((2,), int(value)), moments=moments)
    return Outer(memory=torch.full((2, 7), value), rng=torch.full((2, 11), int(value), dtype=torch.uint8), inner=inner)


def save_step(folder: Path, step: int) -> Path:
    path = checkpoint_path(folder, step)
    save_tensors(path, {"x": torch.ones(50)}, {"kind": "training", "step": step})
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


dtypes = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16])


@settings(deadline=None, max_examples=25)
@given(
    shapes=st.dictionaries(st.text(), st.tuples(st.lists(st.integers(0, 5), max_size=3), dtypes), max_size=4),
    notes=st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False), max_size=4),
)
def test_round_trip_is_exact(
    shapes: dict[str, tuple[list[int], torch.dtype]], notes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    shapes.pop("__metadata__", None)
    tensors = {name: torch.randint(0, 200, shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    save_tensors(path, tensors, {"notes": notes, "kind": "test"})
    loaded, document = load_tensors(path, "test")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert document == {"notes": notes, "kind": "test", "format_version": 1, "hardy_version": package_version()}


def test_views_transposes_and_gradients_are_saved_as_what_they_hold(tmp_path: Path) -> None:
    buffer = torch.arange(12.0)
    weight = torch.nn.Parameter(torch.ones(2, 3))
    tensors = {"low": buffer[:6], "high": buffer[3:].view(3, 3), "turned": buffer.view(3, 4).T, "weight": weight}
    save_tensors(tmp_path / "v", tensors, {"kind": "test"})
    loaded, _ = load_tensors(tmp_path / "v")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert not loaded["weight"].requires_grad


def test_documents_may_be_saved_again_and_need_a_kind(tmp_path: Path) -> None:
    path = save_step(tmp_path / "new" / "folder", 7)
    save_tensors(path, *load_tensors(path))
    assert read_document(path)["step"] == 7
    with pytest.raises(ValueError, match=r"document\['kind'\] = None"):
        save_tensors(path, {}, {"step": 1})


def test_unusable_files_are_refused_by_name_and_reason(tmp_path: Path) -> None:
    good = save_step(tmp_path, 1)
    cut = save_step(tmp_path, 2)
    truncate(cut)
    head_only, empty, text = tmp_path / "head", tmp_path / "empty", tmp_path / "text"
    head_only.write_bytes(good.read_bytes()[:20])
    empty.touch()
    text.write_text("not a checkpoint, only text that is longer than eight bytes")
    for path in (cut, head_only, empty, text, tmp_path):
        with pytest.raises(CheckpointError, match=f"^{path}: truncated, or not a safetensors file"):
            load_tensors(path)
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'none'}: no such file"):
        load_tensors(tmp_path / "none")
    foreign = tmp_path / "foreign"
    for metadata in (None, {"format": "pt"}, {"hardy": "no json"}, {"hardy": "[]"}, {"hardy": "{}"}):
        foreign.write_bytes(safetensors.torch.save({"x": torch.ones(3)}, metadata=metadata))
        with pytest.raises(CheckpointError, match=f"^{foreign}: a safetensors file, but not one that Hardy wrote"):
            load_tensors(foreign)
    header = json.dumps({"kind": "policy", "format_version": 2, "hardy_version": "9.0"})
    foreign.write_bytes(safetensors.torch.save({"x": torch.ones(3)}, metadata={"hardy": header}))
    with pytest.raises(CheckpointError, match=f"^{foreign}: written in format 2 by Hardy 9.0; this Hardy reads up to format 1"):
        load_tensors(foreign)
    with pytest.raises(CheckpointError, match=f"^{good}: holds a 'training', expected a 'policy'"):
        load_tensors(good, "policy")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "trap").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path / "trap")
    assert not (tmp_path / "sprung").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"a": 1})

    def fail(*_: object) -> None:
        assert list(tmp_path.glob(".*.tmp"))  # the new content stands beside the file, not in it
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(checkpoint.os, step, fail)
            write_json_atomic(path, {"a": 2})
        assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
        assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"a": float("nan")})
    write_text_atomic(path, "é")
    assert path.read_bytes() == "é".encode()


def test_a_write_reaches_the_disk_before_and_after_its_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    write_text_atomic(tmp_path / "x", "y")
    assert events == ["fsync", "replace", "fsync"]


def test_a_training_state_returns_into_its_own_storage(tmp_path: Path) -> None:
    saved, state = make_state(3.0), make_state()
    save_tensors(tmp_path / "s", flatten_state(saved, "train.") | {"policy.w": torch.ones(2)}, {"kind": "training"})
    tensors, _ = load_tensors(tmp_path / "s")
    assert set(tensors) == {
        "policy.w",
        *(f"train.{n}" for n in ("memory", "rng", "inner.step", "inner.moments.a.weight", "inner.moments.b")),
    }
    addresses = {name: tensor.data_ptr() for name, tensor in flatten_state(state).items()}
    restore_state_(state, tensors, "train.")
    for name, tensor in flatten_state(state).items():
        assert tensor.data_ptr() == addresses[name]
        assert torch.equal(tensor, flatten_state(saved)[name])


def test_a_state_that_does_not_fit_is_refused_whole_with_every_reason() -> None:
    tensors = flatten_state(make_state(3.0))
    tensors["extra"] = tensors.pop("memory")
    tensors["inner.step"] = tensors["inner.step"].to(torch.int32)
    tensors["inner.moments.b"] = torch.ones(3, dtype=torch.float64)
    state = make_state()
    with pytest.raises(CheckpointError) as caught:
        restore_state_(state, tensors)
    assert str(caught.value).splitlines()[1:] == [
        "extra: in the checkpoint only",
        "inner.moments.b: float64[3] in the checkpoint, float64[2] here",
        "inner.step: int32[2] in the checkpoint, int64[2] here",
        "memory: missing in the checkpoint",
    ]
    assert all(not tensor.any() for tensor in flatten_state(state).values())


def test_the_newest_usable_checkpoint_is_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no usable checkpoint"):
        latest_checkpoint(tmp_path)
    old, new = save_step(tmp_path, 999_999_999), save_step(tmp_path, 1_000_000_000)
    (tmp_path / "step_last.safetensors").touch()
    assert latest_checkpoint(tmp_path) == new
    truncate(new)
    skipped: list[CheckpointError] = []
    assert latest_checkpoint(tmp_path, skipped.append) == old
    assert [str(error).partition(": ")[0] for error in skipped] == [str(new)]
    assert latest_checkpoint(tmp_path) == old


def test_pruning_keeps_the_newest_usable_ones(tmp_path: Path) -> None:
    paths = [save_step(tmp_path, step) for step in (5, 10, 20, 30, 100)]
    truncate(paths[4])
    truncate(paths[1])
    leftover = tmp_path / ".step_000000040.safetensors.tmp"
    leftover.touch()
    other = tmp_path / "policy.safetensors"
    other.touch()
    assert sorted(prune_checkpoints(tmp_path, 2)) == sorted([leftover, paths[0], paths[1]])
    assert sorted(tmp_path.iterdir()) == sorted([other, *paths[2:]])
    assert prune_checkpoints(tmp_path, 2) == []
    with pytest.raises(ValueError, match="keep = 0"):
        prune_checkpoints(tmp_path, 0)
