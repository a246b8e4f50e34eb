"""
Which pipeline classes train, and how: writes docs/models.md from tiny random pipelines, a few seconds each.

    python recipes/benchmarks/models_table.py [--only NAME ...] [--rows rows.json] [--output docs/models.md]

For every class two members of a population are drawn as a training run draws them (after its check of itself), and
compared with their weights written into the model and drawn by the pipeline's own call, one picture a call.
"""

import argparse
import json
import logging
import math
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig

from es_trl.es import NoiseBank, Population, make_generator
from es_trl.pipelines import PipelineAdapter, PolicySampler, PolicySettings, numbers_of
from es_trl.pipelines.self_check import AMPLIFIED, VISIBLE, rms, tolerance
from es_trl.pipelines.targets import coverage
from es_trl.pipelines.verify import merged_weights
from es_trl.pipelines.watching import CallWatch
from es_trl.rewards import RewardSet
from es_trl.samples import pictures_of
from es_trl.trainer.rollout import PopulationRollout, PromptBatch
from recipes.benchmarks.tiny_models import MODELS, TinyModel


PROMPTS = ["a red apple", "two blue cats on a big green mat"]
SIGMA = 0.1
HEAD = """# Models

Which diffusers pipelines train here, found by running each class with tiny random weights on a CPU:
`python recipes/benchmarks/models_table.py` writes this page. Nothing is written down per class in the library; a class
that is not here is treated by the same rules, and a run checks itself at its first step.

- **fused**: several members of the population share a call of the pipeline. **one by one**: each member has a call of
  its own. **per picture**: every picture has. All draw the same pictures; the later ones are slower.
- **error**: largest difference between what training draws and the member's weights merged and drawn by the pipeline
  alone, one picture a call, as a share of the difference between two members; WRONG from a thousandth (and a
  hundred-thousandth of the picture's contrast, where members hardly differ) on.
- **prompts**: "once" where each text is encoded once and the encoders can be released; "together" where the distinct
  texts of a call are encoded together, once; "every call" where nothing is kept.
- **policy gradients**: whether DDPO, GRPO and Pref-GRPO find Gaussian steps, and how far the first ratio of
  probabilities is from 1. Evolution strategies train every class listed as fused, one by one or per picture.
- **layers**: Linear and convolution layers that have LoRA by default, the attention projections, of all in the model.

Counted in the same way before pipelines were watched (122 classes; not repeated here): 20 of 26 text-to-image classes
fused and exact, 13 of all fused and silently wrong, 22 video classes stopped at `.images`, prompts encoded once per
member in all but two.
"""


def measure(model: TinyModel) -> dict:
    """One row of the table."""
    started = time.perf_counter()
    row = {
        "name": model.name,
        "kind": model.kind,
        "how": "refused",
        "error": "",
        "prompts": "",
        "policy": "",
        "targets": "",
        "note": "",
    }
    try:
        adapter = PipelineAdapter(model.pipeline(), LoraConfig(r=2, lora_alpha=2), settings=model.settings())
        row["targets"] = (
            coverage(adapter.denoiser, adapter.space.layers).partition(" layers")[0].removeprefix("LoRA on ")
        )
        row |= draw_members(adapter, model)
        row["policy"] = policy(adapter, model)
    except Exception as error:  # noqa: BLE001 - whatever a class raises is what the table says
        row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


@torch.no_grad()
def draw_members(adapter: PipelineAdapter, model: TinyModel) -> dict:
    """How two members of a population are drawn, and how far they are from their merged weights."""
    population = Population(2)
    rewards = RewardSet(lambda images, **_: [0.0] * len(images))
    rollout = PopulationRollout(adapter, rewards, population, SIGMA, 2, seed=0)
    shapes = {site.name: tuple(site.theta.shape) for site in adapter.space.sites}
    factors = NoiseBank(0, shapes).draw(0, range(1))
    batch = PromptBatch(PROMPTS, model.columns)
    rollout._check_members((batch, factors, 0, 0))
    single = rollout._one_by_one
    how = "per picture" if adapter.drawer.one_by_one else "one by one" if single else "fused"

    def drawn(members: list[int]) -> torch.Tensor:
        samples = PopulationRollout._draw_together(rollout, members, (batch, louder, 0, 0), None, True)
        return numbers_of(samples, adapter.drawer.last_watch.numbers, len(samples)).view(len(members), -1)

    for factor in AMPLIFIED:
        louder = factors.scaled(factor)
        truth = [merged(adapter, model, batch, louder, sign) for sign in (1, -1)]
        spread = rms(truth[0] - truth[1])
        if spread >= VISIBLE * rms(truth[0] - truth[0].mean()):
            break
    found = drawn([0, 1]) if how == "fused" else torch.cat([drawn([0]), drawn([1])])
    error = max(rms(a - b) for a, b in zip(found, truth, strict=True)) / spread if spread else float("nan")
    prompts = adapter.prompts.whole_reason
    if not math.isfinite(error):
        return {
            "how": "no picture",
            "note": "what the pipeline itself draws with these random weights is not made of numbers",
        }
    return {
        "how": how if error * spread <= tolerance(truth[0], spread, torch.float32) else f"{how}, WRONG",
        "error": f"{error:.1e}",
        "prompts": "once" if not prompts else "together" if "depends" in prompts else "every call",
        "note": (adapter.drawer.one_by_one or adapter.drawer.by_prompt)[:120],
    }


def merged(adapter: PipelineAdapter, model: TinyModel, batch: PromptBatch, factors: dict, sign: int) -> torch.Tensor:
    """What a member's weights draw when they are written into the model, by the pipeline's own call per prompt."""
    numbers = []
    with merged_weights(adapter, {name: sign * SIGMA * value.dense()[0] for name, value in factors.items()}):
        adapter.write_back()
        for i, prompt in enumerate(PROMPTS):
            kwargs = adapter.settings.call_kwargs(adapter.pipe) | {n: v[i] for n, v in model.columns.items()}
            kwargs |= {"prompt": prompt} | adapter.settings.text_kwargs(adapter.pipe)
            watch = CallWatch(adapter.pipe, adapter.denoiser, 1, keep=True)
            seed = torch.randint(2**31, (), generator=batch.generator(i, 0, 0, 0)).item()
            with watch.watching(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # as a run does where a pipeline takes noise from torch's own generator
                samples = pictures_of(adapter.pipe(**kwargs, generator=batch.generator(i, 0, 0, 0)))
            numbers.append(numbers_of(samples, watch.numbers, 1))
    return torch.cat(numbers).view(-1)


def policy(adapter: PipelineAdapter, model: TinyModel) -> str:
    """The largest deviation of the first probability ratio from 1; "no" where a sentence refuses the class."""
    try:
        sampler = PolicySampler(adapter, PolicySettings(3))
        generators = [[make_generator(0, tag, i) for i in range(2)] for tag in ("a", "b")]
        _, trajectory = sampler.rollout(PROMPTS, *generators, columns=model.columns)
        worst = []

        def visit(index, gaussian, state):
            worst.append(float((gaussian.log_prob(state) - trajectory.log_probs[index]).exp().sub(1).abs().max()))

        sampler.replay(trajectory, [make_generator(0, "a", i) for i in range(2)], visit, grad=False)
        return f"{max(worst):.0e}"
    except ValueError:
        return "no"
    except Exception as error:  # noqa: BLE001
        return f"no: {type(error).__name__}"


def page(rows: list[dict]) -> str:
    """docs/models.md."""
    lines = [HEAD]
    counts = Counter((row["kind"], row["how"]) for row in rows)
    kinds, ways = list(dict.fromkeys(r["kind"] for r in rows)), list(dict.fromkeys(r["how"] for r in rows))
    lines += [f"| | {' | '.join(ways)} |", f"| --- |{' ---: |' * len(ways)}"]
    lines += [f"| {kind} | {' | '.join(str(counts[kind, way]) for way in ways)} |" for kind in kinds]
    for kind in kinds:
        lines += ["", f"## {kind.capitalize()}", "", "| class | how | error | prompts | policy gradients | layers | |"]
        lines += ["| --- | --- | ---: | --- | ---: | ---: | --- |"]
        for row in (row for row in rows if row["kind"] == kind):
            note = row["note"].replace("|", "/")
            shown = [row[name] for name in ("name", "how", "error", "prompts", "policy", "targets")]
            lines.append(f"| {' | '.join(shown)} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of classes; the other rows are taken from --rows")
    parser.add_argument("--rows", help="a JSON file of rows, kept and added to; without --only, what it has is left")
    parser.add_argument("--output", help="where the page goes, of all rows")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    kept = Path(args.rows) if args.rows else None
    rows = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.is_file() else {}
    for i, model in enumerate(MODELS):
        if args.only and model.name not in args.only:
            continue
        key = f"{model.name} {model.kind} {[m.name for m in MODELS[:i]].count(model.name)}"
        if key in rows and not args.only:
            continue
        rows[key] = row = measure(model)
        print(" | ".join(str(value) for value in row.values()), flush=True)
        if kept:
            kept.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.output:
        Path(args.output).write_text(page(list(rows.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
