"""How far an update of BBF's or SR-SPR's full network is from its floor: a large matrix product of as many operations.

    python benchmarks/floor.py --agent bbf

A round times, one after the other in one process: a matrix product, an update with a batch of 32 random images, and
the parts of it that are no large convolutions, the augmentation and the roll-out of the transition model. Operations
(multiply and add are two) are those that torch's counter finds in convolutions and matrix products, there and back.
"""

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

AGENTS = Path(__file__).resolve().parent.parent / "agents"
NETWORKS = {"bbf": "BBFNetwork", "sr_spr": "SRSPRNetwork"}


@dataclass
class Args:
    agent: Literal["bbf", "sr_spr"] = "bbf"
    rounds: int = 5  # after one that is not counted
    matrix: int = 4096  # rows and columns of the product
    cuda: bool = True  # use a GPU where there is one


def load(agent: str):
    spec = importlib.util.spec_from_file_location(agent, AGENTS / f"{agent}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_parts(args: Args, device: torch.device) -> dict[str, Callable[[], None]]:
    """{name: a function that does it once}."""
    module = load(args.agent)
    flags = module.Args()
    size, steps = flags.batch_size, flags.spr_steps
    torch.manual_seed(0)
    q_network = getattr(module, NETWORKS[args.agent])((4, 84, 84), 6, flags)
    q_network.to(device, memory_format=torch.channels_last)
    target_network = copy.deepcopy(q_network)
    if args.agent == "bbf":
        optimizer = module.make_optimizer(q_network, flags)
    else:
        optimizer = torch.optim.Adam(q_network.parameters(), lr=flags.learning_rate, eps=flags.adam_eps, fused=True)

    def images(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, device=device)

    obs, next_obs, states = images(size), images(size), images(size * steps)
    sequence = torch.randint(0, 6, (size, steps), device=device)
    rewards, discounts = torch.rand(2, size, device=device)
    batch = module.Batch(obs, sequence[:, 0], rewards, next_obs, discounts, np.arange(size))
    masks = torch.ones(size, steps, device=device)
    factors = torch.rand(2, args.matrix, args.matrix, device=device)
    latents_before = q_network.encode(obs).detach()

    def product():
        factors[0] @ factors[1]

    def augment():
        return [module.augment(images, flags.image_pad, flags.intensity) for images in (obs, next_obs, states)]

    def roll_out():
        latents = latents_before.requires_grad_()
        total = 0
        for step in range(steps):
            latents = q_network.advance(latents, sequence[:, step])
            total = total + latents.sum()
        total.backward()

    def update():
        shifted, next_shifted, states_shifted = augment()
        shifted_batch = batch._replace(obs=shifted, next_obs=next_shifted)
        targets = module.c51_target(q_network, target_network, shifted_batch)
        latents = q_network.encode(shifted)
        losses, _ = module.distribution_loss(q_network, latents, shifted_batch, targets)
        spr_losses = module.prediction_loss(q_network, target_network, latents, states_shifted, sequence, masks)
        optimizer.zero_grad()
        (losses + flags.spr_weight * spr_losses).mean().backward()
        optimizer.step()
        module.soft_update(target_network, q_network, flags.tau)

    return {"matrix product": product, "update": update, "augmentation": augment, "roll-out": roll_out}


def seconds(function: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(args: Args):
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    parts = make_parts(args, device)
    operations = {}
    for name, function in parts.items():
        with FlopCounterMode(display=False) as counter:
            function()
        operations[name] = counter.get_total_flops()
    times = {name: [] for name in parts}
    for _ in range(args.rounds):
        for name, function in parts.items():
            times[name].append(seconds(function, device))

    median = {name: statistics.median(found) for name, found in times.items()}
    speed = operations["matrix product"] / median["matrix product"]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.agent} on {where}, torch {torch.__version__}, medians of {args.rounds} rounds\n")
    print("| part | GFLOP | seconds | GFLOP/s | share of the update's operations | of its time |")
    print("|-|-|-|-|-|-|")
    for name in parts:
        billions = operations[name] / 1e9
        row = f"| {name} | {billions:.1f} | {median[name]:.4f} | {billions / median[name]:.0f}"
        if name == "matrix product":
            print(f"{row} | - | - |")
        else:
            print(f"{row} | {operations[name] / operations['update']:.1%} | {median[name] / median['update']:.1%} |")
    ratio = median["update"] * speed / operations["update"]
    print(f"\nupdates a second: {1 / median['update']:.2f}; an update takes {ratio:.2f} times as long as its floor.")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
