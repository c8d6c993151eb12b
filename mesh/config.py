"""One pod's configuration: one frozen object, built once from flags, environment and file, and checked in sentences.

Each field is a flag of `densemesh serve`, a variable `DENSEMESH_<NAME>` and a key of the TOML file.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from loaders import LOADERS
from loaders.memory.buffers import BUFFER_BYTES
from loaders.memory.device import DEVICES, open_device
from loaders.memory.store import Store
from mesh.frontends import FRONTENDS
from mesh.registry import REGISTRIES
from mesh.runtime.settings import RuntimeSettings
from mesh.tls import Tls, TlsError, TlsFiles
from placement import labels
from placement.limits import HostMode
from placement.policies import POLICIES

_UNITS: Final = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B?)", re.IGNORECASE)

MAX_BYTES: Final = 1 << 50
DEFAULT_CAPACITY: Final = "2GiB"
_MAX_PATH_BYTES: Final = 107
"""Of a Unix socket (unix(7), sun_path)."""

_CODE: Final = sorted(
    {name for entry in LOADERS.values() for name in (*entry.runs_code.values(), entry.may_run) if name}
)


def parse_bytes(text: str) -> int:
    """Bytes from `1073741824`, `2GiB`, `1.5 GB`.

    Raises:
        ValueError: says what was expected.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = next((u for u in _UNITS if match and u.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"expected a size such as 512MiB or 2GiB, found {text!r}")
    size_bytes = int(float(match[1]) * _UNITS[unit])
    if not 0 < size_bytes <= MAX_BYTES:
        raise ValueError(f"expected a size of at least 1 byte and at most 1024 TiB, found {text!r}")
    return size_bytes


def format_bytes(size_bytes: int) -> str:
    """`1.5 GiB`, for people."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _setting(default: Any, explanation: str) -> Any:
    return field(default=default, metadata={"help": explanation})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A pod's settings. Sizes are text with a unit, so that they print as they were given."""

    models: str = _setting("", "Model repository whose models are registered at start.")
    registry: str = _setting("memory://", "Where pods meet: memory:// or etcd://host:port[,host:port]/prefix.")
    pod_id: str = _setting("", "This pod's name in the mesh; by default the host's name and the gRPC port.")
    host: str = _setting("0.0.0.0", "Address to listen on.")
    grpc_port: int = _setting(8033, "Port for V2 and management gRPC; 0 takes a free one.")
    metrics_port: int = _setting(2112, "Port for Prometheus; 0 takes a free one.")
    uds: str = _setting("", "Unix socket on which gRPC is served as well, in plaintext.")
    tls_cert: str = _setting("", "PEM certificate with its chain: gRPC is served over TLS only.")
    tls_key: str = _setting("", "PEM private key of --tls-cert, without passphrase.")
    tls_client_ca: str = _setting("", "PEM authorities that must have signed clients' certificates (mutual TLS).")
    tls_ca: str = _setting("", "PEM authorities of other pods' certificates; --tls-client-ca, or the system's.")
    tls_name: str = _setting("", "Name in other pods' certificates, if it is not the host they are reached at.")
    advertise: str = _setting("", "host:port at which other pods reach this one; found out by default.")
    labels: str = _setting("", "What kind of pod this is, and where: gpu=h200,zone=a,node=n1.")
    capacity: str = _setting("", "Memory that loaded models may hold; by default the --runtime's, or 2GiB.")
    device: str = _setting("cpu", f"Where models run whose weights can be moved: cpu, {', '.join(DEVICES)}; cuda:1.")
    device_memory: str = _setting("", "What models may hold of --device; taken at start, in place of --capacity.")
    host_memory: str = _setting("", "Memory beside it for models that the device has no room for; by default none.")
    host_mode: str = _setting("exclusive", "What lies there: only what the device has not, or (inclusive) that too.")
    runtime: str = _setting("", "Model server with ModelMesh's runtime SPI: NAME=host:port or NAME=unix:/path.")
    runtime_data: str = _setting("", "Where it serves V2 gRPC, if not there: host:port or unix:/path.")
    runtime_formats: str = _setting("", "Formats that it serves, e.g. tensorflow,tensorrt; the mesh leaves them to it.")
    runtime_pulls: bool = _setting(False, "It fetches models from stores by itself, as ModelMesh's adapters can.")
    policy: str = _setting("slo_density", f"Eviction policy: {', '.join(POLICIES)}.")
    cache_dir: str = _setting("", "Where models from object stores are kept; by default densemesh in the user's cache.")
    cache_size: str = _setting("", "Disk that they may take; by default a third of what is free at start.")
    prepare: bool = _setting(
        True, "Convert models to what serves them faster, in the background, and keep that on disk."
    )
    prepared_size: str = _setting(
        "", "Disk that it may take, below --cache-dir; by default a third of what is free at start."
    )
    storage_config: str = _setting("", "Storage keys: a directory with a JSON file for each, or one JSON file of all.")
    pvc_root: str = _setting("/pvc_mounts", "Directory in which pvc:// claims are mounted by name.")
    load_slots: int = _setting(2, "Models that load at once.")
    load_timeout_s: float = _setting(90.0, "How long a model may take to load; its slot is another's then.")
    run_threads: int = _setting(os.cpu_count() or 1, "Threads that run models.")
    allow_code: str = _setting("", f"Files that may run their author's code: any of {','.join(_CODE)}.")
    preload: str = _setting("", "Formats whose framework is imported before serving, e.g. onnx,sklearn.")
    frontend: str = _setting("h2", f"What serves gRPC: {', '.join(FRONTENDS)}.")
    max_message: str = _setting("64MiB", "Largest request accepted.")
    request_timeout_s: float = _setting(120.0, "Deadline of requests that come without one.")
    drain_timeout_s: float = _setting(20.0, "How long a pod may take to go; half of it for loads elsewhere.")
    lease_ttl_s: float = _setting(15.0, "How long the mesh waits before it gives a silent pod up.")
    log_level: str = _setting("INFO", "DEBUG, INFO, WARNING or ERROR.")

    @property
    def capacity_bytes(self) -> int | None:
        """None: not told."""
        told = self.capacity or self.device_memory
        return parse_bytes(told) if told else None

    def open_store(self) -> Store | None:
        """The memory of the device and what lies beside it; None: the pod's models are in the process's own.

        Raises:
            LoaderError: there is no such device, or not that much memory.
        """
        if self.device == "cpu":
            return None
        host_bytes = parse_bytes(self.host_memory) if self.host_memory else 0
        return Store(open_device(self.device, parse_bytes(self.device_memory), host_bytes + 2 * BUFFER_BYTES))

    def _device_fault(self) -> str | None:
        kind = self.device.partition(":")[0]
        if self.device != "cpu" and (kind not in DEVICES or not re.fullmatch(r"[a-z]+|cuda:[0-9]{1,3}", self.device)):
            return f"--device: expected cpu, {', '.join(DEVICES)} or cuda:NUMBER, found {self.device!r}"
        for name, told in (("device-memory", self.device_memory), ("host-memory", self.host_memory)):
            if told and self.device == "cpu":
                return f"--{name}: expected --device with it"
        if self.device == "cpu":
            return None
        if not self.device_memory:
            return "--device-memory: expected a size, which --device takes at start"
        if self.capacity or self.runtime:
            return f"--device: expected no {'--capacity' if self.capacity else '--runtime'} with it"
        return None

    @property
    def runtime_settings(self) -> RuntimeSettings | None:
        """The model server, if there is one.

        Raises:
            ValueError: names the flag and what was expected.
        """
        if not self.runtime:
            for flag, told in (("--runtime-data", self.runtime_data), ("--runtime-formats", self.runtime_formats)):
                if told:
                    raise ValueError(f"{flag}: expected --runtime with it")
            return None
        return RuntimeSettings.of(self.runtime, self.runtime_data, self.runtime_formats, self.runtime_pulls)

    @property
    def cache_path(self) -> Path:
        if self.cache_dir:
            return Path(self.cache_dir).absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")).absolute() / "densemesh"

    @property
    def cache_bytes(self) -> int | None:
        """None: a third of what is free."""
        return parse_bytes(self.cache_size) if self.cache_size else None

    @property
    def prepared_bytes(self) -> int | None:
        """None: a third of what is free."""
        return parse_bytes(self.prepared_size) if self.prepared_size else None

    @property
    def max_message_bytes(self) -> int:
        return parse_bytes(self.max_message)

    @property
    def allowed_code(self) -> frozenset[str]:
        return _names(self.allow_code)

    @property
    def preloaded(self) -> frozenset[str]:
        return _names(self.preload)

    def open_tls(self) -> Tls | None:
        """The certificates, if any are configured.

        Raises:
            TlsError: they cannot be used; says why in a sentence.
        """
        files = TlsFiles(
            cert=self.tls_cert, key=self.tls_key, client_ca=self.tls_client_ca, ca=self.tls_ca, name=self.tls_name
        )
        if not files.cert:
            for flag, value in (("--tls-ca", files.ca), ("--tls-name", files.name)):
                if value:
                    raise TlsError(f"{flag}: expected --tls-cert with it")
            return None
        return Tls(files)

    def validate(self) -> str | None:
        """The first sentence that is wrong with this configuration; None: it is fine."""
        for name, size in (
            ("capacity", self.capacity or DEFAULT_CAPACITY),
            ("device-memory", self.device_memory or DEFAULT_CAPACITY),
            ("host-memory", self.host_memory or DEFAULT_CAPACITY),
            ("max-message", self.max_message),
            ("cache-size", self.cache_size or "1GiB"),
            ("prepared-size", self.prepared_size or "1GiB"),
        ):
            try:
                parse_bytes(size)
            except ValueError as error:
                return f"--{name}: {error}"
        if self.max_message_bytes > (1 << 31) - 1:
            return f"--max-message: expected less than 2GiB, which is protobuf's own limit, found {self.max_message}"
        for name, port in (("grpc-port", self.grpc_port), ("metrics-port", self.metrics_port)):
            if not 0 <= port < 1 << 16:
                return f"--{name}: expected a port from 0 to 65535, found {port}"
        for name, number, least, most in (
            ("load-slots", self.load_slots, 1, 64),
            ("load-timeout-s", self.load_timeout_s, 0.001, 86_400),
            ("run-threads", self.run_threads, 1, 1024),
            ("request-timeout-s", self.request_timeout_s, 0.001, 86_400),
            ("drain-timeout-s", self.drain_timeout_s, 0, 86_400),
            ("lease-ttl-s", self.lease_ttl_s, 2, 600),
        ):
            if not least <= number <= most:
                return f"--{name}: expected a number from {least} to {most}, found {number}"
        scheme = self.registry.partition("://")[0]
        if "://" not in self.registry or scheme not in REGISTRIES:
            known = ", ".join(f"{scheme}://" for scheme in REGISTRIES)
            return f"--registry: expected a URL that starts with one of {known}"  # what was found may hold a password
        if self.frontend not in FRONTENDS:
            return f"--frontend: expected one of {', '.join(FRONTENDS)}, found {self.frontend!r}"
        if (fault := self._device_fault()) is not None:
            return fault
        if self.host_mode not in list(HostMode):
            return f"--host-mode: expected {' or '.join(HostMode)}, found {self.host_mode!r}"
        if self.policy not in POLICIES:
            return f"--policy: expected one of {', '.join(POLICIES)}, found {self.policy!r}"
        if unknown := self.allowed_code - set(_CODE):
            return f"--allow-code: expected any of {', '.join(_CODE)}, found {sorted(unknown)[0]!r}"
        if unknown := self.preloaded - set(LOADERS):
            return f"--preload: expected any of {', '.join(sorted(LOADERS))}, found {sorted(unknown)[0]!r}"
        if self.pod_id and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", self.pod_id):
            return f"--pod-id: expected up to 63 letters, digits, dots, dashes, underscores, found {self.pod_id!r}"
        if self.advertise and not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d{1,5}", self.advertise):
            return f"--advertise: expected host:port, found {self.advertise!r}"
        try:
            runtime = self.runtime_settings
        except ValueError as error:
            return str(error)
        try:
            labels.parse(",".join(filter(None, (self.labels, runtime.labels if runtime else ""))))
        except ValueError as error:
            return f"--labels: {error}"
        if self.models and not Path(self.models).is_dir():
            return f"--models: {self.models!r} is not a directory"
        if self.storage_config and not Path(self.storage_config).exists():
            return f"--storage-config: expected a directory or a file, found {self.storage_config!r}"
        if len(os.fsencode(self.uds)) > _MAX_PATH_BYTES:
            return f"--uds: expected a path of at most {_MAX_PATH_BYTES} bytes, found {self.uds!r}"
        try:
            self.open_tls()
        except TlsError as error:
            return str(error)
        if self.log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            return f"--log-level: expected DEBUG, INFO, WARNING or ERROR, found {self.log_level!r}"
        return None


def _names(text: str) -> frozenset[str]:
    """A comma-separated list."""
    return frozenset(filter(None, (name.strip() for name in text.split(","))))


def reachable_host(host: str, registry: str) -> str:
    """The address other pods can reach us at, when we listen on `host`: the interface that leads to the registry."""
    if host not in ("0.0.0.0", "::", ""):
        return host
    match = re.match(r"etcds?://(?:[^@/]*@)?(?:\[(?P<v6>[^\]]+)\]|(?P<name>[^:/,?]+))", registry)
    if match is None:
        return "127.0.0.1"
    try:
        family, kind, _, _, address = socket.getaddrinfo(match["v6"] or match["name"], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket sends nothing; it only chooses its own address
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
