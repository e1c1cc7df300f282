"""Check the rows of a table against its contract: PyIceberg reads the columns that a rule needs, DuckDB counts.

Rules of a contract are those of its `quality` section and two that follow from its fields: what is required is not
null, and values lie in their ranges and enumerations. Each rule is one pass over only its columns, one data file in
memory at a time; what DuckDB has to keep for uniqueness spills to disk beyond `MEMORY_LIMIT`. Rules see one table
snapshot, whole or only the newest hours of event time before the newest event, so that recordings are checked too.

A rule that is broken says how often and shows a few of the rows. Bad rows are a result, never an error.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyiceberg.expressions import AlwaysTrue, BooleanExpression, GreaterThanOrEqual
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.table import Table

from streamforge.contract_model import Contract, ContractField, QualityRule
from streamforge.errors import ConfigurationError, StreamForgeError
from streamforge.lakehouse.column_bounds import greatest
from streamforge.lakehouse.observation import event_column
from streamforge.lakehouse.query import connected, duckdb_module, quoted, sql_text
from streamforge.lakehouse.replay_plan import compare_with
from streamforge.lakehouse.replay_target import files_with, read_file

if TYPE_CHECKING:
    import duckdb

REQUIRED = "required_fields_have_values"
IN_RANGE = "values_are_in_range"
EXAMPLES = 5
MEMORY_LIMIT = "1GB"

_NS_PER_H = 3_600 * 10**9
_COUNT_ROWS = re.compile(r"\s*SELECT\s+COUNT\(\*\)\s+FROM\s+\{table\}(?P<rest>\s.*)?", re.IGNORECASE | re.DOTALL)
_COMPARISONS = MappingProxyType({"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"})
_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = MappingProxyType(
    {
        "mustBe": operator.eq,
        "mustNotBe": operator.ne,
        "mustBeGreaterThan": operator.gt,
        "mustBeGreaterOrEqualTo": operator.ge,
        "mustBeLessThan": operator.lt,
        "mustBeLessOrEqualTo": operator.le,
        "mustBeBetween": lambda found, expected: expected[0] <= found <= expected[1],
        "mustNotBeBetween": lambda found, expected: not expected[0] <= found <= expected[1],
    }
)


class Severity(StrEnum):
    """How bad it is when a rule is broken."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule about the rows of a table, ready to be counted.

    Args:
        columns: the columns that it reads.
        measure: SQL on the relation `rows` that gives one number.
        examples: SQL on `rows` that gives rows which break the rule, None where it cannot be said which.
        operator: how the number is compared, as the standard spells it.
        expected: what it is compared with.
    """

    name: str
    description: str
    severity: Severity
    columns: tuple[str, ...]
    measure: str
    examples: str | None
    operator: str
    expected: Any


@dataclass(frozen=True, slots=True)
class RuleResult:
    """What a rule found; `rows` were looked at."""

    rule: Rule
    passed: bool
    found: Any
    rows: int
    examples: tuple[dict[str, Any], ...] = ()


def rules_of(contract: Contract) -> tuple[Rule, ...]:
    """Return the rules of a contract: those of its fields, then those of its `quality` section.

    Raises:
        ConfigurationError: a rule asks for what cannot be measured; names the contract and the rule.
    """
    derived = [rule for rule in (_required(contract), _in_range(contract)) if rule is not None]
    return (*derived, *(_rule(contract, item) for item in contract.quality))


def check_rules(
    table: Table, contract: Contract, rules: Sequence[Rule], *, newest_h: float | None = None
) -> Iterator[RuleResult]:
    """Yield the result of each rule on the table's current table snapshot.

    Args:
        table: as loaded.
        contract: of the table.
        rules: some of `rules_of(contract)`.
        newest_h: only rows of so many hours before the newest event; None: every row.

    Raises:
        ConfigurationError: a rule's SQL is wrong.
        CommitError: the table cannot be read.
    """
    condition = _newest(table, contract, newest_h)
    with (
        TemporaryDirectory(prefix="streamforge-quality-") as folder,
        connected(Path(folder), memory_limit=MEMORY_LIMIT) as connection,
    ):
        for rule in rules:
            yield _checked(connection, table, contract, rule, condition)


def _checked(
    connection: duckdb.DuckDBPyConnection, table: Table, contract: Contract, rule: Rule, condition: BooleanExpression
) -> RuleResult:
    counted = _Rows(table, rule.columns, condition)
    [found] = _ask(connection, contract, rule, rule.measure, counted)[0].values()
    passed = _OPERATORS[rule.operator](found, rule.expected)
    examples: tuple[dict[str, Any], ...] = ()
    if not passed and rule.examples is not None:
        columns = tuple(dict.fromkeys([*contract.primary_key, *rule.columns]))
        sql = f"{rule.examples} LIMIT {EXAMPLES}"
        examples = tuple(_ask(connection, contract, rule, sql, _Rows(table, columns, condition)))
    return RuleResult(rule, passed, found, counted.seen, examples)


class _Rows:
    """Columns of a table as a stream of record batches, one data file at a time; counts the rows that passed."""

    def __init__(self, table: Table, columns: Sequence[str], condition: BooleanExpression) -> None:
        self._table, self._columns, self._condition = table, tuple(columns), condition
        self.seen = 0
        self.error: StreamForgeError | None = None

    def reader(self) -> pa.RecordBatchReader:
        schema = schema_to_pyarrow(self._table.schema().select(*self._columns), include_field_ids=False)
        # Nullable all of them: whether a required field has values is for a rule to find out.
        schema = pa.schema([item.with_nullable(nullable=True) for item in schema])
        return pa.RecordBatchReader.from_batches(schema, self._batches(schema))

    def _batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        try:
            for task in files_with(self._table, self._condition):
                rows = read_file(self._table, task, self._columns, self._condition).select(schema.names).cast(schema)
                self.seen += rows.num_rows
                yield from rows.to_batches()
        except StreamForgeError as error:
            self.error = error  # DuckDB would keep its text only
            raise


def _ask(
    connection: duckdb.DuckDBPyConnection, contract: Contract, rule: Rule, sql: str, rows: _Rows
) -> list[dict[str, Any]]:
    connection.register("rows", rows.reader())
    try:
        return [dict(row) for row in connection.execute(sql).to_arrow_table().to_pylist()]
    except duckdb_module().Error as error:
        if rows.error is not None:
            raise rows.error from error
        msg = f"contract {contract.id} ({contract.path}), quality rule {rule.name}: its SQL cannot be run: {error}"
        raise ConfigurationError(msg) from error
    finally:
        connection.unregister("rows")


def _newest(table: Table, contract: Contract, newest_h: float | None) -> BooleanExpression:
    column = event_column(contract)
    newest_ns = greatest(table, column) if column is not None and newest_h is not None else None
    if column is None or newest_h is None or newest_ns is None:
        return AlwaysTrue()
    return compare_with(GreaterThanOrEqual, column, newest_ns - int(newest_h * _NS_PER_H))


def _required(contract: Contract) -> Rule | None:
    names = tuple(item.name for item in contract.fields if item.required)
    if not names:
        return None
    broken = " OR ".join(f"{quoted(name)} IS NULL" for name in names)
    description = f"None of the {len(names)} required fields is null."
    return _counting(REQUIRED, description, names, broken)


def _in_range(contract: Contract) -> Rule | None:
    limits = {item.name: limit for item in contract.fields if (limit := _limit(item))}
    if not limits:
        return None
    broken = " OR ".join(f"NOT ({limit})" for limit in limits.values())
    description = f"Values of {', '.join(limits)} lie in their ranges or are among those that the contract names."
    return _counting(IN_RANGE, description, tuple(limits), broken)


def _limit(item: ContractField) -> str:
    """Return the condition that every value of a field meets, empty where there is none; null meets it."""
    column = quoted(item.name)
    parts = [
        f"{column} {sign} {float(item.options[name]) if item.type_name == 'double' else int(item.options[name])}"
        for name, sign in _COMPARISONS.items()
        if name in item.options
    ]
    if item.enum:
        parts.append(f"{column} IN ({', '.join(sql_text(value) for value in item.enum)})")
    return " AND ".join(parts)


def _counting(name: str, description: str, columns: tuple[str, ...], broken: str) -> Rule:
    """Return a rule that no row meets `broken`."""
    return Rule(
        name=name,
        description=description,
        severity=Severity.ERROR,
        columns=columns,
        measure=f"SELECT COUNT(*) FROM rows WHERE {broken}",  # noqa: S608 - made from the contract, quoted
        examples=f"SELECT * FROM rows WHERE {broken}",  # noqa: S608
        operator="mustBe",
        expected=0,
    )


def _rule(contract: Contract, item: QualityRule) -> Rule:
    where = f"contract {contract.id} ({contract.path}), quality rule {item.id}"
    if item.operator not in _OPERATORS:
        msg = f"{where}: expected one of {', '.join(_OPERATORS)}, found {item.operator!r}"
        raise ConfigurationError(msg)
    columns, measure, examples = _sql_rule(contract, item) if item.query else _metric_rule(contract, item, where)
    return Rule(
        name=re.sub(r"\W", "_", item.id),
        description=item.description,
        severity=Severity.ERROR if item.severity == Severity.ERROR else Severity.WARNING,
        columns=columns,
        measure=measure,
        examples=examples,
        operator=item.operator,
        expected=item.expected,
    )


def _sql_rule(contract: Contract, item: QualityRule) -> tuple[tuple[str, ...], str, str | None]:
    query = item.query or ""
    words = set(re.findall(r"\w+", query))
    named = tuple(each.name for each in contract.fields if each.name in words)
    counts = _COUNT_ROWS.fullmatch(query)
    examples = f"SELECT * FROM rows{counts['rest'] or ''}" if counts else None  # noqa: S608
    return named or (contract.fields[0].name,), query.replace("{table}", "rows"), examples


def _metric_rule(contract: Contract, item: QualityRule, where: str) -> tuple[tuple[str, ...], str, str | None]:
    columns = tuple(item.arguments.get("properties") or ([item.field] if item.field else []))
    known = {each.name for each in contract.fields}
    if not known.issuperset(columns) or (not columns and item.metric != "rowCount"):
        msg = f"{where}: expected fields of the contract in arguments.properties, found {list(columns)}"
        raise ConfigurationError(msg)
    names = ", ".join(map(quoted, columns))
    nulls = " OR ".join(f"{quoted(name)} IS NULL" for name in columns)
    match item.metric:
        case "duplicateValues":
            # A row with a null in its key is no duplicate of another, as SQL has it.
            groups = f"SELECT {names}, COUNT(*) AS times FROM rows WHERE NOT ({nulls}) GROUP BY ALL HAVING COUNT(*) > 1"  # noqa: S608
            return columns, f"SELECT COALESCE(SUM(times - 1), 0)::BIGINT FROM ({groups})", groups  # noqa: S608
        case "nullValues":
            return columns, f"SELECT COUNT(*) FROM rows WHERE {nulls}", f"SELECT * FROM rows WHERE {nulls}"  # noqa: S608
        case "rowCount":
            return (contract.fields[0].name,), "SELECT COUNT(*) FROM rows", None
        case _:
            msg = f"{where}: metric {item.metric!r} cannot be measured; known are duplicateValues, nullValues, rowCount"
            raise ConfigurationError(msg)
