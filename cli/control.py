"""`streamforge control`: tell processes what to do, and hear that they did."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from cli.common import DryRunOption, Output, OutputOption, command, emit
from streamforge.events import CommandKind


@command
def control(
    order: Annotated[CommandKind, typer.Argument(metavar="COMMAND", help="ping, pause, resume, stop or fault.")],
    target: Annotated[
        str, typer.Argument(help="A kind (writer), a slot (writer/0), a process id of `status -o json`, or * for all.")
    ],
    *,
    argument: Annotated[
        list[str] | None,
        typer.Option("--argument", "-a", help="name=value of a fault, repeatable.", show_default=False),
    ] = None,
    wait_s: Annotated[float, typer.Option(min=0, help="Seconds to wait for the answers; 0 does not wait.")] = 15.0,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TEXT,
) -> int:
    """Tell processes what to do through `queue-control`, and wait until every live one has answered.

    pause and resume are kept: a process that is restarted is still paused. stop ends a process with exit code 0,
    so `up` does not start it again. fault is for the simulator only.

    Examples: streamforge control pause writer, streamforge control fault simulator -a fault=drop -a count=3
    """
    from streamforge.contracts import load_contracts
    from streamforge.settings import load_settings
    from streamforge.supervision import send_command, wait_for_answers

    arguments = _arguments(order, argument or [])
    plan = {"command": str(order), "target": target, "arguments": arguments, "dry_run": dry_run}
    if dry_run:
        emit(plan, output, lambda: f"would tell {target}: {order} {arguments or ''}")
        return 0
    settings = load_settings()
    contracts = load_contracts(settings.contracts_dir, topic_prefix=settings.topic_prefix)
    sent = send_command(
        settings, contracts, target=target, command=order, issued_by=getpass.getuser(), arguments=arguments
    )
    result: dict[str, object] = {**plan, "command_id": sent.command_id}
    if not wait_s:
        emit(result, output, lambda: f"told {target}: {order}")
        return 0
    answers = wait_for_answers(settings, contracts, sent, timeout_s=wait_s)
    result["answers"] = [
        {"process_id": event.process_id, "state": str(event.state), "detail": event.detail} for event in answers
    ]
    lines = [f"{event.process_id} answered: {event.state} {event.detail}".rstrip() for event in answers]
    emit(result, output, lambda: "\n".join(lines))
    return 0


def _arguments(order: CommandKind, texts: list[str]) -> dict[str, str]:
    if texts and order is not CommandKind.FAULT:
        raise typer.BadParameter(f"--argument belongs to fault, not to {order}")
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise typer.BadParameter(f"--argument must be name=value, found {name!r}")
    return {name: value for name, _, value in pairs}
