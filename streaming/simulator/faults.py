"""Faults on purpose: what is asked for, and which message or connection it hits. Pure; time is passed in."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from streamforge.errors import ConfigurationError
from streamforge.ledger import Fate

_NS_PER_S = 1_000_000_000


class FaultKind(StrEnum):
    """What can go wrong."""

    DISCONNECT = "disconnect"
    STALL = "stall"
    DROP = "drop"
    DOUBLE = "double"
    REORDER = "reorder"
    MALFORMED = "malformed"
    RATE = "rate"
    LISTING = "listing"
    CLEAR = "clear"


MESSAGE_FATES = {
    FaultKind.DROP: Fate.DROPPED,
    FaultKind.DOUBLE: Fate.DOUBLED,
    FaultKind.REORDER: Fate.REORDERED,
    FaultKind.MALFORMED: Fate.MALFORMED,
}

_HELP = (
    "expected kind or kind:name=value,... with kind one of "
    f"{', '.join(FaultKind)}, and names at_s, count, ratio, duration_s, factor, symbol, channel; "
    "for instance drop:count=3,channel=trade or stall:duration_s=5 or rate:factor=20 or listing:symbol=NEWUSDT"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault that is asked for.

    Args:
        kind: what goes wrong.
        at_s: seconds to wait before it begins.
        count: message faults: the next so many messages (1 where neither count, ratio nor duration is given);
            disconnect and stall: so many connections, the oldest first (all where it is not given).
        ratio: message faults: this share of all messages, by chance.
        duration_s: how long it lasts; none: a stall of 5 s, anything else until `clear`.
        factor: of `rate`.
        symbol: only messages of this instrument; of `listing`: the new instrument.
        channel: only messages of this channel.
    """

    kind: FaultKind
    at_s: float = 0.0
    count: int | None = None
    ratio: float | None = None
    duration_s: float | None = None
    factor: float = 20.0
    symbol: str | None = None
    channel: str | None = None


def parse_fault(text: str) -> Fault:
    """Read a fault as written on the command line, `kind:name=value,name=value`.

    Raises:
        ConfigurationError: an unknown kind or name, or a value that does not fit.
    """
    kind, _, rest = text.partition(":")
    arguments = {"fault": kind}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            msg = f"fault {text!r}: {item!r} is not name=value; {_HELP}"
            raise ConfigurationError(msg)
        arguments[name.strip()] = value.strip()
    return fault_from_arguments(arguments)


def fault_from_arguments(arguments: Mapping[str, str]) -> Fault:
    """Read a fault from the arguments of a `fault` command: `fault` is the kind, the rest its fields.

    Raises:
        ConfigurationError: an unknown kind or name, or a value that does not fit.
    """
    values = dict(arguments)
    try:
        kind = FaultKind(values.pop("fault", ""))
        fault = Fault(
            kind=kind,
            at_s=_positive(values.pop("at_s", "0")),
            count=int(values.pop("count")) if "count" in values else None,
            ratio=_positive(values.pop("ratio")) if "ratio" in values else None,
            duration_s=_positive(values.pop("duration_s")) if "duration_s" in values else None,
            factor=_positive(values.pop("factor", "20")),
            symbol=values.pop("symbol", None),
            channel=values.pop("channel", None),
        )
    except ValueError as error:
        msg = f"fault {dict(arguments)}: {error}; {_HELP}"
        raise ConfigurationError(msg) from error
    problems = [f"unknown {name}" for name in values]
    problems += ["ratio above 1"] if (fault.ratio or 0) > 1 else []
    problems += ["count below 1"] if fault.count is not None and fault.count < 1 else []
    problems += ["a listing needs a symbol"] if kind is FaultKind.LISTING and not fault.symbol else []
    if problems:
        msg = f"fault {dict(arguments)}: {', '.join(problems)}; {_HELP}"
        raise ConfigurationError(msg)
    return fault


@dataclass(slots=True)
class _Active:
    fault: Fault
    remaining: int | None
    until_ns: int | None


class FaultPlan:
    """Decide what hits which message; what is not about messages is handed out once it is due.

    Args:
        seed: of the chances.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a simulation
        self._waiting: list[tuple[int, Fault]] = []
        self._active: list[_Active] = []

    @property
    def touches_messages(self) -> bool:
        """Return whether any message may be hit now."""
        return bool(self._active)

    def add(self, fault: Fault, now_ns: int) -> None:
        """Take a fault; it begins `at_s` from now."""
        self._waiting.append((now_ns + int(fault.at_s * _NS_PER_S), fault))

    def begin_due(self, now_ns: int) -> list[Fault]:
        """Begin the message faults that are due, end those that are over, and return the other due faults.

        A `rate` fault with a duration is followed by one with factor 1.
        """
        self._active = [item for item in self._active if item.until_ns is None or now_ns < item.until_ns]
        due = [fault for at_ns, fault in self._waiting if at_ns <= now_ns]
        if not due:
            return []
        self._waiting = [item for item in self._waiting if item[0] > now_ns]
        others = []
        for fault in due:
            if fault.kind in MESSAGE_FATES:
                self._active.append(self._activated(fault, now_ns))
                continue
            others.append(fault)
            if fault.kind is FaultKind.CLEAR:
                self._active.clear()
                self._waiting.clear()
            elif fault.kind is FaultKind.RATE and fault.duration_s is not None:
                self.add(Fault(FaultKind.RATE, at_s=fault.duration_s, factor=1.0), now_ns)
        return others

    def fate(self, symbol: str, channel: str) -> Fate:
        """Return what happens to the next message of this kind for one connection."""
        for item in self._active:
            fault = item.fault
            if fault.symbol not in (None, symbol) or fault.channel not in (None, channel):
                continue
            if fault.ratio is not None and self._random.random() >= fault.ratio:
                continue
            if item.remaining is not None:
                item.remaining -= 1
                if item.remaining == 0:
                    self._active.remove(item)
            return MESSAGE_FATES[fault.kind]
        return Fate.SENT

    @staticmethod
    def _activated(fault: Fault, now_ns: int) -> _Active:
        remaining = fault.count
        if remaining is None and fault.ratio is None and fault.duration_s is None:
            remaining = 1
        until_ns = None if fault.duration_s is None else now_ns + int(fault.duration_s * _NS_PER_S)
        return _Active(fault, remaining, until_ns)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        msg = f"{text!r} is not a number of 0 or more"
        raise ValueError(msg)
    return number
