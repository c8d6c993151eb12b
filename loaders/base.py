"""What a loader is: files in, a model that can run out. One format is one file here and one line in `LOADERS`.

Loaders block; the mesh calls them in worker threads. `infer` may be called from several threads at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

Tensor = npt.NDArray[Any]
"""A C-contiguous array of a dtype in `datatypes.DTYPES`; BYTES tensors hold `bytes` objects."""


class LoaderError(Exception):
    """A model cannot be sized, loaded or unloaded. The message is one sentence meant for the model's owner."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable
        """Whether the same load may succeed later or elsewhere (out of memory, a file not there yet)."""


class OutOfMemory(LoaderError):
    """Memory ran out in this load: the mesh gives up other models and tries once more."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class InferError(Exception):
    """The model itself failed on this request; `bad_input` tells whose fault it is."""

    def __init__(self, message: str, *, bad_input: bool) -> None:
        super().__init__(message)
        self.bad_input = bad_input


class NoMemory(InferError):
    """Memory ran out in this run; the mesh gives up other models, and has the request run elsewhere or later."""

    def __init__(self, message: str) -> None:
        super().__init__(message, bad_input=False)


class ModelLost(InferError):
    """The model is not in memory any more: its process has died, its server has forgotten it. The mesh gives the copy
    up, and loads it again when somebody asks for it."""

    def __init__(self, message: str, *, began: bool) -> None:
        super().__init__(message, bad_input=False)
        self.began = began
        """Whether this request had reached the model, and so may be what ended it: it fails. Others are run on the next
        copy, and their clients do not notice."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model. `shape` uses -1 for a size known only at run time."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and gives, as ModelMetadata tells it."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    """None: it does not tell what it answers, and is asked for () by those who want all."""
    platform: str
    """V2's free text, e.g. `onnx_onnxv1`, `pytorch_torchscript`, `sklearn`."""
    lenient: bool = False
    """The model takes its single input under any name, in any numeric datatype or BYTES and in any shape, and checks it
    itself (scikit-learn: KServe's clients say `input-0`, MLServer's `predict`; TorchScript: the file does not say).
    With several `inputs` it takes either such a single one that has them all for columns, or each under its name.
    `inputs` and the datatypes and shapes of `outputs` are then only a hint: an answer is encoded by its own dtype.
    No `inputs` at all: it does not tell what it takes, and is handed whatever comes, under its own names."""
    default_outputs: tuple[str, ...] = ()
    """Names answered to a client that asks for none; empty: all of `outputs`."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model's files on local disk and how its owner wants them read."""

    path: Path
    """The model file, or a directory for formats that are one."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The registered `key` JSON: loader-specific settings; unknown names are refused by the loader."""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    """Signature declared beside the model (model-settings.json, config.pbtxt), batch dimension included; empty: take
    the model's own."""
    model_id: str = ""
    """For the log, and for servers that have names for models."""
    allowed_code: frozenset[str] = frozenset()
    """What `--allow-code` names."""
    is_fixed: bool = False
    """Nobody writes its files as long as it is loaded, so that they may be mapped: they are the pod's own."""


class LoadedModel(Protocol):
    """A model in memory. `signature` and `size_bytes` do not change while it is loaded."""

    @property
    def signature(self) -> Signature: ...

    @property
    def size_bytes(self) -> int:
        """Measured bytes this copy holds in memory; at least 1."""
        ...

    @property
    def waits(self) -> int:
        """How many requests at once another process computes while `infer` waits for it; they get so many threads of
        their own, and are never run on the event loop. 0: `infer` itself computes."""
        ...

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once. Inputs were checked against `signature`; `outputs` names are of the signature, never empty unless
        that has none.

        Raises:
            InferError: the model refused the values or failed.
            ModelLost: it is not there any more.
        """
        ...

    def unload(self) -> None:
        """Give all memory back; called once, with no `infer` running or to come."""
        ...


class Family(Protocol):
    """Models of one architecture, of which a call can run several."""

    def infer_many(
        self, models: Sequence[Any], requests: Sequence[Mapping[str, Tensor]], outputs: Sequence[str]
    ) -> list[dict[str, Tensor]]:
        """Run a request on each of several models that have joined, all different. Requests must agree in everything
        but the first dimension, which all inputs of one have in common. Answers are those of each model's `infer`,
        within the rounding of their types.

        Raises:
            InferError: whichever of them is to blame; they are to be run one by one.
        """
        ...


@runtime_checkable
class Member(LoadedModel, Protocol):
    """A model that may be run in one call with others."""

    @property
    def family(self) -> Family | None:
        """None: it is not."""
        ...

    def join(self) -> None:
        """Make it ready for `Family.infer_many`, however long it takes; it may be called again, and while it runs.

        Raises:
            LoaderError: it cannot be.
        """
        ...


class Loader(Protocol):
    """Reads one format. Importing its module or constructing it may raise `LoaderError` with the install line."""

    def estimate_bytes(self, artifact: Artifact) -> int:
        """Bytes the loaded model will hold, from its files alone, at most a few milliseconds; at least 1.

        Raises:
            LoaderError: the files are missing or plainly not of this format.
        """
        ...

    def load(self, artifact: Artifact) -> LoadedModel:
        """Load the model; nothing stays behind when this raises.

        Raises:
            LoaderError: with the framework's own reason.
        """
        ...
