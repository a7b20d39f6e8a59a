"""One query per class: a transformer decides whether and where each class is in the tile.

After MaskFormer with fixed matching (Cheng et al., arXiv 2107.06278: N = K, query k is always class
k). A pixel decoder gives per-pixel embeddings at H/4; a transformer decoder gives each class a
presence logit a_k and a mask embedding, whose scaled dot product with the pixels' is the mask logit
M_k. The class score is s_k = sigmoid(a_k) · sigmoid(M_k).

The head returns log s_k, so that softmax gives p_k = s_k / sum_j s_j: a proper distribution over
the classes at each pixel, which Cross-Entropy, Dice and the blending of tiles need. What else
differs from the paper, and why: 3 decoder layers with pre-norm, cross-attention before
self-attention (as Mask2Former) and positions on the keys only, as few queries need no more; memory
at H/16, the ViT's own grid; dot products over sqrt(C); pixel embeddings narrower than the queries'
width, and a light spatial prior on the pixels, since without one no border is sharper than a token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import HeadOutput, SegmentationHead
from models.blocks import LevelFusion, SpatialPrior, TokenClassifier, UpBlock, decoder_width

LAYERS = 3
HEAD_CHANNELS = 32  # of one attention head
PRIOR_WIDTH = 16  # channels of the spatial prior at H/2


class Attention(nn.Module):
    """Multi-head attention, queries (B, N, C) over keys and values (B, M, C) → (B, N, C).

    The projections are matrices of their own, which an optimizer of matrices can tell apart.

    >>> attend = Attention(64)
    >>> attend(torch.zeros(1, 5, 64), torch.zeros(1, 256, 64), torch.zeros(1, 256, 64)).shape
    torch.Size([1, 5, 64])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # softmax would cancel a bias
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        split = [
            project(tokens).unflatten(-1, (-1, HEAD_CHANNELS)).transpose(1, 2)
            for project, tokens in ((self.query, queries), (self.key, keys), (self.value, values))
        ]
        return self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class QueryLayer(nn.Module):
    """One decoder layer: the queries (B, K, C) attend to the memory (B, M, C) and to each other.

    >>> layer, memory = QueryLayer(64), torch.zeros(1, 256, 64)
    >>> layer(torch.zeros(1, 5, 64), keys=memory, values=memory).shape
    torch.Size([1, 5, 64])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.cross_attention = Attention(width)
        self.self_attention = Attention(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        cross_norm, self_norm, norm = self.norms
        queries = queries + self.cross_attention(cross_norm(queries), keys, values)
        normed = self_norm(queries)
        queries = queries + self.self_attention(normed, normed, normed)
        return queries + self.feed_forward(norm(queries))


class MaskFormerHead(SegmentationHead):
    """Log scores at H/4, enlarged by the base class; softmax of them is p_k = s_k / sum s.

    In training one auxiliary output for each earlier state of the queries: the learned ones, then
    after each layer but the last. Any number of levels: each is projected and normalised, and they
    are summed at H/16.

    >>> head = MaskFormerHead(channels=64, levels=4, num_classes=5)
    >>> features = [torch.zeros(1, 64, 16, 16)] * 4  # what a ViT gives for a 256-pixel tile
    >>> logits, aux = head(torch.zeros(1, 3, 256, 256), features)
    >>> logits.shape, len(aux), bool((logits <= 0).all())
    (torch.Size([1, 5, 256, 256]), 3, True)
    """

    def __init__(
        self, channels: int, levels: int, num_classes: int, image_channels: int = 3
    ) -> None:
        super().__init__(channels, levels, num_classes, image_channels)
        width = decoder_width(channels)
        mask_width = max(32, width // 4)
        self.fusion = LevelFusion(channels, levels, width)
        self.prior = SpatialPrior(image_channels, PRIOR_WIDTH)
        self.to_eighth = UpBlock(width, (4 * PRIOR_WIDTH,), width // 2)
        self.to_quarter = UpBlock(width // 2, (2 * PRIOR_WIDTH,), mask_width)
        self.pixel_embedding = nn.Conv2d(mask_width, mask_width, 1)
        nn.init.xavier_uniform_(self.pixel_embedding.weight)
        self.queries = nn.Embedding(num_classes, width)
        self.layers = nn.ModuleList(QueryLayer(width) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)
        self.presence = TokenClassifier(width)
        self.mask_embedding = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, mask_width),
        )
        self.apply(_xavier)

    def decode(self, image: Tensor, features: list[Tensor]) -> HeadOutput:
        _, pixels_quarter, pixels_eighth = self.prior(image)
        memory = self.fusion(features)
        quarter = self.to_quarter(self.to_eighth(memory, pixels_eighth), pixels_quarter)
        pixels = self.pixel_embedding(quarter)
        states = self._query_states(memory)
        kept = states if self.training else states[-1:]
        *aux, logits = (log_scores(*self.predict(queries), pixels) for queries in kept)
        return HeadOutput(logits, tuple(aux))

    def predict(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Presence logits (B, K) and mask embeddings (B, K, C) of a state (B, K, width)."""
        normed = self.norm(queries)
        return self.presence(normed), self.mask_embedding(normed)

    def _query_states(self, memory: Tensor) -> list[Tensor]:
        positions = sine_positions(memory).flatten(2).transpose(1, 2)
        values = memory.flatten(2).transpose(1, 2)
        keys = values + positions
        states = [self.queries.weight.expand(memory.shape[0], -1, -1)]
        for layer in self.layers:
            states.append(layer(states[-1], keys, values))
        return states


def _xavier(module: nn.Module) -> None:
    """DETR's initialisation: PyTorch's own is so small that masks stay flat for many steps."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)


def log_scores(presence: Tensor, embeddings: Tensor, pixels: Tensor) -> Tensor:
    """log(sigmoid(a) · sigmoid(M)) as (B, K, h, w), where M = embeddings · pixels / sqrt(C).

    presence a: (B, K); embeddings: (B, K, C); pixels: (B, C, h, w).

    >>> log_scores(torch.zeros(1, 2), torch.zeros(1, 2, 8), torch.zeros(1, 8, 1, 1)).exp().flatten()
    tensor([0.2500, 0.2500])
    """
    masks = torch.einsum("bkc,bchw->bkhw", embeddings / math.sqrt(embeddings.shape[-1]), pixels)
    return F.logsigmoid(presence.float())[:, :, None, None] + F.logsigmoid(masks.float())


def sine_positions(grid: Tensor) -> Tensor:
    """Sine and cosine positions (1, C, h, w) of a map's cells, rows first, then columns.

    Coordinates are cell centres scaled to (0, 2π), as in DETR, so that any grid spans the same
    range. The map (B, C, h, w) gives shape, type and device.

    >>> sine_positions(torch.zeros(3, 64, 16, 24)).shape
    torch.Size([1, 64, 16, 24])
    """
    channels, height, width = grid.shape[1:]
    rows, columns = (_sine(length, channels // 2, grid) for length in (height, width))
    rows = rows[:, :, None].expand(-1, -1, width)
    columns = columns[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns])[None]


def _sine(length: int, channels: int, like: Tensor) -> Tensor:
    """Positions (channels, length) along one axis."""
    centres = (torch.arange(length, device=like.device) + 0.5) * (2 * math.pi / length)
    exponents = torch.arange(channels // 2, device=like.device) / (channels // 2)
    angles = centres * (10000.0**-exponents)[:, None]
    return torch.cat([angles.sin(), angles.cos()]).to(like.dtype)
