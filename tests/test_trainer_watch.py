"""What an ES run sees along its way: margins, slopes, and the turn at which it goes back and restarts or stops."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import PROMPTS, WHOLE, redness, same, theta_of, tiny_trainer
from transformers import TrainerCallback

from es_trl import ESTrainer, RewardSet
from es_trl.replay import verify_run
from es_trl.rewards import Margin
from es_trl.run.settings import run_config
from es_trl.trainer import es
from es_trl.trainer.watch import Scored


POPULATION = {"population_size": 64, "prompts_per_step": 4, "prompts_per_member": 1, "members_per_forward": 32,
              "guidance_scale": 2.0, "lora_rank": 4,
              "lora_target_modules": ["attn1.to_v", "attn1.to_out.0"], "sigma": 0.25}  # fmt: skip


def pictures(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


def test_the_margin_is_the_score_minus_the_mean_under_the_other_prompts():
    images, prompts = pictures(3), [PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    rewards = RewardSet(["tiny-pickscore", "margin:tiny-pickscore"])
    assert rewards.names == ["tiny-pickscore", "tiny-pickscore_margin"]
    found = rewards(prompts=prompts, images=images, step_prompts=PROMPTS + PROMPTS)
    one = RewardSet("tiny-pickscore")
    for i, prompt in enumerate(prompts):
        under = {other: one(prompts=[other], images=[images[i]])[0, 0] for other in PROMPTS}
        own = under.pop(prompt)
        assert found[i, 1] == pytest.approx(own - np.mean(list(under.values())), abs=1e-4)


def test_one_prompt_alone_has_no_margin():
    found = RewardSet("margin:tiny-pickscore")(prompts=PROMPTS[:1] * 2, images=pictures(2))
    assert np.isnan(found).all()


def test_a_reward_without_a_margin_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="redness_margin: the reward has no method across"):
        Margin(redness)
    with pytest.raises(ValueError, match="jpeg_compressibility_margin: the reward has no method across"):
        tiny_trainer(tmp_path, guard_reward_funcs=["jpeg_compressibility"])


def test_a_scorer_of_ones_own_has_a_margin():
    class Mine:
        def __call__(self, prompts, images, **_):
            return [float(len(prompt)) for prompt in prompts]

        def across(self, prompts, images):
            return torch.tensor([[float(len(prompt)) for prompt in prompts]] * len(images))

    margin = Margin(Mine(), "mine_margin")
    assert margin(prompts=["aaa"], images=pictures(1), step_prompts=["a", "aaa", "aaaaa"]) == [0.0]


def test_a_margin_can_be_trained_by_every_method(tmp_path):
    from tiny_policies import tiny_policy

    trainer = tiny_policy(tmp_path, "grpo", reward_funcs="margin:tiny-pickscore", max_steps=1)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["rewards/tiny-pickscore_margin/mean"])


def test_slopes_of_everything_that_is_scored_are_logged(tmp_path):
    trainer = tiny_trainer(
        tmp_path, ["tiny-pickscore", redness], reward_weights=[1.0, 0.1], slope_reward_funcs=["jpeg_compressibility"],
        max_steps=2, **POPULATION,
    )  # fmt: skip
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "reward" in entry]
    names = {"tiny-pickscore", "redness", "tiny-pickscore_margin", "jpeg_compressibility", "reward", "margin"}
    assert not any(key.startswith("es/slope") for key in first), "before the first step there is no direction"
    assert {key.removeprefix("es/slope/") for key in second if key.startswith("es/slope/")} == names
    for name in names:
        assert abs(second[f"es/slope/{name}"]) <= 1 and 0 < second[f"es/slope_error/{name}"] < 1
    assert second["es/slope/margin"] == second["es/slope/tiny-pickscore_margin"]
    kinds = [key for key in second if key.startswith("es/energy/")]
    assert sum(second[key] for key in kinds) == pytest.approx(second["es/signal"])
    assert "es/energy/attn1.to_out" in kinds
    assert first["rewards/tiny-pickscore/mean"] + 0.1 * first["rewards/redness/mean"] == pytest.approx(first["reward"])


def small_pictures_guarded(folder, **options):
    options = {"travel": 3.0, "max_steps": 6, "save_strategy": "steps", "save_steps": 1} | POPULATION | WHOLE | options
    options |= {"population_size": 128, "guard_reward_funcs": ["tiny-pickscore"]}
    return tiny_trainer(folder, "jpeg_compressibility", **options)


def test_a_guard_ends_a_run_that_empties_the_pictures_and_keeps_the_base(tmp_path):
    trainer = small_pictures_guarded(tmp_path)
    start = theta_of(trainer)
    trainer.train()
    assert trainer.watch.stopped and trainer.state.global_step < 6
    assert same(theta_of(trainer), start), "the guard fell from the first step on"
    entry = [entry for entry in trainer.state.log_history if "es/slope/guard" in entry][0]
    assert entry["es/slope/guard"] < -2 * entry["es/slope_error/guard"]
    trainer.save_model()
    assert verify_run(tmp_path).proven


def test_without_a_guard_it_goes_on(tmp_path):
    trainer = small_pictures_guarded(tmp_path, when_margin_turns="ignore", max_steps=3, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 3


RESTART = {
    "travel": 1.0,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 9,
} | POPULATION
RESTART |= {"reward_funcs": redness, "prompts_per_step": 1, "population_size": 64, "lora_rank": 2, **WHOLE}


def turning_trainer(folder, monkeypatch, rising_steps, **options):
    """Redness is trained, and its margin is redness for some steps and minus half of it from then on."""

    def margin(images, trainer_state, **_):
        sign = 1.0 if trainer_state.global_step < rising_steps else -0.5
        return [sign * value for value in redness(images)]

    scored = Scored(RewardSet([redness, margin], [1.0, 0.0]), 1, {0: 1})
    monkeypatch.setattr(ESTrainer, "_scored", lambda self: scored)
    trainer = tiny_trainer(folder, **(RESTART | options))
    monkeypatch.undo()
    return trainer


def test_a_second_turn_ends_the_run(tmp_path, monkeypatch):
    trainer = turning_trainer(tmp_path, monkeypatch, rising_steps=2, reward_funcs=redness, max_steps=20)
    trainer.train()
    state = trainer.watch.optimizer.param_groups[0]["watch"]
    assert trainer.watch.stopped and state["turns"] == 2 and trainer.state.global_step < 20


@pytest.mark.parametrize(("when", "turns"), [("stop", 1), ("ignore", 0)])
def test_it_may_stop_or_be_ignored(tmp_path, monkeypatch, when, turns):
    trainer = turning_trainer(tmp_path, monkeypatch, rising_steps=2, when_margin_turns=when, save_strategy="no")
    trainer.train()
    assert trainer.watch.optimizer.param_groups[0]["watch"]["turns"] == turns
    assert (trainer.state.global_step < 6) == (when == "stop") == trainer.watch.stopped


class ThetaByStep(TrainerCallback):
    def __init__(self):
        self.theta, self.members = {}, {}

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        self.theta[state.global_step] = {
            name.replace("/", "."): value.detach().clone() for name, value in model.named_parameters()
        }
        self.members[state.global_step] = optimizer.param_groups[0].get("members")


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """A run that turned at step 3, with a checkpoint of every step, what it kept by step, and what it said."""
    with pytest.MonkeyPatch.context() as patch:
        trainer = turning_trainer(tmp_path_factory.mktemp("whole"), patch, rising_steps=3)
        trainer.kept, trainer.said = ThetaByStep(), []
        trainer.add_callback(trainer.kept)
        patch.setattr(es.logger, "warning", lambda text, *args: trainer.said.append(text % args))
        trainer.train()
    assert trainer.watch.optimizer.param_groups[0]["watch"]["turns"] == 1
    return trainer


def test_at_the_turn_theta_goes_back_to_the_maximum_and_the_margin_is_trained_too(turned):
    entries = [entry for entry in turned.state.log_history if "reward" in entry]
    assert [np.sign(entry["es/slope/margin"]) for entry in entries[1:4]] == [1, 1, -1]
    (text,) = [message for message in turned.said if "the margin has surely fallen since its maximum" in message]
    assert text.startswith("Step 3: ") and "reward + margin" in text
    kept = turned.kept
    assert same(kept.theta[4], kept.theta[2]), "the margin rose until the members of step 2, which stood on this theta"
    columns, weights = turned.watch.objective()
    assert columns == [0, 1] and weights.tolist() == [1.0, 1.0] and turned.watch.restarted
    assert kept.members[4] == 0 < kept.members[3]
    turned.save_model()
    assert verify_run(turned.args.output_dir).proven


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_turns_where_the_uninterrupted_one_did(tmp_path, monkeypatch, turned, step):
    """Before, at and after the turn: its maximum, the sum and the objective are in the checkpoint."""
    later = [f"checkpoint-{n}" for n in range(step + 1, 7)]
    folder = shutil.copytree(turned.args.output_dir, tmp_path / "run", ignore=shutil.ignore_patterns(*later))
    resumed = turning_trainer(folder, monkeypatch, rising_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.watch.optimizer.param_groups[0]["watch"]["turns"] == 1
    assert same(theta_of(resumed), theta_of(turned))


def test_sigma_is_found_by_the_change_of_the_output(tmp_path):
    from es_trl.pipelines.output_change import output_change

    sigmas = {}
    for space in ("lora_xs", "weight"):
        options = {"es_space": space, "num_inference_steps": 1, "train_dataset": PROMPTS[:2]}
        trainer = tiny_trainer(tmp_path, sigma=None, output_change=0.1, max_steps=1, **options)
        trainer.train()
        sigmas[space] = trainer.sigma
        again = tiny_trainer(tmp_path, **options)
        again.prepare_prompts(PROMPTS[:2])
        change = output_change(again.adapter, PROMPTS[:2], again.noise, 0)
        assert change(trainer.sigma) == pytest.approx(0.1, rel=0.1)
        assert run_config(trainer)["sigma"] == trainer.sigma
        assert trainer.state.log_history[0]["es/sigma"] == pytest.approx(trainer.sigma)
    assert sigmas["lora_xs"] != sigmas["weight"]


def test_a_perturbation_that_changes_nothing_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, sigma=None, max_steps=1)
    for layer in trainer.adapter.space.layers.values():
        layer.forward = layer.get_base_layer().forward
    with pytest.raises(ValueError, match="does not change at all: the layers with LoRA are never called"):
        trainer.train()


def test_defaults_train_without_any_other_setting(tmp_path):
    """Two settings that are about the machine, and few images; everything else is found."""
    from es_trl import ESConfig, ESTrainer

    config = ESConfig(output_dir=str(tmp_path), max_steps=2, population_size=16, use_cpu=True, report_to="none")
    trainer = ESTrainer("tiny-sana-sprint", "tiny-pickscore", config, PROMPTS[:3])
    assert trainer.args.prompts_per_step == 2 and trainer.population.groups == 2, "there are three prompts only"
    trainer.train()
    assert trainer.state.global_step == 2 and 0.01 < trainer.sigma < 1
