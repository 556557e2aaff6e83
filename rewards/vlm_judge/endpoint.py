"""A judge behind an OpenAI-compatible endpoint: vLLM, SGLang, and the services that speak its chat API."""

import base64
import io
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from editrl.errors import EditrlError, OutageError

FORMATS = ("jpeg", "png")
STARTUP = 60
"""Seconds in which an endpoint has to be there for its first answer: a wrong address is told sooner than an outage."""
QUIET = 10
"""Seconds without an answer before it is told: a busy service refuses now and then."""
_WORTH_ANOTHER_TRY = {408, 409, 425, 429, 500, 502, 503, 504}

log = logging.getLogger("editrl.rewards.vlm_judge")


class Endpoint:
    """Sends texts and images to `<base_url>/chat/completions`.

    Args:
        model: its name at the endpoint.
        base_url: up to and with "/v1".
        api_key_env: the environment variable that holds the key; None where none is needed.
        timeout: seconds for one request.
        max_retries: tries after the first one, on a network error, 408, 409, 425, 429 or 5xx; None: until
            `outage_limit`.
        outage_limit: seconds without an answer to any request, after which the run stops.
        wait: between two tries it waits a random time of up to `wait`, 2·`wait`, 4·`wait`, ... seconds (60 at most).
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
        max_retries: int | None = None,
        outage_limit: float = 600.0,
        wait: float = 1.0,
        concurrency: int = 8,
        image_format: str = "jpeg",
        body: dict[str, Any] | None = None,
    ):
        for name, value in {"timeout": timeout, "concurrency": concurrency}.items():
            if not value > 0:
                raise EditrlError(f"{name} of a judge is {value}: give a positive number.")
        for name, value in {"max_retries": max_retries or 0, "outage_limit": outage_limit, "wait": wait}.items():
            if not value >= 0:
                raise EditrlError(f"{name} of a judge is {value}: give a number of at least 0.")
        if not base_url.startswith(("http://", "https://")):
            raise EditrlError(f"base_url of a judge is {base_url!r}: it starts with http:// or https://.")
        if image_format not in FORMATS:
            raise EditrlError(f"image_format of a judge is {image_format!r}: choose one of {', '.join(FORMATS)}.")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise EditrlError(
                f"the environment variable {api_key_env} is not set: put the key of {base_url} there, or set "
                "api_key_env to the variable that holds it (null where none is needed)."
            )
        self.model, self.url, self.image_format = model, f"{base_url.rstrip('/')}/chat/completions", image_format
        self.concurrency, self.wait, self.body = concurrency, wait, dict(body or {})
        self.max_retries, self.outage_limit = max_retries, outage_limit
        key = {"Authorization": f"Bearer {os.environ[api_key_env]}"} if api_key_env is not None else {}
        self.client = httpx.Client(headers=key, timeout=timeout)
        self._answered = 0.0  # when it last answered; 0: never
        self._outage = False  # whether it has been told

    @property
    def key(self) -> tuple[str, ...]:
        """What of it an answer depends on."""
        return (self.url, self.model, self.image_format, json.dumps(self.body, sort_keys=True, default=repr))

    def ask(self, parts: Sequence[str | Tensor], stop: threading.Event | None = None) -> str:
        """The answer to texts and images [3,H,W] in [0,1]. Once `stop` is set, nothing is tried again.

        Raises: EditrlError for an answer that is none; OutageError where there is none for `outage_limit` seconds, or
            after `max_retries`.
        """
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(part, self.image_format)}}
            for part in parts
        ]
        message = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        response = self._post(message | self.body, stop)
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EditrlError(f"{self.url} answers no chat completion: {response.text[:200]!r}") from error
        if not isinstance(answer, str):
            raise EditrlError(f"{self.url} answers without text: {response.text[:200]!r}")
        return answer

    def _post(self, body: dict[str, Any], stop: threading.Event | None) -> httpx.Response:
        began = time.monotonic()

        def silence() -> float:
            """Seconds since any request was answered, or this one began."""
            return time.monotonic() - max(began, self._answered)

        def left(state: RetryCallState) -> float:
            absent = isinstance(state.outcome.exception(), httpx.ConnectError | httpx.ConnectTimeout)
            limit = self.outage_limit if self._answered or not absent else min(STARTUP, self.outage_limit)
            return limit - silence()

        def enough(state: RetryCallState) -> bool:
            tries = self.max_retries is not None and state.attempt_number > self.max_retries
            return tries or (stop is not None and stop.is_set()) or left(state) <= 0

        def tell(state: RetryCallState) -> None:
            if not self._outage and silence() >= QUIET:
                self._outage = True
                log.warning("%s %s; it is asked again and again", self.url, _reason(state.outcome.exception()))

        growing = wait_random_exponential(self.wait, max=60)
        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=enough,
            wait=lambda state: min(growing(state), max(left(state), 0)),
            sleep=time.sleep if stop is None else stop.wait,
            before_sleep=tell,
            reraise=True,
        )
        try:
            response = retrying(lambda: self.client.post(self.url, json=body).raise_for_status())
        except httpx.HTTPError as error:
            if not _may_pass(error):
                raise EditrlError(f"{self.url} {_reason(error)}") from error
            raise OutageError(
                f"{self.url} {_reason(error)} (no answer for {silence():.0f} s); start the endpoint or check base_url"
            ) from error
        self._answered = time.monotonic()
        if self._outage:
            self._outage = False
            log.warning("%s answers again", self.url)
        return response


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _WORTH_ANOTHER_TRY
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.LocalProtocolError)


def _reason(error: BaseException) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"answers {error.response.status_code}: {' '.join(error.response.text.split())[:200]}"
    return f"cannot be reached: {type(error).__name__}: {error}"


def data_url(image: Tensor, image_format: str) -> str:
    """[3,H,W] in [0,1] -> "data:image/...;base64,..."."""
    buffer = io.BytesIO()
    to_pil_image(image.float().clamp(0, 1).cpu()).save(buffer, image_format, quality=95)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
