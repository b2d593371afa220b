"""The figures' plans against counts by hand, the launcher with agents that pretend, and both for real."""

import ast
import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import ROOT, load

from analysis import figures, panels
from analysis.runs import BadInput, Series, read_folder
from analysis.scores import Run as Curve
from experiments import __main__ as command_line
from experiments import draw, local, plan, slurm, speeds
from experiments.figures import FIGURES, Figure
from experiments.record import Record, shown_command

SCALES = ("paper", "minatar", "smoke")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --------------------------------------------------------------------------------------------- plans
def runs_of(name, scale="paper", overrides=()):
    return [item for item in plan.make_plan([name], scale, dict(overrides)) if isinstance(item, plan.Run)]


@pytest.mark.parametrize(
    ("name", "paper", "minatar"),
    [
        ("fig2.1", 4 * 4 * 20 * 3, 4 * 4 * 5 * 5),  # agents, batch sizes, games, seeds
        ("fig2.2", 2 * 60 * 3, 2 * 5 * 5),
        ("fig2.5", 2 * 4 * 20 * 3, None),
        ("fig2.8", 3 * 4 * 26 * 6, 3 * 4 * 5 * 6),
        ("fig2.13", 2 * 4 * 7 * 3, 2 * 4 * 2 * 5),
        ("fig2.19", 4 * 4 * 20 * 3, 4 * 4 * 5 * 5),  # DQN, and three components added to it
        ("fig2.21", 3 * 3 * 4 * 20 * 3, 3 * 3 * 4 * 5 * 5),
        ("fig2.22", 4 * 3 * 3, 4 * 5 * 5),
        ("fig2.25", 3 * 2 * 4 * 17 * 5, 3 * 2 * 4 * 5 * 5 + 5),  # and on MinAtar a recording of each game
        ("small-batch", 2 * 2 * 20 * 5, 2 * 2 * 5 * 5),
        ("bbf", 6 * 26 * 3, 6 * 3 * 3),
        ("parallel", 2 * 4 * 10 * 5, 2 * 4 * 5 * 3),
    ],
)
def test_how_many_runs(name, paper, minatar):
    assert len(runs_of(name)) == paper
    assert minatar is None or len(runs_of(name, "minatar")) == minatar


def test_every_figure_of_the_study_is_there():
    assert set(FIGURES) >= {f"fig2.{number}" for number in range(1, 26)} | {"small-batch", "bbf", "parallel"}
    for figure in FIGURES.values():
        assert figure.asks.endswith("?")
        varied = {"agent", *figure.varied, *(["variant"] if figure.variants else [])}
        assert {figure.line, *figure.panels} <= varied
        assert callable(getattr(panels, figure.draw))


@pytest.mark.parametrize("scale", SCALES)
def test_every_agent_accepts_its_flags(scale):
    """And the command line gives them as they are in the plan."""
    seen = set()
    for name, figure in FIGURES.items():
        if figure.atari_only and scale == "minatar":
            continue
        overrides = {"dataset_dir": "/data/{game}"} if name == "fig2.25" and scale == "paper" else {}
        for run in runs_of(name, scale, overrides):
            if (run.agent, run.flags) in seen:
                continue
            seen.add((run.agent, run.flags))
            module = load(ROOT / "agents" / f"{run.agent}.py")
            args = module.tyro.cli(module.Args, args=run.command(Path())[2:])
            assert {flag: getattr(args, flag) for flag, _ in run.flags} == dict(run.flags)
            assert (args.env_id, args.seed, args.exp_name) == (run.env_id, run.seed, run.exp_name)
    assert len(seen) > 50


def test_a_plan_by_hand():
    first, *_, last = runs_of("fig2.1")
    assert (first.agent, first.env_id, first.seed) == ("dqn", "ALE/AirRaid-v5", 1)
    assert dict(first.flags) == {"batch_size": 8, "total_timesteps": 25_000_000}
    assert (last.agent, last.env_id, last.seed) == ("iqn", "ALE/Zaxxon-v5", 3)
    names = {run.exp_name: dict(run.flags) for run in runs_of("fig2.19", "smoke")}
    added = names["rainbow,batch_size=8,distributional=False,prioritized=False,total_timesteps=500"]
    flags = plan.defaults_of("rainbow") | added
    assert (flags["n_step"], flags["prioritized"], flags["distributional"]) == (3, False, False)
    assert flags["learning_rate"] == 2.5e-4
    offline = runs_of("fig2.25", "paper", {"dataset_dir": "/data/{game}/1/replay_logs"})
    assert dict(offline[0].flags)["dataset_dir"] == "/data/Asterix/1/replay_logs"


@pytest.mark.parametrize("scale, ratio, batch_size", [("paper", 2, 32), ("minatar", 1, 8)])
def test_the_heirs_of_spr(scale, ratio, batch_size):
    """Six settings, of three agents; the lines of the figure are where the networks are reset."""
    found = {}
    for run in runs_of("bbf", scale):
        module = load(ROOT / "agents" / f"{run.agent}.py")
        found[run.exp_name] = module.Args(**dict(run.flags))
    assert len(found) == 6
    ratios = [getattr(args, "replay_ratio", None) or args.updates_per_step for args in found.values()]
    assert ratios == [ratio] * 6
    assert {args.batch_size for args in found.values()} == {batch_size}
    with_resets = [args for args in found.values() if getattr(args, "reset_interval", 0)]
    assert len(with_resets) == 4
    assert {args.reset_interval for args in with_resets} == {20_000 * ratio}
    assert {args.schedule_updates for args in with_resets if hasattr(args, "schedule_updates")} == {5_000 * ratio}
    bbf = load(ROOT / "agents" / "bbf.py")
    assert all(tuple(bbf.reset_steps(args)) == FIGURES["bbf"].marks for args in with_resets)


def test_figures_share_runs():
    """A setting is one run, whatever figure it is in, and whether it is named or the agent's default."""
    assert plan.make_plan(["fig2.2"], "paper", {}) == plan.make_plan(["fig2.4"], "paper", {})
    together = plan.make_plan(["fig2.1", "fig2.21"], "minatar", {})
    assert len(together) == 400 + 900 - 3 * 100  # one-step DQN, three-step Rainbow and QR-DQN are in both
    assert len({run.name for run in together}) == len(together)


def test_the_first_seed_comes_first():
    seeds = [item.seed for item in plan.make_plan(["fig2.1", "fig2.16"], "minatar", {})]
    assert seeds == sorted(seeds)


def test_overrides():
    words = ["--no-cuda", "--learning-rate", "1e-3", "--network=nature", "--noisy"]
    overrides = plan.read_overrides(words)
    assert overrides == {"cuda": False, "learning_rate": 1e-3, "network": "nature", "noisy": True}
    run = runs_of("fig2.20", "paper", overrides)[0]
    assert dict(run.flags).items() >= overrides.items()
    with pytest.raises(BadInput, match="dqn has no flag --noisy"):
        plan.check_plan(["fig2.1"], "paper", overrides)
    with pytest.raises(BadInput, match="spr has no flag --width-scale"):  # an agent that only a variant names
        plan.check_plan(["bbf"], "paper", {"width_scale": 1})
    with pytest.raises(BadInput, match="has no flag --batchsize: --batch-size"):
        plan.check_plan(["fig2.1"], "paper", {"batchsize": 8})
    with pytest.raises(BadInput, match="8 is none"):
        plan.read_overrides(["8"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--total-timesteps", "100k"], "--total-timesteps of dqn takes int, not '100k'"),
        (["--total-timesteps", "100,000"], "takes int, not (100, 0)"),
        (["--total-timesteps", "1e5"], "takes int, not 100000.0"),
        (["--total-timesteps"], "takes int, not True"),
        (["--gamma"], "takes float, not True"),
        (["--cuda", "yes"], "takes bool, not 'yes'"),
        (["--network", "impalla"], "takes dopamine, nature, dopamine-x4, impala, not 'impalla'"),
        (["--gamma", "1"], None),
        (["--total-timesteps", "100_000"], None),
    ],
)
def test_values_of_flags(words, said):
    """What an agent would refuse is refused before any run."""
    overrides = plan.read_overrides(words)
    if said:
        with pytest.raises(BadInput, match=re.escape(said)):
            plan.check_plan(["fig2.1"], "paper", overrides)
    else:
        plan.check_plan(["fig2.1"], "paper", overrides)


def test_one_choice_alone(monkeypatch):
    """Of an agent of one's own: a part of its name is not it."""
    args = ast.parse('network: Literal["nature"] = "nature"').body[0]
    monkeypatch.setattr(plan, "flags_of", lambda agent: {"network": args})
    plan.check_value("mine", "network", "nature")
    with pytest.raises(BadInput, match="--network of mine takes nature, not 'nat'"):
        plan.check_value("mine", "network", "nat")


def test_values_that_may_be_missing():
    plan.check_value("cql_offline", "adam_eps", 1e-8)
    plan.check_value("cql_offline", "adam_eps", None)
    plan.check_value("cql_offline", "dataset_dir", "/data/{game}")
    with pytest.raises(BadInput, match=r"--dataset-dir of cql_offline takes str \| None, not True"):
        plan.check_value("cql_offline", "dataset_dir", True)


@pytest.mark.parametrize("scale, left_out", [("paper", 1), ("minatar", 3), ("smoke", 0)])
def test_all_figures_can_be_asked_together(scale, left_out):
    names = plan.all_names(scale)
    assert len(names) == len(FIGURES) - left_out
    plan.check_plan(names, scale, {"cuda": False})


# ------------------------------------------------------------------- a launcher of agents that pretend
AGENT = '''
"""Counts its steps, and does what --network says."""

class Args:
    exp_name: str = "dqn"
    batch_size: int = 32
    total_timesteps: int = 100
    network: str = "well"

import json, os, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name = f"{flags['--env-id'].replace('/', '-')}__{flags['--exp-name']}__{flags['--seed']}__1"
folder = pathlib.Path("runs", name)
folder.mkdir(parents=True, exist_ok=True)
checkpoint = folder / "checkpoint.pt"
args = {name[2:].replace("-", "_"): int(value) if value.isdigit() else value for name, value in flags.items()}
record = {"agent": "dqn", "args": args, "git_commit": "abc"}
(folder / "args.json").write_text(json.dumps(record))
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
with open("starts", "a") as file:
    file.write(f"{flags['--seed']} {step} {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")

def stop(number, frame):
    checkpoint.write_text(str(step))
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
if flags.get("--network") == "ill" and flags["--seed"] == "1":
    sys.exit("its last words")
total = int(flags["--total-timesteps"])
while step < total:
    step += 1
    print(f"1% {step}/{total} [00:00<00:00, 10.0 steps/s, return {step / 2}, epsilon 0]", flush=True)
    time.sleep(float(os.environ.get("PACE", 0)))
(folder / "finished").touch()
'''
TINY = Figure("Does it run?", "curves", ("dqn",), {"batch_size": (8,)}, games=("Pong", "Qbert"), seeds=2, steps=20)


@pytest.fixture
def pretence(tmp_path, monkeypatch):
    """Agents that pretend, and a figure of theirs: two games, two seeds."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents/dqn.py").write_text(AGENT)
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    plan.defaults_of.cache_clear()
    monkeypatch.setitem(FIGURES, "tiny", TINY)
    yield tmp_path
    plan.defaults_of.cache_clear()


def launch(folder="study", jobs=2, threads=1, **overrides):
    folder = Path(folder)
    plan.claim_folder(folder, "paper", overrides)
    lock = local.take_lock(folder)
    launcher = local.Launcher(plan.make_plan(["tiny"], "paper", overrides), folder, jobs, threads, Record(None), lock)
    try:
        return launcher, launcher.run()
    finally:
        os.close(lock)


def starts(folder="study"):
    return [line.split() for line in (Path(folder) / "starts").read_text().splitlines()]


def test_all_runs_once(pretence, capsys):
    launcher, status = launch()
    assert status == 0
    assert len(launcher.done) == len(starts()) == 4
    assert [seed for seed, *_ in starts()] == ["1", "1", "2", "2"]
    assert "runs: 4 done, 0 going on, 0 to come; 0:00:00 left" in capsys.readouterr().out
    assert launch()[1] == 0  # there is nothing left to do
    assert len(starts()) == 4


def test_a_run_that_fails(pretence, capsys):
    """It is tried once more, the others go on, and its last words are reported."""
    launcher, status = launch(network="ill")
    assert status == 1
    assert sorted(seed for seed, *_ in starts()) == ["1"] * 4 + ["2"] * 2
    assert [item.seed for item in launcher.done] == [2, 2]
    output = capsys.readouterr()
    assert output.out.count("failed, and tried once more") == 2
    assert "\n  its last words\n" in output.err
    assert output.err.count("failed: dqn,batch_size=8") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_gone_on_with(pretence, monkeypatch, capsys, number):
    """Every run writes its checkpoint; the same command goes on from there."""
    monkeypatch.setenv("PACE", "0.1")

    def interrupt():
        while len(list(Path("study/runs").glob("*/args.json"))) < 2:
            time.sleep(0.02)
        time.sleep(0.8)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    _, status = launch()
    assert status == 128 + number
    assert "the same command goes on" in capsys.readouterr().out
    checkpoints = [int(path.read_text()) for path in Path("study/runs").glob("*/checkpoint.pt")]
    assert len(checkpoints) == 2
    assert min(checkpoints) > 1
    monkeypatch.setenv("PACE", "0")
    assert launch()[1] == 0
    assert sorted(int(step) for _, step, *_ in starts()) == [0, 0, 0, 0, *sorted(checkpoints)]


def test_threads_and_gpus(pretence, monkeypatch, capsys):
    """Cores are divided among the jobs, and there are as many as fit into the memory; GPUs are dealt out in turn."""
    monkeypatch.setattr(command_line, "count_cores", lambda: 7)
    monkeypatch.setattr(command_line.psutil, "virtual_memory", lambda: SimpleNamespace(available=25e9))
    monkeypatch.setattr(command_line, "draw_all", lambda *_: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert call(monkeypatch, capsys, "run", "tiny", "--folder", "study")[0] == 0
    assert {threads for _, _, threads, _ in starts()} == {"2"}
    assert sorted(gpu for *_, gpu in starts()[:3]) == ["3", "3", "5"]


def test_progress_as_a_log_has_it(pretence):
    job = local.Job(plan.make_plan(["tiny"], "paper", {})[0], pretence, {}, None)
    job.process.wait()
    lines = {
        "0% 0/100 [00:00<?, ? steps/s]": (0, 0.0, ""),
        "12% 1212/100000 [22:20<2:09:24, 11.50 steps/s, return -1.5, epsilon 0.000]": (1212, 11.5, "-1.5"),
        "1% 50/4000 [01:40<2:11:40,  2.00s/ steps, return nan, epsilon 1.000]": (50, 0.5, "nan"),
        "1% 50/4000 [01:40<2:11:40, 20.00 steps/s]": (50, 20.0, ""),
    }
    for line, expected in lines.items():
        job.log.write_text(f"run folder: runs/x (cpu)\n{line}\nstep 50: mean return 1.00 of [1.0]\n")
        assert job.progress() == expected


def test_the_time_that_is_left(pretence):
    """Runs of a kind take as long as those of it that are finished; those of another as long as the mean of all."""
    items = plan.make_plan(["tiny"], "paper", {})
    Path("study").mkdir()
    launcher = local.Launcher(items, Path("study"), 2, 1, Record(None))
    assert launcher.seconds_left() is None
    launcher.speeds[items[0].kind] = [1.0, 4.0]  # Pong: 20 steps take 20 or 5 seconds
    launcher.waiting = [items[0], items[2]]
    assert launcher.seconds_left() == pytest.approx(2 * 12.5 / 2)
    launcher.waiting = [items[1]]  # Qbert
    assert launcher.seconds_left() == pytest.approx(12.5 / 2)
    launcher.going[0] = SimpleNamespace(item=items[0], progress=lambda: (2, 1.0, ""))  # 18 steps to go
    launcher.waiting = []
    assert launcher.seconds_left() == pytest.approx((18 + 18 + 4.5) / 3)  # alone: no job beside it helps


def test_a_run_of_other_flags_is_no_result(pretence):
    """As when a flag of the figure is changed in the middle of a study."""
    assert launch()[1] == 0
    run = runs_of("tiny")[0]
    path = run.result(Path("study")) / "args.json"
    record = json.loads(path.read_text())
    record["args"]["total_timesteps"] = 21
    path.write_text(json.dumps(record))
    assert run.result(Path("study")) is None


def test_a_run_of_another_default_is_no_result(pretence):
    """The agent's file was edited. A flag that is newer than the run, or that it filled in itself, changes nothing."""
    assert launch()[1] == 0
    run = runs_of("tiny")[0]
    (agent,) = Path().glob("**/agents/dqn.py")
    source = agent.read_text()
    flags = "    gamma: float = 0.99\n    v_min: float | None = None\n"
    agent.write_text(source.replace("    batch_size: int", f"{flags}    batch_size: int"))
    plan.defaults_of.cache_clear()
    assert run.result(Path("study"))
    path = run.result(Path("study")) / "args.json"
    record = json.loads(path.read_text())
    record["args"]["v_min"] = -10.0
    path.write_text(json.dumps(record))
    assert run.result(Path("study"))
    record["args"]["gamma"] = 0.9
    path.write_text(json.dumps(record))
    assert run.result(Path("study")) is None


TARGET = Figure("?", "curves", ("dqn",), {"target_network_frequency": (8_000, 2_000)}, line="target_network_frequency")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"line": "batch_size"}, "has batch_size as its line or panels, but no values of it"),
        ({"varied": TARGET.varied | {"n_step": (1, 3)}}, "varies n_step, which is neither its line nor in its panels"),
        ({"agents": ("dqn", "iqn"), "panels": ("target_network_frequency",)}, "varies agent, which is neither"),
        ({"agents": ("dqn", "iqn"), "draw": "gains"}, "has several panels: gains draws one"),
        ({"minatar_varied": {"n_steps": (1,)}}, "dqn has no flag --n-steps: --n-step?"),
        ({"flags": {"target_frequency": 1}}, "dqn has no flag --target-frequency: --target-network-frequency?"),
        ({"variants": {"a": {"n_steps": 1}}}, "dqn has no flag --n-steps: --n-step?"),
        ({"agents": ("mine",)}, "there is no agents/mine.py"),
        ({"panels": ()}, "has no panels"),
        ({"draw": "lines"}, "is drawn as lines: there are curves, games"),
        ({"games": "Pong"}, "there is no list of games 'Pong': there are atari60"),
    ],
)
def test_a_wrong_entry_is_refused_at_once(monkeypatch, capsys, changes, said):
    monkeypatch.setitem(FIGURES, "mine", dataclasses.replace(TARGET, **changes))
    for words in (["figure", "mine", "--scale", "minatar"], ["list", "--scale", "minatar"]):
        status, output = call(monkeypatch, capsys, *words)
        assert (status, output.err.count("\n")) == (2, 1)
        assert output.err.startswith("error: ") and said in output.err
    assert not Path("studies").exists()


def test_the_documented_entry(monkeypatch):
    page = (ROOT / "docs" / "experiments.md").read_text()
    entry = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.setitem(FIGURES, "target", eval("{" + entry + "}", {"Figure": Figure})["target"])
    plan.check_plan(["target"], "paper", {})
    plan.check_plan(["target"], "minatar", {})
    assert len(runs_of("target", "minatar")) == 3 * 5 * 5


def test_an_agent_of_ones_own(tmp_path, monkeypatch):
    """A copy beside the others; on MinAtar it needs a line of flags."""
    (tmp_path / "agents").mkdir()
    source = (ROOT / "agents" / "dqn.py").read_text()
    (tmp_path / "agents" / "mydqn.py").write_text(source)
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    plan.defaults_of.cache_clear()
    monkeypatch.setitem(FIGURES, "mine", dataclasses.replace(TARGET, agents=("mydqn",)))
    plan.check_plan(["mine"], "paper", {})
    with pytest.raises(BadInput, match="give mydqn a line in MINATAR there"):
        plan.check_plan(["mine"], "minatar", {})
    monkeypatch.setitem(plan.MINATAR, "mydqn", plan.MINATAR["dqn"])
    plan.check_plan(["mine"], "minatar", {})
    assert len(runs_of("mine", "minatar")) == 2 * 5 * 5
    (tmp_path / "agents" / "mydqn.py").write_text(source.replace("gamma: float = 0.99", "gamma: float = 1 - 1 / 100"))
    plan.defaults_of.cache_clear()
    with pytest.raises(BadInput, match=r"mydqn.py, line \d+: a flag's default must be a plain value"):
        plan.check_plan(["mine"], "minatar", {})
    monkeypatch.undo()
    plan.defaults_of.cache_clear()


def test_checkpoints_of_finished_runs_are_removed(pretence, monkeypatch):
    """They have the whole replay; with --keep-checkpoints they stay."""
    for keep in (False, True):
        folder = Path(f"study{keep}")
        plan.claim_folder(folder, "paper", {})
        for run in runs_of("tiny"):
            name = folder / f"runs/{run.env_id.replace('/', '-')}__{run.exp_name}__{run.seed}__1"
            name.mkdir(parents=True)
            (name / "checkpoint.pt").write_text("19")
        launcher = local.Launcher(runs_of("tiny"), folder, 2, 1, Record(None), keep_checkpoints=keep)
        assert launcher.run() == 0
        assert len(list(folder.glob("runs/*/checkpoint.pt"))) == (4 if keep else 0)
        slurm.Task(runs_of("tiny"), folder, 1, keep)()  # requeued when all is finished
        assert len(list(folder.glob("runs/*/checkpoint.pt"))) == (4 if keep else 0)


def test_one_process_at_a_time(pretence):
    """While another has the folder, or runs that it left behind when it was killed."""
    Path("study").mkdir()
    code = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from types import SimpleNamespace
        from experiments import local
        lock = local.take_lock(Path("study"))
        run = SimpleNamespace(name="run", command=lambda folder: ["sleep", "60"])
        job = local.Job(run, Path("study"), {{}}, lock)
        print(job.process.pid, flush=True)
        time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    with pytest.raises(BadInput, match="in use by another process"):
        local.take_lock(Path("study"))
    holder.kill()
    holder.wait()
    with pytest.raises(BadInput, match="in use by another process"):
        local.take_lock(Path("study"))
    os.kill(child, signal.SIGKILL)
    time.sleep(0.2)
    os.close(local.take_lock(Path("study")))


def test_what_a_run_needs_comes_first(monkeypatch):
    """An offline run waits for the dataset of its game, and the dataset for the recording."""
    items = plan.make_plan(["fig2.25"], "smoke", {})
    recording, export, *offline = items
    assert (recording.exp_name, export.needs) == ("dqn,recorded", (recording,))
    assert all(item.needs == (export,) for item in offline)
    Path("study").mkdir()
    launcher = local.Launcher(items, Path("study"), 1, 1, Record(None))
    assert launcher.next_item() == recording
    launcher.waiting.remove(recording)
    assert launcher.next_item() is None
    folder = Path("study/runs/MinAtar-Breakout-v1__dqn,recorded__1__1")
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": dict(recording.flags)}))
    (folder / "finished").touch()
    assert launcher.next_item() == export
    launcher.waiting.remove(export)
    data = Path("study/datasets/MinAtar-Breakout-v1/export.json")
    data.parent.mkdir(parents=True)
    data.write_text(json.dumps({"steps": recording.steps - 1}))  # it is being written
    assert launcher.next_item() is None
    data.write_text(json.dumps({"steps": recording.steps}))
    assert launcher.next_item() == offline[0]
    assert [slurm.depth_of(item) for item in (recording, export, offline[0])] == [0, 1, 2]


def test_what_no_run_waits_for_is_left_out():
    """No recording, and no dataset, if the runs that learn from it are in the record."""
    items = plan.make_plan(["fig2.25", "fig2.22"], "smoke", {})
    folder = Path("study")
    assert plan.without_needless(items, folder, Record(None)) == items
    recording, export, *runs = items
    assert not isinstance(export, plan.Run) and recording.is_recording
    record = Record(None)
    record.rows = {shown_command(run): {} for run in runs}
    assert plan.without_needless(items, folder, record) == runs
    waiting = next(run for run in runs if run.agent == "cql_offline")
    del record.rows[shown_command(waiting)]
    assert plan.without_needless(items, folder, record) == items


def test_a_task_of_many_cores(pretence, monkeypatch, capsys):
    """srun does not take over sbatch's number of cores since Slurm 22.05: the script gives it to both."""
    Path("bin").mkdir()
    for name, answer in (("sbatch", "Submitted batch job 12"), ("srun", "")):
        Path("bin", name).write_text(f"#!/bin/sh\necho {answer}\n")
        Path("bin", name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:{os.environ['PATH']}")
    words = ["run", "tiny", "--cluster", "slurm", "--cpus", "4", "--side-by-side", "2"]
    status, output = call(monkeypatch, capsys, *words)
    assert (status, output.err) == (0, "")
    (script,) = Path("studies/paper/slurm").glob("*_submission.sh")
    lines = script.read_text().splitlines()
    assert "#SBATCH --cpus-per-task=8" in lines
    (srun,) = [line for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=8" in srun


# ------------------------------------------------------------------------------------- wrong input
def call(monkeypatch, capsys, *words):
    """The exit status and the output of python -m experiments."""
    monkeypatch.setattr(sys, "argv", ["experiments", *words])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    return end.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "fig2.31"], "there is no figure 'fig2.31': try fig2.3"),
        (["run"], "name a figure, or all"),
        (["run", "fig2.6", "--scale", "minatar"], "MinAtar has not: --scale paper"),
        (["run", "fig2.25"], "fig2.25 needs the DQN Replay Dataset: -- --dataset-dir"),
        (["run", "tiny", "--jobs", "-1"], "--jobs and --threads must not be negative"),
        (["run", "tiny", "--", "--batch-size", "4"], "--batch-size is the figure's own"),
        (["run", "tiny", "--", "--seed", "4"], "--seed is the figure's own"),
        (["figure", "fig2.31"], "there is no figure 'fig2.31'"),
        (["run", "tiny", "--cluster", "slurm"], "sbatch is not here"),
        (["run", "tiny", "--", "--learning", "1"], "dqn has no flag --learning"),
        (["run", "tiny", "--", "--total-timesteps", "1e5"], "--total-timesteps of dqn takes int, not 100000.0"),
        (["run", "tiny", "--record", "thesis"], "thesis is no record of runs, but a folder"),
        (["run", "tiny", "--out", "thesis/thesis.tex"], "thesis/thesis.tex is a file"),
        (["run", "tiny", "--folder", "thesis"], "thesis is not empty, and no folder of experiments"),
        (["run", "tiny", "--folder", "other"], "other has runs of another plan, --scale smoke"),
    ],
)
def test_wrong_input(pretence, monkeypatch, capsys, words, said):
    """One sentence, status 2, and nothing is touched."""
    monkeypatch.setenv("PATH", "")
    Path("thesis").mkdir()
    Path("thesis/thesis.tex").touch()
    plan.claim_folder(Path("other"), "smoke", {})
    status, output = call(monkeypatch, capsys, *words)
    assert status == 2
    assert said in output.err
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert not list(Path().glob("*/runs"))
    assert not list(Path("studies").rglob("plan.json"))


def test_a_folder_that_has_figures_alone(pretence):
    """Drawn from a record, before anything was run here."""
    Path("study/figures").mkdir(parents=True)
    plan.claim_folder(Path("study"), "paper", {})
    assert Path("study/plan.json").exists()


def test_a_plan_of_other_flags(pretence):
    plan.claim_folder(Path("study"), "paper", {"cuda": False})
    plan.claim_folder(Path("study"), "paper", {"cuda": False})
    with pytest.raises(BadInput, match="another plan, --scale paper with"):
        plan.claim_folder(Path("study"), "paper", {})


# --------------------------------------------------------------------------------- records and figures
def fake_curve(value, game, seed, scores):
    frames = np.arange(1, len(scores) + 1) * 10
    return Curve("dqn", game, seed, frames, np.array(scores, float), "", {"batch_size": value})


def test_a_panel_by_hand():
    """On MinAtar 1 is the reference's last score and 0 random play: 3.97 in SpaceInvaders, 0.381 in Breakout."""
    found = []
    for seed in range(1, 6):
        for value, gain in ((8, 2.0), (16, 0.5), (32, 1.0)):
            for game, random in (("MinAtar/SpaceInvaders", 3.97), ("MinAtar/Breakout", 0.381)):
                found.append(fake_curve(value, game, seed, [random, random + 10 * gain]))
    panel = panels.make_panel("dqn", found, "batch_size", [8, 16, 32])
    assert panel.reference.key == (32,)
    assert not panel.few
    colours = [panel.colour(group) for group in panel.study.groups]
    assert colours == ["#0072B2", "#D55E00", "black"]
    drawn = panels.curves([panel], 1)
    lines = [line.get_ydata().tolist() for line in drawn.axes[0].lines]
    np.testing.assert_allclose(lines, [[0, 2], [0, 0.5], [0, 1]], atol=1e-12)
    eight, sixteen = panels.sentences([panel])
    assert "dqn: a run with batch size 8 beats one with batch size 32" in eight
    assert "probability 1.00 [1.00, 1.00] (2 games, 5 seeds): batch size 8 is better, beyond the noise" in eight
    assert "dqn: a run with batch size 16 beats one with batch size 32" in sixteen
    assert "probability 0.00 [0.00, 0.00] (2 games, 5 seeds): batch size 32 is better, beyond the noise" in sixteen


def test_what_is_missing_changes_no_colour():
    """And without the reference there is no panel."""
    found = [fake_curve(value, "MinAtar/Breakout", 1, [1, 5]) for value in (1, 4)]
    for curve in found:
        curve.settings = {"batch_divisor": curve.settings["batch_size"]}
    panel = panels.make_panel("qrdqn", found, "batch_divisor", [1, 2, 4, 8])
    assert [panel.colour(group) for group in panel.study.groups] == [panels.OTHERS[0], panels.OTHERS[2]]
    with pytest.raises(BadInput, match="no run with batch divisor 1"):
        panels.make_panel("qrdqn", found[1:], "batch_divisor", [1, 2, 4, 8])


def test_too_few_runs_are_said():
    found = [fake_curve(value, "MinAtar/Breakout", seed, [1, 5]) for value in (8, 32) for seed in range(4)]
    panel = panels.make_panel("dqn", found, "batch_size", [8, 32])
    assert panel.few
    (sentence,) = panels.sentences([panel])
    assert "too few runs to tell" in sentence


def test_hours_by_hand(monkeypatch):
    """100 and 50 steps per second with batches of 8 and 32: 10 and 20 ms a step, so 13.3 ms with 16."""
    known = {"MinAtar": {"dqn network=dopamine": {"8": 100.0, "32": 50.0}}}
    hours = {}
    for run in runs_of("fig2.1", "minatar"):
        hours[run.agent, dict(run.flags)["batch_size"]] = speeds.hours_of(run, known)
    assert hours["dqn", 8] == pytest.approx(500_000 * 0.010 / 3600)
    assert hours["dqn", 16] == pytest.approx(500_000 * 0.040 / 3 / 3600)
    assert hours["dqn", 64] == pytest.approx(500_000 * 0.1 / 3 / 3600)
    assert hours["qrdqn", 8] is None


def test_hours_of_games_side_by_side():
    """By their number, of 1,000 and 4,000 steps per second with 8 and 32; 128 are taken to be as fast as 32."""
    known = {"MinAtar": {"ppo": {"8": 1000.0, "32": 4000.0}}}
    hours = {}
    for run in runs_of("parallel", "minatar"):
        hours[run.agent, dict(run.flags).get("num_envs", 8)] = speeds.hours_of(run, known)
    assert hours["ppo", 8] == pytest.approx(999_424 / 1000 / 3600)
    assert hours["ppo", 32] == hours["ppo", 128] == pytest.approx(999_424 / 4000 / 3600)
    assert hours["pqn", 8] is None


def test_hours_of_costly_flags():
    """A trial with eight updates a step says nothing about one."""
    run = next(run for run in runs_of("bbf", "minatar") if run.agent == "sr_spr")
    assert speeds.place_of(run) == ("MinAtar", "sr_spr network=dopamine replay_ratio=1")
    assert speeds.hours_of(run, {"MinAtar": {"sr_spr network=dopamine replay_ratio=8": {}}}) is None
    (bbf,) = {speeds.place_of(run) for run in runs_of("bbf", "paper") if run.agent == "bbf"}
    assert bbf == ("ALE", "bbf network=impala replay_ratio=2 width_scale=4")


@pytest.mark.parametrize("scale", SCALES)
def test_every_trial_has_flags_that_exist(scale, monkeypatch, capsys):
    """Of the benchmark that times, and of the agents."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    speed = importlib.import_module("speed")
    asked = []

    def pretend(command, **given):
        args = speed.tyro.cli(speed.Args, args=command[2:])
        (agent,) = args.agents
        network = {} if agent in speed.ON_POLICY else {"network": args.network}
        load(ROOT / "agents" / f"{agent}.py").Args(**network, **args.flags)
        asked.append((agent, args.games[0], network.get("network"), tuple(args.flags.items())))
        rows = [{"batch_size": size, "speeds": {"ours": [1.0] * 5}} for size in (8, 32)]
        args.out.write_text(json.dumps({"results": rows}))
        return SimpleNamespace(returncode=0)

    games_of = plan.games_of
    monkeypatch.setattr(plan, "games_of", lambda figure, scale: games_of(figure, scale)[:1])
    monkeypatch.setattr(plan, "seeds_of", lambda figure, scale: [1])
    monkeypatch.setattr(speeds.subprocess, "run", pretend)
    speeds.list_figures(scale, trial=True)
    assert "?" not in [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("fig")]
    assert len(asked) == len(set(asked))
    if scale == "paper":
        assert ("bbf", "ALE/Pong-v5", "impala", (("replay_ratio", 2), ("width_scale", 4))) in asked
        assert ("qrdqn", "ALE/Pong-v5", "dopamine-x4", (("batch_divisor", 1),)) in asked


def test_a_trial_that_fails(monkeypatch, capsys):
    monkeypatch.setattr(speeds.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    status, output = call(monkeypatch, capsys, "list", "--scale", "smoke", "--trial")
    assert (status, output.err) == (2, "error: dqn network=dopamine could not be timed.\n")


def test_the_list(capsys):
    speeds.list_figures("minatar", trial=False)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("fig2.1 ")]
    assert line.split()[:3] == ["fig2.1", "400", "?"]
    assert FIGURES["fig2.1"].asks in line
    assert "list --scale minatar --trial" in lines[-1]


QUICK = {"cuda": False, "eval_episodes": 0}


@pytest.fixture
def short_study(dqn, tmp_path, monkeypatch):
    """Real runs of a figure on MinAtar, as the launcher names them."""
    figure = Figure("?", "curves", ("dqn",), {"batch_size": (8, 32)}, minatar_games=("Breakout",), minatar_steps=400)
    monkeypatch.setitem(FIGURES, "short", figure)
    folder = Path("study")
    plan.claim_folder(folder, "minatar", {})
    runs = runs_of("short", "minatar", QUICK)
    monkeypatch.chdir(folder)
    for run in runs[:7]:
        dqn.train(dqn.Args(env_id=run.env_id, seed=run.seed, exp_name=run.exp_name, **dict(run.flags)))
    monkeypatch.chdir(tmp_path)
    return figure, runs, folder


def test_a_record_replaces_the_folders(short_study, tmp_path, capsys):
    """Its scores are those of the folders, its runs are not run again, and the same figure comes out."""
    figure, runs, folder = short_study
    record = Record(Path("docs/record.csv"))
    for run in runs[:7]:
        record.add(run, folder)
    again = Record(Path("docs/record.csv"))
    assert [run in again for run in runs] == [True] * 7 + [False] * 3
    with open("docs/record.csv") as file:
        rows = list(csv.DictReader(file))
    words = rows[0]["command"].split()
    assert words[:2] == ["python", "agents/dqn.py"]
    assert words[words.index("--seed") + 1] == "1"
    assert rows[0]["commit"] == json.loads((runs[0].result(folder) / "args.json").read_text())["git_commit"]

    missing = []
    for place in (folder, tmp_path / "elsewhere"):
        found, lacking = draw.find_runs(figure, "minatar", QUICK, place, again)
        missing.append(lacking)
        curves = [(setting, curve.seed, curve.frames.tolist(), curve.scores.tolist()) for setting, curve in found]
        assert len(curves) == 7
        if place == folder:
            expected = curves
        else:
            for one, other in zip(curves, expected, strict=True):
                assert one[:3] == other[:3]
                np.testing.assert_allclose(one[3], other[3], atol=1e-4)
    assert missing == [runs[7:]] * 2
    draw.draw("short", figure, "minatar", QUICK, folder, again, Path("figures"))
    said = capsys.readouterr().out
    assert f"missing are 3 of 10 runs: {runs[7].name}, {runs[8].name}, {runs[9].name}" in said
    assert Path("figures/short.png").stat().st_size > 5_000
    assert Path("figures/short.svg").exists()
    table = Path("figures/short.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[1] for row in table] == ["batch size 8", "batch size 32"]
    assert [row.split(" | ")[-1] for row in table] == ["4 |", "3 |"]


def test_a_figure_with_lines_at_resets(tmp_path):
    """Lines in the order of the variants, the first the reference, and marks at the right frames."""
    figure = FIGURES["bbf"]
    found = []
    for number, variant in enumerate(reversed(figure.variants)):
        setting = {"agent": "bbf", "variant": variant}
        scores = [1.0, 2.0 + number]
        found += [(setting, fake_curve(32, "MinAtar/Breakout", seed, scores)) for seed in (1, 2)]
    (made,) = draw.make_panels(figure, found, plan.values_of(figure, "minatar"))
    assert made.reference.label == "spr"
    drawn = panels.curves([made], 1)
    assert [line.get_label() for line in drawn.axes[0].lines] == list(figure.variants)
    scale, _ = figures.frames_unit(made.study.frames)
    panels.mark_steps(drawn, made.study.frames, [30, 70], 4)
    assert [line.get_xdata()[0] for line in drawn.axes[0].lines[6:]] == [120 / scale, 280 / scale]
    panels.mark_steps(drawn, np.array([4_000_000]), [500_000], 4)  # where the axis counts millions
    assert drawn.axes[0].lines[-1].get_xdata()[0] == 2.0
    rows = list(panels.table([made]))[2:]
    assert [row.split(" | ")[1] for row in rows] == list(figure.variants)
    ends = [float(row.split(" | ")[2]) for row in rows]
    assert ends == sorted(ends, reverse=True)


def test_a_sentence_for_every_other_value():
    curves = [fake_curve(size, "Pong", seed, [1.0, size]) for size in (8, 16, 32, 64) for seed in (1, 2)]
    panel = panels.make_panel("dqn", curves, "batch_size", [8, 16, 32, 64])
    found = [sentence.split(" beats one with")[0] for sentence in panels.sentences([panel])]
    assert found == [f"dqn: a run with batch size {size}" for size in (8, 16, 64)]


@pytest.mark.parametrize("width", [5.6, 8.1])
@pytest.mark.parametrize("label", ["batch size 8", "dqn, target network frequency 1000 †", "exploration steps 250000"])
def test_a_legend_is_as_wide_as_its_figure_at_most(width, label):
    with matplotlib.rc_context(figures.STYLE):
        drawn = matplotlib.figure.Figure(figsize=(width, 4))
        lines = [drawn.add_subplot(1, 4, number).plot([0, 1])[0] for number in range(1, 5)]
        figures.legend(drawn, lines, [label] * 4)
        drawn.canvas.draw()
        place = drawn.legends[0].get_window_extent()
    assert place.x0 >= 0 and place.x1 <= width * drawn.dpi
    assert place.width > width * drawn.dpi / 4  # and no narrower than it need be


def measured_curve(seed, rank, steps=200):
    """A curve with a feature rank every tenth of it: rank, rank + 1, ..."""
    curve = fake_curve(32, "MinAtar/Breakout", seed, np.linspace(1, 5, 20))
    curve.frames = np.arange(1, 21) * steps // 20
    places = np.arange(1, 11) * steps // 10
    curve.series["diagnostics/feature_rank"] = Series(places, rank + np.arange(10.0), np.zeros(10))
    return curve


def test_measures_of_networks():
    """Rows of scores and measures; points in the twentieths that have one; the last in the table, or nothing."""
    figure = FIGURES["parallel"]
    found = []
    for number, variant in enumerate(figure.variants):
        setting = {"agent": "pqn", "variant": variant}
        found += [(setting, measured_curve(seed, 100 * number)) for seed in (1, 2, 3)]
    (made,) = draw.make_panels(figure, found, plan.values_of(figure, "minatar"))
    across, (rows,) = panels.measured(made, made.groups[1], "feature_rank")
    assert across.tolist() == [20 * number for number in range(1, 11)]
    assert rows.tolist() == [[100.0 + number for number in range(10)]] * 3
    drawn = panels.measures([made], 1)
    assert len(drawn.axes) == 1 + len(panels.MEASURES)
    assert [len(axes.lines) for axes in drawn.axes] == [4, 4] + [0] * (len(panels.MEASURES) - 1)
    assert drawn.axes[1].lines[3].get_ydata().tolist() == [300 + number for number in range(10)]
    table = list(panels.measures_table([made]))
    assert [row.split(" | ")[1] for row in table[2:]] == list(figure.variants)
    assert [row.split(" | ")[4] for row in table[2:]] == [f"{rank} [{rank}, {rank}]" for rank in (7, 107, 207, 307)]
    assert {row.split(" | ")[5].strip() for row in table[2:]} == {""}


def test_steps_of_whole_rollouts():
    """Of a million steps 61 roll-outs of 16,384, or 976 of 1,024: the same number, so that scores end together."""
    assert {run.steps for run in runs_of("parallel", "minatar")} == {999_424}
    assert {run.steps for run in runs_of("fig2.1", "minatar")} == {500_000}


def test_a_record_keeps_diagnostics(dqn, monkeypatch):
    """As means of each twentieth."""
    figure = Figure("?", "curves", ("dqn",), {"batch_size": (8,)}, minatar_games=("Breakout",), minatar_steps=400)
    monkeypatch.setitem(FIGURES, "short", figure)
    runs = runs_of("short", "minatar", QUICK | {"learning_starts": 100, "diagnostics_frequency": 13})[:2]
    folder = Path()
    record = Record(Path("docs/record.csv"))
    for run in runs:
        dqn.train(dqn.Args(env_id=run.env_id, seed=run.seed, exp_name=run.exp_name, **dict(run.flags)))
        record.add(run, folder)
    again = Record(Path("docs/record.csv"))
    for run in runs:
        logged = read_folder(run.result(folder), None).series["diagnostics/srank"]
        kept = again.curve(run).series["diagnostics/srank"]
        assert len(logged.steps) > 3
        for step, value in zip(kept.steps.tolist(), kept.values.tolist(), strict=True):
            inside = (logged.steps > step - 20) & (logged.steps <= step)
            assert value == pytest.approx(logged.values[inside].mean(), rel=1e-5)
        assert len(kept.steps) == len({(step - 1) // 20 for step in logged.steps.tolist()})
    Path("docs/record_diagnostics.csv").write_text("other\n")
    with pytest.raises(BadInput, match="is no record of runs"):
        Record(Path("docs/record.csv"))


def test_panels_stand_row_by_row():
    """In the order of the figure's values, whatever runs are there."""
    figure = FIGURES["fig2.25"]
    found = []
    for algorithm in ("cql-c51", "dqn"):
        for n_step in (3, 1):
            setting = {"agent": "cql_offline", "algorithm": algorithm, "n_step": n_step, "batch_size": 32}
            found.append((setting, fake_curve(32, "MinAtar/Breakout", 1, [1, 5])))
    made = draw.make_panels(figure, found, plan.values_of(figure, "minatar"))
    titles = [panel.title for panel in made]
    assert titles == ["n step 1, dqn", "n step 1, cql-c51", "n step 3, dqn", "n step 3, cql-c51"]


def test_a_record_counts_emulator_frames(tmp_path):
    """As run folders do: four a step on Atari, one on MinAtar; twenty points of 25 million steps."""
    for scale, frames in (("paper", 4 * 1_250_000), ("minatar", 25_000)):
        run = runs_of("fig2.1", scale)[0]
        record = Record(tmp_path / "record.csv")
        scores = {f"score_{number}": str(number) for number in range(1, 21)} | {"score_1": ""}
        record.rows = {shown_command(run): scores}  # no game ended in the first twentieth
        curve = record.curve(run)
        assert curve.frames.tolist() == [number * frames for number in range(2, 21)]
        assert curve.scores.tolist() == list(range(2, 21))


def test_a_reader_who_has_seen_enough():
    """As python -m experiments list | head -1."""
    command = f"{sys.executable} -m experiments list --scale smoke | head -1"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("figure")
    assert done.stderr == ""


def test_no_run_is_finished(monkeypatch, capsys):
    status, output = call(monkeypatch, capsys, "figure", "fig2.1", "--scale", "smoke")
    assert status == 1
    assert "fig2.1 cannot be drawn: none of its 16 runs is finished" in output.err


# ----------------------------------------------------------------------------------------- for real
def experiments(*words, folder):
    command = [sys.executable, "-m", "experiments", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


@pytest.mark.long
def test_three_figures(tmp_path):
    """Bars, diagnostics, and offline learning from a recording: run and drawn, and nothing is run twice."""
    names = ["fig2.2", "fig2.22", "fig2.25"]
    done = experiments("run", *names, "--scale", "smoke", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        assert (tmp_path / f"studies/smoke/figures/{name}.png").stat().st_size > 5_000
    assert len(list(tmp_path.glob("studies/smoke/runs/*/finished"))) == 4 + 1 + 24  # the first two share theirs
    again = experiments("run", *names, "--scale", "smoke", folder=tmp_path)
    assert again.returncode == 0
    assert "finished:" not in again.stdout


def state_of(run, folder):
    state = torch.load(run.result(folder) / "checkpoint.pt", weights_only=True)
    return {**state["q_network"], "observations": state["replay"]["observations"], "random": state["random"]["torch"]}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm of one node, this machine."""
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged")):
        pytest.skip("Slurm takes root, and Debian's slurm-wlm and munge")
    if subprocess.run("munge -n | unmunge", shell=True, capture_output=True).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        subprocess.run("chown munge /run/munge; su -s /bin/sh munge -c munged", shell=True, check=True)
    name = os.uname().nodename.split(".")[0]
    folder = tmp_path / "slurm"
    for part in ("state", "spool"):
        (folder / part).mkdir(parents=True)
    lines = f"""
        ClusterName=test
        SlurmctldHost={name}(127.0.0.1)
        SlurmUser=root
        AuthType=auth/munge
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        JobAcctGatherType=jobacct_gather/none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_CPU
        MpiDefault=none
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/slurmd.pid
        SlurmctldLogFile={folder}/slurmctld.log
        SlurmdLogFile={folder}/slurmd.log
        SlurmctldPort=26817
        SlurmdPort=26818
        NodeName={name} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
        PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
    """
    (folder / "slurm.conf").write_text(textwrap.dedent(lines))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    daemons = [subprocess.Popen(["slurmctld", "-D"]), subprocess.Popen(["slurmd", "-D"])]
    wait_for(lambda: "idle" in output_of("sinfo"), 60)
    yield
    subprocess.run(["scancel", "--user", "root"])
    wait_for(lambda: not output_of("squeue", "--noheader"), 60)
    for daemon in daemons:
        daemon.terminate()
        daemon.wait()


def output_of(*words):
    return subprocess.run(words, capture_output=True, text=True).stdout


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)


def stop_and_restart(task, times, *command):
    """Let a task of an array be stopped in the middle, and start again without Slurm's pause."""
    subprocess.run([*command, task], check=True)
    wait_for(lambda: f"Restarts={times}" in output_of("scontrol", "show", "job", task), 90)
    wait_for(lambda: "JobState=PENDING" in output_of("scontrol", "show", "job", task), 60)
    time.sleep(5)  # slurmd takes no job that starts in the second in which it was stopped
    subprocess.run(["scontrol", "update", f"jobid={task}", "StartTime=now"], check=True)


@pytest.mark.long
def test_a_cluster(cluster, tmp_path):
    """A task is cancelled and requeued in the middle; all runs end as those of the local launcher, bit for bit."""
    words = ["run", "small-batch", "--scale", "smoke"]
    flags = ["--", "--total-timesteps", "1200"]
    words += ["--keep-checkpoints"]
    tasks = ["--cluster", "slurm", "--side-by-side", "2", "--memory-gb", "0", "--hours", "0.5"]
    refused = experiments(*words, *tasks, "--partition", "nowhere", "--folder", "nowhere", folder=tmp_path)
    assert refused.returncode == 2
    assert "the cluster rejects the job" in refused.stderr
    assert "invalid partition specified: nowhere" in refused.stderr

    submitted = experiments(*words, *tasks, *flags, folder=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    (array,) = json.loads((tmp_path / "studies/smoke/slurm/arrays.json").read_text())
    assert f"submitted as {array}" in submitted.stdout
    busy = experiments(*words, *flags, folder=tmp_path)
    assert busy.returncode == 2
    assert f"scancel {array}" in busy.stderr

    folder = tmp_path / "studies/smoke"
    first = runs_of("small-batch", "smoke", {"total_timesteps": 1_200})[0]
    log = local.log_of(first, folder)
    wait_for(lambda: list(folder.glob("runs/*/checkpoint.pt")), 120)
    stop_and_restart(f"{array}_0", 1, "scontrol", "requeue")
    assert "stopped at step" in log.read_text()
    wait_for(lambda: log.read_text().count("run folder") == 2, 200)
    stop_and_restart(f"{array}_0", 2, "scancel", "--signal=USR2")  # as Slurm does before the hours are over
    assert log.read_text().count("stopped at step") == 2
    wait_for(lambda: not output_of("squeue", "--noheader"), 400)

    here = experiments(*words, "--folder", "here", "--threads", "1", *flags, folder=tmp_path)
    assert here.returncode == 0, here.stderr
    drawn = experiments("figure", "small-batch", "--scale", "smoke", *flags, folder=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert "missing" not in drawn.stdout
    for run in runs_of("small-batch", "smoke", {"total_timesteps": 1_200}):
        states = [state_of(run, place) for place in (folder, tmp_path / "here")]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), f"{run.name}: {name}"
