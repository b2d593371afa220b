# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "ale-py==0.12.1", "minatar==1.0.15", "stable-baselines3==2.9.2",
#   "tyro==1.0.17", "numpy==2.4.6", "tensorboard==2.21.0", "tqdm==4.70.1", "psutil==7.2.2"]
# ///
"""PPO, proximal policy optimisation (Schulman et al., 2017): an actor and a critic learn from the actor's games.

Read after pqn.py; differs in (1) the network is a policy and a value, the games are played by drawing from the policy,
(2) advantages by GAE instead of Q(lambda) returns, (3) the clipped loss, (4) Adam, and no LayerNorm. Departs from the
paper as CleanRL does (the value's loss is clipped and weighs less, advantages are normalised, four epochs and not
three, --clip-coef stays), and from CleanRL's as pqn.py does.

400 million frames, as the study of parallel data (Mayor et al., 2025):
    python agents/ppo.py --env-id ALE/Pong-v5

A minute on a CPU:
    python agents/ppo.py --env-id MinAtar/Breakout-v1 --total-timesteps 200000 --num-envs 32 --num-steps 32
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
from typing import NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # ---- run
    exp_name: str = Path(__file__).stem  # names the folder
    seed: int = 1  # seed of every random generator
    cuda: bool = True  # use a GPU where there is one
    track: bool = False  # mirror the log to Weights & Biases
    eval_episodes: int = 10  # full games in each evaluation (0: none)
    eval_frequency: int = 0  # agent steps between evaluations (0: only after training)
    eval_epsilon: float = 0.0  # share of random actions in evaluation
    save_model: bool = False  # write model.pt at each evaluation
    checkpoint_frequency: int = 250_000  # agent steps between checkpoints (0: none)
    resume: str | None = None  # run folder, or auto: the newest unfinished run of these flags
    diagnostics_frequency: int = 50_000  # agent steps between diagnostics (0: none)
    save_features: bool = False  # write 200 observations and their features with the diagnostics: features/<step>.npz
    # ---- environment
    env_id: str = "ALE/Pong-v5"  # any ALE/<Game>-v5 or MinAtar/<Game>-v1
    num_envs: int = 8  # games played side by side
    sticky_actions: float = 0.0  # chance that a frame repeats the last action (ALE; MinAtar has 0.1)
    noop_max: int = 30  # random no-op frames before a game, fewer than this (ALE)
    frame_skip: int = 4  # emulator frames in an agent step (ALE)
    max_episode_steps: int = 27_000  # agent steps before a game is truncated
    lost_life_ends_return: bool = True  # as a game over does, but the game goes on (ALE)
    # ---- training
    total_timesteps: int = 100_000_000  # agent steps
    learning_rate: float = 2.5e-4  # the optimizer's step size
    anneal_lr: bool = True  # lower the step size linearly, to 0 after the run
    adam_eps: float = 1e-5  # Adam's epsilon
    max_grad_norm: float = 0.5  # norm that gradients are clipped to
    num_steps: int = 128  # agent steps of each game in a roll-out
    num_minibatches: int = 4  # parts of a roll-out, an update each
    update_epochs: int = 4  # times that a roll-out is learned from
    gamma: float = 0.99  # discount per agent step
    # ---- algorithm
    gae_lambda: float = 0.95  # weight of the longer returns in an advantage
    clip_coef: float = 0.1  # how far a loss lets ratios move from 1, and values from the old ones
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value's loss
    target_kl: float | None = None  # approximate KL divergence that ends the epochs (none: never)
    separate_networks: bool = False  # a torso each for policy and value

    def __post_init__(self):
        check_flags(self, max_grad_norm=(1e-6, 1e6), vf_coef=(0, 1e6))
        batch_steps = self.num_envs * self.num_steps
        pieces = self.num_minibatches
        if batch_steps % pieces or batch_steps == pieces:  # one row has no deviation
            fail(f"--num-minibatches is {pieces}: it must divide --num-envs times --num-steps, and be less.")
        if batch_steps > self.total_timesteps:
            fail(f"--total-timesteps is {self.total_timesteps}: one roll-out has {batch_steps}.")


# ======================================= the algorithm =======================================
class Experience(NamedTuple):
    """Steps of a roll-out, all (batch, ...)."""

    obs: Tensor  # (4, 84, 84) bytes, or MinAtar's (10, 10, channels)
    actions: Tensor  # int64
    log_probs: Tensor  # log pi(a | s) when they were drawn
    values: Tensor  # V(s) then
    advantages: Tensor
    returns: Tensor  # advantages + values


class ActorCritic(nn.Module):
    """From observations to policies, of (batch, actions), and values, (batch,)."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, args: Args):
        super().__init__()
        self.convolutions, self.dense, width = make_torso(obs_shape, layer_norm=False)
        self.critic_torso = None  # shared
        if args.separate_networks:
            self.critic_torso = nn.Sequential(*make_torso(obs_shape, layer_norm=False)[:2])
        self.head = nn.Linear(width, num_actions)
        self.value = nn.Linear(width, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, math.sqrt(2))
                nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.head.weight, 0.01)  # nearly equal probabilities at first
        nn.init.orthogonal_(self.value.weight, 1)

    def forward(self, obs: Tensor) -> tuple[Categorical, Tensor]:
        features = self.dense(self.convolutions(obs))
        policy = Categorical(logits=self.head(features), validate_args=False)  # to validate would wait for the GPU
        if self.critic_torso is not None:
            features = self.critic_torso(obs)
        return policy, self.value(features)[:, 0]

    def q_values(self, obs: Tensor) -> Tensor:
        """Logits with Gumbel noise: their largest is a draw from the policy, so that `act` plays it."""
        policy, _ = self(obs)
        return policy.logits - torch.empty_like(policy.logits).exponential_().log()


@torch.inference_mode()
def act(q_network: nn.Module, obs: np.ndarray, epsilon: float, num_actions: int, rng, device) -> np.ndarray:
    """Choose an action epsilon-greedily, of shape (1,)."""
    if rng.random() < epsilon:
        return rng.integers(num_actions, size=1)
    q_values = q_network.q_values(torch.from_numpy(obs).to(device))
    return q_values.argmax(dim=1).cpu().numpy()


@torch.no_grad()
def predict(network: nn.Module, obs: Tensor):
    """The network's output, without a graph."""
    return network(obs)


def gae(rewards: Tensor, discounts: Tensor, values: Tensor, gae_lambda: float) -> Tensor:
    """A_t = delta_t + gamma lambda A_{t+1}, all (steps, games): Schulman et al., 2016, eq. 16.

    values are V(s_t), (steps + 1, games), and delta_t = r_t + gamma V(s_{t+1}) - V(s_t).
    """
    deltas = rewards + discounts * values[1:] - values[:-1]
    advantages = torch.zeros_like(values)  # the last one stays 0
    for step in reversed(range(len(rewards))):
        advantages[step] = deltas[step] + discounts[step] * gae_lambda * advantages[step + 1]
    return advantages[:-1]


def policy_loss(ratios: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """The clipped surrogate objective, negated, (batch,): Schulman et al., 2017, eq. 7."""
    clipped = ratios.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.minimum(ratios * advantages, clipped * advantages)


def value_loss(values: Tensor, batch: Experience, clip_coef: float) -> Tensor:
    """The larger squared error of the values and of those clipped around the old ones, halved, (batch,): CleanRL's."""
    clipped = batch.values + (values - batch.values).clamp(-clip_coef, clip_coef)
    return torch.maximum((values - batch.returns) ** 2, (clipped - batch.returns) ** 2) / 2


def ppo_loss(network: ActorCritic, batch: Experience, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 9, negated, as a mean over the batch; and its parts for the log."""
    policy, values = network(batch.obs)
    log_ratios = policy.log_prob(batch.actions) - batch.log_probs
    ratios = log_ratios.exp()
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)

    policy_term = policy_loss(ratios, advantages, args.clip_coef).mean()
    value_term = value_loss(values, batch, args.clip_coef).mean()
    entropy = policy.entropy().mean()
    loss = policy_term - args.ent_coef * entropy + args.vf_coef * value_term
    return loss, {
        "policy_loss": policy_term,
        "value_loss": value_term,
        "entropy": entropy,
        "approx_kl": (ratios - 1 - log_ratios).mean(),  # Schulman, 2020: k3
        "clipfrac": ((ratios - 1).abs() > args.clip_coef).float().mean(),
    }


def train(args: Args) -> Path:
    """Train, evaluate, and return the run's folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    games = Games(args)
    obs_space = games.envs.single_observation_space
    num_actions = int(games.envs.single_action_space.n)

    network = ActorCritic(obs_space.shape, num_actions, args)
    network.to(device, memory_format=torch.channels_last)  # faster convolutions
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate, eps=args.adam_eps, fused=True)

    # a roll-out: (steps, games, ...)
    batch_steps = args.num_envs * args.num_steps
    shape = (args.num_steps, args.num_envs)
    observations = torch.zeros(batch_steps, *obs_space.shape, dtype=torch.from_numpy(games.obs).dtype, device=device)
    observations = observations.to(memory_format=torch.channels_last).unflatten(0, shape)  # faster convolutions
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    rewards = torch.zeros(shape, device=device)
    log_probs = torch.zeros(shape, device=device)
    values = torch.zeros(args.num_steps + 1, args.num_envs, device=device)
    discounts = torch.zeros(shape, device=device)  # gamma, or 0 where a return ends

    last_step = args.total_timesteps // batch_steps * batch_steps  # whole roll-outs only
    global_step = 0  # agent steps so far, of all games together
    last_return = math.nan  # of the game that ended last

    folder = make_run_folder(args, device)
    checkpoint = folder / "checkpoint.pt"
    parts = {"q_network": network, "optimizer": optimizer, "games": games}
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, args, parts, rng)
        global_step = state["global_step"]
    writer = make_writer(folder, args, global_step)

    def save_checkpoint():
        state = {name: part.state_dict() for name, part in parts.items()}
        state["random"] = random_states(rng)
        state["args"] = asdict(args)
        state["global_step"] = global_step
        writer.flush()
        save(checkpoint, state)

    print(f"run folder: {folder} ({device})", flush=True)
    bar = make_bar(args, global_step)

    while True:
        # ---- evaluate
        finished = global_step == last_step
        due = is_due(args.eval_frequency, global_step, batch_steps)
        if finished or due:  # first, so that an interrupted one is made again
            evaluate(args, make_env(args), network, global_step, device, folder, writer)
        if finished or STOPPED_BY:
            break
        began = time.monotonic()
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - global_step / last_step)

        # ---- play a roll-out
        for step in range(args.num_steps):
            global_step += args.num_envs
            observations[step] = torch.from_numpy(games.obs)
            policy, values[step] = predict(network, observations[step])
            actions[step] = policy.sample()
            log_probs[step] = policy.log_prob(actions[step])

            next_obs, raw_rewards, terminations, truncations, ended_games = games.step(actions[step].cpu().numpy())
            rewards[step] = torch.from_numpy(np.clip(raw_rewards, -1, 1))  # as in dqn.py
            discounts[step] = args.gamma * torch.from_numpy(~(terminations | truncations))
            if truncations.any():  # bootstrap from the game's own last observation, by way of its reward
                _, final_values = predict(network, torch.from_numpy(next_obs).to(device))
                rewards[step] += args.gamma * final_values * torch.from_numpy(truncations & ~terminations).to(device)
            for last_return, length in ended_games:
                writer.add_scalar("charts/episodic_return", last_return, global_step)
                writer.add_scalar("charts/episodic_length", length, global_step)
            bar.update(args.num_envs)
        _, values[-1] = predict(network, torch.from_numpy(games.obs).to(device))

        # ---- learn
        advantages = gae(rewards, discounts, values, args.gae_lambda)
        returns = advantages + values[:-1]
        fields = [observations, actions, log_probs, values[:-1], advantages, returns]
        batch = [field.flatten(0, 1) for field in fields]
        diagnosing = is_due(args.diagnostics_frequency, global_step, batch_steps)
        if diagnosing:
            rows = np.random.default_rng(global_step).permutation(batch_steps)[:1_024]
            probe = Experience(*[field[rows] for field in batch])
            old_policy, _ = predict(network, probe.obs)
        for _ in range(args.update_epochs):
            order = torch.randperm(batch_steps, device=device)
            for rows in order.chunk(args.num_minibatches):
                loss, terms = ppo_loss(network, Experience(*[field[rows] for field in batch]), args)
                optimizer.zero_grad()
                loss.backward()
                gradient_norm = nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
                check_finite(loss + gradient_norm, global_step, checkpoint)
                optimizer.step()
            if args.target_kl is not None and terms["approx_kl"] > args.target_kl:
                break

        # ---- log
        bar.set_postfix_str(f"return {last_return:.1f}", refresh=False)
        for name, value in terms.items():
            writer.add_scalar(f"losses/{name}", value, global_step)
        writer.add_scalar("losses/values", values.mean(), global_step)
        writer.add_scalar("charts/learning_rate", optimizer.param_groups[0]["lr"], global_step)
        writer.add_scalar("charts/SPS", batch_steps / (time.monotonic() - began), global_step)
        if diagnosing:
            loss, _ = ppo_loss(network, probe, args)
            policy, _ = predict(network, probe.obs)
            report = diagnose_rollout(network, probe.obs, old_policy.probs, policy.probs, loss)
            log_ratios = policy.log_prob(probe.actions) - probe.log_probs
            report["diagnostics/effective_sample_size"] = effective_sample_size(log_ratios)
            for tag, value in report.items():
                writer.add_scalar(tag, value, global_step)
            if args.save_features:
                save_features(folder, network, probe.obs[:200], global_step)

        # ---- checkpoint
        last = global_step == last_step
        if args.checkpoint_frequency and (last or is_due(args.checkpoint_frequency, global_step, batch_steps)):
            save_checkpoint()

    if STOPPED_BY and args.checkpoint_frequency:
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


class Games:
    """Games side by side, each of its own length. One that ended is reset alone: no step is an autoreset's."""

    def __init__(self, args: Args):
        self.envs = make_env(args, args.num_envs)
        self.seed = args.seed
        self.lost_life_ends_return = args.lost_life_ends_return
        self.seeded_for = 4_000  # steps of a place: a seed takes an emulator 0.2 s
        self.numbers = np.arange(args.num_envs)  # of the seed of each place
        self.actions = [[] for _ in self.numbers]  # since then
        self.lengths = np.zeros(args.num_envs, int)  # of the games
        self.returns = np.zeros(args.num_envs)  # their raw rewards so far
        self.lives = np.zeros(args.num_envs)
        everywhere = np.ones(args.num_envs, bool)
        self.reset(everywhere, everywhere)

    def reset(self, which: np.ndarray, seeded: np.ndarray):
        """Start the games of the places, (games,), that are true in `which`; seed those of them in `seeded`."""
        self.actions = [[] if anew else played for played, anew in zip(self.actions, seeded, strict=True)]
        seeds = np.where(seeded, (1_000_003 * self.seed + self.numbers) % 2**31, -1)  # -1: none
        if isinstance(self.envs, gym.vector.SyncVectorEnv):
            seeds = [seed if seed >= 0 else None for seed in seeds.tolist()]
            for place in np.flatnonzero(which):
                self.envs.envs[place].unwrapped.game.last_action = 0  # or its sticky action outlives a game
        else:
            seeds = seeds[which]
        self.obs, infos = self.envs.reset(seed=seeds, options={"reset_mask": which})
        self.lengths[which] = 0
        self.returns[which] = 0
        self.lives = infos.get("lives", self.lives)

    def step(self, actions: np.ndarray) -> tuple:
        """Return next_obs (a game's last where it ends), raw rewards, terminations, truncations, and ended games."""
        next_obs, rewards, terminations, truncations, infos = self.envs.step(actions)
        for played, action in zip(self.actions, actions.tolist(), strict=True):
            played.append(action)
        self.obs = next_obs  # but of a game that ends, the next one's first
        self.lengths += 1
        self.returns += rewards
        lives = infos.get("lives", self.lives)
        lost = lives < self.lives
        self.lives = lives

        over = terminations | truncations
        ended_games = list(zip(self.returns[over].tolist(), self.lengths[over].tolist(), strict=True))
        if over.any():
            seeded = over & np.array([len(played) >= self.seeded_for for played in self.actions])
            self.numbers[seeded] += len(over)
            self.reset(over, seeded)
        terminations = terminations | (lost & self.lost_life_ends_return)
        return next_obs, rewards, terminations, truncations, ended_games

    def state_dict(self) -> dict:
        return {"numbers": self.numbers.tolist(), "actions": self.actions}

    def load_state_dict(self, state: dict):
        """Play again what was played since the seeds: emulators are deterministic."""
        actions = state["actions"]
        for left in range(max(map(len, actions)), -1, -1):  # steps to go; some start later
            starts = np.array([len(played) == left for played in actions])
            if starts.any():
                self.numbers[starts] = np.array(state["numbers"])[starts]
                self.reset(starts, starts)
            if left > 0:
                self.step(np.array([played[-left] if len(played) >= left else 0 for played in actions]))


# ---- network
class Pixels(nn.Module):
    """Bytes to 0..1, MinAtar's channels to the front; augmented images are so already."""

    def forward(self, obs: Tensor) -> Tensor:
        if obs.dtype == torch.bool:
            return obs.movedim(3, 1).float()
        return obs / 255 if obs.dtype == torch.uint8 else obs


def make_torso(obs_shape: tuple[int, ...], layer_norm: bool) -> tuple[nn.Sequential, nn.Sequential, int]:
    """Return convolutions, a dense layer, and its width; `layer_norm` puts a LayerNorm before each ReLU."""
    if obs_shape[:2] == (10, 10):  # MinAtar: Young and Tian, 2019
        side, _, channels = obs_shape
        convolutions = [(16, 3, 1)]  # channels, kernel, stride
        width = 128
    else:  # Mnih et al., 2015
        channels, side, _ = obs_shape
        convolutions = [(32, 8, 4), (64, 4, 2), (64, 3, 1)]
        width = 512

    layers = [Pixels()]
    for outputs, kernel, stride in convolutions:
        side = (side - kernel) // stride + 1
        layers.append(nn.Conv2d(channels, outputs, kernel, stride))
        if layer_norm:
            layers.append(nn.LayerNorm([outputs, side, side]))  # over channels and places together
        layers.append(nn.ReLU())
        channels = outputs
    norms = [nn.LayerNorm(width)] if layer_norm else []
    dense = nn.Sequential(nn.Linear(channels * side**2, width), *norms, nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten()), dense, width


# ---- diagnostics and evaluation
def diagnose_rollout(network, obs: Tensor, old_policy: Tensor, policy: Tensor, loss: Tensor) -> dict[str, float]:
    """Measure the network by some observations of a roll-out, its policy there before and after, and their loss."""
    dormant = []
    hidden = obs
    with torch.no_grad():
        for layer in [*network.convolutions, *network.dense]:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU):
                activity = hidden.movedim(1, 0).flatten(1).abs().mean(dim=1)  # of every unit or channel
                dormant.append(activity <= 0.025 * activity.mean())
        singular_values = torch.linalg.svdvals(hidden)  # of the last hidden layer
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    gradient = torch.cat([part.flatten() for part in gradients])
    kernels = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return {
        "diagnostics/feature_rank": rank(singular_values**2),  # Yang et al., 2019
        "diagnostics/srank": rank(singular_values),  # Kumar et al., 2021
        "diagnostics/dormant_neurons": torch.cat(dormant).float().mean(),  # Sokar et al., 2023
        "diagnostics/weight_norm": nn.utils.get_total_norm(kernels),
        "diagnostics/gradient_kurtosis": kurtosis(gradient),
        "diagnostics/zero_gradients": (gradient == 0).float().mean(),
        "diagnostics/policy_variance": policy.var(dim=0, correction=0).mean(),  # Moalla et al., 2024
        "diagnostics/churn": (policy.argmax(1) != old_policy.argmax(1)).float().mean(),  # Schaul et al., 2022
    }


def rank(shares: Tensor) -> Tensor:
    """How many of these, from the largest on, make more than 99% of their sum."""
    short = shares.cumsum(0) <= 0.99 * shares.sum()
    return 1 + (short & (shares > 0)).sum()


def kurtosis(gradient: Tensor) -> Tensor:
    """Of log |g| over the entries that are not zero (Garg et al., 2021); 3 where it is normal."""
    logarithms = gradient[gradient != 0].abs().double().log()
    distances = logarithms - logarithms.mean()
    return (distances**4).mean() / (distances**2).mean() ** 2


def effective_sample_size(log_ratios: Tensor) -> Tensor:
    """1 / (n sum w^2), w the shares that the ratios have in their sum, (n,): Martino et al., 2017."""
    weights = log_ratios.softmax(dim=0)
    return 1 / (weights.square().sum() * len(weights))


@torch.no_grad()
def save_features(folder: Path, network: nn.Module, obs: Tensor, global_step: int):
    """Write observations, and what the last hidden layer makes of them."""
    features = network.dense(network.convolutions(obs))
    (folder / "features").mkdir(exist_ok=True)
    np.savez_compressed(folder / f"features/{global_step}.npz", obs=obs.cpu(), features=features.cpu())


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


def is_due(frequency: int, global_step: int, batch_steps: int) -> bool:
    """Whether the last roll-out reached or passed a multiple of `frequency`, which is 0 for never."""
    return frequency > 0 and global_step > 0 and global_step % frequency < batch_steps


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
