"""The policy-gradient trainers: ratios, directions of known answer, updates inside a step, processes."""

import asyncio
import json
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import ranks
from tiny_pipelines import sana
from tiny_policies import tiny_policy
from tiny_runs import PROMPTS, brightness, redness, same, theta_of
from transformers import TrainerCallback

from es_trl import DDPOConfig, DiffusionDPOConfig, GRPOConfig, PrefGRPOConfig
from es_trl.rewards.preferences import win_rates
from es_trl.run.processes import warn_if_idle
from es_trl.trainer.group_rollout import GroupBatch, Rollout
from recipes.benchmarks.tiny_models import MODELS


class Gradients(TrainerCallback):
    """Keeps what stood in `.grad` when the optimizer was about to step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())


# --- known answers ---

CASES = {
    "grpo": {},
    "grpo, the other way": {"method": "grpo", "sign": -1},
    "grpo, own noise": {"method": "grpo", "init_same_noise": False},
    "grpo, guarded": {"method": "grpo", "loss_type": "grpo_guard"},
    "ddpo": {"per_prompt_stat_tracking_min_count": 8},
    "pref_grpo": {},
    "grpo, flow SDE": {"method": "grpo", "num_inference_steps": 2, "images_per_backward": 16},
    "ddpo, flow SDE": {"method": "ddpo", "num_inference_steps": 2, "per_prompt_stat_tracking_min_count": 8},
}


@pytest.mark.parametrize("case", CASES)
def test_the_update_points_where_the_reward_rises(tmp_path, case):
    """
    Reward `-|x - target|^2` of the latents after the first step: its expectation has the gradient of
    `-|mean - target|^2`, which autograd gives exactly.
    """
    options = {"method": case} | CASES[case]
    if "flow" in case:  # classifier-free guidance and a noise that the pipeline itself does not draw
        options["model"] = sana()
    else:
        options["intermediate_times"] = [0.8]
    sign, number = options.pop("sign", 1), 48
    states, drawn, recorder = [], [], Gradients()

    def quadratic(images, **_):
        return (-sign * (states[-1] - target).square().flatten(1).sum(dim=1)).tolist()

    trainer = tiny_policy(
        tmp_path, reward_funcs=quadratic, num_generations=number, prompts_per_step=1, max_steps=1,
        images_per_forward=number, es_space="lora_b", callbacks=[recorder], max_grad_norm=0.0,
        **({"images_per_backward": number} | options),
    )  # fmt: skip
    rollout = trainer.sampler.rollout

    def remembering(*args, **kwargs):
        images, trajectory = rollout(*args, **kwargs, output_type="latent")
        states.append(trajectory.states[0])
        drawn.append(trajectory)
        return images, trajectory

    target = 0.1
    trainer.sampler.rollout = remembering
    trainer.train()
    # The exact gradient, at the theta that drew.
    with torch.no_grad():
        for parameter in trainer.adapter.theta.values():
            parameter.zero_()
            parameter.grad = None
    batch = type("Batch", (), {"step": 0, "micro": 0})
    generators = trainer.rollout.latent_generators(batch, [(0, g) for g in range(number)])

    def visit(_index, gaussian, _state):
        (sign * (gaussian.mean - target).square().sum()).backward()

    trainer.sampler.replay(drawn[0], generators, visit)
    exact = torch.cat([p.grad.flatten() for p in trainer.adapter.theta.values()])
    cosine = torch.nn.functional.cosine_similarity(recorder.steps[0], exact, dim=0).item()
    assert cosine > 0.15, cosine


# --- updates ---


def test_ratios_are_one_on_the_first_update_and_move_after_it(tmp_path):
    trainer = tiny_policy(tmp_path, num_iterations=2, steps_per_generation=2, images_per_backward=2, max_steps=2)
    trainer.train()
    for entry in (e for e in trainer.state.log_history if "reward" in e):
        assert entry["policy/ratio_deviation"] < 1e-6
        assert entry["policy/approx_kl"] > 1e-12 and entry["policy/clip_fraction"] > 0
    assert trainer.state.global_step == 2 and trainer.images_drawn == 12
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {8}, "four updates per step"


@pytest.mark.parametrize("method", ["ddpo", "grpo"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_diffusion_unets_run_the_methods_that_were_born_there(tmp_path, method, name):
    """SD with DDIM; SDXL with Euler, which has no density and lends its noise levels to DDIM."""
    model = next(model for model in MODELS if model.name == name)
    own = {"guidance_scale": 4.0, "max_sequence_length": None, "num_inference_steps": 3, "height": 32, "width": 32}
    trainer = tiny_policy(tmp_path, method, model=model.pipeline(), max_steps=1, **own)
    start = theta_of(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["policy/ratio_deviation"] < 1e-6
    assert not same(start, theta_of(trainer))


def test_every_pass_deals_all_blocks(tmp_path):
    trainer = tiny_policy(tmp_path, num_iterations=3, steps_per_generation=2, prompts_per_step=5)
    rollout = type("R", (), {"num_blocks": 5, "batch": type("B", (), {"step": 4})})
    updates = trainer._updates(rollout)
    assert len(updates) == 6
    passes = [sorted(updates[i] + updates[i + 1]) for i in (0, 2, 4)]
    assert passes == [[0, 1, 2, 3, 4]] * 3 and updates[0] != updates[2]
    assert updates == trainer._updates(rollout), "a function of the step, not of what was drawn before"


@pytest.mark.parametrize("same_noise", [True, False])
def test_micro_batches_change_rounding_only(tmp_path, same_noise):
    found = []
    for forward, backward in ((16, 16), (2, 1)):
        recorder = Gradients()
        tiny_policy(
            tmp_path, images_per_forward=forward, images_per_backward=backward, init_same_noise=same_noise,
            sample_num_steps=3, max_steps=1, callbacks=[recorder],
        ).train()  # fmt: skip
        found.append(recorder.steps[0])
    torch.testing.assert_close(found[1], found[0], atol=2e-3 * found[0].abs().max().item(), rtol=0)


def test_accumulation_averages_over_prompt_batches(tmp_path):
    """Half of each of two batches' gradients: the first batch's is that of a step without accumulation."""
    one, two, calls = Gradients(), Gradients(), []
    options = {"prompts_per_step": 1, "max_grad_norm": 0.0, "scale_rewards": "group", "max_steps": 1}
    tiny_policy(tmp_path, callbacks=[one], **options).train()
    trainer = tiny_policy(tmp_path, gradient_accumulation_steps=2, callbacks=[two], **options)
    step = trainer.training_step

    def watched(*args, **kwargs):
        loss = step(*args, **kwargs)
        calls.append(torch.cat([p.grad.flatten() for p in trainer.adapter.theta.values()]).clone())
        return loss

    trainer.training_step = watched
    trainer.train()
    assert len(two.steps) == 1 and len(calls) == 2
    torch.testing.assert_close(calls[0], one.steps[0] / 2)
    assert torch.equal(calls[1], two.steps[0]) and not torch.equal(calls[1], calls[0])


def test_the_divergence_pulls_back_to_the_base(tmp_path):
    """With a reward that says nothing, only the KL term moves theta."""

    def constant(images, **_):
        return [1.0] * len(images)

    trainer = tiny_policy(
        tmp_path, reward_funcs=constant, beta=1.0, learning_rate=3e-3, max_steps=8, train_dataset=PROMPTS[:2]
    )
    with torch.no_grad():
        for i, parameter in enumerate(trainer.adapter.theta.values()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    trainer.train()
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences[-1] < 0.5 * divergences[0]


def test_a_constant_reward_is_said_aloud(tmp_path, caplog):
    tiny_policy(tmp_path, reward_funcs=lambda images, **_: [1.0] * len(images), max_steps=1).train()
    assert "every image has an advantage of 0" in caplog.text


def test_missing_rewards_end_the_run_before_the_update(tmp_path):
    trainer = tiny_policy(tmp_path, reward_funcs=lambda images, **_: [None] * len(images))
    before = theta_of(trainer)
    with pytest.raises(RuntimeError, match="100% of the images have no finite reward .*max_invalid_fraction=0.5"):
        trainer.train()
    assert same(before, theta_of(trainer))


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_a_reward_may_keep_to_its_prompts(tmp_path, method):
    """None for every image of a prompt is no missing score: the other reward decides there."""

    def of_apples(prompts, images, **_):
        return [value if "apple" in p else None for p, value in zip(prompts, redness(images), strict=True)]

    trainer = tiny_policy(
        tmp_path, method, [of_apples, redness], train_dataset=PROMPTS[:2], max_steps=1, max_invalid_fraction=0.0
    )
    before = theta_of(trainer)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["frac_reward_zero_std"] == 0 and entry["reward_std"] > 0
    assert not same(before, theta_of(trainer))


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_a_reward_that_compares_sees_whole_groups(tmp_path, method):
    """Though fewer images are drawn at once than a group has."""
    seen = []

    def against_the_group(images, groups, **_):
        seen.append(groups)
        return redness(images)

    against_the_group.groupwise = True
    tiny_policy(tmp_path, method, against_the_group, max_steps=1, num_generations=4, images_per_forward=2).train()
    assert seen == [[0] * 4, [1] * 4]


@pytest.mark.parametrize(("method", "options"), [("grpo", {"epsilon_high": 1e9, "epsilon": 1e9}), ("dpo", {})])
def test_a_gradient_that_is_not_finite_ends_the_run_before_its_update(tmp_path, method, options):
    trainer = tiny_policy(tmp_path, method, num_iterations=2, learning_rate=1e25, max_steps=1, **options)
    with pytest.raises(RuntimeError, match="Step 0: the gradient is not finite.*Lower learning_rate"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.adapter.theta.values())


def test_a_first_ratio_that_is_not_one_ends_the_run_before_its_update(tmp_path):
    """What is replayed is not what was drawn, as where a pipeline's noise or rows are not those of the rollout."""
    trainer = tiny_policy(tmp_path, max_steps=1)
    start, rollout = theta_of(trainer), trainer.sampler.rollout

    def of_another_policy(*args, **kwargs):
        images, trajectory = rollout(*args, **kwargs)
        trajectory.log_probs = {step: value + 0.01 for step, value in trajectory.log_probs.items()}
        return images, trajectory

    trainer.sampler.rollout = of_another_policy
    with pytest.raises(RuntimeError, match="Step 0: the first probability ratio of SanaSprintPipeline differs from 1"):
        trainer.train()
    assert same(theta_of(trainer), start)


@pytest.mark.parametrize("method", ["grpo", "dpo"])
@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (False, "Out of memory at step 0 with images_per_forward=3. Lower it"),
        (True, "Out of memory at step 0, gradient with images_per_backward=16. Lower it, set checkpoint_activations"),
    ],
)
def test_out_of_memory_says_what_to_lower(tmp_path, method, grad, message):
    trainer = tiny_policy(tmp_path, method, max_steps=1, es_space="lora_xs")

    inside, share_of = [], trainer.share_of

    @contextmanager
    def noted(*args):
        with share_of(*args):
            inside.append(args)
            yield

    def full(*_):
        if inside and torch.is_grad_enabled() == grad:  # the encoding of prompts goes up to the denoiser as well
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.share_of = noted
    trainer.adapter.denoiser.register_forward_pre_hook(full)
    with pytest.raises(RuntimeError, match=message):
        trainer.train()


def test_processes_without_work_are_counted(caplog):
    warn_if_idle(4, 4, "prompts_per_step", "images_per_forward")
    assert not caplog.text
    warn_if_idle(8, 4, "prompts_per_step", "images_per_forward")
    assert "Only 4 of 8 processes have work in a step: raise prompts_per_step or lower images_per_for" in caplog.text


def test_the_window_moves_on(tmp_path):
    trainer = tiny_policy(tmp_path, sample_num_steps=5, sde_window_size=2, sde_window_interval=3)
    seen = []
    for step in range(12):
        trainer.state.global_step = step
        seen.append(trainer.trained_steps())
    assert seen == [[0, 1]] * 3 + [[1, 2]] * 3 + [[2, 3]] * 3 + [[0, 1]] * 3


def test_checkpointed_activations_change_nothing(tmp_path):
    found = []
    for checkpoint in (False, True):
        recorder = Gradients()
        tiny_policy(tmp_path, checkpoint_activations=checkpoint, max_steps=1, callbacks=[recorder]).train()
        found.append(recorder.steps[0])
    torch.testing.assert_close(found[0], found[1], atol=1e-9, rtol=1e-4)


def test_bfloat16_keeps_theta_and_its_gradients_in_fp32(tmp_path):
    recorder = Gradients()
    trainer = tiny_policy(tmp_path, dtype="bfloat16", max_steps=2, callbacks=[recorder])
    trainer.train()
    assert {p.dtype for p in trainer.adapter.theta.values()} == {torch.float32} == {g.dtype for g in recorder.steps}
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in recorder.steps)


def test_one_step_is_trained_through_noise_on_its_output(tmp_path):
    trainer = tiny_policy(tmp_path, sample_num_steps=1, output_noise=0.2, max_steps=1)
    before = theta_of(trainer)
    trainer.train()
    assert not same(before, theta_of(trainer))
    assert trainer.args.eval_num_inference_steps == [1]


def test_grpo_learns(tmp_path):
    """Eight steps for a reward that the model can satisfy; measured with one step, on latents not seen in training."""
    trainer = tiny_policy(
        tmp_path, eval_dataset=PROMPTS, max_steps=8, num_generations=8, lora_rank=4, images_per_forward=16,
        eval_images_per_prompt=2,
    )  # fmt: skip
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 3


def test_the_comparison_has_rows_for_both_step_counts(tmp_path):
    trainer = tiny_policy(tmp_path, max_steps=1)
    result = trainer.compare_with_base(PROMPTS[:2], num_pictures=2)
    assert [row.name for row in result.rows] == ["base@1", "adapter@1", "base@2", "adapter@2"]
    assert trainer.results.comparison["gap_closure_rows"] == {
        "model": "adapter@1",
        "base": "base@1",
        "target": "base@2",
    }
    assert (Path(tmp_path) / "samples" / "before_after.jpg").exists()


def test_the_method_of_ones_own_on_the_page_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[1] / "docs" / "policy_gradient.md"
    code = page.read_text().partition("## A method of your own")[2].partition("```python\n")[2].partition("```")[0]
    scope = {"__name__": "page"}
    exec(compile(code, str(page), "exec"), scope)
    assert scope["trainer"].state.log_history[0]["policy/update_norm"] > 0
    assert '"method": "leave_one_out"' in (tmp_path / "outputs/leave_one_out/es_config.json").read_text()


# --- settings ---


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (GRPOConfig, {"num_generations": 1}, "num_generations must be a whole number of at least 2"),
        (GRPOConfig, {"images_per_prompt": 2}, "set num_generations"),
        (GRPOConfig, {"es_space": "weight"}, "es_space must be one of lora, lora_b, lora_xs"),
        (GRPOConfig, {"beta": -1.0}, "beta must be at least 0"),
        (GRPOConfig, {"loss_type": "dapo"}, "loss_type must be one of grpo, grpo_guard"),
        (GRPOConfig, {"num_iterations": 2, "gradient_accumulation_steps": 2}, "exclude each other"),
        (GRPOConfig, {"steps_per_generation": 9}, "steps_per_generation=9 needs as many blocks"),
        (GRPOConfig, {"gradient_checkpointing": True}, "use checkpoint_activations=True"),
        (DiffusionDPOConfig, {"gradient_checkpointing": True}, "use checkpoint_activations=True"),
        (GRPOConfig, {"intermediate_times": []}, "intermediate_times must be a list of at least one number"),
        (GRPOConfig, {"intermediate_times": ["0.8"]}, "intermediate_times must be numbers, got '0.8'"),
        (GRPOConfig, {"eval_num_inference_steps": [0]}, "eval_num_inference_steps must be whole numbers"),
        (DDPOConfig, {"per_prompt_stat_tracking_min_count": 40}, "can never be reached"),
        (PrefGRPOConfig, {"win_rate_temperature": 0.0}, "win_rate_temperature must be above 0"),
        (PrefGRPOConfig, {"pairwise_judge": 3}, "pairwise_judge must be a name or a callable"),
        (
            PrefGRPOConfig,
            {"pairwise_judge": "tiny-pickscore", "multi_objective_aggregation": "normalize_then_sum"},
            "has no effect with pairwise_judge",
        ),
    ],
)
def test_settings_that_cannot_work(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message):
        config(output_dir=str(tmp_path), use_cpu=True, **options)


def test_defaults_follow_the_protocols_steps(tmp_path):
    one = GRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (one.sample_num_steps, one.eval_num_inference_steps, one.epsilon_high) == (2, [1, 2], 1e-4)
    twenty = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, num_inference_steps=20, sample_num_steps=10)
    assert twenty.eval_num_inference_steps == [20]
    own = GRPOConfig(output_dir="unused", use_cpu=True, num_inference_steps=None, sample_num_steps=3)
    assert own.eval_num_inference_steps == [3], "the pipeline's own number is not known yet"
    named = PrefGRPOConfig(output_dir=str(tmp_path), use_cpu=True, pairwise_judge=redness)
    assert json.loads(json.dumps(named.to_dict()))["pairwise_judge"] == "redness"


# --- processes ---

RUNS = {
    "grpo": {"max_steps": 2, "prompts_per_step": 3, "num_iterations": 2, "steps_per_generation": 2},
    "dpo": {"max_steps": 2, "prompts_per_step": 3, "num_iterations": 2, "noise_draws": 2, "images_per_backward": 4},
}
LOGGED = {
    "loss", "grad_norm", "reward", "reward_std", "policy/approx_kl", "policy/clip_fraction", "rewards/margins",
    "rewards/accuracies", "dpo/reward_gap", "dpo/update_norm", "policy/update_norm",
}  # fmt: skip


def run_all(folder: Path) -> None:
    for method, options in RUNS.items():
        trainer = tiny_policy(folder / method, method, **options)
        trainer.train()
        theta = {name: value.tolist() for name, value in trainer.adapter.theta.items()}
        found = {"theta": theta, "log": trainer.state.log_history, "world": trainer.args.world_size}
        (folder / f"{method}-{trainer.args.process_index}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Three blocks for two processes: one of them draws twice as much."""
    folder = tmp_path_factory.mktemp("two")
    codes, outputs = ranks(2, run_all, folder, folder=folder)
    assert codes == [0, 0], outputs
    return folder


@pytest.mark.parametrize("method", RUNS)
def test_two_processes_are_bit_identical_to_one(two_processes, tmp_path, method):
    one = tiny_policy(tmp_path, method, **RUNS[method])
    one.train()
    expected = {name: value.tolist() for name, value in theta_of(one).items()}
    for process in (0, 1):
        found = json.loads((two_processes / f"{method}-{process}.json").read_text())
        assert found["world"] == 2 and found["theta"] == expected
        for theirs, ours in zip(found["log"], one.state.log_history, strict=True):
            assert theirs.keys() == ours.keys()
            for name in LOGGED & ours.keys():
                assert theirs[name] == pytest.approx(ours[name], rel=1e-6, abs=1e-9), name


# --- DDPO's statistics ---


def test_ddpo_without_statistics_of_prompts_uses_those_of_the_batch(tmp_path):
    trainer = tiny_policy(tmp_path, "ddpo", per_prompt_stat_tracking=False)
    scores = np.array([[1.0, 2.0, 6.0], [0.0, 5.0, 4.0]])
    batch = GroupBatch(PROMPTS[:2], {}, 3, 0, 0)
    advantages = trainer.advantages(Rollout(batch, scores[..., None]))
    np.testing.assert_allclose(advantages, (scores - scores.mean()) / (scores.std() + 1e-4))
    assert not trainer.statistics[0].rewards, "nothing is remembered"


def test_ddpo_remembers_as_many_rewards_as_the_buffer_holds(tmp_path):
    trainer = tiny_policy(
        tmp_path, "ddpo", per_prompt_stat_tracking_buffer_size=4, per_prompt_stat_tracking_min_count=2
    )
    for first in (0.0, 10.0):
        scores = np.array([[first, first + 1, first + 5]])
        advantages = trainer.advantages(Rollout(GroupBatch(PROMPTS[:1], {}, 3, 0, 0), scores[..., None]))
    kept = np.array([5.0, 10.0, 11.0, 15.0])
    np.testing.assert_allclose(advantages, (scores - kept.mean()) / (kept.std() + 1e-4))


# --- Pref-GRPO's judges ---


def test_every_reward_judges_alone_if_asked(tmp_path):
    """Win rates of each reward, their advantages summed by weight: the larger scale no longer decides alone."""
    options = {"reward_funcs": [redness, brightness], "reward_weights": [1.0, 0.5], "scale_rewards": "none"}
    scores = np.array([[[0.0, 300.0], [1.0, 0.0], [2.0, 900.0]]])
    rollout = Rollout(GroupBatch(PROMPTS[:1], {}, 3, 0, 0), scores)
    together = tiny_policy(tmp_path, "pref_grpo", **options)
    apart = tiny_policy(tmp_path, "pref_grpo", multi_objective_aggregation="normalize_then_sum", **options)
    np.testing.assert_allclose(
        together.advantages(rollout), win_rates(scores @ np.array([1.0, 0.5])) - 0.5, atol=1e-12
    )
    expected = win_rates(scores[..., 0]) + 0.5 * win_rates(scores[..., 1]) - 0.75
    np.testing.assert_allclose(apart.advantages(rollout), expected, atol=1e-12)


class Flaky:
    """A pairwise judge that raises in every call but each `patience`-th; brighter is better."""

    __name__ = "flaky"

    def __init__(self, patience):
        self.patience, self.calls = patience, 0

    def __call__(self, prompts, images_a, images_b):
        self.calls += 1
        if self.calls % self.patience:
            raise ConnectionError("the judge is away")
        return [float(a > b) for a, b in zip(brightness(images_a), brightness(images_b), strict=True)]


def slow(prompts, images_a, images_b):
    time.sleep(5)


async def slow_to_answer(prompts, images_a, images_b):
    await asyncio.sleep(5)


def test_a_judge_is_asked_again(tmp_path):
    judge = Flaky(patience=2)
    trainer = tiny_policy(tmp_path, "pref_grpo", pairwise_judge=judge, reward_retries=1, max_steps=1)
    trainer.train()
    assert judge.calls == 4 and trainer.state.global_step == 1  # two blocks of one prompt, asked twice each


@pytest.mark.parametrize(
    ("judge", "reason"), [(Flaky(99), "the judge is away"), (slow, "0.2 s"), (slow_to_answer, "0.2 s")]
)
def test_the_error_of_a_judge_names_the_step_and_the_prompt(tmp_path, judge, reason):
    trainer = tiny_policy(tmp_path, "pref_grpo", pairwise_judge=judge, reward_timeout=0.2, max_steps=1)
    with pytest.raises(RuntimeError, match="failed at step 0, prompts 0-0") as caught:
        trainer.train()
    assert reason in str(caught.value) and any(prompt in str(caught.value) for prompt in PROMPTS)


@pytest.mark.parametrize("fraction", [0.0, 0.9])
def test_groups_without_a_verdict_are_left_out_or_too_many(tmp_path, fraction):
    options = {"reward_failure": "invalid", "max_invalid_fraction": fraction, "max_steps": 1}
    trainer = tiny_policy(tmp_path, "pref_grpo", pairwise_judge=Flaky(patience=2), **options)
    if fraction == 0.0:
        with pytest.raises(RuntimeError, match=r"50% of the images have no finite reward \(flaky\)"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.state.global_step == 1
