"""Certificates for tests, as files: what cert-manager would mount."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import trustme

from mesh.tls import TlsFiles

HOSTS = ("localhost", "127.0.0.1")


class Authority:
    """A certificate authority, and what it issues in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._ca = trustme.CA()
        self.ca = str(folder / "ca.crt")
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, *hosts: str, name: str = "tls", until: datetime | None = None) -> tuple[str, str]:
        """Paths of a certificate for these hosts, by default loopback's, and of its key; what was there is replaced."""
        made = self._ca.issue_cert(*(hosts or HOSTS), not_after=until)
        certificate, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        made.private_key_pem.write_to_path(str(key))
        return str(certificate), str(key)

    def files(self, *, mutual: bool, name: str = "") -> TlsFiles:
        """A pod's; `name` is what its certificate is for then, and nothing else."""
        certificate, key = self.issue(*filter(None, [name]), name=name or "tls")
        return TlsFiles(cert=certificate, key=key, client_ca=self.ca if mutual else "", ca=self.ca, name=name)
