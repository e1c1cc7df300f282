"""Fit the graph model on some rows, predict others, save and load it.

Everything that is learned from data, scaling included, is learned from the rows given as training rows. The
last part of them, behind a gap of one label, says when to stop. The same seed gives the same weights on the same
kind of machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from streamforge.errors import ConfigurationError, NotEnoughDataError
from streamforge.gnn.features import FeatureConfig, FeatureSet
from streamforge.gnn.graph import NO_NEIGHBOUR, GraphConfig, MarketGraphs
from streamforge.gnn.network import NetworkConfig, volatility_network
from streamforge.gnn.panel import FloatArray, IntArray

if TYPE_CHECKING:
    import torch

LABEL_INTERVALS = 1
"""A label is of the interval after its row: so many rows at the end of a part see into the next part."""

CONFIG_FILE = "model.json"
WEIGHTS_FILE = "weights.pt"


class TrainingConfig(msgspec.Struct, frozen=True):
    """How the graph model is trained.

    Args:
        seed: of the weights and of the order of the batches.
        epochs: at most so many passes over the training rows.
        patience: passes without a better result on the validation rows before training stops.
        batch_rows: times in one step, each with all its instruments.
        learning_rate: of Adam.
        weight_decay: of Adam.
        validation_ratio: part of the training rows that says when to stop.
        hidden: channels of each attention head.
        heads: attention heads.
        threads: of torch and of LightGBM; more do not help networks of this size, and wait for each other
            where the machine is busy.
    """

    seed: int = 7
    epochs: int = 40
    patience: int = 6
    batch_rows: int = 64
    learning_rate: float = 0.01
    weight_decay: float = 1e-4
    validation_ratio: float = 0.15
    hidden: int = 16
    heads: int = 2
    threads: int = 1


class Recipe(msgspec.Struct, frozen=True):
    """All that a model is made by, apart from data."""

    features: FeatureConfig = FeatureConfig()
    graph: GraphConfig = GraphConfig()
    training: TrainingConfig = TrainingConfig()

    @property
    def history_intervals(self) -> int:
        """Return the intervals that one forecast looks back."""
        return max(self.features.history_intervals, self.graph.history_intervals)


class Scaling(msgspec.Struct, frozen=True):
    """Means and deviations of features and labels over the training rows, all instruments together."""

    means: tuple[float, ...]
    deviations: tuple[float, ...]
    label_mean: float
    label_deviation: float

    def scale(self, values: FloatArray) -> FloatArray:
        """Return standardised features; unknown ones become 0."""
        scaled: FloatArray = np.nan_to_num((values - np.array(self.means)) / np.array(self.deviations), nan=0.0)
        return scaled


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """Fitted weights with what they need to be used.

    Args:
        network: in evaluation mode.
        epochs: passes that were made.
    """

    recipe: Recipe
    interval_ns: int
    names: tuple[str, ...]
    scaling: Scaling
    network: torch.nn.Module
    epochs: int

    def predict(self, features: FeatureSet, graphs: MarketGraphs, rows: IntArray) -> FloatArray:
        """Return predicted log volatility of the next interval, (len(rows), N); NaN where features are not known."""
        import torch  # noqa: PLC0415

        batches = _Batches(features, graphs, self.scaling)
        found = []
        with _bounded_torch(self.recipe.training), torch.no_grad():
            for start in range(0, len(rows), _PREDICT_ROWS):
                part = rows[start : start + _PREDICT_ROWS]
                nodes, edge_index, edge_weight = batches.inputs(part)
                scaled = self.network(nodes, edge_index, edge_weight).numpy().astype(np.float64)
                found.append(scaled.reshape(len(part), -1))
        values = np.concatenate(found) if found else np.empty((0, len(features.instruments)))
        unscaled = values * self.scaling.label_deviation + self.scaling.label_mean
        return np.where(features.known[rows], unscaled, np.nan)


_PREDICT_ROWS = 256


def scaling_of(features: FeatureSet, rows: IntArray) -> Scaling:
    """Fit the scaling on labelled places of `rows`."""
    chosen = features.labelled[rows]
    values, labels = features.values[rows][chosen], features.labels[rows][chosen]
    deviations = values.std(axis=0)
    return Scaling(
        means=tuple(values.mean(axis=0).tolist()),
        deviations=tuple(np.where(deviations > 0, deviations, 1.0).tolist()),
        label_mean=float(labels.mean()),
        label_deviation=float(labels.std()) or 1.0,
    )


def fit_and_stop_rows(features: FeatureSet, rows: IntArray, ratio: float) -> tuple[IntArray, IntArray]:
    """Split training rows, by time, into those to fit on and those that say when to stop.

    Raises:
        NotEnoughDataError: one of both would be without a label.
    """
    stop = max(1, int(len(rows) * ratio))
    fit_rows, stop_rows = rows[: -stop - LABEL_INTERVALS], rows[-stop:]
    labelled = features.labelled
    if not (labelled[fit_rows].any() and labelled[stop_rows].any()):
        msg = f"{len(rows)} intervals to train on hold too few labels, expected some to fit on and some to stop by"
        raise NotEnoughDataError(msg)
    return fit_rows, stop_rows


def train(features: FeatureSet, graphs: MarketGraphs, rows: IntArray, recipe: Recipe) -> TrainedModel:
    """Train on `rows`, which are in order of time; their labels must be known at the time of training.

    Raises:
        NotEnoughDataError: too few rows have labels.
    """
    import torch  # noqa: PLC0415

    config = recipe.training
    fit_rows, stop_rows = fit_and_stop_rows(features, rows, config.validation_ratio)
    scaling = scaling_of(features, fit_rows)
    batches = _Batches(features, graphs, scaling)
    with _bounded_torch(config):
        torch.manual_seed(config.seed)
        network = volatility_network(len(features.names), NetworkConfig(config.hidden, config.heads))
        epochs = _fit(network, batches, fit_rows, stop_rows, config)
    network.eval()
    return TrainedModel(recipe, features.interval_ns, features.names, scaling, network, epochs)


def _fit(
    network: torch.nn.Module, batches: _Batches, fit_rows: IntArray, stop_rows: IntArray, config: TrainingConfig
) -> int:
    """Train until the validation rows say stop; leave the weights that were best on them. Return the passes made."""
    import torch  # noqa: PLC0415

    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=False
    )
    order = np.random.default_rng(config.seed)
    best_loss, best_epoch, best_state = float("inf"), 0, None
    epoch = 0
    for epoch in range(1, config.epochs + 1):
        network.train()
        shuffled = order.permutation(fit_rows)
        for start in range(0, len(shuffled), config.batch_rows):
            optimizer.zero_grad()
            loss, _ = batches.loss(network, shuffled[start : start + config.batch_rows])
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            parts = [batches.loss(network, stop_rows[i : i + _PREDICT_ROWS]) for i in _starts(stop_rows)]
        loss_now = sum(float(loss) * count for loss, count in parts) / max(1, sum(count for _, count in parts))
        if loss_now < best_loss:
            best_loss, best_epoch = loss_now, epoch
            best_state = {name: value.clone() for name, value in network.state_dict().items()}
        elif epoch - best_epoch >= config.patience:
            break
    if best_state is not None:
        network.load_state_dict(best_state)
    return epoch


def _starts(rows: IntArray) -> range:
    return range(0, len(rows), _PREDICT_ROWS)


class _Batches:
    """Turns rows into tensors: all instruments of all rows as the nodes of one graph."""

    def __init__(self, features: FeatureSet, graphs: MarketGraphs, scaling: Scaling) -> None:
        self._known = features.known
        self._labelled = features.labelled
        self._values = scaling.scale(features.values).astype(np.float32)
        labels = (features.labels - scaling.label_mean) / scaling.label_deviation
        self._labels = np.nan_to_num(labels, nan=0.0).astype(np.float32)
        self._graphs = graphs

    def inputs(self, rows: IntArray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return nodes, edge index and edge weights; instruments that are not known have no edges out."""
        import torch  # noqa: PLC0415

        known, graph = self._known[rows], self._graphs.graph_of_row[rows]
        neighbours, weights = self._graphs.neighbours[graph], self._graphs.weights[graph]
        _, instruments, features = self._values.shape
        at = np.arange(len(rows))[:, None, None]
        there = (neighbours != NO_NEIGHBOUR) & known[at, neighbours]
        sources = (at * instruments + neighbours)[there]
        targets = np.broadcast_to(at * instruments + np.arange(instruments)[None, :, None], there.shape)[there]
        return (
            torch.from_numpy(self._values[rows].reshape(-1, features)),
            torch.from_numpy(np.stack([sources, targets])),
            torch.from_numpy(weights[there].astype(np.float32)[:, None]),
        )

    def loss(self, network: torch.nn.Module, rows: IntArray) -> tuple[torch.Tensor, int]:
        """Return the mean squared error over the labelled places of `rows`, and their number."""
        import torch  # noqa: PLC0415

        predicted = network(*self.inputs(rows))
        chosen = torch.from_numpy(self._labelled[rows].reshape(-1))
        labels = torch.from_numpy(self._labels[rows].reshape(-1))
        count = int(chosen.sum())
        if count == 0:
            return (predicted * 0.0).sum(), 0
        return torch.nn.functional.mse_loss(predicted[chosen], labels[chosen]), count


@contextmanager
def _bounded_torch(config: TrainingConfig) -> Iterator[None]:
    """Bound torch's threads and leave its random state as it was."""
    import torch  # noqa: PLC0415

    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


class _SavedModel(msgspec.Struct, frozen=True):
    """The part of a model artifact that is text."""

    recipe: Recipe
    interval_ns: int
    names: tuple[str, ...]
    scaling: Scaling
    epochs: int


def save_model(model: TrainedModel, folder: Path) -> None:
    """Write the model artifact: a JSON file and the weights."""
    import torch  # noqa: PLC0415

    saved = _SavedModel(model.recipe, model.interval_ns, model.names, model.scaling, model.epochs)
    (folder / CONFIG_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(saved)))
    torch.save(model.network.state_dict(), folder / WEIGHTS_FILE)


_BROKEN = (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, UnpicklingError)
"""What reading a file of broken weights raises: torch passes on whatever the bytes lead it into."""


def load_recipe(folder: Path) -> Recipe:
    """Read what the model artifact in `folder` was made by, without its weights.

    Raises:
        ConfigurationError: the file is missing, or of another version of the program.
    """
    return _saved(folder).recipe


def load_model(folder: Path) -> TrainedModel:
    """Read a model artifact.

    Raises:
        ConfigurationError: files are missing, broken, or of another version of the program.
    """
    import torch  # noqa: PLC0415

    saved = _saved(folder)
    config = saved.recipe.training
    try:
        network = volatility_network(len(saved.names), NetworkConfig(config.hidden, config.heads))
        state: dict[str, Any] = torch.load(folder / WEIGHTS_FILE, weights_only=True, map_location="cpu")
        network.load_state_dict(state)
    except _BROKEN as error:
        raise _unreadable(folder, error) from error
    network.eval()
    return TrainedModel(saved.recipe, saved.interval_ns, saved.names, saved.scaling, network, saved.epochs)


def _saved(folder: Path) -> _SavedModel:
    try:
        return msgspec.json.decode((folder / CONFIG_FILE).read_bytes(), type=_SavedModel)
    except (OSError, msgspec.MsgspecError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ConfigurationError:
    # torch writes paragraphs.
    told = f"{type(error).__name__}: {error}".partition("\n")[0]
    return ConfigurationError(
        f"the model artifact in {folder} cannot be read: {told}. Train again: job `retrain` in Dagster"
    )
