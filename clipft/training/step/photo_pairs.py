"""The loss between photos of one product, which ``--photo-pairs`` adds to the run's own loss.

It is the supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362, L_out) with products as
classes: the softmax of each photo is over all other images of the step, and the other photos of its
product share the target. If a photo is the only one of its product in the step, it is a negative
for others but has no loss of its own.
"""

import math

import torch
from torch import Tensor


def group_sizes(groups: Tensor) -> Tensor:
    """Return the size of each row's group, int64 [N]."""
    ordered = groups.sort().values  # unlike torch.unique, this does not wait for a GPU
    ends = torch.searchsorted(ordered, groups, right=True)
    return ends - torch.searchsorted(ordered, groups)


def with_partner(products: Tensor) -> Tensor:
    """Return the rows, int64 [A], of ``products``, int64 [N], that have an equal product."""
    return (group_sizes(products) > 1).nonzero().flatten()


def photo_losses(
    products: Tensor,
    rows: Tensor,
    block_logits: int,
    queries: Tensor,
    images: Tensor,
    differentiate: bool,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Sum the losses of the photos in ``rows``, one block of queries after the other.

    Args:
        products: int64 [N], equal for photos of one product, on the device of the images.
        rows: int64 [A], the result of ``with_partner``, on the same device.
        block_logits: the most logits that exist at once.
        queries: the images of ``rows`` times the scale, float32 [A, D].
        images: unit embeddings, float32 [N, D].
        differentiate: whether to compute gradients.

    Returns:
        The sum, and, with ``differentiate``, its gradients for queries and images.
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
