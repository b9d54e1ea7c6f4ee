"""A hook of MkDocs: files of the repository that a page links to become part of the site.

Pages link to files outside `docs/` by relative paths, which work when the pages are read as plain Markdown. MkDocs
knows only files below `docs/`, so this hook adds the others to the site and lets the links lead there.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

LINK = re.compile(r"(\]\()((?:\.\./)*)([^)\s#:]+)((?:#[^)]*)?\))")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add what pages link to outside their folder, and what those pages link to in turn."""
    docs, left = Path(config.docs_dir), [file for file in files if file.src_uri.endswith(".md")]
    while left:
        page = left.pop()
        text = Path(page.abs_src_path).read_text(encoding="utf-8")
        for found in LINK.finditer(text):
            target = (Path(page.abs_src_path).parent / found[2] / found[3]).resolve()
            if docs in target.parents or docs.parent not in target.parents or not target.is_file():
                continue
            uri = target.relative_to(docs.parent).as_posix()
            if files.get_file_from_path(uri) is None:
                added = File.generated(config, uri, abs_src_path=str(target))
                files.append(added)
                left += [added] if uri.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links out of `docs/` lead to the added files; links of added pages into `docs/` lead to its pages."""
    docs = Path(config.docs_dir)
    source = Path(page.file.abs_src_path)
    here = PurePosixPath(page.file.src_uri).parent

    def moved(found: re.Match[str]) -> str:
        target = (source.parent / found[2] / found[3]).resolve()
        if not target.exists():
            return found[0]
        target = target / "README.md" if target.is_dir() else target
        inside = docs in target.parents
        uri = target.relative_to(docs if inside else docs.parent)
        up = "../" * len(here.parts)
        return f"{found[1]}{up}{uri.as_posix()}{found[4]}"

    return LINK.sub(moved, markdown)
