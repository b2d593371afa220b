"""The environment against gymnasium's own preprocessing, and the rules of the game on the real emulator."""

import ale_py
import gymnasium as gym
import numpy as np
import pytest
from conftest import make_args
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation


@pytest.mark.parametrize("game", ["Pong", "Breakout", "SpaceInvaders"])
def test_preprocessing_against_gymnasium(dqn, game):
    """Frame by frame over 400 random actions: no pixel differs. Sticky actions are off: the two do not share dice."""
    gym.register_envs(ale_py)
    reference = gym.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0)
    reference = AtariPreprocessing(reference, noop_max=0, frame_skip=4, screen_size=84)
    reference = FrameStackObservation(reference, 4, padding_type="zero")
    envs = dqn.make_env(make_args(dqn, env_id=f"ALE/{game}-v5", sticky_actions=0.0))
    assert envs.single_action_space.n == reference.action_space.n
    expected, _ = reference.reset(seed=0)
    obs = dqn.reset(envs, 1, 0, 0)
    rng = np.random.default_rng(0)
    for _ in range(400):
        assert obs.shape == (1, 4, 84, 84) and obs.dtype == np.uint8
        np.testing.assert_array_equal(obs[0], expected)
        action = rng.integers(reference.action_space.n)
        expected, reward, terminated, truncated, _ = reference.step(action)
        obs, rewards, terminations, truncations, _ = envs.step(np.array([action]))
        assert (rewards[0], terminations[0], truncations[0]) == (reward, terminated, truncated)
        if terminated:
            break


def play(module, envs, seed, episode, actions):
    """Everything that a game shows, as one list."""
    seen = [(module.reset(envs, seed, 0, episode).copy(),)]
    for action in actions:
        obs, rewards, terminations, truncations, _ = envs.step(np.array([action]))
        seen.append((obs.copy(), rewards[0], terminations[0], truncations[0]))
        if terminations[0] or truncations[0]:
            break
    return seen


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "MinAtar/Asterix-v1", "MinAtar/Breakout-v1"])
def test_a_game_depends_on_its_seed_alone(agent, env_id):
    """Sticky actions included, whatever was played before: MinAtar's last action must not outlive its game."""
    envs = agent.make_env(make_args(agent, env_id=env_id))
    rng = np.random.default_rng(0)
    actions = rng.integers(envs.single_action_space.n, size=200)
    first = play(agent, envs, 1, 7, actions)
    for before in ([1], [2, 1, 2], []):
        play(agent, envs, 1, 3, before)
        assert same(first, play(agent, envs, 1, 7, actions))
    # another game of the run, and the same game of another run, are other games (a few may coincide: Breakout's ball
    # starts on one of two sides, and is lost soon)
    assert not all(same(first, play(agent, envs, 1, game, actions)) for game in range(8, 16))
    assert not all(same(first, play(agent, envs, seed, 7, actions)) for seed in range(2, 10))


def test_a_sticky_action_does_not_outlive_its_game(agent):
    """MinAtar repeats the previous action with probability 0.1, also at a game's first step: which must be none."""
    envs = agent.make_env(make_args(agent, env_id="MinAtar/Breakout-v1"))
    for game in range(60):
        firsts = []
        for before in (1, 2):
            agent.reset(envs, 1, 0, 1_000)
            envs.step(np.array([before]))
            firsts.append(play(agent, envs, 1, game, [0]))
        assert same(*firsts)


def test_sticky_actions_are_on_by_default(dqn):
    default = dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5"))
    off = dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5", sticky_actions=0.0))
    actions = np.random.default_rng(0).integers(6, size=100)
    assert not same(play(dqn, default, 1, 0, actions), play(dqn, off, 1, 0, actions))
    assert same(play(dqn, off, 1, 0, actions), play(dqn, off, 1, 1, actions))  # nothing else is random


def test_a_stack_begins_with_zeros(dqn):
    obs = dqn.reset(dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5")), 1, 0, 0)
    assert not obs[0, :3].any() and obs[0, 3].any()


def test_the_cap_is_a_truncation(dqn):
    for env_id in ("ALE/Pong-v5", "MinAtar/Freeway-v1"):
        envs = dqn.make_env(make_args(dqn, env_id=env_id, max_episode_steps=30))
        dqn.reset(envs, 1, 0, 0)
        for step in range(1, 31):
            _, _, terminations, truncations, _ = envs.step(np.array([0]))
            assert not terminations[0]
            assert truncations[0] == (step == 30)


def test_losing_a_life_is_no_terminal(dqn):
    """Breakout: the first of five lives is lost within 200 random steps, and the game goes on."""
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


def test_rewards_are_the_games_own(dqn):
    """Space Invaders pays 5 and more a hit: clipping is the training loop's, after the return is counted."""
    envs = dqn.make_env(make_args(dqn, env_id="ALE/SpaceInvaders-v5"))
    dqn.reset(envs, 1, 0, 0)
    rng = np.random.default_rng(0)
    assert max(envs.step(rng.integers(6, size=1))[1][0] for _ in range(200)) >= 5


def test_noops_at_reset(dqn):
    """--noop-max: games that differ in nothing but their seed begin at different frames."""
    envs = dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5", sticky_actions=0.0, noop_max=30))
    frames = set()
    for game in range(20):
        dqn.reset(envs, 1, 0, game)
        frames.add(int(envs.step(np.array([0]))[4]["episode_frame_number"][0]) - 4)
    assert len(frames) > 5 and max(frames) <= 30 and min(frames) >= 0


def test_every_id_of_both_families(dqn):
    for env_id in ("ALE/MsPacman-v5", "ALE/Jamesbond-v5", "MinAtar/SpaceInvaders-v1", "MinAtar/Seaquest-v1"):
        envs = dqn.make_env(make_args(dqn, env_id=env_id))
        obs = dqn.reset(envs, 1, 0, 0)
        assert obs.shape == (1, *envs.single_observation_space.shape)
        assert envs.single_observation_space.dtype == obs.dtype
