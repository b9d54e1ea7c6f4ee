"""Settings from files, as container engines provide secrets, and a Redis password apart from its URL."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from api.settings import ApiSettings
from memory_service.settings import MemorySettings, with_password

ROOT = Path(__file__).parents[3]
TOKEN = "a-token-of-the-memory-service"
PASSWORD = "s3cret/with#signs"
QUOTED = "s3cret%2Fwith%23signs"


@pytest.fixture
def secrets(tmp_path):
    (tmp_path / "RAMREC_MEMORY_TOKEN").write_text(f"{TOKEN}\n")
    (tmp_path / "RAMREC_API_MEMORY_TOKEN").write_text(f"{TOKEN}\n")
    (tmp_path / "RAMREC_MEMORY_REDIS_PASSWORD").write_text(f"{PASSWORD}\n")
    return tmp_path


def test_settings_come_from_files_that_have_the_names_of_their_variables(run, secrets):
    memory = MemorySettings(run=run, redis_url="redis://redis:6379/0", _secrets_dir=secrets)
    assert memory.token.get_secret_value() == TOKEN
    assert memory.redis_url == f"redis://:{QUOTED}@redis:6379/0"
    assert "s3cret" not in repr(memory)
    assert ApiSettings(run=run, _secrets_dir=secrets).memory_token.get_secret_value() == TOKEN


def test_a_variable_comes_before_a_file(run, secrets, monkeypatch):
    monkeypatch.setenv("RAMREC_MEMORY_TOKEN", "another-token-of-it")
    memory = MemorySettings(run=run, redis_url="redis://redis", _secrets_dir=secrets)
    assert memory.token.get_secret_value() == "another-token-of-it"


def test_services_read_the_folder_that_the_environment_names(secrets):
    code = "from memory_service.settings import RedisSettings as S; print(S(redis_url='redis://there').redis_url)"
    env = {"PATH": "/usr/bin", "RAMREC_SECRETS_DIR": str(secrets)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"redis://:{QUOTED}@there\n"


def test_the_folder_is_looked_up_when_settings_are_made(run, secrets, monkeypatch):
    monkeypatch.setenv("RAMREC_SECRETS_DIR", str(secrets))
    assert ApiSettings(run=run).memory_token.get_secret_value() == TOKEN
    monkeypatch.delenv("RAMREC_SECRETS_DIR")
    assert ApiSettings(run=run).memory_token is None


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("rediss://there:1/2?x=a@b", f"rediss://:{QUOTED}@there:1/2?x=a@b"),
        ("redis://a:1, redis://b:2", f"redis://:{QUOTED}@a:1, redis://:{QUOTED}@b:2"),
        ("redis://:own@there", "redis://:own@there"),
        ("unix:///run/redis", "unix:///run/redis"),
    ],
)
def test_a_password_goes_into_urls_that_contain_none(url, opened):
    assert with_password(url, PASSWORD) == opened


def test_a_password_without_a_url_is_refused_and_not_quoted(run, secrets):
    with pytest.raises(ValidationError, match="whose password") as refused:
        MemorySettings(run=run, _secrets_dir=secrets)
    assert "s3cret" not in str(refused.value)
