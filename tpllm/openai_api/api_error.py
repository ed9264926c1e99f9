"""The error that a request's body can cause, and the object that OpenAI's API gives back for it."""
import json
from typing import Any

MAX_SHOWN = 60


class ApiError(ValueError):
    """A request that cannot be run.

    Args:
        message: the value, the limit and the fix.
        param: the key of the body that is to blame, or None.
        code: OpenAI's word for the kind of mistake, such as ``"unknown_parameter"``, or None.
        status: of HTTP: 400 for the caller's mistakes, 500 for ours.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def body(self) -> dict[str, Any]:
        """The response's body: ``{"error": {"message", "type", "param", "code"}}``."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def shortened(value: object) -> str:
    """A JSON value for a message."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN - 3] + "..."
