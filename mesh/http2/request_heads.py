"""The heads of one connection's requests: what they have in common is worked out once.

Header blocks of real clients hardly ever come twice, because of deadlines and trace ids. But they begin alike, and some
end alike too: such a head is that of what is alike, with the fields in between put in.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from mesh.http2.grpc import KEYS, BadBinary, Malformed, Pair, RequestHead, pairs_of, request_head, timeout_of
from mesh.http2.hpack import Decoder, Field
from mesh.http2.limits import Limits


class RequestHeads:
    """`request_head`, quicker for requests that are much like the one before."""

    __slots__ = ("_after", "_base", "_before", "_beginning", "_end", "_keys", "_names", "_previous")

    def __init__(self) -> None:
        self._previous: list[Field] = []
        """The last fields that were unlike what was learned before."""
        self._beginning: list[Field] = []
        self._end: list[Field] = []
        self._base: RequestHead | None = None
        """The head of beginning and end, and its metadata; None: nothing is learned yet."""
        self._before: tuple[Pair, ...] = ()
        self._after: tuple[Pair, ...] = ()
        self._names: list[str] = []
        self._keys: frozenset[str] = frozenset()
        """Of a head with metadata of these names in between."""

    def __call__(self, fields: list[Field] | None) -> RequestHead:
        """Exactly what `request_head` says."""
        if fields is None:
            return request_head(None)
        if self._base is not None:
            begins, ends = len(self._beginning), len(fields) - len(self._end)
            if begins <= ends and fields[:begins] == self._beginning and fields[ends:] == self._end:
                return self._like(self._base, fields[begins:ends]) or request_head(fields)
        self._learn(fields)
        return request_head(fields)

    def _learn(self, fields: list[Field]) -> None:
        """Take what these fields and the previous ones share for what is alike, if it is a request by itself."""
        previous, self._previous = self._previous, fields
        begins = _alike(fields, previous)
        rest = fields[begins:]
        # No pseudo-header belongs to the end: after what is in between, it would be malformed (RFC 9113 §8.3).
        regular = takewhile(lambda field: field[0][:1] != b":", reversed(rest))
        ends = _alike(regular, reversed(previous[begins:]))
        beginning, end = fields[:begins], rest[len(rest) - ends :]
        base = request_head(beginning + end)
        if base.fault is None:
            self._base, self._beginning, self._end = base, beginning, end
            self._before = request_head(beginning).metadata
            self._after = base.metadata[len(self._before) :]
            self._names, self._keys = [], base.keys

    def _like(self, base: RequestHead, between: list[Field]) -> RequestHead | None:
        """The base with these fields put in; None: that is not so simple."""
        pairs: list[Pair] = []
        timeout_s = base.timeout_s
        for field in between:
            name, value = field
            key = KEYS.get(name)
            if key is not None:
                if value.isascii():
                    text = value.decode()
                    if text.isprintable() and text[:1] != " " != text[-1:]:  # it need not be remembered
                        pairs.append((key, text))
                        continue
            elif name == b"grpc-timeout" and base.timeout_s is None:
                timeout_s = timeout_of(value)
                if timeout_s is None:
                    return None
                continue
            try:
                found = pairs_of(field)
            except (Malformed, BadBinary):
                return None
            if found is None:
                return None
            pairs += found
        names = [name for name, _ in pairs]
        if names != self._names:
            self._names, self._keys = names, base.keys.union(names)
        head = RequestHead()
        head.path = base.path
        head.metadata = (*self._before, *pairs, *self._after)
        head.keys = self._keys
        head.timeout_s = timeout_s
        head.encoding = base.encoding
        head.accepts = base.accepts
        head.content_length = base.content_length
        return head


def request_decoder(limits: Limits) -> Decoder[RequestHead]:
    """For one connection."""
    return Decoder(RequestHeads(), table_bytes=limits.table_bytes, list_bytes=limits.max_header_bytes)


def _alike(some: Iterable[Field], others: Iterable[Field]) -> int:
    """How many fields are the same, from the first."""
    count = 0
    for field, other in zip(some, others, strict=False):
        if field != other:
            break
        count += 1
    return count
