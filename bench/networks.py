"""Networks as ONNX files with weights from a seed: same sizes, other seed is another tenant's fine-tune."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from onnx import TensorProto, helper, numpy_helper

OPSET: Final = 17


class Graph:
    """An ONNX graph that is being written: nodes, and weights drawn as they are asked for."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._nodes: list[Any] = []
        self._weights: list[Any] = []

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; the output's name."""
        output = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def weight(self, *shape: int, spread: float | None = None, around: float = 0.0) -> str:
        """Random FP32 numbers; by default spread so that a product with them keeps its scale."""
        if spread is None:
            spread = float(np.prod(shape[1:] if len(shape) == 4 else shape[:-1])) ** -0.5
        values = self._rng.standard_normal(shape, np.float32) * np.float32(spread) + np.float32(around)
        return self.constant(values.astype(np.float32))

    def constant(self, values: Any) -> str:
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def linear(self, x: str, rows: int, columns: int) -> str:
        """x @ W + b"""
        return self.node("Add", self.node("MatMul", x, self.weight(rows, columns)), self.weight(columns, spread=0.1))

    def write(self, path: Path, given: tuple[str, int, list[Any]], last: str, shape: list[Any]) -> int:
        """Write the model with one input and the output `last`; its bytes."""
        answer = helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)
        self._nodes.append(helper.make_node("Identity", [last], ["output"]))
        graph = helper.make_graph(
            self._nodes, "network", [helper.make_tensor_value_info(*given)], [answer], self._weights
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        return path.write_bytes(model.SerializeToString())


def mlp(path: Path, seed: int, widths: tuple[int, ...]) -> int:
    """A perceptron with ReLU between its layers; input FP32 [batch, widths[0]]."""
    graph, last = Graph(seed), "input"
    for n, (rows, columns) in enumerate(pairwise(widths)):
        last = graph.linear(last, rows, columns)
        if n < len(widths) - 2:
            last = graph.node("Relu", last)
    return graph.write(path, ("input", TensorProto.FLOAT, ["batch", widths[0]]), last, ["batch", widths[-1]])


def resnet(path: Path, seed: int, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> int:
    """A residual network with bottlenecks and batch normalisation; the defaults are ResNet-50's sizes (100 MB).

    Input FP32 [batch, 3, 224, 224], or other sizes of image.
    """
    graph = Graph(seed)

    def convolved(x: str, inside: int, out: int, kernel: int, stride: int = 1) -> str:
        x = graph.node(
            "Conv",
            x,
            graph.weight(out, inside, kernel, kernel),
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[kernel // 2] * 4,
        )
        scale, shift = graph.weight(out, spread=0.1, around=1.0), graph.weight(out, spread=0.1)
        mean, variance = graph.weight(out, spread=0.1), graph.weight(out, spread=0.05, around=1.0)
        return graph.node("BatchNormalization", x, scale, shift, mean, variance)

    x = graph.node("Relu", convolved("input", 3, width, 7, 2))
    x = graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    inside = width
    for stage, count in enumerate(blocks):
        narrow, out = width << stage, (width << stage) * 4
        for block in range(count):
            stride = 2 if block == 0 and stage > 0 else 1
            y = graph.node("Relu", convolved(x, inside, narrow, 1))
            y = graph.node("Relu", convolved(y, narrow, narrow, 3, stride))
            y = convolved(y, narrow, out, 1)
            x = graph.node("Relu", graph.node("Add", y, x if block else convolved(x, inside, out, 1, stride)))
            inside = out
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x))
    last = graph.linear(x, inside, 1000)
    return graph.write(path, ("input", TensorProto.FLOAT, ["batch", 3, "height", "breadth"]), last, ["batch", 1000])


def bert(path: Path, seed: int, layers: int = 12, width: int = 768, words: int = 30522, heads: int = 12) -> int:
    """A transformer encoder with a classifier of two labels; the defaults are BERT-base's sizes (440 MB).

    Input INT64 [batch, length], numbers of words; at most 512 long.
    """
    graph = Graph(seed)
    positions = graph.weight(512, width, spread=0.02)
    split = graph.constant(np.array([0, 0, heads, width // heads]))
    joined, root = graph.constant(np.array([0, 0, width])), graph.constant(np.float32((width // heads) ** 0.5))
    half, one, two = (graph.constant(np.float32(value)) for value in (0.5, 1.0, 2.0**0.5))
    zero, ones = graph.constant(np.array([0])), graph.constant(np.array([1]))

    def normalised(x: str) -> str:
        scale, shift = graph.weight(width, spread=0.1, around=1.0), graph.weight(width, spread=0.1)
        return graph.node("LayerNormalization", x, scale, shift, epsilon=1e-12)

    def separate(x: str, order: tuple[int, ...]) -> str:
        return graph.node("Transpose", graph.node("Reshape", graph.linear(x, width, width), split), perm=order)

    length = graph.node("Slice", graph.node("Shape", "input"), ones, graph.constant(np.array([2])), zero)
    placed = graph.node("Slice", positions, zero, length, zero)
    x = normalised(graph.node("Add", graph.node("Gather", graph.weight(words, width, spread=0.02), "input"), placed))
    for _ in range(layers):
        query, value = separate(x, (0, 2, 1, 3)), separate(x, (0, 2, 1, 3))
        scores = graph.node("Div", graph.node("MatMul", query, separate(x, (0, 2, 3, 1))), root)
        mixed = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), value)
        mixed = graph.node("Reshape", graph.node("Transpose", mixed, perm=(0, 2, 1, 3)), joined)
        x = normalised(graph.node("Add", graph.linear(mixed, width, width), x))
        y = graph.linear(x, width, 4 * width)
        bent = graph.node("Add", graph.node("Erf", graph.node("Div", y, two)), one)
        y = graph.linear(graph.node("Mul", graph.node("Mul", y, bent), half), 4 * width, width)
        x = normalised(graph.node("Add", y, x))
    first = graph.node("Gather", x, graph.constant(np.array(0)), axis=1)
    last = graph.linear(graph.node("Tanh", graph.linear(first, width, width)), width, 2)
    return graph.write(path, ("input", TensorProto.INT64, ["batch", "length"]), last, ["batch", 2])
