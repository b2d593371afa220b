"""What the extras cost: the sum tree of prioritized replay, and the diagnostics.

    python benchmarks/overhead.py

The tree: drawing a batch of 32 rows out of 1,000,000 by priority, and setting 32 new priorities, on one core; beside it
the whole of `sample` and `update_priorities`, with Atari's frames (a replay of 7 GB: --rows for less).
The diagnostics: share of the run time on Pong, at the default frequency, from the times measured inside a short run
(of an update's gradient norm, and of a report). Nothing else should run on the machine.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
from dataclasses import dataclass
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
    draws: int = 2_000  # measurements of the sum tree
    agents: tuple[str, ...] = ("dqn", "qrdqn", "rainbow", "iqn")  # agents whose diagnostics are measured
    batch_sizes: tuple[int, ...] = (8, 32)  # batch sizes to measure them with
    steps: int = 600  # agent steps that learn, in each of these runs
    cuda: bool = True  # use a CUDA device where there is one


def milliseconds(function, times: int) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return 1e3 * median(taken)


def tree(module, args: Args) -> None:
    """Print the times of the sum tree and of sampling."""
    torch.set_num_threads(1)
    space, rng = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), np.random.default_rng(0)
    flags = module.Args(buffer_size=args.rows, prioritized=True, n_step=3)
    replay = module.FrameReplay(space, 6, flags, torch.device("cpu"), rng)
    replay.observations.fill(1)  # touch every page, as a full replay has
    replay.age[:] = 1_000
    for first in range(0, args.rows, 10_000):
        rows = np.arange(first, min(first + 10_000, args.rows))
        replay.set_priorities(rows, rng.exponential(size=len(rows)))
    replay.full = True

    def draw_and_set():
        rows = replay.find((np.arange(32) + rng.random(32)) / 32)
        replay.set_priorities(rows, new)

    def sample_and_update():
        replay.update_priorities(replay.sample(32).rows, losses)

    new, losses = rng.exponential(size=32), torch.from_numpy(rng.exponential(size=32))
    alone, whole = milliseconds(draw_and_set, args.draws), milliseconds(sample_and_update, args.draws // 4)
    print(f"sum tree, {args.rows:,} rows, batch 32, one core: draw and set {alone:.3f} ms")
    print(f"sample() and update_priorities() with their frames, 3-step returns: {whole:.3f} ms\n", flush=True)


def diagnostics(name: str, batch_size: int, args: Args) -> tuple[float, float, float, float]:
    """Milliseconds of an agent step, of a gradient norm and of a report; share of a run's time at the default rate.

    The run itself is made without diagnostics; what they do is done and timed at the places where they would do it.
    """
    module = __import__(name)
    norms, began, seen = [], [], {}
    step, act, init = torch.optim.Adam.step, module.act, module.FrameReplay.__init__

    def timed_step(optimizer):
        begun = time.perf_counter()
        gradients = [parameter.grad.flatten() for parameter in optimizer.param_groups[0]["params"]]
        seen["update"] = (torch.ones(()), sum(gradient.dot(gradient) for gradient in gradients).sqrt().cpu())
        norms.append(time.perf_counter() - begun)
        step(optimizer)

    def watched_act(q_network, *arguments):
        seen["network"] = q_network
        began.append(time.perf_counter())
        return act(q_network, *arguments)

    def watched_init(replay, *arguments):
        seen["replay"] = replay
        init(replay, *arguments)

    torch.optim.Adam.step, module.act, module.FrameReplay.__init__ = timed_step, watched_act, watched_init
    random_steps, rng = 400, np.random.default_rng(0)
    flags = {"buffer_size": 10_000, "learning_starts": random_steps, "exploration_steps": 1, "eval_episodes": 0}
    flags |= {"total_timesteps": random_steps + args.steps, "diagnostics_frequency": 0, "cuda": args.cuda}
    with contextlib.redirect_stdout(io.StringIO()):
        module.train(module.Args(batch_size=batch_size, **flags))
    torch.optim.Adam.step, module.act, module.FrameReplay.__init__ = step, act, init

    def report():
        module.diagnose(seen["network"], seen["replay"].probe(rng), [seen["update"]] * 2_500, rng)

    one_step = 1e3 * (began[-1] - began[random_steps] - sum(norms)) / (len(began) - 1 - random_steps)
    one_norm, one_report = 1e3 * median(norms), milliseconds(report, 5)
    frequency, per_update = module.Args.diagnostics_frequency, module.Args.train_frequency
    share = (one_norm * frequency / per_update + one_report) / (one_step * frequency)
    return one_step, one_norm, one_report, share


def main(args: Args) -> None:
    sys.path.insert(0, str(AGENTS))
    cores = torch.get_num_threads()
    tree(__import__("rainbow"), args)
    torch.set_num_threads(cores)
    device = torch.cuda.get_device_name() if args.cuda and torch.cuda.is_available() else f"{cores} cores"
    print(f"diagnostics on Pong, {device}\n")
    print("| agent | batch | agent step, ms | gradient norm, ms an update | report, ms | share of run time |")
    print("|-|-|-|-|-|-|")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in args.agents:
            for batch_size in args.batch_sizes:
                step, norm, report, share = diagnostics(name, batch_size, args)
                print(
                    f"| {name} | {batch_size} | {step:.2f} | {norm:.2f} | {report:.0f} | {100 * share:.2f}% |",
                    flush=True,
                )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
