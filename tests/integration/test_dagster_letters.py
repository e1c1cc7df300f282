"""Dead letters in Dagster, run for real: counted, warned of, and redriven from the launchpad's form."""

from __future__ import annotations

import uuid
from pathlib import Path

import dagster as dg
import pytest

from assets.letters import LETTERS_KEY
from orchestration import letters
from streamforge.lakehouse.catalog import open_catalog
from streamforge.settings import Settings
from tests.dagster_support import Jobs, with_platform
from tests.letters_support import LETTER_TOPICS, PLANTED, plant_letters, raw_messages
from tests.pipeline_support import RawFrame, make_pipeline
from tests.replay_support import BTC, forgetful, frames, land, rows_of, snapshot_ids

pytestmark = pytest.mark.integration


def check(jobs: Jobs) -> dg.AssetCheckEvaluation:
    job = jobs.definitions.resolve_job_def("check_dead_letters")
    [found] = job.execute_in_process(instance=jobs.instance).get_asset_check_evaluations()
    return found


def observed(jobs: Jobs) -> dict[str, object]:
    assert jobs.run("observe_dead_letters").success
    [record] = jobs.instance.fetch_observations(LETTERS_KEY, limit=1).records
    assert record.asset_observation is not None
    return {name: value.value for name, value in record.asset_observation.metadata.items()}


def test_open_letters_warn_until_the_job_has_redriven_them(broker_settings: Settings, tmp_path: Path) -> None:
    pipeline = make_pipeline(broker_settings, tmp_path, f"t{uuid.uuid4().hex[:8]}.", LETTER_TOPICS)
    land(pipeline, [*frames(BTC, range(4)), RawFrame(BTC, b"{")], parse=forgetful(lambda trade: trade.trade_id == "2"))
    definitions = with_platform(letters.definitions(pipeline.contracts), pipeline.settings, pipeline.contracts)
    with dg.instance_for_test() as instance:
        jobs = Jobs(definitions, instance)
        assert check(jobs).passed
        records = raw_messages(pipeline)
        plant_letters(pipeline, [records[2]], times=2)
        plant_letters(pipeline, [records[4]], reason="malformed_json")
        warned = check(jobs)
        assert (warned.passed, warned.severity) == (False, dg.AssetCheckSeverity.WARN)
        assert f"1 of {pipeline.topic('raw-trades')}: {PLANTED} by parser" in (warned.description or "")
        seen = observed(jobs)
        assert [seen[name] for name in ("letters", "open", "redriven", "discarded")] == [2, 2, 0, 0]

        snapshots = snapshot_ids(pipeline)
        dry = jobs.run("redrive")
        assert dry.success, dry.failure
        assert [dry.metadata[name] for name in ("dry_run", "landed", "refused", "recorded")] == [True, 1, 1, 0]
        assert snapshot_ids(pipeline) == snapshots, "a dry run, which is the default, made a commit"

        done = jobs.run("redrive", {"dry_run": False, "reason": PLANTED})
        assert done.success, done.failure
        assert [done.metadata[name] for name in ("letters", "landed", "recorded", "committed")] == [1, 1, 1, True]
        assert [row["trade_id"] for row in rows_of(pipeline)] == ["0", "1", "2", "3"]
        assert observed(jobs)["redriven"] == 1
        assert not check(jobs).passed, "the other letter is open"

        unknown = jobs.run("redrive", {"ids": ["feed"]})
        assert (unknown.success, unknown.error) == (False, "ConfigurationError")

        open_catalog(pipeline.settings).drop_table((pipeline.settings.namespace, "trades"))
        missing = jobs.run("redrive", {"dry_run": False})
        assert (missing.success, missing.error) == (False, "TableMissingError")
        assert "table market.trades does not exist: `streamforge contracts apply` creates it" in missing.failure
        assert [observed(jobs)[name] for name in ("open", "redriven")] == [1, 1], "no letter is decided"
