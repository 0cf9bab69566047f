"""Judge the final model of a run once, at its end, and write ``evaluation.json``."""

from fedlearn.runner.evaluation.final_evaluation import EVALUATION_FILE, evaluate_final_model, write_evaluation

__all__ = ["EVALUATION_FILE", "evaluate_final_model", "write_evaluation"]
