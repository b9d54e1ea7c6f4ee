"""Settings of the api, from the environment (RAMREC_API_…) or the command line."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from api.batching import PATIENCE_S


class ApiSettings(BaseSettings):
    """Everything the api can be told."""

    model_config = SettingsConfigDict(env_prefix="RAMREC_API_", extra="forbid")

    run: Path = Field(description="checkpoint folder")
    memory_url: str = Field("http://127.0.0.1:8001", description="base URL of the memory service")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    memory_timeout_s: float = Field(5.0, gt=0)
    batch_size: int = Field(64, ge=1, description="requests answered by one forward pass")
    batch_wait_s: float = Field(0.001, ge=0, description="how long a batch waits for more while there are many")
    batch_lanes: int = Field(
        2, ge=1, description="batches under way: one is computed while memory is asked for another"
    )
    patience_s: float = Field(PATIENCE_S, ge=0, description="wait after which the connection is looked at")
    queue_limit: int = Field(512, ge=256, description="waiting requests beyond which new ones are refused")
    ingest_limit: int = Field(10_000, ge=1, description="interactions being written beyond which more are answered 429")
    feedback_key: SecretStr = Field(SecretStr(""), description="what recommendation ids are authenticated with")
    torch_threads: int = Field(1, ge=1)
