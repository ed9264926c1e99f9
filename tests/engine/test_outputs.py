"""How outputs print."""
from tpllm.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, failed_output


def test_a_completion_prints_its_text_and_why_it_ended_and_leaves_out_defaults():
    assert repr(CompletionOutput(index=0, text="a\nb", token_ids=[5, 6], finish_reason="stop", stop_reason="x")) == (
        "CompletionOutput(index=0, text='a\\nb', token_ids=[5, 6], finish_reason='stop', stop_reason='x')")


def test_of_many_tokens_the_first_and_their_number_are_printed():
    top = [{7: Logprob(-0.5, 1, "y")}] * 900
    shown = repr(CompletionOutput(index=1, text="t", token_ids=list(range(10, 910)), logprobs=top))
    assert shown == "CompletionOutput(index=1, text='t', token_ids=[10, 11, 12, 13, 14, 15, ... 900 in all], logprobs=[... 900 in all])"


def test_a_request_prints_every_completion():
    output = RequestOutput("3", "prompt", list(range(50)), [CompletionOutput(index=i, text=f"text {i}") for i in range(9)], RequestMetrics(1.5))
    shown = repr(output)
    assert all(f"text='text {i}'" in shown for i in range(9))
    assert "50 in all" in shown
    assert "metrics" not in shown


def test_a_request_that_could_not_begin_prints_its_error():
    assert "error='too long'" in repr(failed_output("0", None, "too long"))
