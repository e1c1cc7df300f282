"""`streamforge doctor`: what is wrong here, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from cli.common import Output, OutputOption, command, emit, error_console

if TYPE_CHECKING:
    from streamforge.diagnosis import Finding

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@command
def doctor(*, output: OutputOption = Output.TEXT) -> int:
    """Check Python, packages, Java, disk, ports, contracts, broker, topics and catalog; changes nothing.

    The catalog is asked on a scratch table whether it refuses the second of two conflicting commits; the
    table is removed again. Exit code 1 when there is a problem; warnings do not count.

    Example: streamforge doctor --output json
    """
    from streamforge.diagnosis import Level, diagnose
    from streamforge.settings import load_settings

    findings = []
    with error_console.status("checking") as status:
        for finding in diagnose(load_settings()):
            findings.append(finding)
            status.update(f"checked {finding.check}")
    problems = sum(finding.level is Level.PROBLEM for finding in findings)
    result = {"problems": problems, "findings": [asdict(finding) for finding in findings]}
    emit(result, output, lambda: _render(findings))
    return 1 if problems else 0


def _render(findings: Sequence[Finding]) -> Table:
    table = Table("", "check", "found", "what to do")
    for finding in findings:
        level = str(finding.level)
        table.add_row(Text(level, style=_STYLES[level]), finding.check, Text(finding.found), Text(finding.advice))
    return table
