"""Targets and losses: on an example worked by hand, and against slow float64 loops on random input."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import make_network

STATES, ACTIONS, SIZE = 20, 3, 32


class Table(torch.nn.Module):
    """A network that returns rows of a table: `obs` holds their numbers."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(torch.as_tensor(values, dtype=torch.float32))

    def forward(self, obs):
        return self.values[obs]

    def slow(self, obs):
        return self.values.detach().double().numpy()[obs]


def make_batch(module, obs, actions, rewards, next_obs, discounts):
    return module.Batch(
        torch.tensor(obs),
        torch.tensor(actions),
        torch.tensor(rewards, dtype=torch.float32),
        torch.tensor(next_obs),
        torch.tensor(discounts, dtype=torch.float32),
        np.arange(len(actions)),
    )


def random_batch(module, seed=0):
    """Random transitions between states with numbers; the same as a list of tuples in float64."""
    rng = np.random.default_rng(seed)
    fields = [
        rng.integers(STATES, size=SIZE),
        rng.integers(ACTIONS, size=SIZE),
        rng.normal(size=SIZE),
        rng.integers(STATES, size=SIZE),
        rng.choice([0, 0.97], size=SIZE),
    ]
    return make_batch(module, *fields), list(zip(*fields, strict=True))


def random_tables(*shape, kind=Table):
    """An online and a target network."""
    rng = np.random.default_rng(1)
    return [kind(rng.normal(0, 2, size=(STATES, ACTIONS, *shape))) for _ in range(2)]


def check_gradients(losses, online, target):
    """They reach the online network alone."""
    losses.sum().backward()
    assert online.values.grad.any()
    assert target.values.grad is None


def slow_huber(error):
    return 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5


def test_dqn_by_hand(dqn):
    """Two transitions, two actions; the second is terminal. gamma = 0.5 and one step."""
    online = Table([[1.0, 2.0], [3.0, -1.0]])
    target = Table([[0.0, 4.0], [10.0, 20.0]])
    batch = make_batch(dqn, [0, 1], [0, 1], [1.0, -1.0], [0, 1], [0.5, 0.0])
    targets = dqn.td_target(target, batch)
    assert targets.tolist() == [1 + 0.5 * 4, -1]
    losses, q_values = dqn.td_loss(online, batch, targets)
    assert q_values.tolist() == [1, -1]
    assert losses.tolist() == [(3 - 1) ** 2, 0]
    losses.sum().backward()
    assert online.values.grad.tolist() == [[-4, 0], [0, 0]]
    assert target.values.grad is None


def test_drq_against_a_loop(drq_eps):
    """Huber loss of r + gamma Q(s', argmax of the online Q; target): squared within 1, then linear."""
    online, target = random_tables()
    batch, transitions = random_batch(drq_eps)
    losses, q_values = drq_eps.huber_loss(online, batch, drq_eps.double_target(online, target, batch))
    within = set()
    for i, (obs, action, reward, next_obs, discount) in enumerate(transitions):
        best = max(range(ACTIONS), key=lambda a, next_obs=next_obs: online.slow(next_obs)[a])
        error = reward + discount * target.slow(next_obs)[best] - online.slow(obs)[action]
        within.add(bool(abs(error) <= 1))
        assert losses[i].item() == pytest.approx(slow_huber(error), rel=1e-4, abs=1e-6)
        assert q_values[i].item() == pytest.approx(online.slow(obs)[action])
    assert within == {True, False}
    check_gradients(losses, online, target)


def test_qrdqn_against_a_loop(qrdqn):
    n = 11
    online, target = random_tables(n)
    batch, transitions = random_batch(qrdqn)
    losses, q_values = qrdqn.quantile_loss(online, batch, qrdqn.quantile_target(target, batch))
    for b, (obs, action, reward, next_obs, discount) in enumerate(transitions):
        means = [sum(target.slow(next_obs)[a]) / n for a in range(ACTIONS)]
        next_theta = target.slow(next_obs)[means.index(max(means))]
        theta = online.slow(obs)[action]
        total = 0.0
        for j in range(n):
            for i in range(n):
                u = reward + discount * next_theta[j] - theta[i]
                total += abs((i + 0.5) / n - (u < 0)) * slow_huber(u)
        assert losses[b].item() == pytest.approx(total / n, rel=1e-4)
        assert q_values[b].item() == pytest.approx(theta.mean(), abs=1e-5)
    check_gradients(losses, online, target)


class Atoms(Table):
    """Logits of a table, with a support; its `mean` is a slow one."""

    def __init__(self, values, v_min=-5, v_max=5):
        super().__init__(values)
        self.support = torch.linspace(v_min, v_max, self.values.shape[-1])

    def mean(self, output):
        if output.shape[-1] == 1:
            return output[..., 0]
        return (torch.exp(output) / torch.exp(output).sum(dim=-1, keepdim=True)) @ self.support


def slow_projection(probabilities, reward, discount, support):
    """Bellemare et al., 2017, algorithm 1, one atom at a time in float64."""
    n, low, high = len(support), float(support[0]), float(support[-1])
    step = (high - low) / (n - 1)
    projected = np.zeros(n)
    for j in range(n):
        b_j = (min(max(reward + discount * (low + j * step), low), high) - low) / step
        lower, upper = math.floor(b_j + 1e-12), math.ceil(b_j - 1e-12)
        if lower == upper:
            projected[lower] += probabilities[j]
        else:
            projected[lower] += probabilities[j] * (upper - b_j)
            projected[upper] += probabilities[j] * (b_j - lower)
    return projected


@pytest.mark.parametrize(("n", "v_min", "v_max"), [(51, -10, 10), (51, -100, 100), (2, -1, 1), (11, 0, 10)])
def test_projection_against_a_loop(rainbow, n, v_min, v_max):
    rng = np.random.default_rng(n)
    probabilities = rng.dirichlet(np.full(n, 0.3), size=100)
    rewards = rng.normal(0, v_max / 2, size=100)
    discounts = rng.choice([0, 0.9, 0.99**3, 1.0], size=100)
    support = np.linspace(v_min, v_max, n)
    atoms = rewards[:, None] + discounts[:, None] * support
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (probabilities, atoms, support)]
    projected = rainbow.project(*tensors).numpy()
    for b in range(100):
        expected = slow_projection(probabilities[b], rewards[b], discounts[b], support)
        np.testing.assert_allclose(projected[b], expected, atol=2e-5)
    np.testing.assert_allclose(projected.sum(axis=1), 1, atol=1e-5)  # no mass is lost
    inside = (atoms >= v_min).all(axis=1) & (atoms <= v_max).all(axis=1)  # nothing is clipped: the mean stays
    assert inside.any()
    mean = rewards + discounts * (probabilities @ support)
    np.testing.assert_allclose((projected @ support)[inside], mean[inside], atol=1e-4 * v_max)


def test_projection_by_hand(rainbow):
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


@pytest.mark.parametrize(
    ("name", "double"), [("rainbow", False), ("rainbow", True), ("der", True), ("spr", True), ("bbf", True)]
)
def test_c51_against_a_loop(name, double, request):
    """The same function of the same numbers in five files; latents are the input of the loss in three."""
    module = request.getfixturevalue(name)
    online, target = random_tables(21, kind=Atoms)
    batch, transitions = random_batch(module)
    if name == "rainbow":
        targets = module.rainbow_target(online, target, batch, double)
        losses, q_values = module.rainbow_loss(online, batch, targets)
    elif name == "der":
        targets = module.c51_target(online, target, batch)
        losses, q_values = module.c51_loss(online, batch, targets)
    else:
        online.distributions = online.forward
        targets = module.c51_target(online, target, batch)
        losses, q_values = module.distribution_loss(online, batch.obs, batch, targets)

    def slow_softmax(x):
        return np.exp(x) / np.exp(x).sum()

    support = np.linspace(-5, 5, 21)
    chooser = online if double else target
    for b, (obs, action, reward, next_obs, discount) in enumerate(transitions):
        means = [slow_softmax(chooser.slow(next_obs)[a]) @ support for a in range(ACTIONS)]
        chosen = slow_softmax(target.slow(next_obs)[means.index(max(means))])
        expected = slow_projection(chosen, reward, discount, support)
        predicted = slow_softmax(online.slow(obs)[action])
        np.testing.assert_allclose(targets[b].numpy(), expected, atol=1e-5)
        assert losses[b].item() == pytest.approx(-(expected * np.log(predicted)).sum(), rel=1e-4)
        assert q_values[b].item() == pytest.approx(predicted @ support, abs=1e-4)
    check_gradients(losses, online, target)


def test_rainbow_without_its_parts_is_dqn(dqn, rainbow):
    """The same weights and the same batch: the same targets, losses and gradients as dqn.py's."""
    shape = (10, 10, 4)
    theirs = make_network(dqn, shape)
    theirs_target = make_network(dqn, shape, seed=2)
    mine = make_network(rainbow, shape, distributional=False)
    mine_target = copy.deepcopy(mine)
    mine.load_state_dict(theirs.state_dict())
    mine_target.load_state_dict(theirs_target.state_dict())
    generator = torch.Generator().manual_seed(0)
    obs, next_obs = torch.rand(2, 8, *shape, generator=generator) < 0.3
    rewards, discounts = torch.rand(2, 8, generator=generator)
    batch = dqn.Batch(obs, torch.arange(8) % 6, rewards, next_obs, discounts, np.arange(8))

    targets = dqn.td_target(theirs_target, batch)
    losses, q_values = dqn.td_loss(theirs, batch, targets)
    own_targets = rainbow.rainbow_target(mine, mine_target, batch, False)
    own_losses, own_q_values = rainbow.rainbow_loss(mine, batch, own_targets)
    assert torch.equal(own_targets[:, 0], targets)
    assert torch.equal(own_losses, losses)
    assert torch.equal(own_q_values, q_values)
    own_losses.mean().backward()
    losses.mean().backward()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_rainbow_double_without_distributions(rainbow):
    """Online prefers action 0, target action 1: 1 + 0.5 * the target network's value of the chosen."""
    online = Atoms([[[9.0], [0.0]]])
    target = Atoms([[[2.0], [4.0]]])
    batch = make_batch(rainbow, [0], [0], [1.0], [0], [0.5])
    assert rainbow.rainbow_target(online, target, batch, False).tolist() == [[3.0]]
    assert rainbow.rainbow_target(online, target, batch, True).tolist() == [[2.0]]


class Linear(Table):
    """An implicit quantile network whose quantile function is linear: Z_tau(s, a) = values[s, a] * tau."""

    def forward(self, obs, tau):
        return self.values[obs][:, :, None] * tau[:, None, :]


@pytest.mark.parametrize("double", [False, True])
def test_iqn_against_a_loop(iqn, double):
    online, target = random_tables(kind=Linear)
    batch, transitions = random_batch(iqn)
    rng = np.random.default_rng(2)
    tau, target_tau, policy_tau = [rng.random((SIZE, n)) for n in (7, 5, 3)]
    tensors = [torch.tensor(x, dtype=torch.float32) for x in (tau, target_tau, policy_tau)]
    targets = iqn.implicit_target(online, target, batch, *tensors[1:], double)
    losses, q_values = iqn.implicit_loss(online, batch, targets, tensors[0])
    chooser = online if double else target
    for b, (obs, action, reward, next_obs, discount) in enumerate(transitions):
        means = [np.mean([chooser.slow(next_obs)[a] * t for t in policy_tau[b]]) for a in range(ACTIONS)]
        value = target.slow(next_obs)[means.index(max(means))]
        total = 0.0
        for t_j in target_tau[b]:
            for t_i in tau[b]:
                u = reward + discount * value * t_j - online.slow(obs)[action] * t_i
                total += abs(t_i - (u < 0)) * slow_huber(u)
        assert losses[b].item() == pytest.approx(total / 5, rel=1e-4, abs=1e-6)
        assert q_values[b].item() == pytest.approx(online.slow(obs)[action] * tau[b].mean(), abs=1e-5)
    check_gradients(losses, online, target)


def test_act_is_greedy_or_random_as_epsilon_says(dqn):
    """The same function in every agent."""

    class Network(torch.nn.Module):
        def q_values(self, obs):
            return torch.tensor([[0.0, 3.0, 1.0]])

    obs = np.zeros((1, 4), np.uint8)
    rng = np.random.default_rng(0)
    greedy = [dqn.act(Network(), obs, 0.0, 3, rng, "cpu") for _ in range(20)]
    assert all(action.shape == (1,) and action[0] == 1 for action in greedy)
    mixed = np.concatenate([dqn.act(Network(), obs, 0.5, 3, rng, "cpu") for _ in range(6_000)])
    shares = np.bincount(mixed, minlength=3) / len(mixed)
    np.testing.assert_allclose(shares, [1 / 6, 2 / 3, 1 / 6], atol=0.03)
