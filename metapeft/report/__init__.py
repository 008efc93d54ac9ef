"""Reports for people: one HTML page that stands alone, PNG pictures, and tables for a terminal."""

from metapeft.report.page import Content
from metapeft.report.write import Paths, write_report

__all__ = ["Content", "Paths", "write_report"]
