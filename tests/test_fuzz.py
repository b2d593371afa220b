"""Whatever a file holds, its reader answers with what is in it or with one sentence: never a traceback.

    python -m pytest tests/test_fuzz.py --hypothesis-profile=long --hypothesis-show-statistics

tries other inputs each time, for some minutes.
"""

import contextlib
import io
import json
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, flat, load, make_args
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from analysis import runs, scores
from analysis.runs import BadInput

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


# ---- checkpoints
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small one: the flags of dqn.py, a network of one layer, its optimizer and what else is plain."""
    dqn = load(ROOT / "agents" / "dqn.py")
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "q_network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "replay": {"pos": 3, "full": False, "ready": torch.tensor([True, False])},
        "random": dqn.random_states(np.random.default_rng(0)),
        "args": asdict(make_args(dqn)),
        "global_step": 7,
        "episode_actions": [0, 2, 1],
        "updates": [[0.5, 1.5]],
    }
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    dqn.save(path, state)
    path.with_name("good.pt").write_bytes(path.read_bytes())
    del state["random"]  # they are set, not returned
    return dqn, path, flat(state)


def read(dqn, path):
    """What the checkpoint holds, or None after one sentence and status 2."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return dqn.load_checkpoint(path, make_args(dqn), {}, np.random.default_rng(0))
    except SystemExit as exit_:
        error = said.getvalue()
        assert exit_.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return None


@given(data=st.data())
def test_a_checkpoint_of_any_bytes(checkpoint, data):
    """It has checksums: what is read is what was written."""
    dqn, path, expected = checkpoint
    good = path.with_name("good.pt").read_bytes()
    path.write_bytes(data.draw(damaged(good) | st.binary(max_size=300)))
    found = read(dqn, path)
    assert found is None or flat(found) == expected


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(data=st.data())
def test_a_checkpoint_of_any_archive(checkpoint, data):
    """Files of it that somebody has changed, added or left out, with checksums that are right again."""
    dqn, path, _ = checkpoint
    with zipfile.ZipFile(path.with_name("good.pt")) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in files if name.endswith("data.pkl"))
    name = data.draw(st.just(pickled) | st.sampled_from(sorted(files)) | st.text("ab.", min_size=1, max_size=5))
    if name in files and data.draw(st.booleans()):
        files[name] = data.draw(damaged(files[name]))
    elif name in files:
        del files[name]
    else:
        files[name] = data.draw(st.binary(max_size=100))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    read(dqn, path)


@given(data=st.data())
def test_a_checkpoint_of_any_contents(checkpoint, data):
    """Whole, but somebody else's idea of a state."""
    dqn, path, _ = checkpoint
    content = data.draw(JSON | st.dictionaries(st.sampled_from(["args", "optimizer", "replay"]), JSON))
    torch.save(content, path)
    read(dqn, path)


def test_a_checkpoint_is_read_as_it_was_written(checkpoint):
    """Else the tests above would pass with a reader that refuses all."""
    dqn, path, expected = checkpoint
    path.write_bytes(path.with_name("good.pt").read_bytes())
    assert flat(read(dqn, path)) == expected


# ---- what the analysis reads
RECORD = {
    "agent": "dqn",
    "args": {"env_id": "ALE/Pong-v5", "seed": 1, "total_timesteps": 1_000, "gamma": 0.99, "resume": None},
    "packages": {"torch": "2.13.0"},
    "device": "cpu",
    "git_commit": None,
    "frames_per_step": 4,
}


@given(data=st.data())
def test_args_json(tmp_path_factory, data):
    """Of any text, and of facts of any value."""
    record = json.loads(json.dumps(RECORD))
    place = data.draw(st.sampled_from(["args", "record", "text"]))
    if place == "args":
        record["args"][data.draw(st.sampled_from([*record["args"], "new"]))] = data.draw(JSON)
    elif place == "record":
        record[data.draw(st.sampled_from([*record, "new"]))] = data.draw(JSON)
    text = json.dumps(record).encode()
    path = tmp_path_factory.getbasetemp() / "args.json"
    path.write_bytes(data.draw(damaged(text)) if place == "text" else text)
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
