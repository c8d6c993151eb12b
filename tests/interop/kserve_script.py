"""What an unmodified KServe SDK sees of a pod: `kserve_script.py HOST:PORT [CA CERT KEY]` prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import grpc
import numpy as np
from kserve import InferInput, InferRequest
from kserve.inference_client import InferenceGRPCClient


async def main(address: str, *tls: str) -> None:
    pems = [Path(path).read_bytes() for path in tls]  # noqa: ASYNC240
    credentials = grpc.ssl_channel_credentials(pems[0], pems[2], pems[1]) if tls else None
    client = InferenceGRPCClient(address, use_ssl=bool(tls), creds=credentials)
    array = np.array([[1.5, -2, 3.25]], np.float32)
    tensor = InferInput("INPUT0", [1, 3], "FP32")
    tensor.set_data_from_numpy(array)
    answer = await client.infer(InferRequest("identity_fp32", [tensor]))
    told = {
        "live": await client.is_server_live(),
        "ready": [await client.is_server_ready(), await client.is_model_ready("identity_fp32")],
        "same": bool(np.array_equal(answer.outputs[0].as_numpy(), array)),
    }
    try:
        await client.infer(InferRequest("nobody", [tensor]))
    except grpc.aio.AioRpcError as error:
        told["error"] = [error.code().name, error.details()]
    await client.close()
    print(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
