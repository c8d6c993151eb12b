"""The process that one model lives in, and the one that it is forked from. This file is run by its path and imports
nothing of ours, because its Python may be another one: any from 3.9 with numpy. Our sides of the two are
`loaders.isolated.process` and `loaders.isolated.nursery`.

Frames on the socket between the two, both ways: lengths of head and body (`<IQ`), the head as JSON, the body. The head
names the tensors in the body (`name`, V2 `datatype`, `shape`, `size` in bytes), each of which is padded to 16 bytes;
BYTES are as in V2's raw contents. Nothing is ever pickled.

    {"kind": "load", ...Settings}        -> {"inputs": [...], "outputs": [...]}
    {"kind": "infer", "outputs": [...]}  -> {} and tensors
    {"kind": "unload"}                   -> {}, and the process ends
    any                                  -> {"error": "one line", "bad_input": false}
"""

from __future__ import annotations

import contextlib
import gc
import importlib.machinery
import inspect
import json
import math
import os
import runpy
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

Tensors = dict[str, Any]
Receive = Callable[[memoryview], None]
"""Fills a buffer."""

_LENGTHS: Final = struct.Struct("<IQ")
_ALIGNED: Final = 16
_JOINED_BYTES: Final = 64 << 10
"""Smaller frames are copied together and sent at once."""
MOST_HEAD_BYTES: Final = 1 << 20
MOST_BODY_BYTES: Final = (1 << 31) - 1
"""As protobuf's messages."""

_NUMBERS: Final = {
    "BOOL": "?",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_NAMES: Final = {np.dtype(code): name for name, code in _NUMBERS.items()}


class FrameError(Exception):
    """The other side sent what is no frame, or a tensor cannot be sent."""


def send(sock: socket.socket, head: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """One frame.

    Raises:
        FrameError: a tensor is of a type that V2 does not have.
        OSError: the other side has gone.
    """
    told, parts, body_bytes = [], [], 0
    for name, value in tensors.items():
        datatype, array, data = _flat(name, value)
        told.append({"name": name, "datatype": datatype, "shape": array.shape, "size": len(data)})
        parts += [data, bytes(-len(data) % _ALIGNED)]
        body_bytes += len(data) + len(parts[-1])
    encoded = json.dumps({**head, "tensors": told}).encode()
    if len(encoded) > MOST_HEAD_BYTES or body_bytes > MOST_BODY_BYTES:
        raise FrameError(f"{len(encoded)} bytes of names and {body_bytes} of tensors are too much for one message")
    parts.insert(0, _LENGTHS.pack(len(encoded), body_bytes) + encoded)
    for part in parts if body_bytes > _JOINED_BYTES else [b"".join(parts)]:
        sock.sendall(part)


def receive(fill: Receive) -> tuple[dict[str, Any], Tensors]:
    """The next frame: its head, and its tensors, which can be written to.

    Raises:
        FrameError: it is none. Nothing in it is trusted.
    """
    lengths = bytearray(_LENGTHS.size)
    fill(memoryview(lengths))
    head_bytes, body_bytes = _LENGTHS.unpack(lengths)
    if head_bytes > MOST_HEAD_BYTES or body_bytes > MOST_BODY_BYTES:
        raise FrameError(f"a frame of {head_bytes} and {body_bytes} bytes")
    encoded, body = bytearray(head_bytes), np.empty(body_bytes, np.uint8)
    fill(memoryview(encoded))
    if body_bytes:
        fill(body.data)
    try:
        head = json.loads(encoded)
        tensors, at = {}, 0
        for each in head.pop("tensors"):
            name, size = each["name"], each["size"]
            if type(name) is not str or type(size) is not int or not 0 <= size <= body_bytes - at:
                raise FrameError(f"a tensor {name!r:.64} of {size!r:.64} bytes")
            tensors[name] = _shaped(each["datatype"], each["shape"], body[at : at + size])
            at += size + -size % _ALIGNED
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FrameError(f"{type(error).__name__}: {error}") from None
    return head, tensors


def dtype_of(datatype: str) -> np.dtype[Any]:
    """A V2 datatype's numpy form.

    Raises:
        FrameError: there is no such datatype.
    """
    if datatype == "BYTES":
        return np.dtype(object)
    code: Any = _NUMBERS.get(datatype)
    if datatype == "BF16":
        try:
            code = importlib.import_module("ml_dtypes").bfloat16
        except ImportError:
            raise FrameError("BF16 needs the package ml_dtypes, which this Python does not have") from None
    if code is None:
        raise FrameError(f"unknown datatype {datatype!r:.64}")
    dtype: np.dtype[Any] = np.dtype(code)
    return dtype


def _flat(name: str, value: Any) -> tuple[str, Any, Any]:
    """Datatype, array, bytes."""
    array = np.ascontiguousarray(value).reshape(np.shape(value))  # which makes scalars one-dimensional
    if array.dtype.kind in "USO":
        items = [item if isinstance(item, bytes) else _text(name, item) for item in array.ravel().tolist()]
        return "BYTES", array, b"".join([len(item).to_bytes(4, "little") + item for item in items])
    datatype = "BF16" if array.dtype.name == "bfloat16" else _NAMES.get(array.dtype.newbyteorder("<"))
    if datatype is None:
        raise FrameError(f"output {name!r:.64} is of numpy type {array.dtype}, which V2 does not have")
    return datatype, array, array.astype(dtype_of(datatype), copy=False).reshape(-1).view(np.uint8).data


def _text(name: str, item: Any) -> bytes:
    if not isinstance(item, str):
        raise FrameError(f"output {name!r:.64} holds a {type(item).__name__}, which is neither text nor a number")
    return item.encode()


def _shaped(datatype: Any, shape: Any, data: Any) -> Any:
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape) or len(shape) > 32:
        raise FrameError(f"a tensor of shape {shape!r:.64}")
    dtype, count = dtype_of(datatype), math.prod(shape)
    if datatype != "BYTES":
        if len(data) != count * dtype.itemsize:
            raise FrameError(f"{len(data)} bytes for {datatype} {shape}")
        return data.view(dtype).reshape(shape)
    raw, at, items = data.tobytes(), 0, []
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        items.append(raw[at + 4 : end])
        at = end
    if at != len(raw) or len(items) != count:
        raise FrameError(f"{len(items)} elements in {len(raw)} bytes for BYTES {shape}")
    array = np.empty(count, object)
    array[:] = items
    return array.reshape(shape)


# What follows runs in the model's process only.

OURS: Final = ("loaders", "mesh", "placement", "protos")
"""Packages of this server, which may be installed where the model's are, and are not meant for it."""


class _NotOurs:
    """Finds packages with our names in the model's directory only."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in OURS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, [self._directory])
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


class Refused(Exception):
    """The model is not of the form that is expected."""


class Model:
    """What an author wrote: a class, or functions of the module."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Import and load it."""
        self._own = _made(settings["implementation"], settings["model_id"], settings["module"])
        self.inputs = getattr(self._own, "inputs", None)
        self.outputs = getattr(self._own, "outputs", None) or settings["outputs"]
        load, given = getattr(self._own, "load", None), (os.getcwd(), settings["parameters"])
        taken = _positional(load) if load is not None else 0
        if settings["parameters"] and taken < 2:
            raise Refused(f"unknown parameter {min(settings['parameters'])!r}: load(path, parameters) would take it")
        if load is not None and _finished(load(*given[:taken])) is False:
            raise Refused("load returned False")

    def predict(self, inputs: Tensors, wanted: Sequence[str]) -> Tensors:
        answer = _finished(self._own.predict(inputs))
        told = {spec["name"]: spec["datatype"] for spec in self.outputs or ()}
        if not isinstance(answer, Mapping):
            name = next(iter(told)) if len(told) == 1 else "output-0"
            answer = {name: answer}
        missing = [name for name in wanted if name not in answer]
        if missing:
            raise Refused(f"predict answered {', '.join(map(str, answer)) or 'nothing'}, and not {', '.join(missing)}")
        return {str(name): _as_told(name, answer[name], told.get(name)) for name in wanted or answer}

    def unload(self) -> None:
        unload = getattr(self._own, "unload", None)
        if unload is not None:
            _finished(unload())


def _made(implementation: str, model_id: str, path: str) -> Any:
    """An object, or a module, with `predict`; `path`: of a file with a class `Model`."""
    if path:
        return runpy.run_path(path)["Model"]()
    module_name, _, name = implementation.rpartition(".")
    module = importlib.import_module(module_name or "model")
    if name:
        kind = getattr(module, name, None)
        if kind is None:
            raise Refused(f"{module.__name__} has no {name}")
    elif callable(getattr(module, "predict", None)):
        return module
    else:
        kinds = [each for each in vars(module).values() if isinstance(each, type) and hasattr(each, "predict")]
        own = [each for each in kinds if each.__module__ == module.__name__]
        named = [each for each in own if each.__name__ == "Model"]
        if len(named or own) != 1:
            found = ", ".join(each.__name__ for each in own) or "none"
            raise Refused(f"expected a class Model, one class with predict, or a function predict: found {found}")
        (kind,) = named or own
    model = kind(model_id) if _positional(kind) else kind()
    if not callable(getattr(model, "predict", None)):
        raise Refused(f"{kind.__name__} has no predict")
    return _Kserve(model) if any(base.__module__.startswith("kserve.") for base in kind.__mro__) else model


class _Kserve:
    """A `kserve.Model`, called as KServe's server does with a V2 request."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def load(self) -> Any:
        return self._model.load()

    def predict(self, inputs: Tensors) -> Any:
        from kserve import InferInput, InferRequest

        given = []
        for name, value in inputs.items():
            given.append(InferInput(name, list(value.shape), _flat(name, value)[0]))
            given[-1].set_data_from_numpy(value)
        answer = _finished(self._model(InferRequest(self._model.name, given), {}))
        if isinstance(answer, tuple):  # and headers
            answer = answer[0]
        if isinstance(answer, Mapping):  # V1
            return {"predictions": answer["predictions"]}
        return {output.name: output.as_numpy() for output in answer.outputs}

    def unload(self) -> None:
        self._model.stop()


def _positional(function: Any) -> int:
    """How many arguments it wants to be given by position, not counting those with defaults if it is a class."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    if isinstance(function, type):
        return sum(each.kind in kinds and each.default is each.empty for each in parameters)
    return sum(each.kind in kinds for each in parameters)


_loop: list[Any] = []


def _finished(result: Any) -> Any:
    """What a coroutine returns, for authors who write `async def`."""
    if not inspect.iscoroutine(result):
        return result
    if not _loop:
        import asyncio

        _loop.append(asyncio.new_event_loop())
    return _loop[0].run_until_complete(result)


def _as_told(name: str, value: Any, datatype: Any) -> Any:
    """The value in the datatype that was declared for it."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise Refused(f"output {name!r}: {error}") from None
    if datatype is None or (datatype == "BYTES") == (array.dtype.kind in "USO"):
        if datatype in (None, "BYTES"):
            return array
        try:
            return array.astype(dtype_of(datatype), casting="same_kind", copy=False)
        except TypeError:
            pass
    raise Refused(f"output {name!r} is of numpy type {array.dtype}, declared was {datatype}")


def _limit(settings: Mapping[str, Any]) -> None:
    """What this process may take; and that it goes first where memory ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (settings["memory_bytes"], settings["memory_bytes"]))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:
        sys.exit("the parent has gone")


def _told(error: BaseException) -> str:
    """An error in one line, with the author's last line that led to it."""
    here = os.getcwd() + os.sep
    frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename.startswith(here)]
    at = f" ({os.path.relpath(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    said = str(error) or (frames[-1].line if frames else "")
    line = " ".join(f"{type(error).__name__}: {said}".split()) + at
    return str(error) if isinstance(error, (Refused, FrameError)) else line[:2000]


def _failure(error: BaseException, memory_bytes: int) -> dict[str, Any]:
    if isinstance(error, MemoryError):
        said = f"{_told(error)}: its process may have {memory_bytes} bytes (parameter memory_bytes)"
        return {"error": said, "bad_input": False}
    return {"error": _told(error), "bad_input": isinstance(error, ValueError)}


def live(descriptor: int) -> None:
    """A model's life: serve frames until it is to end, or the other side has gone."""
    sock = socket.socket(fileno=descriptor)

    def fill(buffer: memoryview) -> None:
        while buffer:
            got = sock.recv_into(buffer)
            if not got:
                os._exit(0)
            buffer = buffer[got:]

    settings, _ = receive(fill)
    _limit(settings)
    sys.path.insert(0, os.getcwd())
    sys.meta_path.insert(0, _NotOurs(os.getcwd()))
    model: Any = None
    kind, request = "load", settings
    tensors: Tensors = {}
    while True:
        answer: dict[str, Any] = {}
        results: Tensors = {}
        try:
            if kind == "load":
                model = Model(settings)
                answer = {"inputs": _listed(model.inputs), "outputs": _listed(model.outputs)}
            elif kind == "infer":
                results = model.predict(tensors, request["outputs"])
            elif model is not None:
                model.unload()
            send(sock, answer, results)
        except (Exception, SystemExit) as error:
            is_told = isinstance(error, (Refused, FrameError)) or (kind == "infer" and isinstance(error, ValueError))
            if not is_told:
                traceback.print_exc()
            send(sock, _failure(error, settings["memory_bytes"]), {})
        if kind == "unload":
            return
        del tensors, results
        while True:
            try:
                request, tensors = receive(fill)
                break
            except FrameError as error:  # a datatype that is unknown here
                send(sock, {"error": str(error), "bad_input": True}, {})
        kind = request["kind"]


def nurse(descriptor: int, parent: int) -> None:
    """Fork a process for each model that is asked for, and tell how they ended, until the other side has gone.

    {"directory": path} and two descriptors  -> {"pid": 1}
    {"reap": 1}                              -> {"status": 0}
    """
    _die_with(parent)
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    sock.send(b"1")
    gc.freeze()  # what the collector does not touch stays shared
    ours = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(sock, 8192, 2)
        if not message:
            return
        told = json.loads(message)
        answer: dict[str, Any]
        try:
            if "reap" in told:
                pid, status = os.waitpid(told["reap"], os.WNOHANG)
                answer = {"status": os.waitstatus_to_exitcode(status) if pid else -9}
            else:
                pid = os.fork()
                if not pid:
                    sock.close()
                    _be_born(ours, told["directory"], *descriptors)
                with contextlib.suppress(OSError):
                    os.setpgid(pid, pid)  # here too, so that it is before the answer
                answer = {"pid": pid}
        except OSError as error:
            answer = {"error": error.strerror}
        for each in descriptors:
            os.close(each)
        sock.send(json.dumps(answer).encode())


def _be_born(parent: int, directory: str, model: int, output: int) -> None:
    status = 1
    try:
        _die_with(parent)
        os.setpgid(0, 0)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.close(output)
        os.chdir(directory)
        if "numpy.random" in sys.modules:
            np.random.seed()
        live(model)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _listed(specs: Iterable[Any] | None) -> Any:
    return [{"name": each["name"], "datatype": each["datatype"], "shape": each["shape"]} for each in specs or ()]


if __name__ == "__main__":
    nurse(int(sys.argv[1]), int(sys.argv[2]))
