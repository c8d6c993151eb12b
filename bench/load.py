"""`mesh.load_generator` in a process of its own, so that its work is not the bench's."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.jobs import result_of, tell
from mesh.load_generator import Load, LoadGenerator, Result
from mesh.loop import new_event_loop


async def run_load(load: Load) -> Result:
    """Run a load in its own process.

    Raises:
        JobError
    """
    with tempfile.NamedTemporaryFile("w", prefix="densemesh-load-", suffix=".json") as plan:
        messages = [b64encode(message).decode() for message in load.messages]
        plan.write(json.dumps({**asdict(load), "messages": messages}))
        plan.flush()
        return Result(**await result_of("bench.load", plan.name))


def median(rounds: Sequence[Result]) -> Result:
    """The rounds as one result: requests and bytes add up, all figures are medians."""
    middle: dict[str, Any] = {name: float(np.median([getattr(each, name) for each in rounds])) for name in _FIGURES}
    requests = sum(each.requests for each in rounds)
    return Result(
        requests=requests,
        errors={},
        seconds=requests / middle.pop("per_second"),
        server_us=[float(used) for used in np.median([each.server_us for each in rounds], axis=0)],
        sent_bytes=sum(each.sent_bytes for each in rounds),
        received_bytes=sum(each.received_bytes for each in rounds),
        **middle,
    )


_FIGURES: Final = ("per_second", "p50_ms", "p90_ms", "p99_ms", "max_ms", "client_us")


def main() -> int:
    said = json.loads(Path(sys.argv[1]).read_text())
    load = Load(**{**said, "messages": [b64decode(message) for message in said["messages"]]})
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        tell(asdict(runner.run(LoadGenerator(load).run())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
