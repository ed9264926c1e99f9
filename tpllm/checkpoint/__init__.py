"""Checkpoints: finding and opening them, whether they fit, and loading their weights by shard."""
from tpllm.checkpoint.folder import Checkpoint, open_checkpoint
from tpllm.checkpoint.load import find_entries, load_params, refuse_quantized
from tpllm.checkpoint.memory import check_memory, needed_bytes
