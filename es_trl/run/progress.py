"""The progress line, and the clock of the steps."""

import math
import sys
import time

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from .results import closing_lines


class StepProgressCallback(ProgressCallback):
    """
    One line of progress: `Steps 12/200 reward 22.41 (+0.18) 41 img/s ETA 1:12:05`; the number in brackets is the
    change since the first step, of a resumed run too. Without a terminal, one such line per log. Evaluations say by
    how much they differ from the base; at the end come the lines of [`closing_lines`].
    """

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer
        self.first_reward: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        rewards = [entry["reward"] for entry in state.log_history if entry.get("reward") is not None]
        self.first_reward = rewards[0] if rewards else None
        self.current_step = state.global_step
        if state.is_world_process_zero:  # without a terminal lines instead of a bar that redraws itself
            form = "Steps {n_fmt}/{total_fmt} |{bar:20}| {desc}ETA {remaining}"
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True,
                                     bar_format=form, disable=not sys.stderr.isatty())  # fmt: skip

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        reward, speed = logs.get("reward"), logs.get("images_per_second")
        if reward is not None:
            self.first_reward = reward if self.first_reward is None else self.first_reward
            line = f"reward {reward:.4g} ({reward - self.first_reward:+.3g}) {speed or 0:.0f} img/s"
            self.training_bar.set_description_str(f"{line} ", refresh=True)
            if self.training_bar.disable:
                self.training_bar.write(f"Steps {state.global_step}/{state.max_steps} {line}")
        elif shown := {k: v for k, v in logs.items() if k.startswith("eval_") and "reward" in k}:
            base, parts = self.trainer.results.base_means, []
            for name, value in shown.items():
                change = f" ({value - base[name]:+.3g} to the base)" if name in base else ""
                score = "has no score" if math.isnan(value) else f"{value:.4g}{change}"
                parts.append(f"{name.removeprefix('eval_')} {score}")
            self.training_bar.write(f"Evaluation at step {state.global_step}: {'  '.join(parts)}")

    def on_train_end(self, args, state, control, **kwargs):
        lines = closing_lines(self.trainer)
        if self.training_bar is not None:
            for line in lines:
                self.training_bar.write(line)
        super().on_train_end(args, state, control, **kwargs)


def show_progress(trainer) -> None:
    """Our progress line in place of the Trainer's, or its plain lines where it shows none."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(StepProgressCallback(trainer))
    elif not any(isinstance(c, PrinterCallback) for c in trainer.callback_handler.callbacks):
        trainer.add_callback(PrinterCallback())


class StepClock(TrainerCallback, ExportableState):
    """
    Seconds spent in steps, without evaluations, samples and checkpoints; kept in the trainer's state, so that a
    resumed run counts on.
    """

    def __init__(self):
        self.seconds = self.started = 0.0

    def state(self) -> dict:
        """For `trainer_state.json`."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__, {})
        self.seconds = float(saved.get("attributes", {}).get("seconds", 0.0)) if state.global_step else 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
