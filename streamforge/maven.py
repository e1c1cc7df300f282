"""Java archives from Maven, through `jgo`'s Python resolver: no `mvn`, no system Java.

The jars lie in Maven's own local repository; what was resolved is remembered beside jgo's cache, so that later
starts resolve nothing and work offline.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jgo
import msgspec
from jgo.config import GlobalSettings
from jgo.maven import Artifact
from requests import RequestException

from streamforge.errors import PermanentSourceError
from streamforge.processes import write_atomically

_DOWNLOADS = 8


class _Resolved(msgspec.Struct, frozen=True):
    endpoint: str
    jars: list[str]


def resolve_jars(name: str, endpoint: str, *, title: str, provided: Collection[str] = ()) -> list[str]:
    """Return the jars of `endpoint` and of what it depends on, fetched from Maven the first time.

    Args:
        name: of the file that remembers them; has the version in it.
        endpoint: Maven coordinates, joined by `+`.
        title: what they are, for people.
        provided: artifact ids that whoever runs them brings.

    Raises:
        PermanentSourceError: the jars are not here and cannot be fetched.
    """
    cache = GlobalSettings.load().cache_dir / "streamforge" / f"{name}.json"
    try:
        known = msgspec.json.decode(cache.read_bytes(), type=_Resolved)
    except (OSError, msgspec.MsgspecError):
        known = None
    if known is not None and known.endpoint == endpoint and all(Path(jar).is_file() for jar in known.jars):
        return known.jars
    try:
        artifacts = [item for item in jgo.resolve(endpoint) if item.artifactId not in provided]
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            jars = [str(path) for path in pool.map(Artifact.resolve, artifacts)]
    except (RequestException, RuntimeError, ValueError, OSError) as error:
        msg = (
            f"{title} cannot be fetched from Maven: {error}. It is needed once, for the first "
            "start; check the network (or the [repositories] of ~/.config/jgo.conf) and try again"
        )
        raise PermanentSourceError(msg) from error
    write_atomically(cache, msgspec.json.encode(_Resolved(endpoint, jars)).decode())
    return jars
