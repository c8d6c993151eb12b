"""What an unmodified `tritonclient.grpc` sees of a pod: `triton_script.py HOST:PORT [CA [CERT KEY]]` prints JSON, one
member for each function of SCENES. In a process of its own, because its generated messages cannot live beside ours."""

from __future__ import annotations

import asyncio
import json
import queue
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

TIMEOUT_S: Final = 60.0

ARRAYS: Final[dict[str, npt.NDArray[Any]]] = {
    "BOOL": np.array([[True, False]]),
    **{
        f"{sign}INT{bits}": np.array([[info.min, info.max, 1]], info.dtype)
        for sign in ("", "U")
        for bits in (8, 16, 32, 64)
        for info in [np.iinfo(f"{sign.lower()}int{bits}")]
    },
    "FP16": np.array([[1.5, -65504, np.inf]], np.float16),
    "BF16": np.array([[1.5, -2.0, 3.25]], ml_dtypes.bfloat16),
    "FP32": np.array([[1.5, np.pi], [-0.0, 1e-40]], np.float32),
    "FP64": np.array([[np.e], [5e-324]], np.float64),
    "BYTES": np.array([[b"", "grün".encode(), b"x" * 300]], object),
}


def tensor(name: str, datatype: str, array: npt.NDArray[Any]) -> Any:
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return given


def pair(rows: int) -> tuple[npt.NDArray[Any], list[Any]]:
    array = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    return array, [tensor("INPUT0", "FP32", array), tensor("INPUT1", "FP32", array)]


def error_of(work: Callable[[], Any]) -> list[str]:
    try:
        work()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return ["OK", ""]


def server(client: Any) -> Any:
    told = client.get_server_metadata()
    return [client.is_server_live(), client.is_server_ready(), told.name, list(told.extensions)]


def datatypes(client: Any) -> Any:
    same = {}
    for datatype, array in ARRAYS.items():
        answer = client.infer(f"identity_{datatype.lower()}", [tensor("INPUT0", datatype, array)])
        got = answer.as_numpy("OUTPUT0")
        same[datatype] = (
            got.shape == array.shape
            and got.dtype == array.dtype
            and got.tolist() == array.tolist()
            and answer.get_output("OUTPUT0").datatype == datatype
        )
    return same


def echo(client: Any) -> Any:
    array, inputs = pair(2)
    answer = client.infer("addsub", inputs, model_version="3", request_id="r-1", parameters={"tenant": "a", "n": 1})
    response = answer.get_response()
    return {
        "id": response.id,
        "model": response.model_name,
        "version": response.model_version,
        "outputs": [output.name for output in response.outputs],
        "right": bool(
            np.array_equal(answer.as_numpy("OUTPUT0"), array + array)
            and np.array_equal(answer.as_numpy("OUTPUT1"), array - array)
        ),
    }


def selection(client: Any) -> Any:
    def names(*wanted: str) -> list[str]:
        outputs = [triton.InferRequestedOutput(name) for name in wanted]
        response = client.infer("addsub", pair(1)[1], outputs=outputs).get_response()
        return [output.name for output in response.outputs]

    return [names("OUTPUT1"), names("OUTPUT1", "OUTPUT0"), names()]


def many_at_once(client: Any) -> Any:
    answers: queue.Queue[Any] = queue.Queue()
    asked = [pair(1 + i % 5) for i in range(40)]
    for i, (_, inputs) in enumerate(asked):
        client.async_infer("addsub", inputs, lambda result, error: answers.put((result, error)), request_id=str(i))
    right = 0
    for _ in asked:
        result, error = answers.get(timeout=TIMEOUT_S)
        if error is None:
            array = asked[int(result.get_response().id)][0]
            right += bool(np.array_equal(result.as_numpy("OUTPUT0"), array * 2))
    return right


def large(client: Any) -> Any:
    """8 MB each way; and some in both of gRPC's compressions."""
    right = []
    for rows, compression in ((2 << 20, None), (1 << 16, "gzip"), (1 << 16, "deflate")):
        array = np.arange(rows, dtype=np.float32).reshape(1, -1)
        answer = client.infer("identity_fp32", [tensor("INPUT0", "FP32", array)], compression_algorithm=compression)
        right.append(bool(np.array_equal(answer.as_numpy("OUTPUT0"), array)))
    return right


def metadata(client: Any) -> Any:
    return client.get_model_metadata("addsub", as_json=True)


def ready(client: Any) -> Any:
    asked = [("addsub", ""), ("addsub", "3"), ("addsub", "4"), ("nobody", "")]
    return [client.is_model_ready(name, version) for name, version in asked]


def repository(client: Any) -> Any:
    def state() -> str:
        index = client.get_model_repository_index()
        return str(next(model.state for model in index.models if model.name == "mlp"))

    states = []
    client.load_model("mlp")
    states.append(state())
    client.unload_model("mlp")
    states.append(state())
    client.load_model("mlp")
    states.append(state())
    return states


def stream(client: Any) -> Any:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    good, bad = pair(1)[1], [tensor("INPUT0", "FP32", np.zeros((1, 4), np.float32))]
    for request_id, model, inputs in (
        ("1", "addsub", good),
        ("2", "addsub", bad),
        ("3", "nobody", good),
        ("4", "addsub", good),
    ):
        client.async_stream_infer(model, inputs, request_id=request_id)
    seen = []
    for _ in range(4):
        result, error = answers.get(timeout=TIMEOUT_S)
        seen.append(error.message() if error is not None else f"ok {result.get_response().id}")
    client.stop_stream()
    return seen


def errors(client: Any) -> Any:
    array = np.zeros((1, 4), np.float32)
    good = pair(1)[1]
    long = [tensor("x", "FP32", np.zeros((1, 2), np.float32))]
    return {
        "unknown model": error_of(lambda: client.infer("nobody", good)),
        "unknown version": error_of(lambda: client.infer("addsub", good, model_version="9")),
        "missing input": error_of(lambda: client.infer("addsub", good[:1])),
        "unknown input": error_of(lambda: client.infer("addsub", [*good, tensor("INPUT2", "FP32", array)])),
        "datatype": error_of(lambda: client.infer("addsub", [tensor("INPUT0", "INT32", array.astype("i4")), good[1]])),
        "shape": error_of(lambda: client.infer("mlp", long)),
        "batch": error_of(lambda: client.infer("mlp", [tensor("x", "FP32", np.zeros((9, 8), np.float32))])),
        "output": error_of(lambda: client.infer("addsub", good, outputs=[triton.InferRequestedOutput("OUTPUT7")])),
        "classification": error_of(
            lambda: client.infer("addsub", good, outputs=[triton.InferRequestedOutput("OUTPUT0", class_count=2)])
        ),
        "metadata of unknown": error_of(lambda: client.get_model_metadata("nobody")),
        "load of unknown": error_of(lambda: client.load_model("nobody")),
        "config": error_of(lambda: client.get_model_config("addsub")),
        "statistics": error_of(client.get_inference_statistics),
        "shared memory": error_of(client.get_system_shared_memory_status),
        "deadline": error_of(lambda: client.infer("slow", [tensor("INPUT0", "FP32", array)], client_timeout=0.1)),
    }


def by_header(client: Any) -> Any:
    answer = client.infer("", pair(1)[1], headers={"mm-model-id": "addsub"})
    return answer.get_response().model_name


SCENES: Final = (
    server,
    datatypes,
    echo,
    selection,
    many_at_once,
    large,
    metadata,
    ready,
    repository,
    stream,
    errors,
    by_header,
)


async def on_asyncio(address: str, **tls: Any) -> Any:
    """tritonclient.grpc.aio: calls at once, a stream and an error."""
    async with triton_aio.InferenceServerClient(address, **tls) as client:
        array, inputs = pair(2)
        answers = await asyncio.gather(*(client.infer("addsub", inputs) for _ in range(20)))

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for n in range(3):
                yield {"model_name": "addsub", "inputs": inputs, "request_id": str(n)}

        streamed = [result.get_response().id async for result, _ in client.stream_infer(requests())]
        try:
            await client.infer("nobody", inputs)
        except InferenceServerException as error:
            return [sum(np.array_equal(a.as_numpy("OUTPUT0"), array * 2) for a in answers), streamed, error.status()]


def main(address: str, ca: str = "", cert: str = "", key: str = "") -> None:
    told = {}
    tls = {"root_certificates": ca or None, "certificate_chain": cert or None, "private_key": key or None}
    with triton.InferenceServerClient(address, ssl=bool(ca), **tls) as client:
        for scene in SCENES:
            told[scene.__name__] = scene(client)
    told[on_asyncio.__name__] = asyncio.run(on_asyncio(address, ssl=bool(ca), **tls))
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
