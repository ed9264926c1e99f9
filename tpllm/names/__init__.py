"""Names of other projects, vLLM's foremost, and what each means here."""
from tpllm.names.translate import Only, Refused, Renamed, Same, Taken, missing, takes, translated

__all__ = ["Only", "Refused", "Renamed", "Same", "Taken", "missing", "takes", "translated"]
