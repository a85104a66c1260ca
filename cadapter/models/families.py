"""Facts about model families, by ``model_type``: what training, conversion and merging need to know of a block.

Each entry answers the same questions in the same order. A decoder block here reads the residual stream, lets an
attention module and an MLP module write to it, and gives it back; the facts say which linear layers are those
*residual writers* and whether what they write reaches the stream as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from cadapter.errors import UsageError


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        attention, mlp: names of the two modules of a block whose outputs are added to the residual stream.
        attention_writers, mlp_writers: the linear layers, by name within the block, whose output is what the
            module writes.
        parallel: attention and MLP read the same normed input, so that a conversion of a ``block`` adapter to
            its writers is exact.
        post_norms: a norm stands between a writer and the addition to the residual stream.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_writers: tuple[str, ...] = ("self_attn.o_proj",)
    mlp_writers: tuple[str, ...] = ("mlp.down_proj",)
    parallel: bool = False
    post_norms: bool = False

    @property
    def sums_branches(self) -> bool:
        """Whether what a block adds is exactly the sum of what its two modules return."""
        return not self.post_norms


LLAMA_SHAPE = Family()

FAMILIES: dict[str, Family] = {
    "llama": LLAMA_SHAPE,
    "mistral": LLAMA_SHAPE,
    "qwen2": LLAMA_SHAPE,
    "qwen3": LLAMA_SHAPE,
}


def family_of(model_type: str) -> Family:
    """Return the facts of ``model_type``.

    Raises:
        UsageError: the family is not in the table.
    """
    if model_type not in FAMILIES:
        raise UsageError(
            f"Models of type {model_type!r} are not supported yet.\nSupported: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
