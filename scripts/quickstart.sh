#!/usr/bin/env bash
# Quantize the embedded model to 4 bits, check what was written, measure what it costs, and let it speak: one or two
# minutes on one core, without network once the environment is installed. `scripts/quickstart.sh [output]`
set -euo pipefail
given=${1:-}
[[ -z $given || $given = /* ]] || given=$PWD/$given
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
export HF_HUB_OFFLINE=1
# the model is so small that a second thread costs more than it gives, on a busy machine many times more
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}

output=${given:-out/tiny-w4}

# step NAME quantkit-arguments…: run one command, stop at its failure and name it
step() {
    local name=$1 status=0 started=$SECONDS word
    shift
    printf '\n== %s\n$ quantkit' "$name"
    for word in "$@"; do
        case $word in *" "*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    printf '\n'
    "$python" -m quantkit "$@" || status=$?
    if ((status)); then
        say "the step '$name' failed with exit code $status"
        exit "$status"
    fi
    printf '(%d s)\n' "$((SECONDS - started))"
}

step "quantize the embedded model to 4 bits" quantize tiny --wbits 4 --group-size 32 \
    --calibration embedded --samples 64 --seqlen 128 -o "$output" --overwrite
step "check what was written" check "$output" --against tiny
step "perplexity before" evaluate tiny --text embedded-test --seqlen 256
step "perplexity after" evaluate "$output" --text embedded-test --seqlen 256
step "let it speak" generate "$output" --prompt "Mira of Nethby writes to Nadia."
printf '\nThe quantized model is in %s; it loads with transformers:\n' "$output"
printf '  AutoModelForCausalLM.from_pretrained("%s")\n' "$output"
