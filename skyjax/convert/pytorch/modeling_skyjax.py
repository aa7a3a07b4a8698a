# Part of skyjax. SPDX-License-Identifier: Apache-2.0
"""skyjax_encoder.py for transformers: `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`.

The model is used as `SkyjaxEncoder` is; see there.
"""

from transformers import PretrainedConfig, PreTrainedModel

from .skyjax_encoder import SkyjaxEncoder


class SkyjaxConfig(PretrainedConfig):
    """What config.json holds: "model", the encoder's sizes, and "statistics", which images are normalised by."""

    model_type = "skyjax"

    def __init__(self, model=None, statistics=None, **others):
        super().__init__(**others)
        self.model = model
        self.statistics = statistics


class SkyjaxModel(PreTrainedModel):
    """`SkyjaxEncoder` with what transformers adds: loading from the hub, saving, device maps."""

    config_class = SkyjaxConfig
    base_model_prefix = "encoder"
    main_input_name = "images"

    def __init__(self, config):
        super().__init__(config)
        self.encoder = SkyjaxEncoder({"model": config.model, "statistics": config.statistics})
        self.post_init()

    def _init_weights(self, module):
        """The encoder's parts initialise themselves."""

    def forward(self, images, lonlat=None, grid=None):
        """A dictionary of features; see `SkyjaxEncoder.forward`."""
        return self.encoder(images, lonlat, grid)

    def save_pretrained(self, *arguments, **options):
        """Saves in the layout of the export, which skyjax_encoder.py reads too."""
        weights = options.get("state_dict") or self.state_dict()
        options["state_dict"] = {name.removeprefix("encoder."): value for name, value in weights.items()}
        super().save_pretrained(*arguments, **options)
