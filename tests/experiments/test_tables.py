"""The committed tables are what the committed results say."""

import json
import math
import statistics

import pytest

from experiments import tables
from experiments.tables import (
    DOCUMENT,
    ORDER,
    OWN,
    RESULTS,
    ROOT,
    SEEDS,
    TIMES,
    document,
    read_table,
    read_variants,
    recipe_values,
    result_path,
)
from tokenshuffle_core.training.stages import parse_stages


def test_the_document_is_made_from_the_results():
    assert DOCUMENT.read_text(encoding="utf-8") == document()


def test_every_table_is_listed():
    assert {path.stem for path in ROOT.glob("*.toml")} - {"variants"} == set(ORDER)


@pytest.mark.parametrize("name", read_variants()["variants"])
def test_every_variant_is_a_recipe_and_in_a_table(name):
    for data in ("singles", "compositions"):
        values = {k: v for k, v in recipe_values(name, data).items() if k not in OWN}
        assert parse_stages(values | {"stage": [{"codes": "codes"}]}).stages[0].loop.steps > 0
    assert name in {row.variant for table in ORDER for row in read_table(table).rows}


def test_every_result_counts():
    counted = {
        result_path(name, data, seed)
        for name in read_variants()["variants"]
        for data in ("singles", "compositions")
        for seed in SEEDS
    }
    for path in set(RESULTS.glob("*.json")) - {TIMES}:
        assert path in counted
        name, data, _ = path.stem.rsplit("-", 2)
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["recipe"] == recipe_values(name, data), path.name


def results(variant: str) -> dict[int, float]:
    """The last loss of each seed, as it lies on the disk."""
    paths = {seed: result_path(variant, "compositions", seed) for seed in SEEDS}
    return {
        seed: json.loads(path.read_text(encoding="utf-8"))["losses"]["validation_loss"][-1][1]
        for seed, path in paths.items()
        if path.exists()
    }


def test_cells_are_means_of_the_results():
    first, second = results("window-1"), results("window-2")
    (line,) = [line for line in document().splitlines() if line.startswith("| window 2 |")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2].startswith(str(len(second)))
    loss, difference = (float(cell.split()[0]) for cell in cells[3:5])
    assert math.isclose(loss, statistics.fmean(second.values()), abs_tol=6e-4)
    paired = [second[seed] - first[seed] for seed in first.keys() & second.keys()]
    assert math.isclose(difference, statistics.fmean(paired), abs_tol=6e-4)


def test_rows_are_compared_with_rows_of_their_table():
    for name in ORDER:
        rows = read_table(name).rows
        assert {row.against for row in rows} - {None} <= {row.label for row in rows}


def lines_of(title: str) -> list[list[str]] | None:
    """The cells of a table of the document, header first, or None where it is not shown."""
    sections = {text.partition("\n")[0]: text for text in document().split("\n## ")}
    if title not in sections:
        return None
    lines = [line for line in sections[title].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("name", ORDER)
def test_the_document_shows_the_models_that_have_scores(name):
    table = read_table(name)
    scored = [
        row.label for row in table.rows
        if any(result_path(row.variant, d, s).exists() for d in table.data for s in SEEDS)
    ]  # fmt: skip
    lines = lines_of(table.title)
    assert (lines is not None) == (len(scored) > 1)
    if lines is not None:
        header, _, *rows = lines
        assert [row[0] for row in rows] == scored
        scores = [i for i, column in enumerate(header) if column in ("loss", "fit", "retrieval")]
        assert all(any(row[i] for i in scores) for row in rows)


def test_models_with_times_alone_are_not_shown(monkeypatch):
    found = tables.results_of

    def without(*variants: str) -> str:
        monkeypatch.setattr(
            tables, "results_of", lambda name, data: {} if name in variants else found(name, data)
        )
        return tables.section(read_table("windows"))

    text = without("window-4")
    assert "| window 2 |" in text
    assert "| window 4 |" not in text
    assert without("window-4", "window-2") == "", "one row compares nothing"
