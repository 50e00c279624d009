"""What an exploit reads from the file of another member: two formats, and nothing that could run code."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_runs import EVERYTHING, tiny
from torch import Tensor

from hardy import DistributionalPPO, checkpoint
from hardy.checkpoint import CheckpointError, read_member, save_tensors
from hardy.population import ExploitRule, leaves
from hardy.trainer import Trainer

FULL: dict[str, Any] = {
    "checkpoint_format": "v2_full_parameters",
    "parameters": {"core.weight": torch.full((1, 2, 3), 2.0)},
    "optimizer": {"upgd": {"step": torch.tensor([5]), "utility": {"core.weight": torch.full((1, 2, 3), 3.0)}}},
    "observation": {"mean": torch.zeros(1, 7), "var": torch.ones(1, 7), "count": torch.tensor([11.0])},
    "reward": {"running_return": torch.ones(1, 5), "moments": {"mean": torch.zeros(1), "var": torch.ones(1)}},
}
POLICY: dict[str, Any] = {"checkpoint_format": "v1_policy_only", "parameters": FULL["parameters"]}


def trained(*changes: Any, seeds: tuple[int, ...] = (3,)) -> Trainer:
    trainer = Trainer(tiny(*changes), list(seeds))
    trainer.iterate(10_000)
    return trainer


def copied(trainer: Trainer) -> dict[str, Tensor]:
    return {leaf.path: leaf.tensor for leaf in leaves(trainer.state) if leaf.rule is ExploitRule.COPY}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("changes", [(), (EVERYTHING,)])
def test_a_full_file_holds_what_an_exploit_copies_and_nothing_else(tmp_path: Path, changes: tuple[Any, ...]) -> None:
    """The rules of the training state decide, so a field that is forgotten here fails."""
    trainer = trained(*changes)
    trainer.save(tmp_path / "checkpoint.safetensors", {})
    model = DistributionalPPO.of(trainer).save(tmp_path / "model")
    for path in (tmp_path / "checkpoint.safetensors", model):
        read = read_member(path)
        assert (read.format, read.missing) == ("v2_full_parameters", ())
        assert_equal(read.parameters, copied(trainer))


def test_a_policy_says_what_it_lacks(tmp_path: Path) -> None:
    trainer = trained()
    path = DistributionalPPO.of(trainer).export_policy(tmp_path / "policy")
    with pytest.warns(UserWarning, match=re.escape(f"{path}: v1_policy_only lacks ")) as caught:
        read = read_member(path)
    assert (read.format, read.missing) == ("v1_policy_only", ("optimizer", "reward.moments"))
    assert "optimizer (moments, utilities and VGS statistics); reward.moments (return normaliser)" in str(caught[0].message)
    expected = {name: value for name, value in copied(trainer).items() if name.startswith(("parameters.", "observation."))}
    assert_equal(read.parameters, expected)


def test_an_older_full_file_is_read_under_the_same_names(tmp_path: Path) -> None:
    path = saved(tmp_path / "old.pt", {**FULL, "step": 7, "note": "text", "best": None, "score": 1.5})
    read = read_member(path)
    assert (read.format, read.missing) == ("v2_full_parameters", ())
    assert_equal(
        read.parameters,
        {
            "parameters.core.weight": torch.full((1, 2, 3), 2.0),
            "optimizer.upgd.step": torch.tensor([5]),
            "optimizer.upgd.utility.core.weight": torch.full((1, 2, 3), 3.0),
            "observation.mean": torch.zeros(1, 7),
            "observation.var": torch.ones(1, 7),
            "observation.count": torch.tensor([11.0]),
            "reward.moments.mean": torch.zeros(1),
            "reward.moments.var": torch.ones(1),
        },
    )


@pytest.mark.parametrize("part", ["parameters", "optimizer", "observation", "reward"])
def test_a_full_file_that_lacks_a_part_is_refused(tmp_path: Path, part: str) -> None:
    path = saved(tmp_path / "old.pt", {name: value for name, value in FULL.items() if name != part})
    with pytest.raises(CheckpointError, match=rf"^{path}: .*lacks {part}|^{path}: holds no weights"):
        read_member(path)


def test_an_older_policy_lacks_the_observation_statistics_too_unless_it_has_them(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"lacks .*observation \(observation statistics\)"):
        read = read_member(saved(tmp_path / "old.pth", POLICY))
    assert read.missing == ("optimizer", "observation", "reward.moments")
    assert_equal(read.parameters, {"parameters.core.weight": torch.full((1, 2, 3), 2.0)})
    with pytest.warns(UserWarning, match=r"lacks optimizer \(.*\); reward"):
        read = read_member(saved(tmp_path / "with.pt", {**POLICY, "observation": FULL["observation"]}))
    assert read.missing == ("optimizer", "reward.moments")


def test_parameters_and_views_become_plain_tensors_of_their_own(tmp_path: Path) -> None:
    buffer = torch.arange(1000.0)
    weights = {"a": torch.nn.Parameter(torch.ones(1, 2)), "b": buffer[3:6].view(1, 3)}
    with pytest.warns(UserWarning, match="lacks"):
        read = read_member(saved(tmp_path / "old.pt", {**POLICY, "parameters": weights}))
    assert [type(value) for value in read.parameters.values()] == [Tensor, Tensor]
    assert not any(value.requires_grad for value in read.parameters.values())
    assert read.parameters["parameters.b"].untyped_storage().nbytes() == 12


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({**FULL, "checkpoint_format": "v3"}, "checkpoint_format = 'v3': must be one of v1_policy_only, v2_full_parameters"),
        ({**FULL, "checkpoint_format": "v2_full_parameter"}, r"did you mean 'v2_full_parameters'\?"),
        ({"state_dict": FULL["parameters"]}, "checkpoint_format = None"),
        ({**POLICY, "checkpoint_format": ["v1_policy_only"]}, "checkpoint_format = "),
        (torch.ones(1), "checkpoint_format = None"),
        ([1, 2], "checkpoint_format = None"),
        ({**POLICY, "policy": FULL["parameters"]}, r"unknown part 'policy\.core\.weight'.*allowed are parameters, optimizer"),
        ({**POLICY, "parameters": {}}, "holds no weights"),
        ({**POLICY, "parameters": torch.ones(1, 2)}, None),
        ({**POLICY, "parameters": {"a": [torch.ones(1)]}}, r"parameters\.a is a list"),
        ({**POLICY, "parameters": {"a": 3.0}}, r"parameters\.a is a float"),
        ({**POLICY, "parameters": {"a": torch.eye(1).to_sparse()}}, r"parameters\.a is a Tensor: allowed are dense tensors"),
        ({**POLICY, "parameters": {"a": torch.ones(3, 2)}}, r"parameters\.a has shape \[3, 2\]"),
        ({**POLICY, "parameters": {"a": torch.tensor(2.0)}}, r"parameters\.a has shape \[\]"),
        ({**POLICY, "parameters": {"a": torch.ones(0, 2)}}, r"parameters\.a has shape \[0, 2\]"),
    ],
)
def test_any_other_layout_is_refused(tmp_path: Path, content: Any, problem: str | None) -> None:
    path = saved(tmp_path / "odd.pt", content)
    if problem is None:  # a single unnamed weight is a part of one tensor
        with pytest.warns(UserWarning, match="lacks"):
            assert list(read_member(path).parameters) == ["parameters"]
        return
    with pytest.raises(CheckpointError, match=f"^{path}: .*{problem}"):
        read_member(path)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["trap.pt", "trap.pth", "trap.safetensors", "trap"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path, name: str, archive: bool) -> None:
    path, sprung = tmp_path / name, tmp_path / "sprung"
    content = {**FULL, "extra": Trap(sprung)}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=f"^{path}: truncated, (no PyTorch file|or not a safetensors file)"):
        read_member(path)
    assert not sprung.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False)  # the trap does work
    assert sprung.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "trap.pt"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match=f"^{path}: truncated"):
        read_member(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_no_part_of_a_file_passes_for_the_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"member{suffix}"
    if suffix == ".pt":
        torch.save(FULL, path)
    else:
        DistributionalPPO.of(trained()).save(path)
    whole = path.read_bytes()
    read_member(path)
    for length in {0, 1, 7, 8, 20, *range(100, len(whole), max(1, len(whole) // 40)), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"^{path}: truncated"):
            read_member(path)


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors"])
def test_a_missing_file_and_a_folder_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{tmp_path / name}: no such file"):
        read_member(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"^{tmp_path / name}: truncated"):
        read_member(tmp_path / name)


def test_a_file_that_goes_away_while_it_is_read_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = DistributionalPPO.of(trained()).save(tmp_path / "model")
    document = checkpoint.read_document

    def look_and_remove(path: Path, kind: str | None = None) -> dict[str, Any]:
        found = document(path, kind)
        path.unlink()
        return found

    monkeypatch.setattr(checkpoint, "read_document", look_and_remove)
    with pytest.raises(CheckpointError, match=f"^{path}: cannot be read"):
        read_member(path)


def test_files_of_others_and_of_several_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "member.safetensors"
    path.write_bytes(safetensors.torch.save({"parameters.a": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=f"^{path}: a safetensors file, but not one that Hardy wrote"):
        read_member(path)
    trained(seeds=(3, 4)).save(path, {})
    with pytest.raises(CheckpointError, match=rf"^{path}: holds a population with the seeds \[3, 4\]"):
        read_member(path)
    for kind in ("table", "Model"):
        save_tensors(path, {"parameters.a": torch.ones(1)}, {"kind": kind})
        with pytest.raises(CheckpointError, match=f"^{path}: holds a '{kind}'; allowed are model, checkpoint, policy"):
            read_member(path)
    save_tensors(path, {"parameters.a": torch.ones(1)}, {"kind": "policy", "seeds": 3})
    with pytest.raises(CheckpointError, match=f"^{path}: holds a population"):
        read_member(path)


def test_a_full_file_is_read_in_silence(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_member(saved(tmp_path / "old.pt", FULL))
    assert caught == []
