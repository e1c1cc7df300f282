"""The network: GATv2 attention over the market graph beside a linear path of each instrument's own features.

The linear path alone is the HAR model and more; the graph path adds what neighbours tell. Its last layer starts
at zero, so training begins from the linear model.

torch is imported when a network is made, not when this module is: the module may be loaded by anyone.

Source: Brody, Alon, Yahav, "How Attentive are Graph Attention Networks?" (2022), for GATv2.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import torch


class NetworkConfig(msgspec.Struct, frozen=True):
    """Size of the network.

    Args:
        hidden: channels of each attention head.
        heads: attention heads.
    """

    hidden: int = 16
    heads: int = 2


def volatility_network(features: int, config: NetworkConfig) -> torch.nn.Module:
    """Make a network for `features` features of each node; its weights come from torch's random state.

    It takes nodes (B * N, F), edge_index (2, E) int64 with rows source and target, edge weights (E, 1), and
    returns the standardised label of every node, (B * N,).
    """
    made: torch.nn.Module = _network_class()(features, config)
    return made


@cache
def _network_class() -> type[torch.nn.Module]:
    import torch  # noqa: PLC0415

    with warnings.catch_warnings():
        # torch-geometric 2.8 scripts functions as it loads, which torch 2.15 deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        from torch_geometric.nn import GATv2Conv  # noqa: PLC0415

    elu = torch.nn.functional.elu

    class VolatilityNetwork(torch.nn.Module):  # type: ignore[misc]
        """Predict the standardised label of every node."""

        def __init__(self, features: int, config: NetworkConfig) -> None:
            super().__init__()
            width = config.hidden * config.heads
            self.linear = torch.nn.Linear(features, 1)
            self.embed = torch.nn.Linear(features, width)
            self.attend = GATv2Conv(width, config.hidden, heads=config.heads, edge_dim=1, add_self_loops=False)
            self.read = torch.nn.Linear(2 * width, width)
            self.out = torch.nn.Linear(width, 1)
            torch.nn.init.zeros_(self.out.weight)
            torch.nn.init.zeros_(self.out.bias)

        def forward(self, nodes: torch.Tensor, edge_index: torch.Tensor, edge_weight: torch.Tensor) -> torch.Tensor:
            """Return one value for each node."""
            own = elu(self.embed(nodes))
            told = elu(self.attend(own, edge_index, edge_weight))
            read = elu(self.read(torch.cat([own, told], dim=1)))
            result: torch.Tensor = (self.linear(nodes) + self.out(read)).squeeze(1)
            return result

    return VolatilityNetwork
