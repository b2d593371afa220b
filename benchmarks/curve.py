"""Draw the training returns of runs against emulator frames, as a PNG.

python benchmarks/curve.py runs/ALE-Pong-v5__qrdqn__1__... --out pong.png
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders to draw
    out: Path = Path("curve.png")  # file to write
    window: int = 20  # games in the running mean


def main(args: Args) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, folder in enumerate(args.runs):
        try:
            record = json.loads((folder / "args.json").read_text())
        except (OSError, ValueError) as error:
            print(f"error: {folder} is no run folder: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        frames_per_step = record["frames_per_step"]
        games = events.Scalars("charts/episodic_return")
        frames = np.array([game.step for game in games]) * frames_per_step / 1e6
        returns = np.array([game.value for game in games])
        window = min(args.window, len(returns))
        means = np.convolve(returns, np.ones(window) / window, mode="valid")
        colour, flags = f"C{number}", record["args"]
        name = f"{record['agent']}, batch {flags['batch_size']}, seed {flags['seed']}"
        axes.plot(frames, returns, ".", color=colour, alpha=0.25, markersize=3)
        axes.plot(frames[window - 1 :], means, color=colour, label=f"{name}: mean of {window} training games")
        if "eval/episodic_return" in events.Tags()["scalars"]:
            evaluations = events.Scalars("eval/episodic_return")
            axes.plot(
                [e.step * frames_per_step / 1e6 for e in evaluations],
                [e.value for e in evaluations],
                "D",
                color=colour,
                markeredgecolor="black",
                label=f"{name}: evaluation, {flags['eval_episodes']} games at epsilon {flags['eval_epsilon']}",
            )
        axes.set_title(flags["env_id"])
    axes.set_xlabel("emulator frames (millions)")
    axes.set_ylabel("return of a full game, unclipped")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(args.out, dpi=150)
    print(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
