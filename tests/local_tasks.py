"""A small task of lm-eval with its data, for tests: no network, no shared folder."""

import json
import random
from pathlib import Path

WORDS = ["river", "stone", "king", "forest", "castle", "night", "song", "letter", "ship", "queen", "garden", "tower"]

CHOOSE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
COMPLETE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: loglikelihood
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{choices[0]}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}, {{metric: acc}}]
"""
CONTINUE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def documents(count=24, seed=0):
    """Return questions with three answers of several lengths, one of them right by chance."""
    draw = random.Random(seed)

    def phrase(most):
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    return [
        {"question": phrase(8), "choices": [phrase(4) for _ in range(3)], "answer": draw.randrange(3)}
        for _ in range(count)
    ]


def write_task(folder: Path, name: str = "pick", template: str = CHOOSE, rows=None) -> Path:
    """Write a task and its data into `folder`, which is returned."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, documents() if rows is None else rows)), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(template.format(name=name, data=data), encoding="utf-8")
    return folder
