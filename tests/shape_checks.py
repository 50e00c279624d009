"""The type checker that tests apply to every function of hardy (see `conftest.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype

# Functions are decorated one by one, and outside its class beartype cannot know what Self is; mypy checks it.
check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))


def leave_inner_functions_alone() -> None:
    """Have the import hook pass over functions inside functions, which it would decorate anew each time they are made."""
    decorating = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda f: f if "<locals>" in f.__qualname__ else decorating(f, typechecker=typechecker)

    jaxtyping.jaxtyped = jaxtyped
