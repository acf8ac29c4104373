"""Strings of the Reber grammar (A. S. Reber, 1967), true ones and false ones, and whether a string is valid.

The grammar is a machine of seven states. A true string starts with B, walks along the arrows and ends with E:

        ┌S┐      X              1 ─T→ 2, 2 ─S→ 2, 2 ─X→ 4
    B→1 T→ 2 ──X→ 4 ──S→ 6 E    1 ─P→ 3, 3 ─T→ 3, 3 ─V→ 5
        P→ 3 ──V→ 5 ──V→        4 ─X→ 3, 4 ─S→ 6, 5 ─P→ 4, 5 ─V→ 6, 6 ─E→ end
        └T┘    P→4
"""

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

Maker = Callable[[str, random.Random], str]

END = 7
ARROWS: dict[int, dict[str, int]] = {
    0: {"B": 1},
    1: {"T": 2, "P": 3},
    2: {"S": 2, "X": 4},
    3: {"T": 3, "V": 5},
    4: {"X": 3, "S": 6},
    5: {"P": 4, "V": 6},
    6: {"E": END},
}


@dataclass(frozen=True)
class Example:
    """A string and whether the grammar makes it."""

    text: str
    valid: bool


def valid(text: str) -> bool:
    """Return whether the grammar makes `text`."""
    state = 0
    for letter in text:
        state = ARROWS.get(state, {}).get(letter, -1)
    return state == END


def examples(count: int, *, seed: int, shortest: int = 10, longest: int = 54) -> list[Example]:
    """Return `count` different strings of `shortest` to `longest` letters in random order, half of them true.

    The false ones are, in equal shares, random letters between B and E, true strings with one letter replaced by
    another one of A to Z, and true strings whose letters between B and E are shuffled. Each has the length of a true
    one, and all start with B and end with E unless that very letter was replaced: neither length nor ends tell.
    """
    chance = random.Random(seed)
    walks = _walks(chance, shortest, longest)
    true = _different(lambda: next(walks), count - count // 2, set())
    makers = (_random_letters, _one_replaced, _shuffled)
    false: list[str] = []
    for number, maker in enumerate(makers):
        share = (count // 2 + number) // len(makers)
        false += _different(partial(_altered, true, maker, chance), share, {*true, *false}, wanted=False)
    made = [Example(text, valid=True) for text in true] + [Example(text, valid=False) for text in false]
    chance.shuffle(made)
    return made


def _different(make: Callable[[], str], count: int, taken: set[str], *, wanted: bool = True) -> list[str]:
    """Return `count` strings that `make` makes, each once and none of `taken`, all valid or all invalid."""
    found: dict[str, None] = {}
    while len(found) < count:
        text = make()
        if text not in taken and valid(text) == wanted:
            found[text] = None
    return list(found)


def _altered(true: Sequence[str], maker: Maker, chance: random.Random) -> str:
    return maker(chance.choice(true), chance)


def _walks(chance: random.Random, shortest: int, longest: int) -> Iterator[str]:
    """Yield true strings: at every state each arrow is as likely as the others; other lengths are thrown away."""
    while True:
        state, letters = 0, ""
        while state != END:
            letter = chance.choice([*ARROWS[state]])
            letters, state = letters + letter, ARROWS[state][letter]
        if shortest <= len(letters) <= longest:
            yield letters


def _random_letters(true: str, chance: random.Random) -> str:
    return "B" + "".join(chance.choices(string.ascii_uppercase, k=len(true) - 2)) + "E"


def _one_replaced(true: str, chance: random.Random) -> str:
    place = chance.randrange(len(true))
    return true[:place] + chance.choice(string.ascii_uppercase) + true[place + 1 :]


def _shuffled(true: str, chance: random.Random) -> str:
    return "B" + "".join(chance.sample(true[1:-1], len(true) - 2)) + "E"
