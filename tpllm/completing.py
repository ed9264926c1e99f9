"""The ways to complete prompts: what :class:`.LLM` does with its engine."""
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tpllm.engine.calls import OnError, complete, complete_all, stream
from tpllm.engine.engine import Engine
from tpllm.engine.outputs import CompletionDelta, RequestOutput, RequestOutputs
from tpllm.engine.prompts import Messages, Prompt, Requests, is_token_ids
from tpllm.engine.request import Request
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import ConfigError
from tpllm.given import Params, conversations_of, listed, prompts_of, requests_of
from tpllm.names import takes
from tpllm.names.vllm import CALLS
from tpllm.progress import progress_bar
from tpllm.tokenizer.chat_template import read_template


class Completing:
    """What completes prompts with an engine, and with default parameters where none are given."""

    engine: Engine
    default_sampling: Mapping[str, Any]

    @takes(CALLS, error=ConfigError)
    def generate(self, prompts: Prompt | Requests | None = None, sampling_params: Params = None, use_tqdm: bool | Callable[..., Any] | None = None, *,
                 prompt_token_ids: Any = None, priority: int | Iterable[int] | None = 0) -> RequestOutputs:
        """Complete prompts.

        Args:
            prompts: one or many: text, token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": [...]}`` or ``{"messages": [...]}``; of many each may
                be a pair of a prompt and its own :class:`SamplingParams`. Many are a list, a pandas Series, a numpy array, or any iterable.
            sampling_params: one for all that bring none, or one each; None takes the model's own defaults (``default_sampling``).
            use_tqdm: a progress bar on standard error; None shows it for more than one prompt on a terminal. A class such as ``tqdm`` makes it.
            prompt_token_ids: instead of ``prompts``: the ids of one, or a list of lists of them.
            priority: one for all, or one each; lower ones come first, and among equals those that came first.

        Returns:
            One output a prompt, in their order.

        Raises:
            PromptError, SamplingError: a prompt or parameter that cannot be used; nothing is generated then.
        """
        engine, prompts = self.engine, list(prompts_of(prompts, prompt_token_ids))
        given = [listed(values, len(prompts), name) for values, name in ((sampling_params, "sampling_params"), (priority, "priorities"))]
        requests = requests_of(prompts, *given, default=self.get_default_sampling_params())
        prepared = [engine.prepare(prompt, params, priority=one) for prompt, params, one in requests]
        with progress_bar(len(prompts), is_shown=use_tqdm) as advance:
            return RequestOutputs(complete_all(engine, prepared, advance))

    __call__ = generate

    def generate_iter(self, prompts: Prompt | Requests, sampling_params: Params = None, *,
                      priority: int | Iterable[int] = 0, on_error: OnError = "raise") -> Iterator[RequestOutput]:
        """Complete prompts, each given back as soon as it ends.

        Prompts are read as slots become free, so their number does not matter for memory. Closing the iterator gives up what is running.

        Args:
            prompts, sampling_params, priority: as for :meth:`generate`; any iterables.
            on_error: ``"raise"``, or ``"return"`` to give back a bad prompt as an output whose ``finish_reason`` is ``"error"``.

        Yields:
            Outputs; ``request_id`` is the prompt's position, as text.
        """
        requests = requests_of(prompts_of(prompts), sampling_params, priority, default=self.get_default_sampling_params())
        yield from complete(self.engine, requests, on_error=on_error)

    def stream(self, prompt: Prompt | Messages, sampling_params: SamplingParams | None = None) -> Iterator[CompletionDelta]:
        """Complete one prompt, or one chat, token by token.

        Args:
            prompt: as for :meth:`generate`, or a list of chat messages.
            sampling_params: None takes the model's own defaults.

        Yields:
            The new text and tokens of one completion at a time.
        """
        prompt = {"messages": prompt} if isinstance(prompt, list) and not is_token_ids(prompt) else prompt
        yield from stream(self.engine, prompt, self._or_default(sampling_params))

    @takes(CALLS, error=ConfigError)
    def chat(self, messages: str | Messages | Iterable[str | Messages], sampling_params: Params = None,
             use_tqdm: bool | Callable[..., Any] | None = None, *, template_kwargs: Mapping[str, Any] | None = None,
             tools: list[dict[str, Any]] | None = None, chat_template: str | None = None, add_generation_prompt: bool | None = None,
             continue_final_message: bool = False) -> RequestOutputs:
        """Answer one conversation or several, through the model's own chat template.

        Args:
            messages: a list of ``{"role": ..., "content": ...}``, or a list of such lists. A text is a conversation of one message.
            sampling_params, use_tqdm: as for :meth:`generate`.
            template_kwargs: more variables for the template, such as ``enable_thinking``.
            tools: JSON schemas of the functions that the model may call; its template must know of them.
            chat_template: Jinja text, or the path of a file, instead of the model's.
            add_generation_prompt: end the prompt with the header of the answer; None does unless ``continue_final_message``.
            continue_final_message: end the prompt with the text of the last message, which the answer then goes on with.
        """
        options = {"template_kwargs": template_kwargs, "tools": tools, "add_generation_prompt": add_generation_prompt,
                   "continue_final_message": continue_final_message, "chat_template": chat_template and read_template(chat_template)}
        prompts = [{"messages": one, **options} for one in conversations_of(messages)]
        return self.generate(prompts, sampling_params, use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """``default_sampling`` as new parameters."""
        return SamplingParams(**self.default_sampling)

    def submit(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> Request:
        """Queue a request with the engine, for those who step it themselves; see :class:`.AsyncLLM` for services."""
        engine = self.engine
        return engine.add_request(request_id, engine.prepare(prompt, self._or_default(params), priority=priority))

    def _or_default(self, params: SamplingParams | None) -> SamplingParams:
        """The model's own where there are none; what is no parameters is left for the check that names it."""
        return self.get_default_sampling_params() if params is None else params
