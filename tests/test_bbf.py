"""SR-SPR and BBF: resets, schedules, the moving average and the network, each against something written out by hand."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import (
    check_same,
    contents,
    make_args,
    make_network,
    name_of,
    optimizer_of,
    scalars,
    stop_in_step,
    stopped,
)
from test_replay import ENDINGS, LENGTHS, Script, check_batch, make_replay, sample_rows
from torch.utils.flop_counter import FlopCounterMode

ALE, MINATAR = (4, 84, 84), (10, 10, 4)
HEAD = {"dense.0", "head", "value", "predictor"}
BODY = {"convolutions.1", "transition.0", "transition.2"}


@pytest.fixture(params=["sr_spr", "bbf"])
def module(request):
    return request.getfixturevalue(request.param)


def step_in(module, monkeypatch):
    """A list to which training adds the number of the step, whenever it acts."""
    acted = []
    real_act = module.act

    def act(*args):
        acted.append(len(acted) + 1)
        return real_act(*args)

    monkeypatch.setattr(module, "act", act)
    return acted


# ---- resets
def slow_reset_steps(interval, total):
    """Step by step: at the first step past I + 1, then past every further I, while a whole I is left."""
    steps = []
    passed = interval + 1
    for step in range(1, total + 1):
        if step > passed:
            if total - step < interval:
                break
            steps.append(step)
            passed = step + interval
    return steps


@pytest.mark.parametrize("replay_ratio", [2, 8])
@pytest.mark.parametrize("total", [20_000, 40_001, 40_002, 50_000, 100_000, 100_019, 100_020, 1_000_000])
def test_reset_steps_against_a_loop(module, replay_ratio, total):
    interval = 40_000 // replay_ratio
    expected = slow_reset_steps(interval, total)
    flags = {"replay_ratio": replay_ratio, "total_timesteps": total}
    if expected:
        assert list(module.reset_steps(module.Args(**flags))) == expected
    else:
        assert replay_ratio == 2 and total in (20_000, 40_001)  # the first, in step 20,002, has no 20,000 left


def test_the_published_resets(module):
    assert list(module.reset_steps(module.Args(replay_ratio=2))) == [20_002, 40_003, 60_004]
    at_8 = list(module.reset_steps(module.Args(replay_ratio=8)))
    assert (len(at_8), at_8[0], at_8[-1]) == (18, 5_002, 90_019)
    assert list(module.reset_steps(module.Args(reset_interval=0))) == []


@pytest.mark.parametrize("keep_moments", [False, True])
def test_a_reset_by_hand(module, keep_moments, monkeypatch):
    """Two networks, each with a fresh draw of its own; what is shrunk, what is new, and what is left of Adam."""
    seen = []
    real_reset = module.reset_network
    step = torch.optim.Adam.step  # AdamW's too

    def reset_network(network, fresh, args):
        before = copy.deepcopy(network)
        real_reset(network, fresh, args)
        seen.append((before, fresh, copy.deepcopy(network)))

    def watch_step(optimizer):
        counts = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                counts.append(state["step"].item() if state else None)
        moments.append(counts)
        step(optimizer)

    moments = []  # each parameter's count of Adam's steps, before each update
    monkeypatch.setattr(module, "reset_network", reset_network)
    monkeypatch.setattr(optimizer_of(module), "step", watch_step)
    flags = {"shrink": 0.7, "perturb": 0.4, "keep_moments": keep_moments, "reset_interval": 140}
    folder = module.train(make_args(module, total_timesteps=300, **flags))
    assert scalars(folder)["charts/resets"] == [(142, 1)]

    (_, online_fresh, _), (_, target_fresh, _) = seen
    assert not torch.equal(online_fresh.head.weight, target_fresh.head.weight)
    for before, fresh, after in seen:
        parts = dict(after.named_parameters())
        assert {name.rpartition(".")[0] for name in parts} == HEAD | BODY
        for name, parameter in parts.items():
            old = before.get_parameter(name).detach().numpy()
            new = fresh.get_parameter(name).detach().numpy()
            expected = new if name.rpartition(".")[0] in HEAD else 0.7 * old + 0.4 * new
            np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=1e-6)
            assert name.endswith("bias") or not np.allclose(old, new)

    assert moments[41] == [41] * len(moments[41])  # after 41 updates, in steps 101 to 141
    kept = [count for count in moments[42] if count is not None]
    assert len(moments) == 200
    assert kept == ([42] * 2 * len(BODY) if keep_moments else [])


def test_a_reset_spares_replay_and_priorities(module, monkeypatch):
    """It comes after the updates of its step and before the next action, and writes no priority."""
    events = []
    acted = step_in(module, monkeypatch)
    reset_network, update = module.reset_network, module.SequenceReplay.update_priorities

    def watch_reset(*args):
        events.append(("reset", len(acted)))
        reset_network(*args)

    def watch_update(*args):
        events.append(("update", len(acted)))
        update(*args)

    monkeypatch.setattr(module, "reset_network", watch_reset)
    monkeypatch.setattr(module.SequenceReplay, "update_priorities", watch_update)
    module.train(make_args(module, total_timesteps=300, reset_interval=280, replay_ratio=2))
    at_142 = [kind for kind, step in events if step == 142]
    assert at_142 == ["update", "update", "reset", "reset"]
    assert [step for kind, step in events if kind == "reset"] == [142, 142]


def test_resumed_across_a_reset(module):
    """Stopped in the step before the reset, in its own and in the one after."""
    flags = {"total_timesteps": 300, "reset_interval": 280, "replay_ratio": 2, "eval_episodes": 2}
    whole = module.train(make_args(module, **flags))
    folder = stopped(module, make_args(module, **flags), stop_in_step, 141)
    assert contents(folder)["/global_step"] == 141
    for _ in range(2):
        stopped(module, make_args(module, **flags, resume=str(folder)), stop_in_step, 1)
    assert contents(folder)["/global_step"] == 143
    module.train(make_args(module, **flags, resume=str(folder)))
    check_same(whole, folder)


# ---- schedules
def test_schedules_by_hand(bbf):
    """After k of 10,000 updates: n = 10 * 0.3^(k / 10,000), gamma = 1 - 0.03 * 0.1^(k / 10,000)."""
    args = bbf.Args()
    found = [bbf.scheduled(k, args) for k in range(12_001)]
    assert found[0] == (10, pytest.approx(0.97))
    assert found[5_000] == (5, pytest.approx(1 - 0.03 * math.sqrt(0.1)))  # 10 * sqrt(0.3) = 5.48
    assert found[10_000] == found[12_000] == (3, pytest.approx(0.997, abs=1e-12))
    falls = [k for k in range(1, 12_001) if found[k][0] < found[k - 1][0]]
    assert falls == [427, 1_350, 2_390, 3_579, 4_966, 6_633, 8_720]
    assert all(one[1] <= other[1] for one, other in itertools.pairwise(found))


def test_schedules_that_stay(bbf):
    """The published ablations BBF-Annealing, BBF+n=10 and BBF+gamma=0.99."""
    for flags, n_step, gamma in [
        ({"initial_n_step": 3, "initial_gamma": 0.997}, [3, 3, 3], [0.997, 0.997, 0.997]),
        ({"n_step": 10}, [10, 10, 10], [0.97, 0.990513, 0.997]),
        ({"initial_gamma": 0.99, "gamma": 0.99}, [10, 5, 3], [0.99, 0.99, 0.99]),
    ]:
        found = [bbf.scheduled(k, bbf.Args(**flags)) for k in (0, 5_000, 20_000)]
        assert [n for n, _ in found] == n_step
        assert [value for _, value in found] == pytest.approx(gamma, abs=1e-6)


def test_training_follows_the_schedules(bbf, monkeypatch):
    """From the first update, and anew from each reset."""
    used = []
    sample = bbf.FrameReplay.sample

    def record(replay, batch_size, n_step, gamma):
        used.append((n_step, gamma))
        return sample(replay, batch_size, n_step, gamma)

    monkeypatch.setattr(bbf.FrameReplay, "sample", record)
    args = make_args(bbf, total_timesteps=300, replay_ratio=2, reset_interval=280, schedule_updates=50)
    bbf.train(args)
    assert len(used) == 400
    before, after = 2 * 42, 2 * 158  # updates in steps 101 to 142, and from there
    expected = []
    for k in [*range(before), *range(after)]:
        share = min(k / 50, 1)
        expected.append((round(10 * 0.3**share), pytest.approx(1 - 0.03 * 0.1**share)))
    assert used == expected


def test_updates_since_a_reset_by_counting(bbf):
    """Over three resets: each begins the count anew."""
    args = make_args(bbf, total_timesteps=700, replay_ratio=2, reset_interval=280)
    resets = bbf.reset_steps(args)
    assert len(resets) == 3
    count = 0
    for step in range(args.learning_starts + 1, 701):
        assert bbf.updates_since_reset(step, resets, args) == count
        count = 0 if step in resets else count + 2


@pytest.mark.parametrize("stack", [4, 1])
def test_the_same_rows_with_other_returns(sr_spr, stack):
    """A batch with n = 10, and the same rows with n = 3, from one replay, against the scripted games."""
    script = Script(LENGTHS * 3, ENDINGS * 3, stack)
    replay = make_replay(sr_spr, "SequenceReplay", 500, 10, stack)
    script.play(replay)
    rows = np.flatnonzero(replay.ready)
    assert len(rows) > 60
    for n_step in (10, 3):
        check_batch(script, replay, sample_rows(replay, rows, n_step), n_step)


def test_rows_wait_for_the_longest_return_and_for_the_predictions(bbf, monkeypatch):
    """BBF-Annealing has returns of 3 steps, and predicts 5: a row is ready when 5 are there."""
    longest = []
    sample = bbf.FrameReplay.sample
    monkeypatch.setattr(
        bbf.FrameReplay, "sample", lambda replay, *args: longest.append(replay.n_step) or sample(replay, *args)
    )
    for flags, expected in [({}, 10), ({"initial_n_step": 3, "initial_gamma": 0.997, "spr_steps": 5}, 5)]:
        bbf.train(make_args(bbf, total_timesteps=110, **flags))
        assert set(longest) == {expected}
        longest.clear()


# ---- updates
def test_the_moving_average_after_three_updates(module):
    """theta_target = 0.995 theta_target + 0.005 theta, for every parameter."""
    online, target = make_network(module, MINATAR, 3), make_network(module, MINATAR, 3, seed=2)
    expected = {name: parameter.detach().double().numpy().copy() for name, parameter in target.named_parameters()}
    rng = np.random.default_rng(0)
    for _ in range(3):
        for name, parameter in online.named_parameters():
            new = rng.normal(size=parameter.shape)
            parameter.data.copy_(torch.from_numpy(new))
            expected[name] = 0.995 * expected[name] + 0.005 * new
        module.soft_update(target, online, 0.005)
    for name, parameter in target.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], atol=1e-6)


def test_the_average_moves_after_every_update_and_acts(module, monkeypatch):
    moved, acting = [], []
    soft_update, act, evaluate = module.soft_update, module.act, module.evaluate

    def watch_move(target_network, q_network, tau):
        moved.append((target_network, q_network, tau))
        soft_update(target_network, q_network, tau)

    def watch_act(network, *others):
        acting.append(network)
        return act(network, *others)

    def watch_evaluate(args, envs, network, *others):
        assert network is moved[0][0]
        evaluate(args, envs, network, *others)

    monkeypatch.setattr(module, "soft_update", watch_move)
    monkeypatch.setattr(module, "act", watch_act)
    monkeypatch.setattr(module, "evaluate", watch_evaluate)
    module.train(make_args(module, total_timesteps=120, replay_ratio=3, tau=0.02))
    assert len(moved) == 3 * 20
    target_network, q_network, _ = moved[0]
    assert target_network is not q_network
    assert {(id(one), id(other), tau) for one, other, tau in moved} == {(id(target_network), id(q_network), 0.02)}
    assert len(acting) == 120
    assert all(network is target_network for network in acting)


def test_decay_is_decoupled_and_spares_biases(bbf):
    """Without a gradient AdamW leaves (1 - 0.1 * learning rate) of every kernel, the heads' too, and all of a bias."""
    args = make_args(bbf, learning_rate=0.01, weight_decay=0.1)
    network = make_network(bbf, MINATAR, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5)
    before = copy.deepcopy(network.state_dict())
    optimizer = bbf.make_optimizer(network, args)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        left = 1.0 if name.endswith("bias") else 1 - 0.1 * 0.01
        torch.testing.assert_close(parameter.detach(), left * before[name], rtol=1e-6, atol=0)
    settings = {(group["lr"], group["eps"]) for group in optimizer.param_groups}
    assert settings == {(0.01, args.adam_eps)}


def test_uniform_sampling_leaves_priorities_alone(bbf, monkeypatch):
    weights = []
    real = bbf.importance_weights

    def watch(replay, rows):
        weights.append(real(replay, rows))
        return weights[-1]

    monkeypatch.setattr(bbf, "importance_weights", watch)
    for prioritized in (False, True):
        folder = bbf.train(make_args(bbf, total_timesteps=150, prioritized=prioritized))
        priorities = torch.load(folder / "checkpoint.pt", weights_only=True)["replay"]["priorities"]
        assert (set(priorities.unique().tolist()) == {0.0, 1.0}) == (not prioritized)
        assert all(bool((found == 1).all()) for found in weights) == (not prioritized)
        weights.clear()


@pytest.mark.long
def test_an_ablation_to_nothing_trains(module):
    """No predictions, resets that leave the encoder as it is: what remains is a C51 with double Q."""
    flags = {"replay_ratio": 1, "spr_weight": 0.0, "shrink": 1.0, "perturb": 0.0, "reset_interval": 100}
    folder = module.train(make_args(module, total_timesteps=1_000, eval_episodes=2, **flags))
    logged = scalars(folder)
    assert len(logged["charts/resets"]) == 8
    assert np.isfinite([value for _, value in logged["losses/td_loss"]]).all()


# ---- the network
PARAMETERS = {"sr_spr": 4_566_533, "bbf": 38_503_589}  # with six actions: protocol of the two papers
GIGAFLOPS = {"sr_spr": 23, "bbf": 603}  # of an update with a batch of 32


def test_parameters_and_operations_of_the_full_network(module):
    """On tensors without contents; the counter knows convolutions and matrix products, there and back."""
    args = module.Args()
    with torch.device("meta"):
        obs, next_obs = torch.rand(2, 32, *ALE)
        states = torch.rand(32 * 5, *ALE)
        rewards, discounts = torch.rand(2, 32)
        sequence, masks = torch.zeros(32, 5, dtype=torch.long), torch.ones(32, 5)
        actions = torch.zeros(32, dtype=torch.long)
    network = make_network(module, network=args.network, **({"width_scale": 4} if name_of(module) == "bbf" else {}))
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name_of(module)]
    network.to("meta")
    target_network = copy.deepcopy(network)
    batch = module.Batch(obs, actions, rewards, next_obs, discounts, None)
    with FlopCounterMode(display=False) as counter:
        targets = module.c51_target(network, target_network, batch)
        latents = network.encode(batch.obs)
        losses, _ = module.distribution_loss(network, latents, batch, targets)
        losses = losses + module.prediction_loss(network, target_network, latents, states, sequence, masks)
        losses.mean().backward()
    assert counter.get_total_flops() / 1e9 == pytest.approx(GIGAFLOPS[name_of(module)], rel=0.02)


@pytest.mark.parametrize(("scale", "channels"), [(1, [16, 32, 32]), (2, [32, 64, 64]), (4, [64, 128, 128])])
def test_width_scale(bbf, scale, channels):
    network = make_network(bbf, ALE, 6, network="impala", width_scale=scale)
    convolutions = [layer for layer in network.convolutions.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions[::5]] == channels  # five in each of three stages
    assert network.dense[0].in_features == 11 * 11 * channels[-1]
    assert network.dense[0].out_features == network.predictor.out_features == 512 * scale
    small = make_network(bbf, MINATAR, 3, width_scale=scale)
    assert small.convolutions[1].out_channels == 16 * scale
    assert small.dense[0].out_features == 128 * scale


# ---- what is refused
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"reset_interval": 1_000_000}, "there will be no reset"),
        ({"total_timesteps": 10_000}, "there will be no reset"),
        ({"reset_interval": 1}, "there will be no reset"),  # less than an agent step
        ({"replay_ratio": 0}, "--replay-ratio is 0: it must be from 1"),
    ],
)
def test_resets_and_ratios_that_make_no_sense(module, flags, words, refused):
    assert words in refused(module.Args, **flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"n_step": 11}, "--n-step is 11: it falls to that from --initial-n-step, which is 10"),
        ({"gamma": 0.9}, "--gamma is 0.9: it grows to that from --initial-gamma, which is 0.97"),
        ({"initial_gamma": 1.0}, "--initial-gamma is 1.0: it must be from 0 to"),
        ({"spr_steps": 2_001}, "--spr-steps is 2001: --learning-starts"),
    ],
)
def test_schedules_that_go_the_wrong_way(bbf, flags, words, refused):
    assert words in refused(bbf.Args, **flags)
