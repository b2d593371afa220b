"""Agent steps per second on Pong, against Stable-Baselines3's DQN and sb3-contrib's QR-DQN.

    python benchmarks/speed.py

Every measurement is a process of its own: 1,000 random steps, then `steps` steps that act with the network (epsilon
0.01) and learn at every fourth, all with --network nature, the network of both libraries. The contenders take turns,
round after round; the table shows medians and their ratio. Nothing else should run on the machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

AGENTS = Path(__file__).resolve().parent.parent / "agents"
RANDOM_STEPS = 1_000


@dataclass
class Args:
    rounds: int = 5  # measurements of each contender
    steps: int = 3_000  # agent steps that learn, in each measurement
    agents: tuple[str, ...] = ("dqn", "qrdqn")  # agents to measure
    batch_sizes: tuple[int, ...] = (8, 32)  # batch sizes to measure
    contender: str | None = None  # measure this one alone (ours or sb3), for the first agent and batch size
    cuda: bool = True  # use a CUDA device where there is one


def ours(agent: str, batch_size: int, args: Args) -> float:
    """Seconds that agents/<agent>.py takes for the steps, set-up excluded."""
    sys.path.insert(0, str(AGENTS))
    module = __import__(agent)
    begun = []

    class Bar(module.tqdm):  # the progress bar is made right before the first step
        def __init__(self, *positional, **keywords):
            begun.append(time.perf_counter())
            super().__init__(*positional, **keywords)

    module.tqdm = Bar
    module.train(
        module.Args(
            total_timesteps=RANDOM_STEPS + args.steps,
            batch_size=batch_size,
            buffer_size=10_000,
            learning_starts=RANDOM_STEPS,
            exploration_steps=1,
            network="nature",
            eval_episodes=0,
            cuda=args.cuda,
        )
    )
    return time.perf_counter() - begun[0]


def sb3(agent: str, batch_size: int, args: Args) -> float:
    """Seconds that the library's agent takes for the same steps."""
    import ale_py
    import gymnasium
    from sb3_contrib import QRDQN
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    game = {"frameskip": 1, "repeat_action_probability": 0.25}
    wrapper = {"noop_max": 0, "terminal_on_life_loss": False}
    env = VecFrameStack(make_atari_env("ALE/Pong-v5", 1, 1, env_kwargs=game, wrapper_kwargs=wrapper), 4)
    model = {"dqn": DQN, "qrdqn": QRDQN}[agent](
        "CnnPolicy",
        env,
        batch_size=batch_size,
        buffer_size=10_000,
        learning_starts=RANDOM_STEPS,
        train_freq=4,
        gradient_steps=1,
        target_update_interval=8_000,
        exploration_fraction=1e-6,
        exploration_final_eps=0.01,
        device="auto" if args.cuda else "cpu",
        policy_kwargs={"n_quantiles": 200} if agent == "qrdqn" else {},
    )
    begun = time.perf_counter()
    model.learn(RANDOM_STEPS + args.steps)
    return time.perf_counter() - begun


def measure(contender: str, agent: str, batch_size: int, args: Args) -> float:
    """Steps per second of one contender, in a process of its own."""
    command = [sys.executable, __file__, "--contender", contender, "--agents", agent, "--batch-sizes", str(batch_size)]
    command += ["--steps", str(args.steps), "--cuda" if args.cuda else "--no-cuda"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return (RANDOM_STEPS + args.steps) / json.loads(done.stdout.splitlines()[-1])["seconds"]


def main(args: Args) -> None:
    if args.contender:
        seconds = {"ours": ours, "sb3": sb3}[args.contender](args.agents[0], args.batch_sizes[0], args)
        print(json.dumps({"seconds": seconds}))
        return
    print(f"{os.cpu_count()} cores, {args.rounds} rounds of {RANDOM_STEPS:,} + {args.steps:,} agent steps on Pong\n")
    print(
        "| agent | batch | ours, steps/s | SB3, steps/s | ratio of the medians | ratios of the rounds |\n|-|-|-|-|-|-|"
    )
    for agent in args.agents:
        for batch_size in args.batch_sizes:
            pairs = [[measure(who, agent, batch_size, args) for who in ("ours", "sb3")] for _ in range(args.rounds)]
            mine, theirs = median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)
            ratios = ", ".join(f"{a / b:.2f}" for a, b in pairs)
            print(
                f"| {agent} | {batch_size} | {mine:.0f} | {theirs:.0f} | {mine / theirs:.2f} | {ratios} |", flush=True
            )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
