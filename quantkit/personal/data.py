"""Examples to learn from: rows of a file become tokens, of which some are scored.

A row is one of

    text                 every token is scored but the first
    prompt, answer       the answer's tokens are scored, and the end of the text behind them
    messages             a conversation [{role, content}, …] through the tokenizer's chat template; what the assistant
                         says last is scored
    sentence, label      the template with the sentence in it, behind which the word of the label is scored

The first of these whose columns a file has is taken.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import DataError, UsageError, nearest
from quantkit.personal.protocols import Batch
from quantkit.untrusted import is_file

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
KINDS = (("messages",), ("prompt", "answer"), ("sentence", "label"), ("text",))
SCORES = ("answer", "all")
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its tokens, from which of them on they are scored, and the number of its label."""

    tokens: tuple[int, ...]
    scored: int
    label: int | None = None


@dataclass(frozen=True, kw_only=True)
class Form:
    """How rows become examples.

    Attributes:
        length: the most tokens of an example.
        score: answer, or all tokens.
        template: what stands around a sentence, `{sentence}` being its place, or the place of any other column.
        words: the word of each label, by what the column `label` says; it must be one token behind the template.
        cut: cut examples that are longer than `length` instead of refusing them: texts lose their end, prompts their
            beginning, answers and labels nothing.
        columns: other names of columns, by the names above.
    """

    length: int
    score: str = "answer"
    template: str = "{sentence}"
    words: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UsageError(f"cannot score {self.score!r}{nearest(self.score, SCORES)}")
        if self.length < 2:
            raise UsageError(f"examples of {self.length} tokens predict nothing; use at least 2")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl, .json, .csv, .tsv or .parquet file.

    Raises:
        DataError: there is no such file, it cannot be read, or it has no rows.
    """
    if not is_file(path):
        raise DataError(f"there is no file {path}; give a {', '.join(READERS)} file of examples")
    if path.suffix not in READERS:
        raise DataError(f"{path} is no {', '.join(READERS)} file; save the examples as one of these")
    from datasets import Dataset  # here: it takes seconds to import

    read = getattr(Dataset, f"from_{READERS[path.suffix]}")
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as cache:
            rows: list[dict[str, Any]] = list(read(str(path), cache_dir=cache, keep_in_memory=True, **options))
    except Exception as error:  # datasets wraps whatever its readers raise
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} cannot be read as {READERS[path.suffix]}: {reason}; correct the file") from error
    if not rows:
        raise DataError(f"{path} has no examples; give a file with at least two")
    return rows


def examples(rows: Sequence[Row], tokenizer: Any, form: Form, where: object = "the data") -> list[Example]:  # noqa: ANN401
    """Return the rows as examples, in order.

    Raises:
        DataError: columns that are missing, a value that is no text, a label without a word or whose word is several
            tokens, an example that is too long or has nothing to predict; the message names the row.
    """
    kind = _kind(rows, form, where)
    codes = word_tokens(form, tokenizer) if kind == ("sentence", "label") else {}
    return list(_examples(rows, tokenizer, form, kind, codes, where))


def split(items: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Return examples to train on and examples to validate with, drawn at random; `share` of them are the latter.

    Raises:
        DataError: one of the two would be empty, and a share was asked for.
    """
    if not 0 <= share < 1:
        raise UsageError(f"validation must be a share from 0 to below 1, not {share:g}")
    count = round(share * len(items))
    if share and not 0 < count < len(items):
        raise DataError(
            f"{len(items)} examples cannot be divided so that {share:g} of them are for validation; one part would be "
            "empty; give more examples or another --validation"
        )
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[i] for i in sorted(order[count:])], [items[i] for i in sorted(order[:count])]


def batch(items: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Return the examples as one batch, padded on the right."""
    length = max(len(item.tokens) for item in items)
    tokens, attention = torch.zeros(len(items), length, dtype=torch.int64), torch.zeros(len(items), length).bool()
    scored = attention.clone()
    for row, item in enumerate(items):
        count = len(item.tokens)
        tokens[row, :count] = torch.tensor(item.tokens)
        attention[row, :count] = True
        scored[row, item.scored : count] = True
    labels: Tensor | None = None
    if items[0].label is not None:
        labels = torch.tensor([-1 if item.label is None else item.label for item in items], device=device)
    return Batch(tokens=tokens.to(device), attention=attention.to(device), scored=scored.to(device), label=labels)


def _kind(rows: Sequence[Row], form: Form, where: object) -> tuple[str, ...]:
    have = set(rows[0])
    for new in form.columns.values():
        if new not in have:
            raise DataError(f"{where} has no column {new!r}{nearest(new, have)}")
    for kind in KINDS:
        if {form.columns.get(name, name) for name in kind} <= have:
            return kind
    wanted = " or ".join("+".join(kind) for kind in KINDS)
    raise DataError(f"{where} has the columns {', '.join(sorted(have))}; needed are {wanted}; rename them, or --column")


def word_tokens(form: Form, tokenizer: Any) -> dict[str, int]:  # noqa: ANN401
    """Return the token of each label's word.

    Raises:
        UsageError: there are no words, one is several tokens, or two are the same.
    """
    if len(form.words) < 2:
        raise UsageError("labels need words; give one for each, such as --word 0=terrible --word 1=great")
    found = {}
    for label, word in form.words.items():
        tokens = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(tokens) != 1:
            raise UsageError(
                f"the word {word!r} of label {label!r} is {len(tokens)} tokens; choose one that is a single token "
                "(most begin with a space)"
            )
        found[label] = tokens[0]
    if len(set(found.values())) < len(found):
        raise UsageError("two labels have the same word; give each its own")
    return found


def _examples(
    rows: Sequence[Row],
    tokenizer: Any,  # noqa: ANN401
    form: Form,
    kind: tuple[str, ...],
    codes: Mapping[str, int],
    where: object,
) -> Iterator[Example]:
    names = {name: form.columns.get(name, name) for name in kind}
    make = {"messages": _of_messages, "prompt": _of_answer, "sentence": _of_label, "text": _of_text}[kind[0]]
    for number, row in enumerate(rows, start=1):
        try:
            made = make({**row, **{name: row[own] for name, own in names.items()}}, tokenizer, form, codes)
            yield _fitted(made, form, fixed=kind != ("text",) and form.score == "answer")
        except ValueError as error:
            raise DataError(f"row {number} of {where} {error}") from error


def _of_text(row: Row, tokenizer: Any, form: Form, codes: object) -> Example:  # noqa: ANN401, ARG001
    return Example(tuple(tokenizer(_text(row, "text"), verbose=False)["input_ids"]), 1)


def _of_answer(row: Row, tokenizer: Any, form: Form, codes: object) -> Example:  # noqa: ANN401, ARG001
    prompt, answer = _text(row, "prompt"), _text(row, "answer")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    before = _opened(tokenizer, prompt)
    after = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    if not after:
        raise ValueError("has an empty answer; leave it out")
    return Example((*before, *after, *end), max(1, len(before)) if form.score == "answer" else 1)


def _of_label(row: Row, tokenizer: Any, form: Form, codes: Mapping[str, int]) -> Example:  # noqa: ANN401
    label = str(row["label"])
    if label not in codes:
        raise ValueError(f"has the label {label!r}, which has no word; give --word {label}=WORD")
    try:
        text = form.template.format_map(row)
    except (KeyError, IndexError, AttributeError) as error:
        raise UsageError(f"the template {form.template!r} asks for a column that is not there: {error}") from error
    _text(row, "sentence")
    before = _opened(tokenizer, text)
    return Example((*before, codes[label]), len(before), list(codes).index(label))


def _of_messages(row: Row, tokenizer: Any, form: Form, codes: object) -> Example:  # noqa: ANN401, ARG001
    messages = row["messages"]
    said = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages)
    if not said or not messages or messages[-1]["role"] != "assistant":
        raise ValueError("has no messages of the form [{role, content}, …] that end with the assistant's")
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template for `messages`; give prompt and answer instead")
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        opening = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template's author may raise what he likes
        raise ValueError(f"does not fit the chat template: {error}") from error
    before = tokenizer(opening, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    if not whole.startswith(opening) or tokens[: len(before)] != before:
        raise ValueError("has an answer that the chat template does not put behind the rest; give prompt and answer")
    return Example(tuple(tokens), max(1, len(before)) if form.score == "answer" else 1)


def _opened(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401
    """Return the tokens of a text that goes on: special ones before it (BOS), none behind it."""
    tokens: list[int] = tokenizer(text, verbose=False)["input_ids"]
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = next((i for i in range(len(tokens) - len(plain) + 1) if tokens[i : i + len(plain)] == plain), 0)
    return tokens[: start + len(plain)]


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"has no text in {name!r}")
    return value


def _fitted(made: Example, form: Form, *, fixed: bool) -> Example:
    """Return the example, cut if need be.

    Raises:
        ValueError: it is too long to be cut or must not be, or nothing in it can be predicted.
    """
    tokens = made.tokens
    if len(tokens) < 2 or made.scored >= len(tokens):
        raise ValueError("is a single token, which leaves nothing to predict; leave it out")
    if len(tokens) <= form.length:
        return made
    too_long = f"is {len(tokens)} tokens, more than {form.length}"
    if not form.cut:
        raise ValueError(f"{too_long}; shorten it, raise --seqlen, or cut long ones with --cut")
    if not fixed:
        return Example(tokens[: form.length], made.scored, made.label)
    if (answer := len(tokens) - made.scored) >= form.length:
        raise ValueError(f"has an answer of {answer} tokens, which leaves no room for a prompt in {form.length}")
    gone = len(tokens) - form.length
    return Example(tokens[gone:], made.scored - gone, made.label)
