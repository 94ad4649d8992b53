import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from clipft.metrics.definitions import paired_figures
from clipft.metrics.ranking import partner_ranks, ranks_of, retrieval
from tests.metrics.embeddings import PLENTY, naive_ranks, tied, unit


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 40),
    values=st.integers(0, 3),
    seed=st.integers(0, 999),
    memory=st.integers(1, 9000),
)
def test_ranks_equal_a_stable_sort_with_many_ties(n, values, seed, memory):
    queries, candidates = tied(n, seed, values), tied(n, seed + 1, values)
    expected = naive_ranks((queries @ candidates.T).numpy()).diagonal()
    assert partner_ranks(queries, candidates, memory).tolist() == expected.tolist()


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 30)),
    seed=st.integers(0, 999),
    memory=st.integers(1, 4000),
    share=st.floats(0, 1),
)
def test_any_number_of_right_candidates_can_be_ranked(shape, seed, memory, share):
    queries, candidates = tied(shape[0], seed), tied(shape[1], seed + 1)
    wanted = np.random.default_rng(seed).random(shape) < share
    rows, columns = map(torch.from_numpy, np.nonzero(wanted))
    expected = naive_ranks((queries @ candidates.T).numpy())[wanted]
    assert ranks_of(queries, candidates, rows, columns, memory).tolist() == expected.tolist()


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 60)),
    different=st.integers(1, 12),
    broken=st.booleans(),
    seed=st.integers(0, 999),
    memory=st.integers(1, 4000),
)
def test_copies_of_candidates_rank_in_their_order(shape, different, broken, seed, memory):
    random = np.random.default_rng(seed)
    queries, candidates = tied(shape[0], seed), tied(different, seed + 1)
    if broken:
        candidates[0] = float("nan")
    candidates = candidates[torch.from_numpy(random.integers(0, different, shape[1]))]
    wanted = random.random(shape) < 0.5
    rows, columns = map(torch.from_numpy, np.nonzero(wanted))
    scores = (queries @ candidates.T).numpy()
    ranks = naive_ranks(scores)  # numpy sorts NaN last
    ranks[np.isnan(scores)] = shape[1]  # and one that is asked for behind all
    found = ranks_of(queries, candidates, rows, columns, memory)
    assert found.tolist() == ranks[wanted].tolist()


def test_the_block_size_does_not_change_the_figures():
    images, texts = unit(50, 1), unit(50, 2)
    for memory in (1, 5000, 20_000):
        assert retrieval(images, texts, memory) == retrieval(images, texts, PLENTY)


@pytest.mark.parametrize("kind", [unit, tied])
@pytest.mark.parametrize("seed", range(3))
def test_figures_agree_with_open_clip(kind, seed):
    metrics = pytest.importorskip("open_clip_train.train").get_clip_metrics
    images, texts = kind(200, seed), kind(200, seed + 10)
    texts = functional.normalize(images + texts, dim=-1) if kind is unit else texts
    for queries, candidates in ((images, texts), (texts, images)):
        # open_clip leaves ties to an unstable sort, so it is given scores in our order
        scores = -torch.from_numpy(naive_ranks((queries @ candidates.T).numpy())).float()
        theirs = metrics(scores, torch.eye(200), torch.tensor(1.0))
        ranks = partner_ranks(queries, candidates, PLENTY).numpy()
        ours = {name: values.mean() for name, values in paired_figures(ranks).items()}
        for k in (1, 5, 10):
            assert ours[f"r@{k}"] == pytest.approx(theirs[f"image_to_text_R@{k}"])
        assert ours["mean_rank"] == pytest.approx(theirs["image_to_text_mean_rank"])
        assert np.floor(np.median(ranks)) == theirs["image_to_text_median_rank"]


def test_a_perfect_model_scores_perfectly_and_the_json_keys_are_stable():
    same = unit(20, 5)
    figures = retrieval(same, same, PLENTY).to_dict()
    assert figures["pairs"] == 20
    expected = {"r@1": 1.0, "r@5": 1.0, "r@10": 1.0, "median_rank": 1.0, "mrr": 1.0}
    assert figures["text_to_image"] == figures["image_to_text"] == expected


def test_nan_ranks_last():
    images, texts = unit(10, 8), unit(10, 9)
    images[3] = float("nan")
    assert partner_ranks(texts, images, PLENTY)[3] == 10
    assert retrieval(images * float("nan"), texts, PLENTY).text_to_image["r@1"] == 0.0


@pytest.mark.gpu
def test_a_gpu_gives_the_same_ranks():
    queries, candidates = tied(300, 1), tied(300, 2)
    on_gpu = partner_ranks(queries.cuda(), candidates.cuda(), 50_000)
    assert on_gpu.tolist() == partner_ranks(queries, candidates, PLENTY).tolist()


GROWTH = """
import torch
from clipft.metrics.ranking import ranks_of

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

torch.set_num_threads(1)
one = torch.Generator().manual_seed(0)
queries, candidates = (torch.randn(n, 16, generator=one) for n in (1_000, 100_000))
candidates = candidates[torch.randint(0, 100_000, (100_000,), generator=one)]
rows = torch.arange(1_000)
ranks_of(queries[:64], candidates, rows[:64], rows[:64], 32 << 20)
before = peak()
ranks_of(queries, candidates, rows, rows, 32 << 20)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_blocks_where_candidates_are_tied():
    """Arrays of as many rows as are tied left holes in the heap: 20 GB for a million pairs."""
    found = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True)
    assert float(found.stdout) < 32, found.stderr  # MiB
