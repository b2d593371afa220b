"""Learning on MinAtar: mean return over the last 100 training games, per agent, batch size and seed.

    python benchmarks/learning.py --jobs 2
    python benchmarks/learning.py --benchmark short --jobs 2
    python benchmarks/learning.py --benchmark 100k --jobs 2

starts the runs whose results are not yet in benchmarks/results/minatar.csv, one process a core (a run that was cut off
goes on from its last checkpoint), adds each result to that file as it comes, and prints a table with random play for
comparison. The settings of 500k, the four agents of the ALE study, are Dopamine's for MinAtar (learning rate, Adam
epsilon, replay, periods, C51's support), with epsilon to 0.01 over 100,000 steps; short is a fifth of that, epsilon to
0.01 over 50,000. 100k has the agents of Atari 100k with their own settings but for MinAtar's learning rate, Adam
epsilon and support, and images shifted by one cell instead of four.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Literal

import gymnasium as gym
import minatar.gym
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "minatar.csv"
KEYS = ["benchmark", "env_id", "agent", "batch_size", "total_timesteps", "seed"]  # what tells results apart
DOPAMINE = {
    "learning_rate": 2.5e-4,
    "adam_eps": 3.125e-4,
    "buffer_size": 100_000,
    "learning_starts": 1_000,
    "target_network_frequency": 1_000,
    "eval_episodes": 10,
}
FLAGS = {
    "500k": {**DOPAMINE, "exploration_steps": 100_000},
    "short": {**DOPAMINE, "exploration_steps": 50_000},
    "100k": {"learning_rate": 2.5e-4, "adam_eps": 3.125e-4},
}
OWN_FLAGS = {  # of one agent
    "rainbow": {"v_min": -100.0, "v_max": 100.0},
    "der": {"v_min": -100.0, "v_max": 100.0},
    "drq_eps": {"image_pad": 1},
    "spr": {"v_min": -100.0, "v_max": 100.0, "image_pad": 1},
    "sr_spr": {"v_min": -100.0, "v_max": 100.0, "image_pad": 1, "replay_ratio": 2},
    "bbf": {"v_min": -100.0, "v_max": 100.0, "image_pad": 1, "width_scale": 1},
}
STUDY = ("dqn", "qrdqn", "rainbow", "iqn")
DEFAULTS = {
    "500k": {
        "games": ("MinAtar/Breakout-v1", "MinAtar/Asterix-v1"),
        "agents": STUDY,
        "batch_sizes": (8,),
        "total_timesteps": 500_000,
    },
    "short": {
        "games": ("MinAtar/Breakout-v1",),
        "agents": STUDY,
        "batch_sizes": (8,),
        "total_timesteps": 100_000,
    },
    "100k": {
        "games": ("MinAtar/Breakout-v1",),
        "agents": ("der", "drq_eps", "spr"),
        "batch_sizes": (32,),
        "total_timesteps": 100_000,
    },
}
LOCK = Lock()


@dataclass
class Args:
    benchmark: Literal["500k", "short", "100k"] = "500k"  # agents and settings; what follows replaces parts of it
    games: tuple[str, ...] | None = None  # games to play
    agents: tuple[str, ...] | None = None  # agents to train
    batch_sizes: tuple[int, ...] | None = None  # batch sizes to train with
    total_timesteps: int | None = None  # agent steps of each run
    seeds: int = 3  # runs of each setting
    jobs: int = 1  # runs at a time, each on one core
    folder: Path = ROOT  # folder to run in: the run folders are in runs/ there
    results: Path = RESULTS  # table of the results
    table_only: bool = False  # start nothing, print what is there

    def __post_init__(self):
        for name, value in DEFAULTS[self.benchmark].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


# ---- what benchmarks/offline.py has, too
def scalars(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What a run logged: {tag: (steps, values)}, both (points,)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    logged = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        logged[tag] = (np.array([point.step for point in points]), np.array([point.value for point in points]))
    return logged


def add_row(path: Path, header: list[str], row: list):
    """Add a row to a CSV file, which is made if need be."""
    with LOCK:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(header)
            writer.writerow(row)


def known(path: Path, keys: list[str], value: str) -> dict[tuple, float]:
    """The results so far: {values of the keys, as strings: value}."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {tuple(row[key] for key in keys): float(row[value]) for row in csv.DictReader(file)}


def call(folder: Path, script: str, *words):
    """Run a script of this repository to its end, on one core."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    print(" ".join(command), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def train(folder: Path, agent: str, flags: dict) -> Path:
    """Train an agent with these flags to its end, unless it is there; return the run's folder, below `folder`."""
    done = find_run(folder, agent, flags)
    if done:
        return done
    words = ["--checkpoint-frequency", max(flags["total_timesteps"] // 10 // 4 * 4, 4), "--resume", "auto"]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", value]
    call(folder, f"agents/{agent}.py", *words)
    return find_run(folder, agent, flags)


def find_run(folder: Path, agent: str, flags: dict) -> Path | None:
    """The finished run with these flags, if there is one."""
    wanted = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    for mark in sorted(folder.glob("runs/*/finished")):
        record = json.loads((mark.parent / "args.json").read_text())
        if record["agent"] == agent and record["args"] == record["args"] | wanted:
            return mark.parent
    return None


def commit_of(run: Path) -> str:
    return json.loads((run / "args.json").read_text())["git_commit"] or ""


def random_play(env_id: str, games: int = 1_000) -> np.ndarray:
    """Returns of uniformly random play, (games,)."""
    if env_id not in gym.registry:
        minatar.gym.register_envs()
    env = gym.make(env_id)
    rng = np.random.default_rng(0)
    returns = np.zeros(games)
    for game in range(games):
        env.reset(seed=game)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(int(rng.integers(env.action_space.n)))
            returns[game] += reward
            done = terminated or truncated
    return returns


# ---- the benchmark
def key_of(args: Args, setting: dict, seed: int) -> tuple:
    return (args.benchmark, *[str(setting[key]) for key in KEYS[1:-1]], str(seed))


def measure(args: Args, setting: dict, seed: int):
    """Train one run, and add its result to the file, unless it is in there."""
    key = key_of(args, setting, seed)
    if key in known(args.results, KEYS, "mean_return"):
        return
    flags = {name: value for name, value in setting.items() if name != "agent"}
    run = train(args.folder, setting["agent"], flags | {"seed": seed})
    _, returns = scalars(run)["charts/episodic_return"]
    add_row(args.results, [*KEYS, "mean_return", "git_commit"], [*key, f"{returns[-100:].mean():.4f}", commit_of(run)])


def main(args: Args):
    settings = []
    for game, agent, batch_size in product(args.games, args.agents, args.batch_sizes):
        setting = {"env_id": game, "agent": agent, "batch_size": batch_size, "total_timesteps": args.total_timesteps}
        settings.append(setting | FLAGS[args.benchmark] | OWN_FLAGS.get(agent, {}))
    seeds = range(1, args.seeds + 1)
    if not args.table_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = [pool.submit(measure, args, setting, seed) for seed in seeds for setting in settings]
        for run in runs:
            run.result()  # raises what went wrong there

    results = known(args.results, KEYS, "mean_return")
    print(f"| game | agent | batch | mean return, last 100 games of {args.total_timesteps:,} steps | each seed |")
    print("|-|-|-|-|-|")
    for game in args.games:
        print(f"| {game} | random play | | {random_play(game).mean():.2f} | 1,000 games |")
        for setting in settings:
            if setting["env_id"] != game:
                continue
            means = [results.get(key_of(args, setting, seed), np.nan) for seed in seeds]
            each = ", ".join(f"{mean:.2f}" for mean in means).replace("nan", "-")
            mean = f"{np.nanmean(means):.2f}" if not np.isnan(means).all() else "-"
            print(f"| {game} | {setting['agent']} | {setting['batch_size']} | {mean} | {each} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
