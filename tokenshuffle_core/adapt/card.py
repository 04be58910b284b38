"""The model card of a model that was made from another one: its licence, and how it was made."""

from ..checkpoints import SIZES

TITLE, DESCRIPTION, AUTHOR = (f"modelspec.{key}" for key in ("title", "description", "author"))
MADE = "Made from "  # how the description of such a model begins
MERGED = "merged with a LoRA"
KEPT = ("modelspec.license", SIZES)  # what is true of a model and of those made from it


def changed_card(card: dict[str, str], how: str) -> dict[str, str]:
    """The card of a model made from that of `card`, `how` in words such as "grown to window 2".

    Its description names the first model that it comes from and its author, and says in turn what
    was done. The rest of `card`, such as scores, is true of the other model alone.
    """
    title = card.get(TITLE, "a model without a title")
    made = card.get(DESCRIPTION, "")
    if made.startswith(MADE):
        made = f"{made}, {how}"
    else:
        author = f" by {card[AUTHOR]}" if AUTHOR in card else ""
        made, title = f"{MADE}{title}{author}: {how}", f"{MADE}{title}"
    kept = {key: card[key] for key in KEPT if key in card}
    return {TITLE: title, DESCRIPTION: made} | kept
