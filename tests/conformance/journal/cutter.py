"""A small proxy before the database that cuts connections at a chosen moment of the protocol."""

import asyncio
import contextlib
from enum import Enum
from urllib.parse import urlsplit, urlunsplit


class Cut(Enum):
    """When to cut: the named statement is seen from the client …"""

    BEFORE = "before"
    """… and never reaches the server."""
    ANSWER_LOST = "answer_lost"
    """… reaches the server, which does it; its answer never comes back."""
    SILENT = "silent"
    """… reaches nobody, and nobody says so: the connection stands, and nothing passes any more."""


class Cutter:
    """Forwards bytes; `arm` cuts the connection that sends `statement`, once. `close` stops taking connections."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._parts = parts
        self._armed: tuple[bytes, Cut] | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = 0
        self.is_refusing = False

    async def start(self, port: int = 0) -> str:
        """The URL that leads through here. port: 0 takes a free one."""
        self._server = await asyncio.start_server(self._take, "127.0.0.1", port)
        port = self._server.sockets[0].getsockname()[1]
        account = self._parts.netloc.rpartition("@")[0]
        netloc = f"{account}@127.0.0.1:{port}" if account else f"127.0.0.1:{port}"
        return urlunsplit(self._parts._replace(netloc=netloc))

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def arm(self, statement: bytes, cut: Cut) -> None:
        """Cut the next connection that sends this."""
        self._armed = (statement, cut)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self.is_refusing:
            writer.close()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        back = asyncio.create_task(self._forward(up_reader, writer))
        try:
            while data := await reader.read(65536):
                if self._armed is not None and self._armed[0] in data:
                    _, cut = self._armed
                    self._armed = None
                    self.cuts += 1
                    back.cancel()
                    await asyncio.wait([back])
                    if cut is Cut.ANSWER_LOST:
                        up_writer.write(data)
                        await up_writer.drain()
                        await up_reader.read(1)  # The server has done it and says so; nobody hears it.
                    if cut is Cut.SILENT:
                        while await reader.read(65536):
                            pass
                    return
                up_writer.write(data)
                await up_writer.drain()
        except ConnectionError:
            pass
        finally:
            back.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await back
            up_writer.transport.abort()
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()
