"""Reading a dataset and learning from it. The files are written here, by the layout's description alone."""

import contextlib
import gc
import gzip
import io
import os
import pickle
import shutil
import signal
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
import tyro
from conftest import ROOT, load, make_args, scalars, weights
from tensorboard.summary.writer import event_file_writer

NAMES = ["$store$_observation", "$store$_action", "$store$_reward", "$store$_terminal", "add_count", "invalid_range"]
ALGORITHMS = ["dqn", "cql-dr3", "cql-c51"]
PAD = [(0, 0, 0.0, 0)] * 3


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # a run's logs are read in the order of their names, which are a second and a number
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10**9))


@pytest.fixture
def offline():
    module = load(ROOT / "agents" / "cql_offline.py")
    yield module
    module.STOPPED_BY.clear()


def offline_args(module, **changes):
    """Flags at a size that a test can run."""
    small = {
        "env_id": "MinAtar/Breakout-v1",
        "cuda": False,
        "dataset_dir": "data",
        "num_checkpoints": 1,
        "data_fraction": 1.0,
        "total_timesteps": 400,
        "iteration_steps": 200,
        "target_network_frequency": 40,
        "batch_size": 8,
        "eval_steps": 0,
        "diagnostics_frequency": 0,
    }
    return module.Args(**(small | changes))


# ---------------------------------------------------------------- a writer and a reader of the layout
def write_arrays(folder, number, arrays):
    folder.mkdir(exist_ok=True)
    for name, array in zip(NAMES, arrays, strict=True):
        with gzip.open(folder / f"{name}_ckpt.{number}.gz", "wb", compresslevel=1) as file:
            np.save(file, array, allow_pickle=False)


def write_checkpoint(folder, number, rows, size, frame=(10, 10), add_count=None):
    """Write rows (frame, action, reward, terminal), and stale ones beyond them.

    A frame may be a number, which then fills it.
    """
    stale = [(200, 5, -1.0, 1)] * (size - len(rows))
    frames, actions, rewards, terminals = zip(*rows, *stale, strict=True)
    observations = np.zeros((size, *frame), np.uint8)
    for row, content in enumerate(frames):
        observations[row] = content
    arrays = [
        observations,
        np.array(actions, np.int32),
        np.array(rewards, np.float32),
        np.array(terminals, np.uint8),
        np.array(len(rows) if add_count is None else add_count),
        np.arange(5),
    ]
    write_arrays(folder, number, arrays)


def read(path):
    with gzip.open(path, "rb") as file:
        return np.load(io.BytesIO(file.read()), allow_pickle=False)


def rewrite(path, change):
    array = change(read(path))
    with gzip.open(path, "wb") as file:
        np.save(file, array)


@pytest.fixture(scope="module")
def four_checkpoints(tmp_path_factory):
    """Games of MinAtar's Breakout that nobody played: random frames, actions and ends."""
    folder = tmp_path_factory.mktemp("offline") / "data"
    rng = np.random.default_rng(0)
    rows = []
    while len(rows) < 900:
        rows += PAD
        length = rng.integers(2, 20)
        for step in range(length):
            frame = rng.random((10, 10, 4)) < 0.1
            frame[9, step % 10, 0] = True  # the paddle: no frame is blank
            terminal = step == length - 1 and length % 4 > 0  # or the game is truncated
            rows.append((frame, rng.integers(3), float(rng.random() < 0.2), terminal))
    for number in range(4):
        count = 249 if number < 3 else 150
        write_checkpoint(folder, number, rows[:count], 250, (10, 10, 4), number * 250 + count)
        rows = rows[count:]
    return folder


@pytest.fixture
def dataset(four_checkpoints, tmp_path):
    """The four checkpoints, the last of them not full, in a folder of the test's own."""
    return shutil.copytree(four_checkpoints, tmp_path / "data")


def make_replay(module, number=0, frame=(10, 10), seed=0, **flags):
    """The replay that reads a checkpoint: of an ALE game of frames (h, w), or a MinAtar one of (h, w, channels)."""
    if len(frame) == 2:
        flags["env_id"] = "ALE/Pong-v5"
        obs_space = gym.spaces.Box(0, 255, (4, *frame), np.uint8)
    else:
        obs_space = gym.spaces.Box(0, 1, frame, bool)
    args = offline_args(module, **flags)
    rng = np.random.default_rng(seed)
    return module.DatasetReplay(module.checkpoint_paths(args, number), obs_space, 6, args, torch.device("cpu"), rng)


# ------------------------------------------------------------------------------------------- reading
def transitions(replay):
    """{newest frame of s: (stack of s, action, stack of s', reward, discount)} of all that can be sampled."""
    batch = replay._get_samples(replay.ready)
    obs = batch.obs[:, :, 0, 0].tolist()
    next_obs = batch.next_obs[:, :, 0, 0].tolist()
    columns = [obs, batch.actions.tolist(), next_obs, batch.rewards.tolist(), batch.discounts.tolist()]
    found = {row[0][-1]: row for row in zip(*columns, strict=True)}
    assert len(found) == len(obs)
    return found


@pytest.mark.parametrize("earlier", [0, 50])
def test_one_step_transitions_by_hand(offline, tmp_path, earlier):
    """Two games: three steps to a termination, then two to a truncation; then the first two steps of a third.

    The rows are `earlier` passes over the 30 of the ring on, and add_count has counted those.
    """
    rows = [*PAD, (11, 1, 0.0, 0), (12, 2, 1.0, 0), (13, 3, -1.0, 1)]
    rows += [*PAD, (21, 1, 0.5, 0), (22, 2, 0.0, 0)]
    rows += [*PAD, (31, 4, 0.25, 0), (32, 5, 0.0, 0)]
    write_checkpoint(tmp_path / "data", 0, rows, 30, add_count=earlier * 30 + len(rows))
    assert transitions(make_replay(offline, gamma=0.5)) == {
        11: ([0, 0, 0, 11], 1, [0, 0, 11, 12], 0.0, 0.5),
        12: ([0, 0, 11, 12], 2, [0, 11, 12, 13], 1.0, 0.5),
        13: ([0, 11, 12, 13], 3, [0, 0, 0, 0], -1.0, 0.0),
        21: ([0, 0, 0, 21], 1, [0, 0, 21, 22], 0.5, 0.5),  # 22 was the last before the truncation: no next state
        31: ([0, 0, 0, 31], 4, [0, 0, 31, 32], 0.25, 0.5),  # 32's is in the next file, or beyond add_count
    }


def test_three_step_transitions_by_hand(offline, tmp_path):
    rows = [*PAD, (11, 1, 0.5, 0), (12, 2, 1.0, 0), (13, 3, -1.0, 0), (14, 0, 1.0, 1)]
    rows += [*PAD, (21, 1, 0.5, 0), (22, 2, 1.0, 0), (23, 2, 1.0, 0), (24, 2, 0.0, 0)]
    write_checkpoint(tmp_path / "data", 0, rows, 30)
    assert transitions(make_replay(offline, gamma=0.5, n_step=3)) == {
        11: ([0, 0, 0, 11], 1, [11, 12, 13, 14], 0.5 + 0.5 - 0.25, 0.125),
        12: ([0, 0, 11, 12], 2, [0, 0, 0, 0], 1.0 - 0.5 + 0.25, 0.0),
        13: ([0, 11, 12, 13], 3, [0, 0, 0, 0], -1.0 + 0.5, 0.0),
        14: ([11, 12, 13, 14], 0, [0, 0, 0, 0], 1.0, 0.0),
        21: ([0, 0, 0, 21], 1, [21, 22, 23, 24], 0.5 + 0.5 + 0.25, 0.125),  # 22 to 24 lack three steps
    }


@pytest.mark.parametrize(
    ("rows", "sampled"),
    [
        # the file begins within a game: 8, 9 and 10 lack frames of their stacks
        ([(8, 1, 0.0, 0), (9, 1, 0.0, 0), (10, 1, 0.0, 0), (11, 1, 0.0, 0), (12, 1, 0.0, 0)], [11]),
        # ... even if it ends right there: the stacks of the next game are whole
        ([(9, 1, 0.0, 1), *PAD, (21, 1, 0.0, 0), (22, 1, 0.0, 0)], [21]),
        # the first of the padding rows stands in the last file, where no row is to be read
        ([*PAD[:2], (11, 1, 0.0, 0), (12, 1, 0.0, 0)], [11]),
        # a game that begins with a black frame
        ([*PAD, (1, 1, 0.0, 1), *PAD, (0, 0, 0.0, 0), (12, 1, 0.0, 0), (13, 1, 0.0, 0)], [1, 0, 12]),
        # two black frames within a game are data
        ([*PAD, (11, 1, 0.0, 0), (0, 0, 0.0, 0), (0, 0, 0.0, 0), (14, 1, 0.0, 0), (15, 1, 0.0, 0)], [11, 0, 0, 14]),
        # three cannot be told from padding after a truncation
        ([*PAD, (11, 1, 0.0, 0), (12, 1, 0.0, 0), *PAD, (14, 1, 0.0, 0), (15, 1, 0.0, 0)], [11, 14]),
        # a game over at the end of the file, with and without some of the padding of the next
        ([*PAD, (11, 1, 0.0, 0), (12, 1, 0.0, 1)], [11, 12]),
        ([*PAD, (11, 1, 0.0, 0), (12, 1, 0.0, 1), *PAD[:2]], [11, 12]),
        # some of the padding after a truncation, at the end of the file: 12 has no next state
        ([*PAD, (11, 1, 0.0, 0), (12, 1, 0.0, 0), *PAD[:1]], [11]),
        ([*PAD, (11, 1, 0.0, 0), (12, 1, 0.0, 0), *PAD[:2]], [11]),
        # one blank row at the start can only be a frame of a game that is under way
        ([*PAD[:1], (9, 1, 0.0, 0), (10, 1, 0.0, 0), (11, 1, 0.0, 0), (12, 1, 0.0, 0)], [11]),
    ],
)
def test_edges(offline, tmp_path, rows, sampled):
    write_checkpoint(tmp_path / "data", 0, rows, 20)
    replay = make_replay(offline)
    assert replay.frames(replay.ready)[:, 0, 0].tolist() == sampled
    batch = replay._get_samples(replay.ready)
    assert not (batch.obs == 200).any()  # of the stale rows
    assert not (batch.next_obs == 200).any()


def test_no_stack_on_minatar(offline, tmp_path):
    """A file that begins within a game lacks nothing there: every frame is a whole observation."""
    rows = [(1, 1, 0.0, 0), (1, 2, 0.0, 1), *PAD, (1, 1, 1.0, 0), (1, 2, 0.0, 0)]
    write_checkpoint(tmp_path / "data", 0, rows, 20, frame=(10, 10, 4))
    batch = make_replay(offline, frame=(10, 10, 4))._get_samples(np.array([0, 1, 2]))
    assert batch.obs.dtype == batch.next_obs.dtype == torch.bool
    assert batch.obs.shape == batch.next_obs.shape == (3, 10, 10, 4)
    assert batch.obs.all()
    assert batch.next_obs[:, 0, 0, 0].tolist() == [True, False, True]
    assert batch.rewards.tolist() == [0, 0, 1]


def random_games(rng, frame, missing):
    """Games of random steps (frame, action, reward), and whether each terminates; the first lacks its beginning."""
    games = []
    for length in [9, 1, 2, 3, 4, 1, 7, 12, 5, 1, 6]:
        steps = []
        for _ in range(length):
            high = 256 if len(frame) == 2 else 2
            image = rng.integers(high, size=frame).astype(np.uint8)
            image.flat[0] = 1  # not blank
            steps.append((image, int(rng.integers(6)), float(rng.integers(-1, 2))))
        games.append((steps, bool(rng.random() < 0.5)))
    games[0] = (games[0][0][missing:], games[0][1])
    return games


def slow_transitions(games, n, stack, missing, frame):
    """All n-step transitions of the games, one obvious step at a time, by the row in which they begin."""
    found = {}
    row = 0
    for number, (steps, terminates) in enumerate(games):

        def look(t, steps=steps):
            images = [steps[i][0] if i >= 0 else np.zeros(frame, np.uint8) for i in range(t - stack + 1, t + 1)]
            return images[0] if stack == 1 else np.stack(images)

        for t, (_, action, _) in enumerate(steps):
            rewards = [reward for _, _, reward in steps[t : t + n]]
            total = sum(0.9**k * reward for k, reward in enumerate(rewards))
            nothing = np.zeros_like(look(t))
            if number == 0 and missing and t < stack - 1:
                pass  # frames of its stack are not there
            elif t + n < len(steps):
                found[row] = look(t), action, look(t + n), total, 0.9**n
            elif terminates:
                found[row] = look(t), action, nothing, total, 0.0
            row += 1
    return found


@pytest.mark.parametrize("missing", [0, 2])
@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize("frame", [(10, 10), (10, 10, 3)], ids=["ALE", "MinAtar"])
def test_every_transition_against_a_slow_loop(offline, tmp_path, frame, n_step, missing):
    games = random_games(np.random.default_rng(n_step), frame, missing)
    rows = []
    for steps, terminates in games:
        if rows or not missing:
            rows += PAD
        for t, step in enumerate(steps):
            rows.append((*step, terminates and t == len(steps) - 1))
    write_checkpoint(tmp_path / "data", 0, rows, 120, frame)
    stack = 4 if len(frame) == 2 else 1
    expected = slow_transitions(games, n_step, stack, missing, frame)
    replay = make_replay(offline, frame=frame, n_step=n_step, gamma=0.9)
    assert replay.ready.tolist() == list(expected)
    batch = replay._get_samples(replay.ready)
    for i, (obs, action, next_obs, reward, discount) in enumerate(expected.values()):
        np.testing.assert_array_equal(batch.obs[i], obs)
        np.testing.assert_array_equal(batch.next_obs[i], next_obs)
        assert batch.actions[i] == action
        assert batch.rewards[i].item() == pytest.approx(reward, abs=1e-6)
        assert batch.discounts[i].item() == pytest.approx(discount)
    np.testing.assert_array_equal(batch.rows, replay.ready)
    types = [batch.actions.dtype, batch.rewards.dtype, batch.discounts.dtype]
    assert types == [torch.int64, torch.float32, torch.float32]


def test_the_fraction_is_of_the_first_rows(offline, tmp_path):
    rows = [*PAD, *[(10 + i, 1, 0.0, 0) for i in range(17)]]
    write_checkpoint(tmp_path / "data", 0, rows, 40)
    assert make_replay(offline).ready.tolist() == list(range(16))
    assert make_replay(offline, data_fraction=0.25).ready.tolist() == list(range(6))


def test_sampling_is_uniform(offline, tmp_path):
    rows = [*PAD, *[(i, 1, 0.0, 0) for i in range(1, 12)]]
    write_checkpoint(tmp_path / "data", 0, rows, 20)
    replay = make_replay(offline)
    batch = replay.sample(20_000)
    counts = np.bincount(batch.rows)
    assert len(counts) == 10
    assert np.abs(counts - 2_000).max() < 5 * 2_000**0.5
    assert batch.obs.shape == (20_000, 4, 10, 10)
    np.testing.assert_array_equal(batch.obs[:, 3, 0, 0], batch.rows + 1)


def test_the_probe(offline, tmp_path):
    """256 observations, always the same, and without disturbing the sampling."""
    write_checkpoint(tmp_path / "data", 0, [*PAD, *[(i, 1, 0.0, 0) for i in range(1, 12)]], 20)
    replay = make_replay(offline)
    probe = replay.probe()
    assert probe.shape == (256, 4, 10, 10)
    assert set(probe[:, 3, 0, 0].tolist()) == set(range(1, 11))
    assert torch.equal(probe, replay.probe())
    assert replay.sample(8).rows.tolist() == make_replay(offline).sample(8).rows.tolist()


# ----------------------------------------------------------------------------------------- bad input
def refused(module, capsys, **flags):
    """The one sentence with which a run is refused."""
    with pytest.raises(SystemExit) as refusal:
        module.train(offline_args(module, **flags))
    error = capsys.readouterr().err
    assert refusal.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", NAMES[:5])
def test_damaged_files(offline, dataset, capsys, name):
    path = dataset / f"{name}_ckpt.0.gz"
    whole = path.read_bytes()
    for content in (whole[:-20], whole[: len(whole) // 2], b"", b"no gzip", gzip.compress(b"no array")):
        path.write_bytes(content)
        error = refused(offline, capsys, num_checkpoints=4)
        assert f"{name}_ckpt.0.gz cannot be read: it is truncated, damaged or no gzipped NumPy array" in error
    path.unlink()
    if name == "$store$_observation":  # a checkpoint without frames is not there
        assert "data has 3 checkpoints" in refused(offline, capsys, num_checkpoints=4)
    else:
        assert f"{name}_ckpt.0.gz cannot be read: No such file" in refused(offline, capsys, num_checkpoints=4)
    path.mkdir()
    assert f"{name}_ckpt.0.gz cannot be read: Is a directory" in refused(offline, capsys, num_checkpoints=4)


def test_two_damaged_files(offline, dataset, capsys):
    """Read at the same time: a sentence about either or both."""
    for number in (1, 2):
        path = dataset / f"$store$_reward_ckpt.{number}.gz"
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SystemExit) as refusal:
        offline.train(offline_args(offline, num_checkpoints=4))
    assert refusal.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) in (1, 2)
    for error in errors:
        assert error.startswith("error: data/$store$_reward_ckpt.")


@pytest.mark.parametrize("name", NAMES[:5])
def test_flipped_bits(offline, dataset, capsys, name):
    """One anywhere: the file is refused, or it was in what does not matter (a date, say) and the data are the same."""
    path = dataset / f"{name}_ckpt.0.gz"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)

    def read_all():
        replay = make_replay(offline, frame=(10, 10, 4))
        frames = replay.frames(np.arange(replay.buffer_size))
        return [replay.actions, replay.rewards, replay.terminations, replay.ages, frames]

    expected = read_all()
    caught = 0
    for _ in range(25):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            found = read_all()
        except SystemExit as refusal:
            assert refusal.code == 2
            assert path.name in capsys.readouterr().err
            caught += 1
            continue
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert caught > 10


class Bomb:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_a_pickle_does_not_run(offline, dataset, capsys):
    path = dataset / "$store$_action_ckpt.0.gz"
    with gzip.open(path, "wb") as file:
        np.save(file, np.array([Bomb()] * 250, object), allow_pickle=True)
    error = refused(offline, capsys, num_checkpoints=4)
    assert "$store$_action_ckpt.0.gz is object of shape (250,), not int32" in error
    path.write_bytes(gzip.compress(pickle.dumps(Bomb())))
    refused(offline, capsys, num_checkpoints=4)
    assert not Path("it_ran").exists()


def one_seven(array):
    array[3] = 7
    return array


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("$store$_action", lambda x: x.astype(np.int64), "is int64 of shape (250,), not int32 of shape (250,)"),
        ("$store$_action", lambda x: x[:0], "$store$_action_ckpt.0.gz has none"),
        ("$store$_action", one_seven, "has actions from 0 to 7, and MinAtar/Breakout-v1 has 0 to 2"),
        ("$store$_action", lambda x: x - 1, "has actions from -1 to 1, and MinAtar/Breakout-v1 has 0 to 2"),
        ("$store$_reward", lambda x: x[:, None], "is float32 of shape (250, 1), not float32 of shape (250,)"),
        ("$store$_reward", lambda x: x[:-60], "is float32 of shape (190,), not float32 of shape (250,)"),
        ("$store$_reward", lambda x: x * np.nan, "has a reward that is not finite"),
        ("$store$_observation", lambda x: x[..., :3], "is uint8 of shape (250, 10, 10, 3), not uint8 of shape"),
        ("$store$_observation", lambda x: x.astype(np.float32), "is float32 of shape (250, 10, 10, 4), not uint8"),
        ("$store$_observation", lambda x: x[:40], "of shape (40, 10, 10, 4), not uint8 of shape (250, 10, 10, 4)"),
        ("$store$_observation", np.asfortranarray, "cannot be read: it is truncated, damaged"),
        ("add_count", lambda x: np.arange(7), "add_count_ckpt.0.gz is int64 of shape (7,), not int64 of shape ()"),
        ("add_count", lambda x: np.float64(np.inf), "add_count_ckpt.0.gz is float64 of shape (), not int64"),
        ("add_count", lambda x: -x - 1, "add_count_ckpt.0.gz is no number of rows"),
    ],
)
def test_wrong_files(offline, dataset, capsys, name, change, words):
    rewrite(dataset / f"{name}_ckpt.0.gz", change)
    error = refused(offline, capsys, num_checkpoints=4)
    assert words in error
    assert "_ckpt.0.gz" in error


def test_headers_are_read_in_threads(offline):
    """As checkpoints are. Python's parser, interrupted at awkward moments by the garbage collector, mixes them up."""
    header = io.BytesIO()
    np.save(header, np.zeros(3, np.uint8))

    def read_deep(depth):
        if depth:
            return read_deep(depth - 1)
        return offline.read_header(io.BytesIO(header.getvalue()))

    def work(*_):
        return sum(range(200))

    interval = sys.getswitchinterval()
    threshold = gc.get_threshold()
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(10)
        gc.callbacks.append(work)
        with ThreadPoolExecutor(4) as pool:
            found = set(pool.map(read_deep, [0, 1, 2, 3, 4, 5, 6] * 800))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        gc.callbacks.remove(work)
    assert found == {((3,), np.dtype("uint8"))}


def test_checkpoints_are_loaded_in_threads(offline, dataset):
    """Each is the same as when it is read alone."""
    args = offline_args(offline)
    obs_space = gym.spaces.Box(0, 1, (10, 10, 4), bool)
    loaded = {}
    offline.load([2, 0, 3, 1], loaded, obs_space, 3, args, torch.device("cpu"), None)
    assert sorted(loaded) == [0, 1, 2, 3]
    for number, replay in loaded.items():
        alone = make_replay(offline, number, frame=(10, 10, 4))
        assert replay.packed == alone.packed
        for name in ("actions", "rewards", "terminations", "ages", "ready"):
            np.testing.assert_array_equal(getattr(replay, name), getattr(alone, name))


def test_rewards_that_are_not_clipped(offline, dataset, capsys):
    rewrite(dataset / "$store$_reward_ckpt.0.gz", lambda x: x * np.float32(3.5))
    replay = make_replay(offline, frame=(10, 10, 4))
    said = capsys.readouterr().out
    assert "$store$_reward_ckpt.0.gz has rewards beyond -1 and 1, and they are clipped" in said
    assert set(replay.rewards) == {0, 1}
    make_replay(offline, 1, frame=(10, 10, 4))
    assert capsys.readouterr().out == ""


def test_too_little_memory(offline, dataset, monkeypatch, capsys):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(percent=96.0))
    error = refused(offline, capsys)
    assert "_ckpt." in error
    assert "does not fit in memory: lower --num-checkpoints or --data-fraction" in error


def test_checkpoints_without_transitions(offline, tmp_path, capsys):
    """One that is too short, as the last of a dataset may be, is left out; one without a transition is refused."""
    folder = tmp_path / "data"
    steps = [(1, 1, 0.0, 0)] * 9
    write_checkpoint(folder, 0, [*PAD, *steps], 20, frame=(10, 10, 4))
    write_checkpoint(folder, 7, [*PAD, *steps[:1]], 20, frame=(10, 10, 4))
    offline.train(offline_args(offline, total_timesteps=20, iteration_steps=20))
    assert "checkpoint 7 of data has 4 rows of data, and is left out" in capsys.readouterr().out
    assert "data has 1 checkpoints" in refused(offline, capsys, num_checkpoints=2)
    write_checkpoint(folder, 0, [*PAD, *steps[:1], *PAD, *steps[:1]], 20, frame=(10, 10, 4))
    assert "ckpt.0.gz has no usable transition in its first 8 rows" in refused(offline, capsys)


@pytest.mark.parametrize("share", [0.001, 1e-9])
def test_a_fraction_of_nothing(offline, dataset, capsys, share):
    """A thousandth of 250 rows is none."""
    error = refused(offline, capsys, data_fraction=share)
    assert "has no usable transition in its first 0 rows" in error


def test_gaps_in_the_numbering(offline, dataset):
    """The dataset's own has some. Other files in the folder are let be."""
    for path in dataset.glob("*_ckpt.[12].gz"):
        path.rename(str(path).replace("ckpt.1", "ckpt.49").replace("ckpt.2", "ckpt.50"))
    (dataset / "export.json").write_text("{}")
    (dataset / "$store$_observation_ckpt.x.gz").write_bytes(b"")
    args = offline_args(offline, num_checkpoints=4)
    assert offline.find_checkpoints(args) == [0, 3, 49, 50]
    offline.train(args)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"dataset_dir": None}, "--dataset-dir is missing"),
        ({"dataset_dir": "nothing"}, "nothing has 0 checkpoints"),
        ({"num_checkpoints": 40}, "data has 4 checkpoints with data"),
        ({"num_checkpoints": 40}, "and --num-checkpoints is 40"),
        ({"num_checkpoints": 0}, "--num-checkpoints is 0"),
        ({"data_fraction": 1.5}, "--data-fraction is 1.5"),
        ({"data_fraction": 0.0}, "--data-fraction is 0.0"),
        ({"cql_alpha": -1.0}, "--cql-alpha is -1.0"),
        ({"dr3_coefficient": float("nan")}, "--dr3-coefficient is nan"),
        ({"learning_rate": 2.0}, "--learning-rate is 2.0"),
        ({"n_atoms": 1}, "--n-atoms is 1"),
        ({"v_min": 1.0}, "--v-min is 1.0"),
        ({"v_max": 0.0}, "--v-max is 0.0"),
        ({"iteration_steps": 202}, "--train-frequency is 4: it must divide the lengths and the other frequencies"),
        ({"total_timesteps": 402}, "--train-frequency is 4: it must divide"),
        ({"target_network_frequency": 41}, "--train-frequency is 4: it must divide"),
        ({"diagnostics_frequency": 10}, "--train-frequency is 4: it must divide"),
        ({"checkpoint_frequency": 101}, "--train-frequency is 4: it must divide"),
        ({"train_frequency": 3}, "--train-frequency is 3: it must divide"),
        ({"env_id": "ALE/Pnog-v5"}, "ALE/Pnog-v5"),
        ({"env_id": "CartPole-v1"}, "must be ALE/<Game>-v5 or MinAtar/<Game>-v1"),
        ({"resume": "nowhere"}, "nowhere: it has no checkpoint.pt"),
    ],
)
def test_wrong_flags(offline, dataset, capsys, flags, words):
    assert words in refused(offline, capsys, **flags)
    assert not Path("runs").exists()


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "MinAtar/Freeway-v1"])
def test_the_dataset_of_another_game(offline, dataset, capsys, env_id):
    error = refused(offline, capsys, env_id=env_id)
    assert "is uint8 of shape (250, 10, 10, 4), not uint8 of shape (250, " in error


# --------------------------------------------------------------------------------------------- losses
def random_batch(module, rng, num_actions=3, size=16):
    obs, next_obs = [torch.tensor(rng.integers(2, size=(size, 10, 10, 4)).astype(bool)) for _ in range(2)]
    return module.Batch(
        obs=obs,
        actions=torch.tensor(rng.integers(num_actions, size=size)),
        rewards=torch.tensor(rng.normal(size=size)).float(),
        next_obs=next_obs,
        discounts=torch.tensor(rng.choice([0.0, 0.99**3], size=size)).float(),
        rows=np.arange(size),
    )


def random_networks(module, args, rng):
    """An online and a target network with 3 actions, of biases that are not zero."""
    networks = [module.OfflineNetwork((10, 10, 4), 3, args) for _ in range(2)]
    for network in networks:
        for parameter in network.parameters():
            parameter.data += torch.from_numpy(rng.normal(size=parameter.shape) * 0.1).float()
    return networks


def double(network, obs):
    """Features and outputs of a network in float64: (batch, width), (batch, actions, atoms)."""
    values = {name: value.detach().double().numpy() for name, value in network.state_dict().items()}
    features = network.convolutions(obs).detach().double().numpy()
    features = np.maximum(features @ values["dense.0.weight"].T + values["dense.0.bias"], 0)
    output = (features @ values["head.weight"].T + values["head.bias"]).reshape(len(obs), 3, -1)
    if "value.weight" in values:
        value = features @ values["value.weight"].T + values["value.bias"]
        output = value[:, None] + output - output.mean(axis=1, keepdims=True)
    return features, output


def softmax(x):
    shifted = np.exp(x - x.max())
    return shifted / shifted.sum()


def slow_c51(output, next_output, target_output, action, reward, discount):
    """Cross-entropy with the projected distribution of the action that the online network prefers, and all Q."""
    support = np.linspace(-2, 3, 11)
    means = [sum(softmax(row) * support) for row in output]
    best = int(np.argmax([sum(softmax(row) * support) for row in next_output]))
    mass = np.zeros(11)
    for atom, share in zip(support, softmax(target_output[best]), strict=True):
        place = (min(max(reward + discount * atom, -2), 3) + 2) / 0.5
        low = int(np.floor(place))
        mass[low] += share * (1 - (place - low))
        if low < 10:
            mass[low + 1] += share * (place - low)
    return -sum(mass * np.log(softmax(output[action]))), means


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_losses_against_slow_loops(offline, algorithm):
    rng = np.random.default_rng(1)
    args = offline_args(offline, algorithm=algorithm, n_atoms=11, v_min=-2.0, v_max=3.0, dr3_coefficient=0.3)
    q_network, target_network = random_networks(offline, args, rng)
    batch = random_batch(offline, rng)
    targets = offline.offline_target(q_network, target_network, batch)
    td_losses, cql, dr3, q_values = offline.offline_loss(q_network, batch, targets, args)
    features, output = double(q_network, batch.obs)
    next_features, next_output = double(q_network, batch.next_obs)
    _, target_output = double(target_network, batch.next_obs)
    for i in range(16):
        action = int(batch.actions[i])
        reward = batch.rewards[i].item()
        discount = batch.discounts[i].item()
        if algorithm == "cql-c51":
            td, means = slow_c51(output[i], next_output[i], target_output[i], action, reward, discount)
        else:
            means = output[i][:, 0]
            error = reward + discount * max(target_output[i][:, 0]) - means[action]
            td = error**2
            if algorithm == "cql-dr3":
                td = 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5
        expected = {
            "td": td,
            "q": means[action],
            "cql": np.log(sum(np.exp(means))) - means[action],
            "dr3": abs(sum(features[i] * next_features[i])),
        }
        found = {"td": td_losses[i], "q": q_values[i], "cql": cql[i], "dr3": dr3[i]}
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_dr3_is_not_computed_where_it_does_not_count(offline):
    rng = np.random.default_rng(1)
    args = offline_args(offline)
    q_network, target_network = random_networks(offline, args, rng)
    batch = random_batch(offline, rng)
    targets = offline.offline_target(q_network, target_network, batch)
    _, _, dr3, _ = offline.offline_loss(q_network, batch, targets, args)
    assert not dr3.any()


def test_gradients_flow_where_they_should(offline):
    """Through both features of DR3, into the online network alone."""
    rng = np.random.default_rng(2)
    args = offline_args(offline, algorithm="cql-dr3")
    q_network, target_network = random_networks(offline, args, rng)
    batch = random_batch(offline, rng)
    targets = offline.offline_target(q_network, target_network, batch)
    assert not targets.requires_grad
    td_losses, cql, dr3, _ = offline.offline_loss(q_network, batch, targets, args)
    for loss in (td_losses, cql):
        q_network.zero_grad()
        loss.mean().backward(retain_graph=True)
        assert q_network.head.weight.grad.any()
        assert q_network.dense[0].bias.grad.any()
    q_network.zero_grad()
    dr3.mean().backward()
    assert q_network.head.weight.grad is None  # DR3 is of the features
    found = q_network.dense[0].bias.grad.clone()

    with torch.no_grad():
        features = q_network.features(batch.obs)
        next_features = q_network.features(batch.next_obs)
    parts = []
    for moving, still in ((batch.obs, next_features), (batch.next_obs, features)):
        q_network.zero_grad()
        (q_network.features(moving) * still).sum(dim=1).abs().mean().backward()
        parts.append(q_network.dense[0].bias.grad.clone())
    assert parts[0].any()
    assert parts[1].any()
    assert torch.allclose(found, parts[0] + parts[1], atol=1e-6)
    assert all(parameter.grad is None for parameter in target_network.parameters())


@pytest.mark.parametrize("algorithm", ["dqn", "cql-c51"])
def test_the_network_on_ale(offline, dqn, algorithm):
    """Pixels over 255, Dopamine's layers and SAME padding, Xavier's initialisation, biases zero."""
    torch.manual_seed(1)
    network = offline.OfflineNetwork((4, 84, 84), 6, offline_args(offline, algorithm=algorithm))
    generator = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8, generator=generator)
    output = network(obs)
    assert output.shape == (3, 6, 51 if algorithm == "cql-c51" else 1)
    assert network.features(obs).shape == (3, 512)
    assert network.dense[0].in_features == 7_744
    assert torch.allclose(output, network(obs / 255), atol=1e-6)
    assert network.q_values(obs).shape == (3, 6)
    if algorithm == "dqn":  # the same as dqn.py's
        torch.manual_seed(1)
        other = dqn.QNetwork((4, 84, 84), 6, make_args(dqn))
        assert torch.allclose(other(obs), network.q_values(obs), atol=1e-6)
    for layer in (network.dense[0], network.head):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


# ------------------------------------------------------------------------------------------- training
def test_defaults_of_the_algorithms(offline, capsys):
    """As the protocol has them; flags that are given go before."""
    expected = {
        "dqn": (6.25e-5, 1.5e-4, 8_000, 1.0, 0.0, 0.0),
        "cql-dr3": (5e-5, 3.125e-4, 8_000, 1.0, 0.1, 0.1),
        "cql-c51": (6.25e-5, 1.5e-4, 400, 0.05, 0.1, 0.0),
    }
    names = ["learning_rate", "adam_eps", "target_network_frequency", "data_fraction", "cql_alpha", "dr3_coefficient"]
    for algorithm, values in expected.items():
        args = tyro.cli(offline.Args, args=["--dataset-dir", "x", "--algorithm", algorithm])
        assert args.algorithm == algorithm
        assert tuple(getattr(args, name) for name in names) == values
    assert tyro.cli(offline.Args, args=["--dataset-dir", "x"]) == offline.Args(dataset_dir="x", algorithm="dqn")

    given = ["--dataset-dir", "x", "--learning-rate", "1e-3", "--algorithm=cql-dr3", "--dr3-coefficient", "0"]
    args = tyro.cli(offline.Args, args=given)
    assert (args.learning_rate, args.cql_alpha, args.dr3_coefficient) == (1e-3, 0.1, 0.0)
    assert (args.batch_size, args.num_checkpoints, args.train_frequency) == (32, 5, 4)
    assert (args.total_timesteps, args.iteration_steps, args.eval_steps) == (200 * 250_000, 4 * 62_500, 125_000)
    with pytest.raises(SystemExit) as refusal:
        tyro.cli(offline.Args, args=["--dataset-dir", "x", "--algorithm", "sarsa"])
    assert refusal.value.code == 2


@pytest.mark.parametrize(("algorithm", "n_step"), [("dqn", 3), ("cql-dr3", 1), ("cql-c51", 3)])
def test_a_run_and_its_repetition(offline, dataset, algorithm, n_step):
    flags = {
        "algorithm": algorithm,
        "n_step": n_step,
        "num_checkpoints": 2,
        "total_timesteps": 1_000,
        "iteration_steps": 400,  # the last is shorter
        "eval_steps": 60,
        "save_model": True,
        "diagnostics_frequency": 200,
    }
    folders = [offline.train(offline_args(offline, **flags)) for _ in range(2)]
    first, again = [weights(folder) for folder in folders]
    for name, value in first.items():
        assert torch.equal(value, again[name]), name

    logged = scalars(folders[0])
    assert [step for step, _ in logged["eval/episodic_return"]] == [400, 800, 1_000]
    assert [step for step, _ in logged["diagnostics/srank"]] == [200, 400, 600, 800, 1_000]
    for tag in ("losses/td_loss", "losses/cql", "losses/dr3", "losses/q_values", "charts/SPS"):
        assert [step for step, _ in logged[tag]] == [1_000]
    assert (logged["losses/dr3"][0][1] > 0) == (algorithm == "cql-dr3")

    # the weights that are saved are those that were evaluated
    args = offline_args(offline, algorithm=algorithm, eval_steps=60)
    network = offline.OfflineNetwork((10, 10, 4), 3, args)
    network.load_state_dict(first)
    silent = SimpleNamespace(add_scalar=lambda *_: None)
    envs = offline.make_env(args)
    played = offline.evaluate_steps(args, envs, network, 1_000, torch.device("cpu"), folders[0], silent)
    assert played == pytest.approx(logged["eval/episodic_return"][-1][1])


def test_the_seed_decides(offline, dataset):
    flags = {"total_timesteps": 40, "iteration_steps": 40, "save_model": True}
    one, other = [weights(offline.train(offline_args(offline, seed=seed, **flags))) for seed in (1, 2)]
    assert not torch.equal(one["head.weight"], other["head.weight"])


@pytest.mark.parametrize(("cql_alpha", "dr3_coefficient"), [(0.0, 0.0), (2.0, 0.0), (0.0, 3.0), (2.0, 3.0)])
def test_the_terms_weigh_in(offline, dataset, monkeypatch, cql_alpha, dr3_coefficient):
    """The loss that is minimised is the mean of the TD loss and of the terms by their weights."""
    terms = []
    minimised = []
    offline_loss = offline.offline_loss
    backward = torch.Tensor.backward

    def spied_loss(*args):
        terms.append(offline_loss(*args))
        return terms[-1]

    def spied_backward(loss):
        minimised.append(loss.item())
        backward(loss)

    monkeypatch.setattr(offline, "offline_loss", spied_loss)
    monkeypatch.setattr(torch.Tensor, "backward", spied_backward)
    flags = {"cql_alpha": cql_alpha, "dr3_coefficient": dr3_coefficient, "algorithm": "cql-dr3"}
    offline.train(offline_args(offline, total_timesteps=20, iteration_steps=20, **flags))
    assert len(minimised) == 5
    for loss, (td_losses, cql, dr3, _) in zip(minimised, terms, strict=True):
        expected = td_losses.mean() + cql_alpha * cql.mean() + dr3_coefficient * dr3.mean()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert cql.mean() > 0
        assert (dr3.mean() > 0) == (dr3_coefficient > 0)


def test_checkpoints_are_drawn_anew(offline, dataset, monkeypatch):
    """In each iteration; each minibatch comes from one of those drawn."""
    drawn = []
    sampled = []
    load_ = offline.load
    sample = offline.DatasetReplay.sample

    def spied_load(numbers, *args):
        drawn.append(sorted(numbers))
        load_(numbers, *args)

    def spied_sample(replay, *args):
        sampled.append(int(replay.paths["action"].name.split(".")[-2]))
        return sample(replay, *args)

    monkeypatch.setattr(offline, "load", spied_load)
    monkeypatch.setattr(offline.DatasetReplay, "sample", spied_sample)
    offline.train(offline_args(offline, num_checkpoints=2, total_timesteps=1_600))
    assert len(drawn) == len(sampled) == 400
    pairs = set()
    for update in range(0, 400, 50):  # the first of each iteration
        pair = drawn[update]
        assert drawn[update : update + 50] == [pair] * 50
        counts = [sampled[update : update + 50].count(number) for number in pair]
        assert len(set(pair)) == 2
        assert sum(counts) == 50
        assert min(counts) > 10
        pairs.add(tuple(pair))
    assert len(pairs) > 1


@pytest.mark.parametrize("available", [10**10, 0])
def test_replays_are_kept_while_there_is_memory(offline, dataset, monkeypatch, available):
    """Each is read once; or, where memory is short, the old one is gone before the next is read."""
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=available, percent=1.0))
    living = weakref.WeakSet()
    made = []
    make = offline.DatasetReplay.__init__

    def spied(replay, paths, *args):
        made.append((paths["action"], len(living)))
        make(replay, paths, *args)
        living.add(replay)

    monkeypatch.setattr(offline.DatasetReplay, "__init__", spied)
    offline.train(offline_args(offline, total_timesteps=1_000, iteration_steps=40, diagnostics_frequency=20))
    numbers = [number for number, _ in made]
    alive = [count for _, count in made]
    assert len(set(numbers)) == 4
    if available:
        assert alive == [0, 1, 2, 3]
    else:
        assert len(numbers) > 8
        assert alive == [0] * len(numbers)


def test_nothing_is_played_but_evaluations(offline, dataset, monkeypatch):
    calls = []
    reset = offline.reset

    def spied(envs, seed, stream, episode):
        calls.append(stream)
        return reset(envs, seed, stream, episode)

    monkeypatch.setattr(offline, "reset", spied)
    offline.train(offline_args(offline))
    assert calls == []
    offline.train(offline_args(offline, eval_steps=50))
    assert set(calls) == {200, 400}  # streams of their own


def test_an_evaluation_plays_as_many_steps_as_asked(offline, monkeypatch):
    """And its last game to the end."""
    args = offline_args(offline, eval_steps=300)
    envs = offline.make_env(args)
    network = offline.OfflineNetwork((10, 10, 4), 3, args)
    played = []
    logged = []
    step = envs.step

    def spied(actions):
        played.append(step(actions))
        return played[-1]

    monkeypatch.setattr(envs, "step", spied)
    writer = SimpleNamespace(add_scalar=lambda *scalar: logged.append(scalar))
    mean = offline.evaluate_steps(args, envs, network, 5, torch.device("cpu"), None, writer)
    ends = [i for i, (_, _, terminations, truncations, _) in enumerate(played, 1) if terminations[0] or truncations[0]]
    assert ends[-1] == len(played)
    assert ends[-2] < 300 <= ends[-1]
    assert mean == pytest.approx(sum(rewards[0] for _, rewards, *_ in played) / len(ends))
    assert logged == [("eval/episodic_return", mean, 5)]


def test_it_learns_which_action_pays(offline, tmp_path):
    """Games of one step, in which action 2 pays 1 and the others nothing: Q learns just that."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        action = int(rng.integers(3))
        rows += [*PAD, (1, action, float(action == 2), 1)]
    write_checkpoint(tmp_path / "data", 0, rows, 1_000, frame=(10, 10, 4))
    flags = {"total_timesteps": 1_200, "learning_rate": 1e-3, "save_model": True}
    folder = offline.train(offline_args(offline, **flags))
    network = offline.OfflineNetwork((10, 10, 4), 3, offline_args(offline))
    network.load_state_dict(weights(folder))
    q_values = network.q_values(torch.ones(1, 10, 10, 4, dtype=torch.bool))[0]
    assert q_values.tolist() == pytest.approx([0, 0, 1], abs=0.1)


def test_the_target_network_and_the_optimizer(offline, dataset, monkeypatch):
    """Copies at the steps that are multiples of the period; Adam has the flags' step size and epsilon."""
    online = []  # a layer at each update
    target = []
    made = []
    offline_target = offline.offline_target
    adam = torch.optim.Adam

    def spied_target(q_network, target_network, batch):
        online.append(q_network.head.weight.detach().clone())
        target.append(target_network.head.weight.detach().clone())
        return offline_target(q_network, target_network, batch)

    def spied_adam(*args, **kwargs):
        made.append(adam(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(offline, "offline_target", spied_target)
    monkeypatch.setattr(torch.optim, "Adam", spied_adam)
    offline.train(offline_args(offline, learning_rate=3e-3, adam_eps=7e-3, target_network_frequency=80))
    assert len(target) == 100
    for update in range(100):
        assert torch.equal(target[update], online[update // 20 * 20])
        assert not torch.equal(online[update], online[update - 1])
    (optimizer,) = made
    assert (optimizer.defaults["lr"], optimizer.defaults["eps"]) == (3e-3, 7e-3)
    assert len(optimizer.state) == 6


def test_a_loss_that_is_not_finite(offline, dataset, monkeypatch, capsys):
    offline_loss = offline.offline_loss
    calls = []

    def spied(*args):
        calls.append(1)
        td_losses, *others = offline_loss(*args)
        return td_losses * (float("nan") if len(calls) == 30 else 1), *others

    monkeypatch.setattr(offline, "offline_loss", spied)
    error = refused(offline, capsys, checkpoint_frequency=40)
    assert "the loss is not finite at step 120; runs/" in error
    (path,) = Path("runs").glob("*/checkpoint.pt")
    assert str(path) in error
    assert torch.load(path, weights_only=True)["global_step"] == 80


# --------------------------------------------------------------------------------------------- resume
SMALL_RUN = {
    "num_checkpoints": 2,
    "total_timesteps": 600,
    "eval_steps": 20,
    "save_model": True,
    "diagnostics_frequency": 140,
    "algorithm": "cql-dr3",
}


@pytest.fixture(scope="module")
def whole(four_checkpoints):
    """The run that is not interrupted."""
    module = load(ROOT / "agents" / "cql_offline.py")
    with contextlib.chdir(four_checkpoints.parent):
        return module.train(offline_args(module, **SMALL_RUN)).resolve()


def stop(module, monkeypatch, owner, name, at):
    """Ask the run to end in call number `at` of a function."""
    calls = []
    real = getattr(owner, name)

    def spied(*args):
        calls.append(1)
        if len(calls) == at:
            module.STOPPED_BY.append(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(owner, name, spied)


def interrupted(module, monkeypatch, name, counts):
    """Train, interrupted in these numbers of calls of a function; return the run's folder."""
    owner = module.DatasetReplay if name == "sample" else module
    folder = None
    for count in counts:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            stop(module, patch, owner, name, count)
            module.train(offline_args(module, resume=folder and str(folder), **SMALL_RUN))
        assert ended.value.code == 128 + signal.SIGTERM
        module.STOPPED_BY.clear()
        (folder,) = Path("runs").iterdir()
        assert not (folder / "finished").exists()
    assert module.train(offline_args(module, resume=str(folder), **SMALL_RUN)) == folder
    return folder


def check_equal(one, other, place):
    """Two values of a checkpoint are the same, bit for bit."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key, value in one.items():
            check_equal(value, other[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for i, value in enumerate(one):
            check_equal(value, other[i], f"{place}/{i}")
    else:
        assert one == other, place


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sample", [1]),
        ("sample", [29, 40, 60]),  # each time in the middle of an iteration
        ("sample", [50]),  # at an iteration's end, before its evaluation
        ("sample", [35]),  # at diagnostics
        ("evaluate_steps", [1, 2]),  # at the end of the first iteration, and of the second
        ("act", [7]),  # in the middle of a game
    ],
)
def test_stopped_and_resumed(offline, dataset, whole, monkeypatch, name, counts):
    """It ends as the uninterrupted run does, bit for bit, and has logged the same."""
    resumed = interrupted(offline, monkeypatch, name, counts)
    states = []
    logs = []
    for folder in (whole, resumed):
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        del state["args"]["resume"]
        states.append(state)
        logged = scalars(folder)
        logged.pop("charts/SPS", None)
        logs.append(logged)
        assert (folder / "finished").exists()
    check_equal(*states, "checkpoint")
    assert states[0]["global_step"] == 600
    assert len(states[0]["drawn"]) == 2
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[0]["eval/episodic_return"]] == [200, 400, 600]
    check_equal(weights(whole), weights(resumed), "model")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_on_a_gpu(offline, dataset, algorithm):
    flags = {"algorithm": algorithm, "total_timesteps": 1_000, "save_model": True, "eval_steps": 60}
    folder = offline.train(offline_args(offline, cuda=True, **flags))
    assert np.isfinite(scalars(folder)["losses/td_loss"][-1][1])
    assert np.isfinite(scalars(folder)["eval/episodic_return"][-1][1])
