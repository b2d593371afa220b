# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "minatar==1.0.15", "stable-baselines3==2.9.2",
#   "tyro==1.0.17", "numpy==2.4.6", "tensorboard==2.21.0", "tqdm==4.70.1", "psutil==7.2.2", "imageio-ffmpeg==0.8.1",
# ]
# ///
"""DQN: regress Q(s, a) onto a bootstrapped return, from replayed transitions and a frozen copy of the network.

Mnih et al., "Human-level control through deep reinforcement learning", Nature 518, 2015. Read this file first: the
other agents are described by how they differ from it.
Departs from the paper as Dopamine (Castro et al., 2018) and the small-batch study (Obando-Ceron et al., 2023) do: Adam
and a squared error in place of RMSProp and a clipped one, sticky actions, game over as the only terminal, convolutions
with SAME padding. It can also use n-step returns (--n-step) and prioritized replay (--prioritized).

Full scale, 100 million frames as in the study:
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
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
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
    eval_only: bool = False  # play the weights of --checkpoint, with its flags for all but this group
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
    prioritized: bool = False  # sample transitions in proportion to their priority


@dataclass
class Args(AlgorithmArgs, TrainingArgs, EnvironmentArgs, RunArgs):
    """Every flag, flat: `args.batch_size`."""


def parse_args() -> Args:
    """Read the command line, with a box in --help for each group of flags."""
    groups = [
        ("run", RunArgs),
        ("environment", EnvironmentArgs),
        ("training", TrainingArgs),
        ("algorithm", AlgorithmArgs),
    ]
    parsed = tyro.cli(tyro.conf.OmitArgPrefixes[make_dataclass("Groups", groups)], description=__doc__)
    return Args(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def fail(message: str) -> NoReturn:
    """Answer wrong input: one sentence on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuse what cannot work before anything is allocated or written."""
    may_be_zero = ["seed", "eval_episodes", "eval_frequency", "noop_max", "learning_starts", "exploration_steps"]
    for name, value in asdict(args).items():
        flag, low = "--" + name.replace("_", "-"), 0 if name in may_be_zero else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < low:
            fail(f"{flag} is {value}, and must be at least {low}.")
        if isinstance(value, float) and not 0 <= value <= 1:
            fail(f"{flag} is {value}, and must be from 0 to 1.")
    if args.eval_only != (args.checkpoint is not None):
        fail("--eval-only and --checkpoint FILE go together: give both or neither.")
    if not args.eval_episodes and (args.capture_video or args.eval_only or args.eval_frequency):
        fail("--eval-episodes 0 leaves no game for --eval-only, --eval-frequency or --capture-video: raise it.")
    for package, needed in [("wandb", args.track), ("minatar", args.env_id.startswith("MinAtar/"))]:
        if needed and not importlib.util.find_spec(package):
            fail(f"{'--track' if package == 'wandb' else args.env_id} needs a package: pip install {package}.")


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
    (1, channels, 10, 10) bool on MinAtar. `overrides` replace some of the keywords for ALE.
    """
    gym.register_envs(ale_py)
    if importlib.util.find_spec("minatar") and "MinAtar/Breakout-v1" not in gym.registry:
        importlib.import_module("minatar.gym").register_envs()
    games = {name.split("/")[1].lower(): name for name in gym.registry if re.match("ALE/.*-v5|MinAtar/.*-v1", name)}
    if args.env_id not in games.values():
        if args.env_id in gym.registry and isinstance(gym.make(args.env_id).action_space, gym.spaces.Box):
            fail(f"{args.env_id} has continuous actions, and this agent chooses among discrete ones.")
        near = difflib.get_close_matches(args.env_id.split("/")[-1].lower(), games, cutoff=0.4)
        fail(f"no game is called {args.env_id!r}: try {', '.join(games[name] for name in near) or 'ALE/Pong-v5'}.")
    if args.env_id.startswith("MinAtar/"):
        kwargs = {"max_episode_steps": args.max_episode_steps, "disable_env_checker": True, "render_mode": "rgb_array"}
        return gym.vector.SyncVectorEnv([lambda: MinAtar(gym.make(args.env_id, **kwargs))])
    chance = {"repeat_action_probability": args.sticky_actions, "noop_max": args.noop_max}
    length = {"frameskip": args.frame_skip, "max_num_frames_per_episode": args.frame_skip * args.max_episode_steps}
    picture = {"maxpool": True, "grayscale": True, "img_height": 84, "img_width": 84, "stack_num": 4}
    rules = {"use_fire_reset": False, "episodic_life": False, "reward_clipping": False, "full_action_space": False}
    kwargs = {"num_envs": 1, "num_threads": 1, **chance, **length, **picture, **rules, **overrides}
    try:
        return gym.make_vec(args.env_id, vectorization_mode="vector_entry_point", **kwargs)
    except (gym.error.Error, OSError, AssertionError, RuntimeError) as error:
        fail(f"the game {args.env_id} is not installed: {str(error).splitlines()[0]}")


def episode_seed(seed: int, stream: int, episode: int) -> int:
    """Derive a game's seed from the run's seed, the stream (0: training, else an evaluation) and the game's number."""
    return int(np.random.SeedSequence([seed, stream, episode]).generate_state(1)[0] >> 1)  # below 2**31


# ------------------------------------------------------------------------------------------------------------- replay
class Batch(NamedTuple):
    obs: torch.Tensor  # (batch, channels, height, width)
    actions: torch.Tensor  # (batch,) int64
    next_obs: torch.Tensor  # (batch, channels, height, width) n steps on; zeros after a termination
    rewards: torch.Tensor  # (batch,) discounted sum of the rewards of n steps, or fewer before a termination
    discounts: torch.Tensor  # (batch,) gamma**n; 0 after a termination
    weights: torch.Tensor  # (batch,) importance weights; all 1 without priorities
    rows: np.ndarray  # (batch,) in the replay


class SumTree:
    """Numbers that are drawn in proportion to their value (Schaul et al., 2016, appendix B.2.1).

    A node has 64 children in place of 2, so that a whole batch walks down a million leaves in four vectorised steps.
    """

    def __init__(self, capacity: int):
        self.levels = [np.zeros(-(-capacity // 64) * 64)]  # leaves first, root last
        while len(self.levels[-1]) > 1:
            nodes = len(self.levels[-1]) // 64
            self.levels.append(np.zeros(-(-nodes // 64) * 64 if nodes > 1 else 1))

    def set(self, leaves: np.ndarray, values: np.ndarray | float) -> None:
        """Set `leaves` (k,) to `values` (k,) or to one number, and recompute the sums above them."""
        self.levels[0][leaves] = values
        for children, parents in zip(self.levels[:-1], self.levels[1:], strict=True):
            leaves = leaves // 64
            parents[leaves] = children.reshape(-1, 64)[leaves].sum(axis=1)

    def find(self, points: np.ndarray) -> np.ndarray:
        """Return the leaves (k,) in whose slice of [0, total) the `points` (k,) lie."""
        leaves = np.zeros(len(points), np.int64)
        for children in self.levels[-2::-1]:
            ends = children.reshape(-1, 64)[leaves].cumsum(axis=1)  # (k, 64)
            child = (ends <= points[:, None]).sum(axis=1)
            child = np.minimum(child, (ends < ends[:, -1:]).sum(axis=1))  # rounding must not lead past the last slice
            points = points - np.where(child > 0, ends[np.arange(len(points)), child - 1], 0)
            leaves = leaves * 64 + child
        return leaves


class FrameReplay(ReplayBuffer):
    """SB3's replay with each frame stored once; stacks and n-step returns are built when sampling.

    A row holds the newest frame of s_t, a_t, r_t and whether s_{t+1} is terminal. The newest frame of s_{t+1} goes to
    the row after it: the next step overwrites it with the same, but after a truncation it stays. A row becomes valid,
    that is, can be sampled, when its n steps are complete or the episode terminates within them, and stays so until
    its frames are overwritten. A window that would cross a truncation never becomes valid.
    """

    def __init__(self, obs_space: gym.spaces.Box, num_actions: int, args: Args, device, rng: np.random.Generator):
        self.stack = 1 if obs_space.dtype == bool else obs_space.shape[0]  # MinAtar's channels are one frame
        frame = gym.spaces.Box(0, 1, (obs_space.shape[0] // self.stack, *obs_space.shape[1:]), obs_space.dtype)
        row_bytes = math.prod(frame.shape) * frame.dtype.itemsize + 24  # all else takes 16
        gigabytes, free = args.buffer_size * row_bytes / 1e9, psutil.virtual_memory().available / 1e9
        if gigabytes > free:
            advice = f"lower --buffer-size, {args.buffer_size:,}, to {int(0.9e9 * free / row_bytes):,}."
            fail(f"the replay takes {gigabytes:.1f} GB and {free:.1f} GB of memory are free: {advice}")
        if args.buffer_size < self.stack + args.n_step + 2:
            fail(f"--buffer-size {args.buffer_size} holds no window of --n-step {args.n_step}: raise it.")
        actions = gym.spaces.Discrete(num_actions)
        super().__init__(args.buffer_size, frame, actions, device, 1, True, handle_timeout_termination=False)
        self.actions = np.zeros(args.buffer_size, np.uint8)
        self.rewards = np.zeros(args.buffer_size, np.float32)
        self.dones = np.zeros(args.buffer_size, bool)  # terminations; truncations leave no mark but invalid rows
        self.timeouts = None
        self.age = np.zeros(args.buffer_size, np.uint8)  # steps since the episode's first, at most 255
        self.valid = np.zeros(args.buffer_size, bool)
        self.priorities, self.max_priority = SumTree(args.buffer_size) if args.prioritized else None, 1.0
        self.episode_steps, self.n_step, self.gamma, self.rng = 0, args.n_step, args.gamma, rng

    def add(self, obs, next_obs, actions, rewards, terminations, truncations) -> None:
        """Store a step; every argument has a leading axis of one environment."""
        row, channels = self.pos, self.observations.shape[2]
        self.set_valid(
            (row + np.arange(self.stack + 1)) % self.buffer_size, False
        )  # those whose stacks are overwritten
        self.observations[row, 0] = obs[0, -channels:]
        self.observations[(row + 1) % self.buffer_size, 0] = next_obs[0, -channels:]
        self.actions[row], self.rewards[row], self.dones[row] = actions[0], rewards[0], terminations[0]
        self.age[row] = min(self.episode_steps, 255)
        self.episode_steps += 1
        complete = np.arange(self.n_step)[: self.episode_steps]  # the windows that end here, as steps back
        if not terminations[0]:
            complete = complete[self.n_step - 1 :]
        self.set_valid((row - complete) % self.buffer_size, True)
        if terminations[0] or truncations[0]:
            self.episode_steps = 0
        rows = 1 if terminations[0] or not truncations[0] else 2
        self.full = self.full or row + rows >= self.buffer_size
        self.pos = (row + rows) % self.buffer_size

    def set_valid(self, rows: np.ndarray, valid: bool) -> None:
        """Let `rows` (k,) be sampled, at first with the largest priority seen so far, or no longer."""
        if self.priorities and (valid or self.valid[rows].any()):
            self.priorities.set(rows, self.max_priority if valid else 0)
        self.valid[rows] = valid

    def sample(self, batch_size: int) -> Batch:
        """Draw transitions with replacement: uniformly, or in proportion to their priorities."""
        if self.priorities:
            points = (np.arange(batch_size) + self.rng.random(batch_size)) / batch_size  # one in each equal slice
            rows = self.priorities.find(points * self.priorities.levels[-1][0])
            weights = 1 / np.sqrt(self.priorities.levels[0][rows] + 1e-10)
            return self._get_samples(rows, weights / weights.max())
        rows = self.rng.integers(self.size(), size=batch_size)
        while not self.valid[rows].all():
            rows = np.where(self.valid[rows], rows, self.rng.integers(self.size(), size=batch_size))
        return self._get_samples(rows, np.ones(batch_size))

    def _get_samples(self, rows: np.ndarray, weights: np.ndarray) -> Batch:
        window = (rows[:, None] + np.arange(self.n_step)) % self.buffer_size  # (batch, n)
        alive = np.cumprod(~self.dones[window], axis=1)  # after each step
        counts = np.hstack([np.ones_like(alive[:, :1]), alive[:, :-1]])  # rewards up to the terminal step's
        rewards = (self.rewards[window] * counts * self.gamma ** np.arange(self.n_step)).sum(axis=1)
        age = self.age[rows].astype(np.int64)
        obs = self._get_stacks(rows, age)
        next_obs = self._get_stacks(rows + self.n_step, np.where(alive[:, -1], age + self.n_step, -1))
        floats = [self.to_torch(x).float() for x in (rewards, self.gamma**self.n_step * alive[:, -1], weights)]
        actions = self.to_torch(self.actions[rows]).long()
        return Batch(self.to_torch(obs, False), actions, self.to_torch(next_obs, False), *floats, rows)

    def _get_stacks(self, rows: np.ndarray, age: np.ndarray) -> np.ndarray:
        """Gather the observations at `rows` (batch,), with zeros for the frames that are older than the episode."""
        back = np.arange(self.stack)[::-1]  # oldest first
        frames = self.observations[(rows[:, None] - back) % self.buffer_size, 0]  # (batch, stack, channels, h, w)
        frames[back > age[:, None]] = 0
        return frames.reshape(len(rows), -1, *frames.shape[3:])

    def update_priorities(self, rows: np.ndarray, losses: torch.Tensor) -> None:
        """Set the priorities of the sampled `rows` (batch,) to sqrt(loss + 1e-10)."""
        priorities = np.sqrt(losses.detach().cpu().numpy() + 1e-10)
        self.priorities.set(rows, priorities)
        self.max_priority = max(self.max_priority, float(priorities.max()))


# ------------------------------------------------------------------------------------------------------------ network
class SameConv2d(nn.Conv2d):
    """A convolution to ceil(size / stride) rows and columns; odd padding has its extra one after the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, kernel, stride = x.shape[-1], self.kernel_size[0], self.stride[0]
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        before, after = total // 2, total - total // 2
        return super().forward(F.pad(x, (before, after, before, after)))


class Pixels(nn.Module):
    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return obs.float() / 255 if obs.dtype == torch.uint8 else obs.float()  # MinAtar's are 0 and 1


def make_convolutions(obs_shape: tuple[int, ...], network: str) -> tuple[nn.Sequential, int, int]:
    """Return the convolutions, the length of their flattened output, and the width of the dense layer on top."""
    if obs_shape[1:] == (10, 10):  # MinAtar: Young and Tian, 2019
        layers, width = [nn.Conv2d(obs_shape[0], 16, 3), nn.ReLU()], 128
    else:
        conv, width = {"dopamine": SameConv2d, "nature": nn.Conv2d}[network], 512
        layers = [conv(obs_shape[0], 32, 8, 4), nn.ReLU(), conv(32, 64, 4, 2), nn.ReLU(), conv(64, 64, 3, 1), nn.ReLU()]
    convolutions = nn.Sequential(Pixels(), *layers, nn.Flatten())
    return convolutions, convolutions(torch.zeros(1, *obs_shape)).shape[1], width


def xavier_uniform(network: nn.Module, generator: torch.Generator) -> None:
    """Initialise weights as Glorot and Bengio, 2010, eq. 16, and biases with zeros."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)


class QNetwork(nn.Module):
    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, args: Args):
        super().__init__()
        self.convolutions, size, width = make_convolutions(obs_shape, args.network)
        self.dense = nn.Linear(size, width)
        self.head = nn.Linear(width, num_actions)
        xavier_uniform(self, torch.Generator().manual_seed(args.seed))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.dense(self.convolutions(obs))))  # (batch, actions)

    def q_values(self, obs: torch.Tensor) -> torch.Tensor:
        return self(obs)  # (batch, actions)


# ------------------------------------------------------------------------------------------ act, the target, the loss
def act(q_network: nn.Module, obs: np.ndarray, epsilon: float, num_actions: int, rng: np.random.Generator, device):
    """Choose an action epsilon-greedily: an array of shape (1,)."""
    if rng.random() < epsilon:
        return rng.integers(num_actions, size=1)
    with torch.inference_mode():
        return q_network.q_values(torch.from_numpy(obs).to(device)).argmax(dim=1).cpu().numpy()


@torch.no_grad()
def td_target(target_network: nn.Module, batch: Batch) -> torch.Tensor:
    """Return r + gamma max_a Q(s', a; theta^-), of shape (batch,): y_j in algorithm 1 of Mnih et al., 2015."""
    return batch.rewards + batch.discounts * target_network(batch.next_obs).max(dim=1).values


def td_loss(q_network: nn.Module, batch: Batch, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared TD error of every transition and Q of the actions taken, both (batch,)."""
    q_values = q_network(batch.obs).gather(1, batch.actions[:, None])[:, 0]
    return (targets - q_values) ** 2, q_values  # (y_j - Q(s_j, a_j; theta))^2


# ------------------------------------------------------------------------------------------- evaluation and checkpoints
def evaluate(q_network: nn.Module, args: Args, device, stream: int, video: Path | None) -> np.ndarray:
    """Play full games and return their raw returns (eval_episodes,), with emulator and random numbers of its own.

    `stream` (at least 1) seeds the games; the first is filmed where `video` names a file.
    """
    envs, rng = make_env(args), np.random.default_rng([args.seed, stream])
    returns, first_game = np.zeros(args.eval_episodes), []
    for episode in range(args.eval_episodes):
        obs, _ = envs.reset(seed=episode_seed(args.seed, stream, episode))
        done = False
        while not done:
            actions = act(q_network, obs, args.eval_epsilon, envs.single_action_space.n, rng, device)
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
    """Play the actions of a game once more, in an emulator that shows every frame in colour, and write an MP4."""
    import imageio_ffmpeg

    minatar = args.env_id.startswith("MinAtar/")
    colour = {"frameskip": 1, "maxpool": False, "grayscale": False, "stack_num": 1, "img_height": 210, "img_width": 160}
    envs = make_env(args, **colour)
    obs, _ = envs.reset(seed=seed)
    path.parent.mkdir(exist_ok=True)
    size, scale, fps = ((160, 160), 16, 10) if minatar else ((320, 420), 2, 60)
    mp4 = imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=2)
    mp4.send(None)
    for actions in game:
        for _ in range(1 if minatar else args.frame_skip):
            image = (envs.render()[0] * 255).astype(np.uint8) if minatar else obs[0, 0]
            mp4.send(np.ascontiguousarray(image.repeat(scale, 0).repeat(scale, 1)))
            obs, _, terminations, truncations, _ = envs.step(actions)
            if terminations[0] or truncations[0]:
                break
    mp4.close()
    envs.close()


def save_checkpoint(path: Path, q_network: nn.Module, args: Args, global_step: int) -> None:
    """Write weights and flags aside, then rename, so that a file under this name is always whole."""
    state = {"agent": AGENT, "args": asdict(args), "global_step": global_step, "weights": q_network.state_dict()}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(args: Args) -> tuple[Args, int, dict]:
    """Read --checkpoint; return its flags, but the run group of `args`, its step and its weights."""
    try:
        state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        agent, flags, step, weights = (state[key] for key in ("agent", "args", "global_step", "weights"))
    except OSError as error:
        fail(f"{args.checkpoint} could not be read: {error.strerror}.")
    except Exception:  # a damaged or foreign file; torch.load has a dozen ways to say so
        fail(f"{args.checkpoint} is damaged, or no checkpoint of these agents.")
    if agent != AGENT:
        fail(f"{args.checkpoint} is a checkpoint of {agent}, not of {AGENT}: play it with agents/{agent}.py.")
    mine = {field.name for field in fields(RunArgs)}
    return replace(args, **{name: value for name, value in flags.items() if name not in mine}), step, weights


# ------------------------------------------------------------------------------------------------------------- training
def make_run_folder(args: Args, device, envs: gym.vector.VectorEnv) -> tuple[Path, SummaryWriter]:
    """Make a new run folder that holds args.json and a TensorBoard log with the same facts."""
    stamp = int(time.time())
    while (folder := Path(f"runs/{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{stamp}")).exists():
        stamp += 1
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--verify", "HEAD"]
    packages = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    environment = {
        "observations": str(envs.single_observation_space),
        "actions": int(envs.single_action_space.n),
        "frames_per_step": 1 if args.env_id.startswith("MinAtar/") else args.frame_skip,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "packages": {name: packages.get(name) for name in ["torch", "gymnasium", "ale-py", "minatar", "numpy"]},
        "git_commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
    }
    try:
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"agent": AGENT, "args": asdict(args), **environment}, indent=2))
    except OSError as error:
        fail(f"the run folder {folder} could not be made: {error.strerror}.")
    if args.track:
        options = {"name": folder.name, "dir": str(folder), "config": asdict(args), "sync_tensorboard": True}
        importlib.import_module("wandb").init(**options)
    writer = SummaryWriter(str(folder))
    for title, table in [("hyperparameters", asdict(args)), ("environment", environment)]:
        writer.add_text(title, "|name|value|\n|-|-|\n" + "\n".join(f"|{key}|{value}|" for key, value in table.items()))
    values = {
        key: value if isinstance(value, bool | int | float) else str(value) for key, value in asdict(args).items()
    }
    for summary in hparams(values, {"charts/episodic_return": 0, "eval/episodic_return": 0}):
        writer.file_writer.add_summary(summary)
    return folder, writer


def train(args: Args) -> Path | None:
    """Train, evaluate and return the run folder; with --eval-only just play."""
    check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.eval_only:
        args, global_step, weights = load_checkpoint(args)
    envs = make_env(args)
    obs_space, num_actions = envs.single_observation_space, int(envs.single_action_space.n)
    q_network = QNetwork(obs_space.shape, num_actions, args).to(device)
    if args.eval_only:
        q_network.load_state_dict(weights)
        video = Path(args.checkpoint).with_suffix(f".seed{args.seed}.mp4") if args.capture_video else None
        returns = evaluate(q_network, args, device, 1 + global_step, video)
        return print(f"{args.env_id}: mean return {returns.mean():.2f} of {len(returns)} games: {returns.tolist()}")

    target_network = QNetwork(obs_space.shape, num_actions, args).to(device)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    replay = FrameReplay(obs_space, num_actions, args, device, np.random.default_rng([args.seed, 0, 1]))
    rng = np.random.default_rng([args.seed, 0, 0])  # of exploration
    folder, writer = make_run_folder(args, device, envs)
    print(f"run folder: {folder} ({device})", flush=True)
    bar = tqdm(total=args.total_timesteps, unit=" steps", dynamic_ncols=True, disable=not sys.stderr.isatty())
    start = last_line = time.monotonic()
    losses = None
    episode, episodic_return, episodic_length, last_return = 0, 0.0, 0, math.nan
    obs, _ = envs.reset(seed=episode_seed(args.seed, 0, episode))

    for global_step in range(1, args.total_timesteps + 1):
        # ------------------------------------------------------------------------------------------------------ act
        decay = [args.learning_starts, args.learning_starts + args.exploration_steps]
        epsilon = float(np.interp(global_step, decay, [args.start_e, args.end_e]))
        actions = act(q_network, obs, epsilon, num_actions, rng, device)

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
            obs, _ = envs.reset(seed=episode_seed(args.seed, 0, episode))  # in place of an autoreset step

        # ---------------------------------------------------------------------------------------------------- learn
        if global_step > args.learning_starts and global_step % args.train_frequency == 0:
            batch = replay.sample(args.batch_size)
            losses, q_values = td_loss(q_network, batch, td_target(target_network, batch))
            loss = (batch.weights * losses).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if args.prioritized:
                replay.update_priorities(batch.rows, losses)

        # --------------------------------------------------------------------------------------------------- target
        if global_step > args.learning_starts and global_step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

        # ------------------------------------------------------------------------------------------------------ log
        status = f"return {last_return:.1f}, epsilon {epsilon:.3f}"
        bar.set_postfix_str(status, refresh=False)
        bar.update()
        if bar.disable and (time.monotonic() - last_line > 30 or global_step == args.total_timesteps):
            last_line = time.monotonic()  # output is no terminal: a plain line now and then
            speed = global_step / (last_line - start)
            left = tqdm.format_interval((args.total_timesteps - global_step) / speed)
            print(
                f"step {global_step:,} of {args.total_timesteps:,}, {speed:.0f} steps/s, {left} left, {status}",
                flush=True,
            )
        if global_step % 1_000 == 0:
            writer.add_scalar("charts/epsilon", epsilon, global_step)
            writer.add_scalar("charts/SPS", global_step / (time.monotonic() - start), global_step)
            if losses is not None:
                writer.add_scalar("losses/td_loss", loss.item(), global_step)
                writer.add_scalar("losses/q_values", q_values.mean().item(), global_step)
                if not math.isfinite(loss.item()):
                    fail(f"the loss is {loss.item()} at step {global_step:,}: the run in {folder} is stopped.")
        last = global_step == args.total_timesteps
        if args.eval_episodes and (last or (args.eval_frequency and global_step % args.eval_frequency == 0)):
            video = folder / "videos" / f"step-{global_step}.mp4" if args.capture_video else None
            returns = evaluate(q_network, args, device, 1 + global_step, video)
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            tqdm.write(f"evaluation at step {global_step:,}: mean return {returns.mean():.2f} of {len(returns)} games")

        # ----------------------------------------------------------------------------------------------- checkpoint
        if last and args.save_model:
            save_checkpoint(folder / "model.pt", q_network, args, global_step)

    bar.close()
    writer.close()
    envs.close()
    print(f"run folder: {folder}", flush=True)
    return folder


if __name__ == "__main__":
    train(parse_args())
