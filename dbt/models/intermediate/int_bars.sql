-- Minutes that have no trade have no bar; neither has an interval without any.
with lengths as (

    select * from values ('5m', 300000000000), ('1h', 3600000000000) as lengths (length, length_ns)

),

minutes as (

    select
        stg_bars.*,
        length,
        length_ns,
        ts_start_ns - ts_start_ns % length_ns as first_ns
    from {{ ref('stg_bars') }} as stg_bars
    cross join lengths

)

select
    instrument,
    any_value(venue) as venue,
    any_value(symbol) as symbol,
    length as `interval`,
    first_ns as ts_start_ns,
    timestamp_micros(first_ns div 1000) as ts_start,
    first_ns + length_ns as ts_end_ns,
    timestamp_micros((first_ns + length_ns) div 1000) as ts_end,
    min_by(open, ts_start_ns) as open,
    max(high) as high,
    min(low) as low,
    max_by(close, ts_start_ns) as close,
    cast(sum(volume) as decimal(38, 18)) as volume,
    cast(sum(taker_buy_volume) as decimal(38, 18)) as taker_buy_volume,
    cast(sum(quote_volume) as decimal(38, 18)) as quote_volume,
    sum(trade_count) as trade_count,
    count(*) as minutes,
    max(ts_end_ns) as last_minute_end_ns
from minutes
group by instrument, length, length_ns, first_ns
