"""The report: one self-contained HTML page from run folders, the work behind `python -m eval.report`."""

from jaxalign.evaluation.report.page import write_report

__all__ = ["write_report"]
