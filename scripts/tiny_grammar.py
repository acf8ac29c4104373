"""A small grammar of our own that writes the texts the embedded model is trained, calibrated and judged on.

Two kinds of knowledge are needed to predict them: facts of one fixed invented world (they must be stored in
the weights) and what was said earlier in the same text (it must be carried by attention). Every random choice
goes through `Dice`, which adds up its surprise, so an upper bound of the entropy of the texts is known.
"""

import itertools
from collections.abc import Callable, Iterator

from tiny_world import (
    ANIMALS,
    COLOURS,
    DAYS,
    DISHES,
    GOODS,
    LANDS,
    MANNERS,
    MORE_LESS,
    MOVES,
    ORDINALS,
    PEOPLE,
    PLACES,
    TIMES,
    TURNS,
    VIEWS,
    Dice,
    article,
    capital,
    counted,
    he,
    his,
    land_facts,
    plural,
    series,
    words_of,
    world,
)


def aside(dice: Dice) -> str:
    """A sentence about nothing said before: nouns come with qualities that are usual for them."""
    who = dice.skewed(PEOPLE)
    if dice.maybe():
        animal = dice.skewed(ANIMALS)
        who = f"the {dice.skewed(world().qualities[animal])} {animal}"
    place = dice.skewed(PLACES)
    there = f"the {dice.skewed(world().qualities[place])} {place}" if dice.maybe() else f"the {place}"
    if dice.maybe():
        act = f"{dice.skewed(MANNERS)} {dice.skewed(MOVES)} to {there}"
    else:
        noun = dice.skewed(GOODS)
        act = f"{dice.skewed(VIEWS)} {article(dice.skewed(world().qualities[noun]))} {noun} near {there}"
    return f"{capital(who)} {act} {dice.skewed(TIMES)}." if dice.maybe() else f"{capital(who)} {act}."


def interrupted(text: str, dice: Dice) -> str:
    """The text with up to two asides, each after one of its sentences."""
    for _ in range(dice.number(0, 2)):
        sentences = text.split(". ")
        at = dice.number(1, len(sentences) - 1)
        text = ". ".join([*sentences[:at], aside(dice) + " " + sentences[at], *sentences[at + 1 :]])
    return text


def market(dice: Dice) -> str:
    """Things are found, lost and given away; every count said is the true one."""
    name, other = dice.some(PEOPLE, 2)
    noun, colour, left, given = dice.skewed(GOODS), dice.skewed(COLOURS), dice.number(3, 9), 0
    text = [f"{name} the {world().people[name][0]} has {counted(left, noun, colour)}."]
    for _ in range(dice.number(3, 5)):
        step = dice.number(1, 3)
        if left >= step and dice.maybe():
            left, to_other = left - step, dice.maybe()
            given += step if to_other else 0
            act = f"gives {words_of(step)} to {other}" if to_other else f"loses {words_of(step)}"
            text.append(f"{capital(he(name))} {act}.")
        else:
            left += step
            text.append(f"{capital(he(name))} {dice.pick(['finds', 'buys', 'makes'])} {words_of(step)} more.")
        text.append(f"Now {he(name)} has {counted(left, noun)}.")
    last = f"{name} has {counted(left, noun, colour)} and {other} has {counted(given, noun, colour)}"
    text.append(f"In the evening {last}.")
    return " ".join(text)


def whereabouts(dice: Dice) -> str:
    """Things are carried from place to place; the questions at the end ask for the last ones."""
    names, things, places = dice.some(PEOPLE, 3), dice.some(GOODS, 2), dice.some(PLACES, 4)
    colours = dict(zip(things, dice.some(COLOURS, 2), strict=True))
    where = dict(zip(things, places, strict=False))
    carrier = dict.fromkeys(things, "")
    text = [f"The {colours[thing]} {thing} is at the {where[thing]}." for thing in things]
    for name in names:
        thing = dice.pick(things)
        target = dice.pick([place for place in places if place != where[thing]])
        text.append(f"{name} takes the {thing} from the {where[thing]} to the {target}.")
        where[thing], carrier[thing] = target, name
    for thing in dice.some(things, 2):
        text.append(f"Where is the {colours[thing]} {thing} now? It is at the {where[thing]}.")
        who = f"{carrier[thing]} took it there" if carrier[thing] else "Nobody moved it"
        text.append(f"Who moved the {thing}? {who}.")
    return " ".join(text)


def lands(dice: Dice) -> str:
    """Facts of two lands, and a traveller who meets them again."""
    first, second = dice.some(LANDS, 2)
    text = dice.some(land_facts(first), 3) + dice.some(land_facts(second), 3)
    name = dice.skewed(PEOPLE)
    for land, verb in ((first, "leaves"), (second, "reaches")):
        text.append(f"{name} {verb} {world().lands[land][0]}, the capital of {land}.")
    crop, other = world().lands[first][2], world().lands[second][2]
    deal = f"sells the {crop} of {first} and buys the {other} of {second}"
    return " ".join([*text, f"There {he(name)} {deal}."])


def portrait(dice: Dice) -> str:
    """Facts of two people, told one by one and then of both."""
    text, names = [], dice.some(PEOPLE, 2)
    for name in names:
        job, town, pet, colour = world().people[name]
        facts = [
            f"comes from {town}",
            f"has {article(pet)}",
            f"likes the colour {colour}",
            f"works as {article(job)}",
        ]
        start, *rest = dice.some(facts, 4)
        text.append(f"{name} {start}. " + " ".join(f"{capital(he(name))} {fact}." for fact in rest))
    (job, town, *_), (other, home, *_) = (world().people[name] for name in names)
    same = "the same work" if job == other else "different work"
    text.append(f"{names[0]} and {names[1]} do {same}: {names[0]} is the {job} and {names[1]} is the {other}.")
    if dice.maybe():
        text.append(f"Today {names[1]} of {home} visits {names[0]} in {town}.")
    return " ".join(text)


def sums(dice: Dice) -> str:
    """A chain of sums: every one starts from the result of the last."""
    name, value = dice.skewed(PEOPLE), dice.number(2, 12)
    text = [f"{name} counts. {capital(he(name))} starts with {words_of(value)}."]
    for _ in range(dice.number(5, 8)):
        step, before = dice.number(2, 9), value
        if value * step < 60 and dice.maybe():
            value, verb = value * step, "times"
        elif value > step and dice.maybe():
            value, verb = value - step, "minus"
        else:
            value, verb = value + step, "plus"
        text.append(f"{capital(words_of(before))} {verb} {words_of(step)} is {words_of(value)}.")
    return " ".join([*text, f"So {name} ends with {words_of(value)}."])


def recall(dice: Dice) -> str:
    """A list that is said, asked for by place, and said again backwards."""
    name, items = dice.skewed(PEOPLE), dice.some(GOODS, dice.number(4, 7))
    text = [f"{name} has a list of {words_of(len(items))} things: {series(items)}."]
    for place in dice.some(range(len(items) - 1), 2):
        text.append(f"The {ORDINALS[place]} thing is the {items[place]}.")
        text.append(f"After the {items[place]} comes the {items[place + 1]}.")
    lines = [f"{words_of(index + 1)}: {item}" for index, item in enumerate(items)]
    if dice.maybe():
        return "\n".join([" ".join(text), f"The list of {name}:", *lines])
    return " ".join([*text, f"Backwards {he(name)} reads {series(items[::-1])}."])


def route(dice: Dice) -> str:
    """A way from place to place, and the same way back."""
    name, places = dice.skewed(PEOPLE), dice.some(PLACES, dice.number(4, 5))
    turns = [dice.pick(list(TURNS)) for _ in places[1:]]
    steps = list(zip(turns, places[1:], strict=True))
    back = list(zip([TURNS[turn] for turn in reversed(turns)], places[-2::-1], strict=True))
    text = [f"{name} stands at the {places[0]}."]
    text += [f"{capital(he(name))} goes {turn} to the {place}." for turn, place in steps]
    text.append(
        f"To come back from the {places[-1]}, {name} goes " + ", then ".join(f"{t} to the {p}" for t, p in back)
    )
    return " ".join(text) + f". Now {he(name)} is at the {places[0]} again."


def ranking(dice: Dice) -> str:
    """Four people in an order that is told in pieces and then asked for."""
    more, less = dice.pick(MORE_LESS)
    names = dice.some(PEOPLE, 4)
    links = dice.some(list(itertools.pairwise(names)), 3)
    text = [f"{a} is {more} than {b}." if dice.maybe() else f"{b} is {less} than {a}." for a, b in links]
    text.append(f"From the {more[:-1]}st to the {less[:-1]}st they are {series(names)}.")
    for first, second in dice.some([(a, b) for a in range(4) for b in range(4) if a != b], 3):
        word = more if first < second else less
        text.append(f"Is {names[first]} {more} or {less} than {names[second]}? {capital(he(names[first]))} is {word}.")
    return " ".join(text)


def lexicon(dice: Dice) -> str:
    """Words of an invented language, in which the colour follows the noun."""
    words, colours = dice.some([*GOODS, *ANIMALS], 3), dice.some(COLOURS, 2)
    known = world().words
    text = [f"In the old tongue {article(word)} is called {known[word]}." for word in words]
    text += [f"The word for {colour} is {known[colour]}." for colour in colours]
    for _ in range(2):
        word, colour = dice.pick(words), dice.pick(colours)
        text.append(f"So {article(f'{colour} {word}')} is {known[word]} {known[colour]}.")
    return " ".join(text)


def recipe(dice: Dice) -> str:
    """A dish with its fixed parts, in amounts that are said twice."""
    name, dish = dice.skewed(PEOPLE), dice.pick(DISHES)
    parts, verb, minutes = world().dishes[dish]
    cups = {part: dice.number(2, 6) for part in dice.some(parts, 4)}
    text = [f"{name} wants to make {dish}. {capital(he(name))} needs"]
    text.append(series([f"{words_of(count)} cups of {part}" for part, count in cups.items()]) + ".")
    first, *rest = cups
    text.append(f"First {he(name)} takes the {words_of(cups[first])} cups of {first}.")
    text += [f"Then {he(name)} adds the {words_of(cups[part])} cups of {part}." for part in rest]
    every = words_of(sum(cups.values()))
    text.append(f"Together these are {every} cups. To {verb} the {dish} takes {words_of(minutes)} minutes.")
    return " ".join(text)


def talk(dice: Dice) -> str:
    """Two people who speak in turn about things of theirs."""
    names, things = dice.some(PEOPLE, 2), dice.some(GOODS, 2)
    colours, price = dice.some(COLOURS, 2), dice.number(2, 20)
    (one, two), (mine, yours) = names, [f"{c} {t}" for c, t in zip(colours, things, strict=True)]
    text = [f'"Good {dice.pick(["morning", "evening"])}, {two}," says {one}. "I have {article(mine)}."']
    text.append(f'"Good day, {one}," says {two}. "I have {article(yours)}. It cost {words_of(price)} coins."')
    text.append(f'"Only {words_of(price)} coins?" asks {one}. "Will you take my {mine} for it?"')
    if dice.maybe():
        text.append(f'"Yes, gladly," says {two}. So now {one} has the {yours} and {two} has the {mine}.')
    else:
        text.append(f'"No, thank you," says {two}. So {one} keeps the {mine} and {two} keeps the {yours}.')
    job = world().people[two][0]
    return " ".join([*text, f"Then {two} the {job} goes home with {his(two)} {things[0 if 'Yes' in text[-1] else 1]}."])


def creature(dice: Dice) -> str:
    """Facts of animals, of one and of many, so that verbs must agree."""
    text = []
    for animal in dice.some(ANIMALS, 2):
        sound, diet, home, colour = world().animals[animal]
        many = plural(animal)
        facts = [
            (f"{many} {sound}", f"the {animal} {sound}s"),
            (f"{many} eat {diet}", f"the {animal} eats {diet}"),
        ]
        facts.append((f"{many} live in {article(home)}", f"the {animal} lives in {article(home)}"))
        facts.append((f"{many} of this land are {colour}", f"the {animal} of this land is {colour}"))
        text += [f"{capital(dice.pick(fact))}." for fact in dice.some(facts, 4)]
        name = dice.skewed(PEOPLE)
        count = dice.number(1, 9)
        text.append(f"{name} has {counted(count, animal)} and gives {'it' if count == 1 else 'them'} {diet}.")
    return " ".join(text)


def letter(dice: Dice) -> str:
    """A letter, signed by whom it is said to come from."""
    one, two = dice.some(PEOPLE, 2)
    noun, colour, count = dice.skewed(GOODS), dice.skewed(COLOURS), dice.number(1, 9)
    day, place = dice.number(0, 5), dice.pick(PLACES)
    job, town, pet, _ = world().people[one]
    gift = counted(count, noun, colour)
    text = [f"{one} of {town} writes to {two}.\nDear {two}, thank you for the {gift}."]
    text.append(f"I put {'it' if count == 1 else 'them'} beside my {pet}. On {DAYS[day]} I go to the {place}.")
    text.append(f"Please meet me there on {DAYS[day]} or one day later, on {DAYS[day + 1]}.")
    text.append(f"I will wait at the {place} with the {gift}.\nYour friend {one}, {job} of {town}")
    return " ".join(text)


KINDS: tuple[Callable[[Dice], str], ...] = (
    market,
    whereabouts,
    lands,
    portrait,
    sums,
    recall,
    route,
    ranking,
    lexicon,
)
KINDS += (recipe, talk, creature, letter)


def document(split: str, index: int) -> tuple[str, float]:
    """Text number `index` of a split and an upper bound of its surprise in nats; depends on nothing else."""
    dice = Dice(f"{split}/{index}")
    text = interrupted(dice.pick(KINDS)(dice), dice)
    return text, dice.nats


def documents(split: str, start: int = 0) -> Iterator[tuple[str, float]]:
    """All texts of a split from number `start` on, without end."""
    index = start
    while True:
        yield document(split, index)
        index += 1
