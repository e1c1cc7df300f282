-- Written from contracts/bars.yaml by dbt/generate.py: do not edit.
SELECT instrument, venue, symbol, interval, ts_start_ns, ts_start, ts_end_ns, ts_end, replay_epoch, revision,
open, high, low, close, volume, taker_buy_volume, quote_volume, vwap, trade_count, first_trade_id,
last_trade_id, trades_partition, trades_start_offset, trades_end_offset, processor_version FROM (SELECT *,
row_number() OVER (PARTITION BY instrument, interval, ts_start_ns ORDER BY replay_epoch DESC, revision DESC)
AS _revisions_behind FROM {{ source('lake', 'bars') }}) WHERE _revisions_behind = 1
