"""Whatever a file holds, its reader answers with what is in it or with one sentence: never a traceback, never a change.

    python -m pytest tests/test_fuzz.py --hypothesis-profile=long --hypothesis-show-statistics

tries other inputs each time, for some minutes.
"""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
from conftest import ROOT, load, make_args
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from analysis import runs, scores
from analysis.runs import BadInput

few = settings(max_examples=settings().max_examples // 5)  # where each input is a run
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """A file with some bytes replaced, cut out, put in or repeated, or cut short."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(0, 40))
        kind = draw(st.sampled_from(["replace", "flip", "cut", "insert", "repeat", "end"]))
        if kind == "replace":
            data[place : place + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[place : place + length]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=40))
        elif kind == "repeat":
            data[place:place] = data[place : place + length]
        elif kind == "end":
            del data[place:]
    return bytes(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of dqn.py, stopped in the middle, in a folder of its own."""
    dqn, folder = load(ROOT / "agents" / "dqn.py"), tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        add = dqn.FrameReplay.add
        patch.setattr(dqn.FrameReplay, "add", lambda s, *a: (add(s, *a), s.pos == 130 and dqn.STOP.append(15))[0])
        path = dqn.train(flags(dqn))
        dqn.STOP.clear()
        yield dqn, folder / path


@pytest.fixture(scope="module")
def content(run):
    """The bytes of its checkpoint, and what is in it: {name: array}."""
    whole = (run[1] / "checkpoint.npz").read_bytes()
    with np.load(io.BytesIO(whole)) as file:
        return whole, {name: file[name] for name in file.files}


def flags(dqn, **changes):
    small = {"total_timesteps": 150, "buffer_size": 200, "checkpoint_frequency": 1_000, "learning_starts": 120}
    return make_args(dqn, **(small | changes))


def answer(function, capsys):
    """What it returns, or None after one sentence and status 2."""
    try:
        return function()
    except SystemExit as exit_:
        error = capsys.readouterr().err
        assert exit_.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return None


@given(data=st.data())
def test_a_checkpoint_of_any_bytes(run, content, capsys, tmp_path_factory, data):
    (dqn, _), (whole, arrays) = run, content
    path = tmp_path_factory.getbasetemp() / "checkpoint.npz"
    path.write_bytes(data.draw(damaged(whole) | st.binary(max_size=300)))
    if found := answer(lambda: dqn.load_checkpoint(path, flags(dqn)), capsys):
        for name, array in found[0].items():  # checksums: what is read is what was written
            assert np.array_equal(array, arrays[name], equal_nan=True)


@few
@given(data=st.data())
def test_a_checkpoint_of_any_facts(run, content, capsys, tmp_path_factory, data):
    """Facts that somebody has changed, in a file that is whole: refused, or the run goes on to its end."""
    dqn, folder = run
    facts = json.loads(content[1]["facts"].tobytes())
    name = data.draw(st.sampled_from([*facts, None]))
    if name is None:
        facts = data.draw(JSON)
    elif data.draw(st.booleans()):
        facts[name] = data.draw(JSON)
    else:
        del facts[name]
    copy = tmp_path_factory.mktemp("facts")
    shutil.copy(folder / "args.json", copy)
    changed = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    np.savez(copy / "checkpoint.npz", **(content[1] | changed))
    before = sorted(path.name for path in copy.iterdir())
    if answer(lambda: dqn.train(flags(dqn, resume=str(copy))), capsys) is None:
        assert sorted(path.name for path in copy.iterdir() if path.name != "lock") == before


ODD = [("version", "1"), ("version", None), ("args", []), ("global_step", 1.5), ("pending", 0), ("logged", 3)]
ODD += [("episode", [0, 0, None, 0]), ("episode", 7), ("game", "ab"), ("game", [99]), ("game", [[]]), ("game", {})]
ODD += [("measured", []), ("measured", {"losses/td_loss": {}}), ("updates", [1]), ("rngs", [{}]), ("rngs", [0, 1, 2])]
ODD += [("seconds", ""), ("args", {"a\nflag": 0})]


@pytest.mark.parametrize(("name", "value"), ODD)
def test_facts_that_once_got_past_the_reader(run, content, capsys, tmp_path, name, value):
    """Tracebacks that fuzzing found: facts of another kind."""
    dqn, folder = run
    facts = json.loads(content[1]["facts"].tobytes()) | {name: value}
    shutil.copy(folder / "args.json", tmp_path)
    changed = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    np.savez(tmp_path / "checkpoint.npz", **(content[1] | changed))
    assert answer(lambda: dqn.train(flags(dqn, resume=str(tmp_path))), capsys) is None
    assert {path.name for path in tmp_path.iterdir()} == {"args.json", "checkpoint.npz", "lock"}


@few
@given(data=st.data())
def test_a_checkpoint_of_other_arrays(run, content, capsys, tmp_path_factory, data):
    """One array has another shape or type, or is missing: refused."""
    (dqn, folder), arrays = run, dict(content[1])
    name = data.draw(st.sampled_from([name for name in arrays if name != "facts"]))
    change = data.draw(st.sampled_from(["missing", "shape", "type", "object"]))
    if change == "missing":
        del arrays[name]
    elif change == "shape":
        arrays[name] = np.zeros((*arrays[name].shape, 2), arrays[name].dtype)
    else:
        arrays[name] = arrays[name].astype({"type": "S3", "object": object}[change])
    copy = tmp_path_factory.mktemp("arrays")
    shutil.copy(folder / "args.json", copy)
    np.savez(copy / "checkpoint.npz", **arrays)
    assert answer(lambda: dqn.train(flags(dqn, resume=str(copy))), capsys) is None


@given(data=st.data())
def test_args_json(run, capsys, tmp_path_factory, data):
    """Of any text, and of flags of any value: for the agent, and for the analysis."""
    dqn, folder = run
    record = json.loads((folder / "args.json").read_text())
    place = data.draw(st.sampled_from(["args", "record", "text"]))
    if place == "args":
        record["args"][data.draw(st.sampled_from([*record["args"], "new"]))] = data.draw(JSON)
    elif place == "record":
        record[data.draw(st.sampled_from([*record, "new"]))] = data.draw(JSON)
    text = json.dumps(record).encode()
    path = tmp_path_factory.getbasetemp() / "args.json"
    path.write_bytes(data.draw(damaged(text)) if place == "text" else text)
    if (found := answer(lambda: dqn.read_flags(path.parent), capsys)) is not None:
        assert type(found) is dict
    try:
        assert runs.read_record(path)["agent"]
    except BadInput as error:
        assert str(error).startswith(str(path))


CSV = b"agent,game,seed,frames,score\n" + b"".join(
    b"dqn,%s,%d,%d,%d.5\n" % (game, seed, frames, seed * frames)
    for game in (b"Pong", b"Qbert")
    for seed in (1, 2)
    for frames in (100, 200)
)


@given(data=st.data())
def test_a_table_of_scores(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "scores.csv"
    path.write_bytes(data.draw(damaged(CSV) | st.text(max_size=200).map(str.encode)))
    try:
        found = scores.read_scores(path)
    except BadInput as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    assert found and all(np.isfinite(run.scores).all() and (np.diff(run.frames) > 0).all() for run in found)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    writer = SummaryWriter(str(folder))
    writer.add_text("hyperparameters", "a table")
    for step in range(1, 40):
        writer.add_scalar("charts/episodic_return", step / 7, step * 1_000)
        writer.add_scalar("losses/td_loss", -step, step)
    writer.close()
    return next(folder.iterdir()).read_bytes()


@given(data=st.data())
def test_an_event_file(log, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "events.out.tfevents.1"
    path.write_bytes(data.draw(damaged(log) | st.binary(max_size=100)))
    try:
        found, *_ = runs.read_log(path)
    except BadInput as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    table = found.get("charts/episodic_return", np.zeros((0, 3)))  # kept values have checksums
    assert set(map(tuple, table[:, :2])) <= {(step * 1_000.0, float(np.float32(step / 7))) for step in range(1, 40)}


def test_a_checkpoint_is_a_plain_archive(run):
    """Anyone can look into it, without this program."""
    _, folder = run
    with zipfile.ZipFile(folder / "checkpoint.npz") as file:
        assert file.testzip() is None and "facts.npy" in file.namelist()
