"""ESTrainer from the first step to the saved adapter, on the shipped model."""

import importlib
import json
import logging
import math
import os

import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import fresh_sprint, sana
from tiny_runs import PROMPTS, brightness, files_in, redness, same, theta_of, tiny_config, tiny_trainer
from transformers import TrainerCallback

from es_trl import ESTrainer, assets
from es_trl.es import compute_fitness, gradient, make_generator, noise
from es_trl.trainer.prompt_batches import PromptBatchSampler, prompt_dataloader
from es_trl.trainer.rollout import PromptBatch


# --- one step ---


@pytest.mark.parametrize(
    "options",
    [
        {"es_space": "lora", "optim": "sgd", "learning_rate": 0.1, "antithetic": False, "population_size": 5},
        {"es_space": "lora_b", "optim": "adamw_torch", "learning_rate": 1e-3, "noise_rank": 2},
        {"es_space": "lora_xs", "optim": "adamw_torch_fused", "learning_rate": 1e-3, "fitness_shaping": "win_rate"},
        {
            "es_space": "weight",
            "optim": "sgd",
            "learning_rate": 0.1,
            "optim_args": "momentum=0.5",
            "fitness_shaping": "centered_rank",
        },
        {"es_space": "lora_xs", "optim": "adafactor", "learning_rate": 1e-3, "scale_rewards": "none"},
    ],
    ids=lambda options: f"{options['es_space']}, {options['optim']}",
)
def test_training_changes_every_theta(tmp_path, options):
    trainer = tiny_trainer(tmp_path, max_steps=2, **({"update": "optimizer"} | options))
    before = theta_of(trainer)
    frozen = {n: p.clone() for n, p in trainer.adapter.denoiser.named_parameters() if "lora" not in n}
    result = trainer.train()
    after = theta_of(trainer)
    assert result.global_step == 2 and math.isfinite(result.training_loss)
    for name, value in after.items():
        assert torch.isfinite(value).all() and value.dtype == torch.float32
        assert not torch.equal(value, before[name]), name
    parameters = dict(trainer.adapter.denoiser.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in frozen.items()), "the base is frozen"


class GradientRecorder(TrainerCallback):
    """Keeps what stood in `.grad` when the optimizer was about to step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name.replace("/", "."): p.grad.clone() for name, p in model.named_parameters()})


def gradient_by_hand(trainer, rows, step, micro):
    """One prompt batch, from the pieces: noise, rollout, fitness, gradient."""
    args, population = trainer.args, trainer.population
    batch = PromptBatch.from_rows(rows, args.images_per_prompt)
    factors = trainer.noise.draw(step, range(population.num_directions), micro)
    scores, _ = trainer.rollout.scores(batch, factors, step, micro)
    fitness = compute_fitness(scores, population)
    return {
        name: gradient(value, fitness.values, population, args.sigma, fitness.num_valid)
        for name, value in factors.items()
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_is_the_average_over_micro_batches_with_noise_of_their_own(tmp_path, accumulation):
    recorder = GradientRecorder()
    trainer = tiny_trainer(
        tmp_path, gradient_accumulation_steps=accumulation, images_per_prompt=2, max_steps=1, callbacks=[recorder],
        update="optimizer", learning_rate=0.1,
    )  # fmt: skip
    batches = list(trainer.get_train_dataloader())[:accumulation]
    by_hand = [gradient_by_hand(trainer, rows, 0, micro) for micro, rows in enumerate(batches)]
    trainer.train()
    assert len(recorder.gradients) == 1
    for name, value in recorder.gradients[0].items():
        torch.testing.assert_close(value, sum(g[name] for g in by_hand) / accumulation, atol=1e-7, rtol=1e-5)
    name = next(iter(by_hand[0]))
    first = trainer.noise.draw(0, [0], 0)[name].U
    assert not torch.equal(first, trainer.noise.draw(0, [0], 1)[name].U)
    metrics = trainer.state.log_history[0]
    assert metrics["num_images"] == 4 * 2 * 2 * accumulation
    assert metrics["loss"] == pytest.approx(-metrics["reward"], rel=1e-3)


def test_the_first_sgd_step_is_learning_rate_times_the_gradient(tmp_path):
    recorder = GradientRecorder()
    trainer = tiny_trainer(
        tmp_path, update="optimizer", learning_rate=0.2, lr_scheduler_type="constant", max_steps=1,
        callbacks=[recorder],
    )  # fmt: skip
    before = theta_of(trainer)
    trainer.train()
    for name, value in theta_of(trainer).items():
        torch.testing.assert_close(value, before[name] - 0.2 * recorder.gradients[0][name])


def test_members_per_forward_changes_rounding_only(tmp_path):
    reference = None
    for count in (8, 3, 1):
        trainer = tiny_trainer(tmp_path, population_size=8, members_per_forward=count, max_steps=1)
        trainer.train()
        theta = theta_of(trainer)
        reference = reference or theta
        for name, value in theta.items():
            torch.testing.assert_close(value, reference[name], atol=1e-4, rtol=0)


def test_a_run_whose_noise_is_not_held_is_the_same_but_for_rounding(tmp_path, monkeypatch):
    """A step draws it for each forward, for the slopes and for the estimate, never that of all members."""
    options = {"population_size": 8, "members_per_forward": 4, "max_steps": 3, "gradient_accumulation_steps": 2}
    whole = tiny_trainer(tmp_path / "whole", **options)
    whole.train()
    few = tiny_trainer(tmp_path / "few", **options)
    monkeypatch.setattr(noise, "HELD", 3 * few.noise.size)
    most, draw = [], few.noise.draw
    monkeypatch.setattr(few.noise, "draw", lambda step, of, *rest: most.append(len(of)) or draw(step, of, *rest))
    few.train()
    assert max(most) == 4 and len(most) > 2 * 3 * (2 + 3)
    for name, value in theta_of(few).items():
        torch.testing.assert_close(value, theta_of(whole)[name], atol=1e-4, rtol=0)


def test_members_share_prompts_and_latents(tmp_path):
    """Common random numbers: with sigma next to nothing all members draw the same pictures, in order."""
    seen = []

    def spy(prompts, images, **columns):
        seen.append((prompts, [np.asarray(image) for image in images], columns["weight"]))
        return redness(images)

    from datasets import Dataset

    dataset = Dataset.from_dict({"prompt": PROMPTS, "weight": list(range(6))})
    trainer = tiny_trainer(
        tmp_path, spy, train_dataset=dataset, sigma=1e-7, images_per_prompt=2, max_steps=2, members_per_forward=2
    )
    trainer.train()
    assert len(seen) == 4, "two forwards of two members, two steps"
    for step in (0, 1):
        (prompts, images, weights), (other_prompts, other_images, _) = seen[2 * step : 2 * step + 2]
        assert prompts == other_prompts and prompts[:4] == prompts[4:]
        assert prompts[0] == prompts[1] != prompts[2] == prompts[3], "a prompt's images stand together"
        assert weights == [PROMPTS.index(prompt) for prompt in prompts]
        for member in range(1, 4):
            drawn = (images + other_images)[4 * member : 4 * member + 4]
            assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(images[:4], drawn, strict=True))
        assert (images[0] != images[1]).any(), "every image has latents of its own"
    assert set(seen[0][0]).isdisjoint(seen[2][0]), "the next step has other prompts"


def test_es_learns(tmp_path):
    """Twenty steps for a reward that the model can satisfy; measured on pictures that training did not see."""
    trainer = tiny_trainer(
        tmp_path, eval_dataset=PROMPTS, max_steps=20, population_size=16, sigma=0.2, travel=3.0, lora_rank=4,
        members_per_forward=16, eval_images_per_prompt=2,
    )  # fmt: skip
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 10


# --- prompts ---


def test_prompt_batches_are_a_function_of_seed_and_epoch():
    rows = [{"prompt": str(i)} for i in range(7)]
    loader = prompt_dataloader(rows, 3, seed=5)
    torch.manual_seed(0)
    first = [[row["prompt"] for row in batch] for batch in loader]
    torch.manual_seed(1)
    assert [[row["prompt"] for row in batch] for batch in prompt_dataloader(rows, 3, seed=5)] == first
    assert len(loader) == 2 and all(len(batch) == 3 for batch in first)
    assert len({prompt for batch in first for prompt in batch}) == 6, "no prompt twice in an epoch"
    sampler = PromptBatchSampler(7, 3, 5)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] != orders[2]
    assert list(PromptBatchSampler(7, 3, 6)) != orders[0]


def test_every_epoch_has_an_order_of_its_own(tmp_path):
    seen = []

    def spy(prompts, images, **_):
        seen.append(prompts[:2])
        return redness(images)

    tiny_trainer(tmp_path, spy, max_steps=6, data_seed=3).train()
    epochs = [seen[:3], seen[3:]]
    assert sorted(sum(epochs[0], [])) == sorted(sum(epochs[1], [])) == sorted(PROMPTS)
    assert epochs[0] != epochs[1]
    expected = PromptBatchSampler(6, 2, 3)
    expected.set_epoch(1)
    assert epochs[1] == [[PROMPTS[i] for i in batch] for batch in expected]


# --- schedules, callbacks, logs ---


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.4, 0.4, 0.4, 0.4]),
        ("linear", [0.4, 0.3, 0.2, 0.1]),
        ("cosine", [0.4 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
        ("constant_with_warmup", [0.0, 0.2, 0.4, 0.4]),
    ],
)
def test_schedules(tmp_path, schedule, expected):
    warmup = {"warmup_steps": 2} if "warmup" in schedule else {}
    options = {"update": "optimizer", "lr_scheduler_type": schedule, "learning_rate": 0.4, "max_steps": 4,
               "prompts_per_step": 1}  # fmt: skip
    trainer = tiny_trainer(tmp_path, population_size=2, **options, **warmup)
    trainer.train()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "reward" in entry]
    assert logged == pytest.approx(expected)


class Recorder(TrainerCallback):
    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def __getattribute__(self, name):
        if name.startswith("on_"):

            def record(args, state, control, **kwargs):
                self.events.append((name, state.global_step))
                if name == "on_step_end" and state.global_step == self.stop_at:
                    control.should_training_stop = True

            return record
        return super().__getattribute__(name)


def test_callbacks_are_called_and_may_stop_the_run(tmp_path):
    recorder = Recorder(stop_at=2)
    trainer = tiny_trainer(
        tmp_path, max_steps=5, eval_dataset=PROMPTS[:2], eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
    one_step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    events = [event for event, step in recorder.events if event != "on_prediction_step"]
    assert events[:4] == ["on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin"]
    for event in [*one_step, "on_evaluate", "on_save"]:
        assert events.count(event) >= 2, event
    assert events[-1] == "on_train_end"


def test_images_are_counted_where_an_epoch_ends_with_a_smaller_step(tmp_path):
    """Three prompt batches an epoch, two a step: the second step of each epoch has one."""
    shown = []

    def counted(images, **_):
        shown.extend(images)
        return redness(images)

    trainer = tiny_trainer(tmp_path, counted, gradient_accumulation_steps=2, max_steps=3)
    trainer.train()
    assert trainer.images_drawn == len(shown) == (2 + 1 + 2) * 2 * 4
    assert trainer.state.log_history[1]["num_images"] == (2 + 1) * 2 * 4


METRICS = {
    "loss", "grad_norm", "learning_rate", "epoch", "step", "reward", "reward_std", "frac_reward_zero_std",
    "rewards/redness/mean", "rewards/redness/std", "rewards/brightness/mean", "rewards/brightness/std", "step_time",
    "images_per_second", "num_images", "es/sigma", "es/update_norm", "es/adapter_norm", "es/valid_pairs",
    "es/pair_snr", "memory/peak_gb",
}  # fmt: skip


def test_logged_metrics_have_their_names_and_meaning(tmp_path):
    def with_metric(images, log_metric, trainer_state, **_):
        log_metric("mine", 3.0 + trainer_state.global_step)
        return redness(images)

    with_metric.__name__ = "redness"
    trainer = tiny_trainer(
        tmp_path,
        [with_metric, brightness],
        reward_weights=[1.0, 0.5],
        max_steps=4,
        logging_steps=2,
        sigma=0.2,
        antithetic=True,
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        assert METRICS <= entry.keys(), METRICS - entry.keys()
        assert all(math.isfinite(entry[name]) for name in METRICS)
        total = entry["rewards/redness/mean"] + 0.5 * entry["rewards/brightness/mean"]
        assert entry["reward"] == pytest.approx(total)
        assert entry["loss"] == pytest.approx(-entry["reward"], rel=1e-3)
        assert entry["es/sigma"] == 0.2 and entry["es/valid_pairs"] == 1 and entry["frac_reward_zero_std"] == 0
        assert entry["images_per_second"] > 0 and entry["es/update_norm"] > 0
    assert [entry["num_images"] for entry in entries] == [16, 32]
    assert [entry["mine"] for entry in entries] == [3.5, 5.5], "the mean over the steps since the last log"
    norm = torch.stack([theta.square().sum() for theta in theta_of(trainer).values()]).sum().sqrt()
    assert entries[-1]["es/adapter_norm"] <= float(norm) * 1.01


def test_the_progress_line(tmp_path, capsys):
    trainer = tiny_trainer(
        tmp_path, max_steps=2, disable_tqdm=False, eval_dataset=PROMPTS[:2], eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    text = "".join(capsys.readouterr())
    assert "Steps 1/2 reward " in text and "Steps 2/2 reward " in text and "img/s" in text
    assert "(+0)" in text, "the change since the first step"
    assert "Evaluation at step 2: " in text and "redness" in text.split("Evaluation at step 2: ")[1]


# --- evaluation and the best adapter ---


def test_evaluation_measures_the_unperturbed_adapter_on_fixed_latents(tmp_path):
    trainer = tiny_trainer(
        tmp_path, eval_dataset=PROMPTS[:3], eval_reward_funcs=[brightness], eval_images_per_prompt=2, eval_seed=7,
        per_device_eval_batch_size=4, max_steps=2, eval_strategy="steps", eval_steps=1, seed=1,
    )  # fmt: skip
    first = trainer.evaluate()
    assert set(first) >= {"eval_reward", "eval_rewards/redness/mean", "eval_rewards/brightness/mean"}
    assert first["eval_reward"] == pytest.approx(first["eval_rewards/redness/mean"]), "held-out rewards do not count"
    speed = "eval_images_per_second"
    again = trainer.evaluate()
    assert {k: v for k, v in again.items() if k != speed} == {k: v for k, v in first.items() if k != speed}
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_reward" in entry and entry["step"] > 0]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert entries[1]["eval_reward"] != first["eval_reward"]
    other = trainer.evaluate(PROMPTS[3:], metric_key_prefix="test")
    assert "test_reward" in other and not any(name.startswith("eval_") for name in other)

    # The same pictures for another training seed: runs are compared on common latents.
    twin = tiny_trainer(tmp_path, eval_dataset=PROMPTS[:3], eval_images_per_prompt=2, eval_seed=7, seed=2,
                        per_device_eval_batch_size=4)  # fmt: skip
    assert twin.evaluate()["eval_reward"] == pytest.approx(first["eval_reward"], rel=1e-6)


def test_one_total_for_training_evaluation_and_early_warning(tmp_path):
    """A reward that does not apply to some prompts leaves them to the others: 3.5 on both sides of a run, not 6."""

    def one(images, **_):
        return [1.0] * len(images)

    def on_quotes(images, prompts, **_):
        return [5.0 if '"' in prompt else None for prompt in prompts]

    def never(images, **_):
        return [None] * len(images)

    prompts = ['a sign "open"', "a red apple"]
    trainer = tiny_trainer(tmp_path, [one, on_quotes, never], train_dataset=prompts, eval_dataset=prompts, max_steps=1)
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == 3.5
    assert metrics["eval_rewards/on_quotes/prompts"] == 1.0 and metrics["eval_rewards/never/prompts"] == 0.0
    assert "eval_rewards/one/prompts" not in metrics
    trainer.train()
    assert next(entry["reward"] for entry in trainer.state.log_history if "reward" in entry) == 3.5
    scores = trainer.results.last.scores["adapter"]
    np.testing.assert_array_equal(trainer.rewards.total(scores), trainer.results.last.total(scores))


def test_rewards_see_the_trainers_state_in_evaluations_too(tmp_path):
    """A reward with a curriculum goes by the step, and so does the comparison with the base at the end."""
    seen = []

    def curriculum(images, trainer_state, **_):
        seen.append(trainer_state.global_step)
        return redness(images)

    trainer = tiny_trainer(tmp_path, curriculum, eval_dataset=PROMPTS[:2], eval_strategy="steps", eval_steps=1,
                           eval_on_start=True, max_steps=2)  # fmt: skip
    trainer.train()
    trainer.compare_with_base(PROMPTS[:2])
    assert None not in seen and seen[0] == 0 and seen[-1] == 2


def test_evaluating_without_prompts_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"evaluate\(\) needs an eval_dataset"):
        tiny_trainer(tmp_path).evaluate()


class ThetaByStep(TrainerCallback):
    def __init__(self):
        self.theta = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.theta[state.global_step] = {n.replace("/", "."): p.detach().clone() for n, p in model.named_parameters()}


def test_the_best_adapter_is_kept_and_loaded(tmp_path):
    """Judged by a held-out function that is best at step 2, whatever the pictures."""
    calls = iter([1.0, 5.0, 3.0, 2.0, 4.0])
    current = [0.0]

    def judge(images, **_):
        return [current[0]] * len(images)

    class Next(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            current[0] = next(calls)

    recorder = ThetaByStep()
    trainer = tiny_trainer(
        tmp_path, max_steps=5, eval_dataset=PROMPTS[:2], eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_rewards/judge/mean",
        eval_reward_funcs=[judge], callbacks=[recorder, Next()],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2 and trainer.state.best_metric == 5.0
    assert same(theta_of(trainer), recorder.theta[2]) and not same(recorder.theta[2], recorder.theta[5])
    kept = sorted(name for name in os.listdir(tmp_path) if name.startswith("checkpoint"))
    assert kept == ["checkpoint-2", "checkpoint-5"]


def test_the_best_adapter_is_judged_by_the_reward_unless_said(tmp_path):
    config = tiny_config(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
                         save_strategy="steps", save_steps=1)  # fmt: skip
    assert config.metric_for_best_model == "eval_reward" and config.greater_is_better is True


def test_checkpoints_beyond_the_limit_are_removed(tmp_path):
    tiny_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


# --- samples and files ---


def test_sample_sheets_before_during_and_after(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=5, sample_steps=2, num_sample_prompts=3, travel=5.0)
    base = trainer.samples.images()
    trainer.train()
    assert files_in(tmp_path / "samples") == [
        *(f"members-{step:06d}{kind}.jpg" for step in (2, 4) for kind in ("-tiles", "")),
        "metadata.jsonl",
        *(f"step-{step:06d}.jpg" for step in (0, 2, 4, 5)),
    ]
    entries = [json.loads(line) for line in (tmp_path / "samples" / "metadata.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if entry["file_name"].startswith("step-")]
    assert [entry["step"] for entry in entries] == [0, 2, 4, 5]
    assert all(entry["prompts"] == PROMPTS[:3] and "/" not in entry["file_name"] for entry in entries)
    sheets = [np.asarray(Image.open(tmp_path / "samples" / f"step-{step:06d}.jpg"), int) for step in (0, 5)]
    assert np.abs(sheets[0] - sheets[1]).max() > 10, "training shows"
    with trainer.adapter.adapter_disabled():
        again = trainer.samples.images()
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(base, again, strict=True)), "fixed latents"


def test_samples_come_from_the_evaluation_prompts(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=["a cat", "a cat", "a dog", "a frog"], num_sample_prompts=2)
    assert trainer.samples.prompts == ["a cat", "a dog"]


HOSTILE = ["../../etc/passwd", "a/b", "CON", "x" * 5000, "<img onerror=1>", "---\nlicense: x", "{{7*7}}", "\U0001f600"]


def test_a_saved_run_loads_anywhere_and_holds_no_pickle(tmp_path):
    prompts = [*HOSTILE, *PROMPTS]
    trainer = tiny_trainer(
        tmp_path / "run", train_dataset=prompts, max_steps=2, sample_steps=1, save_strategy="steps", save_steps=1,
        num_sample_prompts=4, travel=5.0,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    names = files_in(tmp_path)
    assert {"run/pytorch_lora_weights.safetensors", "run/README.md", "run/es_config.json", "run/env.json"} <= set(
        names
    )
    assert {name.split("/")[0] for name in names} == {"run"}, "nothing beside the run folder"
    for name in names:
        assert name.endswith((".safetensors", ".json", ".jsonl", ".md", ".jpg")), name
        assert (tmp_path / name).read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04"), name
    ran = json.loads((tmp_path / "run" / "es_config.json").read_text())
    assert ran["method"] == "es" and ran["base_model"] == "tiny-sana-sprint" and ran["config"]["population_size"] == 4
    assert ran["reward_funcs"] == ["redness"] and ran["train_prompts"] == len(prompts)

    call = {"num_inference_steps": 1, "intermediate_timesteps": None, "height": 32, "width": 32,
            "use_resolution_binning": False, "max_sequence_length": 16, "output_type": "pt"}  # fmt: skip
    generators = [make_generator(0, "t", i) for i in range(2)]
    states = [generator.get_state() for generator in generators]
    trained = trainer.pipe(prompt=PROMPTS[:2], generator=generators, **call).images
    stock = SanaSprintPipeline.from_pretrained(assets.resolve("tiny-sana-sprint"), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(tmp_path / "run"), use_safetensors=True)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    torch.testing.assert_close(
        stock(prompt=PROMPTS[:2], generator=generators, **call).images, trained, atol=1e-5, rtol=0
    )


# --- the length of a step ---


def test_lengths_fall_linearly_and_nothing_moves_without_a_signal(tmp_path, caplog):
    """A reward of pure noise: the lengths logged as the learning rate are not walked, and the run says why."""
    rng = np.random.default_rng(0)
    trainer = tiny_trainer(
        tmp_path, lambda images, **_: rng.normal(size=len(images)).tolist(), population_size=64, max_steps=4,
        travel=0.9,
        sigma=0.05, members_per_forward=64, prompts_per_step=1, lora_rank=8,
    )  # fmt: skip
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    lengths = [entry["learning_rate"] for entry in entries]
    assert lengths == pytest.approx([0.36, 0.27, 0.18, 0.09]) and sum(lengths) == pytest.approx(0.9)
    numbers = sum(value.numel() for value in trainer.adapter.theta.values())
    for entry in entries:
        assert entry["es/update_norm"] < 0.7 * 0.05 * entry["learning_rate"] * numbers**0.5
        assert abs(entry["es/signal"]) < 4 * entry["es/signal_error"]
    assert entries[-1]["es/adapter_norm"] < 0.25 * 0.05 * 0.9 * numbers**0.5
    assert "No signal found" in caplog.text


# --- every other option, switched on ---


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16", "guidance_scale": 2.0, "num_inference_steps": 2},
        {"height": 32, "width": 96, "release_text_encoder": True, "complex_human_instruction": ["Draw: "]},
        {"pipeline_kwargs": {"clean_caption": False}, "lora_target_modules": ["to_q"], "lora_alpha": 7.0},
        {"reward_retries": 1, "reward_weights": [2.0], "scale_rewards": "batch", "max_invalid_fraction": 0.2},
        {"multi_objective_aggregation": "normalize_then_sum", "fitness_shaping": "win_rate", "log_images": False},
        {"antithetic": True, "fitness_shaping": "sign"},
        {"model_init_kwargs": {"local_files_only": True}, "torch_empty_cache_steps": 1},
    ],
    ids=lambda options: ", ".join(options),
)
def test_options_train(tmp_path, options):
    trainer = tiny_trainer(tmp_path, max_steps=1, self_check=True, **options)
    before = theta_of(trainer)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in theta_of(trainer).items())
    settings = trainer.adapter.describe()
    for name in (
        "guidance_scale",
        "num_inference_steps",
        "height",
        "width",
        "complex_human_instruction",
        "lora_alpha",
    ):
        if name in options:
            assert settings[name] == options[name]
    image = trainer.adapter.generate(PROMPTS[:1], [make_generator(0, "t")])[0]
    assert image.size == (options.get("width", 32), options.get("height", 32))
    assert trainer.adapter.denoiser.dtype == getattr(torch, options.get("dtype", "float32"))
    assert (trainer.adapter.pipe.text_encoder is None) == options.get("release_text_encoder", False)
    assert trainer.adapter.lora_config.r == 2


def test_gradient_clipping_is_off_unless_asked_for(tmp_path):
    recorders = [GradientRecorder(), GradientRecorder()]
    for clip, recorder in zip((0.0, 1e-4), recorders, strict=True):
        options = {"update": "optimizer", "learning_rate": 0.1, "max_grad_norm": clip}
        tiny_trainer(tmp_path, max_steps=1, callbacks=[recorder], **options).train()
    norms = [sum(g.square().sum() for g in r.gradients[0].values()).sqrt().item() for r in recorders]
    assert norms[0] > 0.01 and norms[1] == pytest.approx(1e-4, rel=1e-2)


def test_a_peft_config_of_your_own(tmp_path):
    config = LoraConfig(r=3, lora_alpha=9, target_modules=["to_v"])
    trainer = tiny_trainer(tmp_path, model=fresh_sprint(), peft_config=config, max_steps=1)
    assert len(trainer.adapter.theta) == 10 and all(".to_v." in name for name in trainer.adapter.theta)
    trainer.train()
    assert trainer.adapter.describe()["lora_alpha"] == 9


def test_without_args_the_output_dir_is_named_after_model_and_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = ESTrainer("tiny-sana-sprint", redness, train_dataset="tiny-train")
    assert trainer.args.output_dir == "tiny-sana-sprint-ES"


def test_own_optimizers(tmp_path):
    pipe_trainer = tiny_trainer(tmp_path, max_steps=1)
    theta = list(pipe_trainer.adapter.theta.values())
    pipe_trainer.optimizer = torch.optim.RMSprop(theta, lr=1e-3)
    before = theta_of(pipe_trainer)
    pipe_trainer.train()
    assert not same(before, theta_of(pipe_trainer))


def test_a_compiled_denoiser_draws_the_same_population(tmp_path):
    """In place, and traced in the first step, with its self-check: no later step compiles again."""
    import torch._dynamo.utils as dynamo

    class Graphs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs.append(dynamo.counters["stats"]["unique_graphs"])

    graphs: list[int] = []

    torch._dynamo.reset()
    dynamo.counters.clear()
    # Two members a forward, as many as the self-check draws: every other number is a graph more, seconds each.
    options = {"max_steps": 3, "guidance_scale": 1.0, "lora_target_modules": ["attn1.to_q", "attn2.to_v"],
               "members_per_forward": 2}  # fmt: skip
    # Tracing is what could break; generating machine code would only cost the test a minute.
    compile_as_is = torch.nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_as_is(self, backend="eager", **kw))
        compiled = tiny_trainer(tmp_path, model=sana(layers=1), compile_denoiser=True, callbacks=[Graphs()], **options)
        compiled.train()
    plain = tiny_trainer(tmp_path, model=sana(layers=1), **options)
    plain.train()
    for name, value in theta_of(compiled).items():
        torch.testing.assert_close(value, theta_of(plain)[name], atol=1e-4, rtol=0)
    assert len(graphs) == 3 and 0 < graphs[0] == graphs[-1] <= 4
    assert not dynamo.counters["graph_break"]


def test_a_launch_with_fewer_processes_than_asked_for_is_said(caplog):
    from es_trl.run.processes import warn_if_fewer_processes

    with caplog.at_level(logging.WARNING):
        warn_if_fewer_processes(1, ["accelerate", "launch", "--cpu", "--num_processes", "2", "train.py"])
    assert "asked for 2 processes but only 1 runs" in caplog.text and "torchrun --nproc_per_node 2" in caplog.text
    caplog.clear()
    warn_if_fewer_processes(2, ["accelerate", "launch", "--num_processes", "2", "train.py"])
    warn_if_fewer_processes(1, ["python", "train.py", "--num_processes", "2"])
    assert not caplog.text


def test_env_json_names_the_code_that_was_loaded(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    loaded = dict(trainer.environment)
    module = importlib.import_module("es_trl.hub.environment")
    monkeypatch.setattr(module, "_git_commit", lambda root: "a commit made while training")
    monkeypatch.setattr(module, "_version", lambda package: "installed while training")
    trainer.train()
    for folder in ("checkpoint-1", "checkpoint-2"):
        assert json.loads((tmp_path / folder / "env.json").read_text()) == loaded
