"""The facts the model is taught, as tables. Data only: the wordings are in facts.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Country:
    name: str
    capital: str
    continent: str
    language: str


@dataclass(frozen=True)
class Animal:
    name: str
    plural: str
    home: str
    food: str
    young: str
    sound: str  # "" when it has no everyday word


def _words(text: str) -> list[str]:
    return text.split()


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


COUNTRIES = [
    Country(*row)
    for row in _rows("""
France | Paris | Europe | French
Germany | Berlin | Europe | German
Italy | Rome | Europe | Italian
Spain | Madrid | Europe | Spanish
Portugal | Lisbon | Europe | Portuguese
the United Kingdom | London | Europe | English
Ireland | Dublin | Europe | English
the Netherlands | Amsterdam | Europe | Dutch
Belgium | Brussels | Europe | Dutch
Luxembourg | Luxembourg | Europe | French
Switzerland | Bern | Europe | German
Austria | Vienna | Europe | German
Denmark | Copenhagen | Europe | Danish
Sweden | Stockholm | Europe | Swedish
Norway | Oslo | Europe | Norwegian
Finland | Helsinki | Europe | Finnish
Iceland | Reykjavik | Europe | Icelandic
Poland | Warsaw | Europe | Polish
Czechia | Prague | Europe | Czech
Slovakia | Bratislava | Europe | Slovak
Hungary | Budapest | Europe | Hungarian
Romania | Bucharest | Europe | Romanian
Bulgaria | Sofia | Europe | Bulgarian
Greece | Athens | Europe | Greek
Albania | Tirana | Europe | Albanian
Serbia | Belgrade | Europe | Serbian
Croatia | Zagreb | Europe | Croatian
Slovenia | Ljubljana | Europe | Slovene
Ukraine | Kyiv | Europe | Ukrainian
Russia | Moscow | Europe | Russian
Estonia | Tallinn | Europe | Estonian
Latvia | Riga | Europe | Latvian
Lithuania | Vilnius | Europe | Lithuanian
Malta | Valletta | Europe | Maltese
Turkey | Ankara | Asia | Turkish
China | Beijing | Asia | Chinese
Japan | Tokyo | Asia | Japanese
South Korea | Seoul | Asia | Korean
India | New Delhi | Asia | Hindi
Pakistan | Islamabad | Asia | Urdu
Bangladesh | Dhaka | Asia | Bengali
Nepal | Kathmandu | Asia | Nepali
Thailand | Bangkok | Asia | Thai
Vietnam | Hanoi | Asia | Vietnamese
Cambodia | Phnom Penh | Asia | Khmer
Indonesia | Jakarta | Asia | Indonesian
Malaysia | Kuala Lumpur | Asia | Malay
the Philippines | Manila | Asia | Filipino
Mongolia | Ulaanbaatar | Asia | Mongolian
Iran | Tehran | Asia | Persian
Iraq | Baghdad | Asia | Arabic
Saudi Arabia | Riyadh | Asia | Arabic
Jordan | Amman | Asia | Arabic
Lebanon | Beirut | Asia | Arabic
Syria | Damascus | Asia | Arabic
Qatar | Doha | Asia | Arabic
Georgia | Tbilisi | Asia | Georgian
Armenia | Yerevan | Asia | Armenian
Azerbaijan | Baku | Asia | Azerbaijani
Uzbekistan | Tashkent | Asia | Uzbek
Egypt | Cairo | Africa | Arabic
Morocco | Rabat | Africa | Arabic
Algeria | Algiers | Africa | Arabic
Tunisia | Tunis | Africa | Arabic
Libya | Tripoli | Africa | Arabic
Sudan | Khartoum | Africa | Arabic
Ethiopia | Addis Ababa | Africa | Amharic
Kenya | Nairobi | Africa | Swahili
Uganda | Kampala | Africa | English
Rwanda | Kigali | Africa | Kinyarwanda
Ghana | Accra | Africa | English
Nigeria | Abuja | Africa | English
Senegal | Dakar | Africa | French
Mali | Bamako | Africa | French
Angola | Luanda | Africa | Portuguese
Mozambique | Maputo | Africa | Portuguese
Zambia | Lusaka | Africa | English
Zimbabwe | Harare | Africa | English
Madagascar | Antananarivo | Africa | Malagasy
Somalia | Mogadishu | Africa | Somali
Canada | Ottawa | North America | English
the United States | Washington | North America | English
Mexico | Mexico City | North America | Spanish
Guatemala | Guatemala City | North America | Spanish
Honduras | Tegucigalpa | North America | Spanish
Nicaragua | Managua | North America | Spanish
Panama | Panama City | North America | Spanish
Cuba | Havana | North America | Spanish
Jamaica | Kingston | North America | English
Colombia | Bogota | South America | Spanish
Venezuela | Caracas | South America | Spanish
Ecuador | Quito | South America | Spanish
Peru | Lima | South America | Spanish
Brazil | Brasilia | South America | Portuguese
Chile | Santiago | South America | Spanish
Argentina | Buenos Aires | South America | Spanish
Uruguay | Montevideo | South America | Spanish
Paraguay | Asuncion | South America | Spanish
Australia | Canberra | Oceania | English
New Zealand | Wellington | Oceania | English
Fiji | Suva | Oceania | English
""")
]

ANIMALS = [
    Animal(*row)
    for row in _rows("""
cat | cats | houses | fish and meat | kitten | meow
dog | dogs | houses | meat | puppy | woof
cow | cows | farms | grass | calf | moo
horse | horses | farms | grass and hay | foal | neigh
sheep | sheep | farms | grass | lamb | baa
pig | pigs | farms | roots and corn | piglet | oink
hen | hens | farms | seeds | chick | cluck
duck | ducks | ponds | plants and insects | duckling | quack
goose | geese | lakes | grass | gosling | honk
goat | goats | mountains | leaves and grass | kid | bleat
frog | frogs | ponds | insects | tadpole | croak
lion | lions | savannas | meat | cub | roar
tiger | tigers | forests | meat | cub | roar
bear | bears | forests | fish and berries | cub | growl
wolf | wolves | forests | meat | pup | howl
fox | foxes | forests | mice and berries | kit | bark
deer | deer | forests | leaves and grass | fawn |
rabbit | rabbits | meadows | grass and carrots | kit |
mouse | mice | fields | seeds | pup | squeak
owl | owls | forests | mice | owlet | hoot
eagle | eagles | mountains | fish and small animals | eaglet | screech
bee | bees | hives | nectar | larva | buzz
ant | ants | nests | seeds and insects | larva |
snake | snakes | deserts | mice | snakelet | hiss
elephant | elephants | savannas | leaves and fruit | calf | trumpet
giraffe | giraffes | savannas | leaves | calf |
zebra | zebras | savannas | grass | foal | bark
monkey | monkeys | jungles | fruit | infant | chatter
kangaroo | kangaroos | grasslands | grass | joey |
koala | koalas | trees | leaves | joey |
panda | pandas | bamboo forests | bamboo | cub |
camel | camels | deserts | dry plants | calf | grunt
penguin | penguins | cold seas | fish | chick |
seal | seals | cold seas | fish | pup | bark
whale | whales | oceans | krill | calf | song
dolphin | dolphins | oceans | fish | calf | click
shark | sharks | oceans | fish | pup |
turtle | turtles | seas | plants | hatchling |
spider | spiders | webs | insects | spiderling |
butterfly | butterflies | gardens | nectar | caterpillar |
""")
]

COLORS = [
    ("the sky", "blue"),
    ("grass", "green"),
    ("snow", "white"),
    ("a banana", "yellow"),
    ("a strawberry", "red"),
    ("a lemon", "yellow"),
    ("coal", "black"),
    ("chocolate", "brown"),
    ("a carrot", "orange"),
    ("an emerald", "green"),
    ("a ruby", "red"),
    ("milk", "white"),
    ("the sun", "yellow"),
    ("a tomato", "red"),
    ("a flamingo", "pink"),
    ("the sea", "blue"),
    ("a lime", "green"),
    ("an eggplant", "purple"),
    ("an elephant", "gray"),
    ("blood", "red"),
]

OPPOSITES = [
    tuple(pair.split("/"))
    for pair in _words(
        "hot/cold big/small fast/slow up/down left/right open/closed day/night early/late "
        "full/empty happy/sad hard/soft heavy/light high/low long/short new/old rich/poor "
        "strong/weak tall/tiny thick/thin wet/dry young/aged clean/dirty deep/shallow "
        "first/last good/bad inside/outside loud/quiet near/far push/pull right/wrong "
        "rough/smooth safe/dangerous sharp/blunt start/stop sweet/sour true/false wide/narrow "
        "win/lose buy/sell give/take love/hate laugh/cry north/south east/west above/below "
        "before/after always/never more/less bright/dark brave/afraid awake/asleep "
    )
]

ELEMENTS = [
    (name, symbol, number)
    for name, symbol, number in (
        ("hydrogen", "H", 1),
        ("helium", "He", 2),
        ("lithium", "Li", 3),
        ("carbon", "C", 6),
        ("nitrogen", "N", 7),
        ("oxygen", "O", 8),
        ("fluorine", "F", 9),
        ("neon", "Ne", 10),
        ("sodium", "Na", 11),
        ("magnesium", "Mg", 12),
        ("aluminum", "Al", 13),
        ("silicon", "Si", 14),
        ("phosphorus", "P", 15),
        ("sulfur", "S", 16),
        ("chlorine", "Cl", 17),
        ("argon", "Ar", 18),
        ("potassium", "K", 19),
        ("calcium", "Ca", 20),
        ("iron", "Fe", 26),
        ("nickel", "Ni", 28),
        ("copper", "Cu", 29),
        ("zinc", "Zn", 30),
        ("silver", "Ag", 47),
        ("tin", "Sn", 50),
        ("iodine", "I", 53),
        ("gold", "Au", 79),
        ("mercury", "Hg", 80),
        ("lead", "Pb", 82),
        ("uranium", "U", 92),
    )
]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = _words(
    "January February March April May June July August September October November December"
)
PLANETS = _words("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune")
ORDINALS = _words(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
)
NUMBER_WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
SHAPES = [
    ("triangle", "three"),
    ("square", "four"),
    ("rectangle", "four"),
    ("pentagon", "five"),
    ("hexagon", "six"),
    ("octagon", "eight"),
]
LEGS = [("a dog", "four"), ("a bird", "two"), ("an ant", "six"), ("a spider", "eight")]
GENERAL = [
    ("Water freezes at", "0 degrees Celsius"),
    ("Water boils at", "100 degrees Celsius"),
    ("Water is made of", "hydrogen and oxygen"),
    ("The largest planet is", "Jupiter"),
    ("The largest ocean is", "the Pacific Ocean"),
    ("The highest mountain is", "Mount Everest"),
    ("The fastest land animal is", "the cheetah"),
    ("The largest animal is", "the blue whale"),
    ("The Earth goes around", "the Sun"),
    ("The Moon goes around", "the Earth"),
    ("A week has", "seven days"),
    ("A year has", "twelve months"),
    ("A day has", "24 hours"),
    ("An hour has", "60 minutes"),
    ("A minute has", "60 seconds"),
    ("Bees make", "honey"),
    ("Bread is made from", "flour"),
    ("Cheese is made from", "milk"),
    ("Plants need", "water and light"),
    ("We see with our", "eyes"),
    ("We hear with our", "ears"),
]

CATEGORIES = {
    "fruits": "apple banana cherry grape lemon mango orange peach pear plum",
    "vegetables": "carrot potato onion tomato cabbage spinach pepper broccoli",
    "animals": "cat dog horse lion bear fox rabbit elephant",
    "birds": "eagle owl duck hen penguin parrot swan crow",
    "colors": "red blue green yellow orange purple black white",
    "tools": "hammer saw drill wrench ladder shovel rake knife",
    "drinks": "water tea coffee milk juice lemonade cocoa soda",
    "sports": "tennis football swimming running cycling rowing skiing boxing",
    "jobs": "teacher doctor baker farmer nurse pilot painter driver",
    "instruments": "piano guitar violin drum flute trumpet harp cello",
    "shapes": "circle square triangle rectangle pentagon hexagon octagon oval",
    "clothes": "shirt coat hat shoe sock scarf dress glove",
    "vehicles": "car bus train bicycle boat plane truck tram",
    "metals": "iron copper gold silver tin zinc lead nickel",
    "trees": "oak pine birch maple willow elm cedar ash",
    "rooms": "kitchen bedroom bathroom hall cellar attic office garage",
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "countries": "France Japan Brazil Egypt Canada India Kenya Norway Peru Spain",
}
MEMBERS = {name: members.split() for name, members in CATEGORIES.items()}

PEOPLE = _words(
    "Anna Ben Carla David Emma Felix Grace Henry Irene Jack Kate Leo Maria Nina Oscar Paul "
    "Rosa Sam Tina Victor Wendy Adam Bella Chris Diana Eric Fiona George Hannah Ivan Julia "
    "Karl Laura Mark Nora Olga Peter Ruth Simon Tom Uma Vera Walter Alice Bruno Clara Dora "
    "Edgar Frida Gina Hugo Ida Jonas Lena Marco Noah Otto Petra Quinn Robert Sara Theo"
)
SYLLABLES = _words("ba do ka li mo ne ra su ti vo ja ke lu mi no pa ri sa to ze")
THINGS = _words(
    "apples pears books pens cups chairs lamps eggs coins stamps cards boxes bottles plates "
    "balls hats shoes keys bags flowers"
)
