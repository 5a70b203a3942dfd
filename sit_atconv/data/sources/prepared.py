"""The pictures kept in a prepared data set (`prepare --images`), as a source for references and new preparation."""

from sit_atconv.data.pictures.protocol import SourceImage, SourceOptions
from sit_atconv.data.shards.dataset import ShardDataset
from sit_atconv.errors import InputError


class PreparedSource:
    """Pictures of a prepared data set as an `ImageSource`: crops stored losslessly, or latents that are pixels."""

    kind = "prepared"
    lossy = False
    names = None

    def __init__(self, path: str, options: SourceOptions) -> None:
        self._dataset = ShardDataset(path)
        if not self._dataset.has_images:
            raise InputError(f"{path} holds latents without pictures: prepare it with --images, or give its source.")
        labelled = self._dataset.num_classes > 0 and not options.unconditional
        self.class_names = self._dataset.class_names if labelled else None
        self.labels = self._dataset.labels() if labelled else None

    def verify(self) -> None:
        """Raise `InputError` if a shard has changed since it was written; reads all shards, at 1 GB/s per thread."""
        if faults := self._dataset.damaged():
            raise InputError(f"{faults[0]} Copy {len(faults)} such file(s) again, or prepare the data anew.")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> SourceImage:
        image = self._dataset.read([index], [False], images=True)["image"][0].permute(1, 2, 0).numpy()
        label = None if self.labels is None else int(self.labels[index])
        return SourceImage(image, label, self._dataset.where(index))
