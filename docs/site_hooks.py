"""What mkdocs does besides: links into the repository become text; a page that would ask another host is an error."""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError

OUTWARD = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")
FOREIGN = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\brel=["']?stylesheet[^>]*//"""
    r"""|@import\s+(?:url\()?["']?(?:https?:)?//|url\(["']?(?:https?:)?//"""
)


def on_page_markdown(markdown: str, **_) -> str:
    """A file outside docs/ is there for readers of the repository; the site has no page of it."""
    return OUTWARD.sub(r"\1", markdown)


def on_post_build(config, **_) -> None:
    """Refuse fonts, scripts, styles and pictures that a browser would fetch from elsewhere."""
    for path in Path(config.site_dir).rglob("*"):
        if path.suffix in (".html", ".css", ".svg") and (found := FOREIGN.search(path.read_text(encoding="utf-8"))):
            raise PluginError(f"{path} asks another host: {found[0][:200]}")
