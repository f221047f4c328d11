"""The report of a run: report.json is the truth, index.html and report.md are drawn from it."""

from device_bench.report.build import build
from device_bench.report.write import write

__all__ = ["build", "write"]
