"""The losses equal plain torch on the whole matrix, whatever the size of their blocks."""

import math
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipft.config.sections.model import LossSettings
from clipft.core.errors import UsageError
from clipft.core.memory import peak_memory
from clipft.training.step.losses import ContrastiveLoss, make_loss

NAMES = ("clip", "siglip")
MODES = ("soft", "mask")


@dataclass
class Case:
    images: Tensor
    texts: Tensor
    scale: Tensor
    bias: Tensor
    groups: Tensor

    @classmethod
    def drawn(cls, seed: int, size: int, kinds: int, width: int = 5) -> "Case":
        draw = torch.Generator().manual_seed(seed)

        def unit() -> Tensor:
            drawn = torch.randn(size, width, generator=draw, dtype=torch.float64)
            return functional.normalize(drawn, dim=-1).requires_grad_()

        scale = torch.rand((), generator=draw, dtype=torch.float64) * math.log(100)
        bias = -10 * torch.rand((), generator=draw, dtype=torch.float64)
        groups = torch.randint(-kinds, kinds, (size,), generator=draw) * 3_000_000_000
        return cls(unit(), unit(), scale.requires_grad_(), bias.requires_grad_(), groups)

    def loss(self, name: str, mode: str, block: int | None = None) -> ContrastiveLoss:
        holder = SimpleNamespace(logit_scale=self.scale, logit_bias=self.bias)
        made = make_loss(LossSettings(loss=name, positives_mode=mode), holder)
        return replace(made, block_logits=block)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        leaves = [self.images, self.texts, self.scale, self.bias]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def naive(case: Case, name: str, mode: str, groups: Tensor) -> Tensor:
    logits = case.scale.exp() * case.images @ case.texts.T
    same = groups[:, None] == groups
    own = torch.eye(len(groups), dtype=torch.bool)
    compared = own | ~same if mode == "mask" else torch.ones_like(own)
    positive = own if mode == "mask" else same
    if name == "siglip":
        signs = torch.where(positive, 1.0, -1.0)
        each = -functional.logsigmoid(signs * (logits + case.bias))
        return each[compared].sum() / len(groups)
    logits = logits.masked_fill(~compared, -math.inf)
    share = positive.double() / positive.sum(1, keepdim=True)
    both = [functional.log_softmax(z, dim=1) for z in (logits, logits.T)]
    return -sum(torch.where(positive, share * z, 0.0).sum(1).mean() for z in both) / 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 13),
    kinds=st.integers(1, 8),
    block=st.integers(1, 200),
    name=st.sampled_from(NAMES),
    mode=st.sampled_from([*MODES, "none"]),
)
def test_value_and_gradients_are_those_of_the_whole_matrix(seed, size, kinds, block, name, mode):
    case = Case.drawn(seed, size, kinds)
    groups = torch.arange(size) if mode == "none" else case.groups
    expected = naive(case, name, mode, groups)
    loss = case.loss(name, "soft" if mode == "none" else mode, block)
    ours = loss(case.images, case.texts, None if mode == "none" else groups)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(case.gradients(3 * ours), case.gradients(3 * expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("block", [1, 50, None])
def test_the_plain_loss_is_that_of_transformers(block):
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    case = Case.drawn(1, 20, 3)
    logits = case.scale.exp() * case.texts @ case.images.T
    ours = case.loss("clip", "soft", block)(case.images, case.texts)
    torch.testing.assert_close(ours, image_text_contrastive_loss(logits))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_groups_of_one_change_nothing(name, mode):
    case = Case.drawn(2, 9, 3)
    loss = case.loss(name, mode, block=30)
    plain = loss(case.images, case.texts)
    torch.testing.assert_close(loss(case.images, case.texts, torch.arange(9) - 4), plain)
    assert loss.lower_bound(torch.arange(9)) == loss.lower_bound(None) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_the_lower_bound_is_reached_by_a_perfect_model_and_by_no_other(mode):
    """Embeddings with one dimension per group, and a high scale, reach the bound."""
    groups = torch.tensor([0, 0, 0, 1, 2, 2])
    perfect = functional.one_hot(groups).double()
    case = Case(perfect, perfect, torch.tensor(math.log(100)).double(), torch.tensor(0.0), groups)
    loss = case.loss("clip", mode)
    floor = loss.lower_bound(groups)
    if mode == "soft":
        assert floor == pytest.approx((3 * math.log(3) + 2 * math.log(2)) / 6)
    else:
        assert floor == 0.0
    assert loss(perfect, perfect, groups).item() == pytest.approx(floor, abs=1e-12)
    other = Case.drawn(3, 6, 1, width=3)
    assert loss(other.images, other.texts, groups).item() > floor


def test_all_captions_equal():
    case = Case.drawn(4, 8, 1)
    equal = torch.zeros(8, dtype=torch.int64)
    masked = case.loss("clip", "mask", block=20)(case.images, case.texts, equal)
    assert masked.item() == pytest.approx(0.0, abs=1e-12)
    assert all(not gradient.abs().max() > 1e-12 for gradient in case.gradients(masked))
    soft = case.loss("clip", "soft")
    assert soft(case.images, case.texts, equal).item() >= soft.lower_bound(equal) == math.log(8)


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_the_value_is_the_same(name):
    case = Case.drawn(5, 12, 2)
    loss = case.loss(name, "soft", block=40)
    learning = loss(case.images, case.texts, case.groups)
    with torch.inference_mode():
        images, texts = case.images.clone(), case.texts.clone()
        assert loss(images, texts, case.groups).item() == learning.item()


class Products(TorchDispatchMode):
    """Counts matrix products, and notes in which precision each was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.precisions.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("block", [40, None])
@pytest.mark.parametrize("name", NAMES)
def test_validation_computes_no_gradients(name, block):
    """The scale is trained, and in the scenario ``full`` the embeddings may carry a graph too."""
    case = Case.drawn(5, 12, 2)
    loss = case.loss(name, "soft", block)
    with torch.no_grad(), Products() as products:
        value = loss(case.images, case.texts, case.groups)
    assert not value.requires_grad
    assert len(products.precisions) == (1 if block is None else math.ceil(12 / (block // 12)))


@pytest.mark.parametrize("before", ["tf32", "none"])
@pytest.mark.parametrize("block", [40, None])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_exempt_from_tf32_and_autocast(name, block, before, precision):
    precision.fp32_precision = before
    before = precision.fp32_precision  # "none" reads as what holds for the whole process
    drawn = Case.drawn(5, 12, 2)
    floats = (drawn.images, drawn.texts, drawn.scale, drawn.bias)
    case = Case(*(x.detach().float().requires_grad_() for x in floats), drawn.groups)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        loss = case.loss(name, "soft", block)(case.images, case.texts, case.groups)
        between = precision.fp32_precision
        loss.backward()
    assert loss.dtype == case.images.grad.dtype == torch.float32
    assert len(products.precisions) >= 3  # the logits, and both gradients
    assert set(products.precisions) == {"ieee"}
    assert between == precision.fp32_precision == before
    expected = drawn.loss(name, "soft", block)(drawn.images, drawn.texts, drawn.groups)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def precision():
    """The setting of torch for matrix products, put back afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name, mode):
    """A stand-in: tensors without values, from which no number can be read."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        images, texts = (torch.randn(12, 4, requires_grad=True) for _ in range(2))
        scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
        groups = torch.zeros(12, dtype=torch.int64)
        for block in (40, None):
            case = Case(images, texts, scale, bias, groups)
            case.loss(name, mode, block)(images, texts, groups).backward()
        assert images.grad.shape == texts.grad.shape == (12, 4)


def test_extreme_logits_stay_finite_in_fp32():
    images = functional.normalize(torch.randn(6, 4), dim=-1).requires_grad_()
    texts = (-images).detach().requires_grad_()
    scale = torch.tensor(math.log(100), requires_grad=True)
    bias = torch.tensor(-10.0, requires_grad=True)
    for name in NAMES:
        case = Case(images, texts, scale, bias, torch.arange(6))
        loss = case.loss(name, "soft", block=12)(images, texts)
        assert 0 < loss.item() < math.inf
        assert all(gradient.isfinite().all() for gradient in case.gradients(loss))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_computes_the_same(name, mode):
    case = Case.drawn(6, 200, 40, width=32)
    plain = case.loss(name, mode)(case.images, case.texts, case.groups)
    moved = [t.detach().cuda().float().requires_grad_() for t in (case.images, case.texts)]
    scales = [t.detach().cuda().float().requires_grad_() for t in (case.scale, case.bias)]
    there = Case(*moved, *scales, case.groups)
    with torch.autocast("cuda", torch.bfloat16):  # the loss itself stays in fp32
        loss = there.loss(name, mode, block=3000)(*moved, case.groups)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for ours, theirs in zip(there.gradients(loss), case.gradients(plain), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, atol=1e-5, rtol=1e-3)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that exist at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.most = dict[int, int](), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage and storage.data_ptr() not in self.live:
                self.live[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(tensor, self.live.pop, storage.data_ptr(), None)
        self.most = max(self.most, sum(self.live.values()))
        return made


@pytest.mark.parametrize("name", NAMES)
def test_many_blocks_take_no_more_memory_than_a_few(name):
    case = Case.drawn(seed=1, size=256, kinds=100)
    used = []
    for rows in (8, 1):
        with LiveBytes() as counted:
            case.loss(name, "soft", block=256 * rows)(case.images, case.texts, case.groups)
        used.append(counted.most)
    assert used[1] < used[0] < 256 * 256 * 8 / 4  # a quarter of all logits


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_32768_pairs_run_in_bounded_memory(name):
    size, width = 32_768, 64
    whole = size * size * 4
    images = functional.normalize(torch.randn(size, width), dim=-1).requires_grad_()
    texts = functional.normalize(torch.randn(size, width), dim=-1).requires_grad_()
    groups = torch.randint(0, size // 3, (size,))
    case = Case(images, texts, torch.tensor(3.0), torch.tensor(-10.0), groups)
    with peak_memory(torch.device("cpu")) as before:
        pass
    with peak_memory(torch.device("cpu")) as peak:
        case.loss(name, "soft")(images, texts, groups).backward()
    used = peak.bytes - before.bytes
    assert used < whole / 32
    assert images.grad.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 70),
    spread=st.sampled_from([0.0, 1e-3, 0.1]),
    block=st.sampled_from([None, 1, 40, 700]),
    name=st.sampled_from(NAMES),
    mode=st.sampled_from([*MODES, "none"]),
)
def test_a_loss_of_nearly_zero_is_never_below_zero(seed, size, spread, block, name, mode):
    """At the highest temperature a perfect model has logits of 100 and a loss of 0."""
    draw = torch.Generator().manual_seed(seed)
    images = functional.normalize(torch.randn(size, 128, generator=draw), dim=-1)
    noise = spread * torch.randn(size, 128, generator=draw)
    texts = functional.normalize(images + noise, dim=-1)
    bias = torch.tensor([0.0, -10.0, -60.0][seed % 3])
    case = Case(images, texts, torch.tensor(100.0).log(), bias, torch.arange(size))
    groups = None if mode == "none" else case.groups
    if mode == "soft" and name == "siglip":  # several positives, each of which has a loss of 0
        case.groups //= 2
        case.images, case.texts = (rows[torch.arange(size) // 2 * 2] for rows in (images, texts))
    kind = "soft" if mode == "none" else mode
    loss = case.loss(name, kind, block)(case.images, case.texts, groups)
    exact = replace(case, images=case.images.double(), texts=case.texts.double())
    exact.scale, exact.bias = case.scale.double(), case.bias.double()
    expected = exact.loss(name, kind)(exact.images, exact.texts, groups)
    assert loss >= 0
    assert loss.item() == pytest.approx(expected.item(), abs=2e-5, rel=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("mode", ["soft", "mask"])
def test_matryoshka_is_the_mean_of_the_losses_of_cut_embeddings(name, mode):
    case = Case.drawn(seed=4, size=9, kinds=3, width=8)
    ours = replace(case.loss(name, mode), dimensions=(6, 3))(case.images, case.texts, case.groups)

    def cut(size: int) -> Case:
        rows = (functional.normalize(x[:, :size], dim=1) for x in (case.images, case.texts))
        return Case(*rows, case.scale, case.bias, case.groups)

    parts = [naive(part, name, mode, case.groups) for part in (case, cut(6), cut(3))]
    expected = sum(parts) / 3
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(case.gradients(ours), case.gradients(expected))


def test_matryoshka_needs_fewer_dimensions_than_there_are():
    holder = SimpleNamespace(logit_scale=None, logit_bias=None, embedding_size=128)
    with pytest.raises(UsageError, match="the embeddings have 128 dimensions"):
        make_loss(LossSettings(loss="clip", matryoshka="64,128"), holder)
    with pytest.raises(ValueError, match="not a number of dimensions"):
        LossSettings(matryoshka="64,wide")
