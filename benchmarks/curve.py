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


def read_record(folder: Path) -> dict:
    try:
        return json.loads((folder / "args.json").read_text())
    except (OSError, ValueError) as error:
        print(f"error: {folder} is no run folder: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def games_of(records: list[dict]) -> set[str]:
    return {record["args"]["env_id"] for record in records}


def label_of(record: dict, records: list[dict]) -> str:
    """Agent, batch, seed, and the game and the flags in which the runs differ besides."""
    flags = record["args"]
    words = [] if len(games_of(records)) == 1 else [flags["env_id"]]
    words += [record["agent"], f"{flags['num_envs']} games" if "num_envs" in flags else f"batch {flags['batch_size']}"]
    for name, value in flags.items():
        told = name in ("batch_size", "num_envs", "seed", "env_id", "exp_name", "resume")
        others = [other["args"].get(name, value) for other in records]
        if not told and any(other != value for other in others):
            words.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join([*words, f"seed {flags['seed']}"])


def main(args: Args):
    if not args.runs:
        print("error: name a run folder.", file=sys.stderr)
        raise SystemExit(2)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    records = [read_record(folder) for folder in args.runs]
    for number, (folder, record) in enumerate(zip(args.runs, records, strict=True)):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        millions = record["frames_per_step"] / 1e6  # of frames in a step
        if "charts/episodic_return" not in events.Tags()["scalars"]:
            print(f"error: {folder} has no game that was played to its end", file=sys.stderr)
            raise SystemExit(2)
        games = events.Scalars("charts/episodic_return")
        frames = np.array([game.step for game in games]) * millions
        returns = np.array([game.value for game in games])
        window = min(args.window, len(returns))
        means = np.convolve(returns, np.ones(window) / window, mode="valid")
        colour = f"C{number}"
        flags = record["args"]
        name = label_of(record, records)
        axes.plot(frames, returns, ".", color=colour, alpha=0.25, markersize=3)
        axes.plot(frames[window - 1 :], means, color=colour, label=f"{name}: mean of {window} training games")
        if "eval/episodic_return" in events.Tags()["scalars"]:
            evaluations = events.Scalars("eval/episodic_return")
            steps = np.array([evaluation.step for evaluation in evaluations])
            means = [evaluation.value for evaluation in evaluations]
            label = f"{name}: evaluation, {flags['eval_episodes']} games at epsilon {flags['eval_epsilon']}"
            axes.plot(steps * millions, means, "D", color=colour, markeredgecolor="black", label=label)
    axes.set_title(", ".join(sorted(games_of(records))))
    axes.set_xlabel("emulator frames (millions)")
    axes.set_ylabel("return of a full game, unclipped")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(args.out, dpi=150)
    print(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
