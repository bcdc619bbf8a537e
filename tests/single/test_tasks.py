"""Task files in their published layouts: what becomes of them, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from megatron_dlm.config.tree import TaskConfig
from megatron_dlm.errors import ConfigError, DataError
from megatron_dlm.evaluation.tasks import TASKS, load_task
from tests.questions import hellaswag, mmlu, write

HELLASWAG = {
    "activity_label": "Making tea",
    "ctx_a": "[header] How to make tea [title] Boil  the water.",
    "ctx_b": "then the COOK",
    "endings": ["waits. [step] A while", " sings", "c", "d"],
    "label": "2",
    "ctx": "not read",
}
ARC = {
    "id": "x",
    "question": "What is wet?",
    "choices": {"text": ["fire", "water", "sand"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
PIQA = {"goal": "Open a door", "sol1": "push it", "sol2": "eat it", "label": 0}
EXAMPLES: dict[str, dict[str, Any]] = {
    "hellaswag": HELLASWAG,
    "mmlu": mmlu(1)[0],
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "piqa": PIQA,
    "lambada": {"text": "they drank it"},
}


def load(path: Path, name: str, row: dict[str, Any]) -> Any:
    (question,) = load_task(name, write(path / "file.jsonl", [row])).questions
    return question


def test_prompts(tmp_path: Path) -> None:
    question = load(tmp_path, "hellaswag", HELLASWAG)
    assert question.context == "Making tea: How to make tea. Boil the water. Then the cook"
    assert question.options == ("waits. A while", "sings", "c", "d") and question.answer == 2
    for name in ("arc_easy", "arc_challenge"):
        question = load(tmp_path, name, ARC)
        assert question[:3] == ("Question: What is wet?\nAnswer:", ("fire", "water", "sand"), 1)
    assert load(tmp_path, "piqa", PIQA)[:3] == ("Question: Open a door\nAnswer:", ("push it", "eat it"), 0)
    assert load(tmp_path, "lambada", {"text": "it was late\n"})[:3] == ("it was", ("late",), 0)
    row = {"question": " Who? ", "choices": ["w", "x", "", "z"], "answer": 3, "subject": "high_school_art"}
    question = load(tmp_path, "mmlu", row)
    introduction = "The following are multiple choice questions (with answers) about high school art.\n\n"
    assert question.context == introduction + "Who?\nA. w\nB. x\nC. \nD. z\nAnswer:"
    assert question.options == ("A", "B", "C", "D") and question.answer == 3 and question.subject == "high_school_art"


def test_the_prompts_are_those_of_lm_eval(tmp_path: Path) -> None:
    """Of the one task whose preprocessing is code: on texts with every mark that it treats."""
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    from lm_eval.tasks.hellaswag.utils import process_docs

    rows = hellaswag(5) + [{key: value for key, value in HELLASWAG.items() if key != "ctx"}]
    rows.append(
        {**rows[-1], "ctx_a": " [a]  b [title]", "ctx_b": "", "endings": ["  [x] y", "[title] z", "q  r", " s"]}
    )
    task = load_task("hellaswag", write(tmp_path / "h.jsonl", rows))
    theirs = process_docs(datasets.Dataset.from_list(rows))
    found = [(q.context, list(q.options), q.answer) for q in task.questions]
    assert found == [(row["query"], row["choices"], row["gold"]) for row in theirs]


def test_examples_come_first(tmp_path: Path) -> None:
    write(tmp_path / "mmlu.jsonl", mmlu(4))
    dev = mmlu(6, seed=1)
    write(tmp_path / "mmlu_dev.jsonl", dev)
    task = load_task("mmlu", tmp_path, num_fewshot=2)
    assert task.num_fewshot == 2 and [Path(file["path"]).name for file in task.files] == [
        "mmlu.jsonl",
        "mmlu_dev.jsonl",
    ]
    before, after = load_task("mmlu", tmp_path).questions[1], task.questions[1]
    shown = after.context.removeprefix("The following are multiple choice questions (with answers) about lists.\n\n")
    first, second, last = shown.split("\n\n")
    assert first.startswith(dev[1]["question"]) and first.endswith("Answer: " + "ABCD"[dev[1]["answer"]])
    assert second.startswith(dev[3]["question"]) and before.context.endswith(last) and last.endswith("Answer:")
    with pytest.raises(DataError, match=r"line 1: the subject 'high_school_names' has 3 examples, not 4; lower"):
        load_task("mmlu", tmp_path, num_fewshot=4)
    with pytest.raises(DataError, match="is a file; examples need a folder"):
        load_task("mmlu", tmp_path / "mmlu.jsonl", num_fewshot=1)
    with pytest.raises(ConfigError, match="num_fewshot is for mmlu, not for piqa"):
        load_task("piqa", write(tmp_path / "piqa.jsonl", [PIQA]), num_fewshot=1)


@pytest.mark.parametrize("name", TASKS)
def test_files_and_folders(name: str, tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [EXAMPLES[name]] * 3
    expected = [question[:3] for question in load_task(name, write(tmp_path / "a" / f"{name}.jsonl", rows)).questions]
    assert len(expected) == 3
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f"{name}.json.gz").write_bytes(gzip.compress((tmp_path / "a" / f"{name}.jsonl").read_bytes()))
    split = TASKS[name].splits[-1]
    folder = tmp_path / "c" / TASKS[name].names[-1] / "data"
    folder.mkdir(parents=True)
    for number, part in enumerate((rows[:2], rows[2:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"{split}-0000{number}-of-00002.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    for place in ("a", "b", "c"):
        assert [question[:3] for question in load_task(name, tmp_path / place).questions] == expected, place
    assert load_task(name, tmp_path / "c").questions[2].origin.endswith("-00001-of-00002.parquet row 1")
    assert len(load_task(name, tmp_path / "c", limit=2).questions) == 2
    assert [len(file["sha256"]) for file in load_task(name, tmp_path / "c").files] == [64, 64]


def test_a_set_that_is_there_by_subject_too_is_read_once(tmp_path: Path) -> None:
    for subject in ("all", "lists"):
        write(tmp_path / "mmlu" / subject / "test.jsonl", mmlu(2))
    assert len(load_task("mmlu", tmp_path).questions) == 2


def test_the_configuration_knows_the_tasks() -> None:
    assert get_args(get_type_hints(TaskConfig)["name"]) == tuple(TASKS)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hellaswag", {"ctx_a": None}, "'ctx_a' is null, no text; the rows must have ctx_a, ctx_b, activity_label"),
        ("hellaswag", {"label": ""}, "'label' does not say the answer, as in a test split: take the validation split"),
        ("hellaswag", {"label": 4}, "'label' is 4, no number from 0 to 3"),
        ("hellaswag", {"endings": ["a"]}, "'endings' has 1 texts instead of at least 2"),
        ("hellaswag", {"endings": ["a", 2]}, r"'endings[1]' is 2, no text"),
        ("hellaswag", {"endings": ["a", " "]}, r"'endings[1]' is an empty text"),
        ("mmlu", {"choices": ["a", "b"]}, "'choices' has 2 texts instead of 4"),
        ("mmlu", {"answer": "A"}, "'answer' is \"A\", no number from 0 to 3; the rows must have question, choices"),
        ("mmlu", {"answer": True}, "'answer' is true, no number"),
        ("mmlu", {"subject": 3}, "'subject' is 3, no text"),
        ("arc_easy", {"choices": ["a", "b"]}, '\'choices\' is ["a", "b"], no mapping'),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "'choices.label' has 1 texts instead of 2"),
        ("arc_easy", {"answerKey": "E"}, "'answerKey' is 'E', none of the labels 1, 2, 3"),
        ("piqa", {"label": -1}, "'label' does not say the answer"),
        ("piqa", {"goal": "\ud800"}, "no valid Unicode"),
        ("lambada", {"text": "alone"}, "'text' has one word only"),
    ],
)
def test_rows_that_do_not_fit(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "file.jsonl", [EXAMPLES[name], EXAMPLES[name] | change])
    with pytest.raises(DataError) as found:
        load_task(name, path)
    assert str(found.value).startswith(f"{path} line 2: ") and message in str(found.value)
    assert "\n" not in str(found.value)
    missing = {key: value for key, value in EXAMPLES[name].items() if key not in change}
    with pytest.raises(DataError, match=f"line 1: '{next(iter(change))}' is missing .there are: "):
        load_task(name, write(path, [missing]))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.jsonl", b"", "has no rows"),
        ("x.jsonl", b"\n \n", "has no rows"),
        ("x.jsonl", b'\n{"text"', "line 2 is not JSON; give one JSON object in every line"),
        ("x.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("x.jsonl", b"[1]", "line 1: \\[1\\] is no row"),
        ("x.jsonl", b'{"text": "\xff"}', "line 1 is not UTF-8 at byte 10"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a b"}', mtime=0)[:-9], "is damaged; copy it again"),
        ("x.jsonl.gz", b"text", "is damaged; copy it again"),
        ("x.parquet", b"text", "is no readable parquet file"),
    ],
)
def test_files_that_are_damaged(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as found:
        load_task("lambada", tmp_path / file)
    assert "\n" not in str(found.value) and str(tmp_path) in str(found.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist; give the file of the task"):
        load_task("piqa", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no piqa.jsonl or .parquet, and no folder piqa with validation\*"):
        load_task("piqa", tmp_path)
    with pytest.raises(ConfigError, match="'pica' is unknown; choose from hellaswag, mmlu"):
        load_task("pica", tmp_path)
    path = write(tmp_path / "piqa.jsonl", [PIQA])
    with pytest.raises(ConfigError, match="limit is 0; it must be at least 1"):
        load_task("piqa", path, limit=0)
    assert json.loads(path.read_text()) == PIQA
