"""Shapes and parameter counts, computed by hand, and the initialisation's moments."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_args

ALE, MINATAR = (4, 84, 84), (4, 10, 10)
CONVOLUTIONS = (4 * 8 * 8 + 1) * 32 + (32 * 4 * 4 + 1) * 64 + (64 * 3 * 3 + 1) * 64
BODY = {
    "dopamine": CONVOLUTIONS + (11 * 11 * 64 + 1) * 512,
    "nature": CONVOLUTIONS + (7 * 7 * 64 + 1) * 512,
    "minatar": (4 * 3 * 3 + 1) * 16 + (8 * 8 * 16 + 1) * 128,
}


def make_network(module, obs_shape=ALE, num_actions=6, **flags):
    network = {"dqn": "QNetwork", "qrdqn": "QuantileNetwork"}[module.AGENT]
    return getattr(module, network)(obs_shape, num_actions, make_args(module, **flags))


@pytest.mark.parametrize("name", ["dopamine", "nature"])
def test_atari_networks(agent, name):
    network = make_network(agent, network=name)
    quantiles = 200 if agent.AGENT == "qrdqn" else 1
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters == BODY[name] + (512 + 1) * 6 * quantiles
    obs = torch.randint(0, 256, (5, *ALE), dtype=torch.uint8)
    sizes, x = [], obs / 255
    for layer in network.convolutions:
        x = layer(x)
        if isinstance(layer, torch.nn.Conv2d):
            sizes.append(x.shape[-1])
    assert sizes == {"dopamine": [21, 11, 11], "nature": [20, 9, 7]}[name]
    assert network(obs).shape == ((5, 6, 200) if quantiles > 1 else (5, 6))
    assert network.q_values(obs).shape == (5, 6)


def test_minatar_network(agent):
    network = make_network(agent, MINATAR, 3)
    quantiles = 200 if agent.AGENT == "qrdqn" else 1
    assert sum(p.numel() for p in network.parameters()) == BODY["minatar"] + (128 + 1) * 3 * quantiles
    assert network.q_values(torch.zeros(2, *MINATAR, dtype=torch.bool)).shape == (2, 3)


def test_same_padding_against_its_definition(agent):
    """SAME: ceil(size / stride) outputs; of the zeros needed, half before the image, the odd one after it."""
    network = make_network(agent)
    convs = [layer for layer in network.convolutions if isinstance(layer, torch.nn.Conv2d)]
    obs = torch.randint(0, 256, (2, *ALE), dtype=torch.uint8)
    x = obs.numpy() / 255
    for conv in convs:
        stride, kernel, size = conv.stride[0], conv.kernel_size[0], x.shape[-1]
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        x = np.pad(x, ((0, 0), (0, 0), (total // 2, total - total // 2), (total // 2, total - total // 2)))
        x = F.conv2d(torch.tensor(x, dtype=torch.float64), conv.weight.double(), conv.bias.double(), stride)
        x = x.clamp(min=0).detach().numpy()
    assert x.shape == (2, 64, 11, 11)
    np.testing.assert_allclose(network.convolutions(obs / 255).detach().numpy(), x.reshape(2, -1), atol=1e-5)


def test_pixels_are_scaled_and_booleans_are_not(agent):
    seen = []
    for shape, high in ((ALE, 255), (MINATAR, 1)):
        network = make_network(agent, shape)
        network.convolutions.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        network(torch.full((1, *shape), high, dtype=torch.uint8 if high == 255 else torch.bool))
    assert all(x.dtype == torch.float32 and (x == 1).all() for x in seen) and len(seen) == 2


def test_initialisation(agent):
    """Xavier uniform for dqn; uniform with variance 1 / (sqrt(3) fan_in) for qrdqn; biases zero; seeded."""
    network = make_network(agent, seed=5)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            area = layer.kernel_size[0] ** 2 if isinstance(layer, torch.nn.Conv2d) else 1
            fan_in, fan_out = layer.weight.shape[1] * area, layer.weight.shape[0] * area
            variance = 2 / (fan_in + fan_out) if agent.AGENT == "dqn" else 1 / (math.sqrt(3) * fan_in)
            assert layer.weight.var().item() == pytest.approx(variance, rel=0.08)
            limit = math.sqrt(3 * variance)
            assert 0.95 * limit < layer.weight.abs().max().item() <= limit
            assert not layer.bias.any()
    same, other = make_network(agent, seed=5), make_network(agent, seed=6)
    assert torch.equal(network.dense.weight, same.dense.weight)
    assert not torch.equal(network.dense.weight, other.dense.weight)
