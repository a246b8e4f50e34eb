# /// script
# requires-python = ">=3.11"
# dependencies = ["es-trl"]
#
# [tool.hf-jobs]
# flavor = "a100-large"
# timeout = "6h"
# secrets = ["HF_TOKEN"]
# ///
"""Evolution strategies on Sana Sprint, or any diffusers pipeline that loads a LoRA.

On a laptop, with the model that ships with es_trl:

    python recipes/es_sana.py --config recipes/tiny_sana_sprint/es/config.yaml

On GPUs, with Sana Sprint 1.6B (settings are commented in the file; any of them can be overridden here):

    accelerate launch recipes/es_sana.py --config recipes/sana_sprint/es/config.yaml --output_dir outputs/sana

Without a config file:

    python recipes/es_sana.py --model_name_or_path tiny-sana-sprint --reward_funcs tiny-pickscore \
        --dataset_name tiny-train --output_dir outputs/first --max_steps 20
"""

from es_trl import ESConfig, ESTrainer
from es_trl.cli import RunArguments, parse, prepare, run


def main(arguments: RunArguments, config: ESConfig) -> None:
    trainer = prepare(ESTrainer, arguments, config)  # loads prompts, model and rewards
    run(trainer, arguments)  # trains, compares the adapter with the base, saves it with its card, pushes


if __name__ == "__main__":
    main(*parse(ESConfig))
