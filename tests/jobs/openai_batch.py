"""A batch file as a user of the openai package writes one."""
import json

from openai.types.chat import ChatCompletionUserMessageParam
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "Write a loop."}]


def batch_row(custom_id: str, url: str, body: dict) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def batch_rows() -> list[dict]:
    """One row of each kind of body."""
    completions: list[CompletionCreateParamsNonStreaming] = [
        {"model": "gpt-3.5-turbo-instruct", "prompt": "def f(", "max_tokens": 4},
        {"model": "m", "prompt": ["import os\n", "class A:", "import os\n"], "n": 2, "max_tokens": 3, "temperature": 1.0},
        {"model": "m", "prompt": [1, 2, 3], "max_tokens": 2, "logprobs": 2, "seed": 5, "stop": ["\n\n"], "user": "somebody"},
        {"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 2, "top_p": 0.9, "presence_penalty": 0.5, "logit_bias": {"9": -100}},
    ]
    chats: list[chat_params.CompletionCreateParamsNonStreaming] = [
        {"model": "gpt-4o-mini", "messages": USER, "max_completion_tokens": 4},
        {"model": "m", "messages": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *USER], "max_tokens": 3, "n": 2,
         "logprobs": True, "top_logprobs": 2, "temperature": 0.7, "frequency_penalty": 0.5, "response_format": {"type": "text"},
         "metadata": {"run": "1"}, "store": False},
    ]
    return [batch_row(f"text-{index}", COMPLETIONS, body) for index, body in enumerate(completions)] + [
        batch_row(f"chat-{index}", CHAT, body) for index, body in enumerate(chats)]


def to_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
