"""ADM's centre crop, with which data sets are usually prepared."""

import numpy as np
from PIL import Image


def center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale and crop uint8 (H, W, 3) to (height, width, 3).

    The picture is halved with a box filter while it is at least twice the target size, scaled bicubically to the
    smallest size that covers the target, and cropped in the middle. For squares, this gives the pixels of
    guided-diffusion's `center_crop_arr` (Dhariwal and Nichol 2021).
    """
    picture = Image.fromarray(image)
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    top, left = (picture.height - height) // 2, (picture.width - width) // 2
    return np.asarray(picture)[top : top + height, left : left + width]
