"""How fast the analysis is: intervals beside rliable's on the same cores, a report, and the reading of run folders.

    python benchmarks/bootstrap.py            # intervals, alternately with rliable, medians of three rounds
    python benchmarks/bootstrap.py --report   # a report of 7,315 scores of 55 games, seconds and seconds of a core
    python benchmarks/bootstrap.py --reading  # 240 synthetic runs of 25 million steps, read twice (3 GB in a folder)

Two cases of intervals: the IQM of 26 games x 100 runs with 50,000 resamples, and an IQM curve of 60 games x 5 seeds x
200 points with 2,000.
"""

import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    rounds: int = 3  # times that each is measured
    report: bool = False  # measure a report instead of intervals
    reading: bool = False  # measure the reading of run folders instead of intervals
    folders: int = 240  # runs to read
    games: int = 25_000  # games that each has logged


def ours(scores: np.ndarray, resamples: int) -> tuple:
    """IQM and interval of (runs, games) or (runs, games, points)."""
    from analysis import statistics

    strata = [scores[:, game] for game in range(scores.shape[1])]
    found = statistics.estimate(strata, np.random.default_rng(0), ["iqm"], resamples)["iqm"]
    return found.point, found.low, found.high


def rliables(scores: np.ndarray, resamples: int) -> tuple:
    """The same by rliable."""
    from rliable import library, metrics

    def aggregate(x):
        if x.ndim == 2:
            return np.array([metrics.aggregate_iqm(x)])
        return np.array([metrics.aggregate_iqm(x[..., i]) for i in range(x.shape[-1])])

    np.random.seed(0)  # noqa: NPY002 - rliable draws from it, whatever its random_state
    points, ends = library.get_interval_estimates({"x": scores}, aggregate, reps=resamples)
    return points["x"], ends["x"][0], ends["x"][1]


def measured(function, scores: np.ndarray, resamples: int, answer) -> None:
    """In a process of its own: seconds, peak memory in bytes, and what came out."""
    warnings.simplefilter("ignore", FutureWarning)  # arch's, about rliable's generator
    function(scores[:2, :2], 10)  # imports
    start = time.perf_counter()
    found = function(scores, resamples)
    seconds = time.perf_counter() - start
    answer.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, found))


def intervals(args: Args) -> None:
    rng = np.random.default_rng(1)
    cases = {
        "IQM, 26 games x 100 runs, 50,000 resamples": (rng.gamma(1.0, 0.5, (100, 26)), 50_000),
        "curve, 60 games x 5 seeds x 200 points, 2,000 resamples": (rng.gamma(1.0, 0.5, (5, 60, 200)), 2_000),
    }
    print("| case | ours, s | rliable, s | ratio of the medians | ratios of the rounds | our peak memory, MB |")
    print("|-|-|-|-|-|-|")
    context = multiprocessing.get_context("spawn")
    for title, (scores, resamples) in cases.items():
        seconds, peaks, found = {"ours": [], "rliables": []}, [], {}
        for _ in range(args.rounds):
            for function in (ours, rliables):
                queue = context.Queue()
                process = context.Process(target=measured, args=(function, scores, resamples, queue))
                process.start()
                taken, peak, found[function.__name__] = queue.get()
                process.join()
                seconds[function.__name__].append(taken)
                peaks += [peak] if function is ours else []
        mine, theirs = [np.array(seconds[name]) for name in ("ours", "rliables")]
        ratios = ", ".join(f"{ratio:.1f}" for ratio in theirs / mine)
        ratio = np.median(theirs) / np.median(mine)
        cells = [title, f"{np.median(mine):.2f}", f"{np.median(theirs):.2f}", f"{ratio:.1f}", ratios]
        print(f"| {' | '.join(cells)} | {max(peaks) / 1e6:.0f} |", flush=True)
        for a, b in zip(found["ours"], found["rliables"], strict=True):
            np.testing.assert_allclose(np.ravel(a), np.ravel(b), atol=0.02)  # the same thing was measured


def report(args: Args) -> None:
    """Seven settings, 55 games, 19 seeds, one score each: as large as the tables that were published with BBF."""
    from analysis.scores import read_baselines

    rng, rows = np.random.default_rng(0), ["agent,game,seed,frames,score"]
    games = list(read_baselines())[:55]
    for agent in "ABCDEFG":
        for game in games:
            rows += [f"{agent},{game},{seed},400000,{rng.gamma(1.0, 1_000.0)}" for seed in range(19)]
    with tempfile.TemporaryDirectory(prefix="analysis-") as name:
        table, out = Path(name) / "scores.csv", Path(name) / "results"
        table.write_text("\n".join(rows) + "\n")
        command = [sys.executable, "-m", "analysis", "--scores", str(table), "--out", str(out)]
        for _ in range(args.rounds):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f"report of {len(rows) - 1:,} rows and {len(games)} games: {seconds:.1f} s, {busy:.1f} s of a core")


def synthetic(folder: Path, games: int) -> None:
    """Write a run folder of 25 million steps as the agents do, with `games` games."""
    from torch.utils.tensorboard import SummaryWriter

    steps, rng = 25_000_000, np.random.default_rng(0)
    flags = {"env_id": "ALE/Pong-v5", "seed": 1, "total_timesteps": steps, "batch_size": 32, "exp_name": "dqn"}
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"agent": "dqn", "args": flags, "frames_per_step": 4}))
    writer = SummaryWriter(str(folder))
    ends = np.sort(rng.choice(steps, games, replace=False)) + 1
    for step in ends.tolist():
        writer.add_scalar("charts/episodic_return", rng.normal(), step)
        writer.add_scalar("charts/episodic_length", rng.integers(1_000), step)
    for step in range(1_000, steps + 1, 1_000):
        for tag in ("charts/epsilon", "charts/SPS", "losses/td_loss", "losses/q_values"):
            writer.add_scalar(tag, rng.normal(), step)
    for step in range(10_000, steps + 1, 10_000):
        for tag in ("loss_variance", "gradient_norm", "representation_norm", "srank", "dormant_neurons"):
            writer.add_scalar(f"diagnostics/{tag}", rng.normal(), step)
    writer.close()


def reading(args: Args) -> None:
    from analysis.runs import find_folders, read_folders

    with tempfile.TemporaryDirectory(prefix="analysis-") as name:
        root = Path(name)
        first = root / "runs" / "run-0"
        synthetic(first, args.games)
        size = sum(file.stat().st_size for file in first.iterdir())
        for number in range(1, args.folders):
            shutil.copytree(first, root / "runs" / f"run-{number}")
        print(f"{args.folders} runs of {args.games:,} games, {size / 1e6:.1f} MB each")
        for when in ("first", "again"):
            start = time.perf_counter()
            folders = read_folders(find_folders([root / "runs"]), root / "cache")
            print(f"{when}: {time.perf_counter() - start:.1f} s", flush=True)
        assert all(len(folder.series["charts/episodic_return"].steps) == args.games for folder in folders)
        cached = sum(file.stat().st_size for file in (root / "cache").iterdir())
        print(f"cache: {cached / 1e6:.0f} MB")


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    chosen = reading if arguments.reading else report if arguments.report else intervals
    chosen(arguments)
