"""Pictures in folders as a source of samples: no build step between a folder of JPEG, PNG or GeoTIFF and training.

Every image is one sample of one date. Labels are not read; `skyjax data build` keeps them, and suits larger sets.
"""

import os
import pathlib
from typing import Any

from skyjax.errors import BadRecord, UserError
from skyjax.input.images import SUFFIXES, image_sample, list_images
from skyjax.sample import Sample

SENSOR = "rgb"


class ImageFolder:
    """All images below a folder in the order of their paths, of the sensor "rgb"; the protocol is RecordSource's."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Lists the files and looks at the first that can be read.

        Raises:
          UserError: there is no such folder, or it holds no image that can be used.
        """
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise UserError(f'there is no folder "{folder}"; name a folder of images or one made by skyjax data build')
        self._files = list_images(self.folder)
        if not self._files:
            raise UserError(
                f'"{folder}" holds neither images ({" ".join(SUFFIXES)}) nor records; make these with skyjax data build'
            )
        self.description = self._describe()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        """One image as a sample.

        Raises:
          BadRecord: it cannot be used; others may.
        """
        return image_sample(self._files[index], SENSOR, source=self.folder.name)

    def name(self, index: int) -> str:
        """The file's place in the folder, as messages say it."""
        return str(self._files[index].relative_to(self.folder))

    def _describe(self) -> dict[str, Any]:
        """What dataset.json says of modalities, taken from the first image that can be read: the others are alike."""
        reason = ""
        for index in range(min(len(self), 20)):
            try:
                (modality, sequence), *_ = self[index].sequences.items()
            except BadRecord as error:
                reason = reason or str(error)
                continue
            return {
                "modalities": {
                    modality: {"dtype": sequence.values.dtype.name, "sensors": {SENSOR: list(sequence.bands)}}
                }
            }
        raise UserError(f'"{self.folder}" holds no image of the sensor "{SENSOR}" among the first: {reason}')
