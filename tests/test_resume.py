"""A run is never lost: stopped or killed at any moment and resumed, it ends as if nothing had been, bit for bit."""

import ast
import contextlib
import itertools
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ONLINE, Bomb, check_same, contents, in_call, load, logged, make_args, stop_in_step, stopped

from analysis.runs import read_folder


# ---- runs of a size for a test
def small(module, **flags):
    """The flags of a run that has all that a checkpoint holds: games, updates, diagnostics, a ring that is full."""
    own = {
        "total_timesteps": 300,
        "buffer_size": 180,
        "n_step": 3,
        "eval_episodes": 2,
        "eval_frequency": 120,
        "diagnostics_frequency": 140,
    }
    if hasattr(module.Args, "n_tau"):
        own.update(n_tau=8, n_target_tau=8, n_policy_tau=8)  # faster
    if hasattr(module.Args, "reset_interval"):
        own.update(reset_interval=50)  # the networks are reset after steps 52, 103, 154 and 205
    return make_args(module, **(own | flags))


WHOLE = {}


@pytest.fixture
def whole(tmp_path_factory):
    """Trains without an interruption and returns the folder; the same flags only once."""

    def train(module, **flags):
        key = repr((module.__name__, flags))
        if key not in WHOLE:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("whole"))
                WHOLE[key] = module.train(small(module, **flags)).absolute()
        return WHOLE[key]

    return train


def stop_in_evaluation(module, patch, step):
    """After the first game of the evaluation of this step."""
    reset = module.reset

    def spied(envs, seed, stream, episode):
        if (stream, episode) == (step, 1):
            module.STOPPED_BY.append(signal.SIGTERM)
        return reset(envs, seed, stream, episode)

    patch.setattr(module, "reset", spied)


def stop_at_once(module, patch):
    module.STOPPED_BY.append(signal.SIGTERM)


def resumed(module, folder, **flags):
    return module.train(small(module, resume=str(folder), **flags))


def there_is(pattern):
    return lambda: list(Path("runs").glob(pattern))


def newest():
    """When the last checkpoint was written."""
    return [path.stat().st_mtime_ns for path in there_is("*/checkpoint.pt")()]


# ---- stopped and resumed
def test_stopped_and_resumed(agent, whole):
    """Before the first update, between two, and when the ring is full."""
    folder = stopped(agent, small(agent), stop_in_step, 57)
    stopped(agent, small(agent, resume=str(folder)), stop_in_step, 80)
    stopped(agent, small(agent, resume=str(folder)), stop_in_step, 91)
    resumed(agent, folder)
    check_same(whole(agent), folder)
    assert len(list(Path("runs").iterdir())) == 1
    expected = read_folder(whole(agent), None).series  # the analysis' own reader agrees
    for tag, series in read_folder(folder, None).series.items():
        assert series.steps.tolist() == expected[tag].steps.tolist()


def test_an_evaluation_is_made_anew(agent, whole):
    """One of three, and the last, after all training."""
    folder = stopped(agent, small(agent), stop_in_evaluation, 120)
    assert contents(folder)["/global_step"] == 120
    stopped(agent, small(agent, resume=str(folder)), stop_in_evaluation, 300)
    assert contents(folder)["/global_step"] == 300
    assert [step for step, _ in logged(folder)["eval/episodic_return"]] == [120, 240]
    resumed(agent, folder)
    check_same(whole(agent), folder)


def test_in_the_middle_of_a_game_with_sticky_actions(dqn, whole):
    flags = {"env_id": "ALE/Breakout-v5", "total_timesteps": 120, "learning_starts": 110, "eval_episodes": 0}
    flags.update(max_episode_steps=60, network="nature")
    assert small(dqn, **flags).sticky_actions == 0.25
    folder = stopped(dqn, small(dqn, **flags), stop_in_step, 97)
    assert contents(folder)["/episode_actions/36"] in range(4)
    resumed(dqn, folder, **flags)
    check_same(whole(dqn, **flags), folder)


@pytest.mark.long
def test_in_the_middle_of_a_life(der, whole):
    """The frame stack that a lost life emptied is the same again."""
    flags = {"env_id": "ALE/Breakout-v5", "total_timesteps": 300, "learning_starts": 280, "eval_episodes": 0}
    flags["start_e"] = 1.0
    folder = stopped(der, small(der, **flags), stop_in_step, 70)
    state = torch.load(folder / "checkpoint.pt")
    assert state["episode"] == 0
    assert state["replay"]["terminations"].any()
    assert state["replay"]["episode_steps"] > 3
    stopped(der, small(der, resume=str(folder), **flags), stop_in_step, 31)
    resumed(der, folder, **flags)
    check_same(whole(der, **flags), folder)


def test_a_signal_before_the_first_step(dqn, whole, capsys):
    folder = stopped(dqn, small(dqn), stop_at_once)
    assert capsys.readouterr().out.splitlines()[-1] == "stopped at step 0: there is no checkpoint"
    assert not (folder / "checkpoint.pt").exists()
    assert resumed(dqn, "auto") == folder
    check_same(whole(dqn), folder)


def test_a_signal_before_a_resumed_run_s_first_step(dqn):
    """A full replay takes minutes to write: not what is there already."""
    folder = stopped(dqn, small(dqn), stop_in_step, 120)
    written = newest()
    stopped(dqn, small(dqn, resume=str(folder)), stop_at_once)
    assert newest() == written


def test_without_checkpoints(dqn, capsys):
    flags = {"checkpoint_frequency": 0, "eval_episodes": 0}
    folder = dqn.train(small(dqn, **flags))
    assert sorted(path.name.split(".")[0] for path in folder.iterdir()) == ["args", "events", "finished"]
    stopped(dqn, small(dqn, **flags), stop_in_step, 120)
    assert capsys.readouterr().out.splitlines()[-1] == "stopped at step 120: there is no checkpoint"


def test_auto(dqn):
    """The newest unfinished run of the same flags, or a new one."""
    older = stopped(dqn, small(dqn), stop_in_step, 150)
    newer = stopped(dqn, small(dqn), stop_in_step, 120)
    assert resumed(dqn, "auto", batch_size=16) not in (older, newer)
    assert resumed(dqn, "auto", seed=2) not in (older, newer)
    assert not (newer / "finished").exists()

    assert resumed(dqn, "auto") == newer
    assert resumed(dqn, "auto") == older
    check_same(older, newer)
    assert resumed(dqn, "auto") not in (older, newer)


def test_a_gpu_that_is_not_used(dqn, monkeypatch):
    """With --no-cuda, or under a driver that is too old: a checkpoint asks nothing of it."""
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert dqn.random_states(np.random.default_rng(1))["cuda"] == []


def test_the_state_of_one_gpu_is_kept(dqn, monkeypatch):
    """That of the run, the first: the next machine may have no other."""
    asked = []
    for name in ("is_initialized", "is_available"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 2)
    for module in (torch.cuda, torch.cuda.random):
        monkeypatch.setattr(module, "get_rng_state", lambda device="cuda": torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda.random, "set_rng_state", lambda state, device="cuda": asked.append((state, device)))
    rng = np.random.default_rng(1)
    dqn.set_random_states(rng, dqn.random_states(rng))
    assert [(len(state), device) for state, device in asked] == [(16, 0)]


def test_a_copy_does_not_go_on_with_the_original_s_run(dqn, tmp_path):
    """A copied file names its runs after itself."""
    stopped(dqn, make_args(dqn), stop_in_step, 12)
    path = tmp_path / "mydqn.py"
    path.write_text(Path(dqn.__file__).read_text())
    copied = load(path)
    folder = copied.make_run_folder(make_args(copied, resume="auto"), torch.device("cpu"))
    assert "__mydqn__" in folder.name
    assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("other", ["mydqn", "rainbow"])
def test_a_name_of_one_s_own_does_not_join_two_agents(dqn, tmp_path, other):
    """The same --exp-name of a copy, or of an agent that has all of these flags, and more."""
    source = Path(dqn.__file__).with_name("dqn.py" if other == "mydqn" else "rainbow.py")
    (tmp_path / f"{other}.py").write_text(source.read_text())
    theirs = load(tmp_path / f"{other}.py")
    flags = {name: value for name, value in vars(small(theirs)).items() if name in vars(small(dqn))}
    flags |= {"exp_name": "sweep", "resume": "auto"}
    folders = [module.make_run_folder(module.Args(**flags), torch.device("cpu")) for module in (theirs, dqn, theirs)]
    assert folders[0] == folders[2] != folders[1]


def test_a_mirrored_run_goes_on_as_the_same(dqn, monkeypatch):
    """At Weights & Biases."""
    calls = []
    wandb = types.SimpleNamespace(init=lambda **settings: calls.append(settings), __spec__="it is installed")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = stopped(dqn, small(dqn, track=True), stop_in_step, 50)
    resumed(dqn, folder, track=True)
    assert [settings["id"] for settings in calls] == [folder.name, folder.name]
    assert calls[1]["resume"] == "allow"


# ---- processes: signals and kill -9
CHILDREN = multiprocessing.get_context("forkserver")
IMPORTS = ["torch._dynamo", "torch.utils.tensorboard", "stable_baselines3.common.buffers", "minatar.gym", "hypothesis"]
CHILDREN.set_forkserver_preload(IMPORTS)


def command(args):
    """The flags as one types them."""
    words = []
    for name, value in asdict(args).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


def main(path, words, folder):
    """Be `python agents/x.py ...` in this folder, without the seconds that its imports take."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def main_on_a_slow_disk(*args):
    torch.save = lambda state, file: time.sleep(2)
    main(*args)


def start(module, args, target=main):
    process = CHILDREN.Process(target=target, args=(module.__file__, command(args), Path.cwd()))
    process.start()
    return process


def kill(process):
    process.kill()
    process.join()
    time.sleep(1)  # the next log has another second in its name


@pytest.fixture(autouse=True)
def no_child_survives():
    yield
    for process in multiprocessing.active_children():
        process.kill()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training(dqn, number, status):
    """Once: a checkpoint, how to go on, and the status of the signal. The words of how to go on work."""
    flags = {"total_timesteps": 1_000_000, "checkpoint_frequency": 1_000_000, "eval_episodes": 0}
    words = [sys.executable, dqn.__file__, *command(small(dqn, **flags))]
    with open("out.txt", "w") as out, open("err.txt", "w") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err)
    wait_for(lambda: "run folder" in Path("out.txt").read_text())
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(120) == status
    assert Path("err.txt").read_text() == ""

    said = Path("out.txt").read_text()
    assert re.search(r"^stopping: writing a checkpoint of [\d.,]+ MB$", said, re.MULTILINE)
    last = said.splitlines()[-1]
    step, folder = re.fullmatch(r"stopped at step (.+): go on with --resume (\S+) and the same flags", last).groups()
    assert contents(Path(folder))["/global_step"] == int(step.replace(",", "")) > 0
    stopped(dqn, small(dqn, resume=folder, **flags), stop_in_step, 10)
    assert contents(Path(folder))["/global_step"] == int(step.replace(",", "")) + 10


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_second_signal(dqn, number, status):
    """Ctrl-C ends at once, SIGTERM does not: `timeout` sends it to a process and to its group."""
    process = start(dqn, small(dqn, total_timesteps=1_000_000, eval_episodes=0), main_on_a_slow_disk)
    wait_for(there_is("*/events*"))
    time.sleep(0.3)
    os.kill(process.pid, number)
    wait_for(there_is("*/checkpoint.tmp"))
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == status


@pytest.mark.long
def test_twenty_kills(qrdqn, whole):
    """At random moments, half of them while a checkpoint is written; each time the same command again."""
    torch.set_num_threads(1)
    flags = {"total_timesteps": 3_000, "checkpoint_frequency": 20, "eval_episodes": 0, "buffer_size": 3_000}
    rng = random.Random(0)
    steps = []
    half_written = 0
    for number in range(20):
        for path in there_is("*/checkpoint.tmp")():
            path.unlink()
        before = newest()
        process = start(qrdqn, small(qrdqn, resume="auto", **flags))
        if number % 2:
            wait_for(there_is("*/checkpoint.tmp"))
        else:
            wait_for(lambda before=before: newest() != before)
            time.sleep(rng.uniform(0, 0.1))
        kill(process)
        half_written += len(there_is("*/checkpoint.tmp")())
        (path,) = there_is("*/checkpoint.pt")()
        steps.append(contents(path.parent)["/global_step"])
    assert half_written >= 3
    assert steps == sorted(steps)
    assert len(set(steps)) >= 10
    assert steps[-1] < 3_000

    process = start(qrdqn, small(qrdqn, resume="auto", **flags))
    process.join()
    assert process.exitcode == 0
    (folder,) = there_is("*")()
    check_same(whole(qrdqn, **flags), folder)


# ---- how a checkpoint is written
@contextlib.contextmanager
def limited_files(size):
    """As a full disk: no file can be longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(dqn, whole, monkeypatch, capsys):
    """The run says so, keeps the checkpoint and the weights that there are, and goes on to its end."""
    flags = {"checkpoint_frequency": 100, "save_model": True}
    kept = {}

    def fill():
        limit()
        (folder,) = there_is("*")()
        kept.update({path: path.read_bytes() for path in folder.glob("*.pt")})

    with limited_files(100_000) as limit:
        in_call(monkeypatch, dqn.FrameReplay, "add", 250, fill)
        folder = dqn.train(small(dqn, **flags))
    said = capsys.readouterr().out
    assert said.count(f"warning: {folder}/checkpoint.pt is not written, and the one before stands") == 1
    assert said.count(f"warning: {folder}/model.pt is not written, and the one before stands") == 1
    assert sorted(path.name for path in kept) == ["checkpoint.pt", "model.pt"]
    assert {path: path.read_bytes() for path in folder.glob("*.pt")} == kept
    assert list(folder.glob("*.tmp")) == []
    assert logged(folder) == logged(whole(dqn))

    assert contents(folder)["/global_step"] == 200
    resumed(dqn, folder, **flags)
    check_same(whole(dqn, save_model=True), folder)


def test_the_checkpoint_before_stands_until_the_new_one_is_synced(dqn, monkeypatch):
    """And the log is written first: a kill right after it loses nothing of the log that the checkpoint goes on from."""
    seen = []

    def watch(module, name):
        real = getattr(module, name)

        def spied(*args):
            seen.append((name, [contents(path.parent)["/global_step"] for path in there_is("*/checkpoint.pt")()]))
            return real(*args)

        monkeypatch.setattr(module, name, spied)

    watch(dqn.SummaryWriter, "flush")
    watch(torch, "save")
    watch(os, "fsync")
    watch(os, "replace")
    dqn.train(small(dqn, checkpoint_frequency=200, eval_episodes=0))
    names = ["flush", "save", "fsync", "replace"]
    assert seen == [(name, []) for name in names] + [(name, [200]) for name in names]


def test_a_checkpoint_early_in_a_run_is_small(dqn):
    """Of a replay of 60 MB, the rows in use."""
    flags = {"total_timesteps": 200_000, "buffer_size": 150_000, "learning_starts": 1_000}
    folder = stopped(dqn, small(dqn, **flags), stop_in_step, 100)
    first = (folder / "checkpoint.pt").stat().st_size
    stopped(dqn, small(dqn, resume=str(folder), **flags), stop_in_step, 200)
    more = (folder / "checkpoint.pt").stat().st_size - first
    assert first < 2e6
    assert 200 * 400 < more < 200 * 430  # a frame of MinAtar's Breakout is 400 bytes


def test_a_checkpoint_does_not_copy_the_replay(agent, monkeypatch):
    state_dict = agent.FrameReplay.state_dict
    seen = []

    def spied(replay):
        state = state_dict(replay)
        seen.extend(replay.arrays)
        for name in replay.arrays:
            assert state[name].data_ptr() == getattr(replay, name).ctypes.data
        return state

    monkeypatch.setattr(agent.FrameReplay, "state_dict", spied)
    agent.train(small(agent, total_timesteps=120))
    assert "observations" in seen


def test_a_checkpoint_that_was_read_is_let_go(agent, monkeypatch):
    """Else the file, replaced by a newer one, fills the disk until the run ends."""
    flags = {"checkpoint_frequency": 10, "total_timesteps": 150, "eval_episodes": 0}
    folder = stopped(agent, small(agent, **flags), stop_in_step, 115)
    maps = []
    read = lambda: maps.extend(Path("/proc/self/maps").read_text().splitlines())  # noqa: E731
    in_call(monkeypatch, agent.FrameReplay, "add", 30, read)
    resumed(agent, folder, **flags)
    assert len(maps) > 100
    assert [line for line in maps if str(folder) in line] == []


def test_a_loss_that_is_not_finite(agent, monkeypatch, refused):
    """The run ends before its diagnosis, and the checkpoint that it names is from before."""
    (name,) = [name for name in vars(agent) if name.endswith("_loss") and name != "prediction_loss"]
    real_loss = getattr(agent, name)
    numbers = itertools.count(1)

    def spied(*args):
        losses, q_values = real_loss(*args)
        return losses * (math.nan if next(numbers) > 20 else 1), q_values

    monkeypatch.setattr(agent, name, spied)
    args = small(agent, checkpoint_frequency=20, diagnostics_frequency=4)
    error = refused(agent.train, args, may_write=True)
    (folder,) = there_is("*")()
    step = int(re.match(r"error: the loss is not finite at step (\d+);", error)[1])
    assert f"{folder}/checkpoint.pt" in error
    assert not (folder / "finished").exists()
    state = torch.load(folder / "checkpoint.pt")
    assert state["global_step"] == (step - 1) // 20 * 20 > 100
    assert all(weights.isfinite().all() for weights in state["q_network"].values())


def test_a_gradient_that_is_not_finite(dqn, monkeypatch, refused):
    """A finite loss may have one: no step is made with it, so that no checkpoint has weights that are none."""
    real_loss = dqn.td_loss
    numbers = itertools.count(1)

    def spied(*args):
        losses, q_values = real_loss(*args)
        if next(numbers) == 20:
            losses = losses + 0 * (q_values - q_values.detach()).sqrt()  # the root's slope at 0 is infinite
        return losses, q_values

    monkeypatch.setattr(dqn, "td_loss", spied)
    args = small(dqn, train_frequency=1, checkpoint_frequency=1)
    assert "not finite at step" in refused(dqn.train, args, may_write=True)
    (folder,) = there_is("*")()
    state = torch.load(folder / "checkpoint.pt")
    assert all(weights.isfinite().all() for weights in state["q_network"].values())


@pytest.mark.parametrize("path", ONLINE, ids=lambda path: path.stem)
def test_exact_resume_takes_at_most_70_lines(path):
    functions = {"save", "load_checkpoint", "random_states", "set_random_states", "save_checkpoint"}
    functions |= {"state_dict", "load_state_dict"}
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        name = getattr(node, "name", None)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "checkpoint.exists()":
            name = "resume"
        if name in functions | {"resume"}:
            assert name not in found
            found[name] = node.end_lineno - node.lineno + 1
    assert found.keys() == functions | {"resume"}
    assert sum(found.values()) <= 70


# ---- what is refused
def without(part):
    return lambda state: state.pop(part)


def a_pickle(state):
    state["updates"] = Bomb()


def of_another_network(state):
    state["q_network"]["head.bias"] = torch.zeros(99)


def test_checkpoints_that_are_none(dqn, refused):
    """Damaged (test_fuzz.py has more), of another kind, incomplete, or a stranger's: refused, and no code is run."""
    folder = stopped(dqn, small(dqn, save_model=True), stop_in_step, 220)
    path = folder / "checkpoint.pt"
    good = path.read_bytes()
    args = small(dqn, save_model=True, resume=str(folder))
    for content in [b"", good[: len(good) // 2], good[:-1], bytes(1_000), (folder / "model.pt").read_bytes()]:
        path.write_bytes(content)
        assert f"{path} cannot be read as a checkpoint" in refused(dqn.train, args)
    parts = [without(part) for part in ("q_network", "optimizer", "replay", "random")]
    for spoil in (*parts, of_another_network, a_pickle):
        path.write_bytes(good)
        state = torch.load(path)
        spoil(state)
        torch.save(state, path)
        assert f"{path} cannot be read as a checkpoint" in refused(dqn.train, args)
    assert not Path("it_ran").exists()
    torch.load(path, weights_only=False)  # it would have
    assert Path("it_ran").exists()


def test_other_flags_are_named(dqn, qrdqn, refused):
    folder = stopped(dqn, small(dqn), stop_in_step, 220)
    error = refused(dqn.train, small(dqn, resume=str(folder), batch_size=16, gamma=0.5))
    assert "was run with --batch-size 8 --gamma 0.99: give the same flags" in error
    assert "--exp-name dqn" in refused(qrdqn.train, small(qrdqn, resume=str(folder)))


def test_nothing_to_resume(dqn, refused):
    assert "nowhere: it has no checkpoint.pt" in refused(dqn.train, small(dqn, resume="nowhere"))
    folder = dqn.train(small(dqn, checkpoint_frequency=0, eval_episodes=0))
    assert f"{folder}: it has no checkpoint.pt" in refused(dqn.train, small(dqn, resume=str(folder)))
