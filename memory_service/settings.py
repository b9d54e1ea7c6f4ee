"""Settings of the memory service, from the command line, the environment (RAMREC_MEMORY_…) or files of secrets."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from memory_service.protocol.call.logs import LogLevel
from memory_service.protocol.settings import TOKEN_LENGTH, ServiceSettings, is_loopback


def user_data_dir() -> Path:
    """Where the embedded Valkey keeps its files unless a folder is named."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "ramrec"


class RedisSettings(ServiceSettings):
    """Where memories are kept."""

    model_config = SettingsConfigDict(env_prefix="RAMREC_MEMORY_")

    redis_url: str | None = Field(
        None, repr=False, description="redis://, rediss:// or unix://, with its password; none: an embedded Valkey"
    )
    redis_password: SecretStr | None = Field(
        None, description="password for a URL that contains none, so that it can be a secret of its own"
    )

    @model_validator(mode="after")
    def _with_password(self) -> Self:
        if self.redis_password is None:
            return self
        if self.redis_url is None:
            raise ValueError(
                "RAMREC_MEMORY_REDIS_PASSWORD is set without RAMREC_MEMORY_REDIS_URL: whose password is it?"
            )
        self.redis_url = with_password(self.redis_url, self.redis_password.get_secret_value())
        return self


class MemorySettings(RedisSettings):
    """All settings of the memory service."""

    run: Path = Field(description="checkpoint folder")
    host: str = Field("127.0.0.1", description="address to listen on; beyond loopback a token is needed")
    port: int = Field(8001, ge=1, le=65535, description="port to listen on")
    token: SecretStr | None = Field(
        None, min_length=TOKEN_LENGTH, description="token that callers must send (Authorization: Bearer …)"
    )
    open: bool = Field(False, description="listen beyond loopback without a token")
    log_level: LogLevel = Field(
        "info", description="least severe messages that are logged; user ids appear at debug only"
    )
    data_dir: Path = Field(default_factory=user_data_dir, description="folder of the embedded Valkey")
    fsync: Literal["everysec", "always"] = Field("everysec", description="AOF policy of the embedded Valkey")
    redis_timeout_s: float = Field(2.0, gt=0, description="how long an answer of Redis is waited for")
    redis_replicas: int | None = Field(
        None,
        ge=0,
        description="Redis replicas that must confirm a write before it is acknowledged; none: 1 in a Redis Cluster, "
        "0 elsewhere",
    )
    advertise: str | None = Field(
        None,
        pattern="^https?://",
        description="URL at which the api reaches this memory replica; none: host and port, or, if the service listens "
        "on all addresses, the address from which it reaches Redis",
    )
    patience_s: float = Field(
        5.0,
        ge=1,
        description="a memory replica that Redis has not heard from for this long counts as gone, and serves no "
        "memories of other users any more",
    )
    leave_s: float = Field(
        2.0, ge=0, description="how long a memory replica that stops keeps answering, until callers ask the others"
    )
    resident_users: int = Field(
        200_000, ge=1, description="banks kept in memory between calls; the least recently used are dropped first"
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where banks are searched; cuda: on copies on the first GPU"
    )
    collective: bool = Field(True, description="whether users' entries are searched for other users at all")
    collective_users: int = Field(
        2, ge=1, description="other users who must hold an item before memories of it are given to anybody"
    )
    collective_entries: int | None = Field(
        None,
        ge=1,
        description="most entries of other users that are kept, as a sample; none: as many as fit into half of the "
        "memory. Set it where memory replicas differ in memory, so that all keep the same entries",
    )
    compare_s: float = Field(
        600.0,
        gt=0,
        description="how often the collective scope is compared with Redis, whose notifications may get lost",
    )
    recall_s: float = Field(
        600.0, ge=0, description="how often the recall of the collective scope is measured; 0: never"
    )
    idle_days: float | None = Field(
        None, gt=0, description="a bank expires this long after its user's last interaction; none: never"
    )
    body_limit_bytes: int = Field(32 * 2**20, ge=1024, description="largest request body; larger ones are answered 413")
    queue_retrieve: int = Field(256, ge=1, description="retrievals in progress or waiting; more are answered 429")
    queue_ingest: int = Field(64, ge=1, description="plans and writes in progress or waiting; more are answered 429")

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.token is None and not self.open and not is_loopback(self.host):
            raise ValueError(
                f"listening on {self.host} needs a token (RAMREC_MEMORY_TOKEN), "
                "or RAMREC_MEMORY_OPEN=true to answer everybody"
            )
        return self


def with_password(urls: str, password: str) -> str:
    """Redis URLs, separated by commas, with the password put into each that contains none."""

    def filled(url: str) -> str:
        scheme, mark, rest = url.partition("://")
        has_its_own = "@" in rest.partition("/")[0] or scheme.strip() == "unix"
        return url if has_its_own or not mark else f"{scheme}://:{quote(password, safe='')}@{rest}"

    return ",".join(map(filled, urls.split(",")))


def reached_at(settings: MemorySettings) -> str:
    """The URL of the service; if it listens on all addresses, with the address from which it reaches Redis."""
    host = settings.host
    with suppress(ValueError):  # a name is no address
        host = _own_address(settings.redis_url or "") if ip_address(host).is_unspecified else host
    return url_of(host, settings.port)


def url_of(host: str, port: int) -> str:
    """The HTTP URL of a host and port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _own_address(redis_url: str) -> str:
    """This machine's address on the route to Redis, or its name if that is unknown. Sends nothing."""
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
