"""The demo: a platform on a home of its own, a market for a minute, and what became of every message.

    start       broker, topics, writer, bars, parser, market and loader, by the supervisor of `streamforge up`
    models      where asked for: load a history, retrain through Dagster (`streamforge.demo.models`)
    market      until so many events were captured and a minute is over, so that there are bars; beside it Dagster
                observes streams, tables and consumers
    landing     the market is stopped, then the loader; wait until the tables have all that the topics hold
    replay      make one offset range of `trades` again, by Dagster's job where Dagster is installed: nothing may change
    recordings  where a folder is given: the same with recorded messages, through a market and a loader of their own
    verify      compare ledger, topics and tables row by row
    dagster     wait for the jobs that ran beside all that: replay, checks of quality, the hour's bars built again

A step that fails is a problem in the report and not the end of it: what was lost is said whatever happened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from streamforge import faults
from streamforge.contracts import load_contracts
from streamforge.demo.home import is_demo_home, prepare_home
from streamforge.demo.jobs import SUCCESS, JobFigures, Jobs
from streamforge.demo.market import (
    RECORDED,
    Sent,
    paced_rate,
    recorded_home,
    with_recorded_market,
    with_synthetic_market,
)
from streamforge.demo.models import train_demo_model
from streamforge.demo.phases import Phase, PhaseClock, Watcher
from streamforge.demo.report import (
    DemoReport,
    LedgerFigures,
    ModelFigures,
    ReplayFigures,
    Verdict,
    ledger_figures,
    make_report,
    verdicts,
)
from streamforge.demo.session import Session, captured
from streamforge.errors import ProcessError, StreamForgeError
from streamforge.kafka_server import SHORT_LIVED, class_path
from streamforge.lakehouse.catalog import load_table, open_catalog
from streamforge.lakehouse.content_hash import content_hash, content_schema
from streamforge.lakehouse.kafka_reader import log_ranges
from streamforge.lakehouse.line import Line, LineState
from streamforge.lakehouse.replay import replay
from streamforge.lakehouse.table_freshness import TableAges
from streamforge.lakehouse.verify import verify_tables
from streamforge.lakehouse.verify_ledger import RawChannel, verify_ledger
from streamforge.offsets import OffsetRange
from streamforge.platform.control_plane import missing
from streamforge.platform.lifecycle import down, plan_platform, serve_on_free_ports
from streamforge.platform.plan import PlatformFiles, PlatformPlan
from streamforge.platform.supervisor import read_history
from streamforge.settings import Settings, make_folder
from streamforge.supervision import topic_of

_MARKET_MARGIN_S = 120.0
_RECORDINGS_TIMEOUT_S = 900.0
_POLL_S = 0.5
_JOBS_BESIDE_THE_MARKET = ("observe", "observe_consumers", "check_consumers")
_RUN_TIMEOUT_S = 300.0
_RATE_WITH_MODELS = 1_000.0
_HOUR_KEY = "%Y-%m-%d-%H:00"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What a demo is asked to do.

    Args:
        events: messages to capture at least.
        trades_per_s: mean rate of the simulated market over all its instruments; None: as `paced_rate` says.
        seed: of the simulated market.
        start_minutes_ago: the simulated market begins so long ago and runs fast until it is now.
        recordings_dir: folder with recorded data to replay afterwards.
        keep: leave the platform running after a good end.
        models: train a model and forecast with it.
    """

    events: int = 100_000
    trades_per_s: float | None = None
    seed: int = 7
    start_minutes_ago: float = 0.0
    recordings_dir: Path | None = None
    keep: bool = False
    models: bool = False


def run_demo(
    settings: Settings, options: DemoOptions, channels: Mapping[str, RawChannel], watcher: Watcher
) -> DemoReport | None:
    """Run a demo in the home that `settings` name; return its report, None when it was stopped before the end.

    Args:
        settings: of the demo's platform; its home is emptied.
        options: what to do.
        channels: what the loader captures, to compare it with the ledger.
        watcher: hears what is going on.

    Raises:
        ConfigurationError: the home is not a demo's.
        ProcessError: another demo is at work, or the platform did not start; nothing is left running.
        StopRequested: a stop signal came while the platform was starting; nothing is left running.
    """
    home = settings.home_path
    make_folder(home.parent)
    lock = FileLock(home.parent / f"{home.name}.lock", timeout=0)
    try:
        with lock:
            return _Demo(settings, options, channels, watcher).run()
    except Timeout as error:
        msg = f"another demo is at work in {home}. Wait for its end, or set STREAMFORGE_HOME to another folder"
        raise ProcessError(msg) from error


class _Demo:
    """One run."""

    def __init__(
        self, settings: Settings, options: DemoOptions, channels: Mapping[str, RawChannel], watcher: Watcher
    ) -> None:
        self._settings = settings
        self._options = options
        self._channels = channels
        self._watcher = watcher
        self._files = PlatformFiles(settings.home_path)
        self._contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
        self._clock = PhaseClock()
        self._problems: list[str] = []
        self._sent: list[Sent] = []
        self._ages: list[TableAges] = []
        self._verdicts: list[Verdict] = []
        self._ledger: LedgerFigures | None = None
        self._replay: ReplayFigures | None = None
        self._replay_range: OffsetRange | None = None
        self._hash_before = ""
        self._runs: list[JobFigures] = []
        self._market_since_s = 0.0
        self._trades_per_s = 0.0
        self._models: ModelFigures | None = None
        self._is_done = False

    def run(self) -> DemoReport | None:
        """Run all phases and stop what was started."""
        self._enter(Phase.START)
        if is_demo_home(self._settings.home_path):
            down(self._settings, self._watcher.tell)
        prepare_home(self._settings.home_path)
        class_path()
        keep = self._options.keep
        if not keep:
            # A broker that lives for a minute spends half of its time in Java's second compiler.
            os.environ.setdefault("JDK_JAVA_OPTIONS", SHORT_LIVED)
        try:
            serve_on_free_ports(
                self._settings,
                self._files,
                self._plan,
                detach=keep,
                tell=self._watcher.tell,
                ready=lambda _: None,
                hold=self._hold,
            )
        finally:
            if keep and not (self._is_done and self._report().ok):
                down(self._settings, self._watcher.tell)
        self._clock.stop()
        return self._report() if self._is_done else None

    def _report(self) -> DemoReport:
        home = self._settings.home_path
        return make_report(
            events_produced=sum(item.messages for item in self._sent),
            live_s=sum(item.span_s for item in self._sent),
            wall_s=self._clock.total_s,
            ages=self._ages,
            verdicts=self._verdicts,
            ledger=self._ledger,
            replay=self._replay,
            runs=self._runs,
            models=self._models,
            problems=self._problems,
            phases=self._clock.phases,
            files={
                "home": str(home),
                "tables": str(home / "warehouse"),
                "catalog": str(home / "catalog.db"),
                "ledger": str(self._files.ledger),
                "logs": str(self._files.logs),
            },
        )

    def _plan(self) -> PlatformPlan:
        options = self._options
        plan = plan_platform(self._settings, simulator=True, remember=True)
        # Beside a training, which takes minutes, the market goes on all the while.
        paced = _RATE_WITH_MODELS if options.models else paced_rate(options.events, time.time())
        self._trades_per_s = options.trades_per_s or paced
        plan = with_synthetic_market(
            plan,
            trades_per_s=self._trades_per_s,
            seed=options.seed,
            start_minutes_ago=options.start_minutes_ago,
        )
        if options.recordings_dir is None:
            return plan
        return with_recorded_market(plan, self._settings, options.recordings_dir)

    # What is done while it runs

    def _hold(self, plan: PlatformPlan) -> None:
        """Do the work, with a process for Dagster's jobs beside it where Dagster is installed and wanted."""
        why_not = missing() if self._settings.dagster else "STREAMFORGE_DAGSTER is false: nothing runs in Dagster"
        if why_not is not None:
            self._watcher.tell(why_not)
            self._work(plan, None)
            return
        with Jobs(self._settings, self._files.logs / "dagster-jobs.out") as jobs:
            self._work(plan, jobs)

    def _work(self, plan: PlatformPlan, jobs: Jobs | None) -> None:
        line = Line(self._settings, self._contracts)
        session = Session(self._settings, self._contracts, plan)
        if self._options.models:
            self._attempt(Phase.MODELS, self._train_model)
        self._attempt(Phase.MARKET, lambda: self._run_market(line, session, jobs))
        self._attempt(Phase.LANDING, lambda: self._land(line, session, self._files.ledger))
        self._attempt(Phase.REPLAY, lambda: self._repeat_range(jobs), lambda: self._ask_for_checks(jobs))
        # Before recorded messages come: their event times are years old.
        self._ages = line.ages()
        if self._options.recordings_dir is not None:
            if jobs is not None:
                self._attempt(Phase.DAGSTER, lambda: self._take_answers(jobs))
            recorded = Session(self._settings, self._contracts, plan, prefix=f"{RECORDED}-")
            self._attempt(Phase.RECORDINGS, lambda: self._run_recordings(line, recorded))
        self._attempt(Phase.VERIFY, lambda: self._verify(line))
        if jobs is not None:
            self._attempt(Phase.DAGSTER, lambda: self._take_answers(jobs))
        self._problems += self._unexpected_ends()
        self._is_done = True
        if self._options.keep:
            session.start()
        self._enter(Phase.STOP)

    def _attempt(self, phase: Phase, *steps: Callable[[], None]) -> None:
        self._enter(phase)
        for step in steps:
            try:
                step()
            except StreamForgeError as error:
                self._problems.append(f"{phase}: {error}")
                self._watcher.tell(f"{phase} failed: {error}")

    def _enter(self, phase: Phase) -> None:
        self._clock.enter(phase)
        self._watcher.phase(phase)

    def _run_market(self, line: Line, session: Session, jobs: Jobs | None) -> None:
        """Wait until enough was captured and the first bars are in their table; Dagster observes meanwhile."""
        if jobs is not None:
            for job in _JOBS_BESIDE_THE_MARKET:
                jobs.ask(job)
        wanted = self._options.events
        self._market_since_s = time.time()
        deadline_s = time.monotonic() + wanted / self._trades_per_s + _MARKET_MARGIN_S
        while True:
            state = line.look()
            found = captured(state)
            bars = state.rows["bars"]
            self._count_forecasts(state)
            note = f"{sum(state.rows.values()):,} rows landed, {'bars are there' if bars else 'the minute runs'}"
            self._watcher.progress(min(found, wanted), wanted, note)
            if found >= wanted and bars and not self._waits_for_forecasts():
                return
            session.require_running()
            if time.monotonic() > deadline_s:
                msg = f"captured {found:,} of {wanted:,} events and landed {bars} bars before the time was over"
                if self._waits_for_forecasts():
                    msg = f"{msg}; no forecast of champion {self._models.version if self._models else None} landed"
                raise ProcessError(msg)
            time.sleep(_POLL_S)

    def _train_model(self) -> None:
        """Load a history and retrain; bars of the live market close meanwhile, and forecasts begin with the next.

        A model that loses against a baseline is no failure of the demo: the report shows the comparison.
        """
        self._models = train_demo_model(self._settings, self._watcher.tell)

    def _waits_for_forecasts(self) -> bool:
        return self._models is not None and self._models.is_champion and not self._models.forecasts

    def _count_forecasts(self, state: LineState) -> None:
        if self._models is not None:
            self._models = replace(self._models, forecasts=state.rows["predictions"])

    def _land(self, line: Line, session: Session, ledger: Path) -> None:
        """Stop the market, then its loader, and wait until the tables have everything."""
        before = sum(item.messages for item in self._sent)
        self._sent.append(session.land(line, ledger, captured_before=before, tell=self._watcher.progress))

    def _repeat_range(self, jobs: Jobs | None) -> None:
        """Make the middle third of the busiest topic-partition of raw trades again, or ask Dagster for it."""
        logs = log_ranges(self._settings, [topic_of(self._contracts, "raw-trades").name])
        item, log = max(logs.items(), key=lambda entry: entry[1].stable_end - entry[1].log_start)
        third = (log.stable_end - log.log_start) // 3
        wanted = OffsetRange(item.topic, item.partition, log.log_start + third, log.log_start + 2 * third)
        self._replay_range, self._hash_before = wanted, self._table_hash()
        if jobs is not None:
            offsets = f"{wanted.partition}:{wanted.start}-{wanted.end}"
            jobs.ask("replay", config={"table": "trades", "offsets": [offsets], "dry_run": False})
            return
        done = replay(
            self._settings,
            self._contracts,
            "trades",
            [wanted],
            progress=lambda stage, done, total: self._watcher.progress(done, total, stage),
        )
        self._note_replay(done.plan.counts.after, committed=done.committed is not None)

    def _note_replay(self, rows: int, *, committed: bool) -> None:
        """Keep what a replay of the chosen range did, and what the table says now."""
        self._replay = ReplayFigures(
            table=f"{self._settings.namespace}.trades",
            ranges=[str(self._replay_range)],
            rows=rows,
            committed=committed,
            hash_before=self._hash_before,
            hash_after=self._table_hash(),
        )

    def _ask_for_checks(self, jobs: Jobs | None) -> None:
        """Have what the market left checked and built again, as the schedules of a running platform do.

        The marts take Spark's start and dbt, a minute: they are built in the longer demo, the one with models.
        """
        if jobs is None:
            return
        jobs.ask("quality")
        jobs.ask("bars_backfill", partition_key=time.strftime(_HOUR_KEY, time.gmtime(self._market_since_s)))
        if self._options.models:
            jobs.ask("marts")

    def _take_answers(self, jobs: Jobs) -> None:
        """Wait for the jobs that were asked for.

        Raises:
            ProcessError: one did not end in time, or their process is gone; names its log.
        """
        while jobs.waiting:
            job = jobs.waiting[0]
            total = len(jobs.waiting) + len(self._runs)
            self._watcher.progress(len(self._runs), total, f"Dagster's job {job}")
            done = jobs.answer(_RUN_TIMEOUT_S)
            if done is None:
                msg = f"Dagster's job {job} did not end within {_RUN_TIMEOUT_S:g} s; see {jobs.log_file}"
                raise ProcessError(msg)
            self._runs.append(done)
            if done.job == "replay" and done.status == SUCCESS:
                self._note_replay(done.metadata["rows_after"], committed=done.metadata["committed"])

    def _table_hash(self) -> str:
        contract = self._contracts["trades"]
        schema = content_schema(contract)
        table = load_table(open_catalog(self._settings), self._settings, contract)
        return str(content_hash(table.scan(selected_fields=tuple(schema.names)).to_arrow(), schema))

    def _run_recordings(self, line: Line, session: Session) -> None:
        """Replay the recordings through a market and a loader of their own, and let them land."""
        before = captured(line.look())
        session.start()

        def tell() -> None:
            self._watcher.progress(0, 0, f"{captured(line.look()) - before:,} recorded messages captured")

        session.wait_for_market(_RECORDINGS_TIMEOUT_S, on_look=tell)
        self._land(line, session, recorded_home(self._settings) / "ledger")

    def _verify(self, line: Line) -> None:
        """Compare every table with its topics and with what was sent."""
        faults.step("demo.verify")
        comparisons = verify_tables(
            self._settings,
            self._contracts,
            progress=lambda what, done, total: self._watcher.progress(done, total, what),
        )
        self._ages = [
            replace(item, rows=rows) for item, rows in zip(self._ages, line.look().rows.values(), strict=True)
        ]
        self._verdicts = verdicts(comparisons, self._settings.namespace, self._contracts)
        folders = [self._files.ledger, recorded_home(self._settings) / "ledger"]
        self._watcher.progress(0, 0, "ids of the ledger")
        self._ledger = ledger_figures(
            verify_ledger(self._settings, self._contracts, folder, self._channels)
            for folder in folders
            if folder.is_dir()
        )

    def _unexpected_ends(self) -> list[str]:
        """Return a sentence for each process that came back during the demo: none should have to."""
        return [
            f"{name} was restarted {history.restarts} times ({history.last_end}); see {self._files.logs / name}.out"
            for name, history in read_history(self._files).items()
            if history.restarts
        ]
