"""Objects with `module` and `generate` train as diffusers pipelines do."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tiny_runs import theta_of

from es_trl import ESConfig, ESTrainer
from es_trl.es import make_generator
from es_trl.evaluation import EvaluationRow, evaluate
from es_trl.pipelines import PipelineAdapter, verify_population_forward


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


def test_members_of_an_object_are_drawn_fused_and_exact():
    check = verify_population_forward(adapter(), PROMPTS, columns={"colour": ["red"] * 3}, sigma=0.5)
    assert check.fused and check.max_difference <= 1.5 / 255 < check.spread


def adapter() -> PipelineAdapter:
    return PipelineAdapter(Pictures(), LoraConfig(r=2, target_modules=["to_q"]))


def test_the_base_draws_when_the_adapter_is_off():
    made = adapter()
    for parameter in made.theta.values():
        parameter.data.normal_()
    draw = [PROMPTS, [make_generator(0, "test", i) for i in range(3)]]
    with made.adapter_disabled():
        base = made.generate(*draw, columns={"colour": ["red"] * 3})
    plain = Pictures().generate(PROMPTS, [make_generator(0, "test", i) for i in range(3)], ["red"] * 3)
    assert all(np.array_equal(a, b) for a, b in zip(base, plain, strict=True))


def test_what_is_no_generator_is_refused_with_what_it_lacks(tmp_path):
    with pytest.raises(TypeError, match="object with `module`.*`generate.prompts, generators.*got Writer"):
        trainer(tmp_path, Writer())
