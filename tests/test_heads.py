"""What every head promises, tested on all of HEADS, and what single heads promise beyond that."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from models import HEADS, build_head
from models.base import HeadOutput, SegmentationHead, cast, enlarge
from models.blocks import EDGE_TYPES, Classifier, PixelConv
from models.maskformer import log_scores
from models.unet_v2 import routes

CHANNELS, LEVELS, CLASSES = 64, 4, 5
SIZES = [(256, 256), (128, 208), (32, 48), (80, 112)]
LOOKS_AT_PIXELS = sorted(set(HEADS) - {"linear"})
NORMS_EACH_SAMPLE = LOOKS_AT_PIXELS  # GroupNorm; `linear` has BatchNorm

heads = pytest.mark.parametrize("name", HEADS)


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(7)
    yield
    torch.set_num_threads(threads)


def make_inputs(
    size: tuple[int, int], batch: int = 2, levels: int = LEVELS, image_channels: int = 3
) -> tuple[Tensor, list[Tensor]]:
    height, width = size
    image = torch.randn(batch, image_channels, height, width)
    return image, [torch.randn(batch, CHANNELS, height // 16, width // 16) for _ in range(levels)]


def make_head(name: str, levels: int = LEVELS, image_channels: int = 3) -> SegmentationHead:
    return build_head(name, CHANNELS, levels, CLASSES, image_channels)


def all_logits(output: HeadOutput) -> list[Tensor]:
    return [output.logits, *output.aux]


@heads
@pytest.mark.parametrize("size", SIZES)
def test_all_logits_have_the_images_size(name, size):
    image, features = make_inputs(size)
    for logits in all_logits(make_head(name)(image, features)):
        assert logits.shape == (2, CLASSES, *size)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()


@heads
@pytest.mark.parametrize("size", SIZES)
def test_decode_never_exceeds_the_image(name, size):
    for logits in all_logits(make_head(name).decode(*make_inputs(size))):
        assert logits.shape[-2] <= size[0]
        assert logits.shape[-1] <= size[1]


@heads
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_any_number_of_levels_and_each_counts(name, levels):
    head = make_head(name, levels).eval()
    image, features = make_inputs((80, 112), levels=levels)
    with torch.no_grad():
        reference = head(image, features).logits
        for index in range(levels):
            changed = [*features]
            changed[index] = torch.randn_like(features[index])
            assert not torch.allclose(head(image, changed).logits, reference, atol=1e-5)


@heads
@pytest.mark.parametrize("image_channels", [1, 4])
def test_any_number_of_image_channels(name, image_channels):
    head = make_head(name, image_channels=image_channels)
    image, features = make_inputs((32, 48), image_channels=image_channels)
    assert head(image, features).logits.shape == (2, CLASSES, 32, 48)


@heads
@pytest.mark.parametrize("size", [(32, 48), (80, 112)])
@pytest.mark.parametrize("levels", [1, 4, 5])
def test_every_parameter_gets_a_gradient(name, size, levels):
    head = make_head(name, levels)
    output = head(*make_inputs(size, levels=levels))
    sum((logits * torch.randn_like(logits)).sum() for logits in all_logits(output)).backward()
    without = [
        key
        for key, parameter in head.named_parameters()
        if parameter.grad is None or not parameter.grad.any() or not parameter.grad.isfinite().all()
    ]
    assert without == []


@heads
def test_aux_only_in_training(name):
    head, inputs = make_head(name), make_inputs((32, 48))
    aux = {"linear": 0, "unet": 1, "unet_v2": 2, "maskformer": 3}
    assert len(head(*inputs).aux) == aux.get(name, len(head(*inputs).aux))
    assert head.eval()(*inputs).aux == ()


@heads
@pytest.mark.parametrize("training", [True, False])
def test_compiled_equals_eager(name, training):
    torch.compiler.reset()
    head, inputs = make_head(name).train(training), make_inputs((80, 112))
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    expected, found = head(*inputs), compiled(*inputs)
    assert type(found) is HeadOutput
    assert len(found.aux) == len(expected.aux)
    for one, other in zip(all_logits(found), all_logits(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@heads
def test_state_dict_round_trip(name):
    inputs = make_inputs((32, 48))
    trained, fresh = make_head(name), make_head(name)
    trained(*inputs)  # moves BatchNorm's statistics
    fresh.load_state_dict(trained.state_dict(), strict=True)
    torch.testing.assert_close(
        fresh.eval()(*inputs).logits, trained.eval()(*inputs).logits, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, False) for name in HEADS), *((name, True) for name in NORMS_EACH_SAMPLE)],
)
def test_a_sample_does_not_see_its_batch_mates(name, training):
    head = make_head(name).train(training)
    image, features = make_inputs((80, 112), batch=3)
    with torch.no_grad():
        together = head(image, features)
        alone = [head(image[i : i + 1], [level[i : i + 1] for level in features]) for i in range(3)]
    for batch, *singles in zip(
        all_logits(together), *(all_logits(single) for single in alone), strict=True
    ):
        torch.testing.assert_close(batch, torch.cat(singles), rtol=1e-4, atol=1e-4)


@heads
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_cast(name, dtype):
    head = make_head(name).eval()
    image, features = make_inputs((32, 48))
    half = [level.to(dtype) for level in features]
    expected = head(image, [level.float() for level in half]).logits
    torch.testing.assert_close(head(image, half).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 8, 9, 32])
@pytest.mark.parametrize("last", [True, False])
def test_a_map_in_another_type_has_the_rounded_values_and_lies_as_it_did(rows, last):
    level = 100 * torch.randn(3, rows, 5, 16).half().permute(0, 3, 1, 2)
    level = level if last else level.contiguous()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        found = cast(level, dtype)
        assert torch.equal(found, level.to(dtype))
        assert found.stride() == level.to(dtype).stride()
    learned = level.clone().requires_grad_()
    cast(learned, torch.bfloat16).sum().backward()
    assert torch.equal(learned.grad, torch.ones_like(level))


@heads
def test_autocast_still_gives_single_precision_logits(name):
    head, inputs = make_head(name), make_inputs((32, 48))
    with torch.autocast("cpu", torch.bfloat16):
        output = head(*inputs)
    assert {logits.dtype for logits in all_logits(output)} == {torch.float32}
    assert all(logits.isfinite().all() for logits in all_logits(output))


def in_nchw(head: SegmentationHead, image: Tensor, features: list[Tensor]) -> list[Tensor]:
    """What the head gives without its changes of layout and type."""
    assert all(level.is_contiguous() for level in [image, *features])
    return [enlarge(each, image.shape[-2:]) for each in all_logits(head.decode(image, features))]


def gradients(head: SegmentationHead, outputs: list[Tensor], seed: int = 3) -> dict[str, Tensor]:
    """Gradients of a random weighting of all logits."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(logits.shape, generator=generator) for logits in outputs]
    head.zero_grad()
    sum(
        (logits * weight).mean() for logits, weight in zip(outputs, weights, strict=True)
    ).backward()
    return {key: parameter.grad for key, parameter in head.named_parameters()}


@heads
def test_channels_last_changes_neither_logits_nor_gradients(name):
    head = make_head(name)
    plain = make_head(name).to(memory_format=torch.contiguous_format)
    plain.load_state_dict(head.state_dict())
    image, features = make_inputs((80, 112))
    found, wanted = all_logits(head(image, features)), in_nchw(plain, image, features)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    wanted = gradients(plain, wanted)
    for key, gradient in gradients(head, found).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-4, msg=key)


@heads
def test_everything_in_a_head_is_channels_last(name):
    head, seen = make_head(name), []

    def look(module, given, result):
        maps = [each for each in (*given, result) if isinstance(each, Tensor) and each.ndim == 4]
        last = [each.is_contiguous(memory_format=torch.channels_last) for each in maps]
        seen.append((type(module).__name__, all(last)))

    kernels = [kernel for kernel in head.parameters() if kernel.ndim == 4]
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in kernels)
    for module in head.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.GroupNorm)):
            module.register_forward_hook(look)
    image, features = make_inputs((80, 112))
    head(image, [level.to(memory_format=torch.channels_last) for level in features])
    assert seen
    assert [kind for kind, last in seen if not last] == []


@heads
def test_features_reach_the_head_in_autocasts_type_and_are_cast_once(name):
    head, given = make_head(name), []
    decode = head.decode
    head.decode = lambda image, features: (
        given.extend([image, *features]) or decode(image, features)
    )
    image, features = make_inputs((32, 48))
    half = [level.half() for level in features]
    with torch.autocast("cpu", torch.bfloat16):
        found = head(image, half).logits
        rounded = [level.half().float() for level in features]
        torch.testing.assert_close(found, head(image, rounded).logits, rtol=0, atol=0)
    assert {each.dtype for each in given} == {torch.bfloat16}


GROUPS = []  # one that a DDP module lets go of last may wait for its own threads for ever


@contextlib.contextmanager
def lone_group(folder):
    """A group of this process alone, held for good where an error's frames may hold a module."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    GROUPS.append(dist.group.WORLD)
    try:
        yield
        GROUPS.clear()
    finally:
        dist.destroy_process_group()


@heads
@pytest.mark.filterwarnings("error:Grad strides do not match bucket view strides")
def test_gradients_are_the_same_under_ddp(name, tmp_path):
    head, inputs = make_head(name), make_inputs((32, 48))
    wanted = {key: each.clone() for key, each in gradients(head, all_logits(head(*inputs))).items()}
    with lone_group(tmp_path):
        found = gradients(head, all_logits(DistributedDataParallel(head)(*inputs)))
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", LOOKS_AT_PIXELS)
def test_pixels_matter_within_a_patch(name):
    head = make_head(name).eval()
    image, features = make_inputs((32, 48))
    changed = image.clone()
    changed[..., 5, 5] += 3
    difference = (head(changed, features).logits - head(image, features).logits).abs().sum(1)
    assert difference.max() > 1e-4
    assert difference[0, :16, :16].std() > 0


@heads
def test_wrong_number_of_levels_is_named(name):
    image, features = make_inputs((32, 48))
    with pytest.raises(ValueError, match=r"3 feature maps given.*levels=4"):
        make_head(name)(image, features[:3])


@heads
def test_wrong_channels_are_named(name):
    image, features = make_inputs((32, 48))
    with pytest.raises(ValueError, match=r"feature map 3 has 32 channels.*channels=64"):
        make_head(name)(image, [*features[:3], features[3][:, :32]])
    with pytest.raises(ValueError, match=r"the image has 4 channels.*image_channels=3"):
        make_head(name)(torch.zeros(2, 4, 32, 48), features)


@heads
def test_image_and_features_must_cover_the_same_ground(name):
    image, features = make_inputs((32, 48))
    with pytest.raises(ValueError, match=r"the image is \(40, 48\).*covers \(32, 48\)"):
        make_head(name)(F.pad(image, (0, 0, 0, 8)), features)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="num_classes=0"):
        build_head("unet", CHANNELS, LEVELS, num_classes=0)


def test_an_unknown_head_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'segformer'.*unet_v2"):
        build_head("segformer", CHANNELS, LEVELS, CLASSES)


@heads
def test_edge_parameters_are_the_first_and_last_ones(name):
    head = make_head(name)
    edges = {id(parameter) for parameter in head.edge_parameters()}
    own = {id(parameter) for parameter in head.parameters()}
    assert len(edges) == len(head.edge_parameters())
    assert edges < own
    for module in head.modules():
        held = {id(parameter) for parameter in module.parameters(recurse=False)}
        assert held <= edges if isinstance(module, EDGE_TYPES) else not held & edges


@heads
def test_convolutions_at_the_edges_are_marked(name):
    head = build_head(name, CHANNELS, LEVELS, num_classes=7, image_channels=4)
    for module in head.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert (module.in_channels == 4) == isinstance(module, PixelConv)
            assert (module.out_channels == 7) == isinstance(module, Classifier)


@heads
def test_overfits_one_tile(name):
    head = make_head(name)
    cells = torch.randint(CLASSES, (1, 4, 4))  # one class a token, told by features and colour
    label = cells.repeat_interleave(16, 1).repeat_interleave(16, 2)
    image = torch.randn(CLASSES, 3)[label].permute(0, 3, 1, 2)
    features = [torch.randn(CLASSES, CHANNELS)[cells].permute(0, 3, 1, 2) for _ in range(LEVELS)]
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(head(image, features).logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_maskformer_softmax_is_the_normalised_product():
    presence, embeddings = torch.randn(2, CLASSES), torch.randn(2, CLASSES, 16)
    pixels = torch.randn(2, 16, 3, 4)
    masks = torch.einsum("bkc,bchw->bkhw", embeddings, pixels) / 4
    scores = presence.sigmoid()[:, :, None, None] * masks.sigmoid()
    found = log_scores(presence, embeddings, pixels).softmax(1)
    torch.testing.assert_close(found, scores / scores.sum(1, keepdim=True))


def test_maskformer_takes_its_logits_from_the_last_state():
    head, inputs = make_head("maskformer"), make_inputs((32, 48))
    training = head(*inputs)
    torch.testing.assert_close(head.eval()(*inputs).logits, training.logits)


@pytest.mark.parametrize("grid", [(16, 16), (5, 7), (2, 3), (1, 1)])
@pytest.mark.parametrize("levels", [1, 4, 5])
def test_unet_v2_pyramid_sizes(grid, levels):
    height, width = grid
    _, features = make_inputs((16 * height, 16 * width), levels=levels)
    sizes = [tuple(scale.shape[-2:]) for scale in make_head("unet_v2", levels).pyramid(features)]
    half = ((height + 1) // 2, (width + 1) // 2)
    assert sizes == [(4 * height, 4 * width), (2 * height, 2 * width), grid, half]


@pytest.mark.parametrize("levels", range(1, 9))
def test_unet_v2_routes_use_every_level_and_feed_every_scale(levels):
    used, fed = zip(*routes(levels), strict=True)
    assert set(used) == set(range(levels))
    assert set(fed) == {0, 1, 2, 3}
    assert list(used) == sorted(used)


def test_unet_v2_shares_one_context_among_levels():
    head = make_head("unet_v2")
    shared = [key for key, value in head.named_parameters() if key.startswith("context.")]
    assert shared == ["context.weight"]


@pytest.mark.parametrize(
    ("channels", "size", "classes", "gflop"), [(1024, 512, 2, 20), (64, 256, 5, 2)]
)
def test_unet_v2_budget(channels, size, classes, gflop):
    with torch.device("meta"):
        head = build_head("unet_v2", channels, LEVELS, classes).eval()
        image = torch.zeros(1, 3, size, size)
        features = [torch.zeros(1, channels, size // 16, size // 16)] * LEVELS
    with FlopCounterMode(display=False) as counter:
        head(image, features)
    assert sum(parameter.numel() for parameter in head.parameters()) < 15e6
    assert 0 < counter.get_total_flops() <= gflop * 1e9
