"""Targets and losses: on an example worked by hand, and against slow float64 loops on random input."""

import numpy as np
import pytest
import torch


class Table(torch.nn.Module):
    """A network that returns rows of a table: `obs` holds their numbers."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(torch.as_tensor(values, dtype=torch.float32))

    def forward(self, obs):
        return self.values[obs]


def make_batch(module, obs, actions, next_obs, rewards, discounts):
    floats = [torch.tensor(x, dtype=torch.float32) for x in (rewards, discounts, np.ones(len(actions)))]
    indices = [torch.tensor(x) for x in (obs, actions, next_obs)]
    return module.Batch(*indices, *floats, np.arange(len(actions)))


def test_dqn_by_hand(dqn):
    """Two transitions, two actions; the second is terminal. gamma = 0.5 and one step."""
    online = Table([[1.0, 2.0], [3.0, -1.0]])
    target = Table([[0.0, 4.0], [10.0, 20.0]])
    batch = make_batch(dqn, [0, 1], [0, 1], [0, 1], [1.0, -1.0], [0.5, 0.0])
    targets = dqn.td_target(target, batch)
    assert targets.tolist() == [1 + 0.5 * 4, -1]
    losses, q_values = dqn.td_loss(online, batch, targets)
    assert q_values.tolist() == [1, -1]
    assert losses.tolist() == [(3 - 1) ** 2, 0]
    losses.sum().backward()
    assert online.values.grad.tolist() == [[-4, 0], [0, 0]]
    assert target.values.grad is None


def test_dqn_against_a_loop(dqn):
    rng = np.random.default_rng(0)
    online, target = rng.normal(size=(50, 5)).astype(np.float32), rng.normal(size=(50, 5)).astype(np.float32)
    obs, next_obs, actions = rng.integers(50, size=64), rng.integers(50, size=64), rng.integers(5, size=64)
    rewards, discounts = rng.normal(size=64), rng.choice([0, 0.99**3], size=64)
    batch = make_batch(dqn, obs, actions, next_obs, rewards, discounts)
    losses, _ = dqn.td_loss(Table(online), batch, dqn.td_target(Table(target), batch))
    for i in range(64):
        best = max(float(target[next_obs[i], a]) for a in range(5))
        expected = (rewards[i] + discounts[i] * best - float(online[obs[i], actions[i]])) ** 2
        assert losses[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_qrdqn_by_hand(qrdqn):
    """One transition, two actions, two quantiles at tau = 1/4 and 3/4.

    Next state: action 0 has quantiles (0, 2), mean 1; action 1 has (-4, 5), mean 0.5: the target follows action 0, and
    is 1 + 0.5 * (0, 2) = (1, 2). Prediction (0, 4). u_ij = target_j - theta_i:
      i = 0: u = 1, 2; Huber 0.5, 1.5; weight tau = 1/4 each:        0.125, 0.375
      i = 1: u = -3, -2; Huber 2.5, 1.5; weight |3/4 - 1| = 1/4 each: 0.625, 0.375
    Sum over i, mean over j: (0.125 + 0.625 + 0.375 + 0.375) / 2 = 0.75.
    """
    online, target = Table([[[9.0, 9.0], [0.0, 4.0]]]), Table([[[0.0, 2.0], [-4.0, 5.0]]])
    batch = make_batch(qrdqn, [0], [1], [0], [1.0], [0.5])
    targets = qrdqn.quantile_target(target, batch)
    assert targets.tolist() == [[1, 2]]
    losses, q_values = qrdqn.quantile_loss(online, batch, targets)
    assert losses.tolist() == [0.75]
    assert q_values.tolist() == [2]
    losses.sum().backward()
    # d/d theta_0: -tau * (1 + 1) / 2; d/d theta_1: (1 - tau) * (1 + 1) / 2
    assert online.values.grad.tolist() == [[[0, 0], [-0.25, 0.25]]]
    assert target.values.grad is None


def test_qrdqn_terminal_target_is_the_reward_alone(qrdqn):
    batch = make_batch(qrdqn, [0], [0], [0], [-1.0], [0.0])
    assert qrdqn.quantile_target(Table([[[5.0, 7.0]]]), batch).tolist() == [[-1, -1]]


def test_qrdqn_against_a_loop(qrdqn):
    rng = np.random.default_rng(0)
    states, actions_, n, size = 20, 3, 11, 16
    online = (2 * rng.normal(size=(states, actions_, n))).astype(np.float32)
    target = (2 * rng.normal(size=(states, actions_, n))).astype(np.float32)
    obs, next_obs = rng.integers(states, size=size), rng.integers(states, size=size)
    actions, rewards, discounts = (
        rng.integers(actions_, size=size),
        rng.normal(size=size),
        rng.choice([0, 0.97], size=size),
    )
    batch = make_batch(qrdqn, obs, actions, next_obs, rewards, discounts)
    losses, _ = qrdqn.quantile_loss(Table(online), batch, qrdqn.quantile_target(Table(target), batch))
    for b in range(size):
        means = [sum(float(x) for x in target[next_obs[b], a]) / n for a in range(actions_)]
        best = means.index(max(means))
        total = 0.0
        for j in range(n):
            y = rewards[b] + discounts[b] * float(target[next_obs[b], best, j])
            for i in range(n):
                u = y - float(online[obs[b], actions[b], i])
                huber = 0.5 * u * u if abs(u) <= 1 else abs(u) - 0.5
                total += abs((i + 0.5) / n - (u < 0)) * huber
        assert losses[b].item() == pytest.approx(total / n, rel=1e-4)


def test_act_is_greedy_or_random_as_epsilon_says(agent):
    class Network(torch.nn.Module):
        def q_values(self, obs):
            return torch.tensor([[0.0, 3.0, 1.0]])

    obs, rng = np.zeros((1, 4), np.uint8), np.random.default_rng(0)
    greedy = [agent.act(Network(), obs, 0.0, 3, rng, "cpu") for _ in range(20)]
    assert all(action.shape == (1,) and action[0] == 1 for action in greedy)
    mixed = np.concatenate([agent.act(Network(), obs, 0.5, 3, rng, "cpu") for _ in range(6_000)])
    shares = np.bincount(mixed, minlength=3) / len(mixed)
    np.testing.assert_allclose(shares, [1 / 6, 2 / 3, 1 / 6], atol=0.03)
