"""The progress line, and the clock of the steps."""

import sys
import time

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class StepProgressCallback(ProgressCallback):
    """
    One line of progress: `Steps 12/200 reward 22.41 (+0.18) 41 img/s ETA 1:12:05`; the number in brackets is the
    change since the first step. Without a terminal, one such line per log.
    """

    def __init__(self):
        super().__init__()
        self.first_reward: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Steps")
            self.training_bar.bar_format = "{desc} {n_fmt}/{total_fmt} |{bar:20}|{postfix} ETA {remaining}"
            self.training_bar.disable = not sys.stderr.isatty()  # lines instead of a bar that redraws itself

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        reward, speed = logs.get("reward"), logs.get("images_per_second")
        if reward is not None:
            self.first_reward = reward if self.first_reward is None else self.first_reward
            line = f"reward {reward:.4g} ({reward - self.first_reward:+.3g}) {speed or 0:.0f} img/s"
            self.training_bar.set_postfix_str(line, refresh=True)
            if self.training_bar.disable:
                self.training_bar.write(f"Steps {state.global_step}/{state.max_steps} {line}")
        elif any(key.startswith("eval_") and "reward" in key for key in logs):
            shown = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_") and "reward" in k}
            text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.training_bar.write(f"Evaluation at step {state.global_step}: {text}")


class StepClock(TrainerCallback):
    """Seconds spent in steps, without evaluations, samples and checkpoints; a resumed run counts on."""

    def __init__(self):
        self.seconds, self.started = 0.0, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds = max((entry.get("train_time", 0.0) for entry in state.log_history), default=0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.started
