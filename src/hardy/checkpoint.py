"""Checkpoint files: tensors and a JSON document in one safetensors file, written so that a kill at any instant loses nothing.

Reading a stranger's file cannot run his code: nothing is unpickled but the tensors of older files, by a reader that refuses
everything else.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hardy.config import nearest
from hardy.population import leaves

FORMAT_VERSION = 1
_METADATA_KEY = "hardy"
_STEP_FILE = re.compile(r"step_(\d+)\.safetensors")
CheckpointFormat = Literal["v2_full_parameters", "v1_policy_only"]
_FORMAT_OF_KIND: dict[str, CheckpointFormat] = {
    "model": "v2_full_parameters",
    "checkpoint": "v2_full_parameters",
    "policy": "v1_policy_only",
}
PICKLED = (".pt", ".pth")
_COPIED = {
    "parameters": "weights",
    "optimizer": "moments, utilities and VGS statistics",
    "observation": "observation statistics",
    "reward.moments": "return normaliser",
    "risk": "multiplier of the CVaR limit",
    "hyper": "hyperparameters",
}
"""Parts of a training state that an exploit copies."""
_OPTIONAL = ("risk", "hyper")
"""Parts without which a file is still whole."""
_OWN = ("reward.running_return", "collector", "timesteps", "generators", "environment")
"""Parts that a member keeps, or that begin anew."""


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def package_version(name: str = "hardy") -> str:
    """The installed version of a distribution, or ``unknown`` where it runs from source without being installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, also after a kill or a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # in the same folder: only within one file system is a rename atomic
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name itself reaches the disk; elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: Path, document: Any) -> None:
    """`write_bytes_atomic` for a JSON document, indented.

    Raises:
        ValueError: a number is not finite, which JSON cannot express.
    """
    write_text_atomic(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write named tensors and a document as one safetensors file, atomically.

    Args:
        path: the file; its folder is made.
        tensors: any shapes, dtypes and devices; they are copied to the CPU.
        document: JSON values. ``kind`` (required) says what the file is for, so that no other kind is loaded in its place;
            the format version and Hardy's version are added.

    Raises:
        ValueError: the document has no ``kind``.
    """
    if not isinstance(document.get("kind"), str):
        raise ValueError(f"document['kind'] = {document.get('kind')!r}: must say what the file is, for instance 'policy'")
    header = {**document, "format_version": FORMAT_VERSION, "hardy_version": package_version()}
    # The format refuses tensors that share storage, as views of one buffer do: each gets its own.
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_bytes_atomic(path, safetensors.torch.save(own, metadata={_METADATA_KEY: json.dumps(header)}))


def load_tensors(path: Path, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors, on the CPU, and the document.

    Args:
        path: the file.
        kind: refuse a file of any other kind.

    Raises:
        CheckpointError: the file is missing, truncated, no safetensors file, not Hardy's, of a newer format or of another kind.
    """
    document = read_document(path, kind)
    return safetensors.torch.load(path.read_bytes()), document


def read_document(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The document of a file alone, quick whatever the size; refuses what `load_tensors` refuses."""
    try:
        with safe_open(str(path), framework="pt") as file:  # checks that every byte of every tensor is there
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({error})") from None
    try:
        document = json.loads(metadata[_METADATA_KEY])
        version = int(document["format_version"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: a safetensors file, but not one that Hardy wrote") from None
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format {version} by Hardy {document.get('hardy_version')}; this Hardy reads up to format"
            f" {FORMAT_VERSION}: use a newer one"
        )
    if kind is not None and document.get("kind") != kind:
        raise CheckpointError(f"{path}: holds a {document.get('kind')!r}, expected a {kind!r}")
    return dict(document)


def flatten_state(state: object, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a training state under its dotted path, ``prefix`` put in front. The tensors are the state's own."""
    return {leaf.path: leaf.tensor for leaf in leaves(state, prefix)}


@torch.no_grad()
def restore_state_(state: object, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy saved tensors into the existing storage of a training state; all or, where anything does not fit, none.

    Args:
        state: a training state of the same structure as the one saved.
        tensors: as `flatten_state` returned them; those whose name does not start with ``prefix`` are left aside.
        prefix: as given to `flatten_state`.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape or dtype; all such are listed.
    """
    here = flatten_state(state, prefix)
    saved = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    problems = [f"{name}: missing in the checkpoint" for name in here.keys() - saved.keys()]
    problems += [f"{name}: in the checkpoint only" for name in saved.keys() - here.keys()]
    for name in here.keys() & saved.keys():
        found, expected = _kind(saved[name]), _kind(here[name])
        if found != expected:
            problems.append(f"{name}: {found} in the checkpoint, {expected} here")
    if problems:
        raise CheckpointError("the checkpoint does not fit this state:\n" + "\n".join(sorted(problems)))
    for leaf in leaves(state, prefix):
        leaf.restore_(saved[leaf.path])


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


@dataclass(frozen=True)
class MemberCheckpoint:
    """What an exploit copies from one member's file.

    Args:
        parameters: tensors ``[1, ...]`` on the CPU by their dotted path in the training state, such as
            ``parameters.core.weight`` or ``observation.mean``. What a member keeps (random generators, episodes, step
            counters) is not among them.
        format: how much the file holds.
        missing: parts of the state that the file lacks, such as ``optimizer``.
    """

    parameters: dict[str, Tensor]
    format: CheckpointFormat
    missing: tuple[str, ...]


def read_member(path: Path) -> MemberCheckpoint:
    """Read what an exploit copies from the file of one member, whoever wrote it.

    Format ``v2_full_parameters``: weights, optimizer state with VGS statistics, observation and return normalisers. Hardy's
    files of kind "model" and "checkpoint", or a ``.pt`` file of one mapping::

        {"checkpoint_format": "v2_full_parameters",
         "parameters": {...}, "optimizer": {...}, "observation": {...}, "reward": {...}}

    Format ``v1_policy_only``: weights, perhaps observation statistics. Hardy's files of kind "policy", or a ``.pt`` file::

        {"checkpoint_format": "v1_policy_only", "parameters": {...}}

    In a ``.pt`` file each part is a mapping, nested or not, of names to tensors whose first axis is one member; ``hyper`` is
    allowed too, and so are plain numbers and texts beside the parts, which are not read. ``.pt`` and ``.pth`` files are read by
    torch's weights-only reader, all others as safetensors: no file can run code.

    Warns:
        UserWarning: the file lacks parts, which are named.

    Raises:
        CheckpointError: the file is missing, truncated, hostile, not of these layouts, or holds several members.
    """
    tensors, format = _read_pickled(path) if path.suffix in PICKLED else _read_own(path)
    copied = {name: tensor for name, tensor in tensors.items() if not _is_of(name, _OWN)}
    for name, tensor in copied.items():
        if not _is_of(name, _COPIED):
            raise CheckpointError(f"{path}: unknown part {name!r}{nearest(name, _COPIED)}; allowed are {', '.join(_COPIED)}")
        if tensor.ndim == 0 or tensor.shape[0] != 1:
            raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)}: one member has a first axis of 1")
    needed = [part for part in _COPIED if part not in _OPTIONAL]
    missing = tuple(part for part in needed if not any(_is_of(name, (part,)) for name in copied))
    if "parameters" in missing:
        raise CheckpointError(f"{path}: holds no weights ('parameters')")
    if missing and format == "v2_full_parameters":
        raise CheckpointError(f"{path}: says {format}, but lacks {', '.join(missing)}")
    if missing:
        lacks = "; ".join(f"{part} ({_COPIED[part]})" for part in missing)
        warnings.warn(f"{path}: {format} lacks {lacks}; a member that takes it over has none of the source's", stacklevel=2)
    return MemberCheckpoint(copied, format, missing)


def _is_of(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.startswith((f"{part}.", f"{part}/")) for part in parts)


def _read_own(path: Path) -> tuple[dict[str, Tensor], CheckpointFormat]:
    try:
        tensors, document = load_tensors(path)
    except (OSError, SafetensorError) as error:  # removed or replaced between two looks at it, by the member that owns it
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in _FORMAT_OF_KIND:
        raise CheckpointError(f"{path}: holds a {kind!r}; allowed are {', '.join(_FORMAT_OF_KIND)}")
    seeds = document.get("seeds", [0])
    if not isinstance(seeds, list) or len(seeds) != 1:
        raise CheckpointError(f"{path}: holds a population with the seeds {seeds}; allowed is a single member")
    return tensors, _FORMAT_OF_KIND[kind]


def _read_pickled(path: Path) -> tuple[dict[str, Tensor], CheckpointFormat]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # damaged or hostile bytes can fail anywhere in the reader, in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: truncated, no PyTorch file, or more than weights in it ({reason})") from None
    formats = sorted(set(_FORMAT_OF_KIND.values()))
    found = content.get("checkpoint_format") if isinstance(content, dict) else None
    if found not in formats:
        hint = nearest(str(found), formats)
        raise CheckpointError(f"{path}: checkpoint_format = {found!r}: must be one of {', '.join(formats)}{hint}")
    parts = {name: value for name, value in content.items() if not isinstance(value, (str, int, float, type(None)))}
    return dict(_flattened(path, parts)), found


def _flattened(path: Path, tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(path, value, f"{name}.")
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            yield name, value.detach().clone(memory_format=torch.contiguous_format)
        else:
            raise CheckpointError(f"{path}: {name} is a {type(value).__name__}: allowed are dense tensors and mappings of them")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs: ``folder/step_000012345.safetensors``."""
    return folder / f"step_{step:09d}.safetensors"


def latest_checkpoint(folder: Path, on_skip: Callable[[CheckpointError], None] | None = None) -> Path:
    """The newest usable checkpoint of a folder, by step number.

    Args:
        folder: where the ``step_<number>.safetensors`` lie.
        on_skip: called with the reason for every newer file that cannot be used.

    Raises:
        CheckpointError: there is none.
    """
    for path in reversed(checkpoints(folder)):
        try:
            read_document(path)
        except CheckpointError as error:
            if on_skip is not None:
                on_skip(error)
        else:
            return path
    raise CheckpointError(f"{folder}: no usable checkpoint (step_<number>.safetensors)")


def prune_checkpoints(folder: Path, keep: int) -> list[Path]:
    """Delete all but the ``keep`` newest usable checkpoints, and what an interrupted write left; returns what was deleted.

    An unusable file does not count as kept, so a usable one always remains.

    Raises:
        ValueError: ``keep`` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: must be at least 1")
    deleted = list(folder.glob(".step_*.safetensors.tmp"))
    kept = 0
    for path in reversed(checkpoints(folder)):
        if kept == keep:
            deleted.append(path)
            continue
        try:
            read_document(path)
            kept += 1
        except CheckpointError:
            continue  # newer than anything usable: left for whoever wants to look at it
    for path in deleted:
        path.unlink()
    return deleted


def checkpoints(folder: Path) -> list[Path]:
    """The ``step_<number>.safetensors`` of a folder, by step, usable or not."""
    return sorted((path for path in folder.glob("step_*") if _STEP_FILE.fullmatch(path.name)), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The step in the name of a checkpoint.

    Raises:
        ValueError: the file has another name.
    """
    match = _STEP_FILE.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: a checkpoint is called step_<number>.safetensors")
    return int(match[1])
