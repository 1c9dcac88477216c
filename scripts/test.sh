#!/usr/bin/env bash
# Runs the tests: scripts/test.sh [pytest's arguments]. Ends with what was not tested, by name, and pytest's own line.
# With CI=true, anything that was not tested has failed.
set -euo pipefail
cd "$(dirname "$0")/.."
# Many machines and images set this. The tests start some hundred processes, and compiling everything anew in each took
# two thirds of their time to start.
unset PYTHONDONTWRITEBYTECODE

scripts/install.sh dev
# Kassa must work with Debian's PostgreSQL as well as with its own. Without root it is told at the end that this was not tested.
scripts/apt.sh postgresql || true
# The first minute of the README is tried with it. Where it cannot be had, the end tells what was not tested, and on CI that fails.
scripts/apt.sh curl || true
# promtool, which tests the alert rules of deploy/; without it these are told as not tested.
scripts/apt.sh prometheus || true
# The brokers' servers too, each of which may be missing on a machine of one's own, but not on CI.
if ! .venv/bin/python -m servers install && [ "${CI:-}" = true ]; then
    exit 1
fi
workers=$(($(nproc) + 1))
if [ $# -eq 0 ]; then
    set -- -m "not long"
    # Much of the time tests wait for a server.
    workers=$(($(nproc) + 2))
    # Some thousand databases are made and dropped, hundreds of files each: in memory that takes a sixth of the time. Nothing here
    # asks for a disk that keeps what it was told when the machine loses its power. Long runs write gigabytes.
    # Where there is none, it stays the disk.
    memory=$(mktemp -d /dev/shm/kassa-tests-XXXXXX 2>/dev/null) || memory=
    if [ -n "$memory" ]; then
        chmod 711 "$memory"
        # Gone when this process is, which becomes pytest.
        (tail --pid=$$ -f /dev/null; rm -rf "$memory") >/dev/null 2>&1 &
        printf '#!/bin/sh\n' > "$memory/runs" && chmod +x "$memory/runs"
        space_gb=$(df --output=avail --block-size=1G "$memory" | tail -1)
        free_gb=$(awk '/^MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo)
        if "$memory/runs" 2>/dev/null && [ "$space_gb" -ge 4 ] && [ "$free_gb" -ge 8 ]; then
            export TMPDIR=$memory
        fi
    fi
fi
# Tests of one server stay together.
exec .venv/bin/python -m pytest -n "${WORKERS:-$workers}" --dist loadscope --no-loadscope-reorder --max-worker-restart 2 "$@"
