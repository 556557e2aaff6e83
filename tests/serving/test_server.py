"""`editrl serve-reward`, asked over HTTP: who gets in, how much, and what it says when something is wrong."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from editrl.cli import main
from editrl.serving.messages import pack

TOKEN = {"Authorization": "Bearer sesame seven"}


def request(count: int = 1, **columns) -> bytes:
    return pack({"videos": [torch.rand(1, 3, 4, 4)] * count, **columns}, "r1")


def metric(server, name: str) -> float:
    """A number of /metrics; `name` may have labels."""
    lines = httpx.get(f"{server.url}/metrics", headers=TOKEN).text.splitlines()
    return float(next((line.split()[-1] for line in lines if line.startswith(f"editrl_reward_{name}")), 0))


def wait_until(server, name: str, value: float) -> None:
    deadline = time.monotonic() + 30
    while metric(server, name) != value:
        assert time.monotonic() < deadline, f"{name} did not become {value}"
        time.sleep(0.02)


# -- what it says of itself --------------------------------------------------------------------------------------------


def test_health_says_what_to_send(server):
    health = httpx.get(f"{server.url}/health").json()
    assert health["name"] == "steered" and health["ready"] is True and health["requires"] == []
    assert health["columns"] == ["masks", "orders", "source_videos", "videos"]
    assert health["max_body_bytes"] == 512_000_000


def test_metrics_count_what_was_asked(server):
    ok, bad = 'requests_total{reward="steered",status="200"}', 'requests_total{reward="steered",status="400"}'
    before = [metric(server, name) for name in (ok, bad, "samples_total", "errors_total", "seconds_total")]
    assert httpx.post(f"{server.url}/score", content=request(3)).status_code == 200
    assert httpx.post(f"{server.url}/score", content=b"?").status_code == 400
    assert httpx.post(f"{server.url}/score", content=request(orders=["raise"])).status_code == 500
    after = [metric(server, name) for name in (ok, bad, "samples_total", "errors_total", "seconds_total")]
    assert [b - a for a, b in zip(before, after, strict=True)][:4] == [1, 1, 3, 1]
    assert after[4] > before[4]
    assert metric(server, "in_flight") == metric(server, "waiting") == 0


# -- who gets in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/metrics", "/score"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", "sesame seven", "Bearer sesame seve", "Bearer sésame seven"])
def test_without_the_token_nobody_gets_in(guarded, path, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    answer = httpx.request("POST" if path == "/score" else "GET", guarded.url + path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["detail"].endswith("got none" if header is None else "got another")


def test_with_the_token_everybody_does(guarded):
    assert httpx.get(f"{guarded.url}/health", headers=TOKEN).status_code == 200
    assert httpx.post(f"{guarded.url}/score", headers=TOKEN, content=request()).status_code == 200


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: give a token"),
        (["--host", "::"], "--host :: lets other machines in"),
        (["--token-env", "NOWHERE"], "the variable NOWHERE is empty or not set"),
        (["--token-file", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--token-env", "FOREIGN"], "holds what no HTTP header can"),
        (["--token-env", "A", "--token-file", "b"], "give one"),
        (["--kwargs", "model"], "'model' is no mapping"),
        (["--kwargs", "a=1", "b"], "'b' is no key=value"),
        (["--kwargs", "{a: 1, a: 2}"], "'a' is on line 1 already"),
        (["--kwargs", "speed=1"], "unexpected keyword argument 'speed'"),
        (["--host", "no.such.host.invalid", "--open"], "cannot listen there"),
    ],
)
def test_a_wrong_command_line_is_one_line(reward_file, capsys, monkeypatch, words, phrase):
    monkeypatch.setenv("FOREIGN", "sésame")
    assert main(["serve-reward", f"{reward_file}:Captioned", "--device", "cpu", "--port", "0", *words]) == 2
    error = capsys.readouterr().err
    assert phrase in error and error.count("\n") == 1


def test_a_port_in_use_is_told(server, reward_file, capsys):
    assert main(["serve-reward", f"{reward_file}:steered", "--port", str(server.port)]) == 2
    assert "cannot listen there" in capsys.readouterr().err


# -- how much ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_refused_and_never_in_memory(guarded, announced):
    chunk = bytes(1 << 20)
    headers = TOKEN | ({"Content-Length": str(100 << 20)} if announced else {})
    before = guarded.peak_memory()
    answer = httpx.post(f"{guarded.url}/score", headers=headers, content=(chunk for _ in range(100)), timeout=60)
    assert answer.status_code == 413
    assert "larger than 1000000 bytes" in answer.json()["detail"]
    assert guarded.peak_memory() - before < 30


def test_where_the_queue_is_full_clients_are_told_to_come_back(guarded):
    """One is scored, one is decoded, one waits; no other may."""
    with ThreadPoolExecutor(6) as pool:
        body = request(orders=[0.5])
        answers = list(pool.map(lambda _: httpx.post(f"{guarded.url}/score", headers=TOKEN, content=body), range(6)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 3
    assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 503} == {"1"}


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_malformed_body_is_told_why(server):
    answer = httpx.post(f"{server.url}/score", content=request()[:-3])
    assert answer.status_code == 400 and "is no safetensors file" in answer.json()["detail"]


def test_a_reward_that_raises_tells_the_client_a_line_and_the_log_the_rest(server):
    answer = httpx.post(f"{server.url}/score", content=request(2, ids=["a", "b"], orders=[None, "raise"]))
    assert answer.status_code == 500
    detail = answer.json()["detail"]
    assert detail == ("reward 'steered' failed on sample 0 (id 'a') to sample 1 (id 'b'): KeyError: 'no such face'")
    log = server.log_file.read_text()
    assert "request r1 failed" in log and "Traceback" in log and 'raise KeyError("no such face")' in log


def test_a_reward_that_hangs_is_not_ready_until_it_comes_back(serve, reward_file):
    slow = serve(f"{reward_file}:steered", "--columns", "orders", "--timeout", 0.3)
    with ThreadPoolExecutor() as clients:
        first = clients.submit(httpx.post, f"{slow.url}/score", content=request(orders=[5.0]))
        wait_until(slow, "in_flight", 1)
        behind = [clients.submit(httpx.post, f"{slow.url}/score", content=request()) for _ in range(3)]
        for answer in (first, *behind):
            assert answer.result().status_code == 503
            assert "'steered' has not come back" in answer.result().json()["detail"]
    began = time.monotonic()
    assert httpx.post(f"{slow.url}/score", content=request()).status_code == 503  # at once
    assert time.monotonic() - began < 2.0
    health = httpx.get(f"{slow.url}/health")
    assert health.status_code == 503 and health.json()["ready"] is False
    deadline = time.monotonic() + 30
    while httpx.get(f"{slow.url}/health").status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert httpx.post(f"{slow.url}/score", content=request()).status_code == 200


def test_nan_never_leaves(server):
    answer = httpx.post(f"{server.url}/score", content=request(2, orders=[None, "nan"]))
    assert answer.status_code == 500 and "returned nan for sample 1" in answer.json()["detail"]
    answer = httpx.post(f"{server.url}/score", content=request(2, orders=[None, "none"]))
    assert answer.status_code == 200 and answer.json()["scores"][1] is None


def test_a_request_whose_client_left_is_not_scored(server):
    url = f"{server.url}/score"

    before = metric(server, "samples_total")
    busy = threading.Thread(target=httpx.post, args=(url,), kwargs={"content": request(orders=[1.0])})
    busy.start()
    wait_until(server, "in_flight", 1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, content=request(5), timeout=0.2)
    busy.join()
    assert httpx.post(url, content=request()).status_code == 200
    assert metric(server, "samples_total") - before == 2


def test_sigterm_answers_what_is_in_progress_and_then_ends(serve, reward_file):
    ending = serve(f"{reward_file}:steered", "--columns", "orders")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{ending.url}/score", content=request(orders=[1.0]))
        wait_until(ending, "in_flight", 1)
        ending.process.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 200
    assert ending.process.wait(10) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{ending.url}/health")


def test_sigterm_does_not_wait_for_a_reward_that_hangs_and_tells_clients_to_come_back(serve, reward_file):
    """503, which is tried again elsewhere or later; 500 would end the run that asked."""
    hanging = serve(f"{reward_file}:steered", "--columns", "orders", "--grace", 1)
    with ThreadPoolExecutor() as pool:
        answers = []
        # One is scored, one decoded, one waits.
        for orders, gauge, value in ([3600.0], "in_flight", 1), ([None], "in_flight", 2), ([None], "waiting", 1):
            answers.append(pool.submit(httpx.post, f"{hanging.url}/score", content=request(orders=orders), timeout=30))
            wait_until(hanging, gauge, value)
        hanging.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [503] * 3
    assert hanging.process.wait(10) == 0
