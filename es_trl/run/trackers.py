"""Pictures and histograms for the trackers that the Trainer reports to; scalars go through its own callbacks."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..hub import md_escape
from ..hub.tables import table
from ..pictures import rgb


logger = logging.getLogger(__name__)

TRACKERS = (TensorBoardCallback, TrackioCallback, WandbCallback)  # that take pictures


def check_trackers(report_to: Sequence[str]) -> None:
    """Raises `ValueError` for a tracker that is unknown or not installed; the Trainer finds out after the model."""
    here = get_available_reporting_integrations()
    for name in report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to={name!r} is unknown: use {', '.join(sorted(INTEGRATION_TO_CALLBACK))} or none."
            )
        if name not in here and name != "flyte":  # which transformers does not look for
            raise ValueError(f"report_to={name!r} is not installed: pip install {name}, or set report_to='none'.")


def has_tracker(trainer: Trainer) -> bool:
    """Whether this process reports to a tracker that takes pictures."""
    return trainer.is_world_process_zero() and any(isinstance(c, TRACKERS) for c in trainer.callback_handler.callbacks)


def tracker_urls(trainer: Trainer) -> dict[str, str]:
    """The pages of this run on the trackers that have one: wandb when it is online, trackio in a Space."""
    urls = {}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, WandbCallback) and callback._wandb is not None and callback._wandb.run is not None:
            urls["Weights & Biases"] = callback._wandb.run.url
        elif isinstance(callback, TrackioCallback):
            space = callback._static_space_id or callback._space_id
            urls["Trackio"] = f"https://huggingface.co/spaces/{space}" if space else None
    return {name: url for name, url in urls.items() if url}


def log_media(
    trainer: Trainer,
    images: dict[str, tuple[Image.Image, str]],
    histograms: dict[str, Sequence[float]] | None = None,
    step: int | None = None,
) -> None:
    """
    Sends pictures (with their captions, by name) and histograms of finite values to every tracker of `trainer`, as
    those of `step`, by default the last finished one.
    """
    histograms = histograms or {}
    step = trainer.state.global_step if step is None else step

    def send(callback) -> None:
        if isinstance(callback, TensorBoardCallback):
            for name, (image, _) in images.items():
                callback.tb_writer.add_image(name, np.asarray(rgb(image)), step, dataformats="HWC")
            for name, values in histograms.items():
                callback.tb_writer.add_histogram(name, np.asarray(values), step)
            return
        tracker = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
        data = {name: tracker.Image(image, caption=caption) for name, (image, caption) in images.items()}
        data |= {name: tracker.Histogram(list(values)) for name, values in histograms.items()}
        # The Trainer's own wandb axis; trackio has steps of its own and takes them as an argument.
        if isinstance(callback, WandbCallback):
            tracker.log(data | {"train/global_step": step})
        else:
            tracker.log(data, step=step)

    _to_all(trainer, f"Pictures of step {step}", send)


def send_alert(trainer: Trainer, title: str, text: str) -> None:
    """An alert on those trackers of `trainer` that have alerts: wandb and trackio."""

    def send(callback) -> None:
        if isinstance(callback, WandbCallback) and callback._wandb is not None and callback._wandb.run is not None:
            callback._wandb.run.alert(title=title, text=text, level="WARN")
        elif isinstance(callback, TrackioCallback) and hasattr(callback._trackio, "alert"):
            callback._trackio.alert(title=title, text=text)

    if trainer.is_world_process_zero():
        _to_all(trainer, "An alert", send)


def log_table(trainer: Trainer, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Sends a table, a dict per row, of the current step to every tracker of `trainer`; TensorBoard gets Markdown."""
    step, columns = trainer.state.global_step, list(rows[0])
    data = [[row[column] for column in columns] for row in rows]

    def send(callback) -> None:
        if isinstance(callback, TensorBoardCallback):
            cells = [[md_escape(value) for value in row] for row in data]
            callback.tb_writer.add_text(name, table([md_escape(column) for column in columns], cells), step)
        elif isinstance(callback, WandbCallback):
            found = callback._wandb.Table(columns=columns, data=data)
            callback._wandb.log({name: found, "train/global_step": step})
        else:
            import pandas

            frame = pandas.DataFrame(data, columns=columns)
            callback._trackio.log({name: callback._trackio.Table(dataframe=frame)}, step=step)

    _to_all(trainer, f"The table of step {step}", send)


def _to_all(trainer: Trainer, what: str, send: Callable[[Any], None]) -> None:
    for callback in trainer.callback_handler.callbacks:
        written = not isinstance(callback, TensorBoardCallback) or callback.tb_writer is not None
        if isinstance(callback, TRACKERS) and written:
            try:
                send(callback)
            except Exception as error:  # a tracker must never end a training
                logger.warning("%s did not reach %s: %s", what, type(callback).__name__, error)
