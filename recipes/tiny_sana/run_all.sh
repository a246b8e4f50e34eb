#!/usr/bin/env bash
# Train, mix, export and measure everything on two cores: two single-threaded stages side by side.
# Every stage writes its state about every 90 seconds; after an interruption run the same line again.
#
#   TINY_RUNS=runs/tiny bash recipes/tiny_sana/run_all.sh [output folder, default es_trl/assets]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
runs="${TINY_RUNS:-/tmp/tiny_runs}" out="${1:-$here/../../es_trl/assets}"
mkdir -p "$runs" "$out"
export TINY_RUNS="$(cd "$runs" && pwd)"
out="$(cd "$out" && pwd)"
cd "$here"
python="${PYTHON:-python}"

lane_pictures() { # what draws
    "$python" train_vae.py
    "$python" train_teacher.py
    "$python" distill.py
    "$python" train_vae.py --decoder-only --steps 900 --seed 12 --latent-noise 0.05
}
lane_scorers() { # what judges
    "$python" train_clip.py --scorer reward
    "$python" train_clip.py --scorer heldout
}

lane_scorers &
scorers=$!
lane_pictures
wait "$scorers"
# The preference stage compares the teacher's samples, so it needs both lanes.
"$python" train_preference.py --scorer reward &
preference=$!
"$python" train_preference.py --scorer heldout
wait "$preference"

"$python" prompts.py --out "$out/prompts"
"$python" mix.py --out "$out"
"$python" evaluate.py --assets "$out" --out "$TINY_RUNS/evaluation"
