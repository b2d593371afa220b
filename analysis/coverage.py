"""What part of a game each setting saw: observations of all of them, projected together to two dimensions by UMAP.

The agents without a replay save samples of what they saw with --save-features, so many with each of their reports.
"""

import zipfile
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from analysis import figures
from analysis.runs import BadInput, find_folders, read_record
from analysis.scores import label_of, short_name

GRID = 50  # cells in each direction: ours
TIMES = 200  # of a run that saved more often every second, third, ... file is read: all would fill the memory


def samples_of(folder: Path, of: str) -> np.ndarray:
    """What a run saved, (rows, numbers): its observations, as flat pictures, or its features.

    Raises BadInput if there is nothing, or a file is damaged.
    """
    paths = [path for path in (folder / "features").glob("*.npz") if path.stem.isdecimal()]
    if not paths:
        raise BadInput(f"{folder} has no features: they are saved by pqn.py and ppo.py with --save-features.")
    found = []
    ordered = sorted(paths, key=lambda path: int(path.stem))
    for path in ordered[:: max(1, len(ordered) // TIMES)]:
        try:
            with np.load(path, allow_pickle=False) as file:
                found.append(flat_pictures(file["obs"]) if of == "observations" else file["features"])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            raise BadInput(f"{path} cannot be read: remove it.") from None
    return np.concatenate(found)


def flat_pictures(obs: np.ndarray) -> np.ndarray:
    """Atari's newest frames in a quarter of their size, or MinAtar's channels: (rows, numbers) of float32."""
    if obs.dtype == bool:
        return obs.reshape(len(obs), -1).astype(np.float32)
    newest = obs[:, -1].reshape(-1, 21, 4, 21, 4)
    return newest.mean(axis=(2, 4), dtype=np.float32).reshape(len(obs), -1) / 255


def read_settings(paths: tuple[Path, ...], by: list[str], of: str) -> dict[str, dict[str, np.ndarray]]:
    """{game: {setting: samples of its runs}}, settings in their order. Raises BadInput if there are none."""
    found: dict[str, dict[tuple, list]] = {}
    for folder in find_folders(paths):
        record = read_record(folder / "args.json")
        flags = record["args"] | {"agent": record["agent"]}
        if unknown := [name for name in by if name not in flags]:
            raise BadInput(f"{folder} has no flag {unknown[0]}: --by takes names of flags.")
        key = tuple(flags[name] for name in by)
        game = found.setdefault(short_name(flags["env_id"]), {})
        game.setdefault(key, []).append(samples_of(folder, of))
    settings = {}
    for game, groups in found.items():
        settings[game] = {label_of(by, key): np.concatenate(groups[key]) for key in sorted(groups, key=str)}
    return settings


def project(samples: dict[str, np.ndarray], rows: int, seed: int) -> dict[str, np.ndarray]:
    """Points (rows, 2) of each setting, drawn without replacement, as many of each, and projected together."""
    import umap  # takes ten seconds

    rng = np.random.default_rng(seed)
    count = min([rows, *(len(found) for found in samples.values())])
    drawn = [rng.choice(found, count, replace=False) for found in samples.values()]
    neighbours = min(15, len(samples) * count - 1)
    reducer = umap.UMAP(n_components=2, n_neighbors=neighbours, random_state=seed, n_jobs=1)
    points = reducer.fit_transform(np.concatenate(drawn))
    return dict(zip(samples, np.split(points, len(samples)), strict=True))


def shares(points: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of cells with a point, in a grid over the range that all settings have in common."""
    everything = np.concatenate(list(points.values()))
    low, high = everything.min(axis=0), everything.max(axis=0)
    found = {}
    for label, own in points.items():
        cells = np.minimum((own - low) / np.maximum(high - low, 1e-12) * GRID, GRID - 1).astype(int)
        found[label] = len(np.unique(cells, axis=0)) / GRID**2
    return found


def draw(projected: dict[str, dict[str, np.ndarray]], of: str) -> Figure:
    """A scatter for each setting, a row for each game, on the points of all its settings in gray."""
    columns = max(len(points) for points in projected.values())
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=(2.2 * columns + 0.4, 2.3 * len(projected) + 0.6))
        axes = figure.subplots(len(projected), columns, squeeze=False)
        for row, (game, points) in zip(axes, projected.items(), strict=True):
            everything = np.concatenate(list(points.values()))
            for place in row[len(points) :]:
                place.set_visible(False)
            for place, (label, share), own in zip(row, shares(points).items(), points.values(), strict=False):
                place.scatter(*everything.T, s=1, color="0.88", linewidths=0)
                place.scatter(*own.T, s=1.5, color=figures.COLOURS[0], linewidths=0)
                place.set_title(f"{label}\n{share:.1%} of the cells", fontsize=8)
                place.set(xticks=[], yticks=[])
            row[0].set_ylabel(game.removeprefix("MinAtar/"), fontsize=9)
        figure.supxlabel(f"{of} projected by UMAP; gray: those of all settings", fontsize=7, color="0.35")
    return figure
