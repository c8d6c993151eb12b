"""How fast the simulator is: requests per second, and memory, without faults, every model loaded before requests come.

    python -m bench.simulator --pods 1000 --models 100000 --requests 500000

Per second of this process's CPU time, which is wall time on a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
from dataclasses import replace

from placement.simulator.drawn import Clients
from placement.simulator.options import Options
from placement.simulator.scenario import Arrivals
from placement.simulator.world import World

_PER_POD = 100.0
"""Requests a second, in virtual time: many enough for the ticks of idle pods not to be what is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", type=int, default=1_000)
    parser.add_argument("--models", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=500_000)
    parser.add_argument("--check-every", type=int, default=10_000, help="events of pods between two full checks of one")
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    rate = _PER_POD * asked.pods
    duration_ms = max(1, round(asked.requests / rate * 1e3))
    options = Options(
        seed=asked.seed,
        pods=asked.pods,
        capacity_bytes=16 << 30,
        duration_ms=duration_ms,
        warm=True,
        trace=False,
        check_every=asked.check_every,
    )
    print(options, flush=True)
    workload = Clients(models=asked.models, requests_per_s=rate, fill=0.001).workload(options)
    marks: list[float] = []

    def arrivals() -> Arrivals:
        for number, arrival in enumerate(workload.arrivals()):
            if number == 1:  # the first has been asked for: the warm-up is over
                gc.collect()
                gc.freeze()
                gc.disable()
                marks.append(time.process_time())
            yield arrival
        marks.append(time.process_time())
        gc.enable()

    began = time.process_time()
    report = World(options, replace(workload, arrivals=arrivals)).run()
    asking_s = marks[1] - marks[0]
    memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(report)
    print(f"warm-up    {marks[0] - began:.1f} s of CPU, {report.loads / (marks[0] - began):.0f} loads/s")
    print(f"requests   {asking_s:.1f} s of CPU, {report.all_requests / asking_s:.0f} requests/s")
    print(f"memory     {memory_mib:.0f} MiB at most")


if __name__ == "__main__":
    main()
