"""One run: the line with two writers, a lane of faults for each target, then the comparison of every row.

Lanes run side by side, so faults of different targets overlap; those of one target come one after the other, each when
the last one is over and its victims are at work again.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from streamforge.demo.session import captured
from streamforge.errors import StreamForgeError
from streamforge.events import CommandKind
from streamforge.platform.plan import BROKER, SIMULATOR, PlatformFiles, PlatformPlan, ProcessPlan
from streamforge.processes import remembered_ports
from streamforge.settings import Settings
from streamforge.supervision import send_command
from tests.chaos.inject import inject, is_passing, victims_of
from tests.chaos.lake import put_warehouse_behind_a_link
from tests.chaos.line import Outcome, RunningLine, run_line, tell
from tests.chaos.report import Result, Suffered, count
from tests.chaos.scene import Aborted, NotReachedError, Scene, ViolationError
from tests.chaos.schedule import TABLES, TARGETS, VICTIMS, WRITERS, Fault

_LEFT_OUT = ("history-parser", "inference")
"""Consumers that the line does without: they have nothing to do here."""

_TRADES_PER_S = 160.0
_CLI = ["-m", "cli"]
_QUIET_S = 2.0
_STOP_TIMEOUT_S = 120.0


@dataclass
class Run:
    """Faults to inject, and what becomes of them.

    Args:
        faults: in any order of targets.
        seed: of the market.
        plant: bug that the processes have.
        suffered: what was done so far.
        problems: what must not be.
    """

    faults: Sequence[Fault]
    seed: int
    plant: str | None = None
    suffered: list[Suffered] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _scene: Scene | None = None
    _since_s: float = 0.0

    def execute(self, home: Path) -> tuple[Result, Outcome | None]:
        """Run the line in `home`; the outcome is missing where a violation ended the run."""
        began_s = time.monotonic()
        orders = home / "chaos"
        orders.mkdir(parents=True)
        outcome = None
        try:
            outcome = run_line(
                home,
                seed=self.seed,
                trades_per_s=_TRADES_PER_S,
                shape=lambda settings, plan: self._shape(settings, plan, orders),
                mistreat=lambda running: self._mistreat(running, orders),
                stop=self._stop_market,
            )
        except (AssertionError, StreamForgeError) as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        finally:
            if self._scene is not None:
                self._scene.stop_watching()
        by_hand = dict(self._scene.started_by_hand) if self._scene else {}
        result = count(self.suffered, seed=self.seed, started_by_hand=by_hand)
        result = replace(result, violation="; ".join(self.problems), wall_s=round(time.monotonic() - began_s, 1))
        if outcome is None:
            return result, None
        found = outcome.as_dict()
        names = ("messages_sent", "lost", "doubled", "wrong", "disordered", "unexplained")
        rows = sum(item.tally.rows for item in outcome.comparisons)
        return replace(result, rows=rows, **{name: found[name] for name in names}), outcome

    def _shape(self, settings: Settings, plan: PlatformPlan, orders: Path) -> PlatformPlan:
        put_warehouse_behind_a_link(settings)
        processes = [item for item in plan.processes if item.name not in _LEFT_OUT]
        writer = next(item for item in processes if item.kind == "writer")
        files = PlatformFiles(settings.home_path)
        ports = remembered_ports(files.ports, [f"{name} metrics" for name in WRITERS]).numbers
        at = processes.index(writer)
        processes[at : at + 1] = [_writer(writer, name, ports[f"{name} metrics"]) for name in WRITERS]
        options = ["--plant", self.plant] if self.plant else []
        return replace(
            plan,
            processes=[_victim(item, orders, options) if item.name in VICTIMS else item for item in processes],
        )

    def _mistreat(self, running: RunningLine, orders: Path) -> None:
        running.line.landed = tuple(running.contracts[name] for name in TABLES)
        scene = self._scene = Scene(running.settings, running.contracts, running.plan, orders)
        scene.start_watching((*VICTIMS, BROKER))
        self._since_s = time.monotonic()
        lanes = [
            threading.Thread(target=self._lane, args=(scene, target), name=target, daemon=True) for target in TARGETS
        ]
        for lane in lanes:
            lane.start()
        try:
            for lane in lanes:
                while lane.is_alive():
                    lane.join(1.0)
            # What was in trouble when a lane of another target ended has had its time; now all have to work.
            scene.wait_at_work({name: scene.mark(name) for name in VICTIMS})
        except Aborted:
            pass
        finally:
            scene.aborted.set()
        if self.problems:
            raise ViolationError(self.problems.pop())

    def _lane(self, scene: Scene, target: str) -> None:
        try:
            for fault in (item for item in self.faults if item.target == target):
                self._suffer(scene, fault)
        except Aborted:
            return
        except Exception as error:  # noqa: BLE001 - whatever ends a lane has to be known to the others
            self.problems.append(f"{target}: {type(error).__name__}: {error}")
            scene.aborted.set()

    def _suffer(self, scene: Scene, fault: Fault) -> None:
        scene.pause(fault.gap_s)
        at_s = time.monotonic() - self._since_s
        marks = {name: scene.mark(name) for name in victims_of(fault)}
        try:
            inject(scene, fault)
        except NotReachedError:
            self.suffered.append(Suffered(fault=fault, at_s=round(at_s, 2), recovery_s=None))
            return
        over_s = time.monotonic()
        scene.wait_at_work(marks, one_will_do=is_passing(fault))
        recovery_s = time.monotonic() - over_s
        self.suffered.append(Suffered(fault=fault, at_s=round(at_s, 2), recovery_s=recovery_s))
        where = f" at {fault.step}" if fault.step else ""
        tell(
            f"{at_s:7.1f} s  {len(self.suffered)}/{len(self.faults)}  {fault.kind} {fault.target}{where}: "
            f"at work after {recovery_s:.1f} s"
        )

    def _stop_market(self, running: RunningLine) -> None:
        """Stop the market, and wait until nothing more comes of it: what a killed loader missed never comes."""
        scene = self._scene
        assert scene is not None
        scene.stop_watching()
        market = scene.process(SIMULATOR)
        target = f"{market.kind}/{market.slot}"
        stop = CommandKind.STOP
        send_command(running.settings, running.contracts, target=target, command=stop, issued_by="chaos")
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        before, since_s = -1, time.monotonic()
        while time.monotonic() - since_s < _QUIET_S:
            now = captured(running.line.look())
            is_over = running.session.client.processes()[SIMULATOR].state == "EXITED"
            if now != before or not is_over:
                before, since_s = now, time.monotonic()
            if time.monotonic() > deadline_s:
                msg = f"the market has not ended, or the loader not come to rest, within {_STOP_TIMEOUT_S:g} s"
                raise ViolationError(msg)
            time.sleep(0.1)


def _writer(writer: ProcessPlan, name: str, port: int) -> ProcessPlan:
    slot = name.rsplit("-", 1)[1]
    command = [sys.executable, *_CLI, "run", "writer", "--slot", slot, "--metrics-port", str(port), "--output", "json"]
    log_file = str(Path(writer.log_file).with_name(f"{name}.out"))
    return replace(writer, name=name, slot=slot, command=command, ports={"metrics": port}, log_file=log_file)


def _victim(process: ProcessPlan, orders: Path, options: Sequence[str]) -> ProcessPlan:
    python, *rest = process.command
    assert rest[:2] == _CLI, process.command
    agent = ["-m", "tests.chaos.victim", "--name", process.name, "--orders", str(orders), *options, "--"]
    return replace(process, command=[python, *agent, *rest[2:]])
