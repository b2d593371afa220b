"""Finished runs on Atari 100k beside the published scores of 100 runs of each agent on the same game.

    python benchmarks/atari100k.py runs/* --out benchmarks/figures/atari100k.png

A run's score is the mean return of its evaluation, 100 games after the last step. The published runs are those of
Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", 2021 (analysis/data).
"""

import csv
import gzip
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

PUBLISHED = Path(__file__).resolve().parent.parent / "analysis" / "data" / "atari100k_published.csv.gz"
NAMES = {"der": "DER", "drq_eps": "DrQ(eps)", "spr": "SPR"}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders; those of other games, agents or lengths are passed over
    out: Path = Path("atari100k.png")  # file to write


def score(folder: Path) -> tuple[str, str, int, float] | None:
    """Agent, game, seed and score of a finished run of 100,000 steps on ALE; None for any other."""
    if not (folder / "finished").exists():
        return None
    record = json.loads((folder / "args.json").read_text())
    flags = record["args"]
    if record["agent"] not in NAMES or "ALE/" not in flags["env_id"] or flags["total_timesteps"] != 100_000:
        return None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if "eval/episodic_return" not in events.Tags()["scalars"]:
        return None
    game = flags["env_id"].removeprefix("ALE/").removesuffix("-v5")
    return record["agent"], game, flags["seed"], events.Scalars("eval/episodic_return")[-1].value


def main(args: Args):
    scores = [score(folder) for folder in args.runs]
    found = sorted(line for line in scores if line)
    if not found:
        print("error: none of these folders is a finished run of 100,000 steps of der, drq_eps or spr", file=sys.stderr)
        raise SystemExit(2)
    with gzip.open(PUBLISHED, "rt", newline="") as file:
        published = list(csv.DictReader(file))
    print("| agent | game | seed | score | published: median | middle half | all | published runs below ours |")
    print("|-|-|-|-|-|-|-|-|")
    pairs = sorted({(agent, game) for agent, game, *_ in found})
    figure, axes = plt.subplots(figsize=(7, 0.7 + 0.8 * len(pairs)), layout="constrained", squeeze=False)
    axes = axes[0, 0]
    rng = np.random.default_rng(0)
    for place, (agent, game) in enumerate(pairs):
        wanted = (NAMES[agent], game)
        runs = np.array([float(row["score"]) for row in published if (row["agent"], row["game"]) == wanted])
        ours = [(seed, value) for a, g, seed, value in found if (a, g) == (agent, game)]
        for seed, value in ours:
            low, quarter, median, three, high = np.percentile(runs, [0, 25, 50, 75, 100])
            below = f"{(runs < value).sum()} of {len(runs)}"
            spread = f"{quarter:.1f} to {three:.1f} | {low:.1f} to {high:.1f}"
            print(f"| {agent} | {game} | {seed} | {value:.2f} | {median:.1f} | {spread} | {below} |")
        heights = place + rng.uniform(-0.25, 0.25, len(runs))
        values = [value for _, value in ours]
        gray = axes.plot(runs, heights, "o", color="0.6", markersize=3)
        red = axes.plot(values, [place] * len(ours), "D", color="C3", markersize=8)
    axes.set_yticks(range(len(pairs)), [f"{NAMES[agent]}, {game}" for agent, game in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.set_xlabel("mean return of 100 evaluation games after 100,000 steps")
    axes.grid(axis="x", alpha=0.3)
    labels = ["a published run", "a run of ours"]
    figure.legend([*gray, *red], labels, loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(args.out, dpi=150)
    print(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
