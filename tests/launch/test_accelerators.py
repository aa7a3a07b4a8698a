"""Names of slices: rows worked out by hand from Google's pages. v4 and v5p count cores, two a chip."""

import pytest
from accelerators import find

from skyjax.errors import UserError


@pytest.mark.parametrize(
    ("name", "accelerator_type", "gke", "chips", "hosts"),
    [
        ("v4:2x2x1", "v4-8", "tpu-v4-podslice", 4, 1),
        ("v4:4x4x4", "v4-128", "tpu-v4-podslice", 64, 16),
        ("v5e:2x4", "v5litepod-8", "tpu-v5-lite-podslice", 8, 2),
        ("v5e:16x16", "v5litepod-256", "tpu-v5-lite-podslice", 256, 64),
        ("v5p:2x2x1", "v5p-8", "tpu-v5p-slice", 4, 1),
        ("v5p:4x4x8", "v5p-256", "tpu-v5p-slice", 128, 32),
        ("v5p:16x16x24", "v5p-12288", "tpu-v5p-slice", 6144, 1536),
        ("v6e:16x16", "v6e-256", "tpu-v6e-slice", 256, 64),
        ("tpu7x:4x4x4", None, "tpu7x", 64, 16),
    ],
)
def test_rows(name, accelerator_type, gke, chips, hosts):
    part = find(name)
    assert (part.accelerator_type, part.gke_accelerator) == (accelerator_type, gke)
    assert (part.chips, part.hosts) == (chips, hosts)
    assert part.chips_per_host == 4


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v5p-256", "is not written as"),
        ("v9:4x4", '"v9" is not known'),
        ("v3:4x4", "v3 can no longer be rented"),
        ("v5e:4x6", 'no slice "4x6" of v5e; did you mean "4x'),
        ("v5e:16x8", 'did you mean "16x16"'),
        ("v5p:8x4x4", 'no slice "8x4x4" of v5p'),  # axes rise
        ("v5p:4x4x6", "multiples of 4"),
        ("v5p:24x24x24", "up to 6144 chips"),
    ],
)
def test_slices_that_nobody_offers(name, sentence):
    with pytest.raises(UserError) as error:
        find(name)
    assert sentence in str(error.value)
