"""Multiple-choice tasks that a model is asked while it is trained, at its own layout."""

from __future__ import annotations

from dataclasses import replace

from megatron_dlm.config import Config, ConfigError
from megatron_dlm.data.errors import DataError
from megatron_dlm.data.tokenizer import Tokenizer
from megatron_dlm.diffusion.likelihood_masks import TOKENS_PER_BATCH, LikelihoodOptions
from megatron_dlm.evaluation.generation import model_in_training
from megatron_dlm.evaluation.multiple_choice import EncodedTask, Metric, answer, encode_task, metrics
from megatron_dlm.evaluation.run_tasks import flat
from megatron_dlm.evaluation.tasks import load_task
from megatron_dlm.training.setup import Training


def check_tasks(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ``ConfigError`` where the questions of ``evaluate.tasks`` cannot be read or do not fit the model."""
    for index, task in enumerate(config.evaluate.tasks):
        try:
            encode_task(load_task(task.name, task.path, limit=task.limit), tokenizer, config.data.sequence_length)
        except DataError as error:
            raise ConfigError(f"evaluate.tasks[{index}]: {error}") from None


class TrainingTasks:
    """The tasks of ``evaluate.tasks`` as keys of an evaluation's record."""

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
            self._tasks.append((encoded, replace(options, samples=encoded.samples(task.samples))))

    def __call__(self) -> dict[str, float | None]:
        """``task/NAME/acc``, ``task/NAME/acc_stderr`` and so on by the model as it is; collective, equal on all ranks.

        The masks are the same at every evaluation, so that figures of different steps compare. What a model with NaN
        answers is None.
        """
        found: dict[str, float | None] = {}
        for encoded, options in self._tasks:
            for name, value in flat(self._metrics(encoded, options)).items():
                found[f"task/{encoded.task.name}/{name}"] = value
        return found

    def _metrics(self, encoded: EncodedTask, options: LikelihoodOptions) -> dict[str, Metric]:
        model, task = model_in_training(self._training), encoded.task
        try:
            return metrics(task.questions, answer(model, encoded, options), task.kind)
        except ValueError:  # NaN, which skipped steps may still mend
            return {"acc": Metric(float("nan"), None)}
