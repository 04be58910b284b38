"""What does not change the meaning of a prompt does not change its tokens."""

import pytest
import torch
from tokenizers import normalizers

from tokenshuffle_core.checkpoints import BUNDLED
from tokenshuffle_core.normalizer import normalizer
from tokenshuffle_core.pipeline import load
from tokenshuffle_core.text_tokenizer import TextTokenizer

# Six prompts in each language, each with three variations.
PROMPTS = [
    ("red apple, 3d style", "A red apple, 3D style.",
     "the  red apple ,3d style", "\tRED APPLE, 3-D style!"),
    ("cat left of dog", "a cat left of a dog", "The cat left of the dog.", "“Cat left of dog”"),
    ("two owls, flat style", "Two owls,flat style",
     "two  owls , flat style...", "ｔｗｏ　ｏｗｌｓ，ｆｌａｔ　ｓｔｙｌｅ"),
    ("unicorn on blue background", "a unicorn on a blue background",
     "An Unicorn on the blue background", "unicorn on blue background !"),
    ("hourglass", "an hourglass", "Hourglass.", " 'hourglass' "),
    ("t-rex, noto style", "a T-Rex, noto style", "the t-rex, Noto style。", "T‑REX, noto style"),
    ("猫，3d风格", "一只猫，3D风格。", "猫, 3D风格", "  猫 ，３Ｄ风格！"),
    ("红苹果", "一个红苹果", "红苹果。", "「红苹果」"),
    ("两个猫头鹰，扁平风格", "两个猫头鹰,扁平风格",
     "两个猫头鹰、扁平风格。", "两个猫头鹰 ， 扁平风格"),
    ("汽车，蓝色背景", "一辆汽车，蓝色背景", "汽车,蓝色背景", "汽车，蓝色背景…"),
    ("猫在狗的左边", "猫在狗的左边。", " 猫在狗的左边！", "“猫在狗的左边”"),
    ("花，noto风格", "一朵花，Noto风格", "花, NOTO风格", "花；noto风格"),
    ("りんご、3dスタイル", "一つのりんご、3Dスタイル。",
     "りんご、３Ｄスタイル", "りんご, 3Dスタイル"),
    ("猫", "一匹の猫", "猫。", "「猫」"),
    ("左に犬、右に猫", "左に犬、右に猫。", "左に犬，右に猫", "左に犬 、 右に猫"),
    ("青い車", "1台の青い車", "青い車！", " 青い車 "),
    ("バナナ、フラットスタイル", "ﾊﾞﾅﾅ、フラットスタイル",
     "バナナ,フラットスタイル", "『バナナ』、フラットスタイル。"),
    ("星、黒い背景", "一個の星、黒い背景", "星、 黒い背景", "星、黒い背景…"),
    ("고양이, 3d 스타일", "하나의 고양이, 3D 스타일",
     "고양이 ,3d  스타일.", "고양이, ３Ｄ 스타일!"),
    ("빨간 사과", "빨간  사과", "빨간 사과.", "'빨간 사과'"),
    ("파란 자동차, 플랫 스타일", "파란 자동차,플랫 스타일",
     "파란 자동차 , 플랫 스타일!", "파란 자동차; 플랫 스타일"),
    ("왼쪽에 개, 오른쪽에 고양이", "왼쪽에 개,오른쪽에 고양이",
     "왼쪽에 개, 오른쪽에 고양이。", "왼쪽에 개，오른쪽에 고양이"),
    ("별 둘", "별 둘!", "“별 둘”", "별\n둘"),
    ("바나나 x 3", "바나나 X 3", "바나나  x 3.", "바나나 x ３"),
    ("roter apfel, 3d-stil", "Ein roter Apfel, 3D-Stil",
     "Der Roter Apfel, 3D–Stil.", "roter  Apfel ,3D-Stil!"),
    ("katze und hund", "eine Katze und ein Hund", "Die Katze und der Hund.", "„Katze und Hund“"),
    ("blaues auto im flachen stil", "ein blaues Auto im flachen Stil",
     "Das Blaues auto im flachen Stil", "BLAUES AUTO IM FLACHEN STIL"),
    ("links katze, rechts hund", "links eine Katze, rechts ein Hund",
     "Links die Katze , rechts der Hund", "links Katze; rechts Hund."),
    ("sonnenblume, blauer hintergrund", "eine Sonnenblume, blauer Hintergrund",
     "die Sonnenblume,blauer Hintergrund", "»Sonnenblume«, blauer Hintergrund"),
    ("drei stück: katze", "Drei Stück : Katze", "drei Stück:Katze", "drei  Stück: Katze."),
    ("pomme rouge, style 3d", "une pomme rouge, style 3D",
     "La pomme rouge ,style 3D.", "POMME ROUGE, STYLE 3D !"),
    ("ours", "l'ours", "L’ours.", "un ours"),
    ("étoile, fond bleu", "l'étoile, fond bleu",
     "une étoile , fond bleu", "L`Étoile, fond bleu…"),
    ("chat et chien", "un chat et un chien", "Le chat et le chien", "« chat et chien »"),
    ("à gauche : chat, à droite : chien", "à gauche: un chat, à droite: un chien",
     "À gauche : le chat, à droite : le chien.", "à gauche :chat ; à droite :chien"),
    ("voiture bleue en style plat", "une voiture bleue en style plat",
     "La voiture bleue en style plat", "voiture  bleue en style plat!"),
    ("manzana roja, estilo 3d", "una manzana roja, estilo 3D",
     "La manzana roja,estilo 3D.", "¡Manzana roja, estilo 3D!"),
    ("gato y perro", "un gato y un perro", "El gato y el perro", "«Gato y perro»"),
    ("dos gatos", "los dos gatos", "Dos gatos.", "unos dos  gatos"),
    ("coche azul en estilo plano", "el coche azul en estilo plano",
     "un coche azul en estilo plano", "Coche azul en estilo plano…"),
    ("estrella, fondo negro", "una estrella, fondo negro",
     "La estrella , fondo negro", "ESTRELLA,FONDO NEGRO"),
    ("arriba: sol, abajo: casa", "arriba: el sol, abajo: la casa",
     "Arriba : un sol, abajo : una casa", "arriba:sol;abajo:casa"),
    ("maçã vermelha, estilo 3d", "uma maçã vermelha, estilo 3D",
     "A maçã vermelha ,estilo 3D.", "MAÇÃ VERMELHA, ESTILO 3D"),
    ("gato e cachorro", "um gato e um cachorro", "O gato e o cachorro", "“Gato e cachorro”!"),
    ("dois gatos", "os dois gatos", "Dois  gatos.", "uns dois gatos"),
    ("carro azul em estilo plano", "o carro azul em estilo plano",
     "um carro azul em estilo plano", "Carro azul em estilo plano !"),
    ("estrela, fundo preto", "uma estrela, fundo preto",
     "A estrela,fundo preto", "estrela ， fundo preto"),
    ("à esquerda: flor, à direita: sol", "à esquerda: a flor, à direita: o sol",
     "À esquerda : uma flor, à direita : um sol", "à esquerda:flor, à direita:sol."),
    ("mela rossa, stile 3d", "una mela rossa, stile 3D",
     "La mela rossa, stile 3D.", "MELA ROSSA ,STILE 3D"),
    ("orso", "l'orso", "Un orso!", "L’Orso"),
    ("gatto e cane", "il gatto e il cane", "un gatto e un cane", "Gatto e cane…"),
    ("stella, sfondo nero", "la stella, sfondo nero",
     "una stella ,sfondo nero", "“stella”, sfondo nero"),
    ("gatti", "i gatti", "I  Gatti.", "gatti!"),
    ("specchio in stile piatto", "lo specchio in stile piatto",
     "uno specchio in stile piatto", "Specchio in stile piatto."),
    ("красное яблоко, стиль 3d", "Красное яблоко, стиль 3D.",
     "красное яблоко ,стиль  3D", "«Красное яблоко», стиль 3D"),
    ("зелёная звезда", "зеленая звезда", "Зелёная звезда!", "ЗЕЛЁНАЯ ЗВЕЗДА"),
    ("кот и собака", "Кот и собака.", "«кот и собака»", "кот  и собака"),
    ("слева кот, справа собака", "Слева кот,справа собака",
     "слева кот ; справа собака", "слева кот, справа собака…"),
    ("две совы", "Две совы!", " две совы ", "„две совы“"),
    ("дом, синий фон", "Дом , синий фон", "дом,синий фон.", "ДОМ，СИНИЙ ФОН"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """Trained on the canonical forms alone."""
    return TextTokenizer.train([first for first, *_ in PROMPTS], 1000, 8)


@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda prompts: prompts[0])
def test_the_same_tokens(prompts, tokenizer):
    assert len(PROMPTS) == 60
    assert len(set(prompts)) == 4
    first, *others = (tokenizer.encode(prompt) for prompt in prompts)
    assert first
    assert all(other == first for other in others)
    assert tokenizer.encode_all(list(prompts)) == [first] * 4


def test_different_prompts_keep_different_tokens(tokenizer):
    assert len({tuple(tokenizer.encode(prompts[0])) for prompts in PROMPTS}) == 60
    for one, other in (
        ("an ant", "a tan"), ("a cat, a dog", "a cat a dog"), ("lamp", "amp"), ("3d", "2d"),
        ("bow and arrow", "arrow and bow"), ("theme", "me"), ("pomme d'amour", "pomme amour"),
        ("t-rex", "t rex"), ("猫", "狗"), ("2 x cat", "x cat"),
    ):  # fmt: skip
        assert normalizer().normalize_str(one) != normalizer().normalize_str(other)


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        ("cat\n\ndog", "cat dog"),
        ("la maison sur fond bleu", "maison, fond bleu"),
        ("eine Katze auf blauem Hintergrund", "katze, blauer Hintergrund"),
        ("a cat with a blue background", "cat, blue background"),
        ("两只猫", "两个猫"),
        ("고양이 두 마리", "고양이 둘"),
        ("gray cat", "grey cat"),
        ("❤️", "❤"),
        ("l´ours", "ours"),
        ("os gatos", "gatos"),
        ("cat - 3d-style", "cat, 3d style"),
    ],
)
def test_other_words_for_the_same(prompt, same):
    assert normalizer().normalize_str(prompt) == normalizer().normalize_str(same)


def test_what_only_looks_like_an_article_stays():
    normalize = normalizer().normalize_str
    assert normalize("un os") == "os"  # a bone
    assert normalize("十一个苹果") == "十一个苹果"  # eleven
    assert normalize("统一个") == "统一个"


def test_words_that_contain_an_article_stay_whole():
    normalize = normalizer().normalize_str
    for text in ("theatre", "lasso", "a-frame", "den's", "o'clock", "island", "unicorn"):
        assert normalize(text) == text


def test_nothing_but_articles_and_punctuation_asks_for_any_picture(tokenizer):
    for text in ("the", " a ", "...", "“”", "\n"):
        assert tokenizer.encode(text) == tokenizer.encode("")


def test_a_stored_tokenizer_keeps_its_own_rule(tokenizer):
    """The rule is part of its JSON, so that older checkpoints read prompts as before."""
    again = TextTokenizer.from_json(tokenizer.to_json())
    assert again.encode("The red apple.") == again.encode("red apple")
    again.tokenizer.normalizer = normalizers.Lowercase()
    older = TextTokenizer.from_json(again.to_json())
    assert older.encode("the red apple.") != older.encode("red apple")
    assert older.encode("Red Apple") == older.encode("red apple")


@pytest.mark.parametrize("prompts", PROMPTS[::10], ids=lambda prompts: prompts[0])
def test_the_bundled_model_reads_the_same(prompts):
    pipeline = load(BUNDLED)
    ids = [pipeline.encode_prompt(prompt) for prompt in prompts]
    assert all(each == ids[0] for each in ids)
    assert torch.tensor(ids[0]).max() < pipeline.config.model.text_vocabulary
