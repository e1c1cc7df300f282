-- Every bar of an hour is what its five-minute bars are together: first open, extremes, last close, exact sums.
with hours as (

    select * from {{ ref('market_bars') }} where `interval` = '1h'

),

fives as (

    select
        instrument,
        ts_start_ns - ts_start_ns % 3600000000000 as ts_start_ns,
        min_by(open, ts_start_ns) as open,
        max(high) as high,
        min(low) as low,
        max_by(close, ts_start_ns) as close,
        cast(sum(volume) as decimal(38, 18)) as volume,
        cast(sum(quote_volume) as decimal(38, 18)) as quote_volume,
        sum(trade_count) as trade_count,
        sum(minutes) as minutes
    from {{ ref('market_bars') }}
    where `interval` = '5m'
    group by instrument, ts_start_ns - ts_start_ns % 3600000000000

)

select instrument, ts_start_ns
from hours
left join fives using (instrument, ts_start_ns)
where not (
    struct(
        hours.open, hours.high, hours.low, hours.close, hours.volume, hours.quote_volume, hours.trade_count,
        hours.minutes
    )
    <=> struct(
        fives.open, fives.high, fives.low, fives.close, fives.volume, fives.quote_volume, fives.trade_count,
        fives.minutes
    )
)
