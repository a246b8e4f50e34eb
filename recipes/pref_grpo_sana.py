# /// script
# requires-python = ">=3.11"
# dependencies = ["es-trl"]
#
# [tool.hf-jobs]
# flavor = "a100-large"
# timeout = "6h"
# secrets = ["HF_TOKEN"]
# ///
"""Pref-GRPO (win rates within a group as rewards) on Sana Sprint, Sana, or another few-step or flow model.

On a laptop, with the model that ships with es_trl:

    python recipes/pref_grpo_sana.py --config recipes/tiny_sana_sprint/pref_grpo/config.yaml

On GPUs, with Sana Sprint 1.6B (settings are commented in the file; any of them can be overridden here):

    accelerate launch recipes/pref_grpo_sana.py --config recipes/sana_sprint/pref_grpo/config.yaml
"""

from es_trl import PrefGRPOConfig, PrefGRPOTrainer
from es_trl.cli import RunArguments, parse, prepare, run


def main(arguments: RunArguments, config: PrefGRPOConfig) -> None:
    trainer = prepare(PrefGRPOTrainer, arguments, config)  # loads prompts, model and rewards
    run(trainer, arguments)  # trains, compares the adapter with the base, saves it with its card, pushes


if __name__ == "__main__":
    main(*parse(PrefGRPOConfig))
