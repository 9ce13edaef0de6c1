"""The page of all fields says what the configuration says."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_what_the_configuration_says():
    text = runpy.run_path(str(DOCS / "write_configuration.py"))["page"]()
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == text, "python docs/write_configuration.py"
