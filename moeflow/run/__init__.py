"""Runners take a graph of steps and a store, and put into the store what is missing there.

They know neither torch nor models; `ray` is imported only in the folder `ray`.
"""

from moeflow.run.options import Options
from moeflow.run.outcome import CannotRun, ClusterLost, Outcome, StepFailed

__all__ = ["CannotRun", "ClusterLost", "Options", "Outcome", "StepFailed"]
