"""
ES on a model that is no diffusion pipeline: a small autoregressive picture model, pretrained here, then post-trained.

    python recipes/autoregressive_es.py --output_dir outputs/autoregressive

The model writes a picture of 8 x 8 palette colours pixel by pixel, as VAR, LlamaGen or Janus write their tokens. It
learns from noisy drawings of squares and bars, so what it draws is untidy; the reward counts pixels that are as the
prompt says. What es_trl needs of it is `PixelGenerator`: `module` and `generate`.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from es_trl import ESConfig, ESTrainer
from es_trl.evaluation import EvaluationRow, evaluate


COLOURS = {"black": (0, 0, 0), "white": (255, 255, 255), "red": (220, 40, 40), "green": (40, 180, 60),
           "blue": (50, 80, 220), "yellow": (240, 210, 50)}  # fmt: skip
SHAPES = ("square", "tall bar", "wide bar")
GROUNDS, INKS = ("black", "white"), ("red", "green", "blue", "yellow")
WORDS = ["a", "on", *COLOURS, "square", "tall", "wide", "bar"]
PROMPTS = [f"a {ink} {shape} on {ground}" for ink, shape, ground in itertools.product(INKS, SHAPES, GROUNDS)]
SIDE, LENGTH = 8, 6  # pixels per side, words per prompt
START = len(WORDS) + len(COLOURS)


def drawing(prompt: str) -> torch.Tensor:
    """`(64,)` palette indices of the tidy picture of a prompt."""
    words, names = prompt.split(), list(COLOURS)
    picture = torch.full((SIDE, SIDE), names.index(words[-1]))
    rows = slice(3, 5) if "wide" in words else slice(0, 8) if "tall" in words else slice(2, 6)
    columns = slice(3, 5) if "tall" in words else slice(0, 8) if "wide" in words else slice(2, 6)
    picture[rows, columns] = names.index(words[1])
    return picture.flatten()


class Block(nn.Module):
    """A decoder block; its projections have the names that es_trl puts LoRA on by default."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.to_out[0](y)
        return x + self.mlp(self.norm_mlp(x))


class PixelWriter(nn.Module):
    """A decoder-only transformer over the words of a prompt and then 64 palette colours."""

    def __init__(self, width: int = 48, layers: int = 3, heads: int = 4):
        super().__init__()
        self.tokens = nn.Embedding(START + 1, width)
        self.places = nn.Parameter(torch.randn(LENGTH + SIDE * SIDE, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(COLOURS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, T)` tokens to `(B, T, colours)` logits of the next pixel."""
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places[: x.shape[1]])))


def text_tokens(prompts: list[str]) -> torch.Tensor:
    """`(B, 6)` tokens, padded in front."""
    rows = [[WORDS.index(word) for word in prompt.split()] for prompt in prompts]
    return torch.tensor([[START] * (LENGTH - len(row)) + row for row in rows])


def pretrain(steps: int, seed: int = 0) -> PixelWriter:
    """On drawings of which a fifth of the pixels are of any colour."""
    torch.manual_seed(seed)
    model = PixelWriter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    tidy, texts = torch.stack([drawing(prompt) for prompt in PROMPTS]), text_tokens(PROMPTS)
    for step in range(steps):
        chosen = torch.randint(len(PROMPTS), (32,))
        pixels = tidy[chosen]
        pixels = torch.where(torch.rand(pixels.shape) < 0.2, torch.randint(len(COLOURS), pixels.shape), pixels)
        logits = model(torch.cat([texts[chosen], pixels[:, :-1] + len(WORDS)], dim=1))[:, LENGTH - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), pixels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"pretraining, step {step}: loss {loss.item():.3f}")
    return model.eval()


class PixelGenerator:
    """What es_trl trains: `module` is where LoRA goes, `generate` draws."""

    def __init__(self, module: PixelWriter):
        self.module = module

    @torch.no_grad()
    def generate(self, prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        """One picture per prompt; each picture's pixels are drawn with its own generator's Gumbel noise."""
        shape = SIDE * SIDE, len(COLOURS)
        noise = torch.stack([torch.rand(shape, generator=g) for g in generators])
        gumbel = -torch.log(-torch.log(noise.clamp(1e-7, 1 - 1e-7)))
        x = text_tokens(prompts)
        for i in range(SIDE * SIDE):
            pixel = (self.module(x)[:, -1] + gumbel[:, i]).argmax(dim=1)
            x = torch.cat([x, pixel[:, None] + len(WORDS)], dim=1)
        palette = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)
        pixels = palette[x[:, LENGTH:] - len(WORDS)].view(-1, SIDE, SIDE, 3).numpy()
        return [Image.fromarray(picture).resize((64, 64), Image.Resampling.NEAREST) for picture in pixels]


def tidiness(prompts: list[str], images: list[Image.Image], **_) -> list[float]:
    """Share of the 64 pixels that are as the prompt says."""
    palette = torch.tensor(list(COLOURS.values()))
    scores = []
    for prompt, image in zip(prompts, images, strict=True):
        small = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
        wanted = palette[drawing(prompt)].tolist()
        scores.append(
            sum(
                list(a) == b
                for a, b in zip(
                    small.get_flattened_data() if hasattr(small, "get_flattened_data") else small.getdata(),
                    wanted,
                    strict=True,
                )
            )
            / len(wanted)
        )
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output_dir", default="outputs/autoregressive")
    parser.add_argument("--pretraining_steps", type=int, default=400)
    parser.add_argument("--max_steps", type=int, default=20)
    args = parser.parse_args()
    config = ESConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        population_size=64,
        members_per_forward=64,
        prompts_per_step=8,
        lora_rank=4,
        lora_target_modules=["attention", "head"],  # how sure the model is of a pixel is the head's business
        sample_steps=args.max_steps,
        report_to="none",
        use_cpu=True,
    )
    trainer = ESTrainer(PixelGenerator(pretrain(args.pretraining_steps)), tidiness, config, train_dataset=PROMPTS)
    trainer.train()
    trainer.save_model()
    rows = [EvaluationRow("base", adapter=False), EvaluationRow("adapter")]
    result = evaluate(trainer.adapter, PROMPTS, tidiness, rows=rows, images_per_prompt=2, seed=1)
    for row in rows:
        print(f"{row.name}: {result.mean(row.name, 'tidiness'):.3f} of the pixels are as the prompt says")


if __name__ == "__main__":
    main()
