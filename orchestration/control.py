"""Control of the always-on processes from Dagster: observed consumers, jobs that tell them, a sensor that warns."""

import dagster as dg

from streamforge.contracts import Contracts


def definitions(contracts: Contracts) -> dg.Definitions:
    """Return what Dagster has to see and steer the consumers."""
    del contracts
    return dg.Definitions()
