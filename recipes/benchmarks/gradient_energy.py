"""Where a reward's gradient lies: for each kind of layer, how much of it all prompts share, by backpropagation.

ES estimates the mean gradient of a reward from random perturbations of all layers at once; what a layer adds to the
reward's variance without adding to the mean gradient is noise for all others. For one image of each of N prompts this
computes the exact gradient of a CLIP reward with respect to the cores of `lora_xs` at their start and prints, for each
kind of layer, its share of the squared mean gradient (which a step can follow) and of the mean squared gradient (which
perturbations stir up), with jackknife standard errors over prompts.

    python recipes/benchmarks/gradient_energy.py
    python recipes/benchmarks/gradient_energy.py --targets attn1.to_v attn1.to_out.0 time_embed.linear
"""

import argparse
import re

import torch
import torch.nn.functional as F
from peft import LoraConfig

from es_trl import load_prompts
from es_trl.es import make_generator
from es_trl.pipelines import CallSettings, DifferentiableForward, PipelineAdapter, load_pipeline
from es_trl.rewards.clip_features import get_scorer


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class ClipReward:
    """The reward of a CLIP checkpoint as a differentiable function of a picture in [0, 1]."""

    def __init__(self, checkpoint: str):
        self.scorer = get_scorer(checkpoint)
        processor = self.scorer.processor.image_processor
        self.size = processor.crop_size["height"]
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))

    def __call__(self, pictures: torch.Tensor, prompt: str) -> torch.Tensor:
        if pictures.shape[-1] != self.size:
            pictures = F.interpolate(pictures, (self.size, self.size), mode="bicubic", antialias=True)
        found = self.scorer.model.get_image_features(pixel_values=(pictures - self.mean) / self.std)
        features = F.normalize(getattr(found, "pooler_output", found), dim=-1)
        return self.scorer.logit_scale * (features * self.scorer.text_features([prompt])).sum()


def gradients(adapter: PipelineAdapter, reward: ClipReward, prompts: list[str], seed: int) -> torch.Tensor:
    """`(len(prompts), P)`: the gradient of one image of each prompt with respect to all P numbers of theta."""
    call = type(adapter.pipe).__call__.__wrapped__  # without its torch.no_grad
    rows, differentiable = [], DifferentiableForward(adapter)
    for i, prompt in enumerate(prompts):
        for parameter in adapter.theta.values():
            parameter.grad = None
        with torch.enable_grad(), differentiable.enabled(), adapter.prompts.serving():
            generator = make_generator(seed, "gradient_energy", i)
            pictures = call(
                adapter.pipe, **adapter.call_kwargs([prompt]), generator=[generator], output_type="pt"
            ).images
            reward(pictures, prompt).backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in adapter.theta.values()]))
    return torch.stack(rows).double()


def energies(found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(P,)` each: unbiased squares of the mean gradient, and mean squares, of every number of theta."""
    n, squares = len(found), found.square().sum(dim=0)
    return (found.sum(dim=0).square() - squares) / (n * (n - 1)), squares / n


def shares(found: torch.Tensor, groups: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(groups, 2)`: share of the squared mean gradient and of the mean square."""
    shared, stirred = energies(found)
    return torch.stack([
        torch.stack([shared[index].sum() / shared.sum(), stirred[index].sum() / stirred.sum()])
        for index in groups.values()
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sana-sprint")
    parser.add_argument("--reward", default="tiny-pickscore", help="a CLIP checkpoint")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="Linear layers, as in lora_target_modules")
    parser.add_argument("--lora_rank", type=int, default=8)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--max_sequence_length", type=int, default=16)
    parser.add_argument("--dataset", default="tiny-train")
    parser.add_argument("--prompts", type=int, default=192, help="how many of them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank = arguments.lora_rank
    adapter = PipelineAdapter(
        load_pipeline(arguments.model),
        LoraConfig(r=rank, lora_alpha=rank, target_modules=arguments.targets),
        "lora_xs",
        CallSettings(1, arguments.guidance_scale, max_sequence_length=arguments.max_sequence_length),
    )
    prompts = load_prompts(arguments.dataset).shuffle(seed=arguments.seed)["prompt"][: arguments.prompts]
    found = gradients(adapter, ClipReward(arguments.reward), list(prompts), arguments.seed)
    kinds = [
        kind
        for name, parameter in adapter.theta.items()
        for kind in [re.sub(r"^.*?\.\d+\.|\.core$", "", name)] * parameter.numel()
    ]
    groups = {
        kind: torch.tensor([i for i, other in enumerate(kinds) if other == kind]) for kind in dict.fromkeys(kinds)
    }
    whole = shares(found, groups)
    left_out = torch.stack([shares(torch.cat([found[:i], found[i + 1 :]]), groups) for i in range(len(found))])
    errors = ((left_out - left_out.mean(dim=0)).square().sum(dim=0) * (len(found) - 1) / len(found)).sqrt()
    print("| layers | numbers | of the squared mean gradient | of the mean squared gradient |\n|---|---|---|---|")
    rows = zip(groups, groups.values(), whole.tolist(), errors.tolist(), strict=True)
    for kind, index, share, error in sorted(rows, key=lambda row: -row[2][0]):
        cells = [f"{value:.1%} ± {deviation:.1%}" for value, deviation in zip(share, error, strict=True)]
        print(f"| {kind} | {len(index)} | {' | '.join(cells)} |")
    shared, stirred = (float(value.sum()) for value in energies(found))
    print(f"\n{len(found)} prompts: squared mean gradient {shared:.4g}, mean squared gradient {stirred:.4g}")


if __name__ == "__main__":
    main()
