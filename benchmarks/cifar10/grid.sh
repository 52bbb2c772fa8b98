#!/usr/bin/env bash
# Train and test a list of settings, some at a time, a thread each; resumable.
#
#   benchmarks/cifar10/grid.sh SETTINGS RUNS JOBS [FLAGS FOR ALL]
#   benchmarks/cifar10/grid.sh benchmarks/cifar10/methods.txt runs/cifar10 2 --data.root data
#
# A line of SETTINGS is a run: its name, a colon, and what it changes in cifar10_cpu.yaml; RUNS in it
# stands for the folder of the runs, where one starts from what another has left. A run that
# is finished is skipped, one that was killed goes on. The test set is scored once, by the checkpoint
# that was best on validation.
set -euo pipefail
settings=$1 jobs=$3
export RUNS=$2 OMP_NUM_THREADS=1 PYTHON=${PYTHON:-python}
export COMMON="--config recipes/vision/cifar10_cpu.yaml ${*:4}"

run() {
    local name=${1%%:*} flags=${1#*:}
    flags=${flags//RUNS\//$RUNS/}
    local folder=$RUNS/$name
    [[ -e $folder/tested ]] && return
    mkdir -p "$folder"
    local line="$COMMON --trainer.default_root_dir $folder --trainer.enable_progress_bar false $flags"
    local resume=
    [[ -e $folder/checkpoints/last.ckpt ]] && resume="--ckpt_path last"
    # shellcheck disable=SC2086 # flags are words
    if "$PYTHON" -W ignore -m vision fit $line $resume >> "$folder/log" 2>&1 &&
        "$PYTHON" -W ignore -m vision test $line --ckpt_path best >> "$folder/log" 2>&1; then
        touch "$folder/tested"
        echo "$name: $(grep -o 'test/accuracy  *[^0-9]*[0-9.]*' "$folder/log" | tail -1)"
    else
        echo "$name: $(tail -1 "$folder/log")"
    fi
}
export -f run

grep : "$settings" | xargs -d '\n' -P "$jobs" -I{} bash -c 'run "$1"' _ {}
