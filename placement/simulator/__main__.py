"""`python -m placement.simulator`: a world from a seed, its checks, and what came of it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from typing import Any

from placement.policies import POLICIES
from placement.simulator.checks import Violation
from placement.simulator.drawn import Clients, draw
from placement.simulator.options import Faults, Options
from placement.simulator.world import World


def main() -> int:
    """0: every check held; 1: one did not, and the output tells which, and how to see it again."""
    options, clients = _asked()
    print(f"{options}\n{clients}", flush=True)
    world = World(options, clients.workload(options))
    try:
        report = world.run()
    except Violation as violation:
        print(world.told(violation), f"replay: python -m placement.simulator {' '.join(sys.argv[1:])}", sep="\n")
        return 1
    print(report)
    return 0


def _asked() -> tuple[Options, Clients]:
    parser = argparse.ArgumentParser("python -m placement.simulator", description=__doc__)
    parser.add_argument("--drawn", action="store_true", help="draw a small world with faults from the seed")
    parser.add_argument(
        "--no-trace", dest="trace", action="store_false", help="keep no events: large worlds are faster"
    )
    groups = (("run", Options()), ("clients", Clients()), ("faults", Faults()))
    for name, group in groups:
        arguments = parser.add_argument_group(name)
        for f in fields(group):
            default = getattr(group, f.name)
            flag = "--" + f.name.replace("_", "-")
            if isinstance(default, bool):
                if f.name != "trace":
                    arguments.add_argument(flag, action="store_true", default=None)
            elif isinstance(default, (int, float, str)):
                choices = sorted(POLICIES) if f.name == "policy" else None
                kind = type(default)
                arguments.add_argument(flag, type=kind, choices=choices, help=f"else {default}")
    asked = parser.parse_args()
    options, clients = draw(asked.seed or 0) if asked.drawn else (Options(), Clients())

    def given(group: Any) -> dict[str, Any]:
        names = (f.name for f in fields(group))
        return {name: value for name in names if (value := getattr(asked, name, None)) is not None}

    faults = replace(options.faults, **given(options.faults))
    return replace(options, **given(options), faults=faults), replace(clients, **given(clients))


if __name__ == "__main__":
    sys.exit(main())
