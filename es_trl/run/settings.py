"""The settings of a run: what is written of them, and what may differ when it goes on."""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from ..files import write_json, writing_files
from .checkpoint import CONFIG_FILE, CheckpointCorrupt, read_json


logger = logging.getLogger(__name__)

SET_THE_SCHEDULE = {"max_steps", "num_train_epochs"}  # which decays towards the last step
BESIDE_CONFIG = ("reward_funcs", "reward_weights", "train_prompts")  # of what ran, though no fields of the config


def run_config(trainer) -> dict[str, Any]:
    """What ran: method, base model, rewards, and every setting of the config."""
    args = trainer.args
    fields = {field.name for field in dataclasses.fields(args)}
    config = {name: value for name, value in args.to_dict().items() if name in fields and name != "hub_token"}
    return {
        "method": trainer.method_name,
        "about": trainer.about.to_dict() | {"settings": args.own_settings()},
        "base_model": trainer.base_model,
        "reward_funcs": trainer.rewards.names,
        "reward_weights": trainer.rewards.weights.tolist(),
        "eval_reward_funcs": trainer.eval_rewards.names[len(trainer.rewards) :],
        "train_prompts": len(trainer.train_dataset),
        "num_processes": args.world_size,
        **trainer.adapter.space.report(),
        **trainer.run_record(),
        "changes": {name: kind for name, kind in args.changes().items() if kind != "numbers"},
        "config": config,
    }


def write_run_files(trainer, directory: str | os.PathLike) -> None:
    """The adapter, and what ran where."""
    trainer.adapter.save_lora(directory)
    write_json(Path(directory, CONFIG_FILE), run_config(trainer))
    write_json(Path(directory, "env.json"), trainer.environment)


def save_run_files(trainer, directory: str | os.PathLike) -> None:
    """As `write_run_files`, each file whole or as it was before."""
    with writing_files(directory) as temporary:
        write_run_files(trainer, temporary)


def report_changes(checkpoint: str, now: dict[str, Any]) -> None:
    """
    One warning that lists every setting of [`run_config`] that is not what it was in a checkpoint.

    Raises:
        `ValueError`: another base model, or another method.
        `CheckpointCorrupt`: its settings cannot be read.
    """
    saved = read_json(checkpoint, CONFIG_FILE)
    if not isinstance(saved.get("config"), dict) or "base_model" not in saved:
        raise CheckpointCorrupt(f"{Path(checkpoint, CONFIG_FILE)} is not the settings of a run.")
    if saved.get("method") != now["method"]:
        raise ValueError(
            f"{checkpoint} was trained by {saved.get('method')!r}, this run is {now['method']!r}: give "
            "another output_dir, or a checkpoint of this method."
        )
    # A checkpoint from the Hub has `~` in place of the home folder.
    if os.path.expanduser(str(saved["base_model"])) != os.path.expanduser(str(now["base_model"])):
        raise ValueError(
            f"{checkpoint} was trained on {saved['base_model']!r}, this run loads {now['base_model']!r}: an adapter "
            "continues only on its own base model."
        )
    before, after = ((c.get("model_init_kwargs") or {}).get("revision") for c in (saved["config"], now["config"]))
    if before != after:
        raise ValueError(
            f"{checkpoint} was trained on revision {before!r} of {now['base_model']!r}, this run loads {after!r}: "
            "an adapter continues only on its own base model."
        )
    if saved.get("num_processes", now["num_processes"]) != now["num_processes"]:
        logger.info(
            "Resuming on %d processes what %s began: same numbers.", now["num_processes"], saved["num_processes"]
        )
    before, after = ({**run["config"], **{k: run.get(k) for k in BESIDE_CONFIG}} for run in (saved, now))
    free = SET_THE_SCHEDULE if "constant" in str(after["lr_scheduler_type"]) else set()
    free = free | {name for name, kind in now["changes"].items() if kind not in ("numbers", "measures")}
    keys = sorted(set(before) & set(after) - free)
    changed = [key for key in keys if before[key] != json.loads(json.dumps(after[key], default=str))]
    if changed:
        lines = ", ".join(f"{key}: {before[key]!r} -> {after[key]!r}" for key in changed)
        logger.warning("Resuming with other settings than the checkpoint's (%s).", lines)
