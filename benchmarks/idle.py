"""Claim: one `kassa up` that does nothing takes less than 250 MB in all, PostgreSQL and sandbox included, and no processor.

Memory is PSS, summed over `kassa up`, the server with all its processes, and the sandbox, as a user starts them: with
the settings of `kassa up`, not those of the other benchmarks.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import command, cpu_s, family, pss_bytes
from benchmarks.report import Result, write
from benchmarks.stage import Stage
from kassa.db import embedded

SETTLE_S, WATCH_S = 10, 20
BYTES_MAX = 250e6
CPU_MAX = 0.02
"""Of one core: what «about nothing» means here. Timers, health of the parts and the log are looked at now and then."""
STOP_TIMEOUT_S = 60
LABELS = {"postgres": "PostgreSQL", "kassa.channels.sandbox": "sandbox"}


def run(stage: Stage) -> None:
    """Start, let settle, watch."""
    kassa = Path(sys.executable).with_name("kassa")
    with embedded.temporary_directory("kassa-idle-") as folder:
        place = folder / "dir"
        started = [str(kassa), "up", "--dir", str(place), "--port", "0", "--json"]
        with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as up:
            try:
                line = up.stdout.readline() if up.stdout else ""
                if not line:
                    raise SystemExit("kassa up does not start")
                seen = _watch(stage, json.loads(line)["pid"], place)
            finally:
                up.terminate()
                up.wait(STOP_TIMEOUT_S)
    parts = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in seen["bytes"].items())
    total = sum(seen["bytes"].values())
    cpu = ", ".join(f"{name} {share * 100:.1f}" for name, share in seen["cpu"].items())
    share = sum(seen["cpu"].values())
    results = [
        Result(
            "memory of all processes", total / 1e6, "MB", None, parts, f"< {BYTES_MAX / 1e6:.0f} MB", total < BYTES_MAX
        ),
        Result("processor", share * 100, "% of a core", None, cpu, f"< {CPU_MAX * 100:.0f} %", share < CPU_MAX),
    ]
    stage.tell(f"  {total / 1e6:.0f} MB, {share * 100:.1f} %")
    write("idle", results, baseline="", runs=seen, folder=stage.results)


def _watch(stage: Stage, pid: int, place: Path) -> dict[str, Any]:
    time.sleep(1 if stage.is_quick else SETTLE_S)
    server = embedded.find(place)
    roots = [pid] if server is None else [pid, server.pid]
    processes = {member: _label(member) for root in roots for member in family(root)}
    before = {one: cpu_s(one) for one in processes}
    started = time.monotonic()
    time.sleep(3 if stage.is_quick else WATCH_S)
    # Some of PostgreSQL's processes come and go; those that stayed tell what the whole costs.
    stayed = {one: name for one, name in processes.items() if Path(f"/proc/{one}").exists()}
    seconds = time.monotonic() - started
    sizes: dict[str, int] = {}
    shares: dict[str, float] = {}
    for one, name in stayed.items():
        sizes[name] = sizes.get(name, 0) + pss_bytes(one)
        shares[name] = shares.get(name, 0.0) + (cpu_s(one) - before[one]) / seconds
    return {"bytes": sizes, "cpu": shares, "processes": list(stayed.values())}


def _label(pid: int) -> str:
    line = command(pid)
    return next((label for word, label in LABELS.items() if word in line), "kassa up")
