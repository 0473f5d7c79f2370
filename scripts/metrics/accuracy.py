"""Accuracy as a local `evaluate` metric: `evaluate.load` reads this file, so no hub has to be reached."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Gives the share of predictions that equal their reference, from 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference, from 0 to 1.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
