"""Dead letters: a refused record with where it lay, why, and its bytes, ready for its `<topic>.dlq`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import msgspec

from streamforge import __version__
from streamforge.errors import NOT_JSON
from streamforge.market.records import DeadLetter

UNREADABLE = (*NOT_JSON, ValueError)
"""What reading a letter may raise: JSON of another program, or what is not base64."""
_SPARE_BYTES = 1_024  # record framing and headers that Kafka adds
_ENCODER = msgspec.json.Encoder()

Headers = Sequence[tuple[str, str | bytes | None]] | Mapping[str, str | bytes | None] | None


def make_dead_letter(
    *,
    topic: str,
    topic_id: str,
    partition: int,
    offset: int,
    index: int,
    reason: str,
    detail: str,
    processor: str,
    ts_ns: int,
    key: bytes | None,
    payload: bytes,
    headers: Headers,
) -> DeadLetter:
    """Return the dead letter of one record; header values are decoded with replacement."""
    return DeadLetter(
        topic=topic,
        topic_id=topic_id,
        partition=partition,
        offset=offset,
        index=index,
        reason=reason,
        detail=detail,
        processor=processor,
        processor_version=__version__,
        ts_ns=ts_ns,
        key_base64=None if key is None else base64.b64encode(key).decode(),
        payload_base64=base64.b64encode(payload).decode(),
        headers=header_texts(headers),
    )


def encode_dead_letter(letter: DeadLetter, *, max_bytes: int) -> tuple[bytes, bytes]:
    """Return key and value of a dead letter that fits `max_bytes`.

    A payload that would not fit is cut and the detail says so: a dead letter that the broker refuses would
    stop the processor at this record for ever. The whole record stays in its own topic.
    """
    key = f"{letter.topic}-{letter.partition}".encode()
    value = _ENCODER.encode(letter)
    if len(key) + len(value) + _SPARE_BYTES <= max_bytes:
        return key, value
    payload_bytes = len(letter.payload_base64) * 3 // 4
    note = f"{letter.detail[:1_000]} (payload of about {payload_bytes} bytes cut to fit the topic)"
    bare = msgspec.structs.replace(letter, detail=note, payload_base64="", headers={}, key_base64=None)
    room = max_bytes - len(key) - len(_ENCODER.encode(bare)) - _SPARE_BYTES
    kept = letter.payload_base64[: max(0, room) // 4 * 4]
    return key, _ENCODER.encode(msgspec.structs.replace(bare, payload_base64=kept))


def header_texts(headers: Headers) -> dict[str, str]:
    """Return a record's headers as text, decoded with replacement."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
    return {name: _text(value) for name, value in pairs}


def readable(data: str | bytes) -> tuple[str, str]:
    """Return bytes as a person can read them, and how: `utf-8`, or `base64` where they are no such text."""
    if isinstance(data, str):
        return data, "utf-8"
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        return base64.b64encode(data).decode(), "base64"


def _text(value: str | bytes | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else value.decode("utf-8", errors="replace")
