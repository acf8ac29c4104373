"""Published tasks, described by the files in `tasks/`, against plain transformers and lm-eval's own description."""

import math
import os
from pathlib import Path

import datasets
import pytest
import torch
from lm_eval import tasks as lm_eval_tasks
from lm_eval.tasks._yaml_loader import load_yaml

from quantkit.evaluation import harness
from quantkit.evaluation.loading import load_model

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("QUANTKIT_SHARED", ROOT.parent / "shared"))
FILES = sorted((Path(__file__).parent / "tasks").glob("*.yaml"))
OWN = Path(lm_eval_tasks.__file__).parent
ORIGINALS = {
    "boolq": OWN / "super_glue" / "boolq" / "default.yaml",
    "hellaswag": OWN / "hellaswag" / "hellaswag.yaml",
    "lambada_openai": OWN / "lambada" / "lambada_openai.yaml",
    "piqa": OWN / "piqa" / "piqa.yaml",
    "sst2": OWN / "glue" / "sst2" / "default.yaml",
}
LIMIT = 6


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_prompts_are_those_of_lm_eval(file):
    mine, own = (load_yaml(path, resolve_func=False) for path in (file, ORIGINALS[file.stem]))
    if file.stem == "boolq":  # there the answers are the words False and True
        mine["doc_to_target"] = "label"
    if file.stem == "hellaswag":  # the same function by another path
        assert own["process_docs"].endswith("hellaswag/utils.process_docs")
        assert mine["process_docs"].endswith("lm_eval.tasks.hellaswag.utils.process_docs")
    for key in ("task", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "metadata"):
        assert mine.get(key) == own.get(key)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no {SHARED / 'data'}; set QUANTKIT_SHARED to the folder that holds it")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for file in FILES:
        text = file.read_text(encoding="utf-8").replace("DATA", str(SHARED / "data"))
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def stories():
    if not (SHARED / "models" / "stories15m").is_dir():
        pytest.skip("no stories15m; set QUANTKIT_SHARED to the folder that holds it")
    return load_model(SHARED / "models" / "stories15m", device="cpu")


@torch.no_grad()
def loglikelihood(model, tokenizer, context, continuation):
    whole = tokenizer(context + continuation)["input_ids"][-257:]
    given = len(whole) - (len(tokenizer(context + continuation)["input_ids"]) - len(tokenizer(context)["input_ids"]))
    logits = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
    scored = range(given - 1, len(whole) - 1)
    total = sum(float(logits[i, whole[i + 1]]) for i in scored)
    return total, all(int(logits[i].argmax()) == whole[i + 1] for i in scored)


def answers(task, stories):
    """Return per document of lm-eval's task whether the likeliest choice is right, by plain transformers."""
    right = []
    for doc in list(task.eval_docs)[:LIMIT]:
        context = task.doc_to_text(doc)
        found = [loglikelihood(*stories, context, f" {choice}")[0] for choice in task.doc_to_choice(doc)]
        right.append(found.index(max(found)) == int(task.doc_to_target(doc)))
    return tuple(right)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["boolq", pytest.param("hellaswag", marks=pytest.mark.slow), "piqa", "sst2"])
def test_choices_agree_with_plain_transformers(stories, folder, name):
    tasks = harness.find_tasks([name], include_path=folder)
    (score,) = [score for score in harness.run(*stories, tasks, limit=LIMIT).scores if score.metric == "acc"]
    assert score.right == answers(tasks["tasks"][name], stories)


@pytest.mark.shared
def test_lambada_agrees_with_plain_transformers(stories, folder):
    result = harness.run(*stories, harness.find_tasks(["lambada_openai"], include_path=folder), limit=LIMIT)
    scores = {score.metric: score for score in result.scores}
    docs = datasets.load_dataset("json", data_files=str(SHARED / "data" / "lambada" / "lambada_test.jsonl"))["train"]
    found = []
    for text in docs["text"][:LIMIT]:
        context, _, last = text.rpartition(" ")
        found.append(loglikelihood(*stories, context, f" {last}"))
    expected = math.exp(-sum(total for total, _ in found) / LIMIT)
    assert scores["perplexity"].value == pytest.approx(expected, rel=1e-4)
    assert scores["acc"].right == tuple(greedy for _, greedy in found)
