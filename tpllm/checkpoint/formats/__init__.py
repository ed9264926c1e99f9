"""Quantized checkpoints: what a quantization_config means, and reading the matrices behind it."""
from tpllm.checkpoint.formats.find import find_format
