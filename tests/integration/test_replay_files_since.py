"""Which data files landed since a table snapshot: only those, also when manifests were merged, or it is not known."""

from __future__ import annotations

from streamforge.lakehouse.manifests import MERGE_WIDTH
from streamforge.lakehouse.replay_target import files_since
from tests.table_rig import Rig


def paths_since(rig: Rig, snapshot_id: int | None) -> set[str] | None:
    """Return the paths of the files that landed since."""
    tasks = files_since(rig.fresh(), snapshot_id)
    return None if tasks is None else {task.file.file_path for task in tasks}


def paths_now(rig: Rig) -> set[str]:
    """Return the paths of every file of the table."""
    return {task.file.file_path for task in rig.fresh().scan().plan_files()}


def test_files_since_are_the_new_ones_also_in_merged_manifests(rig: Rig) -> None:
    writer = rig.writer()
    writer.claim()
    for end in range(1, MERGE_WIDTH):
        writer.land(end)
    before = writer.table.metadata.current_snapshot_id
    assert before is not None
    old = {each.manifest_path for each in writer.table.snapshots()[-1].manifests(writer.table.io)}
    known = paths_now(rig)
    assert paths_since(rig, before) == set()
    for end in (MERGE_WIDTH, MERGE_WIDTH + 1, MERGE_WIDTH + 2):
        writer.land(end)
    now = {each.manifest_path for each in writer.table.snapshots()[-1].manifests(writer.table.io)}
    assert not old <= now, "the test needs a merge between"
    assert paths_since(rig, before) == paths_now(rig) - known
    assert paths_since(rig, None) == paths_now(rig)


def test_files_since_a_snapshot_out_of_reach_are_not_known(rig: Rig) -> None:
    writer = rig.writer()
    writer.claim()
    before = writer.land(1).snapshot_id
    writer.land(2)
    writer.land(3)
    rig.expire_all_but_last()
    assert paths_since(rig, before) is None
