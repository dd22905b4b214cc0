"""Tables of stored reports, versions and lineages. This package computes nothing, and knows neither runners nor models."""

from moeflow.report.table import Extra, Report, console, read, table

__all__ = ["Extra", "Report", "console", "read", "table"]
