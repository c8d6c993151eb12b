"""HPACK's Huffman code (RFC 7541 §5.2): decoding by bytes, through a table that is filled as it is used.

A state is an inner node of the code's tree, of which there are 256. Decoding half a byte leads from a state to a state
and may put out one octet; those 4,096 steps are computed at import, and whole bytes from two of them when first met.
"""

from __future__ import annotations

from typing import Final

from mesh.http2.tables import CODE_LENGTHS

_EOS: Final = 256
_MEMO_BYTES: Final = 64
_MEMO_ENTRIES: Final = 4_096


class HuffmanError(ValueError):
    """The bits are not a string in this code."""


def _codes() -> list[int]:
    codes, code, length = [0] * len(CODE_LENGTHS), 0, 0
    for symbol in sorted(range(len(CODE_LENGTHS)), key=lambda symbol: (CODE_LENGTHS[symbol], symbol)):
        code <<= CODE_LENGTHS[symbol] - length
        length = CODE_LENGTHS[symbol]
        codes[symbol] = code
        code += 1
    return codes


_CODES: Final = _codes()


def _tree() -> list[list[int]]:
    """Inner nodes, each with its two children: another node, or `~symbol` for a leaf."""
    nodes = [[0, 0]]
    for symbol, code in enumerate(_CODES):
        node = 0
        for shift in range(CODE_LENGTHS[symbol] - 1, 0, -1):
            bit = code >> shift & 1
            if not nodes[node][bit]:
                nodes.append([0, 0])
                nodes[node][bit] = len(nodes) - 1
            node = nodes[node][bit]
        nodes[node][code & 1] = ~symbol
    return nodes


_NODES: Final = _tree()


def _half_steps() -> list[tuple[int, bytes]]:
    """For each state and four bits: the next state and what is put out; a state of -1: EOS, which is an error."""
    steps: list[tuple[int, bytes]] = []
    for state in range(len(_NODES)):
        for bits in range(16):
            node, out = state, b""
            for shift in (3, 2, 1, 0):
                node = _NODES[node][bits >> shift & 1]
                if node == ~_EOS:
                    node = -1
                    break
                if node < 0:
                    out, node = out + bytes((~node,)), 0
            steps.append((node, out))
    return steps


def _padding_states() -> frozenset[int]:
    """States in which a string may end: up to seven bits into EOS, which is all ones (§5.2)."""
    states, node = {0}, 0
    for _ in range(7):
        node = _NODES[node][1]
        states.add(node)
    return frozenset(states)


_HALF: Final = _half_steps()
_ENDS: Final = _padding_states()
_memo: Final[dict[bytes, bytes]] = {}
"""Short strings are few and come again; the same for all connections."""


class _State(dict[int, "tuple[_State, bytes]"]):
    """By byte: the next state and what is put out. All have at most 65,536 entries."""

    __slots__ = ("node",)

    def __init__(self, node: int) -> None:
        super().__init__()
        self.node = node

    def __missing__(self, byte: int) -> tuple[_State, bytes]:
        node, first = _HALF[self.node << 4 | byte >> 4]
        if node >= 0:
            node, second = _HALF[node << 4 | byte & 15]
        if node < 0:
            raise HuffmanError("EOS inside a Huffman string")
        step = self[byte] = _STATES[node], first + second
        return step


_STATES: Final = [_State(node) for node in range(len(_NODES))]


def decode(coded: bytes) -> bytes:
    """The string.

    Raises:
        HuffmanError: EOS, or padding that is longer than seven bits or not all ones.
    """
    known = _memo.get(coded)
    if known is not None:
        return known
    out: list[bytes] = []
    state, put_out = _STATES[0], out.append
    for byte in coded:
        state, octets = state[byte]
        put_out(octets)
    if state.node not in _ENDS:
        raise HuffmanError("a Huffman string ends in padding that is none")
    decoded = b"".join(out)
    if len(coded) <= _MEMO_BYTES:
        if len(_memo) >= _MEMO_ENTRIES:
            _memo.clear()
        _memo[coded] = decoded
    return decoded


def encode(text: bytes) -> bytes:
    """The string in this code, padded with ones."""
    bits = length = 0
    for octet in text:
        bits = bits << CODE_LENGTHS[octet] | _CODES[octet]
        length += CODE_LENGTHS[octet]
    pad = -length % 8
    return (bits << pad | (1 << pad) - 1).to_bytes((length + pad) // 8, "big")
