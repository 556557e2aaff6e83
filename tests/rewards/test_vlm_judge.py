"""The judge: prompts, parser, an OpenAI-compatible endpoint on loopback, and a tiny real model."""

import base64
import io
import json
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from editrl.errors import EditrlError
from editrl.recipes.shapes import WEIGHTS
from editrl.reward import RewardSet
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
        (GOOD.replace('"quality": 6', '"quality": 6, "image quality": 2'), "could both be 'quality'"),
        (GOOD[:-12], "no JSON object"),
    ],
)
def test_what_is_no_score_is_not_read(text, why):
    with pytest.raises(UnreadableAnswer, match=why):
        read_scores(text, THREE)


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
            judge(endpoint, options={"tries": 3})(videos, **columns)
        assert len(endpoint.requests) == tries
        assert "secret" not in str(caught.value)


def test_a_time_out_and_a_closed_port_are_errors(endpoint):
    endpoint.answers = [0.5]
    with pytest.raises(EditrlError, match=r"cannot be reached: ReadTimeout"):
        judge(endpoint, options={"timeout": 0.05, "tries": 2})(*sample()[:1], **sample()[1])
    endpoint.server.shutdown()
    endpoint.server.server_close()
    with pytest.raises(EditrlError, match="cannot be reached: ConnectError"):
        judge(endpoint, options={"tries": 1})(*sample()[:1], **sample()[1])


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


def test_arguments_are_checked(endpoint):
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
