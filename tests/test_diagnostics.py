"""The five diagnostics, each against its definition by a slow independent computation; and what they may not touch."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from conftest import make_args, make_network, name_of, scalars, weights
from test_replay import Script, make_replay

NAMES = ["loss_variance", "gradient_norm", "representation_norm", "srank", "dormant_neurons"]
TAGS = [f"diagnostics/{name}" for name in NAMES]


def noisy(module):
    return {"noisy": True, "dueling": True} if name_of(module) == "rainbow" else {}


def random_obs(size):
    return torch.from_numpy(np.random.default_rng(0).random((size, 10, 10, 4)) < 0.3)


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
        means = [np.abs(layer[:, unit]).mean() for unit in range(layer.shape[1])]
        dormant += sum(mean <= 0.025 * sum(means) / len(means) for mean in means)
        total += len(means)
    return dormant / total


def activations_of(module, network, obs, tau):
    """Every layer's output after its ReLU but the head's, computed from the weights; features and representation."""
    conv = network.convolutions[1]
    x = torch.nn.functional.conv2d(obs.permute(0, 3, 1, 2).float(), conv.weight, conv.bias).clamp(min=0)
    layers = [x]
    x = x.flatten(1)
    representation = x
    if name_of(module) == "iqn":
        cosines = torch.cos(torch.pi * torch.arange(1, 65) * tau.reshape(-1, 1))
        phi = (cosines @ network.embedding[0].weight.T + network.embedding[0].bias).clamp(min=0)
        layers.append(phi)
        x = x.repeat_interleave(tau.shape[1], dim=0) * phi
    if hasattr(network, "encode"):
        low = x.min(dim=1, keepdim=True).values
        high = x.max(dim=1, keepdim=True).values
        x = (x - low) / (high - low + 1e-5)
    features = (x @ network.dense[0].weight.T + network.dense[0].bias).clamp(min=0)
    layers.append(features)
    return [layer.detach().numpy() for layer in layers], features.detach().numpy(), representation.detach().numpy()


def spoil(network):
    """Kill some units, quiet some others, so that there is something to count."""
    with torch.no_grad():
        network.convolutions[1].bias[:3] = -100
        network.dense[0].weight[:20] *= 1e-3
        network.dense[0].bias[:20] *= 1e-3
        network.dense[0].bias[30:40] = -100


def test_network_diagnostics_against_slow_ones(agent):
    """With noisy layers of their means alone; iqn's features are means over the fractions that it acts on."""
    network = make_network(agent, (10, 10, 4), 3, **noisy(agent))
    spoil(network)
    obs = random_obs(48)
    torch.manual_seed(1)
    found = agent.diagnose(network, obs, [[1.0, 3.0], [2.0, 5.0], [6.0, 1.0]])
    torch.manual_seed(1)
    layers, features, representation = activations_of(agent, network, obs, torch.rand(48, 32))
    features = features.reshape(48, -1, features.shape[1]).mean(axis=1)
    assert list(found) == TAGS
    assert found["diagnostics/srank"] == slow_srank(features)
    assert 1 < found["diagnostics/srank"] < 48
    assert float(found["diagnostics/dormant_neurons"]) == pytest.approx(slow_dormant(layers))
    assert 0.01 < found["diagnostics/dormant_neurons"] < 1
    norms = [sum(float(x) ** 2 for x in row) ** 0.5 for row in representation]
    assert float(found["diagnostics/representation_norm"]) == pytest.approx(sum(norms) / 48, rel=1e-5)
    assert found["diagnostics/loss_variance"] == pytest.approx((4 + 1 + 9) / 3)  # around the mean, 3
    assert found["diagnostics/gradient_norm"] == pytest.approx(3)


@pytest.mark.parametrize(("name", "network"), [("dqn", "impala"), ("iqn", "nature"), ("spr", "nature")])
def test_every_layer_but_the_head_is_counted(name, network, request):
    """Atari's networks: three convolutions (or impala's 13 ReLUs) and the dense layer; iqn's embedding as well.

    spr's transition model has no part in Q, and is not counted.
    """
    module = request.getfixturevalue(name)
    q_network = make_network(module, network=network)
    units = {"nature": 32 + 64 + 64, "impala": 2 * 2 * (16 + 32 + 32) + 32}[network] + 512
    units += 3136 if name == "iqn" else 0
    convs = [layer for layer in q_network.convolutions.modules() if isinstance(layer, torch.nn.Conv2d)]
    with torch.no_grad():
        for parameter in q_network.parameters():
            parameter.zero_()
        convs[-1].bias[0] = 1  # one channel of the last convolution lives: one unit of all is not dormant
    obs = torch.zeros(2, 4, 84, 84, dtype=torch.uint8)
    found = module.diagnose(q_network, obs, [[1.0, 1.0]])
    assert float(found["diagnostics/dormant_neurons"]) == pytest.approx(1 - 1 / units, abs=0.1 / units)


class Log:
    """A writer that keeps what it is told."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = float(value)


def test_evaluation_and_diagnostics_disturb_nothing(agent, monkeypatch):
    """No random generator, no weight, no noise, no mode; and both depend on nothing but what they are given."""
    args = make_args(agent, eval_episodes=2, eval_epsilon=0.5, **noisy(agent))
    envs = agent.make_env(args)
    device = torch.device("cpu")
    network = make_network(agent, (10, 10, 4), 3, **noisy(agent))
    rng = np.random.default_rng(5)
    replay = agent.FrameReplay(envs.single_observation_space, args, device, rng)
    zero, no = np.zeros(1, int), np.zeros(1, bool)
    obs = random_obs(301).numpy()[:, None]
    for t in range(300):
        replay.add(obs[t], obs[t + 1], zero, zero, no, no)
    network.q_values(torch.from_numpy(obs[0]))  # draws noise
    actions = []
    act = agent.act

    def record(*arguments):
        actions.append(int(act(*arguments)[0]))
        return np.array(actions[-1:])

    monkeypatch.setattr(agent, "act", record)

    def generators():
        numpys = np.random.get_state()[1].tolist()  # noqa: NPY002
        return [torch.get_rng_state().tolist(), copy.deepcopy(rng.bit_generator.state), numpys, random.getstate()]

    def parts():
        modules = [(module.training, len(module._forward_hooks)) for module in network.modules()]
        tensors = [*network.parameters(), *network.buffers()]
        return modules, [tensor.detach().numpy().tolist() for tensor in tensors], [p.grad for p in network.parameters()]

    before = generators(), parts()
    found = []
    for _ in range(2):
        log = Log()
        agent.evaluate(args, envs, network, 7, device, None, log)
        assert list(log.scalars) == [("eval/episodic_return", 7)]
        values = agent.diagnose(network, replay.probe(), [[1.0, 2.0]])
        found.append((log.scalars, values, actions.copy()))
        actions.clear()
    assert (generators(), parts()) == before
    assert found[0] == found[1]
    assert len(set(found[0][-1])) > 1


@pytest.mark.parametrize("name", ["iqn", "rainbow", "spr"])
def test_diagnostics_of_a_run(name, request, monkeypatch):
    """Logged at the steps asked for, of the updates in between; training is the same without them."""
    module = request.getfixturevalue(name)
    flags = {"save_model": True, "eval_episodes": 1, "n_step": 3, **noisy(module)}
    if name == "iqn":
        flags |= {"n_tau": 8, "n_target_tau": 8, "n_policy_tau": 8}
    losses = []
    gradients = []
    backward = torch.Tensor.backward
    step = torch.optim.Adam.step

    def record_loss(loss):
        losses.append(loss.item())
        backward(loss)

    def record_gradients(self):
        squares = [(p.grad.double() ** 2).sum().item() for group in self.param_groups for p in group["params"]]
        gradients.append(sum(squares) ** 0.5)
        step(self)

    monkeypatch.setattr(torch.Tensor, "backward", record_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", record_gradients)
    folder = module.train(make_args(module, total_timesteps=220, diagnostics_frequency=60, **flags))
    each = 2 if name == "spr" else 1
    assert len(losses) == 30 * each  # at steps 104, 108 ... 220
    logged = scalars(folder)
    ends = [0, 5 * each, 20 * each]  # of the updates up to steps 120 and 180
    parts = [slice(first, last) for first, last in itertools.pairwise(ends)]
    expected = {
        "diagnostics/loss_variance": [np.var(losses[part]) for part in parts],
        "diagnostics/gradient_norm": [np.mean(gradients[part]) for part in parts],
    }
    for tag in TAGS:
        steps, values = zip(*logged[tag], strict=True)
        assert steps == (120, 180)  # none at step 60: there was no update before
        if tag in expected:
            assert values == pytest.approx(expected[tag], rel=1e-4)

    quiet = module.train(make_args(module, total_timesteps=220, diagnostics_frequency=0, **flags))
    assert not set(TAGS) & set(scalars(quiet))
    for one, other in zip(weights(folder).values(), weights(quiet).values(), strict=True):
        assert torch.equal(one, other)


def test_the_probe_is_drawn_uniformly_from_what_can_be_sampled(qrdqn):
    """256 states, whatever the priorities; the same ones until the replay moves on."""
    script = Script([40, 60], ["terminal", "truncation"])
    replay = make_replay(qrdqn, "PrioritizedReplay", 200, 3)
    script.play(replay)
    replay.update_priorities(np.array([5]), torch.tensor([1e6]))  # what training would nearly always draw
    found = []
    for replay.pos in range(101, 141):  # as if it had moved on
        found += [script.decode(obs) for obs in replay.probe().numpy()]
        assert torch.equal(replay.probe(), replay.probe())
    possible = [(0, t) for t in range(40)] + [(1, t) for t in range(58)]
    counts = np.array([found.count(state) for state in possible])
    assert counts.sum() == 40 * 256  # nothing else was drawn
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())
