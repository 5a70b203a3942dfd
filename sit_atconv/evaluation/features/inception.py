"""The network behind FID, sFID, IS, precision and recall: Inception-v3 of 2015-12-05, as the ADM evaluator runs it.

Layers and weights are torch-fidelity's. The changes made here affect speed, not the features (up to 1e-5): batch norm
is folded into the convolutions, the TF1 resize is a gather and a matrix product, and images are processed in small
groups, in the first layers in still smaller ones.
"""

import copy
import io
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.grouping import Grouped
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.weights import read_weights

PUBLISHED_WEIGHTS_PREFIX = "6726825d"  # of the SHA-256 of the file that torch-fidelity publishes
_INPUT_SIZE = 299
_SPATIAL_CHANNELS = 7
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2")
_MIDDLE = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c")
_TOP = ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool")
# On a CPU. From 16 images on, torch uses oneDNN for 1x1 convolutions, which is faster than its own matrix product. The
# stem's feature maps take 8 MB per image: those of a few images stay in the caches, while for many images the system
# maps new memory for every layer.
_CPU_GROUP, _CPU_STEM_GROUP = 16, 2
_GPU_GROUP = 64


class InceptionFeatures:
    """uint8 images (B, 3, H, W) -> {"pool": (B, 2048), "spatial": (B, 2023), "probabilities": (B, 1008)}, float32.

    pool: the last average pooling. spatial: the first 7 channels of Mixed_6d's 1x1 branch, 17 x 17 x 7 flattened
    channels last. probabilities: softmax of the logits without bias (Salimans et al. 2016 as ADM computes it).

    Args:
        weights: the file of torch-fidelity's weights; None uses torch hub's copy, and downloads it if it is missing.
        device: to run on.
        fast: bfloat16 autocast, which is faster on a GPU but does not give the published numbers.

    Raises:
        InputError: when the weights are missing or are not this network's, or the images are not uint8 (B, 3, H, W).
    """

    name, title, suffix = "inception", "Inception-v3 2015-12-05", ""
    neighbours, neighbour_limit = 3, 50_000
    remarks = ()
    dimensions = {"pool": 2048, "spatial": 17 * 17 * _SPATIAL_CHANNELS, "probabilities": 1008}

    def __init__(
        self, weights: str | Path | None = None, device: str | torch.device = "cpu", fast: bool = False
    ) -> None:
        path = _find_weights(weights)
        network = _load_network(path)
        self.weights_path, self.weights_sha256 = str(path), sha256_of_file(path)
        self.device, self.fast = torch.device(device), fast
        self.identity = f"inception {self.weights_sha256} {'bf16' if fast else 'fp32'}"
        for module in network.modules():
            if hasattr(module, "bn"):
                module.conv, module.bn = _fold(module.conv, module.bn), nn.Identity()

        on_cpu = self.device.type == "cpu"
        self._layout = torch.channels_last if on_cpu or fast else torch.contiguous_format
        parts = (_sequence(network, names) for names in (_STEM, _MIDDLE, _TOP))
        self._stem, self._middle, self._top = (part.to(self.device, memory_format=self._layout) for part in parts)
        self._spatial = _first_channels(network.Mixed_6d.branch1x1).to(self.device, memory_format=self._layout)
        self._classes = network.fc.weight.to(self.device)
        self._stem_group = _CPU_STEM_GROUP if on_cpu else _GPU_GROUP
        self._grouped = Grouped(self._forward, self.device, _CPU_GROUP if on_cpu else _GPU_GROUP)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a batch, on `device`: the same bits whatever the batch size."""
        require_uint8_images(images)
        return self._grouped(images)

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        parts = [self._input(part) for part in images.split(self._stem_group)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            x = torch.cat([self._stem(part) for part in parts])
            x = self._middle(x)
            spatial = self._spatial(x)
            pool = self._top(x).flatten(1)
        pool = pool.float()
        return {
            "pool": pool,
            "spatial": spatial.float().permute(0, 2, 3, 1).flatten(1),
            "probabilities": torch.softmax(pool @ self._classes.T, dim=1),
        }

    def _input(self, images: Tensor) -> Tensor:
        """Bytes (B, 3, H, W) -> input of the network, (B, 3, 299, 299)."""
        pixels = (images.float() - 128) / 128
        return resize_tf1(pixels, _INPUT_SIZE).contiguous(memory_format=self._layout)


def require_uint8_images(images: Tensor) -> None:
    """Raise `InputError` unless `images` is a uint8 tensor of shape (B, 3, H, W), B >= 1."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise InputError(
            f"Features need uint8 images (B, 3, H, W) with values from 0 to 255; got {images.dtype} "
            f"{tuple(images.shape)}. sit_atconv.images.to_uint8 converts floats in [-1, 1]."
        )


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """Float images (B, C, H, W) to (B, C, size, size): TensorFlow 1's bilinear resize.

    No half-pixel centres and no antialiasing: output i reads input i * H / size, torch-fidelity's
    `interpolate_bilinear_2d_like_tensorflow1x` in separable form (rows gathered, columns as a matrix product).
    """
    low, high, fraction = _taps(images.shape[2], size, images)
    rows = torch.lerp(images[:, :, low], images[:, :, high], fraction[:, None])
    low, high, fraction = _taps(images.shape[3], size, images)
    columns = torch.zeros(images.shape[3], size, dtype=images.dtype, device=images.device)
    output = torch.arange(size, device=images.device)
    columns.index_put_((low, output), 1 - fraction, accumulate=True)
    columns.index_put_((high, output), fraction, accumulate=True)
    return rows @ columns


def _taps(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper source index and the fraction between them, for each output position."""
    scale = torch.tensor(length / size, dtype=torch.float32, device=like.device)
    position = torch.arange(size, dtype=torch.float32, device=like.device) * scale
    low = position.long()
    return low, (low + 1).clamp_max(length - 1), (position - low).to(like.dtype)


def _find_weights(weights: str | Path | None) -> Path:
    """The weights file; by default torch hub's copy, which is downloaded if it is missing."""
    if weights is not None:
        if not Path(weights).is_file():
            raise InputError(f"There is no weights file {weights}. {_where_to_get_weights()}")
        return Path(weights)
    url = _torch_fidelity().URL_INCEPTION_V3
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=PUBLISHED_WEIGHTS_PREFIX)
        except (OSError, RuntimeError) as error:
            raise InputError(f"Cannot download the Inception weights ({error}). {_where_to_get_weights()}") from error
    return path


def _where_to_get_weights() -> str:
    return (
        f"Fetch {_torch_fidelity().URL_INCEPTION_V3} and name the file with --weights (in Python: weights=...); "
        "or use --features pixels, which needs no network."
    )


def _load_network(path: Path) -> nn.Module:
    """torch-fidelity's network with the weights of `path`, in float32; pickled code is never run."""
    try:
        state = read_weights(path)
    except InputError as error:
        raise InputError(f"{error} {_where_to_get_weights()}") from error
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    checked = io.BytesIO()
    torch.save(tensors, checked)
    checked.seek(0)  # torch-fidelity unpickles its input, so it gets only the tensors
    try:
        return _torch_fidelity().FeatureExtractorInceptionV3("inception", ["2048"], checked)
    except RuntimeError as error:
        raise InputError(
            f"{path} holds {len(tensors)} tensors that are not those of the FID Inception (566, in torch-fidelity's "
            f"names): {last_line(error)}. {_where_to_get_weights()}"
        ) from error


def _torch_fidelity() -> ModuleType:
    try:
        from torch_fidelity import feature_extractor_inceptionv3
    except ImportError as error:
        raise InputError("Inception features need torch-fidelity: pip install 'sit-atconv[eval]'.") from error
    return feature_extractor_inceptionv3


def last_line(error: Exception) -> str:
    """The last line of an error message, at most 160 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().rstrip(".")[:160]


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Fold a batch norm into its convolution, in double precision."""
    return fuse_conv_bn_eval(*(copy.deepcopy(layer).double().eval() for layer in (conv, norm))).float()


def _sequence(network: nn.Module, names: tuple[str, ...]) -> nn.Sequential:
    return nn.Sequential(*(getattr(network, name) for name in names))


def _first_channels(block: nn.Module) -> nn.Module:
    """A copy of a folded 1x1 block that computes only its first 7 channels."""
    head = copy.deepcopy(block)
    head.conv.weight.data = block.conv.weight.data[:_SPATIAL_CHANNELS].clone()
    head.conv.bias.data = block.conv.bias.data[:_SPATIAL_CHANNELS].clone()
    return head
