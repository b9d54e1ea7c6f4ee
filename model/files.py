"""Files that are replaced in one step, as others may read them, or the process may be killed, during a write."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(file: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace the content of a file in one step: readers see the old content or the new one. The content is on disk
    when this returns.

    mode: permissions of the file, less the umask. Raises OSError.
    """
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)  # left by a writer that was killed
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
