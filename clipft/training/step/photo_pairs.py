"""The loss between photos of one product, which ``--photo-pairs`` adds to the run's own loss.

It is the supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362, L_out) with products as
classes: each photo chooses among all other images of the step, and the other photos of its product
share the target. A photo that is the only one of its product in the step is a negative for others,
and has no loss of its own.
"""

import math

import torch
from torch import Tensor


def group_sizes(groups: Tensor) -> Tensor:
    """How many rows the group of each row has, int64 [N]."""
    ordered = groups.sort().values  # unlike torch.unique, this does not wait for a GPU
    ends = torch.searchsorted(ordered, groups, right=True)
    return ends - torch.searchsorted(ordered, groups)


def with_partner(products: Tensor) -> Tensor:
    """The rows whose product has another one, int64 [A], of the products int64 [N]."""
    return (group_sizes(products) > 1).nonzero().flatten()


def photo_losses(
    products: Tensor,
    rows: Tensor,
    block_logits: int,
    queries: Tensor,
    images: Tensor,
    differentiate: bool,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Sum the losses of the photos in ``rows``, a block of queries after the other.

    Args:
        products: int64 [N], equal for photos of one product, on the device of the images.
        rows: int64 [A], those of ``with_partner``, on the same device.
        block_logits: how many logits exist at once, at most.
        queries: the images of ``rows`` times the scale, float32 [A, D].
        images: unit embeddings, float32 [N, D].
        differentiate: whether to compute gradients.

    Returns:
        The sum, and its gradients in queries and images if they were wanted.
    """
    total, size = images.new_zeros(()), max(1, block_logits // len(images))
    gradients = (torch.empty_like(queries), torch.zeros_like(images)) if differentiate else None
    for first in range(0, len(rows), size):
        block = slice(first, first + size)
        own = rows[block, None]
        itself = torch.arange(len(images), device=rows.device) == own
        partners = (products[own] == products) & ~itself
        with torch.set_grad_enabled(differentiate):
            leaves = [x.detach().requires_grad_(differentiate) for x in (queries[block], images)]
            logits = leaves[0] @ leaves[1].T
            positive_logits = (logits * partners).sum(1) / partners.sum(1)
            loss = (logits.masked_fill(itself, -math.inf).logsumexp(1) - positive_logits).sum()
        total = total + loss.detach()
        if gradients:
            in_queries, in_images = torch.autograd.grad(loss, leaves)
            gradients[0][block] = in_queries
            gradients[1].add_(in_images)
    return total, gradients
