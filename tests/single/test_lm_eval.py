"""lm-eval asks our models: the same figures as our own tasks, texts, generation, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lm_eval")

from lm_eval import evaluator  # noqa: E402  (what follows needs it)
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from megatron_dlm.cli import main  # noqa: E402
from megatron_dlm.config.kinds import AUTOREGRESSIVE, MASKED_DIFFUSION
from megatron_dlm.data.tokenizer import ByteTokenizer  # noqa: E402
from megatron_dlm.errors import (
    ConfigError,  # noqa: E402
    DataError,  # noqa: E402
)
from megatron_dlm.evaluation.lm_eval_model import MegatronDLM, run_lm_eval  # noqa: E402
from megatron_dlm.evaluation.multiple_choice import answer, encode_task, metrics  # noqa: E402
from megatron_dlm.evaluation.progress import collect
from megatron_dlm.evaluation.tasks import load_task  # noqa: E402
from megatron_dlm.generation.text_model import TextModel  # noqa: E402
from tests.exports import make_checkpoint  # noqa: E402
from tests.questions import hellaswag, rigged, write  # noqa: E402

BYTES = ByteTokenizer()
COMMON = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
ARC = """task: tiny_arc
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
metadata: {version: 3.0}
"""
LAMBADA = """task: tiny_lambada
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
ROLLING = """task: tiny_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATION = """task: tiny_generation
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "ab"
generation_kwargs: {until: ["c"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


class Visible:
    """Its certainty depends on how much it sees, and its favourite byte on the column: a, b, c, a, b, c, ..."""

    def __call__(self, tokens: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        column = torch.arange(tokens.shape[1])
        seen = ((tokens != BYTES.mask_token_id) * (column % 5 + 1)).cumsum(1).double()
        logits = seen.flatten()[rows][:, None] * torch.linspace(-1, 1, 258, dtype=torch.float64) / 30
        logits[torch.arange(len(rows)), 97 + rows % tokens.shape[1] % 3] += 9.0
        return logits


def visible(autoregressive: bool = False) -> TextModel:
    kind = AUTOREGRESSIVE if autoregressive else MASKED_DIFFUSION
    return TextModel(Visible(), BYTES, kind, 64, torch.device("cpu"), "visible")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """YAML files of four tasks with data beside them."""
    rows = [
        {
            "question": " ".join(row["endings"][1:]),
            "choices": {"text": row["endings"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[lengths.index(min(lengths))],  # which sums prefer, and means do not
        }
        for row in hellaswag(10)
        if (lengths := list(map(len, row["endings"])))
    ]
    rows[0]["choices"]["text"][1] = "caf\u00e9 \u00e9\u00e9\u00e9\u00e9"
    texts = [{"text": text} for text in ("a list of it", "the class of names", "abc " * 30)]
    for name, task, content in (
        ("arc_easy", ARC, rows),
        ("lambada", LAMBADA, texts[:2]),
        ("text", ROLLING, texts),
        ("generation", GENERATION, texts),
    ):
        path = write(tmp_path / f"{name}.jsonl", content)
        (tmp_path / f"{name}.yaml").write_text(COMMON.format(data=path) + task)
    return tmp_path


def run(model: TextModel, tasks: Path, *names: str, **keys: Any) -> dict[str, Any]:
    from megatron_dlm.evaluation.likelihood_masks import LikelihoodOptions

    options = LikelihoodOptions(masks=16, seed=3)
    return run_lm_eval(model, names, options, include_path=str(tasks), **keys)


@pytest.mark.parametrize("autoregressive", [False, True])
def test_the_figures_are_those_of_our_own_tasks(autoregressive: bool, tasks: Path) -> None:
    from megatron_dlm.evaluation.likelihood_masks import LikelihoodOptions

    model = visible(autoregressive)
    found = run(model, tasks, "tiny_arc", "tiny_lambada", log_questions=True)
    for name, theirs in (("arc_easy", found["tiny_arc"]), ("lambada", found["tiny_lambada"])):
        task = load_task(name, tasks)
        answers = collect(answer(model, encode_task(task, BYTES, 64), LikelihoodOptions(masks=16, seed=3)))
        ours = metrics(task.questions, answers, task.kind)
        for metric, (value, error) in ours.items():
            assert theirs["metrics"][metric] == pytest.approx(value)
            if metric != "perplexity":  # which lm-eval bootstraps
                assert theirs["metrics"][f"{metric}_stderr"] == pytest.approx(error)
        assert theirs["questions"] == len(task.questions) and theirs["truncated"] == 0
        for record, each in zip(theirs["log"], answers, strict=True):
            values = [float(response[0]) for response in record["filtered_resps"]]
            assert values == pytest.approx(each.values, rel=1e-12), "the same random numbers, too"
    assert found["tiny_arc"]["version"] == 3.0 and found["tiny_arc"]["settings"]["limit"] is None
    figures = found["tiny_arc"]["metrics"]
    assert figures["acc"] != figures["acc_norm"]


def test_it_is_registered(tasks: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        model="megatron_dlm",
        model_args=f"checkpoint={checkpoint},masks=2,guidance=0.5",
        tasks=["tiny_arc"],
        task_manager=manager,
        limit=3,
        bootstrap_iters=0,
    )
    assert found is not None and 0 <= found["results"]["tiny_arc"]["acc,none"] <= 1
    with pytest.raises(ConfigError, match="masks is 0"):
        MegatronDLM(str(checkpoint), masks=0)


def instance(kind: Any, *arguments: Any, doc: int | None = 0) -> Instance:
    return Instance(kind, {}, arguments, 0, ("task", doc, 1))


def test_likelihoods_and_greedy_words() -> None:
    model = MegatronDLM(rigged({"r": 3.0}), masks=8)
    requests = [instance("loglikelihood", "c", text, doc=doc) for doc, text in enumerate(("rr", "rx", "", "r"))]
    found = model.loglikelihood(requests, disable_tqdm=True)
    p = float(torch.tensor([3.0, *[0.0] * 257]).double().log_softmax(0)[0])
    assert [greedy for _, greedy in found] == [True, False, True, True]
    assert [value for value, _ in found][::2] == pytest.approx([2 * p, 0.0]) and found[3][0] == pytest.approx(p)
    choices = [instance("loglikelihood", "c", text) for text in ("rr", "r")]
    assert [greedy for _, greedy in model.loglikelihood(choices)] == [False, False], (
        "nobody asks, and it costs forwards"
    )
    always = MegatronDLM(rigged({"r": 3.0}), masks=8, greedy=True)
    assert [greedy for _, greedy in always.loglikelihood(choices)] == [True, True]
    exact = MegatronDLM(rigged({"r": 3.0}, autoregressive=True))
    assert [greedy for _, greedy in exact.loglikelihood(choices)] == [True, True]
    assert model.truncated == 0
    model.loglikelihood([instance("loglikelihood", "c" * 99, "r")])
    assert model.truncated == 1
    with pytest.raises(DataError, match="task, document 5: 'rrrrr.* has 70 tokens, more than the 64"):
        model.loglikelihood([instance("loglikelihood", "c", "r" * 70, doc=5)])


def test_whole_texts(tasks: Path) -> None:
    uniform = rigged({})
    found = run(uniform, tasks, "tiny_text")["tiny_text"]["metrics"]
    assert found["bits_per_byte"] == pytest.approx(math.log2(258)), "all windows of all texts, each once"
    texts = [instance("loglikelihood_rolling", text, doc=i) for i, text in enumerate(("abc" * 50, "", "b"))]
    values = MegatronDLM(uniform, masks=4).loglikelihood_rolling(texts)
    assert values == pytest.approx([-150 * math.log(258), 0.0, -math.log(258)])


@pytest.mark.parametrize("autoregressive", [False, True])
def test_generation(autoregressive: bool, tasks: Path) -> None:
    model = MegatronDLM(visible(autoregressive))
    settings: dict[str, Any] = {"until": ["zz"], "max_gen_toks": 4, "do_sample": False}
    requests = [
        instance("generate_until", "x" * 9, settings, doc=0),
        instance("generate_until", "x" * 10, settings, doc=1),
        instance("generate_until", "x" * 9, {**settings, "until": "c"}, doc=2),
        instance("generate_until", "x" * 9, {**settings, "until": ["z", "bc", "ca"]}, doc=3),
        instance("generate_until", "x" * 90, {"max_new_tokens": 500}, doc=4),
        instance("generate_until", "x" * 9, {"max_gen_toks": 6, "temperature": 50.0, "do_sample": True}, doc=5),
    ]
    texts = model.generate_until(requests, disable_tqdm=True)
    assert texts[:4] == ["abca", "bcab", "ab", "a"]
    assert texts[4] == ("cab" * 11)[:32] and model.truncated == 1, "half of the model's 64 tokens"
    assert texts[5] != "abcabc" and texts == model.generate_until(requests, disable_tqdm=True)
    found = run(visible(autoregressive), tasks, "tiny_generation")["tiny_generation"]["metrics"]
    assert found["exact_match"] == pytest.approx(2 / 3), "after 12, 18 and 64 - 6 columns: ab, ab, b"


def test_outside_a_git_repository_nothing_is_printed(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tasks)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tasks.parent))
    before = evaluator.get_git_commit_hash
    run(visible(), tasks, "tiny_arc")
    assert "fatal" not in capfd.readouterr().err and evaluator.get_git_commit_hash is before


def test_what_lm_eval_cannot_load(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rigged({})
    known = TaskManager.__init__

    def small(self: TaskManager, include_defaults: bool = True, **keys: Any) -> None:
        known(self, include_defaults=False, **keys)  # not lm-eval's own thousands

    monkeypatch.setattr(TaskManager, "__init__", small)
    with pytest.raises(ConfigError, match="lm-eval has no task 'nothing'; see lm-eval ls tasks"):
        run(model, tasks, "tiny_arc", "nothing")
    with pytest.raises(ConfigError, match="is no folder; give one with the YAML files"):
        run(model, tasks / "arc_easy.yaml", "tiny_arc")
    (tasks / "text.jsonl").unlink()
    with pytest.raises(ConfigError, match="lm-eval cannot load tiny_text: .*; check its data") as found:
        run(model, tasks, "tiny_text")
    assert "\n" not in str(found.value)


def test_the_command(tasks: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint, output = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "out.json"
    names = "arc_easy,lm_eval:tiny_arc,lm_eval:tiny_lambada"
    arguments = ["--data", str(tasks), "--include-path", str(tasks), "--masks", "4", "--limit", "2"]
    common = ["--checkpoint", str(checkpoint), "--output", str(output)]
    assert main(["evaluate", "--tasks", names, *arguments, *common]) == 0
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["arc_easy", "lm_eval:tiny_arc", "lm_eval:tiny_lambada"]
    ours, theirs = (results[name]["metrics"] for name in ("arc_easy", "lm_eval:tiny_arc"))
    assert ours == pytest.approx(theirs) and results["lm_eval:tiny_arc"]["questions"] == 2
    out = capsys.readouterr().out
    assert "lm_eval:tiny_lambada          2  perplexity" in out and f"results  {output}" in out
