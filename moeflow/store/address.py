"""Parses `s3://` addresses into bucket, prefix and options. Makes no requests."""

from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

OPTIONS = {
    "endpoint": (),
    "addressing": ("auto", "path", "virtual"),
    "checksum": ("when_required", "when_supported"),
    "region": (),
}
SECRETS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile or a role"


@dataclass(frozen=True)
class Remote:
    bucket: str
    prefix: str
    options: dict[str, str]  # endpoint, addressing, checksum, region; as `S3Blobs` takes them


def parse_s3(url: str) -> Remote:
    """Bucket, prefix and connection options of `s3://bucket/prefix?endpoint=..&addressing=path&checksum=..&region=..`.

    Raises ValueError for a missing bucket, an unknown option or value, and credentials in the address.
    """
    # A glob may contain "?" as a wildcard: only a part behind "?" that contains "=" is read as options.
    address, mark, query = url.rpartition("?")
    if not mark or "=" not in query:
        address, query = url, ""
    parts = urlsplit(address.replace("?", "%3F").replace("#", "%23"))
    prefix = parts.path.strip("/").replace("%3F", "?").replace("%23", "#")
    if "@" in parts.netloc:
        raise ValueError(f"credentials do not belong in an s3:// address; {SECRETS}")
    if not parts.netloc:
        raise ValueError(f"{url!r} names no bucket; write s3://bucket/prefix")
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in OPTIONS:
            raise ValueError(f"{url!r}: unknown option {name!r}; known: {', '.join(OPTIONS)}")
        if OPTIONS[name] and value not in OPTIONS[name]:
            raise ValueError(f"{url!r}: {name}={value!r}; known: {', '.join(OPTIONS[name])}")
        options[name] = value
    endpoint = urlsplit(options.get("endpoint", "http://x"))
    if "@" in endpoint.netloc:
        raise ValueError(f"credentials do not belong in an endpoint; {SECRETS}")
    if endpoint.scheme not in ("http", "https") or not endpoint.netloc:
        raise ValueError(f"{url!r}: endpoint={options['endpoint']!r}; write http://host:port or https://host")
    return Remote(parts.netloc, prefix, options)
