"""Write the replay of a run's checkpoint in the layout of the DQN Replay Dataset (Agarwal et al., 2020).

    python export_dataset.py runs/<run> DIR

Called again after a later checkpoint of the same run, it appends what is new since then as the next files. A run's
whole experience is exported by one call after its end if --buffer-size was as large as the run, or else by a call for
every checkpoint, with --checkpoint-frequency below --buffer-size. agents/cql_offline.py learns from DIR.

A checkpoint of the dataset is six gzipped arrays, $store$_observation_ckpt.N.gz and so on; a row is a step: its newest
frame, action, clipped reward, and whether it terminated. Three rows of zeros stand before each episode. From add_count
on, modulo the number of rows, there is no data. export.json beside them says how far the run has been exported.
"""

import gzip
import json
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

BLOCK = 4_096  # rows that are in memory at a time


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # folder of a run that has a checkpoint.pt
    dataset: tyro.conf.Positional[Path]  # folder of the dataset, new or written by this tool for the same run
    rows: int = 1_000_000  # rows of a checkpoint of the dataset at most, padding among them


def fail(message: str):
    """Answer wrong input: one sentence on stderr, exit status 2."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint that has a replay; its arrays stay on the disk until they are needed."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state["replay"]["observations"], state["global_step"]
    except Exception as error:  # there are a dozen ways to be damaged or foreign
        fail(f"{path} cannot be read as a checkpoint with a replay: {error}")
    return state


def read_progress(args: Args) -> dict:
    """Return what is in the dataset already: of which run, how many of its steps, in how many checkpoints."""
    path = args.dataset / "export.json"
    if path.exists():
        progress = json.loads(path.read_text())
        if progress["run"] != args.run.resolve().name:
            fail(f"{args.dataset} is the export of another run, {progress['run']}.")
        return progress
    if args.dataset.is_dir() and any(args.dataset.iterdir()):
        fail(f"{args.dataset} is not empty, and no dataset that was exported: name a new folder.")
    return {"run": args.run.resolve().name, "steps": 0, "checkpoints": 0}


def write_progress(folder: Path, progress: dict) -> None:
    aside = folder / "export.tmp"
    aside.write_text(json.dumps(progress, indent=2))
    os.replace(aside, folder / "export.json")


def steps_in_order(replay: dict) -> np.ndarray:
    """Return the rows of the replay that hold a step, the oldest first."""
    size = len(replay["ages"])
    rows = np.arange(replay["pos"])
    if replay["full"]:
        rows = (replay["pos"] + np.arange(size)) % size
    return rows[replay["ages"].numpy()[rows] >= 0]  # others hold the frame after a truncation


def with_padding(rows: np.ndarray, ages: np.ndarray) -> np.ndarray:
    """Put three rows of padding, as -1, before each row that begins an episode."""
    begins = np.flatnonzero(ages[rows] == 0)
    return np.insert(rows, begins.repeat(3), -1)


def split(rows: np.ndarray, most: int) -> list[np.ndarray]:
    """Cut the rows into parts of at most so many, none of which ends between an episode and its padding."""
    parts = []
    while len(rows) > most:
        end = most
        while rows[end - 1] < 0:
            end -= 1
        parts.append(rows[:end])
        rows = rows[end:]
    return [*parts, rows]


def write_checkpoint(folder: Path, number: int, rows: np.ndarray, replay: dict) -> None:
    """Write one checkpoint of the dataset; its files appear once all of them are whole."""
    used = len(rows)
    size = used + 1  # as in the dataset, the last row has no step
    frames = replay["observations"].numpy()[:, 0]
    arrays = {
        "$store$_observation": frames.view(np.uint8),
        "$store$_action": replay["actions"].numpy().astype(np.int32),
        "$store$_reward": replay["rewards"].numpy(),
        "$store$_terminal": replay["terminations"].numpy().view(np.uint8),
    }
    facts = {
        "add_count": np.int64(number * size + used),
        "invalid_range": (used + np.arange(-1, 4)) % size,  # for a stack of 4 and one-step returns
    }
    paths = {name: folder / f"{name}_ckpt.{number}.gz" for name in [*arrays, *facts]}
    rows = np.append(rows, -1)

    for name, array in arrays.items():
        with gzip.open(paths[name].with_suffix(".tmp"), "wb", compresslevel=1) as file:
            header = {"descr": array.dtype.str, "fortran_order": False, "shape": (size, *array.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
            for block in np.split(rows, range(BLOCK, size, BLOCK)):
                values = array[block]
                values[block < 0] = 0
                file.write(values.tobytes())
    for name, fact in facts.items():
        with gzip.open(paths[name].with_suffix(".tmp"), "wb") as file:
            np.save(file, fact)
    for path in reversed(paths.values()):  # the frames last: a checkpoint is there when they are
        os.replace(path.with_suffix(".tmp"), path)


def export(args: Args) -> None:
    if args.rows < 100:
        fail(f"--rows is {args.rows}: it must be at least 100.")
    state = read_checkpoint(args.run / "checkpoint.pt")
    replay = state["replay"]
    progress = read_progress(args)

    rows = steps_in_order(replay)
    oldest = state["global_step"] - len(rows)  # number of the first step that the replay still has
    if progress["steps"] < oldest:
        lost = oldest - progress["steps"]
        print(f"warning: {lost:,} steps are in no checkpoint any more; export more often, or raise --buffer-size")
    rows = rows[max(progress["steps"] - oldest, 0) :]
    if len(rows) == 0:
        print(f"{args.dataset} has all {state['global_step']:,} steps of this checkpoint already")
        return

    rows = with_padding(rows, replay["ages"].numpy())
    progress["steps"] = max(progress["steps"], oldest)
    try:
        args.dataset.mkdir(parents=True, exist_ok=True)
        write_progress(args.dataset, progress)  # now the folder is this run's
        for part in tqdm(split(rows, args.rows - 1), unit=" files", disable=not sys.stderr.isatty()):
            write_checkpoint(args.dataset, progress["checkpoints"], part, replay)
            progress["checkpoints"] += 1
            progress["steps"] += int(np.count_nonzero(part >= 0))
            write_progress(args.dataset, progress)
    except OSError as error:
        for path in args.dataset.glob("*.tmp"):
            path.unlink()
        fail(f"{args.dataset} could not be written: {error.strerror}; the same command goes on with it.")
    steps = np.count_nonzero(rows >= 0)
    total = f"{progress['steps']:,} of the run in {progress['checkpoints']} checkpoints"
    print(f"{args.dataset}: {steps:,} steps more, {total}")


if __name__ == "__main__":
    export(tyro.cli(Args, description=__doc__))
