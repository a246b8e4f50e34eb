"""Stage 6: teach a scorer what people see first. A plain contrastive CLIP hardly notices blur.

Each step adds to the contrastive loss, with the same caption on both sides:
  - a clean rendering against the same picture blurred, shrunk and enlarged, or noisy;
  - the teacher's 8-step sample against its 1-step sample of the same caption and noise;
and, with the same picture on both sides (an autoencoder reconstruction, because generated pictures look like that),
  - the right caption against a hard negative: fidelity must not be bought with attribute binding.
"""

import numpy as np
import torch
import torch.nn.functional as F
from common import EMA, Checkpoint, cycle_lr, learning_rate, load_weights, logger, parser, setup, stream
from distill import shard_prompts
from models import build_vae
from safetensors.torch import load_file
from tqdm import tqdm
from train_clip import (
    NEGATIVES,
    SCORERS,
    build_scorer,
    captions_with_negatives,
    contrastive_loss,
    embed_pictures,
    embed_texts,
)
from train_teacher import latent_factor


def degrade(pictures: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Each picture (n, 3, h, w) in -1..1 blurred (box 3 or 5), shrunk to a half or a third, or noisy; a random mix."""
    n = len(pictures)
    padded = F.pad(pictures, (2, 2, 2, 2), mode="replicate")
    small = F.interpolate(pictures, scale_factor=0.5, mode="area")
    tiny = F.interpolate(pictures, scale_factor=0.34, mode="area")
    sigma = 0.05 + 0.2 * torch.rand(n, 1, 1, 1, generator=rng)
    versions = torch.stack([
        F.avg_pool2d(padded[..., 1:-1, 1:-1], 3, 1),
        F.avg_pool2d(padded, 5, 1),
        F.interpolate(small, size=pictures.shape[-2:], mode="bilinear"),
        F.interpolate(tiny, size=pictures.shape[-2:], mode="bilinear"),
        (pictures + sigma * torch.randn(pictures.shape, generator=rng)).clamp(-1, 1),
    ])  # fmt: skip
    return versions[torch.randint(len(versions), (n,), generator=rng), torch.arange(n)]


def main() -> None:
    p = parser(__doc__, steps=260, batch_size=32, seed=0)
    p.add_argument("--scorer", choices=SCORERS, required=True)
    p.add_argument("--learning-rate", type=float, default=5e-4)
    args = p.parse_args()
    seed = (args.seed or SCORERS[args.scorer]["seed"]) + 1
    setup(seed, args.threads)
    clip = build_scorer(args.scorer).train()
    load_weights(args.runs / f"clip_{args.scorer}.safetensors", clip)
    vae = build_vae().to(memory_format=torch.channels_last)
    load_weights(args.runs / "vae.safetensors", vae)
    factor = latent_factor(vae)
    # The judge never sees the samples that the reward model learned from: even shards here, odd ones there.
    shards = range(list(SCORERS).index(args.scorer), 4, 2)
    samples = [load_file(args.runs / "trajectories" / f"{i:04d}.safetensors") for i in shards]
    one_step = torch.cat([s["one_step"] for s in samples])
    final = torch.cat([s["points"][:, -1] for s in samples])
    captions = [prompt for i in shards for prompt in shard_prompts(i)]

    optimizer = torch.optim.AdamW(clip.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    ema = EMA(clip, 0.99)
    checkpoint = Checkpoint(args.runs / f"scorer_{args.scorer}.safetensors", clip, optimizer, ema)
    start, half = checkpoint.load(), args.batch_size // 2
    for step, pictures, scenes in tqdm(
        stream(seed, start, args.steps, args.batch_size), mininterval=30, total=args.steps - start
    ):
        cycle_lr(optimizer, learning_rate(step, args.steps, args.learning_rate, 30, 0.2))
        rng, numpy_rng = torch.Generator().manual_seed(seed * 1_000_003 + step), np.random.default_rng([seed, step, 2])
        rows = torch.randint(len(captions), (half,), generator=rng)
        with torch.no_grad():
            decoded = vae.decode(torch.cat([final[rows], one_step[rows]]).float() / factor).sample.clamp(-1, 1)
            rebuilt = vae.decode(vae.encode(pictures[:half]).latent).sample.clamp(-1, 1)
        better, worse = (
            torch.cat([pictures[:half], decoded[:half]]),
            torch.cat([degrade(pictures[:half], rng), decoded[half:]]),
        )
        texts = [scene.prompt for scene in scenes[:half]] + [captions[i] for i in rows.tolist()]
        right, wrong = captions_with_negatives(scenes[:half], numpy_rng)

        scale = clip.logit_scale.exp()
        image = embed_pictures(clip, torch.cat([better, worse, rebuilt]))
        text = embed_texts(clip, texts + right + wrong)
        good, bad = ((image[i * 2 * half : (i + 1) * 2 * half] * text[: 2 * half]).sum(-1) for i in (0, 1))
        preference = -F.logsigmoid(scale * (good - bad)).mean()
        right_cosine = (image[4 * half :] * text[2 * half : 3 * half]).sum(-1, keepdim=True)
        wrong_cosine = torch.einsum("nd,nkd->nk", image[4 * half :], text[3 * half :].view(half, NEGATIVES, -1))
        binding = -F.logsigmoid(scale * (right_cosine - wrong_cosine)).mean()
        loss = contrastive_loss(clip, pictures, scenes, numpy_rng) + preference + binding
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=np.log(30.0))
        ema.update(step)
        checkpoint.maybe_save(step + 1)
        if step % 50 == 0:
            logger.info("step %d loss %.3f preference %.3f binding %.3f seconds %.0f", step, loss.item(),
                        preference.item(), binding.item(), checkpoint.seconds)  # fmt: skip
    checkpoint.save(args.steps)


if __name__ == "__main__":
    main()
