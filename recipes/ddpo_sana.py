# /// script
# requires-python = ">=3.11"
# dependencies = ["es-trl"]
#
# [tool.hf-jobs]
# flavor = "a100-large"
# timeout = "6h"
# secrets = ["HF_TOKEN"]
# ///
"""DDPO (PPO over the denoising steps) on Sana Sprint, Sana, or another pipeline of a consistency or flow model.

On a laptop, with the model that ships with es_trl:

    python recipes/ddpo_sana.py --config recipes/tiny_sana_sprint/ddpo/config.yaml

On GPUs, with Sana Sprint 1.6B (settings are commented in the file; any of them can be overridden here):

    accelerate launch recipes/ddpo_sana.py --config recipes/sana_sprint/ddpo/config.yaml --output_dir outputs/sana
"""

from es_trl import DDPOConfig, DDPOTrainer
from es_trl.cli import RunArguments, parse, prepare, run


def main(arguments: RunArguments, config: DDPOConfig) -> None:
    trainer = prepare(DDPOTrainer, arguments, config)  # loads prompts, model and rewards
    run(trainer, arguments)  # trains, compares the adapter with the base, saves it with its card, pushes


if __name__ == "__main__":
    main(*parse(DDPOConfig))
