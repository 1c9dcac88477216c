#!/usr/bin/env bash
# Makes the lock files again from pyproject.toml; `scripts/lock.sh --upgrade` takes the newest versions that fit.
set -euo pipefail
cd "$(dirname "$0")/.."

compile() {
    local out=$1
    shift
    .venv/bin/uv pip compile -q --generate-hashes --universal --python-version 3.11 \
        --custom-compile-command "scripts/lock.sh" -o "$out" "$@"
}

compile requirements-install.lock requirements-install.in "${@}"
compile requirements.lock pyproject.toml --extra embedded --extra brokers "${@}"
compile requirements-dev.lock pyproject.toml --extra embedded --extra brokers --extra dev --extra bench -c requirements.lock "${@}"
