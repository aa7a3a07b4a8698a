"""How often a step goes through the encoder."""

import jax

from skyjax.input.loader import Loader
from skyjax.train import loop, state, step


def test_views_of_one_size_go_through_the_encoder_in_one_call(tiny_config, monkeypatch):
    config = tiny_config(modalities=("sar",), batch_size=2, data__local_views__count=3)
    calls = []

    def apply(model, params, images, **rest):
        calls.append((rest["key"] is not None, images["sar"]["values"].shape))
        return real(model, params, images, **rest)

    real = step.skysense.apply
    monkeypatch.setattr(step.skysense, "apply", apply)
    loader = Loader(config)
    batch = next(loader)
    loader.close()
    first = state.abstract(config)
    statistics = {m: (table["mean"], table["std"]) for m, table in loop.statistics_table(config.model).items()}
    jax.eval_shape(step.make_step(config, statistics), first, batch)
    dates, local_dates = config.data.dates.sar, config.data.local_views.dates.sar
    large, small = config.data.global_views.size.sar, config.data.local_views.size.sar
    # Student and teacher each see the two global views of both samples at once, the student all three local ones.
    global_views = (2 * 2, dates, large, large, 2)
    assert sorted(calls) == sorted(
        [(True, global_views), (True, (2 * 3, local_dates, small, small, 2)), (False, global_views)]
    )
