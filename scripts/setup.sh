# Sourced by test.sh and demo.sh: finds a Python and keeps .venv at the versions of constraints.txt.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"

say() { printf '==> %s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# new_enough INTERPRETER: is it a Python 3.10 or newer that can make environments?
new_enough() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# find_python: prints the first interpreter that will do; PYTHON=... names one.
find_python() {
  local candidate candidates="${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}"
  for candidate in $candidates; do
    if new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.10 or newer with its venv module is needed, and this is not: $candidates." \
    "Install one, or name it: PYTHON=path/to/python bash scripts/${0##*/}"
}

# install_extra NAME: .venv holds this project, editable, with the extra NAME. Does nothing when nothing changed.
install_extra() {
  local extra="$1" wanted installed base pip
  wanted="$venv $(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum)"
  for installed in "$extra" dev; do # dev holds every other extra
    if [ "$(cat "$venv/.installed-$installed" 2>/dev/null)" = "$wanted" ] && new_enough "$python"; then
      say "environment: .venv, unchanged"
      return
    fi
  done
  if ! new_enough "$python"; then
    base="$(find_python)"
    say "environment: making .venv with $("$base" --version)"
    "$base" -m venv --clear "$venv" || fail "$base could not make $venv; the lines above tell why."
  fi
  say "environment: installing hf_automagic[$extra] and what it needs, a few minutes the first time"
  # --no-compile: halves the time; Python compiles what it imports, when it does
  "$python" -m pip install --no-compile --progress-bar off -c "$root/scripts/constraints.txt" -e "${root}[$extra]" \
    >"$venv/install.log" 2>&1 &
  pip=$!
  show_install_progress $pip
  wait $pip || {
    tail -n 20 "$venv/install.log" >&2
    fail "pip could not install the lines of pyproject.toml's extra '$extra'; its last lines are above, all of them in .venv/install.log."
  }
  echo "$wanted" >"$venv/.installed-$extra"
}

# show_install_progress PID: what pip is at, every 15 seconds until PID ends.
show_install_progress() {
  local seconds=0
  while kill -0 "$1" 2>/dev/null; do
    sleep 1
    seconds=$((seconds + 1))
    if [ $((seconds % 15)) = 0 ]; then
      printf '    %3d s  %s\n' "$seconds" "$(grep -oE '^ *(Collecting|Downloading|Installing|Building) [^ ]+( packages)?' "$venv/install.log" | tail -n 1 | sed 's/^ *//')"
    fi
  done
}
