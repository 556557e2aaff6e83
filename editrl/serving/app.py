"""The HTTP side of a reward service: who may ask, how much at a time, and what an answer says when it is no score."""

import asyncio
import contextlib
import hmac
import logging
import math
from collections.abc import Iterator

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect

from editrl.errors import EditrlError
from editrl.serving.messages import VERSION, unpack
from editrl.serving.service import Meter, RewardService

DECODED = 2
"""Requests whose clips are in memory: one is scored while the next one arrives."""
STALL = 30
"""Seconds without a byte of a body, after which its place goes to another."""
DRAIN = 5
"""Seconds for which the body of a refused request is read and dropped, so that the client gets to read why."""
MESSAGE = 2000
"""Characters of an error that clients get."""

log = logging.getLogger("editrl.serving")


def create_app(
    service: RewardService, *, token: str | None, max_body: int, queue: int, timeout: float = math.inf
) -> FastAPI:
    """The endpoints `POST /score`, `GET /health` and `GET /metrics`.

    Args:
        service: the reward.
        token: what every request has to bring as `Authorization: Bearer ...`; None: nothing.
        max_body: bytes of a request; a longer one is refused (413) while it is read.
        queue: requests that may wait for their turn, with their bodies unread; more are told to come back (503).
        timeout: seconds of scoring after which a request is told that the reward hangs (503), and every other until it
            has come back: another server of the clients may then serve them.
    """
    from editrl import __version__

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    meter = Meter(service.name)
    places, turn = asyncio.Semaphore(DECODED), asyncio.Lock()

    def authorise(request: Request) -> None:
        given = request.headers.get("authorization", "")
        # In constant time, and of bytes: compare_digest refuses text that is not ASCII.
        if token is not None and not hmac.compare_digest(given.encode("latin-1"), f"Bearer {token}".encode()):
            detail = f"this reward server wants a token, and got {'another' if given else 'none'}"
            raise HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        authorise(request)
        ready = service.seconds_busy() < timeout  # the port opens when the weights are loaded
        answer = {
            "ready": ready,
            "name": service.name,
            "identity": service.identity,
            "version": __version__,
            "protocol": VERSION,
            "requires": service.requires,
            "columns": service.columns,
            "max_body_bytes": max_body,
        }
        return JSONResponse(answer, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> PlainTextResponse:
        authorise(request)
        return PlainTextResponse(meter.text(), media_type="text/plain; version=0.0.4")

    @app.post("/score")
    async def score(request: Request) -> dict:
        status = 500
        try:
            authorise(request)
            answer = await admitted(request)
            status = 200
            return answer
        except HTTPException as error:
            status = error.status_code
            await _drain(request)
            raise
        except asyncio.CancelledError as error:  # the server stops, and does not wait any longer for the reward
            status = 503  # uvicorn would say 500, which clients take for the reward's own failure
            raise HTTPException(status, "the server is stopping", {"Retry-After": "1"}) from error
        except ClientDisconnect:
            status = 499  # as nginx calls it; there is nobody to tell
            raise HTTPException(status) from None
        finally:
            meter.requests[status] += 1

    async def admitted(request: Request) -> dict:
        """The answer to a request that is allowed and not too large, when its turn comes."""
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > max_body:
            raise _too_large(max_body)
        if service.seconds_busy() >= timeout:
            raise _hangs(service)
        if meter.waiting >= queue:
            raise HTTPException(503, f"{queue} requests are waiting already", {"Retry-After": "1"})
        with _counted(meter, "waiting"):
            await places.acquire()
        try:
            with _counted(meter, "in_flight"):
                return await answered(request)
        finally:
            places.release()

    async def answered(request: Request) -> dict:
        body = await _read(request, max_body)
        try:
            columns, request_id = await asyncio.to_thread(unpack, body)
        except EditrlError as error:
            raise HTTPException(400, str(error)) from error
        del body
        lacking = [column for column in service.requires if column not in columns]
        if lacking:
            raise HTTPException(400, f"reward '{service.name}' needs the column '{lacking[0]}'")
        async with turn:
            if service.seconds_busy() >= timeout:  # it waited behind the one that hangs
                raise _hangs(service)
            if await request.is_disconnected():
                raise ClientDisconnect
            began = asyncio.get_running_loop().time()
            try:
                scores = await asyncio.wait_for(service.score(columns), None if timeout == math.inf else timeout)
            except TimeoutError as error:
                meter.errors += 1
                raise _hangs(service) from error
            except Exception as error:  # the reward's: the client gets one line, the log the rest
                meter.errors += 1
                log.exception("request %s failed", request_id)
                text = " ".join(str(error).split())
                text = text if isinstance(error, EditrlError) else f"{type(error).__name__}: {text}"
                raise HTTPException(500, text[:MESSAGE]) from error
            finally:
                meter.seconds += asyncio.get_running_loop().time() - began
        meter.samples += len(scores)
        return {"name": service.name, "identity": service.identity, "request_id": request_id, "scores": scores}

    return app


async def _read(request: Request, limit: int) -> bytes:
    """The body; 413 as soon as it is longer than `limit`, 408 when it stops coming."""
    chunks, size = [], 0
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(STALL) as deadline:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
                deadline.reschedule(clock() + STALL)
    except TimeoutError as error:
        raise HTTPException(408, f"no byte of the body came for {STALL} s, after {size} bytes") from error
    return b"".join(chunks)


def _hangs(service: RewardService) -> HTTPException:
    busy = service.seconds_busy()
    log.error("reward '%s' has not come back for %.0f s", service.name, busy)
    return HTTPException(503, f"reward '{service.name}' has not come back for {busy:.0f} s", {"Retry-After": "1"})


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit} bytes; send fewer samples a request")


async def _drain(request: Request) -> None:
    """A connection that is closed on unread data is reset, and the answer may be lost with it."""
    with contextlib.suppress(ClientDisconnect, TimeoutError, RuntimeError):  # RuntimeError: it was read already
        async with asyncio.timeout(DRAIN):
            async for _ in request.stream():
                pass


@contextlib.contextmanager
def _counted(meter: Meter, gauge: str) -> Iterator[None]:
    setattr(meter, gauge, getattr(meter, gauge) + 1)
    try:
        yield
    finally:
        setattr(meter, gauge, getattr(meter, gauge) - 1)
