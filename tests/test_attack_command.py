"""``hardy attack``: natural and attacked returns of a run's newest checkpoint, with intervals and a picture."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from hardy import DistributionalPPO, cli, report, run
from hardy.adversary import ATTACKS, Attack
from hardy.config import ConfigError
from hardy.robustness import attacked_returns
from hardy.run import summarise

TINY = """\
total_timesteps: 64
threads: 1
env: {id: PendulumNoVel-v1, num_envs: 4, max_episode_steps: 9}
policy: {memory_size: 8, encoder: [8]}
ppo: {n_steps: 8, n_epochs: 1, n_minibatches: 2}
evaluation: {episodes: 3}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    Path("tiny.yaml").write_text(TINY)
    assert hardy(monkeypatch, "train", "tiny.yaml") == 0
    capsys.readouterr()
    return Path("artifacts") / "tiny-seed0"


def hardy(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hardy", *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 0
    return 0


def test_each_attack_at_each_radius_is_reported_beside_the_natural_return(folder, monkeypatch, capsys) -> None:
    figures: list[Any] = []
    png = report.png
    monkeypatch.setattr(report, "png", lambda figure: (figures.append(figure), png(figure))[1])
    wanted = ["--epsilon", "0.2", "--epsilon", "0.5", "--attack", "random", "--attack", "critic", "--steps", "2"]
    assert hardy(monkeypatch, "attack", str(folder), *wanted, "--seed", "3", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / "attack.json").read_text())
    assert [(row["attack"], row["epsilon"]) for row in printed] == [
        ("natural", 0), ("random", 0.2), ("random", 0.5), ("critic", 0.2), ("critic", 0.5),
    ]  # fmt: skip
    assert all(row["episodes"] == 3 and row["low"] <= row["mean"] <= row["high"] for row in printed)
    assert len({row["mean"] for row in printed}) == 5
    trainer, _ = run._restored(folder)
    natural = summarise(trainer.evaluate(3, seed=3)[0])
    assert printed[0]["mean"] == natural.mean
    expected = summarise(attacked_returns(trainer, Attack("critic", "linf", 2), 0.5, 3, seed=3)[0])
    assert (printed[4]["mean"], printed[4]["low"]) == (expected.mean, expected.low)
    (figure,) = figures
    (axes,) = figure.axes
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["natural", "random", "critic"]
    curves = {
        container.get_label(): container.lines[0].get_xydata()
        for container in axes.containers
        if container.get_label() != "natural"
    }
    np.testing.assert_allclose(
        curves["critic"], [[0, printed[0]["mean"]], [0.2, printed[3]["mean"]], [0.5, printed[4]["mean"]]]
    )
    assert image.imread(folder / "attack.png").shape[1] >= 1200


def test_by_default_all_attacks_are_tried_and_the_strongest_is_named(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "EPSILONS", (0.3,))
    assert hardy(monkeypatch, "attack", str(folder), "--norm", "l2", "--steps", "1", "--episodes", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("natural: return ")
    assert [line.split(" ")[0] for line in lines[1:-1]] == list(ATTACKS)
    means = {line.split(" ")[0]: float(line.split("return ")[1].split(",")[0]) for line in lines[1:-1]}
    strongest = lines[-1].split(" ")[1]
    assert means[strongest] == min(means.values())
    assert f"picture: {folder / 'attack.png'}" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--attack", "pdg"), "--attack pdg: must be one of fgsm, pgd, sgld, random, critic (did you mean 'pgd'?)"),
        (("--epsilon", "0.1", "--epsilon", "inf"), "--epsilon inf: must be a finite number >= 0"),
        (("--norm", "linff"), "--norm linff: must be one of linf, l2 (did you mean 'linf'?)"),
    ],
)
def test_a_mistake_is_one_message(folder, monkeypatch, capsys, arguments, words) -> None:
    assert hardy(monkeypatch, "attack", str(folder), *arguments) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (folder / "attack.png").exists()


def test_from_python_risk_and_adversary_are_sections_like_the_others() -> None:
    model = DistributionalPPO(
        "MlpLstmPolicy", "CartPoleNoVel-v1", risk={"weight": 0.2}, adversary={"epsilon": 0.1}, critic={"huber_threshold": 0.05}
    )
    assert (model.settings.risk.weight, model.settings.adversary.epsilon) == (0.2, 0.1)
    with pytest.raises(ConfigError, match=r"risk\.wieght"):
        DistributionalPPO("MlpLstmPolicy", "CartPoleNoVel-v1", risk={"wieght": 0.2})
