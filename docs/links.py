"""A hook of mkdocs: a link that leaves `docs/` becomes plain text, since the site holds the documentation alone."""

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(([^)\s:]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with its links out of the documentation as code."""
    folder = posixpath.dirname(page.file.src_uri)

    def shown(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        return f"`{link[1]}`" if target.startswith("..") else link[0]

    return LINK.sub(shown, markdown)
