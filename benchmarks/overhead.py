"""What the extras cost: the priorities of the replay, and the diagnostics.

    python benchmarks/overhead.py

The priorities: drawing a batch of 32 rows out of 1,000,000 by priority, and setting 32 new ones, on one core; beside it
the whole of `sample` and `update_priorities`, with Atari's frames (a replay of 7 GB: --rows for less).
The diagnostics: share of the run time on Pong, at the default frequency, from the times measured inside a short run
(of an update's gradient norm, and of a report). Nothing else should run on the machine.
"""

import contextlib
import importlib
import io
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import gymnasium as gym
import numpy as np
import torch
import tyro

AGENTS = Path(__file__).resolve().parent.parent / "agents"


@dataclass
class Args:
    rows: int = 1_000_000  # transitions in the replay
    draws: int = 2_000  # measurements of the priorities
    agents: tuple[str, ...] = ("dqn", "qrdqn", "rainbow", "iqn")  # agents whose diagnostics are measured
    batch_sizes: tuple[int, ...] = (8, 32)  # batch sizes to measure them with
    steps: int = 600  # agent steps that learn, in each of these runs
    cuda: bool = True  # use a GPU where there is one


def milliseconds(function, times: int) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return 1e3 * median(taken)


def measure_priorities(module, args: Args):
    """Print the times of the priorities alone, and of sampling."""
    torch.set_num_threads(1)
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    rng = np.random.default_rng(0)
    flags = module.Args(buffer_size=args.rows, n_step=3)
    replay = module.PrioritizedReplay(space, flags, torch.device("cpu"), rng)
    replay.observations.fill(1)  # touch every page, as a full replay has
    replay.ages[:] = 1_000
    replay.ready[:] = True
    replay.full = True
    for first in range(0, args.rows, 10_000):
        rows = np.arange(first, min(first + 10_000, args.rows))
        replay.set_priorities(rows, rng.exponential(size=len(rows)))
    new = rng.exponential(size=32)
    losses = torch.from_numpy(rng.exponential(size=32))

    def draw_and_set():
        replay.set_priorities(replay.draw(32), new)

    def sample_and_update():
        replay.update_priorities(replay.sample(32, 3, 0.99).rows, losses)

    alone = milliseconds(draw_and_set, args.draws)
    whole = milliseconds(sample_and_update, args.draws // 4)
    print(f"priorities, {args.rows:,} rows, batch 32, one core: draw and set {alone:.3f} ms")
    print(f"sample() and update_priorities() with their frames, 3-step returns: {whole:.3f} ms\n", flush=True)


def measure_diagnostics(name: str, batch_size: int, args: Args) -> tuple[float, float, float, float]:
    """Milliseconds of an agent step, of a gradient norm and of a report; share of a run's time at the default rate.

    The run itself is made without diagnostics; what they do is done and timed at the places where they would do it.
    """
    module = importlib.import_module(name)
    random_steps = 400
    norms = []  # seconds
    began = []  # of each step
    seen = {}
    step = torch.optim.Adam.step
    act = module.act
    init = module.FrameReplay.__init__

    def timed_step(optimizer):
        step(optimizer)
        begun = time.perf_counter()
        gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        seen["norm"] = torch.nn.utils.get_total_norm(gradients).item()
        norms.append(time.perf_counter() - begun)

    def watched_act(q_network, *arguments):
        seen["network"] = q_network
        began.append(time.perf_counter())
        return act(q_network, *arguments)

    def watched_init(replay, *arguments):
        seen["replay"] = replay
        init(replay, *arguments)

    flags = {
        "batch_size": batch_size,
        "total_timesteps": random_steps + args.steps,
        "learning_starts": random_steps,
        "exploration_steps": 1,
        "buffer_size": 10_000,
        "diagnostics_frequency": 0,
        "checkpoint_frequency": 0,
        "eval_episodes": 0,
        "cuda": args.cuda,
    }
    try:
        torch.optim.Adam.step = timed_step
        module.act = watched_act
        module.FrameReplay.__init__ = watched_init
        with contextlib.redirect_stdout(io.StringIO()):
            module.train(module.Args(**flags))
    finally:
        torch.optim.Adam.step = step
        module.act = act
        module.FrameReplay.__init__ = init

    def report():
        module.diagnose(seen["network"], seen["replay"].probe(), [[1.0, seen["norm"]]] * 2_500)

    one_step = 1e3 * (began[-1] - began[random_steps] - sum(norms)) / (len(began) - 1 - random_steps)
    one_norm = 1e3 * median(norms)
    one_report = milliseconds(report, 5)
    frequency = module.Args.diagnostics_frequency
    updates = frequency / module.Args.train_frequency * getattr(module.Args, "updates_per_step", 1)
    share = (one_norm * updates + one_report) / (one_step * frequency)
    return one_step, one_norm, one_report, share


def main(args: Args):
    sys.path.insert(0, str(AGENTS))
    cores = torch.get_num_threads()
    measure_priorities(importlib.import_module("rainbow"), args)
    torch.set_num_threads(cores)
    device = torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else f"{cores} threads"
    print(f"diagnostics on Pong, {device}\n")
    print("| agent | batch | agent step, ms | gradient norm, ms an update | report, ms | share of run time |")
    print("|-|-|-|-|-|-|")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, batch_size in product(args.agents, args.batch_sizes):
            step, norm, report, share = measure_diagnostics(name, batch_size, args)
            times = f"{step:.2f} | {norm:.2f} | {report:.0f}"
            print(f"| {name} | {batch_size} | {times} | {100 * share:.2f}% |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
