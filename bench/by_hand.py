"""The comparator of `bench.miss`: make an ONNX Runtime session, run it once, drop it, by hand in one process, as a job.

`python -m bench.by_hand SECONDS MODEL...`: the models go round; sessions have their defaults, which is what a first
script would do. The very first session of the process is not counted.
"""

from __future__ import annotations

import itertools
import sys
import time

import numpy as np
import onnxruntime as ort

from bench.jobs import tell


def _cold_ms(path: str) -> float:
    started_s = time.perf_counter()
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    session.run(None, {given.name: np.zeros((1, given.shape[1]), np.float32)})
    return (time.perf_counter() - started_s) * 1e3


def main() -> int:
    seconds, paths = float(sys.argv[1]), sys.argv[2:]
    _cold_ms(paths[0])
    cold_ms: list[float] = []
    own_s, started_s = time.process_time(), time.perf_counter()
    for path in itertools.cycle(paths):
        cold_ms.append(_cold_ms(path))
        if time.perf_counter() > started_s + seconds:
            break
    seconds, own_s = time.perf_counter() - started_s, time.process_time() - own_s
    p50, p90, p99, most = np.percentile(cold_ms, [50, 90, 99, 100])
    cycles = len(cold_ms)
    tell(
        {
            "requests": cycles,
            "errors": {},
            "seconds": seconds,
            "p50_ms": p50,
            "p90_ms": p90,
            "p99_ms": p99,
            "max_ms": most,
            "server_us": [own_s / cycles * 1e6],
            "client_us": 0.0,
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
