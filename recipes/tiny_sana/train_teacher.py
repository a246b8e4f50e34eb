"""Stage 3: the teacher. Text encoder and transformer learn the flow from noise to latents together.

Time as the pipeline has it: t in (0, pi/2] becomes s = sin t / (sin t + cos t). The model sees
x_s = (1 - s) z + s noise, with z a unit-variance latent, and predicts v = noise - z, so that z = x_s - s v. One step
starts at s = 1.
"""

import torch
from common import EMA, Checkpoint, cycle_lr, learning_rate, load_weights, logger, parser, setup, to_tensor
from models import build_text_encoder, build_tokenizer, build_transformer, build_vae, tokenize
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from world import sample_batch


TOKENIZER = build_tokenizer(512)
SHARD = 2048


class TextToLatent(nn.Module):
    """Text encoder and transformer, as trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder, self.transformer = build_text_encoder(), build_transformer()

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (n, length, 128) and their mask (n, length)."""
        tokens = tokenize(TOKENIZER, prompts)
        return self.text_encoder(**tokens).last_hidden_state, tokens["attention_mask"]

    def velocity(self, x: torch.Tensor, s: torch.Tensor, guidance: torch.Tensor, text: tuple) -> torch.Tensor:
        """v at x (n, 16, 8, 8), s (n,), guidance scale (n,); text from `encode`."""
        scale = self.transformer.config.guidance_embeds_scale
        return self.transformer(
            x, encoder_hidden_states=text[0], encoder_attention_mask=text[1], guidance=guidance * scale, timestep=s
        ).sample


@torch.no_grad()
def latent_shard(runs, vae: nn.Module, seed: int, index: int, factor: float) -> tuple[torch.Tensor, list[str]]:
    """Shard number `index` of the latent data set: latents (2048, 16, 8, 8) of unit variance, and captions.

    The shard is kept on disk as fp16, the captions are drawn again from the seed.
    """
    path = runs / "latents" / f"{index:04d}.safetensors"
    pictures, scenes = sample_batch(seed, index, SHARD)
    if path.exists():
        latents = load_file(path)["latents"].float()
    else:
        chunks = [vae.encode(to_tensor(pictures[i : i + 128])).latent for i in range(0, SHARD, 128)]
        latents = torch.cat(chunks).contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents.half()}, path)
    return latents * factor, [scene.prompt for scene in scenes]


@torch.no_grad()
def latent_factor(vae: nn.Module) -> float:
    """One over the standard deviation of the latents: the autoencoder's `scaling_factor`."""
    return float(1 / vae.encode(to_tensor(sample_batch(7, 0, 512)[0])).latent.std())


def main() -> None:
    p = parser(__doc__, steps=8500, batch_size=64, seed=33)
    p.add_argument("--learning-rate", type=float, default=1.2e-3)
    p.add_argument("--shards", type=int, default=24, help="shards of 2048 pictures before the data repeats")
    p.add_argument("--drop-text", type=float, default=0.1, help="share of captions replaced by nothing, for guidance")
    args = p.parse_args()
    setup(args.seed, args.threads)
    vae = build_vae().to(memory_format=torch.channels_last)
    load_weights(args.runs / "vae.safetensors", vae)
    factor = latent_factor(vae)
    model = TextToLatent()
    model.transformer.to(memory_format=torch.channels_last)  # with bf16 autocast: 0.42 s a step instead of 0.65
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    ema = EMA(model, 0.999)
    checkpoint = Checkpoint(args.runs / "teacher.safetensors", model, optimizer, ema)
    start, loaded, running = checkpoint.load(), None, 0.0
    per_shard = SHARD // args.batch_size
    for step in tqdm(range(start, args.steps), mininterval=30):
        cycle_lr(optimizer, learning_rate(step, args.steps, args.learning_rate, 200, 0.3))
        index, row = (step // per_shard) % args.shards, step % per_shard
        if loaded != index:
            latents, captions = latent_shard(args.runs, vae, args.seed, index, factor)
            loaded = index
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        order = torch.randperm(SHARD, generator=torch.Generator().manual_seed(step // per_shard))
        rows = order[row * args.batch_size : (row + 1) * args.batch_size].tolist()
        z, n = latents[rows], args.batch_size
        s = torch.sigmoid(0.3 + 1.2 * torch.randn(n, generator=rng))
        s = torch.where(torch.rand(n, generator=rng) < 0.08, torch.ones(n), s)
        dropped = torch.rand(n, generator=rng) < args.drop_text
        texts = ["" if drop else captions[i] for i, drop in zip(rows, dropped.tolist(), strict=True)]
        noise = torch.randn(z.shape, generator=rng)
        x = z + s.view(-1, 1, 1, 1) * (noise - z)
        with torch.autocast("cpu", torch.bfloat16):
            v = model.velocity(x, s, torch.ones(n), model.encode(texts))
        loss = (v.float() - (noise - z)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(step)
        running = loss.item() if not running else 0.99 * running + 0.01 * loss.item()
        checkpoint.maybe_save(step + 1)
        if step % 100 == 0:
            logger.info("step %d loss %.4f seconds %.0f", step, running, checkpoint.seconds)
    checkpoint.save(args.steps)


if __name__ == "__main__":
    main()
