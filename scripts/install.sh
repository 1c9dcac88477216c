#!/usr/bin/env bash
# Makes .venv with Kassa in it, from the lock files. Quick when already done.
#   scripts/install.sh        what Kassa needs to run
#   scripts/install.sh dev    and what its tests and benchmarks need
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-runtime}
case $what in
    runtime) lock=requirements.lock ;;
    dev) lock=requirements-dev.lock ;;
    *) echo "usage: scripts/install.sh [dev]" >&2; exit 2 ;;
esac

# A virtual environment knows its own path, so a copied one is made anew.
stamp_of() { { pwd; echo "$1"; cat requirements-install.lock "$1" pyproject.toml; } | sha256sum | cut -d' ' -f1; }
is_done() { [ -x .venv/bin/kassa ] && [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$(stamp_of "$2")" ]; }
if is_done "$what" "$lock" || is_done dev requirements-dev.lock; then
    exit 0
fi

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "Kassa needs Python 3.11 or newer, and there is none on the PATH." >&2
    return 1
}

make_environment() {
    local python
    python=$(find_python)
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian keeps these in a package of their own, named after the version.
        scripts/apt.sh "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    fi
    "$python" -m venv --clear .venv
}

# Whoever has configured pip for a mirror has not always configured uv, so pip is the second try.
install() {
    .venv/bin/uv pip install -q -p .venv/bin/python "$@" || .venv/bin/pip install -q --disable-pip-version-check "$@"
}

# Where it is, and whether it still runs after Python was upgraded or the directory moved.
if ! .venv/bin/python -c "import sys; sys.exit(sys.prefix != '$PWD/.venv')" 2>/dev/null \
    || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    make_environment
fi
echo "Installing Kassa ($what) into .venv"
.venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-install.lock
install --require-hashes -r "$lock"
install --no-deps --no-build-isolation -e .
stamp_of "$lock" >".venv/installed-$what"
