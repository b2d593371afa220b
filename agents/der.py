# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "minatar==1.0.15", "stable-baselines3==2.9.2",
#   "tyro==1.0.17", "numpy==2.4.6", "tensorboard==2.21.0", "tqdm==4.70.1", "psutil==7.2.2", "imageio-ffmpeg==0.8.1"]
# ///
"""DER, data-efficient Rainbow (van Hasselt, Hessel and Aslanides, NeurIPS 2019): Rainbow for 100,000 steps of data.

Read after rainbow.py; differs in (1) noisy, dueling, double and C51 always on, the noise in place of epsilon, (2) an
update at every step, 10-step returns, (3) a lost life, which ends the return and the frame stack (class LifeStack).
The benchmark is Atari 100k: no sticky actions, up to 29 no-ops before a game, 100 games of evaluation at the end.
Departs from the paper as Dopamine (Castro et al., 2018) does: the convolutions of DQN with SAME padding and 512 dense
units, 10 steps where the paper has 20, importance weights of exponent 0.5 throughout.

Full scale, 400,000 frames:
  python agents/der.py --env-id ALE/Pong-v5
The 30 million frames of "Small batch deep reinforcement learning" (2023), with a replay of a million (ours):
  python agents/der.py --env-id ALE/Pong-v5 --batch-size 8 --total-timesteps 7500000
A minute on a CPU (the whole MinAtar run has 100000 steps):
  python agents/der.py --env-id MinAtar/Breakout-v1 --total-timesteps 10000 --learning-rate 2.5e-4 --adam-eps 3.125e-4 \
    --v-min -100 --v-max 100
"""

import argparse
import contextlib
import copy
import difflib
import errno
import fcntl
import gzip
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import ale_py
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import tyro
from stable_baselines3.common.buffers import ReplayBuffer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

AGENT = "der"
VERSION = 1  # of the checkpoints' format
PACKAGES = ["torch", "gymnasium", "ale-py", "MinAtar", "stable_baselines3", "numpy"]  # that can change results
LIMITS = {"v_min": (-1e6, 0), "v_max": (1e-3, 1e6), "n_atoms": (2, 1000)}  # smallest, largest
COUNTERS = ["pos", "full", "episode_steps", "max_priority", "number", "start", "rows"]  # of replay and recorder
STOP: list[int] = []  # signals that have asked the run to end


# ---------------------------------------------------------------------------------------------------------- arguments
@dataclass
class RunArgs:
    exp_name: str = AGENT  # name of the experiment, part of the run folder's name
    seed: int = 1  # seed of every random generator
    cuda: bool = True  # use a CUDA device where there is one
    track: bool = False  # mirror the logs to Weights & Biases (pip install wandb; WANDB_PROJECT names the project)
    diagnostics_frequency: int = 10_000  # agent steps between reports on the network, under diagnostics/ (0: none)
    record_dataset: str | None = None  # new folder for the run's steps, as the DQN Replay Dataset has them
    checkpoint_frequency: int = 10_000  # agent steps between checkpoints, for --resume to go on from (0: none at all)
    resume: str | None = None  # run folder to go on with, or auto: the newest unfinished run of these flags, if any
    save_model: bool = False  # keep the weights as model.pt in the run folder, before each evaluation
    eval_episodes: int = 100  # full games in each evaluation (0: no evaluation)
    eval_frequency: int = 0  # agent steps between evaluations during training (0: evaluate only after it)
    eval_epsilon: float = 0.001  # share of random actions in evaluation, 0 to 1
    capture_video: bool = False  # write an MP4 of the first game of each evaluation
    eval_only: bool = False  # play the weights in --checkpoint; of the flags, only this group's are not read from there
    checkpoint: str | None = None  # file that --save-model wrote, to play with --eval-only


@dataclass
class EnvironmentArgs:
    env_id: str = "ALE/Pong-v5"  # game: any ALE/<Game>-v5 or MinAtar/<Game>-v1
    sticky_actions: float = 0.0  # probability that a frame repeats the previous action (ALE; MinAtar has its own 0.1)
    noop_max: int = 30  # random no-op frames at the start of a game, fewer than this; 0 for none (ALE)
    frame_skip: int = 4  # emulator frames per agent step (ALE; MinAtar has 1)
    max_episode_steps: int = 27_000  # agent steps after which a game is truncated
    terminal_on_life_loss: bool = True  # end the return and the frame stack, not the game, at a lost life (ALE)


@dataclass
class TrainingArgs:
    total_timesteps: int = 100_000  # agent steps of training
    learning_rate: float = 1e-4  # Adam's step size
    adam_eps: float = 1.5e-4  # Adam's epsilon, the same for every batch size
    batch_size: int = 32  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept in the replay (never more than the run has)
    gamma: float = 0.99  # discount per agent step
    learning_starts: int = 1_600  # agent steps before the first update
    train_frequency: int = 1  # agent steps between updates
    target_network_frequency: int = 2_000  # agent steps between copies to the target network
    start_e: float = 0.0  # share of random actions until learning starts, 0 to 1
    end_e: float = 0.0  # share of random actions after the decay, 0 to 1
    exploration_steps: int = 250_000  # agent steps of the linear decay of epsilon, once learning has started
    network: Literal["dopamine", "nature", "dopamine-x4", "impala"] = "dopamine"  # convolutions (ALE; MinAtar has one)


@dataclass
class AlgorithmArgs:
    n_step: int = 10  # agent steps of reward in a return before it bootstraps
    prioritized: bool = True  # sample transitions in proportion to their priority
    n_atoms: int = 51  # returns on which the distribution has its mass
    v_min: float = -10.0  # smallest of these returns (discounted sums of clipped rewards)
    v_max: float = 10.0  # largest of these returns
    noisy_sigma: float = 0.1  # initial standard deviation of the weights' noise, times the root of a layer's inputs


@dataclass
class Args(AlgorithmArgs, TrainingArgs, EnvironmentArgs, RunArgs):
    """Every flag, flat: `args.batch_size`."""


def parse_args() -> Args:
    """Read the command line, with a box in --help for each group of flags. --resume FOLDER brings that run's flags."""
    groups = {"run": RunArgs, "environment": EnvironmentArgs, "training": TrainingArgs, "algorithm": AlgorithmArgs}
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--resume", nargs="?")
    resume = first.parse_known_args()[0].resume
    known = read_flags(Path(resume)) if resume and resume != "auto" else {}
    defaults = {}
    for name, group in groups.items():
        defaults[name] = group(**{field.name: known[field.name] for field in fields(group) if field.name in known})
    kind = make_dataclass("Groups", groups.items())
    parsed = tyro.cli(tyro.conf.OmitArgPrefixes[kind], description=__doc__, default=kind(**defaults))
    return Args(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def fail(message: str) -> NoReturn:
    """Answer wrong input: one sentence on stderr, exit status 2."""
    print("error:", *message.splitlines(), file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuse what cannot work before anything is allocated or written. LIMITS has the flags of special range."""
    may_be_zero = ["seed", "eval_episodes", "eval_frequency", "diagnostics_frequency", "noop_max", "exploration_steps"]
    may_be_zero += ["checkpoint_frequency"]
    for name, value in asdict(args).items():
        low, high = LIMITS.get(name, (0, 1) if type(value) is float else (int(name not in may_be_zero), 2**31 - 1))
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} is {value}, and must be from {low} to {high}.")
    if args.n_step > (most := min(args.learning_starts, args.max_episode_steps, args.buffer_size // 2 - 6)):
        fail(f"--n-step {args.n_step}: --learning-starts, --max-episode-steps and --buffer-size allow {most} at most.")
    if Path(args.exp_name).name != args.exp_name:
        fail(f"--exp-name {args.exp_name} cannot be part of a folder's name.")
    if args.resume and (args.eval_only or not args.checkpoint_frequency):
        fail("--resume goes without --eval-only, and needs a --checkpoint-frequency.")
    if args.eval_only != (args.checkpoint is not None) or args.eval_episodes < (args.eval_only or args.capture_video):
        fail("--eval-only goes with --checkpoint FILE, and like --capture-video with at least 1 of --eval-episodes.")
    needed = {"wandb": args.track, "imageio_ffmpeg": args.capture_video, "minatar": "MinAtar/" in args.env_id}
    for package in [name for name, asked in needed.items() if asked and not importlib.util.find_spec(name)]:
        fail(f"these flags need the package {package}, which is not installed: pip install {package}")


# -------------------------------------------------------------------------------------------------------- environment
def make_env(args: Args, **overrides) -> gym.vector.VectorEnv:
    """Make a vector of one game: observations (1, 4, 84, 84) uint8 on ALE, (1, channels, 10, 10) bool on MinAtar.

    Rewards are the game's own. A stack has zeros before an episode's first frame. `overrides` are keywords for ALE.
    """
    gym.register_envs(ale_py)
    if importlib.util.find_spec("minatar") and "MinAtar/Breakout-v1" not in gym.registry:
        importlib.import_module("minatar.gym").register_envs()
    games = {name.split("/")[1].lower(): name for name in gym.registry if re.match("ALE/.*-v5|MinAtar/.*-v1", name)}
    if args.env_id not in games.values():
        near = difflib.get_close_matches(args.env_id.split("/")[-1].lower(), games, cutoff=0.4) or ["pong-v5"]
        fail(f"{args.env_id!r} is no ALE or MinAtar game of discrete actions: try {' or '.join(map(games.get, near))}.")
    if args.env_id.startswith("MinAtar/"):
        rules = {"max_episode_steps": args.max_episode_steps, "sticky_action_prob": 0.1, "difficulty_ramping": True}
        env = gym.make(args.env_id, disable_env_checker=True, render_mode="rgb_array", **rules)
        space = gym.spaces.Box(0, 1, np.roll(env.observation_space.shape, 1), bool)  # channels first
        env = gym.wrappers.TransformObservation(env, lambda obs: obs.transpose(2, 0, 1), space)
        return gym.vector.SyncVectorEnv([lambda: env])
    frames = min(args.frame_skip * args.max_episode_steps, 2**31 - 1)
    length = {"frameskip": args.frame_skip, "max_num_frames_per_episode": frames, "noop_max": args.noop_max}
    picture = {"maxpool": True, "grayscale": True, "img_height": 84, "img_width": 84, "stack_num": 4}
    lives = {"episodic_life": False, "life_loss_info": False, "use_fire_reset": False, "reward_clipping": False}
    actions = {"full_action_space": False, "continuous": False, "repeat_action_probability": args.sticky_actions}
    kwargs = {"num_envs": 1, "num_threads": 1, **length, **picture, **lives, **actions, **overrides}
    try:
        return gym.make_vec(args.env_id, vectorization_mode="vector_entry_point", **kwargs)
    except (gym.error.Error, OSError, AssertionError, RuntimeError) as error:
        fail(f"the game {args.env_id} is not installed or could not be started: {' '.join(str(error).split())}")


def reset(envs: gym.vector.VectorEnv, seed: int, stream: int, game: int) -> np.ndarray:
    """Start the game that seed, stream (0: training) and number determine; return its first observation."""
    if isinstance(envs, gym.vector.SyncVectorEnv):
        envs.envs[0].unwrapped.game.last_action = 0  # MinAtar's sticky action would outlive the game before
    return envs.reset(seed=int(np.random.SeedSequence([seed, stream, game]).generate_state(1)[0] >> 1))[0]  # int32


class LifeStack(gym.vector.VectorWrapper):
    """Stack the last 4 frames of make_env(args, stack_num=1), with zeros for those before the life's first."""

    def __init__(self, envs: gym.vector.VectorEnv):
        super().__init__(envs)
        self.single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.frames, self.lives = np.zeros((1, 4, 84, 84), np.uint8), np.zeros(1, int)

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        obs, infos = self.env.reset(**kwargs)
        self.frames, self.lives = np.pad(obs, [(0, 0), (3, 0), (0, 0), (0, 0)]), infos["lives"]
        return self.frames, infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        obs, *others, infos = self.env.step(actions)
        infos["life_lost"] = infos["lives"] < self.lives
        older = self.frames[:, 1:] * ~infos["life_lost"][:, None, None, None]
        self.frames, self.lives = np.concatenate([older, obs], axis=1), infos["lives"]
        return self.frames, *others, infos


def make_life_env(args: Args) -> gym.vector.VectorEnv:
    """Make the game with, where the flag and the family say so, a LifeStack."""
    lives = args.terminal_on_life_loss and args.env_id.startswith("ALE/")
    return LifeStack(make_env(args, stack_num=1)) if lives else make_env(args)


# ------------------------------------------------------------------------------------------------------------- replay
class Batch(NamedTuple):
    obs: torch.Tensor  # (batch, channels, height, width)
    actions: torch.Tensor  # (batch,) int64
    next_obs: torch.Tensor  # (batch, channels, height, width) n steps on; zeros after a termination
    rewards: torch.Tensor  # (batch,) discounted sum of the rewards of n steps, or fewer before a termination
    discounts: torch.Tensor  # (batch,) gamma**n; 0 after a termination
    weights: torch.Tensor  # (batch,) importance weights; all 1 without priorities
    rows: np.ndarray  # (batch,) in the replay


class FrameReplay(ReplayBuffer):
    """SB3's replay with each frame stored once; stacks and n-step returns are built when sampling.

    A row holds s_t's newest frame, a_t, r_t and whether s_{t+1} is terminal; s_{t+1}'s newest frame goes to the next
    row, where the next step finds it, and stays after a truncation. A row has a priority (is sampled) once its n steps
    are complete or the episode terminated in them, never across a truncation, until its frames are overwritten.
    """

    def __init__(self, obs_space: gym.spaces.Box, num_actions: int, args: Args, device, rng: np.random.Generator):
        self.stack = 1 if obs_space.dtype == bool else obs_space.shape[0]  # MinAtar's channels are one frame
        frame = gym.spaces.Box(0, 1, (obs_space.shape[0] // self.stack, *obs_space.shape[1:]), obs_space.dtype)
        row_bytes = math.prod(frame.shape) * frame.dtype.itemsize + 24  # 22 are in use
        rows = min(args.buffer_size, args.total_timesteps + args.total_timesteps // args.max_episode_steps + 6)
        gigabytes, free = rows * row_bytes / 1e9, psutil.virtual_memory().available / 1e9
        if gigabytes > 0.9 * free:
            most = f"lower --buffer-size to {int(0.9e9 * free / row_bytes):,}."
            fail(f"the replay takes {gigabytes:.1f} GB and {free:.1f} GB of memory are free: {most}")
        super().__init__(rows, frame, gym.spaces.Discrete(num_actions), device, 1, True, False)
        self.actions, self.rewards = np.zeros(rows, np.uint8), np.zeros(rows, np.float32)
        self.dones, self.age = np.zeros(rows, bool), np.zeros(rows, np.int32)  # terminated; steps since the first
        self.episode_steps, self.max_priority, self.width = 0, 1.0, math.ceil(math.sqrt(rows))
        self.priorities, self.sums = np.zeros((self.width, self.width)), np.zeros(self.width)  # a tree of two levels
        self.prioritized, self.n_step, self.gamma, self.rng = args.prioritized, args.n_step, args.gamma, rng

    def add(self, obs, next_obs, actions, rewards, terminations, truncations) -> None:
        """Store a step; every argument has a leading axis of one environment."""
        row, channels = self.pos, self.observations.shape[2]
        self.set_priorities((row + np.arange(self.stack + 1)) % self.buffer_size, 0)  # their stacks lose a frame
        self.observations[row, 0] = obs[0, -channels:]
        self.observations[(row + 1) % self.buffer_size, 0] = next_obs[0, -channels:]
        self.actions[row], self.rewards[row], self.dones[row] = actions[0], rewards[0], terminations[0]
        self.age[row], self.age[(row + 1) % self.buffer_size] = self.episode_steps, -1  # -1: no step
        complete = np.arange(0 if terminations[0] else self.n_step - 1, min(self.n_step, self.episode_steps + 1))
        self.set_priorities((row - complete) % self.buffer_size, self.max_priority)  # whose windows this step completes
        self.episode_steps = 0 if terminations[0] or truncations[0] else self.episode_steps + 1
        end = row + (2 if truncations[0] and not terminations[0] else 1)
        self.full, self.pos = self.full or end >= self.buffer_size, end % self.buffer_size

    def set_priorities(self, rows: np.ndarray, priorities: np.ndarray | float) -> None:
        """Set the priorities of `rows` (k,), and their sums: 0 is never sampled; without --prioritized others are 1."""
        self.priorities.flat[rows] = priorities
        self.sums[rows // self.width] = self.priorities[rows // self.width].sum(axis=1)

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions with replacement: in proportion to their priorities, stratified, or uniformly."""
        shares = self.rng.random(batch_size)
        rows = self.find((np.arange(batch_size) + shares) / batch_size if self.prioritized else shares)
        weights = 1 / np.sqrt(self.priorities.flat[rows] + 1e-10)
        return self._get_samples(rows, weights / weights.max())

    def find(self, shares: np.ndarray) -> np.ndarray:
        """Return the rows (k,) in whose slices of the priorities' total the `shares` (k,) of it, from 0 to 1, lie."""
        ends = self.sums.cumsum()
        points = shares * ends[-1]
        blocks = np.minimum(np.searchsorted(ends, points, "right"), np.searchsorted(ends, ends[-1]))
        inner = self.priorities[blocks].cumsum(axis=1)  # (k, width)
        rest = (points - np.append(0, ends)[blocks])[:, None]
        places = np.minimum((inner <= rest).sum(axis=1), (inner < inner[:, -1:]).sum(axis=1))
        return blocks * self.width + places  # both minima keep rounding from leading past the last priority

    def _get_samples(self, rows: np.ndarray, weights: np.ndarray) -> Batch:
        window = (rows[:, None] + np.arange(self.n_step)) % self.buffer_size  # (batch, n)
        alive = np.cumprod(np.insert(~self.dones[window], 0, True, axis=1), axis=1)  # (batch, n + 1), before each step
        rewards = (self.rewards[window] * alive[:, :-1] * self.gamma ** np.arange(self.n_step)).sum(axis=1)
        next_obs = self._get_stacks(rows + self.n_step, np.where(alive[:, -1], self.age[rows] + self.n_step, -1))
        obs, next_obs = [self.to_torch(x, False) for x in (self._get_stacks(rows, self.age[rows]), next_obs)]
        floats = [self.to_torch(x).float() for x in (rewards, self.gamma**self.n_step * alive[:, -1], weights)]
        return Batch(obs, self.to_torch(self.actions[rows]).long(), next_obs, *floats, rows)

    def _get_stacks(self, rows: np.ndarray, age: np.ndarray) -> np.ndarray:
        """Gather the observations at `rows` (batch,), with zeros for the frames that are older than the episode."""
        back = np.arange(self.stack)[::-1]  # oldest first
        frames = self.observations[(rows[:, None] - back) % self.buffer_size, 0]  # (batch, stack, channels, h, w)
        frames[back > age[:, None]] = 0
        return frames.reshape(len(rows), -1, *frames.shape[3:])

    def update_priorities(self, rows: np.ndarray, losses: torch.Tensor) -> None:
        """Set the priorities of the sampled `rows` (batch,) to sqrt(loss + 1e-10)."""
        priorities = np.sqrt(losses.detach().cpu().numpy() + 1e-10)
        self.set_priorities(rows, priorities)
        self.max_priority = max(self.max_priority, float(priorities.max()))

    def probe(self, rng: np.random.Generator) -> torch.Tensor:
        """Draw 256 observations that can be sampled, with replacement, uniformly whatever their priorities."""
        rows = rng.choice(np.flatnonzero(self.priorities), 256)
        return self.to_torch(self._get_stacks(rows, self.age[rows]), False)


class Recorder:
    """Writes a run's steps in the layout of the DQN Replay Dataset (Agarwal et al., 2020), from the replay.

    A checkpoint is six gzipped arrays, four of them with a row for each step: its newest frame, action, clipped reward,
    whether it terminated. Three rows of zeros stand before each episode. There are buffer_size rows, fewer if the run
    is shorter; from add_count (modulo their number) on they are no data.
    """

    def __init__(self, folder: str, replay: FrameReplay, args: Args, resuming: bool):
        self.folder, self.replay, self.number, self.start, self.rows = Path(folder), replay, 0, 0, 0
        self.size = min(args.buffer_size, 4 * args.total_timesteps + 4)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()) and not resuming:
                fail(f"--record-dataset {folder} is not empty: name a new folder.")
        except OSError as error:
            fail(f"--record-dataset {folder} could not be made: {error.strerror}.")

    def count(self) -> None:
        """Make room for a step that is about to be stored: write a checkpoint if it is full."""
        replay, rows = self.replay, 1 if self.replay.episode_steps else 4
        overwriting = (replay.pos - self.start) % replay.buffer_size >= replay.buffer_size - 2
        if self.rows + rows >= self.size or overwriting:  # the dataset's files have no step in their last row
            self.write()
        self.rows += rows

    def write(self, last: bool = False) -> None:
        """Write the steps since the last checkpoint as the next; its files appear once all are whole."""
        replay, size = self.replay, self.rows + 1 if last and self.number == 0 else self.size
        rows = (self.start + np.arange((replay.pos - self.start) % replay.buffer_size)) % replay.buffer_size
        rows = rows[replay.age[rows] >= 0]  # without the frames that follow truncations
        rows = np.insert(rows, np.flatnonzero(replay.age[rows] == 0).repeat(3), -1)
        used, rows = len(rows), np.append(rows, np.full(size - len(rows), -1))
        frames = replay.observations[:, 0, 0] if replay.stack > 1 else replay.observations[:, 0]
        arrays = {"$store$_observation": frames.view(np.uint8), "$store$_action": replay.actions.astype(np.int32)}
        arrays |= {"$store$_reward": replay.rewards, "$store$_terminal": replay.dones.view(np.uint8)}
        facts = {"add_count": self.number * size + used, "invalid_range": (used + np.arange(-1, 4)) % size}
        paths = {name: self.folder / f"{name}_ckpt.{self.number}.gz" for name in [*arrays, *facts]}
        try:
            for name, path in paths.items():
                with gzip.open(path.with_suffix(".tmp"), "wb", compresslevel=1) as file:
                    if name in facts:
                        np.save(file, np.int64(facts[name]))
                        continue
                    header = {"descr": arrays[name].dtype.str, "shape": (size, *arrays[name].shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header | {"fortran_order": False})
                    for part in np.split(rows, range(4_096, size, 4_096)):
                        block = arrays[name][part]
                        block[part < 0] = 0
                        file.write(block.tobytes())
            for path in paths.values():
                path.with_suffix(".tmp").rename(path)
        except OSError as error:  # a run is worth more than its recording
            tqdm.write(f"warning: checkpoint {self.number} of {self.folder} is not written: {error.strerror}")
            for path in paths.values():
                path.with_suffix(".tmp").unlink(missing_ok=True)
        self.number, self.start, self.rows = self.number + 1, replay.pos, 0


# ------------------------------------------------------------------------------------------------------------ network
class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def make_convolutions(obs_shape: tuple[int, ...], network: str) -> tuple[nn.Sequential, int, int]:
    """Return the convolutions, the length of their flattened output, and the width of the dense layer on top."""
    inputs, layers, width = obs_shape[0], [], 512
    if obs_shape[1:] == (10, 10):  # MinAtar: Young and Tian, 2019
        layers, width = [nn.Conv2d(inputs, 16, 3)], 128
    elif network == "impala":  # Espeholt et al., 2018, figure 3: 84 -> 42 -> 21 -> 11
        for channels, padding in [(16, 0), (32, 0), (32, 1)]:  # as SAME pads 84, 42 and 21
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.MaxPool2d(3, 2, padding, ceil_mode=True)]
            convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4)]
            layers += [Residual(nn.ReLU(), convs[i], nn.ReLU(), convs[i + 1]) for i in (0, 2)]
            inputs = channels
    else:
        same, wide = network != "nature", 4 if network == "dopamine-x4" else 1  # 84 -> 21 -> 11 -> 11 or 20 -> 9 -> 7
        layers = [nn.Conv2d(inputs, 32 * wide, 8, 4, padding=2 * same), nn.ReLU()]
        layers += [nn.ZeroPad2d((1, 2, 1, 2) if same else 0), nn.Conv2d(32 * wide, 64 * wide, 4, 2), nn.ReLU()]
        layers += [nn.Conv2d(64 * wide, 64 * wide, 3, padding=1 * same)]
    convolutions = nn.Sequential(*layers, nn.ReLU(), nn.Flatten())
    return convolutions, convolutions(torch.zeros(1, *obs_shape)).shape[1], width


class NoisyLinear(nn.Linear):
    """A linear layer with factorised Gaussian noise on its weights in training: Fortunato et al., 2018, eq. 9 to 11."""

    def __init__(self, fan_in: int, fan_out: int, sigma_0: float):
        super().__init__(fan_in, fan_out)
        self.sigma_weight = nn.Parameter(torch.full((fan_out, fan_in), sigma_0 / fan_in**0.5))
        self.sigma_bias = nn.Parameter(torch.full((fan_out,), sigma_0 / fan_in**0.5))
        self.register_buffer("noise", torch.zeros(fan_in + fan_out), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        noise_in, noise_out = self.noise.split([self.in_features, self.out_features])
        return super().forward(x) + noise_out * nn.functional.linear(noise_in * x, self.sigma_weight, self.sigma_bias)


def draw_noise(rng: np.random.Generator, *networks: nn.Module) -> None:
    """Draw fresh noise for every noisy layer, the same in corresponding layers of the networks."""
    noisy = [[module for module in network.modules() if isinstance(module, NoisyLinear)] for network in networks]
    for layers in zip(*noisy, strict=True):
        noise = torch.from_numpy(rng.standard_normal(len(layers[0].noise), np.float32))
        for layer in layers:
            layer.noise.copy_(noise.sign() * noise.abs().sqrt())


class C51Network(nn.Module):  # output (batch, actions, atoms): logits
    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, args: Args):
        super().__init__()
        self.convolutions, size, width = make_convolutions(obs_shape, args.network)
        self.dense = nn.Sequential(NoisyLinear(size, width, args.noisy_sigma), nn.ReLU())
        self.head = NoisyLinear(width, num_actions * args.n_atoms, args.noisy_sigma)
        self.value = NoisyLinear(width, args.n_atoms, args.noisy_sigma)
        self.register_buffer("support", torch.linspace(args.v_min, args.v_max, args.n_atoms), persistent=False)
        generator = torch.Generator().manual_seed(args.seed)
        for layer in [module for module in self.modules() if isinstance(module, nn.Conv2d | nn.Linear)]:
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
            if isinstance(layer, NoisyLinear):
                for mu in (layer.weight, layer.bias):
                    nn.init.uniform_(mu, -(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        x = obs / 255 if obs.dtype == torch.uint8 else obs.float()  # MinAtar's are 0 and 1
        features = self.dense(self.convolutions(x))
        advantage = self.head(features).unflatten(1, (-1, len(self.support)))
        return self.value(features)[:, None] + advantage - advantage.mean(dim=1, keepdim=True)  # Wang et al., eq. 9

    def mean(self, output: torch.Tensor) -> torch.Tensor:
        """Return the mean of each distribution, (...,) of logits (..., atoms)."""
        return output.softmax(dim=-1) @ self.support

    def q_values(self, obs: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        if self.training:
            draw_noise(rng, self)
        return self.mean(self(obs))  # (batch, actions)


# ------------------------------------------------------------------------------------------ act, the target, the loss
def act(q_network: nn.Module, obs: np.ndarray, epsilon: float, num_actions: int, rng: np.random.Generator, device):
    """Choose an action epsilon-greedily: an array of shape (1,)."""
    if rng.random() < epsilon:
        return rng.integers(num_actions, size=1)
    with torch.inference_mode():
        return q_network.q_values(torch.from_numpy(obs).to(device), rng).argmax(dim=1).cpu().numpy()


def c51_loss(q_network: nn.Module, batch: Batch, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of every transition and Q of the actions, both (batch,)."""
    output = q_network(batch.obs).take_along_dim(batch.actions[:, None, None], 1)[:, 0]  # (batch, atoms)
    return nn.functional.cross_entropy(output, targets, reduction="none"), q_network.mean(output)


@torch.no_grad()
def c51_target(q_network: nn.Module, target_network: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the distribution of r + gamma Z(s', a*) on the support, (batch, atoms)."""
    best = q_network.mean(q_network(batch.next_obs)).argmax(dim=1)  # double Q: van Hasselt et al., 2016
    output = target_network(batch.next_obs).take_along_dim(best[:, None, None], 1)[:, 0]
    atoms = batch.rewards[:, None] + batch.discounts[:, None] * q_network.support
    return project(output.softmax(dim=1), atoms, q_network.support)


def project(probabilities: torch.Tensor, atoms: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Share the probabilities of `atoms`, both (batch, j), among their neighbours in the support (i,): C51's eq. 7."""
    low, high, count = support[0], support[-1], len(support)
    position = (atoms.clamp(low, high) - low) / (high - low) * (count - 1)  # in atoms, from 0 to count - 1
    distance = (position[:, None, :] - torch.arange(count, device=support.device)[:, None]).abs()  # (batch, i, j)
    return ((1 - distance).clamp(min=0) * probabilities[:, None, :]).sum(dim=2)


# ------------------------------------------------------------------------------ diagnostics, evaluation and checkpoints
@torch.no_grad()
def diagnose(q_network: nn.Module, obs: torch.Tensor, updates: list, rng: np.random.Generator) -> dict[str, float]:
    """Measure the `updates` since the last report, (loss, gradient norm), and the network on a probe batch `obs`."""
    probed, outputs = copy.deepcopy(q_network).eval(), {}
    for module in [m for m in probed.modules() if type(m) is nn.ReLU or m in (probed.dense, probed.convolutions)]:
        module.register_forward_hook(lambda module, _, output: outputs.update({module: output}))
    probed.q_values(obs, rng)
    losses, gradient_norms = [torch.stack(series) for series in zip(*updates, strict=True)]
    # srank: Kumar et al., 2021, delta 0.01; dormant neurons or channels: Sokar et al., 2023, definition 3.1, tau 0.025
    singular = torch.linalg.svdvals(outputs[probed.dense].unflatten(0, (len(obs), -1)).mean(dim=1))  # iqn's over tau
    layers = [x.movedim(1, 0).flatten(1).abs().mean(dim=1) for module, x in outputs.items() if type(module) is nn.ReLU]
    return {
        "diagnostics/loss_variance": losses.var(correction=0).item(),
        "diagnostics/gradient_norm": gradient_norms.mean().item(),
        "diagnostics/representation_norm": outputs[probed.convolutions].norm(dim=1).mean().item(),
        "diagnostics/srank": 1 + (singular.cumsum(0) < 0.99 * singular.sum()).sum().item(),
        "diagnostics/dormant_neurons": torch.cat([x <= 0.025 * x.mean() for x in layers]).float().mean().item(),
    }


def evaluate(envs, q_network: nn.Module, args: Args, device, step: int, video: Path) -> np.ndarray | None:
    """Play games of their own, given the step of the run; return their raw returns (games,), or None if stopped."""
    rng, player = np.random.default_rng([args.seed, 1 + step]), copy.deepcopy(q_network).eval()
    returns, first_game = np.zeros(args.eval_episodes), []
    for episode in range(args.eval_episodes):
        obs, done = reset(envs, args.seed, 1 + step, episode), False
        while not done:
            if STOP:
                return None
            actions = act(player, obs, args.eval_epsilon, envs.single_action_space.n, rng, device)
            obs, rewards, terminations, truncations, _ = envs.step(actions)
            returns[episode], done = returns[episode] + rewards[0], terminations[0] or truncations[0]
            first_game += [actions] if episode == 0 else []
    tqdm.write(f"evaluation at step {step:,}: mean return {returns.mean():.2f} of {returns.tolist()}")
    if args.capture_video:
        film(video, args, 1 + step, first_game)
    return returns


def film(path: Path, args: Args, stream: int, game: list[np.ndarray]) -> None:
    """Play the actions of a game once more, in an emulator that shows itself in colour, and write an MP4."""
    envs = make_env(args, grayscale=False, stack_num=1, img_height=210, img_width=160)
    obs, size = reset(envs, args.seed, stream, 0), (320, 420) if "ALE/" in args.env_id else (160, 160)
    path.parent.mkdir(exist_ok=True)
    mp4 = importlib.import_module("imageio_ffmpeg").write_frames(str(path), size, fps=15, macro_block_size=2)
    try:
        mp4.send(None)
        for actions in game:
            image = obs[0, 0] if "ALE/" in args.env_id else (envs.render()[0] * 255).astype(np.uint8)
            mp4.send(image.repeat(size[0] // image.shape[1], axis=0).repeat(size[0] // image.shape[1], axis=1))
            obs = envs.step(actions)[0]
        mp4.close()
        tqdm.write(f"video: {path}")
    except OSError as error:  # a run is worth more than its video
        tqdm.write(f"warning: no video {path}: {error.strerror or error}")


def save_model(path: Path, q_network: nn.Module, args: Args, global_step: int) -> None:
    """Write weights and flags aside, sync, then rename: a file under this name is always whole. Warn on a full disk."""
    state = {"agent": AGENT, "args": asdict(args), "global_step": global_step, "weights": q_network.state_dict()}
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch's own word for a full disk is the second
        with contextlib.suppress(OSError):
            aside.unlink()
        tqdm.write(f"warning: the weights of step {global_step:,} are not saved: {getattr(error, 'strerror', error)}")


def load_model(args: Args) -> tuple[Args, int, dict]:
    """Return the flags in --checkpoint (those of the run group stay `args`'), its step and its weights."""
    try:
        state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        if (agent := state["agent"]) != AGENT:
            fail(f"{args.checkpoint} is a checkpoint of {agent}, not of {AGENT}: play it with agents/{agent}.py.")
        mine = {field.name: getattr(args, field.name) for field in fields(RunArgs)}
        return replace(args, **state["args"] | mine), state["global_step"], state["weights"]
    except OSError as error:
        fail(f"{args.checkpoint} could not be read: {error.strerror}.")
    except Exception:  # torch.load has a dozen ways to say that a file is damaged or foreign
        fail(f"{args.checkpoint} is damaged, or no checkpoint of these agents.")


def pack(networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer, objects: dict) -> dict[str, np.ndarray]:
    """Return {owner/name: array} of weights, moments, and the arrays and COUNTERS of `objects`: replay and recorder."""
    states = {owner: network.state_dict() for owner, network in networks.items()}
    states |= {f"optimizer/{number}": moments for number, moments in optimizer.state_dict()["state"].items()}
    arrays = {f"{owner}/{name}": x.cpu().numpy() for owner, state in states.items() for name, x in state.items()}
    for owner, item in objects.items():
        kept = {name: x for name, x in vars(item).items() if isinstance(x, np.ndarray) or name in COUNTERS}
        arrays |= {f"{owner}/{name}": np.asarray(x) for name, x in kept.items()}  # no copies
    return arrays


def unpack(arrays: dict, networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer, objects: dict) -> None:
    """Put all back to where `pack` had it from. Raises ValueError if a name, shape or type is another."""
    expected = pack(networks, optimizer, objects)
    if any(name.startswith("optimizer/") for name in arrays):  # Adam has no moments before its first update
        for number, weights in enumerate(optimizer.param_groups[0]["params"]):
            shapes = {"step": (), "exp_avg": weights.shape, "exp_avg_sq": weights.shape}
            expected |= {f"optimizer/{number}/{name}": np.empty(shape, np.float32) for name, shape in shapes.items()}
    if {n: (x.shape, x.dtype) for n, x in arrays.items()} != {n: (x.shape, x.dtype) for n, x in expected.items()}:
        raise ValueError
    states: dict[str, dict] = {}
    for name, array in arrays.items():
        owner, _, name = name.rpartition("/")
        states.setdefault(owner, {})[name] = array
    for owner, network in networks.items():
        network.load_state_dict({name: torch.from_numpy(array) for name, array in states[owner].items()})
    moments = {owner: states[owner] for owner in states if owner.startswith("optimizer/")}
    moments = {int(o[10:]): {name: torch.from_numpy(x) for name, x in state.items()} for o, state in moments.items()}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for owner, item in objects.items():
        for name, array in states[owner].items():
            setattr(item, name, array if array.shape else array.item())


def save_checkpoint(path: Path, arrays: dict[str, np.ndarray], facts: dict) -> bool:
    """Write a checkpoint aside, sync it, read it back, and only then put it in the place of the one before.

    It is a .npz file: arrays, each written piece by piece, without a copy, and with a checksum; one is `facts` as JSON.
    Return whether that went well: where the disk is full the one before stands, and the run goes on.
    """
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        with zipfile.ZipFile(aside) as written:
            if damaged := written.testzip():
                raise OSError(f"{damaged} reads back differently")
        os.replace(aside, path)
        return True
    except (OSError, zipfile.BadZipFile) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        reason = getattr(error, "strerror", None) or error
        tqdm.write(f"warning: no checkpoint of step {facts['global_step']:,} ({reason}): the one before stands")
        return False


def load_checkpoint(path: Path, args: Args, whole: bool = True) -> tuple[dict[str, np.ndarray], dict]:
    """Return the arrays (none if not `whole`) and the facts of a checkpoint; refuse one that is damaged or foreign."""
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            if facts["version"] > VERSION:
                fail(f"{path} has a newer format, {facts['version']}: go on with the {AGENT}.py that made it.")
            if facts["agent"] != AGENT:
                fail(f"{path} is a checkpoint of {facts['agent']}, not of {AGENT}.")
            kinds = {"version": int, "args": dict, "global_step": int, "pending": bool, "logged": dict}
            if any(type(facts[name]) is not kind for name, kind in kinds.items()):
                raise TypeError
            if other := differences(facts["args"], asdict(args)):
                fail(f"{path.parent} was run with {', '.join(other)}: give the same flags, or none but --resume.")
            if not 0 <= facts["global_step"] <= args.total_timesteps:
                raise ValueError
            return {name: file[name] for name in file.files if whole and name != "facts"}, facts
    except FileNotFoundError:
        fail(f"{path.parent} has no {path.name} to go on from.")
    except MemoryError:
        fail(f"{path} does not fit in memory: nothing was changed.")
    except Exception as error:  # there are a dozen ways to be damaged or foreign
        if isinstance(error, OSError) and error.strerror:
            fail(f"{path} cannot be read: {error.strerror}.")
        fail(f"{path} is damaged, or no checkpoint of these agents: nothing was changed.")


def log(writer: SummaryWriter, scalars: dict[str, float], step: int, flush: bool = False) -> None:
    """Log `scalars`. Where the disk is full say so; the log goes on in a new file, a minute later or after that."""
    try:
        if time.monotonic() >= getattr(writer, "retry", 0):
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step)
        if flush:
            writer.flush()
    except OSError as error:
        tqdm.write(f"warning: the log has a gap of a minute from step {step:,} on: {error.strerror}")
        writer.file_writer = writer.all_writers = None  # add_scalar makes new ones
        writer.retry = time.monotonic() + 60


def diverged(folder: Path, step: int) -> NoReturn:
    """Stop a run whose loss is no number any more, and say what there is to go back to."""
    kept = "there is no checkpoint"
    with contextlib.suppress(Exception), np.load(folder / "checkpoint.npz", allow_pickle=False) as file:
        kept = f"the last checkpoint is of step {json.loads(file['facts'].tobytes())['global_step']:,}"
    fail(f"the loss is not finite at step {step:,}, and the run in {folder} is stopped; {kept}.")


def differences(recorded: dict, given: dict) -> list[str]:
    """The flags by which two runs differ, with the recorded values; with what a run is resumed is none of them.

    A flag that there was not yet when the run began had its default.
    """
    recorded, words = {field.name: field.default for field in fields(Args)} | recorded, []
    for name in [name for name in recorded if name not in ("resume", "cuda") and recorded[name] != given.get(name)]:
        flag, value = name.replace("_", "-"), recorded[name]
        plain = {True: f"--{flag}", False: f"--no-{flag}", None: f"no --{flag}"}
        words.append(plain[value] if value is None or type(value) is bool else f"--{flag} {value}")
    return words


# ------------------------------------------------------------------------------------------------------------- training
def read_flags(folder: Path) -> dict:
    """Return the flags in a run folder's args.json."""
    try:
        flags = json.loads((folder / "args.json").read_text())["args"]
        kinds = {field.name: (type(field.default), field.default is None) for field in fields(Args)}
        kinds = {name: (str, type(None)) if optional else kind for name, (kind, optional) in kinds.items()}
        if type(flags) is not dict or not all(isinstance(flags[x], kind) for x, kind in kinds.items() if x in flags):
            raise ValueError
        return flags
    except OSError as error:
        fail(f"{folder / 'args.json'} cannot be read: {error.strerror}.")
    except (ValueError, KeyError, TypeError, RecursionError):
        fail(f"{folder / 'args.json'} is damaged, or of no run of these agents.")


def find_run(args: Args) -> Path | None:
    """Return the folder of the run to go on with: --resume's; for auto the newest unfinished run of the same flags."""
    if args.resume != "auto":
        return Path(args.resume) if args.resume else None
    start = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__"
    for path in sorted(Path("runs").glob("*/checkpoint.npz"), reverse=True):
        if path.parent.name.startswith(start) and not differences(read_flags(path.parent), asdict(args)):
            _, facts = load_checkpoint(path, args, whole=False)
            if facts["global_step"] < args.total_timesteps or facts["pending"]:
                return path.parent
    return None


def lock_run(folder: Path):
    """Keep other processes from a run folder as long as the file that is returned is open."""
    try:
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        file = (folder / "lock").open("ab")
    except OSError as error:
        fail(f"the run folder {folder} cannot be written to: {error.strerror}.")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is at work on the run in {folder}.")
    except OSError as error:  # some network disks have no locks
        tqdm.write(f"warning: {folder} is not locked against other processes: {error.strerror}")
    (folder / "checkpoint.tmp").unlink(missing_ok=True)  # of a process that was killed while it wrote
    return file


def track(folder: Path, args: Args) -> None:
    """Mirror the log to Weights & Biases from here on: before the writer of the log is made."""
    kept = {"name": folder.name, "id": folder.name, "resume": "allow", "dir": str(folder), "config": asdict(args)}
    importlib.import_module("wandb").init(**kept, sync_tensorboard=True)


def make_run_folder(args: Args, device) -> tuple[Path, SummaryWriter]:
    """Make a new run folder that holds args.json and a TensorBoard log with the same facts."""
    name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder, here = Path("runs") / name, Path(__file__).resolve().parent
    sha = subprocess.run("git log -1 --format=%H", shell=True, cwd=here, capture_output=True, text=True).stdout.strip()
    packages = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in PACKAGES}
    record = {"agent": AGENT, "args": asdict(args), "python": sys.version.split()[0], "packages": packages}
    record |= {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "git_commit": sha or None}
    record |= {"threads": torch.get_num_threads(), "frames_per_step": args.frame_skip if "ALE/" in args.env_id else 1}
    try:
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps(record, indent=2))
    except OSError as error:
        fail(f"the run folder {folder} could not be made: {error.strerror}.")
    if args.track:
        track(folder, args)
    writer = SummaryWriter(str(folder))
    for title, table in {"hyperparameters": record.pop("args"), "environment": record}.items():
        writer.add_text(title, "|name|value|\n|-|-|\n" + "\n".join(f"|{key}|{value}|" for key, value in table.items()))
    metrics = {"charts/episodic_return": 0, "eval/episodic_return": 0}
    for summary in torch.utils.tensorboard.summary.hparams(asdict(args) | {"checkpoint": ""}, metrics):
        writer.file_writer.add_summary(summary)
    return folder, writer


def train(args: Args) -> Path | np.ndarray:
    """Train, evaluate and return the run folder; with --eval-only just play, and return the returns."""
    check_args(args)
    if args.eval_only:
        args, global_step, weights = load_model(args)
        check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = make_life_env(args)
    obs_space, num_actions = envs.single_observation_space, int(envs.single_action_space.n)
    q_network = C51Network(obs_space.shape, num_actions, args).to(device)
    if args.eval_only:
        q_network.load_state_dict(weights)
        video = Path(args.checkpoint).with_suffix(f".{datetime.now():%Y%m%d-%H%M%S}.mp4")
        return evaluate(make_life_env(args), q_network, args, device, global_step, video)

    target_network = copy.deepcopy(q_network)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    rngs = rng, replay_rng, probe_rng = [np.random.default_rng([args.seed, 0, stream]) for stream in range(3)]
    rngs.append(noise_rng := np.random.default_rng([args.seed, 0, 3]))
    replay = FrameReplay(obs_space, num_actions, args, device, replay_rng)
    folder = find_run(args)
    recorder = Recorder(args.record_dataset, replay, args, folder is not None) if args.record_dataset else None
    networks, objects = {"q_network": q_network, "target_network": target_network}, {"replay": replay}
    objects |= {"recorder": recorder} if recorder else {}
    if folder:
        lock = lock_run(folder)
        arrays, facts = load_checkpoint(folder / "checkpoint.npz", args)
        if facts["global_step"] == args.total_timesteps and not facts["pending"]:
            print(f"the run in {folder} is finished")
            return folder
    else:
        facts, (folder, writer) = None, make_run_folder(args, device)
        lock = lock_run(folder)
    print(f"run folder: {folder} ({device})" + (f", from step {facts['global_step']:,}" if facts else ""), flush=True)
    obs, episode, episodic_return, episodic_length, last_return = reset(envs, args.seed, 0, 0), 0, 0.0, 0, math.nan
    measured, updates, game, scalars, start = {}, [], [], {}, time.monotonic()
    global_step, pending, logged, saved = 0, False, {}, None  # pending: an evaluation of this step is still to be made
    if facts:
        try:
            unpack(arrays, networks, optimizer, objects)
            saved = global_step, pending = facts["global_step"], facts["pending"]
            counted = [kind(x) for kind, x in zip((int, float, int, float), facts["episode"], strict=True)]
            episode, episodic_return, episodic_length, last_return = counted
            measured = {tag: torch.tensor(value) for tag, value in facts["measured"].items()}
            logged = {tag: float(value) for tag, value in facts["logged"].items()}
            updates = [torch.tensor(pair, device=device).unbind() for pair in facts["updates"]]
            for generator, state in zip(rngs, facts["rngs"], strict=True):
                generator.bit_generator.state = state
            start, obs, game = start - facts["seconds"], reset(envs, args.seed, 0, episode), facts["game"]
            actions_exist = type(game) is list and all(type(x) is int and 0 <= x < num_actions for x in game)
            if not (actions_exist and 0 <= replay.pos < replay.buffer_size):
                raise ValueError
            for action in game:  # the emulator is deterministic: the same actions lead to where the run stood
                obs = envs.step(np.array([action]))[0]
        except Exception:  # it was whole, so that somebody has changed it
            fail(f"{folder / 'checkpoint.npz'} is damaged, or of no run of these flags: nothing was changed.")
        if args.track:
            track(folder, args)
        writer = SummaryWriter(str(folder), purge_step=global_step + (not pending))  # what was logged is superseded
        log(writer, logged, global_step)
    meter = {"unit": " steps", "dynamic_ncols": True, "disable": not sys.stderr.isatty()}
    bar = tqdm(total=args.total_timesteps, initial=global_step, **meter)
    good = torch.tensor(max(global_step, args.learning_starts), device=device)  # every loss was finite up to here

    def evaluate_now() -> bool:
        """Evaluate, and log it; return whether a signal has interrupted it."""
        video = folder / f"videos/step-{global_step}.mp4"
        returns = evaluate(make_life_env(args), q_network, args, device, global_step, video)
        if returns is not None:
            log(writer, {"eval/episodic_return": returns.mean()}, global_step)
        return returns is None

    def first_bad() -> int:
        """The step of the first update whose loss was not finite, if there was one."""
        return (good.item() // args.train_frequency + 1) * args.train_frequency

    def checkpoint_now() -> tuple[int, bool] | None:
        """Write down all that the run is, so that it can go on as if nothing had happened; return of when it is."""
        if not all(values.isfinite().all() for values in (*measured.values(), *q_network.parameters())):
            diverged(folder, first_bad())
        facts = {"version": VERSION, "agent": AGENT, "args": asdict(args), "seconds": time.monotonic() - start}
        facts |= {"global_step": global_step, "pending": pending, "game": game}
        facts |= {"episode": [episode, episodic_return, episodic_length, last_return]}
        facts |= {"measured": {tag: values.mean().item() for tag, values in measured.items()}}
        facts |= {"logged": logged if pending else {}}
        facts |= {"updates": [[x.item() for x in pair] for pair in updates]}
        facts |= {"rngs": [generator.bit_generator.state for generator in rngs]}
        log(writer, {}, global_step, flush=True)
        written = save_checkpoint(folder / "checkpoint.npz", pack(networks, optimizer, objects), facts)
        return (global_step, pending) if written else None

    pending = pending and evaluate_now()
    while global_step < args.total_timesteps and not STOP:
        global_step += 1
        last = global_step == args.total_timesteps
        # ------------------------------------------------------------------------------------------------------ act
        decay = (global_step - args.learning_starts) / max(args.exploration_steps, 1)
        epsilon = args.start_e + (args.end_e - args.start_e) * min(max(decay, 0.0), 1.0)
        actions = act(q_network, obs, epsilon, num_actions, rng, device)
        # ----------------------------------------------------------------------------------------------------- step
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        episodic_return, episodic_length = episodic_return + float(rewards[0]), episodic_length + 1
        # ---------------------------------------------------------------------------------------------------- store
        ended = terminations | infos.get("life_lost", False)  # for the learner; the game itself goes on
        if recorder:
            recorder.count()
        replay.add(obs, next_obs, actions, np.clip(rewards, -1, 1), ended, truncations)
        obs = next_obs
        game.append(int(actions[0]))
        if terminations[0] or truncations[0]:
            scalars |= {"charts/episodic_return": episodic_return, "charts/episodic_length": episodic_length}
            last_return, episode, episodic_return, episodic_length = episodic_return, episode + 1, 0.0, 0
            obs, game = reset(envs, args.seed, 0, episode), []  # in place of an autoreset step
        # ---------------------------------------------------------------------------------------------------- learn
        if global_step > args.learning_starts and global_step % args.train_frequency == 0:
            batch = replay.sample(args.batch_size)
            draw_noise(noise_rng, q_network, target_network)
            targets = c51_target(q_network, target_network, batch)
            draw_noise(noise_rng, q_network)
            losses, q_values = c51_loss(q_network, batch, targets)
            loss = (batch.weights * losses).mean()
            optimizer.zero_grad()
            loss.backward()
            if args.diagnostics_frequency:
                gradients = [parameter.grad.flatten() for parameter in q_network.parameters()]
                updates.append((loss.detach(), sum(gradient.dot(gradient) for gradient in gradients).sqrt()))
            optimizer.step()
            if args.prioritized:
                replay.update_priorities(batch.rows, losses)
            measured = {"losses/td_loss": loss.detach(), "losses/q_values": q_values.detach()}
            good = torch.where(loss.isfinite(), global_step, good)
        # --------------------------------------------------------------------------------------------------- target
        if global_step > args.learning_starts and global_step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())
        # ------------------------------------------------------------------------------------------------------ log
        status = f"return {last_return:.1f}, epsilon {epsilon:.3f}"
        bar.set_postfix_str(status, refresh=False)
        bar.update()
        if bar.disable and (global_step % 10_000 == 0 or last):  # output is no terminal: a plain line now and then
            meter = {"elapsed": time.monotonic() - start, "ncols": 0, "unit": " steps", "postfix": status}
            print(tqdm.format_meter(global_step, args.total_timesteps, **meter), flush=True)
        reporting = updates and global_step % args.diagnostics_frequency == 0
        if global_step % 1_000 == 0 or reporting or last:
            scalars |= {"charts/epsilon": epsilon, "charts/SPS": global_step / (time.monotonic() - start)}
            scalars |= {tag: values.mean().item() for tag, values in measured.items()}
            if not all(math.isfinite(scalars[tag]) for tag in measured):
                diverged(folder, first_bad())
        if reporting:
            scalars |= diagnose(q_network, replay.probe(probe_rng), updates, probe_rng)
            updates.clear()
        log(writer, scalars, global_step)
        logged, scalars = scalars, {}
        # ----------------------------------------------------------------------------------------------- checkpoint
        evaluating = last or (args.eval_frequency and global_step % args.eval_frequency == 0)
        if evaluating and args.save_model:
            save_model(folder / "model.pt", q_network, args, global_step)
        if pending := bool(evaluating and args.eval_episodes):
            if last and args.checkpoint_frequency:  # it may take long
                saved = checkpoint_now()
            pending = evaluate_now()
        if args.checkpoint_frequency and global_step % args.checkpoint_frequency == 0 and not (last or STOP):
            saved = checkpoint_now()
    finished = global_step == args.total_timesteps and not pending
    if recorder and recorder.rows and finished:
        recorder.write(last=True)
    if args.checkpoint_frequency and saved != (global_step, pending):
        saved = checkpoint_now()
    log(writer, {}, global_step, flush=True)
    for resource in (bar, writer, lock):
        resource.close()
    if finished:
        STOP.clear()  # it came too late
        print(f"run folder: {folder}")
    else:
        how = f"go on with --resume {folder}" if saved == (global_step, pending) else "there is no checkpoint of it"
        print(f"stopped at step {global_step:,}: {how}")
    return folder


def stop(number: int, _frame) -> None:
    """Ask the run to end at its next step, with a checkpoint. A second Ctrl-C ends it at once."""
    STOP.append(number)
    if number == signal.SIGINT:  # some programs send SIGTERM twice
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    train(parse_args())
    sys.exit(128 + STOP[0] if STOP else 0)
