"""Joint attention over video and text tokens, laid out in memory as the fast kernels want it."""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor


class JointAttnProcessor:
    """What `HunyuanVideoAttnProcessor2_0` computes, with each head's tokens contiguous in memory.

    diffusers hands the kernels [B, tokens, heads, dim] seen as [B, heads, tokens, dim]; cuDNN's attention is slower on
    such a view than on a contiguous tensor (`benchmarks/throughput/` measures it). Under `torch.compile` the
    rearrangement costs next to nothing, because the kernels that normalise and rotate write their results there.
    """

    # diffusers sets these on the processors of a model.
    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video tokens [B,S,D] and text tokens [B,L,D] to their attention outputs, of the same shapes."""
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        own = (attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        single_stream = attn.add_q_proj is None  # one set of weights for both
        if single_stream:
            joined = torch.cat([hidden_states, encoder_hidden_states], dim=1)
            video, text = zip(*(part.split(lengths, dim=1) for part in projected(joined, *own)), strict=True)
        else:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
            video = projected(hidden_states, *own)
            text = projected(encoder_hidden_states, attn.heads, *added)
        rotated = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in video[:2])
        attended = dispatch_attention_fn(
            *(heads_first(*parts) for parts in zip((*rotated, video[2]), text, strict=True)),
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        of_video, of_text = attended.flatten(2, 3).split(lengths, dim=1)
        if single_stream:  # whose output projection is joined with the feed-forward's
            return of_video, of_text
        return attn.to_out[1](attn.to_out[0](of_video)), attn.to_add_out(of_text)


def projected(tokens: Tensor, heads: int, projections: tuple, norms: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, tokens, heads, dim], the first two normalised."""
    query, key, value = (projection(tokens).unflatten(2, (heads, -1)) for projection in projections)
    return norms[0](query), norms[1](key), value


def heads_first(video: Tensor, text: Tensor) -> Tensor:
    """[B, tokens, heads, dim] of both, joined along the tokens; each head's tokens are neighbours in memory."""
    return torch.cat([video.transpose(1, 2), text.transpose(1, 2)], dim=2).transpose(1, 2)
