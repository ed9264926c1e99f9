"""Products of activations and quantized weights, dequantized in the kernel."""
from pallas_kernels.quant_matmul.reference import dequantize_reference, int8_matmul_reference, int8_rows, quant_matmul_reference
