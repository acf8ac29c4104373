#!/usr/bin/env bash
# Build the source distribution and, from it, the wheel: `scripts/build.sh [directory]`, by default dist/.
set -euo pipefail
directory=${1:-}
[[ -z $directory || $directory = /* ]] || directory=$PWD/$directory
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

exec "$python" -m build --no-isolation --outdir "${directory:-$root/dist}"
