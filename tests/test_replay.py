"""The replay against a slow, obvious loop over the whole history of a scripted game.

The classes have the same text in every agent (test_one_name.py), so one file of each stands for all.
"""

import functools
import io
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from conftest import make_args

GAMMA = 0.9
LENGTHS = [7, 12, 1, 2, 1, 3, 30]  # shorter than n and than the stack, and longer
ENDINGS = ["terminal", "truncation", "terminal", "both", "truncation", "terminal", "terminal"]


class Script:
    """A game that was written down beforehand: episode `e` has `lengths[e]` steps and ends as `ends[e]` says.

    The frame of step t of episode e spells e and t in bits: no two frames are alike, and none is zero.
    """

    def __init__(self, lengths, ends, stack=4):
        self.lengths = lengths
        self.ends = ends
        self.stack = stack
        rng = np.random.default_rng(0)
        steps = [(e, t) for e, length in enumerate(lengths) for t in range(length)]
        self.actions = {key: int(rng.integers(6)) for key in steps}
        self.rewards = {key: float(rng.integers(-9, 10)) / 8 for key in steps}
        self.blank = np.zeros((4, 4, 5), np.uint8) if stack == 4 else np.zeros((4, 5, 3), bool)

    def terminates(self, e):
        return self.ends[e] in ("terminal", "both")

    def frame(self, e, t):
        bits = [(1 + e) >> i & 1 for i in range(10)] + [(1 + t) >> i & 1 for i in range(10)]
        return np.array(bits, np.uint8).reshape(4, 5)

    def obs(self, e, t):
        """A stack with zeros before the episode's first frame, or one frame of three channels, as MinAtar has."""
        obs = self.blank.copy()
        if self.stack == 1:
            obs[:] = self.frame(e, t)[:, :, None]
            return obs
        for back in range(4):
            if t >= back:
                obs[3 - back] = self.frame(e, t - back)
        return obs

    def decode(self, obs):
        """(episode, step) of an observation."""
        bits = (obs[3] if self.stack == 4 else obs[:, :, 0]).astype(int).ravel()
        return int(bits[:10] @ 2 ** np.arange(10)) - 1, int(bits[10:] @ 2 ** np.arange(10)) - 1

    def steps(self):
        """Each step, and what the replay is told of it."""
        for e, length in enumerate(self.lengths):
            for t in range(length):
                last = t == length - 1
                yield (
                    (e, t),
                    (
                        self.obs(e, t)[None],
                        self.obs(e, t + 1)[None],
                        np.array([self.actions[e, t]]),
                        np.array([self.rewards[e, t]]),
                        np.array([last and self.terminates(e)]),
                        np.array([last and self.ends[e] in ("truncation", "both")]),
                    ),
                )

    def play(self, replay):
        for _, step in self.steps():
            replay.add(*step)

    @functools.cache  # noqa: B019
    def expected(self, e, t, n):
        """What must be sampled from step t of episode e: reward, discount, next_obs and the step that completes it.

        None if its window crosses a truncation.
        """
        reward = 0.0
        for k in range(n):
            if t + k >= self.lengths[e]:
                return None
            reward += GAMMA**k * self.rewards[e, t + k]
            if self.terminates(e) and t + k == self.lengths[e] - 1:
                return reward, 0.0, self.blank, (e, t + k)
        return reward, GAMMA**n, self.obs(e, t + n), (e, t + n - 1)


def make_replay(module, kind, capacity, n_step=1, stack=4, obs_space=None):
    if obs_space is None:
        obs_space = gym.spaces.Box(0, 255, (4, 4, 5), np.uint8)
        if stack == 1:
            obs_space = gym.spaces.Box(0, 1, (4, 5, 3), bool)
    args = make_args(
        module,
        env_id="ALE/Pong-v5" if stack == 4 else "MinAtar/Breakout-v1",
        buffer_size=capacity,
        total_timesteps=2**31 - 1,
        n_step=n_step,
        gamma=GAMMA,
    )
    return getattr(module, kind)(obs_space, args, "cpu", np.random.default_rng(3))


def reload(replay, fresh):
    """Write a replay to a file as a checkpoint does, and read it into a fresh one."""
    file = io.BytesIO()
    torch.save(replay.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    fresh.rng = replay.rng
    return fresh


def sample_rows(replay, rows, n_step=None):
    """The batch that these rows make."""
    replay.draw = lambda batch_size: np.array(rows)
    batch = replay.sample(len(rows), n_step or replay.n_step, GAMMA)
    del replay.draw
    return batch


def check_batch(script, replay, batch, n_step=None):
    keys = [script.decode(obs) for obs in batch.obs.numpy()]
    expected = [script.expected(*key, n_step or replay.n_step) for key in keys]
    assert None not in expected, "a window that crosses a truncation was sampled"
    rewards, discounts, next_obs, _ = zip(*expected, strict=True)
    assert batch.actions.dtype == torch.int64
    assert batch.rewards.dtype == batch.discounts.dtype == torch.float32
    np.testing.assert_array_equal(batch.obs, np.stack([script.obs(*key) for key in keys]))
    np.testing.assert_array_equal(batch.actions, [script.actions[key] for key in keys])
    np.testing.assert_allclose(batch.rewards, rewards, atol=1e-6)
    np.testing.assert_array_equal(batch.next_obs, np.stack(next_obs))
    np.testing.assert_allclose(batch.discounts, discounts, rtol=1e-6)


RINGS = [(500, n_step) for n_step in (1, 3, 5, 10)]  # never full
RINGS += [(33, n_step) for n_step in (1, 3, 5, 10)]  # full many times
RINGS += [(77, 3), (78, 3)]  # with a truncation in the last row, and in the one before


@pytest.mark.parametrize(("kind", "stack"), [("FrameReplay", 4), ("PrioritizedReplay", 4), ("PrioritizedReplay", 1)])
@pytest.mark.parametrize(("capacity", "n_step"), RINGS)
def test_every_sampled_transition(qrdqn, capacity, n_step, stack, kind):
    """After every step: exactly the rows that may be sampled are, and every number of them is right.

    Saved and loaded on the way, in the middle of episodes and at their ends.
    """
    script = Script(LENGTHS * 3, ENDINGS * 3, stack)
    replay = make_replay(qrdqn, kind, capacity, n_step, stack)
    position = {}  # of each step, had the ring no end
    ages = np.full(capacity, -1)
    free = 0
    for count, (key, step) in enumerate(script.steps()):
        replay.add(*step)
        position[key] = free
        newest = free
        ages[newest % capacity] = key[1]
        ages[(newest + 1) % capacity] = -1  # the last frame so far: no step
        truncated = step[-1][0] and not step[-2][0]
        free += 2 if truncated else 1  # the last frame has a row of its own
        if count % 9 == 0:
            replay = reload(replay, make_replay(qrdqn, kind, capacity, n_step, stack))

        # complete, and neither itself nor a frame of its stack is overwritten by the newest step's two frames
        possible = set()
        for (e, t), place in position.items():
            found = script.expected(e, t, n_step)
            complete = found is not None and found[-1] in position
            if complete and place - (stack - 1) + capacity > newest + 1:
                possible.add(place % capacity)
        assert set(np.flatnonzero(replay.ready)) == possible
        np.testing.assert_array_equal(replay.ages, ages)
        if kind == "PrioritizedReplay":
            assert (replay.priorities.flat[:capacity] == replay.ready).all()  # until losses are known they are 1
            assert not replay.priorities.flat[capacity:].any()
            np.testing.assert_array_equal(replay.sums, replay.priorities.sum(axis=1))
        if possible:
            batch = replay.sample(8, n_step, GAMMA)
            assert possible.issuperset(batch.rows)
            check_batch(script, replay, batch)
        if possible and count % 5 == 0:
            check_batch(script, replay, sample_rows(replay, sorted(possible)))
    assert replay.full == (capacity < 500)


def test_long_episodes(dqn):
    """A step's place in its episode is more than a byte."""
    script = Script([600], ["terminal"])
    replay = make_replay(dqn, "FrameReplay", 700, 3)
    script.play(replay)
    check_batch(script, replay, sample_rows(replay, range(600)))


def test_bytes_of_a_transition(qrdqn):
    obs_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    replay = make_replay(qrdqn, "PrioritizedReplay", 100_000, obs_space=obs_space)
    arrays = {name: value for name, value in vars(replay).items() if isinstance(value, np.ndarray)}
    obs = np.ones((1, 4, 84, 84), np.uint8)
    for end in (0, 1):
        replay.add(obs, obs, np.ones(1, int), np.ones(1), np.full(1, end == 1), np.zeros(1, bool))
    for name in ("dones", "timeouts"):  # SB3's, of which no page is ever touched
        assert not arrays.pop(name).any()
    assert set(arrays) == set(replay.arrays)
    assert replay.observations.nbytes == 100_000 * 7_056
    assert sum(array.nbytes for array in arrays.values()) <= 100_000 * (7_056 + 24)


def test_the_replay_is_as_large_as_the_run(qrdqn):
    """And no larger: nothing of a short run is overwritten, though a truncation takes a row of its own."""
    args = make_args(qrdqn, total_timesteps=600, buffer_size=10**6, max_episode_steps=50, n_step=3)
    obs_space = gym.spaces.Box(0, 1, (4, 5, 3), bool)
    replay = qrdqn.PrioritizedReplay(obs_space, args, "cpu", np.random.default_rng(0))
    assert 600 < replay.buffer_size < 650
    Script([50] * 12, ["truncation"] * 12, stack=1).play(replay)
    assert not replay.full
    assert np.count_nonzero(replay.ready) == 12 * 48


def test_too_large_a_replay_is_refused_before_it_is_allocated(qrdqn, capsys, monkeypatch):
    def no_allocation(*_, **__):
        raise AssertionError

    monkeypatch.setattr(qrdqn.ReplayBuffer, "__init__", no_allocation)
    obs_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    with pytest.raises(SystemExit) as refusal:
        make_replay(qrdqn, "PrioritizedReplay", 10**9, obs_space=obs_space)
    error = capsys.readouterr().err
    assert refusal.value.code == 2
    assert error.count("\n") == 1
    assert "7080.0 GB" in error
    assert "lower --buffer-size" in error

    # the limit: nine tenths of what is free
    for free, answer in ((7.9e9, AssertionError), (7.8e9, SystemExit)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        with pytest.raises(answer):
            make_replay(qrdqn, "FrameReplay", 10**6, obs_space=obs_space)


def test_uniform_sampling_is_uniform_and_independent(dqn):
    """Every valid transition as often as any other, and within a batch with the repeats that chance gives."""
    script = Script([60, 8, 40], ["truncation", "terminal", "terminal"])
    replay = make_replay(dqn, "FrameReplay", 500, 9)
    script.play(replay)
    possible = np.flatnonzero(replay.ready)
    assert len(possible) == 100
    rows = np.array([replay.draw(100) for _ in range(1_000)])
    counts = np.bincount(rows.ravel(), minlength=500)[possible]
    assert counts.sum() == 100_000
    assert np.abs(counts - 1_000).max() < 5 * np.sqrt(1_000)
    distinct = np.mean([len(set(row)) for row in rows])
    assert distinct == pytest.approx(100 * (1 - 0.99**100), abs=0.5)  # stratified draws would give all 100


def test_prioritized_sampling_frequencies(qrdqn):
    replay = make_replay(qrdqn, "PrioritizedReplay", 500)
    Script([400], ["terminal"]).play(replay)
    losses = np.random.default_rng(1).exponential(size=400)
    losses[:3] = [0, 50, 200]
    replay.update_priorities(np.arange(400), torch.from_numpy(losses))
    expected = np.sqrt(losses + 1e-10)
    expected /= expected.sum()
    draws = 200_000
    rows = np.concatenate([replay.draw(1_000) for _ in range(draws // 1_000)])
    counts = np.bincount(rows, minlength=400)
    assert len(counts) == 400
    deviation = np.abs(counts - draws * expected) / np.sqrt(draws * expected + 1)
    assert deviation.max() < 5  # standard errors; stratification only makes it smaller


def test_sampling_is_stratified(qrdqn):
    """With equal priorities and as many draws as rows, each slice of the total is one row: no row comes twice."""
    replay = make_replay(qrdqn, "PrioritizedReplay", 100)
    Script([64], ["terminal"]).play(replay)
    assert sorted(replay.sample(64, 1, GAMMA).rows) == list(range(64))


def test_new_transitions_get_the_largest_priority_so_far(qrdqn):
    """The largest ever, not the last batch's; it stays through a checkpoint, and is 1 before any loss."""
    script = Script([60], ["terminal"])
    replay = make_replay(qrdqn, "PrioritizedReplay", 200)
    updates = {
        10: (4, [0.25, 0.01]),  # row, losses: below 1 nothing changes
        20: (2, [16, 4]),
        30: (2, [1, 1]),
        50: (7, [9, 25]),
    }
    for (_, t), step in script.steps():
        if t in updates:
            row, losses = updates[t]
            replay.update_priorities(np.array([row, row + 1]), torch.tensor(losses))
        if t == 40:
            replay = reload(replay, make_replay(qrdqn, "PrioritizedReplay", 200))
        replay.add(*step)
    priorities = replay.priorities.flat[:60]
    assert priorities[[2, 3, 4, 5, 7, 8]].tolist() == pytest.approx([1, 1, 0.5, 0.1, 3, 5])
    expected = [1] * 10 + [4] * 30 + [5] * 10
    assert priorities[[*range(10, 20), *range(20, 50), *range(50, 60)]].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("capacity", [14, 64, 65, 4_097])
def test_search_against_cumulative_sums(qrdqn, capacity):
    rng = np.random.default_rng(capacity)
    replay = make_replay(qrdqn, "PrioritizedReplay", capacity)
    slow = np.zeros(capacity)
    for _ in range(5):
        rows = rng.integers(capacity, size=min(capacity, 200))  # some twice: the last counts
        values = rng.exponential(size=len(rows)) * (rng.random(len(rows)) < 0.7)
        for row, value in zip(rows, values, strict=True):
            slow[row] = value
        replay.set_priorities(rows, values)
    total = slow.sum()
    assert replay.sums.sum() == pytest.approx(total)
    shares = rng.random(500)
    np.testing.assert_array_equal(replay.find(shares), np.searchsorted(slow.cumsum(), shares * total, side="right"))
    # the ends of the range, where rounding could step off the last row or onto an empty one
    assert (slow[replay.find(np.array([0.0, math.nextafter(1, 0), 1.0]))] > 0).all()


def test_importance_weights(rainbow):
    """1 / sqrt(priority), divided by the batch's largest: the same function in der.py and spr.py."""
    replay = make_replay(rainbow, "PrioritizedReplay", 100)
    Script([64], ["terminal"]).play(replay)
    assert rainbow.importance_weights(replay, np.arange(8)).tolist() == [1.0] * 8  # equal until losses are known
    replay.update_priorities(np.arange(3), torch.tensor([16.0, 256.0, 0.0625]))  # priorities 4, 16, 0.25
    weights = rainbow.importance_weights(replay, np.array([1, 0, 5]))
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([0.25, 0.5, 1])
    assert rainbow.importance_weights(replay, np.array([2, 1, 0])).tolist() == pytest.approx([1, 0.125, 0.25])
