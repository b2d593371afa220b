"""Shapes and parameter counts, computed by hand, and the initialisation's moments."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_network

ALE, MINATAR = (4, 84, 84), (4, 10, 10)


def convolution(inputs, outputs, size):
    return (inputs * size * size + 1) * outputs


def residual_stack(inputs, outputs):
    """One convolution and two blocks of two."""
    return convolution(inputs, outputs, 3) + 4 * convolution(outputs, outputs, 3)


NARROW = convolution(4, 32, 8) + convolution(32, 64, 4) + convolution(64, 64, 3)
WIDE = convolution(4, 128, 8) + convolution(128, 256, 4) + convolution(256, 256, 3)
IMPALA = residual_stack(4, 16) + residual_stack(16, 32) + residual_stack(32, 32)
FEATURES = {"dopamine": 11 * 11 * 64, "nature": 7 * 7 * 64, "dopamine-x4": 11 * 11 * 256, "impala": 11 * 11 * 32}
PARAMETERS = {"dopamine": NARROW, "nature": NARROW, "dopamine-x4": WIDE, "impala": IMPALA}
CHANNELS = {"dopamine": 64, "nature": 64, "dopamine-x4": 256, "impala": 32, "MinAtar": 16}  # of the last convolution
OUTPUTS = {"dqn": 1, "qrdqn": 200, "rainbow": 51, "iqn": 1, "der": 51, "drq_eps": 1, "spr": 51}  # per action
VALUES = {"der": 51, "drq_eps": 1, "spr": 51}  # of a dueling head


def dense(features, width, actions, agent, channels):
    """Parameters of what stands on top of the convolutions."""
    found = (features + 1) * width + (width + 1) * (actions * OUTPUTS[agent] + VALUES.get(agent, 0))
    if agent == "iqn":
        found += (64 + 1) * features  # the embedding
    if agent in ("der", "spr"):
        found *= 2  # each weight and bias has a sigma
    if agent == "spr":
        transition = convolution(channels + actions, channels, 3) + convolution(channels, channels, 3)
        found += transition + (width + 1) * width  # and the predictor
    return found


@pytest.mark.parametrize("name", FEATURES)
def test_atari_networks(agent, name):
    network = make_network(agent, network=name)
    expected = PARAMETERS[name] + dense(FEATURES[name], 512, 6, agent.AGENT, CHANNELS[name])
    assert sum(p.numel() for p in network.parameters()) == expected
    obs = torch.randint(0, 256, (5, *ALE), dtype=torch.uint8)
    sizes, x = [], obs / 255
    for layer in network.convolutions:
        x = layer(x)
        if isinstance(layer, torch.nn.MaxPool2d if name == "impala" else torch.nn.Conv2d):
            sizes.append(x.shape[-1])
    assert sizes == {"nature": [20, 9, 7], "impala": [42, 21, 11]}.get(name, [21, 11, 11])
    assert x.shape == (5, FEATURES[name])
    output = network(obs, torch.rand(5, 7)) if agent.AGENT == "iqn" else network(obs)
    shapes = {"dqn": (5, 6), "drq_eps": (5, 6), "iqn": (5, 6, 7)}
    assert output.shape == shapes.get(agent.AGENT, (5, 6, OUTPUTS[agent.AGENT]))
    assert network.q_values(obs, np.random.default_rng(0)).shape == (5, 6)


def test_minatar_network(agent):
    network = make_network(agent, MINATAR, 3)
    expected = convolution(4, 16, 3) + dense(8 * 8 * 16, 128, 3, agent.AGENT, CHANNELS["MinAtar"])
    assert sum(p.numel() for p in network.parameters()) == expected
    obs = torch.zeros(2, *MINATAR, dtype=torch.bool)
    assert network.q_values(obs, np.random.default_rng(0)).shape == (2, 3)


def same_padding(size, kernel, stride):
    """Zeros before and after that SAME asks for: ceil(size / stride) outputs, the odd one after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize("name", ["dopamine", "dopamine-x4"])
def test_same_padding_against_its_definition(dqn, name):
    network = make_network(dqn, network=name)
    convs = [layer for layer in network.convolutions if isinstance(layer, torch.nn.Conv2d)]
    obs = torch.randint(0, 256, (2, *ALE), dtype=torch.uint8)
    x = obs.numpy() / 255
    for conv in convs:
        pad = same_padding(x.shape[-1], conv.kernel_size[0], conv.stride[0])
        x = np.pad(x, ((0, 0), (0, 0), pad, pad))
        x = F.conv2d(torch.tensor(x, dtype=torch.float64), conv.weight.double(), conv.bias.double(), conv.stride)
        x = x.clamp(min=0).detach().numpy()
    assert x.shape[2:] == (11, 11)
    np.testing.assert_allclose(network.convolutions(obs / 255).detach().numpy(), x.reshape(2, -1), atol=1e-5)


def test_impala_against_its_definition(dqn):
    """Espeholt et al., 2018, figure 3: convolution, max-pool 3x3/2 (SAME padding), two residual blocks; then ReLU."""
    network = make_network(dqn, network="impala")
    convs = iter([m for m in network.modules() if isinstance(m, torch.nn.Conv2d)])

    def convolve(x):
        conv = next(convs)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), conv.weight.double(), conv.bias.double())

    obs = torch.randint(0, 256, (2, *ALE), dtype=torch.uint8)
    x = obs.double() / 255
    for _ in range(3):
        x = convolve(x)
        before, after = same_padding(x.shape[-1], 3, 2)
        x = F.max_pool2d(F.pad(x, (before, after, before, after), value=-math.inf), 3, 2)
        for _ in range(2):
            x = x + convolve(convolve(x.clamp(min=0)).clamp(min=0))
    expected = x.clamp(min=0).flatten(1)
    np.testing.assert_allclose(network.convolutions(obs / 255).detach().numpy(), expected.detach().numpy(), atol=1e-5)


def test_pixels_are_scaled_and_booleans_are_not(agent):
    seen = []
    for shape, high in ((ALE, 255), (MINATAR, 1)):
        network = make_network(agent, shape)
        network.convolutions.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        obs = torch.full((1, *shape), high, dtype=torch.uint8 if high == 255 else torch.bool)
        network.q_values(obs, np.random.default_rng(0))
    assert all(x.dtype == torch.float32 and (x == 1).all() for x in seen) and len(seen) == 2


def test_initialisation(agent):
    """Xavier uniform, for rainbow, qrdqn and iqn uniform with variance 1 / (sqrt(3) fan_in); biases zero; seeded.

    Noisy layers have a test of their own.
    """
    network = make_network(agent, seed=5)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) and not hasattr(layer, "sigma_weight"):
            area = layer.kernel_size[0] ** 2 if isinstance(layer, torch.nn.Conv2d) else 1
            fan_in, fan_out = layer.weight.shape[1] * area, layer.weight.shape[0] * area
            narrow = agent.AGENT in ("rainbow", "qrdqn", "iqn")
            variance = 1 / (math.sqrt(3) * fan_in) if narrow else 2 / (fan_in + fan_out)
            assert layer.weight.var().item() == pytest.approx(variance, rel=0.12 if fan_out == 1 else 0.08)
            limit = math.sqrt(3 * variance)
            assert 0.95 * limit < layer.weight.abs().max().item() <= limit
            assert not layer.bias.any()
    same, other = make_network(agent, seed=5), make_network(agent, seed=6)
    assert torch.equal(network.dense[0].weight, same.dense[0].weight)
    assert not torch.equal(network.dense[0].weight, other.dense[0].weight)


def test_embedding_by_hand(iqn):
    """Q_tau = head(relu(dense(psi(x) * relu(embedding(cos(pi i tau)), i = 1..64)))), one state and tau at a time."""
    network = make_network(iqn, MINATAR, 3)
    obs = torch.rand(3, *MINATAR, generator=torch.Generator().manual_seed(0))
    tau = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    output = network(obs, tau)
    assert output.shape == (3, 3, 5)
    network.double()
    for b in range(3):
        psi = network.convolutions(obs[b : b + 1].double())[0]
        for k in range(5):
            cosines = torch.tensor([math.cos(math.pi * i * tau[b, k].item()) for i in range(1, 65)]).double()
            weight, bias = network.embedding[0].weight, network.embedding[0].bias
            phi = (weight @ cosines + bias).clamp(min=0)
            hidden = (network.dense[0].weight @ (psi * phi) + network.dense[0].bias).clamp(min=0)
            expected = network.head.weight @ hidden + network.head.bias
            np.testing.assert_allclose(output[b, :, k].detach().numpy(), expected.detach().numpy(), atol=1e-5)


def test_iqn_acts_on_the_mean_over_32_fresh_tau(iqn):
    network = make_network(iqn, MINATAR, 3)
    seen = []
    forward = network.forward
    network.forward = lambda obs, tau: seen.append(tau) or forward(obs, tau)
    obs, rng = torch.ones(2, *MINATAR, dtype=torch.bool), np.random.default_rng(0)
    values = network.q_values(obs, rng)
    network.q_values(obs, rng)
    assert seen[0].shape == (2, 32) and not torch.equal(seen[0], seen[1])
    assert len(set(seen[0].ravel().tolist())) == 64 and ((seen[0] >= 0) & (seen[0] < 1)).all()
    torch.testing.assert_close(values, forward(obs, seen[0]).mean(dim=2))


def test_noisy_layer(rainbow):
    """w = mu + sigma * f(e_out) f(e_in)^T: rank-one noise, f(e) = sign(e) sqrt(|e|); in evaluation mu alone."""
    network = make_network(rainbow, MINATAR, 3, noisy=True)
    layer, rng = network.head, np.random.default_rng(3)
    fan_in, fan_out = layer.in_features, layer.out_features
    assert (fan_in, fan_out) == (128, 3 * 51)
    rainbow.draw_noise(rng, layer)
    raw = np.random.default_rng(3).standard_normal(fan_in + fan_out, np.float32).astype(np.float64)
    e_in, e_out = np.split(np.sign(raw) * np.sqrt(np.abs(raw)), [fan_in])
    mu, sigma = layer.weight.detach().double().numpy(), layer.sigma_weight.detach().double().numpy()
    weight = mu + sigma * np.outer(e_out, e_in)
    bias = layer.bias.detach().double().numpy() + layer.sigma_bias.detach().double().numpy() * e_out
    assert np.linalg.matrix_rank((weight - mu) / sigma) == 1
    x = np.random.default_rng(0).normal(size=(5, fan_in))
    expected = x @ weight.T + bias
    np.testing.assert_allclose(layer(torch.tensor(x).float()).detach().numpy(), expected, atol=1e-4)
    layer.eval()
    expected = x @ mu.T + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(torch.tensor(x).float()).detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("name", "sigma_0"), [("rainbow", 0.1), ("der", 0.1), ("spr", 0.5)])
def test_noisy_layers_begin_as_the_protocol_says(name, sigma_0, request):
    """mu, weights and biases, uniform in +-1/sqrt(fan_in); sigma = sigma0 / sqrt(fan_in); every dense layer."""
    module = request.getfixturevalue(name)
    network = make_network(module, **({"noisy": True, "dueling": True} if name == "rainbow" else {}))
    for layer in (network.dense[0], network.head, network.value):
        assert isinstance(layer, module.NoisyLinear)
        limit = 1 / math.sqrt(layer.in_features)
        for mu in (layer.weight, layer.bias):
            assert mu.var().item() == pytest.approx(limit**2 / 3, rel=0.35 if mu is layer.bias else 0.08)
            assert 0.9 * limit < mu.abs().max().item() <= limit
        for sigma in (layer.sigma_weight, layer.sigma_bias):
            np.testing.assert_allclose(sigma.detach().numpy(), sigma_0 * limit, rtol=1e-6)


def test_noise_is_drawn_for_acting_and_never_in_evaluation(rainbow):
    network = make_network(rainbow, MINATAR, 3, noisy=True)
    obs, rng = torch.ones(1, *MINATAR, dtype=torch.bool), np.random.default_rng(0)
    first, second = network.q_values(obs, rng), network.q_values(obs, rng)
    assert not torch.equal(first, second)
    network.eval()
    before = rng.bit_generator.state
    first, second = network.q_values(obs, rng), network.q_values(obs, rng)
    assert torch.equal(first, second) and rng.bit_generator.state == before
    quiet = make_network(rainbow, MINATAR, 3)  # without --noisy nothing is drawn either
    assert torch.equal(quiet.q_values(obs, rng), quiet.q_values(obs, rng)) and rng.bit_generator.state == before


def test_networks_share_a_draw_of_noise(rainbow):
    one, two = [make_network(rainbow, MINATAR, 3, noisy=True, dueling=True, seed=seed) for seed in (1, 2)]
    rng = np.random.default_rng(0)
    rainbow.draw_noise(rng, one, two)
    pairs = list(zip([one.dense[0], one.head, one.value], [two.dense[0], two.head, two.value], strict=True))
    assert all(torch.equal(a.noise, b.noise) and a.noise.any() for a, b in pairs)
    assert not torch.equal(one.head.noise[:128], one.value.noise[:128])  # each layer has its own
    rainbow.draw_noise(rng, one)
    assert not any(torch.equal(a.noise, b.noise) for a, b in pairs)


@pytest.mark.parametrize("name", ["rainbow", "rainbow without C51", "der", "drq_eps", "spr"])
def test_dueling_subtracts_the_mean_advantage(name, request):
    """Q(s, a) = V(s) + A(s, a) - mean over a of A(s, a), for every atom: Wang et al., 2016, eq. 9."""
    flags = {"dueling": True, "distributional": " " not in name} if "rainbow" in name else {}
    network = make_network(request.getfixturevalue(name.split(" ")[0]), MINATAR, 3, **flags)
    obs = torch.rand(4, *MINATAR, generator=torch.Generator().manual_seed(0))
    features = network.dense(network.encode(obs) if name == "spr" else network.convolutions(obs))
    atoms = 1 if name in ("rainbow without C51", "drq_eps") else 51
    output = network(obs).detach().numpy().reshape(4, 3, atoms)
    value = (features @ network.value.weight.T + network.value.bias).detach().numpy()
    advantage = (features @ network.head.weight.T + network.head.bias).detach().numpy().reshape(4, 3, atoms)
    for b in range(4):
        for a in range(3):
            for z in range(atoms):
                mean = sum(advantage[b, i, z] for i in range(3)) / 3
                assert output[b, a, z] == pytest.approx(value[b, z] + advantage[b, a, z] - mean, abs=1e-5)
