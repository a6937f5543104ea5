"""What mkdocs does beside mkdocs.yml: pages and files outside of docs/ come to the site, and links follow them.

README.md is the front page. Any other file of the repository that a page links to is copied to ``repository/``. So the
same link works where a page is read in the repository, and on the site.

The reference is read from a copy of the sources, because its reader passes over folders without ``__init__.py``, which
kernels/ and passes/ lack on purpose.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/index.md",
}
"""Pages outside of docs/, by their path on the site. Those of benchmarks/notes keep theirs."""

LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
CODE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)

SOURCES = ROOT / "build" / "site_sources"


def on_startup(**_: object) -> None:
    """Copy the sources, with an ``__init__.py`` in every folder, before the reference looks for them."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    shutil.copytree(ROOT / "s2o_compile", SOURCES / "s2o_compile", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("kernels", "passes"):
        (SOURCES / "s2o_compile" / name / "__init__.py").touch()


def _site_path(path: str) -> str:
    """Where a path of the repository stands on the site."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.startswith("benchmarks/notes/") else f"repository/{path}"


def _repository_path(site_path: str) -> str:
    """The inverse, for pages."""
    back = {site: path for path, site in PAGES.items()}
    if site_path in back:
        return back[site_path]
    return site_path if site_path.startswith("benchmarks/notes/") else f"docs/{site_path}"


def _links(markdown: str, page: str) -> list[str]:
    """The files of the repository that a page links to, by paths from the root."""
    found = []
    for _, target, _ in LINK.findall(CODE.sub("", markdown)):
        path, _, _ = target.partition("#")
        if path and "://" not in path and not path.startswith("mailto:"):
            found.append(os.path.normpath(PurePosixPath(page).parent / path))
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/, and every other file of the repository that some page links to."""
    notes = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks" / "notes").glob("*.md"))
    for path in (*PAGES, *notes):
        files.append(File.generated(config, _site_path(path), abs_src_path=str(ROOT / path)))
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for path in _links(page.content_string, _repository_path(page.src_uri)):
            _add(files, config, path)
    return files


def _add(files: Files, config: MkDocsConfig, path: str) -> None:
    """A linked file; of a folder, a page that lists it."""
    site, real = _site_path(path), ROOT / path
    if path == "docs" or not site.startswith("repository/"):
        return
    if real.is_dir():
        children = sorted(child.relative_to(ROOT).as_posix() for child in real.iterdir() if child.is_file())
        for child in children:
            _add(files, config, child)
        links = (f"- [{child}]({os.path.relpath(_site_path(child), site)})" for child in children)
        content = "\n".join([f"# {path}", "", *links])
        listing = File.generated(config, f"{site}/index.md", content=content)
        if listing.src_uri not in files.src_uris:
            files.append(listing)
    elif real.is_file() and site not in files.src_uris:
        files.append(File.generated(config, site, abs_src_path=str(real)))


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point every link to where its file stands on the site."""
    here = page.file.src_uri
    if here.startswith("repository/"):
        return markdown
    source = _repository_path(here)

    def moved(link: re.Match[str]) -> str:
        before, target, after = link.groups()
        path, mark, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return link[0]
        path = os.path.normpath(PurePosixPath(source).parent / path)
        site = "index.md" if path == "docs" else _site_path(path)
        if (ROOT / path).is_dir() and path != "docs":
            site += "/index.md"
        return f"{before}{os.path.relpath(site, PurePosixPath(here).parent)}{mark}{anchor}{after}"

    parts = CODE.split(markdown)
    return "".join(part if number % 2 else LINK.sub(moved, part) for number, part in enumerate(parts))
