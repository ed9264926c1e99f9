"""Products of activations and quantized weights, dequantized in the kernel."""
from pallas_kernels.quant_matmul.op import has_rows_kernel, packed_matmul_reference, quant_matmul
from pallas_kernels.quant_matmul.packing import PackedArrays, WeightFormat, dequantize_packed, layout_for, pack
from pallas_kernels.quant_matmul.reference import (
    dequantize_reference,
    e4m3_rows,
    int8_matmul_reference,
    int8_rows,
    quant_matmul_reference,
    quantize_rows,
)
