#!/usr/bin/env bash
# The main job on real input: LoRA on all-MiniLM-L6-v2, movie sentences, optim="automagic_8bit", no learning rate given.
#
#   bash scripts/demo.sh                               300 steps, a few minutes on two cores
#   DEMO_STEPS=60 bash scripts/demo.sh                 fewer
#   bash scripts/demo.sh --optim adamw_torch ...       arguments go to finetune_lora.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_extra demo
steps="${DEMO_STEPS:-300}"
say "demo: fine-tuning for $steps steps; what the run writes goes to runs/demo"
"$python" "$root/scripts/finetune_lora.py" --max_steps "$steps" --output_dir "$root/runs/demo" "$@" ||
  fail "the demo stopped; the lines above tell why."
