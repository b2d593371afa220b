# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "minatar==1.0.15", "stable-baselines3==2.9.2",
#   "tyro==1.0.17", "numpy==2.4.6", "tensorboard==2.21.0", "tqdm==4.70.1", "psutil==7.2.2"]
# ///
"""DrQ(eps): DQN on randomly shifted images, for 100,000 steps of data (Kostrikov et al., 2021).

Read after der.py; differs in (1) the images of a batch, shifted and scaled: augment, (2) a dueling head of plain layers
and the Huber loss, (3) uniform replay, (4) epsilon in place of noise, (5) a new target network at every step.
Departs from the paper as Agarwal et al. (2021), who named it DrQ(eps), do: epsilon to 0.01, SAME padding.

400,000 frames, the benchmark (the study's 30 million: --batch-size 8 --total-timesteps 7500000):
    python agents/drq_eps.py --env-id ALE/Pong-v5

Two minutes on a CPU:
    python agents/drq_eps.py --env-id MinAtar/Breakout-v1 --total-timesteps 20000 --learning-rate 2.5e-4
        --adam-eps 3.125e-4 --image-pad 1
"""

import copy
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
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
from stable_baselines3.common.buffers import ReplayBuffer
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # ---- run
    exp_name: str = Path(__file__).stem  # names the folder
    seed: int = 1  # seed of every random generator
    cuda: bool = True  # use a GPU where there is one
    track: bool = False  # mirror the log to Weights & Biases
    eval_episodes: int = 100  # full games in each evaluation (0: none)
    eval_frequency: int = 0  # agent steps between evaluations (0: only after training)
    eval_epsilon: float = 0.001  # share of random actions in evaluation
    save_model: bool = False  # write model.pt at each evaluation
    checkpoint_frequency: int = 10_000  # agent steps between checkpoints (0: none)
    resume: str | None = None  # run folder, or auto: the newest unfinished run of these flags
    diagnostics_frequency: int = 10_000  # agent steps between diagnostics (0: none)
    # ---- environment
    env_id: str = "ALE/Pong-v5"  # any ALE/<Game>-v5 or MinAtar/<Game>-v1
    sticky_actions: float = 0.0  # chance that a frame repeats the last action (ALE; MinAtar has 0.1)
    noop_max: int = 30  # random no-op frames before a game, fewer than this (ALE)
    frame_skip: int = 4  # emulator frames in an agent step (ALE)
    max_episode_steps: int = 27_000  # agent steps before a game is truncated
    terminal_on_life_loss: bool = True  # a lost life ends the return and the frame stack, not the game (ALE)
    # ---- training
    total_timesteps: int = 100_000  # agent steps
    learning_rate: float = 1e-4  # the optimizer's step size
    adam_eps: float = 1.5e-4  # Adam's epsilon
    batch_size: int = 32  # transitions in an update
    buffer_size: int = 1_000_000  # transitions in the replay
    gamma: float = 0.99  # discount per agent step
    learning_starts: int = 1_600  # agent steps before the first update
    train_frequency: int = 1  # agent steps between updates
    target_network_frequency: int = 1  # agent steps between copies to the target network
    start_e: float = 1.0  # share of random actions at first
    end_e: float = 0.01  # share of random actions after the decay
    exploration_steps: int = 5_000  # agent steps of the decay, once learning starts
    network: Literal["dopamine", "nature", "dopamine-x4", "impala"] = "dopamine"  # convolutions (ALE)
    # ---- algorithm
    n_step: int = 10  # rewards in a return before it bootstraps
    image_pad: int = 4  # largest shift of an image, in pixels (0: none)
    intensity: float = 0.05  # standard deviation of an image's brightness factor

    def __post_init__(self):
        check_flags(self, image_pad=(0, 42))
        most = min(self.learning_starts, self.max_episode_steps, self.buffer_size // 2 - 6)
        if self.n_step > most:
            fail(f"--n-step is {self.n_step}: --learning-starts, --max-episode-steps and --buffer-size allow {most}.")


# ======================================= the algorithm =======================================
class Batch(NamedTuple):
    obs: Tensor  # (batch, 4, 84, 84) bytes, or MinAtar's (batch, 10, 10, channels)
    actions: Tensor  # (batch,) int64
    rewards: Tensor  # (batch,) discounted sum of n rewards, cut at a termination
    next_obs: Tensor  # like obs, n steps on; zeros after a termination
    discounts: Tensor  # (batch,) gamma^n, or 0 after a termination
    rows: np.ndarray  # (batch,) in the replay


class DuelingNetwork(nn.Module):
    """From observations to Q-values, (batch, actions)."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, args: Args):
        super().__init__()
        self.convolutions, size, width = make_convolutions(obs_shape, args.network)
        self.dense = nn.Sequential(nn.Linear(size, width), nn.ReLU())
        self.head = nn.Linear(width, num_actions)
        self.value = nn.Linear(width, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> Tensor:
        features = self.dense(self.convolutions(obs))
        advantage = self.head(features)
        return self.value(features) + advantage - advantage.mean(dim=1, keepdim=True)  # Wang et al., eq. 9

    def q_values(self, obs: Tensor) -> Tensor:
        return self(obs)  # distributional agents: the mean


def augment(obs: Tensor, image_pad: int, intensity: float) -> Tensor:
    """Shift each stack, repeating its edge, and scale its brightness: (batch, channels, side, side), about 0 to 1."""
    if obs.dtype == torch.bool:
        obs = obs.movedim(3, 1)  # MinAtar's channels to the front
    count, channels, side, _ = obs.shape
    shifts = torch.randint(-image_pad, image_pad + 1, (2, count, 1), device=obs.device)
    factors = 1 + intensity * torch.randn(count, 1, 1, 1, device=obs.device).clamp(-2, 2)
    rows, columns = (torch.arange(side, device=obs.device) + shifts).clamp(0, side - 1)  # (batch, side) both
    pixels = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)  # (batch, side * side)
    shifted = obs.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1)).unflatten(2, (side, side))
    return (shifted / 255 if obs.dtype == torch.uint8 else shifted.float()) * factors


@torch.inference_mode()
def act(q_network: nn.Module, obs: np.ndarray, epsilon: float, num_actions: int, rng, device) -> np.ndarray:
    """Choose an action epsilon-greedily, of shape (1,)."""
    if rng.random() < epsilon:
        return rng.integers(num_actions, size=1)
    q_values = q_network.q_values(torch.from_numpy(obs).to(device))
    return q_values.argmax(dim=1).cpu().numpy()


@torch.no_grad()
def double_target(q_network: DuelingNetwork, target_network: DuelingNetwork, batch: Batch) -> Tensor:
    """r + gamma Q(s', argmax_a Q(s', a; theta); theta^-), of shape (batch,): van Hasselt et al., 2016, eq. 4."""
    best = q_network(batch.next_obs).argmax(dim=1, keepdim=True)
    return batch.rewards + batch.discounts * target_network(batch.next_obs).gather(1, best)[:, 0]


def huber_loss(q_network: DuelingNetwork, batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The Huber loss (threshold 1) of Q(s_j, a_j), and that, both (batch,)."""
    q_values = q_network(batch.obs).gather(1, batch.actions[:, None])[:, 0]
    return nn.functional.huber_loss(q_values, targets, reduction="none"), q_values


def train(args: Args) -> Path:
    """Train, evaluate, and return the run's folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    envs = make_life_env(args)
    obs_space = envs.single_observation_space
    num_actions = int(envs.single_action_space.n)

    q_network = DuelingNetwork(obs_space.shape, num_actions, args)
    q_network.to(device, memory_format=torch.channels_last)  # faster convolutions
    target_network = copy.deepcopy(q_network)
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)
    replay = FrameReplay(obs_space, args, device, rng)

    global_step = 0  # agent steps so far
    episode = 0  # number of the game that is being played
    episode_actions = []  # its actions
    episodic_return = 0.0  # its raw rewards
    last_return = math.nan  # of the game before
    updates = []  # loss and gradient norm of each, for the diagnostics
    obs = reset(envs, args.seed, TRAINING, episode)

    folder = make_run_folder(args, device)
    checkpoint = folder / "checkpoint.pt"
    parts = {"q_network": q_network, "target_network": target_network, "optimizer": optimizer, "replay": replay}
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, args, parts, rng)
        global_step = state["global_step"]
        episode = state["episode"]
        episode_actions = state["episode_actions"]
        updates = state["updates"]
        # the emulator is deterministic: the same actions lead to where the run stood
        obs = reset(envs, args.seed, TRAINING, episode)
        for action in episode_actions:
            obs, rewards, *_ = envs.step(np.array([action]))
            episodic_return += float(rewards[0])
    saved_step = global_step
    writer = make_writer(folder, args, global_step)

    def save_checkpoint():
        state = {name: part.state_dict() for name, part in parts.items()}
        state["random"] = random_states(rng)
        state["args"] = asdict(args)
        state["global_step"] = global_step
        state["episode"] = episode
        state["episode_actions"] = episode_actions
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
        due = args.eval_frequency and global_step > 0 and global_step % args.eval_frequency == 0
        if finished or due:  # first, so that an interrupted one is made again
            evaluate(args, make_life_env(args), q_network, global_step, device, folder, writer)
        if finished or STOPPED_BY:
            break
        global_step += 1

        # ---- act
        decay = (global_step - args.learning_starts) / max(args.exploration_steps, 1)
        epsilon = args.start_e + (args.end_e - args.start_e) * min(max(decay, 0), 1)
        actions = act(q_network, obs, epsilon, num_actions, rng, device)

        # ---- step and store
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        clipped = np.clip(rewards, -1, 1)  # one learning rate for games that score in ones and in thousands
        ended = terminations | infos.get("life_lost", False)  # for the learner; the game itself goes on
        replay.add(obs, next_obs, actions, clipped, ended, truncations)
        obs = next_obs
        episode_actions.append(int(actions[0]))
        episodic_return += float(rewards[0])
        if terminations[0] or truncations[0]:
            writer.add_scalar("charts/episodic_return", episodic_return, global_step)
            writer.add_scalar("charts/episodic_length", len(episode_actions), global_step)
            last_return = episodic_return
            episodic_return = 0.0
            episode += 1
            episode_actions = []
            obs = reset(envs, args.seed, TRAINING, episode)

        # ---- learn
        if global_step > args.learning_starts and global_step % args.train_frequency == 0:
            batch = replay.sample(args.batch_size, args.n_step, args.gamma)
            obs_images = augment(batch.obs, args.image_pad, args.intensity)
            next_images = augment(batch.next_obs, args.image_pad, args.intensity)
            batch = batch._replace(obs=obs_images, next_obs=next_images)
            targets = double_target(q_network, target_network, batch)
            huber_losses, q_values = huber_loss(q_network, batch, targets)
            loss = huber_losses.mean()
            optimizer.zero_grad()
            loss.backward()
            gradient_norm = nn.utils.get_total_norm([p.grad for p in q_network.parameters()])
            check_finite(loss + gradient_norm, global_step, checkpoint)
            optimizer.step()
            if args.diagnostics_frequency:
                updates.append([loss.item(), gradient_norm.item()])
            if global_step % 1_000 < args.train_frequency:
                writer.add_scalar("losses/td_loss", loss, global_step)
                writer.add_scalar("losses/q_values", q_values.mean(), global_step)
        if global_step > args.learning_starts and global_step % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

        # ---- log
        bar.update()
        if global_step % 1_000 == 0:
            bar.set_postfix_str(f"return {last_return:.1f}, epsilon {epsilon:.3f}", refresh=False)
            writer.add_scalar("charts/epsilon", epsilon, global_step)
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
        size = replay.size() * replay.observations[0].nbytes / 1e6
        print(f"stopping: writing a checkpoint of {size:,.1f} MB", flush=True)
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
TRAINING = 0  # the stream of games to learn from; an evaluation's is its step


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


class LifeStack(gym.vector.VectorWrapper):
    """Stack the last 4 frames, with zeros for those before the life's first; infos tell of a lost life."""

    def __init__(self, envs):
        super().__init__(envs)
        self.single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)

    def reset(self, **kwargs):
        obs, infos = self.env.reset(**kwargs)
        self.frames = np.pad(obs, [(0, 0), (3, 0), (0, 0), (0, 0)])
        self.lives = infos["lives"]
        return self.frames, infos

    def step(self, actions: np.ndarray):
        obs, *others, infos = self.env.step(actions)
        infos["life_lost"] = infos["lives"] < self.lives
        older = self.frames[:, 1:] * ~infos["life_lost"]
        self.frames = np.concatenate([older, obs], axis=1)
        self.lives = infos["lives"]
        return self.frames, *others, infos


def make_life_env(args: Args) -> gym.vector.VectorEnv:
    """Make the game with a LifeStack, where the flag asks for one and the game has lives."""
    if args.terminal_on_life_loss and args.env_id.startswith("ALE/"):
        return LifeStack(make_env(args, stack_num=1))
    return make_env(args)


# ---- replay
class FrameReplay(ReplayBuffer):
    """SB3's replay with each frame stored once: stacks and returns are built when sampling.

    Row t holds the newest frame of s_t, a_t, r_t, whether s_{t+1} is terminal, and its episode's age at t. The frame of
    s_{t+1} is in row t + 1; after a truncation it stays there, in a row without a step. A row is ready (may be sampled)
    once its n steps are complete, or the episode terminated in them.
    """

    arrays = ["observations", "actions", "rewards", "terminations", "ages", "ready"]
    counters = ["pos", "full", "episode_steps"]

    def __init__(self, obs_space: gym.spaces.Box, args: Args, device, rng):
        self.stack = 4 if args.env_id.startswith("ALE/") else 1  # MinAtar's channels are one frame
        frame_shape = obs_space.shape[1:] if self.stack == 4 else obs_space.shape
        extra_rows = args.total_timesteps // args.max_episode_steps  # after truncations
        rows = min(args.buffer_size, args.total_timesteps + extra_rows + 6)
        gigabytes = rows * (math.prod(frame_shape) + 24) / 1e9  # 19 of the 24 at most
        free = psutil.virtual_memory().available / 1e9
        if gigabytes > 0.9 * free:
            fail(f"the replay takes {gigabytes:.1f} GB and {free:.1f} GB are free: lower --buffer-size.")

        frames = gym.spaces.Box(0, 1, frame_shape, obs_space.dtype)  # bounds unused
        actions = gym.spaces.Discrete(1)
        super().__init__(rows, frames, actions, device, optimize_memory_usage=True, handle_timeout_termination=False)
        self.actions = np.zeros(rows, np.uint8)
        self.rewards = np.zeros(rows, np.float32)
        self.terminations = np.zeros(rows, bool)
        self.ages = np.full(rows, -1, np.int32)  # steps since the episode's first; -1: no step
        self.ready = np.zeros(rows, bool)
        self.episode_steps = 0
        self.n_step = args.n_step
        self.rng = rng

    def add(self, obs, next_obs, actions, rewards, terminations, truncations):
        """Store a step; every argument has a leading axis of one environment."""
        row = self.pos
        following = (row + 1) % self.buffer_size
        newest = -1 if self.stack == 4 else slice(None)
        spoiled = (row + np.arange(self.stack + 1)) % self.buffer_size  # they need a frame that is written now
        self.mark(spoiled, ready=False)

        self.observations[row, 0] = obs[0, newest]
        self.observations[following, 0] = next_obs[0, newest]
        self.actions[row] = actions[0]
        self.rewards[row] = rewards[0]
        self.terminations[row] = terminations[0]
        self.ages[row] = self.episode_steps
        self.ages[following] = -1

        # steps back to the windows that end here: of n steps, and of fewer if this one terminates
        nearest = 0 if terminations[0] else self.n_step - 1
        farthest = min(self.n_step - 1, self.episode_steps)
        complete = (row - np.arange(nearest, farthest + 1)) % self.buffer_size
        self.mark(complete, ready=True)

        ended = terminations[0] or truncations[0]
        self.episode_steps = 0 if ended else self.episode_steps + 1
        end = row + (2 if truncations[0] and not terminations[0] else 1)
        self.full = self.full or end >= self.buffer_size
        self.pos = end % self.buffer_size

    def mark(self, rows: np.ndarray, ready: bool):
        self.ready[rows] = ready

    def draw(self, batch_size: int) -> np.ndarray:
        """Draw rows that are ready, uniformly and with replacement."""
        rows = self.rng.integers(self.size(), size=batch_size)
        while not self.ready[rows].all():
            unready = ~self.ready[rows]
            rows[unready] = self.rng.integers(self.size(), size=unready.sum())
        return rows

    def sample(self, batch_size: int, n: int, gamma: float) -> Batch:
        rows = self.draw(batch_size)
        steps = np.arange(n)
        window = (rows[:, None] + steps) % self.buffer_size  # (batch, n)
        alive = np.cumprod(~self.terminations[window], axis=1)  # 1 up to the termination
        counted = np.insert(alive[:, :-1], 0, 1, axis=1)  # the terminating step's reward still counts
        rewards = (self.rewards[window] * counted * gamma**steps).sum(axis=1)
        discounts = gamma**n * alive[:, -1]
        next_ages = np.where(alive[:, -1], self.ages[rows] + n, -1)
        return Batch(
            self.stacks(rows, self.ages[rows]),
            self.to_torch(self.actions[rows]).long(),
            self.to_torch(rewards).float(),
            self.stacks(rows + n, next_ages),
            self.to_torch(discounts).float(),
            rows,
        )

    def stacks(self, rows: np.ndarray, ages: np.ndarray) -> Tensor:
        """Gather the observations at `rows` (batch,), with zeros for frames older than the episode."""
        back = np.arange(self.stack)[::-1]  # oldest first
        frames = self.observations[(rows[:, None] - back) % self.buffer_size, 0]
        frames[back > ages[:, None]] = 0
        return self.to_torch(frames if self.stack == 4 else frames[:, 0], copy=False)

    def probe(self) -> Tensor:
        """Draw 256 observations, by a generator of their own."""
        rows = np.random.default_rng(self.pos).choice(np.flatnonzero(self.ready), 256)
        return self.stacks(rows, self.ages[rows])

    def state_dict(self) -> dict:
        """Return all that changes, not copied; only rows in use."""
        used = self.buffer_size if self.full else self.pos + 1
        state = {name: getattr(self, name) for name in self.counters}
        for name in self.arrays:
            state[name] = torch.from_numpy(getattr(self, name)[:used])
        return state

    def load_state_dict(self, state: dict):
        for name in self.counters:
            setattr(self, name, state[name])
        for name in self.arrays:
            array = state[name].numpy()
            getattr(self, name)[: len(array)] = array


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


def evaluate(args: Args, envs, q_network: nn.Module, global_step: int, device, folder: Path, writer):
    """Play full games, keep the run's random state, and log the mean return."""
    if args.save_model:
        save(folder / "model.pt", {"args": asdict(args), "weights": q_network.state_dict()})
    if args.eval_episodes == 0:
        return
    player = copy.deepcopy(q_network).eval()  # without noise
    rng = np.random.default_rng([args.seed, global_step])
    returns = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for episode in range(args.eval_episodes):
            returns.append(0.0)
            obs = reset(envs, args.seed, global_step, episode)
            done = False
            while not done:
                if STOPPED_BY:
                    return
                actions = act(player, obs, args.eval_epsilon, envs.single_action_space.n, rng, device)
                obs, rewards, terminations, truncations, _ = envs.step(actions)
                returns[-1] += float(rewards[0])
                done = terminations[0] or truncations[0]
    writer.add_scalar("eval/episodic_return", np.mean(returns), global_step)
    tqdm.write(f"step {global_step:,}: mean return {np.mean(returns):.2f} of {returns}")


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
