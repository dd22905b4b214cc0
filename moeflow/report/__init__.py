"""Tables of what is stored: reports, versions and lineages. Computes nothing, and knows neither runners nor models."""

from moeflow.report.table import Report, console, read, table

__all__ = ["Report", "console", "read", "table"]
