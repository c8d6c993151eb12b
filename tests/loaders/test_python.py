"""`loaders.python`: a `model.py` in a process of its own, whose faults stay there."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from loaders.base import Artifact, InferError, LoaderError, ModelLost, Tensor, TensorSpec
from loaders.datatypes import DTYPES
from loaders.isolated.model import IsolatedModel
from loaders.isolated.worker import FrameError, receive
from loaders.python import PythonLoader

LOADER = PythonLoader()
TIMEOUT_S = 20.0
Load = Callable[..., IsolatedModel]

ECHO = "def predict(inputs):\n    return inputs\n"
FAULTS = """
    import os, sys, time

    def predict(inputs):
        scope = {"answer": inputs}
        exec(inputs["what"].item().decode(), globals(), scope)
        return scope["answer"]
"""


def written(folder: Path, source: str, **parameters: Any) -> Artifact:
    (folder / "model.py").write_text(textwrap.dedent(source))
    return Artifact(folder, parameters, model_id="m")


def forking() -> list[psutil.Process]:
    """The processes that models are forked from; other tests have children too."""
    return [each for each in psutil.Process().children() if "worker.py" in " ".join(each.cmdline())]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Load a model from its source; afterwards nothing of it is left: no process, no file, no thread."""
    loaded: list[IsolatedModel] = []
    LOADER.load(written(tmp_path, ECHO)).unload()  # leaves the process that the others are forked from
    (nursery,) = forking()
    before = psutil.Process().num_fds()

    def start(source: str, **parameters: Any) -> IsolatedModel:
        loaded.append(LOADER.load(written(tmp_path, source, **parameters)))
        return loaded[-1]

    yield start
    for model in loaded:
        model.unload()
    assert forking() == [nursery]
    assert nursery.children(recursive=True) == []
    assert psutil.Process().num_fds() == before
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("log-")] == []
    assert not (tmp_path / "__pycache__").exists()


def text(what: str) -> dict[str, Tensor]:
    return {"what": np.array(what.encode(), object)}


def wait_until_gone(*processes: psutil.Process) -> None:
    """Those of dead parents may wait for long as zombies, for init to take notice."""
    due_s = time.monotonic() + TIMEOUT_S
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < due_s
        time.sleep(0.005)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_every_datatype_there_and_back(load: Load, shape: tuple[int, ...]) -> None:
    inputs = {name: np.ones(shape, dtype) for name, dtype in DTYPES.items() if name != "BYTES"}
    inputs["BYTES"] = np.full(shape, b"", object)
    inputs["BYTES"].reshape(-1)[:] = [b"", b"\xff\0", b"1", b"22", b"333", b"x" * 70_000][: inputs["BYTES"].size]
    inputs["large"] = np.arange(300_000, dtype=np.int32)
    answer = load(ECHO).infer(inputs, ())
    assert list(answer) == list(inputs)
    for name, array in inputs.items():
        assert answer[name].dtype == array.dtype
        np.testing.assert_array_equal(answer[name], array)


FORMS = {
    "a class Model among others": """
        class Base:
            def predict(self, inputs): ...
        class Model(Base):
            def predict(self, inputs): return {"y": 2 * inputs["x"]}
    """,
    "the only class with predict": """
        class Doubler:
            def predict(self, inputs): return {"y": inputs["x"] * 2}
    """,
    "functions": """
        def load(path): globals()["factor"] = 2
        def predict(inputs): return {"y": inputs["x"] * factor}
    """,
    "coroutines": """
        import asyncio
        class Model:
            async def load(self): self.lock = asyncio.Lock()
            async def predict(self, inputs):
                async with self.lock:
                    return {"y": inputs["x"] * 2}
    """,
    "a list": 'def predict(inputs): return {"y": (inputs["x"] * 2).tolist()}',
    "an array under the only name declared": """
        class Model:
            outputs = [{"name": "y", "datatype": "FP64", "shape": [-1]}]
            def predict(self, inputs): return inputs["x"] * 2
    """,
    "inputs that it may write to": """
        def predict(inputs):
            inputs["x"] *= 2
            return {"y": inputs["x"]}
    """,
    "a KServe-like class that wants its name": """
        class Model:
            def __init__(self, name, config=None): self.name = name
            def load(self): self.ready = True; return self.ready
            def predict(self, inputs, headers=None):
                assert self.ready and self.name == "m"
                return {"y": inputs["x"] * 2}
    """,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_model(load: Load, form: str) -> None:
    model = load(FORMS[form])
    for x in ([1.0, 2.0], [3.0]):
        assert model.infer({"x": np.array(x)}, ("y",))["y"].tolist() == [2 * each for each in x]


def test_a_class_of_kserve(load: Load) -> None:
    pytest.importorskip("kserve", reason="kserve is not installed")
    model = load(
        """
        import kserve

        class Doubler(kserve.Model):
            def load(self):
                self.ready = True
                return self.ready

            async def predict(self, payload, headers=None):
                tensor = payload.inputs[0]
                output = kserve.InferOutput(tensor.name, tensor.shape, tensor.datatype)
                output.set_data_from_numpy(tensor.as_numpy() * 2)
                return kserve.InferResponse(payload.id, self.name, [output])

        class Answers(Doubler):
            def predict(self, payload, headers=None):
                return {"predictions": [self.name]}
    """,
        implementation="model.Doubler",
    )
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(model.infer({"x": x}, ())["x"], 2 * x)
    folder = model._process._settings.directory
    answers = LOADER.load(Artifact(folder, {"implementation": "model.Answers"}, model_id="m"))
    assert answers.infer({"x": x}, ())["predictions"].tolist() == [b"m"]
    answers.unload()


def test_an_implementation_names_the_class_and_other_parameters_are_the_models(load: Load, tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text("FACTOR = 3\n")
    (tmp_path / "weights.txt").write_text("0.5")
    source = """
        import parts
        class First:
            def predict(self, inputs): ...
        class Second:
            def load(self, path, parameters):
                self.factor = parts.FACTOR * parameters["times"] * float(open(path + "/weights.txt").read())
                assert open("weights.txt").read() == "0.5"
            def predict(self, inputs): return self.factor * inputs["x"]
    """
    model = load(source, implementation="model.Second", times=4)
    assert model.infer({"x": np.ones(1)}, ("output-0",))["output-0"].tolist() == [6]


def test_what_the_model_declares_is_its_signature(tmp_path: Path, load: Load) -> None:
    model = load("""
        class Model:
            inputs = [{"name": "x", "datatype": "INT64", "shape": [-1, 4]}]
            outputs = [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in zip("ys", ("FP32", "BYTES"))]
            def predict(self, inputs): return {"y": inputs["x"].sum(axis=1) / 2, "s": ["ä", b"b"]}
    """)
    assert model.signature.inputs == (TensorSpec("x", "INT64", (-1, 4)),)
    assert model.signature.outputs == (TensorSpec("y", "FP32", (-1,)), TensorSpec("s", "BYTES", (-1,)))
    answer = model.infer({"x": np.ones((2, 4), np.int64)}, ("y", "s"))
    assert answer["y"].dtype == np.float32  # as declared, though numpy made FP64 of it
    assert answer["s"].tolist() == ["ä".encode(), b"b"]
    declared = Artifact(tmp_path, inputs=(TensorSpec("x", "FP32", (-1, 4)),))
    with pytest.raises(LoaderError, match=r"declared input x FP32 .* contradicts the model's x INT64"):
        LOADER.load(declared)


def test_what_is_declared_beside_the_model_is_its_signature_if_it_tells_none(load: Load, tmp_path: Path) -> None:
    assert load(ECHO).signature.inputs == ()
    assert load(ECHO).signature.lenient
    specs = (TensorSpec("x", "FP32", (-1,)),)
    model = LOADER.load(Artifact(tmp_path, inputs=specs, outputs=specs))
    try:
        assert (model.signature.inputs, model.signature.outputs, model.signature.lenient) == (specs, specs, False)
    finally:
        model.unload()


def test_the_process_is_its_own_and_finds_nothing_of_ours(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (tmp_path / "mesh.py").write_text("MINE = __file__")
    model = load(
        """
        import json, os, resource, sys
        import mesh
        try:
            import loaders
        except ModuleNotFoundError as error:
            missing = str(error)

        def predict(inputs):
            return json.dumps({
                "mesh": mesh.MINE, "loaders": missing, "cwd": os.getcwd(), "own group": os.getpgid(0) == os.getpid(),
                "stdin": sys.stdin.read(), "OMP": os.environ["OMP_NUM_THREADS"], "OWN": os.environ["OWN"],
                "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
                "ours": [each for each in sys.path if "loaders" in each],
                "secrets": [name for name in os.environ if name.startswith(("AWS", "PYTHON"))],
            })
        """,
        threads=3,
        env={"OWN": "1"},
    )
    assert json.loads(model.infer({}, ())["output-0"].item()) == {
        "mesh": str(tmp_path / "mesh.py"),
        "loaders": "No module named 'loaders'",
        "cwd": str(tmp_path),
        "own group": True,
        "stdin": "",
        "OMP": "3",
        "OWN": "1",
        "core": 0,
        "ours": [],
        "secrets": [],
    }


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it' (model.py, line 1)"),
        ("x = 1\ndef predict(:", "SyntaxError: invalid syntax (model.py, line 2)"),
        ("x = 1", "expected a class Model, one class with predict, or a function predict: found none"),
        ("class A:\n def predict(s, i): 0\nclass B(A): 0", "or a function predict: found A, B"),
        ("class Model:\n pass", "or a function predict: found none"),
        ("def load():\n  open('gone')\ndef predict(i): 0", "No such file or directory: 'gone' (model.py, line 2)"),
        ("def load():\n  return False\ndef predict(i): 0", "load returned False"),
        ("def load():\n  raise SystemExit('no')\ndef predict(i): 0", "SystemExit: no (model.py, line 2)"),
        ("import os\nos._exit(7)", "the model's process ended with status 7: it said nothing"),
        ("import sys, os\nprint('a\\nb')\nos._exit(7)", "the model's process ended with status 7: b"),
        ("import os\nos.kill(os.getpid(), 6)", "the model's process was killed by SIGABRT"),
        ("inputs = [{'name': 'x'}]\ndef predict(i): 0", "KeyError: 'datatype'"),
        (
            "inputs = [{'name': 'x', 'datatype': 'F', 'shape': []}]\ndef predict(i): 0",
            """the model's own inputs have {'name': 'x', 'datatype': 'F', 'shape': []}: expected {"name": "x",""",
        ),
        (
            "bytearray(1 << 30)",
            "MemoryError: bytearray(1 << 30) (model.py, line 1): its process may have 268435456 bytes",
        ),
    ],
)
def test_why_it_does_not_load(load: Load, source: str, says: str) -> None:
    with pytest.raises(LoaderError) as refused:
        load(source, memory_bytes=256 << 20)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_load_that_does_not_end_is_ended(load: Load) -> None:
    with pytest.raises(LoaderError, match="the model did not load within 300 ms, and its process was ended"):
        load("while True: pass", load_timeout_ms=300)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"threads": 0}, "parameter 'threads' is 0: expected a number from 1 to 1024"),
        ({"memory_bytes": "1GiB"}, "parameter 'memory_bytes' is '1GiB': expected a number"),
        ({"timeout_ms": True}, "parameter 'timeout_ms' is True: expected a number"),
        ({"python": "python3"}, "parameter 'python' is 'python3': expected the absolute path of an interpreter"),
        ({"python": "/dev/null"}, "parameter 'python' is '/dev/null': expected the absolute path of an interpreter"),
        ({"env": {"A": 1}}, "parameter 'env' is not an object of texts"),
        ({"implementation": 1}, "parameter 'implementation' is 1: expected module.Class"),
        ({"implementation": "model.Other"}, "model has no Other"),
        ({"implementation": "other.Model"}, "ModuleNotFoundError: No module named 'other'"),
        ({"implementation": "model.np"}, "np has no predict"),
        ({"memory_byte": 1}, "unknown parameter 'memory_byte': load(path, parameters) would take it"),
    ],
)
def test_wrong_settings(load: Load, parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(LoaderError) as refused:
        load("def np(): 0\ndef predict(inputs): 0", **parameters)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("what", "says", "bad_input"),
    [
        ("raise ValueError('no such row')", "ValueError: no such row (model.py, line 6)", True),
        ("raise KeyError('x')", "KeyError: 'x' (model.py, line 6)", False),
        ("sys.exit(3)", "SystemExit: 3 (model.py, line 6)", False),
        ("answer = {'y': 1j}", "output 'y' is of numpy type complex128, which V2 does not have", False),
        ("answer = {'y': [1, None]}", "output 'y' holds a int, which is neither text nor a number", False),
        ("answer = {'y': [[1], [2, 3]]}", "output 'y': setting an array element with a sequence.", False),
        ("bytearray(1 << 30)", "its process may have 268435456 bytes (parameter memory_bytes)", False),
    ],
)
def test_why_it_does_not_answer(load: Load, what: str, says: str, bad_input: bool) -> None:
    model = load(FAULTS, memory_bytes=256 << 20)
    with pytest.raises(InferError) as failed:
        model.infer(text(what), ())
    assert says in str(failed.value)
    assert failed.value.bad_input == bad_input
    assert not isinstance(failed.value, ModelLost)
    assert model.infer(text(""), ()) == text("")  # and goes on


def test_an_output_that_was_asked_for_and_did_not_come(load: Load) -> None:
    with pytest.raises(InferError, match="predict answered x, and not z") as failed:
        load(ECHO).infer({"x": np.ones(1)}, ("z",))
    assert not failed.value.bad_input


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("os.kill(os.getpid(), 11)", "the model's process was killed by SIGSEGV"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL, as the kernel does where memory ends"),
        ("print('that was all', file=sys.stderr); os._exit(3)", "ended with status 3: that was all"),
        ("while True: pass", "the model did not answer within 500 ms, and its process was ended"),
        ("os.fork() or time.sleep(60); os._exit(0)", "ended with status 0: it said nothing"),
        ("import subprocess; subprocess.Popen(['sleep', '60']); os._exit(0)", "ended with status 0"),
        (
            "for fd in range(3, 999): os.path.exists(f'/proc/self/fd/{fd}') and os.write(fd, b'x' * 64)",
            "wrote to its socket",
        ),
    ],
)
def test_what_ends_the_process_fails_the_request_and_is_told_to_the_next(load: Load, what: str, says: str) -> None:
    model = load(FAULTS, timeout_ms=500)
    with pytest.raises(ModelLost) as lost:
        model.infer(text(what), ())
    assert says in str(lost.value)
    assert lost.value.began
    with pytest.raises(ModelLost) as next_one:
        model.infer(text(""), ())
    assert (str(next_one.value), next_one.value.began) == (str(lost.value), False)


def test_a_process_that_ends_while_nobody_asks(load: Load) -> None:
    model = load(ECHO)
    (nursery,) = forking()
    (process,) = nursery.children()
    process.kill()
    wait_until_gone(process)
    with pytest.raises(ModelLost, match="killed by SIGKILL") as lost:
        model.infer({"x": np.ones(1)}, ())
    assert not lost.value.began


def test_unload_runs_the_models_own_for_a_while_and_ends_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaders.isolated.process._UNLOAD_S", 0.3)
    source = """
        import subprocess, time
        def load(): subprocess.Popen(["sleep", "60"])
        def predict(inputs): return inputs
        def unload():
            open("unloaded", "w").close()
            {}
    """
    for also in ("pass", "raise KeyError", "while True: pass"):
        (tmp_path / "unloaded").unlink(missing_ok=True)
        model = LOADER.load(written(tmp_path, source.format(also)))
        (nursery,) = forking()
        started = nursery.children(recursive=True)
        assert len(started) == 2
        model.unload()
        assert (tmp_path / "unloaded").exists()
        wait_until_gone(*started)


def test_models_are_forked_from_one_process_and_draw_their_own_numbers(load: Load) -> None:
    source = "import random, numpy as np\ndef predict(i): return [random.random(), np.random.random()]"
    drawn = [load(source).infer({}, ())["output-0"].tolist() for _ in range(3)]
    assert len({number for numbers in drawn for number in numbers}) == 6
    (nursery,) = forking()
    assert len(nursery.children()) == 3


def test_another_one_is_started_if_it_is_gone(tmp_path: Path) -> None:
    artifact = written(tmp_path, ECHO)
    model = LOADER.load(artifact)
    (nursery,) = forking()
    (process,) = nursery.children()
    nursery.kill()
    wait_until_gone(nursery, process)  # it takes its children with it
    with pytest.raises(ModelLost, match="killed by SIGKILL"):
        model.infer({}, ())
    again = LOADER.load(artifact)
    assert again.infer({"x": np.ones(1)}, ())["x"] == 1
    again.unload()
    model.unload()
    (nursery,) = forking()
    assert nursery.children() == []


def test_an_interpreter_that_cannot_run_models(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no numpy here >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(LoaderError, match="python cannot run models: no numpy here"):
        load(ECHO, python=str(python))
    monkeypatch.setattr("loaders.isolated.nursery._START_S", 0.2)
    python.write_text("#!/bin/sh\nsleep 60\n")
    with pytest.raises(LoaderError, match="python cannot run models: it said nothing"):
        load(ECHO, python=str(python))
    monkeypatch.undo()
    python.write_text("none")
    with pytest.raises(LoaderError, match=r"python cannot be started: .*Exec format error"):
        load(ECHO, python=str(python))
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    assert load(ECHO, python=str(python)).infer({"x": np.ones(1)}, ())["x"] == 1


def test_the_process_ends_with_ours(tmp_path: Path) -> None:
    written(tmp_path, "def predict(inputs):\n    while True: pass")
    script = f"""
import sys, threading
from pathlib import Path
import psutil
from loaders import loader_for
from loaders.base import Artifact
loading = threading.Thread(target=lambda: models.append(loader_for("python").load(Artifact(Path({str(tmp_path)!r})))))
models = []
loading.start()
loading.join()
threading.Thread(target=models[0].infer, args=({{}}, ()), daemon=True).start()
print(*(each.pid for each in psutil.Process().children(recursive=True)), flush=True)
sys.stdin.read()
"""
    ours = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with ours:
        assert ours.stdout is not None
        started = [psutil.Process(int(pid)) for pid in ours.stdout.readline().split()]
        assert len(started) == 2  # though the thread that loaded it has ended
        ours.kill()
    wait_until_gone(*started)


def test_what_it_writes_is_in_our_log_but_not_without_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loaders.isolated")
    model = LOADER.load(written(tmp_path, FAULTS))
    model.infer(text("print('one'); print('two', file=sys.stderr); os.write(1, b'\\xff' + b'long' * 1000)"), ())
    model.infer(text("for n in range(5_000): print(n)"), ())
    model.unload()  # waits for the last line
    lines = caplog.messages
    assert lines[:2] == ["model m: one", "model m: two"]
    assert max(map(len, lines)) < 600
    assert len(lines) < 1_000


def test_a_size_is_measured(load: Load) -> None:
    small = load("import numpy as np\nx = np.ones(1 << 20)\n" + ECHO).size_bytes
    assert 8 << 20 < small < 24 << 20
    (large := load("import numpy as np\nx = np.ones(5 << 20)\n" + ECHO)).infer({}, ())
    assert 28 << 20 < large.size_bytes - small < 36 << 20


def test_an_estimate_counts_the_files(tmp_path: Path) -> None:
    artifact = written(tmp_path, ECHO)
    before = LOADER.estimate_bytes(artifact)
    assert 2 << 20 < before < 8 << 20
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(bytes(1 << 20))
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "pack").write_bytes(bytes(1 << 20))
    assert LOADER.estimate_bytes(artifact) == before + (1 << 20)
    with pytest.raises(LoaderError, match="gone does not exist") as missing:
        LOADER.estimate_bytes(Artifact(tmp_path / "gone"))
    assert missing.value.retryable


WRONG: list[dict[str, Any]] = [
    {"size": 2},
    {"size": -1},
    {"size": True},
    {"size": 1e9},
    {"name": []},
    {"datatype": "COMPLEX"},
    {"datatype": {}},
    {"shape": [2]},
    {"shape": [-1]},
    {"shape": [1 << 70]},
    {"shape": "1"},
    {"shape": [True]},
    {"shape": [1] * 40},
    {"datatype": "BYTES"},
]
GOOD = {"name": "x", "datatype": "INT8", "shape": [1], "size": 1}


@pytest.mark.parametrize(
    "head",
    [
        b"{",
        b"[]",
        b"1",
        b"[" * 100_000,
        b'{"tensors": 1}',
        b"{}",
        *(json.dumps({"tensors": [{**GOOD, **wrong}]}).encode() for wrong in WRONG),
    ],
)
def test_nothing_in_a_frame_is_trusted(head: bytes) -> None:
    frame = struct.pack("<IQ", len(head), 1) + head + b"\1"

    def fill(buffer: memoryview) -> None:
        nonlocal frame
        buffer[:], frame = frame[: len(buffer)], frame[len(buffer) :]

    with pytest.raises(FrameError):
        receive(fill)


@pytest.mark.parametrize("lengths", [(1 << 31, 0), (2, 1 << 40)])
def test_a_frame_without_end_is_refused_before_it_takes_memory(lengths: tuple[int, int]) -> None:
    with pytest.raises(FrameError, match="a frame of"):
        receive(lambda buffer: struct.pack_into("<IQ", buffer, 0, *lengths))
