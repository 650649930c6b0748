"""The report on a run: one page with the paper's tables and figures, our numbers next to the paper's."""

from evaluation.report.config import Config
from evaluation.report.step import run

__all__ = ["Config", "run"]
