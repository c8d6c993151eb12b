"""Message encodings of gRPC (grpc/doc/compression.md): gzip (RFC 1952) and deflate in the zlib format (RFC 1950)."""

from __future__ import annotations

import zlib
from typing import Final

_WINDOW_BITS: Final = {"gzip": 31, "deflate": 15}
_LEVEL: Final = 1
"""Bandwidth is what compression is asked for; higher levels cost several times as much for a few per cent."""


class NotCompressed(ValueError):
    """The bytes are not in the encoding."""


class TooLarge(ValueError):
    """More than the limit comes out of it."""


def decompress(message: bytes, encoding: str, most_bytes: int) -> bytes:
    """The message; never more than `most_bytes` are kept, whatever it claims.

    Raises:
        NotCompressed, TooLarge
    """
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        plain = inflater.decompress(message, most_bytes + 1)
    except zlib.error as error:
        raise NotCompressed(f"not {encoding}: {error}") from None
    if len(plain) > most_bytes:
        raise TooLarge
    if not inflater.eof or inflater.unused_data:
        raise NotCompressed(f"not {encoding}: it ends too early or too late")
    return plain


def compress(message: bytes, encoding: str) -> bytes:
    deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return deflater.compress(message) + deflater.flush()
