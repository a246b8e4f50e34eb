"""Stage 2: the two scorers. `reward` becomes tiny-pickscore (what is optimised), `heldout` the judge (only measured).

Contrastive stage: within a batch every picture must find its caption and every caption its picture; each picture also
sees hard negatives of its own caption (one word changed or two swapped), so that words are bound to objects.
Preference stage: see train_preference.py. The scorers differ in seed, data, width and patch size.
"""

import numpy as np
import torch
import torch.nn.functional as F
from common import EMA, Checkpoint, cycle_lr, learning_rate, logger, parser, setup, stream
from models import build_clip, build_tokenizer, tokenize
from tqdm import tqdm
from transformers import CLIPModel
from world import Scene, hard_negatives


SCORERS = {
    "reward": {"clip": {"width": 128, "patch": 8, "heads": 4}, "seed": 101, "steps": 1900},
    "heldout": {"clip": {"width": 192, "patch": 16, "heads": 6}, "seed": 202, "steps": 2400},
}
NEGATIVES = 3
TOKENIZER = build_tokenizer(24)


def _half(clip: CLIPModel) -> torch.autocast:
    """bf16 while training (twice as fast on CPUs that know it), fp32 otherwise."""
    return torch.autocast("cpu", torch.bfloat16, enabled=clip.training)


def embed_texts(clip: CLIPModel, prompts: list[str]) -> torch.Tensor:
    """Unit vectors (n, 128) of the prompts."""
    with _half(clip):
        output = clip.text_projection(clip.text_model(**tokenize(TOKENIZER, prompts)).pooler_output)
    return F.normalize(output.float(), dim=-1)


def embed_pictures(clip: CLIPModel, pictures: torch.Tensor) -> torch.Tensor:
    """Unit vectors (n, 128) of pictures (n, 3, 64, 64) in -1..1."""
    with _half(clip):
        output = clip.visual_projection(clip.vision_model(pixel_values=pictures).pooler_output)
    return F.normalize(output.float(), dim=-1)


def captions_with_negatives(scenes: list[Scene], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """The n captions and 3 n hard negatives of them (all from training combinations), three after three."""
    negatives = []
    for scene in scenes:
        found = hard_negatives(scene, rng, NEGATIVES, allow_held_out=False)
        negatives += (found * NEGATIVES)[:NEGATIVES]
    return [scene.prompt for scene in scenes], negatives


def contrastive_loss(
    clip: CLIPModel, pictures: torch.Tensor, scenes: list[Scene], rng: np.random.Generator
) -> torch.Tensor:
    """Symmetric softmax loss over the batch; the hard negatives extend every picture's row by three columns."""
    captions, negatives = captions_with_negatives(scenes, rng)
    n = len(captions)
    texts = embed_texts(clip, captions + negatives)
    images = embed_pictures(clip, pictures)
    scale = clip.logit_scale.exp()
    logits = scale * images @ texts[:n].T
    # The same caption twice in a batch is not a mistake of the model.
    same = torch.tensor([[a == b for b in captions] for a in captions]) & ~torch.eye(n, dtype=torch.bool)
    logits = logits.masked_fill(same, -1e4)
    hard = scale * torch.einsum("nd,nkd->nk", images, texts[n:].view(n, NEGATIVES, -1))
    target = torch.arange(n)
    return F.cross_entropy(torch.cat([logits, hard], 1), target) + F.cross_entropy(logits.T, target)


def build_scorer(name: str) -> CLIPModel:
    clip = build_clip(**SCORERS[name]["clip"])
    torch.nn.init.constant_(clip.logit_scale, np.log(10.0))
    return clip


def main() -> None:
    p = parser(__doc__, steps=0, batch_size=96, seed=0)
    p.add_argument("--scorer", choices=SCORERS, required=True)
    p.add_argument("--learning-rate", type=float, default=1.5e-3)
    args = p.parse_args()
    setting = SCORERS[args.scorer]
    seed, steps = args.seed or setting["seed"], args.steps or setting["steps"]
    setup(seed, args.threads)
    clip = build_scorer(args.scorer).train()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    ema = EMA(clip, 0.998)
    checkpoint = Checkpoint(args.runs / f"clip_{args.scorer}.safetensors", clip, optimizer, ema)
    start = checkpoint.load()
    for step, pictures, scenes in tqdm(
        stream(seed, start, steps, args.batch_size), mininterval=30, total=steps - start
    ):
        cycle_lr(optimizer, learning_rate(step, steps, args.learning_rate, 200, 0.3))
        loss = contrastive_loss(clip, pictures, scenes, np.random.default_rng([seed, step, 1]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=np.log(30.0))
        ema.update(step)
        checkpoint.maybe_save(step + 1)
        if step % 250 == 0:
            scale = clip.logit_scale.exp().item()
            logger.info("step %d loss %.4f scale %.1f seconds %.0f", step, loss.item(), scale, checkpoint.seconds)
    checkpoint.save(steps)


if __name__ == "__main__":
    main()
