#!/usr/bin/env bash
# The paper's claims in miniature, as curves: every arm is a plain command, skipped where its result
# is there, so the same command goes on after Ctrl-C. Then the table and the figure tiny/worth.png.
#   tiny/paper.sh           # SEEDS=5 runs an arm, JOBS=2 at a time: four hours on two cores
#   SEEDS=1 STEPS=2 OUT=out/try FIGURE=out/try.png RM_FLAGS="--limit 30 --steps 2 --batch 8" \
#     RL_FLAGS="--limit 12 --eval-every 1" BON_FLAGS="--limit 8" tiny/paper.sh   # does it run?
set -eu
cd "$(dirname "$0")/.."
export OUT=${OUT:-out/paper} STEPS=${STEPS:-50} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export RM_FLAGS=${RM_FLAGS:-} RL_FLAGS=${RL_FLAGS:-} BON_FLAGS=${BON_FLAGS:-}

one_seed() {
  set -eu
  seed=$1 run=$OUT/$1
  reward_model() {  # NAME FLAGS...
    [ -f "$run/$1/result.json" ] ||
      python train_rm.py --seed "$seed" --out "$run/$1" --save-every 50 "${@:2}" $RM_FLAGS
  }
  policy() {  # STEPS NAME FLAGS...
    [ -f "$run/$2/result.json" ] || python grpo.py --seed "$seed" --steps "$1" --out "$run/$2" \
      --save-every 25 "${@:3}" $RL_FLAGS
  }
  halfway() {  # NAME FLAGS...: the run, and in NAME-half what it was after half of its steps
    [ -d "$run/$1-half" ] || {
      policy $((STEPS / 2)) "$@"
      rm -rf "$run/$1-copy" && cp -r "$run/$1/checkpoint" "$run/$1-copy"
      rm "$run/$1/result.json" && mv "$run/$1-copy" "$run/$1-half"
    }
    policy "$STEPS" "$@"
  }
  # Most arms only give a result: one evaluation at the end, and few audits.
  quick="--eval-every $STEPS --audit-every 10"
  # a. Execution as the reward, with K tests of each problem (exec: all 12).
  halfway exec --reward exec
  for k in 1 2 3 6; do policy "$STEPS" "exec-tests-$k" --reward exec --reward-tests $k $quick; done
  # c. Few problems with tests, against the reward model on thousands without (below).
  for n in 2 8 64; do
    python tiny/paper.py few $n "$run/few-$n.jsonl"
    policy "$STEPS" "exec-problems-$n" --reward exec --problems "$run/few-$n.jsonl" $quick
  done
  # The two commands of the README.
  reward_model model
  halfway rm --reward rm --rm "$run/model"
  policy "$STEPS" rm-untested --reward rm --rm "$run/model" --problems toy:untested $quick
  # Best of 16 answers of the first policy, chosen by K tests or by a reward model.
  [ -f "$run/bon.jsonl" ] || {
    python bench.py sample --seed "$seed" --rm "$run/model" --out "$run/samples" $BON_FLAGS
    python bench.py bon --store "$run/samples" --tests 1 2 3 6 12 --json >"$run/bon.part"
    mv "$run/bon.part" "$run/bon.jsonl"
  }
  # d. Refresh the reward model on the new policy's programs, and go on with it.
  reward_model model-refreshed --init "$run/model" --policy "$run/rm-half"
  policy $((STEPS - STEPS / 2)) rm-refreshed --reward rm --rm "$run/model-refreshed" \
    --policy "$run/rm-half"
  # b. The reward model: more verified problems, more epochs, programs of early and late policies.
  while read -r name flags; do
    reward_model "model-$name" $flags </dev/null
    policy "$STEPS" "rm-$name" --reward rm --rm "$run/model-$name" $quick </dev/null
  done <<END
150 --limit 150
recipe --group 3 --policy tiny/policy $run/exec-half $run/exec
epochs-6 --pairs $run/model/pairs.jsonl --epochs 6
epochs-4 --pairs $run/model/pairs.jsonl --epochs 4
4000 --problems toy:untested+tests
epochs-1 --pairs $run/model/pairs.jsonl --epochs 1
600 --limit 600
END
  for model in "$run"/model*; do
    python bench.py rm --rm "$model" --store "$run/samples" --json >"$model/store.jsonl"
  done
}

export -f one_seed
seq 0 $((${SEEDS:-5} - 1)) | xargs -P "${JOBS:-2}" -I SEED bash -c "one_seed SEED"
python tiny/paper.py table "$OUT" "${FIGURE:-tiny/worth.png}"
