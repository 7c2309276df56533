"""Evaluation protocols, one a file, and the report over a run's."""

from xattn.evals.fewshot import fewshot
from xattn.evals.report import EVALS, check, compare_workdirs, evaluate_workdir, run

__all__ = ["EVALS", "check", "compare_workdirs", "evaluate_workdir", "fewshot", "run"]
