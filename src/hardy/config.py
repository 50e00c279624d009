"""Settings: the base class of every part's settings, and their loader from YAML and overrides.

Nothing runs before every value has been checked. A `ConfigError` lists all problems at once, one line each, with the key's
full dotted path, the value, what is allowed, the nearest valid name, and where the value came from.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

SettingsClass = TypeVar("SettingsClass", bound="Settings")


def _relax(schema: Any) -> None:
    # YAML has neither tuples nor paths. Only the container becomes lax: its entries are still checked strictly.
    if isinstance(schema, dict):
        if schema.get("type") in ("tuple", "lax-or-strict"):
            schema["strict"] = False
        for value in schema.values():
            _relax(value)
    elif isinstance(schema, list):
        for value in schema:
            _relax(value)


class Settings(BaseModel):
    """Base of every part's settings: frozen, strictly typed, no unknown keys. A list is accepted where a tuple is declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _relax(schema)
        return schema


def tunable(default: float, **constraints: Any) -> Any:
    """A number that becomes a ``[P]`` hyperparameter tensor, which population-based training may change."""
    return Field(default, json_schema_extra={"tunable": True}, **constraints)


class ConfigError(Exception):
    """Settings that cannot be used: every problem found, one line each.

    Args:
        problems: the lines.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


def nearest(name: str, choices: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with the choice closest to ``name``, or an empty string if none is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean '{by_lower[found[0]]}'?)" if found else ""


def load_settings(cls: type[SettingsClass], path: Path | None, overrides: Sequence[str] = ()) -> SettingsClass:
    """Read settings from a YAML file and apply ``section.key=value`` overrides, the last one of a key winning.

    Args:
        cls: the settings to fill.
        path: the file; with ``None`` the defaults and the overrides alone.
        overrides: each a dotted path, ``=``, and a YAML value. A section that is absent or null is created.

    Raises:
        ConfigError: the file cannot be read or parsed, or any key or value is refused.
    """
    origins: dict[tuple[str, ...], str] = {}
    tree = {} if path is None else _read_file(path, origins)
    problems = [problem for override in overrides if (problem := _apply_override(tree, override, origins))]
    return _validate(cls, tree, origins, problems)


def settings_from_dict(cls: type[SettingsClass], mapping: Mapping[str, Any]) -> SettingsClass:
    """Settings from nested mappings, checked and reported as a file is.

    Raises:
        ConfigError: any key or value is refused.
    """
    return _validate(cls, dict(mapping), {}, [])


def dump_settings(settings: Settings) -> str:
    """YAML that loads back to an equal object, keys in the order of declaration."""
    values = settings.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=120)


def tunables(settings: Settings) -> dict[str, float]:
    """Every `tunable` number by its full dotted path; sections that are ``None`` have none."""
    found: dict[str, float] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("tunable"):
            found[name] = float(value)
        sections = value if isinstance(value, dict) else {"": value}
        for key, section in sections.items():
            if isinstance(section, Settings):
                prefix = f"{name}.{key}." if key else f"{name}."
                found |= {prefix + path: number for path, number in tunables(section).items()}
    return found


# ---------------------------------------------------------------------------------------------------------------- YAML

_SCALARS = (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)
"""Plain scalars as in YAML 1.2: 1e-3 is a number; ``no``, ``on``, 12:30 and 2024-01-31 are text, not a trap."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (the library declares it as an instance variable)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    for _face in (_Loader, _Dumper):
        _face.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))
_Dumper.add_representer(list, lambda dumper, v: dumper.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))


def _read_file(path: Path, origins: dict[tuple[str, ...], str]) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError([f"{path}: is a folder, not a file"])
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError([f"{path}: no such file{nearest(path.name, siblings)}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not a UTF-8 text file (byte {error.start})"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    problems: list[str] = []
    tree = _parse(text, str(path), origins, problems)
    if tree is None and not problems:
        problems = [f"{path}: is empty: expected settings as 'key: value' lines"]
    elif not isinstance(tree, dict) and not problems:
        problems = [f"{path}: expected settings as 'key: value' lines, not {_show(tree)}"]
    if problems:
        raise ConfigError(problems)
    return dict(tree)


def _parse(text: str, source: str, origins: dict[tuple[str, ...], str], problems: list[str]) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _scan(node, (), source, origins, problems, {})
        return None if problems else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problems.append(f"{source}{line}: not valid YAML: {error.problem or error.context}")
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"{source}: not valid YAML: {str(error).splitlines()[0]}")
    return None


def _scan(
    node: Any,
    path: tuple[str, ...],
    source: str,
    origins: dict[tuple[str, ...], str],
    problems: list[str],
    seen: dict[int, bool],
) -> None:
    """Note the line of every key and refuse a key that stands twice in one mapping, which YAML readers silently accept."""
    if seen.get(id(node)):
        problems.append(f"{source}:{node.start_mark.line + 1}: {'.'.join(path)} contains itself")
    if id(node) in seen:  # an alias: its keys are known
        return
    seen[id(node)] = True
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _scan(item, (*path, str(index)), source, origins, problems, seen)
    first_line: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        line = key.start_mark.line + 1
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            problems.append(f"{source}:{line}: key {key.value!r} must be text: put it in quotes")
            continue
        here = (*path, key.value)
        if key.value in first_line:
            problems.append(f"{source}:{line}: {'.'.join(here)} is given twice, first on line {first_line[key.value]}")
        first_line.setdefault(key.value, line)
        origins[here] = f"{source}:{line}"
        _scan(value, here, source, origins, problems, seen)
    seen[id(node)] = False


def _apply_override(tree: dict[str, Any], override: str, origins: dict[tuple[str, ...], str]) -> str | None:
    """Write one override into ``tree``; returns the problem, if there is one."""
    name, equals, text = override.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path):
        return f"override '{override}': must be section.key=value"
    problems: list[str] = []
    value = _parse(text, f"override '{override}'", {}, problems)
    if problems:
        return problems[0]
    section = tree
    for depth, key in enumerate(path[:-1], start=1):
        inner = section.get(key)
        if inner is not None and not isinstance(inner, dict):
            return f"override '{override}': {'.'.join(path[:depth])} = {_show(inner)} is a value, not a section"
        section[key] = section = dict(inner or {})  # a copy: YAML aliases share one mapping
    section[path[-1]] = value
    origins[path] = "override"
    return None


# ---------------------------------------------------------------------------------------------------------- validation

_Options = list[tuple[Any, tuple[Any, ...]]]
"""What a place accepts: (annotation, constraints) of each alternative."""


def _validate(
    cls: type[SettingsClass], tree: dict[str, Any], origins: dict[tuple[str, ...], str], problems: list[str]
) -> SettingsClass:
    try:
        settings = cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems + _problems(cls, tree, origins, error)) from None
    if problems:
        raise ConfigError(problems)
    return settings


def _problems(cls: type[Settings], tree: Any, origins: dict[tuple[str, ...], str], error: ValidationError) -> list[str]:
    by_path: dict[tuple[str, ...], tuple[Any, Any]] = {}
    for item in error.errors(include_url=False):
        path, value = _locate(tree, item)
        by_path.setdefault(path, (item, value))
    # An alternative of a union that did not fit reports the whole section beside the entry that is really wrong.
    deepest = [path for path in by_path if not any(other[: len(path)] == path for other in by_path if len(other) > len(path))]
    return [_line(cls, tree, path, *by_path[path], origins) for path in deepest]


def _locate(tree: Any, item: Any) -> tuple[tuple[str, ...], Any]:
    """The path in the user's data (pydantic's own also names union branches) and the value found there."""
    path: list[str] = []
    value = tree
    for part in item["loc"]:
        if isinstance(value, Settings) and isinstance(part, str) and part in type(value).model_fields:
            value = getattr(value, part)
        elif (isinstance(value, Mapping) and part in value) or (
            isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value)
        ):
            value = value[part]
        else:
            continue
        path.append(str(part))
    if item["type"] == "missing" and isinstance(item["loc"][-1], str):  # else a list that is too short
        path.append(str(item["loc"][-1]))
    return tuple(path), value


def _line(
    cls: type[Settings], tree: Any, path: tuple[str, ...], item: Any, value: Any, origins: dict[tuple[str, ...], str]
) -> str:
    name, kind = ".".join(path), item["type"]
    options = _options_at(cls, tree, path)
    parent = _options_at(cls, tree, path[:-1])
    given = f"{name} = {_show(value)}: " if name else ""
    if kind == "extra_forbidden":
        known = [key for annotation, _ in parent if _is_section(annotation) for key in annotation.model_fields]
        elsewhere = [other for other in _known_paths(cls) if other != name and other.rpartition(".")[2] == path[-1]]
        hint = nearest(path[-1], known) or (f" (did you mean '{elsewhere[0]}'?)" if elsewhere else "")
        said = f"{given}unknown key{hint}; allowed here: {', '.join(known)}"
    elif kind == "missing" and isinstance(item["loc"][-1], str):
        said = f"{name} is missing: must be {_describe(options)}"
    elif kind in ("value_error", "assertion_error"):
        said = f"{given}{item['ctx']['error']}"
    elif kind.startswith("union_tag"):
        tags = [tag.strip().strip("'") for tag in item["ctx"].get("expected_tags", "").split(",") if tag.strip()]
        key = item["ctx"]["discriminator"].strip("'")
        tag = value.get(key) if isinstance(value, Mapping) else None
        allowed = f"one of {', '.join(tags)}" if tags else "given: it says which kind of section this is"
        said = f"{name}.{key} = {_show(tag)}: must be {allowed}{nearest(str(tag), tags)}"
    elif options:
        choices = [str(choice) for annotation, _ in options for choice in _choices(annotation)]
        hint = nearest(value, choices) if isinstance(value, str) else ""
        said = f"{given}must be {_describe(options)}{hint}"
    else:
        said = f"{given}{item['msg']}"
    return said + _origin(path, origins)


def _origin(path: tuple[str, ...], origins: dict[tuple[str, ...], str]) -> str:
    for depth in range(len(path), 0, -1):
        if path[:depth] in origins:
            return f" [{origins[path[:depth]]}]"
    return ""


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _choices(annotation: Any) -> tuple[Any, ...]:
    origin: Any = get_origin(annotation)
    return get_args(annotation) if origin is Literal else ()


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _unwrap(annotation: Any, constraints: Iterable[Any]) -> _Options:
    origin: Any = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        flat = [one for item in extra for one in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _unwrap(inner, (*constraints, *flat))
    if origin in (Union, types.UnionType):
        return [option for member in get_args(annotation) for option in _unwrap(member, constraints)]
    return [(annotation, tuple(constraints))]


def _options_at(cls: type[Settings], tree: Any, path: tuple[str, ...]) -> _Options:
    options: _Options = [(cls, ())]
    value = tree
    for part in path:
        options = [child for annotation, _ in options for child in _children(annotation, part)]
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, (list, tuple)):
            value = value[int(part)]
        else:
            value = getattr(value, part, None)
        meant = [annotation for annotation, _ in options if _is_section(annotation) and _fits(annotation, value)]
        options = [option for option in options if not meant or not _is_section(option[0]) or option[0] in meant]
    return options


def _children(annotation: Any, part: str) -> _Options:
    origin: Any = get_origin(annotation)
    args = get_args(annotation)
    if _is_section(annotation):
        field = annotation.model_fields.get(part)
        return _unwrap(field.annotation, field.metadata) if field else []
    if origin is tuple and part.isdigit():
        entries = args[:1] if args[-1] is Ellipsis else args[int(part) : int(part) + 1]
        return [option for entry in entries for option in _unwrap(entry, ())]
    return _unwrap(args[-1], ()) if args and origin in (dict, list) else []


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a section can be the one meant: among sections told apart by a Literal field, the one that the data names."""
    if not isinstance(value, Mapping):
        return True
    choices = {name: _choices(field.annotation) for name, field in annotation.model_fields.items() if name in value}
    return all(value[name] in allowed for name, allowed in choices.items() if allowed)


def _known_paths(cls: type[Settings], above: tuple[type[Settings], ...] = ()) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield name
        for annotation, _ in _unwrap(field.annotation, ()):
            if _is_section(annotation) and annotation not in (*above, cls):
                yield from (f"{name}.{path}" for path in _known_paths(annotation, (*above, cls)))


_PLAIN: dict[Any, str] = {bool: "true or false", str: "text", type(None): "null", Path: "a path", Any: "any value"}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="), ("multiple_of", "a multiple of"))


def _describe(options: _Options) -> str:
    return " or ".join(dict.fromkeys(_describe_one(*option) for option in options))


def _describe_one(annotation: Any, constraints: tuple[Any, ...]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    found = [(sign, getattr(item, name, None)) for item in constraints for name, sign in _BOUNDS]
    bounds = [f"{sign} {bound:g}" for sign, bound in found if bound is not None]
    limits = f" {' and '.join(bounds)}" if bounds else ""
    least = next((item.min_length for item in constraints if getattr(item, "min_length", None)), 0)
    if annotation is int:
        return f"a whole number{limits}"
    if annotation is float:
        return f"a finite number{limits}"
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in args)}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: {', '.join(_describe(_unwrap(arg, ())) for arg in args)}"
    if origin in (list, tuple):
        return f"a list of {_describe(_unwrap(args[0], ()))} each" + (f", at least {least}" if least else "")
    if origin is dict:
        return f"a mapping of names to {_describe(_unwrap(args[1], ()))} each"
    if _is_section(annotation):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    plain = _PLAIN.get(annotation, str(annotation))
    return f"{plain} of length >= {least}" if least else plain
