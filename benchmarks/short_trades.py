"""The product `trades` cut down to seven fields, about 160 bytes a record: what the sinks are compared on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FIELDS = ("symbol", "trade_id", "price", "size", "aggressor_side", "ts_event_ns", "ts_event", "ts_receive_ns")
SYMBOLS = 64
RECEIPT_LAG_NS = 2_000_000


def write_contracts(source: Path, target: Path) -> Path:
    """Copy all contracts to `target`, that of `trades` with `FIELDS` alone, and return `target`."""
    shutil.copytree(source, target)
    path = target / "trades.yaml"
    contract: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema = contract["schema"][0]
    del schema["quality"]
    schema["properties"] = [item for item in schema["properties"] if item["name"] in FIELDS]
    for item in contract["customProperties"]:
        if item["property"] == "topic.key":
            item["value"] = ["symbol"]
    path.write_text(yaml.safe_dump(contract, sort_keys=False), encoding="utf-8")
    return target


def records(count: int, now_ns: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield key and value of `count` trades, in the form in which our producers write them."""
    for number in range(count):
        symbol = f"C{number % SYMBOLS}USDT"
        value = (
            f'{{"symbol":"{symbol}","trade_id":"{10**9 + number}",'
            f'"price":"{60_000 + number % 997}.{number % 100:02d}","size":"0.{number % 99_991 + 1:05d}",'
            f'"aggressor_side":"{"BUY" if number % 3 else "SELL"}",'
            f'"ts_event_ns":{now_ns + number},"ts_receive_ns":{now_ns + RECEIPT_LAG_NS + number}}}'
        )
        yield symbol.encode(), value.encode()
