#!/usr/bin/env bash
# Every gate that needs no more than a minute. All of them run, and the first that fails does not hide the next.
set -uo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE

failed=()
gate() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

scripts/install.sh dev || exit 1
export PATH="$PWD/.venv/bin:$PATH"
gate "format" ruff format --check
gate "lint" ruff check
gate "types" mypy
gate "layers" lint-imports
gate "pure tests, and every named query prepares" python -m pytest -q tests/unit tests/sql/test_queries_prepare.py

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all gates passed"
