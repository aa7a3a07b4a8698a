"""The command: help has an example, a user's mistake is one sentence and exit 2, and nothing is lost by it."""

import json
import pathlib

import numpy as np
import PIL.Image
import pytest

from skyjax.cli import main

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "pretrain_sample.py")
DATA_ACTIONS = ("build", "stats", "show", "tokenizer")


@pytest.mark.parametrize(
    "words",
    [[], ["train"], ["eval"], ["import"], ["export"], ["report"], *(["data", action] for action in DATA_ACTIONS)],
)
def test_help_has_an_example(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    assert "example: skyjax " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--config=none.py", "--workdir=x"], 'config: there is no file "none.py"'),
        (["train", f"--config={CONFIG}", "--workdri=x"], 'did you mean "--workdir"?'),
        (["train", f"--config={CONFIG}"], "--workdir=DIR is missing"),
        (["train", f"--config={CONFIG}", "--workdir=x", "--config.stepps=1"], 'nearest: "steps"'),
        (["compile", f"--config={CONFIG}", "--topology=v9:2x2"], '"v9" is not known'),
        (["compile", f"--config={CONFIG}", "--topology=v5e:2x2", "--slices=0"], "1 or more"),
        (["compile", f"--config={CONFIG}", "--topology=v5e:2x2", "--config.batch_size=3"], "the nearest that is"),
        (["data", "stats", "--dataset=none"], '"none" is not a skyjax dataset'),
        (["data", "stats", "--dataset=none", "--config.steps=1"], "only train and compile take a config"),
        (["data", "show", "--dataset=none", "--out=x.png"], '"none" is not a skyjax dataset'),
        (["data", "tokenizer", "--input=none.txt", "--out=x.model"], '"none.txt" cannot be read'),
        (["eval", "--checkpoint=none", "--task=knn", "--dataset=none"], "none"),
        (["report", "--workdir=none"], "none"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(words, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, errors = capsys.readouterr()
    assert errors.startswith("skyjax: ")
    assert sentence in errors
    assert errors.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_data_verbs(tmp_path, capsys):
    for name, colour in (("field", (90, 120, 60)), ("water", (20, 40, 90))):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(2):
            PIL.Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(tmp_path / "in" / name / f"{i}.png")
    out = tmp_path / "records"
    source = ROOT / "data" / "class_folder.py"
    assert main(["data", "build", f"--source={source}", f"--input={tmp_path / 'in'}", f"--out={out}"]) == 0
    assert main(["data", "stats", f"--dataset={out}", f"--json={tmp_path / 'stats.json'}"]) == 0
    assert main(["data", "show", f"--dataset={out}", f"--out={tmp_path / 'sheet.png'}", "--sites=2"]) == 0
    rows = {row["band"]: row for row in json.loads((tmp_path / "stats.json").read_text())}
    assert rows["red"]["mean"] == pytest.approx(55)  # of 90 and 20
    assert rows["red"]["std"] == pytest.approx(35)
    assert PIL.Image.open(tmp_path / "sheet.png").size[0] > 100
    assert "rgb" in capsys.readouterr().out
