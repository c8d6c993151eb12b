"""A TCP proxy that loses what it is told to."""

from __future__ import annotations

import asyncio
from typing import Self


class Proxy:
    """Passes bytes to a port of this machine and back, until told otherwise."""

    def __init__(self, port: int, listen: int = 0) -> None:
        self.lost = asyncio.Event()
        """Something was lost."""
        self._port = port
        self._listen = listen
        self._pass_requests = self._pass_answers = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    @property
    def url(self) -> str:
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    def lose_requests(self) -> None:
        self._pass_requests = False

    def lose_answers(self) -> None:
        self._pass_answers = False

    def mend(self) -> None:
        """Break the connections that lost something, and treat new ones well."""
        self._pass_requests = self._pass_answers = True
        for writer in self._writers:
            writer.transport.abort()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._listen)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.mend()
        await asyncio.gather(*self._pumps)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, far_writer}
        for source, sink, requests in ((reader, far_writer, True), (far_reader, writer, False)):
            task = asyncio.create_task(self._pump(source, sink, requests))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, requests: bool) -> None:
        try:
            while data := await source.read(65_536):
                if self._pass_requests if requests else self._pass_answers:
                    sink.write(data)
                    await sink.drain()
                else:
                    self.lost.set()
        except ConnectionError:
            pass  # the other side was aborted
        finally:
            sink.close()
            self._writers.discard(sink)
