"""Certificates of servers and clients: read from files, and read again when the files change."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_RELOAD_S: Final = 10.0
_VALIDITY: Final = re.compile(
    rb"\x30.(?:\x17\x0d\d{12}|\x18\x0f\d{14})Z(?:\x17\x0d(\d{12})|\x18\x0f(\d{14}))Z", re.DOTALL
)
"""A certificate's validity in DER: a sequence of two times with two or four digits of the year (RFC 5280 §4.1.2.5)."""
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2: those that RFC 9113, appendix A, does not forbid. Those of TLS 1.3 are not chosen here."""
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE")


class TlsError(ValueError):
    """One sentence that begins with the flag it is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files, empty where there is none; the flags are `--tls-<field>`."""

    cert: str = ""
    """Our certificate and those between it and its authority; as a server's and as a client's."""
    key: str = ""
    client_ca: str = ""
    """Authorities of clients, who must show a certificate then."""
    ca: str = ""
    """Authorities of servers we call; by default `client_ca`, else the system's (of grpcio, its own)."""
    name: str = ""
    """What servers' certificates must be for, if not for the host that is called; not a file."""

    def __post_init__(self) -> None:
        for given, missing in (("cert", "key"), ("key", "cert"), ("client_ca", "cert")):
            if getattr(self, given) and not getattr(self, missing):
                raise TlsError(f"{_flag(given)}: expected {_flag(missing)} with it")


class Tls:
    """Contexts made from the files as they were when they were last read."""

    def __init__(self, files: TlsFiles) -> None:
        """
        Raises:
            TlsError: a file cannot be read or used.
        """
        self.files = files
        self.pems: Mapping[str, bytes] = {}
        """The files by field of `TlsFiles`; another object whenever they have changed."""
        self.calling: ssl.SSLContext
        """For a client's next connection."""
        self._newest: ssl.SSLContext
        self.reload()
        self.accepting = self._newest
        """For a server, for good: each handshake takes the newest files (ssl.SSLContext.sni_callback)."""
        self.accepting.sni_callback = lambda connection, name, context: setattr(connection, "context", self._newest)

    def reload(self) -> bool:
        """Read the files again; whether they have changed.

        Raises:
            TlsError: they cannot be used; what was read before stays.
        """
        pems = {field.name: self._read(field.name) for field in fields(self.files) if field.name != "name"}
        authority = "ca" if self.files.ca else "client_ca"
        pems["ca"] = pems[authority]
        if pems == self.pems:
            return False
        calling = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if getattr(self.files, authority):
            self._trust(calling, authority, pems)
        else:
            calling.load_default_certs()
        accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self.files.client_ca:
            accepting.verify_mode = ssl.CERT_REQUIRED
            self._trust(accepting, "client_ca", pems)
        for context in (calling, accepting):
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(_CIPHERS)
            context.options |= ssl.OP_NO_RENEGOTIATION  # RFC 9113 §9.2.1
            context.set_alpn_protocols(["h2"])
            if self.files.cert:
                self._show(context, pems)
        self.calling, self._newest, self.pems = calling, accepting, pems
        return True

    async def follow(self) -> None:
        """Reload for ever, and log what is amiss. Connections that are open stay as they are."""
        said = ""
        while True:
            until = self.until
            expired = until is not None and until < datetime.now(UTC)
            amiss = f"{_flag('cert')}: {self.files.cert} expired at {until:%Y-%m-%d %H:%M:%SZ}" if expired else ""
            try:
                if await asyncio.to_thread(self.reload):
                    log.info("certificates have changed; new connections use them")
                    continue
            except TlsError as error:  # of two files, one may be new and the other still old
                amiss = f"changed certificates are not used: {error}"
            if amiss and amiss != said:
                log.warning("%s", amiss)
            said = amiss
            await asyncio.sleep(_RELOAD_S)

    @property
    def until(self) -> datetime | None:
        """When our certificate expires."""
        return expiry(self.pems["cert"])

    def _read(self, field: str) -> bytes:
        path = getattr(self.files, field)
        try:
            return Path(path).read_bytes() if path else b""
        except OSError as error:
            raise TlsError(f"{_flag(field)}: {path}: {error.strerror}") from None

    def _show(self, context: ssl.SSLContext, pems: Mapping[str, bytes]) -> None:
        """Use our certificate."""
        cert, key = self.files.cert, self.files.key
        if b"-----BEGIN CERTIFICATE-----" not in pems["cert"]:
            raise TlsError(f"{_flag('cert')}: {cert}: expected a certificate in PEM")
        if b"PRIVATE KEY-----" not in pems["key"]:
            raise TlsError(f"{_flag('key')}: {key}: expected a private key in PEM")
        if b"ENCRYPTED" in pems["key"]:
            raise TlsError(f"{_flag('key')}: {key}: expected a key without passphrase")
        try:
            context.load_cert_chain(cert, key)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise TlsError(f"{_flag('key')}: {key} is not the key of the certificate in {cert}") from None
            raise TlsError(f"{_flag('cert')}: {cert} and {key} cannot be used: {reason(error)}") from None
        except OSError as error:  # gone since it was read
            raise TlsError(f"{_flag('cert')}: {cert} and {key} cannot be used: {error.strerror}") from None

    def _trust(self, context: ssl.SSLContext, field: str, pems: Mapping[str, bytes]) -> None:
        """Accept certificates that these have signed."""
        try:
            context.load_verify_locations(cadata=pems[field].decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise TlsError(f"{_flag(field)}: {getattr(self.files, field)}: expected certificates in PEM") from None


def expiry(pem: bytes) -> datetime | None:
    """Until when the first certificate is valid, if there is one."""
    block = re.search(rb"-----BEGIN CERTIFICATE-----([^-]+)-----END CERTIFICATE-----", pem)
    found = _VALIDITY.search(b64decode(block[1])) if block else None
    if found is None:
        return None
    text = (found[1] or found[2]).decode()
    return datetime.strptime(text, "%y%m%d%H%M%S" if found[1] else "%Y%m%d%H%M%S").replace(tzinfo=UTC)


def reason(error: OSError) -> str:
    """Why a connection could not be made, or a file not be used, for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError):
        return "it does not speak TLS" if error.reason in _NO_TLS else f"TLS: {error.reason or error}"
    return str(error.strerror or error)


def _flag(field: str) -> str:
    return f"--tls-{field.replace('_', '-')}"
