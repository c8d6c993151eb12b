"""RFC 7541: the examples of Appendix C, and every block of another implementation."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.http2 import huffman
from mesh.http2.frames import ConnectionFault, ErrorCode
from mesh.http2.hpack import Decoder, Field
from mesh.http2.hpack_encoder import Encoder, integer, literal


def decoder(table_bytes: int = 4096, list_bytes: int = 1 << 20) -> Decoder[list[Field] | None]:
    return Decoder(lambda fields: fields, table_bytes=table_bytes, list_bytes=list_bytes)


def fields(text: str) -> list[Field]:
    return [(name.encode(), value.encode()) for name, _, value in (line.partition("= ") for line in text.split("\n"))]


GET = ":method= GET\n:scheme= {}\n:path= {}\n:authority= www.example.com"
FIRST, SECOND = GET.format("http", "/"), GET.format("http", "/") + "\ncache-control= no-cache"
THIRD = GET.format("https", "/index.html") + "\ncustom-key= custom-value"
COOKIE = "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"
DATE = "Mon, 21 Oct 2013 20:13:{} GMT"
ANSWER = ":status= {}\ncache-control= private\ndate= {}\nlocation= https://www.example.com"
ANSWERS = [
    ANSWER.format(302, DATE.format(21)),
    ANSWER.format(307, DATE.format(21)),
    f":status= 200\ncache-control= private\ndate= {DATE.format(22)}\nlocation= https://www.example.com\n"
    f"content-encoding= gzip\nset-cookie= {COOKIE}",
]
EXAMPLES = {
    "C.3 requests": (
        4096,
        [
            ("828684410f7777772e6578616d706c652e636f6d", FIRST),
            ("828684be58086e6f2d6361636865", SECOND),
            ("828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565", THIRD),
        ],
    ),
    "C.4 requests, Huffman": (
        4096,
        [
            ("828684418cf1e3c2e5f23a6ba0ab90f4ff", FIRST),
            ("828684be5886a8eb10649cbf", SECOND),
            ("828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf", THIRD),
        ],
    ),
    "C.5 responses in a table of 256 bytes": (
        256,
        [
            (
                "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d546e176874"
                "7470733a2f2f7777772e6578616d706c652e636f6d",
                ANSWERS[0],
            ),
            ("4803333037c1c0bf", ANSWERS[1]),
            (
                "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d415344"
                "4a4b48514b425a584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31",
                ANSWERS[2],
            ),
        ],
    ),
    "C.6 responses, Huffman": (
        256,
        [
            (
                "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9"
                "ae82ae43d3",
                ANSWERS[0],
            ),
            ("4883640effc1c0bf", ANSWERS[1]),
            (
                "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b39"
                "60d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
                ANSWERS[2],
            ),
        ],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_appendix_c(name: str) -> None:
    table_bytes, blocks = EXAMPLES[name]
    decode = decoder(table_bytes).decode
    for block, expected in blocks:
        assert decode(bytes.fromhex(block)) == fields(expected)


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ("400a637573746f6d2d6b65790d637573746f6d2d686561646572", "custom-key= custom-header"),  # C.2.1
        ("040c2f73616d706c652f70617468", ":path= /sample/path"),  # C.2.2
        ("100870617373776f726406736563726574", "password= secret"),  # C.2.3
        ("82", ":method= GET"),  # C.2.4
    ],
)
def test_appendix_c2(block: str, field: str) -> None:
    assert decoder().decode(bytes.fromhex(block)) == fields(field)


def test_appendix_c1_integers() -> None:
    assert integer(10, 5, 0) == bytes((0b01010,))
    assert integer(1337, 5, 0) == bytes((0b11111, 0b10011010, 0b00001010))
    assert integer(42, 8, 0) == bytes((42,))


@pytest.mark.parametrize(
    "block",
    {
        "index 0": "80",
        "index beyond the table": "be",
        "name index beyond the table": "7e0161",
        "an integer without end": "ff80808080808080808001",
        "an integer cut off": "ff80",
        "a string longer than the block": "400a63",
        "a value longer than the block": "400161" + "05" + "62",
        "a literal without value": "4001" + "61",
        "Huffman padding of zeros": "4081" + "00" + "0161",
        "Huffman padding of a whole byte": "4082" + "1fff" + "0161",
        "EOS": "4084" + "ffffffff" + "0161",
        "a size update above our setting": "3fe21f",
        "a size update after a field": "8220",
        "three size updates": "20203f09",
    }.values(),
)
def test_broken_blocks_are_compression_errors(block: str) -> None:
    """RFC 9113, section 4.3: a decoding error ends the connection."""
    with pytest.raises(ConnectionFault) as raised:
        decoder().decode(bytes.fromhex(block))
    assert raised.value.code is ErrorCode.COMPRESSION_ERROR


def test_a_block_is_remembered_only_as_long_as_it_means_the_same() -> None:
    subject = decoder()
    assert subject.decode(bytes.fromhex("40016101" + "62")) == [(b"a", b"b")]
    for _ in range(3):
        assert subject.decode(b"\xbe") == [(b"a", b"b")]
    assert subject.decode(bytes.fromhex("40016101" + "63")) == [(b"a", b"c")]
    assert subject.decode(b"\xbe") == [(b"a", b"c")]
    assert subject.decode(b"\xbf\x82") == [(b"a", b"b"), (b":method", b"GET")]
    assert subject.decode(b"\x20") == []  # the table is emptied
    with pytest.raises(ConnectionFault):
        subject.decode(b"\xbe")


def test_a_beginning_is_remembered_only_as_long_as_it_means_the_same() -> None:
    subject = decoder(list_bytes=250)
    assert subject.decode(bytes.fromhex("40016101" + "62")) == [(b"a", b"b")]
    for value in (b"1", b"2", b"3"):
        block = b"\xbe\x83" + literal([(b"x", value)])
        assert subject.decode(block) == [(b"a", b"b"), (b":method", b"POST"), (b"x", value)]
    for value in (b"4", b"5"):  # blocks of which one changes the table, and is read before it does
        block = b"\xbe\x83" + bytes.fromhex("40016101") + value
        assert subject.decode(block)[2:] == [(b"a", value)]  # type: ignore[index]
    assert subject.decode(b"\xbe\x83" + literal([(b"x", b"6")])) == [(b"a", b"5"), (b":method", b"POST"), (b"x", b"6")]
    long = literal([(b"x", b"y" * 110)])
    assert subject.decode(b"\xbe\x83" + long) is not None  # 34 + 43 + 143 bytes
    assert subject.decode(b"\xbe\x83\x83" + long) is None
    with pytest.raises(ConnectionFault):
        subject.decode(b"\xbe\x83" + b"\x20")  # a size update after fields


def test_a_list_over_the_limit_keeps_the_table_right() -> None:
    subject = decoder(list_bytes=100)
    block = literal([(b"x", b"y" * 80)]) + bytes.fromhex("40016101" + "62")
    assert subject.decode(block) is None
    assert subject.decode(b"\xbe") == [(b"a", b"b")]


def test_a_bomb_of_references_is_a_list_over_the_limit() -> None:
    subject = decoder(list_bytes=16_384)
    big = b"\x40\x01a" + integer(3_900, 7, 0)
    assert subject.decode(big + b"z" * 3_900) == [(b"a", b"z" * 3_900)]
    assert subject.decode(b"\xbe" * 16_000) is None


FIELDS = st.lists(
    st.tuples(
        st.sampled_from([b":path", b"te", b"x-a", b"x-b", b"grpc-timeout", b"trace-bin"]),
        st.one_of(st.sampled_from([b"", b"/", b"trailers", b"1S"]), st.binary(max_size=300)),
    ),
    max_size=12,
)
BLOCKS = st.lists(st.tuples(FIELDS, st.booleans(), st.one_of(st.none(), st.integers(0, 4096))), max_size=20)


@given(BLOCKS)
@settings(max_examples=300, deadline=None)
def test_decoder_reads_what_another_implementation_writes(blocks: list[tuple[list[Field], bool, int | None]]) -> None:
    theirs, ours = hpack.Encoder(), decoder()
    for sent, huffman_coded, table_bytes in blocks:
        if table_bytes is not None:
            theirs.header_table_size = table_bytes
        assert ours.decode(theirs.encode(sent, huffman=huffman_coded)) == sent


@given(BLOCKS)
@settings(max_examples=300, deadline=None)
def test_encoder_writes_what_others_read(blocks: list[tuple[list[Field], bool, int | None]]) -> None:
    encoder, theirs, ours = Encoder(4096), hpack.Decoder(max_header_list_size=1 << 20), decoder()
    for sent, twice, table_bytes in blocks:
        if table_bytes is not None:
            encoder.resize(table_bytes)
        for _ in range(1 + twice):
            block = encoder.encode(sent)
            assert [tuple(field) for field in theirs.decode(block, raw=True)] == sent
            assert ours.decode(block) == sent
        assert ours.decode(literal(sent)) == sent


@given(st.binary(max_size=100))
def test_huffman_is_reversible(text: bytes) -> None:
    assert huffman.decode(huffman.encode(text)) == text


@given(st.lists(st.binary(max_size=60), max_size=8))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_fields_or_a_compression_error(blocks: list[bytes]) -> None:
    subject = decoder(list_bytes=2_000)
    fault: ConnectionFault | None = None
    for block in blocks:
        try:
            subject.decode(block)
        except ConnectionFault as raised:
            fault = raised
            break
    assert fault is None or fault.code is ErrorCode.COMPRESSION_ERROR
