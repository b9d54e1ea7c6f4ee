"""Settings of the memory service, from the environment (RAMREC_MEMORY_…) or the command line."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from memory_service.protocol.telemetry import LogLevel

TOKEN_LENGTH = 16
"""Characters that a token has at least."""
SECRETS = Path("/run/secrets")
"""Where container engines put secrets: a setting may come from a file here that is called like its variable."""


def secrets_dir() -> Path | None:
    """The folder of secrets: RAMREC_SECRETS_DIR, else the engines' usual one where it exists."""
    named = os.environ.get("RAMREC_SECRETS_DIR")
    return Path(named) if named else SECRETS if SECRETS.is_dir() else None


def user_data_dir() -> Path:
    """Where the embedded Valkey keeps its files unless a folder is given."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "ramrec"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name: wherever it points to
        return False


class RedisSettings(BaseSettings):
    """Where memories are kept."""

    model_config = SettingsConfigDict(
        env_prefix="RAMREC_MEMORY_",
        extra="forbid",
        env_ignore_empty=True,
        hide_input_in_errors=True,
        secrets_dir=secrets_dir(),
    )

    redis_url: str | None = Field(
        None, repr=False, description="redis://, rediss:// or unix://, with its password; none: embedded Valkey"
    )
    redis_password: SecretStr | None = Field(
        None, description="password of a Redis whose URL names none: by a variable or a secret of its own"
    )

    @model_validator(mode="after")
    def _with_password(self) -> Self:
        if self.redis_password is None:
            return self
        if self.redis_url is None:
            raise ValueError("RAMREC_MEMORY_REDIS_PASSWORD without RAMREC_MEMORY_REDIS_URL: whose password is it?")
        self.redis_url = with_password(self.redis_url, self.redis_password.get_secret_value())
        return self


class MemorySettings(RedisSettings):
    """Everything the memory service can be told."""

    run: Path = Field(description="checkpoint folder")
    host: str = "127.0.0.1"
    port: int = Field(8001, ge=1, le=65535)
    token: SecretStr | None = Field(
        None, min_length=TOKEN_LENGTH, description="callers must bring it: Authorization: Bearer …"
    )
    open: bool = Field(False, description="listen beyond loopback without a token")
    log_level: LogLevel = "info"
    data_dir: Path = Field(default_factory=user_data_dir, description="folder of the embedded Valkey")
    fsync: Literal["everysec", "always"] = Field("everysec", description="AOF policy of the embedded Valkey")
    redis_timeout_s: float = Field(2.0, gt=0)
    redis_replicas: int | None = Field(
        None,
        ge=0,
        description="replicas of Redis that confirm a write before it counts; none: 1 in a Redis Cluster, 0 elsewhere",
    )
    advertise: str | None = Field(
        None,
        pattern="^https?://",
        description="URL under which the api reaches this replica; none: host and port, or where it listens on all "
        "addresses, the one from which it reaches Redis",
    )
    patience_s: float = Field(
        5.0,
        ge=1,
        description="a replica that Redis has not heard of for so long is taken for gone, and gives nothing of others' "
        "memories any more",
    )
    leave_s: float = Field(
        2.0, ge=0, description="how long a replica that stops goes on answering, until callers ask the others"
    )
    resident_users: int = Field(
        200_000, ge=1, description="banks kept in memory between calls; the least recently used go first"
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where banks are searched; cuda: on copies on the first GPU"
    )
    collective: bool = Field(True, description="whether users' entries are searched for others at all")
    collective_users: int = Field(
        2, ge=1, description="others who must hold an item before memories of it are given to anybody"
    )
    collective_entries: int | None = Field(
        None,
        ge=1,
        description="most of others' entries that are kept, a sample of all; none: as many as half the memory holds. "
        "To be set where replicas have unlike memory, so that all keep the same ones",
    )
    compare_s: float = Field(
        600.0, gt=0, description="how often all of the collective scope is compared with Redis, whose news may get lost"
    )
    recall_s: float = Field(
        600.0, ge=0, description="how often the recall of the collective scope is measured; 0: never"
    )
    idle_days: float | None = Field(
        None, gt=0, description="a bank expires this long after its user's last interaction; none: never"
    )
    body_limit_bytes: int = Field(32 * 2**20, ge=1024)
    queue_retrieve: int = Field(256, ge=1, description="retrievals under way or waiting; more are answered 429")
    queue_ingest: int = Field(64, ge=1, description="plans and writes under way or waiting; more are answered 429")

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.token is None and not self.open and not is_loopback(self.host):
            raise ValueError(
                f"listening on {self.host} needs a token (RAMREC_MEMORY_TOKEN), "
                "or RAMREC_MEMORY_OPEN=true to answer whoever asks"
            )
        return self


def with_password(url: str, password: str) -> str:
    """URLs of Redis, separated by commas, in each of which the password stands where it names none."""

    def one(url: str) -> str:
        scheme, mark, rest = url.partition("://")
        named = "@" in rest.partition("/")[0] or scheme.strip() == "unix"
        return url if named or not mark else f"{scheme}://:{quote(password, safe='')}@{rest}"

    return ",".join(map(one, url.split(",")))


def reached_at(settings: MemorySettings) -> str:
    """The URL of a service: of one that listens on all addresses, that from which it reaches Redis."""
    host = settings.host
    with suppress(ValueError):  # a name
        host = _own_address(settings.redis_url or "") if ip_address(host).is_unspecified else host
    return url_of(host, settings.port)


def url_of(host: str, port: int) -> str:
    """The URL of what listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _own_address(redis_url: str) -> str:
    """Our address on the way to Redis; the name of this machine where that cannot be told. Nothing is sent."""
    first = urlsplit(redis_url.split(",")[0].strip())
    if first.hostname is None:
        return "127.0.0.1"
    try:
        family, kind, _, _, address = socket.getaddrinfo(first.hostname, first.port or 6379, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
