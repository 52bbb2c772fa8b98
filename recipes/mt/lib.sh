# What the recipes beside this file share: options, steps done once, downloads, fairseq calls.
# It is sourced, never run; the caller has set -euo pipefail.
# shellcheck shell=bash
# shellcheck disable=SC2034  # the recipes use what is set here

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
ROOT="$(cd "$HERE/../.." && pwd -P)"
USER_DIR="$ROOT/fixup_mt"

DATA="" OUTPUT="" METHOD=fixup SEED=1 MAX_UPDATE="" AVERAGE=10 URL="" REFERENCE="" LAUNCHER=""
CHECKSUMS="$HERE/checksums.txt"
METHODS=(fixup postnorm prenorm)
PREPARE_ONLY=no DRY_RUN=no STALE=no
EXTRA=()

COMMON_OPTIONS='Options:
  --data DIR         files already on disk, used instead of a download
  --url URL          another place to download from
  --output DIR       everything the recipe writes (default: runs/NAME in the checkout)
  --method NAME      fixup, postnorm or prenorm; t_fixup, fixup_adam and t_fixup_adam where
                     the recipe has them (default: fixup)
  --seed N           random seed of the training (default: 1)
  --max-update N     length of the training in updates
  --average N        how many neighbouring checkpoints are averaged (default: 10)
  --reference FILE   plain-text reference for sacreBLEU, where the recipe has none of its own
  --launcher CMD     what starts the training instead of python, e.g. "torchrun --nproc-per-node 8"
  --checksums FILE   other sha256 sums than those in recipes/mt/checksums.txt
  --prepare-only     stop once the data are binarised
  --dry-run          print the training command and do nothing
  -- FLAGS           everything after -- is passed on to fairseq-train'

say() { printf '[%s] %s\n' "$(basename "$0" .sh)" "$*"; }

# fail STATUS WORDS...: the one line that a script ends with.
fail() {
    printf 'error: %s\n' "${*:2}" >&2
    exit "$1"
}

# die WORDS...: what the user can mend.
die() { fail 2 "$@"; }

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
    die "this needs bash 4.4 or later; here is $BASH_VERSION"

# The head comment of the recipe is its manual.
usage() {
    sed -n '2,/^$/{s/^# \{0,1\}//;p;}' "$0"
    printf '%s\n' "${OPTIONS:-$COMMON_OPTIONS}"
}

parse_options() {
    while (($#)); do
        case "$1" in
            -h | --help) usage && exit 0 ;;
            --prepare-only) PREPARE_ONLY=yes ;;
            --dry-run) DRY_RUN=yes ;;
            --)
                EXTRA=("${@:2}")
                break
                ;;
            --data | --url | --output | --method | --seed | --max-update | --average | \
                --reference | --launcher | --checksums)
                (($# > 1)) || die "option $1 needs a value; see $0 --help"
                set_option "$1" "$2"
                shift
                ;;
            *) die "unknown option $1; see $0 --help (fairseq's own flags go after --)" ;;
        esac
        shift
    done
    check_options
}

set_option() {
    case "$1" in
        --data) DATA="$2" ;;
        --url) URL="$2" ;;
        --output) OUTPUT="$2" ;;
        --method) METHOD="$2" ;;
        --seed) SEED="$2" ;;
        --max-update) MAX_UPDATE="$2" ;;
        --average) AVERAGE="$2" ;;
        --reference) REFERENCE="$2" ;;
        --launcher) LAUNCHER="$2" ;;
        --checksums) CHECKSUMS="$2" ;;
    esac
}

check_options() {
    [[ " ${METHODS[*]} " == *" $METHOD "* ]] ||
        die "--method is $METHOD; choose one of: ${METHODS[*]}"
    check_count --seed "$SEED"
    check_count --max-update "${MAX_UPDATE:-1}"
    check_count --average "$AVERAGE"
    [[ -z "$DATA" || -e "$DATA" ]] || die "--data $DATA does not exist"
    [[ -z "$REFERENCE" || -f "$REFERENCE" ]] || die "--reference $REFERENCE does not exist"
    [[ -f "$CHECKSUMS" ]] || die "--checksums $CHECKSUMS does not exist"
}

check_count() {
    [[ "$2" =~ ^[1-9][0-9]*$ ]] || die "$1 is $2; give a whole number above 0"
}

# fairseq's dependencies warn on every start; what concerns the user comes as a log line.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"

# --- the environment ---------------------------------------------------------------------------

find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        command -v "$PYTHON" >/dev/null || die "PYTHON is set to $PYTHON, which does not run"
    elif [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x "$ROOT/.venv/bin/python" ]]; then
        PYTHON="$ROOT/.venv/bin/python"
    else
        PYTHON=python3
        need_tools python3
    fi
    LAUNCHER="${LAUNCHER:-$PYTHON}"
}

need_tools() {
    local tool
    for tool in "$@"; do
        command -v "$tool" >/dev/null || die "$tool is missing; install it and run this again"
    done
}

need_modules() {
    local missing
    missing="$("$PYTHON" - "$@" <<'PY'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
PY
)"
    [[ -z "$missing" ]] || die "$PYTHON lacks: $missing; activate the project's environment" \
        "or install its requirements (see README.md)"
}

has_cuda() {
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}

# PYTHONPATH lets `python -m fixup_mt` run from any folder; fairseq finds the plugin by --user-dir.
plugin() { PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m fixup_mt "$@"; }

# --- steps that are done once ------------------------------------------------------------------

# step FOLDER NAME KEY COMMAND...: skipped when it was finished before with the same KEY (what its
# result depends on) and nothing before it had to be done anew.
step() {
    local marker="$1/.done-$2" name="$2" key="$3"
    if [[ "$STALE" == no && -f "$marker" && "$(<"$marker")" == "$key" ]]; then
        say "$name: done before"
        return
    fi
    STALE=yes
    say "$name"
    mkdir -p "$1"
    rm -f "$marker"
    shift 3
    "$@"
    printf '%s\n' "$key" >"$marker.partial"
    mv "$marker.partial" "$marker"
}

# whole_folder TARGET COMMAND...: COMMAND fills the folder named by its last argument, which takes
# the name TARGET only when complete, so that a killed step leaves nothing that looks finished.
whole_folder() {
    local target="$1"
    shift
    rm -rf "$target.partial"
    mkdir -p "$target.partial"
    "$@" "$target.partial"
    rm -rf "$target"
    mv "$target.partial" "$target"
}

# One preparation at a time in a folder, for runs started side by side.
lock_folder() {
    mkdir -p "$1" || die "cannot write to $1; choose another folder with --output"
    if command -v flock >/dev/null; then
        exec 9>"$1/.lock"
        flock --nonblock 9 || {
            say "another run is preparing $1: waiting for it"
            flock 9
        }
    fi
}

unlock_folder() { exec 9>&-; }

# --- downloads ---------------------------------------------------------------------------------

# fetch URL FILE: a broken transfer is resumed; FILE appears only when complete.
fetch() {
    [[ ! -f "$2" ]] || return 0
    need_tools curl
    mkdir -p "$(dirname "$2")"
    say "downloading $1"
    curl --fail --location --silent --show-error --retry 3 --continue-at - \
        --output "$2.partial" "$1" ||
        die "could not download $1; run this again to resume, or give the files with --data DIR"
    mv "$2.partial" "$2"
}

# verify FILE NAME [ORIGIN]: against checksums.txt, else against the digest recorded at first use.
# ORIGIN is the file to replace when the sum is wrong, where FILE is a passing copy of it.
verify() {
    need_tools sha256sum awk
    local found known record="$OUTPUT/checksums/$2.sha256"
    found="$(sha256sum <"$1")" && found="${found%% *}"
    known="$(awk -v name="$2" '!/^#/ && $2 == name { print $1 }' "$CHECKSUMS")"
    if [[ -z "$known" && -f "$record" ]]; then
        known="$(<"$record")"
    elif [[ -z "$known" ]]; then
        mkdir -p "$OUTPUT/checksums"
        printf '%s\n' "$found" >"$record.partial"
        mv "$record.partial" "$record"
        say "no official sha256 is known for $2; recorded $found in $record"
        return
    fi
    [[ "$found" == "$known" ]] ||
        die "${3:-$1} is not the expected $2 (sha256 $found, expected $known);" \
            "nothing was deleted: replace that file and run this again"
}

# --- fairseq -----------------------------------------------------------------------------------

preprocess() { "$PYTHON" -m fairseq_cli.preprocess --user-dir "$USER_DIR" "$@"; }

# train: TRAIN_COMMAND, into $RUN; fairseq itself resumes from checkpoint_last.pt.
train() {
    local status=0
    mkdir -p "$RUN"
    "${TRAIN_COMMAND[@]}" 2>&1 | tee -a "$RUN/train.log" || status=$?
    ((status == 0)) || fail "$status" "training stopped with status $status; the reason is at the end of" \
        "$RUN/train.log, and running this again goes on from the last checkpoint"
}

# build_train_command BIN FLAGS...: sets TRAIN_COMMAND. Later flags win, so the user's come last.
build_train_command() {
    local flag launcher
    HAS_CUDA=no
    if has_cuda; then HAS_CUDA=yes; fi
    read -ra launcher <<<"$LAUNCHER"
    TRAIN_COMMAND=("${launcher[@]}" -m fairseq_cli.train)
    for flag in "$@" --user-dir "$USER_DIR" --required-batch-size-multiple 1 \
        --save-dir "$RUN/checkpoints" --tensorboard-logdir "$RUN/tensorboard" \
        --seed "$SEED" --max-update "$MAX_UPDATE" "${EXTRA[@]}"; do
        if [[ "$flag" == --fp16 && "$HAS_CUDA" == no ]]; then
            say "no GPU found: training in float32, without --fp16"
        else
            TRAIN_COMMAND+=("$flag")
        fi
    done
}

# Checkpoints that the training is certain not to leave are missed now, not when it is over.
check_average() {
    local flag limit
    for flag in --keep-last-epochs --max-epoch --max-update; do
        limit="$(last_value "$flag" "${TRAIN_COMMAND[@]}")"
        [[ ! "$limit" =~ ^[1-9][0-9]*$ ]] || ((AVERAGE <= limit)) ||
            die "--average $AVERAGE checkpoints, but $flag $limit leaves $limit at the most;" \
                "ask for fewer, or add -- $flag $AVERAGE"
    done
}

# last_value FLAG WORDS...: what follows the last FLAG, or nothing.
last_value() {
    local flag="$1" found=""
    shift
    while (($#)); do
        [[ "$1" != "$flag" ]] || found="${2:-}"
        shift
    done
    printf '%s' "$found"
}

# One flag a line, to be read and pasted.
print_train_command() {
    printf '%q' "${TRAIN_COMMAND[0]}"
    local word
    for word in "${TRAIN_COMMAND[@]:1}"; do
        if [[ "$word" == -* ]]; then printf ' \\\n    %q' "$word"; else printf ' %q' "$word"; fi
    done
    printf '\n'
}

# recipe NAME ARGUMENTS...: the course of every recipe. It defines set_method_flags, prepare and
# set_evaluate_flags, and fills MODULES and COMMON_FLAGS.
recipe() {
    OUTPUT_NAME="$1"
    shift
    parse_options "$@"
    set_method_flags
    find_python
    OUTPUT="${OUTPUT:-$ROOT/runs/$OUTPUT_NAME}"
    PREPARED="$OUTPUT/data"
    RUN="$OUTPUT/$METHOD-seed$SEED"
    build_train_command "$PREPARED/bin" "${COMMON_FLAGS[@]}" "${METHOD_FLAGS[@]}"
    check_average
    if [[ "$DRY_RUN" == no ]]; then
        need_tools gzip tar tee
        need_modules torch fairseq sacrebleu "${MODULES[@]}"
        lock_folder "$PREPARED"
        prepare
        unlock_folder
        [[ "$PREPARE_ONLY" == no ]] || exit 0
    fi
    run_training
    set_evaluate_flags
    evaluate --data-bin "$PREPARED/bin" "${EVALUATE_FLAGS[@]}"
}

# run_training: TRAIN_COMMAND, then average the window that is best on the validation set.
run_training() {
    if [[ "$DRY_RUN" == yes ]]; then
        print_train_command
        exit 0
    fi
    step "$RUN" train "${TRAIN_COMMAND[*]}" train
    step "$RUN" average "$AVERAGE" plugin average --checkpoint-dir "$RUN/checkpoints" \
        --best-by-valid "$AVERAGE" --output "$RUN/averaged.pt" --overwrite
}

# evaluate FLAGS...: translate the test set with the averaged checkpoint and score it.
evaluate() {
    step "$RUN" evaluate "$*" "$HERE/evaluate.sh" --checkpoint "$RUN/averaged.pt" \
        --output "$RUN" "$@"
    say "results: $RUN/score.json, checkpoints: $RUN/checkpoints, log: $RUN/train.log"
}
