{#-
    Incremental, and equal to a full refresh whatever changed. The bars as they are now are compared with those that
    landed; from the first bar of a series (instrument, interval) that is new, different or gone, the series is made
    again, going on from the state of the bar before it. Bars that are gone are rows without minutes: the merge
    deletes them (macros/merge.sql). One commit, or none of it.

    bars_now is materialised once in Spark: its parts see one table snapshot, and nothing is computed twice.
-#}
-- depends_on: {{ ref('int_bars') }}
{{ config(
    materialized='incremental',
    incremental_strategy='merge',
    unique_key=['instrument', '`interval`', 'ts_start_ns'],
    on_schema_change='fail',
    partition_by=['months(ts_start)'],
    meta={'gone_when': 'minutes = 0'},
    pre_hook=[
        "drop view if exists bars_now",
        "cache table bars_now as select * from {{ ref('int_bars') }}",
    ],
    post_hook=["uncache table if exists bars_now", "drop view if exists bars_now"],
) }}

{%- set keys = 'instrument, `interval`, ts_start_ns' %}
{%- set values = [
    'venue', 'symbol', 'ts_start', 'ts_end_ns', 'ts_end', 'open', 'high', 'low', 'close', 'volume',
    'taker_buy_volume', 'quote_volume', 'trade_count', 'minutes',
] %}
{%- set indicators = ['ema_50', 'ema_200', 'rsi_14', 'session_vwap', 'atr_30'] %}
{%- set state = [
    'bar_number', 'state_ema_50', 'state_ema_200', 'state_rise', 'state_fall', 'state_true_range',
] %}
{%- set session_start_ns = 'ts_start_ns - ts_start_ns % 86400000000000' %}

with bars as (

    select {{ keys }}, {{ values | join(', ') }}
    from bars_now
    where ts_end_ns <= (select max(last_minute_end_ns) from bars_now)

),

{%- if is_incremental() %}

landed as (

    select * from {{ this }}

),

changed as (

    select
        instrument,
        `interval`,
        min(ts_start_ns) as from_ns
    from bars
    full outer join landed using ({{ keys }})
    where not (
        struct(bars.{{ values | join(', bars.') }})
        <=> struct(landed.{{ values | join(', landed.') }})
    )
    group by instrument, `interval`

),

tail as (

    select bars.*
    from bars
    inner join changed using (instrument, `interval`)
    where ts_start_ns >= from_ns

),

resumed as (

    select
        instrument,
        `interval`,
        max_by(struct(landed.*), ts_start_ns) as last
    from landed
    inner join changed using (instrument, `interval`)
    where ts_start_ns < from_ns
    group by instrument, `interval`

),

session_bars as (

    select bars.*
    from bars
    inner join changed using (instrument, `interval`)
    where ts_start_ns >= from_ns - from_ns % 86400000000000

),

{%- else %}

tail as (

    select * from bars

),

session_bars as (

    select * from bars

),

{%- endif %}

rows_to_fold as (

    select
        {{ keys }},
        cast(high as double) as high,
        cast(low as double) as low,
        cast(close as double) as close,
        {% for name in state -%}
        cast(null as {{ 'bigint' if name == 'bar_number' else 'double' }}) as {{ name }},
        {% endfor -%}
        false as is_state
    from tail

    {%- if is_incremental() %}

    union all

    select
        instrument,
        `interval`,
        last.ts_start_ns,
        cast(last.high as double) as high,
        cast(last.low as double) as low,
        cast(last.close as double) as close,
        {% for name in state -%}
        last.{{ name }},
        {% endfor -%}
        true as is_state
    from resumed

    {%- endif %}

),

folded as (

    select *
    from indicators(table(select * from rows_to_fold) partition by (instrument, `interval`) order by ts_start_ns)

),

sessions as (

    select
        {{ keys }},
        cast(sum(quote_volume) over session as double) / cast(sum(volume) over session as double) as session_vwap
    from session_bars
    window session as (
        partition by instrument, `interval`, {{ session_start_ns }}
        order by ts_start_ns
        rows between unbounded preceding and current row
    )

)

select
    {{ keys }},
    {{ values | join(', ') }},
    {{ indicators | join(', ') }},
    {{ state | join(', ') }}
from tail
inner join folded using ({{ keys }})
inner join sessions using ({{ keys }})

{%- if is_incremental() %}

union all

select
    {{ keys }},
    {% for name in values if name != 'minutes' -%}
    null as {{ name }},
    {% endfor -%}
    0 as minutes,
    {% for name in indicators + state -%}
    null as {{ name }}{{ ',' if not loop.last }}
    {% endfor -%}
from landed
left anti join bars using ({{ keys }})

{%- endif %}
