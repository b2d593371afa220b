"""Agent steps per second while learning: of every agent, beside Stable-Baselines3's and beside those of another commit.

    python benchmarks/speed.py
    git worktree add ../before HEAD~1 && python benchmarks/speed.py --before ../before --no-sb3

Counted is nothing but steps that act with the network and learn as often as the agent does by default: after 1,000
random steps and --warm-up seconds of learning. Those who are compared live side by side, a process each, and take
turns of --seconds while the others wait, so that a slow minute of the machine slows them all. The table has the medians
of the turns, and the median and the quartiles of the ratio within a round. The libraries' DQN, QR-DQN and PPO play
Pong, by the network they have (--network nature). The agents without a replay, and the library's PPO, take turns of
whole roll-outs, and are measured with --num-envs games side by side instead of batch sizes. cql_offline plays no
steps: benchmarks/dataset.py times its updates. Nothing else should run on the machine.
"""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import tyro

AGENTS = Path(__file__).resolve().parent.parent / "agents"
RANDOM_STEPS = 1_000
PERIOD = 4  # steps in which every agent makes the same number of updates
ON_POLICY = ("pqn", "ppo")
ROLLOUT = 128  # steps of each of their games between two updates
SPAWN = multiprocessing.get_context("spawn")
SB3 = {"dqn": ("stable_baselines3", "DQN"), "qrdqn": ("sb3_contrib", "QRDQN"), "ppo": ("stable_baselines3", "PPO")}


@dataclass
class Args:
    agents: tuple[str, ...] = (  # files
        *("dqn", "qrdqn", "iqn", "rainbow", "der", "drq_eps", "spr", "sr_spr", "bbf", "pqn", "ppo"),
    )
    games: tuple[str, ...] = ("ALE/Pong-v5", "MinAtar/Breakout-v1")  # games to play
    batch_sizes: tuple[int, ...] = (8, 32)  # transitions in an update
    num_envs: tuple[int, ...] = (8, 64)  # games side by side, of the agents without a replay
    network: Literal["dopamine", "nature", "dopamine-x4", "impala"] = "nature"  # convolutions (ALE)
    flags: dict[str, int] = field(default_factory=dict)  # more flags of the agents, such as replay_ratio 1
    rounds: int = 10  # turns of each
    seconds: float = 2.0  # of a turn
    warm_up: float = 5.0  # seconds of learning before
    threads: int = 0  # of torch, in each process (0: torch's own choice)
    cuda: bool = True  # use a GPU where there is one
    sb3: bool = True  # measure the libraries, too
    before: Path | None = None  # checkout of another commit, whose agents are measured, too
    out: Path | None = None  # JSON file for every figure


# ---- a measurement
class Enough(Exception):
    """Ends a run."""


class Clock:
    """Measures steps per second in turns. The other end of the channel sends how many seconds each is to take, or 0."""

    def __init__(self, channel: Connection, random_steps: int = RANDOM_STEPS, period: int = PERIOD, games: int = 1):
        self.channel = channel
        self.random_steps = random_steps
        self.period = period
        self.games = games  # agent steps in a tick
        self.steps = 0
        self.began = None  # seconds; the turn that is going on
        self.first_step = 0
        self.length = 0.0

    def tick(self):
        """Count a step; at the end of a turn report it, and wait for the next."""
        self.steps += 1
        if self.steps < self.random_steps or self.steps % self.period:
            return
        if self.began is not None:
            passed = time.perf_counter() - self.began
            if passed < self.length:
                return
            self.channel.send((self.steps - self.first_step) * self.games / passed)
        self.length = self.channel.recv()
        if self.length == 0:
            raise Enough
        self.first_step = self.steps
        self.began = time.perf_counter()


def run_agent(channel: Connection, folder: Path, agent: str, game: str, batch_size: int, args: Args):
    """Let <folder>/<agent>.py learn: every version of it stores a step by FrameReplay.add."""
    spec = importlib.util.spec_from_file_location(agent, folder / f"{agent}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    clock = Clock(channel)
    add = module.FrameReplay.add

    def counted_add(*arguments):
        clock.tick()
        add(*arguments)

    module.FrameReplay.add = counted_add
    flags = {
        "env_id": game,
        "batch_size": batch_size,
        "network": args.network,
        "cuda": args.cuda,
        "total_timesteps": 10_000_000,  # more than it gets; BBF looks through all resets of a run at every step
        "buffer_size": 10_000,
        "learning_starts": RANDOM_STEPS,
        "exploration_steps": 1,
        "checkpoint_frequency": 0,
        "eval_episodes": 0,
    }
    flags |= args.flags
    with contextlib.suppress(Enough):
        module.train(module.Args(**flags))


def run_on_policy(channel: Connection, folder: Path, agent: str, game: str, num_envs: int, args: Args):
    """Let <folder>/<agent>.py learn from so many games; a turn is of whole roll-outs."""
    spec = importlib.util.spec_from_file_location(agent, folder / f"{agent}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    clock = Clock(channel, ROLLOUT, ROLLOUT, num_envs)
    step = module.Games.step

    def counted_step(*arguments):
        clock.tick()
        return step(*arguments)

    module.Games.step = counted_step
    flags = {"env_id": game, "num_envs": num_envs, "num_steps": ROLLOUT, "cuda": args.cuda, "eval_episodes": 0}
    flags |= {"total_timesteps": 1_000_000_000, "checkpoint_frequency": 0}
    flags |= args.flags
    with contextlib.suppress(Enough):
        module.train(module.Args(**flags))


def run_sb3_ppo(channel: Connection, agent: str, game: str, num_envs: int, args: Args):
    """Let the library's PPO learn from so many games, with the same settings."""
    import ale_py
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    emulator = {"frameskip": 1, "repeat_action_probability": 0.0}
    env = VecFrameStack(make_atari_env(game, num_envs, 1, env_kwargs=emulator), 4)
    model = PPO(
        "CnnPolicy",
        env,
        learning_rate=2.5e-4,
        n_steps=ROLLOUT,
        batch_size=num_envs * ROLLOUT // 4,
        n_epochs=4,
        clip_range=0.1,
        clip_range_vf=0.1,
        ent_coef=0.01,
        device="auto" if args.cuda else "cpu",
    )
    clock = Clock(channel, ROLLOUT, ROLLOUT, num_envs)

    def count(_locals, _globals):
        clock.tick()
        return True

    with contextlib.suppress(Enough):
        model.learn(1_000_000_000, count)


def run_sb3(channel: Connection, agent: str, game: str, batch_size: int, args: Args):
    """Let the library's agent learn, with the same settings."""
    import ale_py
    import gymnasium
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    emulator = {"frameskip": 1, "repeat_action_probability": 0.25}
    wrapper = {"noop_max": 0, "terminal_on_life_loss": False}
    env = VecFrameStack(make_atari_env(game, 1, 1, env_kwargs=emulator, wrapper_kwargs=wrapper), 4)
    library, name = SB3[agent]
    model = getattr(importlib.import_module(library), name)(
        "CnnPolicy",
        env,
        batch_size=batch_size,
        buffer_size=10_000,
        learning_starts=RANDOM_STEPS,
        train_freq=4,
        gradient_steps=1,
        target_update_interval=8_000,
        exploration_fraction=1e-9,
        exploration_final_eps=0.01,
        device="auto" if args.cuda else "cpu",
        policy_kwargs={"n_quantiles": 200} if agent == "qrdqn" else {},
    )
    clock = Clock(channel)

    def count(_locals, _globals):
        clock.tick()
        return True

    with contextlib.suppress(Enough):
        model.learn(1_000_000_000, count)


def describe_machine(args: Args) -> dict:
    """What the figures are of."""
    import torch

    if args.cuda and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        device = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    else:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        device = names[0] if names else platform.machine()
    cores = os.cpu_count()
    return {"device": device, "cores": cores, "threads": torch.get_num_threads(), "torch": torch.__version__}


# ---- a process for each
def quietly(channel: Connection, function, *arguments):
    """Call it in an empty folder, without its output; what goes wrong is sent to the other end."""
    output = io.StringIO()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,  # the log may still be written to
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            function(channel, *arguments)
        except BaseException:
            channel.send(output.getvalue() + traceback.format_exc())


class Contender:
    """A process that learns when it is told to."""

    def __init__(self, function, *arguments):
        here, there = SPAWN.Pipe()
        self.channel = here
        self.process = SPAWN.Process(target=quietly, args=(there, function, *arguments), daemon=True)
        self.process.start()

    def turn(self, seconds: float) -> float:
        """Let it learn for so many seconds; return its steps per second. Raises RuntimeError with what went wrong."""
        self.channel.send(seconds)
        answer = self.channel.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def end(self):
        self.channel.send(0)
        self.process.join()


def measure(who: dict[str, tuple], args: Args) -> dict[str, list[float]]:
    """Let them learn by turns: {name: steps per second in each round}."""
    contenders = {name: Contender(*what) for name, what in who.items()}
    for contender in contenders.values():
        contender.turn(args.warm_up)
    speeds = {name: [] for name in who}
    for number in range(args.rounds):
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in order:
            speeds[name].append(contenders[name].turn(args.seconds))
    for contender in contenders.values():
        contender.end()
    return speeds


# ---- the table
def contenders(agent: str, game: str, size: int, args: Args) -> dict[str, tuple]:
    """Who is measured with a batch, or so many games, of this size: {name: (function, arguments)}."""
    setting = (agent, game, size, args)
    ours, theirs = (run_on_policy, run_sb3_ppo) if agent in ON_POLICY else (run_agent, run_sb3)
    found = {"ours": (ours, AGENTS, *setting)}
    if args.before and (args.before / "agents" / f"{agent}.py").exists():
        found["before"] = (ours, args.before.resolve() / "agents", *setting)
    if args.sb3 and agent in SB3 and game.startswith("ALE/") and args.network == "nature" and not args.flags:
        found["sb3"] = (theirs, *setting)
    return found


def print_rows(game: str, agent: str, size: int, speeds: dict[str, list[float]]):
    """Print a row for each rival, or one without."""
    ours = speeds["ours"]
    size = f"{size} games" if agent in ON_POLICY else size
    setting = f"| {game} | {agent} | {size} | {median(ours):.1f} |"
    if len(speeds) == 1:
        print(setting, "| | | |", flush=True)
    for name, theirs in speeds.items():
        if name != "ours":
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            low, middle, high = quantiles(ratios, n=4, method="inclusive")
            print(setting, f"{name} | {median(theirs):.1f} | {middle:.2f} | {low:.2f} to {high:.2f} |", flush=True)


def main(args: Args):
    if args.rounds < 2:
        print("error: --rounds must be at least 2: the table has quartiles.", file=sys.stderr)
        raise SystemExit(2)
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with ProcessPoolExecutor(1, SPAWN) as pool:  # torch stays out of this process
        machine = pool.submit(describe_machine, args).result()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n")
    print("| game | agent | batch | ours, steps/s | beside | steps/s | ratio | middle half of the ratios |")
    print("|-|-|-|-|-|-|-|-|")
    results = []
    for game in args.games:
        for agent in args.agents:
            for size in args.num_envs if agent in ON_POLICY else args.batch_sizes:
                speeds = measure(contenders(agent, game, size, args), args)
                name = "num_envs" if agent in ON_POLICY else "batch_size"
                results.append({"game": game, "agent": agent, name: size, "speeds": speeds})
                print_rows(game, agent, size, speeds)
                if args.out:
                    record = {"machine": machine, "flags": asdict(args), "results": results}
                    args.out.write_text(json.dumps(record, indent=2, default=str))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
