"""Processor time of training steps: evaluations, and what other processes of the machine do, do not enter."""

import time

from transformers import TrainerCallback


class ProcessorClock(TrainerCallback):
    """
    Attributes:
        seconds (`float`): Of all steps.
        last (`float`): Of the last one.
    """

    def __init__(self):
        self.seconds = self.last = self._started = 0.0

    def on_step_begin(self, *args, **kwargs):
        self._started = time.process_time()

    def on_step_end(self, *args, **kwargs):
        self.last = time.process_time() - self._started
        self.seconds += self.last
