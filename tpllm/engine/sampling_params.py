"""How a request is sampled: vLLM's names, meanings and defaults, with one exception (``max_tokens``)."""
import copy
import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tpllm.errors import SamplingError
from tpllm.names import takes
from tpllm.names.vllm import SAMPLING

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64


class RequestOutputKind(enum.IntEnum):
    """What :meth:`.AsyncLLM.generate` yields: the output so far, what is new in it, or the finished output alone."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclasses.dataclass(kw_only=True, slots=True)
class SamplingParams:
    """Parameters of one request. ``None`` for ``logit_bias``, ``bad_words``, ``stop`` or ``stop_token_ids`` is the same as none of them.

    They may be changed; each request takes a copy, which is checked again.

    Attributes:
        n: completions to draw, 1 to 128.
        temperature: divides the logits; 0 takes the best token (greedy).
        top_p: keep the likeliest tokens whose probabilities add up to this, in (0, 1]; 1 keeps all.
        top_k: keep this many likeliest tokens; 0 or -1 keeps all. Tokens tied with the last one kept are kept too.
        min_p: drop tokens less likely than this share of the likeliest one, in [0, 1].
        presence_penalty: taken once from the logit of each token that the completion holds, -2 to 2.
        frequency_penalty: taken from the logit of each token once for each time that the completion holds it, -2 to 2.
        repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and completion; above 0, 1 for none.
        logit_bias: token id -> what is added to its logit, -100 to 100.
        allowed_token_ids: only these may be drawn; None for all.
        bad_words: texts whose own token sequences (alone, and after a space) may not be completed, as in vLLM; the same text made of
            other tokens is not seen. At most 32 sequences of at most 8 tokens.
        seed: of this request's randomness, any whole number of 64 bits; None lets the engine choose one per request from its own seed.
        stop: a string, or several, that end a completion when they appear in its text; they need not begin or end with a token.
        include_stop_str_in_output: keep what ended the completion in its text: the string, or the text of the stop id.
        stop_token_ids: ids that end a completion besides the model's end-of-sequence ids; at most 64.
        ignore_eos: go on after the model's end-of-sequence ids.
        max_tokens: most tokens to generate; None for as many as the context holds (vLLM's default is 16).
        min_tokens: no stop id is drawn, and no stop string looked for, before this many tokens.
        logprobs: report the log probability of each drawn token and of this many likeliest ones, at most ``max_logprobs`` of the :class:`.LLM`
            (20); -1 is the whole vocabulary, None reports none. They are the model's own, before temperature and filters.
        prompt_logprobs: the same for each prompt token.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: make text of the tokens; False leaves it empty.
        truncate_prompt_tokens: keep only this many last tokens of the prompt; -1 keeps as many as leave room for ``max_tokens``, or for one token
            where that is None.
        output_kind: what ``AsyncLLM.generate`` yields: the output so far (0), what is new in it (1), or the finished output alone (2).

    Raises:
        SamplingError: a value out of its range; it names the value and the limits.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = dataclasses.field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = ()
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self):
        for name in ("logit_bias", "bad_words", "stop", "stop_token_ids"):
            if getattr(self, name) is None:
                setattr(self, name, {} if name == "logit_bias" else ())
        _whole("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0, math.inf, fix="use 0 for greedy decoding")
        _number("top_p", self.top_p, 0, 1, fix="use 1 to keep every token", is_low_open=True)
        _whole("top_k", self.top_k, -1, 2**31 - 1, fix="use 0 or -1 to keep every token")
        _number("min_p", self.min_p, 0, 1, fix="use 0 to keep every token")
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 2**31 - 1, fix="leave it out to generate until the context is full")
        _whole("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}; lower it to at most {self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), -1, 2**31 - 1, fix="use -1 for the whole vocabulary")
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1:
            _whole("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, 2**31 - 1, fix="use -1 to keep what leaves room for max_tokens")
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.output_kind not in tuple(RequestOutputKind):
            raise SamplingError(f"output_kind is {self.output_kind!r}; it must be one of {', '.join(map(str, RequestOutputKind))}")
        self._check_stop()
        self._check_stop_token_ids()
        self._check_adjustments()

    def _check_stop(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, Sequence) or not all(isinstance(stop, str) and stop for stop in stops):
            raise SamplingError(f"stop is {self.stop!r}; give a string or a list of strings, none of them empty")
        if stops and self.detokenize is False:
            raise SamplingError(f"stop is {self.stop!r}, which is looked for in the text, and detokenize is False; use stop_token_ids")
        self.stop = tuple(stops)

    def _check_stop_token_ids(self) -> None:
        if isinstance(self.stop_token_ids, str | bytes) or not isinstance(self.stop_token_ids, Sequence):
            raise SamplingError(f"stop_token_ids is {self.stop_token_ids!r}; give a list of token ids")
        for token_id in self.stop_token_ids:
            _whole("stop_token_ids", token_id, 0, 2**31 - 1)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise SamplingError(f"stop_token_ids has {len(self.stop_token_ids)} ids; the most is {MAX_STOP_TOKEN_IDS}")
        self.stop_token_ids = tuple(self.stop_token_ids)

    def _check_adjustments(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -2, 2, fix="use 0 for none")
        _number("repetition_penalty", self.repetition_penalty, 0, math.inf, fix="use 1 for none", is_low_open=True)
        if not isinstance(self.logit_bias, Mapping):
            raise SamplingError(f"logit_bias is {self.logit_bias!r}; give a mapping from token ids to numbers")
        bias = {int(token) if isinstance(token, str) and token.isdecimal() else token: value for token, value in self.logit_bias.items()}
        for token, value in bias.items():
            _whole("logit_bias", token, 0, 2**31 - 1)
            _number(f"logit_bias of token {token}", value, -100, 100)
        self.logit_bias = bias
        if self.allowed_token_ids is not None:
            if isinstance(self.allowed_token_ids, str | bytes) or not isinstance(self.allowed_token_ids, Sequence) or not self.allowed_token_ids:
                raise SamplingError(f"allowed_token_ids is {self.allowed_token_ids!r}; give a list of at least one token id, or None for all")
            for token in self.allowed_token_ids:
                _whole("allowed_token_ids", token, 0, 2**31 - 1)
            self.allowed_token_ids = tuple(self.allowed_token_ids)
        is_list = isinstance(self.bad_words, Sequence) and not isinstance(self.bad_words, str)
        if not is_list or not all(isinstance(word, str) and word.strip() for word in self.bad_words):
            raise SamplingError(f"bad_words is {self.bad_words!r}; give a list of texts, none of them empty")
        self.bad_words = tuple(self.bad_words)

    @classmethod
    def from_optional(cls, **given: Any) -> "SamplingParams":
        """Parameters of which None is not given."""
        return cls(**{name: value for name, value in given.items() if value is not None})

    def clone(self) -> "SamplingParams":
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)

    def check_logprobs(self, most: int) -> None:
        """Raise ``SamplingError`` where more log probabilities are asked for than an engine reports: ``most``, or all where that is -1."""
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and most != -1 and not 0 <= count <= most:
                raise SamplingError(f"{name} is {count}; it must be a whole number from 0 to {most}, or the LLM made with max_logprobs={count}")

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything but temperature and filters changes the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias or self.bad_words
                    or self.allowed_token_ids is not None)

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature == 0


SamplingParams.__init__ = takes(SAMPLING, error=SamplingError)(SamplingParams.__init__)


def _whole(name: str, value: object, low: int, high: int, *, fix: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SamplingError(f"{name} is {value!r}; it must be a whole number from {low} to {high}" + (f"; {fix}" if fix else ""))


def _number(name: str, value: object, low: float, high: float, *, fix: str = "", is_low_open: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_finite = isinstance(value, int) or (is_number and math.isfinite(value))  # isfinite itself fails on whole numbers of over 308 digits
    if not is_number or not is_finite or not low <= value <= high or (is_low_open and value == low):
        upper = "" if high == math.inf else f" and at most {high}"
        raise SamplingError(f"{name} is {value!r}; it must be a finite number {'above' if is_low_open else 'of at least'} {low}{upper}"
                            + (f"; {fix}" if fix else ""))
