"""MkDocs: pages made of files outside `docs/`, whose links are for GitHub and are rewritten for the site."""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = get_plugin_logger(__name__)
ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)|(?<=src=\")(?!\w+:)([^\"]+)")


def _source(page: str) -> PurePosixPath:
    return PurePosixPath(PAGES.get(page, f"docs/{page}"))


def _target(link: str, page: str) -> str:
    """Where a link of a page leads, as a path in the repository."""
    return os.path.normpath(_source(page).parent / link)


def _place(target: str) -> str:
    """Where a file of the repository is on the site."""
    return {source: page for page, source in PAGES.items()}.get(target, target.removeprefix("docs/"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and what any page links to outside `docs/`, such as a notebook."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for file in list(files.documentation_pages()):
        for found in LINK.finditer(file.content_string):
            target = _target(found[0], file.src_uri)
            if (ROOT / target).is_file() and files.get_file_from_path(_place(target)) is None:
                files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the places of the site."""
    here = page.file.src_uri
    folder = PurePosixPath(here).parent
    return LINK.sub(lambda found: os.path.relpath(_place(_target(found[0], here)), folder), markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn, which is an error, of what a page would fetch from elsewhere."""
    for found in re.finditer(r"<(?:script|img|iframe)[^>]*src=\"https?:[^>]*>|<link[^>]*href=\"https?:[^>]*>", output):
        log.warning(f"'{page.file.src_uri}' would fetch {found[0]}")
    return output
