"""Cross-modal alignment: the modalities of one site recognise one another among all sites of the batch.

In: one feature a sample, view and modality. Out: for each pair of modalities the sum of its losses and their count.
Formula: docs/fidelity.md, "Cross-modal alignment"; symmetric InfoNCE (contrastive.py).
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from skyjax.objectives import contrastive, heads


def align(
    features: dict[str, Float[Array, "b v c"]],
    present: dict[str, Bool[Array, "b v"]],
    head: heads.Params,
    bounds: Sequence[float] = heads.TEMPERATURES,
) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]]]:
    """Sums and counts of every pair of modalities, by names like "optical-sar".

    Each view is its own batch: another view of the same site is neither a positive nor a negative. A sample that lacks
    one of the two modalities is neither anchor nor negative. With one sample left the loss is zero.

    Args:
      features: modality -> one feature a sample and view.
      present: modality -> whether it is there.
      head: `heads/alignment`.
      bounds: of the learned temperature.
    """
    temperature = heads.alignment_temperature(head, bounds)
    sums, counts = {}, {}
    modalities = heads.modalities_of(features)
    # A masked row is zeroed before the projection: what stands there may not reach a gradient.
    projected = {
        m: heads.unit(jnp.einsum("bvc,cd->bvd", jnp.where(present[m][..., None], features[m], 0), head[m]["kernel"]))
        for m in modalities
    }
    for first, second in itertools.combinations(modalities, 2):
        both = present[first] & present[second]
        loss = jax.vmap(symmetric_infonce, in_axes=(1, 1, 1, None), out_axes=1)(
            projected[first], projected[second], both, temperature
        )
        sums[f"{first}-{second}"] = loss.sum()
        counts[f"{first}-{second}"] = both.sum().astype(jnp.float32)
    return sums, counts


def symmetric_infonce(
    first: Float[Array, "b d"],
    second: Float[Array, "b d"],
    valid: Bool[Array, "b"],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "b"]:
    """Mean of the two cross-entropies of finding a row's counterpart among all valid rows; zero for other rows.

    Unit vectors; those of masked rows are finite.
    """
    return contrastive.softmax(first, second[:, None], valid[:, None], temperature)
