"""The LO-BCQ number format in plain torch: the single source of truth for every backend."""

from lobcq_fx.format.encoded import Encoded, Operand, check_codebooks, decode, encode, scaled_entries
from lobcq_fx.format.error import sqnr_db
from lobcq_fx.format.int8_activation import Int8Activation, encode_int8
from lobcq_fx.format.matmul import matmul, product_in_fp32, scale_product
from lobcq_fx.format.rotation import rotate
from lobcq_fx.format.scales import absmax_row_scale, absmax_tensor_scale, block_arrays, tensor_scale_of_absmax
from lobcq_fx.format.spec import PAPER_CONFIGURATIONS, FormatSpec
from lobcq_fx.format.stacked import EncodedStack, decode_stack, encode_stack, grouped_matmul
from lobcq_fx.format.universal import universal_codebooks

__all__ = [
    "PAPER_CONFIGURATIONS",
    "Encoded",
    "EncodedStack",
    "FormatSpec",
    "Int8Activation",
    "Operand",
    "absmax_row_scale",
    "absmax_tensor_scale",
    "block_arrays",
    "check_codebooks",
    "decode",
    "decode_stack",
    "encode",
    "encode_int8",
    "encode_stack",
    "grouped_matmul",
    "matmul",
    "product_in_fp32",
    "rotate",
    "scale_product",
    "scaled_entries",
    "sqnr_db",
    "tensor_scale_of_absmax",
    "universal_codebooks",
]
