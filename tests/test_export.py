"""What is exported from a run's checkpoints equals, step by step, what the run has seen."""

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, Bomb, load, make_args, read_array, stop_in_step, stopped
from test_replay import ENDINGS, LENGTHS, Script, make_replay


@pytest.fixture
def tool():
    return load(ROOT / "export_dataset.py")


def export(tool, run="runs/scripted", dataset="data", **flags):
    tool.export(tool.Args(Path(run), Path(dataset), **flags))


# ---- an independent reader
def padded(steps):
    """The rows of steps (frame, action, reward, terminal, begins): three of zeros before each that begins a game."""
    rows = []
    for frame, action, reward, terminal, begins in steps:
        nothing = (np.zeros_like(frame), 0, 0.0, 0)
        if begins:
            rows += [nothing, nothing, nothing]
        rows.append((frame, action, reward, terminal))
    return rows


def read_checkpoint(folder, number):
    """The rows of a checkpoint that are data, once all that the layout promises has been looked at."""
    arrays = [read_array(folder / f"{name}_ckpt.{number}.gz") for name in NAMES]
    size = len(arrays[1])
    frame = arrays[0].shape[1:]
    assert [array.dtype.name for array in arrays] == ["uint8", "int32", "float32", "uint8", "int64", "int64"]
    assert [array.shape for array in arrays] == [(size, *frame), (size,), (size,), (size,), (), (5,)]
    used = int(arrays[4]) % size
    assert used == size - 1  # as in the dataset, the last row has no step
    assert int(arrays[4]) // size == number
    assert arrays[5].tolist() == [(used + i) % size for i in range(-1, 4)]
    assert not any(array[used:].any() for array in arrays[:4])
    return [tuple(array[row] for array in arrays[:4]) for row in range(used)]


def read_dataset(folder):
    """All rows of a dataset, checkpoint after checkpoint; in its folder is nothing else."""
    found = {path.name for path in folder.iterdir()}
    count = len([name for name in found if name.startswith("add_count")])
    expected = {f"{name}_ckpt.{number}.gz" for name in NAMES for number in range(count)}
    assert found == expected | {"export.json"}
    rows = []
    for number in range(count):
        rows += read_checkpoint(folder, number)
    return rows


def check_rows(rows, expected):
    assert len(rows) == len(expected)
    if rows:
        frames, *columns = zip(*rows, strict=True)
        expected_frames, *expected_columns = zip(*expected, strict=True)
        np.testing.assert_array_equal(np.stack(frames), np.stack(expected_frames))
        np.testing.assert_array_equal(columns, expected_columns)


# ---- a scripted replay
def step_of(obs, actions, rewards, terminations, begins):
    """What a replay is told of a step, as `padded` wants it."""
    frame = obs[0, -1] if obs.dtype == np.uint8 else obs[0]  # the newest of ALE's, or MinAtar's channels
    return frame.astype(np.uint8), int(actions[0]), float(rewards[0]), int(terminations[0]), begins


class Recording:
    """A scripted game in a replay, step by step, and its checkpoints."""

    def __init__(self, dqn, capacity, stack=4):
        self.replay = make_replay(dqn, "FrameReplay", capacity, stack=stack)
        self.capacity = capacity
        self.script = Script(LENGTHS * 20, ENDINGS * 20, stack).steps()
        self.steps = []  # as `padded` wants them
        self.positions = []  # of each step, had the ring no end
        self.free = 0

    def advance(self, count):
        for (_, t), step in itertools.islice(self.script, count):
            self.replay.add(*step)
            obs, _, actions, rewards, terminations, truncations = step
            self.steps.append(step_of(obs, actions, rewards, terminations, t == 0))
            self.positions.append(self.free)
            self.free += 2 if truncations[0] and not terminations[0] else 1  # the last frame has a row of its own

    def lost(self):
        """How many of the steps are not in the ring any more: the newest has written its own frame and the next."""
        written = self.positions[-1] + 1
        return sum(position + self.capacity <= written for position in self.positions)

    def save(self, folder="runs/scripted"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {"replay": self.replay.state_dict(), "global_step": len(self.steps)}
        torch.save(state, Path(folder) / "checkpoint.pt")


@pytest.fixture
def recording(dqn):
    """250 steps in a replay that is not full, and their checkpoint."""
    recording = Recording(dqn, 500)
    recording.advance(250)
    recording.save()
    return recording


@pytest.mark.parametrize(("capacity", "stack"), [(500, 4), (33, 4), (34, 1)])
def test_after_every_step(tool, dqn, capacity, stack):
    """Not full, full, and wrapped: the steps that are still there, each once and in order."""
    recording = Recording(dqn, capacity, stack)
    for count in range(1, 90):
        recording.advance(1)
        recording.save()
        export(tool, dataset=f"data{count}")
        kept = recording.steps[recording.lost() :]
        check_rows(read_dataset(Path(f"data{count}")), padded(kept))
    assert recording.replay.full == (capacity < 500)


@pytest.mark.parametrize(("capacity", "every"), [(500, 37), (35, 1), (36, 20)])
def test_appended(tool, dqn, capsys, capacity, every):
    """Exported after every so many steps: all steps of the run, none twice, and nothing before is touched."""
    recording = Recording(dqn, capacity)
    before = {}
    exports = 0
    while len(recording.steps) < 85:
        recording.advance(every)
        recording.save()
        export(tool)
        exports += 1
        assert f"data: {every:,} steps more, {len(recording.steps):,} of the run" in capsys.readouterr().out
        files = {path.name: path.read_bytes() for path in Path("data").glob("*.gz")}
        assert len(files) == 6 * exports
        assert {name: files[name] for name in before} == before
        before = files
    check_rows(read_dataset(Path("data")), padded(recording.steps))
    progress = json.loads(Path("data/export.json").read_text())
    assert progress == {"run": "scripted", "steps": len(recording.steps), "checkpoints": exports}


def test_lost_steps_are_said(tool, dqn, capsys):
    """Once; what is still there is appended, from the middle of its game on without padding."""
    recording = Recording(dqn, 40)
    expected = []
    for count in (30, 100, 5):
        before = len(recording.steps)
        recording.advance(count)
        recording.save()
        export(tool)
        said = capsys.readouterr().out
        lost = max(recording.lost() - before, 0)
        assert (lost > 50) == (count == 100)
        warned = f"warning: {lost:,} steps are in no checkpoint any more; export more often, or raise --buffer-size"
        assert (warned in said) == (count == 100)
        assert ("warning" in said) == (count == 100)
        expected += padded(recording.steps[before + lost :])
    check_rows(read_dataset(Path("data")), expected)


def test_nothing_new(tool, recording, capsys):
    export(tool)
    before = {path: path.read_bytes() for path in Path().rglob("*.*")}
    capsys.readouterr()
    export(tool)
    assert capsys.readouterr().out == "data has all 250 steps of this checkpoint already\n"
    assert {path: path.read_bytes() for path in Path().rglob("*.*")} == before


@pytest.mark.parametrize("rows", [100, 101, 102, 103, 104, 250])
def test_files_of_so_many_rows(tool, recording, rows):
    """Fewer, where a file would end in a game's padding: the next would begin with a row that looks like a step."""
    export(tool, rows=rows)
    expected = padded(recording.steps)
    check_rows(read_dataset(Path("data")), expected)
    sizes = [len(read_array(path)) for path in Path("data").glob("*action*")]
    assert max(sizes) <= rows
    assert len(sizes) == -(-len(expected) // (rows - 1))
    for number in range(len(sizes)):
        blank = [not frame.any() for frame, *_ in read_checkpoint(Path("data"), number)]
        assert not blank[-1]
        leading = blank.index(False)
        assert leading in (0, 3)


def test_more_rows_than_a_block(tool, recording, monkeypatch):
    monkeypatch.setattr(tool, "BLOCK", 7)
    export(tool)
    check_rows(read_dataset(Path("data")), padded(recording.steps))


# ---- real runs
class Spy:
    """What an agent stores, step by step, and its replay."""

    def __init__(self, monkeypatch, module):
        self.steps = []
        self.truncations = 0
        add = module.FrameReplay.add

        def spied(replay, obs, next_obs, actions, rewards, terminations, truncations):
            begins = not self.steps or self.ended
            self.steps.append(step_of(obs, actions, rewards, terminations, begins))
            self.truncations += int(truncations[0])
            self.ended = bool(terminations[0] or truncations[0])
            self.replay = replay
            add(replay, obs, next_obs, actions, rewards, terminations, truncations)

        monkeypatch.setattr(module.FrameReplay, "add", spied)


def test_every_agent_stopped_and_resumed(agent, tool, monkeypatch, capsys):
    """Games that end in both ways, a replay that comes round: exported at each stop, all steps are there."""
    spy = Spy(monkeypatch, agent)
    flags = {"env_id": "MinAtar/Seaquest-v1", "total_timesteps": 220, "max_episode_steps": 16, "start_e": 1.0}
    flags |= {"buffer_size": 120, "n_step": 2, "learning_starts": 190}
    folder = None
    for count in (65, 57):
        folder = stopped(agent, make_args(agent, resume=folder and str(folder), **flags), stop_in_step, count)
        export(tool, folder)
    agent.train(make_args(agent, resume=str(folder), **flags))
    export(tool, folder)
    terminations = sum(terminal for _, _, _, terminal, _ in spy.steps)
    assert min(terminations, spy.truncations) > 3
    assert len(spy.steps) == 220
    check_rows(read_dataset(Path("data")), padded(spy.steps))
    assert "data: 98 steps more, 220 of the run in 3 checkpoints" in capsys.readouterr().out
    assert json.loads(Path("data/export.json").read_text())["run"] == folder.name


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "MinAtar/Asterix-v1"])
@pytest.mark.parametrize("n_step", [1, 3])
def test_the_same_transitions_as_the_online_replay(dqn, tool, monkeypatch, n_step, env_id):
    """Exported, and read by cql_offline.py: for the same rows as in the replay that they came from, all is equal."""
    offline = load(ROOT / "agents" / "cql_offline.py")
    spy = Spy(monkeypatch, dqn)
    flags = {"env_id": env_id, "n_step": n_step, "total_timesteps": 300, "max_episode_steps": 120}
    folder = dqn.train(make_args(dqn, learning_starts=300, **flags))
    export(tool, folder)
    rows = read_dataset(Path("data"))
    check_rows(rows, padded(spy.steps))
    if env_id.startswith("ALE/"):
        assert rows[0][0].shape == (84, 84)
        assert len(np.unique(rows[-1][0])) > 3  # shades of gray

    online = spy.replay
    flags = {"env_id": env_id, "n_step": n_step, "data_fraction": 1.0}
    args = offline.Args(dataset_dir="data", **flags)
    paths = offline.checkpoint_paths(args, 0)
    obs_space = dqn.make_env(make_args(dqn, env_id=env_id)).single_observation_space
    read_back = offline.DatasetReplay(paths, obs_space, 6, args, torch.device("cpu"), np.random.default_rng(0))

    # of the rows that the online replay may sample, the last n before a truncation lack their next state here
    stored = np.flatnonzero(online.ages >= 0)
    unended = np.flatnonzero(np.append(online.ages[stored[1:]] == 0, True) & ~online.terminations[stored])
    lacking = {stored[end] - back for end in unended for back in range(n_step)}
    expected = [i for i, row in enumerate(stored) if online.ready[row] and row not in lacking]
    assert read_back.ready.tolist() == expected
    assert len(expected) > 280
    online.draw = lambda _: stored[expected]
    theirs = online.sample(len(expected), n_step, 0.99)
    ours = read_back._get_samples(read_back.ready)
    for name in ("obs", "actions", "rewards", "next_obs", "discounts"):
        one = getattr(ours, name)
        other = getattr(theirs, name)
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def test_a_life_is_an_episode_in_an_export_of_atari_100k(der, tool, monkeypatch):
    spy = Spy(monkeypatch, der)
    flags = {"env_id": "ALE/Breakout-v5", "total_timesteps": 300, "learning_starts": 300, "start_e": 1.0}
    folder = der.train(make_args(der, **flags))
    export(tool, folder)
    rows = read_dataset(Path("data"))
    check_rows(rows, padded(spy.steps))
    lives = [row for row, (*_, terminal) in enumerate(rows) if terminal]
    assert len(lives) >= 3
    for row in lives[:-1]:
        assert not any(frame.any() for frame, *_ in rows[row + 1 : row + 4])
        assert rows[row + 4][0].any()


# ---- refusals
def test_the_export_of_another_run(tool, recording, refused):
    export(tool)
    recording.save("runs/other")
    assert "data is the export of another run, scripted" in refused(export, tool, "runs/other")


def test_the_same_run_by_another_path(tool, recording, monkeypatch):
    """And moved to another place."""
    export(tool)
    recording.advance(10)
    recording.save()
    shutil.move("runs/scripted", "scripted")
    monkeypatch.chdir("scripted")
    export(tool, ".", "../data")
    check_rows(read_dataset(Path("../data")), padded(recording.steps))


def test_a_folder_with_something_in_it(tool, recording, refused):
    Path("thesis").mkdir()
    Path("thesis/thesis.tex").write_text("years of work")
    assert "thesis is not empty, and no dataset that was exported" in refused(export, tool, dataset="thesis")
    error = refused(export, tool, dataset="thesis/thesis.tex")
    assert "thesis/thesis.tex could not be written: File exists" in error
    Path("empty").mkdir()
    for name in ("empty", "deep/in/folders"):
        export(tool, dataset=name)
        check_rows(read_dataset(Path(name)), padded(recording.steps))


def test_checkpoints_that_are_none(tool, recording, refused):
    """Not there, damaged, a stranger's, or without a replay, as cql_offline.py's."""
    words = "checkpoint.pt cannot be read as a checkpoint with a replay"
    assert f"runs/nothing/{words}" in refused(export, tool, "runs/nothing")
    path = Path("runs/scripted/checkpoint.pt")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(recording.replay.observations[:9].tobytes()) + 9] ^= 1
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:-1], flipped):
        path.write_bytes(content)
        assert words in refused(export, tool)
    for state in ({"replay": Bomb(), "global_step": 1}, {"global_step": 400, "drawn": [0]}, [1, 2], {"replay": {}}):
        torch.save(state, path)
        assert words in refused(export, tool)
    assert not Path("it_ran").exists()


def test_too_few_rows(tool, recording, refused):
    assert "--rows is 99: it must be at least 100" in refused(export, tool, rows=99)


def test_the_run_is_only_read(tool, recording):
    before = Path("runs/scripted/checkpoint.pt").read_bytes()
    export(tool)
    assert [path.name for path in Path("runs/scripted").iterdir()] == ["checkpoint.pt"]
    assert Path("runs/scripted/checkpoint.pt").read_bytes() == before


# ---- interruptions and full disks
def fail_at(tool, monkeypatch, count, error):
    """Raise an error in the call number `count` of those that write or rename a file; return the calls."""
    calls = []

    def guarded(real):
        def spied(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                raise error
            return real(*args, **kwargs)

        return spied

    monkeypatch.setattr(tool.gzip, "open", guarded(gzip.open))
    monkeypatch.setattr(tool.os, "replace", guarded(os.replace))
    monkeypatch.setattr(tool.np.lib.format, "write_array_header_1_0", guarded(np.lib.format.write_array_header_1_0))
    return calls


def check_whole(folder):
    """Every checkpoint that has frames is whole, as export.json says or one more."""
    numbers = {int(path.name.split(".")[-2]) for path in folder.glob("$store$_observation_ckpt.*.gz")}
    for number in numbers:
        read_checkpoint(folder, number)
    progress = json.loads((folder / "export.json").read_text())
    assert progress["checkpoints"] <= len(numbers) <= progress["checkpoints"] + 1
    assert numbers == set(range(len(numbers)))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["kill", "disk"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "appended"])
def test_interrupted_anywhere(tool, recording, monkeypatch, capsys, error, first):
    """At any file, whole or half, of a first export or of a later one: the same command goes on with it."""
    if not first:
        export(tool, dataset="before", rows=150)
        recording.advance(170)
        recording.save()
    count = 0
    while True:
        count += 1
        data = Path(f"data{count}")
        if not first:
            shutil.copytree("before", data)
        with monkeypatch.context() as patch:
            calls = fail_at(tool, patch, count, error)
            try:
                export(tool, dataset=data, rows=150)
            except BaseException as raised:
                assert isinstance(raised, KeyboardInterrupt | SystemExit)
        if len(calls) < count:
            break
        if isinstance(error, OSError):
            assert f"{data} could not be written: No space left on device" in capsys.readouterr().err
            assert not list(data.glob("*.tmp"))
        if count > 1 or not first:
            check_whole(data)
        elif isinstance(error, KeyboardInterrupt):
            (data / "export.tmp").unlink()  # killed as the folder was made: it is not known for an export yet
        export(tool, dataset=data, rows=150)
        check_rows(read_dataset(data), padded(recording.steps))
    assert count > 30
    check_rows(read_dataset(data), padded(recording.steps))


def test_interrupted_and_gone_on_with_later(tool, recording, monkeypatch):
    """By a later checkpoint, with files of another size: nothing of the first attempt is left over."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(tool, patch, 40, KeyboardInterrupt())
        export(tool, rows=100)
    assert len(list(Path("data").glob("*action*.gz"))) >= 2
    recording.advance(60)
    recording.save()
    export(tool, rows=400)
    check_rows(read_dataset(Path("data")), padded(recording.steps))


# ---- as a user would
@pytest.mark.long
def test_from_a_run_to_another_in_an_empty_folder(tmp_path):
    """dqn.py plays Pong; export_dataset.py; cql_offline.py, copied alone, learns from it."""
    for source in ("agents/dqn.py", "agents/cql_offline.py", "export_dataset.py"):
        shutil.copy(ROOT / source, tmp_path)
    game = ["--env-id", "ALE/Pong-v5", "--no-cuda"]
    play = ["--total-timesteps", "400", "--learning-starts", "400", "--eval-episodes", "0", "--max-episode-steps", "90"]
    learn = ["--dataset-dir", "pong", "--num-checkpoints", "2", "--total-timesteps", "40", "--iteration-steps", "20"]
    learn += ["--algorithm", "cql-c51", "--data-fraction", "1", "--eval-steps", "10", "--max-episode-steps", "50"]

    def run(*command):
        done = subprocess.run([sys.executable, "-I", *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("dqn.py", *game, *play)
    (folder,) = Path("runs").iterdir()
    said = run("export_dataset.py", str(folder), "pong", "--rows", "300")
    assert said == "pong: 400 steps more, 400 of the run in 2 checkpoints\n"
    assert len(read_dataset(Path("pong"))) == 400 + 3 * 5  # five games, of which the last is not over
    assert "step 40: mean return" in run("cql_offline.py", *game, *learn)
