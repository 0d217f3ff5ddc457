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
test() {
  stage test python -m pytest -m gpu -q
}
sanitize() {  # small kernels only: the sanitizers slow a kernel down a hundredfold
  for tool in memcheck racecheck; do
    stage "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 python -m pytest tests/ops -m gpu -q -x \
      -k "not whole and not beyond and not capture"
  done
}
bench() {  # no number from a red run
  [ $failed -eq 0 ] || { echo "bench: skipped, something above failed" | tee -a "$OUT/stages.txt"; return; }
  for name in block_sensitivity select_threshold gather_kept masked_adamw masked_linear; do
    stage "bench_$name" python -m pytest "bench/bench_$name.py" --benchmark-only -q
  done
  stage bench_forward python bench/bench_forward.py
  cp bench/results/*.jsonl "$OUT"/
}

for name in "${@:-build test sanitize bench}"; do
  for part in $name; do "$part"; done
done
exit $failed
