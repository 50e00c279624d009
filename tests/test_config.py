"""The settings loader: what it reads, what it refuses, and that a refusal says everything the user needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from hardy.config import ConfigError, Settings, dump_settings, load_settings, nearest, settings_from_dict, tunable, tunables


class Drift(Settings):
    kind: Literal["physics", "permute"]
    every: int = Field(1000, gt=0)
    ranges: dict[str, tuple[float, float]] = Field(default_factory=dict)


class Sgd(Settings):
    name: Literal["sgd"]
    momentum: float = 0.0


class Adam(Settings):
    name: Literal["adam"]
    betas: tuple[float, float] = (0.9, 0.999)


class Part(Settings):
    lr: float = tunable(3e-4, gt=0)
    clip: float | None = Field(0.5, ge=0, le=10)
    epochs: int = Field(4, ge=1)
    hidden: tuple[int, ...] = Field((64, 64), min_length=1)
    adaptive_noise: bool = True


class Whole(Settings):
    seed: int = 0
    total_timesteps: int = 100
    artifacts_dir: Path = Path("artifacts")
    run: str | None = None
    part: Part = Part()
    drift: Drift | None = None
    groups: dict[str, Part] = Field(default_factory=dict)
    inner: Annotated[Sgd | Adam, Field(discriminator="name")] = Sgd(name="sgd")
    scale: float | tuple[float, float] = 1.0
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _long_enough(self) -> Whole:
        if self.drift is not None and self.drift.every > self.total_timesteps:
            raise ValueError(f"drift.every = {self.drift.every}: must be <= total_timesteps = {self.total_timesteps}")
        return self


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(source: Path | dict[str, Any] | None, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        if isinstance(source, dict):
            settings_from_dict(Whole, source)
        else:
            load_settings(Whole, source, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_file_and_overrides_fill_every_kind_of_field(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        seed: 3
        total_timesteps: 100_000
        artifacts_dir: results/here
        run: no
        part: {lr: 1e-3, clip: null, hidden: [32]}
        groups: {actor: {epochs: 2}, critic: {lr: 1}}
        inner: {name: adam, betas: [0.5, 1]}
        scale: [1, 2.5]
        extra: {deep: [1, {a: 12:30}], day: 2024-01-31}
        """,
    )
    loaded = load_settings(
        Whole, path, ["part.epochs=7", "drift.kind=physics", "drift.ranges={length: [0.4, 6e-1]}", "seed=4", "seed=5"]
    )
    assert (loaded.seed, loaded.total_timesteps, loaded.artifacts_dir, loaded.run) == (5, 100_000, Path("results/here"), "no")
    assert loaded.part == Part(lr=0.001, clip=None, hidden=(32,), epochs=7)
    assert loaded.drift == Drift(kind="physics", ranges={"length": (0.4, 0.6)})
    assert loaded.groups == {"actor": Part(epochs=2), "critic": Part(lr=1.0)}
    assert loaded.inner == Adam(name="adam", betas=(0.5, 1.0))
    assert loaded.scale == (1.0, 2.5)
    assert loaded.extra == {"deep": [1, {"a": "12:30"}], "day": "2024-01-31"}


def test_overrides_alone_and_an_override_into_a_null_section(tmp_path: Path) -> None:
    assert load_settings(Whole, None, []) == Whole()
    path = write(tmp_path, "drift: null\nrun: x")
    assert load_settings(Whole, path, ["drift.kind=permute", "drift.every=5", "run="]).drift == Drift(kind="permute", every=5)
    assert load_settings(Whole, path, ["run="]).run is None
    assert load_settings(Whole, path, ["seed=010"]).seed == 10  # not octal
    shared = write(tmp_path, "groups: {a: &x {epochs: 2}, b: *x}")
    assert load_settings(Whole, shared, ["groups.a.epochs=9"]).groups == {"a": Part(epochs=9), "b": Part(epochs=2)}


def test_every_problem_is_listed_once_with_path_value_allowed_and_origin(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1.5\npart:\n  lr: -1\n  hiden: [3]\n  epochs: 0\ndrift: {kind: physcs}\n")
    found = problems(path, "part.adaptive_noise=yes", "groups.a.clip=11")
    assert found == (
        f"seed = 1.5: must be a whole number [{path}:1]",
        f"part.lr = -1: must be a finite number > 0 [{path}:3]",
        f"part.epochs = 0: must be a whole number >= 1 [{path}:5]",
        'part.adaptive_noise = "yes": must be true or false [override]',
        "part.hiden = [3]: unknown key (did you mean 'hidden'?);"
        f" allowed here: lr, clip, epochs, hidden, adaptive_noise [{path}:4]",
        f"drift.kind = \"physcs\": must be one of physics, permute (did you mean 'physics'?) [{path}:6]",
        "groups.a.clip = 11: must be a finite number >= 0 and <= 10 or null [override]",
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lr=1", "lr = 1: unknown key (did you mean 'part.lr'?); allowed here: seed, "),
        ("sed=1", "sed = 1: unknown key (did you mean 'seed'?)"),
        ("seed=true", "seed = true: must be a whole number"),
        ("seed=1e3", "seed = 1000.0: must be a whole number"),
        ("part.lr=true", "part.lr = true: must be a finite number > 0"),
        ("part.lr='1'", 'part.lr = "1": must be a finite number > 0'),
        ("part.lr=.nan", "part.lr = NaN: must be a finite number > 0"),
        ("part.lr=.inf", "part.lr = Infinity: must be a finite number > 0"),
        ("part.lr=", "part.lr = null: must be a finite number > 0"),
        ("part=3", "part = 3: must be a section with the keys lr, clip"),
        ("part.hidden=[]", "part.hidden = []: must be a list of a whole number each, at least 1"),
        ("part.hidden=[1, x]", 'part.hidden.1 = "x": must be a whole number'),
        ("drift={every: 5}", "drift.kind is missing: must be one of physics, permute"),
        (
            "drift={kind: physics, ranges: {length: [1]}}",
            "drift.ranges.length = [1]: must be a list of 2: a finite number, a finite",
        ),
        (
            "drift={kind: physics, ranges: {length: [1, 2, 3]}}",
            "drift.ranges.length = [1, 2, 3]: must be a list of 2: a finite number, a",
        ),
        ("drift={kind: physics, ranges: [1]}", "drift.ranges = [1]: must be a mapping of names to a list of 2"),
        ("inner={name: adamm}", "inner.name = \"adamm\": must be one of sgd, adam (did you mean 'adam'?)"),
        ("inner={}", "inner.name = null: must be given"),
        ("inner={name: adam, momentum: 1}", "inner.momentum = 1: unknown key; allowed here: name, betas"),
        ("scale=x", 'scale = "x": must be a finite number or a list of 2'),
        ("scale=[1, x]", 'scale.1 = "x": must be a finite number'),
        ("run=7", "run = 7: must be text or null"),
        ("artifacts_dir=7", "artifacts_dir = 7: must be a path"),
        ("extra=7", "extra = 7: must be a mapping of names to any value each"),
        ("drift={kind: physics, every: 500}", "drift.every = 500: must be <= total_timesteps = 100"),
        ("seed", "override 'seed': must be section.key=value"),
        ("part..lr=1", "override 'part..lr=1': must be section.key=value"),
        ("seed.x=1", "override 'seed.x=1': seed = 1 is a value, not a section"),
        ("seed=[1", "override 'seed=[1':1: not valid YAML"),
        ("extra={a: 1, a: 2}", "override 'extra={a: 1, a: 2}':1: a is given twice, first on line 1"),
    ],
)
def test_one_bad_value_gives_one_line(override: str, said: str, tmp_path: Path) -> None:
    (line,) = problems(write(tmp_path, "seed: 1"), override)
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": is empty"),
        ("# only a comment\n", ": is empty"),
        ("- 1\n", ": expected settings as 'key: value' lines, not [1]"),
        ("seed: 1\nseed: 2\n", ":2: seed is given twice, first on line 1"),
        ("part:\n  lr: 1\n  clip: 2\n  lr: 3\n", ":4: part.lr is given twice, first on line 2"),
        ("seed: 1\npart: {lr: 1\nrun: x\n", ":3: not valid YAML"),
        ("1: 2\n", ":1: key '1' must be text"),
        ("seed: !!python/object:os.system x\n", ":1: not valid YAML"),
        ("seed: !!int x\n", ": not valid YAML"),
        ("seed: 1\n---\nseed: 2\n", ":2: not valid YAML"),
        ("seed: \x01\n", ": not valid YAML"),
        ("extra: {a: &a [*a]}\n", ":1: extra.a.0 contains itself"),
        ("part: &p\n  lr: 1\n  inner: *p\n", ":1: part.inner contains itself"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    (line,) = problems(path)
    assert line.startswith(f"{path}{said}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1")
    assert problems(tmp_path / "jbo.yaml") == (f"{tmp_path / 'jbo.yaml'}: no such file (did you mean 'job.yaml'?)",)
    assert problems(tmp_path / "none" / "job.yaml") == (f"{tmp_path / 'none' / 'job.yaml'}: no such file",)
    assert problems(tmp_path) == (f"{tmp_path}: is a folder, not a file",)
    (tmp_path / "bytes.yaml").write_bytes(b"seed: \xff")
    assert problems(tmp_path / "bytes.yaml") == (f"{tmp_path / 'bytes.yaml'}: not a UTF-8 text file (byte 6)",)
    assert problems(tmp_path / "job.yaml" / "x")[0].endswith("cannot be read: Not a directory")


def test_python_mappings_are_checked_alike_and_may_hold_settings() -> None:
    assert settings_from_dict(Whole, {"part": Part(epochs=2), "scale": (1, 2)}) == Whole(part=Part(epochs=2), scale=(1.0, 2.0))
    assert problems({"part": {"epoch": 2}}) == (
        "part.epoch = 2: unknown key (did you mean 'epochs'?); allowed here: lr, clip, epochs, hidden, adaptive_noise",
    )


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Whole().seed = 2


numbers = st.floats(allow_nan=False, allow_infinity=False)
parts = st.builds(
    Part,
    lr=st.floats(1e-300, 1e300),
    clip=st.none() | st.floats(0, 10),
    epochs=st.integers(1, 10**20),
    hidden=st.lists(st.integers(), min_size=1, max_size=3).map(tuple),
    adaptive_noise=st.booleans(),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
wholes = st.builds(
    Whole,
    seed=st.integers(),
    run=st.none()
    | st.text()
    | st.sampled_from(["1e-3", "no", "null", "1_0", "0x1f", "12:30", "2024-01-31", "<<", "=", ".5", "~"]),
    part=parts,
    groups=st.dictionaries(st.text(), parts, max_size=2),
    inner=st.builds(Sgd, name=st.just("sgd"), momentum=numbers)
    | st.builds(Adam, name=st.just("adam"), betas=st.tuples(numbers, numbers)),
    scale=numbers | st.tuples(numbers, numbers),
    extra=st.dictionaries(st.text(), values, max_size=3),
)


@settings(deadline=None, max_examples=25)
@given(whole=wholes)
def test_dumped_settings_load_back_equal(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = dump_settings(whole)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    assert load_settings(Whole, path, []) == whole
    assert [line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()][:3] == list(Whole.model_fields)[:3]


def test_dump_is_readable() -> None:
    assert dump_settings(Part(lr=1e-5)) == "lr: 1.0e-05\nclip: 0.5\nepochs: 4\nhidden: [64, 64]\nadaptive_noise: true\n"


def test_tunables_are_found_by_path() -> None:
    class Nested(Settings):
        decay: float = tunable(1.0)
        whole: Whole = Whole(groups={"a": Part(lr=2.0)})
        absent: Part | None = None

    found = tunables(Nested())
    assert found == {"decay": 1.0, "whole.part.lr": 3e-4, "whole.groups.a.lr": 2.0}
    assert all(type(number) is float and math.isfinite(number) for number in found.values())


def test_nearest() -> None:
    assert nearest("CartPol-v1", ["Pendulum-v1", "CartPole-v1"]) == " (did you mean 'CartPole-v1'?)"
    assert nearest("adaptiveupgd", ["UPGD", "AdaptiveUPGD"]) == " (did you mean 'AdaptiveUPGD'?)"
    assert nearest("zzz", ["UPGD"]) == ""
    assert nearest("x", []) == ""
