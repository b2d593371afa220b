"""The agents of the Atari 100k benchmark: lost lives, augmented images, SPR's sequences and its loss."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_args, make_network, scalars
from test_replay import Script

BREAKOUT = {"env_id": "ALE/Breakout-v5", "network": "nature", "diagnostics_frequency": 0}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_defaults_are_the_benchmarks(efficient):
    args = efficient.Args()
    assert (args.total_timesteps, args.eval_episodes, args.noop_max, args.sticky_actions) == (100_000, 100, 30, 0.0)
    assert (args.n_step, args.batch_size, args.gamma, args.train_frequency) == (10, 32, 0.99, 1)
    assert (args.learning_rate, args.adam_eps, args.eval_epsilon) == (1e-4, 1.5e-4, 0.001)
    assert args.learning_starts == (2_000 if efficient.AGENT == "spr" else 1_600)
    assert args.target_network_frequency == (2_000 if efficient.AGENT == "der" else 1)
    assert args.prioritized == (efficient.AGENT != "drq_eps")
    epsilon = {"der": (0, 0), "drq_eps": (1, 0.01, 5_000), "spr": (1, 0, 2_001)}[efficient.AGENT]
    assert (args.start_e, args.end_e, args.exploration_steps)[: len(epsilon)] == epsilon
    assert getattr(args, "noisy_sigma", None) == {"der": 0.1, "spr": 0.5}.get(efficient.AGENT)
    assert getattr(args, "updates_per_step", None) == {"spr": 2}.get(efficient.AGENT)
    assert args.buffer_size == 1_000_000  # or the whole of a shorter run, see below
    if efficient.AGENT != "der":
        assert (args.image_pad, args.intensity) == (4, 0.05)
    if efficient.AGENT != "drq_eps":
        assert (args.n_atoms, args.v_min, args.v_max) == (51, -10, 10)
    if efficient.AGENT == "spr":
        assert (args.spr_steps, args.spr_weight) == (5, 5.0)


def test_the_replay_is_as_large_as_the_run(agent):
    """And no larger: nothing of a short run is overwritten, though a truncation takes a row of its own."""
    args = make_args(agent, total_timesteps=600, buffer_size=10**6, max_episode_steps=50)
    envs = agent.make_env(args)
    replay = agent.FrameReplay(envs.single_observation_space, 3, args, "cpu", np.random.default_rng(0))
    assert 600 < replay.buffer_size < 650
    obs = np.zeros((1, *envs.single_observation_space.shape), bool)
    for step in range(1, 601):
        ended = np.array([step % 50 == 0])
        replay.add(obs, obs, np.zeros(1, int), np.zeros(1), ~ended & ended, ended)
    assert not replay.full and np.count_nonzero(replay.priorities) == 600 - 12 * (args.n_step - 1)


def test_a_lost_life_is_a_terminal_and_not_a_reset(efficient, monkeypatch):
    """Breakout on the real emulator, two games of random play: five terminals and one logged return in each."""
    stored, acted, rewarded = [], [], []
    add, act, step = efficient.FrameReplay.add, efficient.act, efficient.LifeStack.step

    def record(self, obs, next_obs, actions, rewards, terminations, truncations):
        add(self, obs, next_obs, actions, rewards, terminations, truncations)
        stored.append((self, obs.copy(), next_obs.copy(), bool(terminations[0]), bool(truncations[0])))

    def watch(self, actions):
        found = step(self, actions)
        rewarded.append((float(found[1][0]), int(found[4]["lives"][0]), bool(found[2][0])))
        return found

    monkeypatch.setattr(efficient.FrameReplay, "add", record)
    monkeypatch.setattr(efficient.LifeStack, "step", watch)
    monkeypatch.setattr(efficient, "act", lambda *a: acted.append(a[1].copy()) or act(*a))
    flags = {"start_e": 1.0, "end_e": 1.0, "learning_starts": 10_000, "total_timesteps": 700}
    folder = efficient.train(make_args(efficient, **BREAKOUT, **flags, noop_max=30))
    overs = [i for i, (_, _, over) in enumerate(rewarded) if over]
    assert len(overs) >= 2
    lives = [left for _, left, _ in rewarded[: overs[0] + 1]]
    assert lives == sorted(lives, reverse=True) and set(lives) == {0, 1, 2, 3, 4, 5}  # 5 -> 4 without a reset
    terminals = [i for i, (_, _, _, terminated, _) in enumerate(stored) if terminated]
    assert len([i for i in terminals if i <= overs[0]]) == 5
    assert len([i for i in terminals if overs[0] < i <= overs[1]]) == 5
    assert terminals[4] == overs[0] and not any(truncated for *_, truncated in stored)
    # the stack starts from zeros after each of them, when acting and in the replay alike
    replay = stored[0][0]
    sampled = replay._get_stacks(np.arange(700), replay.age[:700])
    for i in range(700):
        np.testing.assert_array_equal(acted[i], stored[i][1])
        np.testing.assert_array_equal(sampled[i], acted[i][0])
        since = i - max([j + 1 for j in terminals if j < i], default=0)  # steps since the life's first
        for back in range(4):
            assert acted[i][0, 3 - back].any() == (back <= since)
        if i in terminals and i not in overs:  # the game goes on: the next frame is the emulator's, not a first one
            np.testing.assert_array_equal(acted[i + 1][0, 3], stored[i][2][0, 3])
    logged = scalars(folder)["charts/episodic_return"]
    first = sum(reward for reward, _, _ in rewarded[: overs[0] + 1])
    second = sum(reward for reward, _, _ in rewarded[overs[0] + 1 : overs[1] + 1])
    assert logged[:2] == [(overs[0] + 1, first), (overs[1] + 1, second)]


def test_a_life_stack_is_the_emulators_own_within_a_life(der):
    args = make_args(der, **BREAKOUT)
    ours, theirs = der.make_life_env(args), der.make_env(args)
    assert isinstance(ours, der.LifeStack) and not isinstance(theirs, der.LifeStack)
    assert ours.single_observation_space == theirs.single_observation_space
    obs, expected, rng, since, lost = (
        der.reset(ours, 1, 0, 3),
        der.reset(theirs, 1, 0, 3),
        np.random.default_rng(0),
        9,
        0,
    )
    for _ in range(400):
        blank = np.arange(4) < 3 - since
        np.testing.assert_array_equal(obs[0], np.where(blank[:, None, None], 0, expected[0]))
        action = rng.integers(4, size=1)
        obs, *mine, infos = ours.step(action)
        expected, *others, _ = theirs.step(action)
        assert mine == others
        lost += infos["life_lost"][0]
        since = 0 if infos["life_lost"][0] else since + 1
        if mine[1][0]:
            break
    assert lost == 5


def test_lives_can_be_left_alone(efficient):
    for flags in ({"terminal_on_life_loss": False}, {"env_id": "MinAtar/Breakout-v1"}):
        assert not isinstance(efficient.make_life_env(make_args(efficient, **BREAKOUT | flags)), efficient.LifeStack)


def test_evaluation_stacks_as_training_does(efficient, monkeypatch):
    """And plays a full game: its return is counted past the lost lives."""
    seen, lives, total = [], [], []
    step = efficient.LifeStack.step

    def watch(self, actions):
        found = step(self, actions)
        seen.append(found[0].copy())
        lives.append(int(found[4]["lives"][0]))
        total.append(float(found[1][0]))
        return found

    monkeypatch.setattr(efficient.LifeStack, "step", watch)
    args = make_args(efficient, **BREAKOUT, eval_episodes=1, eval_epsilon=1.0)
    network = make_network(efficient, num_actions=4, network="nature")
    returns = efficient.evaluate(efficient.make_life_env(args), network, args, "cpu", 1, None)
    assert lives[0] == 5 and lives[-1] == 0 and returns.tolist() == [sum(total)]
    blank = [i for i, obs in enumerate(seen) if not obs[0, :3].any()]
    assert blank == [i for i in range(1, len(lives)) if lives[i] < lives[i - 1]] and len(blank) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_training_on_cuda_with_frames(efficient):
    """The lives, the bytes and the augmentation of ALE's frames; tests/test_training.py has MinAtar."""
    flags = {**BREAKOUT, "cuda": True, "total_timesteps": 1_000, "eval_episodes": 1}
    folder = efficient.train(make_args(efficient, **flags))
    assert np.isfinite([value for _, value in scalars(folder)["losses/td_loss"]]).all()


def test_double_q_picks_with_the_online_network(der, drq_eps, spr):
    """Online prefers action 0, target action 1: the target is 1 + 0.5 * the target network's value of action 0."""

    class Fixed(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values, self.support = torch.tensor(values), torch.linspace(-2.0, 2.0, 3)

        def forward(self, obs):
            return self.values

        def mean(self, output):
            return output.softmax(dim=-1) @ self.support

    floats = [torch.tensor([x]) for x in (1.0, 0.5, 1.0)]
    batch = der.Batch(None, torch.tensor([0]), None, *floats, np.zeros(1))
    online, target = Fixed([[9.0, 0.0]]), Fixed([[2.0, 4.0]])
    assert drq_eps.double_target(online, target, batch).tolist() == [2.0]
    sure = 200.0 * torch.eye(3)  # logits of a certain return: -2, 0, 2
    online, target = Fixed([[[0.0] * 3] * 2]), Fixed([[[0.0] * 3] * 2])
    online.values, target.values = torch.stack([sure[2], sure[0]])[None], torch.stack([sure[0], sure[2]])[None]
    for agent in (der, spr):  # 1 + 0.5 * -2 = 0, the atom in the middle
        assert agent.c51_target(online, target, batch).tolist() == [[0, 1, 0]]


class Dice:
    """A generator whose shifts and Gaussians are given."""

    def __init__(self, shifts, gaussians):
        self.shifts, self.gaussians = np.array(shifts), np.array(gaussians, np.float32)

    def integers(self, low, high, size):
        assert (low, high) == (-4, 5) and size == (2, *self.shifts.shape[1:], 1)  # nine places, as offsets 0 to 8
        return self.shifts[..., None]

    def standard_normal(self, count, dtype):
        return self.gaussians


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_augmentation_by_hand(drq_eps, dtype):
    """Pad 4 by the edge, cut out at an offset, scale: each image its own, all its frames alike."""
    obs = torch.from_numpy(np.random.default_rng(0).integers(256, size=(5, 4, 84, 84), dtype=np.uint8))
    obs = obs if dtype == torch.uint8 else obs > 127
    shifts, gaussians = [[0, 4, -4, 1, -3], [0, -4, 4, 2, 3]], [0.0, 1.0, -1.5, 7.0, -7.0]
    found = drq_eps.augment(obs, 4, 0.05, Dice(shifts, gaussians)).numpy()
    assert found.dtype == np.float32
    for i, factor in enumerate([1.0, 1.05, 0.925, 1.1, 0.9]):  # clipped at two standard deviations
        for frame in range(4):
            padded = np.pad(obs[i, frame].numpy(), 4, mode="edge")
            y, x = 4 + shifts[0][i], 4 + shifts[1][i]
            expected = padded[y : y + 84, x : x + 84] / (255 if dtype == torch.uint8 else 1) * factor
            np.testing.assert_allclose(found[i, frame], expected, atol=1e-6)


def test_shifts_and_intensities_are_spread_as_they_should(drq_eps, spr):
    """Uniform over the 81 shifts; factors with the spread of a Gaussian clipped at two standard deviations."""
    obs = torch.zeros(20_000, 1, 9, 9, dtype=torch.uint8)
    obs[:, 0, 4, 4] = 255
    for module in (drq_eps, spr):
        found = module.augment(obs, 4, 0.05, np.random.default_rng(0)).numpy()
        places, factors = found.reshape(20_000, 81).argmax(axis=1), found.max(axis=(1, 2, 3))
        counts = np.bincount(places, minlength=81)
        assert np.abs(counts - 20_000 / 81).max() < 5 * np.sqrt(20_000 / 81)
        assert factors.min() == pytest.approx(0.9) and factors.max() == pytest.approx(1.1)
        assert factors.std() == pytest.approx(
            0.05 * np.clip(np.random.default_rng(1).normal(size=10**6), -2, 2).std(), 0.03
        )
    same = drq_eps.augment(obs[:5].repeat(1, 3, 1, 1), 0, 0.0, np.random.default_rng(0))
    np.testing.assert_array_equal(same.numpy(), obs[:5].repeat(1, 3, 1, 1).numpy() / 255)  # switched off


@pytest.mark.parametrize("name", ["drq_eps", "spr"])
def test_every_image_of_a_batch_has_its_own_shift(name, request, monkeypatch):
    """States, next states and the states of a sequence: the network sees each set augmented by draws of its own."""
    module, calls = request.getfixturevalue(name), []
    augment = module.augment

    def record(obs, pad, intensity, rng):
        state = copy.deepcopy(rng.bit_generator.state)
        found = augment(obs, pad, intensity, rng)
        calls.append((obs, found, state["state"]["state"], (pad, intensity)))
        return found

    used = {"obs": [], "next_obs": [], "states": []}

    def watch(function, **places):  # note the images that a function is given, found in its arguments
        original = getattr(module, function)

        def watched(*args):
            for kind, find in places.items():
                used[kind].append(find(args).data_ptr())
            return original(*args)

        monkeypatch.setattr(module, function, watched)

    if name == "drq_eps":
        watch("huber_loss", obs=lambda args: args[1].obs)
        watch("double_target", next_obs=lambda args: args[2].next_obs)
    else:
        watch("latent_loss", obs=lambda args: args[2].obs)
        watch("c51_target", next_obs=lambda args: args[2].next_obs)
        watch("prediction_loss", states=lambda args: args[3])
    seen = []
    forward = torch.nn.Sequential.forward
    monkeypatch.setattr(module, "augment", record)
    monkeypatch.setattr(torch.nn.Sequential, "forward", lambda self, x: seen.append(x) or forward(self, x))
    flags = {"total_timesteps": 108, "image_pad": 2, "intensity": 0.1, "diagnostics_frequency": 0}
    module.train(make_args(module, **flags))
    each = 2 if name == "drq_eps" else 3
    updates = 2 * (1 if name == "drq_eps" else 2)  # two steps that learn
    assert len(calls) == each * updates
    assert len({state for _, _, state, _ in calls}) == len(calls)  # no two sets share their dice
    assert all(settings == (2, 0.1) for *_, settings in calls)
    assert [len(obs) for obs, *_ in calls] == ([8, 8] if each == 2 else [8, 8, 16]) * updates
    fed = {x.data_ptr() for x in seen}
    assert all(found.data_ptr() in fed for _, found, *_ in calls)  # what was augmented is what the network saw
    for number, kind in enumerate(["obs", "next_obs", "states"][:each]):
        assert used[kind] == [found.data_ptr() for _, found, *_ in calls[number::each]]
    raw = {obs.data_ptr() for obs, *_ in calls}
    assert not raw & {x.data_ptr() for x in seen}


def test_der_and_spr_draw_noise_for_each_pass(der, spr, monkeypatch, tmp_path):
    """Target and double-Q choice share a draw, the loss has its own, every action a fresh one; evaluation has none."""
    for module in (der, spr):
        monkeypatch.chdir(tmp_path)
        seen, forward = [], module.NoisyLinear.forward

        def record(self, x, seen=seen, forward=forward):
            seen.append((id(self), self.training, x.shape[0], tuple(self.noise[:4].tolist())))
            return forward(self, x)

        monkeypatch.setattr(module.NoisyLinear, "forward", record)
        flags = {"start_e": 0.0, "end_e": 0.0, "train_frequency": 1, "eval_episodes": 1, "diagnostics_frequency": 0}
        module.train(make_args(module, total_timesteps=110, **flags))
        monkeypatch.undo()
        acting = [noise for _, training, rows, noise in seen if training and rows == 1]
        assert len(set(acting)) == len(acting) == 3 * 110  # three noisy layers, a draw for each action
        learning = [(layer, noise) for layer, training, rows, noise in seen if training and rows == 8]
        updates = 10 if module is der else 20
        assert len(learning) == updates * 3 * 3  # updates, passes, layers
        draws = []
        for i in range(0, len(learning), 9):
            choice, target, loss = learning[i : i + 3], learning[i + 3 : i + 6], learning[i + 6 : i + 9]
            assert [noise for _, noise in target] == [noise for _, noise in choice]  # shared by two networks
            assert {layer for layer, _ in choice} == {layer for layer, _ in loss} != {layer for layer, _ in target}
            draws += [noise for _, noise in choice + loss]
        assert len(set(draws)) == len(draws)  # every update's, and the loss's, are new
        assert any(not training for _, training, _, _ in seen)  # evaluation: without noise
        assert not any(training for _, training, rows, _ in seen[-20:] if rows == 1)


def test_two_updates_are_two_batches_before_one_new_target(spr, monkeypatch):
    """The second update's target is one update old: the target is copied once a step, after both."""
    events = []
    sample, load, step = spr.FrameReplay.sample, torch.nn.Module.load_state_dict, torch.optim.Adam.step

    def record(self, size):
        batch = sample(self, size)
        events.append(("sample", tuple(batch.rows)))
        return batch

    monkeypatch.setattr(spr.FrameReplay, "sample", record)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: events.append(("update",)) or step(self))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *a: events.append(("copy",)) or load(*a))
    spr.train(make_args(spr, total_timesteps=130, train_frequency=1, target_network_frequency=1))
    assert [event[0] for event in events] == ["sample", "update", "sample", "update", "copy"] * 30
    rows = [event[1] for event in events if event[0] == "sample"]
    assert len(set(rows)) == 60


ENDS = ["terminal", "truncation", "terminal", "both", "truncation", "terminal", "terminal"]


@pytest.mark.parametrize("capacity", [500, 61], ids=["not full", "full many times"])
def test_sequences_come_from_one_episode(spr, capacity):
    """s_{t+k} and a_{t+k-1} for k = 1..5, against the script; zeros and a mask of 0 past the episode's end."""
    lengths = [7, 12, 1, 2, 1, 3, 30]
    script = Script(lengths * 4, ENDS * 4)
    args = spr.Args(total_timesteps=2**31, buffer_size=capacity, n_step=6, gamma=0.9)
    space = gym.spaces.Box(0, 255, (4, 4, 5), np.uint8)
    replay = spr.SequenceReplay(space, 6, args, "cpu", np.random.default_rng(3))
    ended = set()

    def after_each(e, t):
        if not replay.priorities.any():
            return
        batch = replay.sample(8)
        states, actions, masks = replay.futures(batch.rows, 5)
        assert states.shape == (8, 5, 4, 4, 5) and actions.shape == masks.shape == (8, 5)
        for i in range(8):
            episode, start = script.decode(batch.obs[i].numpy())
            terminates = script.ends[episode] != "truncation"
            for k in range(1, 6):
                alive = not (terminates and start + k >= script.lengths[episode])
                assert masks[i, k - 1].item() == alive
                if alive:
                    np.testing.assert_array_equal(states[i, k - 1].numpy(), script.obs(episode, start + k, 4))
                    assert actions[i, k - 1].item() == script.actions[episode, start + k - 1]
                else:
                    assert not states[i, k - 1].any()
                    ended.add(k)

    script.play(replay, 4, after_each)
    assert ended == {1, 2, 3, 4, 5}


def slow_renormalised(x):
    """To [0, 1]; the 1e-5 keeps a row that is constant from dividing by zero."""
    return (x - x.min()) / (x.max() - x.min() + 1e-5)


def test_spr_loss_against_a_loop(spr):
    """One transition and one step ahead at a time, in float64, from the definition."""
    network, frozen = [make_network(spr, (4, 10, 10), 3, seed=seed) for seed in (1, 2)]
    slow, slow_frozen = copy.deepcopy(network).double(), copy.deepcopy(frozen).double()
    generator = torch.Generator().manual_seed(0)
    obs, states = torch.rand(6, 4, 10, 10, generator=generator), torch.rand(6, 5, 4, 10, 10, generator=generator)
    actions = torch.randint(0, 3, (6, 5), generator=generator)
    masks = (torch.arange(5) < torch.tensor([5, 4, 3, 1, 0, 5])[:, None]).float()
    spr.draw_noise(np.random.default_rng(0), network, frozen)  # which must have no part in this
    losses = spr.prediction_loss(network, frozen, network.encode(obs), states, actions, masks)
    for b in range(6):
        z, total = slow_renormalised(slow.convolutions(obs[b : b + 1].double())[0]), 0.0
        for k in range(5):
            planes = torch.zeros(3, 8, 8, dtype=torch.float64)
            planes[actions[b, k]] = 1
            x = torch.cat([z.reshape(16, 8, 8), planes])[None]
            for layer in (slow.transition[0], slow.transition[2]):
                x = F.conv2d(F.pad(x, (1, 1, 1, 1)), layer.weight, layer.bias).clamp(min=0)
            z = slow_renormalised(x.flatten())
            y = slow.dense[0].weight @ z + slow.dense[0].bias
            y = slow.predictor.weight @ y + slow.predictor.bias
            future = slow_renormalised(slow_frozen.convolutions(states[b, k : k + 1].double())[0])
            target = slow_frozen.dense[0].weight @ future + slow_frozen.dense[0].bias
            difference = y / y.norm() - target / target.norm()
            total += masks[b, k].item() * (difference**2).sum().item()
        assert losses[b].item() == pytest.approx(total / 5, rel=1e-4, abs=1e-6)
    assert losses[4].item() == 0 and losses[0].item() > 0


def test_spr_loss_is_two_minus_two_cosines(spr):
    """On latents that were given, whatever the networks make of them: 0 for the same direction, 4 for the opposite."""

    class Given:
        def __init__(self, projections):
            self.projections = torch.tensor(projections)

        advance = staticmethod(lambda latents, actions: latents)
        projection = predictor = staticmethod(lambda x: x)

        def encode(self, states):
            return self.projections

    latents = torch.tensor([[3.0, 4.0]])
    actions, states = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, 1)
    frozen = Given([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0], [5.0, 0.0]])
    for k, distance in enumerate([0.0, 4.0, 2.0, 2 - 2 * 0.6]):
        masks = torch.eye(4)[k : k + 1]
        loss = spr.prediction_loss(Given([]), frozen, latents, states, actions, masks)
        assert loss.tolist() == [pytest.approx(distance / 4, abs=1e-6)]  # divided by K, whatever is masked


def test_spr_learns_on_the_online_side_only(spr):
    """No gradient reaches the target network, whose predictor and transition model have no part in the loss."""
    network, frozen = [make_network(spr, (4, 10, 10), 3, seed=seed) for seed in (1, 2)]
    obs, states = torch.rand(2, 4, 10, 10), torch.rand(2, 5, 4, 10, 10)
    actions, masks = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5)
    loss = spr.prediction_loss(network, frozen, network.encode(obs), states, actions, masks)
    loss.sum().backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    learning = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert learning == {
        *(f"convolutions.0.{x}" for x in ("weight", "bias")),
        *(f"dense.0.{x}" for x in ("weight", "bias")),  # without their sigmas
        *(f"transition.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")),
        *(f"predictor.{x}" for x in ("weight", "bias")),
    }
    for module in (frozen.predictor, frozen.transition[0], frozen.head):
        torch.nn.init.zeros_(module.weight)
    again = spr.prediction_loss(network, frozen, network.encode(obs), states, actions, masks)
    assert torch.equal(loss, again)


@pytest.mark.parametrize(
    ("shape", "network", "grid"),
    [
        ((4, 10, 10), "dopamine", (16, 8, 8)),
        ((4, 84, 84), "dopamine", (64, 11, 11)),
        ((4, 84, 84), "nature", (64, 7, 7)),
        ((4, 84, 84), "dopamine-x4", (256, 11, 11)),
        ((4, 84, 84), "impala", (32, 11, 11)),
    ],
)
def test_the_transition_model_keeps_the_latents_shape(spr, shape, network, grid):
    module = make_network(spr, shape, 6, network=network)
    latents = module.encode(torch.randint(0, 256, (3, *shape), dtype=torch.uint8))
    assert latents.shape == (3, math.prod(grid)) and module.grid == grid
    assert latents.amin(dim=1).tolist() == [0] * 3 and latents.amax(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-3)
    channels = grid[0]
    first, second = module.transition[0], module.transition[2]
    assert (first.in_channels, first.out_channels, first.kernel_size) == (channels + 6, channels, (3, 3))
    assert (second.in_channels, second.out_channels, second.kernel_size) == (channels, channels, (3, 3))
    after = module.advance(latents, torch.tensor([0, 1, 5]))
    assert after.shape == latents.shape
    assert after.amin(dim=1).tolist() == [0] * 3 and after.amax(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-2)
    assert not torch.equal(after[:1], module.advance(latents[:1], torch.tensor([1])))  # the action matters
    width = 128 if shape[1] == 10 else 512
    assert module.projection(after).shape == module.predictor(module.projection(after)).shape == (3, width)
