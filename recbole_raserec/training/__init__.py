"""A stage that trains a model: resumable, one run at a time in its directory."""

from recbole_raserec.training.stage import DECIMALS, Hooks, Outcome, Trial, evaluate_test, run_stage
from recbole_raserec.training.tracking import tracked, tracker_of
from recbole_raserec.training.trainer import ResumableTrainer

__all__ = [
    "DECIMALS", "Hooks", "Outcome", "ResumableTrainer", "Trial", "evaluate_test", "run_stage", "tracked", "tracker_of",
]  # fmt: skip
