"""The form `converted`: a model of another framework as an ONNX graph, and how to serve it as that framework would.

    model.onnx         the graph
    conversion.json    the model's own signature, which columns of its rows go where, which values it refuses

It runs on ONNX Runtime as ONNX models do (`loaders.onnx`); to clients it is the model that it was made of: the same
names, datatypes, shapes and refusals. What its numbers may differ by is `loaders.prepare.trust`'s business.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from loaders.artifacts import agreed
from loaders.base import Artifact, InferError, LoadedModel, LoaderError, Signature, Tensor, TensorSpec
from loaders.columns import numbers, table
from loaders.datatypes import DTYPES, text_of
from loaders.onnx import OnnxLoader
from loaders.onnx_file import weigh
from loaders.prepare import Damaged

GRAPH: Final = "model.onnx"
_CONVERSION: Final = "conversion.json"
SEPARATOR: Final = "\x01"
_NO_SEPARATOR: Final = "\x02"


@dataclass(frozen=True, slots=True)
class Words:
    """How texts are cut into words, before the graph gets them with `SEPARATOR` between: by Python, because ONNX's
    operators have other regular expressions and another lower case."""

    pattern: str
    lowercase: bool
    stop_words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Feed:
    """One input of the graph: columns [start, stop) of the rows."""

    name: str
    datatype: str
    """FP32, FP64 or BYTES."""
    start: int
    stop: int
    takes_nan: bool = False
    takes_infinite: bool = False
    within_fp32: bool = False
    """The model refuses numbers that FP32 does not have, in whatever datatype they come."""
    words: Words | None = None


@dataclass(frozen=True, slots=True)
class Conversion:
    """How to serve the graph."""

    signature: Signature
    """The model's own, before anything that is declared beside it."""
    feeds: tuple[Feed, ...]
    answers: Mapping[str, str]
    """The graph's output for each of the signature's."""
    width: int | None
    """Columns of a row; None: it is one text."""
    columns: tuple[str, ...] = ()
    """Their names, if requests may have a tensor for each."""


def write(conversion: Conversion, graph: bytes, folder: Path) -> None:
    """Write the form into a folder."""
    (folder / GRAPH).write_bytes(graph)
    told = {**asdict(conversion), "sha256": hashlib.sha256(graph).hexdigest()}
    (folder / _CONVERSION).write_text(json.dumps(told))


def read(folder: Path) -> Conversion:
    """What `write` wrote, the graph checked.

    Raises:
        Damaged
    """
    try:
        told = json.loads((folder / _CONVERSION).read_bytes())
        with (folder / GRAPH).open("rb") as graph:
            if hashlib.file_digest(graph, "sha256").hexdigest() != told["sha256"]:
                raise ValueError("its graph is another")
        own = told["signature"]
        own |= {part: tuple(map(_spec, own[part])) for part in ("inputs", "outputs")}
        return Conversion(
            Signature(**own | {"default_outputs": tuple(own["default_outputs"])}),
            tuple(map(_feed, told["feeds"])),
            told["answers"],
            told["width"],
            tuple(told["columns"]),
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Damaged(f"the converted form is damaged: {error}") from error


class ConvertedLoader:
    """Reads a folder that `write` filled."""

    def estimate_bytes(self, artifact: Artifact) -> int:
        try:
            return weigh(artifact.path / GRAPH)
        except LoaderError as error:
            raise Damaged(str(error)) from error

    def load(self, artifact: Artifact) -> ConvertedModel:
        conversion = read(artifact.path)
        signature = agreed(conversion.signature, artifact)
        try:
            graph = OnnxLoader().load(Artifact(artifact.path / GRAPH))
        except LoaderError as error:
            if error.retryable:
                raise
            raise Damaged(str(error)) from error
        return ConvertedModel(graph, conversion, signature)


class ConvertedModel:
    """A graph behind another framework's manners."""

    waits = 0

    def __init__(self, graph: LoadedModel, conversion: Conversion, signature: Signature) -> None:
        self.signature = signature
        self.size_bytes = graph.size_bytes
        self._graph = graph
        self._feeds = [(feed, None if feed.words is None else _Cutter(feed.words)) for feed in conversion.feeds]
        self._width = conversion.width
        self._columns = conversion.columns
        self._answers = conversion.answers
        own = conversion.signature.outputs
        self._specs = {spec.name: (spec.datatype == "BYTES", DTYPES[spec.datatype], spec.shape[1:]) for spec in own}

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: what the original framework refuses (`bad_input`), or ONNX Runtime's reason.
        """
        rows = table(inputs, self._width, self._columns)
        count = len(rows if isinstance(rows, np.ndarray) else rows[0])
        if not count:
            raise InferError("found array with 0 samples while a minimum of 1 is required", bad_input=True)
        feeds = {feed.name: _fed(feed, cutter, _taken(feed, rows)) for feed, cutter in self._feeds}
        try:
            found = self._graph.infer(feeds, [self._answers[name] for name in outputs])
        except InferError as error:  # what is left are values: an encoder may refuse categories that it does not know
            raise InferError(str(error), bad_input=True) from error
        return {name: self._answer(name, found[self._answers[name]], count) for name in outputs}

    def unload(self) -> None:
        self._graph.unload()

    def _answer(self, name: str, found: Tensor, count: int) -> Tensor:
        is_text, dtype, shape = self._specs[name]
        if found.shape != (count, *shape):
            found = found.reshape(count, *shape)
        return found if is_text else np.ascontiguousarray(found, dtype)


def _taken(feed: Feed, rows: Tensor | list[Tensor]) -> Tensor:
    """The feed's columns."""
    if isinstance(rows, list):
        some = rows[feed.start : feed.stop]
        if len({column.dtype == object for column in some}) > 1:
            some = [numbers(column) for column in some]
        return np.stack(some, 1)
    if rows.ndim == 1:
        return rows.reshape(-1, 1)
    if rows.shape[1] == feed.stop - feed.start:
        return rows
    return rows[:, feed.start : feed.stop]


class _Cutter:
    """`Words`, made ready."""

    def __init__(self, words: Words) -> None:
        self._find = re.compile(words.pattern).findall
        self._lowercase = words.lowercase
        self._stop_words = frozenset(words.stop_words)

    def __call__(self, values: Tensor) -> Tensor:
        cut = np.empty(values.shape, object)
        try:
            cut.reshape(-1)[:] = [self._cut(text) for text in text_of(values).flat]
        except UnicodeDecodeError as error:
            raise InferError(str(error), bad_input=True) from None
        return cut

    def _cut(self, text: str) -> str:
        text = text.replace(SEPARATOR, _NO_SEPARATOR)  # a word with either is none that was learned
        found = self._find(text.lower() if self._lowercase else text)
        return SEPARATOR.join([word for word in found if word not in self._stop_words] if self._stop_words else found)


def _fed(feed: Feed, cutter: _Cutter | None, values: Tensor) -> Tensor:
    """In the graph's datatype, with what the model refuses refused."""
    if feed.datatype == "BYTES":
        if values.dtype != object:
            raise InferError(f"{feed.name} takes BYTES, got numbers", bad_input=True)
        return values if cutter is None else cutter(values)
    fed = numbers(values, np.float32 if feed.datatype == "FP32" else np.float64)
    if not (feed.takes_nan and feed.takes_infinite):
        narrow = numbers(fed, np.float32) if feed.within_fp32 else fed
        if not np.isfinite(narrow).all():
            if not feed.takes_nan and np.isnan(narrow).any():
                raise InferError("input X contains NaN", bad_input=True)
            if not feed.takes_infinite and np.isinf(narrow).any():
                most = "FP32" if feed.within_fp32 else feed.datatype
                raise InferError(f"input X contains infinity or a value too large for {most}", bad_input=True)
    return np.ascontiguousarray(fed)


def _feed(told: dict[str, Any]) -> Feed:
    return Feed(**told | {"words": told["words"] and Words(**told["words"])})


def _spec(told: dict[str, Any]) -> TensorSpec:
    return TensorSpec(told["name"], told["datatype"], tuple(told["shape"]))
