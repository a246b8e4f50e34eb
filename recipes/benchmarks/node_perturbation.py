"""Node perturbation: noise on what layers put out instead of on their weights, with a Hebbian update.

Member `i` draws with `y + sigma s_l xi` at layer `l`, where `s_l` is the layer's RMS output; `F_i xi x^T`, with the
layer's input `x`, then estimates the gradient of its weights, from forward passes only (Williams 1992; own code). The
noise is drawn once per picture, or anew for every token. Fitness, groups, the mean of all estimates, a linear schedule
and the 18 % by which a member changes the denoiser's output are those of ES at its defaults; the length of the steps,
which ES need not be told, is what is tried. Judged on `tiny-validation`, one step, two pictures of each prompt.

    python recipes/benchmarks/node_perturbation.py --output outputs/node.jsonl
"""

import argparse
import json
import random
from pathlib import Path

import torch
from torch import nn

from es_trl import RewardSet, load_prompts
from es_trl.es import make_generator, make_seed
from es_trl.pipelines import CallSettings, FrozenPipeline, load_pipeline


LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
GROUPS, MEMBERS, STEPS = 32, 16, 8  # 4,096 pictures
OUTPUT_CHANGE = 0.18
SCORERS = ("tiny-pickscore", "tiny-clip-heldout")


class Nodes:
    """
    The attention layers of a denoiser, their noise, and what their inputs were.

    Args:
        denoiser (`nn.Module`): Its weights are changed in place by [`Nodes.move`].
        per_token (`bool`): Noise anew for every token, else once per picture.
    """

    def __init__(self, denoiser: nn.Module, per_token: bool):
        self.layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear) and n.endswith(LAYERS)}
        self.per_token, self.sigma, self.generator = per_token, 0.0, torch.Generator()
        self.scale: dict[str, torch.Tensor] = {}  # RMS output of each layer, at the start
        self.seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # noise and input of the last call
        for name, layer in self.layers.items():
            layer.register_forward_hook(lambda _, args, out, name=name: self._disturb(name, args[0], out))

    def _disturb(self, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if name not in self.scale:
            self.scale[name] = out.square().mean().sqrt()
        if not self.sigma:
            return out
        tokens = out.shape[1] if self.per_token else 1
        xi = torch.randn(out.shape[0], tokens, out.shape[2], generator=self.generator)
        self.seen[name] = xi, x if self.per_token else x.mean(dim=1, keepdim=True)
        return out + self.sigma * self.scale[name] * xi

    def estimate(self, fitness: torch.Tensor) -> dict[str, torch.Tensor]:
        """The sum of `F_i s_l xi x^T` over the last call's pictures, for each layer `(out, in)`."""
        return {
            name: self.scale[name] * torch.einsum("n,nto,nti->oi", fitness, xi, x)
            for name, (xi, x) in self.seen.items()
        }

    def move(self, sums: dict[str, torch.Tensor], length: float) -> None:
        """Steps along `sums`, `length` of the weights' norm far."""
        norm = sum(float(layer.weight.square().sum()) for layer in self.layers.values()) ** 0.5
        whole = sum(float(value.square().sum()) for value in sums.values()) ** 0.5
        for name, value in sums.items():
            self.layers[name].weight.data.add_(value, alpha=length * norm / whole)


def change_of_output(frozen: FrozenPipeline, nodes: Nodes, prompts: list[str], sigma: float) -> float:
    """By how much of its norm noise of this size changes the denoiser's output."""
    outputs = []
    hook = frozen.denoiser.register_forward_hook(lambda _, args, out: outputs.append(out[0].clone()))
    for nodes.sigma in (0.0, sigma):
        frozen.generate(prompts, [make_generator(0, "node", i) for i in range(len(prompts))])
    hook.remove()
    nodes.sigma = 0.0
    return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())


def means(frozen: FrozenPipeline, prompts: list[str], rewards: RewardSet) -> torch.Tensor:
    rows = [(prompt, make_generator(4321, "node_test", i, j)) for i, prompt in enumerate(prompts) for j in range(2)]
    scores = []
    for first in range(0, len(rows), 64):
        texts, generators = zip(*rows[first : first + 64], strict=True)
        scores.append(torch.as_tensor(rewards(list(texts), frozen.generate(list(texts), list(generators)))))
    return torch.cat(scores).mean(dim=0)


@torch.no_grad()
def run(per_token: bool, travel: float, seed: int) -> dict:
    """Trains for 4,096 pictures, steps of `travel` of the weights' norm in all; the gains of both scorers."""
    settings = CallSettings(num_inference_steps=1, guidance_scale=2.0, max_sequence_length=16)
    frozen = FrozenPipeline(load_pipeline("tiny-sana-sprint", torch.float32), settings)
    train, validation = (load_prompts(name)["prompt"] for name in ("tiny-train", "tiny-validation"))
    reward, judges = RewardSet(SCORERS[0]), RewardSet(list(SCORERS))
    before = means(frozen, validation, judges)
    nodes = Nodes(frozen.denoiser, per_token)
    sigma = 0.05
    for _ in range(3):
        nodes.generator.manual_seed(0)
        sigma *= OUTPUT_CHANGE / change_of_output(frozen, nodes, train[:32], sigma)
    order = random.Random(seed).sample(train, len(train))
    sums: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        chosen = [order[(step * GROUPS + g) % len(order)] for g in range(GROUPS)]
        nodes.generator.manual_seed(make_seed(seed, "nodes", step))
        for first in range(0, GROUPS, 4):  # four groups of one prompt and one starting noise at a time
            prompts = [prompt for prompt in chosen[first : first + 4] for _ in range(MEMBERS)]
            generators = [
                make_generator(seed, "node_latents", step, first + i // MEMBERS) for i in range(len(prompts))
            ]
            nodes.sigma = sigma
            pictures = frozen.generate(prompts, generators)
            nodes.sigma = 0.0
            scores = torch.as_tensor(reward(prompts, pictures)).double().reshape(4, MEMBERS)
            fitness = (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, keepdim=True).clamp_min(1e-9)
            for name, value in nodes.estimate(fitness.flatten().float()).items():
                sums[name] = sums.get(name, 0) + value
        nodes.move(sums, travel * 2 * (STEPS - step) / (STEPS * (STEPS + 1)))
    gains = means(frozen, validation, judges) - before
    return {"per_token": per_token, "travel": travel, "seed": seed, "sigma": round(sigma, 4),
            **dict(zip(SCORERS, (round(float(g), 3) for g in gains), strict=True))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--travel", nargs="+", type=float, default=[0.01, 0.03, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.is_file() else []
    for per_token in (False, True):
        for travel in args.travel:
            for seed in args.seeds:
                if any((row["per_token"], row["travel"], row["seed"]) == (per_token, travel, seed) for row in done):
                    continue
                row = run(per_token, travel, seed)
                print(json.dumps(row), flush=True)
                with args.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
