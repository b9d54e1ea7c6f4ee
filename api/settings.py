"""Settings of the api, from the environment (RAMREC_API_…) or the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from api.recommend.batching import PATIENCE_S
from memory_service.protocol.telemetry import LogLevel
from memory_service.settings import TOKEN_LENGTH, is_loopback, secrets_dir


class ApiSettings(BaseSettings):
    """Everything the api can be told."""

    model_config = SettingsConfigDict(
        env_prefix="RAMREC_API_",
        extra="forbid",
        env_ignore_empty=True,
        hide_input_in_errors=True,
        secrets_dir=secrets_dir(),
    )

    run: Path = Field(description="checkpoint folder")
    memory_url: str = Field(
        "http://127.0.0.1:8001", description="base URL of the memory service; several replicas, comma separated"
    )
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    keys: Path | None = Field(None, description="file of API keys; without it everybody may do everything")
    open: bool = Field(False, description="listen beyond loopback without API keys")
    memory_token: SecretStr | None = Field(None, min_length=TOKEN_LENGTH, description="token of the memory service")
    log_level: LogLevel = "info"
    memory_timeout_s: float = Field(5.0, gt=0)
    request_timeout_s: float = Field(
        30.0, gt=0, description="deadline of a request whose caller names none (X-Request-Timeout-Ms)"
    )
    batch_size: int = Field(64, ge=1, description="requests answered by one forward pass")
    batch_wait_s: float = Field(0.001, ge=0, description="how long a batch waits for more while there are many")
    batch_lanes: int = Field(
        2, ge=1, description="batches under way: one is computed while memory is asked for another"
    )
    patience_s: float = Field(PATIENCE_S, ge=0, description="wait after which the connection is looked at")
    queue_limit: int = Field(512, ge=256, description="waiting requests beyond which new ones are refused")
    ingest_limit: int = Field(10_000, ge=1, description="interactions being written beyond which more are answered 429")
    drain_s: float = Field(
        1.0, ge=0, description="how long after SIGTERM requests are still taken while callers are sent elsewhere"
    )
    feedback_key: SecretStr = Field(SecretStr(""), description="what recommendation ids are authenticated with")
    torch_threads: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.keys is None and not self.open and not is_loopback(self.host):
            raise ValueError(
                f"listening on {self.host} needs API keys (--keys or RAMREC_API_KEYS, see `ramrec keys create`), "
                "or --open (RAMREC_API_OPEN=true) to let everybody do everything"
            )
        return self
