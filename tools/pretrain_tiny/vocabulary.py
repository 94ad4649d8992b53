"""The tiny CLIP's tokenizer: CLIP's byte-level BPE, learned from words and scenes' captions."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

VOCABULARY_SIZE = 2560
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_REPEATS = 40
"""How often each listed word is shown, so that it outweighs rare fragments of the captions."""

# Ordinary words of product descriptions: without them real captions become single letters.
_LINES = """
chair armchair stool bench sofa couch table desk bookcase shelf shelves cabinet cupboard wardrobe
drawer drawers dresser bed bunk mattress lamp pendant floor ceiling wall light lighting bulb led
rug carpet curtain curtains cushion pillow cover blanket throw quilt mirror clock vase pot plant
potted picture frame frames candle candlestick bowl plate mug cup glass jar bottle box basket
storage container tray rack hook hooks hanger hat coat stand holder unit units door doors panel
handle knob hinge hinges leg legs foot feet seat back backrest arm armrest armrests headboard
footstool pouf ottoman recliner rocking swivel office dining coffee side bedside console nest
sideboard chest trolley island worktop sink tap oven hob fridge kitchen bathroom bedroom living
room hallway outdoor indoor garden balcony children child baby high low tall short wide narrow
deep shallow small large big medium little long slim round square rectangular oval curved straight
corner modular folding foldable extendable adjustable stackable removable washable portable
reversible dimmable wireless white black grey gray brown beige red orange yellow green blue navy
turquoise teal purple violet pink cream ivory gold golden silver copper brass bronze natural dark
pale bright soft warm cool assorted colours colour color multicolour wood wooden solid oak pine
birch beech ash walnut bamboo rattan wicker willow veneer effect stained lacquer lacquered painted
antique steel stainless metal metallic chrome aluminium iron galvanised wire mesh plastic rubber
acrylic polyester cotton linen wool velvet leather suede fabric textile felt jute seagrass
upholstered padded quilted woven knitted striped stripe stripes checked dotted dots pattern
patterned plain printed glossy gloss matt matte frosted clear transparent tempered marble stone
concrete ceramic porcelain stoneware earthenware paper cardboard foam down feather filling set
piece pieces pack pair with without and the a an of for in on to from by is are can be it your you
this that which made make makes making easy easily keep clean wipe washing machine wash place
placed put hang hung hanging mount mounted mounts standing free both sides right left top bottom
above below beside behind under over next near inside outside front between around against at
angle viewed seen view shown showing three four five six two one single double triple many several
open closed closing sliding hinged lid lids wheels castors rail rod bar base support shade cord
switch battery charger included sold separately requires assembly screws fixings tools suits
suitable use used using perfect great good ideal extra more less most also only even when where
while so as if not no up out off into through because thanks since than then there their they has
have may will should complete complements combine combined combination match matching series
collection range style modern classic traditional contemporary minimalist scandinavian rustic
industrial vintage retro design designed designer elegant simple timeless practical durable sturdy
stable strong hardwearing resistant scratch heat moisture stain comfortable comfort cosy relaxing
sleep sit seating space saving saves fit fits home house decorate decoration decorative display
organise organised hidden reach height width depth weight size sizes cm mm inch guarantee year
years safe safety tested quality material materials surface finish finished texture textured grain
handmade hand crafted unique shape shaped shapes different variation gives give directed diffused
atmosphere mood creates create adds add helps help protects protect prevents lets let turn turned
pull push lift move moved fold folded stack stacked flat ladder step steps toy toys game games
play animal book books magazine clothes shoes shoe towel towels bath shower toilet soap dish brush
bin waste laundry ironing board knife fork spoon pan pans cutting chopping food serving drink tea
wine water ice photo poster canvas art print motif letter number flower flowers leaf leaves tree
artificial fresh cat dog bird fish star heart moon sun sky window background shadow image product
catalogue item cube ball sphere cylinder cone pyramid block tower arch ring disc slab post cross
boat car
"""
WORDS = tuple(_LINES.split())


def train_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """Train a fast CLIP tokenizer that encodes any text and ends it with its highest id."""
    merges = _learn_merges([*captions, *WORDS * _REPEATS])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every byte is a symbol, so no text is unknown; CLIP finds a text's end by its highest id
    symbols = [*letters, *(letter + _WORD_END for letter in letters)]
    merges = merges[: VOCABULARY_SIZE - len(symbols) - 2]
    symbols += ["".join(merge) for merge in merges]
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    texts = [*texts, *(word + ending for word in WORDS for ending in ("s", "er", "ing"))]
    template = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = template.pre_tokenizer
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY_SIZE,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            end_of_word_suffix=_WORD_END,
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    return [(left, right) for left, right in model["merges"]]
