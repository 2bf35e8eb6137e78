"""Records -> one HTML file that needs nothing else: no network, no server, no other file."""

from bench.report.page import write_report

__all__ = ["write_report"]
