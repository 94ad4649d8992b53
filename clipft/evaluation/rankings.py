"""Ranks the images for some queries, while a run has their embeddings.

Every image with the query's caption counts as right, not only the query's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clipft.data.captions.table import CaptionTable
from clipft.embedding.embed import Embeddings
from clipft.evaluation.gallery import SHOWN, Rankings
from clipft.metrics.ranking import score_blocks

_MAX_QUERIES = 1000
_BLOCK_SCORES = 1 << 23
"""Scores held at a time, of 64 queries at most; as float32 they take 32 MiB."""


@dataclass(frozen=True)
class CaptionGroups:
    """The T captions of all pairs. ``groups`` has equal numbers for equal captions, and ``owners``
    the pair of each caption, ascending. Both are int64 [T]."""

    groups: Tensor
    owners: Tensor

    @classmethod
    def of(cls, captions: CaptionTable) -> "CaptionGroups":
        known: dict[bytes, int] = {}
        groups, owners = list[int](), list[int]()
        for number, own in enumerate(captions.by_pair()):
            groups += [known.setdefault(caption, len(known)) for caption in own]
            owners += [number] * len(own)
        return cls(torch.tensor(groups, dtype=torch.int64), torch.tensor(owners))


@torch.inference_mode()
def rank_images(embedded: Embeddings, captions: CaptionGroups, data: str) -> Rankings:
    """Rank all images for each distinct first caption. The query is the first pair that has it.

    Every image with the caption, as its first or another caption, is right. If there are too many
    captions, evenly spread ones are chosen. Among equal scores, right images rank last.

    Args:
        embedded: embeddings of the usable pairs.
        captions: the captions of all pairs.
        data: ``data_name`` of the pairs.
    """
    pairs = torch.tensor(embedded.numbers)
    groups = captions.groups[torch.isin(captions.owners, pairs)]
    owners = torch.arange(len(pairs)) if embedded.owners is None else embedded.owners
    own = torch.searchsorted(owners, torch.arange(len(pairs)))  # the first caption of each pair
    group = groups[own]
    # The first row of each group, in the order of the rows
    _, which = torch.unique(group, return_inverse=True)
    firsts = torch.full((int(which.max()) + 1,), len(group))
    firsts = firsts.scatter_reduce(0, which, torch.arange(len(group)), "amin").sort().values
    queries = firsts[:: max(1, -(-len(firsts) // _MAX_QUERIES))]

    ranks, first = list[int](), list[list[int]]()
    asked = embedded.texts[own[queries]]
    block_size = min(64, _BLOCK_SCORES // max(1, len(embedded.images)))
    for start, end, scores in score_blocks(asked, embedded.images, block_size):
        block = queries[start:end]
        right = groups[None] == group[block, None]
        if embedded.owners is not None:  # from captions to their images
            counts = torch.zeros(len(block), len(pairs)).index_add_(1, owners, right.float())
            right = counts > 0
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks += (((scores >= best) & ~right).sum(1) + 1).tolist()
        shown = scores.topk(min(SHOWN, len(embedded.images)), dim=1).indices
        first += pairs[shown].tolist()
    return Rankings(data, pairs[queries].tolist(), ranks, first)
