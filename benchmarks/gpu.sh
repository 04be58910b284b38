#!/usr/bin/env bash
# The work that needs a GPU: whether it computes what a CPU does, one model that grows from 256 to
# 2048 px, and the time for a 2048 x 2048 picture with a model of the paper's size. `check` takes at
# most three minutes; the trainings stop after nine, because a borrowed GPU may be available for only
# ten at a time. Every step but `check` and `score` resumes when it is run again. Only `data` needs
# the network.
#
#   benchmarks/gpu.sh check | data | tokenizer | codes | model | score | decode
#
# RUN is the folder for everything; results go to OUT if that is set. Runs from a checkout, with the
# python3 in PATH. For a trial on a CPU: DEVICE=cpu, SMALL=1 (of check), SUBJECTS (a list), SIDE
# (pixels instead of 2048), COMPOSITIONS and STEPS (of each training, in fp32 and without compiling)
# and MODELS (of decode).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${RUN:=run-gpu}" "${OUT:=$RUN}"
OUT=$(cd "$OUT" && pwd)
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
        --device "${DEVICE:-cuda}" ${SMALL:+--small} --json "$OUT/check.json"
    ;;
data) # the 3d style has no vector source
    "${tokenshuffle[@]}" data emoji data --subjects "${SUBJECTS:-popular}" \
        --styles modern,flat,noto --size "$side" --compositions "${COMPOSITIONS:-6000}"
    ;;
tokenizer)
    resume=()
    if compgen -G "vq/state/[0-9]*" >/dev/null; then resume=(--resume); fi
    for_nine_minutes "${tokenshuffle[@]}" train tokenizer data/composed -o vq --preset emoji-2048 \
        --side "$((side / 4))" --crop "$((side / 16))" --batch 48 --steps "${STEPS:-12000}" \
        --learning-rate 1e-3 "${resume[@]}"
    ;;
codes)
    for part in 8 4 2 1; do
        size=$((side / part))
        "${tokenshuffle[@]}" data codes data/composed -o "codes-$((2048 / part))" \
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
        "${tokenshuffle[@]}" eval retrieval data --model "$model" --count 48 --batch 8 \
            --sheet "stages/$stage/retrieval.png" --json "$OUT/retrieval-$stage.json"
    done
    "${tokenshuffle[@]}" eval compositional data --model "$model" --count 16 --batch 8
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
*) sed -n '2,13p' "$here/benchmarks/gpu.sh" && exit 2 ;;
esac
