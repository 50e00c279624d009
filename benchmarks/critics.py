"""Which critic learns best: kinds, numbers of quantiles and twins on several tasks, the final evaluation with an interval.

python -m benchmarks.critics [configs/cartpole_novel.yaml ...] [--seeds 10] [--only 1,51,twin] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.learning import RESULTS, RunSettings, measure
from hardy.config import load_settings

CONFIGS = [Path("configs") / f"{name}.yaml" for name in ("cartpole_novel", "pendulum_novel", "config_train")]
VARIANTS = {
    "scalar": ["critic.kind=scalar"],
    "1": ["critic.quantiles=1"],
    "21": ["critic.quantiles=21"],
    "32": ["critic.quantiles=32"],
    "51": ["critic.quantiles=51"],
    "categorical": ["critic.kind=categorical", "critic.atoms=51"],
    "twin mean": ["critic.twin=true"],
    "twin min": ["critic.twin=true", "critic.aggregation=min"],
    "twin single": ["critic.twin=true", "critic.aggregation=single"],
    "distribution": ["critic.bootstrap=distribution", "critic.huber_threshold=0.05"],
}
"""Overrides of a configuration; numbers are those of quantiles."""


def main() -> None:
    """Measure each variant on each task; the file is written after every one, so that a stop loses little."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="config | section.key=value")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", help=f"variants, separated by commas, of: {', '.join(VARIANTS)}")
    parser.add_argument("--out", default="critics", help="name of the result")
    given = parser.parse_intermixed_args()
    configs = [Path(word) for word in given.words if "=" not in word] or CONFIGS
    overrides = [word for word in given.words if "=" in word]
    chosen = given.only.split(",") if given.only else list(VARIANTS)
    results = []
    for config in configs:
        for name in chosen:
            settings = load_settings(RunSettings, config, [*VARIANTS[name], *overrides])
            found = measure(settings, given.seeds, progress=False)
            results.append({"config": config.stem, "variant": name, "overrides": overrides, **found})
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{given.out}.json").write_text(json.dumps(results, indent=2) + "\n")
            told = "  ".join(
                f"{what} {found[key]:8.1f} ({found[f'{key}_interval'][0]:.1f} to {found[f'{key}_interval'][1]:.1f})"
                for what, key in (("final", "mean"), ("while training", "while_training"))
            )
            print(f"{config.stem:16} {name:14} {told}", flush=True)


if __name__ == "__main__":
    main()
