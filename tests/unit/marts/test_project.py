"""The dbt project is what contracts and models say, and needs no dbt to be known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from streamforge.contracts import Contracts, load_contracts
from streamforge.errors import ProcessError
from streamforge.market.indicators import IndicatorState, add_bar
from streamforge.marts.generate import STAGING, staging_files, staging_name
from streamforge.marts.project import GRAPH_FILE, project_dir, read_graph
from streamforge.marts.run import run_dbt_process
from streamforge.marts.spark_functions import FoldIndicators
from streamforge.settings import Settings

ADVICE = "run `uv run python dbt/generate.py`"


@pytest.fixture(scope="module")
def contracts() -> Contracts:
    return load_contracts(Settings(_env_file=None).contracts_dir)  # type: ignore[call-arg]


def test_staging_is_what_the_contracts_say(contracts: Contracts) -> None:
    folder = project_dir()
    written = {f"{STAGING}/{path.name}": path.read_text(encoding="utf-8") for path in (folder / STAGING).iterdir()}
    assert written == staging_files(contracts), ADVICE


def test_every_table_is_a_source_with_all_columns_and_a_staging_model(contracts: Contracts) -> None:
    document = yaml.safe_load(staging_files(contracts)[f"{STAGING}/_contracts.yml"])
    tables = {table["name"]: table for table in document["sources"][0]["tables"]}
    models = {model["name"] for model in document["models"]}
    for contract in contracts.with_table:
        assert contract.table is not None
        columns = [(column["name"], column["data_type"]) for column in tables[contract.table.name]["columns"]]
        assert columns == [(field.name, field.type_name) for field in contract.fields]
        assert staging_name(contract) in models


def test_graph_is_what_dbt_itself_says(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from streamforge.marts.generate import graph_file; from streamforge.marts.run import parse_manifest\n"
        "from streamforge.settings import Settings\n"
        "[text] = graph_file(parse_manifest(Settings(_env_file=None, home=sys.argv[1]))).values()\n"
        "Path(sys.argv[2]).write_text(text, encoding='utf-8')"
    )
    # In a process of its own: dbt's warnings and logging stay there.
    command = [sys.executable, "-c", code, str(tmp_path / "home"), str(tmp_path / GRAPH_FILE)]
    subprocess.run(command, check=True, capture_output=True)
    found, written = ((folder / GRAPH_FILE).read_text(encoding="utf-8") for folder in (tmp_path, project_dir()))
    assert json.loads(written) == json.loads(found), ADVICE


def test_every_model_and_column_of_the_project_is_described() -> None:
    graph = read_graph()
    silent = [model.name for model in graph.models if not model.description or not model.columns]
    silent += [f"{model.name}.{c.name}" for model in graph.models for c in model.columns if not c.description]
    silent += [test.name for test in graph.tests if not test.description]
    assert not silent


def test_a_fold_that_starts_from_a_state_row_gives_what_the_whole_series_gives() -> None:
    bars = [(float(3 + n % 5), float(n % 3), 2.0 + n % 4) for n in range(260)]
    state = IndicatorState()
    whole = []
    for bar in bars:
        state, found = add_bar(state, *bar)
        whole.append((*found, *state))
    fold, rest = FoldIndicators(), FoldIndicators()
    first = [row for bar in bars[:120] for row in fold.eval(_row(bar))]
    *_, bars_so_far, ema_fast, ema_slow, rise, fall, true_range = first[-1]
    resumed = _row(bars[119]) | {
        "is_state": True,
        "bar_number": bars_so_far,
        "state_ema_50": ema_fast,
        "state_ema_200": ema_slow,
        "state_rise": rise,
        "state_fall": fall,
        "state_true_range": true_range,
    }
    assert list(rest.eval(resumed)) == []
    rows = first + [row for bar in bars[120:] for row in rest.eval(_row(bar))]
    # A row has no close: the state row brings it.
    assert [row[3:] for row in rows] == [(*each[:5], *each[6:]) for each in whole]


def test_a_dbt_run_without_results_says_what_dbt_said(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, home=tmp_path / "home")  # type: ignore[call-arg]
    heard: list[str] = []
    with pytest.raises(ProcessError, match=r"no-such-command.*exit code 2"):
        run_dbt_process(settings, ["no-such-command"], heard.append)
    assert any("No such command" in line for line in heard)


def test_whoever_is_interrupted_takes_dbt_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(_env_file=None, home=tmp_path / "home")  # type: ignore[call-arg]
    started: list[subprocess.Popen[str]] = []

    class Popen(subprocess.Popen[str]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            started.append(self)

    def interrupted(_line: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Popen)
    with pytest.raises(KeyboardInterrupt):
        run_dbt_process(settings, ["parse"], interrupted)
    assert [process.returncode is not None for process in started] == [True]
    assert not list((tmp_path / "home" / "dbt").glob("run-*"))


def _row(bar: tuple[float, float, float]) -> dict[str, object]:
    names = ("bar_number", "state_ema_50", "state_ema_200", "state_rise", "state_fall", "state_true_range")
    keys = {"instrument": "i", "interval": "5m", "ts_start_ns": 0, "is_state": False}
    return keys | dict(zip(("high", "low", "close"), bar, strict=True)) | dict.fromkeys(names)
