"""Agent steps per second while learning: of every agent, beside Stable-Baselines3's and beside those of another commit.

    python benchmarks/speed.py
    git worktree add ../before HEAD~1 && python benchmarks/speed.py --before ../before --no-sb3

Every measurement is a process of its own, and counts nothing but steps that act with the network and learn as often as
the agent does by default: after 1,000 random steps and --warm-up seconds of learning, for --seconds. Those who are
compared take turns, round after round; the table has medians, their ratio, and the ratio of each round. The libraries'
DQN and QR-DQN play Pong, by the network they have (--network nature). cql_offline plays no steps: benchmarks/dataset.py
times its updates. Nothing else should run on the machine.
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro

AGENTS = Path(__file__).resolve().parent.parent / "agents"
RANDOM_STEPS = 1_000
PERIOD = 4  # steps in which every agent makes the same number of updates
SB3 = {"dqn": ("stable_baselines3", "DQN"), "qrdqn": ("sb3_contrib", "QRDQN")}


@dataclass
class Args:
    agents: tuple[str, ...] = ("dqn", "qrdqn", "iqn", "rainbow", "der", "drq_eps", "spr")  # files in agents/
    games: tuple[str, ...] = ("ALE/Pong-v5", "MinAtar/Breakout-v1")  # games to play
    batch_sizes: tuple[int, ...] = (8, 32)  # transitions in an update
    network: Literal["dopamine", "nature"] = "nature"  # convolutions (ALE)
    rounds: int = 3  # measurements of each
    seconds: float = 20.0  # that are measured
    warm_up: float = 5.0  # seconds of learning before
    threads: int = 0  # of torch, in each process (0: torch's own choice)
    cuda: bool = True  # use a GPU where there is one
    sb3: bool = True  # measure the libraries, too
    before: Path | None = None  # checkout of another commit, whose agents are measured, too
    out: Path | None = None  # JSON file for every figure


# ---- a measurement
class Measured(Exception):
    """Ends a run, and carries its steps per second."""


class Clock:
    """Counts steps, from the moment when learning is warm."""

    def __init__(self, args: Args):
        self.args = args
        self.steps = 0
        self.learning_since = None  # seconds
        self.measured_since = None
        self.first_step = 0  # of those that are measured

    def tick(self):
        """Count a step; end the run when there are enough."""
        self.steps += 1
        if self.steps < RANDOM_STEPS or self.steps % PERIOD:
            return
        now = time.perf_counter()
        if self.learning_since is None:
            self.learning_since = now
        elif self.measured_since is None and now - self.learning_since > self.args.warm_up:
            self.measured_since = now
            self.first_step = self.steps
        elif self.measured_since is not None and now - self.measured_since > self.args.seconds:
            raise Measured((self.steps - self.first_step) / (now - self.measured_since))


def measure_agent(folder: Path, agent: str, game: str, batch_size: int, args: Args) -> float:
    """Steps per second of <folder>/<agent>.py: every version of it stores a step by FrameReplay.add."""
    spec = importlib.util.spec_from_file_location(agent, folder / f"{agent}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    clock = Clock(args)
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
        "total_timesteps": 1_000_000_000,
        "buffer_size": 10_000,
        "learning_starts": RANDOM_STEPS,
        "exploration_steps": 1,
        "checkpoint_frequency": 0,
        "eval_episodes": 0,
    }
    try:
        module.train(module.Args(**flags))
    except Measured as speed:
        return speed.args[0]


def measure_sb3(agent: str, game: str, batch_size: int, args: Args) -> float:
    """Steps per second of the library's agent, with the same settings."""
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
    clock = Clock(args)

    def count(_locals, _globals):
        clock.tick()
        return True

    try:
        model.learn(1_000_000_000, count)
    except Measured as speed:
        return speed.args[0]


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
def quietly(function, *arguments):
    """Call it in an empty folder, without its output."""
    output = io.StringIO()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,  # the log may still be written to
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            return function(*arguments)
        except SystemExit as error:
            raise RuntimeError(output.getvalue()) from error


def in_a_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(quietly, function, *arguments).result()


# ---- the table
def contenders(agent: str, game: str, batch_size: int, args: Args) -> dict[str, tuple]:
    """Who is measured in this setting: {name: (function, arguments)}."""
    setting = (agent, game, batch_size, args)
    found = {"ours": (measure_agent, AGENTS, *setting)}
    if args.before and (args.before / "agents" / f"{agent}.py").exists():
        found["before"] = (measure_agent, args.before.resolve() / "agents", *setting)
    if args.sb3 and agent in SB3 and game.startswith("ALE/") and args.network == "nature":
        found["sb3"] = (measure_sb3, *setting)
    return found


def print_rows(game: str, agent: str, batch_size: int, speeds: dict[str, list[float]]):
    """Print a row for each rival, or one without."""
    ours = speeds["ours"]
    setting = f"| {game} | {agent} | {batch_size} | {median(ours):.1f} |"
    if len(speeds) == 1:
        print(setting, "| | | |", flush=True)
    for name, theirs in speeds.items():
        if name != "ours":
            ratio = f"{median(ours) / median(theirs):.2f}"
            ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(ours, theirs, strict=True))
            print(setting, f"{name} | {median(theirs):.1f} | {ratio} | {ratios} |", flush=True)


def main(args: Args):
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    machine = in_a_process(describe_machine, args)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n")
    print("| game | agent | batch | ours, steps/s | beside | steps/s | ratio of the medians | ratios of the rounds |")
    print("|-|-|-|-|-|-|-|-|")
    results = []
    for game in args.games:
        for agent in args.agents:
            for batch_size in args.batch_sizes:
                who = contenders(agent, game, batch_size, args)
                speeds = {name: [] for name in who}
                for _ in range(args.rounds):
                    for name, (function, *arguments) in who.items():
                        speeds[name].append(in_a_process(function, *arguments))
                results.append({"game": game, "agent": agent, "batch_size": batch_size, "speeds": speeds})
                print_rows(game, agent, batch_size, speeds)
                if args.out:
                    record = {"machine": machine, "flags": asdict(args), "results": results}
                    args.out.write_text(json.dumps(record, indent=2, default=str))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
