#!/usr/bin/env bash
# Checks style, types and claims.
#
#   bash scripts/test.sh                                  the fast suite, below 8 minutes on two cores
#   bash scripts/test.sh --all                            also the slow tests, the ledger's mutants and the demo
#                                                         in a fresh clone and environment, below 30 minutes
#   bash scripts/test.sh tests/test_layers.py -k planted  arguments go to pytest; paths are relative to the repository
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

everything=false
case "${1:-}" in
  -h | --help) exec sed -n '2,/^set /{/^#/p}' "${BASH_SOURCE[0]}" ;;
  --all) everything=true && shift ;;
esac
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
cd "$root"

# One thread a process, since two run side by side; the hub is out of reach.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYRIGHT_PYTHON_IGNORE_WARNINGS=1

check_style() {
  say "style: ruff"
  "$python" -m ruff check . || fail "ruff found the above; '.venv/bin/ruff check --fix' mends most of it."
  "$python" -m ruff format --check . || fail "the files above are not formatted; '.venv/bin/ruff format' mends them."
}

check_types() {
  say "types: pyright"
  "$python" -m pyright --pythonpath "$python" || fail "pyright found the types above not to hold."
}

# run_tests MARKS [pytest arguments]: two processes; every skip is named with its reason.
run_tests() {
  local marks="$1"
  shift
  say "tests: pytest -m '$marks'${*:+ $*}"
  "$python" -m pytest -n 2 -m "$marks" -rs --color="$([ -t 1 ] && echo yes || echo auto)" "$@" | tee "$scratch/pytest.log" ||
    fail "pytest did not pass; the lines above tell why."
}

# Each row of the ledger has a mutation that must turn its test red.
run_mutants() {
  if [ -f tests/ledger.py ]; then
    say "ledger: every mutant must be killed"
    "$python" tests/ledger.py || fail "a mutant named above lives: its row's test does not see the feature."
  fi
}

# As a stranger would: a clone of the last commit, a new environment, the hub out of reach.
run_demo_in_fresh_clone() {
  say "demo: 60 steps in a fresh clone of the last commit, with an environment of its own"
  [ -z "$(git status --porcelain)" ] || say "demo: changes that are not committed are not in that clone"
  git clone --quiet "$root" "$scratch/clone" || fail "the demo needs git and at least one commit to clone."
  env -u OMP_NUM_THREADS DEMO_STEPS=60 bash "$scratch/clone/scripts/demo.sh" || fail "the demo failed in a fresh clone."
}

install_extra dev
check_style
check_types
if $everything; then
  run_tests "not gpu" "$@"
  run_mutants
  run_demo_in_fresh_clone
  say "everything passed in $((SECONDS / 60)) min $((SECONDS % 60)) s; the tests ended with"
  tail -n 1 "$scratch/pytest.log"
else
  run_tests "not slow and not gpu" "$@"
fi
