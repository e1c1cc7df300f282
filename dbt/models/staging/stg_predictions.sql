-- Written from contracts/predictions.yaml by dbt/generate.py: do not edit.
SELECT instrument, venue, symbol, ts_start_ns, ts_start, ts_end_ns, ts_end, volatility, model_name,
model_version, ts_predicted_ns, ts_predicted, market_instruments, bars_topic_id, bars_partition, bars_offset,
processor_version FROM {{ source('lake', 'predictions') }}
