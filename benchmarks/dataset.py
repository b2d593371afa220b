"""What full-size checkpoints of the DQN Replay Dataset cost cql_offline.py: seconds to load, memory, time of a batch.

    python benchmarks/dataset.py --rows 1000000 --checkpoints 5

makes them in the data set's layout from random play, 50,000 steps over and over, loads them as the agent does, and
compares the time of a batch with that of an update. The files are removed at the end.
"""

import copy
import gzip
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "agents"))
import cql_offline


@dataclass
class Args:
    game: str = "Breakout"  # ALE game
    rows: int = 1_000_000  # of a checkpoint
    checkpoints: int = 5  # to load
    steps: int = 50_000  # that are played, and repeated to fill a checkpoint
    rounds: int = 200  # of a batch and an update
    folder: Path | None = None  # for the files (default: a temporary one)


def play(envs, steps: int) -> dict[str, np.ndarray]:
    """Frames, actions, rewards and terminals of random play, with three rows of zeros before each game."""
    rng = np.random.default_rng(0)
    rows = []
    game = 0
    while len(rows) < steps:
        obs = cql_offline.reset(envs, 0, 0, game)
        rows += [(np.zeros((84, 84), np.uint8), 0, 0.0, 0)] * 3
        done = False
        while not done:
            actions = rng.integers(envs.single_action_space.n, size=1)
            next_obs, rewards, terminations, truncations, _ = envs.step(actions)
            done = terminations[0] or truncations[0]
            rows.append((obs[0, -1].copy(), actions[0], np.clip(rewards[0], -1, 1), terminations[0]))
            obs = next_obs
        game += 1
    frames, actions, rewards, terminals = zip(*rows, strict=True)
    return {
        "observation": np.stack(frames),
        "action": np.int32(actions),
        "reward": np.float32(rewards),
        "terminal": np.uint8(terminals),
    }


def write(folder: Path, arrays: dict[str, np.ndarray], args: Args):
    """Write checkpoint 0, and give its files the other numbers as well."""
    for name, array in arrays.items():
        with gzip.open(folder / f"$store$_{name}_ckpt.0.gz", "wb", compresslevel=6) as file:
            header = {"descr": array.dtype.str, "fortran_order": False, "shape": (args.rows, *array.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, args.rows, len(array)):
                file.write(array[: args.rows - start].tobytes())
    with gzip.open(folder / "add_count_ckpt.0.gz", "wb") as file:
        np.save(file, np.int64(args.rows - 1))
    for path in list(folder.iterdir()):
        for number in range(1, args.checkpoints):
            os.link(path, folder / path.name.replace("ckpt.0", f"ckpt.{number}"))


def resident() -> float:
    return psutil.Process().memory_info().rss / 1e9


def measure_loading(flags, envs, args: Args) -> list:
    """Load the dataset, print what that takes, and return the replays."""
    before = resident()
    start = time.monotonic()
    numbers = cql_offline.find_checkpoints(flags)
    loaded = {}
    space = envs.single_observation_space
    rng = np.random.default_rng(0)
    cql_offline.load(numbers, loaded, space, int(envs.single_action_space.n), flags, torch.device("cpu"), rng)
    seconds = time.monotonic() - start
    replays = list(loaded.values())
    rows = sum(replay.buffer_size for replay in replays)
    packed = np.mean([len(replay.packed) for replay in replays]) / args.rows
    raw = args.checkpoints * args.rows * 84 * 84 / 1e9
    print(f"{args.checkpoints} checkpoints, {rows:,} transitions, {raw:.1f} GB of frames: loaded in {seconds:.0f} s")
    print(f"on {os.cpu_count()} cores, {resident() - before:.2f} GB of memory, {packed:.0f} bytes a frame")
    return replays


def measure_updates(flags, replays: list, num_actions: int, rounds: int) -> tuple[float, float]:
    """Milliseconds to make a batch, and of the update with it."""
    q_network = cql_offline.OfflineNetwork((4, 84, 84), num_actions, flags)
    q_network.to(memory_format=torch.channels_last)
    target_network = copy.deepcopy(q_network)
    optimizer = torch.optim.Adam(q_network.parameters(), fused=True)
    batches = []
    updates = []
    for number in range(rounds):
        start = time.perf_counter()
        batch = replays[number % len(replays)].sample(flags.batch_size)
        middle = time.perf_counter()
        targets = cql_offline.offline_target(q_network, target_network, batch)
        td_losses, *_ = cql_offline.offline_loss(q_network, batch, targets, flags)
        optimizer.zero_grad()
        td_losses.mean().backward()
        optimizer.step()
        batches.append(middle - start)
        updates.append(time.perf_counter() - middle)
    return 1e3 * statistics.median(batches), 1e3 * statistics.median(updates)


def main(args: Args):
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        flags = cql_offline.Args(env_id=f"ALE/{args.game}-v5", dataset_dir=name, num_checkpoints=args.checkpoints)
        envs = cql_offline.make_env(flags)
        start = time.monotonic()
        write(Path(name), play(envs, args.steps), args)
        size = (Path(name) / "$store$_observation_ckpt.0.gz").stat().st_size / 1e9
        print(f"made in {time.monotonic() - start:.0f} s; the frames of a checkpoint are a file of {size:.3f} GB")
        replays = measure_loading(flags, envs, args)
    for batch_size in (8, 32):
        flags.batch_size = batch_size
        batch, update = measure_updates(flags, replays, int(envs.single_action_space.n), args.rounds)
        print(f"batch size {batch_size}: {batch:.2f} ms to make a batch, {update:.1f} ms for the update")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
