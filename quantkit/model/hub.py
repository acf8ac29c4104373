"""Fetching a model of the Hugging Face Hub into huggingface_hub's own cache.

It is done in two steps: first the small files, so that a model that quantkit cannot treat is refused before
gigabytes arrive, then the safetensors that the index names and nothing else. Code and pickled weights are
never fetched. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE keep their meaning.
"""

import errno
import logging
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from threading import Thread

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from quantkit.errors import ModelError, NetworkError, OutputError, QuantkitError, nearest
from quantkit.untrusted import parse_json, read_document

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SMALL_FILES = [
    *("config.json", "generation_config.json", _INDEX),
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json"),
    *("resilience/bounds.safetensors", "resilience/scales.safetensors"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),  # most licences ask that a derived model carries them
]
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_OTHER_WEIGHTS = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")
_NEVER = [f"*{suffix}" for suffix in (*_PICKLES, ".py")]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_FULL = (errno.ENOSPC, errno.EDQUOT)

_log = logging.getLogger(__name__)


def fetch(repository: str, revision: str, *, weights: bool, known: Collection[str] = ()) -> Path:
    """Return the directory of a snapshot that is complete, but for the weights if `weights` is False.

    The directory's name is the commit that `revision` stands for. A commit that the cache holds needs no
    network; a branch does, but when the Hub cannot be reached the branch's cached commit is taken, with a
    warning. `known` are the names that a message about a misspelt repository chooses from.

    Raises:
        ModelError: no such repository or revision; no access to it; no config.json or no safetensors.
        NetworkError: the Hub cannot be reached and the cache does not hold the snapshot.
        OutputError: the cache cannot be written.
    """
    cached = _cached(repository, revision, weights=weights)
    if cached is not None and _COMMIT.fullmatch(revision):
        return cached
    with _one_line_errors(repository, revision, known):
        try:
            names = _file_names(repository, revision)
        except Exception as error:
            if cached is None or not _is_silence(error):
                raise
            if not constants.HF_HUB_OFFLINE:
                _log.warning("%s cannot be reached; using the cached commit %s", constants.ENDPOINT, cached.name)
            return cached
        _refuse_unreadable(repository, revision, names)
        path = _download(repository, revision, _SMALL_FILES)
        if weights:
            wanted = _weight_files(path)
            if missing := sorted(set(wanted) - names):
                raise ModelError(f"{repository} lacks {missing[0]}, which its index names; try another --revision")
            _download(repository, path.name, wanted)
    return path


def _cached(repository: str, revision: str, *, weights: bool) -> Path | None:
    """Return the cached snapshot if it is complete."""
    try:
        with _one_line_errors(repository, revision):
            path = _download(repository, revision, _SMALL_FILES, offline=True)
        wanted = ["config.json", *(_weight_files(path) if weights else ())]
    except QuantkitError:
        return None  # what is wrong is found out, and said, when the Hub is asked
    return path if all((path / name).is_file() for name in wanted) else None


def _download(repository: str, revision: str, names: list[str], *, offline: bool = False) -> Path:
    with _quiet_unless_terminal():
        path = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=names,
            ignore_patterns=_NEVER,
            local_files_only=offline,
        )
    return Path(path)


def _file_names(repository: str, revision: str) -> set[str]:
    """Return the names of the repository's files, or fail soon.

    This request comes first on purpose: huggingface_hub's own first one has no time limit, and a limit of the
    HTTP library holds for each address of a host and each request, and not for looking the host up. Behind a
    firewall that swallows packets that makes minutes, so the whole of it gets a thread and a deadline.
    """
    patience = 1.2 * constants.HF_HUB_ETAG_TIMEOUT
    answer: SimpleQueue[set[str] | Exception] = SimpleQueue()

    def ask() -> None:
        try:
            info = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=patience)
            answer.put({sibling.rfilename for sibling in info.siblings or ()})
        except Exception as error:  # noqa: BLE001  it is raised again below
            answer.put(error)

    Thread(target=ask, daemon=True).start()  # a daemon: exiting does not wait for it
    try:
        names = answer.get(timeout=patience)
    except Empty:
        raise TimeoutError(f"no answer within {patience:.0f} s") from None
    if isinstance(names, Exception):
        raise names
    return names


def _refuse_unreadable(repository: str, revision: str, names: set[str]) -> None:
    where = f"{repository} (revision {revision})"
    if "config.json" not in names:
        raise ModelError(f"{where} has no config.json, so it is no transformers model; name the original")
    if names & {_INDEX, _SINGLE}:
        return
    if pickles := sorted(name for name in names if PurePosixPath(name).suffix in _PICKLES):
        raise ModelError(
            f"{where} offers its weights only as pickles ({pickles[0]}), which can run code when opened; "
            "look among the pull requests on the model's page for a safetensors conversion and pass "
            "--revision refs/pr/N, or convert it with https://huggingface.co/spaces/safetensors/convert"
        )
    others = sorted(name for name in names if PurePosixPath(name).suffix in _OTHER_WEIGHTS)
    found = f"only {others[0]}" if others else "nor any other weights"
    raise ModelError(f"{where} has no {_SINGLE}, {found}; name the model it was made from")


def _weight_files(directory: Path) -> list[str]:
    """Return the names of the weight files: those of the index, and without an index the single file."""
    index = directory / _INDEX
    if not index.is_file():
        return [_SINGLE]
    try:
        names = sorted(set(parse_json(read_document(index))["weight_map"].values()))
        plain = all(_SHARD.fullmatch(name) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of safetensors; delete it to fetch it again") from error
    if not names or not plain:
        raise ModelError(f"{index} names files that are not safetensors beside it; try another --revision")
    return names


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Switch off the progress bars unless somebody watches, or HF_HUB_DISABLE_PROGRESS_BARS decides."""
    decided = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    if decided or are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _is_silence(error: Exception) -> bool:
    """Return whether the Hub gave no answer, as opposed to a refusal."""
    if isinstance(error, hub_errors.HfHubHTTPError):
        return error.response.status_code >= 500
    # the HTTP library differs between releases of huggingface_hub; a subclass leads to its base error
    return isinstance(error, TimeoutError | hub_errors.OfflineModeIsEnabled | hub_errors.HfHubHTTPError.__bases__[0])


@contextmanager
def _one_line_errors(repository: str, revision: str, known: Collection[str] = ()) -> Iterator[None]:
    """Turn whatever leaves huggingface_hub into one of quantkit's errors."""
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, hub_errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__  # the wrapper says "not found", its cause says why
        raise _explained(cause, repository, revision, known) from error


def _explained(error: BaseException, repository: str, revision: str, known: Collection[str]) -> QuantkitError:
    if isinstance(error, hub_errors.HfHubHTTPError):
        return _explained_answer(error, repository, revision, known)
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, hub_errors.HFValidationError):
        return ModelError(f"{repository} cannot be the name of a model of the Hub: {reason}")
    number, cache = error.errno if isinstance(error, OSError) else None, constants.HF_HUB_CACHE
    if number in _FULL or "No space left" in reason:  # of hf_xet's errors only the text tells
        return OutputError(f"no space is left for {cache}; make room, or set HF_HOME to a larger disk")
    if number is not None:  # the HTTP library wraps the network's numbers, so this one is of the disk
        return OutputError(f"cannot write to {cache} ({reason}); set HF_HOME to a directory that can be written")
    if constants.HF_HUB_OFFLINE:
        return NetworkError(
            f"{repository} (revision {revision}) is not complete in {cache} and HF_HUB_OFFLINE is set; "
            "unset HF_HUB_OFFLINE, or pass a local directory"
        )
    return NetworkError(
        f"cannot fetch {repository} from {constants.ENDPOINT} ({reason}); check the connection, "
        "set HF_ENDPOINT to a mirror, or pass a local directory"
    )


def _explained_answer(
    error: hub_errors.HfHubHTTPError, repository: str, revision: str, known: Collection[str]
) -> QuantkitError:
    page, status = f"{constants.ENDPOINT}/{repository}", error.response.status_code
    if isinstance(error, hub_errors.GatedRepoError):
        return ModelError(
            f"{repository} is gated; accept its licence on {page}, then set HF_TOKEN or run `hf auth login`"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return ModelError(f"{repository} has no revision {revision}; see {page}/commits, or leave out --revision")
    if isinstance(error, hub_errors.RepositoryNotFoundError) or status == 404:
        near = nearest(repository.split("/")[-1].lower(), known)
        near = near if "did you mean" in near else ""  # a list of all aliases would not help here
        return ModelError(
            f"{constants.ENDPOINT} has no model {repository}{near}; check the name, and for a private model "
            "set HF_TOKEN or run `hf auth login`"
        )
    if status in (401, 403):
        return ModelError(f"{page} denies access ({status}); check HF_TOKEN, or run `hf auth login` again")
    return NetworkError(f"{page} answers with error {status}; try again later, or set HF_ENDPOINT to a mirror")
