"""Evaluations of generated embeddings, for tests of code that displays them."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from clipft.evaluation.evaluator import Comparison
from clipft.metrics.relevance import Identities
from clipft.metrics.retrieval import EvaluationOptions, evaluate


@cache
def evaluation_json(before: float = 0.3, after: float | None = 1.0) -> dict[str, Any]:
    """Return an ``evaluation.json`` of 60 pairs in two categories.

    ``before`` and ``after`` say how similar the texts of the two models are to their images. The
    result is shared between tests and must not be changed.
    """
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(60, 16, generator=generator)
    noise = torch.randn(60, 16, generator=generator)
    own = np.arange(60)
    identities = Identities(np.minimum(own, 55), own, None)
    labels = ["<i>chair"] * 40 + ["lamp"] * 20

    def of(share: float) -> Any:
        texts = normalize(share * images + noise, dim=1)
        options = EvaluationOptions(1 << 20, 200, 1)
        return evaluate(normalize(images, dim=1), texts, identities, labels, options)

    return Comparison(of(before), None if after is None else of(after)).to_dict()
