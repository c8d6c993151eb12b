"""Models on HDFS and on a hub, each from a server on loopback that answers as WebHDFS ("WebHDFS REST API") and the
Hugging Face hub ("Hub API Endpoints") document it: with redirects to other servers, which must not see secrets."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from loaders.base import LoaderError
from loaders.storage import fetch, store, web
from loaders.storage.source import Held, Storage

SECRET = "hf_the-secret"
BIG = bytes(range(256)) * 100
COMMIT = "c0ffee" * 6 + "abcd"
FILES = {"model.onnx": BIG, "sub/config.json": b"{}", "sub/a b.txt": b"text"}


@dataclass
class Asked:
    path: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


Answering = Callable[[Asked], Answer]


@contextmanager
def serving(answer: Answering) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            told = answer(Asked(unquote(url.path), query, {k.lower(): v for k, v in self.headers.items()}))
            self.send_response(told.status)
            for name, value in ({"Content-Length": str(len(told.body))} | told.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(told.body)
            if "Content-Length" in told.headers:  # another one than it has
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def as_json(body: object, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(body).encode(), headers)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "STALL_S", 5.0)
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.001)
    monkeypatch.setattr(web, "_PAUSE_S", 0.001)
    monkeypatch.setattr(fetch, "PART_BYTES", 1000)
    for name in ("HF_TOKEN", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def storage_in(tmp_path: Path, **keys: dict[str, Any]) -> Storage:
    config = tmp_path / "storage.json"
    config.write_text(json.dumps(keys))
    return Storage(tmp_path / "cache", 1 << 20, config, tmp_path)


def refusal(storage: Storage, uri: str, key: str = "") -> LoaderError:
    with pytest.raises(LoaderError) as caught:
        storage.hold(uri, key, {})
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def left(tmp_path: Path) -> list[str]:
    cache = tmp_path / "cache"
    return sorted(path.name for path in cache.iterdir() if path.name != "lock") if cache.exists() else []


def files_of(held: Held) -> dict[str, bytes]:
    root = Path(held.path)
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    held.close()
    return found


class Hub:
    """One repository, `owner/name`, private; large files are on another server."""

    def __init__(self) -> None:
        self.elsewhere = ""
        self.seen: list[Asked] = []
        self.oids = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
        self.revision: Answer | None = None

    def answer(self, asked: Asked) -> Answer:
        self.seen.append(asked)
        if asked.headers.get("authorization") != f"Bearer {SECRET}":
            return as_json({"error": "Invalid username or password."}, 401)
        if asked.path == "/api/models/owner/name/revision/main":
            return self.revision or as_json({"sha": COMMIT})
        if asked.path == f"/api/models/owner/name/tree/{COMMIT}":
            assert asked.query["recursive"] == "true"
            lines: list[dict[str, Any]] = [{"type": "directory", "path": "sub", "size": 0, "oid": "d"}]
            for name, data in FILES.items():
                lines.append({"type": "file", "path": name, "size": len(data), "oid": "g"})
                if data is BIG:
                    lines[-1]["lfs"] = {"oid": self.oids[name], "size": len(data), "pointerSize": 130}
            if "cursor" in asked.query:
                return as_json(lines[2:])
            after = f"http://{asked.headers['host']}{asked.path}?recursive=true&cursor=x"
            return as_json(lines[:2], Link=f'<{after}>; rel="next"')
        name = asked.path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
        if name not in FILES:
            return as_json({"error": "Repository not found"}, 404)
        return Answer(302, headers={"Location": f"{self.elsewhere}/{name.replace(' ', '%20')}?Signature=x"})

    def store(self, asked: Asked) -> Answer:
        assert "authorization" not in asked.headers
        data = FILES[asked.path[1:]]
        if "range" not in asked.headers:
            return Answer(200, data)
        first, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
        return Answer(206, data[int(first) : int(last) + 1])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    with serving(hub.answer) as url, serving(hub.store) as hub.elsewhere:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield hub


def test_a_repository_of_the_hub_comes_whole_and_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    assert files_of(storage.hold("hf://owner/name", "", {})) == FILES
    asked = len(hub.seen)
    assert files_of(storage.hold("hf://model/owner/name@main", "", {})) == FILES
    assert len(hub.seen) == asked + 3  # which commit it is, and two pages of what is in it


@pytest.mark.parametrize(
    ("uri", "name", "data"),
    [
        ("hf://owner/name/model.onnx", "model.onnx", BIG),
        ("hf://owner/name@main/sub/a b.txt", "a b.txt", b"text"),
        ("hf://owner/name:main/sub/config.json", "config.json", b"{}"),
    ],
)
def test_one_file_of_the_hub(hub: Hub, tmp_path: Path, uri: str, name: str, data: bytes) -> None:
    held = storage_in(tmp_path).hold(uri, "", {})
    assert (Path(held.path).name, Path(held.path).read_bytes()) == (name, data)
    held.close()


def test_a_directory_of_the_hub_and_the_token_of_a_storage_key(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    storage = storage_in(tmp_path, hub={"type": "hf", "token": SECRET})
    assert set(files_of(storage.hold("owner/name/sub", "hub", {}))) == {"config.json", "a b.txt"}
    assert "hf://owner/name@main: access is denied (Invalid username or password.)" in str(
        refusal(storage, "hf://owner/name")
    )


def test_the_environments_token_goes_to_no_hub_that_a_key_names(hub: Hub, tmp_path: Path) -> None:
    with serving(hub.store) as other:
        storage = storage_in(tmp_path, other={"type": "hf", "endpoint_url": other})
        refusal(storage, "hf://owner/name", "other")  # `store` fails if it sees a token; so does the connection then
    assert hub.seen == []


def test_what_the_hub_does_not_have_or_tells_otherwise(hub: Hub, tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    assert "there is no such object" in str(refusal(storage, "hf://owner/name/absent"))
    assert "there is no such model or revision" in str(refusal(storage, "hf://owner/other"))
    assert "expected hf://owner/name[@revision][/path]" in str(refusal(storage, "hf://owner"))
    for answer, says in (
        (as_json([]), "the hub's answer is of another form"),
        (Answer(200, b"<html>"), "the server's answer is not JSON"),
        (as_json({"error": "busy"}, 503), "status 503: busy"),
        (Answer(302, headers={"Location": "ftp://host/x"}), "what is not on the web"),
        (Answer(200, b'{"sh', {"Content-Length": "9"}), "the server's answer is not JSON"),
    ):
        hub.revision = answer
        error = refusal(storage, "hf://owner/name")
        assert says in str(error)
        assert error.retryable
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "sub//evil"])
def test_names_that_lead_elsewhere(
    hub: Hub, hadoop: tuple[Hadoop, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(FILES, name, b"evil")
    hadoop[0].files = {"user/me/m/x": b"evil"}
    storage = storage_in(tmp_path, default_hdfs={"type": "hdfs", "namenode": hadoop[1]})
    assert f"file name {name!r} is refused" in str(refusal(storage, "hf://owner/name"))
    status = Hadoop._status
    monkeypatch.setattr(Hadoop, "_status", lambda *a: status(a[0], name, b"evil") if a[1] else status(*a))
    assert f"file name {name!r} is refused" in str(refusal(storage, "hdfs://user/me/m"))
    assert left(tmp_path) == []
    assert not list(tmp_path.rglob("evil"))


def test_bytes_that_the_hub_says_are_others(hub: Hub, tmp_path: Path) -> None:
    hub.oids["model.onnx"] = "0" * 64
    error = refusal(storage_in(tmp_path), "hf://owner/name")
    assert f"model.onnx: its sha256 is {hashlib.sha256(BIG).hexdigest()}, the store says {'0' * 64}" in str(error)
    assert left(tmp_path) == []


class Hadoop:
    """A namenode and a datanode."""

    def __init__(self) -> None:
        self.datanode = ""
        self.files = {f"user/me/m/{name}": data for name, data in FILES.items()}
        self.changed = 1_700_000_000_000
        self.standby = False
        self.seen: list[Asked] = []

    def answer(self, asked: Asked) -> Answer:
        self.seen.append(asked)
        if self.standby:
            return self._exception(403, "StandbyException", "Operation category READ is not supported in state standby")
        if asked.query.get("user.name") == "nobody":
            return self._exception(403, "AccessControlException", "Permission denied: user=nobody")
        path = asked.path.removeprefix("/webhdfs/v1/")
        inside = {name[len(path) + 1 :]: data for name, data in self.files.items() if name.startswith(f"{path}/")}
        operation = asked.query["op"]
        if path not in self.files and not inside:
            return self._exception(404, "FileNotFoundException", f"File does not exist: /{path}")
        if operation == "GETFILESTATUS":
            return as_json({"FileStatus": self._status("", self.files.get(path))})
        if operation == "LISTSTATUS":
            children = {name.partition("/")[0]: data if "/" not in name else None for name, data in inside.items()}
            return as_json({"FileStatuses": {"FileStatus": [self._status(*each) for each in children.items()]}})
        assert operation == "OPEN"
        where = f"{self.datanode}/{path.replace(' ', '%20')}"
        return Answer(
            307, headers={"Location": f"{where}?offset={asked.query['offset']}&length={asked.query['length']}"}
        )

    def read(self, asked: Asked) -> Answer:
        assert "x-gateway" not in asked.headers
        start = int(asked.query["offset"])
        return Answer(200, self.files[asked.path[1:]][start : start + int(asked.query["length"])])

    def _status(self, name: str, data: bytes | None) -> dict[str, Any]:
        kind, length = ("DIRECTORY", 0) if data is None else ("FILE", len(data))
        return {"pathSuffix": name, "type": kind, "length": length, "modificationTime": self.changed}

    def _exception(self, status: int, name: str, message: str) -> Answer:
        return as_json({"RemoteException": {"exception": name, "javaClassName": name, "message": message}}, status)


@pytest.fixture
def hadoop() -> Iterator[tuple[Hadoop, str]]:
    hadoop = Hadoop()
    with serving(hadoop.answer) as url, serving(hadoop.read) as hadoop.datanode:
        yield hadoop, url


def test_hdfs_through_webhdfs(hadoop: tuple[Hadoop, str], tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    address = hadoop[1].removeprefix("http://")
    assert files_of(storage.hold(f"webhdfs://{address}/user/me/m", "", {})) == FILES
    opens = sum(asked.query["op"] == "OPEN" for asked in hadoop[0].seen)
    assert opens == 26 + 2
    assert files_of(storage.hold(f"webhdfs://{address}/user/me/m/", "", {})) == FILES
    assert sum(asked.query["op"] == "OPEN" for asked in hadoop[0].seen) == opens
    hadoop[0].changed += 1
    storage.hold(f"webhdfs://{address}/user/me/m", "", {}).close()
    assert sum(asked.query["op"] == "OPEN" for asked in hadoop[0].seen) == 2 * opens


@pytest.mark.parametrize("path", ["hdfs://user/me/m", "webhdfs://user/me/m", "hdfs://127.0.0.1:8020/user/me/m", "m"])
def test_a_storage_key_as_kserve_writes_it(hadoop: tuple[Hadoop, str], tmp_path: Path, path: str) -> None:
    key = {"type": "hdfs", "namenode": hadoop[1], "headers": json.dumps({"X-Gateway": SECRET})}
    key |= {"user_proxy": "me", "user": "svc"}
    storage = storage_in(tmp_path, hadoop=key | ({"rootpath": "/user/me"} if path == "m" else {}))
    assert files_of(storage.hold(path, "hadoop", {})) == FILES
    assert all(asked.headers["x-gateway"] == SECRET for asked in hadoop[0].seen)
    assert all((asked.query["doas"], asked.query["user.name"]) == ("me", "svc") for asked in hadoop[0].seen)


def test_the_namenode_that_is_active(hadoop: tuple[Hadoop, str], tmp_path: Path) -> None:
    standby = Hadoop()
    standby.standby = True
    with serving(standby.answer) as url:
        storage = storage_in(tmp_path, default_hdfs={"type": "hdfs", "namenode": f"{url};{hadoop[1]}"})
        assert files_of(storage.hold("hdfs://user/me/m", "", {})) == FILES
        assert standby.seen


def test_hdfs_refusals(hadoop: tuple[Hadoop, str], tmp_path: Path) -> None:
    key: dict[str, Any] = {"type": "hdfs", "namenode": hadoop[1], "token": SECRET}
    keys: dict[str, dict[str, Any]] = {
        "hadoop": key,
        "nobody": key | {"user": "nobody"},
        "kerberos": key | {"kerberos_principal": "me@REALM"},
        "tls": key | {"tls_cert": "/nowhere.pem"},
        "pem": key | {"certificate": "no certificate"},
        "line": key | {"headers": {"X-Gateway": f"{SECRET}\nX-Other: y"}},
        "bad": {"type": "hdfs", "namenode": "host:9870"},
    }
    storage = storage_in(tmp_path, **keys)
    for uri, name, says in (
        ("hdfs://user/me/m", "nobody", "access is denied (AccessControlException: Permission denied: user=nobody)"),
        ("hdfs://user/me/absent", "hadoop", "there is no such object, nor any under user/me/absent/"),
        ("hdfs://other:9870/m", "hadoop", "the storage key is for another namenode"),
        ("hdfs://m", "kerberos", "kerberos_principal is not supported"),
        ("hdfs://m", "tls", "tls_cert or tls_key cannot be used: [Errno 2] No such file or directory"),
        ("hdfs://m", "pem", "a certificate, tls_ca"),
        ("hdfs://m", "line", "a line break in a header or a token"),
        ("hdfs://m", "bad", "expected a namenode of URLs that start with http:// or https://"),
        ("hdfs://host:8020/m", "", "expected a storage key with a namenode, or webhdfs://host:port/path"),
    ):
        assert says in str(refusal(storage, uri, name))
    assert left(tmp_path) == []


def test_a_directory_that_is_in_itself(
    hadoop: tuple[Hadoop, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storage_in(tmp_path, default_hdfs={"type": "hdfs", "namenode": hadoop[1]})
    status = Hadoop._status
    monkeypatch.setattr(Hadoop, "_status", lambda hadoop, name, data: status(hadoop, "", None))
    assert "the gateway's answer is of another form" in str(refusal(storage, "hdfs://user/me/m"))


def test_a_file_that_changes_while_it_is_read(hadoop: tuple[Hadoop, str], tmp_path: Path) -> None:
    storage = storage_in(tmp_path, default_hdfs={"type": "hdfs", "namenode": hadoop[1]})
    read = hadoop[0].read

    def changing(asked: Asked) -> Answer:
        hadoop[0].changed += 1
        return read(asked)

    with serving(changing) as hadoop[0].datanode:
        assert "it was changed while it was read" in str(refusal(storage, "hdfs://user/me/m"))
    assert left(tmp_path) == []


def test_a_gateway_that_stalls_or_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "STALL_S", 0.2)
    monkeypatch.setattr(store, "RETRIES", 1)
    released = threading.Event()

    def stalling(asked: Asked) -> Answer:
        released.wait(10)
        return Answer()

    storage = storage_in(tmp_path)
    with ExitStack() as stack:
        url = stack.enter_context(serving(stalling))
        stack.callback(released.set)
        error = refusal(storage, f"webhdfs://{url.removeprefix('http://')}/m")
    assert "stalls or breaks off (timed out)" in str(error)
    assert error.retryable
    assert "cannot be reached" in str(refusal(storage, f"webhdfs://{url.removeprefix('http://')}/m"))
