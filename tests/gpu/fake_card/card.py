"""Makes PyTorch believe in a CUDA card; only for programs that ``build.run`` starts.

Tensors on the card are those of PyTorch's FakeTensorMode. Tensors on the CPU stay real, and small
integer tensors on the card remember their values if these follow from the CPU: keys, lengths and
groups are then what they are in a run.
"""

import collections
import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import clipft

CARD = torch.device("cuda:0")
_PACKAGE = Path(clipft.__file__).parent
_REMEMBERED = 1 << 16
"""Integer tensors of up to so many values keep them."""
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)
_UNDEFINED = "empty"  # operators with this in their name give memory as it is


def believe() -> None:
    """Let torch take the card as present and set up."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "current_device": lambda: 0,
        "manual_seed_all": lambda seed: None,
        "_lazy_init": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name in ("init_gpu_context", "init_cuda_context"):
        if hasattr(fake_tensor, name):
            setattr(fake_tensor, name, lambda *device: None)


@dataclass(frozen=True)
class Images:
    """A copy of images, uint8 [rows, 3, S, S], to the card."""

    rows: int
    stream: int
    pinned: bool


class Card(FakeTensorMode):
    """While active, tensors can be made on the card, and a mix of devices raises.

    ``reads`` counts where the CPU waits for the card, by the place in clipft and the operator: a
    value that is read, and a copy in either direction that is not ``non_blocking``. ``images``
    lists the copies of images, and ``most_images`` is how many were on the card at once.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.reads: collections.Counter[str] = collections.Counter()
        self.images: list[Images] = []
        self.most_images = self._images_now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(_on_card(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name == "record_stream":  # it has no shape function, and returns nothing
            return None
        if name == "_local_scalar_dense":
            self._count(name)
            known = _known(args[0])
            return {torch.bool: True}.get(args[0].dtype, 1) if known is None else known.item()
        if name in {"_to_copy", "copy_"}:
            self._count_copy(name, args, kwargs)
            if name == "_to_copy" and _device_in(kwargs) == "cpu":
                return _on_host(args[0], kwargs.get("dtype"))
        if name in {"nonzero", "_unique2", "masked_select"} or _index_by_mask(name, args):
            self._count(name)
        known = self._computed(func, name, args, kwargs, leaves)
        try:
            args, kwargs = tree_map(self._described, (args, kwargs))
            out = super().__torch_dispatch__(func, types, args, kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            if name == "nonzero" and known is None:  # of values that are not there: none is
                known = torch.empty(0, args[0].ndim, dtype=torch.int64)
            if known is None:
                raise
            return tree_map(self._taken, known)
        if name == "_to_copy":
            self._note_images(leaves[0], out)
        for fake, value in zip(tree_leaves(out), tree_leaves(known), strict=False):
            if isinstance(fake, FakeTensor):
                fake.known = value if isinstance(value, Tensor) else None  # type: ignore[attr-defined]
        return out

    def _computed(self, func: Any, name: str, args: Any, kwargs: Any, leaves: Any) -> Any:
        """The same operator on values that are known; None if they are not, or are many."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        values = [_known(tensor) for tensor in tensors]
        small = all(v is not None and v.numel() <= _REMEMBERED for v in values)
        if not small or _UNDEFINED in name or (not tensors and not _small(func, args)):
            return None
        host_args, host_kwargs = tree_map(_host_operand, (args, kwargs))
        if "device" in host_kwargs:
            host_kwargs["device"] = torch.device("cpu")
        host_kwargs.pop("pin_memory", None)
        found = func(*host_args, **host_kwargs)
        integers = all(v.dtype in _INTEGERS for v in tree_leaves(found) if isinstance(v, Tensor))
        return found if integers else None

    def _described(self, leaf: Any) -> Any:
        """A real tensor as one without values, which is what operators on the card must get."""
        real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
        return self.from_tensor(leaf) if real else leaf

    def _taken(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with self:
            fake = torch.empty(value.shape, dtype=value.dtype, device=CARD)
        fake.known = value  # type: ignore[attr-defined]
        return fake

    def _note_images(self, source: Tensor, copy: Any) -> None:
        if source.device.type == "cpu" and source.ndim == 4 and source.dtype == torch.uint8:
            stream = torch.cuda.current_stream(CARD).stream_id
            self.images.append(Images(len(source), stream, source.is_pinned()))
            self._images_now += len(source)
            self.most_images = max(self.most_images, self._images_now)
            weakref.finalize(copy, self._free_images, len(source))

    def _free_images(self, rows: int) -> None:
        self._images_now -= rows

    def _count_copy(self, name: str, args: Any, kwargs: Any) -> None:
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device.type if name == "copy_" else _device_in(kwargs)
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if waits and target and target != source.device.type:
            self._count(f"{name} {source.device.type} to {target}")

    def _count(self, what: str) -> None:
        frames = [(Path(f.filename), f) for f in traceback.extract_stack()]
        own = [(p, f) for p, f in frames if _PACKAGE in p.parents]
        path, frame = own[-1] if own else frames[0]
        where = path.relative_to(_PACKAGE) if own else path.name
        self.reads[f"{where}:{frame.lineno} {frame.name}: {what}"] += 1


def _on_card(leaf: Any) -> bool:
    if isinstance(leaf, FakeTensor):
        return True
    return isinstance(leaf, torch.device) and leaf.type == "cuda"


def _device_in(kwargs: Any) -> str:
    device = kwargs.get("device")
    return torch.device(device).type if device is not None else ""


def _known(tensor: Tensor) -> Tensor | None:
    if isinstance(tensor, FakeTensor):
        known: Tensor | None = getattr(tensor, "known", None)
        return known
    return tensor if tensor.dtype in _INTEGERS else None


def _host_operand(leaf: Any) -> Any:
    return _known(leaf) if isinstance(leaf, Tensor) else leaf


def _on_host(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    known = _known(tensor)
    if known is None:  # a stand-in; nothing in a step may depend on it
        return torch.ones(tensor.shape, dtype=dtype or tensor.dtype)
    return known.to(dtype or tensor.dtype, copy=True)


def _index_by_mask(name: str, args: Any) -> bool:
    return name == "index" and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


def _small(func: Any, args: Any) -> bool:
    """Whether a factory such as ``arange`` makes few values."""
    numbers = [leaf for leaf in tree_leaves(args) if isinstance(leaf, int)]
    return max([abs(n) for n in numbers], default=0) <= _REMEMBERED


def move(model: nn.Module, card: Card) -> None:
    """Replace every parameter and buffer, wherever it is, by one on the card."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with card:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=CARD)
                    learns = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if learns else fake
                held[name] = made[id(tensor)]


class Roofline(TorchDispatchMode):
    """Counts the operators that run on the card, and the seconds that each needs at least.

    An operator takes as long as its multiplications at ``flops`` per second, or as moving its
    operands at ``bandwidth`` bytes per second, whichever is longer; what it changes in place is
    read and written. Operators without multiplications are called elementwise, whatever they do.
    ``attention`` counts the forward calls of attention by kernel, rows, queries and keys.
    """

    _VIEWS = frozenset(
        [
            "view",
            "transpose",
            "expand",
            "permute",
            "slice",
            "select",
            "detach",
            "alias",
            "unsqueeze",
            "squeeze",
            "t",
            "as_strided",
            "_unsafe_view",
            "split",
            "split_with_sizes",
            "diagonal",
            "reshape",
            "empty",
            "empty_like",
            "new_empty",
            "unbind",
            "lift_fresh",
            "view_as_real",
            "_reshape_alias",
            "unfold",
            "_local_scalar_dense",
        ]
    )

    _OVERWRITE = frozenset(["copy_", "fill_", "zero_"])  # what they are given is not read

    def __init__(self, flops: float = 500e12, bandwidth: float = 2.6e12) -> None:
        super().__init__()
        self._flops, self._bandwidth = flops, bandwidth
        self.calls: collections.Counter[str] = collections.Counter()
        self.products: collections.Counter[str] = collections.Counter()
        self.elementwise: collections.Counter[str] = collections.Counter()
        self.attention: collections.Counter[tuple[str, int, int, int]] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        space, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        overwritten = args[:1] if name in self._OVERWRITE else ()
        read = _bytes((args[len(overwritten) :], {k: v for k, v in kwargs.items() if k != "out"}))
        written = _bytes(out)
        if space.startswith("prim") or name in self._VIEWS or not read + written:
            return out
        moved = (read + written) / self._bandwidth
        count = flop_registry.get(func._overloadpacket)
        self.calls[name] += 1
        if name.startswith("_scaled_dot_product") and not name.endswith("backward"):
            queries, keys = args[0], args[1]
            self.attention[name, len(queries), queries.shape[2], keys.shape[2]] += 1
        if count:
            worked = count(*args, **kwargs, out_val=out) / self._flops
            self.products[name] += max(worked, moved)  # type: ignore[assignment]
        else:
            self.elementwise[name] += moved  # type: ignore[assignment]
        return out

    @property
    def seconds(self) -> tuple[float, float]:
        """Of all products, and of all that is elementwise."""
        return sum(self.products.values()), sum(self.elementwise.values())


def _bytes(operands: Any) -> int:
    """The bytes of the different tensors on the card; one that is expanded has those of its
    storage."""
    tensors = {id(t): t for t in tree_leaves(operands) if isinstance(t, FakeTensor)}
    each = ((t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors.values())
    return sum(map(min, each))
