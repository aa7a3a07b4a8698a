"""Image and text: a site recognises its captions, words find their places, and a decoder writes what it sees.

In: features of the student's global views, what text tower and decoder make of the captions. Out: sums and counts of
the terms "text/STREAM", "words" and "caption". Formulas and sources: docs/fidelity.md, "Image and text".

    head = {"streams": {STREAM: {"kernel": (c, e)}}, "temperature": (), "bias": (),       where weights.text is not 0
            "local": {"places": {"kernel": (c, e)}, "words": {"kernel": (d, e)}, "temperature": ()}}    weights.words
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float, Int

from skyjax.objectives import contrastive, heads
from skyjax.objectives.heads import Params, unit
from skyjax.objectives.multigranularity import masked_mean
from skyjax.parallel.sharding import place_rows, row_shards

KINDS = ("sigmoid", "softmax")
TERMS = ("text", "words", "caption")
_EMPTY = -1e30


@dataclasses.dataclass(frozen=True)
class Written:
    """What the decoder makes of one text a sample.

    Attributes:
      hidden: its features, those at a token telling the next.
      targets: the tokens that come next.
      counted: whether one does.
      scores: from features to scores of all tokens.
    """

    hidden: Float[Array, "b n d"]
    targets: Int[Array, "b n"]
    counted: Bool[Array, "b n"]
    scores: Callable[[Float[Array, "m n d"]], Float[Array, "m n v"]]


@dataclasses.dataclass(frozen=True)
class Read:
    """What the text tower makes of a batch's captions.

    Attributes:
      embedding: a feature a caption, of any length.
      tokens: one a word, before any projection.
      valid: words that are there; a caption without any is not there.
      words: equal for captions of equal words.
      written: the decoder's part, where the model has one.
    """

    embedding: Float[Array, "b k e"]
    tokens: Float[Array, "b k l d"]
    valid: Bool[Array, "b k l"]
    words: Int[Array, "b k"]
    written: Written | None = None


def init_head(
    config: ml_collections.ConfigDict, widths: Mapping[str, int], text: ml_collections.ConfigDict, key: Array
) -> Params:
    """Parameters of the terms that weigh something.

    Args:
      config: `objective`; `objective.text.streams` are the image sides that meet words.
      widths: stream -> width of its features; what it names can meet words.
      text: `model.text`, for the widths of its tokens and of its captions' features.
      key: of the draw.

    Raises:
      ValueError: the kind or a stream is not known.
    """
    options = config.text
    if options.kind not in KINDS:
        raise ValueError(f'objective.text.kind is "{options.kind}"; it is one of {", ".join(KINDS)}')
    strange = [stream for stream in options.streams if stream not in widths]
    if strange or not options.streams:
        raise ValueError(f"objective.text.streams is {options.streams}; it takes one or more of {', '.join(widths)}")
    keys = jax.random.split(key, len(heads.STREAMS) + 2)
    head: Params = {}
    if config.weights.get("text"):
        head |= {
            "streams": {
                stream: {"kernel": heads.kernel(keys[heads.STREAMS.index(stream)], widths[stream], text.embed_dim)}
                for stream in options.streams
            },
            "temperature": jnp.log(jnp.float32(options.temperature)),
        }
        if options.kind == "sigmoid":
            head["bias"] = jnp.float32(options.bias)
    if config.weights.get("words"):
        head["local"] = {
            "places": {"kernel": heads.kernel(keys[-2], widths["fused"], text.embed_dim)},
            "words": {"kernel": heads.kernel(keys[-1], text.width, text.embed_dim)},
            "temperature": jnp.log(jnp.float32(options.words.temperature)),
        }
    return head


def terms(
    config: ml_collections.ConfigDict, images: Mapping[str, Any], pooled: Mapping[str, Any], read: Read, head: Params
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sums and counts of all terms that weigh something.

    Args:
      config: the experiment's `objective`.
      images: the student's output on the global views, leading axes (b, v).
      pooled: modality -> mean feature (b, v, c) and whether there is one (b, v).
      read: what the models make of the captions.
      head: as above.
    """
    weights, options = config.weights, config.text
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    if weights.get("text"):
        # Without geo-context: words tell of what is seen, and a position would give the caption away.
        sides = {**pooled, "fused": masked_mean(images["fused"], images["fused_valid"])}
        features, present = ({stream: side[i] for stream, side in sides.items()} for i in (0, 1))
        sums, counts = recognise(features, present, read, head, options)
    if weights.get("words"):
        sums["words"], counts["words"] = find_words(
            images["fused"][:, 0], images["fused_valid"][:, 0], read, head["local"], options
        )
    if weights.get("caption"):
        if read.written is None:
            raise ValueError("objective.weights.caption asks for captions; model.decoder writes them: add it, or set 0")
        sums["caption"], counts["caption"] = captioning(read.written, options.chunk)
    return sums, counts


def recognise(
    features: dict[str, Float[Array, "b v c"]],
    present: dict[str, Bool[Array, "b v"]],
    read: Read,
    head: Params,
    config: ml_collections.ConfigDict,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The contrastive term of each stream over the global batch; each view is its own batch.

    Args:
      features: stream -> one feature a sample and view.
      present: stream -> whether it is there; a sample without it, or without words, is neither anchor nor negative.
      read: the captions.
      head: as above.
      config: `objective.text`.
    """
    valid = read.valid.any(-1)
    temperature = heads.bounded_temperature(head["temperature"], config.bounds)
    captions = unit(jnp.where(valid[..., None], read.embedding.astype(jnp.float32), 0))
    sums, counts = {}, {}
    for stream, dense in head["streams"].items():
        if stream not in features:
            continue
        there = present[stream]
        # What stands in a masked row may not reach a gradient.
        sites = unit(jnp.einsum("bvc,ce->bve", jnp.where(there[..., None], features[stream], 0), dense["kernel"]))

        def of_view(sites: Array, there: Array) -> tuple[Array, Array]:
            both = valid & there[:, None]
            if config.kind == "sigmoid":
                loss = contrastive.sigmoid(sites, captions, both, temperature, head["bias"], read.words)
            else:
                loss = contrastive.softmax(sites, captions, both, temperature, read.words)
            return loss.sum(), both.any(1).sum().astype(jnp.float32)

        view_sums, view_counts = jax.vmap(of_view, in_axes=1)(sites, there)
        sums[f"text/{stream}"], counts[f"text/{stream}"] = view_sums.sum(), view_counts.sum()
    return sums, counts


def find_words(
    fused: Float[Array, "b h w c"],
    measured: Bool[Array, "b h w"],
    read: Read,
    head: Params,
    config: ml_collections.ConfigDict,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum and count of the local term: the words of a caption look for their places among those of a few sites.

    Each word attends to the regions of a site, cells of grids of `scales` a side over its map, and is compared with
    what it finds; the mean over the words is how well a caption tells of a site (GLoRIA, Huang et al. 2021, section
    3.3). Symmetric softmax over `group` consecutive samples of the global order: a group does not depend on the
    number of devices, and the cost of a sample not on the batch.

    Args:
      fused: features of one view.
      measured: places that are there.
      read: the captions, of which the first of a sample counts; a sample without it or without a place takes no part.
      head: as above, its "local".
      config: `objective.text`, whose `words` has "scales", "group", "sharpness" and "temperature".
    """
    options = config.words
    tokens, valid, words = read.tokens[:, 0], read.valid[:, 0], read.words[:, 0]
    temperature = heads.bounded_temperature(head["temperature"], config.bounds)
    regions, there = grids(fused, measured, options.scales)
    regions = unit(jnp.einsum("bnc,ce->bne", regions, head["places"]["kernel"]))
    tokens = jnp.where(valid[..., None], tokens.astype(jnp.float32), 0)
    tokens = unit(jnp.einsum("bld,de->ble", tokens, head["words"]["kernel"]))

    def split(x: Array) -> Array:
        return x.reshape(-1, min(options.group, len(x)), *x.shape[1:])

    def of_group(part: Any) -> tuple[Array, Array]:
        regions, there, tokens, valid, words = part
        scores = similarities(regions, there, tokens, valid, options.sharpness) / temperature
        both = there.any(1) & valid.any(1)
        number = jnp.arange(len(words))
        own = number[:, None] == number
        negative = both[:, None] & both & ~own & (words[:, None] != words)
        masked = jnp.where(negative, scores, _EMPTY)
        right = jnp.diagonal(scores)
        rest = jax.nn.logsumexp(masked, axis=1), jax.nn.logsumexp(masked, axis=0)
        loss = sum(jax.nn.softplus(x - right) for x in rest) / 2
        return jnp.sum(jnp.where(both, loss, 0)), both.sum().astype(jnp.float32)

    groups = jax.tree.map(split, (regions, there, tokens, valid, words))
    # Side by side, not one after the other: groups lie on different devices.
    sums, counts = jax.vmap(jax.checkpoint(of_group))(groups)
    return sums.sum(), counts.sum()


def similarities(
    regions: Float[Array, "b n e"],
    there: Bool[Array, "b n"],
    tokens: Float[Array, "g l e"],
    valid: Bool[Array, "g l"],
    sharpness: float,
) -> Float[Array, "b g"]:
    """How well each caption tells of each site: mean over its words of the cosine with what the word attends to."""
    attention, cosines = attend(regions, there, tokens, sharpness)
    found = jnp.einsum("bgln,bne->bgle", attention, regions)
    # The attended mean of unit vectors is shorter than one; its direction counts.
    length = jnp.sqrt(jnp.sum(jnp.square(found), axis=-1) + 1e-8)
    cosine = jnp.einsum("bgln,bgln->bgl", attention, jnp.where(there[:, None, None], cosines, 0)) / length
    return jnp.sum(jnp.where(valid, cosine, 0), axis=-1) / jnp.maximum(valid.sum(-1), 1)


def attend(
    regions: Float[Array, "b n e"], there: Bool[Array, "b n"], tokens: Float[Array, "g l e"], sharpness: float
) -> tuple[Float[Array, "b g l n"], Float[Array, "b g l n"]]:
    """Attention of each word of each caption over the regions of each site, and the cosines that it is made of."""
    cosines = jnp.einsum("gle,bne->bgln", tokens, regions, precision="highest")
    return jax.nn.softmax(jnp.where(there[:, None, None], cosines / sharpness, _EMPTY), axis=-1), cosines


def grids(
    fused: Float[Array, "b h w c"], measured: Bool[Array, "b h w"], scales: Sequence[int]
) -> tuple[Float[Array, "b n c"], Bool[Array, "b n"]]:
    """Means over the measured places of the cells of grids, `scales` cells a side; and which cells have any."""
    b, h, w, c = fused.shape
    features = jnp.where(measured[..., None], fused.astype(jnp.float32), 0)
    means, there = [], []
    for scale in scales:
        rows, columns = (jnp.arange(size) * scale // size for size in (h, w))
        cells = (rows[:, None] * scale + columns).reshape(-1)
        member = jax.nn.one_hot(cells, scale * scale, dtype=jnp.float32)
        count = jnp.einsum("bp,pn->bn", measured.reshape(b, -1).astype(jnp.float32), member)
        total = jnp.einsum("bpc,pn->bnc", features.reshape(b, -1, c), member)
        means.append(total / jnp.maximum(count, 1)[..., None])
        there.append(count > 0)
    return jnp.concatenate(means, axis=1), jnp.concatenate(there, axis=1)


def captioning(written: Written, chunk: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum and count of -log p(next token).

    A row has a score of every token at every place, so every device has `chunk` rows at a time.
    """

    def of_chunk(part: Any) -> Array:
        hidden, targets, counted = jax.tree.map(place_rows, part)
        logits = written.scores(hidden).astype(jnp.float32)
        right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - right, 0))

    rows = len(written.hidden) // row_shards()  # of a device
    turns = max(-(-rows // chunk), 1)
    while rows % turns:
        turns += 1

    def split(x: Array) -> Array:
        """Every `turns`-th row makes a part, so that each device has its share of every part, and sends none."""
        return jnp.moveaxis(x.reshape(-1, turns, *x.shape[1:]), 1, 0)

    parts = jax.tree.map(split, (written.hidden, written.targets, written.counted))
    return jnp.sum(jax.lax.map(jax.checkpoint(of_chunk), parts)), written.counted.sum().astype(jnp.float32)
