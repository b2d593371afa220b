"""From runs to comparable scores: one long table, grouped, cut to what is common, normalised; and what was left out.

A `Run` is one curve of raw scores; a `Study` is what figures and tables are made of. Nothing is dropped or padded in
silence: `Study.notes` says it in sentences that name games, seeds and flags.
"""

import csv
import gzip
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from analysis.runs import BadInput, Folder, Series
from analysis.statistics import ENOUGH_RUNS, METRICS

DATA = Path(__file__).resolve().parent / "data"
COLUMNS = ("agent", "game", "seed", "frames", "score")  # of a long table; all others are settings
OURS = {"setting", "normalised"}  # two more of scores.csv, which a report writes
COSMETIC = {  # flags that do not change what is learned
    *("exp_name", "seed", "cuda", "track", "save_model", "save_features", "resume"),
    *("eval_episodes", "eval_frequency", "diagnostics_frequency", "checkpoint_frequency"),
}


@dataclass
class Run:
    """The curve of one run."""

    agent: str
    game: str
    seed: int
    frames: np.ndarray  # (points,) emulator frames at the end of each iteration, increasing
    scores: np.ndarray  # (points,) raw returns
    source: str  # folder, or file and line
    settings: dict = field(default_factory=dict)  # flags or columns
    versions: dict = field(default_factory=dict)  # of packages
    hours: np.ndarray | None = None  # (points,) of wall-clock time
    finished: bool = True
    series: dict[str, Series] = field(default_factory=dict)  # diagnostics, against agent steps
    frames_per_step: int = 1
    steps: int = 0  # agent steps of an iteration
    repeated: int = 0  # iterations in which no game ended
    tail: int = 0  # agent steps after the last whole iteration
    cut_off: bool = False  # the log ends in the middle of a record


def short_name(env_id: str) -> str:
    """ALE/Pong-v5 -> Pong, MinAtar/Breakout-v1 -> MinAtar/Breakout."""
    return env_id.removeprefix("ALE/").rsplit("-v", 1)[0]


# ----------------------------------------------------------------------------------------------------- from run folders
def iteration_steps(found: list[tuple[Run, Folder]], by: list[str]) -> int:
    """Agent steps of an iteration: 250,000 as in the study, or a twentieth of the shortest run if that is less.

    Only runs that are compared count: of several with the same setting, game and seed the one that is farthest, in
    games that all settings have.
    """
    farthest: dict[tuple, tuple[int, int]] = {}
    for run, folder in found:
        place = (setting_of(run, by), run.game, run.seed)
        farthest[place] = max(farthest.get(place, (0, 0)), (folder.last_step, folder.steps))
    games: dict[str, set] = defaultdict(set)
    for label, game, _ in farthest:
        games[label].add(game)
    common = set.intersection(*games.values())
    lengths = [steps for (_, game, _), (_, steps) in farthest.items() if game in common or not common]
    return min(250_000, max(1, min(lengths) // 20))


def describe(folder: Folder) -> Run:
    """Return a run folder's facts, as yet without its curve."""
    flags = folder.record["args"]
    plain = {k: v if isinstance(v, str | int | float | None) else str(v) for k, v in flags.items() if k != "seed"}
    return Run(
        agent=folder.record["agent"],
        game=short_name(flags["env_id"]),
        seed=flags["seed"],
        frames=np.zeros(0, int),
        scores=np.zeros(0),
        source=str(folder.path),
        settings=plain,
        versions=folder.record["packages"],
        finished=folder.finished,
        series={tag: series for tag, series in folder.series.items() if tag.startswith("diagnostics/")},
        frames_per_step=folder.record["frames_per_step"],
        cut_off=folder.cut_off,
    )


def run_of(folder: Folder, steps: int, evaluation: bool) -> Run:
    """Return the curve of a run folder.

    The score of an iteration is the mean raw return of the training games that ended in its `steps` agent steps; of one
    in which none ended, that of the iteration before. With `evaluation` the points are the evaluations instead.
    """
    run = describe(folder)
    empty = Series(np.zeros(0, int), np.zeros(0), np.zeros(0))
    if evaluation:
        series = folder.series.get("eval/episodic_return", empty)
        ends, scores, times = series.steps, series.values, series.times
    else:
        series = folder.series.get("charts/episodic_return", empty)
        count = folder.last_step // steps  # whole iterations
        inside = series.steps <= count * steps
        number = (series.steps[inside] - 1) // steps
        games = np.bincount(number, minlength=count)
        total = np.bincount(number, series.values[inside], minlength=count)
        last = np.zeros(count)
        np.maximum.at(last, number, series.times[inside])
        known = np.maximum.accumulate(np.where(games > 0, np.arange(count), -1))  # the iteration that has the score
        first = int((known < 0).sum())
        ends, known = (np.arange(count)[first:] + 1) * steps, known[first:]
        scores, times = total[known] / games[known], last[known]
        run.steps, run.repeated, run.tail = steps, int((games[first:] == 0).sum()), folder.last_step - count * steps
    run.frames, run.scores, run.hours = ends * run.frames_per_step, scores, times / 3600
    return run


def means_of_parts(steps: np.ndarray, values: np.ndarray, each: float, parts: int) -> np.ndarray:
    """Means of the values at the first `each` steps, the next, and so on, (parts,); NaN where there is none."""
    places = np.ceil(steps / each).astype(int) - 1
    inside = places < parts
    counts = np.bincount(places[inside], minlength=parts)
    totals = np.bincount(places[inside], values[inside], minlength=parts)
    with np.errstate(invalid="ignore"):
        return totals / counts


# ---------------------------------------------------------------------------------------------------- from a long table
def open_table(path: Path):
    """Open a CSV file, compressed or not. Raises OSError."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", newline="", encoding="utf-8-sig")
    return open(path, newline="", encoding="utf-8-sig")


def value_of(text: str):
    """A setting as a number or truth value where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def read_scores(path: Path) -> list[Run]:
    """Read a CSV file with the columns agent, game, seed, frames, score, and any others as settings.

    Raises BadInput, with the line, for missing columns, wrong numbers, empty cells and rows that repeat another.
    """
    curves: dict[tuple, dict[int, tuple[float, int]]] = defaultdict(dict)
    try:
        with open_table(path) as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            missing = [name for name in COLUMNS if name not in header]
            if missing or len(set(header)) < len(header):
                what = f"lacks the column {', '.join(missing)}" if missing else "names a column twice"
                raise BadInput(f"{path}, line 1: the header {what}; there must be {', '.join(COLUMNS)}.")
            others = OURS if set(header) >= OURS else set()
            settings = [name for name in header if name not in {*COLUMNS, *others}]
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if len(row) != len(header):
                    raise BadInput(f"{where}: {len(row)} cells, and {len(header)} columns.")
                cells = dict(zip(header, row, strict=True))
                try:
                    seed, frames, score = int(cells["seed"]), int(cells["frames"]), float(cells["score"])
                except ValueError:
                    raise BadInput(f"{where}: seed and frames must be whole numbers, and score a number.") from None
                if not abs(score) < 1e100 or not 0 <= frames < 2**60:
                    raise BadInput(f"{where}: the score is {score} at {frames} frames; leave out what is not known.")
                if not cells["agent"] or not cells["game"]:
                    raise BadInput(f"{where}: agent or game is empty.")
                key = (cells["agent"], short_name(cells["game"]), seed, *(cells[name] for name in settings))
                if frames in curves[key]:
                    raise BadInput(f"{where}: repeats line {curves[key][frames][1]} (same run, same frames).")
                curves[key][frames] = (score, reader.line_num)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} could not be read: {getattr(error, 'strerror', None) or error}.") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is no text in UTF-8.") from None
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: {error}.") from None
    if not curves:
        raise BadInput(f"{path} has no row of scores.")
    for place, name in enumerate(settings, 3):
        _check_setting(path, name, place, curves)
    runs = []
    for (agent, game, seed, *values), points in curves.items():
        frames = np.array(sorted(points))
        scores = np.array([points[at][0] for at in frames.tolist()])
        where = f"{path}, line {min(line for _, line in points.values())}"
        found = {name: value_of(value) for name, value in zip(settings, values, strict=True)}
        runs.append(Run(agent, game, seed, frames, scores, where, found))
    return runs


def _check_setting(path: Path, name: str, place: int, curves: dict) -> None:
    """Raise BadInput if a column tells rows of one run apart: no two of its values have frames in common."""
    together = defaultdict(list)
    for key, points in curves.items():
        together[key[:place] + key[place + 1 :]].append(set(points))
    if any(len(parts) > 1 and sum(map(len, parts)) == len(set.union(*parts)) > 2 for parts in together.values()):
        raise BadInput(f"{path}: the column {name!r} changes within a run, so that it is no setting: remove it.")


# ---------------------------------------------------------------------------------------------------------------- study
@dataclass
class Group:
    """The runs of one setting, on the study's games and frames."""

    key: tuple
    label: str
    runs: dict[str, list[Run]]  # by game
    raw: dict[str, np.ndarray]  # by game: (runs, points)
    normalised: dict[str, np.ndarray]  # the same, of the games that can be normalised
    hours: dict[str, np.ndarray] | None  # by game: (runs, points)

    def strata(self, games: Iterable[str]) -> list[np.ndarray]:
        """The normalised scores at the last frames, one array (runs,) a game."""
        return [self.normalised[game][:, -1] for game in games]


@dataclass
class Study:
    """Groups that can be compared: all have the same games and the same frames."""

    by: list[str]
    groups: list[Group]
    games: list[str]  # of all groups
    scored: list[str]  # those of them that have a normalised score
    frames: np.ndarray  # (points,)
    unit: str  # of a normalised score
    notes: list[str]
    metrics: list[str]  # that make sense of this unit

    @property
    def seeds(self) -> str:
        counts = sorted({len(runs) for group in self.groups for runs in group.runs.values()})
        return "1 seed" if counts == [1] else f"{'-'.join(map(str, sorted({counts[0], counts[-1]})))} seeds"

    def fewest(self, *groups: Group) -> int:
        """How many runs of these groups the game has that has fewest: a resample draws within each game."""
        return min(len(group.runs[game]) for group in groups for game in self.scored)

    def mark(self, *groups: Group) -> str:
        """What stands after an interval of these groups: a dagger if it rests on too few runs."""
        return " †" if self.fewest(*groups) < ENOUGH_RUNS else ""


def read_random() -> dict[str, float]:
    """{game: score of random play} of the games for which it is known."""
    with open_table(DATA / "minatar_random.csv") as file:
        rows = list(csv.DictReader(file))
    return {game: low for game, (low, _) in read_baselines().items()} | {r["game"]: float(r["random"]) for r in rows}


def read_baselines() -> dict[str, tuple[float, float]]:
    """{game: (score of random play, score of a human)} of the games that have both."""
    with open_table(DATA / "human_random.csv") as file:
        rows = list(csv.DictReader(file))
    return {row["game"]: (float(row["random"]), float(row["human"])) for row in rows if row["random"]}


def label_of(by: list[str], key: tuple) -> str:
    """('qrdqn', 8) -> 'qrdqn, batch size 8'."""
    named = zip(by, key, strict=True)
    plain = ("agent", "variant")
    return ", ".join(str(value) if name in plain else f"{name.replace('_', ' ')} {value}" for name, value in named)


def get(run: Run, name: str):
    """The value of a column or flag of a run, by which it can be grouped or chosen; None if it has none."""
    return run.settings.get(name) if name not in ("agent", "game", "seed") else getattr(run, name)


def setting_of(run: Run, by: list[str]) -> str:
    """The label of the group that a run belongs to."""
    return label_of(by, tuple(get(run, name) for name in by))


def check_grouping(runs: list[Run], by: list[str]) -> None:
    """Raise BadInput if there is nothing of this name to group by."""
    for name in by:
        if all(get(run, name) is None for run in runs):
            known = sorted({"agent", *(key for run in runs for key in run.settings)})
            raise BadInput(f"no run has {name!r}, by which to group: there are {', '.join(known)}.")


def make_study(runs: list[Run], by: list[str], normalize: str) -> Study:
    """Group runs, and bring them to common games and frames.

    `normalize` is human, none or baseline:<agent or label>. Raises BadInput where nothing can be compared.
    """
    notes: list[str] = []
    check_grouping(runs, by)
    runs = _without_repeats(runs, by, notes)
    _note_curves(runs, notes)
    runs = [run for run in runs if len(run.frames)]
    if not runs:
        raise BadInput("no run has a score yet: no iteration, or with --evaluation no evaluation, is complete.")
    if len({run.game.startswith("MinAtar/") for run in runs}) > 1:
        raise BadInput("there are runs of ALE and of MinAtar games: choose some with --games.")
    collected: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    keys = {}
    for run in sorted(runs, key=lambda run: (run.game, run.seed)):
        key = tuple(get(run, name) for name in by)
        keys.setdefault(label_of(by, key), key)
        collected[label_of(by, key)][run.game].append(run)
    labels = sorted(keys, key=lambda label: [(str(type(value)), value) for value in keys[label]])
    games = _common_games(collected, notes)
    frames = _common_frames({label: [run for g in games for run in collected[label][g]] for label in labels}, notes)
    seeds = {game: {run.seed for found in collected.values() for run in found[game]} for game in games}
    groups = []
    for label in labels:
        chosen = {game: collected[label][game] for game in games}
        _note_missing_seeds(label, chosen, seeds, notes)
        _note_protocols(label, [run for found in chosen.values() for run in found], notes)
        raw = {game: np.stack([_at(run, frames, run.scores) for run in found]) for game, found in chosen.items()}
        hours = None
        if all(run.hours is not None for found in chosen.values() for run in found):
            hours = {game: np.stack([_at(run, frames, run.hours) for run in found]) for game, found in chosen.items()}
        groups.append(Group(keys[label], label, chosen, raw, {}, hours))
    scored, unit = _normalise(groups, games, normalize, notes)
    metrics = [name for name in METRICS if normalize != "none" or name != "optimality_gap"]
    study = Study(by, groups, games, scored, frames, unit, notes, metrics)
    if few := [f"{group.label} ({study.fewest(group)})" for group in groups if study.mark(group)]:
        which = f"which rest on fewer than {ENOUGH_RUNS} runs in a game"
        notes.append(f"Warning: too few runs to tell from the intervals marked †, {which}: {_listed(few)}.")
    return study


def _at(run: Run, frames: np.ndarray, values: np.ndarray) -> np.ndarray:
    return values[np.searchsorted(run.frames, frames)]


def _listed(items: Iterable[str], most: int = 12) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _spans(numbers: list[int]) -> str:
    """Sorted numbers in words: 2, 7 to 9."""
    first = [number for number in numbers if number - 1 not in numbers]
    last = [number for number in numbers if number + 1 not in numbers]
    return _listed(str(a) if a == b else f"{a} to {b}" for a, b in zip(first, last, strict=True))


def _without_repeats(runs: list[Run], by: list[str], notes: list[str]) -> list[Run]:
    """Of runs with the same group, game and seed keep the longest, the last one made if they are equally long.

    The names of run folders end in the time at which they were made.
    """
    together = defaultdict(list)
    for run in runs:
        together[(setting_of(run, by), run.game, run.seed)].append(run)
    kept, left, flags = [], [], set()
    for found in together.values():
        lengths = [int(run.frames[-1]) if len(run.frames) else 0 for run in found]
        longest = [run for run, length in zip(found, lengths, strict=True) if length == max(lengths)]
        best = max(longest, key=lambda run: run.source.rsplit("__", 1)[-1])
        kept.append(best)
        left += [run.source for run in found if run is not best]
        flags |= {name for run in found for name in _differences([best, run])}
    if left:
        notes.append(f"Left out, as another run has the same setting, game and seed: {_listed(left)}.")
    if flags:
        notes[-1] = f"Warning: {notes[-1]} They differ in {_listed(sorted(flags))}: group by one with --by."
    return kept


def _differences(runs: list[Run]) -> dict[str, list[str]]:
    """{flag: its values} of the flags, the agent among them, that are not the same in all these runs of one setting."""
    found = {}
    for name in ["agent", *sorted({name for run in runs for name in run.settings} - COSMETIC)]:
        values = {str(get(run, name)) for run in runs}
        if name == "env_id":  # one for each game is as it should be
            values = set() if len(values) == len({run.game for run in runs}) else values
        if len(values) > 1:
            found[name if name == "agent" else f"--{name.replace('_', '-')}"] = sorted(values)
    return found


def _note_curves(runs: list[Run], notes: list[str]) -> None:
    """Say what is to know of single curves."""
    for steps in sorted({run.steps for run in runs if run.steps}):
        notes.append(f"A score is the mean of the games that ended in {steps:,} agent steps.")
    if repeated := [f"{run.repeated} of {run.source}" for run in runs if run.repeated]:
        notes.append(f"Iterations in which no game ended repeat the score before: {_listed(repeated)}.")
    if tails := [f"{run.tail:,} of {run.source}" for run in runs if run.tail and run.finished]:
        notes.append(f"Left out, as less than an iteration, are the last steps: {_listed(tails)}.")
    if empty := [run.source for run in runs if not len(run.frames)]:
        notes.append(f"Left out, as there is no score yet: {_listed(empty)}.")
    if unfinished := [run.source for run in runs if not run.finished]:
        notes.append(f"Unfinished: {_listed(unfinished)}.")
    if cut_off := [run.source for run in runs if run.cut_off]:
        notes.append(f"The log ends in the middle of a record: {_listed(cut_off)}.")


def _common_games(collected: dict, notes: list[str]) -> list[str]:
    every = sorted({game for found in collected.values() for game in found})
    games = [game for game in every if all(game in found for found in collected.values())]
    for label, found in collected.items():
        if missing := [game for game in every if game not in found]:
            notes.append(f"{label}: no run of {_listed(missing, 100)}; left out of every comparison.")
    if not games:
        raise BadInput("there is no game that all settings have: choose settings with --only.")
    return games


def _common_frames(collected: dict[str, list[Run]], notes: list[str]) -> np.ndarray:
    runs = [run for found in collected.values() for run in found]
    frames = set(runs[0].frames.tolist()).intersection(*(run.frames.tolist() for run in runs[1:]))
    if not frames:
        raise BadInput("the runs have no number of frames in common: choose some with --only.")
    frames = np.array(sorted(frames))
    longest = max(int(run.frames[-1]) for run in runs)
    every = {at for run in runs for at in run.frames.tolist() if at <= frames[-1]}
    if len(every) > len(frames):
        notes.append(f"Left out {len(every) - len(frames)} of {len(every)} points in time, which not all runs have.")
    if longest > frames[-1]:
        short = [label for label, found in collected.items() if any(run.frames[-1] == frames[-1] for run in found)]
        end = f" No longer than that: runs of {_listed(short)}." if short else ""
        notes.append(f"Cut to {frames[-1]:,} frames, which all runs have; the longest have {longest:,}.{end}")
    return frames


def _note_missing_seeds(label: str, chosen: dict[str, list[Run]], seeds: dict[str, set[int]], notes: list[str]) -> None:
    """Name the seeds that another game or setting has and this has not."""
    every, lacking = set.union(*seeds.values()), defaultdict(list)
    for game, found in chosen.items():
        if missing := sorted(every - {run.seed for run in found}):
            lacking[_spans(missing)].append(game)
    for missing, games in lacking.items():
        where = f"any of {len(games)} games" if len(games) == len(chosen) > 1 else _listed(games)
        notes.append(f"{label}: no seed {missing} of {where}.")


def _note_protocols(label: str, runs: list[Run], notes: list[str]) -> None:
    """Runs of one group should differ in game and seed alone."""
    for flag, values in _differences(runs).items():
        notes.append(f"Warning: {label} has runs of different {flag}: {_listed(values)}.")
    for package in sorted({name for run in runs for name in run.versions}):
        values = {str(run.versions.get(package)) for run in runs}
        if len(values) > 1:
            notes.append(f"Warning: {label} has runs of different versions of {package}: {_listed(sorted(values))}.")


def _normalise(groups: list[Group], games: list[str], normalize: str, notes: list[str]) -> tuple[list[str], str]:
    """Fill in `normalised` of every group; return the games that have it, and the name of the unit."""
    baselines = read_baselines()
    if normalize == "none":
        scale, unit = dict.fromkeys(games, (0.0, 1.0)), "return"
        if len(games) > 1:
            notes.append("Aggregates pool the returns as they are: games of large returns weigh most.")
    elif normalize == "human":
        scale, unit = {game: baselines[game] for game in games if game in baselines}, "human-normalised score"
        if missing := [game for game in games if game not in scale]:
            notes.append(f"Left out of the aggregates, as no human score is known: {_listed(missing, 100)}.")
        if not scale:
            raise BadInput(f"no human score is known of {_listed(games)}: give --normalize none or baseline:<agent>.")
    else:
        name = normalize.removeprefix("baseline:")
        chosen = [group for group in groups if name in (group.label, group.label.split(",")[0])]
        if normalize == name or len(chosen) != 1:
            labels = "; ".join(group.label for group in groups)
            raise BadInput(f"--normalize {normalize}: give human, none, or baseline: and one of {labels}.")
        random_play = read_random()
        scale, unit = {}, f"score relative to {chosen[0].label}"
        for game in games:
            random, top = random_play.get(game, 0.0), float(chosen[0].raw[game][:, -1].mean())
            if top > random:
                scale[game] = (random, top)
            else:
                notes.append(f"Left out of the aggregates, as {chosen[0].label} is no better than random play: {game}.")
        if not scale:
            raise BadInput(f"{chosen[0].label} is no better than random play in any game.")
        if unknown := [game for game in scale if game not in random_play]:
            notes.append(f"The score of random play is taken to be 0 in {_listed(unknown, 100)}.")
    for group in groups:
        group.normalised = {game: (group.raw[game] - low) / (high - low) for game, (low, high) in scale.items()}
    return list(scale), unit
