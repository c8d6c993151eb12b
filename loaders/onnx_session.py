"""ONNX Runtime sessions as everything here sets them up, and what they tell of their models."""

from __future__ import annotations

import os
import re
from typing import Any, Final

from loaders.base import LoaderError, Signature, TensorSpec

# Since 1.31 importing it starts a telemetry thread and writes into the home directory; a server tells nobody about its
# tenants' models unless its operator wants that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    import onnxruntime as ort
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
except ImportError as missing:
    raise LoaderError("onnxruntime is not installed: pip install 'densemesh[onnx]'") from missing

__all__ = ["InvalidArgument", "has_datatype", "ort", "reason_of", "session_options", "signature_of"]

_DATATYPES: Final = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


def session_options() -> Any:
    """For a session that costs no thread and keeps no activations between runs; `loaders.onnx` has the figures."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # fatal only: reasons reach the caller as exceptions
    return options


def signature_of(session: Any) -> Signature:
    """What a session takes and gives.

    Raises:
        LoaderError: V2 has no such datatype, or two that exclude each other here.
    """
    signature = Signature(
        inputs=tuple(map(_spec, session.get_inputs())),
        outputs=tuple(map(_spec, session.get_outputs())),
        platform="onnx_onnxv1",
    )
    if has_datatype(session, "BF16") and has_datatype(session, "BYTES"):
        raise LoaderError("models that take or give both bfloat16 and string tensors are not supported")
    return signature


def _spec(node: Any) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        hint = ": export it with zipmap=False" if "map(" in node.type else ""
        raise LoaderError(f"{node.name!r} is a {node.type}, which has no V2 datatype{hint}")
    return TensorSpec(node.name, datatype, tuple(size if isinstance(size, int) else -1 for size in node.shape))


def has_datatype(session: Any, datatype: str) -> bool:
    """Whether the session takes or gives tensors of a V2 datatype."""
    return any(_DATATYPES.get(node.type) == datatype for node in (*session.get_inputs(), *session.get_outputs()))


def reason_of(error: Exception) -> str:
    """ONNX Runtime's sentence without its `[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : ` and line breaks."""
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))[:500]
