#!/usr/bin/env bash
# Everything that needs a GPU, in one go and within ten minutes:
#
#   bench/on_gpu.sh [--dry-run] [build] [tests] [sanitizer] [ceilings] [check] [bench]
#
# Without stage names it runs all of them. Each has its own time limit, a failing one does not stop the next, and what
# was measured is written as it goes: into $OUT, or into bench/results/<device>/. --dry-run prints the commands and runs
# only what needs no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

readonly ALL=(build tests sanitizer ceilings check bench)
declare -A LIMIT=([build]=140 [tests]=115 [sanitizer]=90 [ceilings]=25 [check]=40 [bench]=165)
PYTHON=${PYTHON:-python3}
dry=0
stages=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry=1 ;;
    build | tests | sanitizer | ceilings | check | bench) stages+=("$argument") ;;
    *)
      sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
      exit 2
      ;;
  esac
done
((${#stages[@]})) || stages=("${ALL[@]}")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# The device's name as a folder's, from the driver: the package may not be built yet.
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 2>/dev/null | head -n 1)
slug=$(printf '%s' "${gpu:-no-gpu}" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-' | sed 's/^-*//; s/-*$//')
date=$(date +%F)
if ((dry)); then OUT=$work/out; else OUT=${OUT:-bench/results/$slug}; fi
mkdir -p "$OUT"
log=$OUT/$date-log.txt

say() { printf '%s\n' "$*" | tee -a "$log"; }

# run COMMAND...: within what is left of the stage's time, into the log.
run() {
  say "+ $*"
  ((dry)) && return 0
  local left=$((deadline - SECONDS))
  ((left > 0)) || left=1
  timeout --kill-after=5 "$left" "$@" 2>&1 | tee -a "$log"
  return "${PIPESTATUS[0]}"
}

# The same where there is no GPU either.
run_anywhere() {
  local was=$dry status
  dry=0
  run "$@"
  status=$?
  dry=$was
  return "$status"
}

build() {
  run nvcc --version
  if ! "$PYTHON" -c 'import pybind11' 2>/dev/null; then
    # torch carries pybind11's headers, and setup.py needs nothing more of it.
    mkdir -p "$work/pybind11"
    printf '%s\n' 'import os, torch' 'def get_include(): return os.path.join(os.path.dirname(torch.__file__), "include")' \
      >"$work/pybind11/__init__.py"
  fi
  PYTHONPATH="$work:$PYTHONPATH" KDKERNELS_CUDA=1 run "$PYTHON" setup.py build_ext --inplace || return
  run_anywhere "$PYTHON" -m kdkernels info
}

tests() {
  local parallel=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
  # What runs CUDA kernels on the CPU is for machines without a GPU.
  run "$PYTHON" -m pytest tests -q -x -p no:cacheprovider "${parallel[@]}" --ignore=tests/test_cuda_on_cpu.py
}

sanitizer() {
  local tool status=0
  local check=("$PYTHON" -m kdkernels check --device cuda --backend cuda --small)
  for tool in memcheck racecheck synccheck; do
    # Every tensor is its own allocation, so that memcheck knows its bounds; only our kernels are instrumented.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --kernel-name kernel_substring=kdk "${check[@]}" || status=1
  done
  return "$status"
}

ceilings() {
  run "$PYTHON" -m kdkernels.bench.ceilings --device cuda --json "$OUT/$date-ceilings.json"
}

check() {
  run "$PYTHON" -m kdkernels check --device cuda --json "$OUT/$date-check.json"
}

bench() {
  run_anywhere "$PYTHON" -m kdkernels bench --device cuda --list || return
  run "$PYTHON" -m kdkernels bench --device cuda --dtype bfloat16,float32 --seconds 0.6 \
    --time-limit $((LIMIT[bench] - 40)) --output-exactly "$OUT" --format json,md
}

say "bench/on_gpu.sh: ${stages[*]} on ${gpu:-no GPU}, $date"
failed=()
for stage in "${stages[@]}"; do
  say "=== $stage (at most ${LIMIT[$stage]} s)"
  deadline=$((SECONDS + LIMIT[$stage]))
  started=$SECONDS
  if "$stage"; then result=ok; else
    result="FAILED ($?)"
    failed+=("$stage")
  fi
  say "=== $stage: $result after $((SECONDS - started)) s"
done
((dry)) || ls -l "$OUT"
say "=== ${#stages[@]} stages, failed: ${failed[*]:-none}"
exit $((${#failed[@]} > 0))
