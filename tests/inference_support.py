"""Bars of a small market, and a small real model of it in the registry."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import msgspec
import pyarrow as pa
from confluent_kafka import Message, Producer

from streamforge.contracts import Contracts
from streamforge.gnn.features import FeatureConfig, features_of
from streamforge.gnn.graph import GraphConfig, graphs_of
from streamforge.gnn.panel import panel_of
from streamforge.gnn.registry import promote, register, store
from streamforge.gnn.training import Recipe, TrainedModel, TrainingConfig, train
from streamforge.kafka import producer_config
from streamforge.lakehouse.rows import RowDecoder
from streamforge.market.bars import INTERVAL, INTERVAL_NS
from streamforge.market.records import Bar
from streamforge.settings import Settings
from tests.pipeline_support import INSTRUMENTS, Pipeline

FIRST_NS = 1_700_000_040_000_000_000
RECIPE = Recipe(
    features=FeatureConfig(windows=(1, 3, 6), full_window=6),
    graph=GraphConfig(window=12, every=4, neighbours=2, least=6),
    training=TrainingConfig(epochs=1, hidden=4, heads=1),
)
WARM_UP = 8
"""Bars after which every instrument can be forecast."""


def make_bar(instrument: str, minute: int, *, revision: int = 0) -> Bar:
    """Return the bar of a minute: prices are made of instrument, minute and revision alone."""
    chance = random.Random(f"{instrument}/{minute}/{revision}")
    close = 100 + 5 * math.sin(minute / 7) + chance.uniform(-1, 1)
    high, low = close + chance.uniform(0.01, 1), close - chance.uniform(0.01, 1)
    price = f"{close:.4f}"
    start_ns = FIRST_NS + minute * INTERVAL_NS
    return Bar(
        instrument=instrument,
        venue=instrument.rpartition(".")[2],
        symbol=instrument.partition(".")[0].replace("-", ""),
        interval=INTERVAL,
        ts_start_ns=start_ns,
        ts_end_ns=start_ns + INTERVAL_NS,
        replay_epoch=0,
        revision=revision,
        open=price,
        high=f"{high:.4f}",
        low=f"{low:.4f}",
        close=price,
        volume=f"{chance.uniform(1, 9):.3f}",
        taker_buy_volume="0.5",
        quote_volume="100",
        vwap=price,
        trade_count=3,
        first_trade_id="1",
        last_trade_id="3",
        trades_partition=0,
        trades_start_offset=minute,
        trades_end_offset=minute + 1,
        processor_version="1",
    )


def market_minutes(minutes: Iterable[int]) -> list[Bar]:
    """Return the bars of all instruments, minute by minute."""
    return [make_bar(instrument, minute) for minute in minutes for instrument in INSTRUMENTS]


def bars_table(contracts: Contracts, bars: Iterable[Bar]) -> pa.Table:
    """Return bars as rows of their table, decoded by the writer's own decoder."""
    decoded = RowDecoder(contracts["bars"]).decode([bar_message(bar, number) for number, bar in enumerate(bars)])
    return pa.concat_tables(decoded.rows.values())


def bar_message(bar: Bar, offset: int, partition: int = 0) -> Message:
    """Return a bar as it comes from Kafka."""
    return Message(topic="bars", partition=partition, offset=offset, key=b"", value=msgspec.json.encode(bar))


def train_small(contracts: Contracts, *, interval_ns: int = INTERVAL_NS) -> TrainedModel:
    """Train a small model on some hours of the market."""
    panel = panel_of(bars_table(contracts, market_minutes(range(-400, 0))), interval_ns=interval_ns)
    features = features_of(panel, RECIPE.features)
    graphs = graphs_of(features, RECIPE.graph)
    rows = features.labelled.any(axis=1).nonzero()[0]
    return train(features, graphs, rows, RECIPE)


def make_champion(settings: Settings, model: TrainedModel) -> str:
    """Register a model and promote it; return its version."""
    version = register(settings, store(settings, model, tags={}, files={}), table_snapshots={}, tags={})
    promote(settings, version)
    return version


def produce_bars(pipeline: Pipeline, bars: Iterable[Bar | bytes]) -> None:
    """Write bars in one transaction, as the bars processor does."""
    producer = Producer(
        producer_config(pipeline.settings, transactional_id=f"{pipeline.settings.topic_prefix}bars-feeder")
    )
    producer.init_transactions(30)
    producer.begin_transaction()
    for bar in bars:
        value = bar if isinstance(bar, bytes) else msgspec.json.encode(bar)
        key = "BTC-USDT.SIM" if isinstance(bar, bytes) else bar.instrument
        producer.produce(pipeline.topic("bars"), value, key)
    producer.commit_transaction(30)
