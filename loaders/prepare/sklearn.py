"""scikit-learn estimators as ONNX graphs (skl2onnx): in double precision where that can be had, else in FP32, whichever
first agrees with the estimator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx
from skl2onnx import to_onnx
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType, StringTensorType
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline

from loaders.base import Artifact, InferError, Tensor
from loaders.datatypes import bytes_of
from loaders.prepare import NotPreparable
from loaders.prepare.converted import SEPARATOR, Conversion, ConvertedLoader, Feed, Words, write
from loaders.prepare.probes import numeric, strings, texts
from loaders.prepare.trees import exact, with_finite_thresholds
from loaders.prepare.trust import Request, check_agreement, check_gain
from loaders.sklearn import SklearnLoader, SklearnModel
from loaders.sklearn_rows import Rows

_OPSET: Final = {"": 21, "ai.onnx.ml": 3, "com.microsoft": 1}
_TYPES: Final = {"FP64": DoubleTensorType, "FP32": FloatTensorType, "BYTES": StringTensorType}
_BEYOND_FP32: Final = 1e39
_SINGLE_ROWS: Final = 4
"""Of each group of probes, asked one by one too."""


def prepare(artifact: Artifact, folder: Path) -> None:
    """Write the form `converted`.

    Raises:
        NotPreparable: no graph of it agrees, or none is faster.
        LoaderError: the estimator does not load.
    """
    own = SklearnLoader().load(artifact)
    estimator = _convertible(own.estimator)
    options, words = _cut_outside(estimator)
    requests = _Requests(own.estimator, own.rows)
    probes = list(requests.probes())
    reasons: dict[str, None] = {}
    for names, datatype, widen in product(_layouts(own.rows), ("FP64", "FP32"), (False, True)):
        if widen and datatype == "FP32":
            continue
        try:
            feeds = [_watched(feed, own, requests) for feed in _feeds(own.rows, names, datatype, words)]
            graph = _graph(estimator, feeds, options, widen=widen)
            write(_conversion(own, feeds, graph), graph.SerializeToString(), folder)
            conversion = ConvertedLoader().load(Artifact(folder))
            check_agreement(own, conversion, probes)
            check_gain(own, conversion, [requests.usual(1), requests.usual(32)])
            return
        except MemoryError:  # which may be there another time
            raise
        except Exception as error:  # of a converter, for whatever it does not know
            reasons[" ".join(f"{type(error).__name__}: {error}".split())[:200]] = None
    raise NotPreparable("; ".join(reasons)[:1000])


def _convertible(estimator: Any) -> Any:
    """A copy without what skl2onnx stumbles over and predictions do not depend on."""
    estimator = with_finite_thresholds(deepcopy(estimator))
    if hasattr(estimator, "flatten_transform"):
        estimator.flatten_transform = False
    first = estimator.steps[0][1] if hasattr(estimator, "steps") else estimator
    for _, step, _ in getattr(first, "transformers_", ()):
        if isinstance(step, Pipeline):  # strings are never missing, but how an imputer would know them is not converted
            step.steps = [(name, each) for name, each in step.steps if not _imputes_strings(each)]
    return estimator


def _imputes_strings(step: Any) -> bool:
    return isinstance(step, SimpleImputer) and step.statistics_.dtype == object and step.indicator_ is None


def _cut_outside(estimator: Any) -> tuple[dict[int, Any], dict[int, Words]]:
    """Have words found before the graph: the vectorizers' options for skl2onnx, and by column what they did."""
    first = estimator.steps[0][1] if hasattr(estimator, "steps") else estimator
    parts = {0: first}
    for name, step, _ in getattr(first, "transformers_", ()):
        if len(columns := first._transformer_to_input_indices[name]):
            parts[columns[0]] = step.steps[0][1] if isinstance(step, Pipeline) else step
    options, words = {}, {}
    for column, part in parts.items():
        if isinstance(part, CountVectorizer) and part.analyzer == "word":
            words[column] = Words(part.token_pattern, part.lowercase, tuple(sorted(part.get_stop_words() or ())))
            options[id(part)] = {"separators": [SEPARATOR]}
            part.lowercase, part.stop_words = False, None
    return options, words


def _layouts(rows: Rows) -> list[tuple[str, ...]]:
    """Inputs that a graph may have: one of all columns, or one for each under its name."""
    if rows.width is None:
        return [()]
    each = rows.names or tuple(f"x{n}" for n in range(rows.width))
    return [each] if rows.texts else [(), each] if rows.names else [()]


def _feeds(rows: Rows, names: tuple[str, ...], datatype: str, words: Mapping[int, Words]) -> list[Feed]:
    if rows.width is None:
        return [Feed("X", "BYTES", 0, 1, words=words.get(0))]
    if not names:
        return [Feed("X", datatype, 0, rows.width)]
    kinds = ["BYTES" if n in rows.texts else datatype for n in range(len(names))]
    return [
        Feed(name, kind, n, n + 1, words=words.get(n)) for n, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]


def _watched(feed: Feed, own: SklearnModel, requests: _Requests) -> Feed:
    """With what the estimator says of numbers that are none."""
    if feed.datatype == "BYTES":
        return feed

    def takes(value: float) -> bool:
        return any(_is_answered(own, requests.usual(1, {n: value})) for n in (feed.start, feed.stop - 1))

    return replace(feed, takes_nan=takes(np.nan), takes_infinite=takes(np.inf), within_fp32=not takes(_BEYOND_FP32))


def _is_answered(own: SklearnModel, request: Request) -> bool:
    try:
        with np.errstate(all="ignore"):
            own.infer(request, ["predict"])
    except InferError:
        return False
    return True


def _graph(estimator: Any, feeds: Sequence[Feed], options: dict[int, Any], *, widen: bool) -> onnx.ModelProto:
    graph: onnx.ModelProto
    types = [(feed.name, _TYPES[feed.datatype]([None, feed.stop - feed.start])) for feed in feeds]
    how = {"initial_types": types, "target_opset": _OPSET}
    try:
        graph = to_onnx(estimator, options={id(estimator): {"zipmap": False}, **deepcopy(options)}, **how)
    except NameError:  # skl2onnx: it has no such option, and must be told that it has none
        last = estimator.steps[-1][1] if isinstance(estimator, Pipeline) else estimator
        graph = to_onnx(estimator, options={id(last): {}, **deepcopy(options)}, **how)
    exact(graph, estimator, is_double=any(feed.datatype == "FP64" for feed in feeds), widen=widen)
    return graph


def _conversion(own: SklearnModel, feeds: Sequence[Feed], graph: onnx.ModelProto) -> Conversion:
    signature, found = own.signature, [output.name for output in graph.graph.output]
    if len(found) < len(signature.outputs):
        raise NotPreparable(f"its graph has {len(found)} outputs of {len(signature.outputs)}")
    answers = {spec.name: name for spec, name in zip(signature.outputs, found, strict=False)}
    return Conversion(signature, tuple(feeds), answers, own.rows.width, own.rows.names)


class _Requests:
    """Requests as clients would make them."""

    def __init__(self, estimator: Any, rows: Rows) -> None:
        self._rng = rng = np.random.default_rng(0)
        self._rows = rows
        self._texts: list[str] = []
        self._strings: dict[int, list[str]] = {}
        self._numbers: list[Tensor] = []
        if rows.width is None:
            self._texts = texts(estimator, rng)
            return
        self._numbers = numeric(estimator, rows.width, rng)
        if rows.texts:
            self._strings = strings(estimator, range(rows.width), rng)

    def probes(self) -> Iterator[Request]:
        """Each group of rows as one request, and some of its rows one by one."""
        if self._rows.width is None:
            for n in range(0, len(self._texts), 32):
                yield self._text(self._texts[n : n + 32])
            for text in self._texts[:24]:
                yield self._text([text])
            return
        for group in self._numbers:
            for rows in (group, *(group[n : n + 1] for n in range(min(_SINGLE_ROWS, len(group) - 1)))):
                yield self._request(rows, known=True)
                if self._strings:
                    yield self._request(rows[:1], known=False)
        if self._rows.names:
            yield self._request(self._numbers[0], known=True, as_matrix=True)

    def usual(self, count: int, instead: Mapping[int, float] = MappingProxyType({})) -> Request:
        """So many rows that an estimator would take, with these columns' values."""
        if self._rows.width is None:
            return self._text([self._texts[n % len(self._texts)] for n in range(count)])
        rows = np.abs(np.resize(self._numbers[-1], (count, self._rows.width)))
        for column, value in instead.items():
            rows[:, column] = value
        return self._request(rows, known=True)

    def _text(self, some: Sequence[str]) -> Request:
        return {"input-0": bytes_of(np.array(some, object))}

    def _request(self, rows: Tensor, *, known: bool, as_matrix: bool = False) -> Request:
        told = self._rows
        if not told.texts and (as_matrix or not told.names):
            return {"input-0": rows}
        columns = [self._column(n, rows[:, n], known=known) for n in range(rows.shape[1])]
        if as_matrix or not told.names:
            return {"input-0": bytes_of(np.stack([column.astype(object) for column in columns], 1))}
        return {
            name: (bytes_of(column) if column.dtype == object else column).reshape(-1, 1)
            for name, column in zip(told.names, columns, strict=True)
        }

    def _column(self, number: int, values: Tensor, *, known: bool) -> Tensor:
        if number not in self._rows.texts:
            return values
        pool = self._strings.get(number, []) if known else ["?", "", "Größe"]
        return self._rng.choice(np.array(pool or ["?"], object), len(values))
