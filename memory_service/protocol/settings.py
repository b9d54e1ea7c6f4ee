"""What the settings of both services share: secrets from files, the length of tokens, and what counts as loopback."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict
from typing_extensions import override

TOKEN_LENGTH = 16
"""Least number of characters of a token."""
SECRETS = Path("/run/secrets")
"""Where container engines mount secrets. A setting may come from a file here that has the name of its variable."""


class ServiceSettings(BaseSettings):
    """Settings from arguments, else from the environment, else from files in the folder of secrets."""

    model_config = SettingsConfigDict(extra="forbid", env_ignore_empty=True, hide_input_in_errors=True)

    @override
    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Look the folder of secrets up when settings are made, unless `_secrets_dir` names one."""
        if isinstance(file_secret_settings, SecretsSettingsSource) and file_secret_settings.secrets_dir is None:
            file_secret_settings = SecretsSettingsSource(settings_cls, secrets_dir())
        return init_settings, env_settings, dotenv_settings, file_secret_settings


def secrets_dir() -> Path | None:
    """The folder of secrets: RAMREC_SECRETS_DIR, else `/run/secrets` where it exists."""
    named = os.environ.get("RAMREC_SECRETS_DIR")
    return Path(named) if named else SECRETS if SECRETS.is_dir() else None


def is_loopback(host: str) -> bool:
    """Whether a service that listens on `host` can be reached from this machine only; False for unknown names."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
