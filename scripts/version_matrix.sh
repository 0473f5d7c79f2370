#!/usr/bin/env bash
# Runs the integration tests against the oldest and the newest releases that we support, each row in its own environment.
#
#   bash scripts/version_matrix.sh                 every row whose Python is here; the others are named
#   bash scripts/version_matrix.sh oldest newest   some rows
#   MATRIX_DIR=folder bash scripts/version_matrix.sh   where the environments are made and kept; .cache/matrix
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${MATRIX_DIR:-$root/.cache/matrix}"

# row | Python | what differs from row to row
rows="
oldest   | 3.10 | torch==2.6.0 transformers==4.56.2 peft==0.17.1 accelerate==1.10.1 datasets==4.0.0 trl==0.24.0
last4    | 3.11 | torch==2.13.0 transformers==4.57.6 peft==0.18.1 accelerate==1.12.0 datasets==4.5.0 trl==0.26.2
first5   | 3.12 | torch==2.13.0 transformers==5.0.0 peft==0.18.1 accelerate==1.12.0 datasets==4.5.0
newest   | 3.11 | torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
newest13 | 3.13 | torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
"
shared="evaluate==0.4.6 bitsandbytes==0.50.2 matplotlib pytest==9.2.0 pytest-xdist==3.8.0 hypothesis expecttest psutil
  scikit-learn tensorboard came-pytorch==0.1.3 build hatchling pyyaml"
tests="tests/test_resume.py tests/test_checkpoint.py tests/test_push.py tests/test_privacy.py tests/test_estimate.py tests/test_run.py
  tests/test_transformers_door.py tests/test_trainer.py tests/test_trainer_arguments.py tests/test_trainer_modes.py
  tests/test_stock_trainers.py tests/test_registry.py tests/test_callbacks.py tests/test_card.py tests/test_factory.py
  tests/test_loss_intake.py tests/test_schedules.py tests/test_peft_roles.py tests/test_peft_training.py tests/test_trl.py
  tests/test_upstream_seams.py tests/test_doors.py tests/test_foreign_checkpoints.py"

# find_python VERSION: prints an interpreter of that version, on the path or kept by uv or pyenv.
find_python() {
  local candidate
  for candidate in "python$1" "$(uv python find "$1" 2>/dev/null)" "$(pyenv root 2>/dev/null)/versions/$1".*/bin/python; do
    if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
}

run_row() {
  local name="$1" version="$2" packages="$3" python
  python="$(find_python "$version")"
  if [ -z "$python" ]; then
    printf '%-9s python %s: not on this machine\n' "$name" "$version"
    return
  fi
  if [ "$(cat "$folder/$name/.installed" 2>/dev/null)" != "$packages $shared" ]; then
    "$python" -m venv --clear "$folder/$name"
    # shellcheck disable=SC2086
    "$folder/$name/bin/python" -m pip install --quiet --no-compile $packages $shared >"$folder/$name/install.log" 2>&1 || {
      tail -n 5 "$folder/$name/install.log" >&2
      printf '%-9s python %s: pip could not install %s\n' "$name" "$version" "$packages"
      return 1
    }
    echo "$packages $shared" >"$folder/$name/.installed"
  fi
  cd "$root"
  local status=0
  # shellcheck disable=SC2086
  PYTHONPATH="$root" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$folder/$name/bin/python" -m pytest -q -n 2 -rsf \
    -m "not slow and not gpu" -p no:cacheprovider ${MATRIX_TESTS:-$tests} >"$folder/$name/pytest.log" 2>&1 || status=$?
  printf '%-9s python %s, %s: %s\n' "$name" "$version" "$packages" "$(tail -n 1 "$folder/$name/pytest.log")"
  return $status
}

mkdir -p "$folder"
wanted=" ${*:-oldest last4 first5 newest newest13} " failed=0
while IFS='|' read -r name version packages; do
  read -r name <<<"$name" && read -r version <<<"$version" && read -r packages <<<"$packages"
  if [ -n "$name" ] && [[ "$wanted" == *" $name "* ]]; then
    run_row "$name" "$version" "$packages" || failed=1
  fi
done <<<"$rows"
exit $failed
