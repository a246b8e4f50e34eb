"""The small model that ships: it loads by plain from_pretrained, follows prompts, and its prompts are as described."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "es_trl" / "assets"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def recipe():
    """The recipe's own modules `world` and `evaluate`; they are scripts beside each other, not a package."""
    sys.path.insert(0, str(ROOT / "recipes" / "tiny_sana"))
    try:
        import evaluate
        import world

        yield world, evaluate
    finally:
        sys.path.remove(str(ROOT / "recipes" / "tiny_sana"))


@pytest.fixture(scope="module")
def pipe():
    from diffusers import SanaSprintPipeline

    pipe = SanaSprintPipeline.from_pretrained(ASSETS / "tiny-sana-sprint")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts_of(split: str) -> list[str]:
    return (ASSETS / "prompts" / f"{split}.txt").read_text().splitlines()


def test_assets_are_small():
    files = [path for path in ASSETS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]


def test_prompt_files_are_disjoint_and_unseen(recipe):
    world, _ = recipe
    lists = {split: prompts_of(split) for split in SPLITS}
    assert len(lists["train"]) >= 256 and len(lists["validation"]) == 128 and len(lists["test"]) >= 256
    together = [prompt for prompts in lists.values() for prompt in prompts]
    assert len(set(together)) == len(together)
    for split, prompts in lists.items():
        assert {world.held_out(world.parse(prompt)) for prompt in prompts} == {split != "train"}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_hard_negatives_are_other_prompts_of_the_grammar(recipe, split):
    world, _ = recipe
    rows = [json.loads(row) for row in (ASSETS / "prompts" / f"{split}_hard_negatives.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts_of(split)
    for row in rows:
        assert len({row["prompt"], *row["hard_negatives"]}) == 8
        for negative in row["hard_negatives"]:
            world.parse(negative)


def test_prompt_files_come_from_the_recipe(recipe, tmp_path, monkeypatch):
    import prompts

    monkeypatch.setattr(sys, "argv", ["prompts.py", "--out", str(tmp_path)])
    prompts.main()
    for path in sorted(tmp_path.iterdir()):
        assert path.read_text() == (ASSETS / "prompts" / path.name).read_text()


def test_rendering_is_a_function_of_the_seed(recipe):
    world, _ = recipe
    first, scenes = world.sample_batch(5, 0, 16)
    again, _ = world.sample_batch(5, 0, 16)
    other, _ = world.sample_batch(6, 0, 16)
    assert first.shape == (16, 64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not any(world.held_out(scene) for scene in scenes)
    assert [world.parse(scene.prompt) for scene in scenes] == scenes


def test_renderer_draws_what_the_prompt_says(recipe):
    world, _ = recipe
    red, blue = world.render_prompts(["a red heart left of a blue star", "a blue star left of a red heart"], 0)
    half = np.s_[16:48, :32]
    assert red[half][..., 0].astype(int).sum() > red[half][..., 2].astype(int).sum()
    assert blue[half][..., 2].astype(int).sum() > blue[half][..., 0].astype(int).sum()
    with pytest.raises(ValueError, match="not an object"):
        world.parse("a red spaceship")


def test_pipeline_follows_the_prompt_and_two_steps_are_better(recipe, pipe):
    """On 32 unseen combinations: every scorer prefers the own prompt to others, and two steps to one."""
    _, evaluate = recipe
    prompts = prompts_of("validation")[:32]
    for folder in ("tiny-pickscore", "tiny-clip-heldout"):
        scorer = evaluate.Scorer(ASSETS / folder)
        text = scorer.prompts(prompts)
        own = []
        for steps in (1, 2):
            pictures = evaluate.generate(pipe, prompts, steps, guidance=2.0)
            similarity = scorer.pictures(pictures) @ text.T
            assert (similarity.argmax(1) == torch.arange(32)).float().mean() > 0.7
            own.append(similarity.diag().mean())
        assert own[1] > own[0]


def test_default_instruction_changes_nothing(pipe):
    """The tokenizer strips Sana's instruction, so the plain call and a short one draw the same picture."""
    call = {"num_inference_steps": 1, "intermediate_timesteps": None, "height": 64, "width": 64, "output_type": "np",
            "use_resolution_binning": False, "guidance_scale": 2.0}  # fmt: skip
    plain = pipe("a red cat", generator=torch.Generator().manual_seed(0), **call).images
    short = pipe(
        "a red cat", generator=torch.Generator().manual_seed(0), complex_human_instruction=None, **call
    ).images
    assert np.abs(plain - short).max() < 1e-3


def test_scorers_load_and_notice_blur(recipe):
    from safetensors.torch import load_file

    world, evaluate = recipe
    prompts = prompts_of("validation")[:48]
    real = world.render_prompts(prompts, 3)
    for folder in ("tiny-pickscore", "tiny-clip-heldout"):
        scorer = evaluate.Scorer(ASSETS / folder)
        text = scorer.prompts(prompts)
        sharp, soft = ((scorer.pictures(p) * text).sum(-1).mean() for p in (real, evaluate.blur(real, 5)))
        assert sharp - soft > 0.02
        assert 5 < scorer.clip.logit_scale.exp() < 100
    statistics = load_file(ASSETS / "tiny-clip-heldout" / "real_statistics.safetensors")
    assert evaluate.frechet(scorer.pictures(real), **statistics) < evaluate.frechet(
        scorer.pictures(real // 2), **statistics
    )
