"""Learning on MinAtar: mean return over the last 100 training games, per agent, batch size and seed.

    python benchmarks/learning.py --jobs 2

starts the runs that are not yet in runs/ (a run that was cut off is started afresh), waits for them, and prints a table
with random play for comparison. The settings are Dopamine's for MinAtar (learning rate, Adam epsilon, replay, periods),
with epsilon to 0.01 over 100,000 steps.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import minatar.gym
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "learning_rate": 2.5e-4,
    "adam_eps": 3.125e-4,
    "buffer_size": 100_000,
    "learning_starts": 1_000,
    "target_network_frequency": 1_000,
    "exploration_steps": 100_000,
    "eval_episodes": 10,
}
OWN_FLAGS = {"rainbow": {"v_min": -100.0, "v_max": 100.0}}  # of one agent


@dataclass
class Args:
    games: tuple[str, ...] = ("MinAtar/Breakout-v1", "MinAtar/Asterix-v1")  # games to play
    agents: tuple[str, ...] = ("dqn", "qrdqn", "rainbow", "iqn")  # agents to train
    batch_sizes: tuple[int, ...] = (8,)  # batch sizes to train with
    seeds: int = 3  # runs of each setting
    total_timesteps: int = 500_000  # agent steps of each run
    jobs: int = 1  # runs at a time, each on one core
    runs: Path = ROOT / "runs"  # folder of the run folders
    table_only: bool = False  # start nothing, print what is there


def returns_of(folder: Path) -> np.ndarray:
    """The raw returns of a run's training games, in order."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return np.array([event.value for event in events.Scalars("charts/episodic_return")])


def find(args: Args, wanted: dict) -> Path | None:
    """The finished run folder with these flags, if there is one."""
    for folder in sorted(args.runs.glob("*")):
        try:
            record = json.loads((folder / "args.json").read_text())
        except (OSError, ValueError):
            continue
        if all({**record["args"], "agent": record["agent"]}.get(k) == v for k, v in wanted.items()):
            events = EventAccumulator(str(folder))
            events.Reload()
            if "eval/episodic_return" in events.Tags()["scalars"]:
                return folder
    return None


def run(args: Args, wanted: dict) -> None:
    """Train one run to its end, unless it is there."""
    if find(args, wanted):
        return
    command = [sys.executable, str(ROOT / "agents" / f"{wanted['agent']}.py")]
    for name, value in wanted.items():
        if name != "agent":
            command += [f"--{name.replace('_', '-')}", str(value)]
    args.runs.mkdir(exist_ok=True)
    print(" ".join(command), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=args.runs.parent, env=environment, check=True, stdout=subprocess.DEVNULL)


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
    settings = [
        {"agent": agent, "env_id": game, "batch_size": batch_size, "total_timesteps": args.total_timesteps}
        | FLAGS
        | OWN_FLAGS.get(agent, {})
        for game in args.games
        for agent in args.agents
        for batch_size in args.batch_sizes
    ]
    if not args.table_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(
                pool.map(
                    lambda job: run(args, job),
                    [s | {"seed": seed} for seed in range(1, args.seeds + 1) for s in settings],
                )
            )
    print(f"| game | agent | batch | mean return, last 100 games of {args.total_timesteps:,} steps | each seed |")
    print("|-|-|-|-|-|")
    for game in args.games:
        play = random_play(game)
        print(f"| {game} | random play | | {play.mean():.2f} | 1,000 games |")
        for setting in [s for s in settings if s["env_id"] == game]:
            folders = [find(args, setting | {"seed": seed}) for seed in range(1, args.seeds + 1)]
            means = [returns_of(folder)[-100:].mean() for folder in folders if folder]
            missing = "" if all(folders) else f" ({folders.count(None)} missing)"
            each = ", ".join(f"{mean:.2f}" for mean in means)
            mean = f"{np.mean(means):.2f}" if means else "-"
            print(f"| {game} | {setting['agent']} | {setting['batch_size']} | {mean} | {each}{missing} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
