"""PyTorch tenants: a small network trained a few steps and exported. Imported only where torch is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

STEPS: Final = 60


class Classifier(nn.Module):
    """Standardised rows through one hidden layer; answers by name, as the exported model's outputs."""

    def __init__(self, rows: torch.Tensor, width: int, classes: int) -> None:
        super().__init__()
        self.mean, self.scale = nn.Buffer(rows.mean(0)), nn.Buffer(rows.std(0) + 1e-3)
        self.layers = nn.Sequential(nn.Linear(rows.shape[1], width), nn.ReLU(), nn.Linear(width, classes))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layers((rows - self.mean) / self.scale)
        return answer

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        probabilities = self.logits(rows).softmax(1)
        return {"label": probabilities.argmax(1), "probabilities": probabilities}


def train_and_export(
    path: Path,
    width: int,
    seed: int,
    rows: npt.NDArray[np.float32],
    targets: npt.NDArray[Any],
    classes: int,
    held_out: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Train, write a `.pt2` for batches of any size, and answer labels and probabilities of the held-out rows."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    given, wanted = torch.from_numpy(rows), torch.from_numpy(targets)
    model = Classifier(given, width, classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.logits(given), wanted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    with torch.no_grad():
        answer = model(torch.from_numpy(held_out))
        # Two rows, not one: torch.export takes a size of 1 for a constant.
        exported = torch.export.export(model, (given[:2],), dynamic_shapes={"rows": {0: torch.export.Dim("batch")}})
    torch.export.save(exported, path)
    return answer["label"].numpy(), answer["probabilities"].numpy()
