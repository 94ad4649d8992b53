"""The families of CLIP: where their projections are, and how their towers pool.

A tower turns images or texts into pooled features, and its projection maps the features into the
shared embedding space. The two are separate, so that the features of a frozen tower can be computed
once and cached.
"""

from clipft.models.families.bert import AltClip, ChineseClip
from clipft.models.families.clip import Architecture, MetaClip2
from clipft.models.families.open_clip import BidirectionalOpenClip, OpenClip
from clipft.models.families.siglip import NaFlex, Siglip
from clipft.models.source import FAMILIES

__all__ = ["ARCHITECTURES", "Architecture"]

ARCHITECTURES: dict[str, Architecture] = dict(
    zip(
        FAMILIES,
        (
            Architecture(),
            Siglip(),
            NaFlex(),
            MetaClip2(),
            ChineseClip(),
            AltClip(),
            OpenClip(),
            BidirectionalOpenClip(),
        ),
        strict=True,
    )
)
"""The architecture for each ``model_type`` of a checkpoint's configuration."""
