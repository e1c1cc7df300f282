"""The cluster's Dagster instance, and the Jobs that its launcher and executor make, run as a node would run them.

There is no cluster here: a server on the loopback interface takes what dagster-k8s sends to Kubernetes' API,
checks it against Kubernetes' schemas, and runs each Job's command with the environment that its pod would have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._config import process_config
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.instance.ref import InstanceRef
from dagster._core.launcher import LaunchRunContext
from dagster_k8s import K8sRunLauncher, k8s_job_executor
from dagster_postgres import DagsterPostgresStorage
from dagster_postgres.utils import pg_url_from_config

from assets.catalogue import stream_key, table_key
from orchestration.resources import job_executor
from streamforge.lakehouse.catalog import ensure_table, open_catalog
from streamforge.settings import Settings
from tests.conftest import MakeTopics
from tests.kubernetes_support import MANIFESTS, REPOSITORY, of_kind, restricted_faults, validate
from tests.waiting import wait_until

INSTANCE_FILE = MANIFESTS / "dagster" / "dagster.yaml"
IMAGE = "streamforge-dagster:0.1.0"
NAMESPACE = "streamforge"
POSTGRES = {
    "DAGSTER_POSTGRES_USER": "streamforge",
    "DAGSTER_POSTGRES_PASSWORD": "p@ss/word",
    "DAGSTER_POSTGRES_HOST": "postgres.postgres",
    "DAGSTER_POSTGRES_PORT": "5433",
    "DAGSTER_POSTGRES_DB": "dagster",
}
_JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"


class Cluster:
    """Kubernetes' API as far as dagster-k8s uses it for runs, and one node.

    Args:
        config_maps: variables of each ConfigMap and Secret that a pod may draw from.
        logs: folder of what the commands print.
    """

    def __init__(self, config_maps: Mapping[str, Mapping[str, str]], logs: Path) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.faults: list[str] = []
        self._config_maps = config_maps
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig for this cluster to `path`."""
        server = {"server": f"http://127.0.0.1:{self._server.server_address[1]}"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": server}],
            "users": [{"name": "us", "user": {}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "us"}}],
            "current-context": "here",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def create(self, job: dict[str, Any]) -> None:
        """Check `job` and run the command of its container."""
        name = job["metadata"]["name"]
        self.jobs[name] = job
        pod = job["spec"]["template"]["spec"]
        try:
            validate(job)
        except AssertionError as error:
            self.faults.append(str(error))
        self.faults += restricted_faults(pod)
        (container,) = pod["containers"]
        with (self._logs / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                container["args"], env=self._environment(container), cwd=REPOSITORY, stdout=log, stderr=log
            )

    def status(self, name: str) -> dict[str, Any] | None:
        """Return the Job with its status; None where there is none."""
        if name not in self.jobs:
            return None
        code = self._processes[name].poll()
        state = {"active": 1} if code is None else {"succeeded": 1} if code == 0 else {"failed": 1}
        return self.jobs[name] | {"status": state}

    def has_ended(self, name: str) -> bool:
        """Return whether the command of Job `name` has ended."""
        return self._processes[name].poll() is not None

    def log(self) -> str:
        """Return what all commands printed."""
        return "\n".join(f"{path.name}\n{path.read_text()}" for path in sorted(self._logs.iterdir()))

    def close(self) -> None:
        """Stop serving, and end what still runs."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _environment(self, container: Mapping[str, Any]) -> dict[str, str]:
        """Return the variables of a pod: nothing of ours but the programs' folder."""
        found = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}"}
        for source in container["envFrom"]:
            found |= self._config_maps[next(iter(source.values()))["name"]]
        return found | {item["name"]: item["value"] for item in container["env"]}


def _handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == _JOBS
            cluster.create(job)
            self._say(201, job)

        def do_GET(self) -> None:
            found = cluster.status(self.path.removeprefix(f"{_JOBS}/").removesuffix("/status"))
            self._say(404 if found is None else 200, found or {"kind": "Status", "code": 404})

        def _say(self, code: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


def deployed() -> dict[str, Any]:
    """Return the cluster's dagster.yaml."""
    return dict(yaml.safe_load(INSTANCE_FILE.read_text(encoding="utf-8")))


def test_instance_is_postgres_from_the_environment_and_a_job_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**POSTGRES, "DAGSTER_HOME": "/opt/dagster/home"}.items():
        monkeypatch.setenv(name, value)
    reference = InstanceRef.from_dir(str(INSTANCE_FILE.parent))
    storage = yaml.safe_load(reference.storage_data.config_yaml)
    read = process_config(DagsterPostgresStorage.config_type(), storage)
    assert read.success, read.errors
    assert pg_url_from_config(read.value) == "postgresql://streamforge:p%40ss/word@postgres.postgres:5433/dagster"
    launcher = reference.run_launcher_data
    assert launcher is not None
    assert (launcher.module_name, launcher.class_name) == ("dagster_k8s", K8sRunLauncher.__name__)
    config = process_config(K8sRunLauncher.config_type(), yaml.safe_load(launcher.config_yaml))
    assert config.success, config.errors


def test_what_steps_hand_on_lies_on_a_volume_that_every_pod_of_a_run_mounts() -> None:
    config = deployed()["run_launcher"]["config"]
    folder = deployed()["local_artifact_storage"]["config"]["base_dir"]
    (volume,) = [mount["name"] for mount in config["volume_mounts"] if mount["mountPath"] == folder]
    (claim,) = [item["persistentVolumeClaim"]["claimName"] for item in config["volumes"] if item["name"] == volume]
    assert of_kind("PersistentVolumeClaim")[claim]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_instance_without_its_password_says_which_variable_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in POSTGRES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DAGSTER_POSTGRES_PASSWORD")
    read = process_config(DagsterPostgresStorage.config_type(), deployed()["storage"]["postgres"])
    assert not read.success
    assert "DAGSTER_POSTGRES_PASSWORD" in str(read.errors)


def test_executor_is_local_unless_the_environment_says_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_executor() is dg.multi_or_in_process_executor
    assert job_executor(dg.in_process_executor) is dg.in_process_executor
    monkeypatch.setenv("STREAMFORGE_ORCHESTRATION_EXECUTOR", "kubernetes")
    assert job_executor(dg.in_process_executor) is k8s_job_executor


def test_every_job_with_steps_to_spread_has_the_executor_that_the_environment_chose() -> None:
    # A job of one step has nothing to spread: its run is a pod already.
    code = (
        "from orchestration import lakehouse, ml\n"
        "jobs = [job for module in (lakehouse, ml) for job in module.defs.get_repository_def().get_all_jobs()]\n"
        "print({job.executor_def.name for job in jobs if len(job.graph.nodes) > 1})"
    )
    environment = {**os.environ, "STREAMFORGE_ORCHESTRATION_EXECUTOR": "kubernetes"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str({k8s_job_executor.name})


@pytest.fixture
def cluster(platform: Settings, tmp_path: Path) -> Iterator[Cluster]:
    """Return a cluster whose ConfigMaps name the test's broker and tables."""
    logs = tmp_path / "pods"
    logs.mkdir()
    settings = {
        "STREAMFORGE_HOME": str(platform.home_path),
        "STREAMFORGE_TOPIC_PREFIX": platform.topic_prefix,
        "STREAMFORGE_BOOTSTRAP_SERVERS": str(platform.bootstrap_servers),
    }
    chosen = "STREAMFORGE_ORCHESTRATION_EXECUTOR"
    config_maps = {
        "streamforge": settings,
        "dagster": {chosen: of_kind("ConfigMap")["dagster"]["data"][chosen]},
        "streamforge-secrets": {},
        "dagster-secrets": {},
    }
    made = Cluster(config_maps, logs)
    yield made
    made.close()
    print(made.log())  # noqa: T201 - shown when the test fails


@pytest.fixture
def instance(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """Return the cluster's instance with SQLite for Postgres and the loopback cluster for the one that it runs in."""
    home = tmp_path / "dagster"
    home.mkdir()
    config = deployed()
    config["storage"] = {"sqlite": {"base_dir": str(home)}}
    config["local_artifact_storage"]["config"]["base_dir"] = str(home)
    config["run_launcher"]["config"] |= {
        "load_incluster_config": False,
        "kubeconfig_file": str(cluster.kubeconfig(tmp_path / "kubeconfig")),
    }
    (home / "dagster.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with dg.DagsterInstance.get() as made:
        yield made


@pytest.mark.integration
def test_run_and_each_of_its_steps_are_jobs_that_kubernetes_takes_and_that_do_the_work(
    platform: Settings, make_topics: MakeTopics, cluster: Cluster, instance: dg.DagsterInstance
) -> None:
    contracts = make_topics("market-gaps")
    ensure_table(open_catalog(platform), platform, contracts["commits"])
    stream, table = stream_key(contracts["market-gaps"]), table_key(contracts["commits"])
    repository = ReconstructableRepository.for_module("orchestration.lakehouse", "defs", str(REPOSITORY), IMAGE)
    job = repository.get_reconstructable_job("observe")
    run = instance.create_run_for_job(
        job.get_definition(),
        job_code_origin=job.get_python_origin(),
        asset_selection=frozenset({stream, table}),
    )

    instance.run_launcher.launch_run(LaunchRunContext(run, workspace=None))
    wait_until(lambda: cluster.has_ended(f"dagster-run-{run.run_id}"), timeout_s=270, what="the run's Job ends")

    ended = instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.status is dg.DagsterRunStatus.SUCCESS
    assert not cluster.faults
    components = [item["metadata"]["labels"]["app.kubernetes.io/component"] for item in cluster.jobs.values()]
    steps = instance.get_run_stats(run.run_id).steps_succeeded
    assert steps > 1, "an observation, and what checks the table that was observed"
    assert components == ["run_worker", *["step_worker"] * steps]
    images = {item["spec"]["template"]["spec"]["containers"][0]["image"] for item in cluster.jobs.values()}
    assert images == {IMAGE}
    assert instance.fetch_observations(stream, limit=1).records
    assert instance.fetch_observations(table, limit=1).records
