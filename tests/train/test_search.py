"""The search for batch, remat and mesh, over plans whose memory and time follow formulas that the test knows."""

import pathlib

import pytest

from skyjax.config import load_config
from skyjax.errors import UserError
from skyjax.parallel import chips, hlo, roofline
from skyjax.parallel.ahead import CompilerError
from skyjax.train import search
from skyjax.train.plan import GIB, Memory, Plan

pytest.importorskip("libtpu")
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "skysense.py"
STATE = 30 * GIB
A_SAMPLE = {"full": 3 * GIB, "dots": 6 * GIB, "none": 20 * GIB}
SECONDS = {"full": 1.3, "dots": 1.0, "none": 0.9}
DEVICES = 256


def plan_of(config, limit, a_sample=A_SAMPLE, traffic=None):
    """`traffic`: remat -> seconds that a sample's way through HBM takes."""
    samples, remat = config.batch_size // DEVICES, config.model.remat
    memory = Memory(STATE // config.mesh.fsdp, int(a_sample[remat] * samples), None, None, limit)
    program = hlo.Program(0, 0, {}, (), (), ())
    # A part of a step does not grow with the batch: more samples a device are faster, each.
    through_hbm = traffic[remat] * samples if traffic else 0
    bounds = roofline.Bounds(SECONDS[remat] * (samples + 0.2), through_hbm, 0.1 if config.mesh.fsdp < 64 else 9, 0)
    mesh = dict(config.mesh)
    return Plan(
        "v5e:16x16", 1, DEVICES, DEVICES, mesh, config.batch_size, 1, memory, {"all": 1}, program, bounds, 0.5, 1, 1
    )


def run(limit_gib, **plans):
    config = load_config(CONFIG, ["batch_size=256"])
    compiled = []

    def compile_step(chosen):
        compiled.append((chosen.model.remat, int(chosen.mesh.fsdp), chosen.batch_size // DEVICES))
        return plan_of(chosen, int(limit_gib * GIB), **plans)

    return search.search(config, "v5e:16x16", 1, compile_step, lambda _: None), compiled


def test_the_fastest_that_fits_comes_first_and_few_are_compiled():
    tried, compiled = run(15.75)
    assert len(compiled) <= search.MOST_COMPILES
    assert compiled[0] == ("full", 16, 1)  # the config's own
    best = tried[0]
    room = (1 - search.SPARE) * 15.75
    choices = {
        (remat, fsdp, samples): samples / plan.bounds.step_s
        for remat in A_SAMPLE
        for fsdp in search.FSDP
        for samples in (1, 2, 4, 8)
        if STATE / GIB / fsdp + A_SAMPLE[remat] / GIB * samples <= room
        for plan in [plan_of(search.Candidate(samples, remat, fsdp).apply(load_config(CONFIG), DEVICES), GIB)]
    }
    # dots with two samples a device; what is recomputed less does not fit, what is recomputed more is slower.
    assert best.samples_a_second == pytest.approx(DEVICES * max(choices.values()))
    assert (best.candidate.remat, best.candidate.samples) == ("dots", 2)
    assert not any(one.fits for one in tried if one.candidate.remat == "none")
    assert len(set(compiled)) == len(compiled)
    text = search.show(tried, DEVICES)
    assert "The fastest that fits: --config.batch_size=512 --config.model.remat=dots" in text
    assert text.count("does not fit") == sum(not one.fits for one in tried)


def test_what_is_recomputed_less_is_tried_and_loses_where_its_traffic_is_larger():
    tried, compiled = run(15.75, traffic={"full": 1.0, "dots": 2.0, "none": 3.0})
    assert {remat for remat, _, _ in compiled} >= {"full", "dots"}
    assert tried[0].candidate.remat == "full"
    # Known by then to be slower whatever the mesh.
    assert sum(remat == "dots" for remat, _, _ in compiled) == 1


def test_the_batch_is_bisected_where_the_largest_did_not_fit():
    found = []

    def compile_step(chosen):
        found.append(chosen.batch_size // DEVICES)
        # More than in proportion: by one sample, four would fit.
        steep = dict.fromkeys(A_SAMPLE, 3 * GIB * (1.5 if found[-1] > 3 else 1))
        return plan_of(chosen, int(15.75 * GIB), steep)

    tried = search.search(load_config(CONFIG, ["batch_size=256"]), "v5e:16x16", 1, compile_step, lambda _: None)
    assert tried[0].candidate.samples == 3
    assert found[-3:] == [4, 2, 3]


def test_a_mesh_that_cannot_be_compiled_is_passed_over():
    config, said = load_config(CONFIG, ["batch_size=256"]), []

    def compile_step(chosen):
        if chosen.model.remat == "dots":
            raise CompilerError("astray")
        return plan_of(chosen, 16 * GIB)

    tried = search.search(config, "v5e:16x16", 1, compile_step, said.append)
    assert tried[0].candidate.remat == "full"
    assert any("passed over: astray" in words for words in said)

    def refuse(chosen):
        raise CompilerError("always")

    with pytest.raises(CompilerError, match="always"):
        search.search(config, "v5e:16x16", 1, refuse, lambda _: None)


def test_a_state_that_fits_nowhere_is_told():
    config = load_config(CONFIG, ["batch_size=256"])
    with pytest.raises(UserError, match="the state alone"):
        search.search(config, "v5e:1x1", 1, lambda _: pytest.fail("compiled"), lambda _: None)


def test_the_estimate_grows_with_what_is_recomputed_and_with_what_is_sent():
    config, chip = load_config(CONFIG), chips.chip("v5p")

    def estimate(remat, fsdp, chip=chip):
        return search.estimate(config, 10**9, search.Candidate(4, remat, fsdp), 64, chip)

    assert estimate("full", 16).compute > estimate("dots", 16).compute == estimate("none", 16).compute
    slow = chips.chip("v5p").__class__(**{**vars(chip), "ici_bandwidth": 1e9})
    # 2 GB in bfloat16. Gathered for two groups of views, forward and backward, and for the teacher's; scattered for
    # two; of each group's gradients, a share is summed over data.
    gathered, summed = 7 * 2 * 15 / 16, 2 * 2 * (2 / 16) * 3 / 4
    assert estimate("dots", 16, slow).ici == pytest.approx((gathered + summed) / 4)
    assert estimate("dots", 1, slow).ici == pytest.approx(2 * 2 * 2 * 63 / 64 / 4)
