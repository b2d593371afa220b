"""Whole training runs, at the smallest size that still proves the point."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ONLINE, make_args, make_network, scalars, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(agent, monkeypatch, **flags):
    """Train, and return the run's folder, its actions and its losses."""
    actions, losses = [], []
    act, backward = agent.act, torch.Tensor.backward
    monkeypatch.setattr(agent, "act", lambda *a: actions.append(int((chosen := act(*a))[0])) or chosen)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.item()) or backward(loss))
    folder = agent.train(make_args(agent, save_model=True, **flags))
    monkeypatch.undo()
    return folder, actions, losses


def updates_per_step(agent):
    return 2 if agent.AGENT == "spr" else 1


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.values(), right.values(), strict=True))


@pytest.mark.parametrize("prioritized", [False, True], ids=["uniform", "prioritized"])
def test_the_same_seed_gives_the_same_run(agent, monkeypatch, tmp_path, prioritized):
    flags = {"total_timesteps": 600, "prioritized": prioritized, "n_step": 3}
    results = []
    for seed in (1, 1, 2):
        monkeypatch.chdir(tmp_path)
        results.append(run(agent, monkeypatch, seed=seed, **flags))
    monkeypatch.chdir(tmp_path)
    (one, actions, losses), (again, actions_again, losses_again), (other, other_actions, other_losses) = results
    assert len(actions) == 600 and len(losses) == 125 * updates_per_step(agent)  # every 4th of 600 - 100 steps
    assert actions == actions_again and losses == losses_again
    assert equal(weights(tmp_path / one), weights(tmp_path / again))
    assert actions != other_actions and losses != other_losses
    assert not equal(weights(tmp_path / one), weights(tmp_path / other))


def test_evaluation_does_not_disturb_training(agent, monkeypatch, tmp_path):
    plain, *_ = run(agent, monkeypatch, total_timesteps=600)
    monkeypatch.chdir(tmp_path)
    evaluated, *_ = run(agent, monkeypatch, total_timesteps=600, eval_frequency=150, eval_episodes=2)
    assert equal(weights(tmp_path / plain), weights(tmp_path / evaluated))
    before, after = scalars(tmp_path / plain), scalars(tmp_path / evaluated)
    assert before["charts/episodic_return"] == after["charts/episodic_return"]
    assert [step for step, _ in after["eval/episodic_return"]] == [150, 300, 450, 600]


def test_an_update_weighs_its_batch_and_sets_its_priorities(agent, monkeypatch):
    """The loss is the mean of weight * loss, but in qrdqn and iqn of the loss alone (protocol: no importance
    weights); each sampled row then has the square root of its own loss as priority."""
    names = {"dqn": "td_loss", "qrdqn": "quantile_loss", "rainbow": "rainbow_loss", "iqn": "implicit_loss"}
    name = (names | {"der": "c51_loss", "drq_eps": "huber_loss", "spr": "latent_loss"})[agent.AGENT]
    function, backward, batches, losses, means, updates = getattr(agent, name), torch.Tensor.backward, [], [], [], []

    def record(*args):
        found = function(*args)
        batches.append(next(arg for arg in args if isinstance(arg, agent.Batch)))
        losses.append(found[0].detach().numpy().copy())
        return found

    update = agent.FrameReplay.update_priorities

    def check(self, rows, values):
        update(self, rows, values)
        expected = dict(zip(batches[-1].rows.tolist(), np.sqrt(losses[-1] + 1e-10), strict=True))
        updates.append(all(self.priorities.flat[row] == pytest.approx(value) for row, value in expected.items()))

    monkeypatch.setattr(agent, name, record)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: means.append(loss.item()) or backward(loss))
    monkeypatch.setattr(agent.FrameReplay, "update_priorities", check)
    auxiliary = []
    if agent.AGENT == "spr":  # its other loss is weighed too, and has no part in the priorities
        predict = agent.prediction_loss
        monkeypatch.setattr(
            agent, "prediction_loss", lambda *a: auxiliary.append((x := predict(*a)).detach().numpy()) or x
        )
    agent.train(make_args(agent, total_timesteps=400, prioritized=True))
    assert len(means) == len(updates) == 75 * updates_per_step(agent) and all(updates)
    weights_of = [batch.weights.numpy() if agent.AGENT not in ("qrdqn", "iqn") else 1.0 for batch in batches]
    if agent.AGENT == "spr":
        assert all((x > 0).any() for x in auxiliary)
        losses = [loss + 5 * x for loss, x in zip(losses, auxiliary, strict=True)]
    assert means == pytest.approx([np.mean(w * loss) for w, loss in zip(weights_of, losses, strict=True)], rel=1e-4)
    assert min(batch.weights.min().item() for batch in batches) < 0.9  # the weights did differ


def test_batch_size_one_and_updates_at_every_step(agent, monkeypatch):
    _, _, losses = run(agent, monkeypatch, batch_size=1, train_frequency=1)
    assert len(losses) == 200 * updates_per_step(agent) and np.isfinite(losses).all()


def test_the_loss_falls_on_a_fixed_batch(agent):
    """Learning does what it is for: on one batch, a hundred updates take the loss to a tenth."""
    args = make_args(agent)
    envs = agent.make_env(args)
    space, actions = envs.single_observation_space, int(envs.single_action_space.n)
    replay = agent.FrameReplay(space, actions, args, torch.device("cpu"), np.random.default_rng(0))
    obs, rng = agent.reset(envs, 1, 0, 0), np.random.default_rng(0)
    for game in range(1, 30):
        done = False
        while not done:
            chosen = rng.integers(actions, size=1)
            next_obs, rewards, terminations, truncations, _ = envs.step(chosen)
            replay.add(obs, next_obs, chosen, rewards + 1, terminations, truncations)
            obs, done = next_obs, terminations[0] or truncations[0]
        obs = agent.reset(envs, 1, 0, game)
    network = make_network(agent, space.shape, actions)
    batch, frozen, targets = replay.sample(8), copy.deepcopy(network), None
    if agent.AGENT == "rainbow":
        targets = agent.rainbow_target(frozen, frozen, batch, False)
    elif agent.AGENT in ("der", "spr"):
        targets = agent.c51_target(frozen, frozen, batch)

    def losses():
        if agent.AGENT == "dqn":
            return agent.td_loss(network, batch, agent.td_target(frozen, batch))
        if agent.AGENT == "qrdqn":
            return agent.quantile_loss(network, batch, agent.quantile_target(frozen, batch))
        if agent.AGENT == "rainbow":
            return agent.rainbow_loss(network, batch, targets)
        if agent.AGENT == "der":
            return agent.c51_loss(network, batch, targets)
        if agent.AGENT == "drq_eps":
            return agent.huber_loss(network, batch, agent.double_target(frozen, frozen, batch))
        if agent.AGENT == "spr":
            return agent.latent_loss(network, network.encode(batch.obs), batch, targets)
        tau = torch.from_numpy(rng.random((8, 160), np.float32)).split([64, 64, 32], dim=1)
        return agent.implicit_loss(
            network, batch, agent.implicit_target(network, frozen, batch, *tau[1:], False), tau[0]
        )

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        value = losses()[0].mean()
        value.backward()
        optimizer.step()
        values.append(value.item())
    if targets is not None:  # cross-entropy ends at the entropy of the targets
        floor = -(targets * targets.clamp(min=1e-30).log()).sum(dim=1).mean().item()
        values = [value - floor for value in values]
    assert values[-1] < 0.1 * values[0]


class Scripted(gym.Env):
    """Frames count the game and the step; games of 5, 9, ... steps end by termination, every third by truncation."""

    observation_space = gym.spaces.Box(0, 1, (4, 10, 10), bool)
    action_space = gym.spaces.Discrete(3)
    game = type("Game", (), {"last_action": 0})()
    episode = -1

    def frame(self):
        frame = np.zeros((4, 10, 10), bool)
        frame.ravel()[:20] = [(self.episode + 1) >> i & 1 for i in range(10)] + [
            (self.t + 1) >> i & 1 for i in range(10)
        ]
        return frame

    def reset(self, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self.frame(), {}

    def step(self, action):
        self.t += 1
        done = self.t == 5 + 4 * (self.episode % 4)
        return self.frame(), float(self.t), done and self.episode % 3 > 0, done and self.episode % 3 == 0, {}


def test_the_loop_stores_every_step_once_and_no_autoreset_step(agent, monkeypatch):
    """gymnasium's vector environments would spend a step on the reset; it must never enter the replay."""
    monkeypatch.setattr(agent, "make_env", lambda args: gym.vector.SyncVectorEnv([Scripted]))
    assert hasattr(agent, "make_life_env") == (agent.AGENT in ("der", "drq_eps", "spr"))
    stored = []
    add = agent.FrameReplay.add

    def record(self, obs, next_obs, actions, rewards, terminations, truncations):
        stored.append([obs[0].copy(), next_obs[0].copy(), rewards[0], bool(terminations[0]), bool(truncations[0])])
        add(self, obs, next_obs, actions, rewards, terminations, truncations)

    monkeypatch.setattr(agent.FrameReplay, "add", record)
    folder = agent.train(make_args(agent, total_timesteps=200))

    def number(obs, first):
        return int(obs.ravel()[first : first + 10].astype(int) @ 2 ** np.arange(10)) - 1

    assert len(stored) == 200
    episode, t, lengths = 0, 0, []
    for obs, next_obs, reward, terminated, truncated in stored:
        assert (number(obs, 0), number(obs, 10)) == (episode, t)
        assert (number(next_obs, 0), number(next_obs, 10)) == (episode, t + 1)
        assert reward == 1  # clipped: the game pays 1, 2, 3, ...
        t += 1
        done = t == 5 + 4 * (episode % 4)
        assert (terminated, truncated) == (done and episode % 3 > 0, done and episode % 3 == 0)
        if done:
            lengths.append(t)
            episode, t = episode + 1, 0
    logged = scalars(folder)
    assert [value for _, value in logged["charts/episodic_length"]] == lengths
    assert [value for _, value in logged["charts/episodic_return"]] == [n * (n + 1) / 2 for n in lengths]  # unclipped
    assert [step for step, _ in logged["charts/episodic_return"]] == list(np.cumsum(lengths))


def test_schedules(agent, monkeypatch):
    """Epsilon, the first update, and the steps at which the target is copied."""
    epsilons, copies, syncs = [], [], []
    act, load_state_dict = agent.act, torch.nn.Module.load_state_dict
    monkeypatch.setattr(agent, "act", lambda *a: epsilons.append(a[2]) or act(*a))
    monkeypatch.setattr(
        torch.nn.Module,
        "load_state_dict",
        lambda self, state: syncs.append(len(epsilons)) or load_state_dict(self, state),
    )
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: copies.append(len(epsilons)))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    flags = {"total_timesteps": 400, "exploration_steps": 200, "start_e": 1.0, "end_e": 0.2}
    agent.train(make_args(agent, diagnostics_frequency=0, **flags))
    assert epsilons[:100] == [1.0] * 100
    assert epsilons[199] == pytest.approx(1 - 0.8 * 100 / 200)
    assert epsilons[299:] == pytest.approx([0.2] * 101)
    assert copies == [step for step in range(104, 401, 4) for _ in range(updates_per_step(agent))]
    assert syncs == [150, 200, 250, 300, 350, 400]


def test_the_run_folder(agent, monkeypatch):
    flags = {"total_timesteps": 1_000, "eval_episodes": 2, "save_model": True, "capture_video": True}
    folder = agent.train(make_args(agent, diagnostics_frequency=500, **flags))
    assert folder.parent == Path("runs")
    assert folder.name.startswith(f"MinAtar-Breakout-v1__{agent.AGENT}__1__")
    record = json.loads((folder / "args.json").read_text())
    assert record["agent"] == agent.AGENT
    assert record["args"] == vars(make_args(agent, diagnostics_frequency=500, **flags))
    assert record["packages"]["torch"] == torch.__version__
    assert record["frames_per_step"] == 1 and record["device"] == "cpu"
    tags = {"charts/episodic_return", "charts/episodic_length", "charts/epsilon", "charts/SPS"}
    tags |= {"losses/td_loss", "losses/q_values", "eval/episodic_return"}
    tags |= {"losses/spr_loss"} if agent.AGENT == "spr" else set()
    assert {tag for tag in scalars(folder) if not tag.startswith("diagnostics/")} == tags
    assert sum(tag.startswith("diagnostics/") for tag in scalars(folder)) == 5
    events = EventAccumulator(str(folder))
    events.Reload()
    tensors = events.Tags()["tensors"]
    assert {"hyperparameters/text_summary", "environment/text_summary"} <= set(tensors)
    assert "_hparams_/session_start_info" in events.summary_metadata
    video = (folder / "videos" / "step-1000.mp4").read_bytes()
    assert video[4:8] == b"ftyp" and len(video) > 1_000
    assert not list(folder.glob("*.tmp"))


def test_playing_a_checkpoint_repeats_the_evaluation(agent, capsys):
    """Game, network and algorithm come from the checkpoint, so the final evaluation can be played again."""
    folder = agent.train(make_args(agent, env_id="MinAtar/Asterix-v1", eval_episodes=3, save_model=True, n_step=2))
    mean = scalars(folder)["eval/episodic_return"][-1][1]
    capsys.readouterr()
    checkpoint = str(folder / "model.pt")
    agent.train(agent.Args(eval_only=True, checkpoint=checkpoint, eval_episodes=3, cuda=False))
    out = capsys.readouterr().out
    assert out.startswith(f"evaluation at step 300: mean return {mean:.2f} of [")
    assert len(list(Path("runs").iterdir())) == 1  # playing leaves no run behind


def test_video_shows_the_evaluated_game_in_the_real_emulators_frames(dqn, monkeypatch):
    """The filmed emulator, given the same seed and actions, stands where the evaluated one stood at every step."""
    args = make_args(dqn, env_id="ALE/Pong-v5", capture_video=True, eval_episodes=1, max_episode_steps=40)
    frames = []

    class Writer:
        def send(self, image):
            if image is not None:
                frames.append(image)

        def close(self):
            pass

    import imageio_ffmpeg

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", lambda *a, **k: Writer())
    rng = np.random.default_rng(0)
    game = [rng.integers(6, size=1) for _ in range(40)]
    dqn.film(Path("videos/x.mp4"), args, 3, game)
    assert len(frames) == 40 and frames[0].shape == (420, 320, 3)
    # the same game through the agent's own preprocessing: grey is a known mix of red, green and blue
    import cv2

    envs = dqn.make_env(args)
    obs = dqn.reset(envs, args.seed, 3, 0)
    for step in range(40):
        grey = cv2.cvtColor(np.ascontiguousarray(frames[step][::2, ::2]), cv2.COLOR_RGB2GRAY)
        grey = cv2.resize(grey, (84, 84), interpolation=cv2.INTER_AREA)
        assert np.abs(grey.astype(int) - obs[0, 3].astype(int)).mean() < 1.5
        obs = envs.step(game[step])[0]


@pytest.mark.parametrize("path", ONLINE, ids=lambda path: path.stem)
def test_a_file_copied_alone_trains_on_pong(path, tmp_path):
    """The file imports nothing of this repository: in an empty folder it learns from real Pong."""
    shutil.copy(path, tmp_path)
    command = [sys.executable, "-I", path.name, "--env-id", "ALE/Pong-v5", "--total-timesteps", "300"]
    command += ["--learning-starts", "280", "--train-frequency", "4", "--buffer-size", "1000", "--eval-episodes", "0"]
    command += ["--start-e", "1", "--end-e", "1", "--no-cuda"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    folder = lines[0].removeprefix("run folder: ").split(" (")[0]
    assert lines[-1] == f"run folder: {folder}"
    assert re.search(r"300/300 .*steps/s, return .*, epsilon 1.000", lines[-2])  # a plain line: output is no terminal
    record = json.loads((tmp_path / folder / "args.json").read_text())
    assert record["frames_per_step"] == 4 and record["git_commit"] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("prioritized", [False, True], ids=["uniform", "prioritized"])
def test_training_on_cuda(agent, prioritized):
    folder = agent.train(make_args(agent, cuda=True, total_timesteps=2_000, prioritized=prioritized, eval_episodes=1))
    assert np.isfinite([value for _, value in scalars(folder)["losses/td_loss"]]).all()
    assert json.loads((folder / "args.json").read_text())["device"] != "cpu"


def test_a_loss_that_is_not_finite_stops_the_run(agent, monkeypatch, capsys):
    """A reward of 1e30 overflows the square or the sum: the run must say so, not go on with broken weights."""
    monkeypatch.setattr(agent.np, "clip", lambda rewards, low, high: np.asarray(rewards) + np.inf)
    with pytest.raises(SystemExit) as exit_:
        agent.train(make_args(agent, total_timesteps=2_000))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "the loss is not finite at step 104, and the run in runs/" in error  # the first update's


def test_a_loss_that_is_not_finite_stops_the_run_before_its_diagnosis(agent, monkeypatch, capsys):
    """A report that falls due between two checks must not meet broken weights first."""
    backward, count = torch.Tensor.backward, []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backward(loss * (torch.nan if count else 1)))
    step = torch.optim.Adam.step

    def poison(self):
        step(self)
        count.append(1)

    monkeypatch.setattr(torch.optim.Adam, "step", poison)
    with pytest.raises(SystemExit) as exit_:
        agent.train(make_args(agent, total_timesteps=400, diagnostics_frequency=200))
    assert exit_.value.code == 2
    first = 108 if agent.AGENT == "spr" else 112  # the third update's, two a step or every four
    assert f"the loss is not finite at step {first}" in capsys.readouterr().err


def test_a_game_without_a_cap_starts(dqn):
    """ALE counts frames in 32 bits: more agent steps than that must not overflow."""
    envs = dqn.make_env(make_args(dqn, env_id="ALE/Pong-v5", max_episode_steps=2**31 - 1))
    assert not dqn.reset(envs, 1, 0, 0)[0, :3].any()
    assert not envs.step(np.array([0]))[3][0]


def test_weights_are_kept_before_an_evaluation_that_fails(agent, monkeypatch):
    """A run of days must not lose its weights to a failing evaluation or film."""

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr(agent, "evaluate", fails)
    with pytest.raises(OSError, match="no space"):
        agent.train(make_args(agent, save_model=True, eval_episodes=1))
    assert len(list(Path("runs").glob("*/model.pt"))) == 1


def rebuilt(qrdqn, batches, flags):
    """The weights after plain updates on these (step, batch): one update per batch, no divisor, no noise."""
    network = make_network(qrdqn, (4, 10, 10), 3, **flags)
    target = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-5, eps=3.125e-4, fused=True)
    for step in range(1, 601):
        if step in batches:
            losses, _ = qrdqn.quantile_loss(network, batches[step], qrdqn.quantile_target(target, batches[step]))
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        if step > 100 and step % 50 == 0:
            target.load_state_dict(network.state_dict())
    return network.state_dict()


def sampled_batches(qrdqn, monkeypatch, **flags):
    """Train 600 steps; return the folder, {step: batch as sampled} and the batches that the loss was given."""
    steps, batches, used = [], {}, []
    act, sample, loss = qrdqn.act, qrdqn.FrameReplay.sample, qrdqn.quantile_loss

    def record(self, batch_size):
        batch = sample(self, batch_size)
        batches[len(steps)] = type(batch)(*[copy.deepcopy(field) for field in batch])
        return batch

    monkeypatch.setattr(qrdqn, "act", lambda *a: steps.append(1) or act(*a))
    monkeypatch.setattr(qrdqn.FrameReplay, "sample", record)
    monkeypatch.setattr(qrdqn, "quantile_loss", lambda *a: used.append(a[1:]) or loss(*a))
    folder = qrdqn.train(make_args(qrdqn, total_timesteps=600, save_model=True, **flags))
    monkeypatch.undo()
    return folder, batches, used


def test_divisor_1_and_noise_0_change_nothing(qrdqn, monkeypatch, tmp_path):
    """Bit for bit the weights of a plain loop over the same batches."""
    folder, batches, _ = sampled_batches(qrdqn, monkeypatch, batch_divisor=1, target_noise_std=0.0)
    assert equal(weights(tmp_path / folder), rebuilt(qrdqn, batches, {}))


def test_batch_divisor_updates_on_disjoint_parts(qrdqn, monkeypatch):
    _, batches, used = sampled_batches(qrdqn, monkeypatch, batch_divisor=4)
    assert len(batches) == 125 and len(used) == 4 * 125
    for i, batch in enumerate(batches.values()):
        parts = [part for part, _ in used[4 * i : 4 * i + 4]]
        assert [len(part.rows) for part in parts] == [2] * 4
        order = np.concatenate([np.flatnonzero(np.arange(8) % 4 == part) for part in range(4)])  # each row once
        for name in ("rows", "obs", "actions", "rewards", "discounts"):
            joined = np.concatenate([np.asarray(getattr(part, name)) for part in parts])
            np.testing.assert_array_equal(joined, np.asarray(getattr(batch, name))[order])


def test_target_noise(qrdqn, monkeypatch):
    """One Gaussian draw for each transition, the same for all its quantiles; a new one at each update."""
    _, batches, used = sampled_batches(qrdqn, monkeypatch, target_noise_std=50.0, batch_size=16)
    noise = []
    for batch, (part, targets) in zip(batches.values(), used, strict=True):
        noise.append((part.rewards - batch.rewards).numpy())
        assert (part.discounts == batch.discounts).all()
        terminal = (batch.discounts == 0).numpy()
        expected = np.tile(part.rewards.numpy()[terminal, None], 200)
        np.testing.assert_allclose(targets.numpy()[terminal], expected, atol=1e-4)
    noise = np.concatenate(noise)
    assert len(noise) == 2_000 and len(set(noise.tolist())) > 1_990
    assert abs(noise.mean()) < 5 * 50 / np.sqrt(2_000) and noise.std() == pytest.approx(50, rel=0.08)


@pytest.mark.parametrize("switches", range(16), ids=lambda n: f"{n:04b}")
def test_every_rainbow_learns(rainbow, switches):
    """All combinations of distributional, noisy, dueling and double train, with finite losses and diagnostics."""
    names = ["distributional", "noisy", "dueling", "double"]
    flags = {name: bool(switches >> i & 1) for i, name in enumerate(names)}
    folder = rainbow.train(make_args(rainbow, diagnostics_frequency=100, eval_episodes=1, **flags))
    found = scalars(folder)
    assert all(np.isfinite([value for _, value in series]).all() for series in found.values())


def test_noise_of_each_pass(rainbow, monkeypatch):
    """Target and double-Q choice share a draw, the loss has its own, every action a fresh one; evaluation has none."""
    seen = []
    forward = rainbow.NoisyLinear.forward

    def record(self, x):
        seen.append((id(self), self.training, x.shape[0], tuple(self.noise[:4].tolist())))
        return forward(self, x)

    monkeypatch.setattr(rainbow.NoisyLinear, "forward", record)
    flags = {"noisy": True, "double": True, "start_e": 0.0, "end_e": 0.0, "train_frequency": 1, "eval_episodes": 1}
    rainbow.train(make_args(rainbow, total_timesteps=120, diagnostics_frequency=0, **flags))
    acting = [noise for _, training, rows, noise in seen if training and rows == 1]
    assert len(set(acting)) == len(acting) == 2 * 120  # two noisy layers, a draw for each action
    learning = [(layer, noise) for layer, training, rows, noise in seen if training and rows == 8]
    assert len(learning) == 20 * 3 * 2  # updates, passes, layers
    for i in range(0, len(learning), 6):
        target, choice, loss = learning[i : i + 2], learning[i + 2 : i + 4], learning[i + 4 : i + 6]
        assert [noise for _, noise in target] == [noise for _, noise in choice]  # shared by two networks
        assert {layer for layer, _ in choice} == {layer for layer, _ in loss} != {layer for layer, _ in target}
        assert not {noise for _, noise in target} & {noise for _, noise in loss}
    assert any(not training for _, training, _, _ in seen)  # evaluation
