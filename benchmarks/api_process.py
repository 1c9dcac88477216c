"""One API process with Kassa's own event reader beside it, as `kassa serve` runs it. For benchmarks."""

import argparse
import asyncio
import signal

import uvloop

from kassa.api.server import Api
from kassa.app import App
from kassa.settings import Settings


async def serve(settings: Settings) -> None:
    """Until SIGTERM."""
    app = App(settings)
    await app.start()
    api = Api(app)
    await api.start()
    print(api.url, flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await api.stop()
    await app.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database-url", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--dir", required=True)
    options = parser.parse_args()
    settings = Settings(database_url=options.database_url, port=options.port, dir=options.dir)
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
