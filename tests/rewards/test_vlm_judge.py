"""The judge: prompts, parser, an OpenAI-compatible endpoint on loopback, and a tiny real model."""

import base64
import gc
import io
import json
import logging
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from weakref import WeakValueDictionary

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from editrl.errors import EditrlError, OutageError
from editrl.recipes.shapes import WEIGHTS
from editrl.reward import RewardSet
from editrl.rewards.backbone import fetch
from editrl.rewards.vlm_judge import endpoint as endpoint_module
from editrl.rewards.vlm_judge import local
from editrl.rewards.vlm_judge.answer import UnreadableAnswer, read_mark, read_scores, read_yes_no
from editrl.rewards.vlm_judge.endpoint import Endpoint
from editrl.rewards.vlm_judge.judge import VLMJudge
from editrl.rewards.vlm_judge.local import LocalVLM
from editrl.rewards.vlm_judge.prompt import load_prompt, parts

THREE = ("instruction_following", "quality", "preservation")
GOOD = json.dumps({"instruction_following": 8, "quality": 6, "preservation": 10, "reason": "nice"})


# --- prompts


@pytest.mark.parametrize(
    ("name", "dimensions"), [("edit", THREE), ("reference", (*THREE, "similarity")), ("yes_no", ())]
)
def test_packaged_prompts_say_what_is_answered(name, dimensions):
    prompt = load_prompt(name)
    assert prompt.dimensions == dimensions
    assert "$instruction" in prompt.text and "dimensions:" not in prompt.text
    assert all(f"{dimension}:" in prompt.text for dimension in dimensions)


def test_a_prompt_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("dimensions: beauty\nIs $target_caption here, for $$5?")
    prompt = load_prompt(str(file))
    shown = parts(prompt, torch.zeros(9, 3, 4, 4), torch.ones(1, 3, 4, 4), {"target_caption": "a dog"}, frames=3)
    assert [part if isinstance(part, str) else part.mean().item() for part in shown] == [
        "Source video, 1 frame:",
        1.0,
        "Edited video, 3 frames:",
        *[0.0] * 3,
        "Is a dog here, for $5?",
    ]
    with pytest.raises(EditrlError, match=r"wants \$target_caption, which this sample does not have"):
        parts(prompt, torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), {"target_caption": None})
    version = prompt.version
    file.write_text("dimensions: beauty\nIs $target_caption here, for $$6?")
    assert load_prompt(str(file)).version != version


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("rate it", "first line of the prompt"),
        ("dimensions:\nrate it", "first line of the prompt"),
        ("answer: yes or no\nis $it there?", "has the placeholder 'it'"),
    ],
)
def test_a_wrong_prompt_is_refused(text, wanted, tmp_path):
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(EditrlError, match=wanted):
        load_prompt(str(tmp_path / "mine.txt"))
    with pytest.raises(EditrlError, match=r"no prompt 'edits'.*Did you mean 'edit'"):
        load_prompt("edits")


# --- parser


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Let me see {{first}} ... My marks are {GOOD} as you asked.",
        '{"other": 1} then ' + GOOD,
        '{"Instruct follow score (1-10)": "8", "Quality Score": "6/10", "preservation_score": {"score": 10.0}}',
    ],
)
def test_scores_are_read_however_they_are_wrapped(text):
    answer = read_scores(text, THREE)
    assert answer.scores == {"instruction_following": 8, "quality": 6, "preservation": 10}
    assert answer.raw == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("I would say eight.", "no JSON object"),
        ('{"instruction_following": 8, "quality": 6}', "no 'preservation'"),
        (GOOD.replace("10", "11"), "'preservation' is 11, not from 1 to 10"),
        (GOOD.replace("6", "0"), "'quality' is 0, not from 1 to 10"),
        (GOOD.replace("6", '"good"'), "'quality' is 'good', not a number"),
        (GOOD.replace("6", "null"), "'quality' is None"),
        (GOOD.replace("6", "true"), "'quality' is True"),
        (GOOD.replace("6", "NaN"), "'quality' is nan"),
        (GOOD.replace('"quality": 6', '"quality score": 6, "image quality": 2'), "could both be 'quality'"),
        (GOOD.replace('"quality": 6', '"quality": 6, "Quality": 2'), "could both be 'quality'"),
        (GOOD[:-12], "no JSON object"),
    ],
)
def test_what_is_no_score_is_not_read(text, why):
    with pytest.raises(UnreadableAnswer, match=why):
        read_scores(text, THREE)


@pytest.mark.parametrize(
    ("text", "dimensions", "wanted"),
    [
        ('{"a": 1, "b": 2, "c": 3, "reason": "a b c"}', "a b c", [1, 2, 3]),
        ('{"Art": 4, "Edit OK": 5}', "art edit_ok", [4, 5]),
        ('{"art score (1-10)": 4, "edit-ok": 5, "part": 9}', "art edit_ok", [4, 5]),
        ('{"motion_quality": 2, "motion": 3}', "motion motion_quality", [3, 2]),
        ('{"Motion score": 3, "motion_quality": 2}', "motion motion_quality", [3, 2]),
        ('{"quality": 6, "image quality": 2}', "quality", [6]),
    ],
)
def test_dimensions_of_ones_own_are_read(text, dimensions, wanted):
    assert list(read_scores(text, dimensions.split()).scores.values()) == wanted


@pytest.mark.parametrize(
    ("text", "dimensions", "why"),
    [
        ('{"part": 3, "apt": 4}', "art", "no 'art'"),
        ('{"motion_quality": 2}', "motion motion_quality", "no 'motion'"),
    ],
)
def test_the_key_of_another_dimension_or_word_is_not_taken(text, dimensions, why):
    with pytest.raises(UnreadableAnswer, match=why):
        read_scores(text, dimensions.split())


@pytest.mark.parametrize(("text", "wanted"), [("Yes.", 1), ("**NO**", 0), ("Answer: yes, clearly", 1)])
def test_yes_and_no(text, wanted):
    assert read_yes_no(text).scores == {"yes": wanted}


@pytest.mark.parametrize("text", ["perhaps", "yes and no", "nothing known"])
def test_neither_yes_nor_no(text):
    with pytest.raises(UnreadableAnswer):
        read_yes_no(text)


@pytest.mark.parametrize("text", ["7", "**7**", "Mark: 7/9.", "7.0"])
def test_one_mark(text):
    assert read_mark(text, range(1, 10)).scores == {"mark": 7}


@pytest.mark.parametrize("text", ["seven", "7 or 8", "0", "10", "7.5", "-7"])
def test_no_mark(text):
    with pytest.raises(UnreadableAnswer):
        read_mark(text, range(1, 10))


# --- an endpoint


class FakeEndpoint:
    """Answers with `answers` in turn (the last one again and again): text, or (status, body), or seconds to wait."""

    def __init__(self):
        self.answers, self.requests, self.headers, self.most = [GOOD], [], [], 0
        self._lock, self._now = threading.Lock(), 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake._now += 1
                    fake.most = max(fake.most, fake._now)
                    fake.requests.append((self.path, body))
                    fake.headers.append(dict(self.headers))
                    answer = fake.answers.pop(0) if len(fake.answers) > 1 else fake.answers[0]
                if isinstance(answer, float):
                    time.sleep(answer)
                    answer = GOOD
                status, text = answer if isinstance(answer, tuple) else (200, None)
                text = json.dumps({"choices": [{"message": {"content": answer}}]}) if text is None else text
                with fake._lock:
                    fake._now -= 1
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    fake = FakeEndpoint()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def judge(endpoint, **kwargs):
    options = {"api_key_env": "JUDGE_KEY", "wait": 0.001, "image_format": "png"} | kwargs.pop("options", {})
    return VLMJudge("some-vlm", base_url=endpoint.url, options=options, **kwargs)


def sample(count=1, **columns):
    videos = [torch.full((9, 3, 6, 8), 0.25 + i / 100) for i in range(count)]
    sources = [torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 3, 6, 8)] * count
    return videos, {"source_videos": sources, "instructions": ["make it red"] * count} | columns


def test_the_request_holds_the_frames_of_both_clips_and_the_rubric(endpoint):
    assert RewardSet([judge(endpoint, num_frames=3)])(*sample())[:, 0].tolist() == [8]
    [(path, body)] = endpoint.requests
    assert path == "/v1/chat/completions" and body["model"] == "some-vlm" and body["temperature"] == 0
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    [message] = body["messages"]
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", *["image_url"] * 3, "text", *["image_url"] * 3, "text"]
    rubric = message["content"][-1]["text"]
    assert "make it red" in rubric and "$" not in rubric
    images = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))
        for url in images
    ]
    assert [image.shape for image in shown] == [(6, 8, 3)] * 6
    assert [image.mean() for image in shown] == pytest.approx([255 * i / 8 for i in (1, 4, 7)] + [64] * 3, abs=1)


def test_a_reference_image_is_shown_and_asked_about(endpoint):
    endpoint.answers = [json.dumps(json.loads(GOOD) | {"similarity": 4})]
    videos, columns = sample(2, reference_images=[torch.ones(1, 3, 5, 5), None])
    reward = judge(endpoint, num_frames=1)
    assert reward(videos, **columns) == [7, 8]
    longer = max((body["messages"][0]["content"] for _, body in endpoint.requests), key=len)
    assert len(longer) == 7 and longer[4]["text"] == "Reference image:" and "similarity" in longer[-1]["text"]
    assert judge(endpoint, prompt="reference", dimension="similarity")(videos[:1], **sample()[1]) == [4]


def test_yes_or_no_at_an_endpoint(endpoint):
    endpoint.answers = ["Yes", "no"]
    reward = judge(endpoint, prompt="yes_no", options={"concurrency": 1})
    assert reward(*sample(2)[:1], **sample(2)[1]) == [1, 0]


def test_a_mark_is_weighed_by_a_local_model_and_read_at_an_endpoint(endpoint, tiny_vlm, tmp_path):
    (tmp_path / "mark.txt").write_text("answer: 1 to 3\nhow well was $instruction done?")
    endpoint.answers = ["2"]
    videos, columns = sample()
    assert judge(endpoint, prompt=str(tmp_path / "mark.txt"))(videos, **columns) == [2]
    transport = tiny_vlm()
    transport.words = {"1": ["red"], "2": ["blue"], "3": ["green"]}
    [expected] = VLMJudge(transport=transport, prompt=str(tmp_path / "mark.txt"), num_frames=1)(videos, **columns)
    assert 1 < expected < 3 and expected != int(expected)


def test_an_unreadable_answer_is_asked_for_again_saying_why_and_is_then_an_error(endpoint):
    endpoint.answers = ["eight!", GOOD]
    videos, columns = sample()
    [answer] = judge(endpoint).judge(videos, **columns)
    assert (answer.scores["preservation"], answer.reason) == (10, "nice")
    first, second = (body["messages"][0]["content"] for _, body in endpoint.requests)
    assert len(second) == len(first) + 1 and "there is no JSON object in it" in second[-1]["text"]
    endpoint.answers, endpoint.requests[:] = ["eight!"], []
    with pytest.raises(EditrlError, match=r"sample 0: the judge 'some-vlm' gave 2 answers .* no JSON .*'eight!'"):
        judge(endpoint, attempts=2).judge(videos, **columns)
    assert len(endpoint.requests) == 2


def test_what_may_pass_is_tried_again_and_what_will_not_is_an_error(endpoint):
    videos, columns = sample()
    endpoint.answers = [(503, "busy"), (429, "slow down"), GOOD]
    assert judge(endpoint)(videos, **columns) == [8]
    assert len(endpoint.requests) == 3
    for answers, wanted, tries in [
        ([(401, "who are\nyou?")], "answers 401: who are you?", 1),
        ([(500, "broken")], "answers 500: broken", 3),
        ([(200, "<html>")], "answers no chat completion: '<html>'", 1),
    ]:
        endpoint.answers, endpoint.requests[:] = answers, []
        with pytest.raises(EditrlError, match=wanted.replace("?", r"\?")) as caught:
            judge(endpoint, options={"max_retries": 2})(videos, **columns)
        assert isinstance(caught.value, OutageError) == (tries > 1)
        assert len(endpoint.requests) == tries
        assert "secret" not in str(caught.value)


def test_a_time_out_and_a_closed_port_are_outages(endpoint):
    videos, columns = sample()
    endpoint.answers = [0.5]
    with pytest.raises(OutageError, match=r"cannot be reached: ReadTimeout"):
        judge(endpoint, options={"timeout": 0.05, "max_retries": 1})(videos, **columns)
    close(endpoint)
    with pytest.raises(OutageError, match="cannot be reached: ConnectError"):
        judge(endpoint, options={"max_retries": 0})(videos, **columns)


def close(endpoint):
    endpoint.server.shutdown()
    endpoint.server.server_close()


def test_a_short_outage_is_waited_for_and_told(endpoint, monkeypatch, caplog):
    monkeypatch.setattr(endpoint_module, "QUIET", 0)
    endpoint.answers = [(503, "busy")] * 12 + [GOOD]
    with caplog.at_level(logging.WARNING, "editrl.rewards.vlm_judge"):
        assert judge(endpoint, options={"wait": 0.0001})(*sample()[:1], **sample()[1]) == [8]
    assert len(endpoint.requests) == 13
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "answers 503: busy; it is asked again" in told[0] and "answers again" in told[1]


@pytest.mark.parametrize("answer", [(503, "busy"), (500, "broken"), (429, "slow down"), None])
def test_an_outage_that_lasts_stops_the_run_as_one(endpoint, answer):
    reward = judge(endpoint, num_frames=1, options={"outage_limit": 0.3, "wait": 0.02, "concurrency": 2})
    endpoint.answers = [answer]
    if answer is None:
        close(endpoint)
    began = time.monotonic()
    with pytest.raises(OutageError, match=r"reward 'vlm_judge' failed on sample 0 to sample 3: .*no answer for \d+ s"):
        RewardSet([reward])(*sample(4))
    assert time.monotonic() - began >= 0.3
    assert answer is None or len(endpoint.requests) > 4


def test_a_wrong_address_is_told_sooner_than_an_outage(endpoint, monkeypatch):
    monkeypatch.setattr(endpoint_module, "STARTUP", 0.1)
    known, new = (judge(endpoint, options={"outage_limit": limit, "wait": 0.02}) for limit in (0.5, 600))
    videos, columns = sample()
    assert known(videos, **columns) == [8]
    known.transport.client.close()
    known.transport.client = endpoint_module.httpx.Client()  # without the connection that is still open
    close(endpoint)
    with pytest.raises(OutageError, match="check base_url"):
        new(videos, **columns)
    began = time.monotonic()
    with pytest.raises(OutageError):
        known(videos, **columns)
    assert time.monotonic() - began >= 0.5


def test_a_call_that_is_not_wanted_any_more_waits_for_no_outage(endpoint):
    endpoint.answers = [(503, "busy")]
    waiting = judge(endpoint, options={"wait": 30})
    videos, columns = sample()
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(waiting, videos, **columns)
        while not endpoint.requests:
            time.sleep(0.01)
        waiting.cancel()
        assert isinstance(call.exception(timeout=20), OutageError | CancelledError)


def test_no_more_requests_at_a_time_than_allowed(endpoint):
    endpoint.answers = [0.05]
    videos, columns = sample(6)
    assert judge(endpoint, num_frames=1, options={"concurrency": 2})(videos, **columns) == [8] * 6
    assert endpoint.most == 2


def test_it_is_asked_in_the_background_at_an_endpoint_only(endpoint, tiny_vlm):
    assert RewardSet([judge(endpoint)]).background == ["vlm_judge"]
    assert RewardSet([VLMJudge(tiny_vlm)]).background == []
    given = {"vlm_judge": {"background": False}}
    assert RewardSet([judge(endpoint)], options=given).background == []


def test_a_call_that_is_not_wanted_any_more_asks_no_further(endpoint):
    endpoint.answers = [0.3]
    waiting = judge(endpoint, num_frames=1, options={"concurrency": 1})
    videos, columns = sample(6)
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(waiting, videos, **columns)
        while not endpoint.requests:
            time.sleep(0.01)
        waiting.cancel()
        assert isinstance(call.exception(timeout=10), CancelledError | RuntimeError)
    assert len(endpoint.requests) == 1


def test_a_key_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(EditrlError, match="the environment variable NO_SUCH_KEY is not set"):
        Endpoint("m", "http://localhost/v1", api_key_env="NO_SUCH_KEY")
    Endpoint("m", "http://localhost/v1", api_key_env=None)


def test_judges_of_one_set_ask_once(endpoint):
    named = {"follows": "instruction_following", "looks": "quality", "keeps": "preservation", "all": None}
    same = {"model": "some-vlm", "base_url": endpoint.url, "options": {"api_key_env": "JUDGE_KEY"}}
    kwargs = {name: same | {"dimension": dimension} for name, dimension in named.items()}
    scores = RewardSet([f"{name}=vlm_judge" for name in named], kwargs=kwargs)
    videos, columns = sample(3)
    assert scores(videos, columns).tolist() == [[8, 6, 10, 8]] * 3
    assert len(endpoint.requests) == 3
    scores(videos, columns)
    assert len(endpoint.requests) == 6  # a cache lives for one call
    assert judge(endpoint)([videos[0]] * 2, **{name: values[:2] for name, values in columns.items()}) == [8, 8]
    assert len(endpoint.requests) == 7


@pytest.mark.parametrize(
    "other",
    [
        {"num_frames": 2},
        {"prompt": "edit.txt"},
        {"options": {"image_format": "jpeg"}},
        {"options": {"body": {"max_tokens": 9}}},
    ],
)
def test_judges_that_ask_something_else_do_not_share_answers(endpoint, other, tmp_path):
    if "prompt" in other:
        (tmp_path / "edit.txt").write_text(f"dimensions: {' '.join(THREE)}\nrate it")
        other = {"prompt": str(tmp_path / "edit.txt")}
    videos, columns = sample()
    cache = {}
    for reward in (judge(endpoint), judge(endpoint, **other), judge(endpoint, **other)):
        assert reward(videos, cache=cache, **columns) == [8]
    assert len(endpoint.requests) == 2


def test_samples_that_differ_do_not_share_answers(endpoint):
    reward, cache = judge(endpoint), {}
    videos, columns = sample()
    others = [
        {},
        {"instructions": ["make it blue"]},
        {"source_videos": [torch.zeros(9, 3, 6, 8)]},
        {"reference_images": [torch.ones(1, 3, 5, 5)]},
    ]
    endpoint.answers = [json.dumps(json.loads(GOOD) | {"similarity": 4})]
    for different in others * 2:
        reward(videos, cache=cache, **columns | different)
    assert len(endpoint.requests) == 4


def test_an_object_as_transport_shares_answers_with_itself_only():
    class Fixed:
        concurrency, key = 1, "equal"

        def __init__(self, mark):
            self.mark, self.asked = mark, 0

        def ask(self, parts):
            self.asked += 1
            return GOOD.replace("8", self.mark).replace("6", self.mark).replace("10", self.mark)

    first, second = Fixed("3"), Fixed("5")
    cache, (videos, columns) = {}, sample()
    for transport, wanted in ((first, 3), (first, 3), (second, 5)):
        assert VLMJudge(transport=transport)(videos, cache=cache, **columns) == [wanted]
    assert (first.asked, second.asked) == (1, 1)


def test_it_says_which_columns_it_can_use(endpoint, tmp_path):
    assert judge(endpoint).columns == ("reference_images",)
    (tmp_path / "mine.txt").write_text("dimensions: a\n$instruction: $target_caption, ${source_caption}, $$5?")
    mine = judge(endpoint, prompt=str(tmp_path / "mine.txt"))
    assert mine.columns == ("reference_images", "source_captions", "target_captions")
    endpoint.answers = ['{"a": 4}']
    videos, columns = sample(source_captions=["a cat"], target_captions=["a dog"])
    assert mine(videos, **columns) == [4]


@pytest.mark.parametrize("base_url", [None, "http://localhost/v1"])
def test_an_option_that_there_is_not_is_named_with_the_transport(base_url):
    kind = "LocalVLM .a local model" if base_url is None else "Endpoint"
    with pytest.raises(EditrlError, match=f"vlm_judge: options has 'nope', but {kind}"):
        VLMJudge("m", base_url=base_url, options={"nope": 1})
    with pytest.raises(EditrlError, match="options has 'model'"):
        VLMJudge("m", base_url=base_url, options={"model": "n"})
    near = {"max_new_token": "max_new_tokens"} if base_url is None else {"timeouts": "timeout"}
    for wrong, right in near.items():
        with pytest.raises(EditrlError, match=f"Did you mean '{right}'"):
            VLMJudge("m", base_url=base_url, options={wrong: 1})


def test_arguments_are_checked(endpoint):
    for option, value in (("timeout", 0), ("outage_limit", -1), ("max_retries", -1), ("concurrency", 0)):
        with pytest.raises(EditrlError, match=f"{option} of a judge is {value}"):
            judge(endpoint, options={option: value})
    with pytest.raises(EditrlError, match="base_url of a judge is 'localhost:8000/v1': it starts with http"):
        Endpoint("m", "localhost:8000/v1", api_key_env=None)
    with pytest.raises(EditrlError, match="give `model`"):
        VLMJudge()
    with pytest.raises(EditrlError, match="num_frames is 'some'"):
        judge(endpoint, num_frames="some")
    with pytest.raises(EditrlError, match="dimension is 'beauty': the prompt has instruction_following"):
        judge(endpoint, dimension="beauty")
    assert judge(endpoint).identity["prompts"].keys() == {"edit", "reference"}


# --- a local model


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory):
    """The tiny LLaVA of the shapes recipe, with a chat template that takes lists, as those of current models."""
    processor = AutoProcessor.from_pretrained(WEIGHTS / "sft" / "processor")
    processor.chat_template = (
        "{{ bos_token }}{% for message in messages %}<|user|>{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %} <image> {% else %} {{ part['text'] }} {% endif %}{% endfor %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    folder = tmp_path_factory.mktemp("processor")
    processor.save_pretrained(folder)
    words = {"yes": ["red"], "no": ["blue", "green"]}  # a tiny vocabulary: it knows colours only
    return lambda **kwargs: LocalVLM(
        str(WEIGHTS / "sft" / "vlm"), processor=str(folder), dtype="float32", words=words, max_new_tokens=4, **kwargs
    )


@pytest.fixture
def loads(monkeypatch):
    """The kinds that are read from disk. Nothing is held from before."""
    kinds = []
    monkeypatch.setattr(local, "_loaded", WeakValueDictionary())

    def counting(kind, name, **kwargs):
        kinds.append(kind.__name__)
        return fetch(kind, name, **kwargs)

    monkeypatch.setattr(local, "fetch", counting)
    return kinds


def test_judges_share_the_weights_of_a_local_model_and_ask_it_once(tiny_vlm, loads, monkeypatch):
    asked = []
    weigh = LocalVLM.weigh
    monkeypatch.setattr(LocalVLM, "weigh", lambda self, *args: asked.append(self) or weigh(self, *args))
    judges = [VLMJudge(transport=tiny_vlm(), prompt="yes_no", num_frames=1) for _ in range(3)]
    for k, reward in enumerate(judges):
        reward.name = f"judge{k}"
    videos = [torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)]
    columns = {"source_videos": [torch.rand(1, 3, 32, 32)] * 2, "instructions": ["make it red"] * 2}
    scores = RewardSet(judges).to("cpu")(videos, columns)
    assert loads == ["AutoModelForImageTextToText", "AutoProcessor"]
    assert len(asked) == 2 and len(set(scores[0].tolist())) == 1
    others = {name: values[:1] for name, values in columns.items()}
    alone = [reward(videos[:1], **others)[0] for reward in judges]
    assert alone == pytest.approx([scores[0, 0].item()] * 3)
    assert len(asked) == 5


def test_a_local_model_goes_with_its_last_judge_and_is_copied_to_another_device(tiny_vlm, loads):
    first, second = tiny_vlm().to("cpu"), tiny_vlm().to("meta")
    assert len(loads) == 2
    assert {p.device.type for p in first._loaded.network.parameters()} == {"cpu"}
    assert {p.device.type for p in second._loaded.network.parameters()} == {"meta"}
    assert not second._loaded.network.training and not any(p.requires_grad for p in second._loaded.network.parameters())
    assert second.to("cpu")._loaded is first._loaded
    del first, second
    gc.collect()
    assert not local._loaded
    tiny_vlm().to("cpu")
    assert len(loads) == 4


def test_yes_is_weighed_against_no_by_a_local_model(tiny_vlm):
    transport = tiny_vlm()
    reward = VLMJudge(transport=transport, prompt="yes_no", num_frames=1).to("cpu")
    red, source = torch.zeros(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    red[:, 0] = 1
    columns = {"source_videos": [source], "instructions": ["make it red"]}
    [score] = reward([red], **columns)

    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS / "sft" / "vlm", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(transport.processor_path)
    text = "Source video, 1 frame: <image> Edited video, 1 frame: <image> " + load_prompt("yes_no").text.replace(
        "$instruction", "make it red"
    )
    images = [Image.fromarray((c[0].permute(1, 2, 0) * 255).byte().numpy()) for c in (source, red)]
    inputs = processor(images=images, text=f"<begin><|user|> {text} <|end|><|assistant|>", return_tensors="pt")
    with torch.no_grad():
        likely = model(**inputs).logits[0, -1].softmax(-1)
    yes, blue, green = (likely[processor.tokenizer.convert_tokens_to_ids(w)].item() for w in ("red", "blue", "green"))
    assert score == pytest.approx(yes / (yes + blue + green), abs=1e-5)
    assert 0 < score < 1


def test_a_local_model_scores_each_sample_by_itself(tiny_vlm):
    reward = VLMJudge(transport=tiny_vlm(), prompt="yes_no", num_frames=2)
    generator = torch.Generator().manual_seed(0)
    videos = [torch.rand(frames, 3, 32, 32, generator=generator) for frames in (5, 1, 3)]
    columns = {"source_videos": [v.flip(-1) for v in videos], "instructions": ["red", "make it blue", "a circle"]}
    together = reward(videos, **columns)
    back = reward(videos[::-1], **{name: values[::-1] for name, values in columns.items()})
    assert back == together[::-1]
    assert [reward([videos[i]], **{n: [v[i]] for n, v in columns.items()})[0] for i in range(3)] == together
    assert len(set(together)) == 3


def test_a_local_model_writes_answers_and_says_what_it_cannot_do(tiny_vlm):
    transport = tiny_vlm()
    text = transport.ask(["make it red", torch.rand(3, 32, 32)])
    assert text and "<|" not in text
    with pytest.raises(EditrlError, match="has no token for '9'"):
        transport.weigh(["score"], {"9": 9, "10": 10})
    assert transport.weigh(["a"], {"red": 1.0, "blue": 2.0}) == pytest.approx(1.5, abs=0.5)
    with pytest.raises(EditrlError, match="gave 2 answers that cannot be read"):
        VLMJudge(transport=transport, attempts=2, num_frames=1)(*sample()[:1], **sample()[1])
