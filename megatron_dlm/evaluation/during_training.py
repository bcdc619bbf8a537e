"""What a model is asked while it is trained, beside its held-out loss: texts, and multiple-choice tasks."""

from __future__ import annotations

from dataclasses import replace

from megatron_dlm.config.tree import Config
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.likelihood_masks import TOKENS_PER_BATCH, LikelihoodOptions
from megatron_dlm.evaluation.multiple_choice import EncodedTask, Metric, answer, encode_task, metrics
from megatron_dlm.evaluation.progress import collect
from megatron_dlm.evaluation.run_tasks import flat
from megatron_dlm.evaluation.tasks import load_task
from megatron_dlm.generation.denoiser import Denoiser
from megatron_dlm.generation.text_model import TextModel
from megatron_dlm.shipped.sampler_plan import SamplerOptions
from megatron_dlm.training.evaluator import Sample
from megatron_dlm.training.state import Training


def model_in_training(training: Training) -> TextModel:
    """The model of a run as it is now, at the run's layout."""
    config, topology = training.config, training.topology
    return TextModel(
        denoise=Denoiser(training.chunks, topology),
        tokenizer=training.tokenizer,
        kind=config.model.kind,
        max_length=config.data.sequence_length,
        device=topology.device,
        name=config.run.directory,
        topology=topology,
    )


def check_questions(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ``ConfigError`` for prompts and tasks of ``evaluate`` that cannot be put to the model."""
    _check_prompts(config, tokenizer)
    _check_tasks(config, tokenizer)


def _check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ``ConfigError`` where ``evaluate.prompts`` cannot be continued within a training sequence."""
    for prompt in config.evaluate.prompts:
        needed = len(tokenizer.encode(prompt)) + config.evaluate.sample_tokens
        if needed > config.data.sequence_length:
            raise ConfigError(
                f"evaluate.prompts: {prompt[:20]!r} and evaluate.sample_tokens ({config.evaluate.sample_tokens}) are "
                f"{needed} tokens, more than data.sequence_length ({config.data.sequence_length}); shorten either"
            )


def _check_tasks(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ``ConfigError`` where the questions of ``evaluate.tasks`` cannot be read or do not fit the model."""
    for index, task in enumerate(config.evaluate.tasks):
        try:
            encode_task(load_task(task.name, task.path, limit=task.limit), tokenizer, config.data.sequence_length)
        except DataError as error:
            raise ConfigError(f"evaluate.tasks[{index}]: {error}") from None


class DuringTraining:
    """The tasks of ``evaluate.tasks`` and the prompts of ``evaluate.prompts``, put to the model as it is."""

    def __init__(self, training: Training) -> None:
        """Raises ``DataError`` where a file has changed since the check."""
        config = training.config
        self._training = training
        self._tasks: list[tuple[EncodedTask, LikelihoodOptions]] = []
        # Forwards no larger than those of training, whose memory is known to suffice.
        room = max(config.train.micro_batch_size * config.data.sequence_length, 1)
        options = LikelihoodOptions(tokens_per_batch=min(TOKENS_PER_BATCH, room))
        for task in config.evaluate.tasks:
            loaded = load_task(task.name, task.path, limit=task.limit)
            encoded = encode_task(loaded, training.tokenizer, config.data.sequence_length)
            self._tasks.append((encoded, replace(options, masks=encoded.masks(task.masks))))

    def figures(self) -> dict[str, float | None]:
        """``task/NAME/acc``, ``task/NAME/acc_stderr`` and so on; collective, equal on all ranks.

        The masks are the same at every evaluation, so that figures of different steps compare. What a model with NaN
        answers is None.
        """
        found: dict[str, float | None] = {}
        for encoded, options in self._tasks:
            for name, value in flat(self._metrics(encoded, options)).items():
                found[f"task/{encoded.task.name}/{name}"] = value
        return found

    def texts(self) -> list[Sample]:
        """Continue every prompt of ``evaluate.prompts``; collective, equal on all ranks.

        The most probable tokens, block by block: the texts of different steps differ by what was learned in between.
        """
        config, tokenizer = self._training.config, self._training.tokenizer
        prompts, new = config.evaluate.prompts, config.evaluate.sample_tokens
        if not prompts:
            return []
        model = model_in_training(self._training)
        options = model.in_blocks(SamplerOptions(), new)
        samples = model.generate([tokenizer.encode(prompt) for prompt in prompts], options, max_new_tokens=new)
        texts = [tokenizer.decode(row) for row in samples.continuations]
        return [Sample(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]

    def _metrics(self, encoded: EncodedTask, options: LikelihoodOptions) -> dict[str, Metric]:
        model, task = model_in_training(self._training), encoded.task
        try:
            return metrics(task.questions, collect(answer(model, encoded, options)), task.kind)
        except ValueError:  # NaN, which skipped steps may still mend
            return {"acc": Metric(float("nan"), None)}
