"""What is promised of the package as a whole: what it imports, ships, declares and never does."""

from __future__ import annotations

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import hardy
from hardy.population import member_mean

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "hardy"
FILES = sorted(SOURCE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LONGEST_FILE = 500
LIBRARY = "hardy/_compiled"

# Where the modules imported are not named like the distribution that brings them.
MODULES_OF = {"pydantic": {"pydantic", "pydantic_core"}, "pyyaml": {"yaml"}, "scikit-learn": {"sklearn"}}
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower()


RUNTIME = [name_of(requirement) for requirement in PROJECT["dependencies"]]
DEVELOPMENT = [name_of(requirement) for requirement in PROJECT["optional-dependencies"]["dev"]]
OPTIONAL = {
    name_of(requirement)
    for extra, requirements in PROJECT["optional-dependencies"].items()
    if extra != "dev"
    for requirement in requirements
}


def test_import_is_light_and_leaves_torch_alone() -> None:
    script = """
import sys, torch
torch.manual_seed(3)
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import hardy
after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
assert torch.equal(before[0], after[0]), "import drew random numbers"
assert before[1:] == after[1:], (before[1:], after[1:])
heavy = {"matplotlib", "tensorboard", "typer", "sklearn"} & set(sys.modules)
assert not heavy, f"import hardy imports {sorted(heavy)}"
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=SOURCE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shapes_are_checked_in_the_tests() -> None:
    with pytest.raises(TypeCheckError):
        member_mean(torch.zeros(3, 5), where=torch.ones(2, 5, dtype=torch.bool))


def test_the_tests_reach_no_network() -> None:
    with socket.socket() as channel, pytest.raises(OSError, match="do not use the network"):
        channel.connect(("192.0.2.1", 80))


def test_one_version_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)[0]
    assert hardy.__version__ == PROJECT["version"] == newest


def build(tmp_path: Path, kind: str, **environment: str) -> Path:
    """The "wheel" or "sdist" that setuptools makes of a copy of this tree."""
    tree = tmp_path / "tree"
    shutil.copytree(SOURCE, tree / "src" / "hardy", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    script = f"from setuptools import build_meta; print(build_meta.build_{kind}('..'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / done.stdout.splitlines()[-1]


def compiled_in(held: set[str]) -> list[str]:
    return sorted(name.split(".")[0] for name in held if name.endswith((".so", ".pyd")))


def test_the_wheel_holds_everything(tmp_path: Path) -> None:
    wheel = build(tmp_path, "wheel")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    information = f"hardy-{PROJECT['version']}.dist-info"
    assert {str(file.relative_to(SOURCE.parent)) for file in FILES} <= held
    assert {"hardy/py.typed", f"{information}/licenses/LICENSE", f"{information}/entry_points.txt"} <= held
    compiler = sysconfig.get_config_var("CXX") or "c++"
    assert compiled_in(held) == ([LIBRARY] if shutil.which(compiler.split()[0]) else [])


def test_a_change_of_any_source_of_the_library_builds_it_anew() -> None:
    database = subprocess.run(["make", "-pn", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    (kernel,) = re.findall(r"^KERNEL := (.*)$", database, flags=re.MULTILINE)
    sources = {str(file.relative_to(ROOT)) for file in [*SOURCE.rglob("*.cpp"), *SOURCE.rglob("*.h")]}
    assert sources | {"setup.py"} == set(kernel.split())


def test_a_compiler_that_fails_does_not_stop_the_build(tmp_path: Path) -> None:
    wheel = build(tmp_path, "wheel", CC="false", CXX="false")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {str(file.relative_to(SOURCE.parent)) for file in FILES} <= held
    assert compiled_in(held) == []


def test_the_source_distribution_can_be_compiled(tmp_path: Path) -> None:
    with tarfile.open(build(tmp_path, "sdist")) as archive:
        held = {name.split("/", 1)[-1] for name in archive.getnames()}
    wanted = {str(file.relative_to(ROOT)) for file in [*FILES, *SOURCE.rglob("*.cpp"), *SOURCE.rglob("*.h")]}
    assert wanted | {"setup.py", "pyproject.toml"} <= held


def test_the_licence_is_the_declared_one() -> None:
    assert PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_no_file_is_too_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_FILE


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules imported absolutely; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def pickling(text: str) -> list[str]:
    """What in a source file could read or write a pickle."""
    tree = ast.parse(text)
    torch_io = {"torch.load", "torch.save", "torch.serialization"}
    safe = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and "weights_only=True" in (ast.unparse(keyword) for keyword in node.keywords)
    }
    found = [name for name in imported_modules(tree) if name.split(".")[0] in PICKLING or name in torch_io]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in torch_io and id(node) not in safe:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_nothing_is_pickled(file: Path) -> None:
    assert pickling(file.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    import cloudpickle as c",
        "from joblib import dump",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "import torch\ntorch.load('a', weights_only=safe)",
        "import torch\nkeep = torch.save",
        "from torch import load",
        "from torch.serialization import load",
        "import numpy\nnumpy.load('a', allow_pickle=True)",
    ],
)
def test_planted_pickling_is_found(text: str) -> None:
    assert pickling(text)


def test_the_weights_only_reader_is_allowed() -> None:
    assert pickling("import torch\ntorch.load('a', map_location='cpu', weights_only=True)") == []


def test_what_is_imported_is_declared() -> None:
    known = [*RUNTIME, *OPTIONAL]
    declared = {"hardy", *sys.stdlib_module_names}.union(*(MODULES_OF.get(name, {name}) for name in known))
    imported = {name.split(".")[0] for file in FILES for name in imported_modules(ast.parse(file.read_text()))}
    assert imported <= declared


def test_optional_packages_are_imported_only_inside_the_functions_that_need_them() -> None:
    modules = set[str]().union(*(MODULES_OF.get(name, {name}) for name in OPTIONAL))
    for file in FILES:
        body = ast.Module(
            [node for node in ast.parse(file.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))], []
        )
        found = modules & {name.split(".")[0] for name in imported_modules(body)}
        assert not found or file.name in ("time_kernel.py", "triton_lstm.py"), f"{file}: {found}"


def test_every_dependency_has_its_reason() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", (ROOT / "docs" / "dependencies.md").read_text(), flags=re.MULTILINE)
    assert {name for name, _ in rows} == {*RUNTIME, *OPTIONAL, *DEVELOPMENT}
    assert len(rows) == len(dict(rows))
    assert set(DEVELOPMENT) >= OPTIONAL, "the tests need them"
    assert all(len(why.split()) >= 4 for _, why in rows)


def test_constraints_pin_every_dependency() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    # Exact versions by name: no address, no local label, so that any index serves.
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line) for line in lines), lines
    assert "torch==2.13.0" in lines
    assert {*RUNTIME, *OPTIONAL, *DEVELOPMENT} <= {line.split("==")[0] for line in lines}


def test_every_composition_is_kept_by_a_test_that_exists() -> None:
    tables = (ROOT / "docs" / "composition.md").read_text().split("| pair | kept by |\n|---|---|\n")[1:]
    rows = [line.strip("| ").split(" | ") for table in tables for line in table.split("\n\n")[0].strip().splitlines()]
    assert [row[0] for row in rows if len(row) == 1] == [], "rows without a test"
    for _, tests in rows:
        for file, name in re.findall(r"`([^`:]+)::([^`]+)`", tests) or pytest.fail(f"no test is named in {tests!r}"):
            assert f"def {name}(" in (ROOT / "tests" / file).read_text()
