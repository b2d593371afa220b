"""PQN and PPO, which learn from a roll-out of many games and throw it away: data, targets, losses and measures."""

import copy
import itertools
import math
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    check_same,
    contents,
    logged,
    make_args,
    make_network,
    name_of,
    scalars,
    stop_in_call,
    stopped,
    weights,
)
from torch import nn
from torch.distributions import Categorical

from analysis.runs import read_folder


# ---- games of different lengths, whose frames say which game and step they show
class Script(gym.vector.VectorEnv):
    """Game n has 2 to 6 steps; every third is truncated at its end, every second loses a life in its second step."""

    single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    single_action_space = gym.spaces.Discrete(3)

    def __init__(self, games):
        self.games = np.zeros(games, int)
        self.steps = np.zeros(games, int)
        self.played = []  # actions, (games,) a step

    def frames(self):
        rng = np.random.default_rng(0)
        obs = np.tile(rng.integers(256, size=(1, 4, 84, 84), dtype=np.uint8), (len(self.games), 1, 1, 1))
        obs[:, 0, 0, 0] = self.games
        obs[:, 0, 0, 1] = self.steps
        obs[:, :, 20:60, 20:60] = (37 * self.games + 11 * self.steps)[:, None, None, None] % 256
        return obs

    def reset(self, *, seed, options):
        which = options["reset_mask"]
        assert len(seed) == which.sum()
        self.games[which] = np.where(seed >= 0, seed - 1_000_003, self.games[which] + len(self.games))
        self.steps[which] = 0
        return self.frames(), {"lives": self.lives()}

    def lives(self):
        return 9 - self.games // 3 - ((self.games % 2 == 0) & (self.steps >= 2))  # a place's next game has fewer

    def step(self, actions):
        assert (self.steps < [length(game) for game in self.games]).all()  # none goes on after its end
        self.played.append(actions.copy())
        rewards = np.array([reward(game, step) for game, step in zip(self.games, self.steps, strict=True)])
        self.steps += 1
        over = self.steps == [length(game) for game in self.games]
        truncations = over & (self.games % 3 == 0)
        return self.frames(), rewards, over & ~truncations, truncations, {"lives": self.lives()}


def length(game):
    return 2 + game * 7 % 5


def reward(game, step):
    return int(np.random.default_rng([game, step]).integers(-2, 3))


def value_of(module, network, obs):
    """max_a Q, or V, of one observation."""
    with torch.no_grad():
        found = network(torch.from_numpy(obs))
    return float(found.max() if name_of(module) == "pqn" else found[1])


def rolled_out(module, monkeypatch, **flags):
    """Train on one roll-out of three scripted games; return what was learned from, by (game, step), and the network."""
    script = Script(3)
    monkeypatch.setattr(module, "make_env", lambda args, n=1: script)
    loss = "q_loss" if name_of(module) == "pqn" else "ppo_loss"
    real = getattr(module, loss)
    seen = {}

    def spied(network, *batch):
        if not seen:
            seen["network"] = copy.deepcopy(network)
            seen["batch"] = batch if name_of(module) == "pqn" else batch[0]
        return real(network, *batch)

    monkeypatch.setattr(module, loss, spied)
    args = make_args(module, env_id="ALE/Pong-v5", total_timesteps=36, num_steps=12, num_minibatches=1, **flags)
    module.train(args)
    rows = {}
    for fields in zip(*seen["batch"], strict=True):
        game, step = fields[0][0, 0, :2].tolist()
        rows[game, step] = fields
    return rows, seen["network"], script


def slow_targets(module, network, args, script):
    """{(game, step): Q(lambda) return or advantage}, game by game, backwards, in float64."""
    targets = {}
    for place in range(3):
        game, step = place, 0
        path = []  # of the place: (game, step)
        for _ in range(12):
            path.append((game, step))
            step += 1
            if step == length(game):
                game, step = game + 3, 0
        following = None
        for game, step in reversed(path):
            gain = float(np.clip(reward(game, step), -1, 1))
            script.games[:], script.steps[:] = game, step
            value = value_of(module, network, script.frames()[:1])
            script.steps[:] = step + 1
            next_value = value_of(module, network, script.frames()[:1])
            ended = step + 1 == length(game)
            died = (ended and game % 3 != 0) or (args.lost_life_ends_return and game % 2 == 0 and step == 1)
            cut = ended or died or following is None
            bootstrap = 0.0 if died else next_value
            if name_of(module) == "pqn":
                mixed = bootstrap if cut else args.q_lambda * following + (1 - args.q_lambda) * next_value
                following = gain + args.gamma * mixed
            else:
                delta = gain + args.gamma * bootstrap - value
                following = delta if cut else delta + args.gamma * args.gae_lambda * following
            targets[game, step] = following
    return targets


@pytest.mark.parametrize("lost_life_ends_return", [True, False])
def test_a_rollout_against_a_slow_loop(on_policy, monkeypatch, lost_life_ends_return):
    """Terminations, lives, truncations and the roll-out's end; and no step is an autoreset's, or missing."""
    rows, network, script = rolled_out(on_policy, monkeypatch, lost_life_ends_return=lost_life_ends_return)
    args = make_args(on_policy, lost_life_ends_return=lost_life_ends_return)
    actions = {}
    for place in range(3):
        game, step = place, 0
        for played in script.played:
            actions[game, step] = played[place]
            step += 1
            if step == length(game):
                game, step = game + 3, 0
    expected = slow_targets(on_policy, network, args, script)
    assert rows.keys() == expected.keys() == actions.keys()
    assert len(rows) == 36
    assert len({game for game, _ in rows}) > 8
    for key, fields in rows.items():
        fields = [float(field) for field in fields[1:]]
        assert fields[0] == actions[key]
        if name_of(on_policy) == "pqn":
            assert fields[1] == pytest.approx(expected[key], abs=1e-5)
            continue
        script.games[:], script.steps[:] = key
        with torch.no_grad():
            policy, values = network(torch.from_numpy(script.frames()[:1]))
        _, log_prob, value, advantage, returned = fields
        assert log_prob == pytest.approx(float(policy.probs[0, actions[key]].log()), abs=1e-5)
        assert value == pytest.approx(float(values), abs=1e-5)
        assert advantage == pytest.approx(expected[key], abs=1e-5)
        assert returned == pytest.approx(expected[key] + float(values), abs=1e-5)


def test_returns_of_whole_games_are_logged(on_policy, monkeypatch):
    """Raw, in the step in which they end, truncated ones too, and several in one step; the analysis reads them all."""
    rolled_out(on_policy, monkeypatch)
    (folder,) = on_policy.Path("runs").iterdir()
    expected = []
    for place in range(3):
        game, begins = place, 0
        while begins + length(game) <= 12:
            begins += length(game)
            expected.append((3 * begins, sum(reward(game, step) for step in range(length(game)))))
            game += 3
    assert sorted(scalars(folder)["charts/episodic_return"]) == sorted(expected)
    steps = [step for step, _ in expected]
    assert len(set(steps)) < len(steps)
    series = read_folder(folder, None).series["charts/episodic_return"]
    assert sorted(zip(series.steps.tolist(), series.values.tolist(), strict=True)) == sorted(expected)


# ---- targets
def random_rollout(seed, steps=9, games=4):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(steps, games, generator=generator)
    values = torch.randn(steps + 1, games, generator=generator)
    terminations = torch.rand(steps, games, generator=generator) < 0.3
    return rewards, values, terminations


@pytest.mark.parametrize(("seed", "q_lambda"), itertools.product(range(3), (0.0, 0.65, 1.0)))
def test_q_lambda_against_a_loop(pqn, seed, q_lambda):
    rewards, values, terminations = random_rollout(seed)
    targets = pqn.q_lambda_target(rewards, 0.9 * ~terminations, values, q_lambda)
    for game in range(4):
        following = float(values[9, game])
        for step in range(8, -1, -1):
            next_value = float(values[step + 1, game])
            following = 0.0 if terminations[step, game] else q_lambda * following + (1 - q_lambda) * next_value
            following = float(rewards[step, game]) + 0.9 * following
            assert float(targets[step, game]) == pytest.approx(following, abs=1e-5)


@pytest.mark.parametrize(("seed", "gae_lambda"), itertools.product(range(3), (0.0, 0.95, 1.0)))
def test_gae_is_the_sum_of_discounted_errors(ppo, seed, gae_lambda):
    """Schulman et al., 2016, eq. 16, as a sum over what follows in the game."""
    rewards, values, terminations = random_rollout(seed)
    advantages = ppo.gae(rewards, 0.9 * ~terminations, values, gae_lambda)
    for step, game in itertools.product(range(9), range(4)):
        total, weight = 0.0, 1.0
        for later in range(step, 9):
            bootstrap = 0.0 if terminations[later, game] else 0.9 * float(values[later + 1, game])
            total += weight * (float(rewards[later, game]) + bootstrap - float(values[later, game]))
            if terminations[later, game]:
                break
            weight *= 0.9 * gae_lambda
        assert float(advantages[step, game]) == pytest.approx(total, abs=1e-5)


# ---- losses
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "learns"),
    [
        (1.05, 2.0, -2.1, True),
        (1.05, -2.0, 2.1, True),
        (1.3, 2.0, -2.2, False),  # likely enough already
        (1.3, -2.0, 2.6, True),  # made likely by mistake
        (0.7, 2.0, -1.4, True),
        (0.7, -2.0, 1.8, False),
    ],
)
def test_the_policy_loss_is_clipped(ppo, ratio, advantage, loss, learns):
    ratios = torch.tensor([ratio], requires_grad=True)
    found = ppo.policy_loss(ratios, torch.tensor([advantage]), 0.1)
    assert found.item() == pytest.approx(loss, abs=1e-6)
    found.sum().backward()
    assert (ratios.grad.item() != 0) == learns


@pytest.mark.parametrize(
    ("value", "old", "returned", "loss"),
    [
        (1.05, 1.0, 2.0, 0.5 * 0.95**2),  # near the old value
        (1.5, 1.0, 2.0, 0.5 * 0.9**2),  # nearer to the return than it may go: as if held at 1.1
        (0.5, 1.0, 2.0, 0.5 * 1.5**2),  # away from it: the whole error
    ],
)
def test_the_value_loss_is_clipped(ppo, value, old, returned, loss):
    batch = ppo.Experience(*[torch.tensor([0.0])] * 3, torch.tensor([old]), None, torch.tensor([returned]))
    assert ppo.value_loss(torch.tensor([value]), batch, 0.1).item() == pytest.approx(loss, abs=1e-6)


class Fixed(nn.Module):
    """The same policy and values whatever is seen."""

    def __init__(self, logits, values):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.values = nn.Parameter(values)

    def forward(self, obs):
        return Categorical(logits=self.logits), self.values


def test_the_whole_loss_of_ppo(ppo):
    """Advantages are normalised among these rows; entropy and value have their weights."""
    rng = np.random.default_rng(0)
    logits, values, old_log_probs, advantages, returns = (rng.normal(size=size) for size in ((5, 3), 5, 5, 5, 5))
    old_values = values + rng.normal(size=5) / 10
    actions = rng.integers(3, size=5)
    expected = 0.0
    clipped = 0
    divergence = 0.0
    normal = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    for row in range(5):
        probabilities = np.exp(logits[row]) / np.exp(logits[row]).sum()
        ratio = probabilities[actions[row]] / np.exp(old_log_probs[row])
        clipped += abs(ratio - 1) > 0.2
        divergence += (ratio - 1 - np.log(ratio)) / 5
        surrogate = min(ratio * normal[row], min(max(ratio, 0.8), 1.2) * normal[row])
        entropy = -sum(p * np.log(p) for p in probabilities)
        held = old_values[row] + min(max(values[row] - old_values[row], -0.2), 0.2)
        error = max((values[row] - returns[row]) ** 2, (held - returns[row]) ** 2)
        expected += (-surrogate - 0.03 * entropy + 0.7 * error / 2) / 5
    fields = [torch.from_numpy(field) for field in (actions, old_log_probs, old_values, advantages, returns)]
    args = make_args(ppo, clip_coef=0.2, ent_coef=0.03, vf_coef=0.7)
    network = Fixed(torch.from_numpy(logits), torch.from_numpy(values))
    loss, terms = ppo.ppo_loss(network, ppo.Experience(None, *fields), args)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert terms["clipfrac"].item() == pytest.approx(clipped / 5)
    assert terms["approx_kl"].item() == pytest.approx(divergence, abs=1e-12)


def test_entropy_of_equal_logits(ppo):
    batch = ppo.Experience(None, torch.zeros(2, dtype=int), *[torch.tensor([0.0, 1.0])] * 4)
    _, terms = ppo.ppo_loss(Fixed(torch.zeros(2, 6), torch.zeros(2)), batch, make_args(ppo))
    assert terms["entropy"].item() == pytest.approx(math.log(6))


def test_the_loss_of_pqn_is_a_squared_error(pqn):
    network = make_network(pqn)
    obs = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    losses, q_values = pqn.q_loss(network, obs, torch.tensor([0, 5, 2]), torch.tensor([1.0, -1.0, 0.5]))
    for row, (action, target) in enumerate([(0, 1.0), (5, -1.0), (2, 0.5)]):
        q_value = network(obs)[row, action].item()
        assert q_values[row].item() == pytest.approx(q_value, abs=1e-6)
        assert losses[row].item() == pytest.approx((target - q_value) ** 2, abs=1e-5)


# ---- networks
@pytest.mark.parametrize(("obs_shape", "layers"), [((4, 84, 84), 4), ((10, 10, 4), 2)])
def test_a_layer_norm_stands_before_every_relu(pqn, obs_shape, layers):
    network = make_network(pqn, obs_shape)
    found = [*network.convolutions, *network.dense]
    relus = [place for place, layer in enumerate(found) if isinstance(layer, nn.ReLU)]
    assert len(relus) == layers
    for place in relus:
        assert isinstance(found[place - 1], nn.LayerNorm)
        assert isinstance(found[place - 2], nn.Conv2d | nn.Linear)
        assert found[place - 1].eps == 1e-5
    images = torch.rand(2, *obs_shape) < 0.3 if obs_shape[0] == 10 else torch.randint(256, (2, *obs_shape)).byte()
    convolved = network.convolutions[1](network.convolutions[0](images))
    normal = network.convolutions[2](convolved)  # over channels and places together: of each image on its own
    assert normal.flatten(1).mean(dim=1).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert normal.flatten(1).std(dim=1).tolist() == pytest.approx([1, 1], abs=1e-2)


def test_networks_have_the_published_size(pqn, ppo):
    """Nature's convolutions and 512 units; counted by hand."""
    torso = (4 * 64 + 1) * 32 + (32 * 16 + 1) * 64 + (64 * 9 + 1) * 64 + (3136 + 1) * 512
    norms = 2 * (32 * 20 * 20 + 64 * 9 * 9 + 64 * 7 * 7 + 512)
    sizes = [sum(parameter.numel() for parameter in make_network(module).parameters()) for module in (pqn, ppo)]
    assert sizes == [torso + norms + 513 * 6, torso + 513 * 7]
    separate = make_network(ppo, separate_networks=True)
    assert sum(parameter.numel() for parameter in separate.parameters()) == 2 * torso + 513 * 7
    assert not [layer for layer in make_network(ppo).modules() if isinstance(layer, nn.LayerNorm)]


@pytest.mark.parametrize("separate_networks", [False, True])
def test_weights_are_orthogonal_at_first(ppo, separate_networks):
    network = make_network(ppo, separate_networks=separate_networks)
    gains = {"head": 0.01, "value": 1.0}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            matrix = layer.weight.flatten(1).detach()
            matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            gain = gains.get(name, math.sqrt(2))
            torch.testing.assert_close(matrix @ matrix.T, gain**2 * torch.eye(len(matrix)), atol=1e-4, rtol=0)
            assert not layer.bias.any()


def test_separate_networks_share_nothing(ppo):
    network = make_network(ppo, separate_networks=True)
    obs = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    network(obs)[1].sum().backward()
    torso = [*network.convolutions.parameters(), *network.dense.parameters(), *network.head.parameters()]
    assert [parameter for parameter in torso if parameter.grad is not None] == []
    assert all(parameter.grad is not None for parameter in network.critic_torso.parameters())


def test_evaluation_draws_from_the_policy(ppo):
    """The largest of logits with Gumbel noise is each action with its probability."""
    network = make_network(ppo, obs_shape=(10, 10, 4), num_actions=3)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
        drawn = network.q_values(torch.zeros(30_000, 10, 10, 4, dtype=torch.bool)).argmax(dim=1)
    assert (drawn.bincount() / 30_000).tolist() == pytest.approx([0.2, 0.5, 0.3], abs=0.01)


def test_exploration_is_epsilon_in_every_game(pqn):
    q_values = torch.zeros(50_000, 4)
    q_values[:, 2] = 1.0
    shares = np.bincount(pqn.epsilon_greedy(q_values, 0.4, np.random.default_rng(0))) / 50_000
    assert shares.tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1], abs=0.01)
    assert (pqn.epsilon_greedy(q_values, 0.0, np.random.default_rng(0)) == 2).all()


def test_epsilon_falls_over_a_share_of_the_run(pqn, monkeypatch):
    """By the number of steps after the one that is taken."""
    seen = []
    real = pqn.epsilon_greedy
    monkeypatch.setattr(pqn, "epsilon_greedy", lambda q, epsilon, rng: seen.append(epsilon) or real(q, epsilon, rng))
    pqn.train(make_args(pqn, total_timesteps=96, exploration_fraction=0.5, end_e=0.1))
    assert seen == pytest.approx([1 - 0.9 * min(step / 48, 1) for step in range(3, 97, 3)])


# ---- optimizers
def test_optimizers_and_the_annealed_step_size(on_policy, monkeypatch):
    kind, eps = {"pqn": (torch.optim.RAdam, 1e-8), "ppo": (torch.optim.Adam, 1e-5)}[name_of(on_policy)]
    steps = []
    real = kind.step

    def spied(self, *args):
        steps.append((self.param_groups[0]["lr"], self.param_groups[0]["eps"]))
        return real(self, *args)

    monkeypatch.setattr(kind, "step", spied)
    on_policy.train(make_args(on_policy, total_timesteps=100))  # four roll-outs of 24 steps, and four steps too many
    assert steps == [pytest.approx((2.5e-4 * (1 - i / 4), eps)) for i in range(4) for _ in range(4)]
    steps.clear()
    on_policy.train(make_args(on_policy, anneal_lr=False))
    assert {rate for rate, _ in steps} == {2.5e-4}


@pytest.mark.parametrize("most", [0.01, 1e6])
def test_gradients_are_clipped(on_policy, monkeypatch, most):
    norms = []
    kind = torch.optim.RAdam if name_of(on_policy) == "pqn" else torch.optim.Adam
    real = kind.step

    def spied(self, *args):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        norms.append(nn.utils.get_total_norm(gradients).item())
        return real(self, *args)

    monkeypatch.setattr(kind, "step", spied)
    on_policy.train(make_args(on_policy, max_grad_norm=most))
    if most == 0.01:
        assert norms == [pytest.approx(0.01, rel=1e-3)] * 16
    else:
        assert min(norms) > 0.01


def test_epochs_end_once_the_policy_has_moved_far(ppo, monkeypatch):
    counted = []
    real = ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *args: counted.append(1) or real(*args))
    ppo.train(make_args(ppo, update_epochs=5, learning_rate=0.1, target_kl=1e-9))
    assert 4 * 2 <= len(counted) < 4 * 5 * 2


def test_every_row_is_learned_from_once_an_epoch(on_policy, monkeypatch):
    rows = []
    real = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **flags: rows.append(real(*args, **flags)) or rows[-1])
    loss = "q_loss" if name_of(on_policy) == "pqn" else "ppo_loss"
    real_loss = getattr(on_policy, loss)
    sizes = []

    def spied(network, *batch):
        obs = batch[0] if loss == "q_loss" else batch[0].obs
        sizes.append(len(obs))
        return real_loss(network, *batch)

    monkeypatch.setattr(on_policy, loss, spied)
    on_policy.train(make_args(on_policy, num_minibatches=3))
    assert sizes == [8] * 4 * 2 * 3
    assert len(rows) == 8
    assert all(sorted(order.tolist()) == list(range(24)) for order in rows)
    assert len({tuple(order.tolist()) for order in rows}) == 8


# ---- runs
@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_run_of_every_game_count(on_policy, num_envs):
    folder = on_policy.train(make_args(on_policy, num_envs=num_envs, eval_episodes=1, save_model=True))
    found = scalars(folder)
    assert [step for step, _ in found["losses/" + ("td_loss" if name_of(on_policy) == "pqn" else "policy_loss")]] == [
        8 * num_envs * iteration for iteration in range(1, 96 // (8 * num_envs) + 1)
    ]
    assert [step for step, _ in found["eval/episodic_return"]] == [96]
    assert (folder / "finished").exists()
    assert read_folder(folder, None).finished


def test_the_same_seed_is_the_same_run(on_policy):
    runs = [on_policy.train(make_args(on_policy, seed=seed, save_model=True)) for seed in (3, 3, 4)]
    one, same, other = [weights(run) for run in runs]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_gradients_must_have_a_norm(on_policy, refused):
    assert "--max-grad-norm is 0" in refused(make_args, on_policy, max_grad_norm=0.0)


def test_minibatches_must_divide_the_rollout(on_policy, refused):
    error = refused(make_args, on_policy, num_minibatches=5)
    assert "--num-minibatches is 5" in error
    if name_of(on_policy) == "ppo":  # whose advantages have no deviation then
        assert "--num-minibatches is 24" in refused(make_args, on_policy, num_minibatches=24)
    error = refused(make_args, on_policy, total_timesteps=23)
    assert "--total-timesteps is 23" in error


def test_a_run_that_rollouts_do_not_divide_is_finished(on_policy):
    """What is left over is not played, and the analysis knows."""
    folder = on_policy.train(make_args(on_policy, total_timesteps=100))
    found = read_folder(folder, None)
    assert found.last_step == 96
    assert found.finished


# ---- measures
def test_rank_of_a_matrix_of_rank_3(on_policy):
    generator = torch.Generator().manual_seed(0)
    orthogonal = nn.init.orthogonal_(torch.empty(40, 3), generator=generator)
    other = nn.init.orthogonal_(torch.empty(20, 3), generator=generator)
    features = orthogonal @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ other.T
    values = torch.linalg.svdvals(features)
    assert on_policy.rank(values**2) == on_policy.rank(values) == 3
    values = torch.tensor([100.0, 10.0, 2.0])
    assert on_policy.rank(values**2) == 2  # 98.97%, and 99.96% of the squares
    assert on_policy.rank(values) == 3  # 89.3%, 98.2%, and all of the values
    assert on_policy.rank(torch.zeros(5)) == 1


def test_rank_against_a_loop(on_policy):
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = np.sort(rng.exponential(size=12) ** 3)[::-1].copy()
        total, count = 0.0, 0
        while total <= 0.99 * sum(values):
            total += values[count]
            count += 1
        assert on_policy.rank(torch.from_numpy(values)) == count


def test_kurtosis_of_a_normal_sample_and_of_two_heaps(on_policy):
    normal = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).exp()
    assert on_policy.kurtosis(normal).item() == pytest.approx(3, abs=0.05)
    assert on_policy.kurtosis(torch.tensor([1.0, -1.0, 10.0, -10.0, 0.0])).item() == pytest.approx(1)
    gradient = [0.5, -0.001, 3.0, 0.0, 0.02]
    logs = [math.log(abs(g)) for g in gradient if g]
    mean = sum(logs) / 4
    fourth = sum((x - mean) ** 4 for x in logs) / 4
    second = sum((x - mean) ** 2 for x in logs) / 4
    assert on_policy.kurtosis(torch.tensor(gradient)).item() == pytest.approx(fourth / second**2, rel=1e-5)


def test_effective_sample_size(ppo):
    assert ppo.effective_sample_size(torch.full((50,), 0.7)).item() == pytest.approx(1)
    assert ppo.effective_sample_size(torch.tensor([0.0, -1000.0])).item() == pytest.approx(0.5)
    log_ratios = np.random.default_rng(0).normal(size=20)
    ratios = np.exp(log_ratios)
    shares = ratios / ratios.sum()
    assert ppo.effective_sample_size(torch.from_numpy(log_ratios)).item() == pytest.approx(1 / (shares**2).sum() / 20)


def test_the_report_against_slow_loops(on_policy):
    network = make_network(on_policy, obs_shape=(10, 10, 4), num_actions=3)
    with torch.no_grad():
        network.convolutions[1].bias[:3] = -100  # three channels that are dormant without LayerNorm
    obs = torch.rand(60, 10, 10, 4, generator=torch.Generator().manual_seed(0)) < 0.3
    old_policy = torch.eye(3)[torch.arange(60) % 3]
    policy = torch.eye(3)[torch.arange(60) % 2]

    def loss_of(output):
        output = output if torch.is_tensor(output) else torch.cat([output[0].logits, output[1][:, None]], dim=1)
        return output.square().mean()

    report = on_policy.diagnose_rollout(network, obs, old_policy, policy, loss_of(network(obs)))

    layers = [*network.convolutions, *network.dense]
    seen, dormant, units = obs, 0, 0
    with torch.no_grad():
        for layer in layers:
            seen = layer(seen)
            if isinstance(layer, nn.ReLU):
                means = [float(seen[:, unit].abs().mean()) for unit in range(seen.shape[1])]
                dormant += sum(mean <= 0.025 * sum(means) / len(means) for mean in means)
                units += len(means)
    assert float(report["diagnostics/dormant_neurons"]) == pytest.approx(dormant / units)
    if name_of(on_policy) == "ppo":
        assert dormant >= 3
    values = np.linalg.svd(seen.numpy(), compute_uv=False)
    assert int(report["diagnostics/feature_rank"]) == 1 + (np.cumsum(values**2) <= 0.99 * (values**2).sum()).sum()
    assert int(report["diagnostics/srank"]) == 1 + (np.cumsum(values) <= 0.99 * values.sum()).sum()

    squares = 0.0
    for name, parameter in network.named_parameters():
        if name.endswith("weight") and not isinstance(network.get_submodule(name[:-7]), nn.LayerNorm):
            squares += float(parameter.detach().double().square().sum())
    assert float(report["diagnostics/weight_norm"]) == pytest.approx(math.sqrt(squares), rel=1e-5)

    changed = [row % 3 != row % 2 for row in range(60)]
    assert float(report["diagnostics/churn"]) == pytest.approx(sum(changed) / 60)
    assert float(report["diagnostics/policy_variance"]) == pytest.approx((0.25 + 0.25 + 0) / 3)
    network.zero_grad()
    loss_of(network(obs)).backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert float(report["diagnostics/zero_gradients"]) == pytest.approx(float((gradient == 0).float().mean()))
    assert float(report["diagnostics/gradient_kurtosis"]) == pytest.approx(float(on_policy.kurtosis(gradient)))


def test_measures_are_logged_when_due_and_do_not_disturb_the_run(on_policy):
    flags = {"save_model": True, "total_timesteps": 144}
    plain = on_policy.train(make_args(on_policy, **flags))
    measured = on_policy.train(make_args(on_policy, **flags, diagnostics_frequency=50, save_features=True))
    one, other = weights(plain), weights(measured)
    assert all(torch.equal(one[name], other[name]) for name in one)
    found = scalars(measured)
    names = {"feature_rank", "srank", "dormant_neurons", "weight_norm", "gradient_kurtosis", "zero_gradients"}
    names |= {"policy_variance", "churn"}
    if name_of(on_policy) == "ppo":
        names.add("effective_sample_size")
    assert {tag.removeprefix("diagnostics/") for tag in found if tag.startswith("diagnostics/")} == names
    for name in names:
        assert [step for step, _ in found[f"diagnostics/{name}"]] == [72, 120]  # the first roll-outs past 50 and 100
        assert all(math.isfinite(value) for _, value in found[f"diagnostics/{name}"])
    assert sorted(path.name for path in (measured / "features").iterdir()) == ["120.npz", "72.npz"]
    saved = np.load(measured / "features" / "72.npz")
    assert saved["obs"].shape == (24, 10, 10, 4)
    assert saved["features"].shape == (24, 128)


def test_measures_have_as_many_rows_whatever_the_rollout(on_policy, monkeypatch):
    rows = []
    real = on_policy.diagnose_rollout
    monkeypatch.setattr(on_policy, "diagnose_rollout", lambda *args: rows.append(args[1]) or real(*args))
    flags = {"num_envs": 4, "num_steps": 300, "total_timesteps": 2_400, "update_epochs": 1}
    folder = on_policy.train(make_args(on_policy, **flags, diagnostics_frequency=1_200, save_features=True))
    assert [len(obs) for obs in rows] == [1_024, 1_024]
    assert not torch.equal(rows[0], rows[1])
    assert len(np.load(folder / "features" / "1200.npz")["obs"]) == 200


def test_the_measures_of_ppo_are_of_before_and_after_a_rollout(ppo, monkeypatch):
    """Ratios of the policy after the epochs to the one that played; churn between the same two."""
    seen = []
    real = ppo.diagnose_rollout
    monkeypatch.setattr(ppo, "diagnose_rollout", lambda *args: seen.append(args) or real(*args))
    folder = ppo.train(make_args(ppo, diagnostics_frequency=24, total_timesteps=24, learning_rate=0.01))
    ((_, _, old_policy, policy, _),) = seen
    assert not torch.equal(old_policy, policy)
    size = scalars(folder)["diagnostics/effective_sample_size"][0][1]
    assert 0 < size < 1


# ---- games
@pytest.mark.parametrize(
    "env_id, longest", [("ALE/Breakout-v5", 50), ("ALE/Breakout-v5", 27_000), ("MinAtar/Asterix-v1", 50)]
)
def test_games_are_played_again_from_their_actions(pqn, env_id, longest):
    """Sticky actions, lost lives, games that are cut off, some of them seeded; no place depends on the others'."""
    steps = 210 if longest == 50 else 700
    args = make_args(pqn, env_id=env_id, num_envs=3, sticky_actions=0.25, max_episode_steps=longest, seed=5)
    games, again = pqn.Games(args), pqn.Games(args)
    games.seeded_for = again.seeded_for = 120 if longest == 50 else 220
    rng = np.random.default_rng(0)
    actions = rng.integers(3, size=(steps + 10, 3))
    ended = sum([len(games.step(chosen)[-1]) for chosen in actions[:steps]])
    assert ended > sum(games.numbers // 3) >= 3  # some games were seeded, not all
    state = copy.deepcopy(games.state_dict())
    again.load_state_dict(state)
    assert len({len(played) for played in again.actions}) > 1 or (env_id.startswith("ALE") and longest == 50)
    for chosen in actions[steps:]:
        assert np.array_equal(games.obs, again.obs)
        assert games.returns.tolist() == again.returns.tolist()
        assert games.lengths.tolist() == again.lengths.tolist()
        left, right = games.step(chosen), again.step(chosen)
        assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
    assert games.numbers.tolist() == again.numbers.tolist()
    assert games.actions == again.actions


def test_an_emulator_is_seeded_now_and_then_alone(pqn, monkeypatch):
    """It loads its cartridge again, which takes many times as long as a reset."""
    games = pqn.Games(make_args(pqn, env_id="ALE/Pong-v5", num_envs=2, max_episode_steps=10))
    games.seeded_for = 25
    seeds = []
    real = games.envs.reset
    monkeypatch.setattr(
        games.envs, "reset", lambda *, seed, options: seeds.append(seed) or real(seed=seed, options=options)
    )
    for _ in range(60):
        games.step(np.array([2, 3]))
    assert [seed.tolist() == [-1, -1] for seed in seeds] == [True, True, False, True, True, False]
    assert len({*seeds[2], *seeds[5]}) == 4  # none twice


def test_a_lost_life_ends_the_return_and_the_game_goes_on(pqn):
    args = make_args(pqn, env_id="ALE/Breakout-v5", num_envs=2)
    games = pqn.Games(args)
    lost = np.zeros(2, int)
    rng = np.random.default_rng(1)
    lengths = []
    while len(lengths) < 4:
        _, _, terminations, truncations, scores = games.step(rng.integers(4, size=2))
        lost += terminations
        assert not truncations.any()
        lengths += [length for _, length in scores]
    assert lost.sum() >= 4 * 5  # five lives a game
    assert min(lengths) > 100


def test_an_observation_is_not_written_over(pqn):
    """Those of the step before are still read while the next is played."""
    games = pqn.Games(make_args(pqn, env_id="ALE/Pong-v5", num_envs=2))
    first = games.obs
    kept = first.copy()
    for _ in range(3):
        games.step(np.array([2, 3]))
    assert np.array_equal(first, kept)


# ---- stopped and resumed
RESUMED = {
    "MinAtar": {"env_id": "MinAtar/Asterix-v1", "num_envs": 3, "total_timesteps": 250},
    "ALE": {"env_id": "ALE/Breakout-v5", "num_envs": 2, "total_timesteps": 96, "sticky_actions": 0.25},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_stopped_and_resumed(on_policy, kind):
    """In the middle of roll-outs, which are played to their end, and of games of different ages."""
    flags = RESUMED[kind] | {"diagnostics_frequency": 40, "eval_frequency": 60, "eval_episodes": 1}
    flags["max_episode_steps"] = 20
    whole = on_policy.train(make_args(on_policy, **flags)).absolute()
    folder = stopped(on_policy, make_args(on_policy, **flags), stop_in_call, on_policy.Games, "step", 3)
    batch_steps = 8 * flags["num_envs"]
    assert contents(folder)["/global_step"] == batch_steps
    again = 8 + 12  # steps: those of the first roll-out, and into the third
    stopped(on_policy, make_args(on_policy, resume=str(folder), **flags), stop_in_call, on_policy.Games, "step", again)
    assert contents(folder)["/global_step"] == 3 * batch_steps
    on_policy.train(make_args(on_policy, resume=str(folder), **flags))
    check_same(whole, folder)


def test_an_evaluation_is_made_anew(on_policy):
    """The one in the middle, which no checkpoint falls due beside, and the last."""
    flags = {"eval_episodes": 2, "eval_frequency": 40}
    whole = on_policy.train(make_args(on_policy, **flags)).absolute()
    folder = stopped(on_policy, make_args(on_policy, **flags), stop_in_call, on_policy, "reset", 2)
    assert contents(folder)["/global_step"] == 48
    stopped(on_policy, make_args(on_policy, resume=str(folder), **flags), stop_in_call, on_policy, "reset", 4)
    assert contents(folder)["/global_step"] == 96
    assert [step for step, _ in logged(folder)["eval/episodic_return"]] == [48]
    on_policy.train(make_args(on_policy, resume=str(folder), **flags))
    check_same(whole, folder)


def test_separate_networks_are_resumed(ppo):
    flags = {"separate_networks": True, "diagnostics_frequency": 24}
    whole = ppo.train(make_args(ppo, **flags)).absolute()
    folder = stopped(ppo, make_args(ppo, **flags), stop_in_call, ppo.Games, "step", 9)
    ppo.train(make_args(ppo, resume=str(folder), **flags))
    check_same(whole, folder)


def test_checkpoints_are_written_when_due(on_policy, monkeypatch):
    """At the first roll-outs that reach or pass 40 and 80 steps, and at the end."""
    steps = []
    real = on_policy.save
    monkeypatch.setattr(on_policy, "save", lambda path, state: steps.append(state["global_step"]) or real(path, state))
    on_policy.train(make_args(on_policy, checkpoint_frequency=40, total_timesteps=120))
    assert steps == [48, 96, 120]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run(on_policy, refused, monkeypatch, what):
    if what == "loss":
        monkeypatch.setattr(on_policy.np, "clip", lambda rewards, low, high: rewards + math.nan)
    else:
        monkeypatch.setattr(on_policy.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    error = refused(on_policy.train, make_args(on_policy), may_write=True)
    assert "the loss is not finite at step 24" in error
    assert not list(on_policy.Path("runs").glob("*/checkpoint.pt"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "MinAtar/Breakout-v1"])
def test_training_on_cuda(on_policy, env_id):
    flags = {"env_id": env_id, "cuda": True, "total_timesteps": 960, "max_episode_steps": 40, "eval_episodes": 1}
    flags |= {"diagnostics_frequency": 96, "save_features": True}
    folder = stopped(on_policy, make_args(on_policy, **flags), stop_in_call, on_policy.Games, "step", 100)
    on_policy.train(make_args(on_policy, resume=str(folder), **flags))
    found = scalars(folder)
    assert len(found["diagnostics/feature_rank"]) == 10
    assert all(np.isfinite([value for _, value in found[tag]]).all() for tag in found)


# ---- learning
@pytest.mark.long
def test_a_file_alone_in_an_empty_folder(on_policy, tmp_path):
    """As a copy of it would be, on a real game, without this project on the path."""
    path = ROOT / "agents" / f"{name_of(on_policy)}.py"
    shutil.copy(path, tmp_path)
    command = [sys.executable, "-I", path.name, "--env-id", "ALE/Pong-v5", "--total-timesteps", "256", "--no-cuda"]
    command += ["--num-envs", "2", "--num-steps", "64", "--eval-episodes", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("100% 256/256 [")
    assert list(tmp_path.glob("runs/*/finished"))


@pytest.mark.long
def test_it_learns(on_policy):
    """200,000 steps of MinAtar Breakout; random play scores 0.38."""
    args = on_policy.Args(env_id="MinAtar/Breakout-v1", cuda=False, total_timesteps=200_000, num_envs=32, num_steps=32)
    returns = [value for _, value in scalars(on_policy.train(args))["charts/episodic_return"]]
    assert np.mean(returns[-100:]) > 2.0
