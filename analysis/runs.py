"""Read run folders: their flags, and the scalars of their TensorBoard logs.

A run of 25 million steps logs a few hundred thousand scalars, which TensorBoard's own reader takes a minute over. Here
the records of a file are found in one pass and those that hold one scalar, nearly all, are decoded together with NumPy;
the others (headers, texts, restarts) by TensorBoard's protobuf. What was read is kept in a cache.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

KEPT = ("charts/episodic_return", "eval/episodic_return", "diagnostics/")  # beginnings of the tags that are kept
RETURNS = ("charts/episodic_return", "eval/episodic_return")
LAYOUT = 3  # of a cached file: another number makes the old ones unreadable, and they are made anew


class BadInput(Exception):
    """Something that was given is wrong: the message is one sentence that names the file and what to do."""


@dataclass
class Series:
    """The values of one tag: (points,) each."""

    steps: np.ndarray  # agent steps, int64
    values: np.ndarray  # float64
    times: np.ndarray  # seconds since the run began, float64


@dataclass
class Folder:
    """What a run folder holds."""

    path: Path
    record: dict  # args.json
    series: dict[str, Series] = field(default_factory=dict)
    last_step: int = 0  # of anything that was logged
    cut_off: bool = False  # the log ends in the middle of a record: the run was killed, or is still going on

    @property
    def steps(self) -> int:
        """Agent steps of the whole run; of agents without a replay those of whole roll-outs."""
        flags = self.record["args"]
        rollout = flags.get("num_envs", 1) * flags.get("num_steps", 1)
        return flags["total_timesteps"] // rollout * rollout

    @property
    def finished(self) -> bool:
        return self.last_step >= self.steps


def find_folders(paths: Iterable[Path]) -> list[Path]:
    """Return every folder with an args.json in or below `paths`, sorted. Raises BadInput where there is none."""
    found = {}
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path} does not exist.")
        here, seen = {}, set()
        for name, below, files in os.walk(path, followlinks=True):
            place = os.path.realpath(name)
            if place in seen:  # links may lead in circles
                below.clear()
            elif "args.json" in files:
                here[place] = Path(name)
            seen.add(place)
        if not here:
            raise BadInput(f"{path} holds no run: a run is a folder with args.json and a TensorBoard log.")
        found |= here
    return sorted(found.values())


def read_folders(paths: list[Path], cache: Path | None) -> list[Folder]:
    """Read run folders, several at a time, and from `cache` those whose files have not changed since."""
    if len(paths) < 8:
        return [read_folder(path, cache) for path in paths]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(read_folder, paths, [cache] * len(paths), chunksize=4))


def read_folder(path: Path, cache: Path | None) -> Folder:
    """Read one run folder. Raises BadInput if args.json or a log is broken, or there is no log."""
    logs = sorted(path.glob("events.out.tfevents.*"), key=lambda log: log.name)
    mark = path / "finished"
    files = [path / "args.json", *logs, *([mark] if mark.exists() else [])]
    try:
        stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except OSError as error:
        raise BadInput(f"{error.filename} could not be read: {error.strerror}.") from None
    kept = cache and cache / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.npz"
    if kept and kept.exists() and (folder := _from_cache(kept, path, stamp)):
        return folder
    folder = Folder(path, read_record(path / "args.json"))
    if not logs:
        raise BadInput(f"{path} holds no TensorBoard log (events.out.tfevents.*): remove the folder, or name others.")
    collected: dict[str, list[np.ndarray]] = {}
    passed = 0.0  # seconds of the logs before, not of the pauses between them
    for log in logs:
        scalars, restart, began, cut_off = read_log(log)
        if restart is not None:  # the run was taken up again at this step: what was logged beyond is superseded
            collected = {tag: [part[part[:, 0] < restart] for part in parts] for tag, parts in collected.items()}
            passed = max((part[:, 2].max(initial=0.0) for parts in collected.values() for part in parts), default=0.0)
        for tag, table in scalars.items():
            table[:, 2] += passed - began
            collected.setdefault(tag, []).append(table)
        passed = max((table[:, 2].max(initial=passed) for table in scalars.values()), default=passed)
        folder.cut_off = cut_off
    for tag, parts in collected.items():
        table = np.concatenate(parts)
        if tag.startswith("eval/"):  # one that was made anew after a kill counts once; many games may end in a step
            table = table[np.diff(table[:, 0], append=np.inf) != 0]
        folder.last_step = max(folder.last_step, int(table[:, 0].max(initial=0)))
        if tag.startswith(KEPT):
            folder.series[tag] = Series(table[:, 0].astype(np.int64), table[:, 1], table[:, 2])
        if tag.startswith(RETURNS) and not (good := np.isfinite(table[:, 1]) & (table[:, 0] > 0)).all():
            step, value, _ = table[~good][0]
            raise BadInput(f"{path}: {tag} is {value} at step {step:,.0f}, and cannot be a score.")
    if mark.exists():  # nothing need have been logged at the last step
        folder.last_step = max(folder.last_step, folder.steps)
    if kept:
        _to_cache(kept, folder, stamp)
    return folder


def read_record(path: Path) -> dict:
    """Read args.json. Raises BadInput unless it has the agent and its flags."""
    try:
        record = json.loads(path.read_text())
        flags = record["args"]
        if not (isinstance(record["agent"], str) and isinstance(flags["env_id"], str)):
            raise TypeError
        if not all(type(flags[name]) is int for name in ("seed", "total_timesteps")):
            raise TypeError
        record["packages"] = dict(record.get("packages") or {})
        if not (type(record["frames_per_step"]) is int and record["frames_per_step"] > 0):
            raise TypeError
    except OSError as error:
        raise BadInput(f"{path} could not be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is no text.") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}, line {error.lineno}: {error.msg}.") from None
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path} is no record of a run: the agent, a flag or another fact is missing.") from None
    return record


# ------------------------------------------------------------------------------------------------- TensorBoard's format
def read_log(path: Path) -> tuple[dict[str, np.ndarray], int | None, float, bool]:
    """Read one event file.

    Returns {tag: (points, 3) of step, value, time}, the step at which the file takes up an earlier one (or None), the
    time of its first record and whether it ends in the middle of a record. Times are seconds since 1970. Raises
    BadInput if the file is empty or broken: a checksum is wrong, of any record's length or of a record that is kept.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} could not be read: {error.strerror}.") from None
    if not data:
        raise BadInput(f"{path} is empty: remove it, or the run folder.")
    starts, lengths, end = [], [], len(data)
    unpack, position = struct.Struct("<Q").unpack_from, 0
    while position + 16 <= end:  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        (length,) = unpack(data, position)
        if position + 16 + length > end:
            break
        starts.append(position + 12)
        lengths.append(length)
        position += 16 + length
    array, starts, lengths = np.frombuffer(data, np.uint8), np.array(starts, int), np.array(lengths, int)
    heads = starts - 12
    if position + 12 <= end:  # of a record that is not whole, or whose length is nonsense
        heads = np.append(heads, position)
    _check(path, array, heads, 8)
    if not len(starts):
        raise BadInput(f"{path} is broken: there is no whole record in it.")
    scalars, others = {}, np.ones(len(starts), bool)
    for tag, rows, table in _decode_scalars(array, starts, lengths):
        scalars[tag], others[rows] = table, False
        if tag.startswith(KEPT):
            for length in np.unique(lengths[rows]):
                _check(path, array, starts[rows][lengths[rows] == length], length)
    restart, began = None, None
    for row in np.flatnonzero(others):
        try:
            event = Event.FromString(data[starts[row] : starts[row] + lengths[row]])
        except DecodeError:
            raise BadInput(f"{path} is broken at byte {starts[row]:,}.") from None
        if row == 0:
            began = event.wall_time
        if event.session_log.status == SessionLog.START:
            restart = event.step
        for value in event.summary.value:
            if value.HasField("simple_value"):
                extra = np.array([[event.step, value.simple_value, event.wall_time]])
                scalars[value.tag] = np.concatenate([scalars.get(value.tag, np.empty((0, 3))), extra])
    if began is None:
        raise BadInput(f"{path} is broken: its first record is not a header.")
    ordered = {tag: table[table[:, 0].argsort(kind="stable")] for tag, table in scalars.items()}
    return ordered, restart, began, position < end


def _checksum_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, np.uint32(0x82F63B78) ^ (table >> np.uint32(1)), table >> np.uint32(1))
    return table


CHECKSUMS = _checksum_table()  # CRC-32C of every byte


def _check(path: Path, array: np.ndarray, starts: np.ndarray, length: int) -> None:
    """Raise BadInput unless the `length` bytes at each of `starts` are followed by their checksum, CRC-32C masked."""
    crc = np.full(len(starts), 0xFFFFFFFF, np.uint32)
    for place in range(length):
        crc = CHECKSUMS[(crc ^ array[starts + place]) & 0xFF] ^ (crc >> np.uint32(8))
    crc = ~crc
    masked = ((crc >> np.uint32(15)) | (crc << np.uint32(17))) + np.uint32(0xA282EAD8)
    stored = np.ascontiguousarray(array[(starts + length)[:, None] + np.arange(4)]).view("<u4")[:, 0]
    if (wrong := masked != stored).any():
        raise BadInput(f"{path} is broken at byte {starts[wrong][0]:,}: remove the run folder, or restore the file.")


def _decode_scalars(array: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> list[tuple]:
    """Decode the records that hold a step and a scalar; return (tag, numbers of its records, their step value time).

    In protobuf's encoding: 09 time (8 bytes) 10 step (varint) 2a size 0a size 0a size tag 15 value (4 bytes).
    """
    rows = np.flatnonzero((lengths > 24) & (lengths < 128))
    first = starts[rows]
    step, place, going = np.zeros(len(rows), np.int64), first + 10, np.ones(len(rows), bool)
    for shift in range(0, 63, 7):
        byte = array[np.where(going, place, 0)].astype(np.int64)
        step |= np.where(going, (byte & 127) << shift, 0)
        place += going
        going &= byte > 127
        if not going.any():
            break
    end = first + lengths[rows]
    place = np.minimum(place, end - 7)
    size = array[place + 5].astype(np.int64)  # of the tag
    tag = place + 6
    whole = (array[first] == 0x09) & (array[first + 9] == 0x10) & (array[place] == 0x2A) & (array[place + 2] == 0x0A)
    whole &= (array[place + 4] == 0x0A) & (tag + size + 5 == end) & (size > 0)
    whole &= array[np.minimum(tag + size, len(array) - 1)] == 0x15
    rows, first, step, tag, size = rows[whole], first[whole], step[whole], tag[whole], size[whole]
    times = np.ascontiguousarray(array[first[:, None] + np.arange(1, 9)]).view("<f8")[:, 0]
    values = np.ascontiguousarray(array[(tag + size)[:, None] + np.arange(1, 5)]).view("<f4")[:, 0]
    table = np.stack([step, values, times], axis=1)
    found = []
    for width in np.unique(size):
        same = np.flatnonzero(size == width)
        names = np.ascontiguousarray(array[tag[same][:, None] + np.arange(width)]).view(f"S{width}")[:, 0]
        for name in np.unique(names):
            chosen = same[names == name]
            found.append((name.decode("utf-8", "replace"), rows[chosen], table[chosen]))
    return found


# --------------------------------------------------------------------------------------------------------------- cache
def _to_cache(kept: Path, folder: Folder, stamp: list) -> None:
    facts = {"layout": LAYOUT, "stamp": stamp, "record": folder.record, "tags": list(folder.series)}
    facts |= {"last_step": folder.last_step, "cut_off": folder.cut_off}
    arrays = {}
    for number, series in enumerate(folder.series.values()):
        arrays[f"steps{number}"], arrays[f"values{number}"] = series.steps, series.values
        arrays[f"times{number}"] = series.times
    aside = kept.with_suffix(f".{os.getpid()}.tmp")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
        os.replace(aside, kept)
    except OSError:  # a cache that cannot be written is no cache, and no error
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _from_cache(kept: Path, path: Path, stamp: list) -> Folder | None:
    try:
        with np.load(kept, allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            if facts["layout"] != LAYOUT or facts["stamp"] != stamp:
                return None
            series = {
                tag: Series(*[file[f"{name}{number}"] for name in ("steps", "values", "times")])
                for number, tag in enumerate(facts["tags"])
            }
        return Folder(path, facts["record"], series, facts["last_step"], facts["cut_off"])
    except Exception:  # a damaged cache is made anew, whatever is wrong with it
        return None
