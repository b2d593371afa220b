"""Whole training runs, at the smallest size that still proves the point."""

import copy
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ONLINE, ROOT, make_args, make_network, name_of, optimizer_of, scalars, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PREDICTING = ["spr", "sr_spr", "bbf"]  # their own latents
AVERAGING = ["sr_spr", "bbf"]  # their target network is a moving average, which acts
WEIGHTED = ["rainbow", "der", *PREDICTING]  # their losses, by the priorities
PRIORITIZED = [*WEIGHTED, "qrdqn"]  # and by the study's protocol without weights


class Run(NamedTuple):
    """What a run did, and what it left."""

    actions: list[int]
    losses: list[float]
    weights: dict[str, torch.Tensor]
    scalars: dict[str, list[tuple[int, float]]]


def known(agent, flags):
    """Those that the agent has."""
    return {name: value for name, value in flags.items() if hasattr(agent.Args, name)}


def small(agent, **flags):
    fewer = {"n_tau": 8, "n_target_tau": 8, "n_policy_tau": 8}  # faster
    return make_args(agent, **(known(agent, fewer) | flags))


def run(agent, **flags) -> Run:
    actions = []
    losses = []
    real_act = agent.act
    real_backward = torch.Tensor.backward

    def act(*args):
        chosen = real_act(*args)
        actions.append(int(chosen[0]))
        return chosen

    def backward(loss):
        losses.append(loss.item())
        real_backward(loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "act", act)
        patch.setattr(torch.Tensor, "backward", backward)
        folder = agent.train(small(agent, save_model=True, **flags))
    return Run(actions, losses, weights(folder), scalars(folder))


@functools.cache
def usual_run(agent) -> Run:
    """A run with which others are compared."""
    return run(agent, total_timesteps=160)


def updates_per_step(agent):
    return 2 if name_of(agent) == "spr" else 1


def steps_per_update(agent):
    return 1 if name_of(agent) in AVERAGING else 4


def loss_name(agent):
    """The agent's function from a batch to its losses."""
    (name,) = [name for name in vars(agent) if name.endswith("_loss") and name != "prediction_loss"]
    return name


def equal(left, right):
    return all(torch.equal(one, other) for one, other in zip(left.values(), right.values(), strict=True))


# ---- a run as a whole
def test_the_same_seed_gives_the_same_run(agent):
    one = usual_run(agent)
    again = run(agent, total_timesteps=160)
    other = run(agent, total_timesteps=160, seed=2)
    assert len(one.actions) == 160
    assert len(one.losses) == 60 // steps_per_update(agent) * updates_per_step(agent)  # 160 - 100 steps
    assert (one.actions, one.losses) == (again.actions, again.losses)
    assert equal(one.weights, again.weights)
    assert one.actions != other.actions
    assert one.losses != other.losses
    assert not equal(one.weights, other.weights)


def test_evaluation_does_not_disturb_training(agent):
    plain = usual_run(agent)
    evaluated = run(agent, total_timesteps=160, eval_frequency=40, eval_episodes=2)
    assert [step for step, _ in evaluated.scalars["eval/episodic_return"]] == [40, 80, 120, 160]
    assert plain.losses == evaluated.losses
    assert equal(plain.weights, evaluated.weights)
    for tag in ("charts/episodic_return", "charts/episodic_length"):
        assert plain.scalars[tag] == evaluated.scalars[tag]


def test_the_smallest_settings_that_are_accepted(agent):
    """A ring of 14 rows, games of a single step, an update at each, of one transition."""
    flags = {"total_timesteps": 50, "batch_size": 1}
    flags.update(n_step=1, learning_starts=1, max_episode_steps=1, buffer_size=14)
    flags.update(exploration_steps=0, checkpoint_frequency=0, diagnostics_frequency=0, seed=0)
    own = {"n_quantiles": 1, "n_tau": 1, "n_target_tau": 1, "n_policy_tau": 1, "n_atoms": 2, "spr_steps": 1}
    own |= {"train_frequency": 1, "target_network_frequency": 1, "initial_n_step": 1}
    found = run(agent, **flags, **known(agent, own))
    assert len(found.losses) == 49 * updates_per_step(agent)
    assert np.isfinite(found.losses).all()
    assert [step for step, _ in found.scalars["charts/episodic_return"]] == list(range(1, 51))


# ---- updates
def test_an_update_weighs_its_batch_and_sets_its_priorities(agent, monkeypatch):
    """The loss is the mean of l p^-1/2 / max p^-1/2, or of l alone; then the priority p of a row is the root of its l.

    In spr and those after it a prediction's loss is in l, five times, but not in p.
    """
    updates = []
    real_loss = getattr(agent, loss_name(agent))
    real_predict = getattr(agent, "prediction_loss", None)
    real_sample = agent.FrameReplay.sample
    real_backward = torch.Tensor.backward

    def sample(replay, batch_size, *schedule):
        if updates and name_of(agent) in PRIORITIZED:
            last = updates[-1]
            roots = dict(zip(last.rows, np.sqrt(last.losses), strict=True))  # of a row that is in it twice, the last
            assert replay.priorities.flat[list(roots)] == pytest.approx(list(roots.values()), rel=1e-5)
        batch = real_sample(replay, batch_size, *schedule)
        update = SimpleNamespace(rows=batch.rows.tolist(), weights=np.ones(batch_size), predictions=0)
        if name_of(agent) in WEIGHTED:
            update.weights = replay.priorities.flat[batch.rows] ** -0.5
        updates.append(update)
        return batch

    def loss(*args):
        losses, q_values = real_loss(*args)
        updates[-1].losses = losses.detach().numpy().copy()
        return losses, q_values

    def predict(*args):
        losses = real_predict(*args)
        updates[-1].predictions = losses.detach().numpy().copy()
        return losses

    def backward(mean):
        updates[-1].mean = mean.item()
        real_backward(mean)

    monkeypatch.setattr(agent, loss_name(agent), loss)
    monkeypatch.setattr(agent.FrameReplay, "sample", sample)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    if name_of(agent) in PREDICTING:
        monkeypatch.setattr(agent, "prediction_loss", predict)
    agent.train(small(agent, total_timesteps=220))

    assert len(updates) == 120 // steps_per_update(agent) * updates_per_step(agent)
    for update in updates:
        totals = update.losses + 5 * update.predictions
        assert update.mean == pytest.approx(np.mean(update.weights / update.weights.max() * totals), rel=1e-4)
    smallest = min((update.weights / update.weights.max()).min() for update in updates)
    assert (smallest < 0.9) == (name_of(agent) in WEIGHTED)
    if name_of(agent) == "spr":
        assert all(update.predictions.max() > 0 for update in updates)


def test_the_loss_falls_on_a_fixed_batch(agent, monkeypatch):
    """Learning does what it is for: on one batch, a hundred updates take the loss to a tenth."""
    batches = []
    real_sample = agent.FrameReplay.sample

    def sample(replay, batch_size, *schedule):
        batch = real_sample(replay, batch_size, *schedule)
        pays = 0.8 * batch.actions - 0.8  # on C51's atoms: no cross-entropy is below the entropy of its target
        batches.append(batch._replace(rewards=pays, discounts=torch.zeros(batch_size)))
        return batches[0]

    monkeypatch.setattr(agent.FrameReplay, "sample", sample)
    own = {
        "noisy_sigma": 0.0,
        "image_pad": 0,
        "intensity": 0.0,
        "spr_weight": 0.0,
        "updates_per_step": 1,
        "train_frequency": 1,
    }
    flags = {"total_timesteps": 200, "learning_rate": 1e-3}
    losses = run(agent, **flags, **known(agent, own)).losses
    assert len(losses) == 100
    assert losses[-1] < 0.1 * losses[0]


# ---- the loop
class Scripted(gym.Env):
    """Frames tell the game and the step; games of 5, 9, ... steps end by termination, every third by truncation."""

    observation_space = gym.spaces.Box(0, 1, (10, 10, 4), bool)
    action_space = gym.spaces.Discrete(3)
    game = SimpleNamespace(last_action=0)
    episode = -1

    def frame(self):
        frame = np.zeros((10, 10, 4), bool)
        frame.flat[[self.episode, 200 + self.t]] = True
        return frame

    def reset(self, seed=None, options=None):
        self.episode += 1
        self.t = 0
        return self.frame(), {}

    def step(self, action):
        self.t += 1
        done = self.t == 5 + 4 * (self.episode % 4)
        truncated = self.episode % 3 == 0
        return self.frame(), float(self.t), done and not truncated, done and truncated, {}


def test_the_loop_stores_every_step_once_and_no_autoreset_step(agent, monkeypatch):
    """gymnasium's vector environments would spend a step on the reset; it must never enter the replay."""
    stored = []
    actions = []
    real_add = agent.FrameReplay.add
    real_act = agent.act

    def add(replay, *step):
        stored.append([copy.deepcopy(values[0]) for values in step])
        real_add(replay, *step)

    def act(*args):
        actions.append(real_act(*args)[0])
        return np.array(actions[-1:])

    monkeypatch.setattr(agent, "make_env", lambda args, **overrides: gym.vector.SyncVectorEnv([Scripted]))
    monkeypatch.setattr(agent.FrameReplay, "add", add)
    monkeypatch.setattr(agent, "act", act)
    folder = agent.train(small(agent, total_timesteps=200))

    game = 0
    t = 0
    lengths = []
    assert len(stored) == 200
    for action, step in zip(actions, stored, strict=True):
        obs, next_obs, stored_action, reward, terminated, truncated = step
        assert np.flatnonzero(obs).tolist() == [game, 200 + t]
        assert np.flatnonzero(next_obs).tolist() == [game, 200 + t + 1]
        assert stored_action == action
        assert reward == 1  # clipped: the game pays 1, 2, 3, ...
        t += 1
        done = t == 5 + 4 * (game % 4)
        assert terminated == (done and game % 3 > 0)
        assert truncated == (done and game % 3 == 0)
        if done:
            lengths.append(t)
            game += 1
            t = 0

    logged = scalars(folder)
    assert [value for _, value in logged["charts/episodic_length"]] == lengths
    assert [value for _, value in logged["charts/episodic_return"]] == [n * (n + 1) / 2 for n in lengths]  # unclipped
    assert [step for step, _ in logged["charts/episodic_return"]] == list(itertools.accumulate(lengths))


def test_schedules(agent, monkeypatch):
    """Epsilon, the steps with updates, and the steps at which the target is copied."""
    epsilons = []  # one a step
    updates = []
    copies = []
    real_act = agent.act
    real_load = torch.nn.Module.load_state_dict

    def act(*args):
        epsilons.append(args[2])
        return real_act(*args)

    def load(network, state):
        copies.append(len(epsilons))
        return real_load(network, state)

    monkeypatch.setattr(agent, "act", act)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", load)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: updates.append(len(epsilons)))
    monkeypatch.setattr(optimizer_of(agent), "step", lambda optimizer: None)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.zeros(()))
    flags = {"exploration_steps": 150, "start_e": 1.0, "end_e": 0.2, "diagnostics_frequency": 0}
    agent.train(small(agent, total_timesteps=300, **flags))
    assert epsilons[:100] == [1.0] * 100
    assert epsilons[100:250] == pytest.approx([1 - 0.8 * step / 150 for step in range(1, 151)])
    assert epsilons[250:] == pytest.approx([0.2] * 50)
    every = steps_per_update(agent)
    assert updates == [step for step in range(100 + every, 301, every) for _ in range(updates_per_step(agent))]
    assert copies == ([] if name_of(agent) in AVERAGING else [150, 200, 250, 300])


# ---- the folder
def test_the_run_folder(agent, monkeypatch):
    """Its files and all that they tell; 2,000 steps, of which the second thousand is five times as fast."""
    clock = [0.0]
    steps = itertools.count(1)
    real_act = agent.act

    def act(*args):
        clock[0] += 0.01 if next(steps) <= 1_000 else 0.002
        return real_act(*args)

    monkeypatch.setattr(agent, "act", act)
    monkeypatch.setattr(agent, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    flags = {"total_timesteps": 2_000, "learning_starts": 1_980, "start_e": 0.8, "diagnostics_frequency": 2_000}
    args = small(agent, **flags, eval_episodes=2, save_model=True)
    folder = agent.train(args)
    assert folder.parent == Path("runs")
    assert re.fullmatch(rf"MinAtar-Breakout-v1__{name_of(agent)}__1__\d{{8}}-\d{{6}}-\d{{6}}", folder.name)
    files = {path.name for path in folder.iterdir() if not path.name.startswith("events.out.")}
    assert files == {"args.json", "checkpoint.pt", "model.pt", "finished"}

    record = json.loads((folder / "args.json").read_text())
    assert record.keys() == {"agent", "args", "packages", "device", "git_commit", "frames_per_step"}
    assert record["agent"] == name_of(agent)
    assert record["args"] == asdict(args)
    release = torch.__version__.partition("+")[0]  # the installed package's name may lack the build: +cu130
    assert record["packages"]["torch"] in (release, torch.__version__)
    assert record["device"] == "cpu"
    assert record["frames_per_step"] == 1
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert record["git_commit"] == (head or None)

    acting = "target_network" if name_of(agent) in AVERAGING else "q_network"
    model = torch.load(folder / "model.pt", weights_only=True)
    assert model.keys() == {"args", "weights"}
    assert model["args"] == asdict(args)
    assert equal(model["weights"], torch.load(folder / "checkpoint.pt", weights_only=True)[acting])

    logged = scalars(folder)
    tags = {"charts/episodic_return", "charts/episodic_length", "charts/epsilon", "charts/SPS"}
    tags |= {"losses/td_loss", "losses/q_values", "eval/episodic_return"}
    if name_of(agent) in PREDICTING:
        tags.add("losses/spr_loss")
    if name_of(agent) == "bbf":
        tags.add("charts/n_step")
        assert logged["charts/n_step"] == [(2_000, 5)]  # 10 * 0.3^(19/30) = 4.7: the 20th update, of 30 that fall to 3
    assert {tag for tag in logged if not tag.startswith("diagnostics/")} == tags
    assert len(logged) == len(tags) + 5
    assert logged["charts/SPS"] == [(1_000, pytest.approx(100)), (2_000, pytest.approx(500))]
    assert [step for step, _ in logged["charts/epsilon"]] == [1_000, 2_000]
    assert logged["charts/epsilon"][0][1] == pytest.approx(0.8)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert "hyperparameters/text_summary" in events.Tags()["tensors"]


def test_weights_are_saved_before_an_evaluation_that_fails(dqn, monkeypatch):
    """A run of days must not lose its weights to a game."""
    real_act = dqn.act

    def act(network, obs, epsilon, *others):
        if epsilon == 0.005:
            raise OSError("no such game")
        return real_act(network, obs, epsilon, *others)

    monkeypatch.setattr(dqn, "act", act)
    with pytest.raises(OSError, match="no such game"):
        dqn.train(small(dqn, save_model=True, eval_episodes=1, eval_frequency=50, eval_epsilon=0.005))
    assert len(list(Path("runs").glob("*/model.pt"))) == 1


@pytest.mark.long
@pytest.mark.parametrize("path", ONLINE, ids=lambda path: path.stem)
def test_a_file_copied_alone_trains_on_pong(path, tmp_path):
    """The file imports nothing of this repository: in an empty folder it learns from real Pong."""
    shutil.copy(path, tmp_path)
    command = [sys.executable, "-I", path.name, "--env-id", "ALE/Pong-v5", "--total-timesteps", "300"]
    command += ["--learning-starts", "280", "--buffer-size", "1000", "--eval-episodes", "0"]
    command += ["--start-e", "1", "--end-e", "1", "--no-cuda"]
    if path.stem in AVERAGING:
        command += ["--replay-ratio", "1", "--reset-interval", "140"]
    else:
        command += ["--train-frequency", "4"]
    if path.stem == "bbf":
        command += ["--width-scale", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, *_, last = done.stdout.splitlines()
    (folder,) = (tmp_path / "runs").iterdir()
    assert first == f"run folder: runs/{folder.name} (cpu)"
    assert re.fullmatch(r"100% 300/300 \[.* steps/s\]", last)  # no bar: the output is no terminal
    record = json.loads((folder / "args.json").read_text())
    assert record["frames_per_step"] == 4
    assert record["git_commit"] is None
    assert (folder / "finished").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_training_on_cuda(agent):
    folder = agent.train(small(agent, cuda=True, total_timesteps=2_000, eval_episodes=1))
    assert np.isfinite([value for _, value in scalars(folder)["losses/td_loss"]]).all()
    assert json.loads((folder / "args.json").read_text())["device"] != "cpu"


# ---- qrdqn's divisor and noise
def sampled_batches(qrdqn, **flags):
    """Train; return {step: batch as sampled}, and the parts that the loss was given with their targets."""
    batches = {}
    parts = []
    epsilons = []  # one a step
    real_act = qrdqn.act
    real_sample = qrdqn.FrameReplay.sample
    real_loss = qrdqn.quantile_loss

    def act(*args):
        epsilons.append(args[2])
        return real_act(*args)

    def sample(replay, batch_size, *schedule):
        batch = real_sample(replay, batch_size, *schedule)
        batches[len(epsilons)] = copy.deepcopy(batch)
        return batch

    def loss(network, part, targets):
        parts.append((part, targets))
        return real_loss(network, part, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qrdqn, "act", act)
        patch.setattr(qrdqn.FrameReplay, "sample", sample)
        patch.setattr(qrdqn, "quantile_loss", loss)
        qrdqn.train(small(qrdqn, **flags))
    return batches, parts


def test_divisor_1_and_noise_0_change_nothing(qrdqn):
    """Bit for bit the batches that are sampled, one update for each."""
    batches, parts = sampled_batches(qrdqn, batch_divisor=1, target_noise_std=0.0)
    assert list(batches) == list(range(104, 301, 4))
    for batch, (part, _) in zip(batches.values(), parts, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(batch, part, strict=True))


def test_batch_divisor_updates_on_disjoint_parts(qrdqn):
    batches, parts = sampled_batches(qrdqn, batch_divisor=4)
    assert len(batches) == 50
    assert len(parts) == 4 * 50
    for i, batch in enumerate(batches.values()):
        dealt = [part for part, _ in parts[4 * i : 4 * i + 4]]
        assert [len(part.rows) for part in dealt] == [2] * 4
        for name in batch._fields:
            joined = np.concatenate([np.asarray(getattr(part, name)) for part in dealt])
            order = [0, 4, 1, 5, 2, 6, 3, 7]  # each transition once
            np.testing.assert_array_equal(joined, np.asarray(getattr(batch, name))[order])


def test_target_noise(qrdqn):
    """One Gaussian draw for each transition, the same for all its quantiles; a new one at each update."""
    batches, parts = sampled_batches(qrdqn, target_noise_std=50.0, batch_size=40)
    draws = []
    for batch, (part, targets) in zip(batches.values(), parts, strict=True):
        draws += (part.rewards - batch.rewards).tolist()
        ends = batch.discounts == 0
        assert torch.equal(part.discounts, batch.discounts)
        assert torch.equal(targets[ends], part.rewards[ends, None].expand(-1, 200))
    assert len(draws) == 2_000
    assert len(set(draws)) > 1_990
    assert abs(np.mean(draws)) < 5 * 50 / np.sqrt(2_000)
    assert np.std(draws) == pytest.approx(50, rel=0.08)


# ---- rainbow's switches
SWITCHES = ["prioritized", "distributional", "noisy", "dueling", "double"]


@pytest.mark.parametrize("bits", [f"{number:05b}" for number in range(32)])
def test_every_rainbow_learns(rainbow, bits):
    flags = {name: bit == "1" for name, bit in zip(SWITCHES, bits, strict=True)}
    found = run(rainbow, total_timesteps=140, diagnostics_frequency=140, eval_episodes=1, **flags)
    assert len(found.losses) == 10
    assert np.isfinite(found.losses).all()
    assert len(found.scalars) == 8  # return and length, of training and evaluation, and the diagnostics
    assert np.isfinite([value for series in found.scalars.values() for _, value in series]).all()
    network = make_network(rainbow, (10, 10, 4), 3, **flags)
    assert not any(torch.equal(begun, found.weights[name]) for name, begun in network.state_dict().items())
