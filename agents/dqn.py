# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "minatar==1.0.15", "stable-baselines3==2.9.2", "tyro==1.0.17",
#   "numpy==2.4.6", "tensorboard==2.21.0", "tqdm==4.70.1", "psutil==7.2.2", "imageio-ffmpeg==0.8.1",
# ]
# ///
"""DQN: regress Q(s, a) onto a bootstrapped return, from replayed transitions and a frozen copy of the network.

Mnih et al., "Human-level control through deep reinforcement learning", Nature 518, 2015. Read this file first; every
other agent is described by how it differs from it.
Departs from the paper as Dopamine (Castro et al., 2018) and the small-batch study (Obando-Ceron et al., 2023) do: Adam
and a squared error in place of RMSProp and a clipped one, sticky actions, game over as the only terminal, convolutions
with SAME padding; and it can use n-step returns (--n-step) and prioritized replay (--prioritized).

Full scale, 100 million frames, as in the study:
  python agents/dqn.py --env-id ALE/Pong-v5
A minute on a CPU:
  python agents/dqn.py --env-id MinAtar/Breakout-v1 --total-timesteps 60000 --learning-rate 2.5e-4 --adam-eps 3.125e-4 \
    --buffer-size 100000 --learning-starts 1000 --target-network-frequency 1000 --exploration-steps 100000
"""

import difflib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import ale_py
import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from stable_baselines3.common.buffers import ReplayBuffer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

AGENT = "dqn"


# ---------------------------------------------------------------------------------------------------------- arguments
@dataclass
class RunArgs:
    exp_name: str = AGENT  # name of the experiment, part of the run folder's name
    seed: int = 1  # seed of every random generator
    cuda: bool = True  # use a CUDA device where there is one
    track: bool = False  # mirror the logs to Weights & Biases (pip install wandb; WANDB_PROJECT names the project)
    save_model: bool = False  # keep the weights as model.pt in the run folder
    eval_episodes: int = 10  # full games in each evaluation (0: no evaluation)
    eval_frequency: int = 0  # agent steps between evaluations during training (0: evaluate only after it)
    eval_epsilon: float = 0.001  # share of random actions in evaluation, 0 to 1
    capture_video: bool = False  # write an MP4 of the first game of each evaluation
    eval_only: bool = False  # play the weights of --checkpoint; its flags override all but this group's
    checkpoint: str | None = None  # file that --save-model wrote, to play with --eval-only


@dataclass
class EnvironmentArgs:
    env_id: str = "ALE/Pong-v5"  # game: any ALE/<Game>-v5 or MinAtar/<Game>-v1
    sticky_actions: float = 0.25  # probability that a frame repeats the previous action (ALE; MinAtar has its own 0.1)
    noop_max: int = 0  # most random no-op frames at the start of a game (ALE)
    frame_skip: int = 4  # emulator frames per agent step (ALE; MinAtar has 1)
    max_episode_steps: int = 27_000  # agent steps after which a game is truncated
    clip_rewards: bool = True  # learn from rewards clipped to [-1, 1]; logged returns are never clipped


@dataclass
class TrainingArgs:
    total_timesteps: int = 25_000_000  # agent steps of training
    learning_rate: float = 6.25e-5  # Adam's step size
    adam_eps: float = 1.5e-4  # Adam's epsilon, the same for every batch size
    batch_size: int = 32  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept in the replay
    gamma: float = 0.99  # discount per agent step
    learning_starts: int = 20_000  # agent steps before the first update
    train_frequency: int = 4  # agent steps between updates
    target_network_frequency: int = 8_000  # agent steps between copies to the target network
    start_e: float = 1.0  # share of random actions until learning starts, 0 to 1
    end_e: float = 0.01  # share of random actions after the decay, 0 to 1
    exploration_steps: int = 250_000  # agent steps of the linear decay of epsilon, once learning has started
    network: Literal["dopamine", "nature"] = "dopamine"  # convolutions with SAME padding or none (ALE; MinAtar has one)


@dataclass
class AlgorithmArgs:
    n_step: int = 1  # agent steps of reward in a return before it bootstraps
    prioritized: bool = False  # sample transitions in proportion to their priority, with importance weights in the loss


@dataclass
class Args(AlgorithmArgs, TrainingArgs, EnvironmentArgs, RunArgs):
    """Every flag, flat: `args.batch_size`."""


@dataclass
class Groups:
    run: RunArgs
    environment: EnvironmentArgs
    training: TrainingArgs
    algorithm: AlgorithmArgs


def parse_args() -> Args:
    """Read the command line; each member of `Groups` gets a box of its own in --help."""
    groups = tyro.cli(tyro.conf.OmitArgPrefixes[Groups], description=__doc__)
    return Args(**{name: value for group in vars(groups).values() for name, value in vars(group).items()})


def fail(message: str) -> NoReturn:
    """Answer wrong input: one sentence on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuse values that cannot work, before anything is allocated or written."""
    positive = "batch_size n_step total_timesteps train_frequency target_network_frequency frame_skip max_episode_steps"
    natural = "seed eval_episodes eval_frequency noop_max learning_starts exploration_steps"
    share = "eval_epsilon sticky_actions gamma start_e end_e"
    bounds = [(positive, 1, math.inf), (natural, 0, math.inf), (share, 0, 1), ("learning_rate adam_eps", 1e-12, 1)]
    for names, low, high in bounds:
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                fail(f"--{name.replace('_', '-')} must be {limit}, not {getattr(args, name)}.")
    if args.eval_only != (args.checkpoint is not None):
        fail("--eval-only and --checkpoint FILE go together: give both or neither.")
    if not args.eval_episodes and (args.capture_video or args.eval_only or args.eval_frequency):
        fail("--eval-episodes 0 leaves nothing for --eval-only, --eval-frequency or --capture-video to play: raise it.")
    for flag, package in [("track", "wandb"), ("capture_video", "imageio_ffmpeg")]:
        if getattr(args, flag) and not importlib.util.find_spec(package):
            fail(f"--{flag.replace('_', '-')} needs a package that is not installed: pip install {package}.")


# -------------------------------------------------------------------------------------------------------- environment
class MinAtar(gym.ObservationWrapper):
    """Channels first, and no sticky action left over from the game before."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        height, width, channels = env.observation_space.shape
        self.observation_space = gym.spaces.Box(0, 1, (channels, height, width), bool)

    def reset(self, **kwargs):
        self.unwrapped.game.last_action = 0
        return super().reset(**kwargs)

    def observation(self, obs: np.ndarray) -> np.ndarray:
        return obs.transpose(2, 0, 1)


def make_env(args: Args, **overrides) -> gym.vector.VectorEnv:
    """Make the game as a vector of one environment, with rewards as the game gives them.

    Observations are (1, 4, 84, 84) uint8 on ALE, the last 4 frames with zeros before an episode's first, and
    (1, channels, 10, 10) bool on MinAtar. `overrides` replace some of ALE's keywords below.
    """
    gym.register_envs(ale_py)
    if args.env_id.startswith("MinAtar/") and not importlib.util.find_spec("minatar"):
        fail(f"{args.env_id} needs a package that is not installed: pip install minatar.")
    if "MinAtar/Breakout-v1" not in gym.registry and importlib.util.find_spec("minatar"):
        importlib.import_module("minatar.gym").register_envs()
    check_game(args.env_id)
    if args.env_id.startswith("MinAtar/"):
        kwargs = {"max_episode_steps": args.max_episode_steps, "disable_env_checker": True, "render_mode": "rgb_array"}
        return gym.vector.SyncVectorEnv([lambda: MinAtar(gym.make(args.env_id, **kwargs))])
    kwargs = {
        "frameskip": args.frame_skip,
        "maxpool": True,  # over the last 2 frames, against sprites that flicker
        "grayscale": True,
        "img_height": 84,
        "img_width": 84,
        "stack_num": 4,
        "repeat_action_probability": args.sticky_actions,
        "noop_max": args.noop_max,
        "max_num_frames_per_episode": args.max_episode_steps * args.frame_skip,
        "use_fire_reset": False,
        "episodic_life": False,  # only a game over is terminal
        "reward_clipping": False,  # `train` clips, after it has counted the return
        "full_action_space": False,
        "num_threads": 1,
    }
    try:
        return gym.make_vec(args.env_id, num_envs=1, vectorization_mode="vector_entry_point", **(kwargs | overrides))
    except (gym.error.Error, OSError, AssertionError, RuntimeError) as error:
        fail(f"the ROM of {args.env_id} could not be loaded: {str(error).splitlines()[0]}")


def check_game(env_id: str) -> None:
    """Refuse an id that is no game of ALE or MinAtar, and offer the nearest names."""
    games = {}  # "pong" -> ["ALE/Pong-v5"]
    for name in gym.registry:
        if (name.startswith("ALE/") and name.endswith("-v5")) or (name.startswith("MinAtar/") and name.endswith("-v1")):
            games.setdefault(name.split("/")[1].split("-")[0].lower(), []).append(name)
    word = env_id.split("/")[-1].split("-")[0].lower().removesuffix("noframeskip")
    if env_id not in games.get(word, []):
        if "Continuous" in env_id or env_id.startswith(("Pendulum", "BipedalWalker", "CarRacing")):
            fail(f"{env_id} has continuous actions, and this agent chooses among discrete ones.")
        near = [name for match in difflib.get_close_matches(word, games, cutoff=0.5) for name in games[match]]
        fail(f"no game is called {env_id!r}: try {', '.join(near) or 'ALE/<Game>-v5 or MinAtar/<Game>-v1'}.")


def episode_seed(seed: int, stream: int, episode: int) -> int:
    """Derive a game's seed from the run's seed, the stream (0: training, else an evaluation) and the game's number."""
    return int(np.random.SeedSequence([seed, stream, episode]).generate_state(1)[0] >> 1)  # below 2**31


# ------------------------------------------------------------------------------------------------------------- replay
class Batch(NamedTuple):
    """Sampled transitions; `discounts` is gamma**n, or 0 where the episode terminated within the n steps."""

    obs: torch.Tensor  # (batch, channels, height, width)
    actions: torch.Tensor  # (batch,) int64
    rewards: torch.Tensor  # (batch,) the discounted sum of up to n rewards
    next_obs: torch.Tensor  # (batch, channels, height, width), n steps on; zeros where discounts is 0
    discounts: torch.Tensor  # (batch,)
    indices: np.ndarray  # (batch,) rows in the replay, for `update_priorities`
    weights: torch.Tensor  # (batch,) importance weights, all 1 in uniform replay


class SumTree:
    """Non-negative priorities that are drawn in proportion to their value.

    Schaul et al., "Prioritized experience replay", 2016, appendix B.2.1, with 64 children to a node in place of 2, so
    that a whole batch walks down a million leaves in four vectorised steps. Sums are always recomputed, never adjusted.
    """

    FANOUT = 64

    def __init__(self, capacity: int):
        self.levels = [np.zeros(-(-capacity // self.FANOUT) * self.FANOUT)]  # leaves first, root last
        while len(self.levels[-1]) > 1:
            nodes = len(self.levels[-1]) // self.FANOUT
            self.levels.append(np.zeros(nodes if nodes == 1 else -(-nodes // self.FANOUT) * self.FANOUT))

    def set(self, indices: np.ndarray, priorities: np.ndarray | float) -> None:
        """Set the leaves at `indices` (k,) to `priorities` (k,) or one number, and every sum above them."""
        self.levels[0][indices] = priorities
        for children, parents in zip(self.levels, self.levels[1:], strict=False):
            indices = indices // self.FANOUT
            parents[indices] = children.reshape(-1, self.FANOUT)[indices].sum(axis=1)

    def find(self, values: np.ndarray) -> np.ndarray:
        """Return the leaves (k,) in whose slice of [0, total) each of `values` (k,) falls."""
        indices = np.zeros(len(values), dtype=np.int64)
        for children in self.levels[-2::-1]:
            sums = children.reshape(-1, self.FANOUT)[indices].cumsum(axis=1)  # (k, 64)
            child = (sums <= values[:, None]).sum(axis=1)
            # rounding may carry a value past the last child that has any priority: stay on that child
            child = np.minimum(child, (sums < sums[:, -1:]).sum(axis=1))
            values = values - np.where(child > 0, sums[np.arange(len(values)), child - 1], 0.0)
            indices = indices * self.FANOUT + child
        return indices


class FrameReplay(ReplayBuffer):
    """SB3's replay with every frame stored once: stacks and n-step returns are built when sampling.

    Row t holds the newest frame of s_t, with a_t, the clipped r_t and whether s_{t+1} is terminal. The next frame is
    written to the row after; the next step overwrites it with the same, and after a truncation it stays. A row can be
    sampled once its n-step window is complete: n steps on, or at once when the episode terminates. Windows that would
    cross a truncation or the write position never can.

    Args: `obs_shape` (channels, height, width) and `dtype` of an observation, which is `stack` frames along its first
    axis; `rng` draws the samples. Exits with a sentence if the rows do not fit into the memory that is free.
    """

    ROW_BYTES = 24  # more than actions, rewards, flags and priority take

    def __init__(self, buffer_size, obs_shape, dtype, stack, num_actions, n_step, gamma, prioritized, device, rng):
        frame_shape = (obs_shape[0] // stack, *obs_shape[1:])
        row = math.prod(frame_shape) * np.dtype(dtype).itemsize + self.ROW_BYTES
        free = psutil.virtual_memory().available
        if buffer_size * row > free:
            fail(
                f"a replay of {buffer_size:,} transitions needs {buffer_size * row / 1e9:.1f} GB and {free / 1e9:.1f} GB "
                f"of memory are free: lower --buffer-size to {int(0.9 * free / row):,} or less."
            )
        if buffer_size < stack + n_step + 2:
            fail(f"--buffer-size is {buffer_size}; with --n-step {n_step} it must be at least {stack + n_step + 2}.")
        frames, actions = gym.spaces.Box(0, 1, frame_shape, dtype), gym.spaces.Discrete(num_actions)
        super().__init__(
            buffer_size, frames, actions, device, optimize_memory_usage=True, handle_timeout_termination=False
        )
        self.actions = np.zeros(buffer_size, np.uint8)
        self.rewards = np.zeros(buffer_size, np.float32)
        self.dones = np.zeros(buffer_size, bool)  # terminations only
        self.timeouts = None  # a truncation needs no flag: its windows never become valid
        self.age = np.zeros(buffer_size, np.uint8)  # steps since the episode's first, at most 255
        self.valid = np.zeros(buffer_size, bool)  # rows that can be sampled
        self.episode_steps = 0  # of the running episode
        self.stack, self.n_step, self.gamma, self.prioritized, self.rng = stack, n_step, gamma, prioritized, rng
        self.priorities = SumTree(buffer_size) if prioritized else None
        self.max_priority = 1.0

    def add(self, obs, next_obs, actions, rewards, terminations, truncations) -> None:
        """Store one step; every argument has a leading axis of one environment."""
        frame_channels = self.observations.shape[2]
        row, next_row = self.pos, (self.pos + 1) % self.buffer_size
        # the two rows written below, and the old ones whose stacks reach back to them
        self.set_valid((row + np.arange(self.stack + 1)) % self.buffer_size, False)
        self.observations[row, 0] = obs[0, -frame_channels:]
        self.observations[next_row, 0] = next_obs[0, -frame_channels:]
        self.actions[row], self.rewards[row], self.dones[row] = actions[0], rewards[0], terminations[0]
        self.age[row] = min(self.episode_steps, 255)
        self.episode_steps += 1
        complete = min(self.n_step, self.episode_steps)  # windows, counted back from this row
        if terminations[0]:
            self.set_valid((row - np.arange(complete)) % self.buffer_size, True)
        elif complete == self.n_step:
            self.set_valid(np.array([row - self.n_step + 1]) % self.buffer_size, True)
        if terminations[0] or truncations[0]:
            self.episode_steps = 0
        cut = truncations[0] and not terminations[0]
        self.full = self.full or row + 1 + cut >= self.buffer_size
        self.pos = (row + 1 + cut) % self.buffer_size

    def set_valid(self, rows: np.ndarray, valid: bool) -> None:
        """Let `rows` (k,) be sampled, at the largest priority seen so far, or no longer."""
        if not valid and not self.valid[rows].any():
            return
        self.valid[rows] = valid
        if self.prioritized:
            self.priorities.set(rows, self.max_priority if valid else 0.0)

    def sample(self, batch_size: int) -> Batch:
        """Draw `batch_size` transitions with replacement: uniformly, or in proportion to their priorities."""
        if self.prioritized:  # stratified: one draw from each equal slice of the total
            slices = (np.arange(batch_size) + self.rng.random(batch_size)) / batch_size
            rows = self.priorities.find(slices * self.priorities.levels[-1][0])
            weights = 1 / np.sqrt(self.priorities.levels[0][rows] + 1e-10)
            return self._get_samples(rows, (weights / weights.max()).astype(np.float32))
        rows = self.rng.integers(self.size(), size=batch_size)
        while not self.valid[rows].all():
            wrong = ~self.valid[rows]
            rows[wrong] = self.rng.integers(self.size(), size=wrong.sum())
        return self._get_samples(rows, np.ones(batch_size, np.float32))

    def _get_samples(self, rows: np.ndarray, weights: np.ndarray) -> Batch:
        window = (rows[:, None] + np.arange(self.n_step)) % self.buffer_size  # (batch, n)
        going_on = np.cumprod(~self.dones[window], axis=1)  # after each step
        counted = np.concatenate([np.ones_like(going_on[:, :1]), going_on[:, :-1]], axis=1)  # up to the terminal step
        powers = self.gamma ** np.arange(self.n_step)
        rewards = (self.rewards[window] * counted * powers).sum(axis=1).astype(np.float32)
        discounts = (self.gamma**self.n_step * going_on[:, -1]).astype(np.float32)
        age = self.age[rows].astype(np.int64)
        next_age = np.where(going_on[:, -1], age + self.n_step, -1)  # no frames at all after a terminal
        arrays = (
            self._stack(rows, age),
            self.actions[rows].astype(np.int64),
            rewards,
            self._stack(rows + self.n_step, next_age),
            discounts,
        )
        tensors = [torch.from_numpy(array).to(self.device) for array in (*arrays, weights)]
        return Batch(*tensors[:5], rows, tensors[5])

    def _stack(self, rows: np.ndarray, age: np.ndarray) -> np.ndarray:
        """Gather the observations at `rows` (batch,), with zeros for frames before the episode's first."""
        back = np.arange(self.stack)[::-1]  # oldest first
        frames = self.observations[(rows[:, None] - back) % self.buffer_size, 0]  # (batch, stack, channels, h, w)
        frames[back > age[:, None]] = 0
        return frames.reshape(len(rows), -1, *frames.shape[3:])

    def update_priorities(self, rows: np.ndarray, losses: torch.Tensor) -> None:
        """Give the sampled `rows` (batch,) the priority sqrt(loss + 1e-10) of their `losses` (batch,)."""
        priorities = np.sqrt(losses.cpu().numpy().astype(np.float64) + 1e-10)
        self.priorities.set(rows, priorities)
        self.max_priority = max(self.max_priority, priorities.max())


# ------------------------------------------------------------------------------------------------------------ network
class SameConv2d(nn.Conv2d):
    """A convolution with SAME padding: its output has ceil(size / stride) rows and columns.

    Where the padding is odd, the extra row and column come after the image, as in Dopamine's JAX networks.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, kernel, stride = x.shape[-1], self.kernel_size[0], self.stride[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        before, after = total // 2, total - total // 2
        return super().forward(F.pad(x, (before, after, before, after)))


class Pixels(nn.Module):
    """Bytes to [0, 1]; MinAtar's booleans to 0 and 1."""

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return obs.float() / 255 if obs.dtype == torch.uint8 else obs.float()


def make_convolutions(obs_shape: tuple[int, ...], network: str) -> tuple[nn.Sequential, int, int]:
    """Return the convolutions, the length of their flattened output, and the units of the dense layer above them."""
    if obs_shape[1:] == (10, 10):  # MinAtar: Young and Tian, 2019
        layers, units = [nn.Conv2d(obs_shape[0], 16, 3), nn.ReLU()], 128
    else:
        conv = {"dopamine": SameConv2d, "nature": nn.Conv2d}[network]
        layers = [conv(obs_shape[0], 32, 8, 4), nn.ReLU(), conv(32, 64, 4, 2), nn.ReLU(), conv(64, 64, 3, 1), nn.ReLU()]
        units = 512
    convolutions = nn.Sequential(Pixels(), *layers, nn.Flatten())
    with torch.no_grad():
        return convolutions, convolutions(torch.zeros(1, *obs_shape)).shape[1], units


def xavier_uniform(module: nn.Module, generator: torch.Generator) -> None:
    """Initialise every layer: weights Xavier uniform (Glorot and Bengio, 2010, eq. 16), biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)


class QNetwork(nn.Module):
    """Q(s, a) for every action."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, args: Args):
        super().__init__()
        self.convolutions, size, units = make_convolutions(obs_shape, args.network)
        self.dense = nn.Linear(size, units)
        self.head = nn.Linear(units, num_actions)
        xavier_uniform(self, torch.Generator().manual_seed(args.seed))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.dense(self.convolutions(obs))))  # (batch, actions)

    def q_values(self, obs: torch.Tensor) -> torch.Tensor:
        return self(obs)  # (batch, actions)


def make_network(obs_shape: tuple[int, ...], num_actions: int, args: Args) -> QNetwork:
    return QNetwork(obs_shape, num_actions, args)


# -------------------------------------------------------------------------------------------- act, the target, the loss
def act(
    q_network: nn.Module, obs: np.ndarray, epsilon: float, num_actions: int, rng: np.random.Generator
) -> np.ndarray:
    """Choose an action, shape (1,), epsilon-greedily."""
    if rng.random() < epsilon:
        return rng.integers(num_actions, size=1)
    with torch.inference_mode():
        return q_network.q_values(torch.from_numpy(obs).to(q_network.head.weight.device)).argmax(dim=1).cpu().numpy()


def td_target(target_network: nn.Module, batch: Batch) -> torch.Tensor:
    """r + gamma max_a Q(s', a; theta^-), shape (batch,): y_j of Mnih et al., 2015, algorithm 1."""
    with torch.no_grad():
        next_values = target_network(batch.next_obs).max(dim=1).values
        return batch.rewards + batch.discounts * next_values


def td_loss(q_network: nn.Module, batch: Batch, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The squared TD error of each transition and Q of each action taken, both (batch,)."""
    q_values = q_network(batch.obs).gather(1, batch.actions[:, None])[:, 0]
    return (targets - q_values) ** 2, q_values


# ------------------------------------------------------------------------------------------- evaluation and checkpoints
def evaluate(q_network: nn.Module, args: Args, device, stream: int, video: Path | None = None) -> np.ndarray:
    """Play `eval_episodes` full games and return their raw returns; emulator and random numbers are its own.

    `stream` (at least 1) names the games' seeds; the first game is filmed where there is a path for `video`.
    """
    envs, rng = make_env(args), np.random.default_rng([args.seed, stream])
    returns, first_game = np.zeros(args.eval_episodes), []
    for episode in range(args.eval_episodes):
        obs, _ = envs.reset(seed=episode_seed(args.seed, stream, episode))
        done = False
        while not done:
            actions = act(q_network, obs, args.eval_epsilon, envs.single_action_space.n, rng)
            obs, rewards, terminations, truncations, _ = envs.step(actions)
            returns[episode] += rewards[0]
            done = terminations[0] or truncations[0]
            if episode == 0:
                first_game.append(actions)
    envs.close()
    if video:
        film(video, args, episode_seed(args.seed, stream, 0), first_game)
    return returns


def film(path: Path, args: Args, seed: int, game: list[np.ndarray]) -> None:
    """Play the actions of a game again, in an emulator that shows what a player would see, and write an MP4 of it."""
    import imageio_ffmpeg

    minatar = args.env_id.startswith("MinAtar/")
    colour = dict(frameskip=1, maxpool=False, grayscale=False, stack_num=1, img_height=210, img_width=160)
    envs = make_env(args, **colour)
    obs, _ = envs.reset(seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    size, fps = ((160, 160), 10) if minatar else ((320, 420), 60)
    mp4 = imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=2)
    mp4.send(None)
    for actions in game:
        for _ in range(1 if minatar else args.frame_skip):
            image = (envs.render()[0] * 255).astype(np.uint8) if minatar else obs[0, 0]
            mp4.send(
                np.ascontiguousarray(image.repeat(size[0] // image.shape[1], 0).repeat(size[0] // image.shape[1], 1))
            )
            obs, _, terminations, truncations, _ = envs.step(actions)
            if terminations[0] or truncations[0]:
                break
    mp4.close()
    envs.close()


def save_checkpoint(path: Path, q_network: nn.Module, args: Args, global_step: int) -> None:
    """Write the weights and every flag, aside and then renamed, so that no half file is ever seen."""
    state = {"agent": AGENT, "args": asdict(args), "global_step": global_step, "q_network": q_network.state_dict()}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, args: Args) -> tuple[Args, dict]:
    """Read a checkpoint of this agent; return its flags (those of the run group stay `args`') and its contents."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        agent, flags = state["agent"], state["args"]
    except OSError as error:
        fail(f"{path} could not be read: {error.strerror}.")
    except Exception:  # torch.load raises a dozen types on a damaged or foreign file; none of them runs its code
        fail(f"{path} is no checkpoint of these agents, or it is damaged.")
    if agent != AGENT:
        fail(f"{path} is a checkpoint of {agent}: play it with agents/{agent}.py.")
    run = {field.name for field in fields(RunArgs)}
    return replace(args, **{name: value for name, value in flags.items() if name not in run}), state


def play(args: Args) -> np.ndarray:
    """Play the games of --eval-only, print their returns and return them, shape (eval_episodes,)."""
    check_args(args)
    args, state = load_checkpoint(Path(args.checkpoint), args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = make_env(args)
    q_network = make_network(envs.single_observation_space.shape, envs.single_action_space.n, args)
    q_network.load_state_dict(state["q_network"])
    name = f"{Path(args.checkpoint).stem}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}.mp4"
    video = Path(args.checkpoint).parent / "videos" / name if args.capture_video else None
    returns = evaluate(q_network.to(device), args, device, 1 + state["global_step"], video)
    print(f"{args.env_id}: mean return {returns.mean():.2f} over {len(returns)} games: {returns.tolist()}")
    if video:
        print(f"video: {video}")
    return returns


# ------------------------------------------------------------------------------------------------------------- training
class Progress:
    """A live bar where stderr is a terminal; elsewhere a plain line every half minute."""

    def __init__(self, total: int):
        self.total, self.start, self.last_line = total, time.monotonic(), time.monotonic()
        self.bar = tqdm(total=total, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def update(self, global_step: int, last_return: float, epsilon: float) -> None:
        if not self.bar.disable:
            self.bar.set_postfix_str(f"return {last_return:.1f}, epsilon {epsilon:.3f}", refresh=False)
            self.bar.update(global_step - self.bar.n)
        elif time.monotonic() - self.last_line > 30 or global_step == self.total:
            self.last_line = time.monotonic()
            speed = global_step / (self.last_line - self.start)
            left = tqdm.format_interval((self.total - global_step) / speed)
            print(
                f"step {global_step:,} of {self.total:,}, {speed:.0f} steps/s, {left} left, "
                f"last return {last_return:.1f}, epsilon {epsilon:.3f}",
                flush=True,
            )


def make_run_folder(args: Args, device, envs: gym.vector.VectorEnv) -> tuple[Path, SummaryWriter]:
    """Make a new folder for the run, with args.json and the TensorBoard log's texts in it."""
    stamp = int(time.time())
    while True:
        run_name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{stamp}"
        folder = Path("runs") / run_name
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            stamp += 1  # another run began in the same second
        except OSError as error:
            fail(f"the run's folder {folder} could not be made: {error.strerror}.")
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--verify", "HEAD"]
    packages = ["torch", "gymnasium", "ale-py", "minatar", "numpy", "stable-baselines3"]
    environment = {
        "env_id": args.env_id,
        "observation": str(envs.single_observation_space),
        "actions": int(envs.single_action_space.n),
        "frames_per_step": 1 if args.env_id.startswith("MinAtar/") else args.frame_skip,
    }
    record = {
        "agent": AGENT,
        "args": asdict(args),
        "environment": environment,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "packages": {
            name: importlib.metadata.version(name)
            for name in packages
            if importlib.util.find_spec(name.replace("-", "_"))
        },
        "git_commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
    }
    (folder / "args.json").write_text(json.dumps(record, indent=2) + "\n")
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=run_name,
            dir=str(folder),
            config=asdict(args),
            sync_tensorboard=True,
        )
    writer = SummaryWriter(str(folder))
    for title, table in [("hyperparameters", asdict(args)), ("environment", environment)]:
        rows = "\n".join(f"|{name}|{value}|" for name, value in table.items())
        writer.add_text(title, f"|name|value|\n|-|-|\n{rows}")
    flat = {
        name: value if isinstance(value, bool | int | float) else str(value) for name, value in asdict(args).items()
    }
    for summary in hparams(flat, {"charts/episodic_return": 0, "eval/episodic_return": 0}):
        writer.file_writer.add_summary(summary)
    return folder, writer


def epsilon_at(global_step: int, args: Args) -> float:
    """start_e until learning starts, then linearly to end_e over exploration_steps."""
    progress = (global_step - args.learning_starts) / max(args.exploration_steps, 1)
    return args.start_e + (args.end_e - args.start_e) * min(max(progress, 0.0), 1.0)


def train(args: Args) -> Path:
    """Train, log, evaluate; return the run's folder."""
    # ------------------------------------------------------------------------------------------------------- set-up
    check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = make_env(args)
    obs_space, num_actions = envs.single_observation_space, int(envs.single_action_space.n)
    replay = FrameReplay(
        args.buffer_size,
        obs_space.shape,
        obs_space.dtype,
        stack=1 if obs_space.dtype == bool else obs_space.shape[0],
        num_actions=num_actions,
        n_step=args.n_step,
        gamma=args.gamma,
        prioritized=args.prioritized,
        device=device,
        rng=np.random.default_rng([args.seed, 0, 1]),
    )
    rng = np.random.default_rng([args.seed, 0, 0])  # of exploration
    q_network = make_network(obs_space.shape, num_actions, args).to(device)
    target_network = make_network(obs_space.shape, num_actions, args).to(device)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    folder, writer = make_run_folder(args, device, envs)
    print(f"run folder: {folder} ({AGENT} on {args.env_id}, {device})", flush=True)
    progress, start_time = Progress(args.total_timesteps), time.monotonic()
    episode, episodic_return, episodic_length, last_return = 0, 0.0, 0, math.nan
    obs, _ = envs.reset(seed=episode_seed(args.seed, 0, episode))

    for global_step in range(1, args.total_timesteps + 1):
        # ------------------------------------------------------------------------------------------------------ act
        epsilon = epsilon_at(global_step - 1, args)
        actions = act(q_network, obs, epsilon, num_actions, rng)

        # ----------------------------------------------------------------------------------------------------- step
        next_obs, rewards, terminations, truncations, _ = envs.step(actions)
        episodic_return += float(rewards[0])
        episodic_length += 1

        # ---------------------------------------------------------------------------------------------------- store
        stored_rewards = np.clip(rewards, -1, 1) if args.clip_rewards else rewards
        replay.add(obs, next_obs, actions, stored_rewards, terminations, truncations)
        obs = next_obs
        if terminations[0] or truncations[0]:
            last_return = episodic_return
            writer.add_scalar("charts/episodic_return", episodic_return, global_step)
            writer.add_scalar("charts/episodic_length", episodic_length, global_step)
            episode, episodic_return, episodic_length = episode + 1, 0.0, 0
            obs, _ = envs.reset(seed=episode_seed(args.seed, 0, episode))  # in place of the autoreset step

        # ---------------------------------------------------------------------------------------------------- learn
        learning = global_step > args.learning_starts
        if learning and global_step % args.train_frequency == 0:
            batch = replay.sample(args.batch_size)
            losses, q_values = td_loss(q_network, batch, td_target(target_network, batch))
            loss = (batch.weights * losses).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if args.prioritized:
                replay.update_priorities(batch.indices, losses.detach())

        # --------------------------------------------------------------------------------------------------- target
        if learning and global_step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

        # ------------------------------------------------------------------------------------------------------ log
        progress.update(global_step, last_return, epsilon)
        if global_step % 1_000 == 0:
            writer.add_scalar("charts/epsilon", epsilon, global_step)
            writer.add_scalar("charts/SPS", global_step / (time.monotonic() - start_time), global_step)
            if global_step > args.learning_starts + args.train_frequency:
                writer.add_scalar("losses/td_loss", loss.item(), global_step)
                writer.add_scalar("losses/q_values", q_values.mean().item(), global_step)
                if not math.isfinite(loss.item()):
                    fail(f"the loss is {loss.item()} at step {global_step:,}: the run in {folder} was stopped.")
        last = global_step == args.total_timesteps
        if args.eval_episodes and (last or (args.eval_frequency and global_step % args.eval_frequency == 0)):
            video = folder / "videos" / f"step-{global_step}.mp4" if args.capture_video else None
            returns = evaluate(q_network, args, device, 1 + global_step, video)
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            tqdm.write(f"evaluation at step {global_step:,}: mean return {returns.mean():.2f} of {len(returns)} games")

        # ----------------------------------------------------------------------------------------------- checkpoint
        if last and args.save_model:
            save_checkpoint(folder / "model.pt", q_network, args, global_step)

    progress.bar.close()
    writer.close()
    envs.close()
    print(f"run folder: {folder}", flush=True)
    return folder


if __name__ == "__main__":
    args = parse_args()
    play(args) if args.eval_only else train(args)
