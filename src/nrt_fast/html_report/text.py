"""Text of data and models, made fit for a page."""

from __future__ import annotations

from html import escape

MINUS, NO_BREAK = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "␡"}


def shown(text: object) -> str:
    """Escaped, control characters as their pictures; what is no Unicode text as question marks."""
    return escape(str(text).translate(CONTROLS).encode("utf-8", "replace").decode())
