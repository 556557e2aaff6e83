"""A judge behind an OpenAI-compatible endpoint: vLLM, SGLang, and the services that speak its chat API."""

import base64
import io
import os
from collections.abc import Sequence
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from editrl.errors import EditrlError

FORMATS = ("jpeg", "png")
_WORTH_ANOTHER_TRY = {408, 409, 425, 429, 500, 502, 503, 504}


class Endpoint:
    """Sends texts and images to `<base_url>/chat/completions`.

    Args:
        model: its name at the endpoint.
        base_url: up to and with "/v1".
        api_key_env: the environment variable that holds the key; None where none is needed.
        timeout: seconds for one request.
        tries: requests until it gives up on a network error, 408, 409, 425, 429 or 5xx; it waits a random time of up
            to `wait`, 2·`wait`, 4·`wait`, ... seconds (60 at most) in between.
        concurrency: requests that are under way at a time.
        image_format: "jpeg" (quality 95) or "png", as data URLs.
        body: further fields of the request, such as {max_tokens: 512}. The temperature is 0 unless it says otherwise.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str | None = "OPENAI_API_KEY",
        timeout: float = 120.0,
        tries: int = 5,
        wait: float = 1.0,
        concurrency: int = 8,
        image_format: str = "jpeg",
        body: dict[str, Any] | None = None,
    ):
        for name, value in {"timeout": timeout, "tries": tries, "concurrency": concurrency}.items():
            if not value > 0:
                raise EditrlError(f"{name} of a judge is {value}: give a positive number.")
        if image_format not in FORMATS:
            raise EditrlError(f"image_format of a judge is {image_format!r}: choose one of {', '.join(FORMATS)}.")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise EditrlError(
                f"the environment variable {api_key_env} is not set: put the key of {base_url} there, or set "
                "api_key_env to the variable that holds it (null where none is needed)."
            )
        self.model, self.url, self.image_format = model, f"{base_url.rstrip('/')}/chat/completions", image_format
        self.concurrency, self.tries, self.wait, self.body = concurrency, tries, wait, dict(body or {})
        key = {"Authorization": f"Bearer {os.environ[api_key_env]}"} if api_key_env is not None else {}
        self.client = httpx.Client(headers=key, timeout=timeout)

    def ask(self, parts: Sequence[str | Tensor]) -> str:
        """The answer to texts and images [3,H,W] in [0,1]. EditrlError when there is none."""
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(part, self.image_format)}}
            for part in parts
        ]
        message = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        try:
            for attempt in Retrying(
                retry=retry_if_exception(_may_pass),
                stop=stop_after_attempt(self.tries),
                wait=wait_random_exponential(self.wait, max=60),
                reraise=True,
            ):
                with attempt:
                    response = self.client.post(self.url, json=message | self.body).raise_for_status()
        except httpx.HTTPStatusError as error:
            text = " ".join(error.response.text.split())[:200]
            raise EditrlError(f"{self.url} answers {error.response.status_code}: {text}") from error
        except httpx.HTTPError as error:
            raise EditrlError(f"{self.url} cannot be reached: {type(error).__name__}: {error}") from error
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EditrlError(f"{self.url} answers no chat completion: {response.text[:200]!r}") from error
        if not isinstance(answer, str):
            raise EditrlError(f"{self.url} answers without text: {response.text[:200]!r}")
        return answer


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _WORTH_ANOTHER_TRY
    return isinstance(error, httpx.TransportError)


def data_url(image: Tensor, image_format: str) -> str:
    """[3,H,W] in [0,1] -> "data:image/...;base64,..."."""
    buffer = io.BytesIO()
    to_pil_image(image.float().clamp(0, 1).cpu()).save(buffer, image_format, quality=95)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
