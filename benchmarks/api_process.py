"""One process of Kassa as `kassa up` runs it: the API, and its workers beside it. For benchmarks."""

import argparse

import uvloop

from kassa import heap
from kassa.app import App
from kassa.cli.node import api_of, stop_signal
from kassa.settings import Settings
from kassa.workers import loops


async def serve(settings: Settings, workers: list[str]) -> None:
    """Until SIGTERM."""
    told = stop_signal()
    app = App(settings)
    await app.start()
    try:
        async with api_of(app, workers) as api:
            heap.settle()
            print(api.url, flush=True)
            await told.wait()
    finally:
        await app.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database-url", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--lanes", type=int, default=Settings().journal_lanes)
    parser.add_argument("--without", nargs="*", default=[], choices=loops.NAMES, help="workers that do not run")
    options = parser.parse_args()
    settings = Settings(
        database_url=options.database_url, port=options.port, dir=options.dir, journal_lanes=options.lanes
    )
    uvloop.run(serve(settings, [name for name in loops.NAMES if name not in options.without]))


if __name__ == "__main__":
    main()
