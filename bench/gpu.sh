#!/usr/bin/env bash
# Everything that needs a GPU: build, test, measure, sanitize. Rows go to $OUT/rows.jsonl, logs to $OUT/PART.log.
# By default it ends within 15 minutes: the parts run in order of worth, and what no longer fits is skipped.
#
#   MODEL=minilm DATA=data OUT=gpu_out bash bench/gpu.sh                # build, shapes, test, finetune, cost, kernels
#   MODEL=minilm DATA=data OUT=gpu_out bash bench/gpu.sh build finetune # some of them, in this order
#   python bench/_rows.py add gpu_out/rows.jsonl                        # afterwards: append the rows to bench/results
#
# The parts, in order of worth:
#   build     the extension; fails if its kernels are not available. All others but shapes need it
#   shapes    bench_shapes: why a step of a trimmed model is slow. BERT-base, random weights; needs no input
#   test      pytest -m gpu
#   finetune  bench_finetune: MiniLM on sst2 and squad, BERT-base shapes on squad, dense and 50%params
#   cost      bench_cost: whole runs on squad, MiniLM and BERT-base shapes
#   kernels   bench_forward, bench_step, and the benches of the ops
#   sanitize  compute-sanitizer; not among the defaults. All of it takes longer than the usual limits
#
# Inputs, as environment variables. A part whose inputs are missing says so, is skipped, and counts as failed.
#   MODEL       folder of MiniLM with its tokenizer. Weights in half precision will do: all runs load them in fp32
#   DATA        folder with sst2/train.csv and squad/train.jsonl.gz
# Of the dependencies, `datasets` is not needed, since sensibert reads these files itself; pytest-benchmark is (kernels).
#
# Further variables:
#   LIMIT       seconds for all parts together, 840 by default; PART_LIMIT: for each part, 460. What does not fit fails
#   STEPS       training steps per measurement, instead of each bench's default (also: 2 of warm-up)
#   BATCH       rows of a batch, 32 by default
#   EPOCHS      of whole runs, 2 by default
#   ENGINES     of bench_finetune, separated by semicolons
#   SHAPES      more arguments of bench_shapes, such as --small
# To rehearse without a GPU: STEPS=2 BATCH=2 EPOCHS=0.002 SHAPES="--small --longest 32" bash bench/gpu.sh shapes
#
# No number from a red run: a bench that fails leaves no rows, and after a failed build, test or sanitize nothing is
# measured and the rows of this call are removed. The logs keep what was printed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
OUT=$(realpath -m "${OUT:-gpu_out}")
MODEL=${MODEL:+$(realpath -m "$MODEL")} DATA=${DATA:+$(realpath -m "$DATA")}
BATCH=${BATCH:-32} EPOCHS=${EPOCHS:-2} LIMIT=${LIMIT:-840} PART_LIMIT=${PART_LIMIT:-460}
IFS=';' read -ra engines <<<"${ENGINES:-ours;ours, without graphs;Trainer, random order;Trainer, grouped}"
read -ra shapes <<<"${SHAPES:-}"
steps=() warm_up=()
[ -z "${STEPS:-}" ] || { steps=(--steps "$STEPS") warm_up=(--warm-up 2); }
mkdir -p "$OUT"
touch "$OUT/rows.jsonl"
rows_before=$(stat -c %s "$OUT/rows.jsonl")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-8}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0 red=0 built=0

say() { echo "$*" | tee -a "$OUT/stages.txt"; }

limited() {  # name, command...: run it in the time that is left; its log, its exit code, its seconds
  local name=$1 begin=$SECONDS code=0 left=$((end - SECONDS))
  shift
  if [ "$left" -lt 5 ]; then
    failed=1
    say "$part $name: skipped, out of time"
    return 1
  fi
  echo "== $part $name: $*" >>"$OUT/$part.log"
  timeout --kill-after 10 "$left" "$@" >>"$OUT/$part.log" 2>&1 || code=$?
  say "$part $name: exit $code$([ "$code" -ne 124 ] || echo ' (out of time)'), $((SECONDS - begin)) s"
  [ "$code" -eq 0 ] || { failed=1; tail -n 15 "$OUT/$part.log"; }
  return "$code"
}

stage() {  # a check: if it fails, no number of this call stays
  limited "$@" || { red=1; truncate -s "$rows_before" "$OUT/rows.jsonl"; }
}

measure() {  # a bench: its rows stay if it succeeds
  local rows="$scratch/rows"
  [ "$red" -eq 0 ] || { say "$part $1: skipped, a check failed"; return; }
  rm -rf "$rows"
  mkdir "$rows"
  SENSIBERT_RESULTS=$rows limited "$@" || return
  if ! cat "$rows"/*.jsonl >>"$scratch/$part.jsonl" 2>/dev/null; then
    failed=1
    say "$part $1: no rows"
    return
  fi
  cat "$rows"/*.jsonl >>"$OUT/rows.jsonl"
}

inputs() {  # files or folders that must exist
  local path
  for path; do
    [ -e "$path" ] || { failed=1; say "$part: skipped, '$path' is missing, see MODEL and DATA"; return 1; }
  done
}

build() {
  stage build python -m pip install --quiet --no-build-isolation --no-deps --editable .
  stage status python -c "from sensibert import _native; print(_native.status()); assert _native.available"
  built=1
}

native() {  # on a GPU the references would be tested and measured in place of missing kernels
  [ "$built" -eq 1 ] || stage native python -c "import torch; from sensibert import _native
assert _native.available or not torch.cuda.is_available(), 'no kernels, run the part build first: ' + _native.status()"
  built=1  # or red
}

shapes() {  # about 5 minutes: 12 processes of 205 steps
  local common=(--batch "$BATCH" "${steps[@]}" "${shapes[@]}")
  measure cuts python bench/bench_shapes.py --groups cuts --profile "${common[@]}"
  measure multiples python bench/bench_shapes.py --groups multiples "${common[@]}"
  measure settings python bench/bench_shapes.py --groups settings "${common[@]}"
}

test() {  # a process a file, four at a time: an illegal access ends the context of its process
  stage gpu nvidia-smi -L  # without a GPU all tests would be skipped, and succeed
  native
  # shellcheck disable=SC2016 # expanded by the inner shell. Exit 5: no test for a GPU in it
  local one='log=$(python -m pytest "$0" -m gpu -q --tb=short 2>&1); code=$?; printf "%s\n" "$0" "$log"
    [ $code -eq 0 ] || [ $code -eq 5 ]'
  grep -rlwE 'gpu|device' tests/{allocation,models,nn,ops,optim,sensitivity,training} --include='test_*.py' \
    >"$scratch/files"
  stage pytest xargs --arg-file "$scratch/files" -P 4 -n 1 bash -c "$one"
}

finetune() {  # about 6 minutes: 24 processes
  local small=(--model "$MODEL" --name minilm-l6) common=(--sizes dense 50%params --batch-size "$BATCH")
  common+=(--engines "${engines[@]}" "${steps[@]}" "${warm_up[@]}")
  inputs "$MODEL/config.json" "$DATA/squad/train.jsonl.gz" "$DATA/sst2/train.csv" || return
  native
  measure squad python bench/bench_finetune.py "${small[@]}" --train-file "$DATA/squad/train.jsonl.gz" "${common[@]}"
  measure bert-base python bench/bench_finetune.py --model "$MODEL" --shape bert-base --name bert-base \
    --train-file "$DATA/squad/train.jsonl.gz" "${common[@]}"
  measure sst2 python bench/bench_finetune.py "${small[@]}" --train-file "$DATA/sst2/train.csv" "${common[@]}"
}

cost() {  # about 4 minutes: 6 runs
  local common=(--train-file "$DATA/squad/train.jsonl.gz" --epochs "$EPOCHS" --precision bf16 --batch-size "$BATCH")
  inputs "$MODEL/config.json" "$DATA/squad/train.jsonl.gz" || return
  native
  measure minilm-l6 python bench/bench_cost.py --model "$MODEL" --name minilm-l6 "${common[@]}"
  limited bert-base-folder python - "$MODEL" "$scratch/bert-base" <<'END' || return
import sys
from transformers import AutoTokenizer, BertConfig, BertModel

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[2])
BertModel(BertConfig(vocab_size=len(tokenizer))).save_pretrained(sys.argv[2])
END
  measure bert-base python bench/bench_cost.py --model "$scratch/bert-base" --name bert-base "${common[@]}"
}

kernels() {
  local name
  native
  measure forward python bench/bench_forward.py --batch "$BATCH"
  measure step python bench/bench_step.py --batch "$BATCH" "${steps[@]}"
  for name in block_sensitivity select_threshold gather_kept take_columns masked_adamw masked_linear; do
    measure "$name" python -m pytest "bench/bench_$name.py" --benchmark-only -q -o python_files='bench_*.py'
  done
}

sanitize() {  # our kernels alone, at small sizes: a kernel is a hundred times slower under a sanitizer
  local quick="not whole and not model and not more_than and not captur and not reaches and not 16384"
  local plain="tests/ops/test_*.py tests/ops/masked_linear/test_take_columns.py" tool file
  # racecheck of CUDA 13.0 fails inside itself on kernels with setmaxnreg: not the wgmma kernels
  for tool in memcheck racecheck; do
    for file in $plain $([ "$tool" = memcheck ] && echo tests/ops/masked_linear/test_{tiles,bits,dweight}.py); do
      stage "${tool}_$(basename "${file%.py}")" compute-sanitizer --kernel-name kns=sensibert --tool "$tool" \
        --error-exitcode 1 python -m pytest "$file" -m gpu -q -k "$quick"
    done
  done
}

run() {
  case $1 in
    build) build ;;
    shapes) shapes ;;
    test) test ;;
    finetune) finetune ;;
    cost) cost ;;
    kernels) kernels ;;
    sanitize) sanitize ;;
    *) failed=1; say "$1: no such part, want build, shapes, test, finetune, cost, kernels or sanitize" ;;
  esac
}

[ $# -gt 0 ] || set -- build shapes test finetune cost kernels
for part; do
  end=$((SECONDS + PART_LIMIT < LIMIT ? SECONDS + PART_LIMIT : LIMIT))
  run "$part"
  if [ -s "$scratch/$part.jsonl" ] && [ "$red" -eq 0 ]; then
    python bench/_rows.py show "$scratch/$part.jsonl" | tee -a "$OUT/$part.log"
  fi
done
exit "$failed"
