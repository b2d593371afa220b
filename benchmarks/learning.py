"""Learning on MinAtar: mean return over the last 100 training games, per agent, batch size and seed.

    python benchmarks/learning.py --jobs 2
    python benchmarks/learning.py --benchmark 100k --jobs 2

starts the runs whose results are not yet in benchmarks/results/minatar.csv, one process a core (a run that was cut off
goes on from its last checkpoint), adds each result to that file as it comes, and prints a table with random play for
comparison. The settings of 500k, the four agents of the ALE study, are Dopamine's for MinAtar (learning rate, Adam
epsilon, replay, periods, C51's support), with epsilon to 0.01 over 100,000 steps. 100k has the agents of Atari 100k
with their own settings but for MinAtar's learning rate, Adam epsilon and support, and images shifted by one cell
instead of four.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
KEYS = ["env_id", "agent", "batch_size", "total_timesteps", "seed"]  # what tells results apart
FLAGS = {
    "500k": {
        "learning_rate": 2.5e-4,
        "adam_eps": 3.125e-4,
        "buffer_size": 100_000,
        "learning_starts": 1_000,
        "target_network_frequency": 1_000,
        "exploration_steps": 100_000,
        "eval_episodes": 10,
    },
    "100k": {"learning_rate": 2.5e-4, "adam_eps": 3.125e-4},
}
SUPPORT, SHIFT = {"v_min": -100.0, "v_max": 100.0}, {"image_pad": 1}
OWN_FLAGS = {"rainbow": SUPPORT, "der": SUPPORT, "drq_eps": SHIFT, "spr": SUPPORT | SHIFT}  # of one agent
DEFAULTS = {  # games, agents, batch sizes, agent steps
    "500k": (("MinAtar/Breakout-v1", "MinAtar/Asterix-v1"), ("dqn", "qrdqn", "rainbow", "iqn"), (8,), 500_000),
    "100k": (("MinAtar/Breakout-v1",), ("der", "drq_eps", "spr"), (32,), 100_000),
}
LOCK = Lock()


@dataclass
class Args:
    benchmark: Literal["500k", "100k"] = "500k"  # agents and their settings; what follows replaces parts of it
    games: tuple[str, ...] | None = None  # games to play
    agents: tuple[str, ...] | None = None  # agents to train
    batch_sizes: tuple[int, ...] | None = None  # batch sizes to train with
    total_timesteps: int | None = None  # agent steps of each run
    seeds: int = 3  # runs of each setting
    jobs: int = 1  # runs at a time, each on one core
    runs: Path = ROOT / "runs"  # folder of the run folders
    table_only: bool = False  # start nothing, print what is there


def scalars(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What a run logged: {tag: (steps, values)}, both (points,)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {t: (np.array([e.step for e in es]), np.array([e.value for e in es])) for t, es in tags.items()}


def add_row(path: Path, header: list[str], row: list) -> None:
    """Add a row to a CSV file, which is made if need be."""
    with LOCK:
        path.parent.mkdir(exist_ok=True)
        new = not path.exists()
        with open(path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([*([header] if new else []), row])


def find(args: Args, wanted: dict) -> tuple[float, str] | None:
    """Mean return over the last 100 training games, and git commit, of the finished run with these flags."""
    for folder in sorted(args.runs.glob("*")):
        try:
            record = json.loads((folder / "args.json").read_text())
        except (OSError, ValueError):
            continue
        if all({**record["args"], "agent": record["agent"]}.get(k) == v for k, v in wanted.items()):
            logged = scalars(folder)
            if "eval/episodic_return" in logged:
                return logged["charts/episodic_return"][1][-100:].mean(), record["git_commit"] or ""
    return None


def known() -> dict[tuple, float]:
    """The results so far: {values of KEYS, as strings: mean return}."""
    if not RESULTS.exists():
        return {}
    with open(RESULTS, newline="") as file:
        return {tuple(row[key] for key in KEYS): float(row["mean_return"]) for row in csv.DictReader(file)}


def key_of(wanted: dict) -> tuple:
    return tuple(str(wanted[key]) for key in KEYS)


def run(args: Args, wanted: dict) -> None:
    """Train one run to its end, unless it is there, and add its result to the file."""
    if key_of(wanted) in known():
        return
    if not find(args, wanted) and not args.table_only:
        command = [sys.executable, str(ROOT / "agents" / f"{wanted['agent']}.py")]
        for name, value in wanted.items():
            if name != "agent":
                command += [f"--{name.replace('_', '-')}", str(value)]
        command += ["--checkpoint-frequency", str(max(wanted["total_timesteps"] // 10, 1)), "--resume", "auto"]
        args.runs.mkdir(exist_ok=True)
        print(" ".join(command), flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=args.runs.parent, env=environment, check=True, stdout=subprocess.DEVNULL)
    if found := find(args, wanted):
        add_row(RESULTS, [*KEYS, "mean_return", "git_commit"], [*key_of(wanted), f"{found[0]:.4f}", found[1]])


def random_play(env_id: str, games: int = 1_000) -> np.ndarray:
    """Returns of uniformly random play."""
    if env_id not in gym.registry:
        minatar.gym.register_envs()
    env, rng = gym.make(env_id), np.random.default_rng(0)
    returns = np.zeros(games)
    for game in range(games):
        env.reset(seed=game)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(int(rng.integers(env.action_space.n)))
            returns[game] += reward
            done = terminated or truncated
    return returns


def main(args: Args) -> None:
    given = (args.games, args.agents, args.batch_sizes, args.total_timesteps)
    chosen = [b if a is None else a for a, b in zip(given, DEFAULTS[args.benchmark], strict=True)]
    args.games, args.agents, args.batch_sizes, args.total_timesteps = chosen
    settings = [
        {"agent": agent, "env_id": game, "batch_size": batch_size, "total_timesteps": args.total_timesteps}
        | FLAGS[args.benchmark]
        | OWN_FLAGS.get(agent, {})
        for game in args.games
        for agent in args.agents
        for batch_size in args.batch_sizes
    ]
    seeds = range(1, args.seeds + 1)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda wanted: run(args, wanted), [s | {"seed": seed} for seed in seeds for s in settings]))
    results = known()
    print(f"| game | agent | batch | mean return, last 100 games of {args.total_timesteps:,} steps | each seed |")
    print("|-|-|-|-|-|")
    for game in args.games:
        play = random_play(game)
        print(f"| {game} | random play | | {play.mean():.2f} | 1,000 games |")
        for setting in [s for s in settings if s["env_id"] == game]:
            means = [results.get(key_of(setting | {"seed": seed})) for seed in seeds]
            there = [mean for mean in means if mean is not None]
            each = ", ".join("-" if mean is None else f"{mean:.2f}" for mean in means)
            mean = f"{np.mean(there):.2f}" if there else "-"
            print(f"| {game} | {setting['agent']} | {setting['batch_size']} | {mean} | {each} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
