-- Written from contracts/market-gaps.yaml by dbt/generate.py: do not edit.
SELECT gap_id, kind, venue, channel, instrument, ts_start_ns, ts_start, ts_end_ns, ts_end, id_before,
id_after, connection_id, records_dropped, bytes_dropped, detail, ts_detected_ns, ts_detected FROM {{
source('lake', 'market_gaps') }}
