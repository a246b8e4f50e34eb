"""The policy-gradient trainers: ratios, directions of known answer, updates inside a step, processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_policies import tiny_policy
from tiny_runs import PROMPTS, redness, same, theta_of
from transformers import TrainerCallback

from es_trl import DDPOConfig, GRPOConfig, PrefGRPOConfig
from es_trl.trainer.group_rollout import GroupBatch, Rollout


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
}


@pytest.mark.parametrize("case", CASES)
def test_the_update_points_where_the_reward_rises(tmp_path, case):
    """
    Reward `-|x - target|^2` of the latents after the first step: its expectation has the gradient of
    `-|mean - target|^2`, which autograd gives exactly.
    """
    options = {"method": case} | CASES[case]
    sign, number = options.pop("sign", 1), 48
    states, drawn, recorder = [], [], Gradients()

    def quadratic(images, **_):
        latents = states[-1].flatten(1)
        return (-sign * (latents - target).square().sum(dim=1)).tolist()

    trainer = tiny_policy(
        tmp_path, reward_funcs=quadratic, num_generations=number, prompts_per_step=1, max_steps=1,
        images_per_forward=number, images_per_backward=number, intermediate_times=[0.8], es_space="lora_b",
        callbacks=[recorder], max_grad_norm=0.0, **options,
    )  # fmt: skip
    rollout = trainer.sampler.rollout

    def remembering(*args, **kwargs):
        images, trajectory = rollout(*args, **kwargs, output_type="latent")
        states.append(trajectory.states[0])
        drawn.append(trajectory)
        return images, trajectory

    target = torch.zeros(1, 1024)
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
        (sign * (gaussian.mean.flatten(1) - target).square().sum()).backward()

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
    recorder = Gradients()
    options = {"prompts_per_step": 1, "max_grad_norm": 0.0, "scale_rewards": "group"}
    tiny_policy(tmp_path, gradient_accumulation_steps=2, max_steps=1, callbacks=[recorder], **options).train()
    assert len(recorder.steps) == 1 and recorder.steps[0].abs().max() > 0


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
    assert trainer.evaluation["gap_closure_rows"] == {"model": "adapter@1", "base": "base@1", "target": "base@2"}
    assert (Path(tmp_path) / "samples" / "before_after.jpg").exists()


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
        (GRPOConfig, {"intermediate_times": []}, "intermediate_times must be a list of at least one number"),
        (GRPOConfig, {"eval_num_inference_steps": [0]}, "eval_num_inference_steps must be whole numbers"),
        (DDPOConfig, {"per_prompt_stat_tracking_min_count": 40}, "can never be reached"),
        (PrefGRPOConfig, {"win_rate_temperature": 0.0}, "win_rate_temperature must be above 0"),
        (PrefGRPOConfig, {"pairwise_judge": 3}, "pairwise_judge must be a name or a callable"),
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
    named = PrefGRPOConfig(output_dir=str(tmp_path), use_cpu=True, pairwise_judge=redness)
    assert json.loads(json.dumps(named.to_dict()))["pairwise_judge"] == "redness"


# --- processes ---

RUN = {"max_steps": 2, "prompts_per_step": 3, "num_iterations": 2, "steps_per_generation": 2}
SCRIPT = """
import json, sys
sys.path[:0] = {paths!r}
from test_policy_gradient import RUN
from tiny_policies import tiny_policy
trainer = tiny_policy({folder!r}, **RUN)
trainer.train()
theta = {{name: value.tolist() for name, value in trainer.adapter.theta.items()}}
with open({folder!r} + "/process-%d.json" % trainer.args.process_index, "w") as file:
    json.dump({{"theta": theta, "log": trainer.state.log_history, "world": trainer.args.world_size}}, file)
"""


def test_two_processes_are_bit_identical_to_one(tmp_path):
    """Three blocks for two processes: one of them draws twice as much."""
    here = Path(__file__).parent
    script = tmp_path / "two.py"
    script.write_text(SCRIPT.format(paths=[str(here), str(here.parent)], folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one = tiny_policy(tmp_path / "one", **RUN)
    one.train()
    expected = {name: value.tolist() for name, value in theta_of(one).items()}
    for process in (0, 1):
        found = json.loads((tmp_path / f"process-{process}.json").read_text())
        assert found["world"] == 2 and found["theta"] == expected
        for theirs, ours in zip(found["log"], one.state.log_history, strict=True):
            assert theirs.keys() == ours.keys()
            for name in {"loss", "reward", "reward_std", "policy/approx_kl", "policy/clip_fraction"} & ours.keys():
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
