"""EuroSAT RGB, or any folder of split folders of class folders of 64 x 64 pictures, as a TFDS data set.

Source: EuroSAT (Helber et al., 2019), MIT; contains modified Copernicus Sentinel data.
Input: FOLDER/{train,test}/CLASS/IMAGE, as in data/sample/eurosat_rgb.

    skyjax data build --source=data/eurosat_tfds.py --input=data/sample/eurosat_rgb --out=runs/tfds

Trap: TFDS's own Image feature needs TensorFlow; a Tensor, compressed by zlib, is written and read without it.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from skyjax.errors import UserError
from skyjax.input.images import SUFFIXES, read_image

CLASSES = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop"),
    *("Residential", "River", "SeaLake"),
)
SPLITS = ("train", "test")


class EurosatRgb(tfds.core.GeneratorBasedBuilder):
    """Features: image (64, 64, 3) uint8, label, id (split/class/file)."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The folder with train/ and test/, each with a folder a class."

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(64, 64, 3), dtype=np.uint8, encoding="zlib"),
                "label": tfds.features.ClassLabel(names=list(CLASSES)),
                "id": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            supervised_keys=("image", "label"),
            license="MIT",
            homepage="https://github.com/phelber/EuroSAT",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        folder = pathlib.Path(dl_manager.manual_dir)
        missing = [split for split in SPLITS if not (folder / split).is_dir()]
        if missing:
            raise UserError(f'"{folder}" has no folder "{missing[0]}"; it needs {" and ".join(SPLITS)}')
        return {split: self._generate_examples(folder / split) for split in SPLITS}

    def _generate_examples(self, folder: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in CLASSES:
            for file in sorted((folder / name).glob("*")) if (folder / name).is_dir() else []:
                if file.suffix.lower() in SUFFIXES:
                    key = f"{folder.name}/{name}/{file.name}"
                    yield key, {"image": read_image(file), "label": name, "id": key}
