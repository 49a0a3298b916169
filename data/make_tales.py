"""Write tales.txt, a training text whose true entropy is known.

Real text hides its own floor: nobody can say how many bits per byte the best possible model of it would need.  Here
every choice is a uniform draw, so the floor is simply the entropy of the grammar below.  The text is a row of
independent pages, and a page is one little story, on one line, and then LINES lines of addition.

A rule is a list of alternatives, all equally likely.  An alternative is literal text with slots in braces:

    {thing}     expand the rule `thing` afresh         {adj:a}     the same, in the form "a": "a red", "an old"
    {thing!}    expand it and remember the word        {adj!a}     the same, in the form "a"
    {thing?}    repeat what was remembered: 0 bits     {hero?he}   the pronoun that fits the remembered hero

Each text has one derivation only, so the entropy of the text is the entropy of the choices.  Why: within a list no
two words are the same, and a space or a mark ends each word.  Two alternatives of a rule that begin alike come to a
place where they differ in a literal, or draw from lists with no word in common.  Every addition starts with a digit,
no story does.  (A parser that tried every derivation of every page found exactly one for each of the 1,505.)
"""

from __future__ import annotations

import argparse
import math
import random
import re
from functools import cache
from pathlib import Path

# The words of the stories, list by list.  Names that end in a, e or y are girls', the others boys'.
WORDS: dict[str, list[str]] = {name: words.split() for name, words in re.findall(r"(\w+):([^;]+);", """
hero: Mia Ava Zak Ian Gia Eli Tom Lily Ben Lucy Max Rosa Finn Molly Jack Ruby Hugo Daisy Leo Clara Oscar Polly Ned Emma
Felix Annie Will Flora Gus Otto Sally Milo Betsy Nina Arlo Cora Ivan Dora Jonas Penny Rufus Elsie Adam Tilda Simon Noah
Wanda Pip Bella Karl Josie Lars Freya Ida Robin Zoe; friend: Amy Eve Ike Abel Ross Hans Bruno Tilly Edwin Poppy Boris
Jenny Olive Edgar Kitty Gil Ada Nelly Basil Ivy Dolly Maya Rosie Tessa Carla Angus Peggy Linda Susie Alf Linus Effie
Della Igor Willa Frank Petra Thea Ralph Gerda Theo Olga Erik Selma Pia Ivor Maude Axel Anna Bert Etta; kind: fox cat
bear mouse rat hare mole pig otter rabbit badger puppy lamb kitten pony goat donkey beaver vole weasel lion cub tiger
calf monkey panda deer camel llama wolf koala seal walrus yak shrew stoat ferret zebra ox bull lynx ape dog cow; pal:
owl hen frog duck toad goose crow dove robin swan heron newt turtle lizard stork puffin parrot raven pigeon wren dragon
turkey finch crane lark gecko emu jay rook gull eagle falcon magpie thrush ibis cuckoo bat kiwi; thing: hat axe tie web
vest shoe clip fork dish lute gong lens pump hose pick kite bell ball cup spoon drum ring scarf book lamp doll flute
boot box key mug map jug cap coin pot pan bag bow bead belt bowl brush clock comb cork crown fan flag glove gem globe
hook hoop horn jar lid kettle mask medal mat mitten mop nail net pen pail pipe plate purse puppet rake ribbon rope rug
sack sail sock spade stick stone shell sieve sledge tin top torch towel toy tray vase wand whisk basket button teapot
apron mirror pencil bonnet fiddle marble bottle napkin candle cloak shawl locket harp banjo; adj: red old big blue wet
new tiny pink green golden little yellow white black brown grey purple silver orange dark pale bright dull shiny huge
small dry damp dusty muddy sandy sticky dirty clean warm cold frosty icy plain pretty ugly funny odd lovely fine grand
shabby rough smooth soft hard thick thin wide narrow long short round flat bent broken worn wobbly lumpy bumpy greasy
smelly mossy faded glossy magic famous secret lonely rare cheap simple fancy dainty sturdy heavy dented lucky noble
humble violet lilac amber sooty gloomy; trait: shy kind brave jolly clever quiet gentle busy sleepy wise polite merry
proud hungry young timid plump dreamy nimble bold chatty cheeky lively modest gruff bouncy fluffy tidy grumpy stout
daring eager sly fussy nosy keen silly calm loyal weary shaggy spry witty perky quirky dapper meek smart lanky tubby
vain good; sad: sad lonely glum gloomy unhappy worried blue sorry low upset weepy tearful forlorn cross dismal anxious
lost hurt small; glad: glad happy pleased merry proud joyful delighted cheerful thankful excited grateful jolly bubbly
thrilled contented overjoyed; sky: sunny rainy windy foggy snowy warm cold misty frosty cloudy bright chilly breezy
stormy golden grey fine drizzly fresh wild icy mild showery crisp damp hazy wet dry hot cool fair dull; part: day
morning evening afternoon; month: May June July April March August autumn spring summer winter October January;
weekday: Sunday Monday Friday Tuesday Saturday Thursday Wednesday; scene: quiet green little windy old sandy sunny
grassy muddy mossy leafy lonely misty shady rocky pretty sleepy busy narrow deep hidden steep wide weedy pebbly secret
crooked silent big blue cold cosy dusty noisy snowy; place: river pond meadow garden hill lake forest farm mill beach
bridge market stream valley castle barn field well wood lane park marsh cave tower brook moor ferry cliff canal bay inn
den fen glen; went: ran walked skipped hopped trotted hurried marched tiptoed danced ambled raced rambled crept jogged
sped rushed plodded roamed limped waddled dashed; near: by under near behind beside; log: log stone bench bush barrel
cart rock bucket fern hedge root crate fence boat gate stump table ladder trough stool tub plank wall tree vine arch
chair shed chest desk sack post raft oak; bug: ant bee moth wasp gnat fly snail slug worm beetle spider tick mite flea
midge earwig cicada; fruit: apple plum pear carrot nut lemon walnut turnip fig bean apricot pumpkin melon onion grape
almond banana parsnip quince pea leek date damson lime orange olive yam prune acorn raisin; dish: pie cake tart bun
roll pudding muffin biscuit scone dumpling trifle crumble waffle flan cookie fritter omelette stew soup loaf; taste:
warm sweet sticky big hot crumbly tasty fresh spicy juicy fluffy golden crispy lovely creamy cold soft salty sour tiny
huge crunchy rich; adv: softly kindly gently quietly proudly cheerfully bravely happily politely gladly warmly slowly
shyly brightly calmly wisely sweetly firmly merrily eagerly carefully tenderly boldly quickly fondly briskly sleepily
grandly loudly neatly coolly gravely; said: said laughed called chuckled answered replied whispered declared hummed
murmured grinned cried; cried: cried shouted sang cheered laughed gasped squealed called exclaimed giggled yelled
whooped; sighed: sighed sobbed sniffed moaned wept whimpered groaned whispered mumbled wailed sniffled; danced: danced
skipped hopped twirled jumped ran pranced waltzed bounced leapt spun flew; hugged: hugged kissed patted squeezed
cuddled stroked admired tickled; making: baking eating tasting buying making selling wrapping sniffing; fixing: mending
painting polishing drawing washing carrying selling drying cleaning hiding brushing weighing; tree: oak elm apple birch
willow pine beech fir chestnut maple cedar poplar alder rowan larch yew;
""")}

# A line without a name is one more alternative of the rule above it.
STORY_TEXT = """
story  | {start} {lost} {woe} {search} {meet} {help} {found} {joy} {end}
       | {start} {stuck} {woe} {reach} {meet} {advice} {down} {joy} {end}
       | {start} {finds} {wonder} {owner} {return} {thanks} {end}
start  | One {sky} {part} in {month}, {hero!} the {trait} {kind!} {went} to the {scene} {place!}.
       | Once {trait:a} {kind!} called {hero!} lived by {scene:a} {place!}.
       | By the {scene} {place!}, one {sky} {part}, {hero!} the {trait} {kind!} was {busy}.
       | {hero!} was {trait:a} {kind!} who loved the {scene} {place!}, even on {sky:a} {part}.
item   | {adj:a} {thing}
treat  | {taste:a} {fruit} {dish}
spot   | {near} {adj:a} {log}
busy   | {making} {treat}
       | {fixing} {item}
       | picking {taste} {fruit:s}
       | looking for {item}
       | resting {spot}
lost   | There, {spot}, {hero?he} lost {hero?his} {adj!} {thing!}.
       | While {busy}, {hero?he} lost {hero?his} {adj!} {thing!}.
       | {trait:A} {bug} took {hero?his} {adj!} {thing!} and hid it.
woe    | "Oh dear!" {hero?he} {sighed} {spot}.
       | {hero?He} felt as {sad} as {trait:a} {bug} {spot}.
       | Too {sad} for {treat}, {hero?he} sat {spot}.
search | {hero?He} looked {spot}, but found only {item}.
       | Was it {spot}? No, that was {item}.
       | {hero?He} asked {trait:a} {bug}, but it was {busy}.
meet   | Just then {friend!} the {trait} {pal!} came by, {busy}.
       | "Why so {sad}?" asked {friend!}, {trait:a} {pal!} who was {busy}.
       | {trait:A} {pal!} called {friend!} was {busy} {spot}.
help   | "We will find it," {said} {friend?}, {fixing} {item}.
       | "Have {treat}, and then look {spot}," {said} {friend?} {adv}.
       | "Once I lost {item} {spot}," {said} {friend?} {adv}.
found  | And {spot}, next to {item}, lay the {adj?} {thing?}!
       | {trait:A} {bug} slept {spot}, and its pillow was the {thing?}!
       | They moved {item}, looked {spot}, and there it lay!
stuck  | {hero?He} threw {hero?his} {adj!} {thing!} so {adv} that it stuck in {adj:a} {tree!}.
       | The wind blew {hero?his} {adj!} {thing!} into {adj:a} {tree!} {spot}.
reach  | {hero?He} shook the {tree?}, but only {item} fell {spot}.
       | {hero?He} poked it with {item} {spot}, but it stayed in the {tree?}.
       | {hero?He} asked {trait:a} {bug} to climb, but it was {busy}.
advice | "Have {treat}, and then try {item}," {said} {friend?} {adv}.
       | "Let us try {item}," {said} {friend?}, {fixing} it {adv}.
down   | They tickled the {tree?} with {item}, and it fell {spot}!
       | {friend?} stood on {adj:a} {log}, reached up {adv} and got it.
finds  | There, {spot}, {hero?he} found {adj!a} {thing!}.
       | {trait:A} {bug} showed {hero?him} {adj!a} {thing!} {spot}.
       | While {busy}, {hero?he} found {adj!a} {thing!}.
wonder | "Is it yours?" {hero?he} asked {trait:a} {bug}, but it was {busy}.
       | {hero?He} asked {trait:a} {bug}, but it had only lost {item}.
owner  | {friend!} the {trait} {pal!} sat {spot} and {sighed}, for {friend?he} had lost it.
       | Its owner was {friend!}, {trait:a} {pal!} too {sad} to eat {treat}.
return | "Is this {thing?} yours?" {said} {hero?}, {fixing} it {adv}.
       | "Have it back, and {treat} too," {said} {hero?} {adv}.
thanks | "Yes! I lost it {spot}, {busy}!" {cried} {friend?} {adv}.
       | "Oh, you {trait} {kind?}!" {cried} {friend?}, and gave {hero?him} {item}.
joy    | {hero?He} was so {glad} that {hero?he} {danced} {adv} round {adj:a} {log}.
       | "Oh, you {trait} {pal?}!" {cried} {hero?}, and gave {friend?him} {item}.
       | {hero?He} {hugged} {friend?} {adv} and gave {friend?him} {treat}.
end    | Then {hero?} and {friend?} ate {treat} {spot}, {glad} to have the {thing?}.
       | At night, {spot}, {hero?} dreamed of {friend?}, {treat} and the {thing?}.
       | Now each {weekday} {hero?} and {friend?} play with the {thing?} and eat {treat} {spot}.
       | So the {kind?} and the {pal?} {went} home {adv} with the {thing?} and ate {treat} {spot}.
"""
STORY: dict[str, list[str]] = {name: re.findall(r"\| (.+)", options)
                               for name, options in re.findall(r"(\w+)((?:\s+\| .+)+)", STORY_TEXT)}
RULES = WORDS | STORY

LINES = 9  # Lines of addition on a page.
MOST = 99  # Operands are uniform in 1..MOST.
SUM_BITS = 2 * math.log2(MOST)  # Of one line; and its expected bytes, newline and all:
SUM_SIZE = sum(len(f"{a}+{b}={a + b}\n") for a in range(1, MOST + 1) for b in range(1, MOST + 1)) / MOST**2
SLOT = re.compile(r"\{(\w+)([:!?]?)(\w*)\}")
SHE = {"he": "she", "his": "her", "him": "her", "He": "She", "His": "Her"}


def form(word: str, how: str) -> str:
    """Return the word in one of its forms, which the word itself determines: forms carry no information."""
    if how in SHE:
        return SHE[how] if word[-1] in "aey" else how
    if how in ("a", "A"):
        return how + ("n " if word[0] in "aeiou" else " ") + word
    return word + how  # The form is "s" or "".


@cache
def pieces(alternative: str) -> tuple[tuple[str, str, str, str], ...]:
    """Cut an alternative into (literal, slot, mark, form); the last piece has no slot."""
    cut = SLOT.split(alternative) + ["", "", ""]
    return tuple(zip(cut[0::4], cut[1::4], cut[2::4], cut[3::4]))


def draw(rng: random.Random, most: int) -> int:
    """Draw from 0..most-1.  random() is the one method whose sequence Python promises never to change."""
    return int(rng.random() * most)


def tell(rng: random.Random, name: str, memory: dict[str, str]) -> tuple[str, float]:
    """Expand a rule at random; return its text and -log2 of the probability of the choices made."""
    text, bits = "", math.log2(len(RULES[name]))
    for literal, slot, mark, how in pieces(RULES[name][draw(rng, len(RULES[name]))]):
        text += literal
        if slot:
            word, cost = (memory[slot], 0.0) if mark == "?" else tell(rng, slot, memory)
            text, bits = text + form(word, how), bits + cost
            if mark == "!":
                memory[slot] = word
    return text, bits


def page(rng: random.Random) -> tuple[str, float]:
    """Draw one page; return its text and its -log2 probability."""
    story, bits = tell(rng, "story", {})
    sums = [(1 + draw(rng, MOST), 1 + draw(rng, MOST)) for _ in range(LINES)]
    return story + "\n" + "".join(f"{a}+{b}={a + b}\n" for a, b in sums), bits + LINES * SUM_BITS


@cache
def expect(name: str, how: str = "") -> tuple[float, float]:
    """Return the exact expected (bits, bytes) of a rule, summed over its slots: a repeat costs bytes, no bits."""
    count = len(RULES[name])
    bits, size = math.log2(count), 0.0
    for literal, slot, mark, slot_how in (piece for option in RULES[name] for piece in pieces(option)):
        inner = expect(slot, slot_how) if slot else (0.0, 0.0)
        bits += inner[0] / count * (mark != "?")
        size += (len(form(literal, how)) + inner[1]) / count
    return bits, size


def main() -> None:
    """Write the text and its entropy, and print what they are."""
    parser = argparse.ArgumentParser(description="Write stories and additions, and their true entropy in bits/byte.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # One line, without the usage.
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=1_000_000, help="stop at the first page end from here on")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("tales.txt"), help="a .txt file")
    args = parser.parse_args()
    if args.bytes < 1 or args.out.suffix != ".txt":
        parser.error("--bytes must be 1 or more, and --out a .txt file")
    files = args.out, args.out.with_suffix(".entropy")
    if args.out.resolve() != Path(__file__).resolve().with_name("tales.txt"):
        for path in filter(Path.exists, files):
            parser.error(f"{path} exists and would be lost: give another --out")

    rng, pages, size, spent = random.Random(args.seed), [], 0, 0.0
    while size < args.bytes:
        text, bits = page(rng)
        pages.append(text)
        size, spent = size + len(text), spent + bits
    text = "".join(pages)
    story_bits, story_size = expect("story")
    entropy = (story_bits + LINES * SUM_BITS) / (story_size + 1 + LINES * SUM_SIZE)
    try:
        for path, content in zip(files, (text, f"{entropy:.4f}\n")):
            path.write_bytes(content.encode("ascii"))
    except OSError as error:
        parser.error(f"cannot write {args.out}: {error.strerror}")

    print(f"{size} bytes: {len(pages)} stories and {LINES * len(pages)} lines of addition")
    print(f"{len(set(re.findall('[A-Za-z]+', text)))} distinct words")
    print(f"entropy: {entropy:.4f} bits/byte (exact, from the grammar)")
    print(f"this text: {spent / size:.4f} bits/byte (-log2 of its probability)")


if __name__ == "__main__":
    main()
