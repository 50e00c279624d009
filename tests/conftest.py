"""What holds for every test: shapes are checked, one thread, no screen, no network, fixed seeds."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from shape_checks import leave_inner_functions_alone

# All before any hardy module is imported: the hook compiles the checks into them, and matplotlib picks its back end once.
# The variable also reaches the commands that tests start.
leave_inner_functions_alone()
install_import_hook("hardy", "shape_checks.check")
os.environ["MPLBACKEND"] = "Agg"

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Coverage by every case, which takes half as long again; see below."""
    parser.addoption("--trace-every-case", action="store_true", help="count the lines that any case of a test reaches")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a parametrised test only the first case counts for coverage: the others reach nearly the same lines, traced."""
    if config.getoption("--trace-every-case"):
        return
    seen = set()
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in seen:
            item.add_marker("no_cover")
        seen.add(name)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Every test starts from the same global random state, alone or in the suite, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _global_torch_settings() -> Iterator[None]:
    """A test may change the default dtype or the number of threads; the next one does not see it."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the tensors of a test live: the same test on both."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device that PyTorch can use")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to another machine is an error; sockets within this one stay usable."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests do not use the network (connection to {address[0]})")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
