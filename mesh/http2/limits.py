"""What a peer may take of us, in one place, and the budget for frames that cost it nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one connection. Bytes and seconds."""

    max_message_bytes: int = 64 << 20
    """Of one message, also after decompression."""
    max_buffered_bytes: int = 128 << 20
    """Of all messages of a connection that are still incomplete."""
    max_unsent_bytes: int = 256 << 20
    """Of all answers of a connection that its peer does not take."""
    max_streams: int = 1_024
    """SETTINGS_MAX_CONCURRENT_STREAMS"""
    max_header_bytes: int = 16_384
    """SETTINGS_MAX_HEADER_LIST_SIZE: names, values and 32 for each field (RFC 9113 §6.5.2)."""
    max_block_bytes: int = 32_768
    """Of a header block as it comes, over all its CONTINUATION frames."""
    max_continuations: int = 8
    table_bytes: int = 4_096
    """SETTINGS_HEADER_TABLE_SIZE of our decoder, and the most our encoder uses."""
    stream_window: int = 4 << 20
    connection_window: int = 16 << 20
    free_frames: float = 1_000
    """Frames that make no progress (pings, settings, resets, empty data ...) a peer may send at once,"""
    free_frames_per_s: float = 50
    """and how fast it may send them for ever."""
    handshake_s: float = 10.0
    """From the connection to its first SETTINGS, and from our SETTINGS to their acknowledgement."""
    partial_s: float = 30.0
    """For the rest of a frame or of a header block."""
    stall_s: float = 60.0
    """For a peer to take some of an answer that waits for its window."""
    keepalive_s: float = 60.0
    """Silence after which the peer is pinged."""
    keepalive_timeout_s: float = 20.0


class Budget:
    """A leaky bucket of frames without progress; answers to real requests refill it.

    gRPC's own rule against ping floods is of this kind: strikes are forgotten when data is sent (gRFC A8).
    """

    __slots__ = ("_clock", "_most", "_per_s", "_since", "left")

    def __init__(self, most: float, per_s: float, clock: Callable[[], float]) -> None:
        self.left = self._most = most
        self._per_s = per_s
        self._clock = clock
        self._since = clock()

    def spend(self, cost: float = 1) -> bool:
        """Whether the peer may do this. The clock is read only when the bucket seems empty."""
        self.left -= cost
        if self.left >= 0:
            return True
        now = self._clock()
        self.left = min(self._most, self.left + (now - self._since) * self._per_s)
        self._since = now
        return self.left >= 0

    def earn(self, worth: float) -> None:
        """The connection did something useful."""
        if self.left < self._most:
            self.left = min(self._most, self.left + worth)
