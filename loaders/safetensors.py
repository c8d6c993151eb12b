"""Weights in `.safetensors` files, many tenants' for one architecture, of which a process has one skeleton.

The architecture is, in this order,

- parameter `architecture`: what `loaders.skeletons.network` declares, which is data;
- `architecture.json` in the file's directory: the same;
- `skeleton.pt2` there, or the file that parameter `skeleton` names: a `torch.export`ed program, which can run its
  author's code, so that it needs `--allow-code pt2` (`loaders.skeletons.exported`).

Names, datatypes and shapes of the file must be those that the architecture has. The file is mapped, so activating a
model costs no copy; it must stay until the model is unloaded. Where the pod has a device (`loaders.memory.tiered`), the
weights are read into its memory and run there.

Parameter `together: false` makes it an architecture whose models are never run in one call.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from loaders.artifacts import agreed, parameters, reading
from loaders.base import Artifact, InferError, LoaderError, NoMemory, Signature, Tensor
from loaders.memory.layout import aligned
from loaders.memory.mapping import map_file
from loaders.memory.process import Change
from loaders.skeletons.header import Header, read_header

try:
    import torch

    from loaders.skeletons.apart import Apart, placed
    from loaders.skeletons.base import Skeleton, Views
    from loaders.skeletons.exported import Exported, digest_of
    from loaders.skeletons.family import Family, families
    from loaders.skeletons.network import MAX_DECLARED_BYTES, Network, declared_in
    from loaders.skeletons.rows import Row, Rows
    from loaders.skeletons.views import ALIGNMENT, views
    from loaders.torch_tensors import no_memory, one_thread, reason, to_numpy, to_torch
except ImportError as missing:
    raise LoaderError("torch is not installed: pip install 'densemesh[safetensors]'") from missing

DECLARATION: Final = "architecture.json"
SKELETON: Final = "skeleton.pt2"
_MODEL_BYTES: Final = 4_000
_TENSOR_BYTES: Final = 900
_DECLARED_BYTES, _EXPORTED_BYTES = 20_000, 100_000
"""What is expected of a skeleton that is not here yet."""


class SafetensorsLoader:
    """Reads `.safetensors`, or a directory with one and its architecture."""

    def __init__(self) -> None:
        one_thread()

    def estimate_bytes(self, artifact: Artifact) -> int:
        path = _weights_in(artifact.path)
        header = read_header(path)
        architecture = _architecture(artifact, path, header)
        return _bytes(header) + (0 if architecture.digest in families else architecture.expected_bytes)

    def load(self, artifact: Artifact) -> SafetensorsModel:
        path = _weights_in(artifact.path)
        header = read_header(path)
        with _taken(artifact, path, header) as (family, signature, is_first):
            size_bytes = _bytes(header) + (family.skeleton.size_bytes if is_first else 0)
            return SafetensorsModel(family, signature, size_bytes, _mapped(path, header))

    def weights_bytes(self, artifact: Artifact) -> int:
        return max(placed(read_header(_weights_in(artifact.path))).size_bytes, 1)

    def weightless(self, artifact: Artifact) -> Apart:
        path = _weights_in(artifact.path)
        header = read_header(path)
        with _taken(artifact, path, header) as (family, signature, _):
            return Apart(path, header, family, signature, run)


@contextmanager
def _taken(artifact: Artifact, path: Path, header: Header) -> Iterator[tuple[Family, Signature, bool]]:
    """A model's architecture for as long as it is loaded, its signature, and whether it is the first there."""
    architecture = _architecture(artifact, path, header)
    family, is_first = families.take(architecture.digest, lambda: _built(architecture, header))
    try:
        own = family.skeleton.signature
        yield family, agreed(own, artifact) if artifact.inputs or artifact.outputs else own, is_first
    except BaseException:
        families.drop(family)
        raise


class SafetensorsModel:
    """Weights, wherever they lie, and the skeleton that computes with them."""

    waits: Final = 0

    def __init__(self, architecture: Family, signature: Signature, size_bytes: int, bytes_of: torch.Tensor) -> None:
        """`bytes_of`: the file's tensors, one after another."""
        self.signature = signature
        self.size_bytes = size_bytes
        self.architecture = architecture
        self.family = architecture if architecture.rows is not None else None
        self.row: Row | None = None
        self.weights: Views = views(architecture.layout, bytes_of)
        self._mapped: torch.Tensor | None = bytes_of
        self._lock = threading.Lock()

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: see `run`.
        """
        return run(self.architecture, self.weights, inputs, outputs)

    def join(self) -> None:
        """Move the weights into a row; see `loaders.base.Member`.

        Raises:
            LoaderError: there is no memory.
        """
        with self._lock:
            rows = self.architecture.rows
            if self._mapped is None or rows is None:  # it has joined before, or was unloaded meanwhile
                return
            try:
                self.row, self.weights = rows.put(self._mapped)
            except (OSError, MemoryError) as error:
                raise LoaderError(f"no memory for a row: {error}", retryable=True) from error
            self._mapped = None

    def unload(self) -> None:
        with self._lock:
            self._mapped, self.weights = None, {}
            if self.row is not None and self.architecture.rows is not None:
                self.architecture.rows.give_back(self.row)
            self.row = None
        families.drop(self.architecture)


def run(family: Family, weights: Views, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
    """Run a skeleton once, where its weights are.

    Raises:
        InferError: torch's reason; `bad_input` unless memory ran out: weights and architecture were checked, so what
            remains is sizes that the signature leaves free, and values (an index beyond an embedding).
    """
    try:
        with torch.inference_mode():
            device = next((tensor.device for tensor in weights.values()), torch.device("cpu"))
            feeds = {name: to_torch(tensor).to(device) for name, tensor in inputs.items()}
            found = family.skeleton.run(weights, feeds)
        return {name: to_numpy(found[name].cpu()) for name in outputs}
    except InferError:
        raise
    except Exception as error:
        if no_memory(error):
            raise NoMemory(reason(error)) from error
        raise InferError(reason(error), bad_input=True) from error


def _mapped(path: Path, header: Header) -> torch.Tensor:
    """The bytes of a file's tensors. Whoever writes to them has pages of its own.

    Raises:
        LoaderError: it cannot be mapped, or has changed since its header was read.
    """
    start, end = header.data_start, header.data_start + header.data_bytes
    with reading(path), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != end:
            raise LoaderError(f"{path.name} has changed while it was read", retryable=True)
        found = torch.from_numpy(map_file(file.fileno(), aligned(end, ALIGNMENT), own=True))  # within its last page
    return found[start:] if start % ALIGNMENT == 0 else _moved(found[start:end])


def _moved(run: torch.Tensor) -> torch.Tensor:
    """At an even address, and of an even length."""
    moved = torch.zeros(aligned(len(run), ALIGNMENT), dtype=torch.uint8)
    moved[: len(run)] = run
    return moved


def _built(architecture: _Architecture, header: Header) -> Family:
    with Change():
        skeleton = architecture.build()
    suits = architecture.together and Rows.suit(header.layout, header.data_bytes)
    rows = Rows(header.layout, header.data_bytes) if suits else None
    return Family(architecture.digest, skeleton, header.layout, rows)


def _bytes(header: Header) -> int:
    return header.data_bytes + _MODEL_BYTES + _TENSOR_BYTES * len(header.layout.places)


def _weights_in(path: Path) -> Path:
    if not path.is_dir():
        return path
    with reading(path):
        found = sorted(each.name for each in path.iterdir() if each.suffix == ".safetensors")
    if "model.safetensors" in found:
        return path / "model.safetensors"
    if len(found) != 1:
        raise LoaderError(f"{path.name} holds {len(found)} .safetensors files: expected one, or model.safetensors")
    return path / found[0]


class _Architecture(NamedTuple):
    digest: str
    together: bool
    expected_bytes: int
    """Of its skeleton."""
    build: Callable[[], Skeleton]


def _architecture(artifact: Artifact, weights: Path, header: Header) -> _Architecture:
    own = parameters(artifact, "safetensors", "architecture", "skeleton", "together")
    together, name = own.get("together", True), own.get("skeleton", SKELETON)
    if not isinstance(together, bool):
        raise LoaderError(f"parameter 'together' is {together!r}: expected true or false")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".pt2"):
        raise LoaderError(f"parameter 'skeleton' is {name!r}: expected the name of a .pt2 file beside the weights")
    layout, told = header.layout, f"{header.layout.key} {together}"
    declared, path = own.get("architecture"), weights.with_name(name)
    if declared is None and "skeleton" not in own:
        declared = _declared_beside(weights)
    if declared is not None:
        text = json.dumps(declared, sort_keys=True)
        digest = hashlib.sha256(f"{told} {text}".encode()).hexdigest()
        return _Architecture(digest, together, _DECLARED_BYTES, lambda: Network(declared, layout))
    if not path.is_file():
        expected = f"parameter 'architecture', or {DECLARATION} or {SKELETON} in its directory"
        raise LoaderError(f"{weights.name} comes without an architecture: expected {expected}")
    if "pt2" not in artifact.allowed_code:
        raise LoaderError(f"{path.name} can run its author's code when loaded: refused without --allow-code pt2")
    digest = hashlib.sha256(f"{told} {digest_of(path)}".encode()).hexdigest()
    return _Architecture(digest, together, _EXPORTED_BYTES, lambda: Exported(path, layout))


def _declared_beside(weights: Path) -> Any:
    path = weights.with_name(DECLARATION)
    if not path.is_file():
        return None
    with reading(path), path.open("rb") as file:
        text = file.read(MAX_DECLARED_BYTES + 1)
    if len(text) > MAX_DECLARED_BYTES:
        raise LoaderError(f"{DECLARATION}: expected at most {MAX_DECLARED_BYTES} bytes")
    return declared_in(text)
