"""Targets and losses: on an example worked by hand, and against slow float64 loops on random input."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import make_network


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


class Atoms(Table):
    """Logits of a table, with the support of rainbow's network; its `mean` is a slow one."""

    def __init__(self, values, v_min, v_max):
        super().__init__(values)
        self.support = torch.linspace(v_min, v_max, self.values.shape[-1])

    def mean(self, output):
        if output.shape[-1] == 1:
            return output[..., 0]
        return (torch.exp(output) / torch.exp(output).sum(dim=-1, keepdim=True)) @ self.support


def brute_force_projection(probabilities, rewards, discounts, support):
    """Bellemare et al., 2017, algorithm 1, one atom at a time in float64."""
    n, low, high = len(support), float(support[0]), float(support[-1])
    step = (high - low) / (n - 1)
    projected = np.zeros((len(probabilities), n))
    for b in range(len(probabilities)):
        for j in range(n):
            b_j = (min(max(rewards[b] + discounts[b] * (low + j * step), low), high) - low) / step
            lower, upper = math.floor(b_j + 1e-12), math.ceil(b_j - 1e-12)
            if lower == upper:
                projected[b, lower] += probabilities[b, j]
            else:
                projected[b, lower] += probabilities[b, j] * (upper - b_j)
                projected[b, upper] += probabilities[b, j] * (b_j - lower)
    return projected


@pytest.mark.parametrize(("n", "v_min", "v_max"), [(51, -10, 10), (51, -100, 100), (2, -1, 1), (11, 0, 10)])
def test_projection_against_brute_force(rainbow, n, v_min, v_max):
    rng = np.random.default_rng(n)
    probabilities = rng.dirichlet(np.full(n, 0.3), size=200)
    rewards, discounts = rng.normal(0, v_max / 2, size=200), rng.choice([0, 0.9, 0.99**3, 1.0], size=200)
    support = torch.linspace(v_min, v_max, n)
    atoms = torch.tensor(rewards[:, None] + discounts[:, None] * support.numpy(), dtype=torch.float32)
    projected = rainbow.project(torch.tensor(probabilities, dtype=torch.float32), atoms, support).numpy()
    np.testing.assert_allclose(projected, brute_force_projection(probabilities, rewards, discounts, support), atol=2e-5)
    np.testing.assert_allclose(projected.sum(axis=1), 1, atol=1e-5)  # no mass is lost
    ends = rewards[:, None] + discounts[:, None] * np.array([v_min, v_max])
    inside = (ends >= v_min).all(axis=1) & (ends <= v_max).all(axis=1)  # nothing is clipped: the mean stays
    assert inside.any()
    mean = rewards + discounts * (probabilities @ support.numpy())
    np.testing.assert_allclose((projected @ support.numpy())[inside], mean[inside], atol=1e-4 * v_max)


def test_projection_corner_cases(rainbow):
    """Support -2, -1, 0, 1, 2 and powers of two: every number is exact."""
    support = torch.linspace(-2, 2, 5)
    p = torch.tensor([[0.5, 0.0, 0.25, 0.0, 0.25]])

    def project(reward, discount):
        return rainbow.project(p, reward + discount * support[None], support).tolist()[0]

    assert project(0.0, 1.0) == p.tolist()[0]  # every atom lands on itself
    assert project(1.0, 1.0) == [0, 0.5, 0, 0.25, 0.25]  # ... on its neighbour; the last stays at the end
    assert project(1.0, 0.0) == [0, 0, 0, 1, 0]  # terminal: the reward is an atom
    assert project(0.5, 0.0) == [0, 0, 0.5, 0.5, 0]  # terminal: half-way between two
    assert project(0.0, 0.5) == [0, 0.5, 0.25, 0.25, 0]
    assert project(5.0, 1.0) == [0, 0, 0, 0, 1]  # beyond the upper end
    assert project(-5.0, 0.0) == [1, 0, 0, 0, 0]  # beyond the lower end
    assert project(2.0, 0.0) == [0, 0, 0, 0, 1]  # on the upper end
    assert project(-2.0, 0.0) == [1, 0, 0, 0, 0]  # on the lower end


@pytest.mark.parametrize(("name", "double"), [("rainbow", False), ("rainbow", True), ("der", True), ("spr", True)])
def test_c51_against_a_loop(name, double, request):
    """The same function of the same numbers in three files; spr's loss has the latents as its input."""
    module, rng = request.getfixturevalue(name), np.random.default_rng(0)
    states, actions_, n, size = 20, 3, 21, 32
    online = Atoms(rng.normal(size=(states, actions_, n)), -5, 5)
    target = Atoms(rng.normal(size=(states, actions_, n)), -5, 5)
    online.distributions = online.forward
    obs, next_obs = rng.integers(states, size=size), rng.integers(states, size=size)
    actions, rewards = rng.integers(actions_, size=size), rng.normal(size=size)
    discounts = rng.choice([0, 0.97], size=size)
    batch = make_batch(module, obs, actions, next_obs, rewards, discounts)
    if name == "rainbow":
        targets = module.rainbow_target(online, target, batch, double)
        losses, q_values = module.rainbow_loss(online, batch, targets)
    else:
        targets = module.c51_target(online, target, batch)
        loss = module.c51_loss if name == "der" else lambda network, *x: module.latent_loss(network, batch.obs, *x)
        losses, q_values = loss(online, batch, targets)

    def softmax(x):
        x = np.exp(x.astype(np.float64))
        return x / x.sum()

    tables = {"online": online.values.detach().numpy(), "target": target.values.detach().numpy()}
    support = np.linspace(-5, 5, n)
    for b in range(size):
        chooser = tables["online" if double else "target"][next_obs[b]]
        means = [softmax(chooser[a]) @ support for a in range(actions_)]
        chosen = softmax(tables["target"][next_obs[b], means.index(max(means))])
        expected = brute_force_projection(chosen[None], rewards[b : b + 1], discounts[b : b + 1], support)[0]
        predicted = softmax(tables["online"][obs[b], actions[b]])
        np.testing.assert_allclose(targets[b].numpy(), expected, atol=1e-5)
        assert losses[b].item() == pytest.approx(-(expected * np.log(predicted)).sum(), rel=1e-4)
        assert q_values[b].item() == pytest.approx(predicted @ support, abs=1e-4)
    losses.sum().backward()
    assert online.values.grad is not None and target.values.grad is None


def test_drq_against_a_loop(drq_eps):
    """Huber loss of r + gamma Q(s', argmax of the online Q; target): squared within 1, then linear."""
    rng = np.random.default_rng(0)
    online, target = rng.normal(0, 2, size=(2, 50, 5)).astype(np.float32)
    obs, next_obs, actions = rng.integers(50, size=64), rng.integers(50, size=64), rng.integers(5, size=64)
    rewards, discounts = rng.normal(size=64), rng.choice([0, 0.99**10], size=64)
    batch = make_batch(drq_eps, obs, actions, next_obs, rewards, discounts)
    table, frozen = Table(online), Table(target)
    losses, q_values = drq_eps.huber_loss(table, batch, drq_eps.double_target(table, frozen, batch))
    kinds = set()
    for i in range(64):
        best = max(range(5), key=lambda a: online[next_obs[i], a])
        error = rewards[i] + discounts[i] * float(target[next_obs[i], best]) - float(online[obs[i], actions[i]])
        kinds.add(abs(error) <= 1)
        expected = 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5
        assert losses[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert q_values[i].item() == pytest.approx(float(online[obs[i], actions[i]]))
    assert kinds == {True, False}
    losses.sum().backward()
    assert table.values.grad is not None and frozen.values.grad is None


def test_double_takes_the_online_networks_action_and_the_target_networks_value(rainbow, iqn):
    """Online prefers action 0, target action 1; without distributions the target is 1 + 0.5 * the chosen value."""
    online, target = Atoms([[[9.0], [0.0]]], -1, 1), Atoms([[[2.0], [4.0]]], -1, 1)
    batch = make_batch(rainbow, [0], [0], [0], [1.0], [0.5])
    assert rainbow.rainbow_target(online, target, batch, False).tolist() == [[3.0]]
    assert rainbow.rainbow_target(online, target, batch, True).tolist() == [[2.0]]
    online, target = Linear([[9.0, 0.0]]), Linear([[2.0, 4.0]])
    tau = torch.tensor([[0.5, 1.0]])
    assert iqn.implicit_target(online, target, batch, tau, tau[:, :1], False).tolist() == [[1 + 0.5 * 2, 1 + 0.5 * 4]]
    assert iqn.implicit_target(online, target, batch, tau, tau[:, :1], True).tolist() == [[1 + 0.5 * 1, 1 + 0.5 * 2]]


def test_rainbow_without_its_parts_is_dqn(dqn, rainbow):
    """The same weights and the same batch of Atari frames: the same targets, losses and gradients as dqn.py's."""
    flags = {"prioritized": False, "n_step": 1, "network": "nature"}
    mine, theirs = make_network(rainbow, distributional=False, **flags), make_network(dqn, **flags)
    for seed, network in enumerate((theirs, copy.deepcopy(theirs))):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        theirs_target = network
    mine_target = copy.deepcopy(mine)
    mine.load_state_dict(theirs.state_dict())
    mine_target.load_state_dict(theirs_target.state_dict())
    rng = np.random.default_rng(0)
    obs, next_obs = [torch.from_numpy(rng.integers(256, size=(8, 4, 84, 84), dtype=np.uint8)) for _ in range(2)]
    floats = [torch.from_numpy(rng.normal(size=8).astype(np.float32)) for _ in range(2)]
    batch = dqn.Batch(obs, torch.arange(8) % 6, next_obs, *floats, torch.ones(8), np.arange(8))
    targets, losses = (
        dqn.td_target(theirs_target, batch),
        dqn.td_loss(theirs, batch, dqn.td_target(theirs_target, batch)),
    )
    own_targets = rainbow.rainbow_target(mine, mine_target, batch, False)
    own_losses = rainbow.rainbow_loss(mine, batch, own_targets)
    assert torch.equal(own_targets[:, 0], targets)
    assert torch.equal(own_losses[0], losses[0]) and torch.equal(own_losses[1], losses[1])
    own_losses[0].mean().backward()
    losses[0].mean().backward()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Linear(Table):
    """An implicit quantile network whose quantile function is linear: Z_tau(s, a) = values[s, a] * tau."""

    def forward(self, obs, tau):
        return self.values[obs][:, :, None] * tau[:, None, :]


def test_iqn_by_hand(iqn):
    """Prediction 4 tau at tau = 1/4, 3/4: (1, 3). Target 1 + 0.5 * 8 tau' at tau' = 1/2, 1/4: (3, 2).

    u_ij: i = 0: 2, 1 -> Huber 1.5, 0.5, weight 1/4; i = 1: 0, -1 -> Huber 0, 0.5, weights 3/4, 1/4.
    Sum over i, mean over j: (0.375 + 0.125 + 0 + 0.125) / 2 = 0.3125.
    """
    online, target = Linear([[9.0, 4.0]]), Linear([[8.0, 7.0]])
    batch = make_batch(iqn, [0], [1], [0], [1.0], [0.5])
    targets = iqn.implicit_target(online, target, batch, torch.tensor([[0.5, 0.25]]), torch.tensor([[0.1, 0.9]]), False)
    assert targets.tolist() == [[3, 2]]
    losses, q_values = iqn.implicit_loss(online, batch, targets, torch.tensor([[0.25, 0.75]]))
    assert losses.tolist() == [0.3125]
    assert q_values.tolist() == [2]
    losses.sum().backward()
    # d/dZ_0 = -1/4 * (1 + 1) / 2, d/dZ_1 = (3/4 * 0 + 1/4 * 1) / 2; dZ/dvalue = tau
    assert online.values.grad.tolist() == [[0, pytest.approx(-0.25 * 0.25 + 0.125 * 0.75)]]
    assert target.values.grad is None


def test_iqn_against_a_loop(iqn):
    rng = np.random.default_rng(0)
    states, actions_, size = 20, 3, 16
    counts = {"tau": 7, "target": 5, "policy": 3}
    online, target = rng.normal(0, 2, size=(2, states, actions_)).astype(np.float32)
    obs, next_obs = rng.integers(states, size=size), rng.integers(states, size=size)
    actions, rewards = rng.integers(actions_, size=size), rng.normal(size=size)
    discounts = rng.choice([0, 0.97], size=size)
    tau = {name: rng.random((size, n)).astype(np.float32) for name, n in counts.items()}
    batch = make_batch(iqn, obs, actions, next_obs, rewards, discounts)
    torch_tau = {name: torch.from_numpy(x) for name, x in tau.items()}
    frozen = Linear(target)
    targets = iqn.implicit_target(frozen, frozen, batch, torch_tau["target"], torch_tau["policy"], False)
    losses, _ = iqn.implicit_loss(Linear(online), batch, targets, torch_tau["tau"])
    for b in range(size):
        means = [np.mean([float(target[next_obs[b], a]) * float(t) for t in tau["policy"][b]]) for a in range(actions_)]
        best, total = means.index(max(means)), 0.0
        for t_j in tau["target"][b]:
            y = rewards[b] + discounts[b] * float(target[next_obs[b], best]) * float(t_j)
            for t_i in tau["tau"][b]:
                u = y - float(online[obs[b], actions[b]]) * float(t_i)
                huber = 0.5 * u * u if abs(u) <= 1 else abs(u) - 0.5
                total += abs(float(t_i) - (u < 0)) * huber
        assert losses[b].item() == pytest.approx(total / counts["target"], rel=1e-4, abs=1e-6)


def test_act_is_greedy_or_random_as_epsilon_says(agent):
    class Network(torch.nn.Module):
        def q_values(self, obs, rng):
            return torch.tensor([[0.0, 3.0, 1.0]])

    obs, rng = np.zeros((1, 4), np.uint8), np.random.default_rng(0)
    greedy = [agent.act(Network(), obs, 0.0, 3, rng, "cpu") for _ in range(20)]
    assert all(action.shape == (1,) and action[0] == 1 for action in greedy)
    mixed = np.concatenate([agent.act(Network(), obs, 0.5, 3, rng, "cpu") for _ in range(6_000)])
    shares = np.bincount(mixed, minlength=3) / len(mixed)
    np.testing.assert_allclose(shares, [1 / 6, 2 / 3, 1 / 6], atol=0.03)
