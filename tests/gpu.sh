#!/usr/bin/env bash
# Everything that a GPU of 80 GB can prove, in at most 8 minutes and without a network.
#
#     bash tests/gpu.sh [FOLDER]        # python with what requirements.txt lists, transformers
#     bash tests/gpu.sh --cpu [FOLDER]  # the same lines on the tiny shape: do they run at all?
#
# Appends a JSON line a measurement to FOLDER/gpu.jsonl (default out/gpu) and what is printed to
# FOLDER/gpu.log, goes on after a failure, starts nothing new after 7 minutes, prints a table, and
# ends with 1 if a line failed.
cd "$(dirname "$0")/.." || exit
device=cuda small="qwen3-0.6b qwen3-1.7b" large=qwen3-8b most=qwen3-4b pairs=60 rounds=1 seconds=100
if [ "$1" = --cpu ]; then
    shift
    device=cpu small=tiny large=tiny most= pairs=12 rounds=0 seconds=300
fi
out=${1:-out/gpu}
mkdir -p "$out"
: > "$out/gpu.jsonl" > "$out/gpu.log"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
export GPU_DEVICE=$device PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
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
    grep '^{' "$log" >> "$out/gpu.jsonl"
    printf '{"line": "%s", "exit code": %d, "seconds": %d}\n' "$name" $rc $((SECONDS - begun)) \
        >> "$out/gpu.jsonl"
    [ $rc -eq 0 ] || { failed=1; echo "--- $name failed, exit code $rc"; tail -n 5 "$log"; }
}

failed=0
speed="$python tests/speed.py --device $device --rounds $rounds --json --config"
memory="$python bench.py memory --gpus 1 --rm none --prompt 700 --response 512 --json"
line parity $python -m pytest -q -s -m gpu tests/test_model.py
for shape in $small; do
    line "steps of $shape" $speed $shape --rows rm_step grpo_step
    line "computed memory of $shape" $memory --token-budget 16384 --model $shape-shape
done
line "scoring and decoding of $large" $speed $large --rows score generate
for shape in $most; do line "step of $shape" $speed $shape --rows rm_step; done
# The toy run, begun on a CPU and continued on the GPU, and GRPO with its reward model.
# The sandbox is basic: whether a layer of it is missing is no question to a GPU.
toy="--problems toy:train --limit $pairs --candidates mutants --batch 4 --sandbox basic"
line rm-begun $python train_rm.py $toy --steps 1 --device cpu --out "$runs/rm"
line rm-continued $python train_rm.py $toy --steps 3 --device $device --out "$runs/rm"
line grpo $python grpo.py --reward rm --rm "$runs/rm" --limit 12 --steps 1 --prompts 4 --group 4 \
    --max-new-tokens 40 --eval-group 1 --sandbox basic --device $device --out "$runs/grpo"
$python -c 'import bench, json, sys
bench.print_rows([json.loads(line) for line in open(sys.argv[1])], False)' "$out/gpu.jsonl"
exit $failed
