"""What is noticed while pictures are decoded, and may surprise: it is counted, and said once at the end."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from sit_atconv.data.pictures.protocol import SourceImage, SourceOptions

log = logging.getLogger(__name__)

_MOST_DARK = 12  # bits: a picture that uses no more of 16 becomes at least sixteen times too dark


@dataclass(frozen=True)
class Remarks:
    """Counts of pictures with an EXIF orientation and of 16-bit pictures, and the most bits that one of these uses."""

    turned: int = 0
    deep: int = 0
    bits: int = 0

    @staticmethod
    def of(pictures: Iterable[SourceImage]) -> "Remarks":
        pictures = list(pictures)
        bits = [picture.bits for picture in pictures if picture.bits is not None]
        return Remarks(sum(picture.turned for picture in pictures), len(bits), max(bits, default=0))

    def __add__(self, other: "Remarks") -> "Remarks":
        return Remarks(self.turned + other.turned, self.deep + other.deep, max(self.bits, other.bits))

    def say(self, path: str, options: SourceOptions) -> None:
        """Log what a user should know about the pictures of `path`."""
        if self.turned:
            how = "are turned as it says" if options.exif else "are read as stored, as in ADM; preparation has --exif"
            log.warning("%s: %d pictures have an EXIF orientation and %s.", path, self.turned, how)
        if self.deep and self.bits <= _MOST_DARK and options.bits is None:
            log.warning(
                "%s: none of its %d 16-bit pictures uses more than %d bits, so they are nearly black; --bits %d reads "
                "them as such.",
                path, self.deep, self.bits, max(9, self.bits),
            )  # fmt: skip
