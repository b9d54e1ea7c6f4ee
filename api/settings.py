"""Settings of the api, from the command line, the environment (RAMREC_API_…) or files of secrets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from api.recommend.batching import PATIENCE_S
from memory_service.protocol.call.logs import LogLevel
from memory_service.protocol.settings import TOKEN_LENGTH, ServiceSettings, is_loopback


class ApiSettings(ServiceSettings):
    """All settings of the api."""

    model_config = SettingsConfigDict(env_prefix="RAMREC_API_")

    run: Path = Field(description="checkpoint folder")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "cpu", description="where the model runs; auto: on a GPU if there is one"
    )
    memory_url: str = Field(
        "http://127.0.0.1:8001", description="base URL of the memory service; several memory replicas, comma separated"
    )
    host: str = Field("127.0.0.1", description="address to listen on; beyond loopback API keys are needed")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    keys: Path | None = Field(None, description="file of API keys; none: every caller may do everything")
    open: bool = Field(False, description="listen beyond loopback without API keys")
    memory_token: SecretStr | None = Field(None, min_length=TOKEN_LENGTH, description="token of the memory service")
    log_level: LogLevel = Field(
        "info", description="least severe messages that are logged; user ids appear at debug only"
    )
    memory_timeout_s: float = Field(5.0, gt=0, description="how long an answer of the memory service is waited for")
    request_timeout_s: float = Field(
        30.0, gt=0, description="deadline of a request whose caller names none (X-Request-Timeout-Ms)"
    )
    batch_size: int = Field(64, ge=1, description="most requests that one forward pass answers")
    batch_wait_s: float = Field(0.001, ge=0, description="how long a batch waits for further requests under load")
    batch_lanes: int = Field(
        2, ge=1, description="batches in progress: one is computed while memories for another are retrieved"
    )
    patience_s: float = Field(
        PATIENCE_S, ge=0, description="wait after which a request is dropped if its caller has disconnected"
    )
    queue_limit: int = Field(512, ge=256, description="waiting requests beyond which new ones are refused")
    ingest_limit: int = Field(
        10_000, ge=1, description="interactions being written beyond which further ones are answered 429"
    )
    drain_s: float = Field(
        1.0, ge=0, description="how long requests are still accepted after SIGTERM, while callers are sent elsewhere"
    )
    feedback_key: SecretStr = Field(SecretStr(""), description="key that authenticates recommendation ids")
    torch_threads: int = Field(1, ge=1, description="threads of PyTorch in this process")

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.keys is None and not self.open and not is_loopback(self.host):
            raise ValueError(
                f"listening on {self.host} needs API keys (--keys or RAMREC_API_KEYS, see `ramrec keys create`), "
                "or --open (RAMREC_API_OPEN=true) to let everybody do everything"
            )
        return self
