"""Text from any model of ours: a checkpoint at any layout, an export, masked diffusion or autoregressive."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron_dlm.checkpoint.stored import is_checkpoint, open_checkpoint
from megatron_dlm.config.kinds import AUTOREGRESSIVE, MASKED_DIFFUSION, Kind
from megatron_dlm.config.tree import ParallelConfig
from megatron_dlm.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dlm.errors import ConfigError
from megatron_dlm.shipped.sampler import Denoise, Samples, Step, next_token, sample
from megatron_dlm.shipped.sampler_plan import DEFAULT_BLOCK_LENGTH, SamplerOptions, Vocabulary

if TYPE_CHECKING:
    from megatron_dlm.parallel.topology import Topology

_HOLE = "_{4,}"
_DIFFUSION_ONLY = ("steps", "block_length", "threshold", "guidance")


class TextModel(NamedTuple):
    """A model and its tokenizer, behind one interface for every kind."""

    denoise: Denoise
    """Logits of the tokens at the positions; of an autoregressive model, of those that follow (see ``own_tokens``)."""
    tokenizer: Tokenizer
    kind: Kind
    max_length: int
    """Tokens of a sequence in training."""
    device: torch.device
    name: str
    """For people."""
    forbidden_token_ids: tuple[int, ...] = ()
    """Never written, besides [MASK]; ids that the model has and the tokenizer has not, at least."""
    generate_cached: Callable[..., Samples] | None = None
    """Autoregressive sampling with a cache of keys and values, where there is one; the arguments are ``generate``'s
    and the ``vocabulary``."""
    first_token_id: int | None = None
    """What an autoregressive model reads before the first token of a text; None: end-of-document, as in training."""
    topology: Topology | None = None
    """The layout that the model runs at; None: this process alone, or it is not known."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's, with the forbidden ids."""
        return self.tokenizer.vocabulary.forbidding(self.forbidden_token_ids)

    def forbidding(self, ids: Iterable[int]) -> TextModel:
        """The same model, which does not write these ids either."""
        return self._replace(forbidden_token_ids=(*self.forbidden_token_ids, *ids))

    def own_tokens(self) -> Denoise:
        """Logits of tokens at their own positions, whatever the kind of the model."""
        if not self.kind.causal:
            return self.denoise
        first = self.first_token_id
        return next_token(self.denoise, self.tokenizer.end_of_document_id if first is None else first)

    def in_blocks(self, options: SamplerOptions, max_new_tokens: int) -> SamplerOptions:
        """The options for text behind a prompt: block by block, if they do not say how, so that its end is found before
        all of it is written. An autoregressive model has no blocks."""
        if self.kind.causal or options.block_length is not None:
            return options
        return replace(options, block_length=min(DEFAULT_BLOCK_LENGTH, max_new_tokens))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplerOptions,
        *,
        max_new_tokens: int = 0,
        on_step: Callable[[Step], None] | None = None,
    ) -> Samples:
        """Complete prompts, and fill in their masks; the arguments are those of ``sampler.sample``.

        Every rank of the model's layout must call it with the same arguments.

        Raises:
            ValueError: one line; what an autoregressive model cannot do, or as ``sampler.sample``.
        """
        common: dict[str, Any] = {"vocabulary": self.vocabulary, "max_new_tokens": max_new_tokens, "on_step": on_step}
        if self.kind.causal:
            _require_left_to_right(prompts, options, self.tokenizer.mask_token_id)
            if self.generate_cached is not None:
                return self.generate_cached(prompts, options, **common)
            # Blocks of one mask are filled in from left to right: the sampler's way to write one token after the other.
            options = SamplerOptions(
                block_length=1, temperature=options.temperature, top_p=options.top_p, seed=options.seed
            )
        return sample(self.own_tokens(), prompts, options, device=self.device, **common)

    def encode_holes(self, text: str, tokens_per_hole: int) -> list[int]:
        """Ids of ``text`` with ``tokens_per_hole`` masks for every ``____`` (four underscores or more).

        Raises:
            ValueError: the text has no hole.
        """
        parts = re.split(_HOLE, text)  # each is encoded alone: no token reaches across a hole
        if len(parts) == 1:
            raise ValueError("there is nothing to fill in: write ____ where tokens are missing")
        hole = [self.tokenizer.mask_token_id] * tokens_per_hole
        # Text, hole, text, hole, ...: a hole is as many masks as were asked for.
        ids = self.tokenizer.encode(parts[0])
        for part in parts[1:]:
            ids += hole + self.tokenizer.encode(part)
        return ids


def open_text_model(path: str, layout: ParallelConfig | None = None) -> TextModel:
    """The model at ``path``: a run, one of its checkpoints, or a Hugging Face directory; collective.

    Args:
        path: of a directory.
        layout: of a checkpoint's model; None: one process.

    Raises:
        ConfigError: there is no model, or it is of another kind; one line.
        DataError: its tokenizer cannot be read.
    """
    if is_checkpoint(path):
        from megatron_dlm.generation.denoiser import load_denoiser

        stored = open_checkpoint(path)
        denoiser = load_denoiser(stored, layout)
        return TextModel(
            denoise=denoiser,
            tokenizer=stored.open_tokenizer(),
            kind=stored.config.model.kind,
            max_length=stored.config.data.sequence_length,
            device=denoiser.topology.device,
            name=f"{stored.directory} at {denoiser.topology}",
            topology=denoiser.topology,
        )
    if (Path(path) / "config.json").is_file():
        if layout is not None and layout.model_parallel_size > 1:
            raise ConfigError(f"{path} is a Hugging Face directory, which runs on one process; sample a checkpoint")
        return _open_hugging_face(path)
    what = "has neither a checkpoint nor a config.json" if Path(path).is_dir() else "is no directory"
    raise ConfigError(f"{path} {what}; give a run, a checkpoint, or a Hugging Face directory")


def _open_hugging_face(path: str) -> TextModel:
    from megatron_dlm.generation.from_hugging_face import cached_generation, causal_denoise, load_model

    model = load_model(path)
    tokenizer = load_tokenizer(path)
    # Of the models that are read here, only our own exports are masked diffusion.
    autoregressive = model.config.model_type != "megatron_dlm"
    if not autoregressive and model.config.mask_token_id != tokenizer.mask_token_id:
        raise ConfigError(
            f"{path} has mask_token_id {model.config.mask_token_id} in config.json but {tokenizer.mask_token_id} in "
            "its tokenizer; export it again"
        )
    return TextModel(
        denoise=causal_denoise(model) if autoregressive else model.denoise,
        tokenizer=tokenizer,
        kind=AUTOREGRESSIVE if autoregressive else MASKED_DIFFUSION,
        max_length=model.config.max_position_embeddings,
        device=model.device,
        name=f"{path} on {model.device}",
        # The model may have rows that its tokenizer has no text for.
        forbidden_token_ids=tuple(range(tokenizer.vocab_size, model.config.vocab_size)),
        generate_cached=cached_generation(model) if autoregressive else None,
        first_token_id=model.config.bos_token_id if autoregressive else None,
    )


def _require_left_to_right(prompts: Sequence[Sequence[int]], options: SamplerOptions, mask_token_id: int) -> None:
    """Refuse what an autoregressive model cannot do."""
    default = SamplerOptions()
    given = [name for name in (*_DIFFUSION_ONLY, "remasking") if getattr(options, name) != getattr(default, name)]
    if given:
        raise ValueError(f"an autoregressive model writes one token after the other: leave out {', '.join(given)}")
    if any(mask_token_id in prompt for prompt in prompts):
        raise ValueError("an autoregressive model cannot fill in masks inside a text; take a masked diffusion model")
