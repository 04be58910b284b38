"""SimpleAR (arXiv 2504.11455): a Qwen2.5 whose image codes, those of Cosmos' tokenizer, follow its
text tokens in one vocabulary. Pictures are squares; nothing in the prompt tells their size."""

from pathlib import Path

from ..config import Config, GenerationConfig, PromptConfig
from ..text_tokenizer import TextTokenizer
from . import cosmos, image_tokenizers, native, one_vocabulary
from .checkpoint import Checkpoint
from .source import Source
from .tokenizer_files import names_token, text_tokenizer_of

PROMPT = PromptConfig(
    ("<|t2i|>", "A highly realistic image of {prompt}", "<|soi|>"),
    pad="<|endoftext|>",
    negative=("<|t2i|>", "{prompt}", "<|soi|>"),
    negative_text="An image of aerial view, overexposed, low quality, deformation, a poor "
    "composition, bad hands, bad teeth, bad eyes, bad limbs, distortion",
)
SIDES = (1024, 768, 512, 256)
CODES = 64_000  # of Cosmos' tokenizer
MAX_PROMPT = 508  # 4,608 positions of the training, less 4,096 codes and the template's tokens
COSMOS = ("Cosmos-1.0-Tokenizer-DV8x16x16", "Cosmos-Tokenizer-DV8x16x16")  # folders of it


def is_one(source: Source) -> bool:
    if one_vocabulary.is_named(source, "simpar"):
        return True
    # Its config.json may be that of any Qwen2, of which only this one has room and a token for it.
    if not one_vocabulary.is_named(source, "qwen2"):
        return False
    rows = source.shapes[one_vocabulary.EMBEDDING][:1]
    return rows > (CODES,) and names_token(source, PROMPT.template[-1])


def read(
    source: Source, image_tokenizer: Path | None = None, side: int | None = None
) -> Checkpoint:
    """A folder with config.json, a text tokenizer and weights, and the file or folder of Cosmos'
    tokenizer, by default one inside the folder or beside it. Raises FileNotFoundError or
    ValueError."""
    found = image_tokenizer or source.beside(*COSMOS)
    if cosmos.version_of(found) not in (None, cosmos.OF_SIMPLEAR):
        raise ValueError(
            f"{found} is version {cosmos.version_of(found)}, whose codes mean something else: "
            f"SimpleAR needs {COSMOS[0]}"
        )
    images, image_weights = image_tokenizers.read(found)
    text_tokenizer = TextTokenizer.from_json(text_tokenizer_of(source), PROMPT)
    # The codes follow the tokens of the text tokenizer, not the rows of an embedding.
    model = one_vocabulary.shape_of(
        source, len(text_tokenizer), images.codebook_size, max_prompt=MAX_PROMPT, max_grid=64
    )
    sizes = [(each, each) for each in ((side,) if side else SIDES)]
    card = {
        "modelspec.title": source.name,
        "modelspec.author": "Junke Wang et al.",
        "modelspec.description": "SimpleAR: the prompt describes the picture, in English.",
        "modelspec.license": "MIT (code); the image tokenizer: NVIDIA Open Model License",
        **native.card_of_sizes(sizes),
    }
    generation = GenerationConfig(*sizes[0], cfg=6.0, schedule="constant")
    weights = one_vocabulary.weights_of(source, model)
    config = Config(images, model, generation, PROMPT)
    return Checkpoint(source.path, config, text_tokenizer, card, weights, image_weights)
