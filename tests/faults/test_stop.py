"""SIGTERM and Ctrl-C (F7, F8): a run stops between two micro-batches, saves, and ends with the signal's exit code."""

import os
import signal
import threading
import time

import pytest
from forks import fork, wait
from tiny_policies import tiny_policy
from tiny_runs import same, theta_of
from toy_runs import history, redness, toy_trainer, train

from es_trl.cli import main
from es_trl.run import TrainingStopped
from es_trl.run.checkpoint import verify_checkpoint


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), logging_steps=2)


def signalling(step, signum, call=2):
    """`redness`, which in one of the three micro-batches of a step sends this process a signal."""
    calls = []

    def reward(images, trainer_state=None, **_):
        calls.append((trainer_state.global_step, len(images)))
        if [s for s, _ in calls].count(step) == call and calls[-1][0] == step:
            os.kill(os.getpid(), signum)
        return redness(images)

    reward.__name__ = "redness"
    return reward, calls


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_signal_stops_after_the_micro_batch_and_the_run_goes_on_later(tmp_path, uninterrupted, signum, code, step):
    before = signal.getsignal(signum)
    reward, calls = signalling(step, signum)
    trainer = toy_trainer(tmp_path, reward, logging_steps=2)
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert stopped.value.code == code
    assert signal.getsignal(signum) is before
    assert trainer.state.global_step == step and calls.count((step, 4)) == 2, "two of three micro-batches were drawn"
    verify_checkpoint(tmp_path / f"checkpoint-{step}")

    resumed = train(tmp_path, "latest", logging_steps=2)
    assert same(theta_of(resumed), theta_of(uninterrupted)) and history(resumed) == history(uninterrupted)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "prompts_per_step": 1}], ids=["", "micro"])
def test_the_same_trainer_goes_on_in_the_same_process(tmp_path, options):
    """As in a notebook: the step that Ctrl-C cut short is drawn again from its own noise."""
    whole = train(tmp_path / "whole", **options)
    trainer = toy_trainer(tmp_path / "run", signalling(3, signal.SIGINT)[0], **options)
    with pytest.raises(TrainingStopped):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert same(theta_of(trainer), theta_of(whole))


def test_a_signal_between_steps_and_in_the_last_one(tmp_path):
    """Sent while a checkpoint is written: that one is finished and no further step begins."""
    trainer = toy_trainer(tmp_path)
    write = trainer.adapter.save_lora

    def interrupted(directory):
        os.kill(os.getpid(), signal.SIGTERM)
        write(directory)

    trainer.adapter.save_lora = interrupted
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert trainer.state.global_step == 2
    verify_checkpoint(tmp_path / "checkpoint-2")
    trainer = toy_trainer(tmp_path)
    trainer.adapter.save_lora = lambda directory: interrupted(directory) if trainer.state.global_step == 6 else None
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert trainer.state.global_step == 6


def test_a_handler_of_the_programs_own_is_called_too(tmp_path):
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append(1))
    try:
        with pytest.raises(TrainingStopped):
            train(tmp_path, reward_funcs=signalling(0, signal.SIGTERM)[0])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [1]


def test_training_outside_the_main_thread_leaves_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    steps = []
    thread = threading.Thread(target=lambda: steps.append(train(tmp_path, max_steps=1).state.global_step))
    thread.start()
    thread.join()
    assert steps == [1] and signal.getsignal(signal.SIGTERM) is before


def killed_twice(folder, signum):
    def slow(images, trainer_state, **_):
        if trainer_state.global_step == 3:
            os.kill(os.getpid(), signum)
            time.sleep(0.05)
            os.kill(os.getpid(), signum)
            time.sleep(100)
        return redness(images)

    train(folder, reward_funcs=slow)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_second_signal_ends_at_once(tmp_path, signum):
    """Both during one micro-batch that would take minutes; nothing half-written is left that a resume would take."""
    pid = fork(killed_twice, tmp_path, signum, output=tmp_path / "output.log")
    code, output = wait(pid), (tmp_path / "output.log").read_text()
    assert "a second signal ends the run at once" in output
    if signum == signal.SIGTERM:
        assert code == -signal.SIGTERM
    else:
        assert code == 1 and "KeyboardInterrupt" in output  # Python turns it into the signal's exit at the top
    assert sorted(name for name in os.listdir(tmp_path) if "checkpoint" in name) == ["checkpoint-2"]


def test_the_command_line_stops_and_goes_on(tmp_path):
    """`es-trl train` on the shipped model; its second call says `--resume_from_checkpoint latest`."""
    (tmp_path / "reward.py").write_text(
        "import os, signal\n"
        "def reward(images, trainer_state=None, **_):\n"
        "    if trainer_state.global_step == 1 and not os.path.exists(__file__ + '.sent'):\n"
        "        open(__file__ + '.sent', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [float(image.getpixel((0, 0))[0]) for image in images]\n"
    )
    arguments = (
        f"train --model_name_or_path tiny-sana-sprint --reward_funcs {tmp_path}/reward.py:reward "
        f"--dataset_name tiny-train --output_dir {tmp_path}/run --max_steps 3 --population_size 2 "
        "--prompts_per_step 1 --sample_steps 0 "
        "--report_to none --disable_tqdm true --use_cpu true --guidance_scale 2 --max_sequence_length 16"
    ).split()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 143
    verify_checkpoint(tmp_path / "run" / "checkpoint-2")  # the step had one micro-batch only
    assert main([*arguments, "--resume_from_checkpoint", "latest"]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0


POLICY = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2, "num_generations": 2}


@pytest.fixture(scope="module")
def uninterrupted_policy(tmp_path_factory):
    trainer = tiny_policy(tmp_path_factory.mktemp("policy"), **POLICY)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("at", "step"), [("_draw", 1), ("_update_now", 1)], ids=["rollout", "between updates"])
def test_other_methods_stop_and_go_on_too(tmp_path, uninterrupted_policy, at, step):
    """GRPO with two updates a step; SIGTERM in a step while it draws, or between the updates, which it then makes."""
    trainer = tiny_policy(tmp_path, **POLICY)
    method = getattr(trainer, at)

    def interrupted(*args):
        if trainer.state.global_step == (1 if at == "_draw" else 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return method(*args)

    setattr(trainer, at, interrupted)
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert trainer.state.global_step == step
    verify_checkpoint(tmp_path / f"checkpoint-{step}")
    resumed = tiny_policy(tmp_path, **POLICY)
    resumed.train(resume_from_checkpoint="latest")
    assert same(theta_of(resumed), theta_of(uninterrupted_policy))
