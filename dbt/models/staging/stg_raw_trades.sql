-- Written from contracts/raw-trades.yaml by dbt/generate.py: do not edit.
SELECT instrument, venue, channel, connection_id, sequence_in_connection, ts_receive_ns, ts_receive, payload
FROM {{ source('lake', 'raw_trades') }}
