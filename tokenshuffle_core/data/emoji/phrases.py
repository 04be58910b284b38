"""What captions are made of in each language: styles, backgrounds, numbers, places.

The phrases stand side by side in a caption, so that no name has to be inflected. Templates take
{first} and {second}, the names of what is placed; English ones also {a_first} and {a_second}, with
an article, and {plural}. The first template of a kind is the canonical one.
"""

from dataclasses import dataclass

from .pictures import BACKGROUNDS


@dataclass(frozen=True)
class Phrases:
    styles: dict[str, str]  # style -> phrase
    backgrounds: dict[str, str]  # name of the colour -> phrase
    numbers: dict[int, str]  # 2, 3 and 4 -> word
    count: tuple[str, ...]  # these also take {number} and {digit}
    beside: tuple[str, ...]  # {first} is at the left
    above: tuple[str, ...]  # {first} is at the top
    single: tuple[str, ...] = ("{first}",)
    comma: str = ", "


def _phrases(styles: str, background: str, colours: str, numbers: str, **templates) -> Phrases:
    names = zip(BACKGROUNDS, colours.split(", "), strict=True)
    return Phrases(
        styles=dict(zip(("3d", "modern", "flat", "noto"), styles.split(", "), strict=True)),
        backgrounds={name: background.format(colour) for name, colour in names},
        numbers=dict(zip((2, 3, 4), numbers.split(", "), strict=True)),
        **templates,
    )


PHRASES: dict[str, Phrases] = {
    "en": _phrases(
        "3d style, modern style, flat style, noto style",
        "on {} background",
        "a white, a black, a grey, a red, an orange, a yellow, a green, a blue, a purple, a pink",
        "two, three, four",
        single=("{a_first}",),
        count=("{number} {plural}", "{digit} x {first}", "{digit} {plural}"),
        beside=(
            "{a_first} left of {a_second}",
            "{a_second} right of {a_first}",
            "{a_first} to the left of {a_second}",
            "{a_second} to the right of {a_first}",
            "{a_first} on the left, {a_second} on the right",
            "{first} left of {second}",
            "{second} right of {first}",
        ),
        above=(
            "{a_first} above {a_second}",
            "{a_second} below {a_first}",
            "{a_second} under {a_first}",
            "{a_first} at the top, {a_second} at the bottom",
            "{first} above {second}",
            "{second} below {first}",
        ),
    ),
    "zh": _phrases(
        "3D风格, 现代风格, 扁平风格, Noto风格",
        "{}背景",
        "白色, 黑色, 灰色, 红色, 橙色, 黄色, 绿色, 蓝色, 紫色, 粉色",
        "两, 三, 四",
        count=("{number}个{first}", "{first}，{number}个", "{digit}个{first}", "{first} x {digit}"),
        beside=(
            "{first}在{second}的左边",
            "{second}在{first}的右边",
            "左边是{first}，右边是{second}",
        ),
        above=(
            "{first}在{second}的上面",
            "{second}在{first}的下面",
            "上面是{first}，下面是{second}",
        ),
        comma="，",
    ),
    "ja": _phrases(
        "3Dスタイル, モダンスタイル, フラットスタイル, Notoスタイル",
        "{}背景",
        "白い, 黒い, 灰色の, 赤い, オレンジ色の, 黄色い, 緑の, 青い, 紫の, ピンクの",
        "二つ, 三つ, 四つ",
        count=("{first}、全部で{number}", "{first} x {digit}"),
        beside=(
            "左に{first}、右に{second}",
            "{second}の左に{first}",
            "{first}の右に{second}",
        ),
        above=(
            "上に{first}、下に{second}",
            "{second}の上に{first}",
            "{first}の下に{second}",
        ),
        comma="、",
    ),
    "ko": _phrases(
        "3D 스타일, 모던 스타일, 플랫 스타일, Noto 스타일",
        "{} 배경",
        "흰색, 검은색, 회색, 빨간색, 주황색, 노란색, 초록색, 파란색, 보라색, 분홍색",
        "둘, 셋, 넷",
        count=("{first} {number}", "{first} x {digit}"),
        beside=(
            "왼쪽에 {first}, 오른쪽에 {second}",
            "{second} 왼쪽에 {first}",
            "{first} 오른쪽에 {second}",
        ),
        above=(
            "위에 {first}, 아래에 {second}",
            "{second} 위에 {first}",
            "{first} 아래에 {second}",
        ),
    ),
    "de": _phrases(
        "3D-Stil, moderner Stil, flacher Stil, Noto-Stil",
        "{} Hintergrund",
        "weißer, schwarzer, grauer, roter, orangefarbener, gelber, grüner, blauer, violetter, rosa",
        "zwei, drei, vier",
        count=("{number} Stück: {first}", "{digit} x {first}"),
        beside=("links {first}, rechts {second}", "rechts {second}, links {first}"),
        above=("oben {first}, unten {second}", "unten {second}, oben {first}"),
    ),
    "fr": _phrases(
        "style 3D, style moderne, style plat, style Noto",
        "fond {}",
        "blanc, noir, gris, rouge, orange, jaune, vert, bleu, violet, rose",
        "deux, trois, quatre",
        count=("{number} exemplaires : {first}", "{digit} x {first}"),
        beside=(
            "à gauche : {first}, à droite : {second}",
            "à droite : {second}, à gauche : {first}",
        ),
        above=("en haut : {first}, en bas : {second}", "en bas : {second}, en haut : {first}"),
    ),
    "es": _phrases(
        "estilo 3D, estilo moderno, estilo plano, estilo Noto",
        "fondo {}",
        "blanco, negro, gris, rojo, naranja, amarillo, verde, azul, morado, rosa",
        "dos, tres, cuatro",
        count=("{number} ejemplares: {first}", "{digit} x {first}"),
        beside=(
            "a la izquierda: {first}, a la derecha: {second}",
            "a la derecha: {second}, a la izquierda: {first}",
        ),
        above=("arriba: {first}, abajo: {second}", "abajo: {second}, arriba: {first}"),
    ),
    "pt": _phrases(
        "estilo 3D, estilo moderno, estilo plano, estilo Noto",
        "fundo {}",
        "branco, preto, cinza, vermelho, laranja, amarelo, verde, azul, roxo, rosa",
        "dois, três, quatro",
        count=("{number} exemplares: {first}", "{digit} x {first}"),
        beside=(
            "à esquerda: {first}, à direita: {second}",
            "à direita: {second}, à esquerda: {first}",
        ),
        above=("em cima: {first}, embaixo: {second}", "embaixo: {second}, em cima: {first}"),
    ),
    "it": _phrases(
        "stile 3D, stile moderno, stile piatto, stile Noto",
        "sfondo {}",
        "bianco, nero, grigio, rosso, arancione, giallo, verde, blu, viola, rosa",
        "due, tre, quattro",
        count=("{number} esemplari: {first}", "{digit} x {first}"),
        beside=(
            "a sinistra: {first}, a destra: {second}",
            "a destra: {second}, a sinistra: {first}",
        ),
        above=("sopra: {first}, sotto: {second}", "sotto: {second}, sopra: {first}"),
    ),
    "ru": _phrases(
        "стиль 3D, современный стиль, плоский стиль, стиль Noto",
        "{} фон",
        "белый, чёрный, серый, красный, оранжевый, жёлтый, зелёный, синий, фиолетовый, розовый",
        "две, три, четыре",
        count=("{number} штуки: {first}", "{digit} x {first}"),
        beside=("слева {first}, справа {second}", "справа {second}, слева {first}"),
        above=("сверху {first}, снизу {second}", "снизу {second}, сверху {first}"),
    ),
    "nl": _phrases(
        "3D-stijl, moderne stijl, platte stijl, Noto-stijl",
        "{} achtergrond",
        "witte, zwarte, grijze, rode, oranje, gele, groene, blauwe, paarse, roze",
        "twee, drie, vier",
        count=("{number} stuks: {first}", "{digit} x {first}"),
        beside=("links {first}, rechts {second}", "rechts {second}, links {first}"),
        above=("boven {first}, onder {second}", "onder {second}, boven {first}"),
    ),
    "pl": _phrases(
        "styl 3D, styl nowoczesny, styl płaski, styl Noto",
        "{} tło",
        "białe, czarne, szare, czerwone, pomarańczowe, żółte, zielone, niebieskie, fioletowe, "
        "różowe",
        "dwie, trzy, cztery",
        count=("{number} sztuki: {first}", "{digit} x {first}"),
        beside=("po lewej {first}, po prawej {second}", "po prawej {second}, po lewej {first}"),
        above=("u góry {first}, u dołu {second}", "u dołu {second}, u góry {first}"),
    ),
    "sv": _phrases(
        "3D-stil, modern stil, platt stil, Noto-stil",
        "{} bakgrund",
        "vit, svart, grå, röd, orange, gul, grön, blå, lila, rosa",
        "två, tre, fyra",
        count=("{number} stycken: {first}", "{digit} x {first}"),
        beside=(
            "till vänster {first}, till höger {second}",
            "till höger {second}, till vänster {first}",
        ),
        above=("överst {first}, underst {second}", "underst {second}, överst {first}"),
    ),
    "uk": _phrases(
        "стиль 3D, сучасний стиль, плаский стиль, стиль Noto",
        "{} фон",
        "білий, чорний, сірий, червоний, помаранчевий, жовтий, зелений, синій, фіолетовий, рожевий",
        "дві, три, чотири",
        count=("{number} штуки: {first}", "{digit} x {first}"),
        beside=("ліворуч {first}, праворуч {second}", "праворуч {second}, ліворуч {first}"),
        above=("зверху {first}, знизу {second}", "знизу {second}, зверху {first}"),
    ),
    "zh-hant": _phrases(
        "3D風格, 現代風格, 扁平風格, Noto風格",
        "{}背景",
        "白色, 黑色, 灰色, 紅色, 橙色, 黃色, 綠色, 藍色, 紫色, 粉色",
        "兩, 三, 四",
        count=("{number}個{first}", "{first}，{number}個", "{digit}個{first}", "{first} x {digit}"),
        beside=(
            "{first}在{second}的左邊",
            "{second}在{first}的右邊",
            "左邊是{first}，右邊是{second}",
        ),
        above=(
            "{first}在{second}的上面",
            "{second}在{first}的下面",
            "上面是{first}，下面是{second}",
        ),
        comma="，",
    ),
}
