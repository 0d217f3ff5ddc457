#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build, test, sanitize, measure. Rows go to bench/results, logs to $OUT.
#   OUT=gpu_out bash bench/gpu.sh [build test sanitize bench]
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_out}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-8}
failed=0

stage() {  # name, command...: its log, its exit code, its seconds
  local name=$1 begin=$SECONDS
  shift
  "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  echo "$name: exit $code, $((SECONDS - begin)) s" | tee -a "$OUT/stages.txt"
  [ $code -eq 0 ] || { failed=1; tail -n 15 "$OUT/$name.log"; }
}

build() {
  stage build pip install --quiet --no-build-isolation --no-deps --editable .
  stage status python -c "from sensibert import _native; print(_native.status()); assert _native.available"
}
test() {  # a process a file: an illegal access ends the context of its process. Exit 5: no test for a GPU in it
  for file in tests/optim/test_*.py tests/nn/test_*.py tests/ops/test_*.py tests/ops/masked_linear/test_*.py; do
    stage "$(echo "${file%.py}" | tr / _)" bash -c "python -m pytest $file -m gpu -q --tb=short || [ \$? -eq 5 ]"
  done
}
sanitize() {  # our kernels alone, at small sizes: a kernel is a hundred times slower under a sanitizer
  local small="not whole and not model and not more_than and not captur and not reaches and not 16384"
  local plain="tests/ops/test_*.py tests/ops/masked_linear/test_take_columns.py" tool file
  # racecheck of CUDA 13.0 fails inside itself on kernels with setmaxnreg: not the wgmma kernels
  for tool in memcheck racecheck; do
    for file in $plain $([ $tool = memcheck ] && echo tests/ops/masked_linear/test_{tiles,bits,dweight}.py); do
      stage "${tool}_$(basename "${file%.py}")" timeout 600 compute-sanitizer --kernel-name kns=sensibert --tool $tool \
        --error-exitcode 1 python -m pytest "$file" -m gpu -q -k "$small"
    done
  done
}
bench() {  # no number from a red run
  [ $failed -eq 0 ] || { echo "bench: skipped, something above failed" | tee -a "$OUT/stages.txt"; return; }
  for name in block_sensitivity select_threshold gather_kept take_columns masked_adamw masked_linear; do
    stage "bench_$name" python -m pytest "bench/bench_$name.py" --benchmark-only -q -o python_files='bench_*.py'
  done
  stage bench_forward python bench/bench_forward.py
  stage bench_step python bench/bench_step.py
  cp bench/results/*.jsonl "$OUT"/
}

for name in "${@:-build test sanitize bench}"; do
  for part in $name; do "$part"; done
done
exit $failed
