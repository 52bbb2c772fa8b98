#!/usr/bin/env bash
# Multi30k German to English: image captions, 29,000 pairs. A real task that trains on a laptop.
#
# Reproduces: nothing published by the Fixup paper; it compares Fixup, T-Fixup and both carried over to
#   depth with LayerNorm (post-norm and pre-norm) on the same small Transformer: 3+3 layers, 256 wide, 1024
#   inside, 4 heads.
# Target: the sacreBLEU scores on test_2016_flickr in recipes/README.md.
# Hardware: two CPU cores, 4 GB of memory, 2 GB of disk a run. One GPU is used where there is one.
# Time (estimates): preparation 1 minute; training some hours on two cores, minutes on a GPU.
#
# Launch:
#   recipes/mt/multi30k.sh                                   # downloads, prepares, trains, scores
#   recipes/mt/multi30k.sh --data DIR --method postnorm      # DIR holds train.de.gz and so on
#   recipes/mt/multi30k.sh --method t_fixup --seed 2 -- --lr 0.001 --dropout 0.2
# Several GPUs: --launcher "torchrun --nproc-per-node 2" -- --distributed-world-size 2
# Several nodes, inside a Slurm allocation with one task a node: --launcher "srun python" --
#   --distributed-world-size 8 --distributed-port 29500
#
# Started again, it goes on where it stopped. Results: OUTPUT/METHOD-seedN/score.json.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

OFFICIAL_URL=https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw
PIECES="${PIECES:-5000}"
MODULES=(sentencepiece)
SPLITS=(train val test_2016_flickr)
AVERAGE=5

METHODS=(fixup t_fixup fixup_adam t_fixup_adam postnorm prenorm)

# What differs between the methods, chosen on the validation set: of Fixup and LayerNorm the dropout of
# 0.1 and 0.3 and the length that belongs to it, of all the length penalty of 1, 1.5 and 2.
set_method_flags() {
    case "$METHOD" in
        fixup | t_fixup | fixup_adam | t_fixup_adam)
            MAX_UPDATE="${MAX_UPDATE:-5420}"
            LENPEN=2.0
            METHOD_FLAGS=(
                --arch transformer_fixup
                --fixup-method "$METHOD"
                --fixup-output-bias frequencies
                --dropout 0.3
            )
            ;;
        postnorm)
            MAX_UPDATE="${MAX_UPDATE:-2710}"
            LENPEN=1.5
            METHOD_FLAGS=(
                --arch transformer
                --dropout 0.1
            )
            ;;
        prenorm)
            MAX_UPDATE="${MAX_UPDATE:-5420}"
            LENPEN=2.0
            METHOD_FLAGS=(
                --arch transformer
                --encoder-normalize-before
                --decoder-normalize-before
                --dropout 0.3
            )
            ;;
    esac
}

COMMON_FLAGS=(
    --task translation
    --source-lang de
    --target-lang en
    --encoder-layers 3
    --decoder-layers 3
    --encoder-embed-dim 256
    --decoder-embed-dim 256
    --encoder-ffn-embed-dim 1024
    --decoder-ffn-embed-dim 1024
    --encoder-attention-heads 4
    --decoder-attention-heads 4
    --optimizer adam
    --adam-betas '(0.9, 0.98)'
    --lr 0.002
    --lr-scheduler inverse_sqrt
    --warmup-updates 100
    --warmup-init-lr 1e-07
    --weight-decay 0.0001
    --clip-norm 1.0
    --criterion label_smoothed_cross_entropy
    --label-smoothing 0.1
    --max-tokens 2048
    --required-batch-size-multiple 1
    --keep-last-epochs 10
    --log-format simple
    --log-interval 100
    --distributed-world-size 1
)

# One file of text, from --data (plain or gzip) or from the official place.
collect_text() {
    local name="$1" target="$2/$1" source="$DATA/$1"
    if [[ -n "$DATA" && -f "$DATA/$name" ]]; then
        cp "$source" "$target"
    else
        if [[ -n "$DATA" ]]; then
            source="$DATA/$name.gz"
            [[ -f "$source" ]] || die "$DATA has neither $name nor $name.gz"
        else
            source="$OUTPUT/download/$name.gz"
            fetch "${URL:-$OFFICIAL_URL}/$name.gz" "$source"
        fi
        gzip -dc "$source" >"$target" || die "$source is damaged; remove it and run this again"
    fi
    verify "$target" "$name" "$source"
}

collect_texts() {
    local split language
    for split in "${SPLITS[@]}"; do
        for language in de en; do
            collect_text "$split.$language" "$1"
        done
    done
}

binarise() {
    preprocess \
        --source-lang de \
        --target-lang en \
        --trainpref "$PREPARED/pieces/train" \
        --validpref "$PREPARED/pieces/valid" \
        --testpref "$PREPARED/pieces/test" \
        --joined-dictionary \
        --workers 2 \
        --destdir "$1"
}

prepare() {
    step "$PREPARED" raw "$(<"$CHECKSUMS")" whole_folder "$PREPARED/raw" collect_texts
    step "$PREPARED" pieces "$PIECES" whole_folder "$PREPARED/pieces" \
        "$PYTHON" "$HERE/prepare_multi30k.py" "$PREPARED/raw" "$PIECES"
    step "$PREPARED" bin de-en whole_folder "$PREPARED/bin" binarise
}

set_evaluate_flags() {
    EVALUATE_FLAGS=(
        --source-lang de
        --target-lang en
        --beam 5
        --lenpen "$LENPEN"
        --remove-bpe sentencepiece
        --reference "${REFERENCE:-$PREPARED/raw/test_2016_flickr.en}"
    )
}

recipe multi30k "$@"
