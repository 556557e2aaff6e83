"""The reward `remote`: the numbers of the local reward, or an error; never another number."""

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import torch

from editrl.errors import EditrlError, OutageError
from editrl.registry import load_reward
from editrl.reward import RewardSet
from editrl.rewards.remote import Remote
from editrl.serving.messages import VERSION


def scores(reward, videos, **columns) -> torch.Tensor:
    return RewardSet([reward])(videos, columns)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    return f"http://127.0.0.1:{free_port()}"


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- the same numbers --------------------------------------------------------------------------------------------------


def test_a_remote_reward_gives_the_numbers_of_the_local_one(server, reward_file, clips):
    videos = clips(9)
    columns = {
        "source_videos": [(video * 255).round() / 255 for video in videos],
        "masks": [None if i % 3 else (video[:, :1] > 0.5).float() for i, video in enumerate(videos)],
        "orders": ["none", *[None] * 8],
        "ids": [str(i) for i in range(9)],
        "secrets": [object()] * 9,  # of no use to this reward, and not sent
    }
    local = scores(load_reward(f"{reward_file}:steered"), videos, **columns)
    remote = scores(Remote(server.url, samples_per_request=2, max_in_flight=3), videos, **columns)
    assert torch.equal(local.nan_to_num(-1), remote.nan_to_num(-1))
    assert local[1:].isfinite().all() and local[0].isnan() and len(set(local[1:, 0].tolist())) == 8


def test_it_is_a_name_like_any_other(server, clips):
    rewards = RewardSet(["remote"], kwargs={"remote": {"url": server.url}})
    assert rewards.requires == set() and rewards(clips(2), {}).isfinite().all()


def test_two_servers_in_one_recipe_have_names(server, nobody, clips):
    given = {"quality": {"url": server.url}, "alignment": {"url": server.url, "name": "its own"}}
    rewards = RewardSet(["quality=remote", "alignment=remote"], kwargs=given)
    assert rewards.names == ["quality", "alignment"] == rewards.background
    scores = rewards(clips(2), {})
    assert scores.isfinite().all() and torch.equal(scores[:, 0], scores[:, 1])
    given = {"quality": {"url": nobody, "name": "its own", "outage_limit": 0.1}}
    with pytest.raises(OutageError, match="remote reward 'quality': no answer"):
        RewardSet(["quality=remote"], kwargs=given)


def test_its_needs_are_those_of_the_served_reward_and_nothing_else_is_sent(serve, reward_file, clips):
    captioned = serve(f"{reward_file}:Captioned", "--kwargs", "factor=3")
    remote = Remote(captioned.url)
    rewards = RewardSet([remote])
    assert rewards.requires == {"target_captions"}
    given = {"target_captions": ["ab", "abc"], "source_videos": clips(2)}
    assert rewards(clips(2), given)[:, 0].tolist() == [6, 9]
    with pytest.raises(EditrlError, match="needs 'target_captions'"):
        rewards(clips(2), {})
    answer = httpx.post(f"{captioned.url}/score", content=packed(clips(1)))
    assert answer.status_code == 400 and "needs the column 'target_captions'" in answer.text


def packed(videos) -> bytes:
    from editrl.serving.messages import pack

    return pack({"videos": videos}, "")


# -- what the server refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("token", "got"), [(None, "none"), ("sesame 7", "another")])
def test_a_wrong_token_is_told_at_once(guarded, token, got):
    with pytest.raises(EditrlError, match=f"answered 401 to /health: this reward server wants a token, and got {got}"):
        Remote(guarded.url, token=token).to("cpu")


def test_the_token_comes_from_the_environment(serve, reward_file, clips, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("open-sesame\n")
    guarded = serve(f"{reward_file}:steered", "--token-file", tmp_path / "token")
    monkeypatch.setenv("REWARD_TOKEN", "open-sesame")
    assert len(Remote(guarded.url, token_env="REWARD_TOKEN")(clips(1))) == 1
    with pytest.raises(EditrlError, match="the variable NOWHERE is empty or not set"):
        Remote(guarded.url, token_env="NOWHERE")


def test_a_request_that_is_too_large_is_not_even_sent(serve, reward_file, clips):
    small = serve(f"{reward_file}:steered", "--max-body-mb", 0.01)
    with pytest.raises(EditrlError, match=r"takes 10000; lower samples_per_request"):
        Remote(small.url)(clips(4, size=32))


def test_a_reward_that_raises_is_not_asked_again(server, clips):
    began = time.monotonic()
    with pytest.raises(
        EditrlError, match=r"answered 500 to /score: reward 'steered' failed .*KeyError: 'no such face'"
    ):
        scores(Remote(server.url), clips(3), orders=[None, "raise", None], ids=["a", "b", "c"])
    assert time.monotonic() - began < 30  # not `outage_limit`


# -- a server that is not there ----------------------------------------------------------------------------------------


def test_a_reward_that_hangs_runs_into_the_time_out(server, clips):
    remote = Remote(server.url, timeout=0.4, outage_limit=1.2)
    began = time.monotonic()
    with pytest.raises(OutageError, match=rf"no answer for \d+ s from {server.url} \(.*ReadTimeout.*\); start"):
        remote(clips(1), orders=[2.0])
    assert 1 < time.monotonic() - began < 30


def test_a_server_that_is_not_there_is_told_with_all_addresses(nobody, clips):
    remote = Remote(urls=[nobody, "http://127.0.0.1:9"], outage_limit=0.5)
    with pytest.raises(OutageError, match=rf"no answer for .* s from {nobody}, http://127.0.0.1:9 \(.*ConnectError"):
        RewardSet([remote])


def test_the_number_of_tries_can_be_limited(clips):
    with stub(lambda path, body: (503, {}, b"busy")) as (url, asked), pytest.raises(OutageError, match="503"):
        Remote(url, max_retries=2).to("cpu")
    assert asked == ["/health"] * 3


def test_the_next_endpoint_answers_for_one_that_is_away(server, nobody, clips, caplog):
    remote = Remote(urls=[nobody, server.url], max_retries=0)
    assert remote(clips(3)) == Remote(server.url)(clips(3))
    assert remote.urls[remote._endpoint] == server.url  # and stays the first to be asked


@pytest.mark.slow
def test_an_endpoint_of_another_reward_does_not_stand_in(serve, reward_file, clips):
    """Two servers of one class with other arguments: scores of both in one run would be no scores."""
    one, other = (serve(f"{reward_file}:Captioned", "--kwargs", f"factor={factor}") for factor in (1, 100))
    reward = Remote(urls=[one.url, other.url])
    assert reward(clips(1), target_captions=["four"]) == [4.0]
    one.process.kill()
    with pytest.raises(EditrlError, match="serves another reward: asked 'Captioned'"):
        reward(clips(1), target_captions=["four"])


def test_a_served_reward_that_returns_too_few_scores_is_an_error(server, clips):
    with pytest.raises(EditrlError, match="'steered' returned 1 values for 2 videos"):
        Remote(server.url)(clips(2), orders=["short", None])


def test_a_server_whose_reward_hangs_is_passed_over(serve, server, reward_file, clips):
    hung = serve(f"{reward_file}:steered", "--columns", "orders", "--timeout", 0.3)
    videos = clips(1)
    expected = Remote(server.url)(videos)
    reward = Remote(urls=[hung.url, server.url])
    reward.to("cpu")
    with ThreadPoolExecutor() as pool:
        pool.submit(Remote(hung.url, max_retries=0), videos, orders=[60.0])
        wait_until(lambda: httpx.get(f"{hung.url}/health").status_code == 503)
        assert reward(videos) == expected


def test_a_server_that_dies_in_the_middle_costs_time_and_no_score(serve, reward_file, clips, caplog):
    caplog.set_level(logging.WARNING)
    videos = clips(60)
    orders = [0.03] * len(videos)
    spec, words = f"{reward_file}:steered", ("--columns", "orders")
    first = serve(spec, *words)
    whole = Remote(first.url)(videos, orders=orders)
    remote, result = Remote(first.url, samples_per_request=1, outage_limit=60), []
    run = threading.Thread(target=lambda: result.append(remote(videos, orders=orders)))
    run.start()
    time.sleep(0.6)
    first.process.kill()
    first.process.wait()
    assert run.is_alive() and not result
    serve(spec, *words, "--port", first.port)
    run.join(60)
    assert result == [whole]
    assert "does not answer" in caplog.text and "answers again" in caplog.text


def test_a_thousand_requests_of_sixteen_clients(server, reward_file, clips):
    videos = clips(1000, size=8)
    local = scores(load_reward(f"{reward_file}:steered"), videos)
    before = server.peak_memory()

    def client(number: int) -> torch.Tensor:
        return scores(Remote(server.url, samples_per_request=1, max_in_flight=2), videos[number::16])

    with ThreadPoolExecutor(16) as clients:
        for number, found in enumerate(clients.map(client, range(16))):
            assert torch.equal(found, local[number::16])
    assert server.peak_memory() - before < 100


def test_a_call_that_is_not_wanted_any_more_ends(clips):
    """What another thread waits for may be a server that stays away for `outage_limit`."""
    with stub(lambda path, body: (503, {}, b"") if path == "/score" else sane(path, body, {})) as (url, asked):
        remote = Remote(url, outage_limit=30)
        with ThreadPoolExecutor(1) as thread:
            call = thread.submit(remote, clips(8))
            while asked.count("/score") < 4:
                time.sleep(0.01)
            assert not call.done()
            remote.cancel()
            assert isinstance(call.exception(timeout=5), OutageError)


# -- a server that answers nonsense ------------------------------------------------------------------------------------


class stub:
    """A server that answers what a function says: (path, body) -> status, headers, body."""

    def __init__(self, answer):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                asked.append(self.path)
                status, headers, content = answer(self.path, body)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server, self.asked = ThreadingHTTPServer(("127.0.0.1", 0), Handler), asked

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}", self.asked

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


HEALTH = {"name": "r", "identity": "i", "version": "0", "protocol": VERSION, "requires": [], "columns": ["videos"]}
HEALTH["max_body_bytes"] = 10**6


def sane(path: str, body: bytes, content: dict) -> tuple[int, dict, bytes]:
    """What a reward server says, whose answers to /score are `content`."""
    if path == "/health":
        return 200, {}, json.dumps(HEALTH).encode()
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    request_id = json.loads(header["__metadata__"]["editrl"])["request_id"]
    return 200, {}, json.dumps({"name": "r", "identity": "i", "request_id": request_id} | content).encode()


def answering(content: bytes | dict, status: int = 200) -> stub:
    """A sane /health, and this to /score."""
    is_raw = isinstance(content, bytes)
    return stub(lambda path, body: (status, {}, content) if is_raw and path == "/score" else sane(path, body, content))


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"<html>welcome</html>", "answered no JSON object but '<html>welcome</html>'"),
        (b"[0.5, 0.5]", "answered no JSON object"),
        (b"", "answered no JSON object"),
        ({"scores": [0.5]}, "answered with 1 scores for 2 samples"),
        ({"scores": [0.5, 0.5, 0.5]}, "answered with 3 scores for 2 samples"),
        ({"scores": None}, "scores of type NoneType"),
        ({"scores": [0.5, "0.5"]}, "answered '0.5' for sample 1 of 2"),
        ({"scores": [True, 0.5]}, "answered True for sample 0 of 2"),
        ({"scores": [0.5, float("nan")]}, "answered nan for sample 1"),
        ({"scores": [0.5, float("inf")]}, "answered inf for sample 1"),
        ({"scores": [0.5, [0.5]]}, r"answered \[0.5\] for sample 1"),
        (
            {"scores": [0.5, 0.5], "name": "other"},
            "serves another reward: asked 'r' with identity i, got 'other' with i",
        ),
        ({"scores": [0.5, 0.5], "identity": "j"}, "serves another reward: asked 'r' with identity i, got 'r' with j"),
        ({"scores": [0.5, 0.5], "request_id": "other"}, "answered another request"),
    ],
)
def test_a_wrong_answer_is_an_error_and_never_a_number(content, phrase, clips):
    with answering(content) as (url, asked), pytest.raises(EditrlError, match=phrase):
        scores(Remote(url), clips(2))
    assert asked.count("/score") == 1


@pytest.mark.parametrize("status", [400, 403, 404, 413, 500])
def test_what_a_server_refuses_is_not_tried_again(status, clips):
    said, told = b'{"detail": "because of   this"}', f"answered {status} to /score: because of this"
    with answering(said, status) as (url, asked), pytest.raises(EditrlError, match=told):
        Remote(url)(clips(1))
    assert asked.count("/score") == 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(status, clips):
    busy = [True, True]

    def answer(path, body):
        is_busy = path == "/score" and busy and busy.pop()
        return (status, {"Retry-After": "0"}, b"") if is_busy else sane(path, body, {"scores": [0.25]})

    with stub(answer) as (url, asked):
        assert Remote(url)(clips(1)) == [0.25]
    assert asked.count("/score") == 3


@pytest.mark.parametrize(
    ("health", "phrase"),
    [
        ({}, "is not that of `editrl serve-reward`"),
        (HEALTH | {"protocol": 7}, "speaks version 7"),
    ],
)
def test_another_service_is_told_apart(health, phrase):
    with stub(lambda *_: (200, {}, json.dumps(health).encode())) as (url, _), pytest.raises(EditrlError, match=phrase):
        Remote(url).to("cpu")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({}, "give url, the address of a server, or urls"),
        ({"url": "http://a", "urls": ["http://b"]}, "give url, the address of a server, or urls"),
        ({"urls": []}, "give url, the address of a server, or urls"),
        ({"url": "localhost:8000"}, "'localhost:8000' is no address"),
        ({"url": "http://a", "timeout": 0}, "timeout is 0"),
        ({"url": "http://a", "samples_per_request": 0}, "samples_per_request is 0"),
        ({"url": "http://a", "outage_limit": -1}, "outage_limit is -1"),
        ({"url": "http://a", "token": "t", "token_env": "T"}, "give one"),
    ],
)
def test_wrong_options_are_told_before_anything_is_asked(options, phrase):
    with pytest.raises(EditrlError, match=phrase):
        Remote(**options)
