# Sourced by the other scripts: makes .venv with quantkit, its dependencies and the tools of its developers, once.
#
# Sets `root` (the checkout) and `python` (the environment's interpreter) and changes to the checkout. What was installed
# is noted in .venv/.quantkit-stamp when it is complete; while that note agrees with the checkout nothing is installed.
#
#   PYTHON=/path/to/python3.12    which Python to make the environment with; otherwise the first that is 3.11 or newer
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS …    reach pip as they are. On Linux pip takes the CUDA build of
#       torch; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu lets it choose the far smaller CPU build.

root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd) || exit 1
cd -- "$root" || exit 1
python=$root/.venv/bin/python

say() {
    printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
}

# Print a Python that is new enough and can make environments.
_find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        if [[ $candidate = "${PYTHON:-}" ]]; then
            say "PYTHON=$PYTHON is no Python 3.11 or newer with venv and ensurepip"
            return 1
        fi
    done
    say "no Python 3.11 or newer with venv was found; install python3.11 and python3.11-venv, or set PYTHON"
    return 1
}

# Print what an environment that is complete was made from: the place first, because environments cannot be moved.
_expected_stamp() {
    printf '%s\n' "$root"
    "$python" -V 2>&1
    cat pyproject.toml constraints.txt
}

# Run pip, and say every half minute that it is still at work.
_install() {
    local heart status=0
    while sleep 30 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do say "still installing, $((SECONDS - started)) s"; done &
    heart=$!
    # the second constraint is for the environment in which pip builds quantkit itself
    PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip install --no-input \
        --progress-bar off --constraint constraints.txt --editable '.[dev]' >.venv/install.log 2>&1 || status=$?
    kill "$heart" 2>/dev/null
    wait "$heart" 2>/dev/null
    return "$status"
}

_make_environment() {
    local stamp=.venv/.quantkit-stamp base place
    if [[ -f $stamp && $(<"$stamp") = "$(_expected_stamp)" ]]; then
        return
    fi
    if [[ -f $stamp ]]; then
        IFS= read -r place <"$stamp" || true
    fi
    if [[ ${place:-$root} != "$root" ]] || ! "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
    then
        base=$(_find_python) || return
        say "making .venv with $("$base" -V)"
        "$base" -m venv --clear .venv || return
    fi
    rm -f -- "$stamp" # from here on the environment is incomplete
    say "installing quantkit and its dependencies into .venv; the first time this takes minutes …"
    local started=$SECONDS
    if ! _install; then
        tail -n 15 .venv/install.log >&2
        say "pip failed after $((SECONDS - started)) s; the whole of what it said is in .venv/install.log"
        return 1
    fi
    _expected_stamp >"$stamp.new" && mv -- "$stamp.new" "$stamp" || return
    say "installed in $((SECONDS - started)) s"
}

if ! _make_environment; then
    say "the environment .venv could not be made; nothing was run"
    exit 1
fi
