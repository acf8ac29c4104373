"""Tasks of lm-eval against the same figures from plain transformers, and what is refused before a model is asked."""

import functools
import math
import random
import sys

import datasets
import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from local_tasks import CHOOSE, COMPLETE, CONTINUE, documents, write_task

from quantkit.errors import DataError, NetworkError, UsageError
from quantkit.evaluation import harness
from quantkit.evaluation.loading import load_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu")


@pytest.fixture
def folder(tmp_path):
    for name, template in (("pick", CHOOSE), ("complete", COMPLETE), ("continue", CONTINUE)):
        write_task(tmp_path / "tasks", name, template)
    return tmp_path / "tasks"


@pytest.fixture
def quick_index(monkeypatch):
    """Leave lm-eval's 14 000 names out, which take seconds to index."""
    manager = functools.partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **options: manager(**options | {"include_defaults": False}))


@pytest.fixture
def asked(tiny):
    """The token ids of every batch that the model is asked."""
    batches = []
    hook = tiny[0].register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0]))
    yield batches
    hook.remove()


def scores(tiny, folder, *names, num_fewshot=None, **options):
    tasks = harness.find_tasks(names, include_path=folder, num_fewshot=num_fewshot)
    result = harness.run(*tiny, tasks, **options)
    return {(score.task, score.metric): score for score in result.scores}, result


@torch.no_grad()
def loglikelihood(tiny, context, continuation):
    """Return log p(continuation | context) and whether it is what the model would say, one token at a time."""
    model, tokenizer = tiny
    whole = tokenizer(context + continuation)["input_ids"]
    given = len(tokenizer(context)["input_ids"])
    total, greedy = 0.0, True
    for position in range(given, len(whole)):
        logits = model(torch.tensor([whole[:position]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[whole[position]])
        greedy &= int(logits.argmax()) == whole[position]
    return total, greedy


def test_multiple_choice_is_the_likeliest_answer(tiny, folder):
    rows = documents()
    found, _ = scores(tiny, folder, "pick")
    plain, normalised = [], []
    for row in rows:
        context = f"Question: {row['question']}\nAnswer:"
        likelihoods = [loglikelihood(tiny, context, f" {choice}")[0] for choice in row["choices"]]
        per_letter = [value / len(choice) for value, choice in zip(likelihoods, row["choices"], strict=True)]
        plain.append(likelihoods.index(max(likelihoods)) == row["answer"])
        normalised.append(per_letter.index(max(per_letter)) == row["answer"])
    assert found["pick", "acc"].right == tuple(plain)
    assert found["pick", "acc_norm"].right == tuple(normalised)
    assert found["pick", "acc"].value == sum(plain) / len(rows)
    share, count = found["pick", "acc"].value, len(rows)
    assert found["pick", "acc"].stderr == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))
    assert found["pick", "acc"].samples == count
    assert 0 < sum(plain) < count


def test_completion_is_the_likelihood_of_the_target(tiny, folder):
    expected = [loglikelihood(tiny, row["question"], f" {row['choices'][0]}") for row in documents()]
    found, result = scores(tiny, folder, "complete")
    mean = sum(value for value, _ in expected) / len(expected)
    assert found["complete", "perplexity"].value == pytest.approx(math.exp(-mean), rel=1e-4)
    assert found["complete", "perplexity"].right is None
    assert found["complete", "perplexity"].stderr > 0
    assert found["complete", "acc"].right == tuple(greedy for _, greedy in expected)
    assert result.notes == ()


@torch.no_grad()
def test_generation_is_greedy(tiny, tmp_path):
    model, tokenizer = tiny
    rows = documents(6)
    for row in rows[:4]:
        ids = torch.tensor([tokenizer(row["question"])["input_ids"]])
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        said = tokenizer.decode(ids[0], skip_special_tokens=True)[len(row["question"]) :]
        row["choices"] = [said.split("\n")[0]]
    folder = write_task(tmp_path / "said", "continue", CONTINUE, rows)
    found, _ = scores(tiny, folder, "continue")
    assert found["continue", "exact_match"].right[:4] == (True,) * 4
    assert not any(found["continue", "exact_match"].right[4:])


@pytest.mark.parametrize("batch_size", [1, 7])
def test_does_not_depend_on_the_batch(tiny, folder, batch_size):
    alone, _ = scores(tiny, folder, "complete", batch_size=batch_size)
    found, _ = scores(tiny, folder, "complete")
    perplexity = found["complete", "perplexity"]
    assert alone["complete", "perplexity"].value == pytest.approx(perplexity.value, rel=1e-5)


def test_a_batch_has_so_many_tokens(tiny, folder, asked, monkeypatch):
    monkeypatch.setattr(harness, "BATCH_TOKENS", 64)
    scores(tiny, folder, "pick")
    assert all(batch.numel() <= 64 for batch in asked)
    rows = [len(batch) for batch in asked]
    assert max(rows) > min(rows)


def test_tells_its_progress_and_nothing_else(tiny, folder, capfd):
    seen = []

    def tell(done, total):
        seen.append((done, total))
        sys.stdout.write("told\n")

    capfd.readouterr()
    scores(tiny, folder, "pick", limit=5, progress=tell)
    assert seen == [(done, 15) for done in range(1, 16)]
    out, err = capfd.readouterr()
    assert (out, err) == ("told\n" * 15, "")


def test_a_second_run_is_the_same_and_the_random_state_of_the_process_stays(tiny, folder):
    random.seed(5)
    expected = random.Random(5).random()
    np_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    tasks = harness.find_tasks(["pick", "complete"], include_path=folder, num_fewshot=2)
    first, second = (harness.run(*tiny, tasks) for _ in range(2))
    assert first == second
    assert random.random() == expected
    assert (np.random.get_state()[1] == np_state).all()
    assert torch.get_rng_state().equal(torch_state)


def test_limit_takes_the_first_documents(tiny, folder):
    whole, _ = scores(tiny, folder, "pick")
    found, _ = scores(tiny, folder, "pick", limit=7)
    assert found["pick", "acc"].right == whole["pick", "acc"].right[:7]
    assert found["pick", "acc"].samples == 7


def test_examples_are_in_the_prompt(tiny, folder, asked):
    scores(tiny, folder, "pick", limit=3)
    plain = max(batch.shape[1] for batch in asked)
    found, _ = scores(tiny, folder, "pick", limit=3, num_fewshot=3)
    assert max(batch.shape[1] for batch in asked) > 2 * plain
    assert found["pick", "acc"].num_fewshot == 3


def test_prompts_that_do_not_fit_are_told(tiny, tmp_path):
    rows = documents(3)
    rows[1]["question"] = "river " * 600
    _, result = scores(tiny, write_task(tmp_path / "long", rows=rows), "pick")
    assert result.notes == ("3 prompts were longer than the model's context of 256 tokens and lost their beginning",)


def test_bos_stands_before_every_prompt(tiny, folder, asked):
    scores(tiny, folder, "pick", limit=2, bos=True)
    assert {int(token) for batch in asked for token in batch[:, 0]} == {tiny[1].bos_token_id}


def test_an_unknown_task_is_answered_with_the_nearest(folder, quick_index):
    with pytest.raises(UsageError, match=r"unknown task 'pik' \(did you mean pick\?\)$"):
        harness.find_tasks(["complete", "pik"], include_path=folder)
    with pytest.raises(UsageError, match=r"unknown task 'xyzzy'; `quantkit lm-eval ls tasks` lists all$"):
        harness.find_tasks(["xyzzy"], include_path=folder)


def test_a_glob_names_several(tiny, folder, quick_index):
    found, _ = scores(tiny, folder, "co*", limit=2)
    assert {task for task, _ in found} == {"complete", "continue"}


def test_a_group_has_scores_of_its_own(tiny, folder, quick_index):
    listed = "group: both\ntask: [pick, other]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    write_task(folder, "other", CHOOSE, documents(8, seed=1))
    (folder / "both.yaml").write_text(listed)
    found, _ = scores(tiny, folder, "both")
    parts = [found[name, "acc"] for name in ("pick", "other")]
    assert found["both", "acc"].value == pytest.approx(sum(part.value * part.samples for part in parts) / 32)
    assert found["both", "acc"].right is None


def test_a_task_file_that_cannot_be_read_is_named(folder, quick_index):
    (folder / "broken.yaml").write_text("task: broken\n  - oops: [")
    with pytest.raises(UsageError, match=r"unknown task 'broken'.*broken\.yaml cannot be read"):
        harness.find_tasks(["broken"], include_path=folder)


@pytest.mark.parametrize(("made", "what"), [(False, "is no directory"), (True, "holds no task files")])
def test_a_folder_without_task_files(tmp_path, made, what):
    if made:
        (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=what):
        harness.find_tasks(["pick"], include_path=tmp_path / "empty")


def test_missing_data(folder):
    (folder / "pick.jsonl").unlink()
    with pytest.raises(DataError, match=r"the task pick cannot be set up: Unable to find .*pick\.jsonl"):
        harness.find_tasks(["pick"], include_path=folder)


def test_data_without_the_column(tmp_path):
    folder = write_task(tmp_path / "tasks", rows=[{"question": "why", "choices": ["a", "b"]}])
    with pytest.raises(DataError, match="the task pick has a target that is none of the choices"):
        harness.find_tasks(["pick"], include_path=folder)
    folder = write_task(tmp_path / "tasks", rows=[{"query": "why", "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(DataError, match="the task pick cannot be set up: 'question' is undefined"):
        harness.find_tasks(["pick"], include_path=folder)


def test_documents_without_an_answer_are_told(tiny, tmp_path):
    rows = documents(3)
    rows[2]["answer"] = 7
    _, result = scores(tiny, write_task(tmp_path / "tasks", rows=rows), "pick")
    assert result.notes == ("1 documents have a target that is none of their choices, and count as wrong",)


def test_data_of_the_hub_out_of_reach(folder, monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'nobody/pick' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(NetworkError, match=r"data of the task pick cannot be fetched \(Couldn't reach.*--include-path"):
        harness.find_tasks(["pick"], include_path=folder)


def test_code_of_the_model_is_not_executed(folder):
    with (folder / "pick.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    with pytest.raises(UsageError, match="the task pick executes code that the model writes"):
        harness.find_tasks(["pick"], include_path=folder)


def test_a_task_and_a_group_that_holds_it(folder, quick_index):
    (folder / "group.yaml").write_text("group: all\ntask: [pick]\n")
    with pytest.raises(UsageError, match=r"Duplicate task 'pick'.*; leave one out"):
        harness.find_tasks(["pick", "all"], include_path=folder)


def test_a_context_too_short_for_an_answer(tiny, folder):
    text = (folder / "continue.yaml").read_text().replace("max_gen_toks: 4", "max_gen_toks: 4000")
    (folder / "continue.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"the tasks do not fit the model: .*4000"):
        scores(tiny, folder, "continue", limit=1)


def test_lm_eval_knows_the_model(tiny, folder):
    judged = get_model("quantkit").create_from_arg_obj({"pretrained": "tiny"}, {"batch_size": 4, "device": "cpu"})
    assert isinstance(judged, harness.QuantkitLM)
    pairs = [(judged.tokenizer, tiny[1]), (judged.model, tiny[0])]
    assert all(type(mine) is type(other) for mine, other in pairs)
    plain = get_model("hf")(pretrained=tiny[0], tokenizer=tiny[1], batch_size=4)
    tasks = harness.find_tasks(["pick"], include_path=folder)
    results = [harness.evaluate(model, tasks, limit=4)["results"] for model in (judged, plain)]
    assert results[0] == results[1]


def test_an_argument_without_effect_is_refused():
    with pytest.raises(UsageError, match=r"the model quantkit has no argument 'runtme' \(did you mean runtime"):
        harness.QuantkitLM("tiny", runtme="packed")
    with pytest.raises(UsageError, match="unknown runtime 'fast'"):
        harness.QuantkitLM("tiny", runtime="fast")
