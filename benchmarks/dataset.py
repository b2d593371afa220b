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


def play(envs, steps: int) -> tuple[np.ndarray, ...]:
    """Frames, actions, rewards and terminals of random play, with three rows of zeros before each game."""
    rng, rows, game = np.random.default_rng(0), [], 0
    while len(rows) < steps:
        obs, done = cql_offline.reset(envs, 0, 0, game), False
        rows += [(np.zeros((84, 84), np.uint8), 0, 0.0, 0)] * 3
        while not done:
            actions = rng.integers(envs.single_action_space.n, size=1)
            next_obs, rewards, terminations, truncations, _ = envs.step(actions)
            done = terminations[0] or truncations[0]
            rows.append((obs[0, -1].copy(), actions[0], np.clip(rewards[0], -1, 1), terminations[0]))
            obs = next_obs
        game += 1
    frames, actions, rewards, terminals = zip(*rows, strict=True)
    return np.stack(frames), np.int32(actions), np.float32(rewards), np.uint8(terminals)


def write(folder: Path, arrays: tuple[np.ndarray, ...], args: Args) -> None:
    """Write checkpoint 0, and give its files the other numbers as well."""
    names = ["$store$_observation", "$store$_action", "$store$_reward", "$store$_terminal"]
    for name, array in zip(names, arrays, strict=True):
        with gzip.open(folder / f"{name}_ckpt.0.gz", "wb", compresslevel=6) as file:
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


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        flags = cql_offline.Args(env_id=f"ALE/{args.game}-v5", dataset_dir=name, num_checkpoints=args.checkpoints)
        envs, device = cql_offline.make_env(flags), torch.device("cpu")
        start = time.monotonic()
        write(folder, play(envs, args.steps), args)
        size = (folder / "$store$_observation_ckpt.0.gz").stat().st_size
        print(f"made in {time.monotonic() - start:.0f} s; the frames of a checkpoint are a file of {size / 1e9:.3f} GB")
        before, start = resident(), time.monotonic()
        rng, loaded = np.random.default_rng(0), {}
        cql_offline.load(cql_offline.find_checkpoints(flags), loaded, envs, flags, device)
        replays = list(loaded.values())
        seconds, packed = time.monotonic() - start, np.mean([len(replay.packed) for replay in replays])
        raw = args.checkpoints * args.rows * 84 * 84 / 1e9
    rows = sum(len(replay.age) for replay in replays)
    print(
        f"{args.checkpoints} checkpoints, {rows:,} transitions, {raw:.1f} GB of frames: loaded in {seconds:.0f} s on "
        f"{os.cpu_count()} cores, {resident() - before:.2f} GB of memory, {packed / args.rows:.0f} bytes a frame"
    )
    network = cql_offline.OfflineNetwork((4, 84, 84), int(envs.single_action_space.n), flags)
    target_network, optimizer = copy.deepcopy(network), torch.optim.Adam(network.parameters(), fused=True)
    for batch_size in (8, 32):
        times = {"batch": [], "update": []}
        for _ in range(args.rounds):
            start = time.perf_counter()
            batch = replays[rng.integers(len(replays))].sample(batch_size, rng)
            middle = time.perf_counter()
            targets = cql_offline.offline_target(network, target_network, batch)
            optimizer.zero_grad()
            cql_offline.offline_loss(network, batch, targets, flags)[0].mean().backward()
            optimizer.step()
            times["batch"].append(middle - start)
            times["update"].append(time.perf_counter() - middle)
        batch_time, update_time = [1e3 * statistics.median(values) for values in times.values()]
        print(f"batch size {batch_size}: {batch_time:.2f} ms to make a batch, {update_time:.1f} ms for the update")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
