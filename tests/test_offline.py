"""Reading a dataset and learning from it. The files are written here, by the layout's description alone."""

import gzip
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
import tyro
from conftest import (
    NAMES,
    ROOT,
    Bomb,
    check_same,
    load,
    logged,
    make_args,
    read_array,
    scalars,
    stop_in_call,
    stopped,
    weights,
    write_array,
)
from scipy.special import softmax
from test_losses import slow_huber, slow_projection

ALGORITHMS = ["dqn", "cql-dr3", "cql-c51"]
PAD = [(0, 0, 0.0, 0)] * 3


@pytest.fixture
def offline():
    return load(ROOT / "agents" / "cql_offline.py")


def offline_args(module, **changes):
    """Flags at a size that a test can run."""
    small = {
        "env_id": "MinAtar/Breakout-v1",
        "cuda": False,
        "dataset_dir": "data",
        "num_checkpoints": 1,
        "data_fraction": 1.0,
        "total_timesteps": 400,
        "iteration_steps": 200,
        "target_network_frequency": 40,
        "batch_size": 8,
        "eval_steps": 0,
        "diagnostics_frequency": 0,
    }
    return module.Args(**(small | changes))


# ---- a writer of the layout
def write_checkpoint(folder, number, rows, size, frame=(10, 10), add_count=None):
    """Write rows (frame, action, reward, terminal), and stale ones beyond them. A number fills a frame with itself."""
    folder.mkdir(exist_ok=True)
    stale = [(200, 5, -1.0, 1)] * (size - len(rows))
    frames, actions, rewards, terminals = zip(*rows, *stale, strict=True)
    observations = np.zeros((size, *frame), np.uint8)
    for row, content in enumerate(frames):
        observations[row] = content
    arrays = [
        observations,
        np.array(actions, np.int32),
        np.array(rewards, np.float32),
        np.array(terminals, np.uint8),
        np.array(len(rows) if add_count is None else add_count),
        np.arange(5),
    ]
    for name, array in zip(NAMES, arrays, strict=True):
        write_array(folder / f"{name}_ckpt.{number}.gz", array)


@pytest.fixture(scope="module")
def four_checkpoints(tmp_path_factory):
    """Games of MinAtar's Breakout that nobody played: random frames, actions and ends."""
    folder = tmp_path_factory.mktemp("offline") / "data"
    rng = np.random.default_rng(0)
    rows = []
    while len(rows) < 900:
        rows += PAD
        length = rng.integers(2, 20)
        for step in range(length):
            frame = rng.random((10, 10, 4)) < 0.1
            frame[9, step % 10, 0] = True  # the paddle: no frame is blank
            terminal = step == length - 1 and length % 4 > 0  # or the game is truncated
            rows.append((frame, rng.integers(3), float(rng.random() < 0.2), terminal))
    for number in range(4):
        count = 249 if number < 3 else 150
        write_checkpoint(folder, number, rows[:count], 250, (10, 10, 4), number * 250 + count)
        rows = rows[count:]
    return folder


@pytest.fixture
def dataset(four_checkpoints, tmp_path):
    """The four checkpoints, the last of them not full, in a folder of the test's own."""
    return shutil.copytree(four_checkpoints, tmp_path / "data")


def make_replay(module, number=0, frame=(10, 10), seed=0, **flags):
    """The replay that reads a checkpoint: of an ALE game of frames (h, w), or a MinAtar one of (h, w, channels)."""
    if len(frame) == 2:
        flags["env_id"] = "ALE/Pong-v5"
        obs_space = gym.spaces.Box(0, 255, (4, *frame), np.uint8)
    else:
        obs_space = gym.spaces.Box(0, 1, frame, bool)
    args = offline_args(module, **flags)
    rng = np.random.default_rng(seed)
    return module.DatasetReplay(module.checkpoint_paths(args, number), obs_space, 6, args, torch.device("cpu"), rng)


# ---- reading
@pytest.mark.parametrize(
    ("frames", "sampled"),
    [
        # the file begins within a game: 8, 9 and 10 lack frames of their stacks
        ([8, 9, 10, 11, 12], [11]),
        # ... even if it ends right there: the stacks of the next game are whole
        ([-9, 0, 0, 0, 21, 22], [21]),
        # the first of the padding rows stands in the last file, where no row is to be read
        ([0, 0, 11, 12], [11]),
        # one blank row at the start can only be a frame of a game that is under way
        ([0, 9, 10, 11, 12], [11]),
        # a game that begins with a black frame
        ([0, 0, 0, -1, 0, 0, 0, 0, 12, 13], [1, 0, 12]),
        # two black frames within a game are data
        ([0, 0, 0, 11, 0, 0, 14, 15], [11, 0, 0, 14]),
        # three cannot be told from padding after a truncation
        ([0, 0, 0, 11, 12, 0, 0, 0, 14, 15], [11, 14]),
        # a game over at the end of the file, with some of the padding of the next
        ([0, 0, 0, 11, -12, 0, 0], [11, 12]),
        # some of the padding after a truncation, at the end of the file: 12 has no next state
        ([0, 0, 0, 11, 12, 0, 0], [11]),
    ],
)
def test_edges(offline, tmp_path, frames, sampled):
    """Frames by their numbers: 0 is blank, a negative one terminates."""
    rows = [(abs(number), int(number != 0), 0.0, number < 0) for number in frames]
    write_checkpoint(tmp_path / "data", 0, rows, 20)
    replay = make_replay(offline)
    assert replay.frames(replay.ready)[:, 0, 0].tolist() == sampled
    batch = replay._get_samples(replay.ready)
    assert not (batch.obs == 200).any()  # of the stale rows
    assert not (batch.next_obs == 200).any()


def random_games(rng, frame, missing):
    """Games of random steps (frame, action, reward), and whether each terminates; the first lacks its beginning."""
    games = []
    for length in [9, 1, 2, 3, 4, 1, 7, 12, 5, 1, 6]:
        steps = []
        for _ in range(length):
            high = 256 if len(frame) == 2 else 2
            image = rng.integers(high, size=frame).astype(np.uint8)
            image.flat[0] = 1  # not blank
            steps.append((image, int(rng.integers(6)), float(rng.integers(-1, 2))))
        games.append((steps, bool(rng.random() < 0.5)))
    games[0] = (games[0][0][missing:], games[0][1])
    return games


def slow_transitions(games, n, stack, missing, frame):
    """All n-step transitions of the games, one obvious step at a time, by the row in which they begin."""
    found = {}
    row = 0
    for number, (steps, terminates) in enumerate(games):

        def look(t, steps=steps):
            images = [steps[i][0] if i >= 0 else np.zeros(frame, np.uint8) for i in range(t - stack + 1, t + 1)]
            return images[0] if stack == 1 else np.stack(images)

        for t, (_, action, _) in enumerate(steps):
            rewards = [reward for _, _, reward in steps[t : t + n]]
            total = sum(0.9**k * reward for k, reward in enumerate(rewards))
            nothing = np.zeros_like(look(t))
            if number == 0 and missing and t < stack - 1:
                pass  # frames of its stack are not there
            elif t + n < len(steps):
                found[row] = look(t), action, look(t + n), total, 0.9**n
            elif terminates:
                found[row] = look(t), action, nothing, total, 0.0
            row += 1
    return found


@pytest.mark.parametrize("missing", [0, 2])
@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize("frame", [(10, 10), (10, 10, 3)], ids=["ALE", "MinAtar"])
def test_every_transition_against_a_slow_loop(offline, tmp_path, frame, n_step, missing):
    games = random_games(np.random.default_rng(n_step), frame, missing)
    rows = []
    for steps, terminates in games:
        if rows or not missing:
            rows += PAD
        for t, step in enumerate(steps):
            rows.append((*step, terminates and t == len(steps) - 1))
    rounds = n_step - 1  # of the replay that wrote the file, which add_count has counted
    write_checkpoint(tmp_path / "data", 0, rows, 120, frame, rounds * 120 + len(rows))
    stack = 4 if len(frame) == 2 else 1
    expected = slow_transitions(games, n_step, stack, missing, frame)
    replay = make_replay(offline, frame=frame, n_step=n_step, gamma=0.9)
    assert replay.ready.tolist() == list(expected)
    batch = replay._get_samples(replay.ready)
    for i, (obs, action, next_obs, reward, discount) in enumerate(expected.values()):
        np.testing.assert_array_equal(batch.obs[i], obs)
        np.testing.assert_array_equal(batch.next_obs[i], next_obs)
        assert batch.actions[i] == action
        assert batch.rewards[i].item() == pytest.approx(reward, abs=1e-6)
        assert batch.discounts[i].item() == pytest.approx(discount)
    np.testing.assert_array_equal(batch.rows, replay.ready)
    types = [values.dtype for values in batch[:-1]]
    images = torch.uint8 if stack == 4 else torch.bool
    assert types == [images, torch.int64, torch.float32, images, torch.float32]


def test_the_fraction_is_of_the_first_rows(offline, tmp_path):
    rows = [*PAD, *[(10 + i, 1, 0.0, 0) for i in range(17)]]
    write_checkpoint(tmp_path / "data", 0, rows, 40)
    assert make_replay(offline).ready.tolist() == list(range(16))
    assert make_replay(offline, data_fraction=0.25).ready.tolist() == list(range(6))


def test_sampling_is_uniform(offline, tmp_path):
    """The probe is always the same, and does not disturb it."""
    write_checkpoint(tmp_path / "data", 0, [*PAD, *[(i, 1, 0.0, 0) for i in range(1, 12)]], 20)
    replay = make_replay(offline)
    probe = replay.probe()
    assert probe.shape == (256, 4, 10, 10)
    assert set(probe[:, 3, 0, 0].tolist()) == set(range(1, 11))
    assert torch.equal(probe, replay.probe())
    batch = replay.sample(20_000)
    assert batch.rows.tolist() == make_replay(offline).sample(20_000).rows.tolist()
    counts = np.bincount(batch.rows)
    assert len(counts) == 10
    assert np.abs(counts - 2_000).max() < 5 * 2_000**0.5
    np.testing.assert_array_equal(batch.obs[:, 3, 0, 0], batch.rows + 1)


# ---- bad input
@pytest.fixture
def refused_run(offline, refused):
    """A function that begins a run, and returns the one sentence with which it is refused."""

    def run(**flags):
        return refused(offline.train, offline_args(offline, **flags), may_write=True)

    return run


@pytest.mark.parametrize("name", NAMES[:5])
def test_damaged_files(dataset, refused_run, name):
    path = dataset / f"{name}_ckpt.0.gz"
    whole = path.read_bytes()
    checksum_wrong = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    for content in (whole[:-20], checksum_wrong, b"", b"no gzip", gzip.compress(b"no array")):
        path.write_bytes(content)
        error = refused_run(num_checkpoints=4)
        assert f"{name}_ckpt.0.gz cannot be read: it is truncated, damaged or no gzipped NumPy array" in error
    path.unlink()
    if name == "$store$_observation":  # a checkpoint without frames is not there
        assert "data has 3 checkpoints" in refused_run(num_checkpoints=4)
    else:
        assert f"{name}_ckpt.0.gz cannot be read: No such file" in refused_run(num_checkpoints=4)


def test_a_pickle_does_not_run(dataset, refused_run):
    with gzip.open(dataset / "$store$_action_ckpt.0.gz", "wb") as file:
        np.save(file, np.array([Bomb()] * 250, object), allow_pickle=True)
    error = refused_run(num_checkpoints=4)
    assert "$store$_action_ckpt.0.gz is object of shape (250,), not int32" in error
    assert not Path("it_ran").exists()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("$store$_action", lambda x: x.astype(np.int64), "is int64 of shape (250,), not int32 of shape (250,)"),
        ("$store$_action", lambda x: x[:0], "$store$_action_ckpt.0.gz has none"),
        ("$store$_action", lambda x: x + 5, "has actions from 5 to 7, and MinAtar/Breakout-v1 has 0 to 2"),
        ("$store$_action", lambda x: x - 1, "has actions from -1 to 1, and MinAtar/Breakout-v1 has 0 to 2"),
        ("$store$_reward", lambda x: x[:-60], "is float32 of shape (190,), not float32 of shape (250,)"),
        ("$store$_reward", lambda x: x * np.nan, "has a reward that is not finite"),
        ("$store$_observation", lambda x: x[..., :3], "is uint8 of shape (250, 10, 10, 3), not uint8 of shape"),
        ("$store$_observation", np.asfortranarray, "cannot be read: it is truncated, damaged"),
        ("add_count", lambda x: -x - 1, "add_count_ckpt.0.gz is no number of rows"),
    ],
)
def test_wrong_files(dataset, refused_run, name, change, words):
    path = dataset / f"{name}_ckpt.0.gz"
    write_array(path, change(read_array(path)))
    error = refused_run(num_checkpoints=4)
    assert words in error
    assert "_ckpt.0.gz" in error


def test_one_header_is_parsed_at_a_time(offline, dataset, monkeypatch):
    """Checkpoints are read in threads, and Python 3.11's parser fails in those."""
    parse = np.lib.format.read_array_header_1_0
    parsed = []

    def spied(file):
        parsed.append(offline.PARSER.locked())
        return parse(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", spied)
    make_replay(offline, frame=(10, 10, 4))
    assert parsed == [True] * 6


def test_rewards_that_are_not_clipped(offline, dataset, capsys):
    path = dataset / "$store$_reward_ckpt.0.gz"
    write_array(path, read_array(path) * np.float32(3.5))
    replay = make_replay(offline, frame=(10, 10, 4))
    said = capsys.readouterr().out
    assert "$store$_reward_ckpt.0.gz has rewards beyond -1 and 1, and they are clipped" in said
    assert set(replay.rewards) == {0, 1}
    make_replay(offline, 1, frame=(10, 10, 4))
    assert capsys.readouterr().out == ""


def test_too_little_memory(dataset, refused_run, monkeypatch):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(percent=96.0))
    assert "does not fit in memory: lower --num-checkpoints or --data-fraction" in refused_run()


def test_checkpoints_without_transitions(offline, tmp_path, refused_run, capsys):
    """One that is too short, as the last of a dataset may be, is left out; one without a transition is refused."""
    folder = tmp_path / "data"
    steps = [(1, 1, 0.0, 0)] * 9
    write_checkpoint(folder, 0, [*PAD, *steps], 20, frame=(10, 10, 4))
    write_checkpoint(folder, 7, [*PAD, *steps[:1]], 20, frame=(10, 10, 4))
    offline.train(offline_args(offline, total_timesteps=20, iteration_steps=20))
    assert "checkpoint 7 of data has 4 rows of data, and is left out" in capsys.readouterr().out
    assert "data has 1 checkpoints" in refused_run(num_checkpoints=2)
    assert "ckpt.0.gz has no usable transition in its first 0 rows" in refused_run(data_fraction=0.001)
    write_checkpoint(folder, 0, [*PAD, *steps[:1], *PAD, *steps[:1]], 20, frame=(10, 10, 4))
    assert "ckpt.0.gz has no usable transition in its first 8 rows" in refused_run()


def test_gaps_in_the_numbering(offline, dataset):
    """The dataset's own has some. Other files in the folder are let be."""
    for path in dataset.glob("*_ckpt.[12].gz"):
        path.rename(str(path).replace("ckpt.1", "ckpt.49").replace("ckpt.2", "ckpt.50"))
    (dataset / "export.json").write_text("{}")
    (dataset / "$store$_observation_ckpt.x.gz").write_bytes(b"")
    args = offline_args(offline, num_checkpoints=4)
    assert offline.find_checkpoints(args) == [0, 3, 49, 50]
    offline.train(args)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"dataset_dir": "nothing"}, "nothing has 0 checkpoints"),
        (
            {"num_checkpoints": 40},
            "data has 4 checkpoints with data ($store$_observation_ckpt.N.gz and others), and --num",
        ),
        ({"iteration_steps": 202}, "--train-frequency is 4: it must divide the lengths and the other frequencies"),
        ({"total_timesteps": 402}, "--train-frequency is 4: it must divide"),
        ({"target_network_frequency": 41}, "--train-frequency is 4: it must divide"),
        ({"diagnostics_frequency": 10}, "--train-frequency is 4: it must divide"),
        ({"checkpoint_frequency": 101}, "--train-frequency is 4: it must divide"),
        ({"env_id": "ALE/Pnog-v5"}, "ALE/Pnog-v5"),
    ],
)
def test_wrong_flags(offline, dataset, refused, flags, words):
    assert words in refused(lambda: offline.train(offline_args(offline, **flags)))


# ---- losses
def random_batch(module, rng, num_actions=3, size=16):
    obs, next_obs = [torch.tensor(rng.integers(2, size=(size, 10, 10, 4)).astype(bool)) for _ in range(2)]
    return module.Batch(
        obs=obs,
        actions=torch.tensor(rng.integers(num_actions, size=size)),
        rewards=torch.tensor(rng.normal(size=size)).float(),
        next_obs=next_obs,
        discounts=torch.tensor(rng.choice([0.0, 0.99**3], size=size)).float(),
        rows=np.arange(size),
    )


def random_networks(module, args, rng):
    """An online and a target network with 3 actions, of biases that are not zero."""
    networks = [module.OfflineNetwork((10, 10, 4), 3, args) for _ in range(2)]
    for network in networks:
        for parameter in network.parameters():
            parameter.data += torch.from_numpy(rng.normal(size=parameter.shape) * 0.1).float()
    return networks


def double(network, obs):
    """Features and outputs of a network in float64: (batch, width), (batch, actions, atoms)."""
    values = {name: value.detach().double().numpy() for name, value in network.state_dict().items()}
    features = network.convolutions(obs).detach().double().numpy()
    features = np.maximum(features @ values["dense.0.weight"].T + values["dense.0.bias"], 0)
    output = (features @ values["head.weight"].T + values["head.bias"]).reshape(len(obs), 3, -1)
    if "value.weight" in values:
        value = features @ values["value.weight"].T + values["value.bias"]
        output = value[:, None] + output - output.mean(axis=1, keepdims=True)
    return features, output


def slow_c51(output, next_output, target_output, action, reward, discount):
    """Cross-entropy with the projected distribution of the action that the online network prefers, and all Q."""
    support = np.linspace(-2, 3, 11)
    best = int(np.argmax(softmax(next_output, axis=1) @ support))
    mass = slow_projection(softmax(target_output[best]), reward, discount, support)
    return -sum(mass * np.log(softmax(output[action]))), softmax(output, axis=1) @ support


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_losses_against_slow_loops(offline, algorithm):
    """The DR3 term is not computed where it does not count."""
    rng = np.random.default_rng(1)
    args = offline_args(offline, algorithm=algorithm, n_atoms=11, v_min=-2.0, v_max=3.0)
    q_network, target_network = random_networks(offline, args, rng)
    batch = random_batch(offline, rng)
    targets = offline.offline_target(q_network, target_network, batch)
    td_losses, cql, dr3, q_values = offline.offline_loss(q_network, batch, targets, args)
    features, output = double(q_network, batch.obs)
    next_features, next_output = double(q_network, batch.next_obs)
    _, target_output = double(target_network, batch.next_obs)
    for i in range(16):
        action = int(batch.actions[i])
        reward = batch.rewards[i].item()
        discount = batch.discounts[i].item()
        if algorithm == "cql-c51":
            td, means = slow_c51(output[i], next_output[i], target_output[i], action, reward, discount)
        else:
            means = output[i][:, 0]
            error = reward + discount * max(target_output[i][:, 0]) - means[action]
            td = slow_huber(error) if algorithm == "cql-dr3" else error**2
        expected = {
            "td": td,
            "q": means[action],
            "cql": np.log(sum(np.exp(means))) - means[action],
            "dr3": abs(sum(features[i] * next_features[i])) if algorithm == "cql-dr3" else 0,
        }
        found = {"td": td_losses[i], "q": q_values[i], "cql": cql[i], "dr3": dr3[i]}
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_gradients_flow_where_they_should(offline):
    """Through both features of DR3, into the online network alone."""
    rng = np.random.default_rng(2)
    args = offline_args(offline, algorithm="cql-dr3")
    q_network, target_network = random_networks(offline, args, rng)
    batch = random_batch(offline, rng)
    targets = offline.offline_target(q_network, target_network, batch)
    assert not targets.requires_grad
    td_losses, cql, dr3, _ = offline.offline_loss(q_network, batch, targets, args)
    for loss in (td_losses, cql):
        q_network.zero_grad()
        loss.mean().backward(retain_graph=True)
        assert q_network.dense[0].bias.grad.any()
    q_network.zero_grad()
    dr3.mean().backward()
    found = q_network.dense[0].bias.grad.clone()

    parts = []
    for moving, still in ((batch.obs, batch.next_obs), (batch.next_obs, batch.obs)):
        q_network.zero_grad()
        products = q_network.features(moving) * q_network.features(still).detach()
        products.sum(dim=1).abs().mean().backward()
        parts.append(q_network.dense[0].bias.grad.clone())
    assert parts[0].any()
    assert parts[1].any()
    assert torch.allclose(found, parts[0] + parts[1], atol=1e-6)
    assert all(parameter.grad is None for parameter in target_network.parameters())


@pytest.mark.parametrize("algorithm", ["dqn", "cql-c51"])
def test_the_network_on_ale(offline, dqn, algorithm):
    """Of dqn.py's layers, with Xavier's initialisation and biases of zero; without a distribution just the same."""
    torch.manual_seed(1)
    network = offline.OfflineNetwork((4, 84, 84), 6, offline_args(offline, algorithm=algorithm))
    generator = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8, generator=generator)
    assert network(obs).shape == (3, 6, 51 if algorithm == "cql-c51" else 1)
    assert network.q_values(obs).shape == (3, 6)
    if algorithm == "dqn":
        torch.manual_seed(1)
        other = dqn.QNetwork((4, 84, 84), 6, make_args(dqn))
        assert torch.allclose(other(obs), network.q_values(obs), atol=1e-6)
    for layer in (network.dense[0], network.head):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


# ---- training
def test_defaults_of_the_algorithms(offline, capsys):
    """As the protocol has them; flags that are given go before."""
    expected = {
        "dqn": (6.25e-5, 1.5e-4, 8_000, 1.0, 0.0, 0.0),
        "cql-dr3": (5e-5, 3.125e-4, 8_000, 1.0, 0.1, 0.1),
        "cql-c51": (6.25e-5, 1.5e-4, 400, 0.05, 0.1, 0.0),
    }
    names = ["learning_rate", "adam_eps", "target_network_frequency", "data_fraction", "cql_alpha", "dr3_coefficient"]
    for algorithm, values in expected.items():
        args = tyro.cli(offline.Args, args=["--dataset-dir", "x", "--algorithm", algorithm])
        assert args.algorithm == algorithm
        assert tuple(getattr(args, name) for name in names) == values
    assert tyro.cli(offline.Args, args=["--dataset-dir", "x"]) == offline.Args(dataset_dir="x", algorithm="dqn")

    given = ["--dataset-dir", "x", "--learning-rate", "1e-3", "--algorithm=cql-dr3", "--dr3-coefficient", "0"]
    args = tyro.cli(offline.Args, args=given)
    assert (args.learning_rate, args.cql_alpha, args.dr3_coefficient) == (1e-3, 0.1, 0.0)
    assert (args.batch_size, args.num_checkpoints, args.train_frequency) == (32, 5, 4)
    assert (args.total_timesteps, args.iteration_steps, args.eval_steps) == (200 * 250_000, 4 * 62_500, 125_000)


@pytest.mark.parametrize(("algorithm", "n_step"), [("dqn", 3), ("cql-dr3", 1), ("cql-c51", 3)])
def test_a_run_and_its_repetition(offline, dataset, algorithm, n_step):
    flags = {
        "algorithm": algorithm,
        "n_step": n_step,
        "num_checkpoints": 2,
        "total_timesteps": 1_000,
        "iteration_steps": 400,  # the last is shorter
        "eval_steps": 60,
        "save_model": True,
        "diagnostics_frequency": 200,
    }
    one, again, other = [offline.train(offline_args(offline, seed=seed, **flags)) for seed in (1, 1, 2)]
    for name, value in weights(one).items():
        assert torch.equal(value, weights(again)[name]), name
    assert not torch.equal(weights(one)["head.weight"], weights(other)["head.weight"])
    trained = torch.load(one / "checkpoint.pt", weights_only=True)["q_network"]
    assert torch.equal(weights(one)["head.weight"], trained["head.weight"])

    found = scalars(one)
    assert [step for step, _ in found["eval/episodic_return"]] == [400, 800, 1_000]
    assert [step for step, _ in found["diagnostics/srank"]] == [200, 400, 600, 800, 1_000]
    for tag in ("losses/td_loss", "losses/cql", "losses/dr3", "losses/q_values", "charts/SPS"):
        assert [step for step, _ in found[tag]] == [1_000]
    assert (found["losses/dr3"][0][1] > 0) == (algorithm == "cql-dr3")


def test_the_terms_weigh_in(offline, dataset, monkeypatch):
    """The loss that is minimised is the mean of the TD loss and of the terms by their weights."""
    terms = []
    minimised = []
    offline_loss = offline.offline_loss
    backward = torch.Tensor.backward

    def spied_loss(*args):
        terms.append(offline_loss(*args))
        return terms[-1]

    def spied_backward(loss):
        minimised.append(loss.item())
        backward(loss)

    monkeypatch.setattr(offline, "offline_loss", spied_loss)
    monkeypatch.setattr(torch.Tensor, "backward", spied_backward)
    flags = {"cql_alpha": 2.0, "dr3_coefficient": 3.0, "total_timesteps": 20, "iteration_steps": 20}
    offline.train(offline_args(offline, **flags))
    assert len(minimised) == 5
    for loss, (td_losses, cql, dr3, _) in zip(minimised, terms, strict=True):
        expected = td_losses.mean() + 2 * cql.mean() + 3 * dr3.mean()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert cql.mean() > 0
        assert dr3.mean() > 0


def test_checkpoints_are_drawn_anew(offline, dataset, monkeypatch):
    """In each iteration; each minibatch comes from one of those drawn."""
    drawn = []
    sampled = []
    load_ = offline.load
    sample = offline.DatasetReplay.sample

    def spied_load(numbers, *args):
        drawn.append(sorted(numbers))
        load_(numbers, *args)

    def spied_sample(replay, *args):
        sampled.append(int(replay.paths["action"].name.split(".")[-2]))
        return sample(replay, *args)

    monkeypatch.setattr(offline, "load", spied_load)
    monkeypatch.setattr(offline.DatasetReplay, "sample", spied_sample)
    offline.train(offline_args(offline, num_checkpoints=2, total_timesteps=1_600))
    assert len(drawn) == len(sampled) == 400
    pairs = set()
    for update in range(0, 400, 50):  # the first of each iteration
        pair = drawn[update]
        assert drawn[update : update + 50] == [pair] * 50
        counts = [sampled[update : update + 50].count(number) for number in pair]
        assert len(set(pair)) == 2
        assert sum(counts) == 50
        assert min(counts) > 10
        pairs.add(tuple(pair))
    assert len(pairs) > 1


@pytest.mark.parametrize("available", [10**10, 0])
def test_replays_are_kept_while_there_is_memory(offline, dataset, monkeypatch, available):
    """Each is read once; or, where memory is short, the old one is gone before the next is read."""
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=available, percent=1.0))
    living = weakref.WeakSet()
    made = []
    make = offline.DatasetReplay.__init__

    def spied(replay, paths, *args):
        made.append((paths["action"], len(living)))
        make(replay, paths, *args)
        living.add(replay)

    monkeypatch.setattr(offline.DatasetReplay, "__init__", spied)
    offline.train(offline_args(offline, total_timesteps=1_000, iteration_steps=40, diagnostics_frequency=20))
    numbers = [number for number, _ in made]
    alive = [count for _, count in made]
    assert len(set(numbers)) == 4
    if available:
        assert alive == [0, 1, 2, 3]
    else:
        assert len(numbers) > 8
        assert alive == [0] * len(numbers)


def test_nothing_is_played_but_evaluations(offline, dataset, monkeypatch):
    calls = []
    reset = offline.reset

    def spied(envs, seed, stream, episode):
        calls.append(stream)
        return reset(envs, seed, stream, episode)

    monkeypatch.setattr(offline, "reset", spied)
    offline.train(offline_args(offline))
    assert calls == []
    offline.train(offline_args(offline, eval_steps=50))
    assert set(calls) == {200, 400}  # streams of their own


def test_an_evaluation_plays_as_many_steps_as_asked(offline, monkeypatch):
    """And its last game to the end."""
    args = offline_args(offline, eval_steps=300)
    envs = offline.make_env(args)
    network = offline.OfflineNetwork((10, 10, 4), 3, args)
    played = []
    logged = []
    step = envs.step

    def spied(actions):
        played.append(step(actions))
        return played[-1]

    monkeypatch.setattr(envs, "step", spied)
    writer = SimpleNamespace(add_scalar=lambda *scalar: logged.append(scalar))
    mean = offline.evaluate_steps(args, envs, network, 5, torch.device("cpu"), None, writer)
    ends = [i for i, (_, _, terminations, truncations, _) in enumerate(played, 1) if terminations[0] or truncations[0]]
    assert ends[-1] == len(played)
    assert ends[-2] < 300 <= ends[-1]
    assert mean == pytest.approx(sum(rewards[0] for _, rewards, *_ in played) / len(ends))
    assert logged == [("eval/episodic_return", mean, 5)]


def test_it_learns_which_action_pays(offline, tmp_path):
    """Games of one step, in which action 2 pays 1 and the others nothing: Q learns just that."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        action = int(rng.integers(3))
        rows += [*PAD, (1, action, float(action == 2), 1)]
    write_checkpoint(tmp_path / "data", 0, rows, 1_000, frame=(10, 10, 4))
    flags = {"total_timesteps": 1_200, "learning_rate": 1e-3, "save_model": True}
    folder = offline.train(offline_args(offline, **flags))
    network = offline.OfflineNetwork((10, 10, 4), 3, offline_args(offline))
    network.load_state_dict(weights(folder))
    q_values = network.q_values(torch.ones(1, 10, 10, 4, dtype=torch.bool))[0]
    assert q_values.tolist() == pytest.approx([0, 0, 1], abs=0.1)


def test_the_target_network_and_the_optimizer(offline, dataset, monkeypatch):
    """Copies at the steps that are multiples of the period; Adam has the flags' step size and epsilon."""
    online = []  # a layer at each update
    target = []
    made = []
    offline_target = offline.offline_target
    adam = torch.optim.Adam

    def spied_target(q_network, target_network, batch):
        online.append(q_network.head.weight.detach().clone())
        target.append(target_network.head.weight.detach().clone())
        return offline_target(q_network, target_network, batch)

    def spied_adam(*args, **kwargs):
        made.append(adam(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(offline, "offline_target", spied_target)
    monkeypatch.setattr(torch.optim, "Adam", spied_adam)
    offline.train(offline_args(offline, learning_rate=3e-3, adam_eps=7e-3, target_network_frequency=80))
    assert len(target) == 100
    for update in range(100):
        assert torch.equal(target[update], online[update // 20 * 20])
        assert not torch.equal(online[update], online[update - 1])
    (optimizer,) = made
    assert (optimizer.defaults["lr"], optimizer.defaults["eps"]) == (3e-3, 7e-3)
    assert len(optimizer.state) == 6


def test_a_loss_that_is_not_finite(offline, dataset, monkeypatch, refused_run):
    offline_loss = offline.offline_loss
    calls = []

    def spied(*args):
        calls.append(1)
        td_losses, *others = offline_loss(*args)
        return td_losses * (float("nan") if len(calls) == 30 else 1), *others

    monkeypatch.setattr(offline, "offline_loss", spied)
    error = refused_run(checkpoint_frequency=40)
    assert "the loss is not finite at step 120; runs/" in error
    (path,) = Path("runs").glob("*/checkpoint.pt")
    assert str(path) in error
    assert torch.load(path, weights_only=True)["global_step"] == 80


# ---- resume
SMALL_RUN = {
    "num_checkpoints": 2,
    "total_timesteps": 600,
    "eval_steps": 20,
    "save_model": True,
    "diagnostics_frequency": 140,
    "algorithm": "cql-dr3",
}


@pytest.fixture(scope="module")
def whole(four_checkpoints):
    """The run that is not interrupted."""
    module = load(ROOT / "agents" / "cql_offline.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(four_checkpoints.parent)
        return module.train(offline_args(module, **SMALL_RUN)).resolve()


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("sample", [29, 40, 60]),  # each time in the middle of an iteration
        ("sample", [50]),  # at an iteration's end, before its evaluation
        ("evaluate_steps", [1, 2]),  # at the end of the first iteration, and of the second
        ("act", [7]),  # in the middle of a game
    ],
)
def test_stopped_and_resumed(offline, dataset, whole, name, calls):
    """It ends as the uninterrupted run does, bit for bit, and has logged the same."""
    owner = offline.DatasetReplay if name == "sample" else offline
    folder = None
    for number in calls:
        args = offline_args(offline, resume=folder and str(folder), **SMALL_RUN)
        folder = stopped(offline, args, stop_in_call, owner, name, number)
        assert not (folder / "finished").exists()
    assert offline.train(offline_args(offline, resume=str(folder), **SMALL_RUN)) == folder
    check_same(whole, folder)
    assert [step for step, _ in logged(folder)["eval/episodic_return"]] == [200, 400, 600]
    assert all(torch.equal(value, weights(folder)[name]) for name, value in weights(whole).items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_on_a_gpu(offline, dataset, algorithm):
    flags = {"algorithm": algorithm, "total_timesteps": 1_000, "save_model": True, "eval_steps": 60}
    folder = offline.train(offline_args(offline, cuda=True, **flags))
    assert np.isfinite(scalars(folder)["losses/td_loss"][-1][1])
    assert np.isfinite(scalars(folder)["eval/episodic_return"][-1][1])
