#!/usr/bin/env bash
# TRL's own command on a YAML file; `python -m hf_automagic.run` in front of it is all that is ours.
#
#   bash scripts/recipes/sft_lora.sh                                        a random tiny model, toy sentences
#   MODEL=Qwen/Qwen3-0.6B DATA=trl-lib/Capybara bash scripts/recipes/sft_lora.sh --max_steps 500
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
out="${OUT:-runs/sft_lora}"

if [ -z "${MODEL:-}" ]; then
  "$python" "$here/tiny_files.py" "$out/tiny"
  MODEL="$out/tiny/model" DATA="$out/tiny/data"
fi
"$python" -m hf_automagic.run trl sft --config "$here/sft_lora.yaml" \
  --model_name_or_path "$MODEL" --dataset_name "$DATA" --output_dir "$out" "$@"
