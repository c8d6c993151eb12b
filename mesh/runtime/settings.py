"""Which model server lies beside a pod, and which models are its own.

Formats that a server has are its own in the whole mesh: its pod says so in its labels, and models of these formats, or
registered for that server by name (`rt:<name>`, as ModelMesh's controller does), require the label.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from loaders import canonical

LABEL: Final = "runtime"
"""Of a pod: the name of its server; `runtime.<format>=yes` for each format that it has."""

_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,48}[A-Za-z0-9])?")
_PORT: Final = re.compile(r"\d{1,5}")
_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\s/]+):\d{1,5}")


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """A pod's model server (KServe: a ServingRuntime)."""

    name: str
    address: str
    """Of its management: `host:port` or `unix:/path` (ServingRuntime: grpcEndpoint)."""
    data_address: str
    """Of V2 (grpcDataEndpoint)."""
    formats: tuple[str, ...]
    """In our words (supportedModelFormats)."""
    pulls: bool
    """It fetches models from their stores by itself, as ModelMesh's adapters do."""

    @classmethod
    def of(cls, runtime: str, data: str, formats: str, pulls: bool) -> RuntimeSettings:
        """From a pod's settings: `NAME=ENDPOINT`, `ENDPOINT` or "", `FORMAT,FORMAT`.

        Raises:
            ValueError: the setting's flag, and what was expected.
        """
        name, equals, endpoint = runtime.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ValueError(f"--runtime: expected NAME=ENDPOINT, found {runtime!r}")
        told = tuple(filter(None, (part.strip() for part in formats.split(","))))
        if not told or not all(map(_NAME.fullmatch, told)):
            raise ValueError(f"--runtime-formats: expected names of formats and commas, found {formats!r}")
        address = _address("--runtime", endpoint)
        data_address = _address("--runtime-data", data) if data else address
        return cls(name, address, data_address, tuple(dict.fromkeys(map(canonical, told))), pulls)

    @property
    def labels(self) -> str:
        """What the pod says of it."""
        return ",".join([f"{LABEL}={self.name}", *(f"{LABEL}.{name}=yes" for name in self.formats)])

    def serves(self, model_type: str, format_name: str) -> bool:
        """Whether models registered with this ModelInfo.type are its own; `format_name`: see `models.format_of`."""
        return model_type == f"rt:{self.name}" or format_name in self.formats


def required(model_type: str, format_name: str, labels: Iterable[str]) -> str:
    """That of the labels which tells that a server has such models; empty: none has."""
    told = {label for text in labels if LABEL in text for label in text.split(",")}
    by_name = f"{LABEL}={model_type.removeprefix('rt:')}" if model_type.startswith("rt:") else ""
    return next((label for label in (by_name, f"{LABEL}.{format_name}=yes") if label in told), "")


def _address(flag: str, endpoint: str) -> str:
    """KServe's `port:8085` and `unix:///path` are understood too."""
    host, _, port = endpoint.partition(":")
    if host == "port" and _PORT.fullmatch(port):
        return f"localhost:{port}"
    if host == "unix":
        path = "/" + port.lstrip("/")
        if len(path) > 1 and port.startswith("/"):
            return f"unix:{path}"
    elif _ADDRESS.fullmatch(endpoint):
        return endpoint
    raise ValueError(f"{flag}: expected host:port, port:8085 or unix:/path, found {endpoint!r}")
