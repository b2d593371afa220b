"""Finished runs on Atari 100k beside the published scores of each agent on the same game.

    python benchmarks/atari100k.py runs/* --out benchmarks/figures/atari100k.png

A run's score is the mean return of its evaluation, 100 games after the last step. The published runs (analysis/data)
are those of Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", 2021, 100 of each
agent, and of BBF those of its authors, 14 at replay ratio 2 and 52 at 8. Of SR-SPR none are published game by game: its
runs stand beside SPR's.
"""

import csv
import gzip
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DATA = Path(__file__).resolve().parent.parent / "analysis" / "data"
PUBLISHED = {"der": "DER", "drq_eps": "DrQ(eps)", "spr": "SPR", "sr_spr": "SPR", "bbf": "BBF"}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders; those of other games, agents or lengths are passed over
    out: Path = Path("atari100k.png")  # file to write


class Score(NamedTuple):
    agent: str
    replay_ratio: int | None  # where it is a flag
    game: str
    seed: int
    value: float

    @property
    def label(self) -> str:
        ratio = f", replay ratio {self.replay_ratio}" if self.replay_ratio else ""
        return f"{self.agent}{ratio}, {self.game}"


def score(folder: Path) -> Score | None:
    """The score of a finished run of 100,000 steps on ALE; None for any other."""
    if not (folder / "finished").exists():
        return None
    record = json.loads((folder / "args.json").read_text())
    flags = record["args"]
    if record["agent"] not in PUBLISHED or "ALE/" not in flags["env_id"] or flags["total_timesteps"] != 100_000:
        return None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if "eval/episodic_return" not in events.Tags()["scalars"]:
        return None
    game = flags["env_id"].removeprefix("ALE/").removesuffix("-v5")
    value = events.Scalars("eval/episodic_return")[-1].value
    return Score(record["agent"], flags.get("replay_ratio"), game, flags["seed"], value)


def read_published() -> dict[tuple[str, str, str], list[float]]:
    """{(name, replay ratio or "", game): scores after 100,000 steps}."""
    found = defaultdict(list)
    for name in ("atari100k_published.csv.gz", "bbf_published.csv.gz"):
        with gzip.open(DATA / name, "rt", newline="") as file:
            for row in csv.DictReader(file):
                if row["frames"] == "400000":
                    found[row["agent"], row.get("replay_ratio", ""), row["game"]].append(float(row["score"]))
    return found


def main(args: Args):
    scores = [score(folder) for folder in args.runs]
    found = sorted(line for line in scores if line)
    if not found:
        print(
            "error: none of these folders is a finished run of 100,000 steps of der, drq_eps, spr, sr_spr or bbf",
            file=sys.stderr,
        )
        raise SystemExit(2)
    published = read_published()
    print("| agent, game | seed | score | published: median | middle half | all | published runs below ours |")
    print("|-|-|-|-|-|-|-|")
    labels = sorted({run.label for run in found})
    figure, axes = plt.subplots(figsize=(7, 0.7 + 0.8 * len(labels)), layout="constrained", squeeze=False)
    axes = axes[0, 0]
    rng = np.random.default_rng(0)
    for place, label in enumerate(labels):
        ours = [run for run in found if run.label == label]
        ratio = str(ours[0].replay_ratio) if ours[0].agent == "bbf" else ""
        theirs = np.array(published[PUBLISHED[ours[0].agent], ratio, ours[0].game])
        if len(theirs):
            low, quarter, median, three, high = np.percentile(theirs, [0, 25, 50, 75, 100])
            spread = f"{median:.1f} | {quarter:.1f} to {three:.1f} | {low:.1f} to {high:.1f}"
        for run in ours:
            beside = f"{spread} | {(theirs < run.value).sum()} of {len(theirs)}" if len(theirs) else "none | - | - | -"
            print(f"| {label} | {run.seed} | {run.value:.2f} | {beside} |")
        heights = place + rng.uniform(-0.25, 0.25, len(theirs))
        gray = axes.plot(theirs, heights, "o", color="0.6", markersize=3)
        red = axes.plot([run.value for run in ours], [place] * len(ours), "D", color="C3", markersize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("mean return of 100 evaluation games after 100,000 steps")
    axes.grid(axis="x", alpha=0.3)
    figure.legend([*gray, *red], ["a published run", "a run of ours"], loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(args.out, dpi=150)
    print(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
