"""The facts: countries with their capital, continent, currency and main language.

Where a country has several, the one named here is the most widely used. Spellings are
plain ASCII. A world of more countries has invented ones, whose capital, currency and
language are theirs alone.
"""

from typing import NamedTuple

import numpy as np

from stagecraft.worlds.countries import coined

ATTRIBUTES = ("capital", "continent", "currency", "language")

_TABLE = """
Afghanistan|Kabul|Asia|afghani|Pashto
Albania|Tirana|Europe|lek|Albanian
Algeria|Algiers|Africa|dinar|Arabic
Angola|Luanda|Africa|kwanza|Portuguese
Argentina|Buenos Aires|South America|peso|Spanish
Armenia|Yerevan|Asia|dram|Armenian
Australia|Canberra|Oceania|dollar|English
Austria|Vienna|Europe|euro|German
Azerbaijan|Baku|Asia|manat|Azerbaijani
Bahrain|Manama|Asia|dinar|Arabic
Bangladesh|Dhaka|Asia|taka|Bengali
Belarus|Minsk|Europe|ruble|Russian
Botswana|Gaborone|Africa|pula|Tswana
Brazil|Brasilia|South America|real|Portuguese
Bulgaria|Sofia|Europe|lev|Bulgarian
Burundi|Gitega|Africa|franc|Kirundi
Cambodia|Phnom Penh|Asia|riel|Khmer
Cameroon|Yaounde|Africa|franc|French
Canada|Ottawa|North America|dollar|English
Chad|N'Djamena|Africa|franc|Arabic
Chile|Santiago|South America|peso|Spanish
China|Beijing|Asia|yuan|Mandarin
Colombia|Bogota|South America|peso|Spanish
Croatia|Zagreb|Europe|euro|Croatian
Cuba|Havana|North America|peso|Spanish
Czechia|Prague|Europe|koruna|Czech
Denmark|Copenhagen|Europe|krone|Danish
Ecuador|Quito|South America|dollar|Spanish
Egypt|Cairo|Africa|pound|Arabic
Eritrea|Asmara|Africa|nakfa|Tigrinya
Estonia|Tallinn|Europe|euro|Estonian
Ethiopia|Addis Ababa|Africa|birr|Amharic
Fiji|Suva|Oceania|dollar|Fijian
Finland|Helsinki|Europe|euro|Finnish
France|Paris|Europe|euro|French
Gambia|Banjul|Africa|dalasi|English
Georgia|Tbilisi|Asia|lari|Georgian
Germany|Berlin|Europe|euro|German
Ghana|Accra|Africa|cedi|English
Greece|Athens|Europe|euro|Greek
Guatemala|Guatemala City|North America|quetzal|Spanish
Guinea|Conakry|Africa|franc|French
Haiti|Port-au-Prince|North America|gourde|Creole
Honduras|Tegucigalpa|North America|lempira|Spanish
Hungary|Budapest|Europe|forint|Hungarian
Iceland|Reykjavik|Europe|krona|Icelandic
India|New Delhi|Asia|rupee|Hindi
Indonesia|Jakarta|Asia|rupiah|Indonesian
Iran|Tehran|Asia|rial|Persian
Iraq|Baghdad|Asia|dinar|Arabic
Ireland|Dublin|Europe|euro|English
Italy|Rome|Europe|euro|Italian
Jamaica|Kingston|North America|dollar|English
Japan|Tokyo|Asia|yen|Japanese
Jordan|Amman|Asia|dinar|Arabic
Kazakhstan|Astana|Asia|tenge|Kazakh
Kenya|Nairobi|Africa|shilling|Swahili
Kuwait|Kuwait City|Asia|dinar|Arabic
Laos|Vientiane|Asia|kip|Lao
Latvia|Riga|Europe|euro|Latvian
Lebanon|Beirut|Asia|pound|Arabic
Libya|Tripoli|Africa|dinar|Arabic
Lithuania|Vilnius|Europe|euro|Lithuanian
Madagascar|Antananarivo|Africa|ariary|Malagasy
Malawi|Lilongwe|Africa|kwacha|Chichewa
Malaysia|Kuala Lumpur|Asia|ringgit|Malay
Mexico|Mexico City|North America|peso|Spanish
Moldova|Chisinau|Europe|leu|Romanian
Mongolia|Ulaanbaatar|Asia|tugrik|Mongolian
Morocco|Rabat|Africa|dirham|Arabic
Mozambique|Maputo|Africa|metical|Portuguese
Myanmar|Naypyidaw|Asia|kyat|Burmese
Namibia|Windhoek|Africa|dollar|English
Nepal|Kathmandu|Asia|rupee|Nepali
Netherlands|Amsterdam|Europe|euro|Dutch
Nicaragua|Managua|North America|cordoba|Spanish
Niger|Niamey|Africa|franc|Hausa
Nigeria|Abuja|Africa|naira|English
Norway|Oslo|Europe|krone|Norwegian
Oman|Muscat|Asia|rial|Arabic
Pakistan|Islamabad|Asia|rupee|Urdu
Panama|Panama City|North America|balboa|Spanish
Papua New Guinea|Port Moresby|Oceania|kina|English
Paraguay|Asuncion|South America|guarani|Spanish
Peru|Lima|South America|sol|Spanish
Philippines|Manila|Asia|peso|Filipino
Poland|Warsaw|Europe|zloty|Polish
Portugal|Lisbon|Europe|euro|Portuguese
Qatar|Doha|Asia|riyal|Arabic
Romania|Bucharest|Europe|leu|Romanian
Russia|Moscow|Europe|ruble|Russian
Samoa|Apia|Oceania|tala|Samoan
Senegal|Dakar|Africa|franc|French
Serbia|Belgrade|Europe|dinar|Serbian
Slovakia|Bratislava|Europe|euro|Slovak
Somalia|Mogadishu|Africa|shilling|Somali
Spain|Madrid|Europe|euro|Spanish
Sweden|Stockholm|Europe|krona|Swedish
Switzerland|Bern|Europe|franc|German
Syria|Damascus|Asia|pound|Arabic
Thailand|Bangkok|Asia|baht|Thai
Tonga|Nuku'alofa|Oceania|paanga|Tongan
Tunisia|Tunis|Africa|dinar|Arabic
Turkey|Ankara|Asia|lira|Turkish
Ukraine|Kyiv|Europe|hryvnia|Ukrainian
Uruguay|Montevideo|South America|peso|Spanish
Vietnam|Hanoi|Asia|dong|Vietnamese
Zambia|Lusaka|Africa|kwacha|English
"""


class Country(NamedTuple):
    """One entity with its four facts."""

    name: str
    capital: str
    continent: str
    currency: str
    language: str


COUNTRIES = tuple(Country(*line.split("|")) for line in _TABLE.split("\n") if line)
VALUES = {a: tuple(sorted({getattr(c, a) for c in COUNTRIES})) for a in ATTRIBUTES}


def _invented(count):
    columns = {kind: coined.words(kind, count) for kind in coined.PARTS}
    columns["continent"] = [VALUES["continent"][i % 6] for i in range(count)]
    rows = zip(*(columns[field] for field in Country._fields), strict=True)
    return tuple(Country(*row) for row in rows)


MOST = 1000  # countries of a world
INVENTED = _invented(MOST - len(COUNTRIES))
KNOWN = COUNTRIES + INVENTED  # all that any world states
BY_NAME = {c.name: c for c in KNOWN}

# The entity of the single prompt shown through every stage: always a test entity.
SHOWN = "France"


class Split(NamedTuple):
    """Which countries a stage may see: half are demonstrated, the rest held out."""

    train: tuple
    dev: tuple
    test: tuple


def countries(entities=0):
    """Returns the countries of a world: the real ones, then invented ones.

    Args:
        entities: how many; 0 for the real ones.
    """
    return KNOWN[:entities] if entities else COUNTRIES


def split(seed, size="full", entities=0):
    """Splits the countries by role, a function of the seed.

    Args:
        seed: int.
        size: "full" for all, "tiny" for a handful where `entities` is 0.
        entities: as of `countries`.
    """
    everyone = countries(entities)
    names = [c for c in everyone if c.name != SHOWN]
    order = np.random.default_rng([seed, 0]).permutation(len(names))
    shuffled = [names[i] for i in order]
    total = 16 if size == "tiny" and not entities else len(everyone)
    half, quarter = total // 2, total // 4
    return Split(
        tuple(shuffled[:half]),
        tuple(shuffled[half : half + quarter]),
        (BY_NAME[SHOWN], *shuffled[half + quarter : total - 1]),
    )
