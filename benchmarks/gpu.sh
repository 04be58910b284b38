#!/usr/bin/env bash
# What still waits for a GPU: a model of all subjects in four styles, and the time of 2048 x 2048.
# Each step ends within ten minutes and goes on where it stopped when it is run again.
#
#   benchmarks/gpu.sh data | tokenizer | model | score | highres
#
# DATA and RUN name the folders; STEPS_VQ and STEPS shorten a trial on a CPU.
set -euo pipefail
data=${DATA:-emoji-all} run=${RUN:-run-gpu}

train() { # part, folder, then its arguments; Ctrl-C after nine minutes saves the state
    local resume=()
    [ -f "$2/state.pt" ] && resume=(--resume)
    timeout -s INT 540 tokenshuffle train "$1" "$data" -o "$2" "${@:3}" "${resume[@]}" || [ $? -eq 124 ]
}

case ${1:-} in
data) tokenshuffle data emoji "$data" --subjects all --styles 3d,modern,flat,noto --size "${SIZE:-256}" ;;
tokenizer) train tokenizer "$run/vq" --batch 64 --crop 128 --steps "${STEPS_VQ:-20000}" ;;
model) train model "$run/model" --image-tokenizer "$run/vq/final.safetensors" --batch 64 --steps "${STEPS:-40000}" ;;
score) tokenshuffle eval retrieval "$data" --model "$run/model/final.safetensors" --sheet "$run/sheet.png" ;;
highres) python "$(dirname "$0")/highres.py" --preset paper-2.7b --size 2048 ;;
*) sed -n '2,7p' "$0" && exit 2 ;;
esac
