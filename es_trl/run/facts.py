"""What a setting changes, on the setting itself: its help knows it."""

import copy
import dataclasses
from types import MappingProxyType
from typing import Any


# What the settings change that we inherit from the Trainer; those that are not here change the numbers.
INHERITED = {
    # where the run goes and how it lives
    "run": """
        bf16 bf16_full_eval fp16 fp16_full_eval torch_empty_cache_steps auto_find_batch_size save_strategy save_steps
        save_only_model save_on_each_node save_total_limit enable_jit_checkpoint ignore_data_skip
        restore_callback_states_from_checkpoint dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
        skip_memory_metrics activation_checkpointing_kwargs gradient_checkpointing_kwargs torch_compile_backend
        torch_compile_mode use_liger_kernel liger_kernel_config use_cache fsdp fsdp_config deepspeed
    """,
    # what is written, logged, shown or pushed, and how often
    "output": """
        output_dir logging_dir logging_strategy logging_steps logging_first_step log_on_each_node
        logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica report_to run_name project
        trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start
        push_to_hub hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    """,
    # what evaluations measure, and which adapter is kept for it
    "measures": """
        per_device_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object
        eval_accumulation_steps include_for_metrics batch_eval_metrics load_best_model_at_end metric_for_best_model
        greater_is_better
    """,
    # of this process alone, worked out by the Trainer, or secret: not part of what was asked for
    "process": """
        disable_tqdm hub_token accelerator_config parallelism_config debug do_train do_eval do_predict
        resume_from_checkpoint local_rank gradient_checkpointing activation_checkpointing torch_compile
    """,
}


class Help(str):
    """
    The help of a setting, with what the setting changes: `"numbers"` (the adapter), `"measures"` (evaluations),
    `"run"` (how it lives), `"output"` (what is written and shown) or `"process"` (nothing of the run). It rides on the
    help because argparse is given every key of a field's `metadata`.
    """

    changes: str

    def __new__(cls, text: str, changes: str) -> "Help":
        self = super().__new__(cls, text)
        self.changes = changes
        return self


def setting(default: Any, text: str, changes: str = "numbers") -> Any:
    """A field of a config with its default, its help and what it changes."""
    return dataclasses.field(default=default, metadata={"help": Help(text, changes)})


def changes_of(field: dataclasses.Field) -> str:
    """What a setting changes; `"numbers"` where its help does not say."""
    return getattr(field.metadata.get("help"), "changes", "numbers")


def with_facts(config_class: type) -> type:
    """Writes `INHERITED` onto a config class's own copies of the fields that it inherits."""
    kinds = {name: kind for kind, names in INHERITED.items() for name in names.split()}
    fields = vars(config_class)["__dataclass_fields__"]
    for name, kind in kinds.items():
        if name in fields and not isinstance(fields[name].metadata.get("help"), Help):
            fields[name] = own = copy.copy(fields[name])
            own.metadata = MappingProxyType({**own.metadata, "help": Help(own.metadata.get("help", ""), kind)})
    return config_class
