"""enjoy.py plays a run's weights: the games of its evaluation, their pictures, and one sentence for what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import imageio_ffmpeg
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, Bomb, load, make_args, name_of, scalars

import enjoy

# random enough for returns that differ from game to game
FLAGS = {"env_id": "MinAtar/SpaceInvaders-v1", "eval_epsilon": 0.5, "save_model": True, "eval_episodes": 3}


@pytest.fixture
def make_run(tmp_path):
    """A function that trains an agent for some steps and returns the run's folder."""

    def make(module, **flags):
        return tmp_path / module.train(make_args(module, **(FLAGS | {"total_timesteps": 120} | flags)))

    return make


def write_run(folder, module, network, args):
    """A run's folder with the weights of a network that has learned nothing."""
    (folder / "args.json").write_text(json.dumps({"agent": name_of(module), "args": asdict(args)}))
    torch.save({"weights": network.state_dict()}, folder / "model.pt")
    return folder


@pytest.fixture
def folder(tmp_path, dqn):
    args = make_args(dqn, **FLAGS)
    return write_run(tmp_path, dqn, dqn.QNetwork((10, 10, 6), 4, args), args)


def frames_of(path) -> np.ndarray:
    """The pictures of a video, (frames, height, width, 3)."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def watch_act(monkeypatch, name: str) -> list[np.ndarray]:
    """The newest frames that the agent of this name will have seen when it acted."""
    sys.path.insert(0, str(ROOT / "agents"))
    module = __import__(name)
    seen = []
    act = module.act

    def watched_act(network, obs, *others):
        seen.append(obs[0, -1].copy() if obs.dtype == np.uint8 else obs[0].copy())
        return act(network, obs, *others)

    monkeypatch.setattr(module, "act", watched_act)
    return seen


# ---- what is played
def test_agents_without_a_replay_play_too(on_policy, make_run, capsys):
    """After a roll-out that leaves some steps over."""
    run = make_run(on_policy, total_timesteps=100)
    returns = enjoy.main(enjoy.Args(run, episodes=3))
    assert len(returns) == 3
    if name_of(on_policy) != "ppo":  # it draws its actions
        assert f"step 96: mean return {np.mean(returns):.2f} of {returns}" in capsys.readouterr().out
        assert scalars(run)["eval/episodic_return"] == [(96, pytest.approx(np.mean(returns)))]


def test_every_agent_plays_the_games_of_its_last_evaluation(agent, make_run):
    run = make_run(agent)
    returns = enjoy.main(enjoy.Args(run, episodes=3))
    assert len(returns) == 3
    if name_of(agent) != "iqn":  # it draws tau when it acts
        [(step, mean)] = scalars(run)["eval/episodic_return"]
        assert step == 120 and np.mean(returns) == pytest.approx(mean)
        (run / "model.pt").unlink()
        assert enjoy.main(enjoy.Args(run, episodes=3)) == returns  # by checkpoint.pt


def test_they_are_the_same_games_on_ale_with_lives_and_no_ops(der, make_run):
    flags = {"env_id": "ALE/SpaceInvaders-v5", "max_episode_steps": 150, "eval_episodes": 2, "total_timesteps": 105}
    run = make_run(der, **flags)
    returns = enjoy.main(enjoy.Args(run, episodes=2))
    [(_, mean)] = scalars(run)["eval/episodic_return"]
    assert np.mean(returns) == pytest.approx(mean)
    assert mean > 0


def test_weights_of_the_offline_agent_are_played(tmp_path):
    offline = load(ROOT / "agents" / "cql_offline.py")
    args = offline.Args(env_id="MinAtar/Breakout-v1", dataset_dir=str(tmp_path), cuda=False)
    network = offline.OfflineNetwork((10, 10, 4), 3, args)
    write_run(tmp_path, offline, network, args)
    assert len(enjoy.main(enjoy.Args(tmp_path, episodes=2))) == 2


def test_the_seed_determines_the_games(folder):
    first, again, other = [enjoy.main(enjoy.Args(folder, episodes=8, seed=seed)) for seed in (5, 5, 6)]
    assert first == again
    assert first != other


def test_epsilon_is_the_runs_or_the_flags(folder):
    greedy, again, random = [enjoy.main(enjoy.Args(folder, episodes=5, epsilon=e)) for e in (0, 0, None)]
    assert greedy == again
    assert greedy != random


# ---- what is seen
def test_a_video_shows_every_state_of_minatar(folder, monkeypatch):
    seen = watch_act(monkeypatch, "dqn")
    enjoy.main(enjoy.Args(folder, episodes=1, video=folder / "new" / "game.mp4"))
    frames = frames_of(folder / "new" / "game.mp4")
    assert frames.shape == (len(seen) + 1, 480, 480, 3)  # the last state, too
    colours = np.vstack([np.zeros((1, 3)), 255 * np.array(plt.colormaps["tab10"].colors)])
    for frame, state in zip(frames, seen, strict=False):
        for y, x in np.ndindex(10, 10):
            channel = max(np.flatnonzero(state[y, x]), default=-1)
            middle = frame[48 * y + 24, 48 * x + 24]
            assert np.abs(middle - colours[channel + 1]).max() < 30


@pytest.mark.parametrize("name", ["dqn", "der"])
def test_a_video_shows_what_the_agent_sees_of_ale(name, tmp_path, monkeypatch):
    module = load(ROOT / "agents" / f"{name}.py")
    args = make_args(module, env_id="ALE/Pong-v5", max_episode_steps=60, eval_epsilon=1.0)
    [network_class] = [item for item in vars(module).values() if hasattr(item, "q_values")]
    network = network_class((4, 84, 84), 6, args)
    write_run(tmp_path, module, network, args)
    seen = watch_act(monkeypatch, name)
    enjoy.main(enjoy.Args(tmp_path, episodes=2, video=tmp_path / "games.mp4"))
    frames = frames_of(tmp_path / "games.mp4")
    assert frames.shape == (122, 630, 480, 3)
    assert frames[30].std(axis=2).mean() > 20  # in colour

    # no picture of the second game is nearer to what the agent saw at another time
    small = []
    for frame in frames[61:121]:
        gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        small.append(cv2.resize(gray, (84, 84), interpolation=cv2.INTER_AREA).astype(float))
    distances = np.abs(np.stack(small)[:, None] - np.stack(seen[60:])).mean(axis=(2, 3))
    same_time = distances.diagonal()
    assert same_time.max() < 2
    assert (same_time <= distances.min(axis=1) + 0.01).all()
    assert np.diagonal(distances, 3).mean() > 1.3 * same_time.mean()  # so that another time would be seen


def test_a_window_needs_a_display(folder, monkeypatch, refused):
    monkeypatch.delenv("DISPLAY", raising=False)
    plt.switch_backend("agg")
    assert "display" in refused(enjoy.main, enjoy.Args(folder, render=True))


# ---- what is wrong
def changed_record(**facts):
    """A function that writes other facts into args.json."""

    def change(folder):
        record = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(record | facts))

    return change


def flipped_weights(folder):
    data = bytearray((folder / "model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.pt").write_bytes(data)


OTHER = {"head.weight": torch.zeros(3, 3)}
WRONG = [
    (lambda folder: (folder / "args.json").unlink(), "has no args.json"),
    (lambda folder: (folder / "args.json").write_text('{"agent": "dqn"'), "args.json is damaged"),
    (changed_record(agent="../enjoy"), "a run of ../enjoy: there is no"),
    (changed_record(args={"record_dataset": None}), "record_dataset"),  # another version's flag
    (lambda folder: (folder / "model.pt").unlink(), "neither model.pt nor checkpoint.pt"),
    (lambda folder: os.truncate(folder / "model.pt", 1_000), "model.pt cannot be read"),
    (flipped_weights, "model.pt cannot be read"),
    (lambda folder: torch.save({"weights": Bomb()}, folder / "model.pt"), "model.pt cannot be read"),
    (lambda folder: torch.save({"weights": OTHER}, folder / "model.pt"), "weights of another network"),
    (lambda folder: (folder / "model.pt").rename(folder / "checkpoint.pt"), "checkpoint.pt cannot be read"),
]


@pytest.mark.parametrize(("spoil", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_spoiled_folder_is_one_sentence(spoil, words, folder, refused):
    spoil(folder)
    assert words in refused(enjoy.main, enjoy.Args(folder, episodes=1, video=folder / "new.mp4"))


def test_no_folder(folder, refused):
    assert "missing is no folder" in refused(enjoy.main, enjoy.Args(folder / "missing"))


@pytest.mark.parametrize("flags", [{"episodes": 0}, {"seed": -1}, {"epsilon": 2.0}, {"video": Path("x.gif")}])
def test_wrong_flags_are_one_sentence(flags, folder, refused):
    assert next(iter(flags)) in refused(enjoy.Args, folder, **flags)


@pytest.mark.parametrize("name", ["there.mp4", "there.mp4/inside.mp4"])
def test_no_file_is_overwritten(name, folder, refused):
    (folder / "there.mp4").write_text("precious")
    assert "exists" in refused(lambda: enjoy.main(enjoy.Args(folder, episodes=1, video=folder / name)))


def test_the_command_line_plays_until_ctrl_c(folder):
    command = [sys.executable, str(ROOT / "enjoy.py"), str(folder), "--episodes", "100000", "--video", "games.mp4"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("game 1: ")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate()
    assert process.returncode == 0
    games = int(re.search(r"of (\d+) games", rest)[1])
    assert f"game {games}: " in rest or games == 1
    assert len(frames_of(folder / "games.mp4")) > games
