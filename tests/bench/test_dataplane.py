"""`bench.dataplane` with the peers that need no installation. Authority: issue 3: servers are first called with a real
client and its answer compared; a figure with failed requests in it is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.dataplane import CASES, Case, markdown, run
from bench.peers import PEERS
from bench.peers.base import IDENTITY, INFER, MLP, Peer, PeerError, check, message
from bench.peers.grpc_echo import GrpcAio
from bench.preframed import Preframed, PreframedError, rate_of

FEW = (Case(IDENTITY, 64, 2, 2), Case(MLP, 64, 1, 1))


async def test_a_table_from_one_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With our own generator: h2load need not be installed. A peer that is not there is told, and how to have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        told = await run(["densemesh", "grpc-aio", "envoy"], FEW, 0.05, 1, tmp_path)
    assert f"envoy is left out; to have it: python -m venv {tmp_path}/envoy" in capfd.readouterr().err
    assert list(told["table"]) == ["densemesh", "grpc-aio"]
    assert list(told["table"]["densemesh"]) == ["291 B 2x2", "MLP 1x1"]
    assert list(told["table"]["grpc-aio"]) == ["291 B 2x2"]  # an echo runs no network
    for row in told["table"].values():
        for figure in row.values():
            assert figure["cpu_us"] > 0
            assert figure["per_second"] > 0
    lines = markdown(told).splitlines()
    assert lines[0] == "| us of CPU per request | 291 B 2x2 | MLP 1x1 |"
    assert lines[2].startswith("| densemesh, h2 | ")
    assert lines[3].startswith("| grpc.aio ")
    assert lines[3].endswith("x) |  |")


def test_ratios_are_to_ours() -> None:
    """Of servers to our hit, of proxies to our hop; what a peer does not serve stays empty."""
    figures = {"a": {"x": {"cpu_us": 20.0}, "y": {"cpu_us": 10.0}}, "b": {"x": {"cpu_us": 150.0}}}
    figures |= {"p": {"x": {"cpu_us": 30.0}}, "q": {"x": {"cpu_us": 60.0}}}
    told = {"table": figures, "versions": {name: name.upper() for name in figures}, "proxies": ["p", "q"]}
    assert markdown(told).splitlines()[2:] == [
        "| A | 20.0 | 10.0 |",
        "| B | 150 (7.5x) |  |",
        "| P | 30.0 |  |",
        "| Q | 60.0 (2.0x) |  |",
    ]


async def test_answers_are_compared(tmp_path: Path) -> None:
    """An echo is no model, and is found out."""
    echo = GrpcAio(tmp_path, tmp_path, tmp_path)
    try:
        await echo.start()
        assert await check(echo.address, IDENTITY, is_echo=True) == len(message(IDENTITY))
        with pytest.raises(PeerError, match="answers 'model' wrongly"):
            await check(echo.address, IDENTITY)
        with pytest.raises(PreframedError):
            await Preframed(echo.address, INFER, message(IDENTITY), answer_bytes=7).send(1, 1, 3, tmp_path)
    finally:
        await echo.stop()
        await echo.stop()


async def test_a_peer_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    class Broken(Peer):
        name = "broken"

        def command(self) -> list[str]:
            return ["/bin/sh", "-c", "echo no licence; exit 3"]

    with pytest.raises(PeerError, match="broken has ended; its log ends with:\nno licence"):
        await Broken(tmp_path, tmp_path, tmp_path).start()


@pytest.mark.parametrize("name", PEERS)
def test_peers_that_are_not_there_say_how_to_have_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    how = PEERS[name](tmp_path, tmp_path, tmp_path).missing()
    if name.startswith("densemesh") or name == "grpc-aio":
        assert how is None
    else:
        assert how is not None
        assert "install" in how
        assert "\n" not in how


def test_the_message_of_the_small_case_is_291_bytes_framed() -> None:
    """And that of the large one 600 KB, as in the table's headings."""
    assert len(message(IDENTITY)) + 5 == 291
    assert 600_000 < len(message(IDENTITY, CASES[4].floats)) < 605_000


H2LOAD = """
finished in 12.05ms, 8299.45 req/s, 2.69MB/s
requests: 100 total, 100 started, 100 done, {done} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: 100 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 33.33KB (34126) total, 1.09KB (1116) headers (space savings 90.79%), 28.52KB ({data}) data
"""


def test_h2loads_report() -> None:
    """As nghttp2 1.52 prints it; bytes are counted because it does not look at grpc-status."""
    assert rate_of(H2LOAD.format(done=100, failed=0, data=29_200), 100, 292) == 8299.45
    for wrong in ({"done": 99, "failed": 1, "data": 29_200}, {"done": 100, "failed": 0, "data": 29_199}):
        with pytest.raises(PreframedError):
            rate_of(H2LOAD.format(**wrong), 100, 292)
    with pytest.raises(PreframedError, match="not understood"):
        rate_of("Usage: h2load", 100, 292)
