"""What a call of the facade is given: prompts in every form, and parameters and priorities, one for all or one each."""
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tpllm.engine.prompts import Messages, Prompt, Requests, is_token_ids
from tpllm.engine.sampling_params import SamplingParams
from tpllm.errors import ConfigError, PromptError, short

ONE = (SamplingParams, Mapping, int, type(None))  # what is given once for all prompts
Params = SamplingParams | Iterable[SamplingParams] | None
Request = tuple[Prompt, SamplingParams, int]


def prompts_of(prompts: Prompt | Requests | None, prompt_token_ids: Any = None) -> Iterable[Any]:
    """The prompts of a call, whether it gives one or several.

    Args:
        prompts: one, or any iterable of them: a list, a pandas Series, a numpy array.
        prompt_token_ids: the ids of one, or of several, instead.

    Raises:
        PromptError: none, both, or a table.
    """
    if (prompts is None) == (prompt_token_ids is None):
        raise PromptError(f"prompts is {short(prompts)} and prompt_token_ids {short(prompt_token_ids)}; give one of them")
    if prompts is None:
        prompts = [prompt_token_ids] if is_token_ids(prompt_token_ids) else prompt_token_ids
        return [{"prompt_token_ids": token_ids} for token_ids in prompts]
    if hasattr(prompts, "columns"):
        raise PromptError(f"prompts is a table with the columns {short(list(prompts.columns))}; give one of them, as in table['prompt']")
    if not isinstance(prompts, str | Mapping) and not hasattr(prompts, "__iter__"):
        raise PromptError(f"prompts is {short(prompts)}; give text, token ids, or a list of prompts")
    return [prompts] if isinstance(prompts, str | Mapping) or is_token_ids(prompts) else prompts


def conversations_of(messages: str | Messages | Iterable[str | Messages]) -> list[Messages]:
    """The chats of a call, whether it gives one or several; a text is a message of the user's."""
    messages = messages if isinstance(messages, str) else list(messages)
    is_one = isinstance(messages, str) or not messages or isinstance(messages[0], Mapping)
    return [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in ([messages] if is_one else messages)]


def requests_of(prompts: Iterable[Any], sampling_params: Params, priority: int | Iterable[int], *, default: SamplingParams) -> Iterator[Request]:
    """Each prompt with its parameters and priority, as they are asked for; the shortest of several iterables ends them."""
    for prompt, params, one in zip(prompts, _each(sampling_params), _each(priority), strict=False):
        is_pair = isinstance(prompt, tuple) and len(prompt) == 2 and not is_token_ids(prompt)
        prompt, own = prompt if is_pair else (prompt, None)
        params = params if own is None else own
        yield prompt, default if params is None else params, 0 if one is None else one


def listed(values: Any | Iterable[Any], count: int, name: str) -> list[Any]:
    """Each of several, or one value so often."""
    found = [values] * count if isinstance(values, ONE) else list(values)
    if len(found) != count:
        raise ConfigError(f"{count} prompts but {len(found)} {name}; give one for all, or one each")
    return found


def _each(values: Any | Iterable[Any]) -> Iterator[Any]:
    """One value again and again, or each of several."""
    return itertools.repeat(values) if isinstance(values, ONE) else iter(values)
