"""What a checkpoint costs: seconds, bytes and memory at a full replay, and its share of a run's time.

    python benchmarks/checkpoint.py --rows 1000000

fills a replay with frames of Pong, writes it as dqn.py does (write aside, sync, rename), loads it again as dqn.py does,
and times some hundred steps of training for the share at the default frequency. Needs 7.1 GB of memory and twice that
on the disk for a million transitions.
"""

import copy
import importlib
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "agents"))
LEARNING_STARTS = 300


@dataclass
class Args:
    agent: str = "dqn"  # file in agents/ to train with; the checkpoint is dqn.py's
    rows: int = 1_000_000  # transitions in the replay
    rounds: int = 3  # checkpoints to write
    steps: int = 600  # agent steps that learn, to know the speed of training
    folder: Path | None = None  # for the files (default: a temporary one)


class Peak:
    """The most memory that this process has had since the beginning of a `with` block, in GB above the beginning's."""

    def __enter__(self):
        self.process = psutil.Process()
        self.start = self.most = self.process.memory_info().rss
        self.going = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.going:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.01)

    def __exit__(self, *_):
        self.going = False
        self.thread.join()
        self.gigabytes = (self.most - self.start) / 1e9


def training_speed(args: Args) -> float:
    """Agent steps a second while learning, on Pong."""
    agent = importlib.import_module(args.agent)
    times = []
    add = agent.FrameReplay.add

    def timed_add(*arguments):
        times.append(time.perf_counter())
        add(*arguments)

    agent.FrameReplay.add = timed_add
    flags = {"total_timesteps": LEARNING_STARTS + args.steps, "learning_starts": LEARNING_STARTS}
    agent.train(agent.Args(cuda=False, eval_episodes=0, checkpoint_frequency=0, **flags))
    agent.FrameReplay.add = add
    return 1 / np.mean(np.diff(times)[LEARNING_STARTS + 10 :])


def make_state(dqn, flags, rows: int) -> dict:
    """A checkpoint's content, with a replay full of frames of Pong and an optimizer that has made a step."""
    envs = dqn.make_env(flags)
    replay = dqn.FrameReplay(envs.single_observation_space, flags, torch.device("cpu"), np.random.default_rng(0))
    obs = dqn.reset(envs, 0, 0, 0)
    for row in range(rows):
        if row < 2_000:
            obs, *_ = envs.step(np.array([row % 6]))
        replay.observations[row] = obs[0, -1]
    replay.full = True
    q_network = dqn.QNetwork((4, 84, 84), 6, flags)
    optimizer = torch.optim.Adam(q_network.parameters(), fused=True)
    q_network(torch.zeros(1, 4, 84, 84)).sum().backward()
    optimizer.step()
    parts = {"q_network": q_network, "target_network": copy.deepcopy(q_network), "optimizer": optimizer}
    state = {name: part.state_dict() for name, part in (parts | {"replay": replay}).items()}
    random = dqn.random_states(np.random.default_rng(0))
    return state | {"args": asdict(flags), "global_step": rows, "random": random}


def main(args: Args):
    dqn = importlib.import_module("dqn")
    with tempfile.TemporaryDirectory(dir=args.folder and args.folder.resolve()) as name:
        os.chdir(name)
        speed = training_speed(args)
        flags = dqn.Args(buffer_size=args.rows, total_timesteps=2 * args.rows)
        state = make_state(dqn, flags, args.rows)
        path = Path(name) / "checkpoint.pt"
        seconds = []
        with Peak() as peak:
            for _ in range(args.rounds):
                start = time.monotonic()
                dqn.save(path, state)
                seconds.append(time.monotonic() - start)
        middle = statistics.median(seconds)
        size = path.stat().st_size / 1e9
        each = ", ".join(f"{x:.1f}" for x in seconds)
        print(f"{args.rows:,} transitions, {size:.2f} GB: {middle:.1f} s ({each}), {peak.gigabytes:.2f} GB more memory")
        print(f"written in 30 s: about {args.rows * 30 / middle:,.0f} transitions")
        between = dqn.Args.checkpoint_frequency / speed
        share = middle / (middle + between)
        print(f"{speed:.1f} steps/s: {between / 3_600:.2f} h between checkpoints, which take {100 * share:.2f}% of it")

        start = time.monotonic()
        loaded = dqn.load_checkpoint(path, flags, {}, np.random.default_rng(0))
        for array, tensor in state["replay"].items():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(loaded["replay"][array])
        print(f"read again in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
