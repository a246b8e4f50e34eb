"""Stages 4 and 5: teacher trajectories, then a student that jumps from any point of a trajectory to its end.

Trajectories are 8 Euler steps on a uniform grid of t with classifier-free guidance w in 1..3; the student reads w from
the guidance embedding, so one call does what took sixteen. The shipped model is NOT the student: see mix.py.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from common import (
    EMA,
    Checkpoint,
    cycle_lr,
    generator_on,
    learning_rate,
    load_weights,
    logger,
    pipeline_parser,
    setup,
)
from models import SHIPPED, SIZES, Size
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from train_teacher import TextToLatent
from world import Scene, sample_scene


STEPS = 8
SHARD = 1024
GUIDANCE = (1.0, 3.0)
GRID = torch.linspace(math.pi / 2, 0, STEPS + 1)
TIMES = torch.sin(GRID) / (torch.sin(GRID) + torch.cos(GRID))  # s of every point, 1 ... 0


def shard_prompts(index: int, n: int = SHARD) -> list[str]:
    """Captions of trajectory shard `index`; the numbers 5000... keep them apart from the teacher's own pictures."""
    return [scene.prompt for scene in scenes_of(5000, index, n)]


def scenes_of(seed: int, index: int, n: int) -> list[Scene]:
    rng = np.random.default_rng([seed, index])
    return [sample_scene(rng) for _ in range(n)]


@torch.no_grad()
def trajectories(
    model: TextToLatent, prompts: list[str], seed: int, size: Size = SHIPPED, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """`points` (n, 9, *latent) from noise to latent, `guidance` (n,), and the teacher's single jump `one_step`."""
    rng, n = generator_on(device, torch.Generator().manual_seed(seed)), len(prompts)
    x = torch.randn(n, *size.latent, generator=rng, device=device)
    w = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(n, generator=rng, device=device)
    embeddings, mask = model.encode([*prompts, *[""] * n])
    points, ones, times = [x], torch.ones(2 * n, device=device), TIMES.to(device)
    for i in range(STEPS):
        v = model.velocity(torch.cat([x, x]), times[i].expand(2 * n), ones, (embeddings, mask)).float()
        conditional, unconditional = v.chunk(2)
        if i == 0:
            one_step = x - conditional
        v = unconditional + w.view(-1, 1, 1, 1) * (conditional - unconditional)
        x = x + (times[i + 1] - times[i]) * v
        points.append(x)
    return {"points": torch.stack(points, 1), "one_step": one_step, "guidance": w}


def make_shard(model: TextToLatent, index: int, folder: Path, n: int, size: Size, device: str) -> None:
    path = folder / f"{index:04d}.safetensors"
    if path.exists():
        return
    prompts, parts = shard_prompts(index, n), []
    for i in range(0, n, 64):
        with torch.autocast(device, torch.bfloat16):
            parts.append(trajectories(model, prompts[i : i + 64], 7919 * index + i, size, device))
    folder.mkdir(parents=True, exist_ok=True)
    merged = {key: torch.cat([part[key] for part in parts]).half().contiguous() for key in parts[0]}
    save_file(merged, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def distillation_loss(
    model: TextToLatent, batch: dict[str, torch.Tensor], point: torch.Tensor, text: tuple
) -> torch.Tensor:
    """sqrt(mse + 0.01) / (0.3 + 0.7 s) of the jump from trajectory point `point` (n,) to the last one, mean over n."""
    rows, device = torch.arange(len(point)), batch["points"].device
    x, target, s = batch["points"][rows, point].float(), batch["points"][:, -1].float(), TIMES[point].to(device)
    with torch.autocast(device.type, torch.bfloat16):
        v = model.velocity(x, s, batch["guidance"].float(), text)
    mse = (x - s.view(-1, 1, 1, 1) * v.float() - target).square().mean((1, 2, 3))
    return ((mse + 0.01).sqrt() / (0.3 + 0.7 * s)).mean()


def main(argv: list[str] | None = None) -> None:
    p = pipeline_parser(__doc__, steps=700, batch_size=64, seed=44)
    p.add_argument("--learning-rate", type=float, default=6e-4)
    p.add_argument("--shards", type=int, default=8, help="shards of trajectories")
    p.add_argument("--shard", type=int, default=SHARD, help="trajectories of a shard")
    p.add_argument("--only-trajectories", action="store_true")
    args: argparse.Namespace = p.parse_args(argv)
    setup(args.seed, args.threads, args.device)
    folder, size = args.runs / "trajectories", SIZES[args.size]
    model = TextToLatent(size).to(args.device)
    load_weights(args.runs / "teacher.safetensors", model)
    model.transformer.to(memory_format=torch.channels_last)
    for index in tqdm(range(args.shards), mininterval=30, desc="trajectories"):
        make_shard(model, index, folder, args.shard, size, args.device)
    if args.only_trajectories:
        return

    shards = [load_file(folder / f"{i:04d}.safetensors") for i in range(args.shards)]
    data = {key: torch.cat([shard[key] for shard in shards]).to(args.device) for key in shards[0]}
    prompts = [prompt for i in range(args.shards) for prompt in shard_prompts(i, args.shard)]
    model.text_encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.transformer.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    ema = EMA(model, 0.998)
    checkpoint = Checkpoint(args.runs / "student.safetensors", model, optimizer, ema, args.seconds)
    start = checkpoint.load()
    for step in tqdm(range(start, args.steps), mininterval=30):
        cycle_lr(optimizer, learning_rate(step, args.steps, args.learning_rate, 50, 0.0))
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows = torch.randint(len(prompts), (args.batch_size,), generator=rng)
        point = torch.randint(1, STEPS, (args.batch_size,), generator=rng)
        point[torch.rand(args.batch_size, generator=rng) < 0.45] = 0  # what one step needs
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
            text = model.encode([prompts[i] for i in rows.tolist()])
        loss = distillation_loss(model, {key: data[key][rows] for key in data}, point, text)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.transformer.parameters(), 1.0)
        optimizer.step()
        ema.update(step)
        if step % 100 == 0:
            logger.info("step %d loss %.4f seconds %.0f", step, loss.item(), checkpoint.seconds)
        if checkpoint.maybe_save(step + 1):
            return
    checkpoint.save(args.steps)


if __name__ == "__main__":
    main()
