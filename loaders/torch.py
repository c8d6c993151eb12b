"""PyTorch models without their Python source: `.pt2` (torch.export, AOTInductor) and `.pt` (TorchScript). CPU only.

All can run code of the model's author, so all are refused unless the operator allows them (`Format.runs_code`):

- `.pt2`: `torch.export.load` unpickles any weight or constant that the archive marks `use_pickle` with
  `weights_only=False`, and evaluates symbolic sizes of `model.json` with `sympy.sympify`, which is `eval`. Tried with
  torch 2.13: a payload in either place runs while loading (`tests/loaders/test_torch.py`).
- `.pt2` of AOTInductor: machine code, made for one kind of processor, and so allowed by a name of its own, `aoti`.
- `.pt`: unpickled in C++ by a restricted reader and interpreted as TorchScript, so no Python runs, but the model's own
  program does, and TorchScript can read and write files (`torch.from_file`, `torch.save`).

Tensors are positional in TorchScript, and so are names declared in Triton's convention (`INPUT__0`, `OUTPUT__1`: the
number is the position). Without declared names:

- `.pt2`: inputs by the names of `forward`'s parameters, outputs by the keys of a returned dict, else `OUTPUT__<i>`.
- `.pt`: the input by the name of `forward`'s parameter, outputs `OUTPUT__<i>`. The file tells neither datatypes nor
  shapes: one input is lenient (see `Signature`), several must be declared, as must outputs of unknown number.
- AOTInductor's code: the same, with the names `INPUT__<i>`; it checks what it is given by itself.

One intra-op and one inter-op thread for the whole process, set once: parallelism comes from requests, and with OpenMP
every calling thread would otherwise get a team of its own.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from loaders.artifacts import agreed, parameters, reading
from loaders.base import Artifact, InferError, LoaderError, OutOfMemory, Signature, Tensor, TensorSpec
from loaders.memory.process import Change
from loaders.taking_turns import framework_load
from loaders.torch_tensors import DATATYPES, no_memory, one_thread, reason, to_numpy, to_torch

try:
    import torch
    from torch.utils import _pytree
except ImportError as missing:
    raise LoaderError("torch is not installed: pip install 'densemesh[torch]'") from missing

os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")  # else other shapes are read and written beyond their ends

_POSITIONAL: Final = re.compile(r".*__(\d+)")

_OPERATION: Final = re.compile(r"getattr\(|\bself\.\w|(?<![\w.])(?:torch|ops)\.\w|(?<=[(=,] )\[|(?<=\()\[")
_CONSTANT: Final = re.compile(r"(?<=[\[( ])(?:-?\d[\w.+-]*|True|False|None)(?=[,\])])")
_MOST_CODE_BYTES: Final = 4 << 20

_EXPORTED_BYTES, _EXPORTED_NODE_BYTES = 30_000, 3_500
_SCRIPT_BYTES, _SCRIPT_NODE_BYTES = 150_000, 6_000
"""Beside its tensors, per model and per graph node. So sizes are within 12 % of trimmed RSS after three runs for
scripts, 30 % for exported programs, of 100 KB to 100 MB: MLPs, a convolution net, a graph of 200 nodes."""


class TorchLoader:
    """Reads `.pt2` and TorchScript `.pt`; loads one model at a time."""

    def __init__(self) -> None:
        one_thread()

    def estimate_bytes(self, artifact: Artifact) -> int:
        parameters(artifact, "torch")
        is_exported = artifact.path.suffix == ".pt2"
        with reading(artifact.path, "a PyTorch archive"), zipfile.ZipFile(artifact.path) as archive:
            if _is_native(archive) and "aoti" not in artifact.allowed_code:
                name = artifact.path.name
                raise LoaderError(f"{name} holds native code of AOTInductor: refused without --allow-code aoti")
            stored = sum(each.file_size for each in archive.infolist() if not each.filename.endswith(".json"))
            nodes = 0 if is_exported else _script_nodes(archive)
        return stored + (_EXPORTED_BYTES if is_exported else _SCRIPT_BYTES + _SCRIPT_NODE_BYTES * nodes)

    def load(self, artifact: Artifact) -> TorchModel:
        self.estimate_bytes(artifact)  # refuses what is no archive, which torch would log at length
        with zipfile.ZipFile(artifact.path) as archive:
            is_native = _is_native(archive)
        is_exported = artifact.path.suffix == ".pt2"
        read = _read_native if is_native else _read_exported if is_exported else _read_script
        with Change(), framework_load(artifact.path, ignore=DeprecationWarning):  # of torch.jit, not of the model
            try:
                return read(artifact)
            except LoaderError:
                raise
            except Exception as error:
                kind = OutOfMemory if no_memory(error) else LoaderError
                raise kind(f"{artifact.path.name}: {reason(error)}") from error


def _is_native(archive: zipfile.ZipFile) -> bool:
    return any("/aotinductor/" in name for name in archive.namelist())


def _script_nodes(archive: zipfile.ZipFile) -> int:
    """Graph nodes of a TorchScript archive, about: its methods' calls, attributes, lists, and constants once each."""
    code = [each for each in archive.infolist() if each.filename.endswith(".py") and "/code/" in each.filename]
    if sum(each.file_size for each in code) > _MOST_CODE_BYTES:
        return 0
    methods = [method for each in code for method in archive.read(each).decode(errors="replace").split("  def ")[1:]]
    return sum(len(_OPERATION.findall(method)) + len(set(_CONSTANT.findall(method))) for method in methods)


class TorchModel:
    """A module and how tensors are handed to it by name."""

    waits: Final = 0

    def __init__(
        self,
        module: Any,
        call: Callable[[dict[str, torch.Tensor]], Any],
        signature: Signature,
        names: tuple[tuple[str, ...], tuple[str, ...]],
        size_bytes: int,
    ) -> None:
        self.signature = signature
        self.size_bytes = size_bytes
        self._module = module
        self._call = call
        self._inputs, self._outputs = names

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once.

        Raises:
            InferError: torch's reason; `bad_input` if sizes or values break the exported program's own guards, or if
                the model is lenient and so nobody checked the input before.
        """
        if self.signature.lenient and len(inputs) == 1:
            inputs = dict.fromkeys(self._inputs, *inputs.values())
        try:
            feeds = {name: to_torch(tensor) for name, tensor in inputs.items()}
            with torch.inference_mode():
                found = _by_name(self._call(feeds), self._outputs)
            return {name: to_numpy(found[name]) for name in outputs}
        except InferError:
            raise
        except Exception as error:
            guard = isinstance(error, AssertionError | ValueError | IndexError)
            bad_input = guard or (self.signature.lenient and not no_memory(error))
            raise InferError(reason(error), bad_input=bad_input) from error

    def unload(self) -> None:
        """Free the weights now; a graph in reference cycles (4 kB a node) waits for the garbage collector.

        torch 2.13 itself never frees 20 to 100 kB per load of a `.pt2` (sources and symbolic shapes); TorchScript 2 kB.
        """
        with Change():
            for tensor in _tensors(self._module):
                tensor.data = torch.empty(0)
            del self._module, self._call


def _read_exported(artifact: Artifact) -> TorchModel:
    program = torch.export.load(artifact.path)
    takes, gives, is_dict = interface(program)
    order = _positions(artifact.inputs, len(takes))
    takes_names = tuple(spec.name for spec in order) if order else tuple(spec.name for spec in takes)
    takes = [replace(spec, name=name) for spec, name in zip(takes, takes_names, strict=True)]
    if not is_dict and len(artifact.outputs) == len(gives):  # positional in any naming
        order = _positions(artifact.outputs, len(gives)) or list(artifact.outputs)
        gives = [replace(spec, name=said.name) for spec, said in zip(gives, order, strict=True)]
    gives_names = tuple(spec.name for spec in gives)

    signature = agreed(Signature(tuple(takes), tuple(gives), platform="pytorch_export"), artifact)
    module = program.module()
    in_spec = program.call_spec.in_spec
    nodes = len(program.graph.nodes)

    def call(feeds: dict[str, torch.Tensor]) -> Any:
        args, kwargs = _pytree.tree_unflatten([feeds[name] for name in takes_names], in_spec)
        return module(*args, **kwargs)

    size_bytes = _bytes(_tensors(module)) + _EXPORTED_BYTES + _EXPORTED_NODE_BYTES * nodes
    return TorchModel(module, call, signature, (takes_names, gives_names), size_bytes)


def interface(program: torch.export.ExportedProgram) -> tuple[list[TensorSpec], list[TensorSpec], bool]:
    """What a program takes and gives, in its order, and whether it gives a dict.

    Raises:
        LoaderError: something else than tensors.
    """
    takes = [_exported_spec(program, name) for name in program.graph_signature.user_inputs]
    gives = [_exported_spec(program, name) for name in program.graph_signature.user_outputs]
    tree = _pytree.tree_unflatten(list(range(len(gives))), program.call_spec.out_spec)
    is_dict = isinstance(tree, dict) and all(isinstance(place, int) for place in tree.values())
    keys = {place: str(key) for key, place in tree.items()} if is_dict else {}
    return takes, [replace(spec, name=keys.get(i, f"OUTPUT__{i}")) for i, spec in enumerate(gives)], is_dict


def _exported_spec(program: torch.export.ExportedProgram, name: object) -> TensorSpec:
    value = next((node.meta.get("val") for node in program.graph.nodes if node.name == name), None)
    datatype = DATATYPES.get(value.dtype) if isinstance(value, torch.Tensor) else None
    if value is None or datatype is None:
        raise LoaderError(f"{name!r} of the exported program is no tensor of a V2 datatype")
    return TensorSpec(str(name), datatype, tuple(size if isinstance(size, int) else -1 for size in value.shape))


def _read_script(artifact: Artifact) -> TorchModel:
    module = torch.jit.load(str(artifact.path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    schema = module.forward.schema
    arguments = [each for each in schema.arguments[1:] if not each.has_default_value()]
    if [each.name for each in arguments if str(each.type) != "Tensor"]:
        raise LoaderError(f"forward takes more than tensors: {schema}")
    own = tuple(each.name for each in arguments)
    signature, takes_names = _untold_inputs(artifact, own, "pytorch_torchscript")
    gives = _positions(artifact.outputs, len(artifact.outputs)) or list(artifact.outputs)
    gives = gives or _script_outputs(schema.returns[0].type)
    gives_names = tuple(spec.name for spec in gives)

    def call(feeds: dict[str, torch.Tensor]) -> Any:
        return module(**{name: feeds[said] for name, said in zip(own, takes_names, strict=True)})

    nodes = sum(1 for _ in module.inlined_graph.nodes())
    size_bytes = _bytes(_tensors(module)) + _SCRIPT_BYTES + _SCRIPT_NODE_BYTES * nodes
    signature = replace(signature, outputs=tuple(gives))
    return TorchModel(module, call, signature, (takes_names, gives_names), size_bytes)


def _read_native(artifact: Artifact) -> TorchModel:
    runner = torch._inductor.aoti_load_package(str(artifact.path)).loader
    counts = [_pytree.treespec_loads(spec).num_leaves for spec in runner.get_call_spec()]
    own = tuple(f"INPUT__{i}" for i in range(counts[0]))
    signature, takes_names = _untold_inputs(artifact, own, "pytorch_aotinductor")
    gives = _positions(artifact.outputs, counts[1]) or list(artifact.outputs)
    gives = gives or [TensorSpec(f"OUTPUT__{i}", "FP32", (-1, -1)) for i in range(counts[1])]
    if len(gives) != counts[1]:
        raise LoaderError(f"{len(gives)} outputs are declared, but the model gives {counts[1]}")

    def call(feeds: dict[str, torch.Tensor]) -> Any:
        return runner.run([feeds[name].contiguous() for name in takes_names])

    with zipfile.ZipFile(artifact.path) as archive:
        size_bytes = sum(each.file_size for each in archive.infolist()) + _EXPORTED_BYTES
    names = (takes_names, tuple(spec.name for spec in gives))
    return TorchModel(torch.nn.Module(), call, replace(signature, outputs=tuple(gives)), names, size_bytes)


def _untold_inputs(artifact: Artifact, own: tuple[str, ...], platform: str) -> tuple[Signature, tuple[str, ...]]:
    """The signature but for its outputs, and the input names in the order of `forward`'s parameters `own`."""
    signature = Signature(artifact.inputs, (), platform=platform)
    for spec in (*artifact.inputs, *artifact.outputs):
        if spec.datatype == "BYTES":
            raise LoaderError(f"declared tensor {spec.name!r} is BYTES, which PyTorch does not have")
    if {spec.name for spec in artifact.inputs} == set(own):
        return signature, own
    if order := _positions(artifact.inputs, len(own)):
        return signature, tuple(spec.name for spec in order)
    if artifact.inputs:
        said = ", ".join(spec.name for spec in artifact.inputs)
        raise LoaderError(f"declared inputs {said}, but forward takes {', '.join(own)} (or INPUT__0, ...)")
    if len(own) != 1:
        raise LoaderError(f"forward takes {', '.join(own) or 'nothing'}: declare names, datatypes and shapes of inputs")
    return replace(signature, inputs=(TensorSpec(own[0], "FP32", (-1, -1)),), lenient=True), own


def _script_outputs(returned: Any) -> list[TensorSpec]:
    count = len(returned.elements()) if returned.kind() == "TupleType" else 1
    if returned.kind() not in ("TensorType", "TupleType"):
        raise LoaderError(f"forward returns {returned}: declare names, datatypes and shapes of outputs")
    return [TensorSpec(f"OUTPUT__{i}", "FP32", (-1, -1)) for i in range(count)]


def _positions(declared: Sequence[TensorSpec], count: int) -> list[TensorSpec]:
    """Declared specs by the number in their names (`INPUT__0`), if they are exactly 0 to count - 1; else empty."""
    places = {int(found[1]): spec for spec in declared if (found := _POSITIONAL.fullmatch(spec.name))}
    return [places[i] for i in range(count)] if len(declared) == count and set(places) == set(range(count)) else []


def _by_name(result: Any, names: tuple[str, ...]) -> dict[str, Any]:
    found = result if isinstance(result, dict) else dict(zip(names, _pytree.tree_leaves(result), strict=False))
    if missing := [name for name in names if name not in found]:
        raise InferError(f"the model did not answer {', '.join(missing)}", bad_input=False)
    return found


def _tensors(module: Any) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
