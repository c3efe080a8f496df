"""How good a picture is: PSNR and SSIM, what every metric means exactly, and the type of a measured picture.

`psnr` and `ssim` are plain differentiable functions of tensors and raise only for shapes, so that a training
loss may use them on pictures that leave [0, 1]. Measurements go through `Pictures`, which holds the range,
and `Meter` (in `eval.meter`), which knows all metrics of a protocol.

References: PSNR and SSIM as in Wang et al. 2004, "Image quality assessment: from error visibility to
structural similarity", with an 11 × 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03 and data range 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from avatars.errors import UserError

__all__ = [
    "AKD_DLIB",
    "AKD_MESH",
    "AKD_MTCNN",
    "AKD_PIPNET",
    "CSIM_ARCFACE",
    "CSIM_DLIB",
    "CSIM_FACENET",
    "DEFINITIONS",
    "LPIPS",
    "LPIPS_SQUEEZE",
    "LPIPS_VGG",
    "PSNR",
    "PSNR_CAP",
    "PSNR_MASKED",
    "SSIM",
    "SSIM_MASKED",
    "Definition",
    "Pictures",
    "masked_mean",
    "psnr",
    "ssim",
    "ssim_map",
]

PSNR_CAP = 100.0
"""dB that count for a picture whose PSNR is higher or infinite: JSON has no infinity, a mean needs a number.
Two 8-bit pictures of 224 × 224 that differ by one level in one value reach it."""

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03

# Up to this edge length the blur is one product with a banded matrix, above it a product per block.
# Measured on CPU: 4 to 8 times faster forward and backward than a depthwise convolution at 96 to 128 pixels.
WHOLE_MATRIX_UP_TO = 256
BLOCK = 16


@dataclass(frozen=True)
class Definition:
    """What a number in a result row means. All of it is part of the protocol's id.

    Attributes:
        key: name in rows, tables and the tracker (`eval/<key>`).
        label: column heading, with the network where there is one.
        unit: unit, empty for a plain number.
        higher_is_better: direction.
        text: the definition in words.
        network: name of the network that measures, None for a formula.
        weights: (file name, sha256 or its published prefix) of every weight file that the number depends on.
    """

    key: str
    label: str
    unit: str
    higher_is_better: bool
    text: str
    network: str | None = None
    weights: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "key": self.key,
            "label": self.label,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "text": self.text,
            "network": self.network,
            "weights": [list(entry) for entry in self.weights],
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Definition:
        """The reverse of `as_dict`."""
        weights = tuple((str(name), str(digest)) for name, digest in values["weights"])
        return Definition(**{**values, "weights": weights})


PSNR = Definition(
    "psnr",
    "PSNR",
    "dB",
    True,
    "10 log10(1 / MSE) of each picture over all pixels and the three channels, data range 1; equal pictures "
    f"and anything above {PSNR_CAP:g} dB count as {PSNR_CAP:g}; mean over pictures",
)
SSIM = Definition(
    "ssim",
    "SSIM",
    "",
    True,
    "mean of the SSIM map of each picture over all pixels and the three channels: Gaussian window 11 × 11, "
    "sigma 1.5, K1 0.01, K2 0.03, data range 1, population covariance, reflected border (edge not "
    "repeated) that counts like the rest; mean over pictures",
)
PSNR_MASKED = Definition(
    "psnr_masked",
    "PSNR in mask",
    "dB",
    True,
    "PSNR with the mean squared error taken over the pixels whose target mask is at least 0.5; pictures with "
    "an empty mask are left out and counted; mean over pictures",
)
SSIM_MASKED = Definition(
    "ssim_masked",
    "SSIM in mask",
    "",
    True,
    "mean of the SSIM map of the full picture over the pixels whose target mask is at least 0.5; pictures "
    "with an empty mask are left out and counted; mean over pictures",
)
LPIPS_TEXT = (
    "lpips 0.1.4, linear heads v0.1 over torchvision's ImageNet network, pictures scaled from [0, 1] to [-1, 1], "
    "spatial mean; mean over pictures"
)
LPIPS = Definition(
    "lpips",
    "LPIPS (alex)",
    "",
    False,
    LPIPS_TEXT,
    "alex",
    (("alexnet-owt-7be5be79.pth", "7be5be79"), ("lpips-v0.1-alex.pth", "df73285e")),
)
LPIPS_VGG = Definition(
    "lpips_vgg",
    "LPIPS (vgg)",
    "",
    False,
    LPIPS_TEXT,
    "vgg",
    (("vgg16-397923af.pth", "397923af"), ("lpips-v0.1-vgg.pth", "a78928a0")),
)
LPIPS_SQUEEZE = Definition(
    "lpips_squeeze",
    "LPIPS (squeeze)",
    "",
    False,
    LPIPS_TEXT,
    "squeeze",
    (("squeezenet1_1-b8a52dc0.pth", "b8a52dc0"), ("lpips-v0.1-squeeze.pth", "4a5350f2")),
)
MTCNN_WEIGHTS = (
    ("pnet.pt", "a2a71925e0b9996a"),
    ("rnet.pt", "bbb937de72efc9ef"),
    ("onet.pt", "165bfbe42940416c"),
)
AKD_RULE = (
    "mean Euclidean distance in pixels, at the protocol's size, of the {points} found separately on prediction and "
    "target, the largest face of each; pictures where either has no face are left out and counted; mean over pictures"
)
CSIM_RULE = "; pictures where either has no face are left out and counted; mean over pictures"


def _akd(network: str, label: str, points: str, weights: tuple[tuple[str, str], ...]) -> Definition:
    return Definition(f"akd/{network}", label, "px", False, AKD_RULE.format(points=points), network, weights)


AKD_MTCNN = _akd(
    "mtcnn-5",
    "AKD-5 (MTCNN)",
    "5 points (eyes, nose, mouth corners) of facenet-pytorch's MTCNN",
    MTCNN_WEIGHTS,
)
AKD_DLIB = _akd(
    "dlib-68",
    "AKD-68 (dlib)",
    "68 points of dlib's shape predictor in the box of its HOG detector (one doubling),",
    (("shape_predictor_68_face_landmarks.dat", "fbdc2cb80eb9aa7a"),),
)
AKD_MESH = _akd(
    "mesh-468",
    "AKD-468 (MediaPipe mesh)",
    "468 points (x and y) of MediaPipe's face mesh, in a square of 1.5 times MTCNN's box with the eyes level,",
    (("face_landmark.tflite", "2efcb4f4de43c761"), *MTCNN_WEIGHTS),
)
AKD_PIPNET = _akd(
    "pipnet-98",
    "AKD-98 (PIPNet)",
    "98 WFLW points of PIPNet (ResNet-18, 10 neighbours) in MTCNN's box enlarged 1.2 times,",
    (("pipnet-wflw-r18-nb10.pth", ""), ("pipnet-wflw-meanface.txt", ""), *MTCNN_WEIGHTS),
)
CSIM_FACENET = Definition(
    "csim/facenet-vggface2",
    "CSIM (FaceNet-VGGFace2)",
    "",
    True,
    "cosine of the 512-d embeddings of facenet-pytorch's InceptionResnetV1 (VGGFace2) of the target's MTCNN "
    "face box with margin 14 of 160 cut out of both pictures at 160 × 160; pictures whose target shows no "
    "face are left out and counted; mean over pictures",
    "facenet-vggface2",
    (("20180402-114759-vggface2.pt", ""), *MTCNN_WEIGHTS),
)
CSIM_ARCFACE = Definition(
    "csim/arcface",
    "CSIM (ArcFace w600k_r50)",
    "",
    True,
    "cosine of the 512-d embeddings of InsightFace's w600k_r50 (the recognizer of buffalo_l), each picture's face "
    "aligned by MTCNN's five points to ArcFace's 112 × 112 template, RGB (x - 127.5) / 127.5" + CSIM_RULE,
    "arcface",
    (("w600k_r50.onnx", ""), *MTCNN_WEIGHTS),
)
CSIM_DLIB = Definition(
    "csim/dlib-128",
    "CSIM (dlib-128)",
    "",
    True,
    "cosine of the 128-d descriptors of dlib's ResNet-29, each picture's face cut out at 150 × 150 with padding 0.25 "
    "by dlib's five points in the box of its HOG detector (one doubling)" + CSIM_RULE,
    "dlib-128",
    (
        ("dlib_face_recognition_resnet_model_v1.dat", "55533b28a95800a5"),
        ("shape_predictor_5_face_landmarks.dat", "c4b1e9804792707d"),
    ),
)

DEFINITIONS = {
    metric.key: metric
    for metric in (
        *(PSNR, SSIM, PSNR_MASKED, SSIM_MASKED),
        *(LPIPS, LPIPS_VGG, LPIPS_SQUEEZE),
        *(AKD_MTCNN, AKD_DLIB, AKD_MESH, AKD_PIPNET),
        *(CSIM_FACENET, CSIM_ARCFACE, CSIM_DLIB),
    )
}
"""All metrics that this version can measure, in the order of tables."""


@dataclass(frozen=True)
class Pictures:
    """Pictures that may be measured: (C, 3, H, W) float32 sRGB, finite and in [0, 1] by construction.

    Raises:
        UserError: another shape, a value that is not finite, or a value outside [0, 1].
    """

    tensor: Tensor
    name: str = "picture"

    def __post_init__(self) -> None:
        tensor = self.tensor
        if tensor.ndim != 4 or tensor.shape[1] != 3 or 0 in tensor.shape:
            raise UserError(
                f"The {self.name} has the shape {tuple(tensor.shape)}; metrics need (C, 3, H, W)."
            )
        if not torch.is_floating_point(tensor):
            raise UserError(
                f"The {self.name} is {tensor.dtype}; metrics need floats: divide 8-bit values by 255."
            )
        _check_finite(tensor, self.name)
        low, high = (float(value) for value in torch.aminmax(tensor.detach()))
        if low < 0 or high > 1:
            raise UserError(
                f"The {self.name} has values from {low:.4g} to {high:.4g}; metrics need [0, 1]. "
                "Scale 8-bit values by 1/255, [-1, 1] by (x + 1)/2, and clamp what a renderer leaves outside."
            )

    def to(self, device: str | torch.device) -> Pictures:
        """The same pictures on another device."""
        return Pictures(self.tensor.to(device), self.name)

    @staticmethod
    def rendered(tensor: Tensor, name: str = "prediction") -> Pictures:
        """A renderer's pictures as a viewer would save them: clamped to [0, 1] and rounded to 8 bits.

        Args:
            tensor: (C, 3, H, W) float; values outside [0, 1] are clamped, values that are not finite refused.
            name: what the error calls it.
        """
        _check_finite(tensor, name)
        return Pictures((tensor.detach().float().clamp(0, 1) * 255).round() / 255, name)


def psnr(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each picture, data range 1.

    Args:
        prediction: (C, 3, H, W) float.
        target: (C, 3, H, W) float.
        mask: (C, 1, H, W); where given, only pixels of at least 0.5 count.

    Returns:
        (C,) decibels: inf where the pictures are equal, nan where the mask is empty.

    Raises:
        UserError: the shapes differ.
    """
    _check_shapes(prediction, target, mask)
    return -10 * torch.log10(masked_mean((prediction - target).square(), mask))


def ssim(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity of each picture (Wang et al. 2004), differentiable.

    Gaussian window 11 × 11 of sigma 1.5, data range 1, population covariance, border reflected without
    repeating the edge. The mean runs over the whole map, border included: torchmetrics' definition.
    (scikit-image and the original leave 5 pixels of border out of it: `ssim_map(...)[..., 5:-5, 5:-5]`.)

    Args:
        prediction: (C, 3, H, W) float, H and W at least 6.
        target: (C, 3, H, W) float.
        mask: (C, 1, H, W); where given, the map's mean runs over the pixels of at least 0.5.

    Returns:
        (C,) in [-1, 1]; nan where the mask is empty.

    Raises:
        UserError: the shapes differ or a side is shorter than 6 pixels.
    """
    _check_shapes(prediction, target, mask)
    return masked_mean(ssim_map(prediction, target), mask)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """(C,) mean of (C, 3, H, W) over channels and pixels, or over the pixels where (C, 1, H, W) is at least 0.5."""
    if mask is None:
        return values.mean(dim=(1, 2, 3))
    inside = (mask >= 0.5).to(values.dtype)
    return (values * inside).sum(dim=(1, 2, 3)) / (inside.sum(dim=(1, 2, 3)) * values.shape[1])


def ssim_map(prediction: Tensor, target: Tensor) -> Tensor:
    """SSIM at every pixel and channel, (C, 3, H, W); see `ssim` for the definition and errors."""
    _check_shapes(prediction, target, None)
    height, width = prediction.shape[-2:]
    if min(height, width) <= WINDOW // 2:
        raise UserError(f"SSIM needs pictures of at least 6 × 6 pixels; these are {height} × {width}.")
    c1, c2 = K1**2, K2**2
    with torch.autocast(prediction.device.type, enabled=False):
        # Sum and difference need four blurs where x, y, x², y², xy need five; centred on grey they also lose
        # fewer digits: s = x + y, d = x - y give 2xy = (s² - d²)/2 and x² + y² = (s² + d²)/2.
        x, y = prediction.float() - 0.5, target.float() - 0.5
        s, d = x + y, x - y
        mean_s, mean_d, mean_ss, mean_dd = _blur(torch.stack([s, d, s * s, d * d]))
        var_s, var_d = mean_ss - mean_s * mean_s, mean_dd - mean_d * mean_d
        mean_s = mean_s + 1  # back from grey-centred to [0, 1]: x + y + 2 * 0.5
        square_s, square_d = mean_s * mean_s, mean_d * mean_d
        luminance = ((square_s - square_d) / 2 + c1) / ((square_s + square_d) / 2 + c1)
        structure = ((var_s - var_d) / 2 + c2) / ((var_s + var_d) / 2 + c2)
        return luminance * structure


def _check_finite(tensor: Tensor, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise UserError(f"The {name} holds values that are not finite; a metric of it would mean nothing.")


def _check_shapes(prediction: Tensor, target: Tensor, mask: Tensor | None) -> None:
    if prediction.shape != target.shape:
        raise UserError(
            f"The prediction is {tuple(prediction.shape)} and the target {tuple(target.shape)}; "
            "a metric compares pictures of one size. Render at the protocol's size."
        )
    if prediction.ndim != 4:
        raise UserError(f"The pictures have the shape {tuple(prediction.shape)}; metrics need (C, 3, H, W).")
    if mask is not None and mask.shape != (prediction.shape[0], 1, *prediction.shape[-2:]):
        raise UserError(
            f"The mask is {tuple(mask.shape)}; pictures of {tuple(prediction.shape)} need "
            f"{(prediction.shape[0], 1, *prediction.shape[-2:])}."
        )


def _blur(pictures: Tensor) -> Tensor:
    """Gaussian window over the last two axes of (..., H, W), with reflected borders."""
    for axis in (-2, -1):
        n = pictures.shape[axis]
        if n <= WHOLE_MATRIX_UP_TO:
            matrix = _blur_matrix(n, pictures.device)
            pictures = matrix @ pictures if axis == -2 else pictures @ matrix.T
        else:
            pictures = _blur_in_blocks(pictures, axis)
    return pictures


def _blur_in_blocks(pictures: Tensor, axis: int) -> Tensor:
    """The same along one long axis: each block of outputs is a small matrix times the inputs that it sees."""
    n = pictures.shape[axis]
    order = _reflected(n, -n % BLOCK, pictures.device)
    padded = pictures.index_select(axis, order)
    blocks = padded.unfold(axis, BLOCK + WINDOW - 1, BLOCK)
    matrix = _window_matrix(pictures.device)
    if axis == -1:  # (..., H, blocks, BLOCK + 10)
        return (blocks @ matrix.T).flatten(-2)[..., :n]
    # (..., blocks, W, BLOCK + 10): the matrix from the left keeps the pixels of a row together
    return (matrix @ blocks.transpose(-1, -2)).flatten(-3, -2)[..., :n, :]


def _gaussian() -> Tensor:
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    return weights / weights.sum()


def _reflected(n: int, extra: int, device: torch.device) -> Tensor:
    """Indices that pad an axis of n by reflection, then by `extra` repeats that are cut off later."""
    half = WINDOW // 2
    index = torch.arange(-half, n + half, device=device).abs()
    index = torch.where(index >= n, 2 * n - 2 - index, index)
    return torch.cat([index, index[-1:].expand(extra)])


@lru_cache(maxsize=64)
def _blur_matrix(n: int, device: torch.device) -> Tensor:
    """(n, n): row i holds the window around pixel i, folded back at the borders."""
    columns = _reflected(n, 0, torch.device("cpu")).unfold(0, WINDOW, 1)  # (n, 11)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    matrix.scatter_add_(1, columns, _gaussian().expand(n, WINDOW).contiguous())
    return matrix.float().to(device)


@lru_cache(maxsize=8)
def _window_matrix(device: torch.device) -> Tensor:
    """(BLOCK, BLOCK + 10): the window at each output of a block."""
    matrix = torch.zeros(BLOCK, BLOCK + WINDOW - 1, dtype=torch.float64)
    for row in range(BLOCK):
        matrix[row, row : row + WINDOW] = _gaussian()
    return matrix.float().to(device)
