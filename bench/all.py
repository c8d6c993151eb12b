"""`make bench`: every bench, one after the other; `--seconds` and `--json DIRECTORY` as the single ones have them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Final

BENCHES: Final = ("local_hit", "forward", "miss")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, help="measured time per row; by default each bench's own")
    parser.add_argument("--json", type=Path, help="directory for <bench>.json")
    asked = parser.parse_args()
    if asked.json:
        asked.json.mkdir(parents=True, exist_ok=True)
    for name in BENCHES:
        options = [f"--seconds={asked.seconds}"] if asked.seconds else []
        options += [f"--json={asked.json / name}.json"] if asked.json else []
        status = subprocess.run([sys.executable, "-m", f"bench.{name}", *options], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the bench that ran has said so
        sys.exit(130)
