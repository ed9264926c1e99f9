"""OpenAI's completions and chat completions as JSON objects: a request's body -> prompts and sampling, outputs -> a response's body.

It knows nothing of jobs or servers: whoever carries the bodies gives ids and times, and runs the prompts.
"""
from tpllm.openai_api.api_error import ApiError
from tpllm.openai_api.logprobs import finite, logprobs_by_id
from tpllm.openai_api.requests import ENDPOINTS, ApiRequest, read_request
from tpllm.openai_api.responses import ResponseHead, response_body

__all__ = ["ENDPOINTS", "ApiError", "ApiRequest", "ResponseHead", "finite", "logprobs_by_id", "read_request", "response_body"]
