"""`make sim`: many small worlds, each with its own seed and faults; the first that breaks an invariant is told, and how
to run it again.

    python tests/sim.py --seeds 1000 --first 0 --processes 2
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from multiprocessing import Pool, cpu_count

from placement.simulator.checks import Violation
from placement.simulator.drawn import draw
from placement.simulator.world import World


def broken(seed: int) -> str:
    """What is wrong with the world of a seed; empty: nothing."""
    options, clients = draw(seed)
    world = World(options, clients.workload(options))
    try:
        world.run()
    except Violation as violation:
        return f"{world.told(violation)}\nreplay: python -m placement.simulator --drawn --seed {seed}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1_000)
    parser.add_argument("--first", type=int, default=None, help="else drawn, and printed")
    parser.add_argument("--processes", type=int, default=cpu_count())
    asked = parser.parse_args()
    first = random.SystemRandom().randrange(1 << 32) if asked.first is None else asked.first
    print(f"seeds {first} to {first + asked.seeds - 1}", flush=True)
    began = time.monotonic()
    with Pool(asked.processes) as pool:
        for number, told in enumerate(pool.imap(broken, range(first, first + asked.seeds)), 1):
            if told:
                print(told)
                return 1
            if number % 100 == 0:
                print(f"{number} worlds, {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
