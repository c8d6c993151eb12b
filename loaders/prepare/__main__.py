"""The child that prepares: `python -m loaders.prepare <parent's pid>`, one JSON object a line on stdin and stdout.

    {"function": "module:name", "path": "...", "parameters": {...}, "folder": "...", "max_bytes": ...}
    -> {} | {"refused": "..."} | {"failed": "..."}

Its priority is the lowest, and it is the first that the kernel ends when memory is short. It ends with its parent, and
when nothing has come for a minute.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

from loaders.base import Artifact
from loaders.prepare import NotPreparable, named
from loaders.prepare.child import IDLE_S, MEMORY_BYTES

_PR_SET_PDEATHSIG: Final = 1
_SIGKILL: Final = 9


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent has gone")
    _be_modest()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print belongs to the log
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    while (line := _line(requests)) is not None:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _be_modest() -> None:
    os.nice(19)
    with suppress(OSError):  # not Linux, or not ours to say
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Private writable memory; RLIMIT_AS would count what is only reserved, which for a framework is many times more.
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def _line(requests: IO[bytes]) -> bytes | None:
    """The next request; None: there are no more, or none came for long."""
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    if not poll.poll(IDLE_S * 1e3):
        return None
    line = b""
    while not line.endswith(b"\n"):
        part = requests.read(65_536)
        if not part:
            return None
        line += part
    return line


def _answer(request: dict[str, Any]) -> dict[str, str]:
    artifact = Artifact(Path(request["path"]), request["parameters"])
    try:
        named(request["function"])(artifact, Path(request["folder"]))
    except NotPreparable as refusal:
        return {"refused": str(refusal)}
    except Exception as error:  # a converter's own: which ones, nobody knows
        kind = "refused" if not isinstance(error, MemoryError | OSError) else "failed"
        return {kind: f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {}


if __name__ == "__main__":
    main()
