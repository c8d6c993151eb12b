"""One form for all graphs that compute alike, so that fine-tunes of one network are the same bytes but for weights.

ONNX Runtime numbers what it generates in an order that differs from run to run, exporters name as they like, and
authors leave words. Only the names of inputs and outputs mean something to clients.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any


def canonicalise(model: Any) -> None:
    """Order and name the nodes and tensors of an `onnx.ModelProto` by their place in the computation; drop words.

    A node comes after what it needs, inputs first to last, beginning at the first output.
    """
    graph = model.graph
    nodes = list(_in_order(graph))
    outside = {info.name for info in chain(graph.input, graph.output)}
    prefix = "t"
    while any(name.startswith(prefix) for name in outside):
        prefix += "_"
    names = {name: name for name in outside} | {"": ""}
    for n, node in enumerate(nodes):
        node.name = f"{node.op_type}_{n}"
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                field[place] = names.setdefault(name, f"{prefix}{len(names)}")
        node.attribute.sort(key=lambda attribute: attribute.name)
    kept = {tensor.name: tensor for tensor in graph.initializer}
    for tensor in kept.values():
        tensor.name = names.get(tensor.name, tensor.name)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.initializer[:]
    graph.initializer.extend(kept[old] for old in names if old in kept)
    del graph.value_info[:]
    for message in chain((model, graph), graph.node, graph.input, graph.output, graph.initializer):
        message.ClearField("doc_string")
        message.ClearField("metadata_props")
    for field in ("producer_name", "producer_version", "domain", "model_version"):
        model.ClearField(field)
    graph.name = "network"
    imports = sorted(model.opset_import, key=lambda imported: imported.domain)
    used = {node.domain for node in graph.node} | {""}
    del model.opset_import[:]
    model.opset_import.extend(imported for imported in imports if imported.domain in used)


def _in_order(graph: Any) -> Iterator[Any]:
    """Every node that an output needs, after what it needs itself."""
    makers = {name: node for node in graph.node for name in node.output if name}
    done: set[int] = set()
    for output in graph.output:
        waiting = [(makers[output.name], False)] if output.name in makers else []
        while waiting:
            node, is_ready = waiting.pop()
            if id(node) in done:
                continue
            if is_ready:
                done.add(id(node))
                yield node
            else:
                waiting.append((node, True))
                waiting += [(makers[name], False) for name in reversed(node.input) if name in makers]
