"""Run a command of `streamforge` in a process that the harness can trouble from outside.

    python -m tests.chaos.victim --name writer-0 --orders DIR [--plant BUG] -- run writer --slot 0

Nothing of the product is replaced: named steps (`streamforge.faults.step`), the catalog's commit and the wall clock
are wrapped, deadlines are shortened so that what takes minutes in production takes seconds here, and then the command
line runs as always. An order is a file `DIR/NAME.order`; once it has been obeyed it is called `DIR/NAME.obeyed`.
"""

# ruff: noqa: PLC0415 - what is imported early cannot be patched any more

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import msgspec

SESSION_TIMEOUT_S = 6.0
TRANSACTION_TIMEOUT_S = 5.0
CATALOG_TIMEOUT_S = 3.0
"""Production has 45, 30 and 30 s."""

TELL_WHERE = signal.SIGUSR2
"""Makes a process write to its log where each of its threads is."""

_HEARTBEAT_S = 1.5
_LOOK_S = 0.1
_NS_PER_S = 1_000_000_000
COMMIT_ORDERS = frozenset({"refused", "lost_answer", "false_conflict"})
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_real_time_ns = time.time_ns


class Order(msgspec.Struct, frozen=True):
    """What a process is to suffer, once.

    Args:
        number: of the fault.
        what: `kill`, `stop` or `slow` at a step; `clock`; `refused`, `lost_answer` or `false_conflict` of a commit.
        step: named step, for the first three.
        passage: which passage of the step, counted from 1.
        value_s: how slow, or how far the clock jumps.
    """

    number: int
    what: str
    step: str = ""
    passage: int = 1
    value_s: float = 0.0


def order_file(folder: Path, name: str) -> Path:
    """Return where the order of the process `name` lies until it is obeyed."""
    return folder / f"{name}.order"


def obeyed_file(folder: Path, name: str) -> Path:
    """Return where an obeyed order lies."""
    return folder / f"{name}.obeyed"


class Agent:
    """Obeys the orders of one process."""

    def __init__(self, folder: Path, name: str) -> None:
        self._order_file, self._obeyed_file = order_file(folder, name), obeyed_file(folder, name)
        self._order: Order | None = None
        self._passages = 0
        self._shift_ns = 0

    def install(self) -> None:
        """Wrap clock, steps and catalog, and begin to look for orders."""
        time.time_ns = self._time_ns
        time.time = lambda: self._time_ns() / _NS_PER_S
        self.look()
        threading.Thread(target=self._keep_looking, name="chaos", daemon=True).start()
        # Behind the clock: default arguments keep the function that was there when they were made.
        from pyiceberg.catalog.sql import SqlCatalog

        from streamforge import faults

        faults.step = self.step
        SqlCatalog.commit_table = self._around_commit(SqlCatalog.commit_table)  # type: ignore[method-assign]

    def step(self, name: str) -> None:
        """Do what is ordered for the step `name`."""
        order = self._order
        if order is None or order.step != name:
            return
        self._passages += 1
        if self._passages < order.passage:
            return
        if not self._took(order):
            return
        if order.what == "slow":
            time.sleep(order.value_s)
        else:
            os.kill(os.getpid(), _SIGNALS[order.what])

    def _around_commit(self, commit: Callable[..., Any]) -> Callable[..., Any]:
        from pyiceberg.exceptions import CommitFailedException
        from sqlalchemy.exc import OperationalError

        @wraps(commit)
        def troubled(*arguments: Any, **named: Any) -> Any:
            order = self._order
            if order is None or order.what not in COMMIT_ORDERS or not self._took(order):
                return commit(*arguments, **named)
            if order.what != "refused":
                commit(*arguments, **named)
            if order.what == "false_conflict":
                msg = "ordered by the chaos harness: it landed and is answered as a conflict"
                raise CommitFailedException(msg)
            raise OperationalError("commit", {}, ConnectionError("ordered by the chaos harness"))

        return troubled

    def _time_ns(self) -> int:
        return _real_time_ns() + self._shift_ns

    def _keep_looking(self) -> None:
        while True:
            time.sleep(_LOOK_S)
            self.look()

    def look(self) -> None:
        """Read the order that is there, and jump at once where the clock is to."""
        try:
            order = msgspec.json.decode(self._order_file.read_bytes(), type=Order)
        except (OSError, msgspec.MsgspecError):
            self._order = None
            return
        if order != self._order:
            self._order, self._passages = order, 0
        if order.what == "clock" and self._took(order):
            self._shift_ns = int(order.value_s * _NS_PER_S)

    def _took(self, order: Order) -> bool:
        """Mark the order as obeyed; False where the other thread did, or it was taken back."""
        self._order = None
        try:
            self._order_file.rename(self._obeyed_file)
        except FileNotFoundError:
            return False
        return True


def shorten_deadlines() -> None:
    """Shorten session, transactions and the catalog's patience, so that outliving them takes seconds."""
    from streamforge import kafka
    from streamforge.lakehouse import catalog

    consumer, producer = kafka.consumer_config, kafka.producer_config

    def short_consumer(*arguments: Any, **named: Any) -> dict[str, Any]:
        short = {
            "session.timeout.ms": int(SESSION_TIMEOUT_S * 1000),
            "heartbeat.interval.ms": int(_HEARTBEAT_S * 1000),
        }
        return consumer(*arguments, **named) | short

    def short_producer(*arguments: Any, **named: Any) -> dict[str, Any]:
        config = producer(*arguments, **named)
        if "transactional.id" in config:
            config["transaction.timeout.ms"] = int(TRANSACTION_TIMEOUT_S * 1000)
        return config

    kafka.consumer_config, kafka.producer_config = short_consumer, short_producer
    catalog.REQUEST_TIMEOUT_S = CATALOG_TIMEOUT_S


def main() -> None:
    """Become the command that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--orders", required=True, type=Path)
    parser.add_argument("--plant")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    faulthandler.register(TELL_WHERE, all_threads=True)
    Agent(options.orders, options.name).install()
    shorten_deadlines()
    if options.plant:
        from tests.chaos.plants import plant

        plant(options.plant)
    from cli.app import main as run

    sys.argv = ["streamforge", *options.command]
    run()


if __name__ == "__main__":
    main()
