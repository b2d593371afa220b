"""Learning from a recording on MinAtar: cql_offline.py beside the DQN that made the data.

    python benchmarks/offline.py --jobs 2

trains dqn.py for 500,000 steps in each game with a replay that keeps them all, exports it as a dataset, cuts out the
last tenth of the steps as a second, narrow one, and trains each algorithm on both, with one-step and three-step
returns, batches of 8 and 32, three seeds. The score of a run is its last evaluation. Results are added to
benchmarks/results/offline.csv as they come; runs that are there are not made again. The table has the IQM over games
and seeds, in shares of what the behaviour policy (mean of the recorded games) and the DQN that was recorded (its last
100 games) gained on random play, and the probability that a run beats one of dqn, offline, with the same settings.
MinAtar's settings are Dopamine's.
"""

import csv
import gzip
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from learning import FLAGS, ROOT, add_row, call, commit_of, known, random_play, scalars, train

sys.path.insert(0, str(ROOT))
from analysis.figures import COLOURS, MARKERS, STYLE
from analysis.statistics import Interval, estimate, probability_of_improvement

RESULTS = ROOT / "benchmarks" / "results" / "offline.csv"
LEVELS = ["random", "all", "last tenth", "dqn"]  # mean returns: random play, recorded games, DQN's last 100 games
RECORDED_STEPS = 500_000  # agent steps of a recording
KEYS = ["game", "data", "algorithm", "n_step", "batch_size", "seed", "total_timesteps"]  # what tells results apart
DATA = ["all", "last tenth"]
SETTINGS = {
    "learning_rate": 2.5e-4,
    "adam_eps": 3.125e-4,
    "target_network_frequency": 1_000,
    "data_fraction": 1.0,
    "v_min": -100.0,
    "v_max": 100.0,
    "eval_steps": 10_000,
}
NAMES = ("observation", "action", "reward", "terminal")


@dataclass
class Args:
    games: tuple[str, ...] = ("MinAtar/Breakout-v1", "MinAtar/Asterix-v1")  # games to learn
    data: tuple[str, ...] = ("all", "last tenth")  # parts of the recordings to learn from
    algorithms: tuple[str, ...] = ("dqn", "cql-dr3", "cql-c51")  # of cql_offline.py
    n_steps: tuple[int, ...] = (1, 3)  # agent steps of reward in a return
    batch_sizes: tuple[int, ...] = (8, 32)  # transitions per update
    seeds: int = 3  # runs of each setting
    total_timesteps: int = 100_000  # agent steps of training, an update every 4
    jobs: int = 1  # runs at a time, each on one core
    folder: Path = ROOT  # folder to run in: the run folders are in runs/ there, the recordings in datasets/
    results: Path = RESULTS  # table of the results; a table of the recordings is beside it
    table_only: bool = False  # start nothing, print what is there
    figure: Path | None = None  # picture of the IQMs to write


# ---- recordings
def dataset_of(args: Args, game: str, data: str) -> Path:
    return args.folder.resolve() / "datasets" / f"{game.replace('/', '-')}-{data.replace(' ', '-')}"


def recordings_of(args: Args) -> Path:
    return args.results.with_name("offline_recordings.csv")


def record(args: Args, game: str):
    """Record DQN, and write the last tenth of its steps as a dataset of its own, unless both are there."""
    whole, tenth = [dataset_of(args, game, data) for data in DATA]
    if tenth.exists():
        return
    steps = RECORDED_STEPS
    flags = {**FLAGS["500k"], "env_id": game, "seed": 1, "total_timesteps": steps, "buffer_size": steps}
    run = train(args.folder, "dqn", flags)
    if not (whole / "export.json").exists():
        shutil.rmtree(whole, ignore_errors=True)
        call(args.folder, "export_dataset.py", run.resolve(), whole, "--rows", max(steps // 5, 100))
    aside = tenth.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_last_tenth(whole, aside)

    ends, returns = scalars(run)["charts/episodic_return"]
    late = returns[ends > 0.9 * steps]
    values = [random_play(game).mean(), returns.mean(), late.mean(), returns[-100:].mean()]
    add_row(recordings_of(args), ["game", *LEVELS], [game, *[f"{value:.4f}" for value in values]])
    aside.rename(tenth)


def write_last_tenth(whole: Path, tenth: Path):
    """Write the last tenth of the rows of a dataset, from the beginning of a game on, as one checkpoint."""
    arrays = {}
    for name in NAMES:
        parts = []
        for number in range(len(list(whole.glob("add_count*")))):
            with gzip.open(whole / f"add_count_ckpt.{number}.gz") as file:
                add_count = int(np.load(file))
            with gzip.open(whole / f"$store$_{name}_ckpt.{number}.gz") as file:
                array = np.load(file)
            parts.append(array[: add_count % len(array)])
        arrays[f"$store$_{name}"] = np.concatenate(parts)

    rows = len(arrays["$store$_action"])
    first = rows - rows // 10
    first += int(np.flatnonzero(arrays["$store$_terminal"][first:])[0]) + 1  # where a game begins
    for name, array in arrays.items():
        arrays[name] = np.append(array[first:], array[:1], axis=0)  # the last row has no step
    arrays["add_count"] = np.int64(rows - first)
    arrays["invalid_range"] = np.arange(-1, 4)
    for name, array in arrays.items():
        with gzip.open(tenth / f"{name}_ckpt.0.gz", "wb") as file:
            np.save(file, array)


def levels_of(args: Args) -> dict[str, dict[str, float]]:
    """{game: {name of LEVELS: mean return}} of the recordings."""
    levels = {}
    with open(recordings_of(args), newline="") as file:
        for row in csv.DictReader(file):
            levels[row["game"]] = {name: float(row[name]) for name in LEVELS}
    return {game: levels[game] for game in args.games}


# ---- runs
def key_of(run: dict) -> tuple[str, ...]:
    """A run's place in the table of results."""
    return tuple(str(run[name]) for name in KEYS)


def measure(args: Args, wanted: dict):
    """Train one run, {name of KEYS: value}, and add its result to the file."""
    folder = dataset_of(args, wanted["game"], wanted["data"])
    flags = SETTINGS | {name: wanted[name] for name in KEYS if name not in ("game", "data")}
    flags["env_id"] = wanted["game"]
    flags["dataset_dir"] = str(folder)
    flags["num_checkpoints"] = min(5, len(list(folder.glob("add_count*"))))
    flags["iteration_steps"] = args.total_timesteps // 2
    run = train(args.folder, "cql_offline", flags)
    _, returns = scalars(run)["eval/episodic_return"]
    add_row(args.results, [*KEYS, "score", "git_commit"], [*key_of(wanted), f"{returns[-1]:.4f}", commit_of(run)])


# ---- table and figure
def scores_of(args: Args, results: dict, setting: dict) -> np.ndarray:
    """The scores of the seeds that are there, of {name of KEYS: value} but for seed and length."""
    wanted = [setting | {"seed": seed, "total_timesteps": args.total_timesteps} for seed in seeds_of(args)]
    return np.array([results[key_of(one)] for one in wanted if key_of(one) in results])


def chance(args: Args, results: dict, ours: dict, theirs: dict) -> str:
    """The probability that a run of `ours` beats one of `theirs` that is the same in all else, and its interval."""
    factors = {"game": args.games, "data": args.data, "algorithm": args.algorithms}
    factors |= {"n_step": args.n_steps, "batch_size": args.batch_sizes}
    free = {name: values for name, values in factors.items() if name not in ours}
    settings = [dict(zip(free, values, strict=True)) for values in product(*free.values())]
    pairs = [[scores_of(args, results, setting | side) for side in (ours, theirs)] for setting in settings]
    pairs = [pair for pair in pairs if all(map(len, pair))]
    if not pairs or ours == theirs:
        return ""
    found = probability_of_improvement(*zip(*pairs, strict=True), np.random.default_rng(0))
    return f"{found.point:.2f} [{found.low:.2f}, {found.high:.2f}]"


def measured(args: Args, results: dict, levels: dict) -> list[tuple[dict, dict, list[Interval]]]:
    """Every setting that was run: {name of KEYS: value}, {game: scores}, the IQMs in shares of behaviour and of DQN."""
    found = []
    for values in product(args.data, args.algorithms, args.n_steps, args.batch_sizes):
        setting = dict(zip(("data", "algorithm", "n_step", "batch_size"), values, strict=True))
        scores = {game: scores_of(args, results, setting | {"game": game}) for game in args.games}
        if not all(map(len, scores.values())):
            continue
        iqms = []
        for top in (setting["data"], "dqn"):
            spans = {game: play[top] - play["random"] for game, play in levels.items()}
            strata = [(values - levels[game]["random"]) / spans[game] for game, values in scores.items()]
            iqms.append(estimate(strata, np.random.default_rng(0), ["iqm"])["iqm"])
        found.append((setting, scores, iqms))
    return found


def table(args: Args):
    """Print the scores, a row for each setting, and what beats what over all settings; draw the IQMs."""
    results = known(args.results, KEYS, "score")
    levels = levels_of(args)
    for game, play in levels.items():
        print(game + ": " + ", ".join(f"{name} {value:.2f}" for name, value in play.items()))
    names = [game.split("/")[1].removesuffix("-v1") for game in args.games]
    titles = ["data", "algorithm", "n-step", "batch", *names, "IQM, behaviour = 1", "IQM, DQN = 1", "beats dqn"]
    print(f"\n| {' | '.join(titles)} |\n|{'-|' * len(titles)}")
    rows = measured(args, results, levels)
    for setting, scores, iqms in rows:
        cells = [f"{x.mean():.2f} ({', '.join(f'{score:.1f}' for score in x)})" for x in scores.values()]
        cells += [f"{iqm.point:.2f} [{iqm.low:.2f}, {iqm.high:.2f}]" for iqm in iqms]
        cells.append(chance(args, results, setting, setting | {"algorithm": "dqn"}))
        print(f"| {' | '.join(map(str, (*setting.values(), *cells)))} |")
    duels = [("algorithm", "cql-dr3", "dqn"), ("algorithm", "cql-c51", "dqn"), ("algorithm", "cql-c51", "cql-dr3")]
    duels += [("n_step", 3, 1), ("batch_size", 8, 32)]
    print(f"\n| a run of | beats one of | {' | '.join(args.data)} |\n|-|-|{'-|' * len(args.data)}")
    for name, ours, theirs in duels:
        cells = [chance(args, results, {"data": data, name: ours}, {"data": data, name: theirs}) for data in args.data]
        titles = [f"{name} {value}".removeprefix("algorithm ").replace("_", " ") for value in (ours, theirs)]
        print(f"| {' | '.join((*titles, *cells))} |")
    if args.figure:
        draw(args, rows)


def draw(args: Args, rows: list[tuple[dict, dict, list[Interval]]]):
    """The IQMs in shares of the behaviour policy, a panel for each dataset."""
    with matplotlib.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(args.data), figsize=(8, 3.3), sharey=True, squeeze=False)
        for axes, data in zip(panels[0], args.data, strict=True):
            settings = list(product(args.n_steps, args.batch_sizes))
            axes.axhline(1, color="0.5", linestyle=":")
            for number, algorithm in enumerate(args.algorithms):
                found = [row for row in rows if (row[0]["data"], row[0]["algorithm"]) == (data, algorithm)]
                places = [settings.index((setting["n_step"], setting["batch_size"])) for setting, *_ in found]
                points, low, high = np.array([iqms[0] for *_, iqms in found]).reshape(-1, 3).T
                places, colour = np.add(places, 0.2 * number - 0.2), ["black", *COLOURS][number]
                axes.vlines(places, low, high, color=colour)
                axes.plot(places, points, MARKERS[number], color=colour, label=algorithm)
            axes.set_xticks(range(len(settings)), [f"n-step {n}\nbatch {batch}" for n, batch in settings])
            axes.set_title(f"{data} of the recording")
        panels[0, 0].set_ylabel("IQM (random play 0, recorded games 1)")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        figure.savefig(args.figure)


def seeds_of(args: Args) -> range:
    return range(1, args.seeds + 1)


def main(args: Args):
    if not args.table_only:
        grid = product(seeds_of(args), args.data, args.n_steps, args.batch_sizes, args.algorithms, args.games)
        wanted = [
            dict(zip(KEYS, (game, data, algorithm, n_step, batch, seed, args.total_timesteps), strict=True))
            for seed, data, n_step, batch, algorithm, game in grid
        ]
        results = known(args.results, KEYS, "score")
        wanted = [one for one in wanted if key_of(one) not in results]
        games = list(dict.fromkeys(one["game"] for one in wanted))
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda game: record(args, game), games))
            list(pool.map(lambda one: measure(args, one), wanted))
    table(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
