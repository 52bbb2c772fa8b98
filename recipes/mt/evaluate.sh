#!/usr/bin/env bash
# Translate one subset of a binarised data set and score it.
#
# Writes OUTPUT/generated.txt (what fairseq-generate printed) and OUTPUT/score.json.
# Works with any checkpoint that fairseq-train wrote, ours or not; several, separated by colons,
# make an ensemble. Every test sentence must come back translated, or the script stops.
# Time: minutes on a GPU; about 1,000 short sentences a minute on two CPU cores (estimate).
#
# Launch:
#   recipes/mt/evaluate.sh --checkpoint run/averaged.pt --data-bin data/bin --output run \
#       --reference test.en --remove-bpe sentencepiece
#   recipes/mt/evaluate.sh --checkpoint a.pt:b.pt --data-bin data/bin --output ensemble \
#       --remove-bpe subword_nmt --tokenised-reference test.tok.en --lowercase

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

OPTIONS='Options:
  --checkpoint A.pt[:B.pt]     what translates
  --data-bin DIR               what fairseq-preprocess wrote
  --output DIR                 where the two files go
  --subset NAME                test, valid or another subset (default: test)
  --source-lang X              language codes; fairseq infers them from the folder
  --target-lang Y              when they are not given
  --beam N                     beam width (default: 5)
  --lenpen X                   length penalty (default: 1.0)
  --max-tokens N               tokens in one batch (default: 4096)
  --remove-bpe NAME            sentencepiece, subword_nmt or none (default: none)
  --reference FILE             plain text: sacreBLEU and chrF
  --detokenise NAME            none or moses:LANG (default: none)
  --tokenised-reference FILE   tokenised text: the legacy tokenised BLEU
  --tokenised                  the same against the references in the data set
  --compound-split             split at hyphens before the tokenised BLEU
  --lowercase                  ignore case
  -- FLAGS                     everything after -- is passed on to fairseq-generate'

CHECKPOINT="" DATA_BIN="" SUBSET=test BEAM=5 LENPEN=1.0 REMOVE_BPE=none MAX_TOKENS=4096
LANGUAGE_FLAGS=() SCORE_FLAGS=() GENERATE_FLAGS=()

parse_evaluate_options() {
    while (($#)); do
        case "$1" in
            -h | --help) usage && exit 0 ;;
            --lowercase | --compound-split | --tokenised) SCORE_FLAGS+=("$1") ;;
            --)
                GENERATE_FLAGS=("${@:2}")
                break
                ;;
            --*)
                (($# > 1)) || die "option $1 is unknown or needs a value; see $0 --help"
                set_evaluate_option "$1" "$2"
                shift
                ;;
            *) die "unknown option $1; see $0 --help" ;;
        esac
        shift
    done
}

set_evaluate_option() {
    case "$1" in
        --checkpoint) CHECKPOINT="$2" ;;
        --data-bin) DATA_BIN="$2" ;;
        --output) OUTPUT="$2" ;;
        --subset) SUBSET="$2" ;;
        --beam) BEAM="$2" ;;
        --lenpen) LENPEN="$2" ;;
        --max-tokens) MAX_TOKENS="$2" ;;
        --remove-bpe) REMOVE_BPE="$2" ;;
        --source-lang | --target-lang) LANGUAGE_FLAGS+=("$1" "$2") ;;
        --reference | --detokenise) SCORE_FLAGS+=("$1" "$2") ;;
        --tokenised-reference) SCORE_FLAGS+=(--tokenised "$1" "$2") ;;
        *) die "unknown option $1; see $0 --help" ;;
    esac
}

check_evaluate_options() {
    local path paths
    [[ -n "$CHECKPOINT" ]] || die "which checkpoint? add --checkpoint FILE"
    [[ -n "$DATA_BIN" ]] || die "which data? add --data-bin DIR"
    [[ -n "$OUTPUT" ]] || die "where to? add --output DIR"
    [[ -d "$DATA_BIN" ]] || die "--data-bin $DATA_BIN is not a folder"
    IFS=: read -ra paths <<<"$CHECKPOINT"
    for path in "${paths[@]}"; do
        [[ -f "$path" ]] || die "--checkpoint $path does not exist"
    done
}

generate() {
    local bpe=()
    [[ "$REMOVE_BPE" == none ]] || bpe=("--remove-bpe=$REMOVE_BPE")
    "$PYTHON" -m fairseq_cli.generate "$DATA_BIN" \
        --user-dir "$USER_DIR" \
        --path "$CHECKPOINT" \
        --task translation \
        "${LANGUAGE_FLAGS[@]}" \
        --gen-subset "$SUBSET" \
        --beam "$BEAM" \
        --lenpen "$LENPEN" \
        --max-tokens "$MAX_TOKENS" \
        --required-batch-size-multiple 1 \
        --no-progress-bar \
        "${bpe[@]}" \
        "${GENERATE_FLAGS[@]}" \
        >"$OUTPUT/generated.txt.partial" 2>"$OUTPUT/generate.log" ||
        fail "$?" "fairseq-generate failed; the reason is at the end of $OUTPUT/generate.log"
    mv "$OUTPUT/generated.txt.partial" "$OUTPUT/generated.txt"
}

parse_evaluate_options "$@"
check_evaluate_options
find_python
need_modules torch fairseq sacrebleu
mkdir -p "$OUTPUT" || die "cannot write to $OUTPUT"
say "translating $SUBSET with $CHECKPOINT"
generate
plugin score \
    --generated "$OUTPUT/generated.txt" \
    --checkpoint "$CHECKPOINT" \
    --setting "subset=$SUBSET" \
    --setting "beam=$BEAM" \
    --setting "lenpen=$LENPEN" \
    --setting "remove_bpe=$REMOVE_BPE" \
    --setting "generate_flags=${GENERATE_FLAGS[*]}" \
    --json "$OUTPUT/score.json" \
    "${SCORE_FLAGS[@]}"
