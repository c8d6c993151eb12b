"""How fast does a model come from a store, and how soon after its last byte is the first answer?

`Storage.hold` into an empty cache, against the same library (obstore) moving the same bytes by the same ranged reads,
in as many threads: into memory, where they are forgotten, and into a file. In turns, from one store on this machine
(`bench.object_server`), as fast as it goes and at the speed of a network. Then 100 MB of ONNX through a pod: a cold
request, split where the store sent the last byte, beside ONNX Runtime by hand with the file at hand.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.jobs import Job, JobError, result_of
from bench.rig import INFER, Mesh, infer_message, write_mlp
from loaders.storage.fetch import PARALLEL, PART_BYTES
from loaders.storage.source import Storage

PACES: Final = {"as fast as it goes": 0.0, "10 Gbit/s": 1.25e9}
"""Bytes per second of the store."""
SMALL_FILES: Final = 1_000
SMALL_BYTES: Final = 20_000
HIDDEN: Final = 4_960
"""Width that makes an ONNX model of 100 MB."""


class Place:
    """What is fetched from, and where to."""

    def __init__(self, root: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.scratch = root / "scratch"
        key = {"type": "s3", "access_key_id": "a", "secret_access_key": "b", "endpoint_url": self.url}
        self.config = root / f"storage-{port}.json"
        self.config.write_text(json.dumps({"key": key}))

    def ours_s(self, path: str) -> float:
        self._clear()
        storage = Storage(self.scratch / "cache", None, self.config, self.scratch)
        started_s = time.perf_counter()
        held = storage.hold(f"s3://b/{path}", "key", {})
        took_s = time.perf_counter() - started_s
        held.close()
        storage.close()
        return took_s

    def library_s(self, sizes: Mapping[str, int], *, to_file: bool) -> float:
        """As its own documentation has it: a ranged read per part, in threads; one thread at a time writes to a file,
        because more of them are slower."""
        import obstore
        from obstore.store import S3Store

        self._clear()
        config: Any = {"endpoint": self.url, "access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
        started_s = time.perf_counter()
        store = S3Store("b", config=config, client_options={"allow_http": True})
        writing = threading.Lock()
        files = {}
        if to_file:
            for key, size in sizes.items():
                (self.scratch / key).parent.mkdir(parents=True, exist_ok=True)
                files[key] = os.open(self.scratch / key, os.O_WRONLY | os.O_CREAT)
                os.posix_fallocate(files[key], 0, size)

        def move(part: tuple[str, int, int]) -> None:
            key, start, end = part
            data = obstore.get_range(store, key, start=start, end=end)
            if to_file:
                with writing:
                    os.pwrite(files[key], memoryview(data), start)

        parts = [
            (key, start, min(start + PART_BYTES, size))
            for key, size in sizes.items()
            for start in range(0, size, PART_BYTES)
        ]
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(move, parts))
        for file in files.values():
            os.close(file)
        return time.perf_counter() - started_s

    def _clear(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        os.sync()  # what an earlier round wrote is not to be paid for in this one


async def fetches(root: Path, sizes: Sequence[int], paces: Mapping[str, float], rounds: int) -> dict[str, Any]:
    cases: dict[str, dict[str, int]] = {}
    for size in sizes:
        for folder, name in (("parts", f"{size // 1_000_000} MB"), ("md5", f"{size // 1_000_000} MB, ETag is its MD5")):
            (root / folder).mkdir(exist_ok=True)
            (root / folder / f"{size}.bin").write_bytes(os.urandom(size))
            cases[name] = {f"{folder}/{size}.bin": size}
    (root / "small").mkdir()
    for n in range(SMALL_FILES):
        (root / "small" / f"{n}.bin").write_bytes(os.urandom(SMALL_BYTES))
    small = {f"small/{n}.bin": SMALL_BYTES for n in range(SMALL_FILES)}
    cases[f"{SMALL_FILES:,} files of {SMALL_BYTES // 1_000} kB"] = small
    figures = {}
    for pace, bytes_per_s in paces.items():
        async with Job("bench.object_server", str(root), str(bytes_per_s)) as job:
            place = Place(root, (await told(job))["port"])
            for name, files in cases.items():
                figures[f"{name}, {pace}"] = await asyncio.to_thread(compared, place, files, rounds)
                print(line(f"{name}, {pace}", figures[f"{name}, {pace}"]), flush=True)
    return figures


def compared(place: Place, files: Mapping[str, int], rounds: int) -> dict[str, float]:
    """MB/s, medians of the rounds."""
    path = next(iter(files)) if len(files) == 1 else "small"
    ways: dict[str, Callable[[], float]] = {
        "memory": lambda: place.library_s(files, to_file=False),
        "file": lambda: place.library_s(files, to_file=True),
        "ours": lambda: place.ours_s(path),
    }
    for way in ways.values():
        way()
    took_s: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            took_s[name].append(way())
    megabytes = sum(files.values()) / 1e6
    return {name: megabytes / median(seconds) for name, seconds in took_s.items()}


def line(name: str, speeds: Mapping[str, float]) -> str:
    to_memory, to_file = speeds["ours"] / speeds["memory"], speeds["ours"] / speeds["file"]
    return (
        f"| {name} | {speeds['memory']:,.0f} | {speeds['file']:,.0f} | {speeds['ours']:,.0f} "
        f"| {to_memory:.2f}x | {to_file:.2f}x |"
    )


async def first_answers(root: Path, hidden: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a cold request to a model that lies in the store, medians of the rounds."""
    models = root / "models"
    models.mkdir()
    write_mlp(models / "0.onnx", hidden)
    for n in range(1, rounds + 1):
        (models / f"{n}.onnx").hardlink_to(models / "0.onnx")
    write_mlp(models / "first.onnx", 8)
    took_ms: dict[str, list[float]] = {name: [] for name in ("fetch", "load", "run", "by hand")}
    async with Job("bench.object_server", str(root)) as job:
        place = Place(root, (await told(job))["port"])
        settings = {"storage_config": str(place.config), "cache_dir": str(root / "cache"), "capacity": "8GiB"}
        # Room for three: a virtual machine's memory is slow when it is touched for the first time.
        settings["cache_size"] = str(max(3 * (models / "0.onnx").stat().st_size, 1 << 20))
        async with Mesh(1, **settings) as mesh:
            key = json.dumps({"storage_key": "key"})
            await mesh.register("first", "onnx", "s3://b/models/first.onnx", load=True, key=key)
            for n in range(rounds + 1):
                await mesh.register(f"m-{n}", "onnx", f"s3://b/models/{n}.onnx", key=key)
                await asyncio.to_thread(os.sync)
                started_s = time.monotonic()
                await infer(mesh, f"m-{n}")
                answered_s = time.monotonic()
                last_s = await asyncio.to_thread(last_byte_s, place)
                await infer(mesh, f"m-{n}")
                run_s = time.monotonic() - answered_s
                if n:  # the first one is not counted
                    took_ms["fetch"].append((last_s - started_s) * 1e3)
                    took_ms["load"].append((answered_s - last_s - run_s) * 1e3)
                    took_ms["run"].append(run_s * 1e3)
                    by_hand = await result_of("bench.by_hand", "0", str(models / f"{n}.onnx"))
                    took_ms["by hand"].append(by_hand["p50_ms"])
                await mesh.unregister(f"m-{n}")
    return {name: median(found) for name, found in took_ms.items()}


async def infer(mesh: Mesh, model_id: str) -> None:
    deadline = asyncio.get_running_loop().time() + 60
    await mesh.client.call(mesh.pods[0].address, INFER, infer_message(model_id), (), deadline)


def last_byte_s(place: Place) -> float:
    with urllib.request.urlopen(f"{place.url}/last") as answer:
        return float(answer.read())


async def told(job: Job) -> dict[str, Any]:
    found = await job.line()
    if found is None:
        raise JobError("the store ended before it had begun")
    return found


async def run(megabytes: Sequence[int], paces: Mapping[str, float], hidden: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as directory:
        print("| MB/s | library, to memory | library, to a file | ours | to memory | to a file |")
        print("|---|---|---|---|---|---|")
        speeds = await fetches(Path(directory), [size * 1_000_000 for size in megabytes], paces, rounds)
    with tempfile.TemporaryDirectory(prefix="densemesh-bench-") as directory:
        answer_ms = await first_answers(Path(directory), hidden, rounds)
    after_ms = answer_ms["load"] + answer_ms["run"]
    by_hand = answer_ms["by hand"]
    print(
        f"cold request to an ONNX model of {hidden**2 * 4 / 1e6:,.0f} MB: fetch {answer_ms['fetch']:.0f} ms; from its "
        f"last byte to the answer {after_ms:.0f} ms (load {answer_ms['load']:.0f}, run {answer_ms['run']:.1f}); load "
        f"and run by hand {by_hand:.0f} ms ({after_ms / by_hand:.2f}x)"
    )
    return {"mb_per_s": speeds, "answer_ms": answer_ms}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width of the ONNX model (%(default)s: 100 MB)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    figures = asyncio.run(run(asked.megabytes, PACES, asked.hidden, asked.rounds))
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
