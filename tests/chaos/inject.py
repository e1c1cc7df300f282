"""How each kind of fault is done. A function returns when the trouble is over; recovery is waited for afterwards."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from streamforge.errors import RetryableSourceError
from streamforge.events import CommandKind
from streamforge.platform.launch import launch_command, starts_file
from streamforge.platform.plan import environment_of
from streamforge.supervision import send_command
from tests.chaos import lake
from tests.chaos.scene import FENCED, RECOVERY_TIMEOUT_S, NotReachedError, Scene, ViolationError
from tests.chaos.schedule import BROKER, VICTIMS, WRITERS, Fault, is_at_start
from tests.chaos.victim import Order

_ORDER_TIMEOUT_S = 45.0
_TWIN_TIMEOUT_S = RECOVERY_TIMEOUT_S
_END_TIMEOUT_S = RECOVERY_TIMEOUT_S
_SPACE_LEFT_BYTES = 2_048
_COMMIT_ORDERS = {"commit_refused": "refused", "answer_lost": "lost_answer", "false_conflict": "false_conflict"}


def inject(scene: Scene, fault: Fault) -> None:
    """Do one fault and return when its trouble is over.

    Raises:
        NotReachedError: its step was not passed.
        ViolationError: it showed something that must not be.
    """
    _INJECT[fault.kind](scene, fault)


def is_passing(fault: Fault) -> bool:
    """Return whether it is enough that one of the victims goes on: nobody has to recover, and the other may be down."""
    return fault.kind in {"foreign_commit", "expire_snapshots"}


def victims_of(fault: Fault) -> tuple[str, ...]:
    """Return who has to be at work again after a fault."""
    if fault.target in VICTIMS:
        return (fault.target,)
    return VICTIMS if fault.target == BROKER else WRITERS


def _kill(scene: Scene, fault: Fault) -> None:
    pid = scene.kill(fault.target, signal.SIGKILL)
    if fault.again:
        scene.wait(lambda: scene.found(fault.target).pid not in {None, pid}, _END_TIMEOUT_S, f"{fault.target} is back")
        scene.pause(fault.gap_s)
        scene.kill(fault.target, signal.SIGKILL)


def _kill_at_step(scene: Scene, fault: Fault) -> None:
    _at_step(scene, fault, "kill")


def _freeze(scene: Scene, fault: Fault) -> None:
    pid = scene.kill(fault.target, signal.SIGSTOP)
    try:
        scene.pause(fault.hold_s)
    finally:
        _continue(pid)


def _zombie_at_step(scene: Scene, fault: Fault) -> None:
    pid = _at_step(scene, fault, "stop")
    try:
        scene.pause(fault.hold_s)
    finally:
        _continue(pid)


def _rebalance(scene: Scene, fault: Fault) -> None:
    name = fault.target
    scene.keep_away(name)
    try:
        scene.kill(name, signal.SIGTERM)
        scene.wait(lambda: scene.has_ended(name), _END_TIMEOUT_S, f"{name} ends when told to")
        scene.pause(fault.hold_s)
    finally:
        scene.bring_back(name)


def _twin(scene: Scene, fault: Fault) -> None:
    """Start a second process for a slot: exactly one of the two may survive, the other ends as fenced."""
    name = fault.target
    scene.keep_away(name)
    twin = _start_twin(scene, name)
    deadline_s = time.monotonic() + _TWIN_TIMEOUT_S
    try:
        while not (twin.poll() == FENCED or _code(scene, name) == FENCED):
            if twin.poll() is not None:  # it met another fault on its way; the slot has not been asked for yet
                twin = _start_twin(scene, name)
            if time.monotonic() > deadline_s:
                msg = f"{name}: two processes with one slot, and after {_TWIN_TIMEOUT_S:g} s none was fenced"
                raise ViolationError(msg)
            scene.pause(0.1)
        if twin.poll() == FENCED and _code(scene, name) == FENCED:
            msg = f"{name}: two processes with one slot have fenced each other"
            raise ViolationError(msg)
    finally:
        twin.kill()
        twin.wait()
        scene.bring_back(name)


def _pause_resume(scene: Scene, fault: Fault) -> None:
    process = scene.process(fault.target)
    target = f"{process.kind}/{process.slot}"

    def tell(command: CommandKind) -> bool:
        try:
            send_command(scene.settings, scene.contracts, target=target, command=command, issued_by="chaos")
        except RetryableSourceError:
            return False  # the broker is away
        return True

    tell(CommandKind.PAUSE)
    try:
        scene.pause(fault.hold_s)
    finally:
        scene.wait(lambda: tell(CommandKind.RESUME), _END_TIMEOUT_S, "the broker takes a command")


def _clock_jump(scene: Scene, fault: Fault) -> None:
    _order(scene, fault, Order(fault.number, "clock", value_s=fault.shift_s))


def _slow_disk(scene: Scene, fault: Fault) -> None:
    if is_at_start(fault):
        scene.kill(fault.target, signal.SIGKILL)
    _order(scene, fault, Order(fault.number, "slow", fault.step, fault.passage, fault.hold_s))
    scene.pause(fault.hold_s)


def _full_disk(scene: Scene, fault: Fault) -> None:
    """Let the process write no file beyond a few kilobytes: Parquet, manifests and SQLite get an error, for real."""
    pid = scene.pid(fault.target)
    try:
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_SPACE_LEFT_BYTES, before[1]))
        scene.pause(fault.hold_s)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    except ProcessLookupError:
        return  # it gave up, and starts again without the limit


def _commit_trouble(scene: Scene, fault: Fault) -> None:
    _order(scene, fault, Order(fault.number, _COMMIT_ORDERS[fault.kind]))


def _broker_kill(scene: Scene, _fault: Fault) -> None:
    pid = scene.kill(BROKER, signal.SIGKILL)
    scene.wait(lambda: scene.found(BROKER).pid not in {None, pid}, _END_TIMEOUT_S, "the broker is started again")


def _replay(scene: Scene, fault: Fault) -> None:
    """Spoil a range of `trades` by a replay with a wrong parser, then mend it with the right one: one commit each.

    Where a step is given, the mending is killed there and made again.
    """
    offsets = lake.range_to_replay(scene.settings, scene.contracts, random.Random(fault.number))
    _run_replay(scene, offsets, "--plant", "wrong_parser")
    if fault.step:
        _run_replay(scene, offsets, kill_at=fault.step)
    if not any(_run_replay(scene, offsets) == 0 for _ in range(5)):
        msg = f"the replay of trades {offsets} does not come to an end; {scene.orders / 'replay.out'} says why"
        raise ViolationError(msg)


def _run_replay(scene: Scene, offsets: str, *options: str, kill_at: str | None = None) -> int:
    scene.pause(0.0)
    environment = {**os.environ, **environment_of(scene.settings)}
    if kill_at is not None:
        environment["STREAMFORGE_KILL_AT"] = kill_at
    command = _victim(scene, "replay", *options)
    command += ["--", "replay", "trades", "--offsets", offsets, "--output", "json"]
    with (scene.orders / "replay.out").open("ab") as out:
        return subprocess.run(command, env=environment, stdout=out, stderr=out, check=False).returncode


def _start_twin(scene: Scene, name: str) -> subprocess.Popen[bytes]:
    process = scene.process(name)
    starts_file(scene.orders, f"{name}-twin").unlink(missing_ok=True)
    command = _victim(scene, f"{name}-twin")
    command += ["--", "run", process.kind, "--slot", process.slot, "--output", "json"]
    environment = {**os.environ, **environment_of(scene.settings)}
    command = launch_command(command, name=f"{name}-twin", state=scene.orders)  # it dies with the harness
    with (scene.orders / "twin.out").open("ab") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out)


def _victim(scene: Scene, name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "tests.chaos.victim", "--name", name, "--orders", str(scene.orders), *options]


def _code(scene: Scene, name: str) -> int | None:
    return scene.found(name).exit_code if scene.has_ended(name) else None


def _at_step(scene: Scene, fault: Fault, what: str) -> int:
    """Have a process killed or stopped at its step, and return the pid that it has then."""
    order = Order(fault.number, what, fault.step, fault.passage)
    scene.order(fault.target, order)
    if is_at_start(fault):
        scene.kill(fault.target, signal.SIGKILL)
    if not scene.wait_obeyed(fault.target, _ORDER_TIMEOUT_S):
        raise NotReachedError
    return scene.pid(fault.target)


def _order(scene: Scene, fault: Fault, order: Order) -> None:
    scene.order(fault.target, order)
    if not scene.wait_obeyed(fault.target, _ORDER_TIMEOUT_S):
        raise NotReachedError


def _continue(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


_INJECT: Mapping[str, Callable[[Scene, Fault], None]] = {
    "kill": _kill,
    "kill_at_step": _kill_at_step,
    "freeze": _freeze,
    "zombie": _freeze,
    "zombie_at_step": _zombie_at_step,
    "transaction_timeout": _zombie_at_step,
    "rebalance": _rebalance,
    "twin": _twin,
    "pause_resume": _pause_resume,
    "clock_jump": _clock_jump,
    "slow_disk": _slow_disk,
    "full_disk": _full_disk,
    "commit_refused": _commit_trouble,
    "answer_lost": _commit_trouble,
    "false_conflict": _commit_trouble,
    "broker_kill": _broker_kill,
    "broker_freeze": _freeze,
    "foreign_commit": lambda scene, fault: lake.foreign_commits(scene.settings, scene.contracts, fault),
    "expire_snapshots": lambda scene, fault: lake.expire_snapshots(scene.settings, scene.contracts, fault),
    "catalog_locked": lambda scene, fault: lake.lock_catalog(scene.settings, lambda: scene.pause(fault.hold_s)),
    "catalog_away": lambda scene, fault: lake.lock_catalog(scene.settings, lambda: scene.pause(fault.hold_s)),
    "store_away": lambda scene, fault: lake.hide_warehouse(scene.settings, lambda: scene.pause(fault.hold_s)),
    "replay": _replay,
    "replay_killed": _replay,
}
