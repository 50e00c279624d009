"""A file of hardy imports only from layers below its own, never from a sibling unit of the same layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "hardy"

# A unit is a module or a package directly under hardy. The files of one package may import one another.
LAYERS = {
    0: ("config", "population", "compiled", "parallel", "profiling", "splitmix", "graphs", "interrupts", "allocator"),
    1: ("ops", "optim", "nn", "envs", "checkpoint", "metrics", "console", "lineage", "figures", "minibatch"),
    2: ("policy", "adversary", "report", "population_report", "pbt"),
    3: ("rollout",),
    4: ("ppo", "device_rollout"),
    5: ("settings",),
    6: ("trainer",),
    7: ("algorithm", "evolution", "robustness"),
    8: ("run", "bench"),
    9: ("cli",),
}
LAYER_OF = {unit: layer for layer, units in LAYERS.items() for unit in units}
PUBLIC_API = "__init__"


def unit_of(file: Path, source: Path) -> str:
    return file.relative_to(source).with_suffix("").parts[0]


def package_of(file: Path, source: Path) -> tuple[str, ...]:
    return ("hardy", *file.relative_to(source).parent.parts)


def imported_units(file: Path, source: Path) -> Iterator[tuple[int, str]]:
    """Line and unit of every import of hardy in ``file``: in functions, under TYPE_CHECKING and relative ones too."""
    for node in ast.walk(ast.parse(file.read_text())):
        modules: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            modules = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = package_of(file, source)
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # "from hardy import nn" names the unit after "import".
            modules = [(*base, alias.name) for alias in node.names] if base == ("hardy",) else [base]
        for module in modules:
            if module[0] == "hardy":
                yield getattr(node, "lineno", 0), module[1] if len(module) > 1 else PUBLIC_API


def violations(source: Path) -> list[str]:
    found = []
    for file in sorted(source.rglob("*.py")):
        unit, name = unit_of(file, source), file.relative_to(source)
        if unit == PUBLIC_API:
            continue
        if unit not in LAYER_OF:
            found.append(f"{name}: {unit} has no layer")
            continue
        for line, target in imported_units(file, source):
            if target == PUBLIC_API:
                found.append(f"{name}:{line}: imports the public API")
            elif target not in LAYER_OF:
                found.append(f"{name}:{line}: imports {target}, which has no layer")
            elif target != unit and LAYER_OF[target] >= LAYER_OF[unit]:
                found.append(f"{name}:{line}: layer {LAYER_OF[unit]} imports {target} of layer {LAYER_OF[target]}")
    return found


def test_hardy_keeps_its_layers() -> None:
    assert list(SOURCE.rglob("*.py")), f"no source under {SOURCE}"
    assert violations(SOURCE) == []


def test_the_table_names_no_unit_twice() -> None:
    assert len(LAYER_OF) == sum(len(units) for units in LAYERS.values())


def plant(source: Path, file: str, text: str) -> Path:
    path = source / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return source


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("ops/returns.py", "from hardy.policy import Policy", "ops/returns.py:1: layer 1 imports policy of layer 2"),
        ("ops/returns.py", "import hardy.policy", "ops/returns.py:1: layer 1 imports policy of layer 2"),
        ("ops/returns.py", "import math, hardy.policy as p", "ops/returns.py:1: layer 1 imports policy of layer 2"),
        ("ops/returns.py", "from hardy import policy", "ops/returns.py:1: layer 1 imports policy of layer 2"),
        ("ops/returns.py", "from ..policy import Policy", "ops/returns.py:1: layer 1 imports policy of layer 2"),
        ("ops/returns.py", "from .. import policy", "ops/returns.py:1: layer 1 imports policy of layer 2"),
        ("ops/returns.py", "from hardy.nn.linear import Linear", "ops/returns.py:1: layer 1 imports nn of layer 1"),
        ("metrics.py", "from .checkpoint import save", "metrics.py:1: layer 1 imports checkpoint of layer 1"),
        ("population.py", "def f():\n    from hardy import cli", "population.py:2: layer 0 imports cli of layer 9"),
        ("config.py", "if TYPE_CHECKING:\n    from .nn import X", "config.py:2: layer 0 imports nn of layer 1"),
        ("trainer.py", "from hardy import DistributionalPPO", "trainer.py:1: imports DistributionalPPO, which has no layer"),
        ("trainer.py", "import hardy", "trainer.py:1: imports the public API"),
        ("trainer.py", "from hardy.utils import f", "trainer.py:1: imports utils, which has no layer"),
        ("utils.py", "", "utils.py: utils has no layer"),
        ("extras/deep/more.py", "", "extras/deep/more.py: extras has no layer"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, found: str) -> None:
    assert violations(plant(tmp_path, file, text)) == [found]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("__init__.py", "from hardy.algorithm import DistributionalPPO"),
        ("ops/returns.py", "from hardy.population import member_sum\nfrom . import quantiles\nfrom .quantiles import loss"),
        ("ops/deep/returns.py", "from ..quantiles import loss\nfrom ...population import member_sum"),
        ("cli.py", "import torch\nfrom hardy import algorithm, run\nimport hardy.console"),
    ],
)
def test_an_import_from_below_is_no_violation(tmp_path: Path, file: str, text: str) -> None:
    assert violations(plant(tmp_path, file, text)) == []
