#!/usr/bin/env bash
# Everything that a GPU of 80 GB can prove, in at most 8 minutes and without a network.
#
#     bash tests/gpu.sh [FOLDER]        # python with torch, numpy, safetensors, tokenizers at hand
#     bash tests/gpu.sh --cpu [FOLDER]  # the same lines on the tiny shape: do they run at all?
#
# Appends a JSON line a measurement to FOLDER/gpu.jsonl (default out/gpu) and what is printed to
# FOLDER/gpu.log, goes on after a failure, starts nothing new after 7 minutes, prints a table, and
# ends with 1 if a line failed.
cd "$(dirname "$0")/.." || exit
device=cuda small=qwen3-0.6b-shape middle=qwen3-1.7b-shape large=qwen3-8b-shape most=qwen3-4b-shape
budget=16384 new=512 pairs=60 seconds=100
if [ "$1" = --cpu ]; then
    shift
    device=cpu small=tiny-shape middle=tiny-shape large=tiny-shape most=tiny-shape
    budget=256 new=12 pairs=12
fi
out=${1:-out/gpu}
mkdir -p "$out"
: > "$out/gpu.jsonl" > "$out/gpu.log"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
export GPU_PY_DEVICE=$device PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
python=${PYTHON:-python3}

line() {  # name, command: its JSON lines and how it ended
    local name=$1 begun=$SECONDS log="$runs/log" rc=1
    shift
    if [ $begun -lt 420 ]; then
        timeout "$seconds" "$@" > "$log" 2>&1
        rc=$?
    else
        echo "not started: 7 minutes are over" > "$log"
    fi
    cat "$log" >> "$out/gpu.log"
    grep '^{"what"' "$log" >> "$out/gpu.jsonl"
    printf '{"what": "%s", "exit code": %d, "seconds": %d}\n' "$name" $rc $((SECONDS - begun)) \
        >> "$out/gpu.jsonl"
    [ $rc -eq 0 ] || { failed=1; echo "--- $name failed, exit code $rc"; tail -n 5 "$log"; }
}

failed=0
line parity $python tests/gpu.py parity
line train-small $python tests/gpu.py train $small $budget
line train-middle $python tests/gpu.py train $middle $budget
line decode $python tests/gpu.py decode $large $((2 * new)) $new
line train-most $python tests/gpu.py train $most $budget
# The toy run, begun on a CPU and continued on the GPU, and GRPO with its reward model.
# The sandbox is basic: whether a layer of it is missing is no question to a GPU.
toy="--problems toy:train --limit $pairs --candidates mutants --batch 4 --sandbox basic"
line rm-begun $python train_rm.py $toy --steps 1 --device cpu --out "$runs/rm"
line rm-continued $python train_rm.py $toy --steps 3 --device $device --out "$runs/rm"
line grpo $python grpo.py --reward rm --rm "$runs/rm" --limit 12 --steps 1 --prompts 4 --group 4 \
    --max-new-tokens 40 --eval-group 1 --sandbox basic --device $device --out "$runs/grpo"
[ $device = cpu ] || line pytest $python -m pytest -q -m gpu tests
$python tests/gpu.py table "$out/gpu.jsonl"
exit $failed
