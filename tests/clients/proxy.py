"""A TCP relay that cuts its connections: with RST as a dying network does, with FIN as a dying server does, or once the
server has done what it was asked, and before it can say so."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading

_RST = struct.pack("ii", 1, 0)


class Proxy:
    """Relays to a local port, in a thread of its own."""

    def __init__(self, target: int) -> None:
        #: Where new connections lead.
        self.target = target
        #: The connection that sends this is cut when its answer comes; then it is ``None`` again.
        self.cut_before_answering: bytes | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        #: How many connections it has cut.
        self.cuts = 0
        sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = sock.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(sock,), name="proxy")
        self._thread.start()

    def _run(self, sock: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        self._ended = asyncio.Event()
        async with await asyncio.start_server(self._relay, sock=sock):
            await self._ended.wait()
            await self._cut(reset=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        upstream = None
        try:
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self.target)
            asked = asyncio.Event()
            ways = [
                asyncio.create_task(self._forward(reader, upstream, asked)),
                asyncio.create_task(_copy(upstream_reader, writer, asked)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.wait(ways)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            del self._open[task]
            for side in (writer, upstream):
                if side is not None:
                    side.close()
                    with contextlib.suppress(OSError):
                        await side.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self.cut_before_answering is not None and self.cut_before_answering in data:
                    self.cut_before_answering = None
                    self.cuts += 1
                    asked.set()
                writer.write(data)
                await writer.drain()

    async def _cut(self, *, reset: bool) -> int:
        cut = dict(self._open)
        for task, writer in cut.items():
            if reset:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
                writer.transport.abort()
            task.cancel()
        if cut:
            await asyncio.wait(cut)
        self.cuts += len(cut)
        return len(cut)

    def cut(self, *, reset: bool) -> int:
        """Cut what is open now; how many connections that were."""
        return asyncio.run_coroutine_threadsafe(self._cut(reset=reset), self._loop).result(10)

    def close(self) -> None:
        """Cut everything and end."""
        self._loop.call_soon_threadsafe(lambda: self._ended.set())
        self._thread.join(10)
        assert not self._thread.is_alive(), "the proxy did not end"


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: asyncio.Event) -> None:
    with contextlib.suppress(OSError):
        while (data := await reader.read(65536)) and not stop.is_set():
            writer.write(data)
            await writer.drain()
