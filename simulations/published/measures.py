"""Numbers of a run for comparisons with published tables. Accuracies are in percent."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from statistics import mean, pvariance

from fedlearn.runner.run_result import RunResult
from simulations.published.records import Measure, Published

PERCENT = 100.0


def final_accuracy(published: Published | None = None) -> Measure:
    """Return the measure of the accuracy on the pooled test examples after the last round."""
    return Measure(
        name="accuracy, %", read=lambda run: PERCENT * float(run.summary["final"]["accuracy"]), published=published
    )


def best_accuracy(published: Published | None = None) -> Measure:
    """Return the measure of the best accuracy of all evaluations on the pooled test examples.

    If clients have personal models, the accuracy is that of each client's model on the client's examples.
    """

    def read(run: RunResult) -> float:
        return max(accuracy for _, accuracy in _accuracies(run, personal=True))

    return Measure(name="best accuracy, %", read=read, published=published)


def best_accuracy_by(last_round: int, published: Published | None = None) -> Measure:
    """Return the measure of the best accuracy of the evaluations up to a round."""

    def read(run: RunResult) -> float:
        return max(accuracy for number, accuracy in _accuracies(run) if number <= last_round)

    return Measure(name=f"best accuracy by round {last_round}, %", read=read, published=published)


def rounds_to(target: float, published: Published | None = None) -> Measure:
    """Return the measure of the rounds to reach an accuracy in percent.

    As in McMahan et al. 2017, the curve is the best accuracy so far, with linear interpolation between evaluations.
    """

    def read(run: RunResult) -> float | None:
        return first_crossing(_accuracies(run), target)

    return Measure(name=f"rounds to {target:g} %", read=read, published=published)


def first_crossing(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Return the round at which the best value so far reaches a target, or None.

    Args:
        curve: pairs of round and value, in order of rounds.
        target: value to reach.

    >>> first_crossing([(1, 90.0), (2, 89.0), (3, 98.0)], 94.0)
    2.5
    >>> first_crossing([(1, 90.0)], 94.0) is None
    True
    """
    number, best = 0, 0.0
    for next_number, value in curve:
        if value >= target and best < target:
            start = number if number else next_number
            return start + (next_number - start) * (target - best) / (value - best)
        number, best = next_number, max(best, value)
    return None


def over_clients(name: str, statistic: Callable[[Sequence[float]], float]) -> Measure:
    """Return the measure of a statistic of the accuracies of clients, in percent."""

    def read(run: RunResult) -> float:
        with (run.folder / "clients.csv").open(encoding="utf-8", newline="") as file:
            rows = [row["accuracy"] for row in csv.DictReader(file)]
        return statistic([PERCENT * float(accuracy) for accuracy in rows if accuracy])

    return Measure(name=name, read=read)


def worst_tenth(values: Sequence[float]) -> float:
    """Return the mean of the smallest tenth of the values.

    >>> worst_tenth([*range(20)])
    0.5
    """
    return mean(sorted(values)[: max(1, round(len(values) / 10))])


def best_tenth(values: Sequence[float]) -> float:
    """Return the mean of the largest tenth of the values.

    >>> best_tenth([*range(20)])
    18.5
    """
    return mean(sorted(values)[-max(1, round(len(values) / 10)) :])


def fairness() -> tuple[Measure, ...]:
    """Return mean, worst tenth, best tenth and variance of the accuracies of clients."""
    return (
        over_clients("mean of clients, %", mean),
        over_clients("worst 10 %, %", worst_tenth),
        over_clients("best 10 %, %", best_tenth),
        over_clients("variance, points squared", pvariance),
    )


def _accuracies(run: RunResult, *, personal: bool = False) -> list[tuple[int, float]]:
    """Return pairs of round and accuracy in percent; of personal models, if asked for and available."""
    curve = []
    for line in run.history:
        models = line.get("personal") if personal else None
        accuracy = models["accuracy"]["pooled"] if models else (line.get("test") or {}).get("accuracy")
        if accuracy is not None:
            curve.append((int(line["round"]), PERCENT * float(accuracy)))
    return curve


def spent_epsilon(published: Published | None = None) -> Measure:
    """Return the measure of the epsilon that a run spent."""
    return Measure(name="epsilon", read=lambda run: run.summary["epsilon"], published=published)
