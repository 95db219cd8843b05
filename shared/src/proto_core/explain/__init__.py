"""Explanations as data, and the HTML report that draws them."""

from proto_core.explain.records import Case, Evidence, Explanation
from proto_core.explain.report import (
    Comparison,
    Picture,
    ReportSection,
    plain_text,
    render_page,
    render_report,
    write_report,
)

__all__ = [
    "Case",
    "Comparison",
    "Evidence",
    "Explanation",
    "Picture",
    "ReportSection",
    "plain_text",
    "render_page",
    "render_report",
    "write_report",
]
