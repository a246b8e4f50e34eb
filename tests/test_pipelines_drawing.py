"""Doors and self-checks: what goes into a call per row, what comes out, and what is noticed."""

import types

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import stable_diffusion

from es_trl import ESConfig, ESTrainer
from es_trl.es import make_generator
from es_trl.evaluation import evaluate
from es_trl.pipelines import CallSettings, PipelineAdapter
from es_trl.rewards import RewardSet
from es_trl.samples import is_black, mark_unscored, still_of, why_unscored
from recipes.benchmarks import toy_pipeline as toys
from recipes.benchmarks.models_table import measure
from recipes.benchmarks.tiny_models import MODELS
from recipes.benchmarks.toy_pipeline import TOKENS, WIDTH, ToyPipeline, ToyTransformer, redness, toy_pipeline


PROMPTS = ["a red apple", "two blue cats", "a green frog"]
LORA = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out"])


def pipeline(call, transformer=None) -> ToyPipeline:
    """A toy pipeline of another class, with `call` in place of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = transformer or ToyTransformer()
    return type("OtherPipeline", (ToyPipeline,), {"__call__": call})(transformer)


def inputs(prompt, generator):
    noise = torch.stack([torch.randn(TOKENS, WIDTH, generator=g) for g in generator])
    return noise + torch.stack([toys._vector(p) for p in prompt])[:, None]


def output(values, **more):
    pixels = (torch.sigmoid(values).view(-1, 8, 8, 3) * 255).round().byte().numpy()
    return types.SimpleNamespace(**{"images": [Image.fromarray(p.copy()) for p in pixels], **more})


def draw(pipe, prompts=PROMPTS, settings=None, **kwargs):
    adapter = PipelineAdapter(pipe, LORA, settings=settings)
    generators = [make_generator(0, "test", i) for i in range(len(prompts))]
    return adapter, adapter.generate(prompts, generators, **kwargs)


def trainer(pipe, path, **options):
    lora = options.pop("peft_config", LORA)
    options = {"max_steps": 1, "population_size": 4, "prompts_per_step": 2, "members_per_forward": 4} | options
    options |= {
        "update": "optimizer",
        "sigma": 0.1,
        "learning_rate": 0.1,
        "sample_steps": 0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return ESTrainer(pipe, redness, ESConfig(str(path), **options), train_dataset=PROMPTS, peft_config=lora)


def same(a, b) -> bool:
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


# ---- pictures that are not numbers, flagged, or black ----


def test_a_picture_that_is_not_made_of_numbers_has_no_score_and_the_others_do(monkeypatch, caplog):
    vector = toys._vector
    monkeypatch.setattr(toys, "_vector", lambda p: vector(p) * float("nan") if p == PROMPTS[1] else vector(p))
    result = evaluate(toy_pipeline(), PROMPTS, redness, steps=[1], images_per_prompt=2, resamples=50)
    missing = np.isnan(result.of("base@1", "redness"))
    assert missing.tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert result.details["odd_pictures"] == {"base@1": {"without a score": 2}}
    assert "'two blue cats': it is not made of numbers, first in the ToyTransformer (float32)" in caplog.text


def test_what_overflows_in_the_decoder_is_seen_before_it_is_a_black_picture():
    pipe = stable_diffusion()
    pipe.vae.decoder.conv_out.bias.data[:] = float("inf")
    adapter = PipelineAdapter(pipe, settings=CallSettings(1))
    images = adapter.generate(PROMPTS[:2], [make_generator(0, "test", i) for i in range(2)])
    assert all("first in the decoder (float32)" in why_unscored(image) for image in images)
    assert adapter.drawer.pictures == {"drawn": 2, "not_finite": 2}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("nsfw_content_detected", list), ("nsfw_content_detected", np.array), ("nsfw_detected", torch.tensor)],
)
def test_what_a_safety_checker_flagged_has_no_score(name, kind):
    def call(self, prompt, num_inference_steps=1, generator=None):
        return output(self.transformer(inputs(prompt, generator)), **{name: kind(["red" in p for p in prompt])})

    _, images = draw(pipeline(call), PROMPTS[::-1])
    assert [why_unscored(image) is not None for image in images] == [False, False, True]
    scores = RewardSet(
        [redness, lambda images, prompts, name, **_: [len(p + n) for p, n in zip(prompts, name, strict=True)]]
    )
    values = scores(PROMPTS[::-1], images, {"name": ["a", "bb", "ccc"]})
    assert np.isnan(values[2]).all() and values[:2, 1].tolist() == [len(PROMPTS[2]) + 1, len(PROMPTS[1]) + 2]


def test_a_black_picture_is_scored_and_counted():
    def call(self, prompt, num_inference_steps=1, generator=None):
        return output(self.transformer(inputs(prompt, generator)) - 1e4)

    adapter, images = draw(pipeline(call))
    assert is_black(images[0]) and why_unscored(images[0]) is None
    assert adapter.drawer.pictures["black"] == 3


def test_samples_that_carry_no_note_are_replaced_by_one_that_does():
    assert why_unscored(mark_unscored(np.zeros(5), "silent")) == "silent"
    film = [Image.new("RGB", (4, 4), c) for c in ("red", "blue", "green")]
    assert still_of(film) is film[1] and why_unscored(film) is None
    assert why_unscored(mark_unscored(film, "torn")) == "torn"


# ---- noise ----


def test_noise_from_torch_s_global_generator_is_the_picture_s_own(caplog):
    def call(self, prompt, num_inference_steps=1, generator=None):
        values = inputs(prompt, generator)
        return output(self.transformer(values + torch.randn(values.shape)))

    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapter, images = draw(pipeline(call))
        drawn.append(images)
    assert same(*drawn) and not same(drawn[0][:1], drawn[0][1:2])
    assert "global generator" in adapter.drawer.one_by_one and "call of its own" in caplog.text


def test_noise_of_numpy_s_global_generator_is_refused():
    def call(self, prompt, num_inference_steps=1, generator=None):
        values = inputs(prompt, generator)
        return output(self.transformer(values + torch.from_numpy(np.random.randn(*values.shape)).float()))

    with pytest.raises(ValueError, match="draws another picture every time from the same prompt and generator"):
        draw(pipeline(call))


def test_one_generator_for_a_whole_batch_is_noticed():
    def call(self, prompt, num_inference_steps=1, generator=None):
        return output(self.transformer(inputs(prompt, [generator[0]] * len(prompt))))

    for prompts in (PROMPTS, PROMPTS[:1] * 3):
        adapter, images = draw(pipeline(call), prompts)
        assert "depends on what it is drawn with" in adapter.drawer.one_by_one
        assert same(images, draw(toy_pipeline(), prompts)[1])


# ---- members ----


def test_a_wrong_row_of_a_member_is_noticed_and_members_are_drawn_alone(tmp_path, caplog):
    def call(self, prompt, num_inference_steps=1, generator=None):
        return output(self.transformer(inputs(prompt, generator).flip(0)).flip(0))

    wrong = trainer(pipeline(call), tmp_path / "a")
    wrong.train()
    assert "two members drawn in one batch differ" in caplog.text
    right = trainer(toy_pipeline(), tmp_path / "b", members_per_forward=1)
    right.train()
    for name, value in right.adapter.theta.items():
        torch.testing.assert_close(wrong.adapter.theta[name], value)


class IdleTransformer(ToyTransformer):
    def __init__(self):
        super().__init__()
        self.idle = torch.nn.Linear(WIDTH, WIDTH)


def test_lora_layers_that_are_never_called_are_named(tmp_path, caplog):
    def lora(*names):
        return LoraConfig(r=2, target_modules=list(names))

    some = trainer(pipeline(ToyPipeline.__call__, IdleTransformer()), tmp_path / "a", peft_config=lora("to_q", "idle"))
    some.train()
    assert "1 of 2 LoRA layers are never called by OtherPipeline, the first being idle" in caplog.text
    none = trainer(pipeline(ToyPipeline.__call__, IdleTransformer()), tmp_path / "b", peft_config=lora("idle"))
    with pytest.raises(ValueError, match="1 of 1 LoRA layers are never called.*lora_target_modules"):
        none.train()


# ---- doors ----


def test_columns_and_constants_reach_the_call_row_by_row():
    seen = []

    def call(self, prompt, image, mask_image=None, num_inference_steps=1, generator=None):
        seen.append((image, mask_image))
        return output(self.transformer(inputs(prompt, generator)))

    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    mask = Image.new("L", (4, 4))
    columns = {"image": pictures, "category": ["a", "b", "c"]}
    draw(pipeline(call), settings=CallSettings(extra={"mask_image": mask}), columns=columns)
    assert (pictures, [mask] * 3) in seen


def test_a_pipeline_for_one_prompt_is_called_per_picture(tmp_path, caplog):
    def call(self, prompt, num_inference_steps=1, generator=None):
        if not isinstance(prompt, str):
            raise ValueError("one prompt at a time")
        return output(self.transformer(inputs([prompt], [generator])))

    one = trainer(pipeline(call), tmp_path / "a")
    one.train()
    assert "does not take 2 prompts at once (one prompt at a time)" in caplog.text
    many = trainer(toy_pipeline(), tmp_path / "b")
    many.train()
    for name, value in many.adapter.theta.items():
        torch.testing.assert_close(one.adapter.theta[name], value, atol=1e-5, rtol=1e-4)


def test_a_wrong_call_is_an_error_and_not_a_slow_pipeline():
    def call(self, prompt, num_inference_steps=1, generator=None):
        raise ValueError("height has to be divisible by 32")

    with pytest.raises(ValueError, match="divisible by 32"):
        draw(pipeline(call))


def test_a_video_is_a_list_of_pictures():
    def call(self, prompt, num_inference_steps=1, generator=None):
        frames = [output(self.transformer(inputs(prompt, generator)) + i).images for i in range(3)]
        return types.SimpleNamespace(frames=[list(clip) for clip in zip(*frames, strict=True)])

    shown = []

    def reward(images, **_):
        shown.extend(images)
        return [float(len(film)) for film in images]

    result = evaluate(pipeline(call), PROMPTS, reward, steps=[1], resamples=50)
    assert result.of("base@1", "reward").ravel().tolist() == [3, 3, 3]
    assert all(isinstance(frame, Image.Image) for film in shown for frame in film)
    assert isinstance(result.images["base@1"][0][0], Image.Image)


def test_keywords_that_go_on_to_a_parent_class_are_keywords():
    def call(self, *args, **kwargs):
        return ToyPipeline.__call__(self, *args, **kwargs)

    _, images = draw(pipeline(call), settings=CallSettings(1))
    assert same(images, draw(toy_pipeline())[1])
    with pytest.raises(ValueError, match="OtherPipeline takes no strength"):
        draw(pipeline(call), settings=CallSettings(extra={"strength": 0.5}))


@pytest.mark.parametrize("name", ["BriaFiboPipeline", "Kandinsky3Pipeline"])
def test_prompts_that_lengthen_each_other_have_calls_of_their_own_which_members_share(name, caplog):
    """Kandinsky 3 averages over the text's padding, Bria's encoder attends to it: a picture would know the others."""
    model = next(model for model in MODELS if model.name == name)
    row = measure(model)
    assert row["how"] == "fused" and float(row["error"]) < 1e-4 and "length" in row["note"].replace("long", "length")
    adapter = PipelineAdapter(model.pipeline(), LoraConfig(r=2), settings=model.settings())
    prompts = ["a cat", "two blue cats on a big green mat", "a cat"]
    together = adapter.generate(prompts, [make_generator(0, "t", i) for i in range(3)], output_type="pt")
    assert "Every prompt has calls of its own" in caplog.text
    for i, prompt in enumerate(prompts):
        alone = adapter.generate([prompt], [make_generator(0, "t", i)], output_type="pt")
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=0)
