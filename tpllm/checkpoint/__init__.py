"""Checkpoints: finding and opening them, whether they fit, and loading their weights by shard."""
from tpllm.checkpoint.entries import find_entries
from tpllm.checkpoint.folder import Checkpoint, config_without_weights, open_checkpoint
from tpllm.checkpoint.load import load_params, stored_schemes
from tpllm.checkpoint.memory import check_memory, needed_bytes
