#!/usr/bin/env bash
# What still waits for a GPU: an elastic model of all subjects in four styles, and the time of
# 2048 x 2048.
# Each step ends within ten minutes and goes on where it stopped when it is run again.
#
#   benchmarks/gpu.sh data | tokenizer | codes | model | score | highres
#
# DATA and RUN name the folders; STEPS_VQ and STEPS shorten a trial on a CPU.
set -euo pipefail
data=${DATA:-emoji-all} run=${RUN:-run-gpu}

train() { # part, data, folder, then its arguments; Ctrl-C after nine minutes saves the state
    local resume=()
    [ -d "$3/state" ] && resume=(--resume)
    timeout -s INT 540 tokenshuffle train "$1" "$2" -o "$3" "${@:4}" "${resume[@]}" || [ $? -eq 124 ]
}

vq=$run/vq/final.safetensors model=$run/model/final.safetensors
case ${1:-} in
data) tokenshuffle data emoji "$data" --subjects all --styles 3d,modern,flat,noto --size "${SIZE:-256}" --compositions "${COMPOSITIONS:-40000}" ;;
tokenizer) train tokenizer "$data/composed" "$run/vq" --batch 64 --crop 128 --side "${SIZE:-256}" --steps "${STEPS_VQ:-20000}" ;;
codes) tokenshuffle data codes "$data/composed" -o "$run/codes" --sizes "${SIZE:-256}x${SIZE:-256}" --image-tokenizer "$vq" --batch 128 ;;
model) train model "$run/codes" "$run/model" --image-tokenizer "$vq" --windows 2,1,4 --window-head 128 --batch 64 --steps "${STEPS:-40000}" ;;
score)
    tokenshuffle eval retrieval "$data" --model "$model" --sheet "$run/sheet.png"
    tokenshuffle eval compositional "$data" --model "$model"
    ;;
highres) python "$(dirname "$0")/highres.py" --preset paper-2.7b --size 2048 ;;
*) sed -n '2,8p' "$0" && exit 2 ;;
esac
