#!/usr/bin/env bash
# Run the tests: `scripts/test.sh [pytest arguments]`.
#
#   scripts/test.sh                      everything
#   scripts/test.sh -m "not slow"        what takes less than 5 s each
#   scripts/test.sh tests/core -k pack   as pytest has it
#
# Nothing reaches the network. Tests of real, published models need a folder of them: QUANTKIT_SHARED, by default the
# directory `shared` beside the checkout; where it does not exist they are skipped, and the summary says so.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

export QUANTKIT_SHARED=${QUANTKIT_SHARED:-$(dirname -- "$root")/shared}
[[ -d $QUANTKIT_SHARED ]] || say "no $QUANTKIT_SHARED: the tests of real models are skipped; set QUANTKIT_SHARED to run them"
export HF_HUB_OFFLINE=1 # the tests of the Hub bring their own, on the loopback interface
# the models of the tests are so small that a second thread costs more than it gives
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# each worker imports torch and takes about 1.5 GB
exec "$python" -m pytest -rs -n logical --maxprocesses 4 --dist worksteal "$@"
