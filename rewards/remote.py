"""A reward that another process computes: the client of `editrl serve-reward`.

What a server answers is a score or it is an error: nothing here ever stands in for a number.
"""

import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

import httpx
import tenacity
from torch import Tensor

from editrl.errors import EditrlError, OutageError
from editrl.registry import register_reward
from editrl.serving.messages import VERSION, check_token, pack

CONNECT = 10
"""Seconds to reach a server; `timeout` is for its answer."""
STARTUP = 60
"""Seconds in which a server has to be there when a run starts: a wrong address is told sooner than an outage."""
UNAVAILABLE = (429, 502, 503, 504)  # busy, or a proxy whose server is away

log = logging.getLogger("editrl.rewards.remote")


class Unavailable(Exception):
    """No endpoint answered; `wait` is the seconds after which a server asked to be tried again."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@register_reward("remote")
class Remote:
    """Scores of a reward that `editrl serve-reward` serves, on another GPU or machine.

    Args:
        url, urls: the server, or several of one reward: the next one is asked where one does not answer.
        name: what errors and logs call it; default "remote".
        timeout: seconds to wait for the answer to one request.
        token_env: environment variable that holds the server's token (better than `token`, which ends up in recipes).
        max_retries: tries after the first one, each at every endpoint; None: until `outage_limit`.
        outage_limit: seconds without an answer from any endpoint, after which the run stops.
        max_in_flight: requests at a time.
        samples_per_request: clips a request.

    Connection errors, time-outs, 429, 502, 503 and 504 are tried again, with growing random pauses. Every other answer
    that is no list of finite scores is an EditrlError that says what the server said.
    """

    background = True  # a `RewardOptions`

    def __init__(
        self,
        url: str | None = None,
        *,
        urls: Sequence[str] | None = None,
        name: str = "remote",
        timeout: float = 300.0,
        token_env: str | None = None,
        token: str | None = None,
        max_retries: int | None = None,
        outage_limit: float = 600.0,
        max_in_flight: int = 4,
        samples_per_request: int = 4,
    ):
        if (url is None) == (urls is None) or not (url or urls) or isinstance(urls, str):
            raise EditrlError("remote reward: give url, the address of a server, or urls, a list of them")
        self.urls = [address.rstrip("/") for address in ([url] if urls is None else urls)]
        for address in self.urls:
            if not address.startswith(("http://", "https://")):
                raise EditrlError(f"remote reward: '{address}' is no address; it starts with http:// or https://")
        positive = {"timeout": timeout, "max_in_flight": max_in_flight, "samples_per_request": samples_per_request}
        for key, value in positive.items():
            if not value > 0:
                raise EditrlError(f"remote reward: {key} is {value}; it must be above 0")
        for key, value in {"outage_limit": outage_limit, "max_retries": max_retries or 0}.items():
            if not value >= 0:
                raise EditrlError(f"remote reward: {key} is {value}; it must be at least 0")
        self.name = name
        self.outage_limit, self.max_retries = outage_limit, max_retries
        self.max_in_flight, self.samples_per_request = max_in_flight, samples_per_request
        token = _token(token, token_env)
        self._client = httpx.Client(
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout, connect=min(CONNECT, timeout), pool=None),
            limits=httpx.Limits(max_connections=max_in_flight),
        )
        self._server: dict[str, Any] | None = None  # what /health said
        self._endpoint = 0  # the one that answered last
        self._answered = 0.0  # when
        self._outage = False  # whether it has been told
        self._stop = threading.Event()  # of the last call

    @property
    def requires(self) -> set[str]:
        """The columns that the served reward needs in every row. Asks the server, the first time."""
        return set(self._health()["requires"])

    @property
    def columns(self) -> set[str]:
        """Those that the served reward may look at."""
        return set(self._health()["columns"])

    def to(self, device) -> "Remote":
        """Look whether the server is there. Nothing of it runs on `device`."""
        self._health()
        return self

    def __call__(self, videos: Sequence[Tensor], **columns: list) -> list[float | None]:
        """N clips [F,3,H,W] float32 in [0,1] and what the served reward asks for -> N floats or None.

        Raises: EditrlError for an answer that is no score; OutageError where there is none for `outage_limit` seconds.
        """
        wanted = {"ids", *self.columns}  # ids, so that the server's errors can name a sample
        sent = {"videos": videos} | {name: values for name, values in columns.items() if name in wanted}
        size = self.samples_per_request
        parts = [
            {name: values[start : start + size] for name, values in sent.items()}
            for start in range(0, len(videos), size)
        ]
        self._answered = time.monotonic()
        stop = self._stop = threading.Event()  # a part that failed ends the waiting of the others
        pool = ThreadPoolExecutor(self.max_in_flight)
        try:
            answers = [pool.submit(self._score, part, stop) for part in parts]
            return [score for answer in answers for score in answer.result()]
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def cancel(self) -> None:
        """A call that another thread waits for asks no more: requests that are on their way are its last."""
        self._stop.set()

    def _score(self, columns: dict[str, list], stop: threading.Event) -> list[float | None]:
        """The scores of one request."""
        count, request_id = len(columns["videos"]), uuid.uuid4().hex
        body = pack(columns, request_id)
        limit = self._health()["max_body_bytes"]
        if len(body) > limit:
            raise EditrlError(
                f"a request of {count} samples has {len(body)} bytes, {self.urls[self._endpoint]} takes {limit}; lower "
                "samples_per_request, or raise --max_body_mb of the server"
            )
        headers = {"Content-Type": "application/octet-stream"}
        answer, url = self._ask("POST", "/score", limit=self.outage_limit, stop=stop, content=body, headers=headers)
        asked = {key: self._health()[key] for key in ("name", "identity")} | {"request_id": request_id}
        if any(answer.get(key) != value for key, value in asked.items()):
            raise EditrlError(
                f"{url} answered another request, or serves another reward: asked '{asked['name']}' with identity "
                f"{asked['identity']}, got '{answer.get('name')}' with {answer.get('identity')}; serve the same reward "
                "with the same arguments everywhere, and start the run again if a change is meant"
            )
        return _scores(answer.get("scores"), count, url)

    def _health(self) -> dict[str, Any]:
        if self._server is None:
            self._answered = time.monotonic()
            answer, url = self._ask("GET", "/health", limit=min(STARTUP, self.outage_limit))
            kinds = {"name": str, "identity": str, "requires": list, "columns": list, "max_body_bytes": int}
            if not all(isinstance(answer.get(key), kind) for key, kind in kinds.items()):
                raise EditrlError(f"{url}/health is not that of `editrl serve-reward`: {_short(json.dumps(answer))}")
            if answer.get("protocol") != VERSION:
                raise EditrlError(
                    f"{url} speaks version {answer.get('protocol')!r} (editrl {answer.get('version')}), this client "
                    f"version {VERSION}; install the same editrl on both sides"
                )
            self._server = answer
        return self._server

    def _ask(
        self, method: str, path: str, *, limit: float, stop: threading.Event | None = None, **request
    ) -> tuple[dict, str]:
        """The answer of the first endpoint that gives one, and its address; again and again for `limit` seconds."""

        def enough(state: tenacity.RetryCallState) -> bool:
            tries = self.max_retries is not None and state.attempt_number > self.max_retries
            return tries or (stop is not None and stop.is_set()) or self._silence() >= limit

        def pause(state: tenacity.RetryCallState) -> float:
            growing = tenacity.wait_random_exponential(multiplier=0.5, max=10)(state)
            left = max(limit - self._silence(), 0)
            return min(max(growing, state.outcome.exception().wait), left)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            stop=enough,
            wait=pause,
            sleep=time.sleep if stop is None else stop.wait,
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return retrying(self._round, method, path, request)
        except Unavailable as error:
            raise OutageError(
                f"remote reward '{self.name}': no answer for {self._silence():.0f} s from {', '.join(self.urls)} "
                f"({error}); start the server (`editrl serve-reward`) or check url"
            ) from error

    def _round(self, method: str, path: str, request: dict) -> tuple[dict, str]:
        """One try at each endpoint, the one that answered last first."""
        first, failures = self._endpoint, []
        for k in range(len(self.urls)):
            endpoint = (first + k) % len(self.urls)
            try:
                answer = self._answer(self.urls[endpoint], method, path, request)
            except Unavailable as failure:
                failures.append(failure)
                continue
            self._endpoint, self._answered = endpoint, time.monotonic()
            if self._outage:
                self._outage = False
                log.warning("remote reward '%s': %s answers again", self.name, self.urls[endpoint])
            return answer, self.urls[endpoint]
        raise Unavailable("; ".join(map(str, failures)), max(failure.wait for failure in failures))

    def _answer(self, url: str, method: str, path: str, request: dict) -> dict:
        """The JSON object that one endpoint answers with."""
        try:
            response = self._client.request(method, url + path, **request)
        except httpx.TransportError as error:
            raise Unavailable(f"{url}: {type(error).__name__} {error}".rstrip()) from error
        except httpx.HTTPError as error:
            raise EditrlError(f"remote reward '{self.name}': {url}: {type(error).__name__}: {error}") from error
        if response.status_code in UNAVAILABLE:
            wait = response.headers.get("retry-after", "")
            raise Unavailable(f"{url}: {response.status_code}", float(wait) if wait.isdigit() else 0.0)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.status_code != 200:
            said = answer["detail"] if isinstance(answer, dict) and "detail" in answer else response.text
            raise EditrlError(f"{url} answered {response.status_code} to {path}: {_short(said) or 'nothing'}")
        if not isinstance(answer, dict):
            raise EditrlError(f"{url}{path} answered no JSON object but {_short(response.text)!r}")
        return answer

    def _silence(self) -> float:
        """Seconds since any request of this reward was answered."""
        return time.monotonic() - self._answered

    def _tell(self, state: tenacity.RetryCallState) -> None:
        if not self._outage:
            self._outage = True
            log.warning(
                "remote reward '%s' does not answer (%s); it is asked again and again",
                self.name,
                state.outcome.exception(),
            )


def _scores(values: Any, count: int, url: str) -> list[float | None]:
    """`count` finite numbers or None, or an EditrlError."""
    if not isinstance(values, list) or len(values) != count:
        what = f"{len(values)} scores" if isinstance(values, list) else f"scores of type {type(values).__name__}"
        raise EditrlError(f"{url} answered with {what} for {count} samples")
    return list(_checked(values, url))


def _checked(values: list, url: str) -> Iterator[float | None]:
    for i, value in enumerate(values):
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not is_number:
            raise EditrlError(f"{url} answered {value!r} for sample {i} of {len(values)}; a score is a finite number")
        yield value


def _token(token: str | None, variable: str | None) -> str | None:
    if token is not None and variable is not None:
        raise EditrlError("remote reward: token and token_env both say what the token is; give one")
    if variable is not None:
        return check_token(os.environ.get(variable, ""), f"remote reward: token_env: the variable {variable}")
    return None if token is None else check_token(token, "remote reward: token")


def _short(text: Any) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= 500 else f"{text[:500]}..."
