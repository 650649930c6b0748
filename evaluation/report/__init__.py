"""The report on a run: one page with the paper's tables and figures, ours beside the paper's numbers where they compare."""

from evaluation.report.config import Config
from evaluation.report.step import run

__all__ = ["Config", "run"]
