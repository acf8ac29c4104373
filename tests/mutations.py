"""Damage: functions of a random generator and a file's bytes, or of a parsed document, that give a damaged one.

`damage(form, data, rng)` picks one, and says in a few words what it did. Everything follows from the generator.
"""

import copy
import io
import json
import math
import random
import struct
import tomllib
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import tomli_w

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**6, 10**9, 10**12, 10**40, 0.5),
    *(1e-308, 1e308, -1e308, math.nan, math.inf, -math.inf),
)
STRINGS = (
    *("", " ", ".", "..", "../secret", "../../etc/passwd", "/etc/passwd", "/dev/zero", "a\0b", "~", "C:\\x", "a/../b"),
    *(
        "\u202e\U0001f600\u00e9",
        "\ud800",
        "\x1b[2J\n\r",
        "NaN",
        "null",
        "None",
        "true",
        "0",
        "-1",
        "%s%n{}",
        "*",
        "[",
        "(",
    ),
    *("auto", "llama", "gpt2", "bert", "qwen3_moe", "eager", "float64", "int4", "x" * 100_000, "\n".join("y" * 200)),
)
DEPTH = 100_000  # deeper than any parser recurses
FORMS = ("json", "jsonl", "toml", "safetensors", "parquet", "text")


def damage(form: str, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return what was done, and the damaged bytes of a file of one of `FORMS`."""
    ways: dict[str, tuple[Callable[..., tuple[str, bytes]], ...]] = {
        "json": (_json, _json, _json, _raw, _nested),
        "jsonl": (_lines, _raw),
        "toml": (_toml, _toml, _toml, _raw),
        "safetensors": (_header, _header, _length, _raw_header, _raw),
        "parquet": (_raw, _columns),
        "text": (_raw,),
    }
    return rng.choice(ways[form])(data, rng)


# --- bytes


def _raw(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage bytes as disks, networks and editors do."""
    way = rng.choice(("flip", "truncate", "delete", "repeat", "swap", "insert", "empty", "mark", "noise"))
    begin = rng.randrange(len(data) + 1)
    end = min(len(data), begin + rng.choice((1, 8, 200, len(data))))
    part = data[begin:end]
    if way == "flip":
        changed = bytearray(data)
        for place in rng.choices(range(len(data)), k=rng.choice((1, 4, 64))):
            changed[place] ^= 1 << rng.randrange(8)
        return way, bytes(changed)
    made = {
        "truncate": data[:begin],
        "delete": data[:begin] + data[end:],
        "repeat": data[:end] + part + data[end:],
        "swap": data[end:] + part + data[:begin],
        "insert": data[:begin]
        + rng.choice((b"\0", b"\xff", b"\n", b'"', b"{", b"]", rng.randbytes(16)))
        + data[begin:],
        "empty": b"",
        "mark": rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"version https://git-lfs\n")) + data,
        "noise": rng.randbytes(rng.choice((1, 100, 10_000))),
    }
    return way, made[way]


def _nested(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Nest brackets deeper than any stack."""
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inner = rng.choice((b"", data)) or b"1"
    return "nest", opening * DEPTH + inner + closing * rng.choice((DEPTH, 0))


# --- documents


def _json(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    document = json.loads(data)
    if rng.random() < 0.1 and document:  # a key twice, which no dictionary can hold
        key, value = rng.choice(list(document)), json.dumps(strange(rng))
        text = json.dumps(document).removeprefix("{")
        return f"{key} twice", f"{{{json.dumps(key)}: {value}, {text}".encode()
    done, document = mutate(document, rng)
    return done, json.dumps(document, ensure_ascii=True).encode()


def _lines(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    done, lines[place] = _json(lines[place], rng)
    return done, b"\n".join(lines)


def _toml(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    done, document = mutate(tomllib.loads(data.decode()), rng)
    try:
        return done, tomli_w.dumps(document).encode()
    except (TypeError, ValueError, AttributeError, RecursionError):  # no TOML can say it
        return _raw(data, rng)


def mutate(document: Any, rng: random.Random) -> tuple[str, Any]:
    """Return what was done, and a copy of the document with one to three places changed."""
    document, done = copy.deepcopy(document), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            return "replace", strange(rng)
        owner, key = rng.choice(places)
        done.append(_change(owner, key, places, rng))
    return ", ".join(done), document


def _places(document: Any) -> Any:
    """Yield (container, key) of everything inside a document."""
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys)[:2000]:
        yield document, key
        yield from _places(document[key])


def _change(owner: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random) -> str:
    way = rng.choice(("delete", "replace", "replace", "replace", "like", "swap", "add", "wrap", "repeat"))
    if way == "delete":
        del owner[key]
    elif way == "replace":
        owner[key] = strange(rng)
    elif way == "like":
        owner[key] = _alike(owner[key], rng)
    elif way == "swap":
        other, place = rng.choice(places)
        owner[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(owner[key])
    elif way == "wrap":
        owner[key] = [owner[key]]
    elif isinstance(owner, dict):
        owner[rng.choice(STRINGS)] = strange(rng) if way == "add" else copy.deepcopy(owner[key])
    else:
        owner.insert(key, strange(rng) if way == "add" else copy.deepcopy(owner[key]))
    return f"{way} {str(key)[:30]!r}"


def _alike(value: Any, rng: random.Random) -> Any:
    """Return a value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, value // 2, 10 * value, *map(int, NUMBERS[:16])))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e30, *NUMBERS))
    if isinstance(value, str):
        return rng.choice((value.upper(), value + value, value[::-1], "../" + value, "/" + value, *STRINGS))
    return type(value)() if isinstance(value, list | dict) else strange(rng)


def strange(rng: random.Random) -> Any:
    """Return a value that nobody expects."""
    kind = rng.randrange(6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(STRINGS)
    deep: Any = rng.choice(NUMBERS)
    for _ in range(50):
        deep = [deep]
    return rng.choice((None, True, False, [], {}, [0] * 10_000, deep, {"a": deep}, [None], [[]], ["a", 1], {"": ""}))


# --- safetensors and parquet


def split(data: bytes) -> tuple[bytes, bytes]:
    """Return header and tensors of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def _joined(header: bytes, rest: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + rest


def _header(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Change what the header says: dtypes, shapes, offsets that overlap, leave gaps or point behind the end."""
    header, rest = split(data)
    document = json.loads(header)
    name = rng.choice([name for name in document if name != "__metadata__"])
    entry = document[name]
    begin, end = entry["data_offsets"]
    ways = {
        "dtype": {"dtype": rng.choice(("F64", "F32", "F16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "", 5))},
        "shape": {
            "shape": rng.choice(([], [0], [-1], entry["shape"][::-1], [2**62, 4], [2**60], [1.5], "1", [10**30]))
        },
        "offsets": {
            "data_offsets": rng.choice(
                ([end, begin], [begin, 2**60], [begin + 2, end + 2], [0, end - begin], [-2, 4], [begin], [2**64, 2**65])
            )
        },
        "both": {"shape": [2**30, 2**30], "data_offsets": [0, 2**61]},
    }
    way = rng.choice((*ways, "document", "drop", "rename", "metadata"))
    if way == "document":
        way, document = mutate(document, rng)
    elif way == "drop":
        del document[name]
    elif way == "rename":
        document[rng.choice(STRINGS)] = document.pop(name)
    elif way == "metadata":
        document["__metadata__"] = strange(rng)
    else:
        entry |= ways[way]
    return f"{way} of {name[:40]}", _joined(json.dumps(document).encode(), rest)


def _length(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    header, rest = split(data)
    claimed = rng.choice((0, 1, 2, len(header) - 1, len(header) + 1, len(data), 10**8, 2**32, 2**60, 2**63, 2**64 - 1))
    return f"length {claimed}", _joined(header, rest, claimed)


def _raw_header(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    header, rest = split(data)
    done, changed = _raw(header, rng)
    return f"{done} in the header", _joined(changed, rest)


def _columns(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return a whole parquet file whose columns are not what they should be."""
    del data
    columns = rng.choice(
        (
            {"text": [1, 2, 3]},
            {"text": [None, "a"]},
            {"text": [["a"], ["b"]]},
            {"text": [b"\xff\xfe", b"a"]},
            {"text": []},
            {"Text": ["a"]},
            {"text": ["", " "]},
            {"text": ["a\0b" * 1000]},
            {"text": [{"text": "a"}]},
        )
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return f"columns {str(columns)[:40]}", buffer.getvalue()
