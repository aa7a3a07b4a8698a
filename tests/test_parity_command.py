"""tests/parity.py as it is called, on folders made from the stored cases."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import parity
import pytest
from safetensors.numpy import load_file, save_file

STORED = pathlib.Path(__file__).parent / "models" / "cases"


def copy(case, folder):
    shutil.copytree(STORED / case, folder, ignore=shutil.ignore_patterns("exact.npz"))
    return folder


def change(folder, **weights):
    """Replaces weights; None takes one away."""
    path = folder / "weights.safetensors"
    changed = load_file(path) | {name.replace("__", "."): value for name, value in weights.items()}
    save_file({name: value for name, value in changed.items() if value is not None}, path)


@pytest.fixture
def cases(tmp_path):
    """A small case of three parts, in folders whose names say nothing."""
    for case in ("gradients_sar_vit", "gradients_fusion", "gradients_up_head"):
        copy(case, tmp_path / "cases" / case[::-1])
    return tmp_path / "cases"


def test_cases_that_agree(cases, tmp_path):
    (cases / "checkpoint.pth").write_bytes(b"not read")
    (cases / "gradients_up_head"[::-1] / "case.json").unlink()  # nothing in it is needed
    command = [sys.executable, parity.__file__, str(cases), f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4  # one an output and the sum
    for folder, line in zip(sorted(cases.glob("*/")), lines, strict=False):
        name, output, error, verdict = line.split()
        assert (name, output, verdict) == (folder.name, "native.0", "ok")
        assert 0 <= float(error) <= 1e-5
        ours, theirs = np.load(tmp_path / "out" / f"{name}.npz"), np.load(folder / "outputs.npz")
        assert ours.files == theirs.files
        for key in theirs:
            assert ours[key].shape == theirs[key].shape
            assert ours[key].dtype == np.float32
            np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-5 * np.abs(theirs[key]).max())


def test_a_weight_off_by_one_percent_is_found(tmp_path, capsys):
    folder = copy("gradients_up_head", tmp_path / "case")
    assert parity.main([str(tmp_path)]) == 0
    change(folder, decoder__0__weight=1.01 * load_file(folder / "weights.safetensors")["decoder.0.weight"])
    assert parity.main([str(tmp_path)]) == 1
    assert "above 1e-05" in capsys.readouterr().out
    assert parity.main([str(tmp_path), "--dtype=bfloat16"]) == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "no case in it"),
        (lambda folder: (folder / "inputs.npz").unlink(), "inputs.npz"),
        (lambda folder: (folder / "outputs.npz").write_bytes(b"PK nonsense"), "outputs.npz"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"nonsense"), "weights.safetensors"),
        (lambda folder: (folder / "case.json").write_text("[]"), "case.json"),
        (lambda folder: (folder / "case.json").write_text('{"config": {"heads": 3}}'), "3 heads"),
        (lambda folder: np.savez(folder / "outputs.npz"), "no array in it"),
        (lambda folder: np.savez(folder / "outputs.npz", other=np.zeros(3)), '"other" is not INPUT.NUMBER'),
        (lambda folder: change(folder, porj_linear__weight=None), "no known part"),
        (lambda folder: change(folder, layers__1__ln2__bias=None), "lacks layers.1.ln2.bias"),
        (lambda folder: change(folder, stranger=np.zeros(3, np.float32)), "has besides stranger"),
        (lambda folder: change(folder, porj_linear__bias=np.zeros(3, np.float32)), "shapes"),
    ],
)
def test_nonsense_is_told_in_a_sentence(tmp_path, capsys, spoil, reason):
    spoil(copy("gradients_fusion", tmp_path / "case"))
    assert parity.main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert reason in told
    assert len(told.splitlines()) == 1


def test_what_does_not_matter_is_passed_over(tmp_path):
    folder = copy("gradients_up_head", tmp_path / "case")
    weights = load_file(folder / "weights.safetensors")
    save_file({f"head_s2.{name}": value for name, value in weights.items()}, folder / "weights.safetensors")
    np.savez(folder / "inputs.npz", unused=np.zeros((1, 16, 2, 2), np.float32), **np.load(folder / "inputs.npz"))
    assert parity.main([str(tmp_path)]) == 0  # a prefix of a whole checkpoint, an input without outputs


def test_sizes_are_read_from_weights():
    """Of the settings a Swin needs its window alone, a ViT its heads: the module has the weights' shapes, or raises."""
    for name in ("gradients_swin_v2", "gradients_multispectral_vit", "gradients_fusion"):
        case = parity.load_case(STORED / name)
        part = parity.build(dataclasses.replace(case, config={"window": 4, "heads": 2}))
        assert part.released(part.params).keys() == case.weights.keys()


def test_released_names_hold_the_same_bits():
    for name in ("gradients_swin_v2", "gradients_sar_vit", "gradients_fusion", "gradients_up_head"):
        case = parity.load_case(STORED / name)
        part = parity.build(case)
        for key, value in part.released(part.params).items():
            assert np.array_equal(value, case.weights[key]), key
