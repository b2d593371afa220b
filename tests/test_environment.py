"""The environment against gymnasium's own preprocessing, and the rules of the game on the real emulator.

The same text in every agent (test_one_name.py): dqn.py stands for all.
"""

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from conftest import make_args
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation


@pytest.mark.parametrize("game", ["Pong", "SpaceInvaders"])
def test_preprocessing_against_gymnasium(dqn, game):
    """Frame by frame over 250 random actions: no pixel differs. Sticky actions are off: the two do not share dice."""
    gym.register_envs(ale_py)
    reference = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0)
    reference = AtariPreprocessing(reference, noop_max=0, frame_skip=4, screen_size=84)
    reference = FrameStackObservation(reference, 4, padding_type="zero")
    envs = dqn.make_env(make_args(dqn, env_id=f"ALE/{game}-v5", sticky_actions=0.0))
    assert envs.single_action_space.n == reference.action_space.n
    expected, _ = reference.reset(seed=0)
    obs = dqn.reset(envs, 1, 0, 0)
    rng = np.random.default_rng(0)
    paid = 0
    for _ in range(250):
        assert obs.shape == (1, 4, 84, 84)
        assert obs.dtype == np.uint8
        np.testing.assert_array_equal(obs[0], expected)
        action = rng.integers(reference.action_space.n)
        expected, reward, terminated, truncated, _ = reference.step(action)
        obs, rewards, terminations, truncations, _ = envs.step(np.array([action]))
        assert (rewards[0], terminations[0], truncations[0]) == (reward, terminated, truncated)
        paid = max(paid, abs(reward))
    assert paid >= (5 if game == "SpaceInvaders" else 1)  # the game's own rewards: clipping is the training loop's


def play(module, envs, seed, episode, actions, stream=None):
    """Everything that a game shows, as one list."""
    seen = [module.reset(envs, seed, stream or module.TRAINING, episode).tobytes()]
    for action in actions:
        obs, rewards, terminations, truncations, _ = envs.step(np.array([action]))
        seen.append((obs.tobytes(), rewards[0], terminations[0], truncations[0]))
        if terminations[0] or truncations[0]:
            break
    return seen


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "MinAtar/Asterix-v1", "MinAtar/Breakout-v1"])
def test_a_game_depends_on_its_seed_alone(dqn, env_id):
    """Sticky actions included, whatever was played before."""
    envs = dqn.make_env(make_args(dqn, env_id=env_id))
    actions = np.random.default_rng(0).integers(envs.single_action_space.n, size=120)
    first = play(dqn, envs, 1, 7, actions)
    for before in ([1], [2, 1, 2]):
        play(dqn, envs, 1, 3, before)
        assert play(dqn, envs, 1, 7, actions) == first
    assert play(dqn, dqn.make_env(make_args(dqn, env_id=env_id)), 1, 7, actions) == first
    # another game of the run, of another stream, and the same game of another run, are other games (a few may
    # coincide: Breakout's ball starts on one of two sides, and is lost soon)
    assert any(play(dqn, envs, 1, episode, actions) != first for episode in range(8, 14))
    assert any(play(dqn, envs, seed, 7, actions) != first for seed in range(2, 8))
    assert any(play(dqn, envs, 1, 7, actions, stream) != first for stream in (1_000, 2_000, 3_000, 4_000))


def test_no_two_games_have_one_seed(dqn):
    class Spy:
        def reset(self, seed):
            seeds.append(seed)
            return None, {}

    seeds = []
    for seed in (0, 1, 2):
        for stream in (dqn.TRAINING, 1, 2, 1_000, 1_000_000):
            for episode in range(30):
                dqn.reset(Spy(), seed, stream, episode)
    assert len(set(seeds)) == 3 * 5 * 30
    assert 0 <= min(seeds) < max(seeds) < 2**31


def test_a_sticky_action_does_not_outlive_its_game(dqn):
    """MinAtar repeats the previous action with probability 0.1, also at a game's first step: which must be none."""
    envs = dqn.make_env(make_args(dqn, env_id="MinAtar/Breakout-v1"))
    for game in range(60):
        firsts = []
        for before in (1, 2):
            dqn.reset(envs, 1, 0, 1_000)
            envs.step(np.array([before]))
            firsts.append(play(dqn, envs, 1, game, [0]))
        assert firsts[0] == firsts[1]


def test_sticky_actions_are_on_by_default(dqn):
    default = dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5"))
    off = dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5", sticky_actions=0.0))
    actions = np.random.default_rng(0).integers(6, size=100)
    assert play(dqn, default, 1, 0, actions) != play(dqn, off, 1, 0, actions)
    assert play(dqn, off, 1, 0, actions) == play(dqn, off, 1, 1, actions)  # nothing else is random


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "MinAtar/Freeway-v1"])
def test_the_cap_is_a_truncation(dqn, env_id):
    envs = dqn.make_env(make_args(dqn, env_id=env_id, max_episode_steps=30))
    for game in range(2):
        dqn.reset(envs, 1, 0, game)
        for step in range(1, 31):
            _, _, terminations, truncations, _ = envs.step(np.array([0]))
            assert not terminations[0]
            assert truncations[0] == (step == 30)


def test_losing_a_life_is_no_terminal(dqn):
    """Breakout: five lives are lost within a few hundred random steps, and only the last ends the game."""
    envs = dqn.make_env(make_args(dqn, env_id="ALE/Breakout-v5"))
    dqn.reset(envs, 1, 0, 0)
    rng = np.random.default_rng(0)
    lives, ended = [], []
    while 0 not in lives:
        _, _, terminations, _, infos = envs.step(rng.integers(4, size=1))
        lives.append(int(infos["lives"][0]))
        ended.append(bool(terminations[0]))
    assert sorted(set(lives)) == [0, 1, 2, 3, 4, 5]
    assert ended == [left == 0 for left in lives]


def test_noops_at_reset(dqn):
    """--noop-max: games that differ in nothing but their seed begin at different frames."""
    envs = dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5", sticky_actions=0.0, noop_max=30))
    frames = set()
    for game in range(12):
        dqn.reset(envs, 1, 0, game)
        frames.add(int(envs.step(np.array([0]))[4]["episode_frame_number"][0]) - 4)
    assert len(frames) > 5
    assert min(frames) >= 0
    assert max(frames) < 30  # "fewer than this"


def test_frames_in_a_step(dqn):
    envs = dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5", frame_skip=3, max_episode_steps=10))
    dqn.reset(envs, 1, 0, 0)
    numbers = [int(envs.step(np.array([0]))[4]["episode_frame_number"][0]) for _ in range(10)]
    assert np.diff(numbers).tolist() == [3] * 9


@pytest.mark.parametrize("game", ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"])
def test_minatar_shows_the_games_own_state(dqn, game):
    envs = dqn.make_env(make_args(dqn, env_id=f"MinAtar/{game}-v1"))
    obs = dqn.reset(envs, 1, 0, 0)
    state = envs.envs[0].unwrapped.game.state
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert obs.dtype == envs.single_observation_space.dtype == bool
        assert obs.shape == (1, *envs.single_observation_space.shape)
        assert obs.shape[:3] == (1, 10, 10)
        np.testing.assert_array_equal(obs[0], state())
        obs, *_ = envs.step(rng.integers(envs.single_action_space.n, size=1))
