"""What the texts of `tiny_grammar` are made of: words and their forms, facts of an invented world, dice."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

T = TypeVar("T")


def listed(text: str, separator: str | None = None) -> list[str]:
    """The words of a text."""
    return text.split(separator)


SHE = listed("""
    Mira Tessa Odile Runa Petra Ilka Senna Vera Luma Hedda Anouk Brisa Calla Dorit Elna Fenna Greta Hanne Ines
    Jorun Kaia Lotte Maren Nadia
""")
HE = listed("""
    Tobin Anders Bram Corin Dario Emil Falk Goran Henk Ivo Jonas Karel Lars Milo Nils Otis Pavel Quinn Rolf
    Stellan Tomas Ulrik Viktor Wim
""")
PEOPLE = [name for pair in zip(SHE, HE, strict=True) for name in pair]
GOODS = listed("""
    apple pear plum cherry loaf egg candle coin button bead basket lantern ribbon spoon knife box brush jar
    feather shell pebble rope bell leaf pencil cup kettle hat scarf stamp drum flute kite needle
""")
COLOURS = listed("red blue green yellow white black brown grey purple orange silver golden")
PLACES = listed("""
    mill bridge barn market harbour forest well chapel tower garden meadow school bakery quarry ferry inn
    forge orchard library stable
""")
TOWNS = listed("""
    Aldrow Bexmoor Corvane Dunhollow Estrel Farrowby Glimmet Hartwick Issel Jarrow Kestwin Lorne Marsk Nethby
    Orlow Pellam Quarn Ridley Sorrel Tarn
""")
LANDS = listed("""
    Avaria Belmora Cestrand Dorvia Elmark Fenlia Garonde Hestria Ithmar Jorland Kelvia Lumeria Mordane Norvia
    Ostrand Pirania Questia Rovania Sildor Tamaria
""")
RIVERS = listed("Ash Brin Cole Dace Erl Fenn Gale Hurn Isk Jade")
CROPS = listed("wheat wool salt copper honey timber silk tin barley glass")
JOBS = listed("""
    baker miller weaver potter sailor teacher tailor farmer mason painter carpenter doctor gardener fisher
    singer smith
""")
ANIMALS = listed("fox hen goose sheep mouse horse cow owl frog bee wolf cat dog goat duck crow pony hare")
SOUNDS = listed("bark cluck honk bleat squeak neigh moo hoot croak buzz howl purr")
DIETS = listed("grass seeds fish worms clover berries mice grain nectar roots")
HOMES = listed("den coop pond fold burrow stall hive nest cave kennel")
DISHES = listed("soup stew pie cake porridge salad pudding broth pancake dumpling jam curry")
STUFFS = listed("""
    flour butter milk sugar onion carrot potato cheese pepper cream garlic rice bean turnip cabbage lemon
""")
COOKING = listed("bake boil fry roast steam simmer")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
TURNS = {"north": "south", "south": "north", "east": "west", "west": "east"}
MORE_LESS = [("taller", "shorter"), ("older", "younger"), ("faster", "slower"), ("stronger", "weaker")]
IRREGULAR = {"loaf": "loaves", "knife": "knives", "leaf": "leaves", "goose": "geese", "sheep": "sheep"}
IRREGULAR |= {"mouse": "mice", "wolf": "wolves"}
UNITS = listed("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen
""")
TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = listed("first second third fourth fifth sixth seventh")
QUALITIES = listed("""
    old new small large quiet busy pretty heavy light broken clean dusty warm cold strange lovely narrow round
    empty simple
""")
MANNERS = listed("slowly quickly quietly gladly often never always sometimes carefully again")
MOVES = listed("walks runs comes rides hurries wanders returns")
VIEWS = listed("sees likes wants paints draws sells hides cleans brings watches")
TIMES = listed("in the morning,at noon,in the evening,at night,in spring,in summer,in autumn,in winter", ",")
WORLD_SEED = "the invented world"


class Dice:
    """Random choices from one seed; `nats` is the surprise of all choices made so far."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self.nats = 0.0

    def number(self, low: int, high: int) -> int:
        """A whole number, low and high included; `Random.random` is stable between Python versions."""
        self.nats += math.log(high - low + 1)
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, each as likely."""
        return options[self.number(0, len(options) - 1)]

    def skewed(self, options: Sequence[T]) -> T:
        """One of the options, the earlier the likelier, as the words of real text are."""
        size = len(options)
        index = int(size * self._random.random() ** 2)
        self.nats -= math.log(math.sqrt((index + 1) / size) - math.sqrt(index / size))
        return options[index]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """Count different options in random order."""
        rest, chosen = list(options), []
        for _ in range(count):
            chosen.append(rest.pop(self.number(0, len(rest) - 1)))
        return chosen

    def maybe(self) -> bool:
        """True half of the time."""
        return self.number(0, 1) == 1


@dataclass(frozen=True, kw_only=True)
class World:
    """The fixed facts: for every land, person, animal, dish and word what is true of it in all texts."""

    lands: dict[str, tuple[str, str, str, str, str]]
    people: dict[str, tuple[str, str, str, str]]
    animals: dict[str, tuple[str, str, str, str]]
    dishes: dict[str, tuple[list[str], str, int]]
    words: dict[str, str]
    qualities: dict[str, list[str]]


@cache
def world() -> World:
    """The one world, drawn from its own seed: the same for every text of every split."""
    dice = Dice(WORLD_SEED)
    towns = dice.some(TOWNS, len(TOWNS))
    pick = dice.pick
    syllables = listed("ba do fi gu ke la mo ni pa ru se to va wi zu")
    return World(
        lands={
            land: (town, pick(RIVERS), pick(CROPS), pick(PEOPLE), pick(COLOURS))
            for land, town in zip(LANDS, towns, strict=True)
        },
        people={name: (pick(JOBS), pick(TOWNS), pick(ANIMALS), pick(COLOURS)) for name in PEOPLE},
        animals={name: (pick(SOUNDS), pick(DIETS), pick(HOMES), pick(COLOURS)) for name in ANIMALS},
        dishes={name: (dice.some(STUFFS, 4), pick(COOKING), dice.number(2, 9) * 5) for name in DISHES},
        words={word: "".join(dice.some(syllables, 3)) for word in [*GOODS, *COLOURS, *ANIMALS]},
        qualities={noun: dice.some(QUALITIES, 4) for noun in [*GOODS, *ANIMALS, *PLACES]},
    )


def plural(noun: str) -> str:
    """The noun in the plural."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("ch", "sh", "x", "s")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeou" else noun + "s"


def words_of(number: int) -> str:
    """A number from 0 to 99 in words."""
    if number < 20:
        return UNITS[number]
    tens, unit = TENS[number // 10 - 2], number % 10
    return f"{tens}-{UNITS[unit]}" if unit else tens


def counted(number: int, noun: str, colour: str = "") -> str:
    """A number of things: `no red apples`, `one red apple`, `two red apples`."""
    head = "no" if number == 0 else words_of(number)
    return " ".join(filter(None, [head, colour, noun if number == 1 else plural(noun)]))


def article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def he(name: str) -> str:
    """The pronoun of a person, as subject."""
    return "she" if name in SHE else "he"


def his(name: str) -> str:
    """The pronoun of a person, as owner."""
    return "her" if name in SHE else "his"


def series(items: Sequence[str]) -> str:
    """Items as `a, b and c`."""
    return f"{', '.join(items[:-1])} and {items[-1]}"


def capital(text: str) -> str:
    """The text with a large first letter."""
    return text[0].upper() + text[1:]


def land_facts(land: str) -> list[str]:
    """All that is always true of a land."""
    town, river, crop, ruler, colour = world().lands[land]
    queen = "queen" if ruler in SHE else "king"
    return [
        f"The capital of {land} is {town}.",
        f"The river {river} flows through {land}.",
        f"{land} is known for its {crop}.",
        f"The {queen} of {land} is {ruler}, the {world().people[ruler][0]}.",
        f"The flag of {land} is {colour}.",
    ]
