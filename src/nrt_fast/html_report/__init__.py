"""A run's folder to one HTML page that needs nothing else: no script, no network, no font, and no torch to make it."""

from nrt_fast.html_report.page import MARK, render
from nrt_fast.html_report.read import RunRecord, read_run

__all__ = ["MARK", "RunRecord", "read_run", "render"]
