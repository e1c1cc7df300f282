-- Written from contracts/venue-bars.yaml by dbt/generate.py: do not edit.
SELECT instrument, venue, symbol, interval, ts_start_ns, ts_start, ts_end_ns, ts_end, open, high, low, close,
volume, ts_receive_ns, ts_receive, raw_topic_id, raw_epoch, raw_partition, raw_offset, raw_index,
parser_version FROM {{ source('lake', 'venue_bars') }}
