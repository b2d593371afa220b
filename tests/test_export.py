"""What is exported from a run's checkpoints equals, step by step, what the run has seen."""

import gzip
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, load, make_args

NAMES = ["$store$_observation", "$store$_action", "$store$_reward", "$store$_terminal", "add_count", "invalid_range"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tool():
    return load(ROOT / "export_dataset.py")


def export(tool, run="runs/scripted", dataset="data", **flags):
    tool.export(tool.Args(Path(run), Path(dataset), **flags))


# ------------------------------------------------------------------------------ an independent reader
def read(path):
    with gzip.open(path, "rb") as file:
        return np.load(io.BytesIO(file.read()), allow_pickle=False)


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
    arrays = [read(folder / f"{name}_ckpt.{number}.gz") for name in NAMES]
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


# -------------------------------------------------------------------------------- a scripted replay
class Recording:
    """A run that was written down beforehand, step by step in a replay, and its checkpoints.

    Games of `lengths` end by turns in a termination and in a truncation. Frames are random, and none is zero.
    """

    lengths = [7, 12, 1, 2, 1, 3, 30, 4, 1, 1, 9]

    def __init__(self, dqn, capacity, frame=(4, 5)):
        self.minatar = len(frame) == 3
        obs_space = gym.spaces.Box(0, 255, (4, *frame), np.uint8)
        if self.minatar:
            obs_space = gym.spaces.Box(0, 1, frame, bool)
        env_id = "MinAtar/Breakout-v1" if self.minatar else "ALE/Pong-v5"
        args = make_args(dqn, env_id=env_id, buffer_size=capacity, total_timesteps=10**6)
        self.replay = dqn.FrameReplay(obs_space, args, "cpu", np.random.default_rng(0))
        self.capacity = capacity
        self.frame = frame
        self.rng = np.random.default_rng(1)
        self.steps = []  # as `padded` wants them
        self.positions = []  # of each step, had the ring no end
        self.free = 0
        self.games = self.play()

    def new_frame(self):
        image = self.rng.integers(2 if self.minatar else 256, size=self.frame).astype(np.uint8)
        image.flat[0] = 1
        return image

    def as_obs(self, image):
        if self.minatar:
            return image[None].astype(bool)
        return np.stack([np.full(self.frame, 99, np.uint8)] * 3 + [image])[None]  # only the newest counts

    def play(self):
        """Yield after every step."""
        game = 0
        while True:
            length = self.lengths[game % len(self.lengths)]
            image = self.new_frame()
            for t in range(length):
                following = self.new_frame()
                action = int(self.rng.integers(6))
                reward = float(self.rng.integers(-8, 9)) / 8
                terminal = t == length - 1 and game % 2 == 0
                truncation = t == length - 1 and game % 2 == 1
                self.replay.add(
                    self.as_obs(image),
                    self.as_obs(following),
                    np.array([action]),
                    np.array([reward]),
                    np.array([terminal]),
                    np.array([truncation]),
                )
                self.steps.append((image, action, reward, int(terminal), t == 0))
                self.positions.append(self.free)
                self.free += 2 if truncation else 1  # the last frame has a row of its own
                image = following
                yield
            game += 1

    def advance(self, count):
        for _ in range(count):
            next(self.games)

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


@pytest.mark.parametrize(("capacity", "frame"), [(500, (4, 5)), (33, (4, 5)), (34, (4, 5, 3))])
def test_after_every_step(tool, dqn, capacity, frame):
    """Not full, full, and wrapped: the steps that are still there, each once and in order."""
    recording = Recording(dqn, capacity, frame)
    for count in range(1, 90):
        recording.advance(1)
        recording.save()
        export(tool, dataset=f"data{count}")
        kept = recording.steps[recording.lost() :]
        check_rows(read_dataset(Path(f"data{count}")), padded(kept))
    assert recording.replay.full == (capacity < 500)


@pytest.mark.parametrize(("capacity", "every"), [(500, 1), (500, 37), (35, 1), (35, 13), (36, 20)])
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


@pytest.mark.parametrize("rows", [100, 101, 102, 103, 104, 105, 250, 335, 336, 337])
def test_files_of_so_many_rows(tool, recording, rows):
    """Fewer, where a file would end in a game's padding: the next would begin with a row that looks like a step."""
    export(tool, rows=rows)
    expected = padded(recording.steps)
    check_rows(read_dataset(Path("data")), expected)
    sizes = [len(read(path)) for path in Path("data").glob("*action*")]
    assert max(sizes) <= rows
    assert len(sizes) == -(-len(expected) // (rows - 1))
    for number in range(len(sizes)):
        blank = [not frame.any() for frame, *_ in read_checkpoint(Path("data"), number)]
        assert not blank[-1]
        leading = blank.index(False)
        assert leading in (0, 3)


def test_more_rows_than_a_block(tool, recording, monkeypatch):
    for block in (1, 7, 100):
        monkeypatch.setattr(tool, "BLOCK", block)
        export(tool, dataset=f"data{block}")
        check_rows(read_dataset(Path(f"data{block}")), padded(recording.steps))


# ----------------------------------------------------------------------------------------- real runs
class ScriptedGame:
    """A vector of one game of random frames and rewards from -3 to 3, which the seed determines; keeps a diary.

    A third of the games terminate, the others are truncated.
    """

    single_observation_space = gym.spaces.Box(0, 1, (10, 10, 3), bool)
    single_action_space = gym.spaces.Discrete(4)
    diary = {}  # of all games: (seed, step) -> what `padded` wants

    def reset(self, seed):
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.length = int(self.rng.integers(1, 16))
        self.t = 0
        self.image = self.rng.random((1, 10, 10, 3)) < 0.5
        return self.image, {}

    def step(self, actions):
        reward = float(self.rng.integers(-3, 4))
        over = self.t == self.length - 1
        terminal = over and self.seed % 3 == 0
        clipped = max(-1.0, min(1.0, reward))
        entry = (self.image[0].astype(np.uint8), int(actions[0]), clipped, int(terminal), self.t == 0)
        assert ScriptedGame.diary.setdefault((self.seed, self.t), entry)[1] == entry[1]  # a resumed run plays the same
        self.t += 1
        self.image = self.rng.random((1, 10, 10, 3)) < 0.5
        return self.image, np.array([reward]), np.array([terminal]), np.array([over and not terminal]), {}


def stop_after(module, monkeypatch, steps):
    """Ask the run to end in its step number `steps`."""
    add = module.FrameReplay.add
    calls = []

    def spied(*args):
        calls.append(1)
        if len(calls) == steps:
            module.STOPPED_BY.append(signal.SIGTERM)
        add(*args)

    monkeypatch.setattr(module.FrameReplay, "add", spied)


def train_and_export(module, tool, monkeypatch, flags, parts):
    """Train, stopped after so many steps each time and exported there; return the run's folder."""
    folder = None
    for count in parts:
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_after(module, patch, count)
            module.train(make_args(module, resume=folder and str(folder), **flags))
        module.STOPPED_BY.clear()
        (folder,) = Path("runs").iterdir()
        export(tool, folder)
    module.train(make_args(module, resume=folder and str(folder), **flags))
    (folder,) = Path("runs").iterdir()
    export(tool, folder)
    return folder


def test_every_agent_stopped_and_resumed(agent, tool, monkeypatch, capsys):
    """Rewards beyond -1 and 1, games that end in both ways, a replay that comes round: all steps are there."""
    monkeypatch.setattr(ScriptedGame, "diary", {})
    monkeypatch.setattr(agent, "make_env", lambda args, **_: ScriptedGame())
    flags = {"total_timesteps": 220, "buffer_size": 120, "n_step": 2, "learning_starts": 190}
    folder = train_and_export(agent, tool, monkeypatch, flags, [65, 57])
    steps = list(ScriptedGame.diary.values())
    assert len(steps) == 220
    assert {reward for _, _, reward, _, _ in steps} == {-1, 0, 1}
    assert sum(terminal for _, _, _, terminal, _ in steps) > 5
    check_rows(read_dataset(Path("data")), padded(steps))
    assert "data: 98 steps more, 220 of the run in 3 checkpoints" in capsys.readouterr().out
    assert json.loads(Path("data/export.json").read_text())["run"] == folder.name


class Spy:
    """What an agent stores, step by step, and its replay."""

    def __init__(self, monkeypatch, module):
        self.steps = []
        add = module.FrameReplay.add

        def spied(replay, obs, next_obs, actions, rewards, terminations, truncations):
            frame = obs[0, -1] if replay.stack == 4 else obs[0]
            begins = not self.steps or self.ended
            step = (frame.astype(np.uint8), int(actions[0]), float(rewards[0]), int(terminations[0]), begins)
            self.steps.append(step)
            self.ended = bool(terminations[0] or truncations[0])
            self.replay = replay
            add(replay, obs, next_obs, actions, rewards, terminations, truncations)

        monkeypatch.setattr(module.FrameReplay, "add", spied)


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
    theirs = online.sample(len(expected))
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


# ----------------------------------------------------------------------------------------- refusals
def files_and_folders():
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def refused(tool, capsys, **flags):
    """The one sentence with which an export is refused; nothing that was there has changed."""
    before = files_and_folders()
    with pytest.raises(SystemExit) as refusal:
        export(tool, **flags)
    error = capsys.readouterr().err
    assert refusal.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert files_and_folders() == before
    return error


def test_the_export_of_another_run(tool, recording, capsys):
    export(tool)
    recording.save("runs/other")
    assert "data is the export of another run, scripted" in refused(tool, capsys, run="runs/other")


def test_the_same_run_by_another_path(tool, recording, monkeypatch):
    """And moved to another place."""
    export(tool)
    recording.advance(10)
    recording.save()
    monkeypatch.chdir("runs")
    export(tool, "scripted", "../data")
    recording.advance(10)
    recording.save("scripted")
    shutil.move("scripted", "../scripted")
    monkeypatch.chdir("../scripted")
    export(tool, ".", "../data")
    check_rows(read_dataset(Path("../data")), padded(recording.steps))


def test_a_folder_with_something_in_it(tool, recording, capsys):
    Path("thesis").mkdir()
    Path("thesis/thesis.tex").write_text("years of work")
    assert "thesis is not empty, and no dataset that was exported" in refused(tool, capsys, dataset="thesis")
    error = refused(tool, capsys, dataset="thesis/thesis.tex")
    assert "thesis/thesis.tex could not be written: File exists" in error
    Path("empty").mkdir()
    export(tool, dataset="empty")
    export(tool, dataset="deep/in/folders")
    check_rows(read_dataset(Path("empty")), padded(recording.steps))
    check_rows(read_dataset(Path("deep/in/folders")), padded(recording.steps))


def test_no_checkpoint(tool, recording, capsys):
    for run in ("runs/nothing", "runs", "runs/scripted/checkpoint.pt"):
        error = refused(tool, capsys, run=run)
        assert f"{run}/checkpoint.pt cannot be read as a checkpoint with a replay" in error


def test_a_checkpoint_without_a_replay(tool, capsys):
    """As cql_offline.py's."""
    Path("runs/offline").mkdir(parents=True)
    path = Path("runs/offline/checkpoint.pt")
    for state in ({"global_step": 400, "drawn": [0]}, [1, 2], {"replay": {}}):
        torch.save(state, path)
        error = refused(tool, capsys, run="runs/offline")
        assert "checkpoint.pt cannot be read as a checkpoint with a replay" in error


class Bomb:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_damaged_checkpoints(tool, recording, capsys):
    """One bit anywhere: the checkpoint is refused, or what is exported is the same."""
    export(tool, dataset="whole")
    expected = read_dataset(Path("whole"))
    path = Path("runs/scripted/checkpoint.pt")
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert "checkpoint.pt cannot be read as a checkpoint with a replay" in refused(tool, capsys)
    torch.save({"replay": Bomb(), "global_step": 1}, path)
    assert "checkpoint.pt cannot be read" in refused(tool, capsys)
    assert not Path("it_ran").exists()

    rng = np.random.default_rng(0)
    caught = 0
    for number in range(40):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            export(tool, dataset=f"data{number}")
        except SystemExit as refusal:
            assert refusal.code == 2
            assert "checkpoint.pt cannot be read" in capsys.readouterr().err
            caught += 1
            continue
        check_rows(read_dataset(Path(f"data{number}")), expected)
    assert caught > 15


@pytest.mark.parametrize("rows", [99, 0, -1])
def test_too_few_rows(tool, recording, capsys, rows):
    assert f"--rows is {rows}: it must be at least 100" in refused(tool, capsys, rows=rows)


def test_the_run_is_only_read(tool, recording):
    Path("runs/scripted").chmod(0o500)
    Path("runs/scripted/checkpoint.pt").chmod(0o400)
    before = Path("runs/scripted/checkpoint.pt").read_bytes()
    export(tool)
    assert [path.name for path in Path("runs/scripted").iterdir()] == ["checkpoint.pt"]
    assert Path("runs/scripted/checkpoint.pt").read_bytes() == before


# ---------------------------------------------------------------------------- interruptions and full disks
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


def test_a_disk_that_is_full(tool, dqn, capsys):
    """Really: no file may be longer than this. No half file is left, and with more space the export goes on."""
    recording = Recording(dqn, 900, frame=(20, 20))
    recording.advance(30)
    recording.save()
    export(tool)
    recording.advance(250)
    recording.save()
    before = files_and_folders()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        with pytest.raises(SystemExit) as refusal:
            export(tool)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refusal.value.code == 2
    error = capsys.readouterr().err
    assert error == "error: data could not be written: File too large; the same command goes on with it.\n"
    assert files_and_folders() == before
    export(tool)
    check_rows(read_dataset(Path("data")), padded(recording.steps))


# ------------------------------------------------------------------------------------- as a user would
def run(*command):
    return subprocess.run([sys.executable, "-I", *command], capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_from_a_run_to_another_in_an_empty_folder(tmp_path):
    """dqn.py plays Pong, stopped and resumed; export_dataset.py; cql_offline.py, copied alone, learns from it."""
    for source in ("agents/dqn.py", "agents/cql_offline.py", "export_dataset.py"):
        shutil.copy(ROOT / source, tmp_path)
    game = ["--env-id", "ALE/Pong-v5", "--no-cuda"]
    play = ["--total-timesteps", "400", "--learning-starts", "400", "--eval-episodes", "0", "--max-episode-steps", "90"]
    learn = ["--dataset-dir", "pong", "--num-checkpoints", "2", "--total-timesteps", "40", "--iteration-steps", "20"]
    learn += ["--algorithm", "cql-c51", "--data-fraction", "1", "--eval-steps", "10", "--max-episode-steps", "50"]

    done = run("dqn.py", *game, *play)
    assert done.returncode == 0, done.stderr
    (folder,) = Path("runs").iterdir()
    done = run("export_dataset.py", str(folder), "pong", "--rows", "300")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "pong: 400 steps more, 400 of the run in 2 checkpoints\n"
    done = run("export_dataset.py", str(folder), "pong")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "pong has all 400 steps of this checkpoint already\n"
    rows = read_dataset(Path("pong"))
    assert len(rows) == 400 + 3 * 5  # five games, of which the last is not over
    done = run("cql_offline.py", *game, *learn)
    assert done.returncode == 0, done.stderr
    assert "step 40: mean return" in done.stdout
    assert len(list(Path("runs").iterdir())) == 2

    # what goes wrong is a sentence
    (learned,) = [path for path in Path("runs").iterdir() if path != folder]
    done = run("export_dataset.py", str(learned), "other")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {learned}/checkpoint.pt cannot be read as a checkpoint with a replay")
    assert done.stderr.count("\n") == 1
    Path("pong/$store$_action_ckpt.0.gz").write_bytes(b"?")
    done = run("cql_offline.py", *game, *learn)
    assert done.returncode == 2
    assert done.stderr.startswith("error: pong/$store$_action_ckpt.0.gz cannot be read")
    assert done.stderr.count("\n") == 1
