"""Stage 1: the autoencoder. L1 + 0.5 gradient L1 + squared error, with a little noise on the latents.

The noise makes the decoder forgive the small errors of a one-step sample; the moment penalty keeps latents near unit
variance, so that the noise means the same throughout. `--decoder-only` continues with the encoder frozen: latents and
what was trained on them stay valid while the decoder gets sharper.
"""

import torch
from common import (
    EMA,
    Checkpoint,
    cycle_lr,
    learning_rate,
    load_weights,
    logger,
    pipeline_parser,
    setup,
    stream,
    to_tensor,
)
from models import SIZES, Size, build_vae
from tqdm import tqdm
from world import sample_batch


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + 0.5 gradient L1 + squared error of pictures (n, 3, h, w) in -1..1."""
    error = output - target
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * gradient + error.square().mean()


@torch.no_grad()
def psnr(vae: torch.nn.Module, size: Size) -> float:
    """Mean peak signal-to-noise ratio in dB over held-out scenes."""
    pictures = to_tensor(sample_batch(999, 0, size.scenes // 2, unseen=True, side=size.side)[0], vae.device)
    output = vae.decode(vae.encode(pictures).latent).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (output - pictures).square().mean((1, 2, 3)))).mean())


def main(argv: list[str] | None = None) -> None:
    p = pipeline_parser(__doc__, steps=1600, batch_size=16, seed=11)
    p.add_argument("--decoder-only", action="store_true", help="freeze the encoder and continue from the full stage")
    p.add_argument("--learning-rate", type=float, default=1.5e-3)
    p.add_argument("--latent-noise", type=float, default=0.1, help="largest standard deviation of the latent noise")
    args = p.parse_args(argv)
    setup(args.seed, args.threads, args.device)
    size = SIZES[args.size]
    vae = build_vae(size).to(args.device, memory_format=torch.channels_last)
    if args.decoder_only:
        load_weights(args.runs / "vae.safetensors", vae)
    # channels_last halves the time of a step on CPU; bf16 autocast did not help on top of it.
    trained = vae.decoder if args.decoder_only else vae
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    ema = EMA(vae, 0.998)
    path = args.runs / ("vae_decoder.safetensors" if args.decoder_only else "vae.safetensors")
    checkpoint = Checkpoint(path, vae, optimizer, ema, args.seconds)
    start = checkpoint.load()
    batches = stream(args.seed, start, args.steps, args.batch_size, size.side, args.device, args.workers)
    for step, pictures, _ in tqdm(batches, mininterval=30, total=args.steps - start):
        cycle_lr(optimizer, learning_rate(step, args.steps, args.learning_rate, 100, 0.4))
        with torch.set_grad_enabled(not args.decoder_only):
            latent = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent
        noise = torch.rand(len(latent), 1, 1, 1, device=latent.device) * args.latent_noise * torch.randn_like(latent)
        output = vae.decode(latent + noise).sample
        loss = reconstruction_loss(output, pictures)
        if not args.decoder_only:
            mean, variance = latent.mean((0, 2, 3)), latent.var((0, 2, 3))
            loss = loss + 0.01 * (mean.square() + (variance.clamp_min(1e-4).log()).square()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        ema.update(step)
        if step % 250 == 0:
            logger.info("step %d loss %.4f seconds %.0f", step, loss.item(), checkpoint.seconds)
        if checkpoint.maybe_save(step + 1):
            return
    checkpoint.save(args.steps)
    ema.copy_to(vae)
    logger.info("PSNR %.2f dB on held-out scenes, %.0f s", psnr(vae, size), checkpoint.seconds)


if __name__ == "__main__":
    main()
