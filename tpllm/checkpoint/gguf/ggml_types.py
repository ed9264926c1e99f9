"""The types of ggml's tensors: how many values a block has and how many bytes it takes (ggml-common.h's ``block_*`` structures)."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class GgmlType:
    """One type.

    Attributes:
        name: as ggml writes it, such as ``"Q4_K"``.
        block: values of a block; a row is a whole number of blocks.
        block_bytes: of a block.
        dtype: the safetensors name of the same dtype, where a block is one plain value.
    """

    name: str
    block: int
    block_bytes: int
    dtype: str | None = None


GGML_TYPES: dict[int, GgmlType] = {
    0: GgmlType("F32", 1, 4, "F32"), 1: GgmlType("F16", 1, 2, "F16"), 30: GgmlType("BF16", 1, 2, "BF16"), 28: GgmlType("F64", 1, 8, "F64"),
    24: GgmlType("I8", 1, 1, "I8"), 25: GgmlType("I16", 1, 2, "I16"), 26: GgmlType("I32", 1, 4, "I32"), 27: GgmlType("I64", 1, 8, "I64"),
    2: GgmlType("Q4_0", 32, 18), 3: GgmlType("Q4_1", 32, 20), 6: GgmlType("Q5_0", 32, 22), 7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34), 10: GgmlType("Q2_K", 256, 84), 11: GgmlType("Q3_K", 256, 110), 15: GgmlType("Q8_K", 256, 292),
    12: GgmlType("Q4_K", 256, 144), 13: GgmlType("Q5_K", 256, 176), 14: GgmlType("Q6_K", 256, 210),
    16: GgmlType("IQ2_XXS", 256, 66), 17: GgmlType("IQ2_XS", 256, 74), 18: GgmlType("IQ3_XXS", 256, 98), 19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18), 21: GgmlType("IQ3_S", 256, 110), 22: GgmlType("IQ2_S", 256, 82), 23: GgmlType("IQ4_XS", 256, 136),
    29: GgmlType("IQ1_M", 256, 56), 34: GgmlType("TQ1_0", 256, 54), 35: GgmlType("TQ2_0", 256, 66), 39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
}
"""The types by their number in a file; Q8_1, which only products use, is never in one."""
