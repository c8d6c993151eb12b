"""Runs in MLServer: the input back, or what the ONNX network makes of it."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Model(MLModel):
    async def load(self) -> bool:
        uri = self.settings.parameters.uri
        self.session = None
        if uri.endswith(".onnx"):
            import onnxruntime

            self.session = onnxruntime.InferenceSession(uri, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        array = NumpyCodec.decode_input(payload.inputs[0])
        if self.session is not None:
            (array,) = self.session.run(None, {"input": array})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("OUTPUT0", array)])
