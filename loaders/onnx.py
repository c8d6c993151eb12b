"""ONNX models on ONNX Runtime, set up so that hundreds of sessions share a process.

One session costs no thread: one intra-op and one inter-op thread mean the caller's own, where the default starts a pool
per session. Without a CPU arena a session keeps no activations between runs: 92 kB instead of 130 kB for a small MLP
after its first run. Memory patterns are off because they cache a plan per input shape. Weights stay prepacked: with
arena and patterns off, `session.disable_prepacking` saved nothing (885 kB either way for a 790 kB MLP) and cost up to
half the speed of batches (50 MB MLP, batch 32: 8 ms prepacked, 16 ms not). Large models are opened without
(`onnx_parted`) and get it when they have been in use for as long as it takes.

Loading runs no code of the model's author: operators come from ONNX Runtime alone (custom operator libraries are not
accepted) and it refuses external data outside the model's folder.

Parameters: `device` ("cpu", "cuda", "cuda:1") or `providers` (execution providers in order of preference).
"""

from __future__ import annotations

import ctypes
import logging
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import numpy as np

from loaders.artifacts import agreed, parameters, reading
from loaders.base import Artifact, InferError, LoaderError, OutOfMemory, Signature, Tensor
from loaders.datatypes import DTYPES, bytes_of, text_of
from loaders.memory.process import Change
from loaders.onnx_file import weigh
from loaders.onnx_parted import Parted, part
from loaders.onnx_session import InvalidArgument, has_datatype, ort, reason_of, session_options, signature_of

log = logging.getLogger(__name__)

_PACKING_S_PER_BYTE: Final = 1.5e-9
_packing: Final = threading.Lock()
"""Held while one model's weights are packed."""
_BFLOAT16: Final = 16
"""onnx.TensorProto.BFLOAT16"""
_PROVIDERS: Final = (
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "OpenVINOExecutionProvider",
)


class OnnxLoader:
    """Reads `.onnx`, with external data files beside it if the model has them."""

    def __init__(self) -> None:
        """Check the installation.

        Raises:
            LoaderError: onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files.
        """
        if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
            raise LoaderError(
                "onnxruntime and onnxruntime-gpu are both installed and break each other: uninstall both, install one"
            )

    def estimate_bytes(self, artifact: Artifact) -> int:
        return weigh(artifact.path, widened=_providers(artifact)[0] == "CPUExecutionProvider")

    def load(self, artifact: Artifact) -> OnnxModel:
        providers = _providers(artifact)
        estimate = self.estimate_bytes(artifact)
        parted = _parted(artifact) if providers == ["CPUExecutionProvider"] else None
        with Change() as change:
            try:
                if parted is not None:
                    session = parted.open()
                else:
                    session = ort.InferenceSession(
                        str(artifact.path), session_options(), providers=providers, enable_fallback=0
                    )
            except Exception as error:
                reason = reason_of(error)
                no_memory = isinstance(error, MemoryError) or "bad_alloc" in reason or "allocate memory" in reason
                kind = OutOfMemory if no_memory else LoaderError
                raise kind(f"{artifact.path.name}: {reason}") from error
            asked = providers[0] if isinstance(providers[0], str) else providers[0][0]
            if asked not in session.get_providers():  # ONNX Runtime only logs that a provider would not start
                raise LoaderError(f"{artifact.path.name}: {asked} does not start on this machine")
            # Weights on a device are not malloc's, and what its driver takes is not the model's.
            size_bytes = change.measured(estimate, "onnx") if asked == "CPUExecutionProvider" else estimate
        signature = agreed(signature_of(session), artifact)
        return OnnxModel(session, signature, size_bytes, parted)


class OnnxModel:
    """One session; runs on the calling thread, in as many threads at once as call it."""

    waits: Final = 0

    def __init__(self, session: Any, signature: Signature, size_bytes: int, parted: Parted | None = None) -> None:
        """`parted`: whose weights the session reads where they are. It gets its packed ones once its runs have taken as
        long as packing does, in a thread of its own: it never loses more than that."""
        self.signature = signature
        self.size_bytes = size_bytes
        self._switching = threading.Lock()
        self._opened = _Opened(session, parted)
        self._unpacked_s = _PACKING_S_PER_BYTE * size_bytes if parted is not None else 0.0
        """Of runs that are still to come without packed weights."""
        self._texts = {spec.name for spec in signature.inputs if spec.datatype == "BYTES"}
        self._has_bf16 = has_datatype(session, "BF16")

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once; strings must be UTF-8, which is what an ONNX string is.

        Raises:
            InferError: ONNX Runtime's reason; `bad_input` for shapes, datatypes and values that it calls invalid.
        """
        try:
            feeds = {name: text_of(tensor) if name in self._texts else tensor for name, tensor in inputs.items()}
        except UnicodeDecodeError as error:
            raise InferError(f"string input is not UTF-8: {error}", bad_input=True) from error
        opened = self._opened  # for as long as this run takes
        started_s = time.perf_counter() if opened.parted is not None else 0.0
        try:
            run = partial(_run_values, opened.session) if self._has_bf16 else opened.session.run
            results: list[Tensor] = run(list(outputs), feeds)
        except Exception as error:
            raise InferError(reason_of(error), bad_input=isinstance(error, InvalidArgument)) from error
        if opened.parted is not None:
            self._unpacked_s -= time.perf_counter() - started_s
            if self._unpacked_s < 0:
                self._pack(opened.parted)
        return {
            name: bytes_of(result) if result.dtype == object else result
            for name, result in zip(outputs, results, strict=True)
        }

    def unload(self) -> None:
        with Change(), self._switching:
            self._opened = _GONE

    def _pack(self, parted: Parted) -> None:
        """Begin to pack the weights, unless another model's are."""
        if _packing.acquire(blocking=False):
            self._unpacked_s = math.inf
            threading.Thread(target=self._packed, args=(parted,), name="pack", daemon=True).start()

    def _packed(self, parted: Parted) -> None:
        try:
            with Change():
                session = parted.packed()
                with self._switching:
                    if self._opened is not _GONE:  # unloaded meanwhile
                        self._opened = _Opened(session)
        except Exception as error:
            log.warning("an ONNX model's weights cannot be packed: %s", reason_of(error))
        finally:
            _packing.release()


@dataclass(frozen=True, slots=True)
class _Opened:
    session: Any
    parted: Parted | None = None
    """Has the weights that the session reads."""


_GONE: Final = _Opened(None)


def _run_values(session: Any, outputs: list[str], feeds: dict[str, Tensor]) -> list[Tensor]:
    """The way for BF16, which ONNX Runtime cannot exchange as numpy arrays: by address, bit for bit."""
    bf16 = DTYPES["BF16"]
    values = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(np.uint16), _BFLOAT16)
        if tensor.dtype == bf16
        else ort.OrtValue.ortvalue_from_numpy(tensor)
        for name, tensor in feeds.items()
    }
    results: list[Tensor] = []
    for value in session.run_with_ort_values(outputs, values):
        if value.data_type() != "tensor(bfloat16)":
            results.append(value.numpy())
            continue
        array = np.empty(value.shape(), bf16)
        ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
        results.append(array)
    return results


def _parted(artifact: Artifact) -> Parted | None:
    path = artifact.path
    try:
        with reading(path):
            return part(path, is_fixed=artifact.is_fixed)
    except (ValueError, IndexError) as error:
        raise LoaderError(f"{path.name} is not an ONNX model: {error}") from error


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _providers(artifact: Artifact) -> list[Any]:
    """Execution providers in order of preference, the CPU last.

    Raises:
        LoaderError: a parameter is unknown, or asks for what this installation does not have.
    """
    settings = parameters(artifact, "onnx", "device", "providers")
    if len(settings) == 2:
        raise LoaderError("parameters 'device' and 'providers' exclude each other")
    device = settings.get("device", "cpu")
    names = settings.get("providers", ["CPUExecutionProvider"])
    options: dict[str, int | str] = {}
    if device != "cpu":
        cuda = re.fullmatch(r"cuda(?::(\d+))?", str(device))
        if cuda is None:
            raise LoaderError(f"parameter 'device' is {device!r}: expected 'cpu', 'cuda' or 'cuda:<number>'")
        names = ["CUDAExecutionProvider"]
        # The arena doubles its blocks by default, which a device shared by many models cannot afford.
        options = {"device_id": int(cuda[1] or 0), "arena_extend_strategy": "kSameAsRequested"}
    if not isinstance(names, list) or not names:
        raise LoaderError(f"parameter 'providers' is {names!r}: expected a list of provider names")
    here = [name for name in ort.get_available_providers() if name in _PROVIDERS]
    for name in names:
        if name not in here:
            raise LoaderError(f"execution provider {name!r} is not available here: expected {' or '.join(here)}")
    first: Any = (names[0], options) if options else names[0]
    return [first, *names[1:], *({"CPUExecutionProvider"} - set(names))]
