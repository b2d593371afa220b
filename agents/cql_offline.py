# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "minatar==1.0.15", "stable-baselines3==2.9.2",
#   "tyro==1.0.17", "numpy==2.4.6", "tensorboard==2.21.0", "tqdm==4.70.1", "psutil==7.2.2", "imageio-ffmpeg==0.8.1"]
# ///
"""Offline DQN, CQL + DR3 and CQL + C51 on the DQN Replay Dataset: learn from another agent's games, play none.

Dataset: Agarwal et al., 2020. CQL: Kumar et al., "Conservative Q-learning for offline reinforcement learning", 2020.
DR3: Kumar et al., "DR3: value-based deep reinforcement learning requires explicit regularization", 2022.
Read after rainbow.py; differs in (1) the replay, which is read from files, frames compressed, (2) the CQL and DR3 terms
of the loss, (3) the loop: no acting; in each iteration a few checkpoints of the dataset, drawn anew.

Steps count as an online agent's would, one update every 4, so that curves compare; none is played. The coefficient of
the CQL term is ours where DR3 is on. --record-dataset of any online agent makes such a dataset.

Full scale, 200 iterations of 62,500 updates (the README says how to get the dataset):
  python agents/cql_offline.py --algorithm cql-dr3 --env-id ALE/Pong-v5 --dataset-dir Pong/1/replay_logs
Two minutes on a CPU, once dqn.py's short command has been run with --record-dataset breakout:
  python agents/cql_offline.py --env-id MinAtar/Breakout-v1 --dataset-dir breakout --num-checkpoints 1 \
    --total-timesteps 100000 --iteration-steps 50000 --eval-steps 5000 --target-network-frequency 1000 \
    --learning-rate 2.5e-4 --adam-eps 3.125e-4
"""

import argparse
import contextlib
import copy
import difflib
import errno
import fcntl
import functools
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
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from stable_baselines3.common.buffers import BaseBuffer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

AGENT = "cql_offline"
VERSION = 1  # of the checkpoints' format
PACKAGES = ["torch", "gymnasium", "ale-py", "MinAtar", "stable_baselines3", "numpy"]  # that can change results
LIMITS = {"cql_alpha": (0, 1e6), "dr3_coefficient": (0, 1e6), "v_min": (-1e6, 0), "v_max": (1e-3, 1e6)}  # min, max
LIMITS |= {"n_atoms": (2, 1000), "data_fraction": (1e-9, 1)}
PARSER = threading.Lock()  # Python 3.11's parser, with which NumPy reads headers, fails in threads (gh-106905)
COUNTERS: list[str] = []  # of the replay: there are none
STOP: list[int] = []  # signals that have asked the run to end
DEFAULTS = {  # of flags, where they are the algorithm's
    "dqn": {"cql_alpha": 0.0, "dr3_coefficient": 0.0},
    "cql-dr3": {"learning_rate": 5e-5, "adam_eps": 3.125e-4, "cql_alpha": 0.1, "dr3_coefficient": 0.1},
    "cql-c51": {"target_network_frequency": 400, "data_fraction": 0.05, "cql_alpha": 0.1, "dr3_coefficient": 0.0},
}


# ------------------------------------------------------------------------------------------------------------ arguments
@dataclass
class RunArgs:
    exp_name: str = AGENT  # name of the experiment, part of the run folder's name
    seed: int = 1  # seed of every random generator
    cuda: bool = True  # use a CUDA device where there is one
    track: bool = False  # mirror the logs to Weights & Biases (pip install wandb; WANDB_PROJECT names the project)
    diagnostics_frequency: int = 10_000  # agent steps between reports on the network, under diagnostics/ (0: none)
    checkpoint_frequency: int = 250_000  # agent steps between checkpoints, for --resume to go on from (0: none at all)
    resume: str | None = None  # run folder to go on with, or auto: the newest unfinished run of these flags, if any
    save_model: bool = False  # keep the weights as model.pt in the run folder, before each evaluation
    eval_steps: int = 125_000  # agent steps of each evaluation, its last game played to the end (0: no evaluation)
    eval_epsilon: float = 0.001  # share of random actions in evaluation, 0 to 1
    capture_video: bool = False  # write an MP4 of the first game of each evaluation
    eval_only: bool = False  # play the weights in --checkpoint; of the flags, only this group's are not read from there
    checkpoint: str | None = None  # file that --save-model wrote, to play with --eval-only


@dataclass
class EnvironmentArgs:
    env_id: str = "ALE/Pong-v5"  # game: any ALE/<Game>-v5 or MinAtar/<Game>-v1
    sticky_actions: float = 0.25  # probability that a frame repeats the previous action (ALE; MinAtar has its own 0.1)
    noop_max: int = 0  # random no-op frames at the start of a game, fewer than this; 0 for none (ALE)
    frame_skip: int = 4  # emulator frames per agent step (ALE; MinAtar has 1)
    max_episode_steps: int = 27_000  # agent steps after which a game is truncated


@dataclass
class TrainingArgs:
    total_timesteps: int = 50_000_000  # agent steps of training
    iteration_steps: int = 250_000  # agent steps of an iteration: a draw of checkpoints, updates, an evaluation
    learning_rate: float = 6.25e-5  # Adam's step size
    adam_eps: float = 1.5e-4  # Adam's epsilon, the same for every batch size
    batch_size: int = 32  # transitions per update
    gamma: float = 0.99  # discount per agent step
    train_frequency: int = 4  # agent steps between updates
    target_network_frequency: int = 8_000  # agent steps between copies to the target network
    network: Literal["dopamine", "nature", "dopamine-x4", "impala"] = "dopamine"  # convolutions (ALE; MinAtar has one)


@dataclass
class AlgorithmArgs:
    algorithm: Literal["dqn", "cql-dr3", "cql-c51"] = "dqn"  # TD loss: squared, Huber, C51 with dueling and double Q
    dataset_dir: str | None = None  # folder of the dataset, replay_logs
    num_checkpoints: int = 5  # checkpoints of the dataset that an iteration learns from, drawn at random
    data_fraction: float = 1.0  # share of each checkpoint that is used, its first rows, 0 to 1
    n_step: int = 1  # agent steps of reward in a return before it bootstraps
    cql_alpha: float = 0.0  # weight of the CQL term, logsumexp Q - Q(a)
    dr3_coefficient: float = 0.0  # weight of the DR3 term, |features . next features|
    n_atoms: int = 51  # returns on which the distribution has its mass
    v_min: float = -10.0  # smallest of these returns (discounted sums of clipped rewards)
    v_max: float = 10.0  # largest of these returns


@dataclass
class Args(AlgorithmArgs, TrainingArgs, EnvironmentArgs, RunArgs):
    """Every flag, flat: `args.batch_size`."""


def parse_offline_args() -> Args:
    """Read the command line; --algorithm has a say in the defaults, and --resume FOLDER brings that run's flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algorithm", nargs="?")
    first.add_argument("--resume", nargs="?")
    early, _ = first.parse_known_args()
    known = DEFAULTS.get(early.algorithm or AlgorithmArgs.algorithm, {})
    if early.resume and early.resume != "auto":
        known = read_flags(Path(early.resume))
    groups = {"run": RunArgs, "environment": EnvironmentArgs, "training": TrainingArgs, "algorithm": AlgorithmArgs}
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


def check_offline_args(args: Args) -> None:
    """Refuse what cannot work before anything is read or written. LIMITS has the flags of special range."""
    may_be_zero = ["seed", "eval_steps", "diagnostics_frequency", "noop_max", "checkpoint_frequency"]
    for name, value in asdict(args).items():
        low, high = LIMITS.get(name, (0, 1) if type(value) is float else (int(name not in may_be_zero), 2**31 - 1))
        if type(value) in (int, float) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} is {value}, and must be from {low} to {high}.")
    periods = ("iteration_steps", "target_network_frequency", "diagnostics_frequency", "checkpoint_frequency")
    for name in ("total_timesteps", *periods):
        if getattr(args, name) % args.train_frequency:
            fail(f"--{name.replace('_', '-')} must be a multiple of --train-frequency, {args.train_frequency}.")
    if Path(args.exp_name).name != args.exp_name:
        fail(f"--exp-name {args.exp_name} cannot be part of a folder's name.")
    if args.resume and (args.eval_only or not args.checkpoint_frequency):
        fail("--resume goes without --eval-only, and needs a --checkpoint-frequency.")
    if args.eval_only != (args.checkpoint is not None) or args.eval_steps < (args.eval_only or args.capture_video):
        fail("--eval-only goes with --checkpoint FILE, and like --capture-video with at least 1 of --eval-steps.")
    if not (args.eval_only or args.dataset_dir):
        fail("--dataset-dir is missing: the folder of a dataset, downloaded or made with --record-dataset.")
    needed = {"wandb": args.track, "imageio_ffmpeg": args.capture_video, "minatar": "MinAtar/" in args.env_id}
    for package in [name for name, asked in needed.items() if asked and not importlib.util.find_spec(name)]:
        fail(f"these flags need the package {package}, which is not installed: pip install {package}")


# ---------------------------------------------------------------------------------------------------------- environment
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


# --------------------------------------------------------------------------------------------------------------- replay
class Batch(NamedTuple):
    obs: torch.Tensor  # (batch, channels, height, width)
    actions: torch.Tensor  # (batch,) int64
    next_obs: torch.Tensor  # (batch, channels, height, width) n steps on; zeros after a termination
    rewards: torch.Tensor  # (batch,) discounted sum of the rewards of n steps, or fewer before a termination
    discounts: torch.Tensor  # (batch,) gamma**n; 0 after a termination
    weights: torch.Tensor  # (batch,) importance weights; all 1 without priorities
    rows: np.ndarray  # (batch,) in the replay


class DatasetError(Exception):
    """A file of the dataset cannot be used: the message is a sentence that names it."""


@contextmanager
def dataset_file(path: Path, whole: bool = True):
    """Open a gzipped file, and check its end if all of it was read. Raises DatasetError for what is wrong with it."""
    try:
        with gzip.open(path) as file:
            yield file
            while whole and file.read(2**20):  # the checksum comes last
                pass
    except DatasetError:
        raise
    except Exception as error:  # there are a dozen ways to be damaged
        reason = getattr(error, "strerror", None) or "it is truncated, damaged or no gzipped NumPy array"
        raise DatasetError(f"{path} cannot be read: {reason}.") from None


def read_header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Read the head of an array file: shape and type."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with PARSER:
        shape, in_columns, dtype = read[np.lib.format.read_magic(file)](file)
    if in_columns and len(shape) > 1:
        raise ValueError
    return shape, dtype


def read_array(file) -> np.ndarray:
    """Read an array file of numbers."""
    shape, dtype = read_header(file)
    return np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def episode_ages(blank: np.ndarray, dones: np.ndarray) -> np.ndarray:
    """Return of every row (rows,) the steps since its episode began, or since the file did; of padding -1.

    `blank` rows are all zeros. After a termination the first three of a run of them are padding, at the file's start so
    are two or three. Elsewhere three or more are, which follow a truncation, and any at the file's end. (A black screen
    may be taken for padding, never padding for a black screen.)
    """
    padding = np.zeros(len(blank), bool)
    for first, end in np.flatnonzero(np.diff(blank, prepend=False, append=False)).reshape(-1, 2):
        begins = dones[first - 1] if first else end > 1
        padding[first : min(end, first + 3) if begins else end] = begins or end - first >= 3 or end == len(blank)
    begins = ~padding & np.insert((padding | dones)[:-1], 0, True)
    rows = np.arange(len(blank))
    return np.where(padding, -1, rows - np.maximum.accumulate(np.where(begins, rows, 0)))


class DatasetReplay(BaseBuffer):
    """A checkpoint of the dataset: each frame once and compressed by itself; stacks and returns are built in sampling.

    A row holds s_t's newest frame, a_t, r_t and whether s_{t+1} is terminal; s_{t+1}'s newest frame is in the next row.
    Padding is left out. A row is sampled if its frames and its n steps, or fewer to a termination, are all in the file.
    Raises DatasetError.
    """

    def __init__(self, folder: Path, number: int, envs: gym.vector.VectorEnv, args: Args, device):
        space, num_actions = envs.single_observation_space, int(envs.single_action_space.n)
        self.stack, self.n_step, self.gamma = 1 if space.dtype == bool else space.shape[0], args.n_step, args.gamma
        self.frame, self.dtype = space.shape if self.stack == 1 else space.shape[1:], space.dtype  # MinAtar: no stack
        self.paths, (filled, total) = checkpoint_files(folder, number), checkpoint_rows(folder, number)
        used = min(filled, round(args.data_fraction * total))
        arrays = {"action": "int32", "reward": "float32", "terminal": "uint8"}
        actions, rewards, dones = [self.read(name, dtype, total)[:used] for name, dtype in arrays.items()]
        dones = dones > 0
        empty = self.read_frames(used, total, used == filled, (actions == 0) & (rewards == 0) & ~dones)
        age = episode_ages(empty, dones)
        kept = age >= 0
        self.actions, self.rewards, self.dones, self.age = actions[kept], rewards[kept], dones[kept], age[kept]
        self.starts, self.ends, rows = self.starts[kept], self.ends[kept], np.arange(kept.sum())
        begins = self.age == 0
        lasts = np.append(np.flatnonzero(begins)[1:], len(rows))[begins.cumsum() - 1] - 1  # (rows,) of their episodes
        usable = self.dones[lasts] | (rows + self.n_step <= lasts)
        if 0 in age[:1]:  # the file begins in the middle of an episode: frames of the first stacks are in another
            usable[: min(self.stack - 1, lasts[0] + 1)] = False
        self.usable = np.flatnonzero(usable)
        if not len(self.usable):
            raise DatasetError(f"{self.paths['observation']} has no usable transition in its first {used:,} rows.")
        if not 0 <= self.actions.min() <= self.actions.max() < num_actions:
            found = f"has actions from {self.actions.min()} to {self.actions.max()}"
            raise DatasetError(f"{self.paths['action']} {found}, and {args.env_id} has 0 to {num_actions - 1}.")
        if not np.isfinite(self.rewards).all():
            raise DatasetError(f"{self.paths['reward']} has a reward that is not finite.")
        if np.abs(self.rewards).max() > 1:
            warn(f"{self.paths['reward']} has rewards beyond -1 and 1, and they are clipped")
            self.rewards = self.rewards.clip(-1, 1)
        super().__init__(len(rows), space, envs.single_action_space, device)

    def read(self, name: str, dtype: str, total: int) -> np.ndarray:
        """Read an array of one number a row, (total,)."""
        with dataset_file(self.paths[name]) as file:
            array = read_array(file)
        if array.dtype != dtype or array.shape != (total,):
            found = f"{array.dtype} of shape {array.shape}"
            raise DatasetError(f"{self.paths[name]} is {found}, not {dtype} of shape {(total,)}.")
        return array

    def read_frames(self, used: int, total: int, whole: bool, candidates: np.ndarray) -> np.ndarray:
        """Compress the first `used` frames as they are read; return which of the candidates (used,) are all zeros.

        Frame i is deflated, with the first that is not blank as dictionary, to the bytes from starts[i] to ends[i].
        """
        path, blank, empty = self.paths["observation"], bytes(math.prod(self.frame)), candidates.copy()
        self.starts, self.ends = np.zeros((2, used), np.int64)
        self.packed, self.dictionary = bytearray(), b""
        with dataset_file(path, whole) as file:
            shape, dtype = read_header(file)
            if dtype != np.uint8 or shape != (total, *self.frame):
                raise DatasetError(f"{path} is {dtype} of shape {shape}, not uint8 of shape {(total, *self.frame)}.")
            for row in range(used):
                if row % 10_000 == 0 and psutil.virtual_memory().percent > 95:
                    raise DatasetError(f"{path} does not fit in memory: lower --num-checkpoints or --data-fraction.")
                frame = file.read(len(blank))
                if len(frame) < len(blank):
                    raise EOFError
                empty[row] &= frame == blank
                self.dictionary = self.dictionary or (b"" if frame == blank else frame)
                deflate = zlib.compressobj(1, wbits=-15, zdict=self.dictionary)
                self.starts[row] = len(self.packed)
                self.packed += deflate.compress(frame) + deflate.flush()
                self.ends[row] = len(self.packed)
        return empty

    def frames(self, rows: np.ndarray) -> np.ndarray:
        """Return the frames of `rows` (...,), each decompressed once."""
        needed, places = np.unique(rows, return_inverse=True)
        found = np.empty((len(needed), math.prod(self.frame)), np.uint8)
        packed = memoryview(self.packed)
        for i, (start, end) in enumerate(zip(self.starts[needed].tolist(), self.ends[needed].tolist(), strict=True)):
            inflate = zlib.decompressobj(-15, zdict=self.dictionary)
            found[i] = np.frombuffer(inflate.decompress(packed[start:end]), np.uint8)
        return found.view(self.dtype)[places].reshape(*rows.shape, *self.frame)

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        """Draw transitions uniformly, with replacement."""
        return self._get_samples(self.usable[rng.integers(len(self.usable), size=batch_size)])

    def _get_samples(self, rows: np.ndarray) -> Batch:
        window = np.minimum(rows[:, None] + np.arange(self.n_step), self.buffer_size - 1)  # (batch, n)
        alive = np.cumprod(np.insert(~self.dones[window], 0, True, axis=1), axis=1)  # (batch, n + 1), before each step
        rewards = (self.rewards[window] * alive[:, :-1] * self.gamma ** np.arange(self.n_step)).sum(axis=1)
        ages = np.stack([self.age[rows], np.where(alive[:, -1], self.age[rows] + self.n_step, -1)])  # (2, batch)
        obs, next_obs = [self.to_torch(x, False) for x in self._get_stacks(np.stack([rows, rows + self.n_step]), ages)]
        floats = [self.to_torch(x).float() for x in (rewards, self.gamma**self.n_step * alive[:, -1])]
        actions, weights = self.to_torch(self.actions[rows]).long(), torch.ones(len(rows), device=self.device)
        return Batch(obs, actions, next_obs, *floats, weights, rows)

    def _get_stacks(self, rows: np.ndarray, ages: np.ndarray) -> np.ndarray:
        """Gather the observations at `rows` (k, batch), with zeros for the frames that are older than the episode."""
        back = np.arange(self.stack)[::-1]  # oldest first
        frames = self.frames((rows[:, :, None] - back).clip(0, self.buffer_size - 1))  # (k, batch, stack, ...)
        frames[back > ages[:, :, None]] = 0
        return frames.reshape(*rows.shape, -1, *self.frame[-2:])

    def probe(self, rng: np.random.Generator) -> torch.Tensor:
        """Draw 256 observations, with replacement."""
        rows = rng.choice(self.usable, (1, 256))
        return self.to_torch(self._get_stacks(rows, self.age[rows])[0], False)


@functools.cache
def warn(message: str) -> None:
    """Say something once."""
    tqdm.write(f"warning: {message}")


def checkpoint_files(folder: Path, number: int) -> dict[str, Path]:
    """Return the files of a checkpoint that are read; invalid_range concerns the replay that wrote them."""
    names = ("observation", "action", "reward", "terminal")
    files = {name: folder / f"$store$_{name}_ckpt.{number}.gz" for name in names}
    return files | {"add_count": folder / f"add_count_ckpt.{number}.gz"}


def checkpoint_rows(folder: Path, number: int) -> tuple[int, int]:
    """Return how many rows of a checkpoint are data, and how many there are with older ones. Raises DatasetError."""
    files = checkpoint_files(folder, number)
    with dataset_file(files["action"], whole=False) as file:
        shape, _ = read_header(file)
    with dataset_file(files["add_count"]) as file:
        add_count = read_array(file)
    if add_count.shape or add_count.dtype.kind not in "iu" or add_count < 0 or not (len(shape) == 1 and shape[0] > 0):
        raise DatasetError(f"{files['add_count']} is no number of rows, or {files['action'].name} has none.")
    return int(add_count) % shape[0], shape[0]


def find_checkpoints(args: Args) -> list[int]:
    """Return the numbers of the dataset's checkpoints that have n steps; there may be gaps. Raises DatasetError."""
    folder, numbers = Path(args.dataset_dir), []
    names = [re.fullmatch(r"\$store\$_observation_ckpt\.(\d+)\.gz", path.name) for path in folder.glob("*")]
    for number in sorted(int(name[1]) for name in names if name):
        for path in checkpoint_files(folder, number).values():
            if not path.exists():
                raise DatasetError(f"{path} is missing, and checkpoint {number} is of no use without it.")
        filled, _ = checkpoint_rows(folder, number)
        if filled >= args.n_step + 4:
            numbers.append(number)
        else:
            warn(f"checkpoint {number} of {folder} has {filled} rows of data, and is left out")
    if len(numbers) < args.num_checkpoints:
        found = f"{folder} has {len(numbers)} checkpoints with data ($store$_observation_ckpt.N.gz and four more files)"
        raise DatasetError(f"{found}, and --num-checkpoints is {args.num_checkpoints}.")
    return numbers


def load(numbers: list[int], loaded: dict[int, DatasetReplay], envs, args: Args, device) -> None:
    """Load the checkpoints that are not in `loaded`; others stay there while there is memory. Raises DatasetError."""
    new = [number for number in numbers if number not in loaded]
    largest = max((len(replay.packed) + 64 * len(replay.age) for replay in loaded.values()), default=0)
    if 1.5 * largest * len(new) > psutil.virtual_memory().available:
        for number in loaded.keys() - set(numbers):
            del loaded[number]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # zlib lets other threads run
        made = pool.map(lambda number: DatasetReplay(Path(args.dataset_dir), number, envs, args, device), new)
        loaded.update(zip(new, made, strict=True))


# -------------------------------------------------------------------------------------------------------------- network
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


class OfflineNetwork(nn.Module):  # output (batch, actions, atoms): logits, or one atom that is Q
    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, args: Args):
        super().__init__()
        distributional = args.algorithm == "cql-c51"
        self.convolutions, size, width = make_convolutions(obs_shape, args.network)
        self.atoms = args.n_atoms if distributional else 1
        self.dense = nn.Sequential(nn.Linear(size, width), nn.ReLU())
        self.head = nn.Linear(width, num_actions * self.atoms)
        self.value = nn.Linear(width, self.atoms) if distributional else None  # dueling
        self.register_buffer("support", torch.linspace(args.v_min, args.v_max, self.atoms), persistent=False)
        generator = torch.Generator().manual_seed(args.seed)
        for layer in [module for module in self.modules() if isinstance(module, nn.Conv2d | nn.Linear)]:
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def features(self, obs: torch.Tensor) -> torch.Tensor:
        x = obs / 255 if obs.dtype == torch.uint8 else obs.float()  # MinAtar's are 0 and 1
        return self.dense(self.convolutions(x))  # (batch, width)

    def output(self, features: torch.Tensor) -> torch.Tensor:
        advantage = self.head(features).unflatten(1, (-1, self.atoms))
        if self.value is None:
            return advantage
        return self.value(features)[:, None] + advantage - advantage.mean(dim=1, keepdim=True)  # Wang et al., eq. 9

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.output(self.features(obs))

    def mean(self, output: torch.Tensor) -> torch.Tensor:
        """Return the mean of each distribution, (...,) of logits (..., atoms)."""
        return output.softmax(dim=-1) @ self.support if self.atoms > 1 else output[..., 0]

    def q_values(self, obs: torch.Tensor, _rng: np.random.Generator) -> torch.Tensor:
        return self.mean(self(obs))  # (batch, actions); other agents' networks draw noise or quantiles here


# -------------------------------------------------------------------------------------------- act, the target, the loss
def act(q_network: nn.Module, obs: np.ndarray, epsilon: float, num_actions: int, rng: np.random.Generator, device):
    """Choose an action epsilon-greedily: an array of shape (1,)."""
    if rng.random() < epsilon:
        return rng.integers(num_actions, size=1)
    with torch.inference_mode():
        return q_network.q_values(torch.from_numpy(obs).to(device), rng).argmax(dim=1).cpu().numpy()


def offline_loss(q_network: nn.Module, batch: Batch, targets: torch.Tensor, args: Args) -> tuple[torch.Tensor, ...]:
    """Return of every transition the TD loss, the CQL term, the DR3 term and Q of its action, all (batch,)."""
    features = q_network.features(batch.obs)
    output = q_network.output(features)  # (batch, actions, atoms)
    taken = output.take_along_dim(batch.actions[:, None, None], 1)[:, 0]  # (batch, atoms)
    q_values = q_network.mean(taken)
    if args.algorithm == "cql-c51":
        td = nn.functional.cross_entropy(taken, targets, reduction="none")
    elif args.algorithm == "cql-dr3":
        td = nn.functional.huber_loss(q_values, targets[:, 0], reduction="none")
    else:
        td = (targets[:, 0] - q_values) ** 2
    cql = q_network.mean(output).logsumexp(dim=1) - q_values  # Kumar et al., 2020, eq. 4: CQL(H)
    next_features = q_network.features(batch.next_obs) if args.dr3_coefficient else torch.zeros_like(features)
    dr3 = (features * next_features).sum(dim=1).abs()  # Kumar et al., 2022; after a termination s' is zeros, as ever
    return td, cql, dr3, q_values


@torch.no_grad()
def offline_target(q_network: nn.Module, target_network: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the distribution of r + gamma Z(s', a*), a* by double Q, or r + gamma max_a Q(s', a), (batch, atoms)."""
    output = target_network(batch.next_obs)  # (batch, actions, atoms)
    if output.shape[2] == 1:
        return batch.rewards[:, None] + batch.discounts[:, None] * output.amax(dim=1)
    best = q_network.mean(q_network(batch.next_obs)).argmax(dim=1)  # double Q: van Hasselt et al., 2016
    atoms = batch.rewards[:, None] + batch.discounts[:, None] * q_network.support
    return project(output.take_along_dim(best[:, None, None], 1)[:, 0].softmax(dim=1), atoms, q_network.support)


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


def evaluate_steps(envs, q_network: nn.Module, args: Args, device, step: int, video: Path) -> np.ndarray | None:
    """Play games of their own, given the step, for eval_steps or more; return their raw returns, or None if stopped."""
    rng, player = np.random.default_rng([args.seed, 1 + step]), copy.deepcopy(q_network).eval()
    returns, first_game, played = [], [], 0
    while played < args.eval_steps:
        obs, done = reset(envs, args.seed, 1 + step, len(returns)), False
        returns.append(0.0)
        while not done:
            if STOP:
                return None
            actions = act(player, obs, args.eval_epsilon, envs.single_action_space.n, rng, device)
            obs, rewards, terminations, truncations, _ = envs.step(actions)
            returns[-1], done, played = returns[-1] + rewards[0], terminations[0] or truncations[0], played + 1
            first_game += [actions] if len(returns) == 1 else []
    tqdm.write(f"evaluation at step {step:,}: mean return {np.mean(returns):.2f} of {len(returns)} games")
    if args.capture_video:
        film(video, args, 1 + step, first_game)
    return np.array(returns)


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
    check_offline_args(args)
    if args.eval_only:
        args, global_step, weights = load_model(args)
        check_offline_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = make_env(args)
    obs_space, num_actions = envs.single_observation_space, int(envs.single_action_space.n)
    q_network = OfflineNetwork(obs_space.shape, num_actions, args).to(device)
    if args.eval_only:
        q_network.load_state_dict(weights)
        video = Path(args.checkpoint).with_suffix(f".{datetime.now():%Y%m%d-%H%M%S}.mp4")
        return evaluate_steps(envs, q_network, args, device, global_step, video)

    target_network = copy.deepcopy(q_network)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    rngs = rng, replay_rng, probe_rng = [np.random.default_rng([args.seed, 0, stream]) for stream in range(3)]
    networks, numbers, loaded = {"q_network": q_network, "target_network": target_network}, find_checkpoints(args), {}
    if folder := find_run(args):
        lock = lock_run(folder)
        arrays, facts = load_checkpoint(folder / "checkpoint.npz", args)
        if facts["global_step"] == args.total_timesteps and not facts["pending"]:
            print(f"the run in {folder} is finished")
            return folder
        drawn = facts.get("drawn")
        if not (type(drawn) is list and len(drawn) == args.num_checkpoints and all(x in numbers for x in drawn)):
            fail(f"{folder / 'checkpoint.npz'} is damaged, or {args.dataset_dir} has other checkpoints than it had.")
        load(drawn, loaded, envs, args, device)
    else:
        drawn = rng.choice(numbers, args.num_checkpoints, replace=False).tolist()
        load(drawn, loaded, envs, args, device)
        facts, (folder, writer) = None, make_run_folder(args, device)
        lock = lock_run(folder)
    print(f"run folder: {folder} ({device})" + (f", from step {facts['global_step']:,}" if facts else ""), flush=True)
    measured, updates, scalars, start, last_return = {}, [], {}, time.monotonic(), math.nan
    global_step, pending, logged, saved = 0, False, {}, None  # pending: an evaluation of this step is still to be made
    if facts:
        try:
            unpack(arrays, networks, optimizer, {})
            saved = global_step, pending = facts["global_step"], facts["pending"]
            last_return = float(facts["last_return"])
            measured = {tag: torch.tensor(value) for tag, value in facts["measured"].items()}
            logged = {tag: float(value) for tag, value in facts["logged"].items()}
            updates = [torch.tensor(pair, device=device).unbind() for pair in facts["updates"]]
            for generator, state in zip(rngs, facts["rngs"], strict=True):
                generator.bit_generator.state = state
            start -= facts["seconds"]
        except Exception:  # it was whole, so that somebody has changed it
            fail(f"{folder / 'checkpoint.npz'} is damaged, or of no run of these flags: nothing was changed.")
        if args.track:
            track(folder, args)
        writer = SummaryWriter(str(folder), purge_step=global_step + (not pending))  # what was logged is superseded
        log(writer, logged, global_step)
    meter = {"unit": " steps", "dynamic_ncols": True, "disable": not sys.stderr.isatty()}
    bar = tqdm(total=args.total_timesteps, initial=global_step, **meter)
    good = torch.tensor(global_step, device=device)  # every loss was finite up to here

    def evaluate_now() -> tuple[bool, float]:
        """Evaluate, and log it; return whether a signal has interrupted it, and the mean return."""
        video = folder / f"videos/step-{global_step}.mp4"
        returns = evaluate_steps(envs, q_network, args, device, global_step, video)
        if returns is None:
            return True, last_return
        log(writer, {"eval/episodic_return": returns.mean()}, global_step)
        return False, float(returns.mean())

    def first_bad() -> int:
        """The step of the first update whose loss was not finite, if there was one."""
        return (good.item() // args.train_frequency + 1) * args.train_frequency

    def checkpoint_now() -> tuple[int, bool] | None:
        """Write down all that the run is, so that it can go on as if nothing had happened; return of when it is."""
        if not all(values.isfinite().all() for values in (*measured.values(), *q_network.parameters())):
            diverged(folder, first_bad())
        facts = {"version": VERSION, "agent": AGENT, "args": asdict(args), "seconds": time.monotonic() - start}
        facts |= {"global_step": global_step, "pending": pending, "drawn": drawn, "last_return": last_return}
        facts |= {"measured": {tag: values.mean().item() for tag, values in measured.items()}}
        facts |= {"logged": logged if pending else {}}
        facts |= {"updates": [[x.item() for x in pair] for pair in updates]}
        facts |= {"rngs": [generator.bit_generator.state for generator in rngs]}
        log(writer, {}, global_step, flush=True)
        written = save_checkpoint(folder / "checkpoint.npz", pack(networks, optimizer, {}), facts)
        return (global_step, pending) if written else None

    if pending:
        pending, last_return = evaluate_now()
    while global_step < args.total_timesteps and not STOP:
        global_step += args.train_frequency
        last = global_step == args.total_timesteps
        # ---------------------------------------------------------------------------------------------------- learn
        if global_step > args.train_frequency and (global_step - args.train_frequency) % args.iteration_steps == 0:
            replay, drawn = None, rng.choice(numbers, args.num_checkpoints, replace=False).tolist()
            load(drawn, loaded, envs, args, device)
        replay = loaded[drawn[rng.integers(len(drawn))]]
        batch = replay.sample(args.batch_size, replay_rng)
        targets = offline_target(q_network, target_network, batch)
        td_losses, cql, dr3, q_values = offline_loss(q_network, batch, targets, args)
        loss = (td_losses + args.cql_alpha * cql + args.dr3_coefficient * dr3).mean()
        optimizer.zero_grad()
        loss.backward()
        if args.diagnostics_frequency:
            gradients = [parameter.grad.flatten() for parameter in q_network.parameters()]
            updates.append((loss.detach(), sum(gradient.dot(gradient) for gradient in gradients).sqrt()))
        optimizer.step()
        measured = {"losses/td_loss": td_losses, "losses/cql": cql, "losses/dr3": dr3, "losses/q_values": q_values}
        measured = {tag: values.detach() for tag, values in measured.items()}
        good = torch.where(loss.isfinite(), global_step, good)
        # --------------------------------------------------------------------------------------------------- target
        if global_step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())
        # ------------------------------------------------------------------------------------------------------ log
        status = f"return {last_return:.1f}"
        bar.set_postfix_str(status, refresh=False)
        bar.update(args.train_frequency)
        if bar.disable and (global_step % 10_000 == 0 or last):  # output is no terminal: a plain line now and then
            meter = {"elapsed": time.monotonic() - start, "ncols": 0, "unit": " steps", "postfix": status}
            print(tqdm.format_meter(global_step, args.total_timesteps, **meter), flush=True)
        reporting = updates and global_step % args.diagnostics_frequency == 0
        if global_step % 1_000 == 0 or reporting or last:
            scalars |= {tag: values.mean().item() for tag, values in measured.items()}
            scalars["charts/SPS"] = global_step / (time.monotonic() - start)
            if not all(math.isfinite(scalars[tag]) for tag in measured):
                diverged(folder, first_bad())
        if reporting:
            scalars |= diagnose(q_network, replay.probe(probe_rng), updates, probe_rng)
            updates.clear()
        log(writer, scalars, global_step)
        logged, scalars = scalars, {}
        # ----------------------------------------------------------------------------------------------- checkpoint
        evaluating = last or global_step % args.iteration_steps == 0
        if evaluating and args.save_model:
            save_model(folder / "model.pt", q_network, args, global_step)
        if pending := bool(evaluating and args.eval_steps):
            if last and args.checkpoint_frequency:  # it may take long
                saved = checkpoint_now()
            pending, last_return = evaluate_now()
        if args.checkpoint_frequency and global_step % args.checkpoint_frequency == 0 and not (last or STOP):
            saved = checkpoint_now()
    finished = global_step == args.total_timesteps and not pending
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
    try:
        train(parse_offline_args())
    except DatasetError as error:
        fail(str(error))
    sys.exit(128 + STOP[0] if STOP else 0)
