"""Files that others may read, or a kill may hit, while they are written."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(file: Path, content: bytes, mode: int = 0o666) -> None:
    """Put the content in a file's place in one step: a reader sees the old one or the new one. It is on disk when this
    returns. mode: permissions, less the umask. Raises OSError.
    """
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)  # of a writer that was killed
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
