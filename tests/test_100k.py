"""The agents of the Atari 100k benchmark: lost lives, augmented images, SPR's sequences and its loss."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_args, make_network, name_of, scalars
from test_diagnostics import Log
from test_replay import ENDINGS, LENGTHS, Script, make_replay, reload

BREAKOUT = {"env_id": "ALE/Breakout-v5", "network": "nature", "diagnostics_frequency": 0, "noop_max": 30}
ALE, MINATAR = (4, 84, 84), (10, 10, 4)


COMMON = {
    "total_timesteps": 100_000,
    "eval_episodes": 100,
    "eval_epsilon": 0.001,
    "noop_max": 30,
    "sticky_actions": 0.0,
    "terminal_on_life_loss": True,
    "buffer_size": 1_000_000,  # or the whole of a shorter run
    "n_step": 10,
    "batch_size": 32,
    "gamma": 0.99,
    "learning_rate": 1e-4,
    "adam_eps": 1.5e-4,
    "network": "dopamine",
}
C51 = {"n_atoms": 51, "v_min": -10, "v_max": 10}
PIXELS = {"image_pad": 4, "intensity": 0.05}
SPR = {"updates_per_step": 2, "spr_steps": 5, "spr_weight": 5, "noisy_sigma": 0.5}
AVERAGE = {"spr_steps": 5, "spr_weight": 5, "tau": 0.005, "buffer_size": 200_000, "keep_moments": False}
AVERAGE |= {"reset_interval": 40_000}  # updates
SR_SPR = {"replay_ratio": 8, "shrink": 0.8, "perturb": 0.2}
BBF = {"replay_ratio": 2, "shrink": 0.5, "perturb": 0.5, "weight_decay": 0.1, "width_scale": 4, "network": "impala"}
BBF |= {"initial_n_step": 10, "n_step": 3, "initial_gamma": 0.97, "gamma": 0.997, "schedule_updates": 10_000}
OWN = {  # learning starts, target network frequency; epsilon: start, end, steps
    "der": (1_600, 2_000, (0, 0, 250_000), C51 | {"noisy_sigma": 0.1}),
    "drq_eps": (1_600, 1, (1, 0.01, 5_000), PIXELS),
    "spr": (2_000, 1, (1, 0, 2_001), C51 | PIXELS | SPR),
    "sr_spr": (2_000, None, (1, 0, 2_001), C51 | PIXELS | AVERAGE | SR_SPR),
    "bbf": (2_000, None, (1, 0, 2_001), C51 | PIXELS | AVERAGE | BBF | {"prioritized": True}),
}


def test_defaults_are_the_benchmarks(efficient):
    args = efficient.Args()
    starts, frequency, epsilon, others = OWN[name_of(efficient)]
    assert args.learning_starts == starts
    assert getattr(args, "target_network_frequency", None) == frequency
    assert getattr(args, "train_frequency", 1) == 1  # or --replay-ratio, at every step
    assert (args.start_e, args.end_e, args.exploration_steps) == epsilon
    expected = COMMON | others
    assert {flag: getattr(args, flag) for flag in expected} == expected
    assert hasattr(efficient, "PrioritizedReplay") == (name_of(efficient) != "drq_eps")


def test_a_lost_life_is_a_terminal_and_not_a_reset(efficient, monkeypatch):
    """Breakout on the real emulator, two games of random play: five terminals and one logged return in each."""
    stored, acted, rewarded = [], [], []
    add, act, step = efficient.FrameReplay.add, efficient.act, efficient.LifeStack.step

    def record(self, obs, next_obs, actions, rewards, terminations, truncations):
        add(self, obs, next_obs, actions, rewards, terminations, truncations)
        stored.append((self, obs.copy(), next_obs.copy(), bool(terminations[0]), bool(truncations[0])))

    def watch_step(self, actions):
        found = step(self, actions)
        rewarded.append((float(found[1][0]), int(found[4]["lives"][0]), bool(found[2][0])))
        return found

    def watch_act(q_network, obs, *others):
        acted.append(obs.copy())
        return act(q_network, obs, *others)

    monkeypatch.setattr(efficient.FrameReplay, "add", record)
    monkeypatch.setattr(efficient.LifeStack, "step", watch_step)
    monkeypatch.setattr(efficient, "act", watch_act)
    flags = {"start_e": 1.0, "end_e": 1.0, "learning_starts": 10_000, "total_timesteps": 600}
    folder = efficient.train(make_args(efficient, **BREAKOUT, **flags))
    overs = [i for i, (_, _, over) in enumerate(rewarded) if over]
    assert len(overs) >= 2
    lives = [left for _, left, _ in rewarded[: overs[0] + 1]]
    assert lives == sorted(lives, reverse=True)  # 5 -> 4 without a reset
    assert set(lives) == {0, 1, 2, 3, 4, 5}
    terminals = [i for i, (_, _, _, terminated, _) in enumerate(stored) if terminated]
    assert len([i for i in terminals if i <= overs[0]]) == 5
    assert len([i for i in terminals if overs[0] < i <= overs[1]]) == 5
    assert terminals[4] == overs[0]
    assert not any(truncated for *_, truncated in stored)

    # the stack starts from zeros after each of them, when acting and in the replay alike
    replay = stored[0][0]
    sampled = replay.stacks(np.arange(600), replay.ages[:600])
    for i in range(600):
        np.testing.assert_array_equal(acted[i], stored[i][1])
        np.testing.assert_array_equal(sampled[i], acted[i][0])
        assert acted[i][0, 2].any() == (i > 0 and i - 1 not in terminals)
        if i in terminals and i not in overs:  # the game goes on: the next frame is the emulator's, not a first one
            np.testing.assert_array_equal(acted[i + 1][0, 3], stored[i][2][0, 3])
    logged = scalars(folder)["charts/episodic_return"]
    first = sum(reward for reward, _, _ in rewarded[: overs[0] + 1])
    second = sum(reward for reward, _, _ in rewarded[overs[0] + 1 : overs[1] + 1])
    assert logged[:2] == [(overs[0] + 1, first), (overs[1] + 1, second)]


def test_a_life_stack_is_the_emulators_own_within_a_life(der):
    args = make_args(der, **BREAKOUT)
    ours, theirs = der.make_life_env(args), der.make_env(args)
    assert isinstance(ours, der.LifeStack)
    assert not isinstance(theirs, der.LifeStack)
    assert ours.single_observation_space == theirs.single_observation_space
    rng = np.random.default_rng(0)
    for game in (3, 4):
        obs = der.reset(ours, 1, 0, game)
        expected = der.reset(theirs, 1, 0, game)
        since, lost = 0, 0
        done = False
        while not done:
            blank = np.arange(4) < 3 - since
            np.testing.assert_array_equal(obs[0], np.where(blank[:, None, None], 0, expected[0]))
            action = rng.integers(4, size=1)
            obs, *mine, infos = ours.step(action)
            expected, *others, _ = theirs.step(action)
            assert mine == others
            lost += infos["life_lost"][0]
            since = 0 if infos["life_lost"][0] else since + 1
            done = mine[1][0]
        assert lost == 5


def test_lives_can_be_left_alone(der):
    for flags in ({"terminal_on_life_loss": False}, {"env_id": "MinAtar/Breakout-v1"}):
        assert not isinstance(der.make_life_env(make_args(der, **BREAKOUT | flags)), der.LifeStack)


def test_evaluation_stacks_as_training_does(efficient, monkeypatch):
    """And plays a full game: its return is counted past the lost lives. This is what `train` evaluates with."""
    made = []
    make_life_env = efficient.make_life_env
    monkeypatch.setattr(efficient, "make_life_env", lambda args: made.append(make_life_env(args)) or made[-1])
    efficient.train(make_args(efficient, **BREAKOUT, total_timesteps=1))
    training, evaluation = made
    assert isinstance(evaluation, efficient.LifeStack)
    assert training is not evaluation
    monkeypatch.undo()

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
    log = Log()
    efficient.evaluate(args, evaluation, network, 5, torch.device("cpu"), None, log)
    assert log.scalars == {("eval/episodic_return", 5): sum(total)}
    assert lives[0] == 5
    assert lives[-1] == 0
    blank = [i for i, obs in enumerate(seen) if not obs[0, :3].any()]
    assert blank == [i for i in range(1, len(lives)) if lives[i] < lives[i - 1]]
    assert len(blank) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_training_on_cuda_with_frames(efficient):
    """The lives, the bytes and the augmentation of ALE's frames; tests/test_training.py has MinAtar."""
    flags = {**BREAKOUT, "cuda": True, "total_timesteps": 1_000, "eval_episodes": 1}
    folder = efficient.train(make_args(efficient, **flags))
    assert np.isfinite([value for _, value in scalars(folder)["losses/td_loss"]]).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_augmentation_by_hand(drq_eps, dtype, monkeypatch):
    """Pad 4 by the edge, cut out at an offset, scale: each image its own, all its frames alike.

    The function is the same in spr.py. MinAtar's channels come last and leave first.
    """
    shifts = torch.tensor([[0, 4, -4, 1, -3], [0, -4, 4, 2, 3]])
    gaussians = torch.tensor([0.0, 1.0, -1.5, 7.0, -7.0])
    factors = [1.0, 1.05, 0.925, 1.1, 0.9]  # clipped at two standard deviations

    def randint(low, high, size, device):
        assert (low, high) == (-4, 5)  # nine ages
        return shifts.reshape(size)

    monkeypatch.setattr(torch, "randint", randint)
    monkeypatch.setattr(torch, "randn", lambda *size, device: gaussians.reshape(size))
    images = np.random.default_rng(0).integers(256, size=(5, 4, 20, 20), dtype=np.uint8)
    scale = 255
    obs = torch.from_numpy(images)
    if dtype == torch.bool:
        images = images > 127
        scale = 1
        obs = torch.from_numpy(images.transpose(0, 2, 3, 1))
    found = drq_eps.augment(obs, 4, 0.05).numpy()
    assert found.dtype == np.float32
    assert found.shape == images.shape
    for i in range(5):
        for frame in range(4):
            padded = np.pad(images[i, frame], 4, mode="edge")
            y, x = 4 + shifts[0, i], 4 + shifts[1, i]
            expected = padded[y : y + 20, x : x + 20] / scale * factors[i]
            np.testing.assert_allclose(found[i, frame], expected, atol=1e-6)


def test_shifts_and_intensities_are_spread_as_they_should(drq_eps):
    """Uniform over the 81 shifts; factors with the spread of a Gaussian clipped at two standard deviations."""
    obs = torch.zeros(20_000, 1, 9, 9, dtype=torch.uint8)
    obs[:, 0, 4, 4] = 255
    torch.manual_seed(0)
    found = drq_eps.augment(obs, 4, 0.05).numpy()
    ages = found.reshape(20_000, 81).argmax(axis=1)
    counts = np.bincount(ages, minlength=81)
    assert np.abs(counts - 20_000 / 81).max() < 5 * np.sqrt(20_000 / 81)
    factors = found.max(axis=(1, 2, 3))
    assert factors.min() == pytest.approx(0.9)
    assert factors.max() == pytest.approx(1.1)
    gaussians = np.random.default_rng(1).normal(size=10**6)
    assert factors.std() == pytest.approx(0.05 * np.clip(gaussians, -2, 2).std(), 0.03)
    same = drq_eps.augment(obs[:5].repeat(1, 3, 1, 1), 0, 0.0)
    np.testing.assert_array_equal(same.numpy(), obs[:5].repeat(1, 3, 1, 1).numpy() / 255)  # switched off


@pytest.mark.parametrize("name", ["drq_eps", "spr"])
def test_every_set_of_images_has_its_own_shifts(name, request, monkeypatch):
    """States, next states and a sequence's states: the networks see each set as it was augmented, by its own draws."""
    module = request.getfixturevalue(name)
    augmented, settings, dice, seen = [], [], [], []
    augment, pixels = module.augment, module.Pixels.forward

    def record(obs, *flags):
        dice.append(tuple(torch.get_rng_state().tolist()))
        settings.append(flags)
        augmented.append(augment(obs, *flags))
        return augmented[-1]

    def watch(self, obs):
        seen.append(obs)
        return pixels(self, obs)

    monkeypatch.setattr(module, "augment", record)
    monkeypatch.setattr(module.Pixels, "forward", watch)
    flags = {"total_timesteps": 108, "image_pad": 2, "intensity": 0.1, "diagnostics_frequency": 0, "n_step": 3}
    module.train(make_args(module, **flags))
    sets = 2 if name == "drq_eps" else 3
    updates = 2 if name == "drq_eps" else 4  # in two steps that learn
    assert len(augmented) == sets * updates
    assert len(set(dice)) == len(dice)
    assert set(settings) == {(2, 0.1)}
    expected = []
    for update in range(updates):
        obs, next_obs, *states = augmented[update * sets : update * sets + sets]
        expected += [next_obs, next_obs, obs, *states]  # double Q by two networks, the loss, what is to be predicted
    batches = [obs for obs in seen if len(obs) > 1]  # acting sees the bytes
    assert [id(obs) for obs in batches] == [id(obs) for obs in expected]


@pytest.mark.parametrize("name", ["rainbow", "der", "spr"])
def test_noise_is_drawn_for_each_pass(name, request, monkeypatch):
    """Target and double-Q choice share a draw, the loss has its own, every action a fresh one; evaluation has none."""
    module = request.getfixturevalue(name)
    seen = []
    forward = module.NoisyLinear.forward

    def record(self, x):
        seen.append((id(self), self.training, x.shape[0], tuple(self.noise[:4].tolist())))
        return forward(self, x)

    monkeypatch.setattr(module.NoisyLinear, "forward", record)
    flags = {"start_e": 0.0, "end_e": 0.0, "train_frequency": 1, "eval_episodes": 1, "diagnostics_frequency": 0}
    if name == "rainbow":
        flags |= {"noisy": True, "dueling": True, "double": True}
    module.train(make_args(module, total_timesteps=110, **flags))
    acting = [noise for _, training, rows, noise in seen if training and rows == 1]
    assert len(set(acting)) == len(acting) == 3 * 110  # three noisy layers, a draw for each action
    learning = [(layer, noise) for layer, training, rows, noise in seen if training and rows == 8]
    updates = 20 if name == "spr" else 10
    assert len(learning) == updates * 3 * 3  # updates, passes, layers
    draws = []
    for i in range(0, len(learning), 9):
        passes = learning[i : i + 3], learning[i + 3 : i + 6], learning[i + 6 : i + 9]
        choice, target, loss = passes
        if name == "rainbow":
            target, choice, loss = passes
        assert [noise for _, noise in target] == [noise for _, noise in choice]  # shared by two networks
        assert {layer for layer, _ in choice} == {layer for layer, _ in loss} != {layer for layer, _ in target}
        draws += [noise for _, noise in choice + loss]
    assert len(set(draws)) == len(draws)  # every update's, and the loss's, are new
    assert any(not training for _, training, _, _ in seen)  # evaluation: without noise
    assert not any(training for _, training, rows, _ in seen[-20:] if rows == 1)


def test_two_updates_are_two_batches_before_one_new_target(spr, monkeypatch):
    """The second update's target is one update old: the target is copied once a step, after both."""
    events = []
    sample, load, step = spr.SequenceReplay.sample, torch.nn.Module.load_state_dict, torch.optim.Adam.step

    def record(self, size, *schedule):
        batch = sample(self, size, *schedule)
        events.append(("sample", tuple(batch.rows)))
        return batch

    monkeypatch.setattr(spr.SequenceReplay, "sample", record)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: events.append(("update",)) or step(self))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *a: events.append(("copy",)) or load(*a))
    spr.train(make_args(spr, total_timesteps=110, train_frequency=1, target_network_frequency=1))
    assert [event[0] for event in events] == ["sample", "update", "sample", "update", "copy"] * 10
    rows = [event[1] for event in events if event[0] == "sample"]
    assert len(set(rows)) == 20


@pytest.mark.parametrize("stack", [4, 1])
@pytest.mark.parametrize("capacity", [500, 61], ids=["not full", "full many times"])
def test_sequences_come_from_one_episode(spr, capacity, stack):
    """s_{t+k} and a_{t+k-1} for k = 1..5, against the script; zeros and a mask of 0 past the episode's end."""
    script = Script(LENGTHS * 3, ENDINGS * 3, stack)
    replay = make_replay(spr, "SequenceReplay", capacity, 6, stack)
    ended = set()
    for count, (_, step) in enumerate(script.steps()):
        replay.add(*step)
        if count % 20 == 0:
            replay = reload(replay, make_replay(spr, "SequenceReplay", capacity, 6, stack))
        if not replay.ready.any():
            continue
        batch = replay.sample(8, 6, 0.99)
        states, actions, masks = replay.futures(batch.rows, 5)
        assert states.shape == (8 * 5, *script.blank.shape)
        assert actions.shape == masks.shape == (8, 5)
        for i in range(8):
            episode, start = script.decode(batch.obs[i].numpy())
            for k in range(1, 6):
                state = states[5 * i + k - 1].numpy()
                alive = not (script.terminates(episode) and start + k >= script.lengths[episode])
                assert masks[i, k - 1].item() == alive
                if alive:
                    np.testing.assert_array_equal(state, script.obs(episode, start + k))
                    assert actions[i, k - 1].item() == script.actions[episode, start + k - 1]
                else:
                    assert not state.any()
                    ended.add(k)
    assert ended == {1, 2, 3, 4, 5}


def slow_renormalised(x):
    """To [0, 1]; the 1e-5 keeps a row that is constant from dividing by zero."""
    return (x - x.min()) / (x.max() - x.min() + 1e-5)


@pytest.mark.parametrize("name", ["spr", "sr_spr", "bbf"])
def test_spr_loss_against_a_loop(name, request):
    """One transition and one step ahead at a time, in float64, from the definition."""
    module = request.getfixturevalue(name)
    network, frozen = [make_network(module, MINATAR, 3, seed=seed) for seed in (1, 2)]
    slow, slow_frozen = copy.deepcopy(network).double(), copy.deepcopy(frozen).double()
    generator = torch.Generator().manual_seed(0)
    obs = torch.rand(6, 4, 10, 10, generator=generator)  # augmented images: channels first
    states = torch.rand(6, 5, 4, 10, 10, generator=generator)
    actions = torch.randint(0, 3, (6, 5), generator=generator)
    masks = (torch.arange(5) < torch.tensor([5, 4, 3, 1, 0, 5])[:, None]).float()
    if name == "spr":
        module.draw_noise(network, frozen)  # which must have no part in this
    losses = module.prediction_loss(network, frozen, network.encode(obs), states.flatten(0, 1), actions, masks)
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
    assert losses[4].item() == 0
    assert losses[0].item() > 0


def test_spr_learns_on_the_online_side_only(spr):
    """No gradient reaches the target network, whose predictor and transition model have no part in the loss."""
    network, frozen = [make_network(spr, MINATAR, 3, seed=seed) for seed in (1, 2)]
    obs, states = torch.rand(2, 4, 10, 10), torch.rand(2 * 5, 4, 10, 10)
    actions, masks = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5)
    loss = spr.prediction_loss(network, frozen, network.encode(obs), states, actions, masks)
    loss.sum().backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    learning = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    layers = ["convolutions.1", "dense.0", "transition.0", "transition.2", "predictor"]  # without their sigmas
    assert learning == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    for module in (frozen.predictor, frozen.transition[0], frozen.head):
        torch.nn.init.zeros_(module.weight)
    again = spr.prediction_loss(network, frozen, network.encode(obs), states, actions, masks)
    assert torch.equal(loss, again)


@pytest.mark.parametrize(
    ("shape", "network", "grid"),
    [(MINATAR, "dopamine", (16, 8, 8)), (ALE, "dopamine", (64, 11, 11)), (ALE, "impala", (32, 11, 11))],
)
def test_the_transition_model_keeps_the_latents_shape(spr, shape, network, grid):
    """And their range: renormalised before and after."""
    module = make_network(spr, shape, 6, network=network)
    obs = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    latents = module.encode(obs > 127 if shape == MINATAR else obs)
    assert module.grid == grid
    after = module.advance(latents, torch.tensor([0, 1, 5]))
    for values in (latents, after):
        assert values.shape == (3, math.prod(grid))
        assert values.amin(dim=1).tolist() == [0] * 3
        assert values.amax(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-2)
    assert not torch.equal(after[:1], module.advance(latents[:1], torch.tensor([1])))  # the action matters
