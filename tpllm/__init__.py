"""tpllm."""
