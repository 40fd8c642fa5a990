"""A capture as one HTML file that works from disk with the network off, and a checker for such files."""

from workbench.report.check import check
from workbench.report.report import Report

__all__ = ["Report", "check"]
