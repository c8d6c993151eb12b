"""Tensors of requests and weights as torch has them, and back; what torch's exceptions say."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import numpy as np

from loaders.base import InferError, LoaderError, Tensor
from loaders.datatypes import DTYPES

try:
    import torch
except ImportError as missing:
    raise LoaderError("torch is not installed: pip install 'densemesh[torch]'") from missing

DATATYPES: Final = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}
TORCH_DTYPES: Final[Mapping[str, Any]] = {
    **{name: dtype for dtype, name in DATATYPES.items()},
    "FP8_E4M3FN": torch.float8_e4m3fn,
    "FP8_E5M2": torch.float8_e5m2,
}
"""Of inputs, outputs and weights."""


def one_thread() -> None:
    """One intra-op and one inter-op thread for the whole process: parallelism comes from requests, and with OpenMP
    every calling thread would otherwise get a team of its own."""
    torch.set_num_threads(1)
    with suppress(RuntimeError):  # can be set only before the first parallel work, by us or another user of torch
        torch.set_num_interop_threads(1)


def to_torch(array: Tensor) -> torch.Tensor:
    """
    Raises:
        InferError: strings.
    """
    # Tensors cannot be read-only: a model that writes to its input must not write to the request's buffer.
    array = array if array.flags.writeable else array.copy()
    if array.dtype == DTYPES["BF16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype == object:
        raise InferError("PyTorch takes no BYTES tensors", bad_input=True)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> Tensor:
    """
    Raises:
        InferError: V2 does not have its datatype.
    """
    if tensor.dtype not in DATATYPES:
        raise InferError(f"the model answered {tensor.dtype}, which has no V2 datatype", bad_input=False)
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["BF16"])
    return tensor.numpy()


def reason(error: Exception) -> str:
    """The last sentence of torch's message, which follows TorchScript's traceback; the type if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]


def no_memory(error: Exception) -> bool:
    """Whether memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error)
