#!/usr/bin/env bash
# WMT English to German in the setting of Ott et al. (2018): 4.5 million pairs, big Transformer.
#
# Reproduces: the machine-translation table of Fixup (Zhang et al., ICLR 2019), on newstest2014.
# Target, tokenised and compound-split BLEU: Fixup 29.3, LayerNorm (--method postnorm) 29.3. The
#   same translations score about 0.7 lower in sacreBLEU, which is printed beside it (detokenised,
#   against sacrebleu's own wmt14/full).
# Hardware: 8 GPUs with 16 GB or more, 32 GB of memory, 80 GB of disk a run (estimates).
# Time: Ott et al. report 85 minutes on 128 V100 GPUs for 29.3; on 8 GPUs with 16 accumulated
#   batches expect about a day on that class (estimate). Not run by us in full.
#
# Launch: the default is 8 GPUs on one node with the batch of 128 (--update-freq 16, --lr 0.001).
#   recipes/mt/wmt16_en_de.sh --data wmt16_en_de.tar.gz      # or the unpacked folder
#   recipes/mt/wmt16_en_de.sh --data DIR --method postnorm
# 8 GPUs with their own batch: -- --update-freq 1 --lr 0.0005
# fairseq starts one process for each GPU by itself; torchrun does too:
#   --launcher "torchrun --nproc-per-node 8"
# 128 GPUs, inside a Slurm allocation of 16 nodes with one task a node: --launcher "srun python" --
#   --distributed-world-size 128 --distributed-port 29500 --update-freq 1
#
# Data: wmt16_en_de.tar.gz as Google prepared it (32,000 joint BPE pieces). It lies on Google Drive
# (id 0B_bZck-ksdkpM25jRUN2X2UxMm8), which often answers with a web page instead of the file:
# getting it with a browser and passing it with --data is the reliable way. No official sha256 of
# it is known to us: the digest of the first use is recorded and later ones are held to it.
# Without network, sacreBLEU needs --reference FILE (newstest2014 in German, 3,003 lines of plain
# text); with neither, only the tokenised BLEU is printed.
# Differs from the paper: the 10 averaged checkpoints are the neighbouring epochs that are best on
# newstest2013 (of the last 20); dropout 0.3 and 30,000 updates are our choice for all methods.
#
# Started again, it goes on where it stopped. Results: OUTPUT/METHOD-seedN/score.json.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DRIVE_ID=0B_bZck-ksdkpM25jRUN2X2UxMm8
DRIVE=https://drive.usercontent.google.com/download
OFFICIAL_URL="$DRIVE?id=$DRIVE_ID&export=download&confirm=t"
TRAIN_TEXT=train.tok.clean.bpe.32000
VALID_TEXT=newstest2013.tok.bpe.32000
TEST_TEXT=newstest2014.tok.bpe.32000
NUM_WORDS=32768
WORKERS="$(nproc 2>/dev/null || echo 1)"
MODULES=(sacremoses)

# The hyper-parameters of each method: the only place they stand.
set_method_flags() {
    MAX_UPDATE="${MAX_UPDATE:-30000}"
    case "$METHOD" in
        fixup)
            METHOD_FLAGS=(
                --arch transformer_fixup_vaswani_wmt_en_de_big
                --dropout 0.3
            )
            ;;
        postnorm)
            METHOD_FLAGS=(
                --arch transformer_vaswani_wmt_en_de_big
                --share-all-embeddings
                --dropout 0.3
            )
            ;;
        prenorm)
            METHOD_FLAGS=(
                --arch transformer_vaswani_wmt_en_de_big
                --encoder-normalize-before
                --decoder-normalize-before
                --share-all-embeddings
                --dropout 0.3
            )
            ;;
    esac
}

COMMON_FLAGS=(
    --task translation
    --source-lang en
    --target-lang de
    --optimizer adam
    --adam-betas '(0.9, 0.98)'
    --lr 0.001
    --lr-scheduler inverse_sqrt
    --warmup-updates 4000
    --warmup-init-lr 1e-07
    --criterion label_smoothed_cross_entropy
    --label-smoothing 0.1
    --weight-decay 0.0
    --clip-norm 0.0
    --max-tokens 3584
    --update-freq 16
    --fp16
    --keep-last-epochs 20
    --log-format simple
    --log-interval 100
)

# The last argument is the folder to fill: six texts, copied from the archive or linked to.
collect_texts() {
    local name language
    if [[ -d "$DATA" && -f "$DATA/$TRAIN_TEXT.en" ]]; then
        ln -s "$(cd "$DATA" && pwd -P)"/*.{en,de} "$1"
    else
        find_archive
        verify "$ARCHIVE" wmt16_en_de.tar.gz
        tar -xzf "$ARCHIVE" -C "$1" || die "$ARCHIVE is damaged; get it again"
    fi
    for name in "$TRAIN_TEXT" "$VALID_TEXT" "$TEST_TEXT"; do
        for language in en de; do
            [[ -f "$1/$name.$language" ]] || die "$name.$language is missing; give the complete" \
                "wmt16_en_de.tar.gz, or its unpacked folder, with --data"
        done
    done
}

find_archive() {
    if [[ -z "$DATA" ]]; then
        ARCHIVE="$OUTPUT/download/wmt16_en_de.tar.gz"
        fetch "${URL:-$OFFICIAL_URL}" "$ARCHIVE"
        check_download "$ARCHIVE"
    elif [[ -d "$DATA" ]]; then
        ARCHIVE="$DATA/wmt16_en_de.tar.gz"
        [[ -f "$ARCHIVE" ]] || die "$DATA holds neither wmt16_en_de.tar.gz nor $TRAIN_TEXT.en"
    else
        ARCHIVE="$DATA"
    fi
}

check_download() {
    [[ "$(od -An -tx1 -N2 "$1")" == *"1f 8b"* ]] && return
    rm -f "$1"
    die "Google Drive sent a web page instead of the archive; get the file $DRIVE_ID with a" \
        "browser and pass it with --data FILE"
}

binarise() {
    preprocess \
        --source-lang en \
        --target-lang de \
        --trainpref "$TEXT/$TRAIN_TEXT" \
        --validpref "$TEXT/$VALID_TEXT" \
        --testpref "$TEXT/$TEST_TEXT" \
        --nwordssrc "$NUM_WORDS" \
        --nwordstgt "$NUM_WORDS" \
        --joined-dictionary \
        --workers "$WORKERS" \
        --destdir "$1"
}

# Whole words again: the reference of the tokenised BLEU.
join_words() { sed -E 's/@@( |$)//g' "$TEXT/$TEST_TEXT.de" >"$1/test.de"; }

prepare() {
    TEXT="$PREPARED/text"
    step "$PREPARED" text joint-bpe whole_folder "$TEXT" collect_texts
    step "$PREPARED" words de whole_folder "$PREPARED/words" join_words
    step "$PREPARED" bin en-de whole_folder "$PREPARED/bin" binarise
}

# Sets REFERENCE to sacrebleu's own test set where it can be had.
find_reference() {
    local file="$PREPARED/newstest2014.de"
    [[ -z "$REFERENCE" ]] || return 0
    if [[ ! -f "$file" ]]; then
        if ! "$PYTHON" -m sacrebleu -t wmt14/full -l en-de --echo ref >"$file.partial" 2>/dev/null
        then
            rm -f "$file.partial"
            say "no sacreBLEU: sacrebleu cannot download wmt14/full; give --reference FILE"
            return
        fi
        mv "$file.partial" "$file"
    fi
    REFERENCE="$file"
}

set_evaluate_flags() {
    find_reference
    EVALUATE_FLAGS=(
        --source-lang en
        --target-lang de
        --beam 4
        --lenpen 0.6
        --remove-bpe subword_nmt
        --tokenised-reference "$PREPARED/words/test.de"
        --compound-split
        --detokenise moses:de
    )
    [[ -z "$REFERENCE" ]] || EVALUATE_FLAGS+=(--reference "$REFERENCE")
}

recipe wmt16_en_de "$@"
