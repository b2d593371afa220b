# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "minatar==1.0.15", "stable-baselines3==2.9.2",
#   "tyro==1.0.17", "numpy==2.4.6", "tensorboard==2.21.0", "tqdm==4.70.1", "psutil==7.2.2"]
# ///
"""Offline DQN, CQL + DR3 and CQL + C51: learn from another agent's recorded games, play none.

Dataset: Agarwal et al., 2020. CQL: Kumar et al., 2020, "Conservative Q-learning for offline reinforcement learning".
DR3: Kumar et al., 2022, "DR3: value-based deep reinforcement learning requires explicit regularization".
Read after rainbow.py; differs in (1) the replay, which is read from files, (2) the CQL and DR3 terms of the loss,
(3) the loop: no acting; in each iteration a few checkpoints of the dataset, drawn anew. Steps count as an online
agent's would, an update every 4, so that curves compare. The coefficient of the CQL term beside DR3 is ours.

200 iterations of 62,500 updates, as in the study (docs/offline.md says how to get the dataset):
    python agents/cql_offline.py --algorithm cql-dr3 --env-id ALE/Pong-v5 --dataset-dir Pong/1/replay_logs

Two minutes on a CPU, from a run of dqn.py that export_dataset.py has exported:
    python agents/cql_offline.py --env-id MinAtar/Breakout-v1 --dataset-dir breakout --num-checkpoints 1
        --total-timesteps 100000 --iteration-steps 50000 --eval-steps 5000 --target-network-frequency 1000
        --learning-rate 2.5e-4 --adam-eps 3.125e-4
"""

import copy
import gzip
import importlib.util
import io
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
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import psutil
import torch
import tyro
from stable_baselines3.common.buffers import BaseBuffer
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

DEFAULTS = {  # of the flags that depend on the algorithm
    "dqn": {"learning_rate": 6.25e-5, "adam_eps": 1.5e-4, "cql_alpha": 0.0, "dr3_coefficient": 0.0},
    "cql-dr3": {"learning_rate": 5e-5, "adam_eps": 3.125e-4, "cql_alpha": 0.1, "dr3_coefficient": 0.1},
    "cql-c51": {"learning_rate": 6.25e-5, "adam_eps": 1.5e-4, "cql_alpha": 0.1, "dr3_coefficient": 0.0},
}
DEFAULTS["dqn"].update(target_network_frequency=8_000, data_fraction=1.0)
DEFAULTS["cql-dr3"].update(target_network_frequency=8_000, data_fraction=1.0)
DEFAULTS["cql-c51"].update(target_network_frequency=400, data_fraction=0.05)


@dataclass
class Args:
    # ---- run
    exp_name: str = Path(__file__).stem  # names the folder
    seed: int = 1  # seed of every random generator
    cuda: bool = True  # use a GPU where there is one
    track: bool = False  # mirror the log to Weights & Biases
    eval_steps: int = 125_000  # agent steps of each evaluation, its last game played to the end (0: none)
    eval_epsilon: float = 0.001  # share of random actions in evaluation
    save_model: bool = False  # write model.pt at each evaluation
    checkpoint_frequency: int = 250_000  # agent steps between checkpoints (0: none)
    resume: str | None = None  # run folder, or auto: the newest unfinished run of these flags
    diagnostics_frequency: int = 10_000  # agent steps between diagnostics (0: none)
    # ---- environment
    env_id: str = "ALE/Pong-v5"  # any ALE/<Game>-v5 or MinAtar/<Game>-v1
    sticky_actions: float = 0.25  # chance that a frame repeats the last action (ALE; MinAtar has 0.1)
    noop_max: int = 0  # random no-op frames before a game, fewer than this (ALE)
    frame_skip: int = 4  # emulator frames in an agent step (ALE)
    max_episode_steps: int = 27_000  # agent steps before a game is truncated
    # ---- training
    total_timesteps: int = 50_000_000  # agent steps
    iteration_steps: int = 250_000  # agent steps of an iteration: a draw of checkpoints, updates, an evaluation
    learning_rate: float | None = None  # the optimizer's step size
    adam_eps: float | None = None  # Adam's epsilon
    batch_size: int = 32  # transitions in an update
    gamma: float = 0.99  # discount per agent step
    train_frequency: int = 4  # agent steps between updates
    target_network_frequency: int | None = None  # agent steps between copies to the target network
    network: Literal["dopamine", "nature", "dopamine-x4", "impala"] = "dopamine"  # convolutions (ALE)
    # ---- algorithm; None is the algorithm's own default, in DEFAULTS
    algorithm: Literal["dqn", "cql-dr3", "cql-c51"] = "dqn"  # TD loss: squared, Huber, C51 with dueling and double Q
    dataset_dir: str | None = None  # folder of the dataset's files
    num_checkpoints: int = 5  # checkpoints of the dataset that an iteration learns from
    data_fraction: float | None = None  # share of each checkpoint that is used, its first rows
    n_step: int = 1  # rewards in a return before it bootstraps
    cql_alpha: float | None = None  # weight of the CQL term, logsumexp Q - Q(a)
    dr3_coefficient: float | None = None  # weight of the DR3 term, |features . next features|
    n_atoms: int = 51  # atoms of a return's distribution
    v_min: float = -10.0  # return of the lowest atom
    v_max: float = 10.0  # return of the highest atom

    def __post_init__(self):
        for name, value in DEFAULTS[self.algorithm].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        ranges = {"n_atoms": (2, 1000), "v_min": (-1e6, 0), "v_max": (1e-3, 1e6), "data_fraction": (1e-9, 1)}
        check_flags(self, **ranges, cql_alpha=(0, 1e6), dr3_coefficient=(0, 1e6))
        if self.dataset_dir is None:
            fail("--dataset-dir is missing: the folder of a dataset, downloaded or written by export_dataset.py.")
        periods = [self.total_timesteps, self.iteration_steps, self.target_network_frequency]
        periods += [self.diagnostics_frequency, self.checkpoint_frequency]
        if any(period % self.train_frequency for period in periods):
            fail(f"--train-frequency is {self.train_frequency}: it must divide the lengths and the other frequencies.")


# ======================================= the algorithm =======================================
class Batch(NamedTuple):
    obs: Tensor  # (batch, 4, 84, 84) bytes, or MinAtar's (batch, 10, 10, channels)
    actions: Tensor  # (batch,) int64
    rewards: Tensor  # (batch,) discounted sum of n rewards, cut at a termination
    next_obs: Tensor  # like obs, n steps on; zeros after a termination
    discounts: Tensor  # (batch,) gamma^n, or 0 after a termination
    rows: np.ndarray  # (batch,) in the replay


class OfflineNetwork(nn.Module):
    """From observations to logits of the return's distribution, (batch, actions, atoms), or to one atom that is Q."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, args: Args):
        super().__init__()
        self.convolutions, size, width = make_convolutions(obs_shape, args.network)
        self.dense = nn.Sequential(nn.Linear(size, width), nn.ReLU())
        distributional = args.algorithm == "cql-c51"
        self.atoms = args.n_atoms if distributional else 1
        self.head = nn.Linear(width, num_actions * self.atoms)
        self.value = nn.Linear(width, self.atoms) if distributional else None  # dueling
        support = torch.linspace(args.v_min, args.v_max, self.atoms)
        self.register_buffer("support", support, persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def features(self, obs: Tensor) -> Tensor:
        return self.dense(self.convolutions(obs))  # (batch, width)

    def output(self, features: Tensor) -> Tensor:
        advantage = self.head(features).unflatten(1, (-1, self.atoms))
        if self.value is None:
            return advantage
        return self.value(features)[:, None] + advantage - advantage.mean(dim=1, keepdim=True)  # Wang et al., eq. 9

    def forward(self, obs: Tensor) -> Tensor:
        return self.output(self.features(obs))

    def mean(self, output: Tensor) -> Tensor:
        """Q of each distribution, (...,) of logits (..., atoms)."""
        if self.atoms == 1:
            return output[..., 0]
        return output.softmax(dim=-1) @ self.support

    def q_values(self, obs: Tensor) -> Tensor:
        return self.mean(self(obs))


@torch.inference_mode()
def act(q_network: nn.Module, obs: np.ndarray, epsilon: float, num_actions: int, rng, device) -> np.ndarray:
    """Choose an action epsilon-greedily, of shape (1,)."""
    if rng.random() < epsilon:
        return rng.integers(num_actions, size=1)
    q_values = q_network.q_values(torch.from_numpy(obs).to(device))
    return q_values.argmax(dim=1).cpu().numpy()


@torch.no_grad()
def offline_target(q_network: OfflineNetwork, target_network: OfflineNetwork, batch: Batch) -> Tensor:
    """The distribution of r + gamma Z(s', a*), a* by double Q-learning, or r + gamma max_a Q(s', a), (batch, atoms)."""
    output = target_network(batch.next_obs)  # (batch, actions, atoms)
    if output.shape[2] == 1:
        return batch.rewards[:, None] + batch.discounts[:, None] * output.amax(dim=1)
    best = q_network.mean(q_network(batch.next_obs)).argmax(dim=1)
    output = output.take_along_dim(best[:, None, None], dim=1)[:, 0]
    atoms = batch.rewards[:, None] + batch.discounts[:, None] * q_network.support
    return project(output.softmax(dim=1), atoms, q_network.support)


def project(probabilities: Tensor, atoms: Tensor, support: Tensor) -> Tensor:
    """Share the probabilities of `atoms`, both (batch, j), among the neighbours in the support (i,): C51's eq. 7."""
    low, high = support[0], support[-1]
    count = len(support)
    position = (atoms.clamp(low, high) - low) / (high - low) * (count - 1)  # in atoms, from 0 to count - 1
    distance = (position[:, None, :] - torch.arange(count, device=support.device)[:, None]).abs()  # (batch, i, j)
    return ((1 - distance).clamp(min=0) * probabilities[:, None, :]).sum(dim=2)


def offline_loss(q_network: OfflineNetwork, batch: Batch, targets: Tensor, args: Args) -> tuple[Tensor, ...]:
    """The TD loss, the CQL term, the DR3 term and Q(s_j, a_j), all (batch,)."""
    features = q_network.features(batch.obs)
    output = q_network.output(features)  # (batch, actions, atoms)
    taken = output.take_along_dim(batch.actions[:, None, None], dim=1)[:, 0]  # (batch, atoms)
    q_values = q_network.mean(taken)
    if args.algorithm == "cql-c51":
        td_losses = nn.functional.cross_entropy(taken, targets, reduction="none")
    elif args.algorithm == "cql-dr3":
        td_losses = nn.functional.huber_loss(q_values, targets[:, 0], reduction="none")
    else:
        td_losses = (targets[:, 0] - q_values) ** 2
    cql = q_network.mean(output).logsumexp(dim=1) - q_values  # Kumar et al., 2020, eq. 4: CQL(H)
    next_features = q_network.features(batch.next_obs) if args.dr3_coefficient else torch.zeros_like(features)
    dr3 = (features * next_features).sum(dim=1).abs()  # Kumar et al., 2022
    return td_losses, cql, dr3, q_values


def train(args: Args) -> Path:
    """Train, evaluate, and return the run's folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    envs = make_env(args)
    obs_space = envs.single_observation_space
    num_actions = int(envs.single_action_space.n)

    q_network = OfflineNetwork(obs_space.shape, num_actions, args)
    q_network.to(device, memory_format=torch.channels_last)  # faster convolutions
    target_network = copy.deepcopy(q_network)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)

    numbers = find_checkpoints(args)  # of the dataset
    loaded = {}  # a replay for each that is in memory
    drawn = []  # those that this iteration learns from
    global_step = 0  # agent steps so far
    last_return = math.nan  # of the last evaluation
    updates = []  # loss and gradient norm of each, for the diagnostics

    folder = make_run_folder(args, device)
    checkpoint = folder / "checkpoint.pt"
    parts = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer}
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, args, parts, rng)
        global_step = state["global_step"]
        drawn = state["drawn"]
        updates = state["updates"]
    saved_step = global_step
    writer = make_writer(folder, args, global_step)

    def save_checkpoint():
        state = {name: part.state_dict() for name, part in parts.items()}
        state["random"] = random_states(rng)
        state["args"] = asdict(args)
        state["global_step"] = global_step
        state["drawn"] = drawn
        state["updates"] = updates
        writer.flush()
        save(checkpoint, state)

    print(f"run folder: {folder} ({device})", flush=True)
    bar = make_bar(args, global_step)
    logged_step = global_step
    logged_at = time.monotonic()

    while True:
        # ---- evaluate
        finished = global_step == args.total_timesteps
        begins = global_step % args.iteration_steps == 0
        if finished or (begins and global_step > 0):  # first, so that an interrupted one is made again
            last_return = evaluate_steps(args, envs, q_network, global_step, device, folder, writer)
        if finished or STOPPED_BY:
            break

        # ---- load checkpoints of the dataset
        if begins:
            drawn = rng.choice(numbers, args.num_checkpoints, replace=False).tolist()
            replay = None  # its memory may be needed for the next
        load(drawn, loaded, obs_space, num_actions, args, device, rng)
        global_step += args.train_frequency  # as if it had played them

        # ---- learn
        replay = loaded[drawn[rng.integers(len(drawn))]]
        batch = replay.sample(args.batch_size)
        targets = offline_target(q_network, target_network, batch)
        td_losses, cql, dr3, q_values = offline_loss(q_network, batch, targets, args)
        loss = (td_losses + args.cql_alpha * cql + args.dr3_coefficient * dr3).mean()
        optimizer.zero_grad()
        loss.backward()
        gradient_norm = nn.utils.get_total_norm([p.grad for p in q_network.parameters()])
        check_finite(loss + gradient_norm, global_step, checkpoint)
        optimizer.step()
        if args.diagnostics_frequency:
            updates.append([loss.item(), gradient_norm.item()])
        if global_step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

        # ---- log
        bar.update(args.train_frequency)
        if global_step % 1_000 < args.train_frequency:
            bar.set_postfix_str(f"return {last_return:.1f}", refresh=False)
            writer.add_scalar("losses/td_loss", td_losses.mean(), global_step)
            writer.add_scalar("losses/cql", cql.mean(), global_step)
            writer.add_scalar("losses/dr3", dr3.mean(), global_step)
            writer.add_scalar("losses/q_values", q_values.mean(), global_step)
            writer.add_scalar("charts/SPS", (global_step - logged_step) / (time.monotonic() - logged_at), global_step)
            logged_step = global_step
            logged_at = time.monotonic()
        if updates and global_step % args.diagnostics_frequency == 0:
            for tag, value in diagnose(q_network, replay.probe(), updates).items():
                writer.add_scalar(tag, value, global_step)
            updates = []

        # ---- checkpoint
        last = global_step == args.total_timesteps
        if args.checkpoint_frequency and (last or global_step % args.checkpoint_frequency == 0):
            save_checkpoint()
            saved_step = global_step

    if STOPPED_BY and args.checkpoint_frequency and saved_step != global_step:
        print("stopping: writing a checkpoint", flush=True)
        save_checkpoint()
    bar.close()
    writer.close()
    finish(folder, global_step)
    return folder


# ========================= from here on the same text in every agent =========================
# ---- flags
def fail(message: str):
    """Answer wrong input: a sentence on stderr, status 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def check_flags(args: Args, **ranges: tuple[float, float]):
    """Refuse numbers out of range: counts from 1 (0 where that means none), shares from 0 to 1."""
    ranges.setdefault("noop_max", (0, 1_000))
    may_be_zero = {"seed", "exploration_steps", "eval_episodes", "eval_frequency", "eval_steps"}
    may_be_zero |= {"checkpoint_frequency", "diagnostics_frequency"}
    for name, value in vars(args).items():
        least = 0 if name in may_be_zero else 1
        usual = {int: (least, 2**31 - 1), float: (0, 1)}
        if type(value) in usual:
            low, high = ranges.get(name, usual[type(value)])
            if not low <= value <= high:  # NaN is in no range
                fail(f"--{name.replace('_', '-')} is {value}: it must be from {low} to {high}.")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs wandb: pip install wandb")


# ---- environment
def make_env(args: Args, n: int = 1, **overrides) -> gym.vector.VectorEnv:
    """A vector of n games: raw rewards, obs (n, 4, 84, 84) uint8 or MinAtar's (n, 10, 10, channels)."""
    if not re.fullmatch(r"ALE/\w+-v5|MinAtar/\w+-v1", args.env_id):
        fail(f"--env-id is {args.env_id}: it must be ALE/<Game>-v5 or MinAtar/<Game>-v1.")
    try:
        if args.env_id.startswith("MinAtar/"):
            import minatar.gym  # takes a second

            if args.env_id not in gym.registry:
                minatar.gym.register_envs()
            return gym.make_vec(args.env_id, n, "sync", max_episode_steps=args.max_episode_steps)

        # ale-py's own vector: gray, 84 x 84, the brighter of a skip's last two frames
        gym.register_envs(ale_py)
        settings = {
            "frameskip": args.frame_skip,
            "stack_num": 4,
            "noop_max": args.noop_max,
            "repeat_action_probability": args.sticky_actions,
            "max_num_frames_per_episode": min(args.frame_skip * args.max_episode_steps, 2**31 - 1),
            "use_fire_reset": False,
            "reward_clipping": False,
        }
        return gym.make_vec(args.env_id, n, "vector_entry_point", **(settings | overrides))
    except (gym.error.Error, OSError, AssertionError, RuntimeError) as error:
        fail(f"--env-id is {args.env_id}: {error}")


def reset(envs, seed: int, stream: int, episode: int) -> np.ndarray:
    """Start the game that the numbers determine."""
    sequence = np.random.SeedSequence([seed, stream, episode])
    emulator_seed = int(sequence.generate_state(1)[0] >> 1)  # an int32
    if isinstance(envs, gym.vector.SyncVectorEnv):
        envs.envs[0].unwrapped.game.last_action = 0  # or its sticky action outlives a game
    obs, _ = envs.reset(seed=emulator_seed)
    return obs


# ---- replay
PARSER = threading.Lock()  # Python 3.11's parser, by which NumPy reads a header, fails in threads (gh-106905)


@contextmanager
def dataset_file(path: Path, whole: bool = True):
    """Open a gzipped file; what is wrong with it is told in a sentence. A `whole` file's checksum comes last."""
    try:
        with gzip.open(path) as file:
            yield file
            while whole and file.read(2**20):
                pass
    except Exception as error:  # there are a dozen ways to be damaged
        reason = getattr(error, "strerror", None) or "it is truncated, damaged or no gzipped NumPy array"
        fail(f"{path} cannot be read: {reason}.")


def read_header(file) -> tuple[tuple[int, ...], np.dtype]:
    """Read the head of an array file: shape and type."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with PARSER:
        shape, in_columns, dtype = read[np.lib.format.read_magic(file)](file)
    if in_columns and len(shape) > 1:
        raise ValueError
    return shape, dtype


def read_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read an array of this type and shape."""
    with dataset_file(path) as file:
        found = read_header(file)
        if found != (shape, np.dtype(dtype)):
            fail(f"{path} is {found[1]} of shape {found[0]}, not {dtype} of shape {shape}.")
        data = file.read(math.prod(shape) * np.dtype(dtype).itemsize)
        return np.frombuffer(data, dtype).reshape(shape)


def checkpoint_paths(args: Args, number: int) -> dict[str, Path]:
    """Return the files of a checkpoint that are read; invalid_range concerns the replay that wrote them."""
    folder = Path(args.dataset_dir)
    names = ["observation", "action", "reward", "terminal"]
    paths = {name: folder / f"$store$_{name}_ckpt.{number}.gz" for name in names}
    paths["add_count"] = folder / f"add_count_ckpt.{number}.gz"
    return paths


def count_rows(paths: dict[str, Path]) -> tuple[int, int]:
    """Return how many rows of a checkpoint are data, and how many there are with older ones."""
    with dataset_file(paths["action"], whole=False) as file:
        (total,), _ = read_header(file)
    add_count = int(read_array(paths["add_count"], "int64", ()))
    if total == 0 or add_count < 0:
        fail(f"{paths['add_count']} is no number of rows, or {paths['action'].name} has none.")
    return add_count % total, total


def find_checkpoints(args: Args) -> list[int]:
    """Return the numbers of the dataset's checkpoints; there may be gaps, and some may be too short."""
    numbers = []
    for path in Path(args.dataset_dir).glob("*"):
        name = re.fullmatch(r"\$store\$_observation_ckpt\.(\d+)\.gz", path.name)
        if not name:
            continue
        number = int(name[1])
        filled, _ = count_rows(checkpoint_paths(args, number))
        if filled >= args.n_step + 4:
            numbers.append(number)
        else:
            print(f"warning: checkpoint {number} of {args.dataset_dir} has {filled} rows of data, and is left out")
    if len(numbers) < args.num_checkpoints:
        found = (
            f"{args.dataset_dir} has {len(numbers)} checkpoints with data ($store$_observation_ckpt.N.gz and others)"
        )
        fail(f"{found}, and --num-checkpoints is {args.num_checkpoints}.")
    return sorted(numbers)


def load(numbers: list[int], loaded: dict, obs_space, num_actions: int, args: Args, device, rng):
    """Load the checkpoints that are not in `loaded`; others stay there while there is memory."""
    new = [number for number in numbers if number not in loaded]
    if not new:
        return
    largest = max((len(replay.packed) + 64 * replay.buffer_size for replay in loaded.values()), default=0)
    if 1.5 * largest * len(new) > psutil.virtual_memory().available:
        for number in loaded.keys() - set(numbers):
            del loaded[number]

    def read(number: int) -> DatasetReplay:
        return DatasetReplay(checkpoint_paths(args, number), obs_space, num_actions, args, device, rng)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # zlib lets other threads run
        loaded.update(zip(new, pool.map(read, new), strict=True))


def episode_ages(blank: np.ndarray, terminations: np.ndarray) -> np.ndarray:
    """Return of every row (rows,) the steps since its episode began, or since the file did; of padding -1.

    `blank` rows are all zeros. The first three of a run of them after a termination are padding, at the file's start
    two or three. Elsewhere three or more are, after a truncation, and any at the file's end. (A black screen may be
    taken for padding, never padding for a black screen.)
    """
    padding = np.zeros(len(blank), bool)
    for first, end in np.flatnonzero(np.diff(blank, prepend=False, append=False)).reshape(-1, 2):
        begins = terminations[first - 1] if first else end > 1
        if begins:
            padding[first : min(end, first + 3)] = True
        elif end - first >= 3 or end == len(blank):
            padding[first:end] = True
    begins = ~padding & np.insert((padding | terminations)[:-1], 0, True)
    rows = np.arange(len(blank))
    begun = np.maximum.accumulate(np.where(begins, rows, 0))
    return np.where(padding, -1, rows - begun)


class DatasetReplay(BaseBuffer):
    """A checkpoint of the dataset: each frame once and compressed by itself; stacks and returns are built in sampling.

    A row holds the newest frame of s_t, a_t, r_t and whether s_{t+1} is terminal; the frame of s_{t+1} is in the next
    row. Padding is left out. A row is ready if its frames and its n steps, or fewer to a termination, are in the file.
    """

    def __init__(self, paths: dict[str, Path], obs_space, num_actions: int, args: Args, device, rng):
        self.paths = paths
        self.stack = 4 if args.env_id.startswith("ALE/") else 1  # MinAtar's channels are one frame
        self.frame_shape = obs_space.shape[1:] if self.stack == 4 else obs_space.shape
        self.dtype = obs_space.dtype
        self.n_step = args.n_step
        self.gamma = args.gamma
        self.rng = rng

        filled, total = count_rows(paths)
        used = min(filled, round(args.data_fraction * total))
        actions = read_array(paths["action"], "int32", (total,))[:used]
        rewards = read_array(paths["reward"], "float32", (total,))[:used]
        terminations = read_array(paths["terminal"], "uint8", (total,))[:used] > 0
        self.check(actions, rewards, num_actions, args)
        may_be_blank = (actions == 0) & (rewards == 0) & ~terminations
        blank = may_be_blank & self.read_frames(used, total, whole=used == filled)
        ages = episode_ages(blank, terminations)

        kept = ages >= 0
        self.actions = actions[kept]
        self.rewards = rewards[kept].clip(-1, 1)
        self.terminations = terminations[kept]
        self.ages = ages[kept]
        self.starts = self.starts[kept]
        self.ends = self.ends[kept]
        super().__init__(len(self.ages), obs_space, gym.spaces.Discrete(num_actions), device)
        self.ready = self.find_ready(midway=0 in ages[:1])
        if len(self.ready) == 0:
            fail(f"{paths['observation']} has no usable transition in its first {used:,} rows.")

    def check(self, actions: np.ndarray, rewards: np.ndarray, num_actions: int, args: Args):
        """Refuse numbers that are no actions or rewards of the game."""
        if not 0 <= actions.min(initial=0) <= actions.max(initial=0) < num_actions:
            found = f"has actions from {actions.min()} to {actions.max()}"
            fail(f"{self.paths['action']} {found}, and {args.env_id} has 0 to {num_actions - 1}.")
        if not np.isfinite(rewards).all():
            fail(f"{self.paths['reward']} has a reward that is not finite.")
        if np.abs(rewards).max(initial=0) > 1:
            tqdm.write(f"warning: {self.paths['reward']} has rewards beyond -1 and 1, and they are clipped")

    def read_frames(self, used: int, total: int, whole: bool) -> np.ndarray:
        """Compress the first `used` frames as they are read; return which of them are all zeros.

        Frame i is deflated, with the first that is not blank as dictionary, to the bytes from starts[i] to ends[i].
        """
        path = self.paths["observation"]
        nothing = bytes(math.prod(self.frame_shape))
        blank = np.zeros(used, bool)
        self.starts = np.zeros(used, np.int64)
        self.ends = np.zeros(used, np.int64)
        self.packed = bytearray()
        self.dictionary = b""
        with dataset_file(path, whole) as file:
            found = read_header(file)
            if found != ((total, *self.frame_shape), np.uint8):
                expected = (total, *self.frame_shape)
                fail(f"{path} is {found[1]} of shape {found[0]}, not uint8 of shape {expected}.")
            for row in range(used):
                if row % 10_000 == 0 and psutil.virtual_memory().percent > 95:
                    fail(f"{path} does not fit in memory: lower --num-checkpoints or --data-fraction.")
                frame = file.read(len(nothing))
                if len(frame) < len(nothing):
                    raise EOFError
                blank[row] = frame == nothing
                if not self.dictionary and not blank[row]:
                    self.dictionary = frame
                deflate = zlib.compressobj(1, wbits=-15, zdict=self.dictionary)
                self.starts[row] = len(self.packed)
                self.packed += deflate.compress(frame) + deflate.flush()
                self.ends[row] = len(self.packed)
        return blank

    def find_ready(self, midway: bool) -> np.ndarray:
        """Return the rows that may be sampled; `midway`: the file begins in the middle of an episode."""
        rows = np.arange(self.buffer_size)
        begins = self.ages == 0
        last_rows = np.append(np.flatnonzero(begins)[1:], len(rows)) - 1  # of the episodes
        lasts = last_rows[begins.cumsum() - 1]  # (rows,)
        ready = self.terminations[lasts] | (rows + self.n_step <= lasts)
        if midway:  # frames of the first stacks are in another file
            ready[: min(self.stack - 1, lasts[0] + 1)] = False
        return np.flatnonzero(ready)

    def frames(self, rows: np.ndarray) -> np.ndarray:
        """Return the frames of `rows` (...,), each decompressed once."""
        needed, positions = np.unique(rows, return_inverse=True)
        found = np.empty((len(needed), math.prod(self.frame_shape)), np.uint8)
        packed = memoryview(self.packed)
        for i, row in enumerate(needed):
            inflate = zlib.decompressobj(-15, zdict=self.dictionary)
            found[i] = np.frombuffer(inflate.decompress(packed[self.starts[row] : self.ends[row]]), np.uint8)
        return found.view(self.dtype)[positions].reshape(*rows.shape, *self.frame_shape)

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions uniformly, with replacement."""
        rows = self.ready[self.rng.integers(len(self.ready), size=batch_size)]
        return self._get_samples(rows)

    def _get_samples(self, rows: np.ndarray) -> Batch:
        """Build the transitions that start at `rows` (batch,)."""
        steps = np.arange(self.n_step)
        window = np.minimum(rows[:, None] + steps, self.buffer_size - 1)  # (batch, n)
        alive = np.cumprod(~self.terminations[window], axis=1)  # 1 up to the termination
        counted = np.insert(alive[:, :-1], 0, 1, axis=1)  # the terminating step's reward still counts
        rewards = (self.rewards[window] * counted * self.gamma**steps).sum(axis=1)
        discounts = self.gamma**self.n_step * alive[:, -1]
        next_ages = np.where(alive[:, -1], self.ages[rows] + self.n_step, -1)
        return Batch(
            self.stacks(rows, self.ages[rows]),
            self.to_torch(self.actions[rows]).long(),
            self.to_torch(rewards).float(),
            self.stacks(rows + self.n_step, next_ages),
            self.to_torch(discounts).float(),
            rows,
        )

    def stacks(self, rows: np.ndarray, ages: np.ndarray) -> Tensor:
        """Gather the observations at `rows` (batch,), with zeros for frames older than the episode."""
        back = np.arange(self.stack)[::-1]  # oldest first
        frames = self.frames((rows[:, None] - back).clip(0, self.buffer_size - 1))
        frames[back > ages[:, None]] = 0
        return self.to_torch(frames if self.stack == 4 else frames[:, 0], copy=False)

    def probe(self) -> Tensor:
        """Draw 256 observations, by a generator of their own."""
        rows = np.random.default_rng(self.buffer_size).choice(self.ready, 256)
        return self.stacks(rows, self.ages[rows])


# ---- network
class Pixels(nn.Module):
    """Bytes to 0..1, MinAtar's channels to the front; augmented images are so already."""

    def forward(self, obs: Tensor) -> Tensor:
        if obs.dtype == torch.bool:
            return obs.movedim(3, 1).float()
        return obs / 255 if obs.dtype == torch.uint8 else obs


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def make_convolutions(obs_shape: tuple[int, ...], network: str, scale: int = 1) -> tuple[nn.Sequential, int, int]:
    """Return the convolutions, the length of their output, and the width of the next layer."""
    minatar = obs_shape[:2] == (10, 10)
    width = scale * (128 if minatar else 512)
    wide = 4 * scale if network == "dopamine-x4" else scale
    few, many = 32 * wide, 64 * wide
    if minatar:  # Young and Tian, 2019
        layers = [nn.Conv2d(obs_shape[2], 16 * scale, 3)]
    elif network == "impala":  # Espeholt et al., 2018, figure 3: 84 -> 42 -> 21 -> 11
        layers, inputs = [], 4
        for channels, padding in [(16 * scale, 0), (few, 0), (few, 1)]:  # as SAME pads 84, 42 and 21
            layers.append(nn.Conv2d(inputs, channels, 3, padding=1))
            layers.append(nn.MaxPool2d(3, 2, padding, ceil_mode=True))
            for _ in range(2):
                first = nn.Conv2d(channels, channels, 3, padding=1)
                second = nn.Conv2d(channels, channels, 3, padding=1)
                layers.append(Residual(nn.ReLU(), first, nn.ReLU(), second))
            inputs = channels
    elif network == "nature":  # 84 -> 20 -> 9 -> 7
        layers = [nn.Conv2d(4, few, 8, 4), nn.ReLU()]
        layers += [nn.Conv2d(few, many, 4, 2), nn.ReLU(), nn.Conv2d(many, many, 3)]
    else:  # SAME padding: 84 -> 21 -> 11 -> 11
        first = nn.Conv2d(4, few, 8, 4, padding=2)
        second = nn.Conv2d(few, many, 4, 2)
        third = nn.Conv2d(many, many, 3, padding=1)
        layers = [first, nn.ReLU(), nn.ZeroPad2d((1, 2, 1, 2)), second, nn.ReLU(), third]
    convolutions = nn.Sequential(Pixels(), *layers, nn.ReLU(), nn.Flatten())
    obs = torch.zeros(1, *obs_shape, dtype=torch.bool if minatar else torch.uint8)
    return convolutions, convolutions(obs).shape[1], width


# ---- diagnostics and evaluation
@torch.no_grad()
def diagnose(q_network: nn.Module, obs: Tensor, updates: list[list[float]]) -> dict[str, float]:
    """Measure the updates since the last time and, on a probe, the network; without disturbing the run."""
    network = copy.deepcopy(q_network).eval()
    outputs = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
    with torch.random.fork_rng([obs.device] if obs.is_cuda else []):
        network.q_values(obs)

    dormant = []
    for name, output in outputs.items():
        if isinstance(network.get_submodule(name), nn.ReLU):
            activity = output.movedim(1, 0).flatten(1).abs().mean(dim=1)  # of every unit or channel
            dormant.append(activity <= 0.025 * activity.mean())
    features = outputs["dense"].unflatten(0, (len(obs), -1)).mean(dim=1)  # iqn.py has one for each tau
    singular_values = torch.linalg.svdvals(features)
    below = singular_values.cumsum(0) < 0.99 * singular_values.sum()
    losses, gradient_norms = np.array(updates).T
    return {
        "diagnostics/loss_variance": losses.var(),
        "diagnostics/gradient_norm": gradient_norms.mean(),
        "diagnostics/representation_norm": outputs["convolutions"].norm(dim=1).mean(),
        "diagnostics/srank": 1 + below.sum(),  # Kumar et al., 2021
        "diagnostics/dormant_neurons": torch.cat(dormant).float().mean(),  # Sokar et al., 2023
    }


def evaluate_steps(args: Args, envs, q_network: nn.Module, global_step: int, device, folder: Path, writer) -> float:
    """Play full games for at least eval_steps, by random numbers of their own; log and return the mean return."""
    if args.save_model:
        save(folder / "model.pt", {"args": asdict(args), "weights": q_network.state_dict()})
    player = copy.deepcopy(q_network).eval()
    rng = np.random.default_rng([args.seed, global_step])
    returns = []
    played = 0
    while played < args.eval_steps:
        obs = reset(envs, args.seed, global_step, len(returns))
        returns.append(0.0)
        done = False
        while not done:
            if STOPPED_BY:
                return math.nan
            actions = act(player, obs, args.eval_epsilon, envs.single_action_space.n, rng, device)
            obs, rewards, terminations, truncations, _ = envs.step(actions)
            returns[-1] += float(rewards[0])
            played += 1
            done = terminations[0] or truncations[0]
    if not returns:
        return math.nan
    writer.add_scalar("eval/episodic_return", np.mean(returns), global_step)
    tqdm.write(f"step {global_step:,}: mean return {np.mean(returns):.2f} of {len(returns)} games")
    return float(np.mean(returns))


# ---- run folder, log and checkpoints
def make_run_folder(args: Args, device) -> Path:
    """Return the folder of the run to go on with, or a new one."""
    name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__"
    if args.resume == "auto":
        for path in sorted(Path("runs").glob(f"{name}*/args.json"), reverse=True):
            record = json.loads(path.read_text())
            same = record["agent"] == Path(__file__).stem and not differences(record["args"], args)
            if same and not (path.parent / "finished").exists():
                return path.parent
    elif args.resume:
        folder = Path(args.resume)
        if not (folder / "checkpoint.pt").exists():
            fail(f"--resume {folder}: it has no checkpoint.pt.")
        return folder

    git = f"git -C '{Path(__file__).resolve().parent}' rev-parse HEAD"
    commit = subprocess.run(git, shell=True, capture_output=True, text=True).stdout.strip()
    packages = ["torch", "gymnasium", "ale-py", "minatar", "stable-baselines3", "numpy"]
    record = {
        "agent": Path(__file__).stem,
        "args": asdict(args),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "git_commit": commit or None,
        "frames_per_step": args.frame_skip if args.env_id.startswith("ALE/") else 1,
    }
    folder = Path("runs") / f"{name}{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder.mkdir(parents=True)
    aside = folder / "args.tmp"
    aside.write_text(json.dumps(record, indent=2))
    aside.rename(folder / "args.json")
    return folder


def differences(recorded: dict, args: Args) -> list[str]:
    """The flags that a recorded run had otherwise."""
    found = []
    for name, value in asdict(args).items():
        if name not in ("resume", "cuda") and recorded.get(name) != value:
            found.append(f"--{name.replace('_', '-')} {recorded.get(name)}")
    return found


def make_writer(folder: Path, args: Args, global_step: int) -> SummaryWriter:
    """Open the log; what was logged after `global_step` is superseded."""
    if args.track:
        import wandb

        wandb.init(name=folder.name, id=folder.name, resume="allow", config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(str(folder), purge_step=global_step + 1)
    rows = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{rows}")
    return writer


def make_bar(args: Args, global_step: int) -> tqdm:
    """A progress bar, or without a terminal a plain line a minute."""
    looks = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        looks = {"file": PlainLines(), "ncols": 0, "mininterval": 60, "maxinterval": 60}
    return tqdm(total=args.total_timesteps, initial=global_step, unit=" steps", **looks)


class PlainLines(io.StringIO):
    """A file of which every write is a line."""

    def write(self, text: str):
        if text.strip():
            print(text.strip(), flush=True)


def check_finite(loss: Tensor, global_step: int, checkpoint: Path):
    if not loss.isfinite():
        fail(f"the loss is not finite at step {global_step:,}; {checkpoint}, if there, is from before.")


def random_states(rng: np.random.Generator) -> dict:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return {"numpy": rng.bit_generator.state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(rng: np.random.Generator, states: dict):
    rng.bit_generator.state = states["numpy"]
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])


def save(path: Path, state: dict):
    """Write aside, sync, rename: a file of this name is whole."""
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        tqdm.write(f"warning: {path} is not written, and the one before stands: {error.__context__ or error}")


def load_checkpoint(path: Path, args: Args, parts: dict, rng) -> dict:
    """Load parts and random states; return the rest."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if others := differences(state["args"], args):
            fail(f"{path.parent} was run with {' '.join(others)}: give the same flags.")
        state["optimizer"] = copy.deepcopy(state["optimizer"])  # else it keeps the file
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))
        set_random_states(rng, state.pop("random"))
        return state
    except Exception as error:  # a dozen ways to be damaged or foreign
        fail(f"{path} cannot be read as a checkpoint: {error}")


STOPPED_BY: list[int] = []  # signals


def stop(number: int, _frame):
    """Ask the run to end; a second Ctrl-C ends it at once."""
    STOPPED_BY.append(number)
    if number == signal.SIGINT:  # SIGTERM may come twice
        signal.signal(number, signal.SIG_DFL)


def finish(folder: Path, global_step: int):
    """Mark a run as finished, or say how to go on with it."""
    if STOPPED_BY:
        there = (folder / "checkpoint.pt").exists()
        how = f"go on with --resume {folder} and the same flags" if there else "there is no checkpoint"
        print(f"stopped at step {global_step:,}: {how}")
        sys.exit(128 + STOPPED_BY[0])
    (folder / "finished").touch()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    train(tyro.cli(Args, description=__doc__))
