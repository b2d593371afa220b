"""The five diagnostics, each against its definition by a slow independent computation."""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_args, make_network, scalars, weights
from test_training import run

TAGS = [f"diagnostics/{name}" for name in ("loss_variance", "gradient_norm", "representation_norm", "srank")]
TAGS += ["diagnostics/dormant_neurons"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def slow_srank(features):
    """Smallest k whose top-k singular values hold 99% of their sum (Kumar et al., 2021)."""
    singular = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
    for k in range(1, len(singular) + 1):
        if sum(singular[:k]) >= 0.99 * sum(singular):
            return k


def slow_dormant(activations):
    """Share of units whose mean |activation| is at most 0.025 of their layer's mean (Sokar et al., 2023)."""
    dormant = total = 0
    for layer in activations:  # (samples, units) or (samples, channels, height, width)
        means = []
        for unit in range(layer.shape[1]):
            values = [abs(float(x)) for x in np.asarray(layer[:, unit]).ravel()]
            means.append(sum(values) / len(values))
        dormant += sum(mean <= 0.025 * sum(means) / len(means) for mean in means)
        total += len(means)
    return dormant / total


def activations_of(agent, network, obs, tau):
    """Every layer's output after its ReLU but the head's, computed from the weights; features and representation."""
    x, layers = obs.float(), []
    conv = network.convolutions[0]
    x = torch.nn.functional.conv2d(x, conv.weight, conv.bias).clamp(min=0)
    layers.append(x)
    representation = x = x.flatten(1)
    if agent.AGENT == "iqn":
        cosines = torch.cos(torch.pi * torch.arange(1, 65) * tau.reshape(-1, 1))
        phi = (cosines @ network.embedding[0].weight.T + network.embedding[0].bias).clamp(min=0)
        layers.append(phi)
        x = x.repeat_interleave(tau.shape[1], dim=0) * phi
    if agent.AGENT == "spr":
        low, high = x.min(dim=1, keepdim=True).values, x.max(dim=1, keepdim=True).values
        x = (x - low) / (high - low + 1e-5)
    features = (x @ network.dense[0].weight.T + network.dense[0].bias).clamp(min=0)
    layers.append(features)
    return [layer.detach().numpy() for layer in layers], features.detach().numpy(), representation.detach().numpy()


def spoil(network):
    """Kill some units, quiet some others, so that there is something to count."""
    with torch.no_grad():
        network.convolutions[0].bias[:3] = -100
        network.dense[0].weight[:20] *= 1e-3
        network.dense[0].bias[30:40] = -100


def test_network_diagnostics_against_slow_ones(agent):
    network = make_network(agent, (4, 10, 10), 3)
    spoil(network)
    obs = torch.from_numpy(np.random.default_rng(0).random((64, 4, 10, 10)) < 0.3)
    updates = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0]), torch.tensor([6.0, 1.0])]
    found = agent.diagnose(network, obs, updates, np.random.default_rng(1))
    tau = torch.from_numpy(np.random.default_rng(1).random((64, 32), np.float32))
    layers, features, representation = activations_of(agent, network, obs, tau)
    features = features.reshape(64, -1, features.shape[1]).mean(axis=1)  # of iqn: over its 32 quantiles
    assert found["diagnostics/srank"] == slow_srank(features)
    assert 1 < found["diagnostics/srank"] < 64
    assert found["diagnostics/dormant_neurons"] == pytest.approx(slow_dormant(layers))
    assert 0.01 < found["diagnostics/dormant_neurons"] < 1
    norms = [sum(float(x) ** 2 for x in row) ** 0.5 for row in representation]
    assert found["diagnostics/representation_norm"] == pytest.approx(sum(norms) / 64, rel=1e-5)
    assert found["diagnostics/loss_variance"] == pytest.approx((4 + 1 + 9) / 3)  # around the mean, 3
    assert found["diagnostics/gradient_norm"] == pytest.approx(3)
    assert list(found) == TAGS


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_srank_of_known_ranks(dqn, rank):
    """Features of the dense layer with `rank` equal singular values: 99% of their sum needs all (rank < 100)."""

    class Known(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutions, self.dense, self.relu = torch.nn.Flatten(), torch.nn.Flatten(), torch.nn.ReLU()

        def q_values(self, obs, rng):
            return self.relu(self.dense(self.convolutions(obs)))

    obs = torch.zeros(20, 15)
    obs[range(rank), range(rank)] = 2.0
    found = dqn.diagnose(Known(), obs, [torch.ones(2)], np.random.default_rng(0))
    assert found["diagnostics/srank"] == rank
    assert found["diagnostics/dormant_neurons"] == pytest.approx((15 - rank) / 15)


@pytest.mark.parametrize("name", ["dopamine", "impala"])
def test_every_layer_but_the_head_is_counted(agent, name):
    """Atari's networks: three convolutions (or impala's 13 ReLUs) and the dense layer; iqn's embedding as well.

    spr's transition model has no part in Q, and is not counted.
    """
    network = make_network(agent, network=name)
    seen = {"dopamine": 32 + 64 + 64, "impala": 2 * 2 * (16 + 32 + 32) + 32}[name] + 512
    seen += {"dopamine": 7744, "impala": 3872}[name] if agent.AGENT == "iqn" else 0
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    with torch.no_grad():  # one channel of the last convolution lives: one unit of all is not dormant
        convs = [m for m in network.convolutions.modules() if isinstance(m, torch.nn.Conv2d)]
        convs[-1].bias[0] = 1
    obs = torch.zeros(8, 4, 84, 84, dtype=torch.uint8)
    found = agent.diagnose(network, obs, [torch.ones(2)], np.random.default_rng(0))
    assert found["diagnostics/dormant_neurons"] == pytest.approx(1 - 1 / seen, abs=0.1 / seen)


def test_diagnostics_of_a_run(agent, monkeypatch, tmp_path):
    """Logged at the steps asked for; loss and gradients are those of the updates in between; training is the same."""
    gradients = []
    step = torch.optim.Adam.step

    def record(self):
        gradients.append(
            sum((p.grad.double() ** 2).sum().item() for g in self.param_groups for p in g["params"]) ** 0.5
        )
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    args = make_args(agent, total_timesteps=600, diagnostics_frequency=200, save_model=True)
    losses = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.item()) or backward(loss))
    folder = agent.train(args).resolve()
    monkeypatch.undo()
    logged = scalars(folder)
    each = 2 if agent.AGENT == "spr" else 1
    assert len(losses) == 125 * each
    ends = [0, 25 * each, 75 * each, 125 * each]  # updates at steps 104 ... 200, ... 400, ... 600
    parts = [slice(first, last) for first, last in itertools.pairwise(ends)]
    variances = [(step, np.var(losses[part])) for step, part in zip((200, 400, 600), parts, strict=True)]
    norms = [(step, np.mean(gradients[part])) for step, part in zip((200, 400, 600), parts, strict=True)]
    for tag, expected in (("loss_variance", variances), ("gradient_norm", norms)):
        found = logged[f"diagnostics/{tag}"]
        assert [step for step, _ in found] == [200, 400, 600]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-4)
    assert all([step for step, _ in logged[tag]] == [200, 400, 600] for tag in TAGS)
    monkeypatch.chdir(tmp_path)
    quiet, *_ = run(agent, monkeypatch, total_timesteps=600, diagnostics_frequency=0)
    assert not set(TAGS) & set(scalars(tmp_path / quiet))
    assert all(
        torch.equal(a, b) for a, b in zip(weights(folder).values(), weights(tmp_path / quiet).values(), strict=True)
    )


def test_the_probe_is_256_states_whatever_the_batch(agent, monkeypatch):
    shapes = []
    diagnose = agent.diagnose
    monkeypatch.setattr(agent, "diagnose", lambda *a: shapes.append(tuple(a[1].shape)) or diagnose(*a))
    for batch_size in (4, 16):
        agent.train(make_args(agent, total_timesteps=200, diagnostics_frequency=100, batch_size=batch_size))
    assert shapes == [(256, 4, 10, 10)] * 2  # none at step 100: there was no update before


def test_the_probe_is_drawn_uniformly_from_what_can_be_sampled(qrdqn):
    from test_replay import Script, make_replay

    script = Script([40, 60], ["terminal", "truncation"])
    replay = make_replay(qrdqn, 200, 3, True)
    script.play(replay, 4)
    replay.update_priorities(np.array([5]), torch.tensor([1e6]))  # what training would nearly always draw
    rng = np.random.default_rng(0)
    found = [script.decode(obs) for _ in range(40) for obs in replay.probe(rng).numpy()]
    possible = [(0, t) for t in range(40)] + [(1, t) for t in range(58)]
    counts = np.array([found.count(state) for state in possible])
    assert counts.sum() == 40 * 256  # nothing else was drawn
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())
