"""Measure a pipeline and the two scorers: JSON with intervals and a contact sheet.

    python recipes/tiny_sana/evaluate.py --out /tmp/eval                        # the shipped model, test prompts
    python recipes/tiny_sana/evaluate.py --mix 0 0.2 1 --split validation ...   # mixes of teacher and student

Every picture has its own generator, the same for every row: only the model or the number of steps differs.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import RUNS, logger, setup, to_tensor
from diffusers import SanaSprintPipeline
from mix import build_pipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from scorer import Scorer
from world import SIZE, render_prompts


ASSETS = Path(__file__).parents[2] / "es_trl" / "assets"


def interval(values: torch.Tensor, draws: int = 10_000) -> list[float]:
    """Mean and the 95 % bootstrap interval of it, resampling prompts."""
    values, rng = values.double(), torch.Generator().manual_seed(0)
    means = torch.stack(
        [values[torch.randint(len(values), (len(values),), generator=rng)].mean() for _ in range(draws)]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return [round(float(values.mean()), 4), round(low, 4), round(high, 4)]


def frechet(features: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> float:
    """100 x the Frechet distance between Gaussians fitted to features (n, d) and given by mean (d,), cov (d, d)."""
    features, mean, cov = features.double(), mean.double(), cov.double()
    ours = features.T.cov()
    values, vectors = torch.linalg.eigh(cov)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ ours @ root).clamp_min(0).sqrt().sum()
    return float(100 * ((features.mean(0) - mean).square().sum() + ours.trace() + cov.trace() - 2 * cross))


def judge(scorer: Scorer, pictures: np.ndarray, prompts: list[str], negatives: list[list[str]]) -> dict:
    """Cosine, retrieval among all prompts and hard-negative accuracy of one scorer; per-prompt values under `_`."""
    image, text = scorer.pictures(pictures), scorer.prompts(prompts)
    cosine = (image * text).sum(-1)
    flat = scorer.prompts([other for row in negatives for other in row]).view(len(prompts), -1, text.shape[-1])
    margin = cosine[:, None] - torch.einsum("nd,nkd->nk", image, flat)
    return {
        "cosine": interval(cosine),
        "retrieval": interval(((image @ text.T).argmax(1) == torch.arange(len(prompts))).float()),
        "hard_negatives_each": round(float((margin > 0).float().mean()), 4),
        "hard_negatives_all": interval((margin > 0).all(1).float()),
        "_cosine": cosine,
        "_image": image,
    }


def generate(pipe: SanaSprintPipeline, prompts: list[str], steps: int, guidance: float, seed: int = 0) -> np.ndarray:
    """uint8 (n, 64, 64, 3); picture i starts from the noise of generator (seed, i) whatever the model or batch."""
    rows = []
    for i in range(0, len(prompts), 64):
        chunk = prompts[i : i + 64]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + i + k) for k in range(len(chunk))]
        middle = {1: None, 2: 1.3}.get(steps)
        rows.append(pipe(
            chunk, num_inference_steps=steps, intermediate_timesteps=middle, guidance_scale=guidance,
            height=SIZE, width=SIZE, use_resolution_binning=False, generator=generators, output_type="np",
        ).images)  # fmt: skip
    return (np.concatenate(rows) * 255).round().astype(np.uint8)


def blur(pictures: np.ndarray, width: int) -> np.ndarray:
    """Box blur of odd width."""
    pixels = to_tensor(pictures)
    padded = F.pad(pixels, [width // 2] * 4, mode="replicate")
    return ((F.avg_pool2d(padded, width, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def contact_sheet(
    rows: dict[str, np.ndarray], prompts: list[str], path: Path, columns: int = 8, zoom: int = 2
) -> None:
    """Blocks of one prompt per column; under the prompt one picture per row of `rows`, in order."""
    side, head, n = SIZE * zoom, 26, len(prompts)
    height = head + len(rows) * (side + 2) + 6
    sheet = Image.new("RGB", (columns * (side + 6), -(-n // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, prompt in enumerate(prompts):
        x, y = (i % columns) * (side + 6), (i // columns) * height
        words, lines = prompt.split(), [""]
        for word in words:
            if draw.textlength(f"{lines[-1]} {word}", font_size=9) > side:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        draw.text((x, y + 2), "\n".join(lines[:2]), fill="black", font_size=9)
        for k, pictures in enumerate(rows.values()):
            picture = Image.fromarray(pictures[i]).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (x, y + head + k * (side + 2)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument(
        "--mix", type=float, nargs="*", default=[], help="mixes built from --runs, instead of the assets"
    )
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--guidance", type=float, nargs="*", default=[2.0])
    parser.add_argument("--prompts", type=int, default=512, help="at most so many prompts")
    parser.add_argument("--sheet", type=int, default=32, help="prompts on the contact sheet")
    parser.add_argument("--out", type=Path, required=True, help="results.json and sheet.png go here")
    args = parser.parse_args()
    setup(0)
    rows = (args.assets / "prompts" / f"{args.split}_hard_negatives.jsonl").read_text().splitlines()[: args.prompts]
    prompts = [json.loads(row)["prompt"] for row in rows]
    negatives = [json.loads(row)["hard_negatives"] for row in rows]
    scorers = {"reward": Scorer(args.assets / "tiny-pickscore"), "heldout": Scorer(args.assets / "tiny-clip-heldout")}
    statistics = load_file(args.assets / "tiny-clip-heldout" / "real_statistics.safetensors")

    pictures = {"real": render_prompts(prompts, 77)}
    for width in (3, 5, 7):
        pictures[f"real, blur {width}"] = blur(pictures["real"], width)
    sheet = {}
    for mix in args.mix or [None]:
        if mix is None:
            pipe = SanaSprintPipeline.from_pretrained(args.assets / "tiny-sana-sprint")
            pipe.set_progress_bar_config(disable=True)
        else:
            pipe = build_pipeline(args.runs, mix)
        for guidance in args.guidance:
            for steps in args.steps:
                name = ", ".join([*([] if mix is None else [f"mix {mix}"]), f"guidance {guidance}", f"steps {steps}"])
                pictures[name] = sheet[name] = generate(pipe, prompts, steps, guidance)

    results = {}
    for name, shown in pictures.items():
        results[name] = {key: judge(scorer, shown, prompts, negatives) for key, scorer in scorers.items()}
        results[name]["frechet"] = round(frechet(results[name]["heldout"]["_image"], **statistics), 2)
        flat = {key: results[name][key]["cosine"][0] for key in scorers}
        hard = {key: results[name][key]["hard_negatives_all"][0] for key in scorers}
        retrieval = {key: results[name][key]["retrieval"][0] for key in scorers}
        logger.info(
            "%s: cosine %s retrieval %s hard %s frechet %s", name, flat, retrieval, hard, results[name]["frechet"]
        )
    for result in results.values():
        for key in scorers:
            result[key] = {k: v for k, v in result[key].items() if not k.startswith("_")}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    contact_sheet(sheet, prompts[: args.sheet], args.out / "sheet.png")


if __name__ == "__main__":
    main()
