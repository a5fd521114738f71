"""For mkdocs: a link to a file outside docs/ leads somewhere in the repository only; on the site it becomes plain text."""

import posixpath
import re

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^):#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, **_) -> str:
    """The page's text without links that leave docs/."""
    here = posixpath.dirname(page.file.src_uri)

    def kept(link: re.Match[str]) -> str:
        leaves = posixpath.normpath(posixpath.join(here, link[2])).startswith("..")
        return link[1] if leaves else link[0]

    return LINK.sub(kept, markdown)
