"""Regenerates the protobuf code into a scratch folder and fails when it differs from what is checked in."""

from __future__ import annotations

import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / "protos").glob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["protoc", f"-I{ROOT}", f"--python_out={scratch}", f"--pyi_out={scratch}"]
        if protoc.main([*arguments, *(str(ROOT / source) for source in sources)]) != 0:
            return 1
        made = sorted(path.name for path in Path(scratch, "protos").iterdir())
        _, differ, missing = filecmp.cmpfiles(Path(scratch, "protos"), ROOT / "protos", made, shallow=False)
    for name in (*differ, *missing):
        print(f"protos/{name} is not what its .proto generates: run `make protos`", file=sys.stderr)
    return 1 if differ or missing else 0


if __name__ == "__main__":
    sys.exit(main())
