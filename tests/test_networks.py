"""Networks: shapes and parameter counts computed by hand, the layers against their definitions, initialisation, noise.

The convolutions have the same text in every agent (test_one_name.py): dqn.py stands for all.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_network, name_of

ALE, MINATAR = (4, 84, 84), (10, 10, 4)


def convolution(inputs, outputs, size):
    return (inputs * size * size + 1) * outputs


def residual_stack(inputs, outputs):
    """One convolution and two blocks of two."""
    return convolution(inputs, outputs, 3) + 4 * convolution(outputs, outputs, 3)


NARROW = convolution(4, 32, 8) + convolution(32, 64, 4) + convolution(64, 64, 3)
WIDE = convolution(4, 128, 8) + convolution(128, 256, 4) + convolution(256, 256, 3)
IMPALA = residual_stack(4, 16) + residual_stack(16, 32) + residual_stack(32, 32)
CONVOLUTIONS = {  # parameters, sides of the images, length of the output
    "dopamine": (NARROW, [21, 11, 11], 11 * 11 * 64),
    "nature": (NARROW, [20, 9, 7], 7 * 7 * 64),
    "dopamine-x4": (WIDE, [21, 11, 11], 11 * 11 * 256),
    "impala": (IMPALA, [42, 21, 11], 11 * 11 * 32),
}


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def random_obs(shape, size=3):
    generator = torch.Generator().manual_seed(0)
    if shape == ALE:
        return torch.randint(0, 256, (size, *ALE), dtype=torch.uint8, generator=generator)
    return torch.rand(size, *shape, generator=generator) < 0.3


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_atari_convolutions(dqn, name):
    network = make_network(dqn, network=name)
    parameters, sides, length = CONVOLUTIONS[name]
    assert count(network.convolutions) == parameters
    assert count(network) == parameters + (length + 1) * 512 + (512 + 1) * 6
    x = random_obs(ALE)
    found = []
    for layer in network.convolutions:
        x = layer(x)
        if isinstance(layer, torch.nn.MaxPool2d if name == "impala" else torch.nn.Conv2d):
            found.append(x.shape[-1])
    assert found == sides
    assert x.shape == (3, length)


@pytest.mark.parametrize(("shape", "actions"), [(ALE, 6), (MINATAR, 3)])
def test_heads(agent, shape, actions):
    """What stands on top of the convolutions, on ALE of the nature network."""
    name = name_of(agent)
    network = make_network(agent, shape, actions, network="nature")
    side, channels, width = (7, 64, 512) if shape == ALE else (8, 16, 128)
    size = side * side * channels
    outputs = {"qrdqn": 200, "rainbow": 51, "der": 51, "spr": 51, "sr_spr": 51, "bbf": 51}.get(
        name, 1
    )  # of each action
    value = {"der": 51, "drq_eps": 1, "spr": 51, "sr_spr": 51, "bbf": 51}.get(name, 0)  # of a dueling head
    expected = (size + 1) * width + (width + 1) * (actions * outputs + value)
    if name == "iqn":
        expected += (64 + 1) * size  # the embedding
    if name in ("der", "spr"):
        expected *= 2  # each weight and bias has a sigma
    if name in ("spr", "sr_spr", "bbf"):
        expected += convolution(channels + actions, channels, 3) + convolution(channels, channels, 3)
        expected += (width + 1) * width  # the predictor
    assert count(network) == expected + (NARROW if shape == ALE else convolution(4, 16, 3))

    obs = random_obs(shape)
    assert network.q_values(obs).shape == (3, actions)
    if name == "iqn":
        assert network(obs, torch.rand(3, 7)).shape == (3, actions, 7)
    else:
        assert network(obs).shape == ((3, actions) if outputs == 1 else (3, actions, outputs))


def same_padding(size, kernel, stride):
    """Zeros before and after that SAME asks for: ceil(size / stride) outputs, the odd one after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def test_same_padding_against_its_definition(dqn):
    network = make_network(dqn, network="dopamine")
    obs = random_obs(ALE, 2)
    x = obs.double() / 255
    for conv in network.convolutions:
        if isinstance(conv, torch.nn.Conv2d):
            pad = same_padding(x.shape[-1], conv.kernel_size[0], conv.stride[0])
            x = F.conv2d(F.pad(x, (*pad, *pad)), conv.weight.double(), conv.bias.double(), conv.stride).clamp(min=0)
    assert x.shape[2:] == (11, 11)
    torch.testing.assert_close(network.convolutions(obs).double(), x.flatten(1), atol=1e-5, rtol=0)


def test_impala_against_its_definition(dqn):
    """Espeholt et al., 2018, figure 3: convolution, max-pool 3x3/2 (SAME padding), two residual blocks; then ReLU."""
    network = make_network(dqn, network="impala")
    convs = iter([module for module in network.modules() if isinstance(module, torch.nn.Conv2d)])

    def convolve(x):
        conv = next(convs)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), conv.weight.double(), conv.bias.double())

    obs = random_obs(ALE, 2)
    x = obs.double() / 255
    for _ in range(3):
        x = convolve(x)
        pad = same_padding(x.shape[-1], 3, 2)
        x = F.max_pool2d(F.pad(x, (*pad, *pad), value=-math.inf), 3, 2)
        for _ in range(2):
            x = x + convolve(convolve(x.clamp(min=0)).clamp(min=0))
    expected = x.clamp(min=0).flatten(1)
    torch.testing.assert_close(network.convolutions(obs).double(), expected, atol=1e-5, rtol=0)


def test_minatar_convolution_against_its_definition(dqn):
    """Young and Tian, 2019: 16 filters of 3 x 3, stride 1, no padding; the channels come last in an observation."""
    network = make_network(dqn, MINATAR)
    obs = random_obs(MINATAR)
    conv = network.convolutions[1]
    expected = np.zeros((3, 16, 8, 8))
    for y in range(8):
        for x in range(8):
            patch = obs[:, y : y + 3, x : x + 3].numpy().astype(float)
            expected[:, :, y, x] = np.einsum("bijc,ocij->bo", patch, conv.weight.detach().numpy())
    expected = np.maximum(expected + conv.bias.detach().numpy()[:, None, None], 0)
    np.testing.assert_allclose(network.convolutions(obs).detach().numpy(), expected.reshape(3, -1), atol=1e-5)


def test_pixels(dqn):
    """Bytes become shares of 255, booleans 0 and 1, channels first; what augmentation made stays."""
    obs = random_obs(ALE)
    np.testing.assert_allclose(dqn.Pixels()(obs).numpy(), obs.numpy() / 255, rtol=1e-6)
    obs = random_obs(MINATAR)
    np.testing.assert_array_equal(dqn.Pixels()(obs).numpy(), obs.numpy().transpose(0, 3, 1, 2).astype(np.float32))
    images = torch.rand(2, 4, 84, 84)
    assert torch.equal(dqn.Pixels()(images), images)


def test_initialisation(agent):
    """Xavier uniform, for rainbow, qrdqn and iqn uniform with variance 1 / (sqrt(3) fan_in); biases zero; seeded.

    Noisy layers have a test of their own.
    """
    network = make_network(agent, network="nature", seed=5)
    narrow = name_of(agent) in ("rainbow", "qrdqn", "iqn")
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) and not hasattr(layer, "sigma_weight"):
            area = layer.kernel_size[0] ** 2 if isinstance(layer, torch.nn.Conv2d) else 1
            fan_in = layer.weight.shape[1] * area
            fan_out = layer.weight.shape[0] * area
            variance = 1 / (math.sqrt(3) * fan_in) if narrow else 2 / (fan_in + fan_out)
            assert layer.weight.var().item() == pytest.approx(variance, rel=0.12 if fan_out == 1 else 0.08)
            limit = math.sqrt(3 * variance)
            assert 0.95 * limit < layer.weight.abs().max().item() <= limit * (1 + 1e-6)
            assert not layer.bias.any()
    same = make_network(agent, network="nature", seed=5)
    other = make_network(agent, network="nature", seed=6)
    assert torch.equal(network.dense[0].weight, same.dense[0].weight)
    assert not torch.equal(network.dense[0].weight, other.dense[0].weight)


def test_embedding_by_hand(iqn):
    """Q_tau = head(relu(dense(psi(x) * relu(embedding(cos(pi i tau)), i = 1..64)))), one state and tau at a time."""
    network = make_network(iqn, MINATAR, 3)
    obs = random_obs(MINATAR)
    tau = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    output = network(obs, tau)
    images = network.convolutions[0](obs).double()
    network.double()
    for b in range(3):
        psi = network.convolutions(images[b : b + 1])[0]
        for k in range(5):
            cosines = torch.tensor([math.cos(math.pi * i * tau[b, k].item()) for i in range(1, 65)]).double()
            weight, bias = network.embedding[0].weight, network.embedding[0].bias
            phi = (weight @ cosines + bias).clamp(min=0)
            hidden = (network.dense[0].weight @ (psi * phi) + network.dense[0].bias).clamp(min=0)
            expected = network.head.weight @ hidden + network.head.bias
            torch.testing.assert_close(output[b, :, k].double(), expected, atol=1e-5, rtol=0)


def test_iqn_acts_on_the_mean_over_fresh_tau(iqn):
    network = make_network(iqn, MINATAR, 3)
    seen = []
    forward = network.forward
    network.forward = lambda obs, tau: seen.append(tau) or forward(obs, tau)
    obs = random_obs(MINATAR)
    q_values = network.q_values(obs)
    network.q_values(obs)
    assert seen[0].shape == (3, 32)
    assert len(set(torch.cat(seen).ravel().tolist())) == 2 * 96
    assert ((seen[0] >= 0) & (seen[0] < 1)).all()
    torch.testing.assert_close(q_values, forward(obs, seen[0]).mean(dim=2))


def test_noisy_layer(rainbow):
    """w = mu + sigma * f(e_out) f(e_in)^T: rank-one noise, f(e) = sign(e) sqrt(|e|); in evaluation mu alone."""
    layer = rainbow.NoisyLinear(128, 153, 0.5)
    torch.nn.init.uniform_(layer.sigma_weight)
    torch.nn.init.uniform_(layer.sigma_bias)
    torch.manual_seed(3)
    rainbow.draw_noise(layer)
    torch.manual_seed(3)
    raw = torch.randn(128 + 153).double().numpy()
    e_in, e_out = np.split(np.sign(raw) * np.sqrt(np.abs(raw)), [128])
    parameters = (layer.weight, layer.sigma_weight, layer.bias, layer.sigma_bias)
    mu, sigma, bias_mu, bias_sigma = [parameter.detach().double().numpy() for parameter in parameters]
    x = np.random.default_rng(0).normal(size=(5, 128))
    expected = x @ (mu + sigma * np.outer(e_out, e_in)).T + bias_mu + bias_sigma * e_out
    np.testing.assert_allclose(layer(torch.tensor(x).float()).detach().numpy(), expected, atol=1e-4)
    layer.eval()
    np.testing.assert_allclose(layer(torch.tensor(x).float()).detach().numpy(), x @ mu.T + bias_mu, atol=1e-5)


@pytest.mark.parametrize(("name", "sigma_0"), [("rainbow", 0.1), ("der", 0.1), ("spr", 0.5)])
def test_noisy_layers_begin_as_the_protocol_says(name, sigma_0, request):
    """mu, weights and biases, uniform in +-1/sqrt(fan_in); sigma = sigma0 / sqrt(fan_in); every dense layer."""
    module = request.getfixturevalue(name)
    flags = {"noisy": True, "dueling": True} if name == "rainbow" else {}
    network = make_network(module, network="nature", **flags)
    for layer in (network.dense[0], network.head, network.value):
        assert isinstance(layer, module.NoisyLinear)
        limit = 1 / math.sqrt(layer.in_features)
        for mu in (layer.weight, layer.bias):
            assert mu.var().item() == pytest.approx(limit**2 / 3, rel=0.35 if mu is layer.bias else 0.08)
            assert 0.9 * limit < mu.abs().max().item() <= limit * (1 + 1e-6)
        for sigma in (layer.sigma_weight, layer.sigma_bias):
            np.testing.assert_allclose(sigma.detach().numpy(), sigma_0 * limit, rtol=1e-6)


def test_noise_is_drawn_for_acting_and_never_in_evaluation(rainbow, der, spr):
    obs = random_obs(MINATAR)
    for network in (make_network(rainbow, MINATAR, noisy=True), make_network(der, MINATAR), make_network(spr, MINATAR)):
        assert not torch.equal(network.q_values(obs), network.q_values(obs))
        network.eval()
        before = torch.get_rng_state()
        assert torch.equal(network.q_values(obs), network.q_values(obs))
        assert torch.equal(torch.get_rng_state(), before)
    quiet = make_network(rainbow, MINATAR)  # without --noisy nothing is drawn either
    before = torch.get_rng_state()
    assert torch.equal(quiet.q_values(obs), quiet.q_values(obs))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["rainbow", "rainbow without C51", "der", "drq_eps", "spr", "sr_spr", "bbf"])
def test_dueling_subtracts_the_mean_advantage(name, request):
    """Q(s, a) = V(s) + A(s, a) - mean over a of A(s, a), for every atom: Wang et al., 2016, eq. 9."""
    flags = {"dueling": True, "distributional": " " not in name} if "rainbow" in name else {}
    network = make_network(request.getfixturevalue(name.split(" ")[0]), MINATAR, 3, **flags)
    network.eval()
    obs = random_obs(MINATAR)
    features = network.dense(network.encode(obs) if hasattr(network, "encode") else network.convolutions(obs))
    atoms = 1 if name in ("rainbow without C51", "drq_eps") else 51
    output = network(obs).reshape(3, 3, atoms)
    value = features @ network.value.weight.T + network.value.bias
    advantage = (features @ network.head.weight.T + network.head.bias).reshape(3, 3, atoms)
    for b in range(3):
        for a in range(3):
            mean = (advantage[b, 0] + advantage[b, 1] + advantage[b, 2]) / 3
            torch.testing.assert_close(output[b, a], value[b] + advantage[b, a] - mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qrdqn", "rainbow", "der", "spr", "sr_spr", "bbf"])
def test_q_values_are_the_means_of_the_distributions(name, request):
    network = make_network(request.getfixturevalue(name), MINATAR, 3)
    network.eval()
    obs = random_obs(MINATAR)
    output = network(obs).detach().double().numpy()
    if name == "qrdqn":
        expected = output.mean(axis=2)
    else:
        shares = np.exp(output)
        shares /= shares.sum(axis=2, keepdims=True)
        expected = shares @ np.linspace(-10, 10, 51)
    np.testing.assert_allclose(network.q_values(obs).detach().numpy(), expected, atol=1e-5)
