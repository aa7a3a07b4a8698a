import pytest

from skyjax.parallel import chips
from skyjax.parallel.hlo import Program, Traffic
from skyjax.parallel.roofline import bounds, mfu_ceiling

V5E, TPU7X = chips.chip("v5e"), chips.chip("tpu7x")


def program(flops=0, hbm=0, ici=0, dcn=0):
    # In two kinds, of which the sum counts.
    collectives = {"all-gather": Traffic(3, ici // 2, 0), "all-reduce": Traffic(1, ici - ici // 2, dcn)}
    return Program(flops, hbm, collectives, (), (), ())


@pytest.mark.parametrize(
    ("taken", "want", "by"),
    [
        ({"flops": 197 * 10**12, "hbm": 819 * 10**8, "ici": 10**11, "dcn": 10**9}, (1.0, 0.1, 0.5, 0.32), "compute"),
        ({"flops": 197 * 10**9, "hbm": 819 * 10**9, "ici": 10**11, "dcn": 10**9}, (0.001, 1, 0.5, 0.32), "memory"),
        ({"hbm": 819 * 10**7, "ici": 10**11, "dcn": 10**9}, (0, 0.01, 0.5, 0.32), "network over ICI"),
        ({"hbm": 819 * 10**7, "ici": 10**11, "dcn": 10**10}, (0, 0.01, 0.5, 3.2), "network over DCN"),
    ],
)
def test_each_bound_by_hand(taken, want, by):
    found = bounds(program(**taken), V5E)
    assert (found.compute_s, found.memory_s, found.ici_s, found.dcn_s) == pytest.approx(want)
    assert found.network_s == pytest.approx(max(want[2:]))
    assert found.step_s == pytest.approx(max(want))
    assert found.bound_by == by


def test_two_devices_share_a_chip():
    found = bounds(program(flops=2307 * 10**12, hbm=738 * 10**9, ici=60 * 10**9), TPU7X)
    assert (found.compute_s, found.memory_s, found.ici_s) == pytest.approx((2.0, 0.2, 0.2))


def test_the_ceiling_is_what_the_model_needs_of_the_step():
    # 4 chips compute half as much again as the model asks for, and wait for memory twice as long as they compute.
    taken = program(flops=3 * 197 * 10**12, hbm=6 * 819 * 10**9)
    model_flops = 4 * 2 * 197 * 10**12
    assert mfu_ceiling(model_flops, 4, V5E, bounds(taken, V5E)) == pytest.approx(2 / 6)
    assert mfu_ceiling(model_flops, 4, V5E, bounds(program(flops=3 * 197 * 10**12), V5E)) == pytest.approx(2 / 3)
    assert mfu_ceiling(0, 4, V5E, bounds(program(), V5E)) == 0
    # A tpu7x's two devices each ran this program.
    on_7x = bounds(program(flops=2307 * 10**12 // 2), TPU7X)
    assert mfu_ceiling(2307 * 10**12, 1, TPU7X, on_7x) == pytest.approx(1)
