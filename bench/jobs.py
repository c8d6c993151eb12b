"""Helpers in processes of their own: a module of `bench` that tells its results as JSON lines."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from mesh.child import spawn

ROOT: Final = Path(__file__).resolve().parent.parent

_LINE_BYTES: Final = 1 << 24
"""Longest line a job may print: a load generator tells every latency in one."""
_SET: Final = {
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",  # and BLAS: jobs share the machine with each other or with the pods
    "ORT_DISABLE_TELEMETRY": "1",  # or importing ONNX Runtime leaves files in the temporary and the home directory
}


class JobError(Exception):
    """A job ended with an error; carries its last words."""


class Job:
    """`python -m <module> <arguments>`, or another `program` in place of `python -m`.

    It runs from the `async with` on until its end, and is ended by force when that is left early. Lines that are JSON
    objects are its results, all others (warnings, tracebacks) its last words. It dies with us, and Ctrl-C does not
    reach it.
    """

    def __init__(self, module: str, *arguments: str, program: Sequence[str] = (sys.executable, "-m")) -> None:
        self._module = module
        self._command = [*program, module, *arguments]
        self._words: list[str] = []

    async def __aenter__(self) -> Self:
        ours, theirs = os.pipe()
        try:
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            self._process = spawn(self._command, output=theirs, environment=os.environ | _SET | {"PYTHONPATH": path})
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._reader = asyncio.StreamReader(limit=_LINE_BYTES)
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), os.fdopen(ours, "rb")
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._transport.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def line(self) -> dict[str, Any] | None:
        """The next result; None: the job has ended.

        Raises:
            JobError: it ended with an error.
        """
        while text := await self._reader.readline():
            if text.startswith(b"{"):
                found: dict[str, Any] = json.loads(text)
                return found
            self._words.append(text.decode(errors="replace").rstrip())
        status = await asyncio.to_thread(self._process.wait)
        if status:
            said = "\n".join(self._words[-15:])
            raise JobError(f"{self._module} ended with status {status}; its last words:\n{said}")
        return None

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        """The results until the job's end.

        Raises:
            JobError: it ended with an error.
        """
        while (line := await self.line()) is not None:
            yield line


async def result_of(module: str, *arguments: str) -> dict[str, Any]:
    """Run a job that tells one result.

    Raises:
        JobError
    """
    async with Job(module, *arguments) as job:
        results = [line async for line in job.lines()]
    if len(results) != 1:
        raise JobError(f"{module} told {len(results)} results, expected one")
    return results[0]


def tell(result: dict[str, Any]) -> None:
    """In a job: one result for the parent."""
    print(json.dumps(result), flush=True)
