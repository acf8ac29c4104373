#!/usr/bin/env bash
# Check style, formatting and types, the tree as it is: `scripts/check.sh`. Repair what can be: `scripts/check.sh --fix`.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

case ${1:-} in
    --fix)
        "$python" -m ruff check --fix --quiet || true # what is left is reported below
        "$python" -m ruff format --quiet
        ;;
    "") ;;
    *)
        say "unknown argument $1; the only one is --fix"
        exit 2
        ;;
esac

failed=0
for tool in "ruff check" "ruff format --check" "mypy"; do
    # shellcheck disable=SC2086  # a tool and its arguments
    "$python" -m $tool || { say "$tool failed"; failed=1; }
done
exit "$failed"
