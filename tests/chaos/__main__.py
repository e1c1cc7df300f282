"""Trouble the running line with faults and compare every row afterwards: nothing lost, doubled or out of order.

    uv run python -m tests.chaos --faults 50 --seed 1 --output json

The line (broker, market, loader, parser, bars, two writers) runs under load as `streamforge up` starts it. A seed
draws the faults: kills at random and at every named step, zombies, rebalances, a second process for a slot, a broker
that dies or stands still, lost answers, conflicts, full and slow disks, jumping clocks, expired table snapshots,
replays. Then the market stops, everything lands, and its ledger is compared with Kafka and with the tables, row by row.

A long run is made of parts with different seeds: `--append FILE` adds each result as a line and prints the sum so far.
`--plant BUG` gives the processes a bug of the commit protocol, which the run has to find. Exit code 0: all is well.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import msgspec

from streamforge.logs import configure as configure_logs
from streamforge.settings import load_settings
from tests.chaos.line import tell
from tests.chaos.plants import PLANTS
from tests.chaos.report import Result, append, as_text, read_sum
from tests.chaos.run import Run
from tests.chaos.schedule import KINDS, Fault, chosen, draw, read_schedule, write_schedule
from tests.chaos.shrink import shrink


def main() -> int:
    """Run once and say what became of every row."""
    options = _options()
    if options.sum is not None:
        _say(read_sum(options.sum), options.output)
        return 0
    configure_logs(load_settings())
    for name in ("streamforge.librdkafka", "pyiceberg"):  # they go on about a broker that was killed, and conflicts
        logging.getLogger(name).setLevel(logging.CRITICAL)
    faults = (
        read_schedule(options.replay_schedule)
        if options.replay_schedule
        else draw(options.seed, options.faults, options.kinds)
    )
    faults = chosen(faults, options.only)
    home = Path(tempfile.mkdtemp(prefix="streamforge-chaos-", dir=options.folder))
    run = Run(faults, options.seed, options.plant)
    result, outcome = run.execute(home / "home")
    if not result.is_clean:
        (home / "history.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(run.suffered))
        if outcome is not None:
            tell(msgspec.json.format(msgspec.json.encode(outcome.as_dict())).decode())
        tell(f"NOT ok with seed {options.seed}. Logs, tables and history.jsonl (what happened, in order): {home}")
        _explain(faults, home, options)
    elif not options.keep:
        shutil.rmtree(home)
    if options.append is not None:
        tell(as_text(append(options.append, result)))
    _say(result, options.output)
    return 0 if result.is_clean else 1


def _explain(faults: Sequence[Fault], home: Path, options: argparse.Namespace) -> None:
    """Write the schedule that failed, as short as it was asked to be made, and say how to run it again."""
    tries = count(1)

    def fails(part: Sequence[Fault]) -> bool:
        with tempfile.TemporaryDirectory(prefix="streamforge-chaos-", dir=options.folder) as folder:
            result, _ = Run(part, options.seed, options.plant).execute(Path(folder) / "home")
        tell(f"try {next(tries)}: {len(part)} faults {'pass' if result.is_clean else 'fail'}")
        return not result.is_clean

    left = shrink(faults, fails, tries=options.shrink) if options.shrink else faults
    schedule = home / "schedule.jsonl"
    write_schedule(schedule, left)
    plant = f" --plant {options.plant}" if options.plant else ""
    tell(f"{len(left)} faults again: python -m tests.chaos --seed {options.seed} --replay-schedule {schedule}{plant}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=(__doc__ or "").split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--faults", type=int, default=50, help="how many faults are drawn")
    parser.add_argument("--seed", type=int, default=1, help="draws faults, victims and moments, and the market")
    parser.add_argument("--kinds", type=_kinds, default=tuple(KINDS), help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--replay-schedule", type=Path, help="take the faults of this file instead")
    parser.add_argument("--only", metavar="K..L", help="of the faults only those with these numbers")
    parser.add_argument("--shrink", type=int, default=0, metavar="TRIES", help="shorten a schedule that fails")
    parser.add_argument("--plant", choices=sorted(PLANTS), help="give the processes this bug")
    parser.add_argument("--append", type=Path, help="add the result to this file and print the sum of its parts")
    parser.add_argument("--sum", type=Path, help="only print the sum of the parts in this file")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the home is made")
    parser.add_argument("--keep", action="store_true", help="keep the home also where nothing is wrong")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    return parser.parse_args()


def _kinds(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in KINDS]:
        msg = f"no kind of fault: {', '.join(unknown)}"
        raise argparse.ArgumentTypeError(msg)
    return names


def _say(result: Result, output: str) -> None:
    if output == "json":
        sys.stdout.write(msgspec.json.encode({"ok": result.is_clean, **msgspec.to_builtins(result)}).decode() + "\n")
    else:
        sys.stdout.write(as_text(result))


if __name__ == "__main__":
    sys.exit(main())
