-- Written from contracts/trades.yaml by dbt/generate.py: do not edit.
SELECT instrument, venue, symbol, trade_id, price, size, aggressor_side, ts_event_ns, ts_event, ts_receive_ns,
ts_receive, raw_topic_id, raw_epoch, raw_partition, raw_offset, raw_index, parser_version FROM {{
source('lake', 'trades') }}
