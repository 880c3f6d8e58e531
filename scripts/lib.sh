# Sourced by the other scripts: finds or makes an environment that has the package and what it needs.
#
# `prepare_environment EXTRA...` sets PYTHON. The caller's environment is taken if the package is installed in it with
# these extras; otherwise .venv in the checkout, which is made or, if it was left half made or pyproject.toml has
# changed since, completed.

CHECKOUT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

prepare_environment() {
    local candidate
    for candidate in python python3; do
        # From /, so that the checkout is not taken for an installation.
        if (cd / && "$candidate" "$CHECKOUT/scripts/has_extras.py" "$@") >/dev/null 2>&1; then
            PYTHON="$(command -v "$candidate")"
            return
        fi
    done
    PYTHON="$CHECKOUT/.venv/bin/python"
    local stamp
    stamp="$(cat "$CHECKOUT/pyproject.toml" "$CHECKOUT/constraints.txt" | cksum)"
    if [ "$(cat "$CHECKOUT/.venv/stamp" 2>/dev/null)" != "$stamp" ]; then
        make_venv
        printf '%s\n' "$stamp" >"$CHECKOUT/.venv/stamp"
    fi
}

make_venv() {
    local base log="$CHECKOUT/.venv/install.log"
    base="$(find_python)"
    echo "Setting up $CHECKOUT/.venv with $("$base" --version) (once; a few minutes)" >&2
    "$PYTHON" -c 'import pip' >/dev/null 2>&1 || "$base" -m venv --clear "$CHECKOUT/.venv" ||
        fail "cannot make $CHECKOUT/.venv: free some space, or activate an environment of your own"
    "$PYTHON" -m pip install -c "$CHECKOUT/constraints.txt" -e "$CHECKOUT[eval,plot,dev,docs]" >"$log" 2>&1 &
    wait_for_pip $! "$log" || {
        tail -n 5 "$log" >&2
        fail "the packages could not be installed (all of pip's output: $log). Without a network, make a pip that" \
            "works there (PIP_INDEX_URL, PIP_FIND_LINKS) or activate an environment that has them; then run this again"
    }
    # A CPU build of torch with torchvision for CUDA cannot be imported together, and what imports torchvision when it
    # is there (transformers, datasets) works without it.
    "$PYTHON" -c 'import torch, torchvision' >/dev/null 2>&1 || {
        echo "torchvision does not fit this build of torch: removing it, as nothing here needs it" >&2
        "$PYTHON" -m pip uninstall -q -y torchvision >>"$log" 2>&1
    }
}

# Show what pip is doing until process $1, whose output goes to file $2, has ended; its exit status.
wait_for_pip() {
    trap 'kill "$pip" 2>/dev/null; exit 130' INT TERM
    local pip="$1" log="$2" start=$SECONDS shown=-30
    while kill -0 "$pip" 2>/dev/null; do
        if [ -t 2 ]; then
            printf '\r\033[K%s' "$(tail -n 1 "$log" | cut -c 1-100)" >&2
        elif [ $((SECONDS - start)) -ge $((shown + 30)) ]; then
            shown=$((SECONDS - start))
            printf 'installing, %s s\n' "$shown" >&2
        fi
        sleep 1
    done
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
    trap - INT TERM
    wait "$pip"
}

# A Python that the package supports (pyproject.toml says which) and that can make environments.
find_python() {
    local candidate first end
    read -r first end <<<"$(sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"$/\1 \2/p' "$CHECKOUT/pyproject.toml")"
    for candidate in python3 $(seq -f 'python3.%g' $((end - 1)) -1 "$first") python; do
        if "$candidate" -c "import ensurepip, sys, venv; sys.exit(not (3, $first) <= sys.version_info < (3, $end))" \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python from 3.$first to 3.$((end - 1)) that can make environments was found; install one (Debian and" \
        "Ubuntu: apt install python3 python3-venv) or activate an environment that has one"
}

# evaluate BENCHMARK DEFAULT_CONFIG [CONFIG] [section.key=value ...]; a config is an argument without "=".
evaluate() {
    local benchmark="$1" config="$2"
    shift 2
    if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then
        config="$1"
        shift
    elif [ ! -e "$config" ]; then
        config="$CHECKOUT/$config"
    fi
    prepare_environment eval
    PYTHONPATH="$CHECKOUT${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m eval.run "$config" \
        "evaluation.benchmark=$benchmark" "$@"
}
