"""The command line: what it prints, and that a user's mistake ends with one message and exit status 2."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from hardy import cli, list_envs
from hardy.config import dump_settings, load_settings, settings_from_dict
from hardy.settings import RunSettings
from hardy.trainer import Trainer

ROOT = Path(__file__).parents[1]
TINY = """\
total_timesteps: 64
threads: 1
env: {id: CartPoleNoVel-v1, num_envs: 4}
policy: {memory_size: 8, encoder: [8]}
ppo: {n_steps: 8, n_epochs: 1, n_minibatches: 2}
evaluation: {episodes: 2}
"""


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


class Hardy:
    """The command, run in this process and in an empty folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.write("tiny.yaml", TINY)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def __call__(self, *arguments: str) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["hardy", *arguments])
        self.capsys.readouterr()
        code = 0
        with warnings.catch_warnings():  # main shows them its own way, and the tests look at the standard error
            warnings.simplefilter("default")
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0
        return Result(code, *self.capsys.readouterr())

    def refuses(self, *arguments: str, words: list[str]) -> None:
        """One message on the standard error that holds the words, exit status 2, and nothing made."""
        before = sorted(self.folder.rglob("*"))
        code, out, err = self(*arguments)
        assert (code, out) == (2, "")
        plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
        for word in words:
            assert word in plain, plain
        assert "Traceback" not in err
        assert sorted(self.folder.rglob("*")) == before


@pytest.fixture
def hardy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hardy:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    return Hardy(tmp_path, monkeypatch, capsys)


# ----------------------------------------------------------------------------------------------------------- what it does


def test_help_names_every_command(hardy: Hardy) -> None:
    code, out, err = hardy("--help")
    assert (code, err) == (0, "")
    for command in ("train", "resume", "eval", "attack", "config", "envs"):
        assert re.search(rf"\b{command}\b", out)
    assert "CONFIG" in hardy("train", "--help").out
    assert "--json" in hardy("eval", "--help").out


def test_without_a_command_it_explains_itself(hardy: Hardy) -> None:
    code, out, err = hardy()
    assert code == 2
    assert "train" in out + err


def test_version(hardy: Hardy) -> None:
    code, out, _ = hardy("--version")
    assert code == 0
    assert re.fullmatch(r"hardy (\d+\.\d+\.\d+\S*|unknown)\n", out)


def test_train_and_eval(hardy: Hardy) -> None:
    code, out, err = hardy("train", "tiny.yaml", "ppo.n_steps=4", "optimizer.name=UPGDW", "seed=3")
    assert (code, err) == (0, "")
    folder = Path("artifacts") / "tiny-seed3"
    assert f"results: {folder}\n" in out
    assert re.search(r"evaluation: return \d+\.\d, 95 % interval \S+ to \S+, 2 episodes", out)
    assert "64 / 64 steps (100%)" in out  # plain lines, since this is no terminal
    assert "\x1b" not in out
    settings = load_settings(RunSettings, folder / "config.yaml")
    assert (settings.ppo.n_steps, settings.optimizer.name, settings.seed) == (4, "UPGDW", 3)

    code, out, err = hardy("eval", str(folder), "--episodes", "3", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found) == ["mean", "low", "high", "episodes"]
    assert found["episodes"] == 3
    assert found["low"] <= found["mean"] <= found["high"]
    assert hardy("eval", str(folder), "--episodes", "3", "--json").out == out
    code, out, _ = hardy("eval", str(folder), "--episodes", "3")
    assert out == f"return {found['mean']:.1f}, 95 % interval {found['low']:.1f} to {found['high']:.1f}, 3 episodes\n"
    default = json.loads(hardy("eval", str(folder), "--json").out)
    assert default == json.loads((folder / "summary.json").read_text())["evaluation"]

    newest = max((folder / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:200])
    hardy.refuses("eval", str(folder), words=["no usable checkpoint"])
    code, out, err = hardy("resume", str(folder), "total_timesteps=128")
    assert code == 2 and out.startswith("skipped") and "no usable checkpoint" in err


def test_a_finished_run_is_resumed_only_to_go_further(hardy: Hardy) -> None:
    hardy("train", "tiny.yaml")
    folder = str(Path("artifacts") / "tiny-seed0")
    hardy.refuses("resume", folder, words=["total_timesteps = 64", "at 64 already", "larger number"])
    hardy.refuses("resume", folder, "ppo.gama=0.5", words=["ppo.gama", "did you mean 'gamma'"])
    code, out, _ = hardy("resume", folder, "total_timesteps=96")
    assert code == 0
    assert "at 64 steps" in out and "96 / 96 steps (100%)" in out and f"results: {folder}" in out


def test_eval_with_a_broken_newest_checkpoint_says_so_beside_the_json(hardy: Hardy) -> None:
    hardy("train", "tiny.yaml", "checkpoint.every=32")
    newest = max(Path("artifacts/tiny-seed0/checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    code, out, err = hardy("eval", "artifacts/tiny-seed0", "--json")
    assert code == 0
    assert set(json.loads(out)) == {"mean", "low", "high", "episodes"}
    assert err.startswith("warning: skipped") and "step_000000064" in err


def test_config_prints_what_reloads_equal(hardy: Hardy) -> None:
    code, out, err = hardy("config", "tiny.yaml", "ppo.gamma=0.5", "env.drift={kind: permute, every: 1000}")
    assert (code, err) == (0, "")
    hardy.write("resolved.yaml", out)
    settings = load_settings(RunSettings, Path("resolved.yaml"))
    assert settings == load_settings(
        RunSettings, Path("tiny.yaml"), ["ppo.gamma=0.5", "env.drift={kind: permute, every: 1000}"]
    )
    assert settings.ppo.gamma == 0.5 and "beta_utility: 0.999" in out
    assert hardy("config", "resolved.yaml").out == out
    assert not Path("artifacts").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(hardy: Hardy, path: Path) -> None:
    code, out, err = hardy("config", str(path), "threads=1")
    assert (code, err) == (0, "")
    assert "adaptive_noise: true" in out


def test_envs_lists_every_task(hardy: Hardy) -> None:
    code, out, err = hardy("envs")
    assert (code, err) == (0, "")
    for info in list_envs():
        assert info.id in out
        for name in info.physics:
            assert name in out


def test_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "from hardy.cli import main; main()", "train", "missing.yaml"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: missing.yaml: no such file\n")


# ---------------------------------------------------------------------------------------------------- mistakes of the user


@pytest.mark.parametrize("command", ["train", "config"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.n_stepz=3", ["ppo.n_stepz = 3", "unknown key", "did you mean 'n_steps'", "[override]"]),
        ("polciy.memory=gru", ["polciy", "did you mean 'policy'"]),
        ("n_steps=3", ["n_steps = 3", "did you mean 'ppo.n_steps'"]),
        ("ppo.n_steps=many", ['ppo.n_steps = "many"', "must be a whole number >= 1"]),
        ("ppo.n_steps=2.5", ["ppo.n_steps = 2.5", "must be a whole number >= 1"]),
        ("ppo.normalize_advantage=yes", ['ppo.normalize_advantage = "yes"', "must be true or false"]),
        ("ppo.gamma=1.01", ["ppo.gamma = 1.01", "<= 1"]),
        ("optimizer.lr=.nan", ["optimizer.lr = NaN", "finite number > 0"]),
        ("policy.memory=lsmt", ['policy.memory = "lsmt"', "one of none, lstm, gru", "did you mean 'lstm'"]),
        ("policy.encoder=[8, 0]", ["policy.encoder.1 = 0", ">= 1"]),
        ("threads=1000000", ["threads = 1000000", "<= 1024"]),
        ("ppo.n_minibatches=5", ["ppo.n_minibatches = 5", "at most env.num_envs = 4"]),
        ("vgs={estimator: microbatch, microbatches: 3}", ["vgs.microbatches = 3", "at most 2"]),
        ("optimizer.overrides={acter: {noise: false}}", ["optimizer.overrides", "acter", "did you mean 'actor'"]),
        ("env.id=CartPoleNovel-v1", ["env.id = 'CartPoleNovel-v1'", "CartPoleNoVel-v1"]),
        ("env.id=FrozenLake-v1", ["observation space Discrete(16) is not supported"]),
        ("env.id=no_such_module:Thing-v0", ["env.id = 'no_such_module:Thing-v0'", "No module named"]),
        ("env.kwargs={gravity: 3}", ["env.kwargs = {'gravity': 3}", "CartPoleNoVel-v1 takes none"]),
        ("env={id: Acrobot-v1, kwargs: {gravity: 3}}", ["env.id = 'Acrobot-v1'", "{'gravity': 3}", "unexpected keyword"]),
        ("env.drift={kind: physics, every: 9, ranges: {gravty: [1, 2]}}", ["gravty", "gravity"]),
        ("env.drift={kind: physics, every: 9, ranges: {gravity: [2, 1]}}", ["gravity", "low must not exceed high"]),
        ("ppo.n_steps", ["override 'ppo.n_steps'", "section.key=value"]),
        ("ppo.n_steps=[1", ["override 'ppo.n_steps=[1'", "not valid YAML"]),
        ("seed.deep=1", ["seed"]),
    ],
)
def test_an_impossible_setting_is_refused(hardy: Hardy, command: str, override: str, words: list[str]) -> None:
    hardy.refuses(command, "tiny.yaml", override, words=words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("env: {id: CartPoleNoVel-v1\nseed: 1", ["bad.yaml:", "not valid YAML"]),
        ("seed: 1\nseed: 2\nenv: {id: CartPole-v1}", ["bad.yaml:2", "seed is given twice"]),
        ("", ["bad.yaml: is empty"]),
        ("- 1\n- 2", ["bad.yaml: expected settings"]),
        ("seed: 1", ["env is missing"]),
        ("env: {id: CartPole-v1}\nppo:\n  gama: 0.9", ["ppo.gama", "did you mean 'gamma'", "bad.yaml:3"]),
    ],
)
def test_a_bad_file_is_refused(hardy: Hardy, text: str, words: list[str]) -> None:
    hardy.write("bad.yaml", text)
    hardy.refuses("train", "bad.yaml", words=words)


def test_every_problem_is_reported_at_once(hardy: Hardy) -> None:
    hardy.refuses("train", "tiny.yaml", "ppo.gamma=2", "seed=-1", words=["ppo.gamma = 2", "seed = -1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "tinny.yaml"), ["tinny.yaml: no such file", "did you mean 'tiny.yaml'"]),
        (("train", "."), ["is a folder, not a file"]),
        (("config", "binary.yaml"), ["not a UTF-8 text file"]),
        (("train", "tiny.yaml", "artifacts_dir=tiny.yaml"), ["artifacts_dir = 'tiny.yaml'", "no folder can be made"]),
        (("train",), ["Missing argument", "CONFIG"]),
        (("tain", "tiny.yaml"), ["No such command 'tain'"]),
        (("eval", "artifacts/x"), ["artifacts/x: no such folder"]),
        (("resume", "artifacts/x"), ["artifacts/x: no such folder"]),
        (("eval", "tiny.yaml"), ["tiny.yaml: is a file; the folder of a run is needed"]),
        (("resume", "runs/started/config.yaml"), ["is a file; the folder of a run is needed (did you mean 'runs/started'?)"]),
        (("attack", "runs/started/sub/x"), ["sub/x: is a file; the folder of a run is needed (did you mean 'runs/started'?)"]),
        (("eval", "."), ["config.yaml: no such file"]),
        (("eval", "runs/started"), ["runs/started/checkpoints", "no usable checkpoint"]),
        (("resume", "runs/started"), ["runs/started/checkpoints", "no usable checkpoint"]),
        (("eval", "runs/strated"), ["runs/strated: no such folder", "runs in runs are started"]),
        (("eval", "runs/started", "--episodes", "1"), ["--episodes", "2"]),
        (("eval", "runs/started", "--episodes", "some"), ["--episodes", "integer"]),
        (("eval", "runs/started", "--seed", "-1"), ["--seed"]),
    ],
)
def test_what_is_not_there_is_named(hardy: Hardy, arguments: tuple[str, ...], words: list[str]) -> None:
    (hardy.folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    run = hardy.folder / "runs" / "started"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_settings(settings_from_dict(RunSettings, {"env": {"id": "CartPole-v1"}})))
    (run / "sub").mkdir()
    (run / "sub" / "x").write_text("")
    hardy.refuses(*arguments, words=words)


def test_an_interruption_outside_training_is_no_traceback(hardy: Hardy) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    hardy.monkeypatch.setattr(cli.run, "make_trainer", interrupted)
    code, out, err = hardy("train", "tiny.yaml")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("saved", [True, False])
def test_a_second_ctrl_c_says_where_the_run_is_and_whether_it_can_go_on(hardy: Hardy, saved: bool) -> None:
    iterate = Trainer.iterate

    def twice(self: Trainer, total_timesteps: int) -> object:
        if self.timesteps:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return iterate(self, total_timesteps)

    hardy.monkeypatch.setattr(Trainer, "iterate", twice)
    code, out, err = hardy("train", "tiny.yaml", f"checkpoint.every={1 if saved else 10**6}")
    assert (code, err) == (130, "")
    folder = Path("artifacts") / "tiny-seed0"
    assert "press Ctrl-C again to stop at once\n" in out and f"results: {folder}\n" in out
    assert (f"continue with: hardy resume {folder}\n" in out) == saved
    assert ("there is no checkpoint yet" in out) != saved
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


def test_pbt_trains_a_population_and_refuses_a_single_agent(hardy: Hardy) -> None:
    hardy.refuses("pbt", "tiny.yaml", words=["population.size = 1: must be at least 2; add for instance population.size=8"])
    code, out, err = hardy("pbt", "tiny.yaml", "population.size=2", "pbt.interval=32", "pbt.episodes=2")
    assert (code, err) == (0, "")
    for words in ("member", "score", "last exchange", "evaluation: return", "results: artifacts/tiny-seed0"):
        assert words in out
    assert (hardy.folder / "artifacts" / "tiny-seed0" / "population.csv").exists()
    code, out, err = hardy("train", "artifacts/tiny-seed0/schedule.yaml")
    assert (code, err) == (0, "")
    code, out, err = hardy("eval", "artifacts/tiny-seed0", "--json", "--episodes", "3")
    assert code == 0 and json.loads(out)["episodes"] == 3


def test_a_hyperparameter_that_cannot_be_tuned_is_refused_with_those_that_can(hardy: Hardy) -> None:
    spaces = "pbt.hyperparams={ppo.n_epochs: {low: 1, high: 9}}"
    words = ["'ppo.n_epochs' is no tunable number", "allowed are", "optimizer.lr", "ppo.ent_coef", "vgs.alpha"]
    hardy.refuses("pbt", "tiny.yaml", "population.size=2", spaces, words=words)


def test_a_population_that_is_lost_ends_with_one_message(hardy: Hardy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "sound", lambda self: np.zeros(2, dtype=bool))
    code, _, err = hardy("pbt", "tiny.yaml", "population.size=2", "pbt.interval=32")
    assert code == 1 and "no member has finite weights" in err and "Traceback" not in err


def test_threads_can_be_given_to_every_command_that_computes(hardy: Hardy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("hardy.trainer.set_threads", lambda threads, recurrent: seen.append(threads))
    run = "artifacts/tiny-seed0"
    for arguments in (
        ["train", "tiny.yaml", "--threads", "3"],
        ["resume", run, "total_timesteps=96", "--threads", "4"],
        ["eval", run, "--threads", "5"],
        ["attack", run, "--attack", "random", "--epsilon", "0.1", "--episodes", "2", "--threads", "6"],
        ["eval", run],
        ["pbt", "tiny.yaml", "population.size=2", "pbt.episodes=2", "--threads", "7"],
    ):
        code, _, err = hardy(*arguments)
        assert (code, err) == (0, ""), arguments
    assert seen == [3, 4, 5, 6, 4, 7]
    for command in (["train", "tiny.yaml"], ["pbt", "tiny.yaml"], ["resume", run], ["eval", run], ["attack", run]):
        hardy.refuses(*command, "--threads", "0", words=["--threads 0: must be a whole number from 1 to 1024"])
        hardy.refuses(*command, "--threads", "1025", words=["--threads 1025: must be"])
