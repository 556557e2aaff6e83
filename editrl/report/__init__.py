"""The HTML report: videos side by side, reward curves, settings."""

from editrl.report.html import Curve, ReportCase, write_report

__all__ = ["Curve", "ReportCase", "write_report"]
