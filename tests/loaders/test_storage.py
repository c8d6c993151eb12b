"""Models fetched from an S3-compatible store (Amazon S3 API reference), from the web and from mounted claims, and what
their owner is told when that fails. After every failure nothing is left in the cache."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loaders.base import LoaderError
from loaders.storage import fetch, store
from loaders.storage.source import Held, Storage
from tests.loaders.object_server import ObjectServer, serving

SECRET = "wJalrXUtnFEMI-the-secret"
BIG = bytes(range(256)) * 100


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setattr(store, "STALL_S", 0.3)
    monkeypatch.setattr(store, "RETRIES", 1)
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.001)
    monkeypatch.setattr(fetch, "PART_BYTES", 1000)
    with serving() as server:
        server.objects = {"m/model.onnx": BIG, "m/sub/config.json": b"{}", "m/": b"", "one.onnx": b"one"}
        yield server


@pytest.fixture
def config(tmp_path: Path, server: ObjectServer) -> Path:
    """A storage config as a secret is mounted; edit its files."""
    folder = tmp_path / "storage-config"
    folder.mkdir()
    (folder / "minio").write_text(json.dumps(s3(server)))
    return folder


def s3(server: ObjectServer, **changes: Any) -> dict[str, Any]:
    key = {"type": "s3", "access_key_id": "AKIA", "secret_access_key": SECRET, "endpoint_url": server.url}
    return key | {"default_bucket": "b", "region": "us-east-1"} | changes


@pytest.fixture
def storage(tmp_path: Path, config: Path) -> Storage:
    return Storage(tmp_path / "cache", 1 << 20, config, tmp_path / "mounts")


def hold(storage: Storage, uri: str, key: str = "minio", **params: Any) -> Held:
    return storage.hold(uri, key, params)


def left(tmp_path: Path) -> list[str]:
    """What is in the cache beside its own lock."""
    cache = tmp_path / "cache"
    return sorted(path.name for path in cache.iterdir() if path.name != "lock") if cache.exists() else []


def refusal(storage: Storage, uri: str, key: str = "minio", **params: Any) -> LoaderError:
    with pytest.raises(LoaderError) as caught:
        hold(storage, uri, key, **params)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def zipped(**files: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def tarred(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def test_a_directory_comes_whole_in_ranges_and_is_fetched_once(server: ObjectServer, storage: Storage) -> None:
    held = hold(storage, "s3://b/m")
    assert (Path(held.path) / "model.onnx").read_bytes() == BIG
    assert (Path(held.path) / "sub" / "config.json").read_bytes() == b"{}"
    assert server.gets("m/model.onnx") == 26
    held.close()
    again = hold(storage, "s3://b/m/")
    assert again.path == held.path
    assert server.gets("m/model.onnx") == 26
    again.close()


@pytest.mark.parametrize(("path", "params"), [("m", {}), ("/m", {"bucket": "b"})])
def test_modelmesh_paths_lie_in_the_keys_bucket_or_the_one_told(
    server: ObjectServer, config: Path, storage: Storage, path: str, params: dict[str, str]
) -> None:
    (config / "minio").write_text(json.dumps(s3(server, default_bucket="none" if params else "b")))
    held = hold(storage, path, **params)
    assert (Path(held.path) / "model.onnx").read_bytes() == BIG
    held.close()


def test_google_and_azure_speak_their_own_ways(server: ObjectServer, config: Path, storage: Storage) -> None:
    # Cloud Storage's XML API lists and reads as S3 does; Azure's "Get Blob" takes the same path
    (config / "g").write_text(json.dumps({"type": "gcs", "bucket": "b", "anonymous": True, "endpoint_url": server.url}))
    azure = {"type": "azure", "container": "b", "account_name": "acct", "anonymous": True, "endpoint_url": server.url}
    (config / "a").write_text(json.dumps(azure))
    google = hold(storage, "m", "g")
    assert (Path(google.path) / "model.onnx").read_bytes() == BIG
    blob = hold(storage, "az://b/one.onnx", "a")
    assert Path(blob.path).read_bytes() == b"one"
    google.close()
    blob.close()
    assert "is for another account than 'other'" in str(
        refusal(storage, "https://other.blob.core.windows.net/b/one.onnx", "a")
    )


def test_a_new_version_is_fetched(server: ObjectServer, storage: Storage) -> None:
    old = hold(storage, "s3://b/one.onnx")
    server.objects["one.onnx"] = b"two"
    new = hold(storage, "s3://b/one.onnx")
    assert (Path(old.path).read_bytes(), Path(new.path).read_bytes()) == (b"one", b"two")
    old.close()
    new.close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_file_with_and_without_ranges(server: ObjectServer, storage: Storage, ranges: bool) -> None:
    server.ranges = ranges
    held = hold(storage, f"{server.url}/b/m/model.onnx?sig=hidden", "")
    assert Path(held.path).name == "model.onnx"
    assert Path(held.path).read_bytes() == BIG
    held.close()


def test_a_signed_url_that_allows_only_get(server: ObjectServer, storage: Storage) -> None:
    server.heads = False
    held = hold(storage, f"{server.url}/b/m/model.onnx?X-Amz-Signature=hidden", "")
    assert Path(held.path).read_bytes() == BIG
    held.close()
    server.denied = True
    error = refusal(storage, f"{server.url}/b/m/model.onnx?X-Amz-Signature=hidden", "")
    assert "access is denied (AccessDenied: Access Denied.)" in str(error)
    assert "hidden" not in str(error)
    server.denied = False
    assert "there is nothing there" in str(refusal(storage, f"{server.url}/b/absent.onnx", ""))


def test_a_whole_bucket_and_a_key_that_may_be_listed_but_not_asked_for(server: ObjectServer, storage: Storage) -> None:
    server.heads = False
    held = hold(storage, "s3://b")
    assert sorted(path.name for path in Path(held.path).iterdir()) == ["m", "one.onnx"]
    held.close()


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tgz"])
def test_archives_are_unpacked(server: ObjectServer, storage: Storage, name: str) -> None:
    files = {"top/model.onnx": BIG, "top/x/y": b"y"}
    tar = tarred(*((member(path), data) for path, data in files.items()))
    server.objects[name] = zipped(**files) if name == "a.zip" else tar
    held = hold(storage, f"s3://b/{name}")
    assert (Path(held.path) / "model.onnx").read_bytes() == BIG
    assert (Path(held.path) / "x" / "y").read_bytes() == b"y"
    held.close()


@pytest.mark.parametrize("fault", ["500", "reset", "short", "stall"])
def test_faults_that_pass_are_survived(server: ObjectServer, storage: Storage, fault: str) -> None:
    server.faults[fault] = 1
    held = hold(storage, "s3://b/m")
    assert (Path(held.path) / "model.onnx").read_bytes() == BIG
    held.close()


@pytest.mark.parametrize(("fault", "says"), [("500", "InternalError: We encountered"), ("stall", "stalls")])
def test_faults_that_stay_are_told(
    server: ObjectServer, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    server.faults[fault] = 1000
    error = refusal(storage, "s3://b/one.onnx")
    assert says in str(error)
    assert error.retryable
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("uri", "says", "retryable"),
    [
        ("s3://b/absent", "there is no such object, nor any under absent/", True),
        ("s3://none/m", "not found (NoSuchBucket: The specified bucket does not exist)", True),
        ("s3://", "names no bucket", False),
        ("s3://b/../x", "no key of an object", False),
        ("ftp://b/m", "storage scheme 'ftp' is not supported: expected one of s3://, gs://, az://", False),
    ],
)
def test_what_is_not_there(storage: Storage, tmp_path: Path, uri: str, says: str, retryable: bool) -> None:
    error = refusal(storage, uri)
    assert says in str(error)
    assert error.retryable is retryable
    assert left(tmp_path) == []


def test_denied_in_the_stores_own_words(server: ObjectServer, storage: Storage) -> None:
    server.denied = True
    error = refusal(storage, "s3://b/m")
    assert "access is denied (AccessDenied: Access Denied.)" in str(error)
    assert not error.retryable


def test_a_package_that_is_not_installed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    assert "pip install 'densemesh[storage]'" in str(refusal(storage, "s3://b/m"))


def test_missing_credentials(server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", server.url)
    assert "there are no credentials" in str(refusal(Storage(tmp_path, None, None, tmp_path), "s3://b/m", ""))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{", "'minio' is not a JSON object"),
        ("[]", "'minio' is not a JSON object"),
        ({"access_key_id": "a"}, "has access_key_id without secret_access_key"),
        ({"secret_access_key": 5}, "secret_access_key is not a string"),
        ({"verify_ssl": "maybe"}, "verify_ssl is neither true nor false"),
        ({"type": "tape"}, "expected a type of s3, gcs"),
        ({"type": "s3"}, "expected a bucket there or in storage_params"),
    ],
)
def test_storage_keys_that_cannot_be_used(config: Path, storage: Storage, value: Any, says: str) -> None:
    (config / "minio").write_text(value if isinstance(value, str) else json.dumps(value))
    assert says in str(refusal(storage, "m"))


def test_a_key_that_is_not_there_and_one_json_file_of_all(
    server: ObjectServer, tmp_path: Path, storage: Storage
) -> None:
    assert "'other' is not in the storage config" in str(refusal(storage, "m", "other"))
    assert "'../x' is not in the storage config" in str(refusal(storage, "m", "../x"))
    assert "no storage config" in str(refusal(Storage(tmp_path, None, None, tmp_path), "m"))
    whole = tmp_path / "all.json"
    whole.write_text(json.dumps({"default_s3": json.dumps(s3(server))}))
    held = hold(Storage(tmp_path / "cache", None, whole, tmp_path), "s3://b/one.onnx", "")
    assert Path(held.path).read_bytes() == b"one"
    held.close()


def test_an_owner_cannot_send_a_keys_secret_elsewhere(server: ObjectServer, config: Path, storage: Storage) -> None:
    (config / "minio").write_text(json.dumps(s3(server, endpoint_url="http://127.0.0.1:1")))
    refusal(storage, "m", endpoint_url=server.url)
    assert server.seen == []


def test_a_checksum_that_differs(server: ObjectServer, config: Path, storage: Storage, tmp_path: Path) -> None:
    server.etags["one.onnx"] = f'"{"0" * 32}"'
    error = refusal(storage, "s3://b/one.onnx")
    assert "its checksum differs from the store's ETag" in str(error)
    assert left(tmp_path) == []
    (config / "minio").write_text(json.dumps(s3(server, etag_md5=False)))
    hold(storage, "s3://b/one.onnx").close()


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_an_owner_says_that_files_have(server: ObjectServer, storage: Storage, tmp_path: Path) -> None:
    both = {"model.onnx": sha256_of(BIG).upper(), "sub/config.json": sha256_of(b"{}")}
    held = hold(storage, "s3://b/m", sha256=both)
    assert (Path(held.path) / "model.onnx").read_bytes() == BIG
    held.close()
    gets = server.gets("m/model.onnx")
    hold(storage, "s3://b/m", sha256=both).close()
    assert server.gets("m/model.onnx") == gets
    before = left(tmp_path)
    for key, data in {"m/sub/config.json": b"[]", "m/model.onnx": b"x" + BIG[1:]}.items():
        server.objects[key] = data
        assert f"its sha256 is {sha256_of(data)}, storage_params say" in str(refusal(storage, "s3://b/m", sha256=both))
        server.objects["m/sub/config.json"] = b"{}"
    assert left(tmp_path) == before


@pytest.mark.parametrize("ranges", [True, False])
def test_one_files_sha256_and_one_that_differs(
    server: ObjectServer, storage: Storage, tmp_path: Path, ranges: bool
) -> None:
    server.ranges = ranges
    url = f"{server.url}/b/m/model.onnx"
    error = refusal(storage, url, "", sha256="0" * 64)
    assert f"its sha256 is {sha256_of(BIG)}" in str(error)
    assert not error.retryable
    assert left(tmp_path) == []
    hold(storage, url, "", sha256=sha256_of(BIG)).close()


@pytest.mark.parametrize(
    ("uri", "sha256", "says"),
    [
        ("s3://b/m", "0" * 64, "neither 64 hex digits nor an object with those of each file"),
        ("s3://b/one.onnx", "0" * 63, "neither 64 hex digits"),
        ("s3://b/one.onnx", 5, "neither 64 hex digits"),
        ("s3://b/m", {"model.onnx": "0" * 64}, "'sub/config.json' is not in sha256"),
        ("s3://b/one.onnx", {"one.onnx": "0" * 64, "two": "0" * 64}, "'two' is not in the store"),
        ("/local/model.onnx", "0" * 64, "sha256 is checked when a model is fetched, which '/local/model.onnx' is not"),
    ],
)
def test_sha256_of_another_form(storage: Storage, tmp_path: Path, uri: str, sha256: Any, says: str) -> None:
    assert says in str(refusal(storage, uri, "" if uri.startswith("/") else "minio", sha256=sha256))
    assert left(tmp_path) == []


def test_what_no_pod_of_this_size_can_hold_is_not_fetched(server: ObjectServer, config: Path, tmp_path: Path) -> None:
    server.objects["a.zip"] = BIG
    small = Storage(tmp_path / "cache", 1 << 20, config, tmp_path / "mounts", len(BIG) - 1)
    error = refusal(small, "s3://b/m")
    assert str(error) == f"model.onnx has {len(BIG)} bytes; this pod holds {len(BIG) - 1} bytes"
    assert not error.retryable
    assert "cannot be unpacked" in str(refusal(small, "s3://b/a.zip"))  # what it holds is not known before
    tiny = Storage(tmp_path / "cache", 1000, config, tmp_path / "mounts")
    assert "take 25602 bytes, the model cache may have 1000" in str(refusal(tiny, "s3://b/m"))
    assert not server.gets("m/model.onnx")
    assert left(tmp_path) == []


def test_a_body_shorter_than_told(
    server: ObjectServer, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = store.Objects.read
    monkeypatch.setattr(store.Objects, "read", lambda *args: read(*args)[:-1])
    assert "2 bytes came, 3 were asked for" in str(refusal(storage, "s3://b/one.onnx"))
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("a.zip", lambda: zipped(**{"../x": b""}), "'../x' is refused"),
        ("a.zip", lambda: zipped(**{"/etc/x": b""}), "is refused"),
        ("a.zip", lambda: zipped(m=BIG)[:-40], "a.zip cannot be unpacked"),
        ("a.zip", lambda: zipped(m=bytes(80 << 20)), "a.zip unpacks to more than"),
        ("a.tgz", lambda: tarred((member("../x"), b"")), "'../x' is refused"),
        ("a.tgz", lambda: tarred((member("x", tarfile.SYMTYPE, "/etc"), b"")), "neither a file nor a directory"),
        ("a.tgz", lambda: tarred((member("x", tarfile.LNKTYPE, "/etc/passwd"), b"")), "neither a file nor"),
        ("a.tgz", lambda: tarred((member("x", tarfile.CHRTYPE), b"")), "neither a file nor a directory"),
        ("a.tgz", lambda: tarred((member("x"), b""), (member("x"), b"")), "'x' occurs twice"),
        ("a.tgz", lambda: tarred((member("x"), BIG))[:50], "a.tgz cannot be unpacked"),
        ("a.tgz", lambda: b"no archive", "a.tgz cannot be unpacked"),
    ],
)
def test_archives_that_are_refused(
    server: ObjectServer, tmp_path: Path, storage: Storage, name: str, make: Callable[[], bytes], says: str
) -> None:
    server.objects[name] = make()
    assert says in str(refusal(storage, f"s3://b/{name}"))
    assert left(tmp_path) == []


def test_archives_with_too_many_files(
    server: ObjectServer, tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaders.storage.archive.MAX_FILES", 3)
    server.objects["a.zip"] = zipped(a=b"", b=b"", c=b"", d=b"")
    assert "holds more than 3 files" in str(refusal(storage, "s3://b/a.zip"))
    assert left(tmp_path) == []


def test_a_full_disk(server: ObjectServer, tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    error = refusal(storage, "s3://b/one.onnx")
    assert str(error) == "the model cache cannot be written: No space left on device"
    assert error.retryable
    monkeypatch.undo()
    assert left(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 400 kB; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("key", ["large.onnx", "large.zip"])
def test_a_disk_that_is_full_although_the_cache_may_have_more(
    server: ObjectServer, config: Path, tiny_disk: Path, key: str
) -> None:
    large = bytes(600_000)
    server.objects[key] = zipped(m=large) if key == "large.zip" else large
    storage = Storage(tiny_disk / "cache", 1 << 20, config, tiny_disk)
    held = hold(storage, "s3://b/m")
    error = refusal(storage, f"s3://b/{key}")
    assert str(error) == "the model cache cannot be written: No space left on device"
    assert error.retryable
    assert (Path(held.path) / "model.onnx").read_bytes() == BIG
    assert len(left(tiny_disk)) == 2  # what is held and its lock
    held.close()
    storage.close()


@pytest.mark.parametrize("keys", [("x/m", "x/m/y"), ("x/m/y", "x/m")])
def test_a_name_that_is_a_file_and_a_directory(
    server: ObjectServer, storage: Storage, tmp_path: Path, keys: tuple[str, str]
) -> None:
    server.objects = dict.fromkeys(keys, b"data")
    assert "is both a file and a directory" in str(refusal(storage, "s3://b/x"))
    assert left(tmp_path) == []


def test_keys_that_lead_elsewhere(server: ObjectServer, storage: Storage, tmp_path: Path) -> None:
    for key in ("x/../../evil", "x//etc/passwd", "x/./y"):
        server.objects = {key: b"evil", "x/good": b"good"}
        assert "/x" in str(refusal(storage, "s3://b/x"))
        assert left(tmp_path) == []
    assert not list(tmp_path.rglob("evil"))


def test_claims_are_directories_and_keep_to_themselves(tmp_path: Path, storage: Storage) -> None:
    claim = tmp_path / "mounts" / "claim"
    claim.mkdir(parents=True)
    (claim / "m.onnx").write_bytes(b"m")
    (claim / "out").symlink_to(tmp_path)
    assert hold(storage, "pvc://claim/m.onnx", "").path == claim / "m.onnx"
    assert "leads out of the volume" in str(refusal(storage, "pvc://claim/out/x", ""))
    assert "'../x' is refused" in str(refusal(storage, "pvc://claim/../x", ""))
    assert "is not mounted" in str(refusal(storage, "pvc://other/x", ""))
