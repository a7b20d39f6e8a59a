"""The frozen DINOv3 ViT: pixels in, feature maps of chosen blocks out.

Source: Siméoni et al., "DINOv3", arXiv 2508.10104; checkpoint format: Hugging Face transformers,
`dinov3_vit`. Blocks are numbered from 0, as in the paper; the backbone's one final LayerNorm is
applied to every tapped block, as in `get_intermediate_layers(norm=True)` of the original code.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import ConfigError, Model
from models.hub import BackboneError, from_hub, own_json, require_possible

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # LVD-1689M checkpoints
SAT493M = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # SAT-493M checkpoints
SHAPING = ("num_attention_heads", "rope_theta", "layer_norm_eps", "hidden_act", "use_gated_mlp")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """What a backbone's features depend on, known before its weights are loaded.

    image_mean and image_std have a number for each band and belong to pixels in [0, 1]; rgb are the
    places among the bands of the three that the backbone sees; remarks are for the log.
    """

    name: str
    layers: tuple[int, ...]
    channels: int
    patch_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rgb: tuple[int, ...] = (0, 1, 2)
    remarks: tuple[str, ...] = ()
    norm: str = "final"


class Normalize(nn.Module):
    """8-bit pixels to what the backbone and the heads see: scaled to [0, 1], then mean and std.

    >>> Normalize([0.5] * 3, [0.25] * 3)(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).unique()
    tensor([2.])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, bands, H, W) pixels in 0..255 to float32 of the same shape."""
        return (pixels.float() / 255 - self.mean) / self.std


class DinoBackbone(nn.Module):
    """A DINOv3 ViT that never trains and computes nothing above the deepest block asked for.

    model: a transformers `DINOv3ViTModel`; spec: which blocks and which mean and std;
    feature_dtype: the precision features leave in. Feature maps of a (B, 3, H, W) batch are
    (B, channels, H/16, W/16), one per block of `spec.layers`, in that order.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: BackboneSpec,
        weights_hash: str,
        feature_dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.weights_hash = weights_hash
        self.feature_dtype = feature_dtype
        self.normalize = Normalize(spec.image_mean, spec.image_std)
        self.embeddings = model.embeddings
        self.rope = model.rope_embeddings
        self.blocks = model.model.layer[: max(spec.layers) + 1]
        self.norm = model.norm
        self.prefix = 1 + model.config.num_register_tokens  # CLS, then registers, then patches
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "DinoBackbone":
        """Stay in evaluation mode whatever the parent does: training would jitter the RoPE."""
        return super().train(False)

    def compute_in(self, precision: str) -> "DinoBackbone":
        """Compute in fp32 or bf16: weights and activations, as `from_pretrained(dtype=...)` has it.

        The angles of the rotary positions stay exact.
        """
        for part in (self.embeddings, self.blocks, self.norm):
            part.to(PRECISIONS[precision])
        return self

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps of (B, bands, H, W) pixels in 0..255, sides multiples of the patch size."""
        return self.encode(self.normalize(pixels))

    @torch.no_grad()
    def encode(self, image: Tensor) -> list[Tensor]:
        """Feature maps of a normalised image (B, bands, H, W)."""
        patch = self.spec.patch_size
        rows, cols = image.shape[-2] // patch, image.shape[-1] // patch
        if (rows * patch, cols * patch) != tuple(image.shape[-2:]):
            raise ValueError(
                f"tile of {tuple(image.shape[-2:])} pixels, must be multiples of {patch}"
            )
        seen = image[:, list(self.spec.rgb)].to(self.norm.weight.dtype)
        with torch.autocast(image.device.type, enabled=False):  # the weights say in what to compute
            return self._maps(seen, rows, cols)

    def _maps(self, seen: Tensor, rows: int, cols: int) -> list[Tensor]:
        tokens = self.embeddings(seen)
        positions = self.rope(seen)
        maps = []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, position_embeddings=positions)
            if number in self.spec.layers:
                patches = self.norm(tokens)[:, self.prefix :].to(self.feature_dtype)
                maps.append(patches.unflatten(1, (rows, cols)).permute(0, 3, 1, 2))
        return maps


def even_layers(blocks: int) -> tuple[int, ...]:
    """The last block of each quarter of the network, from 0.

    >>> even_layers(24), even_layers(12)
    ((5, 11, 17, 23), (2, 5, 8, 11))
    """
    return tuple(sorted({-(-quarter * blocks // 4) - 1 for quarter in range(1, 5)}))


def describe_backbone(
    section: Model, bands: Sequence[int] = (1, 2, 3), rgb: Sequence[int] | None = None
) -> BackboneSpec:
    """What a backbone's features depend on, from its own config.json and the configuration.

    bands: the numbers of those that are read; rgb: the three, or one repeated, that it sees.
    """
    own, layers = own_config(section)
    mean, std, remarks = image_statistics(section)
    places = rgb_places(bands, rgb)
    return BackboneSpec(
        section.backbone, layers, own.hidden_size, own.patch_size,
        for_bands(mean, places, len(bands)), for_bands(std, places, len(bands)), places, remarks,
    )  # fmt: skip


def own_config(section: Model) -> tuple[Any, tuple[int, ...]]:
    """A backbone's own config.json, and the blocks to tap; ConfigError where these do not agree."""
    from transformers import AutoConfig

    require_possible(section.backbone)
    own = from_hub(section.backbone, AutoConfig)
    if own.model_type != "dinov3_vit":
        raise ConfigError(
            [f"model.backbone: {section.backbone} is a {own.model_type}, expected a dinov3_vit"]
        )
    layers = (
        tuple(section.layers) if section.layers is not None else even_layers(own.num_hidden_layers)
    )
    if max(layers) >= own.num_hidden_layers:
        raise ConfigError(
            [
                f"model.layers: found {list(layers)}, {section.backbone} has blocks "
                f"0 to {own.num_hidden_layers - 1}"
            ]
        )
    if section.dino_channels not in (None, own.hidden_size):
        raise ConfigError(
            [
                f"model.dino_channels: found {section.dino_channels}, {section.backbone} has "
                f"{own.hidden_size}; correct it or leave it out"
            ]
        )
    return own, layers


def rgb_places(bands: Sequence[int], rgb: Sequence[int] | None) -> tuple[int, ...]:
    """Where among the bands the backbone's three channels are; a single band is repeated.

    >>> rgb_places((4, 3, 2, 1), None), rgb_places((1, 2, 3, 4), (3, 2, 1)), rgb_places((1,), None)
    ((0, 1, 2), (2, 1, 0), (0, 0, 0))
    """
    chosen = list(rgb or bands[:3])
    if len(chosen) not in (1, 3) or not set(chosen) <= set(bands):
        raise ConfigError([f"dataset.rgb: found {chosen}, expected one or three of {list(bands)}"])
    places = tuple(list(bands).index(band) for band in chosen)
    return places * 3 if len(places) == 1 else places


def for_bands(values: Sequence[float], places: Sequence[int], count: int) -> tuple[float, ...]:
    """A number for each band: the channel's own, or the mean of the three for other bands.

    >>> for_bands((0.4, 0.5, 0.6), places=(2, 1, 0), count=4)
    (0.6, 0.5, 0.4, 0.5)
    >>> for_bands((0.4, 0.5, 0.6), places=(0, 0, 0), count=1)
    (0.5,)
    """
    mean = sum(values) / len(values)
    own = dict(zip(places, values, strict=True)) if len(set(places)) == len(values) else {}
    return tuple(round(own.get(band, mean), 6) for band in range(count))


def build_backbone(
    section: Model, spec: BackboneSpec, feature_dtype: torch.dtype = torch.float16
) -> DinoBackbone:
    """Load the weights that `spec` describes, every one of them, in fp32 on the CPU."""
    from transformers import AutoModel

    model, report = from_hub(
        section.backbone,
        AutoModel,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told in the report, and refused below
    )
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if lacking:
        raise BackboneError(
            f"{section.backbone}: {len(lacking)} tensors that config.json calls for are missing or "
            f"of another shape ({sorted(lacking)[0]} ...); download it again"
        )
    return DinoBackbone(model, spec, state_hash(model), feature_dtype)


def state_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all weights, and over what else decides on features.

    `SHAPING` are the fields of a backbone's config.json that change features but not weights.

    >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> state_hash(a) == state_hash(a), state_hash(a) == state_hash(b)
    (True, False)
    """
    digest = hashlib.sha256()
    for field in SHAPING:
        digest.update(f"{field} {getattr(getattr(model, 'config', None), field, None)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def image_statistics(
    section: Model,
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """Mean and std of the pixels a checkpoint was trained on, with remarks for the log.

    The configuration decides; then the checkpoint's name, since the preprocessor file of SAT-493M
    checkpoints was seen to carry ImageNet's numbers; then the preprocessor file; then ImageNet's.
    """
    if section.image_mean is not None and section.image_std is not None:
        return tuple(section.image_mean), tuple(section.image_std), ()
    saved = _saved_statistics(section.backbone)
    named = _named_statistics(section.backbone)
    if named is None and saved is None:
        return *IMAGENET, ("model.image_mean/std: the backbone names none, ImageNet's are used",)
    if named is None or named == saved or saved is None:
        return *(named or saved), ()
    remark = (
        f"preprocessor_config.json of {section.backbone} has mean {list(saved[0])}, its name calls "
        f"for {list(named[0])}, which is used; set model.image_mean and image_std to decide"
    )
    return *named, (remark,)


def _named_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    own = Path(name).name.lower()  # a parent folder says nothing of the checkpoint
    known = {"sat493m": SAT493M, "lvd1689m": IMAGENET}
    return next((known[data] for data in known if data in own), None)


def _saved_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    from transformers.utils import cached_file

    try:
        saved = own_json(Path(cached_file(name, "preprocessor_config.json")))
        mean, std = (tuple(map(float, saved[key])) for key in ("image_mean", "image_std"))
        return (mean, std) if len(mean) == len(std) == 3 and min(std) > 0 else None
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None


def write_random_backbone(folder: Path, seed: int, **sizes: Any) -> None:
    """Write a DINOv3 ViT with random weights in the Hugging Face folder format.

    For demonstrations, tests and timings. sizes: fields of transformers' DINOv3ViTConfig
    (hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, ...).
    """
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DINOv3ViTModel(DINOv3ViTConfig(**{"num_register_tokens": 4, **sizes}))
    model.save_pretrained(folder)
    mean, std = IMAGENET
    preprocessor = {"do_resize": False, "image_mean": mean, "image_std": std}
    text = json.dumps(preprocessor, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
