"""An ONNX file into skeleton and weights: done once for a model's bytes, in a process where time does not matter.

ONNX Runtime optimises the graph with the weights known, so what it folds, fuses and lays out anew (constants, batch
normalisation, blocked convolutions) is in the weights that are stored, and the skeleton needs no optimisation when it
is loaded. Convolutions are in the layout of this machine's CPU then: `machine` is written down, and compared.

Every initialiser that training can change becomes an input: floats and the small integers of quantised weights, of any
size, because one bias left in the graph would make each fine-tune an architecture of its own. Shapes and indices
(64-bit integers), booleans and strings stay. Whatever is not clearly splittable is refused and served as it is:

- control flow: graphs inside of graphs have weights of their own;
- operators whose weights are attributes (tree ensembles, linear models of ONNX-ML): they would stay in the skeleton;
- external data: what is prepared is known by the bytes of the `.onnx` file alone;
- weights that are inputs of the model already, sparse ones, and those of types that cannot be fed (bfloat16, 4 bits);
- strings or bfloat16 as inputs or outputs, which are exchanged another way;
- a model that no probe runs on, or that answers differently when its weights are fed, or much slower.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np

from loaders.artifacts import own_parameters
from loaders.base import Artifact, LoaderError, Tensor, TensorSpec
from loaders.datatypes import DTYPES
from loaders.fleet.architectures import FACTS_FILE, PREPACKED_FILE, SKELETON_FILE, WEIGHTS_FILE, Facts, machine
from loaders.fleet.canonical import canonicalise
from loaders.fleet.feeding import Fed, open_session
from loaders.memory.weights import DATA_START, WeightsFile, write_weights
from loaders.onnx_session import ort, reason_of, session_options, signature_of
from loaders.prepare import NotPreparable

_FLOAT, _UINT8, _INT8, _INT32, _FLOAT16, _DOUBLE = 1, 2, 3, 6, 10, 11
_LIFTED: Final = frozenset({_FLOAT, _UINT8, _INT8, _INT32, _FLOAT16, _DOUBLE})
"""onnx.TensorProto.DataType"""
_PROBED_SIZES: Final = (2, 16, 224, 1)
"""What sizes known only at run time are tried with, in this order."""
_TIMED_S: Final = 0.5
_MOST_RUNS: Final = 300
_SLOWEST: Final = 4.0
"""Times the run time of a session of its own, above which a model is not split."""
_RELATIVE: Final = 1e-3


def split(artifact: Artifact, folder: Path) -> None:
    """Write skeleton, weights and what was measured into a folder, once answers were found to be the same.

    Raises:
        NotPreparable: it is to be served as it is.
        LoaderError: it is no model at all, or the disk refuses.
    """
    source = artifact.path
    if any(parameter != ("device", "cpu") for parameter in own_parameters(artifact).items()):
        raise NotPreparable("it asks for a device or for execution providers")
    _inspect(source)
    try:
        plain = _optimised(source, folder)
        model, weights = _lifted(folder)
        _write(model, weights, folder)
        _check(plain, len(model.graph.node), folder)
    finally:
        for name in (_OPTIMISED, _INITIALISERS):
            (folder / name).unlink(missing_ok=True)


_OPTIMISED: Final = "optimised.onnx"
_INITIALISERS: Final = "optimised.bin"


def _inspect(source: Path) -> None:
    """Refuse what the file itself tells."""
    import onnx
    from onnx import AttributeProto

    try:
        model = onnx.load(source, load_external_data=False)
    except Exception as error:
        raise LoaderError(f"{source.name} is not an ONNX model: {error}") from error
    graph = model.graph
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    if any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in attributes):
        raise NotPreparable("it has control flow")
    if graph.sparse_initializer or model.functions:
        raise NotPreparable("it has sparse weights or functions of its own")
    if any(tensor.external_data for tensor in chain(graph.initializer, (attribute.t for attribute in attributes))):
        raise NotPreparable("it has external data")
    outside = {info.name for info in chain(graph.input, graph.output)}
    if any(tensor.name in outside for tensor in graph.initializer):
        raise NotPreparable("it has weights that are inputs or outputs too")


def _optimised(source: Path, folder: Path) -> Any:
    """A session of the model as it is; its optimised graph lies in the folder then."""
    options = session_options()
    options.optimized_model_filepath = str(folder / _OPTIMISED)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _INITIALISERS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "0")
    try:
        return ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise LoaderError(f"{source.name}: {reason_of(error)}") from error


def _lifted(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The optimised model without the weights, and these, in the order in which they are used first."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(folder / _OPTIMISED, load_external_data=False)
    canonicalise(model)
    stored = folder / _INITIALISERS
    data = np.memmap(stored, np.uint8, "r") if stored.exists() and stored.stat().st_size else np.empty(0, np.uint8)
    graph, weights = model.graph, dict[str, Tensor]()
    tensors = list(graph.initializer)
    del graph.initializer[:]
    for tensor in tensors:
        array = _array(tensor, data)
        if tensor.data_type in _LIFTED:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            weights[tensor.name] = array
        else:
            graph.initializer.append(numpy_helper.from_array(array, tensor.name))
    return model, weights


def _array(tensor: Any, data: Any) -> Tensor:
    from onnx import helper, numpy_helper

    if not tensor.external_data:
        return numpy_helper.to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    start, length = int(where["offset"]), int(where["length"])
    array: Tensor = data[start : start + length].view(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return array.reshape(tuple(tensor.dims))


def _write(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    import onnx

    skeleton = model.SerializeToString(deterministic=True)
    if len(skeleton) > sum(array.nbytes for array in weights.values()):
        raise NotPreparable("most of it is graph, not weights")
    digest = hashlib.sha256(skeleton).hexdigest()
    contents = write_weights(folder / WEIGHTS_FILE, weights, digest)
    (folder / SKELETON_FILE).write_bytes(skeleton)
    # The same graph with its weights as constants again, where they lie: what is promoted is loaded from it.
    kinds = {info.name: info.type.tensor_type.elem_type for info in model.graph.input}
    places = {place.name: place for place in contents.layout.places}
    own = [info for info in model.graph.input if info.name not in places]
    del model.graph.input[:]
    model.graph.input.extend(own)
    for place in places.values():
        constant = onnx.TensorProto(name=place.name, data_type=kinds[place.name], dims=place.shape)
        constant.data_location = onnx.TensorProto.EXTERNAL
        where = {"location": WEIGHTS_FILE, "offset": DATA_START + place.offset, "length": place.size_bytes}
        for key, value in where.items():
            constant.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(constant)
    (folder / PREPACKED_FILE).write_bytes(model.SerializeToString())


def _check(plain: Any, nodes: int, folder: Path) -> None:
    """Compare answers and times with the model's own, and write down what prepacking saves."""
    signature = signature_of(plain)
    if {spec.datatype for spec in (*signature.inputs, *signature.outputs)} & {"BYTES", "BF16"}:
        raise NotPreparable("it takes or gives strings or bfloat16")
    names = [spec.name for spec in signature.outputs]
    probe, expected = _probe(plain, signature.inputs, names)
    with WeightsFile(folder / WEIGHTS_FILE) as file:
        weights = file.views()
    try:
        fed, prepacked = Fed(open_session(folder / SKELETON_FILE), weights), open_session(folder / PREPACKED_FILE)
        alike = all(_alike(run(names, probe), expected) for run in (fed.run, prepacked.run))
    except Exception as error:
        raise NotPreparable(f"it does not run with its weights fed: {reason_of(error)}") from error
    if not alike:
        raise NotPreparable("with its weights fed it answers differently")
    with WeightsFile(folder / WEIGHTS_FILE) as file:
        saving = _saving(file.architecture, [partial(run, names, probe) for run in (fed.run, prepacked.run, plain.run)])
    (folder / FACTS_FILE).write_text(json.dumps(asdict(Facts(nodes, saving, machine()))))


_savings: Final[dict[str, float]] = {}
"""By architecture, of those met in this process: it is the first model of each that is measured."""


def _saving(digest: str, runs: Sequence[Callable[[], object]]) -> float:
    """Part of a fed run's time that prepacking spares; `runs`: fed, prepacked, and the model as it is."""
    if digest not in _savings:
        fed_s, prepacked_s, plain_s = _best_s(runs)
        if fed_s > _SLOWEST * plain_s:
            raise NotPreparable(f"with its weights fed it takes {fed_s / plain_s:.1f} times as long")
        _savings[digest] = round(max(0.0, 1 - prepacked_s / fed_s), 3)
    return _savings[digest]


def _probe(plain: Any, inputs: tuple[TensorSpec, ...], names: list[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs that the model takes, and what it answers."""
    rng = np.random.default_rng(0)
    for size in _PROBED_SIZES:
        probe: dict[str, Tensor] = {}
        for spec in inputs:
            shape, dtype = [size if known < 0 else known for known in spec.shape], DTYPES[spec.datatype]
            probe[spec.name] = rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)
        try:
            return probe, plain.run(names, probe)
        except Exception:  # other sizes may fit together
            continue
    raise NotPreparable("no probe runs on it")


def _alike(answers: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(_close, answers, expected))


def _close(answer: Tensor, expected: Tensor) -> bool:
    if answer.shape != expected.shape or answer.dtype != expected.dtype:
        return False
    if answer.dtype.kind != "f":
        return bool((answer == expected).all())
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return np.allclose(answer, expected, _RELATIVE, _RELATIVE * scale, equal_nan=True)


def _best_s(runs: Sequence[Callable[[], object]]) -> list[float]:
    """The best time of each, tried in turns so that a disturbance meets them alike."""
    best, until = [math.inf] * len(runs), time.perf_counter() + _TIMED_S
    for _ in range(_MOST_RUNS):
        for n, run in enumerate(runs):
            started = time.perf_counter()
            run()
            best[n] = min(best[n], time.perf_counter() - started)
        if time.perf_counter() > until:
            break
    return best
