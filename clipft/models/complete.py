"""Rejects incomplete models, whose missing parts the libraries would make up.

transformers and PEFT initialize missing weights at random, and replace a missing tokenizer with one
that gives every letter the same id. They only log this, so the output of such a model looks valid.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipft.core.common import counted
from clipft.core.errors import ModelError

_SHOWN = 3
_SAMPLES = ("a", "b", "1", "é", "д", "あ")
"""Texts to which every tokenizer gives different ids, whatever its language."""


def first_names(names: Sequence[str]) -> str:
    """List the first names and the number of the remaining ones."""
    shown, rest = ", ".join(names[:_SHOWN]), len(names) - _SHOWN
    return f"{shown} and {rest:,} more" if rest > 0 else shown


def check_weights(name: str, found: Mapping[str, Any], config: str = "config.json") -> None:
    """Check that a file held all weights of a model, and no others.

    ``found`` is the loading info of transformers, which leaves out harmless buffers such as
    position ids. ``config`` is the file that determines the weights.

    Raises:
        ModelError: weights are missing, unexpected, or of another shape.
    """
    again = f"take {config} and the weights from the same model, and download or save both again"
    if mismatched := sorted(found["mismatched_keys"]):
        key, stored, expected = mismatched[0]
        raise ModelError(
            f"{_are(len(mismatched))} of another shape in the file of {name} than {config} "
            f"says: {key} is {_shape(stored)}, not {_shape(expected)}",
            again,
        )
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if prefix := _common_prefix(missing, unexpected):
        raise ModelError(
            f"{name} is not complete: {_are(len(missing), 'of the model ')} not in the file, where "
            f"names begin with {prefix!r}: {first_names(missing)}",
            "save the model itself again, without its wrapper",
        )
    wrong = []
    if missing:
        of_model = _are(len(missing), "of the model ")
        wrong.append(f"{of_model} not in the file: {first_names(missing)}")
    if unexpected:
        in_file = _are(len(unexpected), "in the file ")
        wrong.append(f"{in_file} not in the model: {first_names(unexpected)}")
    if wrong:
        raise ModelError(f"{name} is not complete: {'; '.join(wrong)}", again)


def check_finite(what: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Check that all weights are finite. ``what`` names their owner in the error message.

    Raises:
        ModelError: some weights are NaN or infinite.
    """
    broken = [name for name, weight in weights if not torch.isfinite(weight).all()]
    if broken:
        raise ModelError(
            f"{_are(len(broken), f'of {what} ')} not finite (NaN or infinity): "
            f"{first_names(broken)}",
            "the training that wrote them diverged, or the file is damaged: use another checkpoint",
        )


def check_normalization(name: str, processor: Any) -> None:
    """Check the mean and std of each channel in an image processor's configuration.

    Raises:
        ModelError: the configuration is not a JSON object, mean or std is not three numbers, or a
            std is not positive.
    """
    known = processor if isinstance(processor, dict) else {}
    for key in ("image_mean", "image_std"):
        values = known.get(key, (1, 1, 1))
        numbers = isinstance(values, list | tuple) and all(
            isinstance(value, int | float) and math.isfinite(value) for value in values
        )
        if not (numbers and len(values) == 3 and (key == "image_mean" or min(values) > 0)):
            raise ModelError(
                f"the image processor of {name} cannot normalize images: {key} is {values}",
                "copy preprocessor_config.json from the original model",
            )
    if not known:
        raise ModelError(
            f"the image processor of {name} is not described: preprocessor_config.json is empty or "
            "not a JSON object",
            "copy preprocessor_config.json from the original model",
        )


def check_tokenizer(name: str, tokenizer: Any, vocab_size: int, pools_at_end: bool) -> None:
    """Check that a tokenizer distinguishes texts and fits the token embedding of its model.

    Args:
        name: the model.
        tokenizer: a tokenizer of transformers.
        vocab_size: the number of rows of the token embedding.
        pools_at_end: whether the text tower needs the end token in each text.

    Raises:
        ModelError: the tokenizer is missing, or does not fit the model.
    """
    files = ", ".join(dict.fromkeys(["tokenizer.json", *tokenizer.vocab_files_names.values()]))
    restore = f"copy the tokenizer's files ({files}) from the original model"
    ids = [tuple(row) for row in tokenizer(list(_SAMPLES))["input_ids"]]
    if len(set(map(frozenset, ids))) == 1:
        raise ModelError(
            f"no tokenizer in {name}: without its files, every letter would get the same id",
            restore,
        )
    end = tokenizer.eos_token_id
    if end is None or (pools_at_end and any(row[-1] != end for row in ids)):
        raise ModelError(f"the tokenizer of {name} does not add an end token to a text", restore)
    known = tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in known.items() if number >= vocab_size)
    if beyond:
        tokens = first_names([token for _, token in beyond])
        raise ModelError(
            f"the tokenizer of {name} has {beyond[-1][0] + 1} ids, the model {vocab_size}: "
            f"there is no embedding for {tokens}",
            "resize the model with resize_token_embeddings and train it with the new tokens, or "
            + restore,
        )
    if len(known) < vocab_size / 2:  # token embeddings may be padded, but not by this much
        raise ModelError(
            f"the tokenizer of {name} has {len(known)} ids, the model {vocab_size}: it belongs to "
            "another model",
            restore,
        )


def _are(count: int, of: str = "") -> str:
    return f"{counted(count, 'weight')} {of}{'is' if count == 1 else 'are'}"


def _shape(size: Iterable[int]) -> str:
    return " x ".join(map(str, size)) or "a scalar"


def _common_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return the prefix that every missing name has in the file, such as ``module.``."""
    known = set(unexpected)
    for name in unexpected if missing else ():
        prefix = name.removesuffix(missing[0])
        if name.endswith(missing[0]) and all(prefix + other in known for other in missing):
            return prefix
    return ""
