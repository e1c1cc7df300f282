"""The manifests are what Kubernetes, the command line and the settings say they may be."""

from __future__ import annotations

import runpy
from typing import Any

import click.testing
import httpx
import pytest
import typer.main
import typer.testing
import yaml
from dagster._cli import create_dagster_cli
from dagster._daemon.cli import create_dagster_daemon_cli
from dagster_webserver.cli import create_dagster_webserver_cli

from cli.app import app
from cli.run import WORKERS
from streamforge import __version__
from streamforge.metrics import MetricsServer, ProcessMetrics
from streamforge.settings import build_settings
from streaming.loaders.base import LoaderSettings
from streaming.processors.types import TransactionOptions
from streaming.writer import WriterSettings
from tests.kubernetes_support import (
    MANIFESTS,
    REPOSITORY,
    container_of,
    kustomization,
    objects,
    of_kind,
    pod_of,
    restricted_faults,
    validate,
    workloads,
)

POD_INDEX = {
    "name": "POD_INDEX",
    "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}},
}
# Read by libraries: Dagster, libpq, and the AWS clients of PyArrow and Iceberg.
LIBRARY_VARIABLES = {
    "DAGSTER_HOME",
    "DAGSTER_CURRENT_IMAGE",
    "PGSSLMODE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_REGION",
}
DAGSTER_PROGRAMS = {
    "dagster": create_dagster_cli,
    "dagster-daemon": create_dagster_daemon_cli,
    "dagster-webserver": create_dagster_webserver_cli,
}
ALWAYS_ON = {**of_kind("StatefulSet"), **of_kind("Deployment")}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@pytest.fixture(scope="module")
def setting_names() -> set[str]:
    """Return the variable of every setting of every kind of process."""
    page = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))
    return {f"STREAMFORGE_{name.upper()}" for kind in page["settings_classes"]() for name in kind.model_fields}


def example_secrets() -> dict[str, dict[str, str]]:
    """Return the variables of each example of a Secret, by the Secret's name."""
    files = (MANIFESTS / "secrets").glob("*.env.example")
    return {
        file.name.removesuffix(".env.example"): dict(
            line.split("=", 1)
            for line in file.read_text(encoding="utf-8").splitlines()
            if line and not line.startswith("#")
        )
        for file in files
    }


def labels_of(workload: dict[str, Any]) -> dict[str, str]:
    """Return the labels of the pods of a workload."""
    labels: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def selected(selector: dict[str, str]) -> set[str]:
    """Return the workloads whose pods `selector` picks."""
    return {name for name, item in workloads().items() if selector.items() <= labels_of(item).items()}


# What Kubernetes says


@pytest.mark.parametrize("item", objects(), ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_object_fits_the_schemas_of_kubernetes(item: dict[str, Any]) -> None:
    validate(item)


def test_misspelt_field_is_found() -> None:
    item = workloads()["writer"]
    pod_of(item)["terminationGraceperiodSeconds"] = 5
    with pytest.raises(AssertionError, match=r"StatefulSet writer.*terminationGraceperiodSeconds"):
        validate(item)


def test_every_manifest_is_applied() -> None:
    applied = {*kustomization()["resources"], "kustomization.yaml"}
    assert {path.name for path in MANIFESTS.glob("*.yaml")} == applied


@pytest.mark.parametrize("name", workloads())
def test_pod_is_restricted_and_bounded(name: str) -> None:
    assert not list(restricted_faults(pod_of(workloads()[name])))
    (namespace,) = of_kind("Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_names_that_objects_refer_to_exist() -> None:
    accounts, services = of_kind("ServiceAccount"), of_kind("Service")
    for item in workloads().values():
        assert pod_of(item)["serviceAccountName"] in accounts
        assert item["spec"].get("selector", {}).get("matchLabels", {}).items() <= labels_of(item).items()
        if item["kind"] == "StatefulSet":
            assert item["spec"]["serviceName"] in services
        for volume in pod_of(item)["volumes"]:
            assert volume.get("configMap", {}).get("name", "dagster-instance") in of_kind("ConfigMap")
    for binding in of_kind("RoleBinding").values():
        assert binding["roleRef"]["name"] in of_kind("Role")
        assert {subject["name"] for subject in binding["subjects"]} <= set(accounts)


def test_selectors_pick_the_pods_they_are_meant_for() -> None:
    services = {name: selected(item["spec"]["selector"]) for name, item in of_kind("Service").items()}
    assert services.pop("consumers") == set(of_kind("StatefulSet"))
    assert services == {name: {name} for name in ("dagster-webserver", "lakehouse", "ml")}
    (policy,) = of_kind("NetworkPolicy").values()
    assert selected(policy["spec"]["podSelector"]["matchLabels"]) == {"lakehouse", "ml"}
    (source,) = policy["spec"]["ingress"][0]["from"]
    assert selected(source["podSelector"]["matchLabels"]) == {"dagster-webserver", "dagster-daemon"}


def test_every_always_on_process_has_a_disruption_budget_of_one_pod() -> None:
    budgets = of_kind("PodDisruptionBudget")
    assert {name: selected(item["spec"]["selector"]["matchLabels"]) for name, item in budgets.items()} == {
        name: {name} for name in ALWAYS_ON
    }
    assert {item["spec"]["maxUnavailable"] for item in budgets.values()} == {1}


# What the command line says


def test_every_consumer_has_a_stateful_set_whose_ordinal_is_the_slot() -> None:
    found = of_kind("StatefulSet")
    assert set(found) == {"loader", *WORKERS}
    for name, item in found.items():
        container = container_of(item)
        command = ["streamforge", "load"] if name == "loader" else ["streamforge", "run", name]
        assert container["args"][: len(command)] == command
        assert "--slot $(POD_INDEX)" in " ".join(container["args"])
        assert container["env"] == [POD_INDEX]


@pytest.mark.parametrize("name", workloads())
def test_command_has_only_options_that_its_program_knows(name: str) -> None:
    assert_is_a_command(container_of(workloads()[name])["args"])


def test_probe_commands_have_only_options_that_their_program_knows() -> None:
    for item in ALWAYS_ON.values():
        for probe in PROBES:
            command = container_of(item).get(probe, {}).get("exec", {}).get("command")
            if command:
                assert_is_a_command(command)


def assert_is_a_command(words: list[str]) -> None:
    """Parse `words` with the program's own parser; `--help` at the end keeps it from running."""
    program, *arguments = words
    if program == "streamforge":
        ours = typer.testing.CliRunner().invoke(app, [*arguments, "--help"])
        code, output = ours.exit_code, ours.output
    else:
        found = click.testing.CliRunner().invoke(DAGSTER_PROGRAMS[program](), [*arguments, "--help"])
        code, output = found.exit_code, found.output
    assert code == 0, output


def test_workspace_has_the_code_locations_of_the_laptop_each_behind_its_service() -> None:
    local = yaml.safe_load((REPOSITORY / "workspace.yaml").read_text(encoding="utf-8"))["load_from"]
    modules = {item["python_module"]["location_name"]: item["python_module"]["module_name"] for item in local}
    remote = yaml.safe_load((MANIFESTS / "dagster" / "workspace.yaml").read_text(encoding="utf-8"))["load_from"]
    servers = {item["grpc_server"]["location_name"]: item["grpc_server"] for item in remote}
    assert set(servers) == set(modules)
    for location, server in servers.items():
        service = of_kind("Service")[server["host"]]
        assert [port["port"] for port in service["spec"]["ports"]] == [server["port"]]
        (name,) = selected(service["spec"]["selector"])
        arguments = container_of(workloads()[name])["args"]
        assert arguments[arguments.index("--module-name") + 1] == modules[location]
        assert arguments[arguments.index("--port") + 1] == str(server["port"])


# What the settings say


def test_every_variable_is_a_setting_or_is_read_by_a_library(setting_names: set[str]) -> None:
    instance = (MANIFESTS / "dagster" / "dagster.yaml").read_text(encoding="utf-8")
    read_by_instance = {line.split("env:")[1].strip() for line in instance.splitlines() if "env: " in line}
    allowed = setting_names | LIBRARY_VARIABLES | read_by_instance
    given = {name for item in of_kind("ConfigMap").values() for name in item["data"] if not name.endswith(".yaml")}
    given |= {name for variables in example_secrets().values() for name in variables}
    assert not given - allowed
    assert not read_by_instance - given
    for item in workloads().values():
        container = container_of(item)
        own = {variable["name"] for variable in container.get("env", [])}
        assert not {name for name in own - allowed if f"$({name})" not in container["args"]}


def test_settings_of_the_cluster_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("streamforge", "dagster"):
        for variable, value in of_kind("ConfigMap")[name]["data"].items():
            monkeypatch.setenv(variable, value)
    settings = build_settings(LoaderSettings)
    assert settings.catalog_type == "rest"
    assert settings.metrics_host not in {"127.0.0.1", "localhost"}, "the kubelet asks from outside the pod"
    assert settings.home_path.as_posix() in {
        mount["mountPath"] for mount in container_of(workloads()["writer"])["volumeMounts"]
    }


def test_secrets_are_referred_to_and_never_written_down() -> None:
    assert not of_kind("Secret")
    assert {value for variables in example_secrets().values() for value in variables.values()} == {""}
    maps = set(of_kind("ConfigMap"))
    for name, item in workloads().items():
        sources = container_of(item)["envFrom"]
        secrets = {source["secretRef"]["name"] for source in sources if "secretRef" in source}
        assert secrets <= set(example_secrets())
        assert {source["configMapRef"]["name"] for source in sources if "configMapRef" in source} <= maps
        # Who lands data has no business in Dagster's database.
        assert ("dagster-secrets" in secrets) == (pod_of(item)["serviceAccountName"] == "dagster"), name


# What the processes say


def test_images_have_this_version_and_the_packages_that_the_process_needs() -> None:
    images = {name: container_of(item)["image"] for name, item in workloads().items()}
    assert {image.split(":")[1] for image in images.values()} == {__version__}
    by_packages = {name: image.split(":")[0] for name, image in images.items()}
    models = {"ml", "inference"}
    control = {"dagster-webserver", "dagster-daemon", "lakehouse"}
    assert {name for name, image in by_packages.items() if image == "streamforge-ml"} == models
    assert {name for name, image in by_packages.items() if image == "streamforge-dagster"} == control
    tags = {item["name"]: item["newTag"] for item in kustomization()["images"]}
    assert tags == dict.fromkeys(by_packages.values(), __version__)


def test_runs_of_a_code_location_use_its_image() -> None:
    replaced = {item["source"]["name"] for item in kustomization()["replacements"]}
    locations = selected({"app.kubernetes.io/component": "code-location"})
    assert replaced == locations
    for name in locations:
        container = container_of(workloads()[name])
        assert container["env"] == [{"name": "DAGSTER_CURRENT_IMAGE", "value": container["image"]}]


@pytest.mark.parametrize("name", ALWAYS_ON)
def test_probes_ask_a_port_that_the_process_is_told_to_serve(name: str) -> None:
    container = container_of(ALWAYS_ON[name])
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    probes = [container[probe] for probe in PROBES if probe in container]
    assert {"startupProbe", "livenessProbe"} <= container.keys()
    # The daemon serves nothing: no Service waits for it to be ready.
    assert ("readinessProbe" in container) == bool(ports)
    for probe in probes:
        asked = probe["httpGet"]["port"] if "httpGet" in probe else probe.get("grpc", {}).get("port")
        port = ports.get(asked, asked)
        assert port is None or str(port) in container["args"]


def test_consumers_are_asked_for_paths_that_they_answer() -> None:
    paths = {
        probe: {container_of(item)[probe]["httpGet"]["path"] for item in of_kind("StatefulSet").values()}
        for probe in PROBES
    }
    metrics = ProcessMetrics("writer", "0")
    server = MetricsServer(metrics)
    try:
        answers = {
            (probe, path): httpx.get(f"http://127.0.0.1:{server.port}{path}").status_code
            for probe in PROBES
            for path in paths[probe]
        }
    finally:
        server.close()
    # Not ready yet: it must not be restarted for that, and gets no traffic.
    assert answers == {
        ("startupProbe", "/live"): 200,
        ("readinessProbe", "/ready"): 503,
        ("livenessProbe", "/live"): 200,
    }


def test_processes_have_the_time_to_end_that_they_may_need() -> None:
    writer, loader = build_settings(WriterSettings), build_settings(LoaderSettings)
    needed_s = {
        "writer": writer.writer_commit_deadline_s + writer.writer_commit_interval_s,
        "loader": 2 * loader.loader_stop_deadline_s,
        **{name: TransactionOptions().transaction_timeout_ms / 1000 for name in set(WORKERS) - {"writer"}},
    }
    for name, seconds in needed_s.items():
        assert pod_of(workloads()[name])["terminationGracePeriodSeconds"] > seconds, name


def test_files_that_dagster_is_told_of_are_mounted_and_its_home_can_be_written() -> None:
    (home,) = {item["data"]["DAGSTER_HOME"] for item in of_kind("ConfigMap").values() if "DAGSTER_HOME" in item["data"]}
    files = of_kind("ConfigMap")["dagster-instance"]["data"]
    for item in of_kind("Deployment").values():
        mounts = {mount["mountPath"]: mount for mount in container_of(item)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod_of(item)["volumes"]}
        assert "emptyDir" in volumes[mounts[home]["name"]]
        told = [f"{home}/dagster.yaml", *(word for word in container_of(item)["args"] if word.endswith(".yaml"))]
        assert all(mounts[path]["subPath"] in files for path in told)


def test_only_one_daemon_runs_at_a_time() -> None:
    spec = workloads()["dagster-daemon"]["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate")
