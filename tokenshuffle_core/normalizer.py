"""What does not change the meaning of a prompt, and is left out before it is encoded."""

from tokenizers import Regex, normalizers

ARTICLES = (
    "a|an|the|der|die|das|den|dem|des|ein|eine|einen|einem|einer|eines|le|la|les|un|une|el|los|las|"
    "lo|una|unos|unas|il|i|gli|uno|o|um|uma|uns|umas"
)
# Measure words of Chinese, Japanese and Korean.
MEASURES = "个個只隻颗顆朵辆輛棵头頭匹条條架艘把块塊杯碗本台座枚张張根支片位顶頂"
COUNTERS = "つ匹個台本枚頭羽輪粒軒機隻杯冊足着"
UNITS = "(?:마리|개|대|송이|채|자루|그루|장|잔|권|척|켤레|벌|명)(?:의)?"
NUMBERS = (("두|2", "둘"), ("세|3", "셋"), ("네|4", "넷"), ("다섯|5", "다섯"))
ENDS = r"\A[\s.,:!?¡¿。·']+|[\s.,:!?。·']+\z", ""
START, END = r"(?<![\w'-])", r"(?![\w'-])"
# What does not change the meaning of a prompt, as (pattern, replacement) on lowercase NFKC text.
# The engine is Oniguruma, in which ^ and $ match at every line.
RULES = (
    ("[\u200b-\u200f\u2060\ufeff\u00ad\ufe0e\ufe0f]", ""),  # invisible
    (" \u0301", "'"),  # NFKC's form of an acute accent alone
    ("ё", "е"),
    ("[’‘ʼ`]", "'"),
    ("[‐‑–—]", "-"),
    (r"\s+-+\s+", ", "),
    ("×", "x"),
    ('["“”„«»「」『』]', " "),
    (r"\b3-d\b", "3d"),
    (r"(?<=3d|flat|modern|noto)-(?=style\b)", " "),
    (r"\bgray\b", "grey"),
    ENDS,
    (r"\s*[,;、]\s*", ", "),
    (r"\s*:\s*", ": "),
    # Articles; Portuguese "os" and "as" only before a plural, because a French "os" is a bone.
    (rf"{START}d'une?(?=\s)", "de"),
    (rf"{START}(?:{ARTICLES}){END}|{START}(?:l|un)'(?=\w)|{START}(?:os|as)(?=\s+\w+s\b)", " "),
    (rf"(?:(?<![\d十])[一1][{COUNTERS}]|ひとつ)の|(?<![十第唯统統])一[{MEASURES}]", " "),
    (rf"(?<!\w)(?:하나의|(?:한 |1 ?){UNITS})(?!\w)", " "),
    # A number with the measure word of any noun.
    (rf"(?<=[两二三四五2-5])[{MEASURES}](?=[\u4e00-\u9fff])", "个"),
    *((rf"(?<!\w)(?:{number}) ?{UNITS}(?!\w)", word) for number, word in NUMBERS),
    (r"\s+", " "),
    # "On a blue background" in other words.
    (r" (?:sur|sobre|con|com|em|num|su) (?=(?:fond|fondo|fundo|sfondo)\b)", ", "),
    (r"(?<=\w)e[mn] hintergrund\b", "er hintergrund"),
    (r" (?:auf|vor|mit) (?=\w+ hintergrund\b)", ", "),
    (r" (?:with|against) (?=\w+ background\b)", ", "),
    ENDS,
)
# Rules that an older version had in their place, and that its checkpoints keep.
FORMER_END = r"[\s.,:!?…。·']+$"
FORMER_RULES = (
    ("[’‘ʼ`´]", "'"),
    (rf"^[\s.,:!?¡¿…。·']+|{FORMER_END}", ""),
    (rf"^[\s.,:!?…。·']+|{FORMER_END}", ""),
    (
        rf"{START}(?:{ARTICLES.replace('uno|o|um', 'uno|o|os|as|um')}){END}|{START}(?:l|un)'(?=\w)",
        " ",
    ),
    (
        "[一1][つ匹個台本枚]の|一[个個只隻颗顆朵辆輛棵头頭匹条條架艘把块塊杯碗本台座枚张張]"
        r"|(?<!\w)하나의(?!\w)",
        " ",
    ),
)


def normalizer() -> normalizers.Normalizer:
    """Lowercase NFKC without what does not change the meaning: extra white space, quotation marks,
    the punctuation at the end, and the articles of ten languages.

    It is stored with the vocabulary, so a checkpoint keeps the one that it was trained with.
    """
    replaced = [normalizers.Replace(Regex(pattern), content) for pattern, content in RULES]
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *replaced])
