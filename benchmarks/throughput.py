"""Training speed of Hardy beside sb3-contrib's RecurrentPPO: same task, same network, same number of updates, same run.

The work: velocity-masked CartPole, linear 128 and LSTM 128, unroll 128, 4 epochs of 4 minibatches, float32. Both libraries
run alternately (A B A B …), each repeat in a fresh process, so that a machine that slows down slows both. What counts is
environment steps per second over whole iterations, rollout and update together; the first iteration warms up.

    python -m benchmarks.throughput [--out NAME] [--envs 8 64] [--threads 2] [--repeats 5] [--only hardy|sb3-contrib]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PEER_ENVIRONMENT = ROOT / ".venv-bench"
PEER_REQUIREMENT = "sb3-contrib==2.9.2"
LIBRARIES = ("sb3-contrib", "hardy")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a worker is asked to do; it travels to the worker as JSON."""

    num_envs: int
    threads: int
    iterations: int
    seed: int
    num_steps: int = 128
    hidden: int = 128
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 3e-4
    quantiles: int = 1
    """Of Hardy's critic; one gives exactly the peer's network of 132,867 weights."""
    warmup: int = 1
    """Iterations that are not measured; at least one."""


def peer_python() -> Path:
    """The interpreter of the peer's own environment, which is made on first use and when the requirements change."""
    python = PEER_ENVIRONMENT / "bin" / "python"
    stamp = PEER_ENVIRONMENT / ".installed"
    wanted = PEER_REQUIREMENT + "\n" + (ROOT / "constraints.txt").read_text()
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing {PEER_REQUIREMENT} into {PEER_ENVIRONMENT.name}", flush=True)
        venv.create(PEER_ENVIRONMENT, clear=True, with_pip=True)
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "-qq",
            "--disable-pip-version-check",
            "-c",
            str(ROOT / "constraints.txt"),
        ]
        subprocess.run([*install, PEER_REQUIREMENT], check=True)
        stamp.write_text(wanted)
    return python


def measure(library: str, work: Work) -> dict[str, Any]:
    """One repeat in a fresh process.

    Raises:
        RuntimeError: the worker failed; the message holds what it wrote.
    """
    ours = library == "hardy"
    python, module = (Path(sys.executable), "worker_hardy") if ours else (peer_python(), "peer_sb3_contrib")
    environment = os.environ | {"OMP_NUM_THREADS": str(work.threads), "MKL_NUM_THREADS": str(work.threads)}
    command = [str(python), "-m", f"benchmarks.{module}", json.dumps(dataclasses.asdict(work))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{library} failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def compare(num_envs: int, threads: int, repeats: int, steps: int, quantiles: int, libraries: list[str]) -> dict[str, Any]:
    """Alternate the libraries ``repeats`` times at one size; medians, and the ratio of Hardy to the peer."""
    iterations = max(steps // (num_envs * Work.num_steps), 2)
    runs: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
    for repeat in range(repeats):
        for library in libraries:
            result = measure(library, Work(num_envs, threads, iterations, seed=repeat, quantiles=quantiles))
            runs[library].append(result)
            print(
                f"N = {num_envs:3d}, {threads} threads, repeat {repeat + 1}/{repeats}: {library:12s}"
                f"{result['steps_per_second']:9.0f} steps/s, episodes of {result['mean_episode_length']:.0f} steps",
                flush=True,
            )
    speed = {library: [result["steps_per_second"] for result in results] for library, results in runs.items()}
    row: dict[str, Any] = {
        "num_envs": num_envs,
        "threads": threads,
        "iterations": iterations,
        "quantiles": quantiles,
        "median": {library: statistics.median(values) for library, values in speed.items()},
        "runs": runs,
    }
    if len(libraries) == len(LIBRARIES):
        ratios = [ours / peers for ours, peers in zip(speed["hardy"], speed["sb3-contrib"], strict=True)]
        row["ratio"] = {
            "of_medians": row["median"]["hardy"] / row["median"]["sb3-contrib"],
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return row


def report(rows: list[dict[str, Any]], host: dict[str, Any]) -> None:
    """Print machine, versions and one line per size."""
    print(f"\n{host['processor']}, {host['cores']} cores, {host['system']}")
    for library, runs in rows[0]["runs"].items():
        print(f"{library}: {runs[0]['parameters']} parameters;", ", ".join(f"{k} {v}" for k, v in runs[0]["versions"].items()))
    for row in rows:
        line = ", ".join(f"{library} {median:.0f} steps/s" for library, median in row["median"].items())
        if "ratio" in row:
            line += ", ratio {of_medians:.2f} ({lowest:.2f} to {highest:.2f})".format(**row["ratio"])
        print(f"N = {row['num_envs']:3d}, {row['threads']} threads: {line}")


def main() -> None:
    """Read the arguments, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="throughput", help="name of the JSON file under benchmarks/results/ (throughput)")
    parser.add_argument("--envs", type=int, nargs="+", default=[8, 64], help="environments N (8 64)")
    parser.add_argument("--threads", type=int, default=2, help="threads per process (2)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each library and size (5)")
    parser.add_argument("--steps", type=int, default=40_000, help="environment steps measured per repeat (40000)")
    parser.add_argument("--quantiles", type=int, default=1, help="of Hardy's critic; 1 is the peer's network (1)")
    parser.add_argument("--only", choices=LIBRARIES, help="measure one library alone")
    arguments = parser.parse_args()
    libraries = [arguments.only] if arguments.only else list(LIBRARIES)
    rows = [
        compare(n, arguments.threads, arguments.repeats, arguments.steps, arguments.quantiles, libraries)
        for n in arguments.envs
    ]
    host = machine()
    report(rows, host)
    path = RESULTS / f"{Path(arguments.out).stem}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": host, "rows": rows}, indent=2) + "\n")
    print(f"saved {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
