"""The type checker that tests apply to every function of hardy (see `conftest.py`)."""

from __future__ import annotations

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

# Functions are decorated one by one, and outside its class beartype cannot know what Self is; mypy checks it.
check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))
