"""The errors users meet. Each is a ``ValueError`` whose message names the value, the limit and the fix."""


class TpllmError(ValueError):
    """Base of every error that a user's input can cause."""


class VersionError(TpllmError, ImportError):
    """A Python or a jax that tpllm was not tried on."""


class ConfigError(TpllmError):
    """A model configuration that cannot be run."""


class CheckpointError(TpllmError):
    """A checkpoint that is missing, damaged, unsafe or of the wrong shape."""


class MemoryNeedError(TpllmError):
    """A model that does not fit the memory that is free."""


class TokenizerError(TpllmError):
    """A tokenizer or chat template that is missing or cannot be used."""


class SamplingError(TpllmError):
    """A sampling parameter out of its range."""


class PromptError(TpllmError):
    """A prompt that is empty, malformed or longer than the context."""


class JobError(TpllmError):
    """A batch job that cannot be started or resumed."""
