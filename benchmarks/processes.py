"""Commands with a time limit, of which nothing is left running, whatever ends them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE = 5.0
"""Seconds between asking a command to end and ending it."""


class CommandError(Exception):
    """A command did not succeed; the message is one line that says why."""


def call(command: Sequence[str], limit: float, folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end.

    Args:
        command: program and arguments.
        limit: seconds after which it is stopped.
        folder: where it runs.
        environment: variables besides those of this process.

    Returns:
        What it wrote to its standard output.

    Raises:
        CommandError: it failed, or took longer than ``limit``.
    """
    # Files, not pipes: a grandchild that outlives the command would keep a pipe open, and reading it would never end.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise CommandError(f"not done within {limit:g} s") from None
        finally:
            stop(process)
        out.seek(0)
        err.seek(0)
        written, complaints = out.read(), err.read()
    if status != 0:
        raise CommandError(cause(written + "\n" + complaints) or f"ended with status {status}")
    return written


def cause(output: str) -> str:
    """The line of an output that says best why it failed: an exception, an error, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    patterns = (r"[\w.]*(Error|Exception|Interrupt)\b(: |$)", r"error\b", "")
    for pattern in patterns:
        found = [line for line in lines if re.match(pattern, line, re.IGNORECASE if pattern == "error\\b" else 0)]
        if found:
            return found[-1][:200]
    return ""


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End a process that leads a session of its own, with all it started; does nothing where nothing is left."""
    family = [process.pid, *descendants(process.pid)]
    _send(process.pid, family, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    _send(process.pid, family, signal.SIGKILL)
    process.wait()


def _send(leader: int, family: Sequence[int], number: signal.Signals) -> None:
    """A signal to the leader's process group, and to those of its family that have left the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)
    for pid in family[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have, as far as they run."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold anything; the parent is the second word behind it.
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found
