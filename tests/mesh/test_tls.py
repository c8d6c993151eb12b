"""Certificates as files: what is wrong with them is told in one sentence. Authority: issue 3; mesh.tls's own words."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from mesh import tls
from mesh.config import Config
from mesh.tls import Tls, TlsError, TlsFiles, expiry
from tests.mesh.certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def encrypted(key: str) -> str:
    """The same key behind a passphrase."""
    loaded = load_pem_private_key(Path(key).read_bytes(), None)
    pem = loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    Path(key).write_bytes(pem)
    return key


def emptied(path: str) -> str:
    Path(path).write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("field", "spoil", "says"),
    [
        ("cert", lambda path, other: "/no/such", "/no/such: No such file or directory"),
        ("key", lambda path, other: "/no/such", "/no/such: No such file or directory"),
        ("client_ca", lambda path, other: "/no/such", "/no/such: No such file or directory"),
        ("ca", lambda path, other: "/", "/: Is a directory"),
        ("cert", lambda path, other: emptied(path), "expected a certificate in PEM"),
        ("key", lambda path, other: emptied(path), "expected a private key in PEM"),
        ("ca", lambda path, other: __file__, "expected certificates in PEM"),
        ("client_ca", lambda path, other: emptied(path + ".ca"), "expected certificates in PEM"),
        ("key", lambda path, other: other, "is not the key of the certificate in "),
        ("key", lambda path, other: encrypted(path), "expected a key without passphrase"),
    ],
)
def test_a_file_that_cannot_be_used(
    authority: Authority, field: str, spoil: Callable[[str, str], str], says: str
) -> None:
    files = authority.files(mutual=True)
    _, other = authority.issue("other", name="other")
    spoiled = {field: spoil(getattr(files, field), other)}
    with pytest.raises(TlsError) as error:
        Tls(replace(files, **spoiled))
    said = str(error.value)
    assert said.startswith(f"--tls-{field.replace('_', '-')}: ")
    assert says in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tls_cert": "c"}, "--tls-cert: expected --tls-key with it"),
        ({"tls_key": "k"}, "--tls-key: expected --tls-cert with it"),
        ({"tls_client_ca": "c"}, "--tls-client-ca: expected --tls-cert with it"),
        ({"tls_ca": "c"}, "--tls-ca: expected --tls-cert with it"),
        ({"tls_name": "n"}, "--tls-name: expected --tls-cert with it"),
        ({"tls_cert": "/no/such", "tls_key": "k"}, "--tls-cert: /no/such: No such file or directory"),
    ],
)
def test_a_pods_settings(settings: dict[str, Any], says: str) -> None:
    assert Config(**settings).validate() == says


def test_without_settings_there_is_no_tls() -> None:
    assert Config().open_tls() is None


async def test_a_certificate_that_has_expired_is_used_and_told_once(
    authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "_RELOAD_S", 0.0)
    certificate, key = authority.issue(until=datetime(2020, 2, 3, 4, 5, 6, tzinfo=UTC))
    following = asyncio.create_task(Tls(TlsFiles(cert=certificate, key=key)).follow())
    while not caplog.records:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    os.remove(key)
    while len(caplog.records) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    following.cancel()
    assert [record.message for record in caplog.records] == [
        f"--tls-cert: {certificate} expired at 2020-02-03 04:05:06Z",
        f"changed certificates are not used: --tls-key: {key}: No such file or directory",
    ]


@pytest.mark.parametrize("until", [datetime(2049, 12, 31, tzinfo=UTC), datetime(2050, 1, 1, 2, 3, 4, tzinfo=UTC)])
def test_until_when_a_certificate_is_valid(authority: Authority, until: datetime) -> None:
    """RFC 5280 §4.1.2.5: two digits for the year until 2049, four from then on."""
    certificate, _ = authority.issue(until=until)
    assert expiry(Path(certificate).read_bytes()) == until
    assert expiry(b"") is None
