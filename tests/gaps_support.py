"""A retention gap that tests change as they need."""

from __future__ import annotations

from streamforge.retention_gaps import ConsumerKind, GapState, PipelineGap

GAP = PipelineGap(
    state=GapState.OPEN,
    consumer_kind=ConsumerKind.TABLE,
    consumer="market.trades",
    topic="trades",
    topic_id="id-1",
    source_epoch=1,
    source_partition=3,
    start_offset=10,
    end_offset=20,
    records_removed=None,
    detail="gone",
    detected_by="writer.0",
)
