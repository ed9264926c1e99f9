"""Objects of OpenAI's API, read with the openai package's own types and nothing let through."""
import pydantic
from openai.types import Completion
from openai.types.chat import ChatCompletion


def parsed(body: dict) -> Completion | ChatCompletion:
    """The body as the type its ``object`` names: strict types, and no key that the package does not know."""
    kind = {"text_completion": Completion, "chat.completion": ChatCompletion}[body["object"]]
    value = kind.model_validate(body, strict=True)
    assert unknown_keys(value) == []
    assert value.model_dump(exclude_unset=True) == body
    return value


def unknown_keys(value: object, where: str = "") -> list[str]:
    """Keys that the package keeps but has no field for, in the value and all below it."""
    if isinstance(value, list):
        return [key for index, item in enumerate(value) for key in unknown_keys(item, f"{where}[{index}]")]
    if not isinstance(value, pydantic.BaseModel):
        return []
    below = [key for name in type(value).model_fields for key in unknown_keys(getattr(value, name), f"{where}.{name}")]
    return [f"{where}.{key}" for key in value.model_extra or ()] + below
