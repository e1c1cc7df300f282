"""What `deploy/kubernetes` says, read as Kubernetes would, and the schemas that it is checked against."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
MANIFESTS = REPOSITORY / "deploy" / "kubernetes"
VERSIONS = ("1.32", kubernetes_validate.latest_version())
"""The oldest Kubernetes that docs/deployment.md names (pods know their index there), and the newest schemas we have."""

Object = dict[str, Any]


def kustomization() -> Object:
    """Return what is applied, by file and by generated ConfigMap."""
    return _documents(MANIFESTS / "kustomization.yaml")[0]


def objects() -> list[Object]:
    """Return every object that `kubectl apply -k` would send, without its namespace."""
    listed = kustomization()
    found = [item for name in listed["resources"] for item in _documents(MANIFESTS / name)]
    for generated in listed["configMapGenerator"]:
        data = {Path(name).name: (MANIFESTS / name).read_text(encoding="utf-8") for name in generated["files"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generated["name"]}, "data": data})
    return found


def of_kind(*kinds: str) -> dict[str, Object]:
    """Return the objects of `kinds` by name."""
    return {item["metadata"]["name"]: item for item in objects() if item["kind"] in kinds}


def workloads() -> dict[str, Object]:
    """Return what has a pod template, by name."""
    return of_kind("StatefulSet", "Deployment", "Job")


def pod_of(workload: Mapping[str, Any]) -> Object:
    """Return the pod specification of a workload."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def container_of(workload: Mapping[str, Any]) -> Object:
    """Return the one container of a workload."""
    (container,) = pod_of(workload)["containers"]
    return dict(container)


def validate(item: Object) -> None:
    """Check one object against the schemas of every version, unknown fields included.

    Raises:
        AssertionError: names object, version, place and fault.
    """
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = ".".join(str(part) for part in error.path)
            text = f"{item['kind']} {item['metadata'].get('name')}, Kubernetes {version}, at {place}: {error.message}"
            raise AssertionError(text) from error


def restricted_faults(pod: Mapping[str, Any]) -> Iterator[str]:
    """Say what the Pod Security Standard `restricted` (and our own, stricter rules) would refuse in a pod."""
    whole = pod.get("securityContext", {})
    if whole.get("runAsNonRoot") is not True or not whole.get("runAsUser"):
        yield "runs as root"
    if whole.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "no seccomp profile"
    if pod.get("enableServiceLinks") is not False:
        yield "Services put variables into its environment"
    if any("hostPath" in volume for volume in pod.get("volumes", [])):
        yield "mounts a folder of the node"
    names = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        if {mount["name"] for mount in container.get("volumeMounts", [])} - names:
            yield f"{container['name']} mounts a volume that the pod lacks"
        yield from (f"{container['name']} {fault}" for fault in _container_faults(container))


def _container_faults(container: Mapping[str, Any]) -> Iterator[str]:
    own, resources = container.get("securityContext", {}), container.get("resources", {})
    if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
        yield "keeps privileges"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "can write into its image"
    if not {"cpu", "memory"} <= resources.get("requests", {}).keys():
        yield "asks for no cpu or memory"
    if "memory" not in resources.get("limits", {}):
        yield "has no memory limit"


def _documents(path: Path) -> list[Object]:
    return copy.deepcopy(_parsed(path))


@functools.cache
def _parsed(path: Path) -> list[Object]:
    return list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
