"""What vLLM's public examples of offline inference do (basic, chat, chat with tools, prefix caching, metrics), written anew: with vLLM in place of
tpllm in the imports these are scripts for vLLM."""
import json

import pytest

from tpllm import LLM, SamplingParams
from tpllm.metrics_reader import Counter, Gauge, Histogram, Vector

TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }}({{ call.function.arguments | tojson }})]{% endfor %}"
    "{{ message.content or '' }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
FAHRENHEIT = {"type": "function", "function": {
    "name": "to_fahrenheit", "description": "A temperature in degrees Fahrenheit",
    "parameters": {"type": "object", "properties": {"celsius": {"type": "number"}}, "required": ["celsius"]}}}


@pytest.fixture(scope="module")
def llm():
    llm = LLM(model="demo", tensor_parallel_size=1, gpu_memory_utilization=0.9, enforce_eager=True, trust_remote_code=False, dtype="auto", seed=0,
              max_model_len=256, max_num_seqs=4, disable_log_stats=False, enable_prefix_caching=True)
    yield llm
    llm.close()


def test_basic(llm):
    prompts = ["def main():", "import os", "class Stack:", "for i in range("]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8)
    outputs = llm.generate(prompts, sampling_params)
    shown = [(output.prompt, output.outputs[0].text) for output in outputs]
    assert [prompt for prompt, _ in shown] == prompts
    assert all(isinstance(text, str) for _, text in shown)
    assert all(0 < len(output.outputs[0].token_ids) <= 8 for output in outputs)


def test_basic_with_the_models_own_parameters(llm):
    sampling_params = llm.get_default_sampling_params()
    sampling_params.max_tokens = 6
    sampling_params.temperature = 0.0
    outputs = llm.generate(["def main():"], sampling_params, use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason in ("length", "stop")
    assert outputs[0].finished


def test_chat(llm):
    sampling_params = llm.get_default_sampling_params()
    sampling_params.max_tokens = 8
    conversation = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "Hello"},
                    {"role": "assistant", "content": "Hello! What shall I write?"}, {"role": "user", "content": "A loop."}]
    one = llm.chat(conversation, sampling_params, use_tqdm=False)
    many = llm.chat([conversation for _ in range(5)], sampling_params, use_tqdm=True)
    assert (len(one), len(many)) == (1, 5)
    assert all(output.prompt == one[0].prompt and output.prompt.endswith("A loop.<|im_end|>\n<|im_start|>assistant\n") for output in many)
    shouting = "{% for message in messages %}{{ message['content'] | upper }}\n{% endfor %}"
    assert llm.chat(conversation, sampling_params, chat_template=shouting)[0].prompt.endswith("A LOOP.\n")


def test_chat_with_tools(llm):
    """The model is asked, its answer (which the demo model cannot give) is taken for a call, and the tool's result goes back to it."""
    messages = [{"role": "user", "content": "How warm is 20 degrees Celsius in Fahrenheit?"}]
    options = {"sampling_params": SamplingParams(max_tokens=8, temperature=0.0), "tools": [FAHRENHEIT], "chat_template": TOOL_TEMPLATE}
    first = llm.chat(messages, **options)[0]
    assert '"name": "to_fahrenheit"' in first.prompt
    call = {"name": "to_fahrenheit", "arguments": {"celsius": 20}}
    messages.append({"role": "assistant", "content": first.outputs[0].text,
                     "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}]})
    tools = {"to_fahrenheit": lambda celsius: str(celsius * 9 / 5 + 32)}
    messages.append({"role": "tool", "content": tools[call["name"]](**call["arguments"]), "tool_call_id": "abcdefghi", "name": call["name"]})
    second = llm.chat(messages, **options)[0]
    assert second.prompt.endswith("<|im_start|>tool\n68.0<|im_end|>\n<|im_start|>assistant\n")
    assert "to_fahrenheit({" in second.prompt
    assert second.outputs[0].token_ids


def test_prefix_caching(llm):
    prefix = "# Every function below takes a list of whole numbers and returns one of them, and each raises ValueError where the list is empty.\n" * 2
    prompts = [prefix + text for text in ("def largest(numbers):", "def smallest(numbers):", "def middle(numbers):")]
    sampling_params = SamplingParams(temperature=0.0, max_tokens=6)
    regular = LLM(model="demo", enable_prefix_caching=False, tensor_parallel_size=1, max_model_len=256, max_num_seqs=4)
    expected = [output.outputs[0].text for output in regular.generate(prompts, sampling_params)]
    del regular
    llm.generate(prompts[0], sampling_params)
    cached = llm.generate(prompts, sampling_params)
    assert [output.outputs[0].text for output in cached] == expected
    assert all(output.num_cached_tokens > 0 for output in cached)
    assert llm.reset_prefix_cache() is None
    assert llm.generate(prompts[0], sampling_params)[0].num_cached_tokens == 0


def test_metrics(llm):
    llm.generate(["def main():", "import os"], SamplingParams(temperature=0.8, top_p=0.95, max_tokens=4))
    lines = []
    for metric in llm.get_metrics():
        if isinstance(metric, Gauge):
            lines.append(f"{metric.name} (gauge) = {metric.value}")
        elif isinstance(metric, Counter):
            lines.append(f"{metric.name} (counter) = {metric.value}")
        elif isinstance(metric, Vector):
            lines.append(f"{metric.name} (vector) = {metric.values}")
        elif isinstance(metric, Histogram):
            lines.append(f"{metric.name} (histogram): sum = {metric.sum}, count = {metric.count}, below "
                         + ", ".join(f"{bound}: {count}" for bound, count in metric.buckets.items()))
    assert len(lines) == len(llm.get_metrics()) >= 10
    assert "vllm:num_requests_running (gauge) = 0.0" in lines
