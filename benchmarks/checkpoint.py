"""What a checkpoint costs: seconds, bytes and memory at a full replay, and its share of a run's time.

    python benchmarks/checkpoint.py --rows 1000000

fills a replay with frames of Pong, writes it as dqn.py does (write, sync, read back), loads it again, and times some
hundred steps of training for the share at the default frequency. Needs 7.1 GB of memory and twice that on the disk for
a million transitions.
"""

import importlib
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "agents"))


@dataclass
class Args:
    agent: str = "dqn"  # file in agents/ to train with; its replay is dqn.py's
    rows: int = 1_000_000  # transitions in the replay
    rounds: int = 3  # checkpoints to write
    folder: Path | None = None  # for the files (default: a temporary one)


class Peak:
    """The most memory that this process has had since the beginning of a `with` block, in GB above the beginning's."""

    def __enter__(self):
        self.process, self.going = psutil.Process(), True
        self.start = self.most = self.process.memory_info().rss
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


def main(args: Args) -> None:
    agent, device = importlib.import_module(args.agent), torch.device("cpu")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        os.chdir(name)
        flags = {"total_timesteps": 900, "learning_starts": 300, "eval_episodes": 0, "checkpoint_frequency": 0}
        run = agent.Args(env_id="ALE/Pong-v5", cuda=False, **flags)
        times, step = [], agent.FrameReplay.add
        agent.FrameReplay.add = lambda *a: times.append(time.perf_counter()) or step(*a)
        agent.train(run)
        agent.FrameReplay.add = step
        speed = 1 / np.mean(np.diff(times)[310:])
        flags = agent.Args(env_id="ALE/Pong-v5", buffer_size=args.rows, total_timesteps=2 * args.rows)
        envs = agent.make_env(flags)
        replay = agent.FrameReplay(envs.single_observation_space, 6, flags, device, np.random.default_rng(0))
        obs = agent.reset(envs, 0, 0, 0)
        for row in range(args.rows):
            if row < 2_000:
                obs = envs.step(np.array([row % 6]))[0]
            replay.observations[row] = obs[0, -1]
        network = agent.QNetwork((4, 84, 84), 6, flags)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        network(torch.zeros(1, 4, 84, 84)).sum().backward()
        optimizer.step()
        arrays = agent.pack({"q_network": network, "target_network": network}, optimizer, {"replay": replay})
        path, seconds = Path(name) / "checkpoint.npz", []
        with Peak() as peak:
            for _ in range(args.rounds):
                start = time.monotonic()
                agent.save_checkpoint(path, arrays, {"global_step": 0})
                seconds.append(time.monotonic() - start)
        middle, size = statistics.median(seconds), path.stat().st_size / 1e9
        each = ", ".join(f"{x:.1f}" for x in seconds)
        print(f"{args.rows:,} transitions, {size:.2f} GB: {middle:.1f} s ({each}), {peak.gigabytes:.2f} GB more memory")
        print(f"written in 30 s: about {args.rows * 30 / middle:,.0f} transitions")
        hours = 250_000 / speed / 3_600
        share = middle / (middle + 250_000 / speed)
        print(f"{speed:.1f} steps/s: {hours:.2f} h between checkpoints, which take {100 * share:.2f}% of the time")
        start = time.monotonic()
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                file[key]
        print(f"read again in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
