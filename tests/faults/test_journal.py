"""journal.jsonl: every step can be replayed, and the saved adapter is what the journal gives, bit by bit."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_runs import PROMPTS, RUN, redness, toy_trainer, train
from transformers import TrainerCallback

from es_trl.cli import main
from es_trl.files import read_lines
from es_trl.pipelines import tensor_digest
from es_trl.replay import ReplayError, redraw_member, verify_run
from es_trl.run.journal import JOURNAL, decode_scores, encode_scores
from recipes.benchmarks.toy_pipeline import toy_pipeline


class Watch(TrainerCallback):
    """Stops at a step, and keeps what `redness` saw in others."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop_at


def run(folder, resume=None, stop_at=None, **options):
    trainer = train(folder, resume, callbacks=[Watch(stop_at)], **options)
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Six steps; all pictures that were scored, by step and member."""
    folder, seen = tmp_path_factory.mktemp("recorded"), {}

    def keeping(images, trainer_state=None, **_):
        if trainer_state is not None:
            seen.setdefault(trainer_state.global_step, []).extend(image.copy() for image in images)
        return redness(images)

    trainer = toy_trainer(folder, keeping)
    trainer.train()
    trainer.save_model()
    return folder, seen


VARIANTS = {
    "mean": {},
    "sgd, momentum": {"update": "optimizer", "learning_rate": 0.5, "optim_args": "momentum=0.9", "noise_reuse": 2,
                      "max_grad_norm": 0.1},
    "adamw, cosine, warmup": {"update": "optimizer",
                              "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
                              "warmup_steps": 2, "es_space": "lora", "weight_decay": 0.1},
    "accumulation over a short epoch": {"gradient_accumulation_steps": 2, "train_dataset": PROMPTS, "max_steps": 5,
                                        "images_per_prompt": 2},
    "pairs, two rewards, slopes": {"antithetic": True, "reward_weights": [1.0, -0.5], "es_space": "weight",
                                   "reward_funcs": [redness, "jpeg_compressibility"],
                                   "slope_reward_funcs": ["jpeg_incompressibility"]},
    "epochs, seed of the data": {"max_steps": -1, "num_train_epochs": 2, "data_seed": 7,
                                 "es_space": "lora_b", "fitness_shaping": "centered_rank", "save_steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_the_adapter_follows_from_the_journal(tmp_path, name):
    trainer = run(tmp_path, **VARIANTS[name])
    result = verify_run(tmp_path, toy_pipeline)
    assert result.proven and result.steps == trainer.state.global_step
    assert {"pytorch_lora_weights.safetensors", f"checkpoint-{result.steps}"} <= result.matches.keys()
    assert result.digest == tensor_digest(trainer.adapter.lora_state_dict())


def test_a_resumed_run_has_the_journal_of_an_uninterrupted_one(tmp_path, recorded):
    """Stopped at 5, resumed at 4: the lines of step 4 are cut and written anew. Then with another sigma."""
    run(tmp_path, stop_at=5)
    assert [e["step"] for e in read_lines(tmp_path / JOURNAL) if "step" in e] == [0, 1, 2, 3, 4]
    run(tmp_path, "latest", stop_at=5)
    assert [e.get("start", e.get("step")) for e in read_lines(tmp_path / JOURNAL)] == [0, 0, 1, 2, 3, 4, 4]
    assert verify_run(tmp_path, toy_pipeline).proven
    run(tmp_path, "latest", sigma=0.03, population_size=4)
    result = verify_run(tmp_path, toy_pipeline)
    assert result.proven and result.steps == 6


def test_the_best_adapter_is_found_among_the_steps(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": PROMPTS[:2],
               "metric_for_best_model": "eval_reward", "greater_is_better": False}  # fmt: skip
    trainer = run(tmp_path, **options)
    assert trainer.state.best_global_step < 6
    result = verify_run(tmp_path, toy_pipeline)
    assert result.proven and result.digest != tensor_digest(trainer.adapter.lora_state_dict())


def copy(recorded, tmp_path):
    return shutil.copytree(recorded[0], tmp_path / "run")


def change_line(folder, step, change):
    lines = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    change(next(line for line in lines if line.get("step") == step))
    (folder / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_another_adapter_or_another_score_is_seen(tmp_path, recorded, capsys):
    folder = copy(recorded, tmp_path)
    path = folder / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-7
    save_file(tensors, path)
    result = verify_run(folder, toy_pipeline)
    assert not result.proven and result.matches == {"checkpoint-4": True, "checkpoint-6": True, path.name: False}

    def one_score(line):
        scores = decode_scores(line["shape"], line["scores"])
        scores[2, 1, 0] += 1e-3
        line["scores"] = encode_scores(scores)

    change_line(folder, 2, one_score)
    with pytest.raises(ReplayError, match="the adapter before step 3 is .* in the journal: a line was changed"):
        verify_run(folder, toy_pipeline)


def test_a_torn_last_line_is_passed_over(tmp_path, recorded):
    folder = copy(recorded, tmp_path)
    whole = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(whole[:-40])
    (folder / "pytorch_lora_weights.safetensors").unlink()
    assert verify_run(folder, toy_pipeline).steps == 5


@pytest.mark.parametrize("member", [0, 3, 5])
def test_any_member_is_drawn_again(recorded, member):
    folder, seen = recorded
    images, prompts, scores = redraw_member(folder, 4, member, model=toy_pipeline)
    assert len(prompts) == 2 and scores.shape == (2, 1)
    for image, drawn in zip(images, seen[4][2 * member : 2 * member + 2], strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(drawn))
    assert scores[:, 0].tolist() == redness(images)


def test_commands(tmp_path, recorded, capsys, monkeypatch):
    folder = copy(recorded, tmp_path)
    monkeypatch.setattr("es_trl.trainer.inputs.load_pipeline", lambda name, *_, **__: {"toy": toy_pipeline}[name]())
    assert main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "checkpoint-6: the same bits" in out
    assert f"6 steps replayed, LoRA sha256 {verify_run(folder).digest}" in out
    assert main(["show", str(folder), "--step", "2", "--member", "5"]) == 0
    path = capsys.readouterr().out.strip().splitlines()[-1]
    assert path == str(folder / "samples" / "member-000002-0005.png")
    assert Image.open(path).size[0] > 100
    for arguments, message in (
        (["show", str(folder), "--step", "2", "--member", "6"], "member 6 does not exist: step 2 had 0 to 5"),
        (["show", str(folder), "--step", "6", "--member", "0"], "no line of step 6"),
        (["show", str(folder), "--step", "9", "--member", "0"], "ends with step 5"),
        (["verify", str(tmp_path)], "there is no journal.jsonl"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"es-trl {arguments[0]}: ") and message in error
    (folder / "pytorch_lora_weights.safetensors").unlink()
    shutil.rmtree(folder / "checkpoint-6")
    shutil.rmtree(folder / "checkpoint-4")
    assert main(["verify", str(folder)]) == 1


BROKEN = {
    "scores of another shape": lambda line: line.update(shape=[1, 1, 1], scores=encode_scores(torch.zeros(1, 1, 1))),
    "scores that are no base64": lambda line: line.update(scores="&&&"),
    "a shape that does not fit": lambda line: line.update(shape=[6, 2, 2]),
    "no scores": lambda line: line.pop("scores"),
    "no step": lambda line: line.pop("step"),
    "another theta": lambda line: line.update(theta="0" * 64),
    "left out": lambda line: line.update(step=1),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_line_is_an_error_with_its_step(tmp_path, recorded, kind):
    folder = copy(recorded, tmp_path)
    change_line(folder, 3, BROKEN[kind])
    with pytest.raises(ReplayError, match="step"):
        verify_run(folder, toy_pipeline)


def test_what_a_journal_cannot_hold_is_said(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=1)
    optimizer = torch.optim.SGD(trainer.adapter.theta.values(), lr=0.1)
    del trainer
    options = {"max_steps": 1, "optimizers": (optimizer, None)}
    with pytest.raises(ValueError, match='optimizers does not act with update="mean"'):
        toy_trainer(tmp_path, **options)
    toy_trainer(tmp_path, update="optimizer", learning_rate=0.1, **options).train()
    with pytest.raises(ReplayError, match="an optimizer object of its own"):
        verify_run(tmp_path, toy_pipeline)
    assert RUN["max_steps"] == 6


def test_the_last_sheet_says_whose_pictures_it_shows(tmp_path):
    """With `load_best_model_at_end` the adapter of an earlier step draws it."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": PROMPTS[:2],
               "metric_for_best_model": "eval_reward", "greater_is_better": False, "sample_steps": 4}  # fmt: skip
    trainer = train(tmp_path, **options)
    last = [json.loads(line) for line in (tmp_path / "samples" / "metadata.jsonl").read_text().splitlines()][-1]
    assert (last["file_name"], last["adapter_of_step"]) == ("step-000006.jpg", trainer.state.best_global_step)
