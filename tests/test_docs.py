"""The documents are true: keys, defaults, commands, links, names, and every example."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.vector import AutoresetMode
from pydantic.fields import FieldInfo
from typer.main import get_command

import hardy
from hardy.cli import app
from hardy.config import ConfigError, Settings, load_settings, settings_from_dict, tunables
from hardy.envs import list_envs, make
from hardy.metrics import METRICS
from hardy.optim.transforms import Gating
from hardy.policy import ActorCritic, CriticSettings, PolicySettings
from hardy.settings import RunSettings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
PREFIX = "<prefix>"
SECTIONS = {name for name, field in RunSettings.model_fields.items() if "Settings" in str(field.annotation)}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(document: Path, *languages: str) -> list[str]:
    """The fenced code blocks in these languages."""
    return [text for language, text in FENCE.findall(document.read_text()) if language in languages]


def prose(document: Path) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", document.read_text())


def table(document: Path, first_columns: str) -> list[list[str]]:
    """The rows of every table whose header starts with these columns, cell by cell."""
    rows: list[list[str]] = []
    inside = False
    for line in document.read_text().splitlines():
        if line.startswith(f"| {first_columns} |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|-"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows, f"{document.name} has no table with the columns {first_columns}"
    return rows


# ------------------------------------------------------------------------------------------------------- configuration


def sections_of(annotation: Any) -> list[tuple[type[Settings], tuple[str, ...]]]:
    """The settings classes that a field can hold, and what stands between its key and theirs."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [(annotation, ())]
    found = [section for part in typing.get_args(annotation) for section in sections_of(part)]
    return [(cls, (PREFIX,)) for cls, _ in found] if typing.get_origin(annotation) is dict else found


def keys(cls: type[Settings], above: tuple[str, ...] = ()) -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key; one that is nothing but a section is left to the keys in it."""
    for name, field in cls.model_fields.items():
        sections = sections_of(field.annotation)
        if field.annotation not in [section for section, _ in sections]:
            yield ".".join((*above, name)), field
        for section, between in sections:
            yield from keys(section, (*above, name, *between))


KEYS = dict(keys(RunSettings))
ROWS = {row[0].strip("`"): row[1:] for row in table(ROOT / "docs" / "configuration.md", "key | default")}
COMPLETE = (
    "env.id=CartPoleNoVel-v1",
    "env.drift={kind: permute, every: 10}",
    "optimizer.overrides={actor: {}}",
    "pbt.hyperparams={optimizer.lr: {low: 0.1, high: 0.2}}",
    "schedule=[{step: 0, values: {optimizer.lr: 0.1}}]",
)
ENTRIES: dict[str, str | int] = {"optimizer.overrides": "actor", "pbt.hyperparams": "optimizer.lr", "schedule": 0}
"""Keys that hold several sections, and which of these a complete file has."""


class Written(Settings):
    """A value as a file has it."""

    value: Any = None


def put(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Write a value under a documented key, into the entry of `ENTRIES` where there may be several."""
    parts = [part for part in key.split(".") if part != PREFIX]
    path: list[str | int] = []
    for depth, part in enumerate(parts, start=1):
        entry = ENTRIES.get(".".join(parts[:depth]))
        path += [part] if entry is None or depth == len(parts) else [part, entry]
    section: Any = tree
    for step in path[:-1]:
        section = section[step]
    section[path[-1]] = value
    return tree


def refusal(key: str, value: Any) -> str:
    """What the loader says about an impossible value."""
    tree = put(load_settings(RunSettings, None, COMPLETE).model_dump(mode="json"), key, value)
    with pytest.raises(ConfigError) as refused:
        settings_from_dict(RunSettings, tree)
    return str(refused.value)


def test_the_keys_are_found_whatever_holds_their_section() -> None:
    assert {"seed", "env.drift", "env.drift.kind", "optimizer.overrides", f"optimizer.overrides.{PREFIX}.noise"} <= set(KEYS)
    assert not {"env", "ppo"} & set(KEYS)


def test_every_key_is_documented_and_no_other() -> None:
    assert list(ROWS) == list(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_documented_key_has_its_default_its_range_and_its_mark(key: str) -> None:
    default, allowed, per_member, meaning = ROWS[key]
    if KEYS[key].is_required():
        assert default == "required"
    else:
        # An empty section is replaced whole; everything else is one value among those of a complete file.
        base = load_settings(RunSettings, None, [text for text in COMPLETE if not text.startswith(f"{key}=")])
        value = load_settings(Written, None, [f"value={default.strip('`')}"]).value
        assert settings_from_dict(RunSettings, put(base.model_dump(mode="json"), key, value)) == base
    assert refusal(key, object()).endswith(f"must be {allowed}")
    assert per_member in ("", "yes")
    assert (per_member == "yes") == (key in tunables(load_settings(RunSettings, None, COMPLETE)))
    assert meaning


@pytest.fixture(scope="module")
def parameters() -> list[str]:
    """Names of the parameters of policies with a shared memory and without."""
    env = make(load_settings(RunSettings, None, COMPLETE).env, [0], num_envs=1)
    spaces = env.observation_space, env.action_space
    shapes = [PolicySettings(shared_memory=shared, head=(2,)) for shared in (True, False)]
    return [name for shape in shapes for name, _ in ActorCritic(*spaces, shape, CriticSettings(), [0]).named_parameters()]


@EVERY_DOCUMENT
def test_keys_and_metrics_named_in_a_text_exist(document: Path, parameters: list[str]) -> None:
    for name in re.findall(r"`([a-z_]+\.[a-z_.<>]+)(?:=[^`]*)?`", prose(document)):
        section, _, rest = name.partition(".")
        if section in SECTIONS and rest not in ("py", "safetensors", "csv", "yaml"):
            assert name in KEYS or any(full.startswith(f"{name}.") for full in parameters), f"{name} is no key"
    groups = {metric.split("/")[0] for metric in METRICS}
    for name in re.findall(r"`([a-z]+/[a-z_]+)`", prose(document)):
        assert name.split("/")[0] not in groups or name in METRICS, f"{name} is no metric"


# ------------------------------------------------------------------------------------------------------------ other tables


def test_the_table_of_optimizer_arguments_is_that_of_the_signature() -> None:
    documented: dict[str, str] = {}
    for names, defaults, _ in table(ROOT / "docs" / "optimizers.md", "argument | default"):
        documented |= zip(re.findall(r"`(.+?)`", names), re.findall(r"`(.+?)`", defaults), strict=True)
    parameters = inspect.signature(hardy.AdaptiveUPGD).parameters
    assert documented == {name: str(p.default) for name, p in parameters.items() if name != "params"}
    base = inspect.signature(hardy.UPGD).parameters
    assert {name: p.default for name, p in base.items()} == {name: parameters[name].default for name in base}
    assert set(parameters) - set(base) == {"beta1", "beta2", "eps"}
    assert all(f"`{gating}`" in (ROOT / "docs" / "optimizers.md").read_text() for gating in typing.get_args(Gating))


def test_the_published_step_factors_are_those_of_the_reference() -> None:
    (row,) = [row for row in table(ROOT / "docs" / "optimizers.md", "open point") if row[0].startswith("factor")]
    found = {name: float(factor) for name, factor in re.findall(r"`(\w+)` (\d)", row[2])}
    optimizers = (hardy.UPGD, hardy.UPGDW, hardy.AdaptiveUPGD)
    real = {cls.__name__: cls([torch.ones(1)], reference=True).defaults["step_factor"] for cls in optimizers}
    assert found == real


def test_the_table_of_tasks_is_the_listing() -> None:
    documented = [
        [cell.strip("`") for cell in row] for row in table(ROOT / "docs" / "environments.md", "id | what the agent sees")
    ]
    listed = [
        [info.id, info.observation, info.action, str(info.max_episode_steps), ", ".join(info.physics)] for info in list_envs()
    ]
    assert documented == listed
    modes = [row[0].strip("`") for row in table(ROOT / "docs" / "environments.md", "mode | what the environment does")]
    assert sorted(modes) == sorted(mode.name for mode in AutoresetMode)


# ---------------------------------------------------------------------------------------------------------------- examples


QUICK = {"n_steps": 16, "n_epochs": 1}


def small(code: str) -> str:
    """An example with every training cut to one iteration and every long loop to some steps."""
    return re.sub(r"range\(\d{3,}\)", "range(30)", re.sub(r"total_timesteps=[\d_]+", "total_timesteps=1", code))


WITH_EXAMPLES = ["README.md", *(f"docs/{name}.md" for name in ("python", "optimizers", "environments"))]
WITH_EXAMPLES += ["docs/PBT_BEST_PRACTICES.md", "docs/UPGD_INTEGRATION.md"]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_python_examples_run_one_after_the_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        hardy.algorithm,
        "settings_from_dict",
        lambda cls, tree: settings_from_dict(cls, {**tree, "ppo": {**tree["ppo"], **QUICK}}),
    )
    examples = blocks(ROOT / name, "python")
    assert examples
    space: dict[str, Any] = {"__name__": "example"}
    for number, example in enumerate(examples):
        exec(compile(small(example), f"{name}, example {number}", "exec"), space)


def test_the_example_of_members_in_processes_runs(tmp_path: Path) -> None:
    (script,) = [text for text in blocks(ROOT / "docs" / "python.md", "python") if "__main__" in text]
    cut = re.sub(r"= 2_048, 2, 10", "= 64, 2, 2", script).replace("threads=1", "threads=1, ppo={'n_steps': 8, 'n_epochs': 1}")
    (tmp_path / "members.py").write_text(cut)
    done = subprocess.run([sys.executable, "-W", "error", "members.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"member [012]: ", done.stdout)


@EVERY_DOCUMENT
def test_yaml_examples_are_configurations_whose_task_exists(document: Path, tmp_path: Path) -> None:
    for number, example in enumerate(blocks(document, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(example)
        settings = load_settings(RunSettings, file)
        env = make(settings.env, [settings.seed], num_envs=2)
        assert env.reset().shape == (2, *env.observation_space.shape)
        env.close()


def shell_lines(document: Path) -> Iterator[list[str]]:
    """The words of every command in the shell examples, comments left out."""
    for block in blocks(document, "sh", ""):
        for line in block.splitlines():
            words = shlex.split(line, comments=True) if line.startswith(("make ", "hardy ")) else []
            if words:
                yield words


def test_the_readme_shows_the_commands() -> None:
    commands = [words[:2] for words in shell_lines(ROOT / "README.md")]
    assert commands[:2] == [["make", "train"], ["make", "test"]]
    assert re.search(r"make train.*make test.*!\[.+\]\(", "".join((ROOT / "README.md").read_text()[:500]), flags=re.DOTALL)
    assert {name for program, name in commands if program == "hardy"} == set(get_command(app).commands)  # type: ignore[attr-defined]


@EVERY_DOCUMENT
def test_commands_in_examples_exist(document: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for program, name, *arguments in shell_lines(document):
        if program == "make":
            assert name in targets
            continue
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= options
        overrides = [word for word in arguments if "=" in word]
        if name in ("train", "config", "pbt"):
            load_settings(RunSettings, ROOT / arguments[0], overrides)
        else:
            assert not overrides


# ------------------------------------------------------------------------------------------------------------------- links


def anchors(document: Path) -> set[str]:
    """What a link may name behind ``#``, as code hosts derive it from headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_DOCUMENT
def test_relative_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = document.parent / path if path else document
        assert file.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{target}: {file.name} has no such heading"


@EVERY_DOCUMENT
def test_tests_named_in_a_text_exist(document: Path) -> None:
    text = document.read_text()
    for file in re.findall(r"tests/(\w+\.py)", text):
        assert (ROOT / "tests" / file).exists(), file
    for file, name in re.findall(r"`(?:tests/)?(\w+\.py)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
