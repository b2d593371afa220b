"""A run is never lost: killed at any moment and resumed, it ends as the uninterrupted one does, bit for bit."""

import errno
import gc
import gzip
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import AGENTS, ROOT, load, make_args, scalars

from analysis.runs import read_folder

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["torch", "stable_baselines3.common.buffers", "ale_py", "tensorboard.compat"])


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=AGENTS, ids=lambda path: path.stem)
def every(request, tmp_path):
    """The module of every agent in turn, with a dataset for the one that needs it."""
    module = load(request.param)
    if module.AGENT == "cql_offline":
        dqn = load(ROOT / "agents" / "dqn.py")
        shutil.rmtree(dqn.train(make_args(dqn, total_timesteps=500, buffer_size=200, record_dataset="data")))
    return module


def small(module, **flags):
    """The flags of a run in which all that a checkpoint holds matters: games, updates, reports, evaluations."""
    if module.AGENT == "cql_offline":
        own = {"dataset_dir": "data", "num_checkpoints": 1, "iteration_steps": 200, "eval_steps": 20}
        own |= {"env_id": "MinAtar/Breakout-v1", "cuda": False, "target_network_frequency": 40, "batch_size": 8}
        return module.Args(**(own | {"total_timesteps": 600, "diagnostics_frequency": 140} | flags))
    own = {"total_timesteps": 600, "prioritized": True, "n_step": 3, "eval_episodes": 1, "eval_frequency": 200}
    return make_args(module, **(own | {"diagnostics_frequency": 140, "buffer_size": 400} | flags))


def state(folder):
    """All arrays and facts of a run's checkpoint, but for what is no part of the run's course."""
    with np.load(folder / "checkpoint.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    facts = json.loads(arrays.pop("facts").tobytes())
    for name in ("seconds", "logged"):
        facts.pop(name)
    for flag in ("resume", "checkpoint_frequency"):
        facts["args"].pop(flag)
    return arrays, facts


def logged(folder):
    """{tag: [(step, value), ...]} of a run, but for its speed."""
    return {tag: points for tag, points in scalars(folder).items() if tag != "charts/SPS"}


def check_same(one, other):
    """Two runs ended the same: weights, moments, replay, priorities, generators, counters, and every value logged."""
    (arrays, facts), (others, other_facts) = state(one), state(other)
    assert arrays.keys() == others.keys() and len(arrays) > 10
    different = [name for name in arrays if not np.array_equal(arrays[name], others[name], equal_nan=True)]
    assert not different and repr(facts) == repr(other_facts)
    assert logged(one) == logged(other)
    for tag, series in read_folder(one, None).series.items():  # the analysis' own reader agrees
        assert series.steps.tolist() == read_folder(other, None).series[tag].steps.tolist(), tag


def stop_after(module, monkeypatch, steps):
    """Ask the run to end in its step number `steps`, or half of that in updates, if it plays none."""
    calls, target, method = [], getattr(module, "FrameReplay", None), "add"
    if module.AGENT == "cql_offline":  # 150 updates where others have 600 steps
        target, method, steps = module.DatasetReplay, "sample", (steps + 1) // 2
    real = getattr(target, method)

    def spied(*args, **kwargs):
        calls.append(1)
        if len(calls) == steps:
            module.STOP.append(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(target, method, spied)


def next_second():
    """Logs are named by their second; in one process two of the same second would not be in order."""
    time.sleep(1.01 - time.time() % 1)


def interrupted(module, monkeypatch, args, steps):
    """Train, interrupted after each of these numbers of steps; return the run folder."""
    folder = None
    for count in steps:
        with monkeypatch.context() as patch:
            stop_after(module, patch, count)
            folder = module.train(module.replace(args, resume=str(folder) if folder else None))
            assert module.STOP
            module.STOP.clear()
            next_second()
    return module.train(module.replace(args, resume=str(folder)))


@pytest.mark.parametrize("steps", [[1], [57, 80, 143], [133]], ids=["at once", "three times", "at a report"])
def test_stopped_and_resumed(every, monkeypatch, steps):
    whole = every.train(small(every))
    resumed = interrupted(every, monkeypatch, small(every), steps)
    assert whole != resumed
    check_same(whole, resumed)
    assert len(list(Path("runs").iterdir())) == 2


@pytest.mark.parametrize(
    "flags", [{}, {"env_id": "ALE/Breakout-v5", "max_episode_steps": 60}], ids=["Pong", "Breakout"]
)
def test_in_the_middle_of_a_game_with_sticky_actions(dqn, monkeypatch, flags):
    args = {"env_id": "ALE/Pong-v5", "total_timesteps": 260, "learning_starts": 150, "eval_episodes": 0, **flags}
    assert small(dqn, **args).sticky_actions == 0.25
    whole = dqn.train(small(dqn, **args))
    check_same(whole, interrupted(dqn, monkeypatch, small(dqn, **args), [97, 101]))


def test_in_the_middle_of_a_life(der, monkeypatch):
    """The frame stack that a lost life emptied is the same again."""
    args = {"env_id": "ALE/Breakout-v5", "total_timesteps": 300, "start_e": 1.0, "learning_starts": 280, "n_step": 2}
    whole = der.train(small(der, **args, eval_episodes=0))
    assert state(whole)[0]["replay/dones"].sum() >= 2
    check_same(whole, interrupted(der, monkeypatch, small(der, **args, eval_episodes=0), [70, 31, 90]))


def test_an_evaluation_that_is_interrupted_is_made_again(every, monkeypatch):
    whole = every.train(small(every))
    name = "evaluate_steps" if every.AGENT == "cql_offline" else "evaluate"
    evaluate, calls = getattr(every, name), []

    def spied(*args):
        calls.append(args[4])
        if len(calls) in (1, 3):
            every.STOP.append(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(every, name, spied)
    folder = every.train(small(every))
    facts = state(folder)[1]
    assert (facts["global_step"], facts["pending"], calls) == (200, True, [200])
    for _ in range(2):
        every.STOP.clear()
        next_second()
        every.train(small(every, resume=str(folder)))
    assert calls == [200, 200, 400, 400, 600]
    check_same(whole, folder)


def test_an_evaluation_made_again_is_logged_once(every, monkeypatch):
    """It was interrupted, then made, and before the next checkpoint the run was killed."""
    whole = every.train(small(every))
    name = "evaluate_steps" if every.AGENT == "cql_offline" else "evaluate"
    evaluate = getattr(every, name)
    with monkeypatch.context() as patch:
        patch.setattr(every, name, lambda *args: every.STOP.append(signal.SIGTERM) or evaluate(*args))
        folder = every.train(small(every))
    every.STOP.clear()
    next_second()
    with monkeypatch.context() as patch:
        stop_after(every, patch, 20)
        patch.setattr(every, "save_checkpoint", lambda *args: False)  # as if it had been killed
        every.train(small(every, resume=str(folder)))
    every.STOP.clear()
    next_second()
    assert [step for step, _ in logged(folder)["eval/episodic_return"]] == [200]
    every.train(small(every, resume=str(folder)))
    check_same(whole, folder)


def test_the_last_evaluation_can_be_made_again(dqn, monkeypatch):
    """What was trained is written down before it: killed in it, the run goes on with it."""
    whole = dqn.train(small(dqn, eval_frequency=0))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dqn, "evaluate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        dqn.train(small(dqn, eval_frequency=0))
    gc.collect()
    (folder,) = [path for path in Path("runs").iterdir() if path != whole]
    next_second()
    assert state(folder)[1]["pending"]
    assert dqn.train(small(dqn, eval_frequency=0, resume="auto")) == folder
    check_same(whole, folder)


def test_a_signal_in_the_last_step_comes_too_late(dqn, monkeypatch, capsys):
    stop_after(dqn, monkeypatch, 600)
    folder = dqn.train(small(dqn, eval_episodes=0))
    assert not dqn.STOP and capsys.readouterr().out.splitlines()[-1] == f"run folder: {folder}"


def test_stopped_before_its_first_step(every, monkeypatch, capsys):
    """A resumed run that is stopped at once has nothing to write: a full replay takes its time."""
    stop_after(every, monkeypatch, 100)
    folder = every.train(small(every))
    written, said = (folder / "checkpoint.npz").stat().st_ino, capsys.readouterr().out.splitlines()[-1]
    next_second()
    assert every.STOP and every.train(small(every, resume=str(folder))) == folder
    assert (folder / "checkpoint.npz").stat().st_ino == written and capsys.readouterr().out.splitlines()[-1] == said
    every.STOP.clear()


def test_stopped_without_a_checkpoint(dqn, monkeypatch, capsys):
    stop_after(dqn, monkeypatch, 100)
    dqn.train(small(dqn, checkpoint_frequency=0))
    dqn.STOP.clear()
    assert capsys.readouterr().out.splitlines()[-1] == "stopped at step 100: there is no checkpoint of it"


def test_mirrored_again(dqn, monkeypatch):
    """A run that goes on is the same run at Weights & Biases."""
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs)))
    monkeypatch.setattr(dqn.importlib.util, "find_spec", lambda name: True)
    interrupted(dqn, monkeypatch, small(dqn, track=True), [50])
    assert len(calls) == 2 and calls[0]["id"] == calls[1]["id"] and calls[1]["resume"] == "allow"
    assert Path("runs", calls[0]["id"]).exists()


def test_a_recording_is_not_overwritten_by_another_run(dqn, capsys):
    dqn.train(small(dqn, record_dataset="data"))
    error = refused(dqn, capsys, record_dataset="data", seed=2, resume="auto")
    assert "--record-dataset data is not empty" in error


def test_a_recording_goes_on(dqn, monkeypatch):
    flags = {"buffer_size": 100, "n_step": 1, "max_episode_steps": 30}
    dqn.train(small(dqn, record_dataset="whole", **flags))
    interrupted(dqn, monkeypatch, small(dqn, record_dataset="parts", **flags), [55, 230])
    names = sorted(path.name for path in Path("whole").iterdir())
    assert names == sorted(path.name for path in Path("parts").iterdir()) and len(names) > 30
    for name in names:
        assert read_gzip(Path("whole") / name) == read_gzip(Path("parts") / name)


def read_gzip(path):
    return gzip.decompress(path.read_bytes())


# ---------------------------------------------------------------------------------------------------------- kill -9
def child(path, flags, folder):
    """Train in a process of its own, in the folder."""
    os.chdir(folder)
    torch.set_num_threads(1)
    module = load(Path(path))
    module.train(small(module, **flags))


def start(module, folder, **flags):
    process = CHILDREN.Process(target=child, args=(module.__file__, flags, folder))
    process.start()
    return process


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    alive = getattr(process, "is_alive", lambda: process.poll() is None)
    while not condition() and alive() and time.monotonic() < end:
        time.sleep(0.002)
    assert time.monotonic() < end


def test_killed_after_a_checkpoint(every, tmp_path):
    """kill -9 at a random moment after the first checkpoint."""
    torch.set_num_threads(1)
    flags = {"total_timesteps": 1_200, "checkpoint_frequency": 200}
    whole = every.train(small(every, **flags))
    process = start(every, tmp_path, **flags)
    wait_for(lambda: len(list(Path("runs").glob("*/checkpoint.npz"))) == 2, process)
    time.sleep(random.Random(every.AGENT).uniform(0, 0.4))
    process.kill()
    process.join()
    (folder,) = [path for path in Path("runs").iterdir() if path != whole]
    next_second()
    assert 200 <= state(folder)[1]["global_step"] < 1_200
    every.train(small(every, resume=str(folder), **flags))
    check_same(whole, folder)


def test_twenty_kills(dqn, tmp_path):
    """At random moments of one run, many of them while a checkpoint is written; each time the same command again."""
    torch.set_num_threads(1)
    flags = {"total_timesteps": 4_000, "checkpoint_frequency": 20, "resume": "auto"}  # twenty times 0.15 s do not do it
    flags |= {"eval_episodes": 0, "buffer_size": 20_000}
    whole = dqn.train(small(dqn, **flags))
    whole = whole.rename(tmp_path / "whole")
    rng, writing, steps = random.Random(0), 0, []
    for number in range(20):
        for path in Path("runs").glob("*/checkpoint.tmp"):
            path.unlink()
        process = start(dqn, tmp_path, **flags)
        before = len(list(Path("runs").glob("*/events*")))
        wait_for(lambda before=before: len(list(Path("runs").glob("*/events*"))) > before, process)
        time.sleep(rng.uniform(0, 0.15))
        if number % 2:  # while a checkpoint is written
            wait_for(lambda: list(Path("runs").glob("*/checkpoint.tmp")), process)
        process.kill()
        process.join()
        writing += bool(list(Path("runs").glob("*/checkpoint.tmp")))
        for path in Path("runs").glob("*/checkpoint.npz"):
            steps.append(state(path.parent)[1]["global_step"])
    assert writing >= 5 and len(set(steps)) > 5 and steps == sorted(steps)
    process = start(dqn, tmp_path, **flags)
    process.join()
    assert process.exitcode == 0
    folders = [path.parent for path in Path("runs").glob("*/checkpoint.npz")]
    assert len(folders) == 1
    check_same(whole, folders[0])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", ["dqn", "cql_offline"])
def test_signals(dqn, name, number, status):
    """Once: a checkpoint, a last line that says how to go on, and the status of the signal. The line's words work."""
    flags = ["--env-id", "MinAtar/Breakout-v1", "--total-timesteps", "200000", "--no-cuda"]
    flags += {
        "dqn": ["--learning-starts", "200", "--buffer-size", "1000", "--eval-episodes", "0"],
        "cql_offline": ["--dataset-dir", "data", "--num-checkpoints", "1", "--eval-steps", "0"],
    }[name]
    if name == "cql_offline":
        shutil.rmtree(dqn.train(make_args(dqn, total_timesteps=500, buffer_size=200, record_dataset="data")))
    command = [sys.executable, ROOT / "agents" / f"{name}.py"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(Path("runs").glob("*/events*")), process)
    time.sleep(0.5)
    for _ in range(1 if number == signal.SIGINT else 2):  # as `timeout` does, which signals a process and its group
        process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (status, "")
    found = re.fullmatch(r"stopped at step ([\d,]+): go on with (--resume runs/\S+)", out.splitlines()[-1])
    stopped = int(found[1].replace(",", ""))
    folder = Path(found[2].split()[1])
    assert state(folder)[1]["global_step"] == stopped
    process = subprocess.Popen([*command, *found[2].split()], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(folder.glob("events*"))) == 2, process)
    time.sleep(0.5)
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == status and out.startswith(f"run folder: {folder} (cpu), from step {stopped:,}\n")
    assert int(re.search(r"stopped at step ([\d,]+)", out)[1].replace(",", "")) > stopped
    assert len(list(Path("runs").iterdir())) == 1


# -------------------------------------------------------------------------------------------------- what can go wrong
def limited(path, flags, folder):
    """Train in a process that from its second checkpoint on can write files of 100 kB at most."""
    os.chdir(folder)
    torch.set_num_threads(1)
    module = load(Path(path))
    save, calls = module.save_checkpoint, []

    def spied(*args):
        calls.append(1)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return save(*args)

    module.save_checkpoint = spied
    sys.stdout = open("out.txt", "w", buffering=1)  # noqa: SIM115
    module.train(small(module, **flags))


def test_a_full_disk(dqn, tmp_path):
    """The run says so, keeps the checkpoint that there is, and goes on to its end."""
    flags = {"checkpoint_frequency": 200, "eval_episodes": 0}
    process = CHILDREN.Process(target=limited, args=(dqn.__file__, flags, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
    (folder,) = Path("runs").iterdir()
    assert state(folder)[1]["global_step"] == 200 and not (folder / "checkpoint.tmp").exists()
    said = Path("out.txt").read_text()
    assert "warning: no checkpoint of step 400 (File too large): the one before stands" in said
    assert "600/600" in said or "run folder" in said.splitlines()[-1]
    whole = dqn.train(small(dqn, **flags))
    dqn.train(small(dqn, resume=str(folder), **flags))
    check_same(whole, folder)


def no_space(path, flags, folder):
    """Train in a process for which, from its 300th step on, no file can be longer than its log is then."""
    os.chdir(folder)
    torch.set_num_threads(1)
    module = load(Path(path))
    add, calls = module.FrameReplay.add, []

    def spied(*args):
        calls.append(1)
        if len(calls) == 300:
            (log,) = Path("runs").glob("*/events*")
            resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, resource.RLIM_INFINITY))
        add(*args)

    module.FrameReplay.add = spied
    sys.stdout = open("out.txt", "w", buffering=1)  # noqa: SIM115
    module.train(small(module, **flags))


def test_a_disk_on_which_nothing_can_be_written(dqn, tmp_path):
    """Neither the log nor weights nor checkpoints nor a recording: the run goes on to its end."""
    flags = {"checkpoint_frequency": 200, "save_model": True, "record_dataset": "data", "total_timesteps": 1_200}
    process = CHILDREN.Process(target=no_space, args=(dqn.__file__, flags, tmp_path))
    process.start()
    process.join()
    said = Path("out.txt").read_text()
    assert process.exitcode == 0 and said.splitlines()[-1].startswith("run folder: runs/")
    for what in (
        "no checkpoint of step 400 ",
        "the weights of step 400 are not saved",
        "the log has a gap of a minute",
    ):
        assert f"warning: {what}" in said
    assert said.count("the log has a gap") < 5
    (folder,) = Path("runs").iterdir()
    assert state(folder)[1]["global_step"] == 200


def test_a_checkpoint_that_reads_back_differently(dqn, monkeypatch, capsys):
    """The disk returns other bytes than it was given: the checkpoint before stands."""
    flags = {"checkpoint_frequency": 200, "eval_episodes": 0}
    fsync, calls = os.fsync, []

    def spied(number):
        fsync(number)
        calls.append(1)
        if len(calls) > 1:
            os.pwrite(number, b"\xff\xfe\xfd", 2_000)

    monkeypatch.setattr(dqn.os, "fsync", spied)
    folder = dqn.train(small(dqn, **flags))
    assert state(folder)[1]["global_step"] == 200 and len(calls) == 3
    assert capsys.readouterr().out.count("the one before stands") == 2


def refused(module, capsys, **flags):
    """The one sentence with which a run is refused; nothing that was there has changed."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(SystemExit) as exit_:
        module.train(small(module, **flags))
    after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name != "lock"}
    error, status = capsys.readouterr().err, exit_.value.code
    del exit_
    gc.collect()  # what is left of the run still holds its lock
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert before == after
    return error


@pytest.fixture
def stopped(dqn, monkeypatch):
    """A run of dqn.py that was stopped at step 250."""
    with monkeypatch.context() as patch:
        stop_after(dqn, patch, 250)
        folder = dqn.train(small(dqn))
    dqn.STOP.clear()
    next_second()
    return folder


class Bomb:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_damaged_checkpoints(dqn, stopped, tmp_path, capsys):
    path = stopped / "checkpoint.npz"
    whole = path.read_bytes()
    contents = [b"", whole[:100], whole[: len(whole) // 2], whole[:-1], b"PK" + whole[2:1_000], pickle.dumps(Bomb())]
    for content in contents:
        path.write_bytes(content)
        assert "checkpoint.npz is damaged, or no checkpoint" in refused(dqn, capsys, resume=str(stopped))
    path.write_bytes(whole)
    for bad in ({"facts": np.array([Bomb()], object)}, {"q_network/head.bias": np.array([Bomb()], object)}):
        with np.load(path) as file:
            np.savez(tmp_path / "bomb.npz", **({name: file[name] for name in file.files} | bad))
        content = (tmp_path / "bomb.npz").read_bytes()
        (tmp_path / "bomb.npz").unlink()
        path.write_bytes(content)
        assert "is damaged" in refused(dqn, capsys, resume=str(stopped))
        path.write_bytes(whole)
    assert not Path("it_ran").exists()
    path.unlink()
    assert "has no checkpoint.npz to go on from" in refused(dqn, capsys, resume=str(stopped))


def test_flipped_bits(dqn, stopped, capsys):
    """One anywhere: the checkpoint is refused, or it was in what does not matter, and the run ends as it should."""
    path = stopped / "checkpoint.npz"
    originals, _ = dqn.load_checkpoint(path, small(dqn))
    whole, rng, caught = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            arrays, facts = dqn.load_checkpoint(path, small(dqn))
        except SystemExit:
            caught += "is damaged" in capsys.readouterr().err
            continue
        assert arrays.keys() == originals.keys() and facts["global_step"] == 250
        for name, array in arrays.items():
            assert np.array_equal(array, originals[name], equal_nan=True)
    assert caught > 50


def test_foreign_checkpoints(dqn, qrdqn, stopped, capsys):
    folder = str(stopped)
    error = refused(qrdqn, capsys, resume=folder)
    assert "is a checkpoint of dqn, not of qrdqn" in error
    error = refused(dqn, capsys, resume=folder, batch_size=16, gamma=0.5)
    assert "was run with --batch-size 8, --gamma 0.99: give the same flags, or none but --resume" in error
    with np.load(stopped / "checkpoint.npz") as file:
        arrays = {name: file[name] for name in file.files}
    facts = json.loads(arrays["facts"].tobytes())
    np.savez(
        stopped / "checkpoint.npz",
        **(arrays | {"facts": np.frombuffer(json.dumps(facts | {"version": 2}).encode(), np.uint8)}),
    )
    assert "has a newer format, 2" in refused(dqn, capsys, resume=folder)
    np.savez(stopped / "checkpoint.npz", **(arrays | {"replay/priorities": arrays["replay/priorities"][:-1]}))
    assert "is damaged" in refused(dqn, capsys, resume=folder)
    for name in ("q_network/head.bias", "replay/rewards", "replay/pos", "optimizer/2/exp_avg"):
        np.savez(stopped / "checkpoint.npz", **{k: v for k, v in arrays.items() if k != name})
        assert "is damaged" in refused(dqn, capsys, resume=folder)
    changes = [("optimizer/2/exp_avg", np.zeros(1, np.float32)), ("optimizer/0/step", np.zeros(3, np.float32))]
    changes += [("replay/pos", np.int64(10**6)), ("replay/more", np.int64(0)), ("replay/pos", np.float64(1))]
    for name, other in changes:
        np.savez(stopped / "checkpoint.npz", **(arrays | {name: other}))
        assert "is damaged" in refused(dqn, capsys, resume=folder)
    for other in ({"global_step": 10**9}, {"global_step": -1}, {"rngs": []}, {"logged": {"x": "y"}}, {"game": [99]}):
        changed = np.frombuffer(json.dumps(facts | other).encode(), np.uint8)
        np.savez(stopped / "checkpoint.npz", **(arrays | {"facts": changed}))
        assert "is damaged" in refused(dqn, capsys, resume=folder)
    older = {name: value for name, value in facts["args"].items() if name != "network"}  # a flag that came later
    changed = np.frombuffer(json.dumps(facts | {"args": older}).encode(), np.uint8)
    np.savez(stopped / "checkpoint.npz", **(arrays | {"facts": changed}))
    assert dqn.load_checkpoint(stopped / "checkpoint.npz", small(dqn))[1]["global_step"] == 250
    error = refused(dqn, capsys, resume=folder, network="nature", track=False, prioritized=False, save_model=True)
    assert "was run with --no-save-model, --network dopamine, --prioritized: give" in error
    assert "nowhere" in refused(dqn, capsys, resume="nowhere")


def test_a_folder_that_cannot_be_written_to(dqn, stopped, monkeypatch, capsys):
    with monkeypatch.context() as patch:  # root may write to any
        patch.setattr(dqn.os, "access", lambda path, mode: path != stopped)
        assert "cannot be written to: Permission denied" in refused(dqn, capsys, resume=str(stopped))
    (stopped / "lock").unlink()
    (stopped / "lock").mkdir()
    assert "cannot be written to: Is a directory" in refused(dqn, capsys, resume=str(stopped))
    shutil.rmtree("runs")
    Path("runs").write_text("no folder")
    assert "could not be made" in refused(dqn, capsys)


def somebody_else(path, flags, folder):
    """Train as a user of no rights, who has all that Python needs in memory already."""
    os.chdir(folder)
    module = load(Path(path))
    module.train(small(module, total_timesteps=250, exp_name="first"))
    sys.stderr = open("error.txt", "w", buffering=1)  # noqa: SIM115
    os.setgid(65534)
    os.setuid(65534)
    module.train(small(module, **flags))


def test_a_folder_of_somebody_else(dqn, stopped, tmp_path):
    if os.getuid():
        pytest.skip("only root can become somebody else")
    (stopped / "lock").chmod(0o666)
    open_to_all = [path for path in tmp_path.parents if path.stat().st_uid == 0 and not path.stat().st_mode & 0o001]
    for path in (tmp_path, *open_to_all):
        path.chmod(path.stat().st_mode | 0o001)
    process = CHILDREN.Process(target=somebody_else, args=(dqn.__file__, {"resume": str(stopped)}, tmp_path))
    process.start()
    process.join()
    for path in open_to_all:
        path.chmod(path.stat().st_mode & ~0o001)
    error = Path("error.txt").read_text()
    assert error.startswith(f"error: the run folder {stopped} cannot be written to: Permission denied.\n")
    assert process.exitcode == 2


def no_locks():
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_disk_without_locks(dqn, stopped, monkeypatch, capsys):
    """As some network disks: the run goes on, with a warning."""
    with monkeypatch.context() as patch:
        patch.setattr(dqn.fcntl, "flock", lambda *_: no_locks())
        dqn.train(small(dqn, resume=str(stopped)))
    assert "is not locked against other processes: No locks available" in capsys.readouterr().out
    assert state(stopped)[1]["global_step"] == 600


def test_two_processes_on_one_run(dqn, stopped, capsys):
    lock = dqn.lock_run(stopped)
    for resume in (str(stopped), "auto"):
        assert "another process is at work on the run in" in refused(dqn, capsys, resume=resume)
    lock.close()
    dqn.train(small(dqn, resume="auto"))
    assert state(stopped)[1]["global_step"] == 600


def test_auto(dqn, stopped, monkeypatch, capsys):
    """Other flags, an agent of another name or a finished run: a new one. The same flags: the newest unfinished."""
    for flags in ({"batch_size": 16}, {"seed": 2}, {"exp_name": "other"}, {"gamma": 0.9}):
        folder = dqn.train(small(dqn, resume="auto", **flags))
        assert folder != stopped and state(folder)[1]["global_step"] == 600
    assert state(stopped)[1]["global_step"] == 250
    with monkeypatch.context() as patch:
        stop_after(dqn, patch, 150)
        newest = dqn.train(small(dqn))
    dqn.STOP.clear()
    next_second()
    assert dqn.train(small(dqn, resume="auto")) == newest and state(newest)[1]["global_step"] == 600
    assert dqn.train(small(dqn, resume="auto")) == stopped and state(stopped)[1]["global_step"] == 600
    assert dqn.train(small(dqn, resume="auto")) != stopped
    capsys.readouterr()
    assert dqn.train(small(dqn, resume=str(stopped))) == stopped
    assert "is finished" in capsys.readouterr().out


def test_resume_brings_the_flags(dqn, stopped, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dqn.py", "--resume", str(stopped)])
    assert dqn.parse_args() == small(dqn, resume=str(stopped))
    monkeypatch.setattr(sys, "argv", ["dqn.py", f"--resume={stopped}", "--batch-size", "99"])
    with pytest.raises(SystemExit):
        dqn.train(dqn.parse_args())
    assert "was run with --batch-size 8: give the same flags" in capsys.readouterr().err
    for content in (
        "",
        "{",
        "[1]",
        '{"args": [1]}',
        '{"args": {"seed": "x"}}',
        '{"args": {"gamma": null}}',
        "[" * 10_000,
    ):
        (stopped / "args.json").write_text(content)
        with pytest.raises(SystemExit) as exit_:
            dqn.parse_args()
        assert exit_.value.code == 2 and "args.json is damaged" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(every, monkeypatch, capsys):
    """The run stops with the step and what there is to go back to, which stays as it is."""
    name = next(name for name in vars(every) if name.endswith("_loss") and name != "prediction_loss")
    real, calls = getattr(every, name), []

    def spied(*args):
        calls.append(1)
        losses, *rest = real(*args)
        return (losses * float("nan") if len(calls) > 100 else losses, *rest)

    monkeypatch.setattr(every, name, spied)
    flags = small(every, checkpoint_frequency=40, total_timesteps=2_000)
    with pytest.raises(SystemExit) as exit_:
        every.train(flags)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    found = re.search(
        r"the loss is not finite at step ([\d,]+), and the run in runs/.*; the last checkpoint is of step", error
    )
    updates = 101 if every.AGENT != "spr" else 51  # steps with updates to the first bad one
    first = getattr(flags, "learning_starts", 0) // flags.train_frequency + updates
    assert found and int(found[1].replace(",", "")) == first * flags.train_frequency
    (folder,) = Path("runs").iterdir()
    arrays, facts = state(folder)
    assert f"of step {facts['global_step']:,}." in error and facts["global_step"] < int(found[1].replace(",", ""))
    assert all(np.isfinite(array).all() for name, array in arrays.items() if name.startswith("q_network"))


def test_no_checkpoints_at_all(dqn):
    folder = dqn.train(small(dqn, checkpoint_frequency=0))
    assert sorted(path.name.split(".")[0] for path in folder.iterdir()) == ["args", "events", "lock"]


def test_the_previous_checkpoint_stands_until_the_new_one_is_verified(dqn, monkeypatch):
    """At no moment of the writing is there no whole checkpoint."""
    seen, savez, fsync = [], np.savez, os.fsync

    def look(what):
        path = next(Path("runs").glob("*/checkpoint.npz"), None)
        seen.append((what, path and state(path.parent)[1]["global_step"]))

    monkeypatch.setattr(dqn.np, "savez", lambda *a, **k: (look("write"), savez(*a, **k))[1])
    monkeypatch.setattr(dqn.os, "fsync", lambda f: (look("sync"), fsync(f))[1])
    real = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda self: (look("verify"), real(self))[1])
    dqn.train(small(dqn, checkpoint_frequency=200, eval_episodes=0))
    steps = ["write", "sync", "verify"]
    assert seen == [*[(w, None) for w in steps], *[(w, 200) for w in steps], *[(w, 400) for w in steps]]
