"""Pictures and histograms for the trackers that the Trainer reports to; scalars go through its own callbacks."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ..hub import md_escape
from ..hub.tables import table
from ..pictures import rgb


logger = logging.getLogger(__name__)


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
    kinds = (TensorBoardCallback, TrackioCallback, WandbCallback)
    return trainer.is_world_process_zero() and any(isinstance(c, kinds) for c in trainer.callback_handler.callbacks)


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
    images: dict[str, tuple[Image.Image, str]] | None = None,
    histograms: dict[str, Sequence[float]] | None = None,
    step: int | None = None,
) -> None:
    """
    Sends pictures and histograms to every tracker of `trainer`.

    Args:
        trainer (`Trainer`): Its callbacks say where to.
        images (`dict[str, tuple[PIL.Image.Image, str]]`, *optional*): Picture and caption by name.
        histograms (`dict[str, Sequence[float]]`, *optional*): Finite values by name.
        step (`int`, *optional*): Whose they are; the last finished step by default.
    """
    images, histograms = images or {}, histograms or {}
    step = trainer.state.global_step if step is None else step
    for callback in trainer.callback_handler.callbacks:
        try:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, (image, _) in images.items():
                    callback.tb_writer.add_image(name, np.asarray(rgb(image)), step, dataformats="HWC")
                for name, values in histograms.items():
                    callback.tb_writer.add_histogram(name, np.asarray(values), step)
            elif isinstance(callback, WandbCallback | TrackioCallback):
                _log_to_run(callback, images, histograms, step)
        except Exception as error:  # a tracker must never end a training
            logger.warning("Pictures of step %d did not reach %s: %s", step, type(callback).__name__, error)


def send_alert(trainer: Trainer, title: str, text: str) -> None:
    """An alert on those trackers of `trainer` that have alerts: wandb and trackio."""
    if not trainer.is_world_process_zero():
        return
    for callback in trainer.callback_handler.callbacks:
        try:
            if isinstance(callback, WandbCallback) and callback._wandb is not None and callback._wandb.run is not None:
                callback._wandb.run.alert(title=title, text=text, level="WARN")
            elif isinstance(callback, TrackioCallback) and hasattr(callback._trackio, "alert"):
                callback._trackio.alert(title=title, text=text)
        except Exception as error:  # a tracker must never end a training
            logger.warning("An alert did not reach %s: %s", type(callback).__name__, error)


def log_table(trainer: Trainer, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Sends a table, a dict per row, of the current step to every tracker of `trainer`; TensorBoard gets Markdown."""
    step, columns = trainer.state.global_step, list(rows[0])
    data = [[row[column] for column in columns] for row in rows]
    for callback in trainer.callback_handler.callbacks:
        try:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                cells = [[md_escape(value) for value in row] for row in data]
                callback.tb_writer.add_text(name, table([md_escape(column) for column in columns], cells), step)
            elif isinstance(callback, WandbCallback):
                found = callback._wandb.Table(columns=columns, data=data)
                callback._wandb.log({name: found, "train/global_step": step})
            elif isinstance(callback, TrackioCallback):
                import pandas

                frame = pandas.DataFrame(data, columns=columns)
                callback._trackio.log({name: callback._trackio.Table(dataframe=frame)}, step=step)
        except Exception as error:  # a tracker must never end a training
            logger.warning("The table of step %d did not reach %s: %s", step, type(callback).__name__, error)


def _log_to_run(callback, images: dict, histograms: dict, step: int) -> None:
    tracker = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
    data = {name: tracker.Image(image, caption=caption) for name, (image, caption) in images.items()}
    data |= {name: tracker.Histogram(list(values)) for name, values in histograms.items()}
    # The Trainer's own wandb axis; trackio has steps of its own and takes them as an argument.
    if isinstance(callback, WandbCallback):
        tracker.log(data | {"train/global_step": step})
    else:
        tracker.log(data, step=step)
