"""The line between Kassa and a broker: slow, narrow, cut in the middle of something, or open at our end alone."""

import asyncio
from contextlib import suppress

CHUNK = 16_384


class Line:
    """Forwards TCP from a port of its own to `port`. What it does to bytes may be changed at any time."""

    def __init__(self, port: int, *, host: str = "127.0.0.1") -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._calls: set[_Call] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut_after: int | None = None
        self.delay_s = 0.0
        """Each chunk takes so long, either way."""
        self.bytes_per_s: float | None = None
        self.is_refusing = False
        """New connections are closed at once."""
        self.cuts = 0

    async def start(self, port: int = 0) -> int:
        """The port to go through. port: 0 takes a free one."""
        self._server = await asyncio.start_server(self._take, "127.0.0.1", port)
        taken: int = self._server.sockets[0].getsockname()[1]
        return taken

    async def stop(self) -> None:
        """Nothing is left."""
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Resets every connection that there is."""
        for call in list(self._calls):
            call.end()
            self.cuts += 1

    def cut_after(self, size: int) -> None:
        """The next connection whose client has sent so many bytes from now on is cut there, in the middle of a frame."""
        self._cut_after = size

    def forget(self) -> None:
        """Every connection that there is stays open, and its bytes vanish, both ways and for ever; new ones work."""
        for call in self._calls:
            call.is_forgotten = True
            self.cuts += 1

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if self.is_refusing:
                raise ConnectionRefusedError
            up_reader, up_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        call = _Call(writer, up_writer)
        self._calls.add(call)
        back = asyncio.create_task(self._forward(up_reader, writer, call))
        try:
            await self._forward(reader, up_writer, call, is_client=True)
        finally:
            self._calls.discard(call)
            back.cancel()
            call.end()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, call: "_Call", *, is_client: bool = False
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                if is_client and self._cut_after is not None:
                    self._cut_after -= len(data)
                    if self._cut_after <= 0:
                        # The first part of what was sent arrives.
                        writer.write(data[: self._cut_after or None])
                        await writer.drain()
                        self._cut_after = None
                        self.cuts += 1
                        break
                pause_s = self.delay_s + (len(data) / self.bytes_per_s if self.bytes_per_s else 0.0)
                if pause_s:
                    await asyncio.sleep(pause_s)
                if not call.is_forgotten:
                    writer.write(data)
                    await writer.drain()
            if not call.is_forgotten:
                call.end()


class _Call:
    """One connection, both ends."""

    def __init__(self, ours: asyncio.StreamWriter, theirs: asyncio.StreamWriter) -> None:
        self._writers = (ours, theirs)
        self.is_forgotten = False

    def end(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
