"""A long run with checkpoints: does its memory stay flat once the replay is full?

    python benchmarks/soak.py --minutes 60 --out benchmarks/figures/soak.png

trains on MinAtar with a checkpoint every 10,000 steps, notes the process' resident memory every five seconds, stops it
with SIGTERM, prints how much it grew from the filling of the replay to the end, and draws it.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import psutil
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    agent: str = "rainbow"  # file in agents/ to run
    minutes: float = 60.0  # that it runs
    rows: int = 100_000  # transitions in the replay
    settle: float = 60.0  # seconds after it is full that are not counted
    out: Path = Path("soak.png")  # file to write


def watch(args: Args, folder: Path) -> tuple[np.ndarray, np.ndarray, int, int, float]:
    """Run the agent; return times (s) and memory (MB), its exit status, steps, and when its replay was full (s)."""
    flags = {
        "env-id": "MinAtar/Breakout-v1",
        "buffer-size": args.rows,
        "total-timesteps": 1_000_000_000,
        "learning-starts": 1_000,
        "checkpoint-frequency": 10_000,
        "eval-frequency": 50_000,
    }
    command = [sys.executable, str(ROOT / "agents" / f"{args.agent}.py"), "--no-cuda"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    out = folder / "out.txt"
    with out.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file)
    watched = psutil.Process(process.pid)
    start = time.monotonic()
    samples = []
    while process.poll() is None and time.monotonic() - start < 60 * args.minutes:
        samples.append((time.monotonic() - start, watched.memory_info().rss / 1e6))
        time.sleep(5)
    process.send_signal(signal.SIGTERM)
    process.wait()

    steps = int(re.search(r"stopped at step ([\d,]+)", out.read_text())[1].replace(",", ""))
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    began = events.FirstEventTimestamp()
    filled = [event.wall_time - began for event in events.Scalars("charts/epsilon") if event.step >= args.rows]
    times, memory = np.array(samples).T
    if not filled or (times > filled[0] + args.settle).sum() < 2:
        print(f"error: {steps:,} steps fill no replay in time: more --minutes, or fewer --rows.", file=sys.stderr)
        raise SystemExit(2)
    return times, memory, process.returncode, steps, filled[0]


def main(args: Args):
    with tempfile.TemporaryDirectory() as folder:
        times, memory, status, steps, filled = watch(args, Path(folder))
    after = times > filled + args.settle
    slope = np.polyfit(times[after] / 3_600, memory[after], 1)[0]
    print(f"{steps:,} steps in {args.minutes:g} minutes, status {status}, {steps // 10_000} checkpoints")
    print(f"the replay was full after {filled / 60:.1f} minutes; from {args.settle:g} s later to the end:")
    print(f"{memory[after].min():.0f} to {memory[after].max():.0f} MB, a trend of {slope:+.1f} MB an hour")
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(times / 60, memory)
    axes.axvline(filled / 60, color="0.5", linestyle=":", label="the replay is full")
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident memory (MB)")
    axes.set_ylim(0)
    axes.legend(frameon=False)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
