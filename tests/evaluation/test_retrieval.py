import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from clipft.evaluation import retrieval as module
from clipft.evaluation.retrieval import partner_ranks, retrieval, validation_loss
from clipft.training.contrastive import contrastive_loss


def unit(rows: int, seed: int, dim: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def naive_ranks(scores: np.ndarray) -> list[int]:
    """Sort each row by falling score, equal ones by index, and look the partner up."""
    return [
        1 + sorted(range(len(row)), key=lambda j: (-row[j], j)).index(i)
        for i, row in enumerate(scores)
    ]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), values=st.integers(1, 4), seed=st.integers(0, 999))
def test_ranks_are_those_of_a_sort_with_many_ties(n, values, seed):
    queries = torch.from_numpy(np.random.default_rng(seed).integers(0, values, (n, 3))).float()
    candidates = torch.from_numpy(np.random.default_rng(seed + 1).integers(0, values, (n, 3)))
    scores = (queries @ candidates.float().T).numpy()
    assert partner_ranks(queries, candidates.float()).tolist() == naive_ranks(scores)


def test_blocks_change_nothing(monkeypatch):
    images, texts = unit(50, 1), unit(50, 2)
    whole = retrieval(images, texts), validation_loss(images, texts, 30.0)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert retrieval(images, texts) == whole[0]
    assert validation_loss(images, texts, 30.0) == pytest.approx(whole[1], rel=1e-6)


def test_figures_agree_with_open_clip():
    metrics = pytest.importorskip("open_clip_train.train").get_clip_metrics
    images, texts = unit(200, 3), unit(200, 4)
    texts = functional.normalize(images + texts, dim=-1)
    theirs = metrics(images, texts, torch.tensor(100.0))
    ours = retrieval(images, texts)
    for name, figures in (
        ("image_to_text", ours.image_to_text),
        ("text_to_image", ours.text_to_image),
    ):
        assert figures.r1 == pytest.approx(theirs[f"{name}_R@1"])
        assert figures.r5 == pytest.approx(theirs[f"{name}_R@5"])
        assert figures.r10 == pytest.approx(theirs[f"{name}_R@10"])


def test_a_perfect_model_is_perfect_and_the_json_has_its_names():
    same = unit(20, 5)
    figures = retrieval(same, same).to_dict()
    assert figures["pairs"] == 20
    expected = {"r@1": 1.0, "r@5": 1.0, "r@10": 1.0, "median_rank": 1.0, "mrr": 1.0}
    assert figures["text_to_image"] == figures["image_to_text"] == expected


def test_validation_loss_is_the_training_loss_of_one_batch():
    images, texts = unit(30, 6), unit(30, 7)
    expected = contrastive_loss(images, texts, torch.tensor(3.0))
    assert validation_loss(images, texts, float(torch.tensor(3.0).exp())) == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_not_a_number_ranks_last():
    images, texts = unit(10, 8), unit(10, 9)
    images[3] = float("nan")
    assert partner_ranks(texts, images)[3] == 10
    assert retrieval(images * float("nan"), texts).text_to_image.r1 == 0.0
