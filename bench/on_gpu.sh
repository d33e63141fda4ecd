#!/usr/bin/env bash
# Everything that needs a GPU, in one go and within ten minutes; no network is needed, only nvcc, torch and pytest:
#
#   bench/on_gpu.sh [--dry-run] [--seconds N] [build] [smoke] [tests] [sanitizer] [ceilings] [check] [bench]
#
# Without stage names it runs all of them, within N seconds (590) together: each stage has its share of what is left, so
# `--seconds 590 bench` gives all to one. A failing stage does not stop the next, and what was measured is written as it
# goes: into bench/results/<device>/, or, where OUT is set, into $OUT: a log and a results.tar.gz, made anew after every
# step. KDKERNELS_COMMIT names the commit where there is no .git. --dry-run prints the commands and runs only what needs
# no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

readonly ALL=(build smoke tests sanitizer ceilings check bench)
declare -A SHARE=([build]=130 [smoke]=40 [tests]=120 [sanitizer]=80 [ceilings]=15 [check]=45 [bench]=160)
# What is timed first: a cut run has the kernels that most depend on the device.
readonly FAMILIES=(row_divergence linear_divergence triplet_angle pairwise_distance gram_match weighted_match
  row_gather peer_divergence dist pixel_relation edge_relation graph_closure)
PYTHON=${PYTHON:-python3}
dry=0 seconds=590
stages=()
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --seconds) seconds=${2:?--seconds takes a number} && shift ;;
    build | smoke | tests | sanitizer | ceilings | check | bench) stages+=("$1") ;;
    *)
      sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
      exit 2
      ;;
  esac
  shift
done
((${#stages[@]})) || stages=("${ALL[@]}")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
parallel=()
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# The device's name as a folder's, from the driver: the package may not be built yet.
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 2>/dev/null | head -n 1)
slug=$(printf '%s' "${gpu:-no-gpu}" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9' '-' | sed 's/^-*//; s/-*$//')
date=$(date +%F)
((dry)) && OUT=$work/out
# Where OUT is set it may take only a few files: all but the log go into one.
results=${OUT:+$work/results}
results=${results:-bench/results/$slug}
OUT=${OUT:-$results}
mkdir -p "$OUT" "$results"
log=$OUT/$date-log.txt

say() { printf '%s\n' "$*" | tee -a "$log"; }

pack() { [[ $results == "$OUT" ]] || tar -C "$results" -czf "$OUT/results.tar.gz" .; }

# run COMMAND...: within what is left of the stage's time, into the log. It is interrupted, not killed: pytest then says
# what has failed so far.
run() {
  say "+ $*"
  ((dry)) && return 0
  local left=$((deadline - SECONDS)) status
  ((left > 0)) || { say "no time is left for it"; return 124; }
  timeout --signal=INT --kill-after=10 "$left" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  pack
  return "$status"
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

pytest() { run "$PYTHON" -m pytest -q -rfE --tb=short -p no:cacheprovider "$@"; }

# Every loss once with its gradients, and a CUDA graph: what does not launch at all is known in a minute.
smoke() {
  local status=0
  pytest tests/test_no_sync.py -k "gpu and cuda" || status=$?
  pytest "${parallel[@]}" tests/test_no_sync.py -k "gpu and triton" || status=$?
  return "$status"
}

tests() {
  local status=0
  # The CUDA kernels, which need no compiling; then all but what is about machines without a GPU or about the package.
  KDKERNELS_TEST_BACKENDS=cuda pytest "${parallel[@]}" tests/test_numerics.py tests/test_traps.py || status=$?
  pytest "${parallel[@]}" tests --ignore=tests/test_no_sync.py --ignore=tests/test_cuda_on_cpu.py \
    --ignore=tests/test_packaging.py --ignore=tests/test_mutations.py --ignore=tests/test_triton_launches.py \
    --ignore=tests/test_demo.py --ignore=tests/test_examples.py --ignore=tests/test_docs.py || status=$?
  return "$status"
}

sanitizer() {
  local tool status=0 end=$deadline left=3
  for tool in memcheck racecheck synccheck; do
    # One slow tool must not take the time of the next.
    deadline=$((SECONDS + (end - SECONDS) / left))
    left=$((left - 1))
    # Every tensor is its own allocation, so that memcheck knows its bounds; only our kernels are instrumented.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --kernel-name kernel_substring=kdk "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_no_sync.py \
      -k "every_loss_on_a_gpu and cuda and bfloat16" || status=1
  done
  return "$status"
}

ceilings() {
  run "$PYTHON" -m kdkernels.bench.ceilings --device cuda --json "$results/$date-ceilings.json"
}

check() {
  local status=0 backend
  for backend in cuda triton; do
    run "$PYTHON" -m kdkernels check --device cuda --backend "$backend" --small --json "$results/$date-check-$backend.json" ||
      status=$?
  done
  return "$status"
}

# Without torch.compile, which takes longer to compile a row than to time it.
bench() {
  local family status=0 end=$deadline left=${#FAMILIES[@]}
  run_anywhere "$PYTHON" -m kdkernels bench --device cuda --list --family row_divergence || return
  for family in "${FAMILIES[@]}"; do
    # The first ones get more: half of what is left while there are others, at least a fair share.
    local rest=$((end - SECONDS)) share
    share=$((rest / (left < 4 ? left : 4)))
    left=$((left - 1))
    deadline=$((SECONDS + share + 20 < end ? SECONDS + share + 20 : end))
    run "$PYTHON" -m kdkernels bench --device cuda --family "$family" --dtype bfloat16,float32 --seconds 0.5 --no-compile \
      --no-startup --time-limit "$((share > 10 ? share - 10 : 1))" --output-exactly "$results" --format json,md || status=$?
  done
  return "$status"
}

say "bench/on_gpu.sh: ${stages[*]} on ${gpu:-no GPU}, $date, within $seconds s"
failed=()
begun=$SECONDS
while ((${#stages[@]})); do
  stage=${stages[0]} all=0
  for name in "${stages[@]}"; do all=$((all + SHARE[$name])); done
  share=$(((seconds - (SECONDS - begun)) * SHARE[$stage] / all))
  stages=("${stages[@]:1}")
  say "=== $stage (at most $share s)"
  started=$SECONDS
  deadline=$((SECONDS + share))
  if "$stage"; then result=ok; else
    result="FAILED ($?)"
    failed+=("$stage")
  fi
  say "=== $stage: $result after $((SECONDS - started)) s"
done
((dry)) || ls -l "$OUT"
say "=== failed: ${failed[*]:-none}"
pack
exit $((${#failed[@]} > 0))
