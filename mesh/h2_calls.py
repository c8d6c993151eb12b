"""Calls of the HTTP/2 front end while they run: how handlers are driven, and how they are given up."""

from __future__ import annotations

import asyncio
import types
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final, Generic, TypeVar

from mesh.errors import Code, MeshError, MessageTooLarge
from mesh.http2.compression import NotCompressed, TooLarge, compress, decompress
from mesh.http2.grpc import RequestHead
from mesh.http2.streams import Stream
from mesh.rpc import Call, Unary

T = TypeVar("T")

_Conduct = Callable[[Coroutine[Any, Any, T]], Coroutine[Any, Any, None]]
_Begun = tuple[Coroutine[Any, Any, T], Any, _Conduct[T]]

_IN_LINE_BYTES: Final = 4_096
"""Compressed messages up to this size are decompressed on the loop: at deflate's most, 1032 to 1, that is 4 MiB."""
_WORTH_BYTES: Final = 1_024
"""Smaller answers are not compressed."""


class Compressed(bytes):
    """An answer that is compressed already."""


class _Corrupt(MeshError):
    """What came is not what the headers say."""

    code = Code.INTERNAL


class Spare(Generic[T]):
    """A task that waits for something to do.

    Most handlers end without ever waiting, and a task for each costs more than all the rest of a request. So a handler
    takes its first step by hand, with a spare task as the current one, which is what timeouts and task groups ask for.
    Only if it waits does the task take over; if not, the task serves the next request the same way.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._go: asyncio.Future[_Begun[T]] = loop.create_future()
        self._goes_on = False
        self.task = loop.create_task(self._run())
        self.task.add_done_callback(self._ended)

    def step(self, coroutine: Coroutine[Any, Any, T]) -> Any:
        """The first step: what it waits for.

        Raises:
            StopIteration: it has ended, with that value.
            Exception: what it raised.
        """
        _enter_task(self._loop, self.task)
        try:
            return coroutine.send(None)
        finally:
            _leave_task(self._loop, self.task)

    def take_over(self, coroutine: Coroutine[Any, Any, T], yielded: Any, conduct: _Conduct[T]) -> None:
        """Go on with a coroutine from where `step` left it, inside `conduct`."""
        begun = coroutine, yielded, conduct
        if self._go.done():
            self._cancelled(begun)  # by itself, in its first step
        else:
            self._go.set_result(begun)

    def cancel(self) -> None:
        """Cancel what it does; without anything to do, it is needed no more."""
        self.task.cancel()

    async def _run(self) -> None:
        coroutine, yielded, conduct = await self._go
        self._goes_on = True
        await conduct(_resumed(coroutine, yielded))

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not self._goes_on and self._go.done() and not self._go.cancelled():
            self._cancelled(self._go.result())  # between the first step and the task's turn, by a timeout of 0 for one

    def _cancelled(self, begun: _Begun[T]) -> None:
        """The task has ended before it could go on: the coroutine must learn of it as any other does."""
        self._goes_on = True
        coroutine, yielded, conduct = begun
        if isinstance(yielded, asyncio.Future):
            yielded.cancel()
        self.task = self._loop.create_task(conduct(_resumed(coroutine, yielded, asyncio.CancelledError())))


@types.coroutine
def _resumed(
    coroutine: Coroutine[Any, Any, T], yielded: Any, error: BaseException | None = None
) -> Generator[Any, Any, T]:
    """The rest of a coroutine that has yielded once already; `error` is raised where it waits."""
    sent: Any = None
    try:
        while True:
            if error is None:
                try:
                    sent = yield yielded
                except GeneratorExit:
                    coroutine.close()
                    raise
                except BaseException as raised:
                    error = raised
            if error is None:
                yielded = coroutine.send(sent)
            else:
                thrown, error = error, None
                yielded = coroutine.throw(thrown)
    except StopIteration as done:
        value: T = done.value
        return value


class Running:
    """A call whose handler waits for something."""

    __slots__ = ("incoming", "task", "timer")

    def __init__(self, task: asyncio.Task[None] | Spare[bytes], incoming: Any = None) -> None:
        self.task = task
        self.incoming = incoming
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.task.cancel()


async def inflated(message: bytes, head: RequestHead, most_bytes: int) -> bytes:
    """A message whose compressed flag is set; large ones are decompressed in a thread.

    Raises:
        MeshError
    """
    if not head.encoding:
        raise _Corrupt("a message is compressed, and no grpc-encoding says how")
    try:
        if len(message) <= _IN_LINE_BYTES:
            return decompress(message, head.encoding, most_bytes)
        return await asyncio.to_thread(decompress, message, head.encoding, most_bytes)
    except TooLarge:
        raise MessageTooLarge(f"more than {most_bytes} bytes after decompression") from None
    except NotCompressed as error:
        raise _Corrupt(str(error)) from None


async def unpacked(handler: Unary, call: Call, message: bytes, stream: Stream, most_bytes: int) -> bytes:
    """A unary call with a compressed request: the answer is compressed in the same way, if the client takes that."""
    head: RequestHead = stream.head
    response = await handler(call, await inflated(message, head, most_bytes))
    if head.encoding not in head.accepts or len(response) < _WORTH_BYTES:
        return response
    return Compressed(await asyncio.to_thread(compress, response, head.encoding))
