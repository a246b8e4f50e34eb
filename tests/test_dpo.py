"""Diffusion-DPO: the loss is the paper's, an update prefers what was chosen, pairs come from rewards or from data."""

import io
import json
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_pipelines import PROMPTS, fresh_sprint, sana
from tiny_policies import tiny_policy
from tiny_runs import WHOLE, redness, same, theta_of
from transformers import TrainerCallback

from es_trl.es import make_generator
from es_trl.pipelines import CallSettings, DenoisingModel, PipelineAdapter
from es_trl.trainer import DiffusionDPOConfig
from es_trl.trainer.dpo_loss import PairErrors, dpo_loss, draw_noise, pair_errors
from es_trl.trainer.dpo_pairs import best_and_worst, check_pairs, pictures_of, totals
from recipes.benchmarks.tiny_models import MODELS


def picture(colour: str, size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def pairs(**columns) -> Dataset:
    """Six prompts whose chosen pictures are red and whose rejected ones are blue."""
    prompts = [f"a {word}" for word in ("apple", "cat", "frog", "dog", "star", "chair")]
    columns = {"chosen": [picture("red")] * 6, "rejected": [picture("blue")] * 6} | columns
    return Dataset.from_dict({"prompt": prompts} | {k: v for k, v in columns.items() if v is not None})


def offline(folder, **options):
    """Pairs from data; strong updates in the range that a one-step picture starts from."""
    small = {"online": False, "noise_draws": 2, "min_noise_level": 0.5, "beta": 200.0, "images_per_backward": 8}
    return tiny_policy(folder, "dpo", **({"train_dataset": pairs()} | small | options))


# ---- the loss ----


def test_loss_by_hand():
    """Equation 14 of the paper, and IPO's squared distance of the log-ratio from 1 / (2 beta)."""
    errors = PairErrors(*(torch.tensor([value]) for value in (0.30, 0.50, 0.40, 0.45)))
    margin = -10 / 2 * ((0.30 - 0.40) - (0.50 - 0.45))
    assert dpo_loss(errors, 10.0, "sigmoid").item() == pytest.approx(math.log1p(math.exp(-margin)))
    assert dpo_loss(errors, 10.0, "ipo").item() == pytest.approx((margin / 10 - 0.05) ** 2)
    chosen, rejected = errors.rewards(10.0)
    assert (chosen.item(), rejected.item()) == (pytest.approx(0.5), pytest.approx(-0.25))


def test_pair_shares_noise_and_level_and_the_base_is_the_reference():
    """At theta = 0 the errors are the base's own; equal images have equal errors whatever the noise."""
    adapter = PipelineAdapter(fresh_sprint(), settings=CallSettings(max_sequence_length=16))
    model = DenoisingModel(adapter)
    torch.manual_seed(0)
    chosen, rejected, noise = torch.randn(3, 2, *model.latent_shape)
    rejected[1] = chosen[1]
    with torch.no_grad():
        errors = pair_errors(model, chosen, rejected, noise, torch.tensor([0.4, 0.9]), PROMPTS[:2])
    assert torch.equal(errors.chosen, errors.chosen_base) and torch.equal(errors.rejected, errors.rejected_base)
    assert errors.chosen[1].item() == pytest.approx(errors.rejected[1].item(), rel=1e-5)
    assert errors.chosen[0].item() != pytest.approx(errors.rejected[0].item(), rel=1e-3)
    assert torch.allclose(dpo_loss(errors, 2000.0, "sigmoid"), torch.tensor(2.0).log())


@pytest.mark.parametrize(
    ("settings", "mean"),
    [
        ({"min_noise_level": 0.2, "max_noise_level": 0.8}, 0.5),
        ({"noise_level_sampling": "logit_normal", "logit_mean": 1.0, "logit_std": 0.5, "min_noise_level": 0.0}, 0.72),
        (
            {"noise_level_sampling": "logit_normal", "logit_std": 3.0, "min_noise_level": 0.0, "max_noise_level": 0.5},
            0.17,
        ),
    ],
)
def test_noise_levels(settings, mean, tmp_path):
    config = DiffusionDPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    draws = [draw_noise(config, (2, 3), (0, 0, 0, 0, i)) for i in range(400)]
    levels = torch.stack([level for _, level in draws])
    config_low = DiffusionDPOConfig(output_dir=str(tmp_path), use_cpu=True, num_inference_steps=4)
    assert (config_low.min_noise_level, DiffusionDPOConfig(output_dir=str(tmp_path)).min_noise_level) == (0.0, 0.5)
    assert config.min_noise_level <= levels.min() and levels.max() <= config.max_noise_level
    assert levels.mean().item() == pytest.approx(mean, abs=0.04)
    noise, level = draw_noise(config, (2, 3), (0, 0, 0, 0, 7))
    assert torch.equal(noise, draws[7][0]) and level == draws[7][1], "a function of its key"
    assert not torch.equal(noise, draws[8][0])


# ---- known answers ----


def test_an_update_prefers_what_was_chosen(tmp_path):
    """On fresh noise the chosen pictures become likelier than the rejected ones, and one-step pictures redder."""
    trainer = offline(tmp_path, max_steps=6, learning_rate=3e-3, **WHOLE)
    before = trainer.evaluate(PROMPTS)["eval_reward"]
    trainer.train()
    model = trainer.denoising
    latents = model.encode([picture("red"), picture("blue")])
    noise = torch.randn(8, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    trainer.adapter.write_back()
    with torch.no_grad():
        errors = pair_errors(
            model, latents[:1].expand(8, -1, -1, -1), latents[1:].expand(8, -1, -1, -1), noise,
            torch.linspace(0.5, 1, 8), ["a cat"] * 8,
        )  # fmt: skip
    chosen, rejected = errors.rewards(200.0)
    assert (chosen > rejected).all()
    assert trainer.evaluate(PROMPTS)["eval_reward"] > before + 0.2
    log = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) and log[0]["loss"] == pytest.approx(math.log(2))
    assert log[-1]["rewards/margins"] > 0.1 and log[-1]["rewards/accuracies"] > 0.9
    assert log[-1]["rewards/margins"] == pytest.approx(log[-1]["rewards/chosen"] - log[-1]["rewards/rejected"])
    assert trainer.images_drawn == 0, "nothing is drawn"


def test_the_gradient_at_pure_noise_is_that_of_the_derivation(tmp_path):
    """
    At the base and at noise level 1 both images of a pair are the same noise, and the gradient of the loss is
    `beta / (2 D)` times that of `<v(eps), chosen - rejected>`: drawn pairs, noise and weights must give just that.
    """
    kept, gradients = [], []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())

    trainer = tiny_policy(
        tmp_path, "dpo", max_steps=1, min_noise_level=0.9999, noise_draws=2, num_generations=4, images_per_forward=4,
        es_space="lora_b", max_grad_norm=0.0, callbacks=[Keep()],
    )  # fmt: skip
    draw_pairs, start = trainer._draw_pairs, theta_of(trainer)

    def remembering(*args):
        kept.append(draw_pairs(*args))
        return kept[-1]

    trainer._draw_pairs = remembering
    trainer.train()
    trainer.adapter.load_state_dict(trainer.adapter.state_dict() | {f"theta.{n}": v for n, v in start.items()})
    for parameter in trainer.adapter.theta.values():
        parameter.grad = None
    pairs, total = kept[0]
    for block in pairs.values():
        for i, index in enumerate(block.indices):
            for draw in range(2):
                noise, _ = draw_noise(trainer.args, block.chosen.shape[1:], (0, 0, 0, index, draw))
                with trainer.forward.enabled():
                    v = trainer.denoising.predict(noise[None], torch.ones(1), block.prompts[i : i + 1])
                    product = (v * (block.chosen[i] - block.rejected[i])).mean()
                    (trainer.args.beta / 2 * product / (2 * total)).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.adapter.theta.values()])
    assert torch.nn.functional.cosine_similarity(gradients[0], expected, dim=0) > 0.999
    assert gradients[0].norm().item() == pytest.approx(expected.norm().item(), rel=0.02)


def test_swapped_pairs_point_the_other_way(tmp_path):
    """At the start the loss is odd in the pair, so swapping the columns flips the sign of every gradient."""
    gradients = []
    for columns in ({}, {"chosen_column": "rejected", "rejected_column": "chosen"}):
        trainer = offline(tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **columns)
        start = theta_of(trainer)
        trainer.train()
        gradients.append(torch.cat([(value - start[name]).flatten() for name, value in theta_of(trainer).items()]))
    assert gradients[0].norm() > 0
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) < -0.999


def test_drawn_pairs_follow_the_reward(tmp_path):
    """A quadratic reward in latent space: the update moves one-step latents towards its centre."""
    found = []
    for sign in (1.0, -1.0):

        def nearness(images, sign=sign, **_):
            return [-sign * float(np.square(np.asarray(image, dtype=float) / 255 - 0.9).mean()) for image in images]

        trainer = tiny_policy(tmp_path, "dpo", nearness, max_steps=4, num_generations=4, images_per_forward=8,
                              min_noise_level=0.8, learning_rate=3e-3, noise_draws=2)  # fmt: skip
        trainer.train()
        found.append(trainer.evaluate(PROMPTS)["eval_reward"] * sign)
    assert found[0] > found[1], "nearer to 0.9 when that is rewarded than when it is punished"


# ---- how it is computed ----


def test_batches_do_not_change_the_update(tmp_path):
    """Two latents at a time with recomputed activations, or all of them without."""
    reference = None
    for options in ({}, {"images_per_backward": 2, "checkpoint_activations": True}):
        trainer = tiny_policy(tmp_path, "dpo", max_steps=1, optim="sgd", max_grad_norm=0.0, noise_draws=2, **options)
        trainer.train()
        theta = torch.cat([value.flatten() for value in theta_of(trainer).values()])
        reference = theta if reference is None else reference
        assert torch.allclose(theta, reference, rtol=1e-4, atol=1e-7)


def test_an_update_more_on_the_same_pairs(tmp_path):
    """`num_iterations` draws no image more, but moves theta again, at other noise."""
    moved = {}
    for iterations in (1, 2):
        trainer = tiny_policy(
            tmp_path, "dpo", max_steps=1, noise_draws=1, num_iterations=iterations, es_space="lora_xs"
        )
        trainer.train()
        assert trainer.images_drawn == 2 * 3
        moved[iterations] = max(float(value.abs().max()) for value in theta_of(trainer).values())
    assert moved[2] > 1.5 * moved[1]


def test_the_base_draws_if_asked(tmp_path):
    """With a wild adapter the two draw different pictures."""
    one = {"max_steps": 1, "prompts_per_step": 1, "train_dataset": PROMPTS[:1], "noise_draws": 1}
    trainer = tiny_policy(tmp_path, "dpo", draw_with="base", **one)
    for value in trainer.adapter.theta.values():
        value.data += 0.3

    def drawn() -> float:
        generators = [make_generator(trainer.args.seed, "latents", 0, 0, 0, g) for g in range(3)]
        return float(np.mean(redness(trainer.adapter.generate(PROMPTS[:1] * 3, generators))))

    with trainer.adapter.adapter_disabled():
        base = drawn()
    assert base != pytest.approx(drawn(), abs=0.1)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == pytest.approx(base, abs=1e-3)


def test_ties_teach_nothing_and_are_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = tiny_policy(tmp_path, "dpo", lambda images, **_: [1.0] * len(images), max_steps=1)
        start = theta_of(trainer)
        trainer.train()
    assert same(start, theta_of(trainer))
    assert "nothing to learn" in caplog.text
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1


def test_too_many_missing_rewards_stop_the_run(tmp_path):
    trainer = tiny_policy(tmp_path, "dpo", lambda images, **_: [None] * len(images), max_invalid_fraction=0.2)
    with pytest.raises(RuntimeError, match="100% of the images.*max_invalid_fraction=0.2"):
        trainer.train()


def test_sana_of_several_steps(tmp_path):
    trainer = tiny_policy(tmp_path, "dpo", model=sana(), max_steps=1, num_inference_steps=2, noise_draws=1)
    start = theta_of(trainer)
    trainer.train()
    assert not same(start, theta_of(trainer))


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "FluxPipeline", "LatentConsistencyModelPipeline"])
@pytest.mark.parametrize("online", [True, False])
def test_models_of_other_kinds(tmp_path, name, online):
    """SDXL predicts the noise, Flux a velocity on packed latents, LCM has its guidance as an input."""
    model = next(model for model in MODELS if model.name == name)
    own = model.call | {"max_steps": 1, "num_inference_steps": 2, "noise_draws": 1, "height": 32, "width": 32}
    make, own = (tiny_policy, own | {"method": "dpo"}) if online else (offline, own)
    trainer = make(tmp_path, model=model.pipeline(), **{"max_sequence_length": None, "guidance_scale": None} | own)
    start = theta_of(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "theta was the base's"
    assert not same(start, theta_of(trainer))


@pytest.mark.parametrize("online", [True, False])
def test_columns_of_prompts_go_into_the_loss(tmp_path, online):
    """A control network cannot be called without its picture; each row of the loss has its own."""
    model = next(model for model in MODELS if model.name == "StableDiffusionControlNetPipeline")
    data = pairs(image=[picture(colour, 32) for colour in ("red", "green", "blue", "white", "black", "grey")])
    own = {"max_steps": 1, "num_inference_steps": 2, "noise_draws": 1, "height": 32, "width": 32}
    own |= {"max_sequence_length": None, "guidance_scale": None, "train_dataset": data, "model": model.pipeline()}
    trainer = offline(tmp_path, **own) if not online else tiny_policy(tmp_path, "dpo", **own)
    start = theta_of(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert not same(start, theta_of(trainer))
    latents, levels, images = (
        torch.randn(2, *trainer.denoising.latent_shape),
        torch.tensor([0.5, 0.5]),
        data["image"][:2],
    )
    with torch.no_grad():
        together = trainer.denoising.predict(latents, levels, PROMPTS[:2], {"image": images})
        alone = trainer.denoising.predict(latents[1:], levels[1:], PROMPTS[1:2], {"image": images[1:]})
        other = trainer.denoising.predict(latents[1:], levels[1:], PROMPTS[1:2], {"image": images[:1]})
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)
    assert (other - alone).abs().max() > 1e-3 * alone.abs().max()


# ---- pairs ----


def test_best_against_worst():
    nan = math.nan
    values = np.array([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0], [nan, 5.0, nan], [nan, 1.0, 4.0]])
    assert best_and_worst(values) == [(0, 1, 0), (3, 2, 1)]


def test_latents_of_a_pair_are_those_of_its_images(tmp_path):
    trainer = tiny_policy(tmp_path, "dpo", num_generations=4, images_per_forward=4)
    pipe = trainer.adapter.pipe
    pairs, total = trainer._draw_pairs([{"prompt": p} for p in PROMPTS], [slice(i, i + 1) for i in range(3)], 0, 0)
    assert total == len(pairs) == 3
    for block, prompt in enumerate(PROMPTS):
        generators = [make_generator(trainer.args.seed, "latents", 0, 0, block, g) for g in range(4)]
        scores = redness(trainer.adapter.generate([prompt] * 4, generators))
        for latents, expected in ((pairs[block].chosen, max(scores)), (pairs[block].rejected, min(scores))):
            with torch.no_grad():
                decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
            assert redness(pipe.image_processor.postprocess(decoded)) == pytest.approx([expected], abs=0.1)


def test_several_rewards_are_scaled_before_they_are_summed_if_asked():
    weights = np.array([1.0, 2.0])
    scores = np.array([[[0.0, 100.0], [1.0, 0.0]], [[0.0, -100.0], [1.0, math.inf]]])
    assert totals(scores, weights, "sum_then_normalize")[0].tolist() == [200.0, 1.0]
    assert math.isnan(totals(scores, weights, "sum_then_normalize")[1, 1])
    scaled = totals(scores, weights, "normalize_then_sum")
    assert abs(scaled[0]).max() < 5 and scaled[0, 0] > scaled[0, 1]


def test_pictures_in_every_form(tmp_path):
    buffer = io.BytesIO()
    picture("red").save(buffer, format="PNG")
    path = tmp_path / "blue.png"
    picture("blue").save(path)
    rows = [
        {"prompt": "a", "chosen": picture("red"), "rejected": str(path)},
        {"prompt": "a", "chosen": buffer.getvalue(), "rejected": {"bytes": None, "path": str(path)}},
        {"prompt": "a", "jpg_0": str(path), "jpg_1": buffer.getvalue(), "label_0": 0.0},
        {"prompt": "a", "jpg_0": buffer.getvalue(), "jpg_1": str(path), "label_0": 1.0},
    ]
    for row in rows:
        chosen, rejected = pictures_of(row, "chosen", "rejected")
        assert chosen.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
        assert rejected.convert("RGB").getpixel((0, 0)) == (0, 0, 255)
    labels = {"jpg_0": [picture("red")] * 6, "jpg_1": [picture("blue")] * 6, "label_0": [1.0, 0.5, 0.0, 0.5, 1.0, 1.0]}
    kept = check_pairs(pairs(chosen=None, rejected=None, **labels), "chosen", "rejected")
    assert kept["label_0"] == [1.0, 0.0, 1.0, 1.0], "ties are left out"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rejected": None}, "'rejected' is not among prompt, chosen.*rejected_column"),
        (
            {"rejected": ["nowhere.png"] * 6},
            "column 'rejected', prompt 'a apple': there is no picture file 'nowhere.png'",
        ),
        ({"chosen": [3] * 6}, "a picture is a PIL image, a path, the bytes.*not int"),
        ({"chosen": [b"not a picture"] * 6}, "cannot be read"),
        ({"chosen": None, "jpg_0": ["a"] * 6, "jpg_1": ["b"] * 6, "label_0": [0.5] * 6}, "only ties"),
    ],
)
def test_pairs_that_cannot_work(columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        offline(tmp_path, train_dataset=pairs(**columns))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"loss_type": "hinge"}, "loss_type must be one of sigmoid, ipo"),
        ({"num_generations": 1}, "num_generations.*at least 2"),
        ({"images_per_backward": 1}, "images_per_backward.*at least 2"),
        ({"draw_with": "teacher"}, "draw_with must be one of adapter, base"),
        ({"min_noise_level": 0.9, "max_noise_level": 0.5}, "max_noise_level must be above 0.9"),
        ({"max_noise_level": 1.5}, "at most 1"),
        ({"noise_level_sampling": "cosine"}, "noise_level_sampling must be one of"),
        ({"es_space": "weight"}, "es_space must be one of lora, lora_b, lora_xs"),
        ({"images_per_prompt": 2}, "num_generations"),
        ({"scale_rewards": "none"}, "no effect"),
        ({"num_iterations": 2, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=1"),
    ],
)
def test_settings_that_cannot_work(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DiffusionDPOConfig(output_dir=str(tmp_path), **settings)


def test_ipo_and_logs(tmp_path):
    """The other loss trains too, and the run says what DPO's users look for."""
    trainer = tiny_policy(tmp_path, "dpo", loss_type="ipo", max_steps=2, noise_draws=1)
    start = theta_of(trainer)
    trainer.train()
    assert not same(start, theta_of(trainer))
    names = {"loss", "reward", "reward_std", "dpo/reward_gap", "dpo/generate_time", "dpo/reward_time",
             "dpo/gradient_time", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
             "rewards/redness/mean", "images_per_second", "num_images", "memory/peak_gb"}  # fmt: skip
    assert names <= trainer.state.log_history[0].keys()
    assert trainer.state.log_history[1]["num_images"] == 2 * 2 * 3
    trainer.save_model()
    assert json.loads((tmp_path / "es_config.json").read_text())["method"] == "dpo"
