"""A masked diffusion language model on transformers' own Qwen3 modules; a copy of this file ships inside every export.

Attention is bidirectional, the logits at a position are those of its own token, and ``generate`` fills in masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3PreTrainedModel

from .configuration_dlm import DLMConfig
from .sampler import Samples, Step, sample
from .sampler_plan import SamplerOptions, Vocabulary

_IGNORED = -100
# Arguments of other models' generate that callers pass by habit, and the values that ask for nothing here; () any.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (),
    "use_cache": (),
    "top_k": (0, None),
    "max_length": (None,),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "streamer": (None,),
    "assistant_model": (None,),
    "repetition_penalty": (1.0, None),
}


class DLMForMaskedDiffusion(Qwen3PreTrainedModel, GenerationMixin):
    """The denoiser: noised tokens in, logits of the clean ones out."""

    config_class = DLMConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DLMConfig) -> None:
        super().__init__(config)
        self.model = Qwen3Model(config)
        self.model.embed_tokens.padding_idx = None  # padding is end-of-document, whose embedding learns like any other
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.is_causal = False  # without a mask, transformers' attention functions follow this
            if not config.qk_norm:
                attention.q_norm = attention.k_norm = nn.Identity()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        rows: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits, and with ``labels`` the masked diffusion loss.

        Args:
            input_ids: [batch, seq] int64, [MASK] wherever a token is unknown.
            attention_mask: [batch, seq], 0 for padding at the left or right; None: no padding.
            position_ids: [batch, seq]; None: each row counts its own tokens, whatever the padding.
            inputs_embeds: [batch, seq, hidden] instead of ``input_ids``, without ``labels``.
            labels: [batch, seq] int64, the clean tokens x0; -100 where nothing is to be predicted (prompts, padding).
                A row of ``input_ids`` with [MASK] at a labelled position is taken as noised already. One without is
                noised here, as in training: of its L labelled tokens k are masked, k uniform on 1..L.
            loss_weights: [batch] or [batch, seq], weights of the masked tokens' cross-entropies; None: L / k, which
                makes the loss an estimate of the negative ELBO (LLaDA, arXiv 2502.09992, equation 6).
            rows: [n] int64, flat indices into [batch * seq] of the positions whose logits are wanted; None: all.
            generator: of the noise; None: torch's own.
            num_items_in_batch: labelled tokens of the whole batch where this is a part of it; transformers' Trainer
                gives it, and accumulating gradients then changes nothing. None: those of ``labels``.

        Returns:
            logits [batch, seq, vocab], or [n, vocab] with ``rows``; loss [] fp32 in nats per labelled token.

        Raises:
            ValueError: ``labels`` without ``input_ids``, or with ``rows``.
        """
        if labels is not None:
            if input_ids is None or rows is not None:
                raise ValueError("labels need input_ids, and the logits of all positions: leave out rows")
            input_ids = _noised(input_ids, labels, self.config.mask_token_id, generator)
        if position_ids is None and attention_mask is not None:
            # Padding at the left must not move the positions: each token counts the real ones before it.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        # With fused attention None where nothing is padded, which leaves it its fastest kernels.
        mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask)
        hidden = self.model(
            inputs_embeds=inputs_embeds,
            # A mapping is taken as it is; a tensor would be made causal.
            attention_mask={"full_attention": mask},
            position_ids=position_ids,
            use_cache=False,
            **{name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs},
        )
        # The head on the positions that are wanted only: logits of all would be the largest tensor by far.
        last = hidden.last_hidden_state
        logits = self.lm_head(last if rows is None else last.flatten(0, 1)[rows])
        loss = None
        if labels is not None:
            masked = input_ids == self.config.mask_token_id
            loss = _loss(logits, masked, labels, loss_weights, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=hidden.hidden_states, attentions=hidden.attentions
        )

    @torch.no_grad()
    def denoise(self, tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        """Logits [n, vocab] of some positions; the arguments are those of the sampler's ``Denoise``."""
        attention_mask = None
        if lengths is not None:
            attention_mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device)[:, None]
        return self(input_ids=tokens, attention_mask=attention_mask, rows=rows).logits

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        on_step: Callable[[Step], None] | None = None,
        return_dict_in_generate: bool = False,
        **kwargs: Any,
    ) -> Tensor | GeneratedSamples:
        """Fill in the masks of the prompts, and of ``max_new_tokens`` more behind each.

        Args:
            inputs: [batch, seq] int64 (or ``input_ids``); [MASK] anywhere is filled in too.
            generation_config: defaults for the keywords below; None: the model's own.
            attention_mask: [batch, seq], 0 for padding, at the left or right of a prompt; None: no padding.
            on_step: see ``sampler.sample``.
            return_dict_in_generate: return what the sampler counted as well.
            kwargs: ``max_new_tokens`` (0: fill in the prompts' masks only), and the fields of
                ``sampler_plan.SamplerOptions``: ``steps``, ``block_length``, ``remasking``, ``threshold``,
                ``temperature``, ``top_p``, ``guidance``, ``seed``.

        Returns:
            [batch, seq + max_new_tokens] int64: the prompts as they were padded, filled in, and the new tokens;
            behind end-of-document there is padding.

        Raises:
            ValueError: an unknown or contradictory keyword, or a prompt without any token.
        """
        prompts = inputs if inputs is not None else input_ids
        if prompts is None or prompts.ndim != 2:
            raise ValueError("generate needs input_ids of shape [batch, seq]")
        if attention_mask is not None and (attention_mask.shape != prompts.shape or bool((attention_mask < 0).any())):
            raise ValueError("attention_mask must have the shape of input_ids, with 1 for tokens and 0 for padding")
        known, ends = self._settings(generation_config, kwargs)
        new, end = known.pop("max_new_tokens") or 0, ends["eos_token_id"]
        if new < 0:
            raise ValueError(f"max_new_tokens is {new}; it must not be negative")
        # transformers allows several ends; the sampler knows one.
        end = end[0] if isinstance(end, list) else end
        vocabulary = Vocabulary(self.config.mask_token_id, end)
        if new == 0 and end is not None:  # an infilled text goes on behind its masks
            vocabulary = vocabulary.forbidding([end])
        real = torch.ones_like(prompts) if attention_mask is None else attention_mask
        # The sampler pads by itself and at the right: it is given what is real.
        samples = sample(
            self.denoise,
            [row[keep.bool()].tolist() for row, keep in zip(prompts, real, strict=True)],
            SamplerOptions(**{name: value for name, value in known.items() if value is not None}),
            vocabulary=vocabulary,
            max_new_tokens=new,
            device=prompts.device,
            on_step=on_step,
        )
        padding = ends["pad_token_id"] if ends["pad_token_id"] is not None else end
        sequences = _as_padded(prompts, real, samples, new, padding)
        return GeneratedSamples(sequences, samples.forwards, samples) if return_dict_in_generate else sequences

    def _settings(
        self, generation_config: GenerationConfig | None, given: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(``max_new_tokens`` and the sampler's options, the end and padding ids); ``given`` goes before the rest."""
        # Keywords go before the configuration given, and that before the model's own.
        first = generation_config if generation_config is not None else self.generation_config
        names = ["max_new_tokens", *(field.name for field in fields(SamplerOptions))]
        known = {name: getattr(first, name, None) for name in names}
        ends: dict[str, Any] = {"eos_token_id": None, "pad_token_id": None}
        for config in (self.config, self.generation_config, first):
            ends |= {name: value for name in ends if (value := getattr(config, name, None)) is not None}
        for name, value in given.items():
            if name in known:
                known[name] = value
            elif name in ends:
                ends[name] = value
            elif name not in _NEUTRAL or (_NEUTRAL[name] and value not in _NEUTRAL[name]):
                raise ValueError(f"generate has no argument {name!r}; give {', '.join([*known, *ends])}")
        if given.get("do_sample") is not None:  # what transformers' word for a temperature means
            known["temperature"] = (known["temperature"] or 1.0) if given["do_sample"] else 0.0
        return known, ends


@dataclass
class GeneratedSamples:
    """What ``generate`` returns when it is asked for more than tokens."""

    sequences: Tensor
    """[batch, seq + max_new_tokens] int64."""
    forwards: int
    """Forwards of the whole batch."""
    samples: Samples
    """As the sampler left them, without padding."""


def _as_padded(prompts: Tensor, real: Tensor, samples: Samples, new: int, padding: int | None) -> Tensor:
    """The samples [batch, seq + new] in the places of their prompts, which may be padded on either side."""
    output = F.pad(prompts, (0, new))
    for row, (tokens, keep, continuation) in enumerate(
        zip(samples.tokens, real.bool(), samples.continuations, strict=True)
    ):
        # The prompt back to where its tokens were; the new tokens behind the padded width.
        start = int(keep.sum())
        output[row, : prompts.shape[1]][keep] = output.new_tensor(tokens[:start])
        found = tokens[start : start + len(continuation) + 1]  # with end-of-document, if there is one
        output[row, prompts.shape[1] :] = output.new_tensor(
            found + [padding if padding is not None else samples.end_of_document_id] * (new - len(found))
        )
    return output


def _noised(input_ids: Tensor, labels: Tensor, mask_token_id: int, generator: torch.Generator | None) -> Tensor:
    """``input_ids`` with masks at labelled positions: a row's own if it has some, else k of its L."""
    # A row that brings its own masks at labelled positions is left as it is.
    eligible = labels != _IGNORED
    clean = ~((input_ids == mask_token_id) & eligible).any(1, keepdim=True)
    device = input_ids.device if generator is None else generator.device
    # [batch, 1 + seq] numbers: the first decides how many, the others which. On the generator's device, which may be
    # another.
    uniform = torch.rand(input_ids.shape[0], input_ids.shape[1] + 1, device=device, generator=generator)
    uniform = uniform.to(input_ids.device)
    total = eligible.sum(1, keepdim=True)
    count = (uniform[:, :1] * total).long() + 1  # uniform on 1..L; above the ranks of a row that has no labels
    # Ranks among a row's labelled tokens: 2 is above every uniform number, so the others come last.
    rank = uniform[:, 1:].masked_fill(~eligible, 2.0).argsort(1).argsort(1)
    return input_ids.masked_fill((rank < count) & eligible & clean, mask_token_id)


def _loss(
    logits: Tensor, masked: Tensor, labels: Tensor, weights: Tensor | None, divisor: Tensor | int | None
) -> Tensor:
    """Sum of the weighted cross-entropies of masked labelled tokens over the number of labelled tokens, in nats."""
    eligible = labels != _IGNORED
    masked = masked & eligible
    if weights is None:
        weights = eligible.sum(1) / masked.sum(1).clamp(min=1)
    weights = (weights[:, None] if weights.ndim == 1 else weights).expand(labels.shape)
    cross_entropy = F.cross_entropy(logits[masked].float(), labels[masked], reduction="none")
    loss = (weights[masked].float() * cross_entropy).sum()
    return loss / (eligible.sum().clamp(min=1) if divisor is None else divisor)
