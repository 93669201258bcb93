"""Events to bytes."""

from __future__ import annotations

import pytest

from opencode_sse_plugin import Event
from opencode_sse_plugin.events import StoredEvent
from opencode_sse_plugin.frames import EVENT, GLOBAL, Envelope, frame, parse


def test_the_id_is_the_last_line_of_its_block() -> None:
    stored = StoredEvent(7, "evt_1", "a", None, None, None, None, "instance", b'{"type":"a"}')
    assert EVENT.batch([stored], "e") == b'data: {"type":"a"}\nid: e:7\n\n'
    assert GLOBAL.batch([stored], "e") == b'data: {"payload":{"type":"a"}}\nid: e:7\n\n'


@pytest.mark.parametrize("envelope", [EVENT, GLOBAL])
def test_a_control_frame_has_retry_data_id(envelope: Envelope[bytes]) -> None:
    block = envelope.control(Event("server.connected", {}, "evt_2"), "e:7", 1000)
    assert [line.split(b": ")[0] for line in block.split(b"\n")] == [b"retry", b"data", b"id", b"", b""]
    assert next(iter(parse(block)))[0] == "e:7"


def test_a_frame_needs_only_data() -> None:
    assert frame(b"{}") == b"data: {}\n\n"
