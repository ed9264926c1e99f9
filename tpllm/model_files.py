"""Which files a model is made of, beside its weights, and what is changed in them."""
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpllm.checkpoint.folder import Checkpoint, open_checkpoint
from tpllm.checkpoint.gguf.header import open_gguf
from tpllm.checkpoint.source import GGUF, Hub, find_folder, only_gguf
from tpllm.errors import ConfigError, short
from tpllm.tokenizer import Tokenizer
from tpllm.tokenizer.chat_template import read_template
from tpllm.tokenizer.generation_defaults import SAMPLING_KEYS, GenerationDefaults, default_sampling
from tpllm.tokenizer.gguf import defaults_from_gguf, tokenizer_from_gguf


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The arguments of :class:`tpllm.LLM` that concern files; see there."""

    revision: str | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    skip_tokenizer_init: bool = False
    chat_template: str | None = None
    hf_overrides: Mapping[str, Any] | None = None
    hf_token: str | bool | None = None
    download_dir: str | None = None
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.skip_tokenizer_init and (self.tokenizer is not None or self.chat_template is not None):
            raise ConfigError("skip_tokenizer_init is true, and a tokenizer or chat_template is given; leave one of them out")
        if self.tokenizer_revision is not None and self.tokenizer is None:
            raise ConfigError(f"tokenizer_revision is {short(self.tokenizer_revision)}, without a tokenizer; give one, or revision for both")
        overrides = self.override_generation_config
        if not isinstance(overrides, Mapping | None) or not (overrides or {}).keys() <= SAMPLING_KEYS.keys():
            raise ConfigError(f"override_generation_config is {short(overrides)}; give a dict with keys among {', '.join(SAMPLING_KEYS)}")

    def open(self, model: str | Path) -> tuple[Checkpoint, Tokenizer | None, GenerationDefaults]:
        """A model, its tokenizer, where it is not to be skipped, and what its files say of generating.

        Raises:
            TpllmError: something that cannot be found or read.
        """
        hub = Hub(self.hf_token, self.download_dir)
        checkpoint = open_checkpoint(model, revision=self.revision, hub=hub, hf_overrides=self.hf_overrides)
        with checkpoint.reads.recording():
            tokenizer = None if self.skip_tokenizer_init else self._tokenizer(checkpoint, hub)
            return checkpoint, tokenizer, self._generation(checkpoint, tokenizer)

    def fingerprint(self) -> dict[str, Any]:
        """What of it changes results and is in no file, as JSON."""
        changes = {"hf_overrides": self.hf_overrides, "override_generation_config": self.override_generation_config,
                   "generation_config": None if self.generation_config == "auto" else self.generation_config, "chat_template": self.chat_template}
        return {name: dict(value) if isinstance(value, Mapping) else str(value) for name, value in changes.items() if value}

    def _tokenizer(self, checkpoint: Checkpoint, hub: Hub) -> Tokenizer:
        folder, gguf = checkpoint.folder, checkpoint.gguf
        if self.tokenizer is not None:
            folder, _ = find_folder(self.tokenizer, self.tokenizer_revision, hub)
            path = folder if folder.suffix == GGUF else only_gguf(folder)
            gguf = None if path is None else open_gguf(path)
        tokenizer = Tokenizer.from_folder(folder) if gguf is None else tokenizer_from_gguf(gguf)
        return tokenizer if self.chat_template is None else tokenizer.with_template(read_template(self.chat_template))

    def _generation(self, checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> GenerationDefaults:
        """The ids that end a text are those of the tokenizer, and of the generation_config.json that is read, whatever sampling is taken of it."""
        if tokenizer is not None and self.tokenizer is None and self.generation_config in ("auto", "vllm"):
            found = tokenizer.generation
        else:
            own = set() if tokenizer is None or tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
            found = self._generation_of_files(checkpoint)
            found = dataclasses.replace(found, eos_token_ids=found.eos_token_ids | own)
        sampling = {} if self.generation_config == "vllm" else found.sampling
        overrides = default_sampling(Path("override_generation_config"), self.override_generation_config or {})
        return dataclasses.replace(found, sampling={**sampling, **overrides})

    def _generation_of_files(self, checkpoint: Checkpoint) -> GenerationDefaults:
        if self.generation_config not in ("auto", "vllm"):
            folder = Path(self.generation_config).expanduser()
            if not (folder / "generation_config.json").is_file():
                raise ConfigError(f"generation_config is {short(self.generation_config)}, where no generation_config.json is; give a folder that "
                                  "holds one, 'auto' for the model's, or 'vllm' for none")
            return GenerationDefaults.from_folder(folder)
        return GenerationDefaults.from_folder(checkpoint.folder) if checkpoint.gguf is None else defaults_from_gguf(checkpoint.gguf)


AS_THEY_ARE = ModelFiles()
