"""HTTP/2 frames on the wire: RFC 9113 §4 (format), §6 (kinds), §7 (error codes)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""§3.4: what a client sends first."""

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6

FRAME_BYTES: Final = 16_384
"""§4.2: the largest payload everybody takes, and the largest we take: larger frames gained nothing when measured."""
DEFAULT_WINDOW: Final = 65_535
"""§6.9.2"""
MAX_WINDOW: Final = (1 << 31) - 1
MAX_STREAM_ID: Final = (1 << 31) - 1

HEAD: Final = struct.Struct(">HBBBL")
"""The 9 bytes of §4.1: length (16 high bits, 8 low bits), kind, flags, stream."""
MESSAGE_HEAD: Final = struct.Struct(">HBBBLBL")
"""A DATA frame's head and in it the prefix of a gRPC message: compressed flag and length."""
PREFIX: Final = 14
"""Its bytes."""
UPDATE: Final = struct.Struct(">HBBBLL")
"""A WINDOW_UPDATE: a frame's head, and the increment."""
UPDATE_BYTES: Final = 13
_SETTING: Final = struct.Struct(">HL")
_WORD: Final = struct.Struct(">L")
_TWO_WORDS: Final = struct.Struct(">LL")


class ErrorCode(IntEnum):
    """§7"""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class ConnectionFault(Exception):
    """The peer broke a rule for which the whole connection ends (§5.4.1)."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Any frame."""
    size = len(payload)
    return HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream_id) + payload


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(key, value) for key, value in values.items()))


SETTINGS_ACK: Final = frame(SETTINGS, ACK, 0)


def parse_settings(payload: bytes) -> list[tuple[int, int]]:
    """The settings in their order; the length was checked."""
    return list(_SETTING.iter_unpack(payload))


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, _WORD.pack(increment))


def rst_stream(stream_id: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream_id, _WORD.pack(code))


def goaway(last_stream_id: int, code: int, text: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, _TWO_WORDS.pack(last_stream_id, code) + text.encode()[:256])


def header_frames(stream_id: int, block: bytes, *, end_stream: bool, frame_bytes: int = FRAME_BYTES) -> bytes:
    """A header block as HEADERS and, where it does not fit, CONTINUATION (§6.10)."""
    ends = END_STREAM if end_stream else 0
    if len(block) <= frame_bytes:
        return frame(HEADERS, ends | END_HEADERS, stream_id, block)
    parts = [block[at : at + frame_bytes] for at in range(0, len(block), frame_bytes)]
    first, last = frame(HEADERS, ends, stream_id, parts[0]), frame(CONTINUATION, END_HEADERS, stream_id, parts[-1])
    return b"".join([first, *(frame(CONTINUATION, 0, stream_id, part) for part in parts[1:-1]), last])


def word(payload: bytes, at: int = 0) -> int:
    """32 bits, unsigned."""
    value: int = _WORD.unpack_from(payload, at)[0]
    return value
