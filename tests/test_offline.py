"""Recording, reading what was recorded, and learning from it."""

import copy
import gc
import gzip
import io
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, load, make_args, scalars, weights

NAMES = ["$store$_observation", "$store$_action", "$store$_reward", "$store$_terminal", "add_count", "invalid_range"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def offline():
    return load(ROOT / "agents" / "cql_offline.py")


def offline_args(module, **changes):
    """Flags at a size that a test can run; the algorithm's own defaults first, as on the command line."""
    small = {"env_id": "MinAtar/Breakout-v1", "cuda": False, "dataset_dir": "data", "num_checkpoints": 1}
    small |= {"total_timesteps": 400, "iteration_steps": 200, "target_network_frequency": 40, "batch_size": 8}
    small |= {"eval_steps": 0, "data_fraction": 1.0, "diagnostics_frequency": 0}
    return module.Args(**(module.DEFAULTS[changes.get("algorithm", "dqn")] | small | changes))


# -------------------------------------------------------------- an independent reader, from the layout's description
def read(path):
    with gzip.open(path, "rb") as file:
        return np.load(io.BytesIO(file.read()), allow_pickle=False)


def read_checkpoint(folder, number):
    """The rows of a checkpoint that are data: a list of (frame, action, reward, terminal), padding included."""
    arrays = [read(folder / f"{name}_ckpt.{number}.gz") for name in NAMES]
    used = int(arrays[4]) % len(arrays[1])
    return [tuple(array[row] for array in arrays[:4]) for row in range(used)]


class Spy:
    """What an agent stores, step by step."""

    def __init__(self, monkeypatch, module):
        self.steps = []
        add = module.FrameReplay.add

        def spied(replay, obs, next_obs, actions, rewards, terminations, truncations):
            channels = replay.observations.shape[2]
            step = (obs[0, -channels:].copy(), int(actions[0]), float(rewards[0]), bool(terminations[0]))
            self.steps.append((*step, bool(truncations[0]), replay.episode_steps))
            self.replay = replay
            return add(replay, obs, next_obs, actions, rewards, terminations, truncations)

        monkeypatch.setattr(module.FrameReplay, "add", spied)


# ------------------------------------------------------------------------------------------------------------ recording
def check_recording(folder, steps, size, frame):
    """Every file has the layout, and together they hold the steps. With a size of None there is one, just as long."""
    numbers = sorted({int(path.name.split(".")[-2]) for path in folder.iterdir()})
    assert {path.name for path in folder.iterdir()} == {f"{name}_ckpt.{n}.gz" for name in NAMES for n in numbers}
    assert numbers == list(range(len(numbers)))
    position = 0
    for number in numbers:
        arrays = [read(folder / f"{name}_ckpt.{number}.gz") for name in NAMES]
        assert [array.dtype.name for array in arrays] == ["uint8", "int32", "float32", "uint8", "int64", "int64"]
        size = size or int(arrays[4]) + 1
        assert [array.shape for array in arrays] == [(size, *frame), (size,), (size,), (size,), (), (5,)]
        used = int(arrays[4]) - number * size
        assert 0 < used < size
        assert arrays[5].tolist() == [(used + i) % size for i in range(-1, 4)]
        row = 0
        while row < used:
            image, action, reward, terminal, _, age = steps[position]
            if age == 0:
                for _ in range(3):
                    assert not any(array[row].any() for array in arrays[:4])
                    row += 1
            assert (arrays[0][row] == image.reshape(frame)).all()
            assert (arrays[1][row], arrays[2][row], arrays[3][row]) == (action, reward, terminal)
            row, position = row + 1, position + 1
        assert not any(array[used:].any() for array in arrays[:4])
        if number != numbers[-1]:  # full, but for the rows that an episode's beginning would not have fitted in
            assert used >= size - 4
    assert position == len(steps)
    return numbers


def test_every_agent_records(agent, monkeypatch, tmp_path):
    """On MinAtar, with truncations, checkpoints that end within games, and a replay that wraps."""
    spy = Spy(monkeypatch, agent)
    args = make_args(agent, total_timesteps=700, buffer_size=150, max_episode_steps=9, n_step=2, record_dataset="data")
    agent.train(args)
    assert any(step[4] for step in spy.steps) and any(step[3] for step in spy.steps)
    numbers = check_recording(tmp_path / "data", spy.steps, 150, (4, 10, 10))
    assert len(numbers) > 5
    assert not [path for path in (tmp_path / "data").iterdir() if path.suffix != ".gz"]


def test_recording_on_ale(dqn, monkeypatch, tmp_path):
    spy = Spy(monkeypatch, dqn)
    flags = {"env_id": "ALE/Pong-v5", "total_timesteps": 500, "buffer_size": 200, "max_episode_steps": 150}
    dqn.train(make_args(dqn, learning_starts=600, record_dataset="data", **flags))
    assert len(check_recording(tmp_path / "data", spy.steps, 200, (84, 84))) == 3


def test_an_episode_longer_than_the_replay(dqn, monkeypatch, tmp_path):
    """... that is truncated just when the replay has come round: nothing is lost."""
    for length in range(192, 204):
        spy = Spy(monkeypatch, dqn)
        flags = {"env_id": "MinAtar/Freeway-v1", "total_timesteps": 245, "buffer_size": 100, "learning_starts": 300}
        dqn.train(make_args(dqn, max_episode_steps=length, record_dataset=f"data{length}", **flags))
        assert sum(step[4] for step in spy.steps) == 1 and not any(step[3] for step in spy.steps)
        check_recording(tmp_path / f"data{length}", spy.steps, 100, (7, 10, 10))


def test_recording_does_not_change_the_run(dqn):
    plain, recorded = [weights(dqn.train(make_args(dqn, save_model=True, record_dataset=d))) for d in (None, "data")]
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), recorded.values(), strict=True))


def test_a_life_is_an_episode_in_the_recordings_of_atari_100k(der, monkeypatch, tmp_path):
    spy = Spy(monkeypatch, der)
    flags = {"env_id": "ALE/Breakout-v5", "total_timesteps": 400, "learning_starts": 400, "start_e": 1.0}
    der.train(make_args(der, record_dataset="data", **flags))
    assert sum(step[3] for step in spy.steps) >= 2
    check_recording(tmp_path / "data", spy.steps, None, (84, 84))


def test_a_folder_with_something_in_it_is_refused(dqn, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit) as exit_:
        dqn.train(make_args(dqn, record_dataset="data"))
    assert exit_.value.code == 2 and "data is not empty" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit):
        dqn.train(make_args(dqn, record_dataset="data/thesis.tex"))
    assert "could not be made" in capsys.readouterr().err


def test_a_disk_that_is_full_does_not_end_the_run(dqn, monkeypatch, tmp_path, capsys):
    """The second checkpoint cannot be written: the run says so, goes on, and the third is there."""
    real = gzip.open

    def full(path, *args, **kwargs):
        if "action_ckpt.1" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(dqn.gzip, "open", full)
    dqn.train(make_args(dqn, total_timesteps=400, buffer_size=100, record_dataset="data"))
    assert "checkpoint 1 of data is not written: No space left on device" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert {f"{name}_ckpt.{number}.gz" for name in NAMES for number in (0, 2, 3)} <= names
    assert not [name for name in names if ".1." in name or name.endswith(".tmp")]


# -------------------------------------------------------------------------------------------------------------- reading
def write_checkpoint(folder, number, rows, size, frame=(10, 10), add_count=None, **kinds):
    """Write rows (frame value, action, reward, terminal), stale rows beyond them. A frame is filled with its value."""
    folder.mkdir(exist_ok=True)
    stale = [(200, 5, -1.0, 1)] * (size - len(rows))
    values, actions, rewards, terminals = zip(*rows, *stale, strict=True)
    frames = np.zeros((size, *frame), np.uint8) + np.reshape(values, (-1, *[1] * len(frame)))
    arrays = {"$store$_observation": frames.astype(kinds.get("frames", np.uint8))}
    arrays |= {"$store$_action": np.array(actions, kinds.get("actions", np.int32))}
    arrays |= {"$store$_reward": np.array(rewards, np.float32), "$store$_terminal": np.array(terminals, np.uint8)}
    arrays |= {"add_count": np.array(len(rows) if add_count is None else add_count), "invalid_range": np.arange(5)}
    for name, array in arrays.items():
        with gzip.open(folder / f"{name}_ckpt.{number}.gz", "wb") as file:
            np.save(file, array, allow_pickle=False)


class Envs:
    """The spaces of a vector of ALE games with 10x10 frames, and six actions."""

    def __init__(self, shape=(4, 10, 10), dtype=np.uint8, num_actions=6):
        from gymnasium import spaces

        self.single_observation_space = spaces.Box(0, 255, shape, dtype)
        self.single_action_space = spaces.Discrete(num_actions)


def read_replay(module, folder, envs=None, number=0, **flags):
    args = offline_args(module, env_id="ALE/Pong-v5", **flags)
    return module.DatasetReplay(folder, number, envs or Envs(), args, torch.device("cpu"))


PAD = [(0, 0, 0.0, 0)] * 3


def transitions(replay):
    """{newest frame of s: (stack of s, action, stack of s', reward, discount)} of all that can be sampled."""
    batch = replay._get_samples(replay.usable)
    stacks = [x[:, :, 0, 0].int().tolist() for x in (batch.obs, batch.next_obs)]
    columns = [stacks[0], batch.actions.tolist(), stacks[1], batch.rewards.tolist(), batch.discounts.tolist()]
    return {row[0][-1]: row for row in zip(*columns, strict=True)}


@pytest.mark.parametrize("earlier", [0, 50])
def test_one_step_transitions_by_hand(offline, tmp_path, earlier):
    """Two games: three steps to a termination, then two to a truncation; then the first two steps of a third.

    The rows are `earlier` passes over the 30 of the ring on, and add_count has counted those.
    """
    rows = [*PAD, (11, 1, 0.0, 0), (12, 2, 1.0, 0), (13, 3, -1.0, 1), *PAD, (21, 1, 0.5, 0), (22, 2, 0.0, 0)]
    rows += [*PAD, (31, 4, 0.25, 0), (32, 5, 0.0, 0)]
    write_checkpoint(tmp_path / "data", 0, rows, 30, add_count=earlier * 30 + len(rows))
    found = transitions(read_replay(offline, tmp_path / "data", gamma=0.5))
    assert found == {
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
    found = transitions(read_replay(offline, tmp_path / "data", gamma=0.5, n_step=3))
    assert found == {
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
    replay = read_replay(offline, tmp_path / "data")
    assert replay.frames(replay.usable)[:, 0, 0].tolist() == sampled
    batch = replay._get_samples(replay.usable)
    assert not (batch.obs == 200).any() and not (batch.next_obs == 200).any()  # of the stale rows


def slow_transitions(rows, n, gamma, stack):
    """All n-step transitions of a checkpoint's rows, one obvious step at a time, numbered by their first steps."""
    episodes, found, number = [], [], 0
    for frame, action, reward, terminal in rows:
        if not (frame.any() or action or reward or terminal):
            episodes.append([])
        else:
            episodes[-1].append((frame, action, reward, terminal))
    for episode in [episode for episode in episodes if episode]:
        for t in range(len(episode)):
            total, end = 0.0, None
            for k in range(n):
                if t + k >= len(episode):
                    break
                total += gamma**k * float(episode[t + k][2])
                if episode[t + k][3]:
                    end = "terminal"
                    break
            else:
                end = "bootstrap" if t + n < len(episode) else None
            if end:
                images = [episode[i][0] if i >= 0 else np.zeros_like(frame) for i in range(t - stack + 1, t + 1)]
                after = [
                    episode[i][0] if i >= 0 and end == "bootstrap" else np.zeros_like(frame)
                    for i in range(t + n - stack + 1, t + n + 1)
                ]
                found.append((number, images, episode[t][1], after, total, gamma**n * (end == "bootstrap")))
            number += 1
    return found


@pytest.mark.parametrize("n_step", [1, 3])
def test_a_recording_of_pong_against_an_independent_reader(dqn, offline, tmp_path, n_step):
    """dqn.py records Pong, with games cut short; what the loader makes of it is recomputed by a slow loop."""
    flags = {"env_id": "ALE/Pong-v5", "total_timesteps": 330, "max_episode_steps": 100, "learning_starts": 400}
    dqn.train(make_args(dqn, record_dataset="data", **flags))
    envs = dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5"))
    replay = read_replay(offline, tmp_path / "data", envs, n_step=n_step, gamma=0.9)
    expected = slow_transitions(read_checkpoint(tmp_path / "data", 0), n_step, 0.9, 4)
    assert replay.usable.tolist() == [row for row, *_ in expected]
    assert len(expected) == 330 - 4 * n_step  # every game lost n, and so did the last
    batch = replay._get_samples(replay.usable)
    for i, (_, images, action, after, reward, discount) in enumerate(expected):
        assert (batch.obs[i].numpy() == np.stack(images)).all() and (batch.next_obs[i].numpy() == np.stack(after)).all()
        assert batch.actions[i] == action
        assert batch.rewards[i].item() == pytest.approx(reward) and batch.discounts[i].item() == pytest.approx(discount)


@pytest.mark.parametrize("env_id", ["MinAtar/Breakout-v1", "ALE/Breakout-v5"])
@pytest.mark.parametrize("n_step", [1, 3])
def test_the_same_batches_as_the_online_replay(dqn, offline, monkeypatch, tmp_path, n_step, env_id):
    """The same steps, in the replay that they were recorded from and as they are read: for the same rows, all equal."""
    spy = Spy(monkeypatch, dqn)
    flags = {"env_id": env_id, "n_step": n_step, "total_timesteps": 400, "max_episode_steps": 120}
    dqn.train(make_args(dqn, record_dataset="data", buffer_size=2_000, learning_starts=390, **flags))
    online, envs = spy.replay, dqn.make_env(make_args(dqn, env_id=env_id))
    args = offline_args(offline, env_id=env_id, n_step=n_step)
    recorded = offline.DatasetReplay(tmp_path / "data", 0, envs, args, torch.device("cpu"))
    rows = np.flatnonzero(online.age >= 0)[: len(recorded.age)]  # of the online replay, which keeps truncations' frames
    known = online.priorities.flat[rows] > 0
    last = np.append(online.age[(rows + 1) % online.buffer_size][:-1] < 0, True) & ~online.dones[rows]
    known &= ~np.convolve(last, np.ones(n_step), "full")[n_step - 1 :].astype(bool)  # the next state is not recorded
    assert set(recorded.usable) == set(np.flatnonzero(known))
    ours, theirs = recorded._get_samples(recorded.usable), online._get_samples(rows[known], np.ones(known.sum()))
    for name in ("obs", "actions", "next_obs", "rewards", "discounts", "weights"):
        left, right = getattr(ours, name), getattr(theirs, name)
        assert left.dtype == right.dtype and torch.equal(left, right), name


def test_the_fraction_is_of_the_first_rows(offline, tmp_path):
    rows = [*PAD, *[(10 + i, 1, 0.0, 0) for i in range(17)]]
    write_checkpoint(tmp_path / "data", 0, rows, 40)
    assert read_replay(offline, tmp_path / "data").usable.tolist() == list(range(16))
    assert read_replay(offline, tmp_path / "data", data_fraction=0.25).usable.tolist() == list(range(6))


def test_sampling_is_uniform(offline, tmp_path):
    write_checkpoint(tmp_path / "data", 0, [*PAD, *[(i, 1, 0.0, 0) for i in range(1, 12)]], 20)
    replay = read_replay(offline, tmp_path / "data")
    batch = replay.sample(20_000, np.random.default_rng(0))
    counts = np.bincount(batch.rows, minlength=10)
    assert len(counts) == 10 and (np.abs(counts - 2_000) < 5 * 2_000**0.5).all()
    assert batch.obs.shape == (20_000, 4, 10, 10) and replay.probe(np.random.default_rng(0)).shape == (256, 4, 10, 10)


# ------------------------------------------------------------------------------------------------------------ bad input
def refused(module, capsys, **flags):
    with pytest.raises(SystemExit) as exit_:
        try:
            module.train(offline_args(module, **flags))
        except module.DatasetError as error:
            module.fail(str(error))  # as the command line does
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.fixture
def dataset(dqn, tmp_path):
    """Four checkpoints of MinAtar's Breakout, the last of them not full."""
    dqn.train(make_args(dqn, total_timesteps=700, buffer_size=250, record_dataset="data"))
    shutil.rmtree(tmp_path / "runs")
    return tmp_path / "data"


def rewrite(path, change):
    array = change(read(path))
    with gzip.open(path, "wb") as file:
        np.save(file, array)


def count_of(dataset):
    return len(list(dataset.glob("add*")))


@pytest.mark.parametrize("name", NAMES[:5])
def test_damaged_files(offline, dataset, capsys, name):
    path = dataset / f"{name}_ckpt.0.gz"
    whole, words = path.read_bytes(), f"{name}_ckpt.0.gz cannot be read: it is truncated, damaged or no gzipped"
    for content in (whole[:-20], whole[: len(whole) // 2], b"", b"no gzip", gzip.compress(b"no array")):
        path.write_bytes(content)
        assert words in refused(offline, capsys, num_checkpoints=count_of(dataset))
    path.unlink()
    if name != "$store$_observation":  # a checkpoint without frames is not there
        assert f"{name}_ckpt.0.gz is missing" in refused(offline, capsys)
    path.mkdir()
    assert f"{name}_ckpt.0.gz cannot be read: Is a directory" in refused(
        offline, capsys, num_checkpoints=count_of(dataset)
    )
    assert not (dataset.parent / "runs").exists()


@pytest.mark.parametrize("name", NAMES[:5])
def test_flipped_bits(offline, dataset, name):
    """One anywhere: the file is refused, or it was in what does not matter (a date, say) and the data are the same."""
    args, path, rng = offline_args(offline), dataset / f"{name}_ckpt.0.gz", np.random.default_rng(0)
    envs, whole, caught = offline.make_env(args), path.read_bytes(), 0

    def read_all():
        replay = offline.DatasetReplay(dataset, 0, envs, args, torch.device("cpu"))
        return [replay.actions, replay.rewards, replay.dones, replay.age, replay.frames(np.arange(len(replay.age)))]

    expected = read_all()
    for _ in range(25):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            assert all(np.array_equal(a, b) for a, b in zip(read_all(), expected, strict=True))
        except offline.DatasetError as error:
            caught += path.name in str(error)
    assert caught > 10


class Bomb:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_a_pickle_does_not_run(offline, dataset, capsys, tmp_path):
    with gzip.open(dataset / "$store$_action_ckpt.0.gz", "wb") as file:
        np.save(file, np.array([Bomb()] * 250, object), allow_pickle=True)
    error = refused(offline, capsys, num_checkpoints=count_of(dataset))
    assert "$store$_action_ckpt.0.gz cannot be read: it is truncated, damaged" in error
    (dataset / "$store$_action_ckpt.0.gz").write_bytes(gzip.compress(pickle.dumps(Bomb())))
    refused(offline, capsys, num_checkpoints=count_of(dataset))
    assert not (tmp_path / "it_ran").exists()


def one_seven(array):
    array[3] = 7
    return array


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("$store$_action", lambda x: x.astype(np.int64), "is int64 of shape (250,), not int32 of shape (250,)"),
        ("$store$_reward", lambda x: x[:, None], "is float32 of shape (250, 1), not float32 of shape (250,)"),
        ("$store$_reward", lambda x: x[:-60], "is float32 of shape (190,), not float32 of shape (250,)"),
        ("$store$_observation", lambda x: x[:, :3], "of shape (250, 3, 10, 10), not uint8 of shape"),
        ("$store$_observation", lambda x: x.astype(np.float32), "is float32 of shape (250, 4, 10, 10), not uint8"),
        (
            "$store$_observation",
            lambda x: x[:40],
            "is uint8 of shape (40, 4, 10, 10), not uint8 of shape (250, 4, 10, 10)",
        ),
        ("$store$_observation", np.asfortranarray, "cannot be read: it is truncated, damaged"),
        ("$store$_action", lambda x: x[:0], "$store$_action_ckpt.0.gz has none"),
        ("$store$_action", one_seven, "has actions from 0 to 7, and MinAtar/Breakout-v1 has 0 to 2"),
        ("$store$_action", lambda x: x - 1, "has actions from -1 to 1, and MinAtar/Breakout-v1 has 0 to 2"),
        ("$store$_reward", lambda x: x * np.nan, "has a reward that is not finite"),
        ("add_count", lambda x: np.arange(7), "add_count_ckpt.0.gz is no number of rows"),
        ("add_count", lambda x: -x - 1, "add_count_ckpt.0.gz is no number of rows"),
        ("add_count", lambda x: np.float64(np.inf), "add_count_ckpt.0.gz is no number of rows"),
    ],
)
def test_wrong_files(offline, dataset, capsys, name, change, words):
    rewrite(dataset / f"{name}_ckpt.0.gz", change)
    error = refused(offline, capsys, num_checkpoints=count_of(dataset))
    assert words in error and "_ckpt.0.gz" in error
    assert not (dataset.parent / "runs").exists()


def test_headers_are_read_in_threads(offline):
    """As checkpoints are. Python's parser, interrupted at awkward moments by the garbage collector, mixes them up."""
    header = io.BytesIO()
    np.save(header, np.zeros(3, np.uint8))

    def read(depth):
        if depth:
            return read(depth - 1)
        return offline.read_array(io.BytesIO(header.getvalue())).shape

    callback, interval, threshold = (lambda *_: sum(range(200))), sys.getswitchinterval(), gc.get_threshold()
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(10)
        gc.callbacks.append(callback)
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(read, [0, 1, 2, 3, 4, 5, 6] * 400)) == {(3,)}
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)


def test_rewards_that_are_not_clipped(offline, dataset, capsys):
    rewrite(dataset / "$store$_reward_ckpt.0.gz", lambda x: x + np.float32(2.5) * (x > 0))
    envs = offline.make_env(offline_args(offline))
    replay = offline.DatasetReplay(dataset, 0, envs, offline_args(offline), torch.device("cpu"))
    assert "$store$_reward_ckpt.0.gz has rewards beyond -1 and 1, and they are clipped" in capsys.readouterr().out
    assert replay.rewards.max() == 1 and replay.rewards.min() == 0


def test_too_little_memory(offline, dataset, monkeypatch, capsys):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(percent=96.0))
    error = refused(offline, capsys)
    assert "_ckpt." in error and "does not fit in memory: lower --num-checkpoints or --data-fraction" in error


def test_checkpoints_without_transitions(offline, tmp_path, capsys):
    """One that is too short, as the last of a recording may be, is left out; one without a transition is refused."""
    write_checkpoint(tmp_path / "data", 0, [*PAD, *[(10 + i, 1, 0.0, 0) for i in range(9)]], 20, frame=(4, 10, 10))
    write_checkpoint(tmp_path / "data", 7, [*PAD, (10, 1, 0.0, 0)], 20, frame=(4, 10, 10))
    offline.train(offline_args(offline, total_timesteps=20, iteration_steps=20))
    assert "checkpoint 7 of data has 4 rows of data, and is left out" in capsys.readouterr().out
    assert "data has 1 checkpoints" in refused(offline, capsys, num_checkpoints=2)
    rows = [*PAD, (10, 1, 0.0, 0), *PAD, (10, 1, 0.0, 0)]
    write_checkpoint(tmp_path / "data", 0, rows, 20, frame=(4, 10, 10))
    assert "ckpt.0.gz has no usable transition in its first 8 rows" in refused(offline, capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"dataset_dir": None}, "--dataset-dir is missing"),
        ({"dataset_dir": "nothing"}, "nothing has 0 checkpoints"),
        ({"num_checkpoints": 40}, "and --num-checkpoints is 40"),
        ({"iteration_steps": 202}, "--iteration-steps must be a multiple of --train-frequency, 4"),
        ({"data_fraction": 1.5}, "--data-fraction is 1.5"),
        ({"data_fraction": 0.0}, "--data-fraction is 0.0"),
        ({"cql_alpha": -1.0}, "--cql-alpha is -1.0"),
        ({"env_id": "ALE/Pnog-v5"}, "ALE/Pong-v5"),
        ({"env_id": "ALE/Pong-v5"}, "not uint8 of shape"),
        ({"eval_only": True}, "--eval-only goes with --checkpoint"),
        ({"capture_video": True}, "--eval-steps"),
    ],
)
def test_wrong_flags(offline, dataset, capsys, flags, words):
    assert words in refused(offline, capsys, **flags)
    assert not (dataset.parent / "runs").exists()


# -------------------------------------------------------------------------------------------------- losses and training
def random_batch(module, rng, obs_shape=(4, 10, 10), num_actions=3, size=16):
    obs, next_obs = [torch.tensor(rng.integers(2, size=(size, *obs_shape)).astype(bool)) for _ in range(2)]
    floats = [rng.normal(size=size), rng.choice([0.0, 0.99**3], size=size), np.ones(size)]
    actions = torch.tensor(rng.integers(num_actions, size=size))
    return module.Batch(obs, actions, next_obs, *[torch.tensor(x).float() for x in floats], np.arange(size))


def double(network, obs):
    """Features and outputs of a network in float64: (batch, width), (batch, actions, atoms)."""
    weights = {name: value.detach().double().numpy() for name, value in network.state_dict().items()}
    features = network.convolutions(obs.float()).detach().double().numpy()
    features = np.maximum(features @ weights["dense.0.weight"].T + weights["dense.0.bias"], 0)
    output = (features @ weights["head.weight"].T + weights["head.bias"]).reshape(len(obs), -1, network.atoms)
    if network.atoms > 1:
        value = features @ weights["value.weight"].T + weights["value.bias"]
        output = value[:, None] + output - output.mean(axis=1, keepdims=True)
    return features, output


def softmax(x):
    shifted = np.exp(x - x.max())
    return shifted / shifted.sum()


@pytest.mark.parametrize("algorithm", ["dqn", "cql-dr3", "cql-c51"])
def test_losses_against_slow_loops(offline, algorithm):
    rng = np.random.default_rng(1)
    args = offline_args(offline, algorithm=algorithm, n_atoms=11, v_min=-2.0, v_max=3.0, dr3_coefficient=0.3)
    networks = [offline.OfflineNetwork((4, 10, 10), 3, args) for _ in range(2)]
    for network in networks:
        for parameter in network.parameters():
            parameter.data += torch.from_numpy(rng.normal(size=parameter.shape) * 0.1).float()
    q_network, target_network = networks
    batch = random_batch(offline, rng)
    targets = offline.offline_target(q_network, target_network, batch)
    td, cql, dr3, q_values = offline.offline_loss(q_network, batch, targets, args)
    features, output = double(q_network, batch.obs)
    next_features, next_output = double(q_network, batch.next_obs)
    _, target_output = double(target_network, batch.next_obs)
    support = np.linspace(-2, 3, 11)
    for i in range(16):
        action, reward, discount = int(batch.actions[i]), batch.rewards[i].item(), batch.discounts[i].item()
        if algorithm == "cql-c51":
            means = [sum(softmax(row) * support) for row in output[i]]
            best = int(np.argmax([sum(softmax(row) * support) for row in next_output[i]]))
            mass = np.zeros(11)
            for atom, share in zip(support, softmax(target_output[i][best]), strict=True):
                place = (min(max(reward + discount * atom, -2), 3) + 2) / 0.5
                low = int(np.floor(place))
                mass[low] += share * (1 - (place - low))
                if low < 10:
                    mass[low + 1] += share * (place - low)
            expected = -sum(mass * np.log(softmax(output[i][action])))
        else:
            means = output[i][:, 0]
            error = reward + discount * max(target_output[i][:, 0]) - means[action]
            expected = error**2
            if algorithm == "cql-dr3":
                expected = 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5
        assert td[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert q_values[i].item() == pytest.approx(means[action], rel=1e-4, abs=1e-5)
        assert cql[i].item() == pytest.approx(np.log(sum(np.exp(means))) - means[action], rel=1e-4, abs=1e-5)
        assert dr3[i].item() == pytest.approx(abs(sum(features[i] * next_features[i])), rel=1e-4, abs=1e-5)


def test_gradients_flow_where_they_should(offline):
    """Through both features of DR3, into the online network alone."""
    rng = np.random.default_rng(2)
    args = offline_args(offline, algorithm="cql-dr3")
    q_network, target_network = [offline.OfflineNetwork((4, 10, 10), 3, args) for _ in range(2)]
    batch = random_batch(offline, rng)
    targets = offline.offline_target(q_network, target_network, batch)
    assert not targets.requires_grad
    _, _, dr3, _ = offline.offline_loss(q_network, batch, targets, args)
    dr3.mean().backward()
    found = q_network.dense[0].bias.grad.clone()
    with torch.no_grad():
        fixed = [q_network.features(x) for x in (batch.obs, batch.next_obs)]
    parts = []
    for moving, still in ((batch.obs, fixed[1]), (batch.next_obs, fixed[0])):
        q_network.zero_grad()
        (q_network.features(moving) * still).sum(dim=1).abs().mean().backward()
        parts.append(q_network.dense[0].bias.grad.clone())
    assert torch.allclose(found, parts[0] + parts[1], atol=1e-6) and all(part.abs().sum() > 0 for part in parts)


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("algorithm", ["dqn", "cql-dr3", "cql-c51"])
def test_a_run_and_its_repetition(offline, dataset, algorithm, n_step):
    flags = {"algorithm": algorithm, "n_step": n_step, "num_checkpoints": 2, "save_model": True, "eval_steps": 60}
    folders = [offline.train(offline_args(offline, diagnostics_frequency=100, seed=s, **flags)) for s in (1, 1, 2)]
    first, again, other = [weights(folder) for folder in folders]
    assert all(torch.equal(a, b) for a, b in zip(first.values(), again.values(), strict=True))
    assert not torch.equal(first["head.weight"], other["head.weight"])
    logged = scalars(folders[0])
    assert [step for step, _ in logged["eval/episodic_return"]] == [200, 400]
    assert [step for step, _ in logged["diagnostics/srank"]] == [100, 200, 300, 400]
    assert {"losses/td_loss", "losses/cql", "losses/dr3", "losses/q_values", "charts/SPS"} <= set(logged)
    assert (logged["losses/dr3"][-1][1] > 0) == (algorithm == "cql-dr3")
    model = str(folders[0] / "model.pt")
    returns = offline.train(offline_args(offline, eval_only=True, checkpoint=model, eval_steps=60))
    assert returns.mean() == pytest.approx(logged["eval/episodic_return"][-1][1])


@pytest.mark.parametrize("name", ["cql_alpha", "dr3_coefficient"])
def test_the_terms_weigh_in(offline, dataset, name):
    """The loss that is minimised is the TD loss and the terms by their weights."""
    losses = {}
    for weight in (0.0, 2.0):
        seen, backward = [], torch.Tensor.backward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", lambda x, seen=seen, f=backward: seen.append(x.item()) or f(x))
            flags = {"cql_alpha": 0.0, "dr3_coefficient": 0.0} | {name: weight}
            folder = offline.train(offline_args(offline, total_timesteps=4, iteration_steps=4, **flags))
        losses[weight] = seen, scalars(folder)
    tag = {"cql_alpha": "losses/cql", "dr3_coefficient": "losses/dr3"}[name]
    added = losses[2.0][0][0] - losses[0.0][0][0]
    assert added == pytest.approx(2 * losses[2.0][1][tag][0][1], rel=1e-4) and added > 0


def test_checkpoints_are_drawn_anew(offline, dataset, monkeypatch):
    """In each iteration; each minibatch comes from one of those drawn."""
    drawn, sampled = [], []
    load_, sample = offline.load, offline.DatasetReplay.sample
    monkeypatch.setattr(offline, "load", lambda numbers, *a: drawn.append(sorted(numbers)) or load_(numbers, *a))

    def spied(replay, *args):
        sampled.append((len(drawn), int(replay.paths["action"].name.split(".")[-2])))
        return sample(replay, *args)

    monkeypatch.setattr(offline.DatasetReplay, "sample", spied)
    offline.train(offline_args(offline, num_checkpoints=2, total_timesteps=1_600))
    assert len(drawn) == 8 and len(set(map(tuple, drawn))) > 1 and all(len(set(pair)) == 2 for pair in drawn)
    for iteration, pair in enumerate(drawn, 1):
        counts = [sampled.count((iteration, number)) for number in pair]
        assert sum(counts) == 50 and min(counts) > 10
    assert len(sampled) == 400


@pytest.mark.parametrize("available", [10**10, 0])
def test_replays_are_kept_while_there_is_memory(offline, dataset, monkeypatch, available):
    """Each is read once; or, where memory is short, the old one is gone before the next is read."""
    memory, living, made = psutil.virtual_memory(), weakref.WeakSet(), []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=available, percent=1.0))
    make = offline.DatasetReplay.__init__

    def spied(replay, folder, number, *args):
        made.append((number, len(living)))
        make(replay, folder, number, *args)
        living.add(replay)

    monkeypatch.setattr(offline.DatasetReplay, "__init__", spied)
    offline.train(offline_args(offline, total_timesteps=4_000))
    numbers = [number for number, _ in made]
    assert len(set(numbers)) == count_of(dataset) > 2
    if available:
        assert len(numbers) == len(set(numbers)) and [alive for _, alive in made] == list(range(len(made)))
    else:
        assert len(numbers) > 8 and not any(alive for _, alive in made)


def test_nothing_is_played_but_evaluations(offline, dataset, monkeypatch):
    calls = []
    reset = offline.reset
    monkeypatch.setattr(offline, "reset", lambda *a: calls.append(a[2]) or reset(*a))
    offline.train(offline_args(offline))
    assert calls == []
    offline.train(offline_args(offline, eval_steps=50))
    assert set(calls) == {201, 401}  # streams of their own


def test_an_evaluation_plays_as_many_steps_as_asked(offline, monkeypatch):
    args = offline_args(offline, eval_steps=300)
    envs = offline.make_env(args)
    network = offline.OfflineNetwork((4, 10, 10), 3, args)
    played, step = [], envs.step
    monkeypatch.setattr(envs, "step", lambda a: played.append(step(a)) or played[-1])
    returns = offline.evaluate_steps(envs, network, args, torch.device("cpu"), 5, None)
    ends = [i for i, x in enumerate(played, 1) if x[2][0] or x[3][0]]
    assert len(ends) == len(returns) and ends[-1] == len(played) and ends[-2] < 300 <= ends[-1]
    assert sum(returns) == sum(float(x[1][0]) for x in played)


def test_defaults_of_the_algorithms(offline, monkeypatch):
    """As the protocol has them; flags that are given go before."""
    expected = {
        "dqn": (6.25e-5, 1.5e-4, 8_000, 1.0, 0.0, 0.0),
        "cql-dr3": (5e-5, 3.125e-4, 8_000, 1.0, 0.1, 0.1),
        "cql-c51": (6.25e-5, 1.5e-4, 400, 0.05, 0.1, 0.0),
    }
    names = ("learning_rate", "adam_eps", "target_network_frequency", "data_fraction", "cql_alpha", "dr3_coefficient")
    for algorithm, values in expected.items():
        monkeypatch.setattr(sys, "argv", ["x", "--algorithm", algorithm])
        args = offline.parse_offline_args()
        assert args.algorithm == algorithm and tuple(getattr(args, name) for name in names) == values
    monkeypatch.setattr(sys, "argv", ["x", "--learning-rate", "1e-3", "--algorithm=cql-dr3"])
    args = offline.parse_offline_args()
    assert (args.learning_rate, args.cql_alpha, args.batch_size, args.num_checkpoints) == (1e-3, 0.1, 32, 5)
    assert (args.total_timesteps, args.iteration_steps, args.eval_steps) == (200 * 250_000, 4 * 62_500, 125_000)
    monkeypatch.setattr(sys, "argv", ["x"])
    assert offline.parse_offline_args() == offline.Args()
    monkeypatch.setattr(sys, "argv", ["x", "--algorithm", "sarsa"])
    with pytest.raises(SystemExit) as exit_:
        offline.parse_offline_args()
    assert exit_.value.code == 2


def test_it_learns_which_action_pays(offline, tmp_path):
    """Games of one step, in which action 2 pays 1 and the others nothing: Q learns just that."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        action = int(rng.integers(3))
        rows += [*PAD, (1, action, float(action == 2), 1)]
    write_checkpoint(tmp_path / "data", 0, rows, 1_000, frame=(4, 10, 10))
    flags = {"total_timesteps": 1_200, "learning_rate": 1e-3, "save_model": True}
    folder = offline.train(offline_args(offline, **flags))
    network = offline.OfflineNetwork((4, 10, 10), 3, offline_args(offline))
    network.load_state_dict(weights(folder))
    q_values = network.q_values(torch.ones(1, 4, 10, 10, dtype=torch.bool), rng)[0]
    assert q_values.tolist() == pytest.approx([0, 0, 1], abs=0.1)


def test_the_target_network_and_the_optimizer(offline, dataset, monkeypatch):
    """Copies at the steps that are multiples of the period; Adam has the flags' step size and epsilon."""
    made, copies, deepcopy = [], [], copy.deepcopy

    def spied(network, *memo):
        if not isinstance(network, offline.OfflineNetwork):
            return deepcopy(network, *memo)
        made.append(deepcopy(network, *memo))
        load_ = made[-1].load_state_dict
        made[-1].load_state_dict = lambda state: copies.append(len(losses)) or load_(state)
        return made[-1]

    losses, backward, adam = [], torch.Tensor.backward, []
    monkeypatch.setattr(offline.copy, "deepcopy", spied)
    monkeypatch.setattr(torch.Tensor, "backward", lambda x: losses.append(x.item()) or backward(x))
    make = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: adam.append(make(*a, **k)) or adam[-1])
    offline.train(offline_args(offline, learning_rate=3e-3, adam_eps=7e-3, target_network_frequency=80))
    assert copies == [20, 40, 60, 80, 100] and len(losses) == 100 and len(made) == 1
    assert (adam[0].defaults["lr"], adam[0].defaults["eps"]) == (3e-3, 7e-3)
    assert adam[0].state and len(adam[0].param_groups[0]["params"]) == 6


@pytest.mark.parametrize("algorithm", ["dqn", "cql-c51"])
def test_the_network_on_ale(offline, dqn, algorithm):
    """Pixels over 255, Dopamine's layers and SAME padding, Xavier's initialisation, biases zero."""
    args = offline_args(offline, algorithm=algorithm)
    network = offline.OfflineNetwork((4, 84, 84), 6, args)
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    output = network(obs)
    assert output.shape == (3, 6, 51 if algorithm == "cql-c51" else 1)
    assert network.features(obs).shape == (3, 512) and network.dense[0].in_features == 7_744
    assert torch.allclose(output, network(obs / 255), atol=1e-6)
    assert network.q_values(obs, None).shape == (3, 6)
    if algorithm == "dqn":  # the same as dqn.py's
        other = dqn.QNetwork((4, 84, 84), 6, make_args(dqn))
        assert torch.allclose(other(obs), network.q_values(obs, None), atol=1e-6)
    for layer in (network.dense[0], network.head):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()


def test_recorded_and_learned_from_in_an_empty_folder(tmp_path):
    """dqn.py records Pong, and cql_offline.py, copied alone, learns from it: as a user would."""
    for name in ("dqn", "cql_offline"):
        shutil.copy(ROOT / "agents" / f"{name}.py", tmp_path)
    flags = ["--env-id", "ALE/Pong-v5", "--no-cuda"]
    record = ["--total-timesteps", "300", "--learning-starts", "300", "--eval-episodes", "0"]
    record += ["--record-dataset", "pong"]
    learn = ["--dataset-dir", "pong", "--num-checkpoints", "1", "--total-timesteps", "40", "--iteration-steps", "20"]
    learn += ["--algorithm", "cql-c51", "--data-fraction", "1", "--eval-steps", "10", "--max-episode-steps", "50"]
    for name, own in (("dqn", record), ("cql_offline", learn)):
        command = [sys.executable, "-I", f"{name}.py", *flags, *own]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "evaluation at step 40: mean return" in done.stdout
    assert len(list((tmp_path / "runs").iterdir())) == 2
    (tmp_path / "pong" / "$store$_action_ckpt.0.gz").write_bytes(b"?")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: pong/$store$_action_ckpt.0.gz cannot be read")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_run_on_a_gpu(offline, dataset):
    for algorithm in ("dqn", "cql-dr3", "cql-c51"):
        folder = offline.train(offline_args(offline, algorithm=algorithm, cuda=True, save_model=True, eval_steps=60))
        assert np.isfinite(scalars(folder)["losses/td_loss"][-1][1])
