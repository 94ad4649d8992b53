"""The mean of several fine-tuned models' weights, exact for whole weights and for LoRA.

Whole weights are averaged one by one. The mean of LoRA adapters is not the adapter with the mean
matrices, because the product of two means is not the mean of the products. So the matrices are
concatenated along the rank: with ``B = [s1 B1 / k, s2 B2 / k, ...]`` and ``A = [A1; A2; ...]``,
``B A`` is the mean of the k changes ``si Bi Ai``. The mixture is a LoRA model whose rank is the sum
of the ranks and whose scale is 1, which all commands can open. A member without an adapter at some
layer adds no change there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipft.config.scenarios import SCENARIOS
from clipft.config.settings import EVALUATION_OVERRIDES, Settings
from clipft.config.sources import option_of
from clipft.core.errors import UsageError

_SAME = ("context_length", "image_size", "loss")
"""Settings that determine the meaning of the weights. They must be equal in all members."""
_MEASURED = ("caption", "caption_lines", "fields", "label_prompts", "group_field")
"""Settings that determine on what the members are measured."""
_CHANGED_BASE = {"olora", "pissa"}


@dataclass(frozen=True)
class Member:
    """A model to average: its checkpoint, its run as the user named it, and its settings."""

    run: Path
    checkpoint: Path
    settings: Settings

    def state(self) -> dict[str, Any]:
        """Read the trained weights; they are not kept in memory."""
        from clipft.runs.checkpoint import load_checkpoint

        state: dict[str, Any] = load_checkpoint(self.checkpoint)["model_state_dict"]
        return state

    @property
    def kind(self) -> str:
        """The kind of the trained weights. Models of the same kind can be averaged."""
        scenario = self.settings.declared_scenario
        return "LoRA" if scenario.lora else scenario.name

    @property
    def lora_scale(self) -> float:
        """The factor by which PEFT multiplies the product of both matrices."""
        rank = self.settings.lora_r
        return self.settings.lora_alpha / (math.sqrt(rank) if self.settings.lora_rslora else rank)


def check_mixable(members: Sequence[Member], contents: Sequence[dict[str, Any]]) -> None:
    """Check that the weights of several checkpoints can be averaged. ``contents`` may be from
    ``check_checkpoint``; empty ones are not checked.

    Raises:
        UsageError: they were trained from other models or on other pairs, or train other weights.
    """
    first, known = members[0], contents[0]
    for member, content in zip(members, contents, strict=True):
        _check_adapter(member)
        if member.kind != first.kind:
            raise _unlike(member, f"trains {member.kind}", f"{first.kind} in {first.run}")
        for name in _SAME:
            ours, theirs = (getattr(m.settings, name) for m in (member, first))
            if ours != theirs:
                raise _unlike(member, f"has {name} {ours}", f"{theirs} in {first.run}")
        for name in _MEASURED:
            ours, theirs = (getattr(m.settings, name) for m in (member, first))
            if ours != theirs:
                hint = "average only runs whose captions are made in the same way"
                if name in EVALUATION_OVERRIDES:
                    hint = f"set {option_of(name)}, so that all of them are measured alike"
                raise UsageError(
                    f"{member.run} has {name} {ours!r} instead of {theirs!r} in {first.run}", hint
                )
        if not content or not known:
            continue
        ours, theirs = (c["base_model"] for c in (content, known))
        if ours["fingerprint"] != theirs["fingerprint"]:
            raise _unlike(member, f"began with {ours['name']}", f"{theirs['name']} in {first.run}")
        if content.get("data") != known.get("data"):
            raise _unlike(member, "was trained on other pairs", f"than {first.run}", "")


def _check_adapter(member: Member) -> None:
    settings = member.settings
    if not settings.declared_scenario.trains:
        raise UsageError(f"{member.run} trained nothing", "name runs of another scenario")
    variant = settings.lora_init if settings.lora_init in _CHANGED_BASE else ""
    if member.kind == "LoRA" and (settings.lora_dora or variant):
        name = "DoRA" if settings.lora_dora else f"--lora-init {variant}"
        raise UsageError(
            f"{member.run} was trained with {name}, whose adapters cannot be averaged exactly",
            "leave it out, or train without it",
        )


def _unlike(member: Member, has: str, other: str, instead: str = "instead of ") -> UsageError:
    return UsageError(
        f"{member.run} {has} {instead}{other}",
        "average only runs of one pretrained model, one kind of scenario and the same pairs",
    )


def mixed_settings(members: Sequence[Member]) -> Settings:
    """Return the settings of the mean of ``members``: those of the first, with its weights."""
    first = members[0].settings
    if members[0].kind != "LoRA" or len(members) == 1:
        return first
    rank = sum(member.settings.lora_r for member in members)
    changed = {
        "scenario": _scenario_of(members),
        "lora_targets": _targets_of(members),
        "lora_r": rank,
        "lora_alpha": float(rank),
        "lora_rslora": False,
    }
    return first.model_copy(update=changed)


def _scenario_of(members: Sequence[Member]) -> str:
    """Return the LoRA scenario that trains the towers of all members."""
    towers = {tower for member in members for tower in member.settings.declared_scenario.lora}
    return next(name for name, known in SCENARIOS.items() if towers and set(known.lora) == towers)


def _targets_of(members: Sequence[Member]) -> str:
    """Return the smallest set of layers that covers the adapters of all members."""
    from clipft.models.trainable import TARGETS

    needed = {layer for m in members for layer in TARGETS[m.settings.lora_targets]}
    fitting = (name for name, layers in TARGETS.items() if needed <= set(layers))
    return min(fitting, key=lambda name: len(TARGETS[name]))


def mixed_state(members: Sequence[Member], start: dict[str, Any]) -> dict[str, Any]:
    """Average the trained weights of ``members``.

    Args:
        members: models that ``check_mixable`` accepts.
        start: the weights of ``mixed_settings`` before training, used for members that do not train
            them.
    """
    import torch

    if len(members) == 1:
        return members[0].state()
    mixture: dict[str, Any] = {}
    for member in members:  # one after the other: whole models are large
        state = member.state()
        for name, pretrained in start.items():
            part = _part_of(member, state, name, pretrained, len(members))
            if name not in mixture:
                mixture[name] = part
            elif _is_adapter(name):
                mixture[name] = torch.cat([mixture[name], part], dim=_rank_dim(name))
            else:
                mixture[name] += part
    return mixture


def _part_of(member: Member, state: dict[str, Any], name: str, pretrained: Any, count: int) -> Any:
    """Return what one of ``count`` members contributes to a weight of their average."""
    if not _is_adapter(name):
        return state.get(name, pretrained) / count
    if name not in state:
        shape, rank = list(pretrained.shape), member.settings.lora_r
        shape[_rank_dim(name)] = rank
        return pretrained.new_zeros(shape)
    return state[name] * (member.lora_scale / count) if "lora_B" in name else state[name]


def _is_adapter(name: str) -> bool:
    return "lora_A" in name or "lora_B" in name


def _rank_dim(name: str) -> int:
    """The dimension of the rank: the first of A [r, in], the second of B [out, r]."""
    return 1 if "lora_B" in name else 0
