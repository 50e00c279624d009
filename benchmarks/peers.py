"""The libraries that Hardy is measured beside: which versions, what of their work differs, and an environment for each.

Each library lives in a virtual environment of its own, `.venv-bench/NAME`, made when it is first measured.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import CommandError, call

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-bench"
INSTALL_LIMIT = 1800.0
"""Seconds for one installation."""


class SkippedError(Exception):
    """A library cannot be measured here; the message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class Library:
    """A library to measure.

    Attributes:
        name: on the command line and in results.
        package: whose version is the library's.
        module: of the worker, in `benchmarks`.
        requirements: for pip, torch of the version in `constraints.txt`; none means the environment of the caller, which is
            Hardy's own.
        remarks: what differs from the common work.
        constrained: whether `constraints.txt` holds for the dependencies; otherwise only its version of torch does.
        population: whether it trains a population; others train one agent, of whom members in turn are as fast in all.
        environment: variables of its process and of its installation.
        dependencies: installed before ``requirements``, for a library that asks for others than it needs.
        pip_options: for ``requirements`` alone.
    """

    name: str
    package: str
    module: str
    requirements: tuple[str, ...]
    remarks: str
    constrained: bool = False
    population: bool = False
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dependencies: tuple[str, ...] = ()
    pip_options: tuple[str, ...] = ()


HARDY = Library(
    "hardy",
    "hardy",
    "worker_hardy",
    (),
    "exact resets; AdaptiveUPGD with VGS, normalised observations and rewards; a population is trained as one program",
    population=True,
)
PURE = dataclasses.replace(
    HARDY, name="hardy-pure", remarks="the same without its compiled library", environment={"HARDY_COMPILED": "0"}
)
OURS = (HARDY, PURE)
PEERS = (
    Library(
        "sb3-contrib",
        "sb3-contrib",
        "peer_sb3_contrib",
        ("sb3-contrib==2.9.2",),
        "exact resets, by padding; one LSTM for actor and critic instead of its default of two, which is slower",
        constrained=True,
    ),
    Library(
        "rl-games",
        "rl-games",
        "peer_rl_games",
        ("rl-games==1.6.5",),
        "resets inside a sequence cut it for all environments; environments in one process, without Ray; not compiled",
    ),
    Library(
        "sample-factory",
        "sample-factory",
        "peer_sample_factory",
        ("sample-factory==2.1.1",),
        "exact resets, by packed sequences; serial and synchronous, so without experience of older weights",
    ),
    Library(
        "agilerl",
        "agilerl",
        "peer_agilerl",
        ("agilerl==2.58.0", "peft==0.21.2"),
        "exact resets, by padding; no layer in front of the LSTM, which is wider instead; minibatches of equally many "
        "sequences, not steps; a population is trained in turn, without evolution",
        population=True,
    ),
    Library(
        "rllib",
        "ray",
        "peer_rllib",
        ("ray[rllib]==2.60.0", "torch"),
        "exact resets, by splitting and padding; environments and learner in one process",
    ),
    Library(
        "pufferlib",
        # pufferlib 3.0.0 downloads raylib and Box2D from GitHub while pip builds it, and its NO_OCEAN=1 is a NameError; this is
        # a repackaging of its trainer, networks and vectorisation, without the environments in C.
        "pufferlib-core",
        "peer_pufferlib",
        ("pufferlib-core==3.0.23",),
        "no resets inside an unroll, whose state is zero at its start and whose last step has no advantage; truncations are "
        "ignored; sequences are drawn by priority; Adam instead of Muon; CartPole in vectorised NumPy; not compiled, which "
        "was no faster",
        constrained=True,
        # Its wheel is for CUDA and torch 2.9.0: the advantages in C++ are built for the torch that all others have, and never
        # taken from pip's cache, which does not know for which torch they were built.
        dependencies=(
            "torch",
            "setuptools",
            "gymnasium",
            "numpy",
            "rich",
            "psutil==7.2.2",
            "rich-argparse==1.8.0",
            "pyro-ppl==1.9.2",
        ),
        pip_options=("--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-binary", "pufferlib-core"),
        environment={"PUFFERLIB_DISABLE_CUDA": "1"},
    ),
)
LIBRARIES = {library.name: library for library in (*OURS, *PEERS)}
_failed: dict[str, str] = {}
"""Libraries that this process could not install, with the reason."""


def wanted(library: Library) -> dict[str, Any]:
    """What an installation of a library depends on: when that changes, it is installed anew.

    What most libraries have none of is left out, so that their installations from before it existed are kept.
    """
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in constraints if library.constrained or line.startswith("torch==")]
    built = {
        "dependencies": [*library.dependencies],
        "pip_options": [*library.pip_options],
        "environment": {**library.environment},
    }
    return {
        "requirements": [*library.requirements],
        "constraints": kept,
        "python": list(sys.version_info[:2]),
        **(built if built["dependencies"] or built["pip_options"] else {}),
    }


def interpreter(library: Library, reinstall: bool = False, pip_options: tuple[str, ...] = ()) -> Path:
    """The interpreter of a library's own environment, which is made on first use and when its requirements change.

    A failed installation is not tried again by this process, but by the next.

    Args:
        library: of `LIBRARIES`.
        reinstall: whether to install anew in any case.
        pip_options: in front of the requirements.

    Raises:
        SkippedError: the library could not be installed.
    """
    if not library.requirements:
        return Path(sys.executable)
    folder = ENVIRONMENTS / library.name
    record = folder / "installed.json"
    found = json.loads(record.read_text()) if record.is_file() else None
    if reinstall or found != wanted(library):
        failure = (None if reinstall else _failed.get(library.name)) or _install(library, folder, pip_options)
        if failure:
            _failed[library.name] = failure
            raise SkippedError(f"not installed: {failure}")
        record.write_text(json.dumps(wanted(library), indent=2) + "\n")
    return folder / "bin" / "python"


def _install(library: Library, folder: Path, pip_options: tuple[str, ...]) -> str | None:
    """Make the environment and install into it; why that failed, or None."""
    print(f"installing {' '.join(library.requirements)} into {folder.relative_to(folder.parents[1])}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(wanted(library)["constraints"]) + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *pip_options]
    pip += ["-c", str(constraints)]
    try:
        if library.dependencies:
            call([*pip, *library.dependencies], INSTALL_LIMIT, ROOT)
        call([*pip, *library.pip_options, *library.requirements], INSTALL_LIMIT, ROOT, library.environment)
    except CommandError as error:
        return str(error)
    return None
