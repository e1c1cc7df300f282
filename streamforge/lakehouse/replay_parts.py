"""A replay in parts that add up, one topic-partition after the other: memory is that of the largest one.

A part is what `make_plan` and `write_remade` do for the ranges of one topic-partition. Its index (60 bytes a row) is
let go of when it is planned and made again when it is written, so a whole table can be made anew. All parts are made on
one table snapshot and land in one commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter

import pyarrow as pa
from pyiceberg.manifest import DataFile
from pyiceberg.table import FileScanTask, Table

from streamforge.lakehouse.content_hash import ContentHash
from streamforge.lakehouse.replay_plan import Counts, Lineage, Plan, RowIndex, TouchedFile, merged_ranges
from streamforge.lakehouse.replay_run import (
    IN_PROCESS,
    DataFiles,
    check_repeated,
    index_rows,
    make_plan,
    write_kept,
    write_remade,
)
from streamforge.lakehouse.replay_target import Progress, Target
from streamforge.offsets import OffsetRange, total_records


class ByTopicPartition:
    """Both passes in this process, with the memory of one topic-partition."""

    name = IN_PROCESS.name

    def plan(self, target: Target, table: Table, ranges: Sequence[OffsetRange], progress: Progress) -> Plan:
        """Compare as `make_plan` does, topic-partition by topic-partition.

        Raises:
            StreamForgeError: as for `make_plan`.
        """
        empty = RowIndex(target.lineage, [], [])
        parts = [
            replace(make_plan(target, table, part, hear), index=empty) for part, hear in _parts_of(ranges, progress)
        ]
        return merged_plan(target.lineage, parts)

    def write(self, target: Target, table: Table, plan: Plan, commit_id: str, progress: Progress) -> list[DataFile]:
        """Write as `write_files` does.

        Raises:
            StreamForgeError: as for `write_files`.
        """
        files, made = DataFiles(target, table), ContentHash()
        write_kept(files, plan)
        for part, hear in _parts_of(plan.ranges, progress):
            own = replace(plan, ranges=tuple(part))
            own = replace(own, index=index_rows(target, table, own))
            made += write_remade(files, own, commit_id, hear)
        check_repeated(plan, made)
        return files.closed()


def merged_plan(lineage: Lineage, plans: Sequence[Plan]) -> Plan:
    """Return the plan for all ranges of `plans`, which were made on one table snapshot for disjoint topic-partitions.

    Its index is empty: that is for the pass that writes, and each part makes its own.
    """
    first = plans[0]
    tasks: dict[str, FileScanTask] = {}
    rows_in_ranges: dict[str, int] = {}
    dropped: dict[str, int] = {}
    for plan in plans:
        for each in plan.touched:
            path = each.task.file.file_path
            tasks.setdefault(path, each.task)
            rows_in_ranges[path] = rows_in_ranges.get(path, 0) + each.rows_in_ranges
        for reason, count in plan.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    added = [plan.added for plan in plans if plan.added is not None]
    return replace(
        first,
        ranges=merged_ranges(each for plan in plans for each in plan.ranges),
        touched=tuple(TouchedFile(task, rows_in_ranges[path]) for path, task in tasks.items()),
        kept_rows=sum(task.file.record_count - rows_in_ranges[path] for path, task in tasks.items()),
        counts=sum((plan.counts for plan in plans), Counts()),
        hash_now=sum((plan.hash_now for plan in plans), ContentHash()),
        hash_after=sum((plan.hash_after for plan in plans), ContentHash()),
        dropped=dropped,
        index=RowIndex(lineage, [], []),
        added=pa.concat_tables(added) if added else None,
        from_table=merged_ranges(each for plan in plans for each in plan.from_table),
    )


def _parts_of(ranges: Sequence[OffsetRange], progress: Progress) -> Iterator[tuple[list[OffsetRange], Progress]]:
    """Yield the ranges of each topic-partition, and who hears of it as a part of the whole."""
    before, total = 0, total_records(ranges)
    for _, group in groupby(ranges, attrgetter("topic_partition")):
        part = list(group)
        yield part, _Shifted(progress, before, total)
        before += total_records(part)


class _Shifted:
    def __init__(self, progress: Progress, before: int, total: int) -> None:
        self._progress, self._before, self._total = progress, before, total

    def __call__(self, stage: str, done: int, _total: int) -> None:
        self._progress(stage, self._before + done, self._total)
