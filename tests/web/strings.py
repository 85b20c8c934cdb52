"""Strings in forty scripts, with emoji, white space and control characters."""

import random

# The first letter of a script, and the number of characters from there on to choose from.
SCRIPTS = {
    "Latin": (0x61, 26), "Latin-1": (0xC0, 64), "Latin Extended": (0x100, 128), "IPA": (0x250, 96), "Greek": (0x391, 57),
    "Greek Extended": (0x1F00, 22), "Cyrillic": (0x410, 64), "Armenian": (0x531, 38), "Hebrew": (0x5D0, 27),
    "Hebrew points": (0x5B0, 59), "Arabic": (0x620, 43), "Arabic marks": (0x64B, 21), "Syriac": (0x710, 48),
    "Thaana": (0x780, 49), "N'Ko": (0x7CA, 33), "Devanagari": (0x901, 77), "Bengali": (0x981, 75), "Gurmukhi": (0xA01, 77),
    "Gujarati": (0xA81, 77), "Oriya": (0xB01, 87), "Tamil": (0xB82, 76), "Telugu": (0xC01, 77), "Kannada": (0xC82, 76),
    "Malayalam": (0xD02, 76), "Sinhala": (0xD82, 78), "Thai": (0xE01, 58), "Lao": (0xE81, 70), "Tibetan": (0xF40, 72),
    "Myanmar": (0x1000, 74), "Georgian": (0x10D0, 43), "Hangul jamo": (0x1100, 80), "Ethiopic": (0x1200, 73),
    "Cherokee": (0x13A0, 86), "Canadian Aboriginal": (0x1401, 90), "Ogham": (0x1680, 29), "Runic": (0x16A0, 75),
    "Khmer": (0x1780, 84), "Mongolian": (0x1820, 88), "Hiragana": (0x3041, 86), "Katakana": (0x30A1, 90),
    "Bopomofo": (0x3105, 43), "Han": (0x4E00, 300), "Yi": (0xA000, 200), "Hangul": (0xAC00, 300), "Gothic": (0x10330, 27),
    "Deseret": (0x10400, 80), "Cuneiform": (0x12000, 90), "Mathematical": (0x1D400, 100), "Adlam": (0x1E900, 68),
}  # fmt: skip
SPACES = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2009\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
CONTROLS = "\x00\x01\x07\x08\x1b\x7f\x80\x9f\xad\u0600\u200c\u200d\u200e\u202e\u2060\ue000\ufffd\uffff\U000e0041"
EMOJI = ["🙂", "👍🏽", "👨‍👩‍👧", "🇩🇪", "❤️", "1️⃣", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "☕"]
MARKS = [
    *"'\"!?,.;:-_()[]{}<>|/\\@#$%^&*+=~`",
    "'s",
    "'T",
    "don't",
    "I'LL",
    "12345",
    "٣٤",
    "Ⅷ",
    "½",
    "e\u0301",
    "ǅ",
    "İ",
    "ß",
    "ſ",
    "<|",
]


def make_strings(count: int = 1000) -> list[str]:
    """Words in one script each, between spaces of every kind, emoji, marks and control characters."""
    source = random.Random(0)
    scripts = [*SCRIPTS.values()]
    strings = []
    for index in range(count):
        start, size = scripts[index % len(scripts)]
        parts = []
        for _ in range(source.randrange(1, 9)):
            word = "".join(chr(start + source.randrange(size)) for _ in range(source.randrange(1, 9)))
            separator = (
                " " * source.choice([1, 1, 1, 0, 2, 3])
                if source.random() < 0.7
                else source.choice(SPACES) * source.randrange(1, 3)
            )
            parts += [word, source.choice([*MARKS, *EMOJI, *CONTROLS]) if source.random() < 0.4 else "", separator]
        strings.append("".join(parts))
    return strings
