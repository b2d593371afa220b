"""The replay against a slow, obvious loop over the whole history of a scripted game."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

STACK = 4


class Script:
    """A game that was written down beforehand: episode `e` has `lengths[e]` steps and ends as `ends[e]` says.

    The frame of step t of episode e spells e and t in bits: no two frames are alike, and none is zero.
    """

    def __init__(self, lengths, ends, channels=1, dtype=np.uint8):
        self.lengths, self.ends, self.channels, self.dtype = lengths, ends, channels, dtype
        rng = np.random.default_rng(0)
        self.actions = {(e, t): int(rng.integers(6)) for e, length in enumerate(lengths) for t in range(length)}
        self.rewards = {key: float(rng.integers(-9, 10)) / 8 for key in self.actions}

    def frame(self, e, t):
        bits = [(1 + e) >> i & 1 for i in range(10)] + [(1 + t) >> i & 1 for i in range(10)]
        return np.tile(np.array(bits, self.dtype).reshape(4, 5), (self.channels, 1, 1))

    def obs(self, e, t, stack):
        """The stacked observation: frames before the episode's first are zeros."""
        blank = np.zeros((self.channels, 4, 5), self.dtype)
        return np.concatenate([self.frame(e, i) if i >= 0 else blank for i in range(t - stack + 1, t + 1)])

    @staticmethod
    def decode(obs):
        """(episode, step) of the newest frame of a stacked observation."""
        bits = obs[-1].astype(int).ravel()
        return int(bits[:10] @ 2 ** np.arange(10)) - 1, int(bits[10:] @ 2 ** np.arange(10)) - 1

    def play(self, replay, stack, after_each=lambda e, t: None):
        for e, (length, end) in enumerate(zip(self.lengths, self.ends, strict=True)):
            for t in range(length):
                last = t == length - 1
                replay.add(
                    self.obs(e, t, stack)[None],
                    self.obs(e, t + 1, stack)[None],
                    np.array([self.actions[e, t]]),
                    np.array([self.rewards[e, t]]),
                    np.array([last and end in ("terminal", "both")]),
                    np.array([last and end in ("truncation", "both")]),
                )
                after_each(e, t)

    def expected(self, e, t, n, gamma, stack):
        """The transition that starts at (e, t), by the definition of the n-step return; None if it must not exist."""
        total, length = 0.0, self.lengths[e]
        terminates = self.ends[e] in ("terminal", "both")
        for k in range(n):
            if t + k >= length:
                return None  # it would cross a truncation
            total += gamma**k * self.rewards[e, t + k]
            if terminates and t + k == length - 1:
                return total, 0.0, np.zeros((stack * self.channels, 4, 5), self.dtype)
        return total, gamma**n, self.obs(e, t + n, stack)


def make_replay(module, capacity, n_step, prioritized, space=gym.spaces.Box(0, 255, (STACK, 4, 5), np.uint8)):  # noqa: B008
    args = module.Args(total_timesteps=2**31, buffer_size=capacity, n_step=n_step, prioritized=prioritized, gamma=0.9)
    return module.FrameReplay(space, 6, args, "cpu", np.random.default_rng(3))


def check_batch(script, replay, batch, stack=STACK):
    for i in range(len(batch.actions)):
        e, t = script.decode(batch.obs[i].numpy())
        expected = script.expected(e, t, replay.n_step, replay.gamma, stack)
        assert expected is not None, f"the window from step {t} of episode {e} must not be sampled"
        rewards, discount, next_obs = expected
        np.testing.assert_array_equal(batch.obs[i].numpy(), script.obs(e, t, stack))
        np.testing.assert_array_equal(batch.next_obs[i].numpy(), next_obs)
        assert batch.actions[i].item() == script.actions[e, t]
        assert batch.rewards[i].item() == pytest.approx(rewards, abs=1e-6)
        assert batch.discounts[i].item() == pytest.approx(discount, abs=1e-6)


def starts(script, replay):
    """(episode, step) of every row that can be sampled."""
    rows = np.flatnonzero(replay.priorities)
    weights = np.ones(len(rows), np.float32)
    return {script.decode(obs) for obs in replay._get_samples(rows, weights).obs.numpy()} if len(rows) else set()


ENDINGS = ["terminal", "truncation", "terminal", "both", "truncation", "terminal", "terminal"]


@pytest.mark.parametrize("prioritized", [False, True], ids=["uniform", "prioritized"])
@pytest.mark.parametrize("n_step", [1, 3, 10])
@pytest.mark.parametrize("capacity", [500, 41, 33], ids=["not full", "full", "full many times"])
def test_every_sampled_transition(agent, capacity, n_step, prioritized):
    """Full and partly filled rings, both ends of episodes, episodes shorter than n and than the stack."""
    lengths = [7, 12, 1, 2, 1, 3, 30]
    script = Script(lengths * 4, ENDINGS * 4)
    replay = make_replay(agent, capacity, n_step, prioritized)
    added = []  # (row, episode, step) as time went on

    def after_each(e, t):
        added.append((e, t))
        if not replay.priorities.any():
            return
        batch = replay.sample(16)
        check_batch(script, replay, batch)
        assert batch.weights.tolist() == [1.0] * 16  # until losses are known, all priorities are 1
        assert not replay.priorities.ravel()[capacity:].any()
        np.testing.assert_array_equal(replay.sums, replay.priorities.sum(axis=1))

    script.play(replay, STACK, after_each)
    found = starts(script, replay)
    # what must be sampleable: every window that is complete and whose frames are still in the ring
    complete = [(e, t) for e, t in added if script.expected(e, t, n_step, 0.9, STACK) is not None]
    if capacity == 500:
        assert found == set(complete)
    else:
        assert replay.full
        rows_since = {key: len(added) - i for i, key in enumerate(added)}  # a truncation takes one row more
        cuts = sum(end == "truncation" for end in script.ends[-14:])
        young = {key for key in complete if rows_since[key] <= capacity - cuts - STACK - 2}
        assert young <= found <= set(complete)
        assert all(rows_since[key] <= capacity - 2 for key in found)


def test_last_starts_before_a_termination_have_shorter_returns(agent):
    script = Script([5], ["terminal"])
    replay = make_replay(agent, 50, 3, False)
    script.play(replay, STACK)
    assert starts(script, replay) == {(0, t) for t in range(5)}
    batch = replay._get_samples(np.arange(5), np.ones(5, np.float32))
    r = [script.rewards[0, t] for t in range(5)]
    assert batch.rewards[4].item() == pytest.approx(r[4], abs=1e-6)
    assert batch.rewards[3].item() == pytest.approx(r[3] + 0.9 * r[4], abs=1e-6)
    assert batch.rewards[1].item() == pytest.approx(r[1] + 0.9 * r[2] + 0.81 * r[3], abs=1e-6)
    assert batch.discounts.tolist() == pytest.approx([0.9**3, 0.9**3, 0, 0, 0])


def test_a_truncation_bootstraps_from_its_last_observation(agent):
    script = Script([5, 4], ["truncation", "terminal"])
    replay = make_replay(agent, 50, 1, False)
    script.play(replay, STACK)
    assert starts(script, replay) == {(0, t) for t in range(5)} | {(1, t) for t in range(4)}
    batch = replay._get_samples(np.array([4]), np.ones(1, np.float32))
    assert batch.discounts.item() == pytest.approx(0.9)
    np.testing.assert_array_equal(batch.next_obs[0].numpy(), script.obs(0, 5, STACK))


def test_without_a_stack(agent):
    """MinAtar's case: one frame of several channels."""
    script = Script([7, 12, 1, 2, 40], ["terminal", "truncation", "terminal", "both", "terminal"], 3, bool)
    replay = make_replay(agent, 33, 3, False, gym.spaces.Box(0, 1, (3, 4, 5), bool))
    script.play(
        replay, 1, lambda e, t: check_batch(script, replay, replay.sample(16), 1) if replay.priorities.any() else 0
    )
    assert replay.full


def test_long_episodes(agent):
    """The age of a row is kept in one byte: steps beyond 255 must still have whole stacks."""
    script = Script([700], ["terminal"])
    replay = make_replay(agent, 1000, 3, False)
    script.play(replay, STACK)
    check_batch(script, replay, replay._get_samples(np.arange(700), np.ones(700, np.float32)))


def test_bytes_of_a_transition(agent):
    replay = make_replay(agent, 100_000, 3, True, gym.spaces.Box(0, 255, (4, 84, 84), np.uint8))
    arrays = [v for v in vars(replay).values() if isinstance(v, np.ndarray)]
    assert replay.observations.nbytes == 100_000 * 7_056
    assert sum(a.nbytes for a in arrays) <= 100_000 * (7_056 + 24)


def test_prioritized_sampling_frequencies(qrdqn):
    script = Script([400], ["terminal"])
    replay = make_replay(qrdqn, 500, 1, True)
    script.play(replay, STACK)
    losses = torch.from_numpy(np.random.default_rng(1).exponential(size=400).astype(np.float32))
    losses[:3] = torch.tensor([0.0, 50.0, 200.0])
    replay.update_priorities(np.arange(400), losses)
    expected = np.sqrt(losses.numpy().astype(np.float64) + 1e-10)
    expected /= expected.sum()
    draws = 200_000
    counts = np.zeros(500)
    for _ in range(draws // 1000):
        batch = replay.sample(1000)
        np.add.at(counts, batch.rows, 1)
    assert counts[400:].sum() == 0
    counts = counts[:400]
    deviation = np.abs(counts - draws * expected) / np.sqrt(draws * expected + 1)
    assert deviation.max() < 5  # standard errors; stratification only makes it smaller
    # weights: 1 / sqrt(p), divided by the batch's largest
    priorities = np.sqrt(losses.numpy()[batch.rows].astype(np.float64) + 1e-10)
    weights = 1 / np.sqrt(priorities + 1e-10)
    np.testing.assert_allclose(batch.weights.numpy(), weights / weights.max(), rtol=1e-5)


def test_uniform_sampling_is_uniform_and_independent(dqn):
    """Every valid transition as often as any other, and within a batch with the repeats that chance gives."""
    script = Script([100], ["terminal"])
    replay = make_replay(dqn, 500, 1, False)
    script.play(replay, STACK)
    rows = np.array([replay.sample(100).rows for _ in range(1_000)])
    counts = np.bincount(rows.ravel(), minlength=100)
    assert counts.shape == (100,) and np.abs(counts - 1_000).max() < 5 * np.sqrt(1_000)
    distinct = np.mean([len(set(row)) for row in rows])
    assert distinct == pytest.approx(100 * (1 - 0.99**100), abs=0.5)  # stratified draws would give all 100


def test_sampling_is_stratified(qrdqn):
    """With equal priorities and as many draws as rows, each slice of the total is one row: no row comes twice."""
    script = Script([64], ["terminal"])
    replay = make_replay(qrdqn, 100, 1, True)
    script.play(replay, STACK)
    assert sorted(replay.sample(64).rows) == list(range(64))


def test_new_transitions_get_the_largest_priority_seen(qrdqn):
    script = Script([10, 3], ["terminal", "terminal"])
    replay = make_replay(qrdqn, 50, 1, True)
    leaves = replay.priorities.ravel()  # a view

    def after_each(e, t):
        if (e, t) == (0, 9):
            assert leaves[:10].tolist() == [1.0] * 10
            replay.update_priorities(np.array([2, 5]), torch.tensor([16.0, 4.0]))
            replay.update_priorities(np.array([2]), torch.tensor([1.0]))

    script.play(replay, STACK, after_each)
    assert leaves[5] == pytest.approx(2) and leaves[2] == pytest.approx(1)
    assert leaves[10:13].tolist() == pytest.approx([4.0] * 3)


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 4096, 4097, 300_000])
def test_sum_tree_against_cumulative_sums(agent, capacity):
    rng = np.random.default_rng(capacity)
    replay, leaves = make_replay(agent, capacity, 1, True, gym.spaces.Box(0, 1, (1, 2, 2), bool)), np.zeros(capacity)
    for _ in range(5):
        where = rng.integers(capacity, size=min(capacity, 200))
        values = rng.exponential(size=len(where)) * (rng.random(len(where)) < 0.7)
        for i, value in zip(where, values, strict=True):
            leaves[i] = value
        replay.set_priorities(where, leaves[where])
    total = leaves.sum()
    assert replay.sums.sum() == pytest.approx(total)
    if not total:
        return
    points = rng.random(500)
    np.testing.assert_array_equal(replay.find(points), np.searchsorted(leaves.cumsum(), points * total, side="right"))
    # the ends of the range, where rounding could step off the last leaf or onto an empty one
    assert (leaves[replay.find(np.array([0.0, math.nextafter(1, 0), 1.0]))] > 0).all()


def test_too_large_a_replay_is_refused_before_it_is_allocated(agent, capsys):
    with pytest.raises(SystemExit) as exit_:
        make_replay(agent, 10**9, 1, False, gym.spaces.Box(0, 255, (4, 84, 84), np.uint8))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1
    assert "7080.0 GB" in error and "--buffer-size" in error and "GB of memory are free" in error
