"""What PyIceberg is told of the object store and of a signed catalog: from settings, and credentials only from there.

Where no key is set, AWS's own search (environment, profile, role of the pod) finds credentials, in PyArrow and in the
signature alike.
"""

from __future__ import annotations

from streamforge.errors import ConfigurationError
from streamforge.settings import Settings


def s3_properties(settings: Settings, *, connect_timeout_s: float, request_timeout_s: float) -> dict[str, str]:
    """Return how the object store is reached; what is not set, AWS's own search finds.

    Raises:
        ConfigurationError: one half of a key.
    """
    if (settings.s3_access_key_id is None) != (settings.s3_secret_access_key is None):
        msg = (
            "STREAMFORGE_S3_ACCESS_KEY_ID and STREAMFORGE_S3_SECRET_ACCESS_KEY belong together, found one of them. "
            "Set both, or none: then AWS's own search finds credentials"
        )
        raise ConfigurationError(msg)
    secrets = {
        "client.access-key-id": settings.s3_access_key_id,
        "client.secret-access-key": settings.s3_secret_access_key,
        "client.session-token": settings.s3_session_token,
    }
    plain = {
        "s3.endpoint": settings.s3_endpoint,
        "client.region": settings.s3_region,
        "s3.connect-timeout": str(connect_timeout_s),
        "s3.request-timeout": str(request_timeout_s),
    }
    return {key: secret.get_secret_value() for key, secret in secrets.items() if secret is not None} | {
        key: value for key, value in plain.items() if value is not None
    }


def signing_properties(settings: Settings) -> dict[str, str]:
    """Return how requests to the catalog are signed.

    Raises:
        ConfigurationError: no region, or no credentials; PyIceberg would only find out in the midst of a request.
    """
    if settings.catalog_signing_name is None:
        return {}
    import boto3  # noqa: PLC0415 - heavy

    found = boto3.Session(region_name=settings.s3_region)
    missing = {
        "STREAMFORGE_S3_REGION": found.region_name is None,
        "STREAMFORGE_S3_ACCESS_KEY_ID and STREAMFORGE_S3_SECRET_ACCESS_KEY": settings.s3_access_key_id is None
        and found.get_credentials() is None,
    }
    if any(missing.values()):
        names = " and ".join(name for name, is_missing in missing.items() if is_missing)
        msg = (
            f"requests to the Iceberg catalog {settings.resolved_catalog_uri} are to be signed for "
            f"{settings.catalog_signing_name}, and neither the settings nor AWS's own search say with what: set {names}"
        )
        raise ConfigurationError(msg)
    return {
        "rest.sigv4-enabled": "true",
        "rest.signing-name": settings.catalog_signing_name,
        "rest.signing-region": str(found.region_name),
        # A request is sent once: what its failure means is decided by whoever sent it.
        "rest.sigv4.max-retries": "0",
    }
