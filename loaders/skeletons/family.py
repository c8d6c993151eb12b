"""Models that share a skeleton, in one process, and runs of several of them in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np
import torch

from loaders.base import InferError, NoMemory, Tensor
from loaders.memory.layout import Layout
from loaders.sharing import InUse
from loaders.skeletons.base import Skeleton, Views
from loaders.skeletons.rows import Row, Rows
from loaders.torch_tensors import no_memory, reason, to_numpy, to_torch


class Placed(Protocol):
    """A model that may have a row."""

    row: Row | None
    weights: Views


class Family:
    """A skeleton, the layout of its models' files, and how many of them are loaded."""

    def __init__(self, digest: str, skeleton: Skeleton, layout: Layout, rows: Rows | None) -> None:
        self.digest = digest
        self.skeleton = skeleton
        self.layout = layout
        self.rows = rows
        """None: its models are run one by one."""
        self.models = 0

    def infer_many(
        self, models: Sequence[Placed], requests: Sequence[Mapping[str, Tensor]], outputs: Sequence[str]
    ) -> list[dict[str, Tensor]]:
        """Run a request each on several models; requests differ at most in their first dimension.

        Raises:
            InferError: torch's reason; it may be one request's fault, so they are to be run one by one.
        """
        assert self.rows is not None
        rows = [model.row for model in models if model.row is not None]
        assert len(rows) == len(models)
        sizes = [len(next(iter(request.values()))) for request in requests]
        results: list[dict[str, Tensor]] = [{} for _ in requests]
        try:
            with torch.inference_mode():
                for part in self.rows.parts(rows):
                    if part.size == 1:  # nobody is near it
                        ((n, _),) = part.places
                        given = {name: to_torch(tensor) for name, tensor in requests[n].items()}
                        alone = self.skeleton.run(models[n].weights, given)
                        results[n] = {name: to_numpy(alone[name]) for name in outputs}
                        continue
                    most = max(sizes[n] for n, _ in part.places)
                    inputs = {
                        name: to_torch(_together(name, tensor, requests, part.places, part.size, most))
                        for name, tensor in requests[0].items()
                    }
                    found = self.skeleton.run_many(part.weights, inputs)
                    for name in outputs:
                        array = to_numpy(found[name])
                        for n, place in part.places:
                            results[n][name] = array[place] if sizes[n] == most else array[place, : sizes[n]]
            return results
        except Exception as error:
            if no_memory(error):
                raise NoMemory(reason(error)) from error
            raise InferError(reason(error), bad_input=True) from error


def _together(
    name: str,
    like: Tensor,
    requests: Sequence[Mapping[str, Tensor]],
    places: Sequence[tuple[int, int]],
    count: int,
    most: int,
) -> Tensor:
    """The input [models, rows, ...] of all requests; zeros where there is none."""
    if len(places) == count and all(len(requests[n][name]) == most for n, _ in places):
        return np.concatenate([requests[n][name] for n, _ in places]).reshape(count, most, *like.shape[1:])
    together = np.zeros((count, most, *like.shape[1:]), like.dtype)
    for n, place in places:
        tensor = requests[n][name]
        together[place, : len(tensor)] = tensor
    return together


families: Final = InUse[Family]()
"""Of this process."""
