"""Runs in Triton's Python backend: the input back, or what the ONNX network makes of it."""

import json

import triton_python_backend_utils as triton  # comes with the backend


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]
        path = config["parameters"]["onnx"]["string_value"]
        self.session = None
        if path:
            import onnxruntime

            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        answers = []
        for request in requests:
            array = triton.get_input_tensor_by_name(request, self.input).as_numpy()
            if self.session is not None:
                (array,) = self.session.run(None, {self.input: array})
            answers.append(triton.InferenceResponse([triton.Tensor(self.output, array)]))
        return answers
