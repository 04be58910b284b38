#!/usr/bin/env bash
# The work that needs a GPU, for one that may be borrowed for ten minutes at a time and has no
# network: each step ends by itself in time, and results go to OUT, in small files.
#
#   benchmarks/gpu.sh check     does it compute what a CPU does, and how fast? At most three minutes;
#                               PARTS=tests for the tests alone (see benchmarks/gpu_check.py)
#   benchmarks/gpu.sh data      the data set of `train`, in RUN/data (18 MB); needs the network
#   benchmarks/gpu.sh train     a model for 256 x 256 to 512 x 256, at most 570 s (SECONDS_IN_ALL)
#   benchmarks/gpu.sh join      OUT/model.safetensors from the pieces that `train` left in OUT
#   benchmarks/gpu.sh decode    the time for a picture, also of 2048 x 2048
#   benchmarks/gpu.sh data-2048 | tokenizer | codes | model | score
#                               one model that grows from 256 to 2048 px; the trainings stop after
#                               nine minutes, and resume when they are run again
#
# RUN is the folder for everything, OUT that for results (default: RUN). `train` goes on from the
# checkpoint INIT if that is set, also from one with int8 weights, which is half as large to send.
# Runs from a checkout, with the python3 in PATH. For a trial on a CPU: DEVICE=cpu, SMALL=1 (of
# check and train), SUBJECTS (a list), SIDE (pixels of the data set), COMPOSITIONS and STEPS (of
# each training, in fp32 and without compiling) and MODELS (of decode).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${RUN:=run-gpu}" "${OUT:=$RUN}"
OUT=$(cd "$OUT" && pwd)
INIT=${INIT:+$(realpath "$INIT")}
cd "$RUN" && RUN=$PWD
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
tokenshuffle=(python3 -m tokenshuffle_core)
side=${SIDE:-2048}

for_nine_minutes() { # Ctrl-C saves the state
    timeout --foreground -s INT 540 "$@" || case $? in 124 | 130) ;; *) return 1 ;; esac
}

case ${1:-} in
check)
    timeout --foreground -k 5 175 python3 -m benchmarks.gpu_check \
        --device "${DEVICE:-cuda}" ${SMALL:+--small} ${PARTS:+--parts $PARTS} \
        --json "$OUT/check.json"
    ;;
data)
    "${tokenshuffle[@]}" data emoji emoji --subjects "${SUBJECTS:-popular}" \
        --styles 3d,modern,flat,noto --size "${SIDE:-256}"
    python3 -m benchmarks.gpu_train prepare emoji data \
        ${COMPOSITIONS:+--compositions "$COMPOSITIONS"}
    du -sh --apparent-size data
    ;;
train)
    seconds=${SECONDS_IN_ALL:-570}
    timeout --foreground -s INT -k 4 "$((seconds - 5))" python3 -m benchmarks.gpu_train train data \
        --work . --out "$OUT" --until "$(($(date +%s) + seconds - 8))" \
        --device "${DEVICE:-cuda}" ${INIT:+--init "$INIT"} ${SMALL:+--small} \
        ${COMPOSITIONS:+--compositions "$COMPOSITIONS"} ${STEPS:+--steps "$STEPS"} 2>&1 |
        tee "$OUT/train.log"
    ;;
join)
    python3 -m benchmarks.pieces "$OUT" "$OUT/model.safetensors"
    ;;
data-2048) # the 3d style has no vector source
    "${tokenshuffle[@]}" data emoji data-2048 --subjects "${SUBJECTS:-popular}" \
        --styles modern,flat,noto --size "$side" --compositions "${COMPOSITIONS:-6000}"
    ;;
tokenizer)
    resume=()
    if compgen -G "vq/state/[0-9]*" >/dev/null; then resume=(--resume); fi
    for_nine_minutes "${tokenshuffle[@]}" train tokenizer data-2048/composed -o vq \
        --preset emoji-2048 --side "$((side / 4))" --crop "$((side / 16))" --batch 48 \
        --steps "${STEPS:-12000}" --learning-rate 1e-3 "${resume[@]}"
    ;;
codes)
    for part in 8 4 2 1; do
        size=$((side / part))
        "${tokenshuffle[@]}" data codes data-2048/composed -o "codes-$((2048 / part))" \
            --sizes "${size}x$size" --image-tokenizer vq/final.safetensors --batch $((4 * part))
    done
    ;;
model)
    cp "$here/recipes/emoji-2048.toml" recipe.toml
    if [ -n "${STEPS:-}" ]; then
        sed -i "s/^steps = .*/steps = $STEPS/; s/bf16/fp32/; s/^compile.*//" recipe.toml
    fi
    for_nine_minutes "${tokenshuffle[@]}" train stages recipe.toml -o stages
    ;;
score)
    for stage in 256 512 1024 2048; do
        model=stages/$stage/final.safetensors
        "${tokenshuffle[@]}" eval retrieval data-2048 --model "$model" --count 48 --batch 8 \
            --sheet "stages/$stage/retrieval.png" --json "$OUT/retrieval-$stage.json"
    done
    "${tokenshuffle[@]}" eval compositional data-2048 --model "$model" --count 16 --batch 8
    ;;
decode)
    decode=(python3 -m benchmarks.decode)
    "${decode[@]}" --models "${MODELS:-111m}" --sizes "$((side / 4))" --json "$OUT/decode.json"
    for weights in int8 fp8; do
        "${decode[@]}" --models "${MODELS:-111m}" --windows 2 --sizes "$((side / 4))" \
            --weights "$weights" --no-plain --no-transformers --json "$OUT/decode-$weights.json"
    done
    "${decode[@]}" --models "${MODELS:-2.7b}" --windows 2 --sizes "$side" --rounds 1 \
        --no-plain --no-transformers --json "$OUT/decode-2048.json"
    ;;
*) sed -n '2,18p' "$here/benchmarks/gpu.sh" && exit 2 ;;
esac
