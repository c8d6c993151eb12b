"""What all pods agree on: models, vmodels, pods and their copies. One file per store behind one port."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.registry.base import Registry

REGISTRIES: Final = {"memory": "mesh.registry.memory", "etcd": "mesh.registry.etcd", "etcds": "mesh.registry.etcd"}
"""URL scheme to the module whose `open_url` opens it; imported on use, so that a store's client is needed only then."""


def open_registry(url: str) -> Registry:
    """Open the store that a URL names, from inside a running event loop. Nothing is sent yet.

    memory://           a store of its own, gone with the registry
    memory://name       one store per name and process
    etcd://[user:password@]host[:port][,host[:port]...]/prefix
    etcds://...         the same over TLS; ?ca=, cert=, key= (PEM files) and server_name=

    User, password, prefix and parameters are percent-decoded; the port is 2379 when left out.

    Raises:
        ValueError: the URL is malformed; one sentence that says what was expected.
        OSError: a file named in the URL cannot be read.
    """
    scheme = url.partition("://")[0]
    if "://" not in url or scheme not in REGISTRIES:
        expected = ", ".join(f"{known}://" for known in REGISTRIES)
        raise ValueError(f"a registry's URL starts with one of {expected}")
    opener: Callable[[str], Registry] = import_module(REGISTRIES[scheme]).open_url
    return opener(url)
