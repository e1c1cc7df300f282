{#- dbt-spark's merge, with one clause more: landed rows whose new row says that they are gone are deleted.
    `gone_when` of the model's meta is that condition. -#}
{% macro spark__get_merge_sql(target, source, unique_key, dest_columns, incremental_predicates) %}
    {%- set gone = 'made.' ~ config.get('meta', {}).get('gone_when', 'instrument is null') -%}
    merge into {{ target }} as landed
    using {{ source }} as made
    on {% for key in unique_key %}landed.{{ key }} = made.{{ key }}{{ ' and ' if not loop.last }}{% endfor %}
    when matched and {{ gone }} then delete
    when matched then update set *
    when not matched and not ({{ gone }}) then insert *
{% endmacro %}
