"""Text models as Hugging Face's transformers saves them: a directory with `config.json`, `model.safetensors` and
`tokenizer.json`. Text classification, token classification and embeddings, on CPU.

They run in this process, on one thread per request: safetensors and `tokenizer.json` are data, code that lies with a
model (`auto_map`) is refused, and no hub is asked for anything. `pytorch_model.bin` is a pickle, which torch reads
without running code (`weights_only`); it is treated as code all the same.

The task is what the architecture in `config.json` was made for, or parameter `task`, by transformers' names:

    text-classification     BYTES [n] -> label BYTES [n], score FP32 [n], scores FP32 [n, labels]
    token-classification    BYTES [n] -> labels BYTES [n, tokens], scores FP32, offsets INT32 [n, tokens, 2] (of
                            characters); special tokens and padding have the label "" and the score 0
    feature-extraction      BYTES [n] -> embedding FP32 [n, width]: `pooling` is `mean` (default) or `cls`, and
                            `normalize` makes its length 1; sentence-transformers' directories have own defaults

Texts longer than the model takes (or parameter `max_length`, in tokens) are cut.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from loaders.artifacts import agreed, parameters, reading
from loaders.base import Artifact, InferError, LoaderError, OutOfMemory, Signature, Tensor, TensorSpec
from loaders.datatypes import bytes_of, text_of
from loaders.memory.process import Change
from loaders.taking_turns import framework_load

# Read when these packages are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
try:
    import torch
    import transformers
except ImportError as missing:
    raise LoaderError(f"{missing.name} is not installed: pip install 'densemesh[huggingface]'") from missing

_TASKS: Final = {
    "text-classification": ("ForSequenceClassification", transformers.AutoModelForSequenceClassification),
    "token-classification": ("ForTokenClassification", transformers.AutoModelForTokenClassification),
    "feature-extraction": ("", transformers.AutoModel),
}
"""What an architecture's name ends with, and what reads it."""
_ROWS: Final = 32
"""Of one run: all are padded to the longest."""
_LONGEST: Final = 512
"""Tokens, where neither tokenizer nor configuration tell."""
_HEADER_BYTES: Final = 100_000_000
"""As safetensors itself allows."""
_TEXT: Final = TensorSpec("text", "BYTES", (-1,))
_WEIGHT_BYTES: Final = 4_000
_TOKENIZER: Final = 9
"""Beside the weights, which are mapped from the file: Python objects for each, and a tokenizer's bytes over those of
its file. So sizes are within 10 % of what malloc gave out and the weights' bytes, for BERTs of 100 KB to 90 MB."""

Answer = Callable[[Any, "torch.Tensor", Sequence[Any]], dict[str, Tensor]]
"""From a model's output, the mask of its tokens, and their encodings."""


class HuggingfaceLoader:
    """Reads directories with `model.safetensors`; loads one model at a time."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        with suppress(RuntimeError):  # can be set only before the first parallel work, by us or another user of torch
            torch.set_num_interop_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def estimate_bytes(self, artifact: Artifact) -> int:
        path = artifact.path
        with reading(path):
            weights = [each for each in path.iterdir() if each.suffix in (".safetensors", ".bin")]
            stored = sum(each.stat().st_size for each in weights)
            count = sum(_count(each) for each in weights)
            tokenizer = (path / "tokenizer.json").stat().st_size
        return stored + _WEIGHT_BYTES * count + _TOKENIZER * tokenizer

    def load(self, artifact: Artifact) -> HuggingfaceModel:
        config = _json(artifact.path / "config.json")
        own = parameters(artifact, "huggingface", "task", "pooling", "normalize", "max_length")
        task = _task(own, config)
        self.estimate_bytes(artifact)  # the files are there
        with Change(), framework_load(artifact.path):
            try:
                tokenizer, model = _read(artifact.path, config, task)
                answer, outputs = _answering(task, model, own, artifact.path)
            except LoaderError:
                raise
            except Exception as error:
                no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
                kind = OutOfMemory if no_memory else LoaderError
                raise kind(f"{artifact.path.name}: {_reason(error)}") from error
            signature = Signature((_TEXT,), outputs, platform="huggingface_transformers", lenient=True)
            tensors = [*model.parameters(), *model.buffers()]
            stored = sum({each.data_ptr(): each.nbytes for each in tensors}.values())
            vocabulary = (artifact.path / "tokenizer.json").stat().st_size
            size_bytes = stored + _WEIGHT_BYTES * len(tensors) + _TOKENIZER * vocabulary
            encode = _encoder(tokenizer, model.config, own)
            return HuggingfaceModel(model, encode, answer, agreed(signature, artifact), size_bytes)


class HuggingfaceModel:
    """A model and its tokenizer."""

    waits: Final = 0

    def __init__(
        self,
        model: Any,
        encode: Callable[[list[str]], tuple[dict[str, torch.Tensor], Sequence[Any]]],
        answer: Answer,
        signature: Signature,
        size_bytes: int,
    ) -> None:
        self.signature = signature
        self.size_bytes = size_bytes
        self._model = model
        self._encode = encode
        self._answer = answer

    def infer(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run once for every `_ROWS` texts.

        Raises:
            InferError: not one column of texts (`bad_input`), or torch's reason.
        """
        texts = _texts(inputs)
        try:
            with torch.inference_mode():
                parts = [self._run(texts[at : at + _ROWS]) for at in range(0, max(len(texts), 1), _ROWS)]
        except Exception as error:
            raise InferError(_reason(error), bad_input=False) from error
        return {name: _joined([part[name] for part in parts]) for name in outputs}

    def _run(self, texts: list[str]) -> dict[str, Tensor]:
        feeds, encodings = self._encode(texts)
        answer = self._answer(self._model(**feeds), feeds["attention_mask"], encodings)
        return {name: array[: len(texts)] for name, array in answer.items()}

    def unload(self) -> None:
        with Change():
            for tensor in (*self._model.parameters(), *self._model.buffers()):
                tensor.data = torch.empty(0)
            del self._model, self._encode, self._answer


def _read(path: Path, config: Mapping[str, Any], task: str) -> tuple[Any, Any]:
    if "auto_map" in config and config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise LoaderError(f"{path.name} needs code of its author (auto_map in config.json), which is never run")
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **where)
    if not tokenizer.is_fast:
        raise LoaderError(f"{path.name}: expected a tokenizer.json that the tokenizers package reads")
    is_safe = any(path.glob("*.safetensors"))
    model, told = _TASKS[task][1].from_pretrained(
        path,
        **where,
        use_safetensors=is_safe,
        weights_only=True,
        ignore_mismatched_sizes=True,  # and told, in place of a report in the log
        output_loading_info=True,
    )
    missing = sorted(name for name in told["missing_keys"] if "pooler" not in name)  # which nothing here uses
    if missing:  # transformers makes them up
        raise LoaderError(f"{path.name} is no {task} model: its weights lack {', '.join(missing[:4])}")
    if misfits := sorted(name for name, *_ in told["mismatched_keys"]):
        raise LoaderError(f"{path.name}: {', '.join(misfits[:4])} are not of the size that config.json tells")
    return tokenizer, model.eval()


def _task(own: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    task = own.get("task")
    if task is None:
        names = config.get("architectures") or [""]
        return next(task for task, (suffix, _) in _TASKS.items() if str(names[0]).endswith(suffix))
    if task not in _TASKS:
        raise LoaderError(f"parameter 'task' is {task!r:.64}: expected {', '.join(_TASKS)}")
    return str(task)


def _encoder(
    tokenizer: Any, config: Any, own: Mapping[str, Any]
) -> Callable[[list[str]], tuple[dict[str, torch.Tensor], Sequence[Any]]]:
    """Texts to tensors. Calling the tokenizer of transformers itself would set it up anew each time, which threads may
    not do at once."""
    takes = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or _LONGEST)
    longest = own.get("max_length", takes)
    if type(longest) is not int or not 1 <= longest <= takes:
        raise LoaderError(f"parameter 'max_length' is {longest!r:.64}: expected a number of tokens from 1 to {takes}")
    backend, pad = tokenizer.backend_tokenizer, tokenizer.pad_token_id
    backend.enable_truncation(longest, direction=tokenizer.truncation_side)
    if pad is None:
        raise LoaderError("the tokenizer has no pad_token: texts of different lengths could not be run together")
    backend.enable_padding(direction=tokenizer.padding_side, pad_id=pad, pad_token=tokenizer.pad_token)
    columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    columns = {name: columns[name] for name in {*tokenizer.model_input_names, "attention_mask"} if name in columns}

    def encode(texts: list[str]) -> tuple[dict[str, torch.Tensor], Sequence[Any]]:
        encodings = backend.encode_batch(texts or [""])
        return {
            name: torch.tensor([getattr(each, column) for each in encodings]) for name, column in columns.items()
        }, encodings

    return encode


def _answering(task: str, model: Any, own: Mapping[str, Any], path: Path) -> tuple[Answer, tuple[TensorSpec, ...]]:
    config = model.config
    if task == "feature-extraction":
        return _embedding(config, own, path)
    labels = [str(config.id2label[n]) for n in range(config.num_labels)]
    names = bytes_of(np.array(labels, object))
    if task == "token-classification":
        return _tokens(names)
    kind = config.problem_type or ("multi_label_classification" if len(labels) == 1 else "")

    def classes(output: Any, mask: torch.Tensor, encodings: Sequence[Any]) -> dict[str, Tensor]:
        scores = output.logits.float()  # as transformers' TextClassificationPipeline
        if kind == "multi_label_classification":
            scores = scores.sigmoid()
        elif kind != "regression":
            scores = scores.softmax(-1)
        best, which = scores.max(-1)
        return {"label": names[which.numpy()], "score": best.numpy(), "scores": scores.numpy()}

    told = [("label", "BYTES", (-1,)), ("score", "FP32", (-1,)), ("scores", "FP32", (-1, len(labels)))]
    return classes, tuple(TensorSpec(*each) for each in told)


def _tokens(names: Tensor) -> tuple[Answer, tuple[TensorSpec, ...]]:
    def tokens(output: Any, mask: torch.Tensor, encodings: Sequence[Any]) -> dict[str, Tensor]:
        best, which = output.logits.float().softmax(-1).max(-1)
        is_text = np.array([each.special_tokens_mask for each in encodings]) == 0
        return {
            "labels": np.where(is_text, names[which.numpy()], b""),
            "scores": np.where(is_text, best.numpy(), np.float32(0)),
            "offsets": np.array([each.offsets for each in encodings], np.int32),
        }

    told = [("labels", "BYTES", (-1, -1)), ("scores", "FP32", (-1, -1)), ("offsets", "INT32", (-1, -1, 2))]
    return tokens, tuple(TensorSpec(*each) for each in told)


def _embedding(config: Any, own: Mapping[str, Any], path: Path) -> tuple[Answer, tuple[TensorSpec, ...]]:
    modules = [str(each.get("type", "")).rpartition(".")[2] for each in _listed(path / "modules.json")]
    pooled = _json(path / "1_Pooling" / "config.json") if "Pooling" in modules else {}
    pooling = own.get("pooling", "cls" if pooled.get("pooling_mode_cls_token") else "mean")
    normalize = own.get("normalize", "Normalize" in modules)
    if pooling not in ("mean", "cls"):
        raise LoaderError(f"parameter 'pooling' is {pooling!r:.64}: expected mean or cls")
    if not isinstance(normalize, bool):
        raise LoaderError(f"parameter 'normalize' is {normalize!r:.64}: expected true or false")
    if others := set(modules) - {"Transformer", "Pooling", "Normalize"}:
        raise LoaderError(f"{path.name} has modules that are not supported: {', '.join(sorted(others))}")

    def embedding(output: Any, mask: torch.Tensor, encodings: Sequence[Any]) -> dict[str, Tensor]:
        states = output.last_hidden_state.float()
        if pooling == "cls":
            found = states[:, 0]
        else:
            weights = mask.unsqueeze(-1).float()
            found = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return {"embedding": (torch.nn.functional.normalize(found, dim=-1) if normalize else found).numpy()}

    return embedding, (TensorSpec("embedding", "FP32", (-1, config.hidden_size)),)


def _texts(inputs: Mapping[str, Tensor]) -> list[str]:
    if len(inputs) != 1:
        raise InferError(f"the model takes one input of texts, got {len(inputs)}", bad_input=True)
    (tensor,) = inputs.values()
    if tensor.dtype != object or tensor.ndim not in (1, 2) or tensor.shape[1:] not in ((), (1,)):
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise InferError(f"expected texts, BYTES of shape [n] or [n, 1], got {got}", bad_input=True)
    try:
        return [str(text) for text in text_of(tensor).ravel()]
    except UnicodeDecodeError as error:
        raise InferError(f"a text is not UTF-8: {error.reason} at byte {error.start}", bad_input=True) from None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows of several runs, whose texts may have been padded to different lengths."""
    if len({part.shape[1:2] for part in parts}) == 1:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)
    empty = b"" if parts[0].dtype == object else 0
    fill = [[(0, 0), (0, width - part.shape[1]), *([(0, 0)] * (part.ndim - 2))] for part in parts]
    return np.concatenate([np.pad(part, pads, constant_values=empty) for part, pads in zip(parts, fill, strict=True)])


def _json(path: Path) -> dict[str, Any]:
    try:
        with reading(path):
            told = json.loads(path.read_bytes())
    except ValueError as error:
        raise LoaderError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(told, dict):
        raise LoaderError(f"{path.name} is not a JSON object")
    return told


def _listed(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list; none if there is no such file."""
    if path.is_file():
        try:
            yield from (each for each in json.loads(path.read_bytes()) if isinstance(each, dict))
        except (ValueError, TypeError) as error:
            raise LoaderError(f"{path.name} is not a JSON list: {error}") from None


def _count(weights: Path) -> int:
    """Tensors in a safetensors file; of a pickle, roughly what a model has."""
    if weights.suffix != ".safetensors":
        return 200
    with weights.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if size > min(weights.stat().st_size, _HEADER_BYTES):
            raise LoaderError(f"{weights.name} is no safetensors file, or was cut")
        header = file.read(size)
    return header.count(b'"data_offsets"')


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
