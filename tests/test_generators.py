"""Objects with `module` and `generate` train as diffusers pipelines do."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tiny_runs import theta_of

from es_trl import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    ESConfig,
    ESTrainer,
    GRPOConfig,
    GRPOTrainer,
)
from es_trl.es import make_generator
from es_trl.evaluation import EvaluationRow, evaluate
from es_trl.pipelines import GeneratorPipeline, PipelineAdapter, add_frozen, read_start, verify_population_forward
from es_trl.samples import why_unscored


PROMPTS = ["a red apple", "two blue cats", "a green frog"]


class Writer(torch.nn.Module):
    """A plain module: no config, no dtype, no adapters of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.to_q, self.head = (
            torch.nn.Embedding(256, 16),
            torch.nn.Linear(16, 16),
            torch.nn.Linear(16, 192),
        )

    def forward(self, ids: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.to_q(self.embed(ids).mean(1) + noise)))


class Pictures:
    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = Writer()
        self.saved = []

    def generate(self, prompts, generators, colour):
        assert len(colour) == len(prompts) == len(generators)
        ids = torch.tensor([list(prompt.encode()[:8].ljust(8)) for prompt in prompts])
        noise = torch.stack([torch.randn(16, generator=generator) for generator in generators])
        pixels = (torch.sigmoid(self.module(ids=ids, noise=noise)).view(-1, 8, 8, 3) * 255).byte().numpy()
        return [Image.fromarray(array.copy()) for array in pixels]

    def save(self, directory):
        self.saved.append(directory)


def brightness(images, **_):
    return [float(np.asarray(image, dtype=float).mean()) for image in images]


def dataset() -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "colour": "red"} for prompt in PROMPTS])


def trainer(folder, generator=None, **options) -> ESTrainer:
    options = {"max_steps": 2, "population_size": 4, "prompts_per_step": 2, "save_steps": 1} | options
    options |= {"update": "optimizer", "sigma": 0.2, "learning_rate": 0.5}
    options |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "lora_target_modules": ["to_q"]}
    config = ESConfig(str(folder), **options)
    return ESTrainer(generator or Pictures(), brightness, config, train_dataset=dataset(), eval_dataset=dataset())


def test_an_object_trains_resumes_evaluates_and_saves(tmp_path, caplog):
    generator = Pictures()
    whole = trainer(tmp_path / "a", generator)
    start = theta_of(whole)
    whole.train()
    assert any(not torch.equal(value, start[name]) for name, value in theta_of(whole).items())
    assert not [r for r in caplog.records if "one after the other" in r.getMessage()], "members share a batch"
    whole.save_model()
    assert (tmp_path / "a" / "pytorch_lora_weights.safetensors").is_file() and generator.saved
    assert whole.evaluate()["eval_rewards/brightness/mean"] > 0

    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert all(torch.equal(value, theta_of(whole)[name]) for name, value in theta_of(resumed).items())


def test_an_object_is_evaluated_with_rows_of_its_own(tmp_path):
    run = trainer(tmp_path)
    run.train()
    columns = {"colour": ["red"] * 3}
    result = evaluate(run.adapter, PROMPTS, brightness, columns=columns, resamples=50)
    assert [row.name for row in result.rows] == ["base@1", "adapter@1"], "there are no steps to double"
    assert (result.of("adapter@1", "brightness") != result.of("base@1", "brightness")).any()
    run.save_model()
    loaded = evaluate(Pictures(), PROMPTS, brightness, adapters=f"mine={tmp_path}", columns=columns, resamples=50)
    assert np.array_equal(loaded.of("mine@1", "brightness"), result.of("adapter@1", "brightness"))
    base = evaluate(Pictures(), PROMPTS, brightness, rows=[EvaluationRow("base", False)], columns=columns)
    assert np.array_equal(base.of("base", "brightness"), result.of("base@1", "brightness"))


def test_an_object_starts_from_a_lora_beside_a_frozen_one(tmp_path):
    adapter().save_lora(tmp_path)
    file, own = str(tmp_path / "pytorch_lora_weights.safetensors"), GeneratorPipeline(Pictures())
    add_frozen(own, [(file, 0.5)])
    assert PipelineAdapter(own, start=read_start(own, file)).frozen_adapters == ["frozen_0"]
    assert own.module.peft_config.keys() == {"frozen_0", "default"}, "what was read is off again"


def test_members_of_an_object_are_drawn_fused_and_exact():
    check = verify_population_forward(adapter(), PROMPTS, columns={"colour": ["red"] * 3}, sigma=0.5)
    assert check.fused and check.max_difference <= 1.5 / 255 < check.spread


def adapter(output=list) -> PipelineAdapter:
    class Pictures_(Pictures):
        def generate(self, prompts, generators, colour):
            return output(super().generate(prompts, generators, colour))

    Pictures_.__name__ = "Pictures"
    return PipelineAdapter(Pictures_(), LoraConfig(r=2, target_modules=["to_q"]))


def test_the_base_draws_when_the_adapter_is_off():
    made = adapter()
    for parameter in made.theta.values():
        parameter.data.normal_()
    draw = [PROMPTS, [make_generator(0, "test", i) for i in range(3)]]
    with made.adapter_disabled():
        base = made.generate(*draw, columns={"colour": ["red"] * 3})
    plain = Pictures().generate(PROMPTS, [make_generator(0, "test", i) for i in range(3)], ["red"] * 3)
    assert all(np.array_equal(a, b) for a, b in zip(base, plain, strict=True))


def _array(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize(
    "output",
    [
        tuple,
        _array,
        lambda images: _array(images).astype(np.float32) / 255,
        lambda images: torch.from_numpy(_array(images)).permute(0, 3, 1, 2).float() / 255,
        lambda images: [torch.from_numpy(picture) for picture in _array(images)],
        lambda images: SimpleNamespace(images=images),
        lambda images: {"images": images},
        lambda images: (images,),
    ],
)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_outputs_of_any_kind_are_the_same_pictures(output, prompts):
    generators = [[make_generator(0, "test", i) for i in range(len(prompts))] for _ in range(2)]
    plain = Pictures().generate(prompts, generators[0], ["red"] * len(prompts))
    drawn = adapter(output).generate(prompts, generators[1], columns={"colour": ["red"] * len(prompts)})
    assert all(isinstance(picture, Image.Image) for picture in drawn)
    assert np.array_equal(_array(drawn), _array(plain))


def test_numbers_that_are_no_picture_are_refused_or_have_no_score():
    def draw(output, **columns):
        made = adapter(output)
        drawn = made.generate(PROMPTS, [make_generator(0, "test", i) for i in range(3)], columns=columns)
        return [why_unscored(picture) for picture in drawn]

    red = ["red"] * 3
    with pytest.raises(ValueError, match=r"Pictures.generate gave a picture of floats from .*be in \[0, 1\]"):
        draw(lambda images: _array(images) / 127.5 - 1, colour=red)
    with pytest.raises(TypeError, match="one sample per prompt, got NoneType"):
        draw(lambda images: None, colour=red)
    with pytest.raises(ValueError, match="Pictures.generate needs colour, .* they have shade"):
        draw(tuple, shade=red)

    whole = Pictures().generate(PROMPTS, [make_generator(0, "test", i) for i in range(3)], red)

    def spoilt(images):
        numbers = _array(images) / 255
        numbers[[np.array_equal(image, whole[1]) for image in images], 0, 0] = np.nan
        return numbers

    assert ["not made of numbers" in (reason or "") for reason in draw(spoilt, colour=red)] == [False, True, False]


def test_sounds_stay_as_they_are():
    sound = GeneratorPipeline(Pictures()).postprocess(torch.ones(2, 800))
    assert sound.shape == (2, 800)


@pytest.mark.parametrize(
    ("config", "trainer_class"), [(GRPOConfig, GRPOTrainer), (DiffusionDPOConfig, DiffusionDPOTrainer)]
)
def test_gradient_methods_say_that_an_object_has_no_scheduler(tmp_path, config, trainer_class):
    args = config(
        str(tmp_path), max_steps=1, prompts_per_step=2, report_to="none", use_cpu=True, lora_target_modules=["to_q"]
    )
    with pytest.raises(ValueError, match="Pictures has no scheduler.*ESTrainer"):
        trainer_class(Pictures(), brightness, args, train_dataset=dataset()).train()


def test_what_is_no_generator_is_refused_with_what_it_lacks(tmp_path):
    with pytest.raises(TypeError, match="object with `module`.*`generate.prompts, generators.*got Writer"):
        trainer(tmp_path, Writer())
