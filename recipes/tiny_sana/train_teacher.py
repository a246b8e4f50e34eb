"""Stage 3: the teacher. Text encoder and transformer learn the flow from noise to latents together.

Time as the pipeline has it: t in (0, pi/2] becomes s = sin t / (sin t + cos t). The model sees
x_s = (1 - s) z + s noise, with z a unit-variance latent, and predicts v = noise - z, so that z = x_s - s v. One step
starts at s = 1.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from common import (
    EMA,
    Checkpoint,
    cycle_lr,
    drawn_ahead,
    generator_on,
    learning_rate,
    load_weights,
    logger,
    pipeline_parser,
    setup,
    to_tensor,
)
from models import SHIPPED, SIZES, Size, build_text_encoder, build_tokenizer, build_transformer, build_vae, tokenize
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from world import sample_batch


TOKENIZER = build_tokenizer(512)
SHARD = 2048


class TextToLatent(nn.Module):
    """Text encoder and transformer, as trained together."""

    def __init__(self, size: Size = SHIPPED) -> None:
        super().__init__()
        self.text_encoder, self.transformer = build_text_encoder(size), build_transformer(size)

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (n, length, width) and their mask (n, length)."""
        tokens = {k: v.to(self.text_encoder.device) for k, v in tokenize(TOKENIZER, prompts).items()}
        return self.text_encoder(**tokens).last_hidden_state, tokens["attention_mask"]

    def velocity(self, x: torch.Tensor, s: torch.Tensor, guidance: torch.Tensor, text: tuple) -> torch.Tensor:
        """v at x (n, *size.latent), s (n,), guidance scale (n,); text from `encode`."""
        scale = self.transformer.config.guidance_embeds_scale
        return self.transformer(
            x, encoder_hidden_states=text[0], encoder_attention_mask=text[1], guidance=guidance * scale, timestep=s
        ).sample


class Latents:
    """
    The latent data set in shards of n: unit-variance latents (n, *latent) on the device, and their captions.

    A shard's pictures are drawn when it is first asked for; shards must then be asked for in their order. Latents are
    kept as fp16, on disk and in memory.
    """

    def __init__(self, args: argparse.Namespace, vae: nn.Module, factor: float, first: int) -> None:
        self.folder, self.vae, self.factor, self.device = args.runs / "latents", vae, factor, args.device
        draw = partial(sample_batch, args.seed, n=args.shard, side=SIZES[args.size].side)
        order = [*range(first, args.shards), *range(first)]
        self.pictures = zip(order, drawn_ahead(draw, order, args.workers), strict=True)
        self.kept: dict[int, tuple[torch.Tensor, list[str]]] = {}

    @torch.no_grad()
    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[str]]:
        if index in self.kept:
            latents, captions = self.kept[index]
            return latents.float() * self.factor, captions
        drawn, (pictures, scenes) = next(self.pictures)
        assert drawn == index, (drawn, index)
        path = self.folder / f"{index:04d}.safetensors"
        if path.exists():
            latents = load_file(path)["latents"].to(self.device).float()
        else:
            chunks = [to_tensor(pictures[i : i + 128], self.device) for i in range(0, len(pictures), 128)]
            latents = torch.cat([self.vae.encode(chunk).latent for chunk in chunks]).contiguous()
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"latents": latents.half()}, path)
        self.kept[index] = latents.half(), [scene.prompt for scene in scenes]
        return latents * self.factor, self.kept[index][1]


@torch.no_grad()
def latent_factor(vae: nn.Module, size: Size = SHIPPED) -> float:
    """One over the standard deviation of the latents: the autoencoder's `scaling_factor`."""
    pictures = to_tensor(sample_batch(7, 0, size.scenes, side=size.side)[0], vae.device)
    return float(1 / vae.encode(pictures).latent.std())


def batches(args: argparse.Namespace, latents: Latents, start: int) -> Iterator[tuple]:
    """From step `start`: step, latents z (n, *latent), noise like z, s (n,), captions. Batch k is always the same."""
    per_shard, loaded = args.shard // args.batch_size, None
    for step in range(start, args.steps):
        index, row = (step // per_shard) % args.shards, step % per_shard
        if loaded != index:
            (values, captions), loaded = latents[index], index
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        order = torch.randperm(args.shard, generator=torch.Generator().manual_seed(step // per_shard))
        rows = order[row * args.batch_size : (row + 1) * args.batch_size].tolist()
        z, n = values[rows], args.batch_size
        s = torch.sigmoid(0.3 + 1.2 * torch.randn(n, generator=rng))
        s = torch.where(torch.rand(n, generator=rng) < 0.08, torch.ones(n), s)
        dropped = torch.rand(n, generator=rng) < args.drop_text
        texts = ["" if drop else captions[i] for i, drop in zip(rows, dropped.tolist(), strict=True)]
        noise = torch.randn(z.shape, generator=generator_on(args.device, rng), device=args.device)
        yield step, z, noise, s.to(args.device), texts


def main(argv: list[str] | None = None) -> None:
    p = pipeline_parser(__doc__, steps=8500, batch_size=64, seed=33)
    p.add_argument("--learning-rate", type=float, default=1.2e-3)
    p.add_argument("--shards", type=int, default=24, help="shards of pictures before the data repeats")
    p.add_argument("--shard", type=int, default=SHARD, help="pictures of a shard")
    p.add_argument("--drop-text", type=float, default=0.1, help="share of captions replaced by nothing, for guidance")
    args = p.parse_args(argv)
    setup(args.seed, args.threads, args.device)
    size = SIZES[args.size]
    vae = build_vae(size).to(args.device, memory_format=torch.channels_last)
    load_weights(args.runs / "vae.safetensors", vae)
    factor = latent_factor(vae, size)
    model = TextToLatent(size).to(args.device)
    model.transformer.to(memory_format=torch.channels_last)  # with bf16 autocast: 0.42 s a step instead of 0.65
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    ema = EMA(model, 0.999)
    checkpoint = Checkpoint(args.runs / "teacher.safetensors", model, optimizer, ema, args.seconds)
    start, running = checkpoint.load(), None
    latents = Latents(args, vae, factor, first=start // (args.shard // args.batch_size) % args.shards)
    for step, z, noise, s, texts in tqdm(batches(args, latents, start), mininterval=30, total=args.steps - start):
        cycle_lr(optimizer, learning_rate(step, args.steps, args.learning_rate, 200, 0.3))
        x = z + s.view(-1, 1, 1, 1) * (noise - z)
        with torch.autocast(args.device, torch.bfloat16):
            v = model.velocity(x, s, torch.ones(len(s), device=args.device), model.encode(texts))
        loss = (v.float() - (noise - z)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(step)
        running = loss.detach() if running is None else running.lerp(loss.detach(), 0.01)
        if step % 100 == 0:
            logger.info("step %d loss %.4f seconds %.0f", step, running.item(), checkpoint.seconds)
        if checkpoint.maybe_save(step + 1):
            return
    checkpoint.save(args.steps)


if __name__ == "__main__":
    main()
