"""Models that share a skeleton, in one process."""

from __future__ import annotations

from typing import Final

from loaders.memory.layout import Layout
from loaders.sharing import InUse
from loaders.skeletons.base import Skeleton


class Family:
    """A skeleton, the layout of its models' files, and how many of them are loaded."""

    def __init__(self, digest: str, skeleton: Skeleton, layout: Layout) -> None:
        self.digest = digest
        self.skeleton = skeleton
        self.layout = layout
        self.models = 0


families: Final = InUse[Family]()
"""Of this process."""
