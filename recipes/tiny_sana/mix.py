"""Stage 7: mix teacher and student weights into the model that ships, and write everything the package carries.

A fully distilled student draws as well as its scorers can see, which leaves nothing to improve. The shipped one is
`teacher + mix * (student - teacher)` with a small mix: recognisable in one step, clearly better in two.
"""

import argparse
from pathlib import Path

import torch
from common import RUNS, load_weights, setup
from diffusers import AutoencoderDC, SanaSprintPipeline, SCMScheduler
from models import SHIPPED, SIZES, Size, build_tokenizer, build_vae
from safetensors.torch import save_file
from scorer import Scorer
from train_clip import SCORERS, build_scorer
from train_clip import TOKENIZER as CLIP_TOKENIZER
from train_teacher import TextToLatent, latent_factor
from transformers import CLIPImageProcessor, CLIPProcessor
from world import SIZE, sample_batch


ASSETS = Path(__file__).parents[2] / "es_trl" / "assets"
NAMES = {"reward": "tiny-pickscore", "heldout": "tiny-clip-heldout"}
MIX = 0.25


def load_vae(runs: Path, size: Size = SHIPPED, device: str = "cpu") -> AutoencoderDC:
    """The autoencoder with its `scaling_factor`, and the sharpened decoder when that stage has run."""
    vae = build_vae(size).to(device)
    load_weights(runs / "vae.safetensors", vae)
    vae.register_to_config(scaling_factor=latent_factor(vae, size))
    sharpened = runs / "vae_decoder.safetensors"
    if sharpened.exists():
        load_weights(sharpened, vae)
    return vae


def build_pipeline(runs: Path, mix: float, size: Size = SHIPPED, device: str = "cpu") -> SanaSprintPipeline:
    """The pipeline at a mix of 0 (teacher) ... 1 (student), fp32."""
    model = TextToLatent(size).to(device)
    load_weights(runs / "teacher.safetensors", model)
    if mix:
        student = TextToLatent(size).to(device)
        load_weights(runs / "student.safetensors", student)
        with torch.no_grad():
            for ours, theirs in zip(model.transformer.parameters(), student.transformer.parameters(), strict=True):
                ours.lerp_(theirs, mix)
    vae = load_vae(runs, size, device)
    pipe = SanaSprintPipeline(build_tokenizer(512), model.text_encoder, vae, model.transformer, SCMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_processor() -> CLIPProcessor:
    side = {"height": SIZE, "width": SIZE}
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return CLIPProcessor(image_processor=pictures, tokenizer=CLIP_TOKENIZER)


def export_pipeline(runs: Path, out: Path, mix: float, size: Size = SHIPPED) -> None:
    """`out/tiny-sana-sprint` in bf16."""
    build_pipeline(runs, mix, size).to(torch.bfloat16).save_pretrained(out / "tiny-sana-sprint")


def export_scorers(runs: Path, out: Path) -> None:
    """`out/tiny-pickscore` and `out/tiny-clip-heldout` in bf16, in the format of transformers."""
    for name in SCORERS:
        clip = build_scorer(name)
        load_weights(runs / f"scorer_{name}.safetensors", clip)
        clip.to(torch.bfloat16).save_pretrained(out / NAMES[name])
        build_processor().save_pretrained(out / NAMES[name])


def export_real_statistics(out: Path, batches: int = 32, size: int = 256) -> None:
    """Mean (128,) and covariance (128, 128) of the judge's unit image embeddings of real pictures of unseen scenes.

    `batches * size` pictures, drawn from the distribution of the validation and test prompts.
    """
    judge = Scorer(out / NAMES["heldout"])
    real = torch.cat([judge.pictures(sample_batch(4242, i, size, unseen=True)[0]) for i in range(batches)]).double()
    tensors = {"mean": real.mean(0).float(), "cov": real.T.cov().float().contiguous()}
    save_file(tensors, out / NAMES["heldout"] / "real_statistics.safetensors", {"pictures": str(len(real))})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--mix", type=float, default=MIX, help="0 is the teacher, 1 the student")
    parser.add_argument("--size", choices=SIZES, default="6m", help="of the pipeline; the scorers see 64 px")
    parser.add_argument("--only", choices=("pipeline", "scorers"), help="write only this part")
    args = parser.parse_args(argv)
    setup(0)
    if args.only != "scorers":
        export_pipeline(args.runs, args.out, args.mix, SIZES[args.size])
    if args.only != "pipeline":
        export_scorers(args.runs, args.out)
        export_real_statistics(args.out)


if __name__ == "__main__":
    main()
