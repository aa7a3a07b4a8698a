"""The ablation's script: rows are what they say, and its tables say what the cells do."""

import json
import pathlib
import statistics

import pytest

from skyjax.config import load_config, run_file
from skyjax.errors import UserError
from skyjax.train import state as states

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "ablations.py"
ablations = run_file(SCRIPT, "benchmark")


def cell(row, seed, share, kinds=("fused",)):
    scores = {metric: [share, share - 0.1, share + 0.1] for metric in ablations.METRICS}
    probes = [
        {"dataset": dataset, "label": label, "features": kind, "scores": scores}
        for dataset, label in ablations.PROBES
        for kind in kinds
    ]
    return {"row": row, "seed": seed, "probes": probes}


def line_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start} |"))


@pytest.mark.parametrize("row", ["image", "object", "alignment"])
def test_heads_of_a_row_are_those_of_its_terms(row):
    heads = states.abstract(load_config(SCRIPT, [f"row={row}"]))["params"]["heads"]
    named = {f"{level}/{stream}" for stream, own in heads.items() if stream != "alignment" for level in own}
    terms = {term for term in ablations.ROWS[row].terms if term.split("/")[0] in ablations.LEVELS}
    assert named == terms
    assert ("alignment" in heads) == (row == "alignment")


def test_only_the_row_of_geo_context_has_prototypes():
    named = [name for name in ablations.ROWS if load_config(SCRIPT, [f"row={name}"]).model.prototypes is not None]
    assert named == ["geo"]


def test_an_unknown_row_is_named():
    with pytest.raises(UserError, match='"pixels" is not known'):
        load_config(SCRIPT, ["row=pixels"])


def test_terms_are_held_to_the_claim():
    row = ablations.ROWS["image"]
    logged = {"loss": 1.0, "loss/image/multispectral": 1.0, "loss/image/fused": 1.0, "loss/spread/fused": 1.0}
    whole = logged | {"loss/spread/multispectral": 1.0}
    ablations.check_terms(row, [whole | {"loss/image/fused": None}, whole])
    with pytest.raises(ValueError, match=r"missing: \['spread/multispectral'\]"):
        ablations.check_terms(row, [logged])
    with pytest.raises(ValueError, match=r"too many: \['pixel/fused'\]"):
        ablations.check_terms(row, [whole | {"loss/pixel/fused": 1.0}])
    with pytest.raises(ValueError, match=r"missing: \['image/fused'\]"):
        ablations.check_terms(row, [whole | {"loss/image/fused": None}])  # never had a value


def test_tables_have_means_deviations_and_paired_differences():
    image, pixel = (0.50, 0.60, 0.58), (0.52, 0.62, 0.605)
    cells = [cell("image", seed, share) for seed, share in enumerate(image)]
    cells += [cell("pixel", seed, share) for seed, share in reversed(list(enumerate(pixel)))]  # in any order
    text = ablations.tables(cells)
    assert f"{100 * sum(image) / 3:.1f} ± {100 * statistics.stdev(image):.1f}" in line_of(text, "image level only")
    # Differences 2.0, 2.0, 2.5: Student's t for two degrees of freedom is 4.303, so 2.17 -+ 0.72 leaves out zero.
    assert "| **+2.2 ± 0.3** |" in line_of(text, "+ pixel level − image level only")
    assert set(line_of(text, "+ object level − + pixel level").split(" | ")[1:-1]) == {"–"}


@pytest.mark.parametrize(
    ("apart", "told"),
    # Half the interval is 4.303 / sqrt(3) = 2.484 standard deviations.
    [((1.0, 2.0, 3.0), False), ((1.6, 2.6, 3.6), True), ((-1.6, -2.6, -3.6), True)],
)
def test_a_difference_is_told_apart_by_students_t(apart, told):
    first = {seed: 50 + each for seed, each in enumerate(apart)}
    text = ablations.difference(first | {7: 99.0}, dict.fromkeys(range(3), 50.0))  # seed 7 has no partner
    assert text.startswith("**") == told
    assert text.strip("*") == f"{statistics.mean(apart):+.1f} ± 1.0"


def test_what_stands_around_the_tables_is_kept(tmp_path):
    path = tmp_path / "ablations.md"
    path.write_text(f"before\n{ablations.BEGIN}\nold\n{ablations.END}\nafter\n")
    ablations.write_tables(path, "new")
    ablations.write_tables(path, "newer")
    assert path.read_text() == f"before\n{ablations.BEGIN}\n\nnewer\n\n{ablations.END}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(UserError, match="has no lines"):
        ablations.write_tables(path, "new")


def test_kept_results_are_one_cell_each_and_of_one_kind():
    cells = ablations.read_results(ablations.RESULTS)
    assert len({(each["row"], each["seed"]) for each in cells}) == len(cells)
    for each in cells:
        assert each["overrides"] == json.loads(json.dumps(ablations.ROWS[each["row"]].overrides))
        assert {key.removeprefix("loss/") for key in each["last"] if key.startswith("loss/")} in (
            set(),
            ablations.ROWS[each["row"]].terms,
        )
