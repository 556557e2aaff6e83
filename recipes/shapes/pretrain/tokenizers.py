"""Word-level tokenizers over the world's closed vocabulary, in the file formats of the real ones."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from editrl.recipes.shapes.world import VOCABULARY

TEXT_LENGTH = 48

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _word_level(special: list[str], ids_last: bool) -> Tokenizer:
    words = [*VOCABULARY, *special] if ids_last else [*special, *VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w]+|,"), behavior="removed", invert=True)
    return tokenizer


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Text between a begin and an end token. The end token has the highest id: CLIP reads its pooled embedding there
    (an end token of id 2 would switch transformers' CLIP to its legacy pooling)."""
    tokenizer = _word_level(["<unk>", "<begin>", "<end>"], ids_last=True)
    begin, end = tokenizer.token_to_id("<begin>"), tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", begin), ("<end>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<begin>",
        eos_token="<end>",
        pad_token="<end>",
        model_max_length=TEXT_LENGTH,
    )


def vlm_tokenizer() -> PreTrainedTokenizerFast:
    """Chat turns with image placeholders, as the LLaVA tokenizers have them."""
    special = ["<pad>", "<unk>", "<begin>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level(special, ids_last=False),
        unk_token="<unk>",
        bos_token="<begin>",
        eos_token="<|end|>",
        pad_token="<pad>",
        additional_special_tokens=special[3:6] + special[7:],
        chat_template=CHAT_TEMPLATE,
    )
