"""The committed tables are what the committed results say."""

import json
import math
import statistics

import pytest

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
    recipe_values,
    result_path,
    variant_names,
)
from tokenshuffle_core.training.stages import parse_stages


def test_the_document_is_made_from_the_results():
    assert DOCUMENT.read_text(encoding="utf-8") == document()


def test_every_table_is_listed():
    assert {path.stem for path in ROOT.glob("*.toml")} - {"variants"} == set(ORDER)


@pytest.mark.parametrize("name", variant_names())
def test_every_variant_is_a_recipe_and_in_a_table(name):
    for data in ("singles", "compositions"):
        values = {k: v for k, v in recipe_values(name, data).items() if k not in OWN}
        assert parse_stages(values | {"stage": [{"codes": "codes"}]}).stages[0].loop.steps > 0
    assert name in {row.variant for table in ORDER for row in read_table(table).rows}


def test_every_result_counts():
    counted = {
        result_path(name, data, seed)
        for name in variant_names()
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
