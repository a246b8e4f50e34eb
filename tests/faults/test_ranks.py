"""Several processes (F7, F9, F11): the same bits for any number of them, and none waits for one that is dead.

The ranks are forks that form a gloo group on this machine; NCCL and several machines are not tested here.
"""

import json
import os
import signal
import time

import pytest
from forks import ranks
from safetensors.torch import load_file
from tiny_runs import same, theta_of
from toy_runs import PROMPTS, history, redness, toy_trainer, train
from transformers import TrainerCallback

from es_trl.files import read_lines
from es_trl.run.checkpoint import last_checkpoint, verify_checkpoint
from es_trl.run.journal import JOURNAL


OPTIONS = {"max_steps": 6, "population_size": 10, "gradient_accumulation_steps": 2, "prompts_per_step": 1}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), **OPTIONS)


def rank() -> int:
    return int(os.environ["RANK"])


def run(folder, stop_at=None, options=OPTIONS):
    trainer = toy_trainer(folder, **options)
    if stop_at is not None:
        scores = trainer.rollout.scores

        def stopping(batch, factors, step, *args, **context):
            if step == stop_at and rank() == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return scores(batch, factors, step, *args, **context)

        trainer.rollout.scores = stopping
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model()
    logged = [entry for entry in trainer.state.log_history if "es/comm_bytes" in entry]
    with open(f"{folder}/result-{rank()}.json", "w") as file:
        sums = {name: value.tolist() for name, value in theta_of(trainer).items()}
        json.dump({"theta": sums, "bytes": [entry["es/comm_bytes"] for entry in logged]}, file)


def ended_like(folder, processes, alone):
    expected = {name: value.tolist() for name, value in theta_of(alone).items()}
    results = [json.loads((folder / f"result-{r}.json").read_text()) for r in range(processes)]
    ours = [e for e in read_lines(os.path.join(alone.args.output_dir, JOURNAL)) if "step" in e]
    theirs = [e for e in read_lines(folder / JOURNAL) if "step" in e]
    return all(result["theta"] == expected for result in results) and ours == theirs


def test_f9_two_then_one_then_three_processes(tmp_path, alone):
    """The first two stop by a SIGTERM that only rank 0 gets (F7): both end with 143, at the same step."""
    codes, outputs = ranks(2, run, tmp_path, 2, folder=tmp_path)
    assert codes == [143, 143], outputs
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    codes, outputs = ranks(1, run, tmp_path, 5, folder=tmp_path)
    assert codes == [143] and "Resuming on 1 processes what 2 began: same numbers" in outputs[0]
    verify_checkpoint(tmp_path / "checkpoint-5")
    codes, outputs = ranks(3, run, tmp_path, folder=tmp_path)
    assert codes == [0, 0, 0], outputs
    assert ended_like(tmp_path, 3, alone)


def test_three_processes_send_scores_and_nothing_else(tmp_path, alone):
    """Bytes per step: what the state of each process and its table of scores take, whatever the LoRA's size."""
    bytes_sent = []
    for name, lora_rank, space in (("small", 2, "lora_xs"), ("large", 12, "lora")):
        folder = tmp_path / name
        folder.mkdir()
        options = OPTIONS | {"lora_rank": lora_rank, "es_space": space, "max_steps": 2}
        codes, outputs = ranks(3, run, folder, None, options, folder=folder)
        assert codes == [0, 0, 0], outputs
        bytes_sent.append(json.loads((folder / "result-0.json").read_text())["bytes"])
        assert (folder / "pytorch_lora_weights.safetensors").stat().st_size > 500
    # How it fared (8 bytes) and 10 members x 1 prompt x 1 reward of fp64, for each of the prompt batches of a step
    assert bytes_sent[0] == bytes_sent[1] == [8 + 10 * 8] * 2


def test_two_processes_that_keep_nothing(tmp_path):
    options = OPTIONS | {"save_strategy": "no", "max_steps": 1}
    codes, outputs = ranks(2, run, tmp_path, None, options, folder=tmp_path)
    assert codes == [0, 0], outputs


def test_a_checkpoint_of_three_processes_loads_alone(tmp_path, alone):
    assert ranks(3, run, tmp_path, 4, folder=tmp_path)[0] == [143] * 3
    resumed = train(tmp_path, "latest", **OPTIONS)
    assert same(theta_of(resumed), theta_of(alone))
    # The Trainer averages the loss over processes, and (a + a + a) / 3 rounds.
    logs = [[{k: v for k, v in entry.items() if k != "loss"} for entry in history(t)] for t in (resumed, alone)]
    assert logs[0] == logs[1]


def befalls(how):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        time.sleep(4)
    if how == "raises":
        raise OSError("the server is gone")


def failing(folder, how, rank_to_fail, timeout, **options):
    """`how` befalls one rank in step 1."""

    def reward(images, trainer_state=None, **_):
        if trainer_state is not None and trainer_state.global_step == 1 and rank() == rank_to_fail:
            befalls(how)
        return redness(images)

    toy_trainer(folder, reward, **(OPTIONS | {"ddp_timeout": timeout, "save_steps": 1} | options)).train()


def failing_in_an_evaluation(folder, how, rank_to_fail, timeout):
    """In the first one, in a reward that is measured only there."""

    def measured(images, **_):
        if rank() == rank_to_fail:
            befalls(how)
        return redness(images)

    options = {
        "eval_reward_funcs": [measured],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": PROMPTS,
        "save_steps": 1,
    }
    toy_trainer(folder, redness, **(OPTIONS | {"ddp_timeout": timeout} | options)).train()


def failing_between_steps(folder, rank_to_fail):
    """In a callback of one rank, where no work is shared."""

    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and rank() == rank_to_fail:
                raise OSError("the tracker is gone")

    toy_trainer(folder, callbacks=[Broken()], **(OPTIONS | {"logging_steps": 3})).train()


def test_f11_an_error_in_one_process_ends_all_and_is_quoted(tmp_path):
    started = time.monotonic()
    codes, outputs = ranks(3, failing, tmp_path, "raises", 1, 600, folder=tmp_path)
    assert codes == [1, 1, 1] and time.monotonic() - started < 60
    for output in (outputs[0], outputs[2]):
        assert "Process 1 failed at step 1: RuntimeError: reward function 'reward' failed" in output
        assert "the server is gone" in output


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_f11_a_process_that_does_not_come_is_named(tmp_path, how):
    codes, outputs = ranks(3, failing, tmp_path, how, 2, 3, folder=tmp_path)
    assert codes[:2] == [1, 1] and codes[2] != 0
    assert "Process 0 waited for the others at step 1" in outputs[0] and "ddp_timeout=3 s" in outputs[0]
    assert "2" in outputs[0].split("gloo says:")[1].splitlines()[0]
    verify_checkpoint(tmp_path / "checkpoint-1")
    assert load_file(tmp_path / "checkpoint-1" / "pytorch_lora_weights.safetensors")


def test_f17_a_reward_that_hangs_in_one_process_ends_all(tmp_path):
    """Long before the others would have given up waiting."""
    started = time.monotonic()
    options = {"reward_timeout": 1.0}
    codes, outputs = ranks(2, lambda: failing(tmp_path, "hangs", 1, 600, **options), folder=tmp_path)
    assert codes == [1, 1] and time.monotonic() - started < 60
    assert "Process 1 failed at step 1: RuntimeError: reward function 'reward' failed at step 1" in outputs[0]
    assert "no result within reward_timeout=1 s" in outputs[0]


def test_f11_an_error_in_an_evaluation_ends_all_and_is_quoted(tmp_path):
    """Which the others may have finished their shares of."""
    started = time.monotonic()
    codes, outputs = ranks(3, failing_in_an_evaluation, tmp_path, "raises", 1, 600, folder=tmp_path)
    assert codes == [1, 1, 1] and time.monotonic() - started < 60
    for output in (outputs[0], outputs[2]):
        assert "Process 1 failed at the evaluation at step 1: RuntimeError: reward function 'measured'" in output
        assert "the server is gone" in output


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_f11_a_process_that_does_not_come_to_an_evaluation_is_named(tmp_path, how):
    codes, outputs = ranks(3, failing_in_an_evaluation, tmp_path, how, 2, 3, folder=tmp_path)
    assert codes[:2] == [1, 1] and codes[2] != 0
    assert "Process 0 waited for the others at an evaluation" in outputs[0] and "ddp_timeout=3 s" in outputs[0]
    assert "2" in outputs[0].split("gloo says:")[1].splitlines()[0]


def test_f11_an_error_between_two_steps_is_quoted_too(tmp_path):
    started = time.monotonic()
    codes, outputs = ranks(2, failing_between_steps, tmp_path, 0, folder=tmp_path)
    assert codes == [1, 1] and time.monotonic() - started < 60
    assert "Process 0 failed at step 2: OSError: the tracker is gone" in outputs[1]
