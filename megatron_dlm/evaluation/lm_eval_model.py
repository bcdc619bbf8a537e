"""Models of ours in lm-eval (EleutherAI's language model evaluation harness), masked diffusion ones by their bound.

Importing this module registers them there, so that both of these work:

    megatron-dlm evaluate --checkpoint runs/demo --tasks lm_eval:arc_easy
    lm_eval.simple_evaluate(model="megatron_dlm", model_args="checkpoint=runs/demo,masks=128", tasks=["arc_easy"])
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.likelihood import LogLikelihood, Request
from megatron_dlm.evaluation.likelihood_masks import DEFAULT_MASKS, TOKENS_PER_BATCH, Estimator, LikelihoodOptions
from megatron_dlm.evaluation.progress import Finished, collect, with_bar
from megatron_dlm.evaluation.rolling import totals, windows_of
from megatron_dlm.evaluation.scoring import encode_pair, score
from megatron_dlm.generation.text_model import TextModel, open_text_model
from megatron_dlm.shipped.sampler_plan import SamplerOptions

_NEW_TOKENS = 256
# Names that lm-eval's tasks use for the number of new tokens, the first that is there.
_NEW_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Of bootstrapped standard errors, which lm-eval makes of 100,000 resamplings; of means it has formulas.
_BOOTSTRAP = 1000


@register_model("megatron_dlm")
class MegatronDLM(LM):
    """A run, a checkpoint or a Hugging Face directory as lm-eval's model.

    Requests go through the model as ``scoring.score`` batches them, so there is no batch size. At a parallel layout
    every rank makes the same calls, as one process in lm-eval's eyes.
    """

    def __init__(
        self,
        checkpoint: str | TextModel,
        *,
        masks: int = DEFAULT_MASKS,
        estimator: Estimator = "exact_count",
        guidance: float = 0.0,
        seed: int = 0,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        greedy: bool | None = None,
    ) -> None:
        """
        Args:
            checkpoint: a directory, or the model itself.
            masks, estimator, guidance, seed, tokens_per_batch: see ``LikelihoodOptions``.
            greedy: whether a masked diffusion model looks for the greedy continuation, which takes a forward for each
                of its tokens; False says that no continuation is. None: only where a document has one request, as
                "is the last word right?" has; the accuracy of multiple choice does not ask for it.

        Raises:
            ConfigError: there is no model, or an option is out of range; one line.
        """
        super().__init__()
        self.model = checkpoint if isinstance(checkpoint, TextModel) else open_text_model(checkpoint)
        self.greedy = greedy
        self.truncated = 0
        """Requests so far whose context has lost its beginning."""
        self.asked = False
        """lm-eval has loaded its tasks and begun."""
        try:
            self.options = LikelihoodOptions(estimator, masks, guidance, seed, tokens_per_batch)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return self.model.tokenizer.fingerprint

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether greedy decoding gives it) of (context, continuation).

        The options of a document share their random numbers. Raises ``DataError``, one line.
        """
        self.asked = True
        single = Counter((request.task_name, request.doc_id) for request in requests)
        found: dict[int, tuple[float, bool]] = {}
        wanted: dict[bool, dict[int, Request]] = {True: {}, False: {}}
        for index, request in enumerate(requests):
            context, continuation = request.args
            if not continuation:
                found[index] = (0.0, True)
                continue
            alone = single[request.task_name, request.doc_id] == request.repeats or request.doc_id is None
            greedy = alone if self.greedy is None else self.greedy
            try:
                pair = encode_pair(self.model.tokenizer, context, continuation, self.model.max_length)
            except ValueError as error:
                raise DataError(f"{request.task_name}, document {request.doc_id}: {error}") from None
            self.truncated += pair.truncated
            wanted[greedy][index] = Request(pair.context, pair.target, _group(request, index))
        for greedy, some in wanted.items():
            results = self._score(list(some.values()), greedy, "likelihoods", disable_tqdm)
            for index, result in zip(some, results, strict=True):
                found[index] = (result.value, bool(result.is_greedy))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood", request.args, found[index])
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats; see ``rolling`` for longer ones."""
        self.asked = True
        texts = [self.model.tokenizer.encode(request.args[0]) for request in requests]
        groups = [_group(request, index) for index, request in enumerate(requests)]
        windows = windows_of(texts, max_length=self.model.max_length, groups=groups)
        scored = self._score([window for text in windows for window in text], False, "texts", disable_tqdm)
        values = [total.value for total in totals(windows, scored)]
        for request, value in zip(requests, values, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return values

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, up to the first of the texts in ``until`` or the end of the document.

        New tokens are at most half of the model's length, and prompts lose their beginnings where both do not fit.
        Masked diffusion models write block by block, one token a forward.
        """
        self.asked = True
        texts: dict[int, str] = {}
        for part in with_bar(self._generate(requests), "generating", hidden=disable_tqdm):
            texts |= part.results
            for index, text in part.results.items():
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [texts[index] for index in range(len(requests))]

    def _generate(self, requests: list[Instance]) -> Iterator[Finished[str]]:
        """Texts by index of the request; those with equal settings are written together, the longest prompts first."""
        model, done = self.model, 0
        together: dict[tuple[int, float, float], list[int]] = {}
        for index, request in enumerate(requests):
            together.setdefault(_generation(request.args[1], model.max_length), []).append(index)
        for (new, temperature, top_p), indices in together.items():
            options = SamplerOptions(temperature=temperature, top_p=top_p, seed=self.options.seed % 2**32)
            if not model.kind.causal:
                options = replace(options, guidance=self.options.guidance)
            options = model.in_blocks(options, new)
            prompts = {index: model.tokenizer.encode(requests[index].args[0]) for index in indices}
            room = model.max_length - new
            self.truncated += sum(len(prompt) > room for prompt in prompts.values())
            rows = max(self.options.tokens_per_batch // model.max_length, 1)
            order = sorted(indices, key=lambda index: len(prompts[index]), reverse=True)
            for batch in (order[start : start + rows] for start in range(0, len(order), rows)):
                cut = [prompts[index][max(len(prompts[index]) - room, 0) :] for index in batch]
                samples = model.generate(cut, options, max_new_tokens=new)
                texts = {
                    index: _before(model.tokenizer.decode(row), requests[index].args[1].get("until"))
                    for index, row in zip(batch, samples.continuations, strict=True)
                }
                done += len(batch)
                yield Finished(texts, done / len(requests))

    def _score(self, requests: Sequence[Request], greedy: bool, what: str, disable_tqdm: bool) -> list[LogLikelihood]:
        return collect(with_bar(score(self.model, requests, self.options, greedy=greedy), what, hidden=disable_tqdm))


def run_lm_eval(
    model: TextModel,
    names: Sequence[str],
    options: LikelihoodOptions,
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    log_questions: bool = False,
) -> dict[str, dict[str, Any]]:
    """The results of lm-eval's tasks by name, for JSON; groups stand beside their members. Collective.

    Args:
        options: of likelihoods.
        include_path: a folder with YAML files of further tasks.
        limit: documents of every task.
        num_fewshot: None: what the task says.
        log_questions: have lm-eval's record of every document in the results.

    Returns:
        metrics: each beside its standard error; questions; truncated: requests of all tasks together that have lost
        their beginnings; version and num_fewshot of the task. Empty but on the first rank.

    Raises:
        ConfigError: there is no such task, or lm-eval cannot load it; one line.
    """
    manager = _task_manager(names, include_path)
    values = {name: getattr(options, name) for name in ("masks", "estimator", "guidance", "seed", "tokens_per_batch")}
    language_model = MegatronDLM(model, **values)
    try:
        with _undescribed():
            found = simple_evaluate(
                model=language_model,
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=log_questions,
            )
    except (ConfigError, DataError):
        raise
    except Exception as error:  # data sets that are not there raise nearly anything
        if language_model.asked:
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"lm-eval cannot load {', '.join(names)}: {reason}; check its data and --include-path"
        ) from None
    results = {} if found is None else found["results"]
    return {name: _result(name, found, language_model.truncated) for name in results}


@contextlib.contextmanager
def _undescribed() -> Iterator[None]:
    """Keep lm-eval from describing the machine and the git repository, of which nothing is kept here.

    Outside a repository git's error would be printed, and the description of the machine takes a second.
    """
    with contextlib.ExitStack() as stack:
        for name in ("get_git_commit_hash", "add_env_info"):
            stack.enter_context(mock.patch.object(evaluator, name, lambda *_: None, create=True))
        yield


def _task_manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """One that knows the tasks. Looking through lm-eval's own 14,000 takes many seconds, so they come last."""
    known: list[str] = []
    for defaults in (False, True) if include_path else (True,):
        if include_path and not os.path.isdir(include_path):
            raise ConfigError(f"{include_path} is no folder; give one with the YAML files of tasks as --include-path")
        try:
            manager = TaskManager(include_path=include_path, include_defaults=defaults)
        except Exception as error:  # YAML files that are none
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(f"lm-eval cannot read the tasks in {include_path}: {reason}; correct them") from None
        known = list(manager.all_tasks)
        if set(names) <= set(known):
            return manager
    missing = [name for name in names if name not in known]
    raise ConfigError(f"lm-eval has no task {missing[0]!r}; see lm-eval ls tasks, or give --include-path")


def _result(name: str, found: dict[str, Any], truncated: int) -> dict[str, Any]:
    """What lm-eval says of one task or group. Its keys are ``acc,none``: a metric and the filter of the outputs."""
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, chosen = key.partition(",")
        if not chosen or isinstance(value, bool):
            continue
        number = value if isinstance(value, int | float) and value - value == 0 else None
        metrics[metric if chosen == "none" else f"{metric}/{chosen}"] = number
    result = {
        "metrics": metrics,
        "questions": found.get("n-samples", {}).get(name, {}).get("effective"),
        "truncated": truncated,
        "num_fewshot": found.get("n-shot", {}).get(name),
        "version": found.get("versions", {}).get(name),
        "settings": {key: found["config"].get(key) for key in ("fewshot_seed", "bootstrap_iters", "limit")},
    }
    if "samples" in found and name in found["samples"]:
        result["log"] = found["samples"][name]
    return json.loads(json.dumps(result, default=str))


def _group(request: Instance, index: int) -> int:
    """What names the random numbers: the document, as the index of a question does in our own tasks."""
    return index if request.doc_id is None else request.doc_id


def _generation(settings: dict[str, Any], max_length: int) -> tuple[int, float, float]:
    """New tokens, temperature and top-p."""
    given = next((settings[key] for key in _NEW_TOKENS_KEYS if settings.get(key)), _NEW_TOKENS)
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
    return max(min(int(given), max_length // 2), 1), temperature, float(settings.get("top_p") or 1.0)


def _before(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to the first place where one of the stops begins."""
    stops = [until] if isinstance(until, str) else until or []
    return text[: min([text.find(stop) for stop in stops if stop and stop in text], default=len(text))]
