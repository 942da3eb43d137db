"""The words of generated tasks: a stand-in for the wonderwords lists of RULER, so that nothing is downloaded."""

from __future__ import annotations

_ADJECTIVES_TEXT = """
able acid agile airy alert alive ample ancient angry antique apt arctic arid autumn awake balmy bare basic best big
bitter black blank bleak blind blond blue blunt bold brave brief bright brisk broad broken brown busy calm candid
careful central cheap cheery chief chilly civil clean clear clever close cloudy coarse cold common complex cool
coral cosmic cozy crisp crowded cruel curious curly dainty damp daring dark dear deep dense dim direct distant dizzy
double dry dull dusty eager early earnest easy elder elegant empty equal exact extra faint fair famous fancy far
fast fierce final fine firm first fit flat fluffy fond formal fragile frank free fresh frosty frozen full funny
gentle giant glad global golden good grand grave great green grim handy happy hard harsh hasty heavy helpful hidden
hollow honest huge humble icy ideal idle inner jolly keen kind large late lazy lean light little lively local lonely
long loose loud loyal lucky mad magic major marble mellow mild minor misty modern modest narrow neat nimble noble
noisy novel odd old open orange outer pale patient plain polite proud pure quick quiet rapid rare raw ready red rich
rigid ripe rough round royal rustic sad safe salty scarce secret shallow sharp shiny short shy silent silver simple
sleepy slim slow smooth social soft solid sour spare stable steep stern strict strong subtle sunny sweet swift tall
tame tender thick thin tidy tiny tired total tough true upper urban useful vague vast vivid warm wary weak weird wet
white whole wide wild wise wooden young
"""

_NOUNS_TEXT = """
acorn actor alley amber anchor angle ankle apple apron arch arrow artist atlas attic author autumn badge bakery
balcony ballad bamboo banana banjo barley barrel basin basket beacon beaver bench berry bicycle biscuit blanket
blossom bottle boulder bracelet branch bread bridge bronze brush bucket buffalo butter button cabin cactus camel
candle canoe canvas canyon captain caravan carpet carrot castle cattle cavern cedar cellar chapel cherry chimney
chorus cinema circle citadel clarinet clock cloud clover coast cobra coffee collar comet compass copper corner
cottage cotton cousin cradle crater crystal curtain cushion cypress dancer deer desert diamond dinner doctor dolphin
donkey dragon drawer drummer eagle easel echo elbow elephant engine evening fabric falcon farmer feather fence ferry
fiddle field finger flame flower flute forest fountain fox galaxy garden garlic gate giraffe glacier glove goat
gravel guitar hammer hamlet harbor harvest hazel hedge helmet heron hill honey horizon horse hotel house island
ivory jacket jaguar jasmine jewel journey jungle kettle kitchen kitten ladder lagoon lantern laurel leather lemon
leopard letter library lighthouse lily lion lizard lobster lotus magnet mango mantle maple market meadow melon
mirror monkey moon morning mountain museum needle nest nickel oasis ocean olive onion opal orchard orchid otter oven
owl oyster paddle palace panda paper parade parrot pasture peach pebble pelican pencil pepper piano pigeon pillow
pilot pine pirate planet plaza pocket poem pond poppy potato prairie prism pumpkin puppet quartz quilt rabbit radio
raven ribbon river robin rocket saddle salmon sandal satchel scholar school shadow shelter shovel signal singer
sparrow spider spoon spring squirrel stable statue stone storm stream summer sunset swallow tablet tailor teapot
temple thimble thunder tiger timber tomato torch tower trumpet tulip tunnel turtle valley vase velvet village violin
walnut walrus water whale wheat whistle willow window winter wizard wolf yard zebra
"""

_VERBS_TEXT = """
admire adopt answer arrange balance believe borrow build carry catch change chase choose climb collect compare
consider cover cross deliver describe discover divide draw enjoy enter explore fetch find finish follow forget
gather guard guide hold imagine improve invite join keep learn leave listen mend move notice observe offer paint
pass plant practise prefer prepare protect pull reach read remember repair repeat return sail search share sing
sketch sort start study teach trace travel trust turn visit walk wander watch welcome whisper wonder write
"""

ADJECTIVES = tuple(_ADJECTIVES_TEXT.split())
NOUNS = tuple(_NOUNS_TEXT.split())
VERBS = tuple(_VERBS_TEXT.split())
ALL_WORDS = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))


def compound(index: int) -> str:
    """Adjective and noun joined by a hyphen, as RULER's keys are; index from 0 to COMPOUND_COUNT - 1."""
    return f"{ADJECTIVES[index // len(NOUNS)]}-{NOUNS[index % len(NOUNS)]}"


COMPOUND_COUNT = len(ADJECTIVES) * len(NOUNS)
