{#- An indicator is null in exactly the first `bars` bars of its series. -#}
{% test null_for_the_first(model, column_name, bars) %}
select bar_number, {{ column_name }}
from {{ model }}
where (bar_number <= {{ bars }}) <> ({{ column_name }} is null)
{% endtest %}
