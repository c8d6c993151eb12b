"""Runs in KServe's environment: kserve_server.py GRPC_PORT HTTP_PORT IDENTITY_NAME MLP_NAME MLP_PATH"""

import sys

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Identity(Model):
    def __init__(self, name, run=lambda array: array):
        super().__init__(name)
        self.run = run
        self.ready = True

    async def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        given = payload.inputs[0]
        array = self.run(given.as_numpy())
        answer = InferOutput(name="OUTPUT0", shape=list(array.shape), datatype=given.datatype)
        answer.set_data_from_numpy(array, binary_data=True)
        return InferResponse(response_id=payload.id, model_name=self.name, infer_outputs=[answer])


if __name__ == "__main__":
    grpc_port, http_port, identity, mlp, path = sys.argv[1:]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    models = [Identity(identity), Identity(mlp, lambda array: session.run(None, {"input": array})[0])]
    sys.argv[1:] = []  # kserve parses it too, when it starts
    ModelServer(grpc_port=int(grpc_port), http_port=int(http_port), workers=1, enable_latency_logging=False).start(
        models
    )
