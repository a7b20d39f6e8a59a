"""The frozen backbone: the features transformers gives, the blocks asked for, errors that help."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import project
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file
from torch import nn

from config import Config, ConfigError, Model
from models import HEADS, build_head
from models import backbone as module
from models.backbone import (
    IMAGENET,
    SAT493M,
    build_backbone,
    describe_backbone,
    even_layers,
    for_bands,
    image_statistics,
    rgb_places,
    state_hash,
    write_random_backbone,
)
from models.hub import BackboneError, trouble
from models.segmenter import Segmenter

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
LAYERS = [0, 1, 3]
SAT, LVD = "facebook/dinov3-vitl16-pretrain-sat493m", "facebook/dinov3-vits16-pretrain-lvd1689m"


def build(folder: Path, dtype: torch.dtype = torch.float32, **keys):
    section = Model(backbone=str(folder), **keys)
    return build_backbone(section, describe_backbone(section), dtype)


@pytest.fixture(scope="module")
def exact(backbone_folder):
    """The backbone of the tests with features in full precision."""
    return build(backbone_folder, layers=LAYERS)


@pytest.fixture(scope="module")
def reference(backbone_folder):
    """The same weights as transformers alone loads them."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(backbone_folder).eval()


@pytest.fixture
def copied(backbone_folder, tmp_path) -> Path:
    """A copy of the backbone's folder to damage."""
    return shutil.copytree(backbone_folder, tmp_path / "copy")


@pytest.fixture
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (2, 3, 48, 80), generator=generator, dtype=torch.uint8)


def tapped(reference: nn.Module, image: torch.Tensor, index: int) -> torch.Tensor:
    """An entry of transformers' hidden_states as a normed feature map."""
    states = reference(image, output_hidden_states=True).hidden_states
    patches = reference.norm(states[index])[:, 1 + reference.config.num_register_tokens :]
    rows, cols = image.shape[-2] // 16, image.shape[-1] // 16
    return patches.transpose(1, 2).reshape(len(image), -1, rows, cols)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def test_features_are_the_normed_hidden_states_one_after_the_block(exact, reference, pixels):
    image = exact.normalize(pixels)
    maps = exact(pixels)
    assert len(maps) == len(LAYERS)
    for block, level in zip(LAYERS, maps, strict=True):
        assert level.shape == (2, 32, 3, 5)
        assert torch.allclose(level, tapped(reference, image, block + 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_blocks_are_not_taken_for_indices_of_hidden_states(exact, reference, pixels):
    """The control of the test above: one block earlier differs a thousandfold of its tolerance."""
    image = exact.normalize(pixels)
    for block, level in zip(LAYERS, exact(pixels), strict=True):
        assert (level - tapped(reference, image, block)).abs().max() > 1e-2


@torch.no_grad()
def test_features_are_those_of_a_hand_run_of_the_blocks(exact, reference, pixels):
    image = (pixels.float() / 255 - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / torch.tensor(
        IMAGENET[1]
    ).view(3, 1, 1)
    tokens, positions = reference.embeddings(image), reference.rope_embeddings(image)
    for number, block in enumerate(reference.model.layer):
        tokens = block(tokens, position_embeddings=positions)
        if number in LAYERS:
            by_place = reference.norm(tokens)[:, 5:].reshape(2, 3, 5, 32)
            level = exact(pixels)[LAYERS.index(number)]
            for row in range(3):
                for col in range(5):
                    found = level[:, :, row, col]
                    assert torch.allclose(found, by_place[:, row, col], atol=1e-5, rtol=0)


@torch.no_grad()
def test_blocks_above_the_deepest_are_neither_kept_nor_computed(backbone_folder, pixels):
    shallow, deep = build(backbone_folder, layers=[0, 1]), build(backbone_folder, layers=LAYERS)
    assert (len(shallow.blocks), len(deep.blocks)) == (2, 4)
    ran = []
    for number, block in enumerate(shallow.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    for a, b in zip(shallow(pixels), deep(pixels)[:2], strict=True):
        assert torch.equal(a, b)
    assert ran == [0, 1]


def test_it_stays_frozen_and_in_evaluation_mode_under_a_training_parent(exact, pixels):
    parent = nn.Sequential(exact, nn.Dropout())
    before = exact(pixels)
    parent.train()
    assert parent.training
    assert not any(part.training for part in exact.modules())
    assert not any(parameter.requires_grad for parameter in exact.parameters())
    after = exact(pixels)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(level.requires_grad for level in after)


@torch.no_grad()
def test_a_batch_gives_what_its_tiles_give_alone(exact, pixels):
    together = exact(pixels)
    for number in range(len(pixels)):
        alone = exact(pixels[number : number + 1])
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[number], b[0])


@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_prefix_tokens_are_counted_by_the_config(tmp_path, pixels, registers):
    from transformers import AutoModel

    write_random_backbone(tmp_path, seed=1, **SIZES, num_register_tokens=registers)
    ours = build(tmp_path, layers=[2])
    reference = AutoModel.from_pretrained(tmp_path).eval()
    expected = tapped(reference, ours.normalize(pixels), 3)
    assert torch.allclose(ours(pixels)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(47, 80), (48, 72), (8, 8)])
def test_a_tile_that_no_patches_fill_is_an_error(exact, size):
    with pytest.raises(ValueError, match="must be multiples of 16"):
        exact(torch.zeros(1, 3, *size, dtype=torch.uint8))


def test_features_leave_in_half_precision_unless_asked_otherwise(backbone, exact, pixels):
    assert {level.dtype for level in backbone(pixels)} == {torch.float16}
    assert torch.equal(backbone(pixels)[0], exact(pixels)[1].half())


# Bands


def build_for(folder: Path, bands: tuple[int, ...], rgb: tuple[int, ...] | None = None, **keys):
    section = Model(backbone=str(folder), layers=LAYERS, **keys)
    return build_backbone(section, describe_backbone(section, bands, rgb), torch.float32)


def test_of_four_bands_the_backbone_sees_the_three_of_rgb(backbone_folder, exact, pixels):
    """The file has blue, green, red and near-infrared; the fourth changes no feature."""
    ours = build_for(backbone_folder, (1, 2, 3, 4), rgb=(3, 2, 1))
    assert ours.spec.rgb == (2, 1, 0)
    blue_first = pixels.flip(1)
    for infrared in (pixels[:, :1], 255 - pixels[:, :1]):
        found = ours(torch.cat([blue_first, infrared], 1))
        for a, b in zip(found, exact(pixels), strict=True):
            assert torch.allclose(a, b, atol=1e-6, rtol=0)


def test_every_band_is_normalised_its_own_way(backbone_folder, pixels):
    ours = build_for(backbone_folder, (1, 2, 3, 4), rgb=(3, 2, 1))
    mean, std = IMAGENET
    assert ours.spec.image_mean == (*mean[::-1], round(sum(mean) / 3, 6))
    assert ours.spec.image_std == (*std[::-1], round(sum(std) / 3, 6))
    image = ours.normalize(torch.cat([pixels, pixels[:, :1]], 1))
    assert image.shape == (2, 4, 48, 80)
    expected = (pixels[:, 0].float() / 255 - ours.spec.image_mean[3]) / ours.spec.image_std[3]
    assert torch.allclose(image[:, 3], expected, atol=1e-6)


def test_a_single_band_is_seen_three_times(backbone_folder, pixels):
    mean, std = [0.5] * 3, [0.25] * 3  # alike for all three, so that the image may be stacked
    alone = build_for(backbone_folder, (4,), image_mean=mean, image_std=std)
    assert (alone.spec.rgb, alone.spec.image_mean) == ((0, 0, 0), (0.5,))
    three = build_for(backbone_folder, (1, 2, 3), image_mean=mean, image_std=std)
    grey = pixels[:, :1]
    for a, b in zip(alone(grey), three(grey.expand(-1, 3, -1, -1)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("bands", "rgb", "places"),
    [
        ((1, 2, 3), None, (0, 1, 2)),
        ((4, 3, 2, 1), None, (0, 1, 2)),
        ((1, 2, 3, 4), (4, 3, 2), (3, 2, 1)),
        ((2, 4, 8), (8, 4, 2), (2, 1, 0)),
        ((7,), None, (0, 0, 0)),
        ((1, 2, 3, 4), (4,), (3, 3, 3)),
        ((1, 2), (2,), (1, 1, 1)),
    ],
)
def test_rgb_are_places_among_the_bands(bands, rgb, places):
    assert rgb_places(bands, rgb) == places
    assert for_bands((0.1, 0.2, 0.6), places, len(bands)) == tuple(
        (0.1, 0.2, 0.6)[places.index(band)] if band in places and len(set(places)) == 3 else 0.3
        for band in range(len(bands))
    )


@pytest.mark.parametrize(
    ("bands", "rgb"), [((1, 2), None), ((1, 2, 3, 4), (1, 2)), ((1, 2, 3), (1, 2, 4))]
)
def test_bands_that_make_no_rgb_are_refused_in_a_line(backbone_folder, bands, rgb):
    with pytest.raises(ConfigError, match="dataset.rgb: found .*, expected one or three of") as err:
        describe_backbone(Model(backbone=str(backbone_folder)), bands, rgb)
    assert err.value.exit_code == 2
    assert "\n" not in str(err.value)


def test_the_bands_of_a_configuration_are_the_ones_described(backbone_folder):
    dataset = Config(dataset={"bands": [3, 2, 1, 4], "rgb": [3, 2, 1]}).dataset
    spec = describe_backbone(Model(backbone=str(backbone_folder)), dataset.bands, dataset.rgb)
    assert spec.rgb == (0, 1, 2)
    assert len(spec.image_mean) == len(spec.image_std) == 4


# What the config says of a backbone


def test_layers_and_channels_are_taken_from_the_backbone_where_left_out(backbone_folder):
    spec = describe_backbone(Model(backbone=str(backbone_folder)))
    assert spec.layers == even_layers(4) == (0, 1, 2, 3)
    assert (spec.channels, spec.patch_size) == (32, 16)


@pytest.mark.parametrize(("blocks", "layers"), [(1, (0,)), (3, (0, 1, 2)), (32, (7, 15, 23, 31))])
def test_even_layers_end_with_the_last_block(blocks, layers):
    assert even_layers(blocks) == layers


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"layers": [1, 4]}, r"model\.layers: found \[1, 4\].*blocks 0 to 3"),
        ({"dino_channels": 1024}, r"model\.dino_channels: found 1024.*has 32"),
    ],
)
def test_layers_and_channels_are_checked_against_the_backbone(backbone_folder, keys, said):
    with pytest.raises(ConfigError, match=said) as caught:
        describe_backbone(Model(backbone=str(backbone_folder), **keys))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("model_type", ["dinov3_convnext", "vit"])
def test_a_backbone_of_another_kind_is_refused(copied, model_type):
    (copied / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConfigError, match=f"is a {model_type}, expected a dinov3_vit"):
        describe_backbone(Model(backbone=str(copied)))


# Mean and standard deviation


def statistics(monkeypatch, saved, **keys):
    monkeypatch.setattr(module, "_saved_statistics", lambda name: saved)
    return image_statistics(Model(**keys))


def test_mean_and_std_follow_the_name_of_the_checkpoint(monkeypatch):
    assert statistics(monkeypatch, None, backbone=SAT) == (*SAT493M, ())
    assert statistics(monkeypatch, None, backbone=LVD) == (*IMAGENET, ())
    assert statistics(monkeypatch, SAT493M, backbone=SAT) == (*SAT493M, ())


def test_a_preprocessor_that_disagrees_with_the_name_gives_way_with_a_remark(monkeypatch):
    mean, std, [remark] = statistics(monkeypatch, IMAGENET, backbone=SAT)
    assert (mean, std) == SAT493M
    assert "0.485" in remark
    assert "0.43" in remark
    assert "image_mean" in remark


def test_a_preprocessor_decides_for_a_checkpoint_without_a_known_name(monkeypatch):
    own = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    assert statistics(monkeypatch, own, backbone="./mine") == (*own, ())
    mean, std, [remark] = statistics(monkeypatch, None, backbone="./mine")
    assert (mean, std) == IMAGENET
    assert "ImageNet" in remark


def test_the_configuration_has_the_last_word_on_mean_and_std(monkeypatch):
    given = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    expected = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), ()
    assert statistics(monkeypatch, IMAGENET, backbone=SAT, **given) == expected


def test_the_preprocessor_of_a_local_folder_is_read(copied):
    edit_json(
        copied / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    spec = describe_backbone(Model(backbone=str(copied)))
    assert (spec.image_mean, spec.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"image_mean": null, "image_std": null}',
     '{"image_mean": [0.5], "image_std": [0.5]}', '{"image_mean": [1, 2, 3], "image_std": "abc"}',
     '{"image_mean": [1, 2, 3], "image_std": [1, 1, 0]}'],
)  # fmt: skip
def test_a_preprocessor_that_makes_no_sense_is_left_out_with_a_remark(copied, text):
    (copied / "preprocessor_config.json").write_text(text)
    spec = describe_backbone(Model(backbone=str(copied)))
    assert (spec.image_mean, spec.image_std) == IMAGENET
    assert "ImageNet" in spec.remarks[0]


# Weights


def test_the_hash_tells_weights_apart_by_a_single_number(backbone_folder, copied):
    original = build(backbone_folder).weights_hash
    assert build(copied).weights_hash == original

    def nudge(weights):
        name = max(weights)
        weights[name].view(-1)[0] += 1e-3

    edit_weights(copied, nudge)
    assert build(copied).weights_hash != original


def test_the_hash_covers_names_and_shapes():
    wide, tall = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
    tall.weight.data = wide.weight.data.reshape(6, 2)
    named = nn.Module()
    named.other = wide.weight
    assert len({state_hash(part) for part in (wide, tall, named)}) == 3


def drop_one(weights):
    weights.pop("layer.2.mlp.up_proj.weight")


def drop_all(weights):
    for name in list(weights):
        weights[f"other.{name}"] = weights.pop(name)


def reshape_one(weights):
    weights["layer.2.mlp.up_proj.weight"] = torch.zeros(8, 32)


@pytest.mark.parametrize("change", [drop_one, drop_all, reshape_one])
def test_missing_or_misshapen_tensors_are_an_error_and_not_random_weights(copied, change):
    edit_weights(copied, change)
    with pytest.raises(BackboneError, match="missing or of another shape") as caught:
        build(copied)
    assert caught.value.exit_code == 3
    assert str(copied) in str(caught.value)


def damage_half(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def damage_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def damage_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def resized(**sizes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | sizes))

    return damage


def damage_nested(folder):
    (folder / "config.json").write_text("[" * 10**5)


def damage_endless(folder):
    (folder / "config.json").write_text(" " * 2**21)


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_no_config(folder):
    (folder / "config.json").unlink()


def damage_types(folder):
    edit_json(folder / "config.json", hidden_size="x")


def damage_activation(folder):
    edit_json(folder / "config.json", hidden_act="no such")


def damage_code(folder):
    edit_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


@pytest.mark.parametrize(
    "damage",
    [damage_half, damage_pointer, damage_pickle, damage_config, damage_no_config, damage_types,
     damage_activation, damage_code, damage_nested, damage_endless,
     resized(num_hidden_layers=10**9), resized(hidden_size=10**9), resized(hidden_size=10**99),
     resized(num_register_tokens=10**10), resized(num_hidden_layers=1000, hidden_size=2**15)],
)  # fmt: skip
def test_a_damaged_or_unsafe_folder_is_refused_in_one_line(copied, damage, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    damage(copied)
    with pytest.raises(BackboneError) as caught:
        build(copied)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"{copied}: cannot be loaded (")
    assert str(caught.value).endswith("download it again")
    assert "\n" not in str(caught.value)
    assert not (copied / "ran").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BackboneError, match="no such folder"):
        describe_backbone(Model(backbone=str(tmp_path / "nowhere")))


# The hub


def hub_error(kind):
    response = SimpleNamespace(headers={}, request=None)
    return kind("said the hub\nin two lines", response=response)


CASES = {
    "gated": (
        "You are trying to access a gated repo.\nMake sure to have access to it.",
        lambda: hub_error(GatedRepoError),
        ("gated", f"https://huggingface.co/{SAT}", "hf auth login", "HF_TOKEN", "local"),
    ),
    "unknown": (
        "x/y is not a local folder and is not a valid model identifier listed on 'hf.co/models'\n",
        lambda: hub_error(RepositoryNotFoundError),
        ("no such model", "private", "check the name", "local"),
    ),
    "offline": (
        "We couldn't connect to 'https://huggingface.co' to load the files\n",
        lambda: LocalEntryNotFoundError("not in the cache"),
        ("cannot be reached", "HF_HUB_OFFLINE", "local"),
    ),
    "offline, named by its cause only": (
        "Something went wrong",
        lambda: LocalEntryNotFoundError("not in the cache"),
        ("cannot be reached", "HF_HUB_OFFLINE"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_trouble_with_the_hub_says_what_to_do(monkeypatch, case):
    from transformers import AutoConfig

    said, cause, words = CASES[case]

    def from_pretrained(*_, **__):
        try:
            raise OfflineModeIsEnabled("first of the chain") from None
        except OfflineModeIsEnabled:
            raise OSError(said) from cause()

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(BackboneError) as caught:
        describe_backbone(Model(backbone=SAT))
    line = str(caught.value)
    assert caught.value.exit_code == 4
    assert line.startswith(f"{SAT}: ")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_an_error_of_another_kind_is_told_shortly():
    line = str(trouble("x/y", OSError("No space left\non device " + 1000 * "x")))
    assert line.startswith("x/y: cannot be loaded (OSError: No space left on device xxx")
    assert len(line) < 300


def test_an_unknown_model_offline_ends_the_program_with_one_line(tmp_path):
    config = project.write_project(tmp_path, model={"backbone": "some/unknown-model"})
    command = [project.PYTHON, project.ROOT / "main.py", config]
    done = project.start(command, tmp_path, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if "some/unknown-model" in line]
    assert line.startswith("error: some/unknown-model: not in the local Hugging Face cache")


# ---- precision ----


def relative_rms(found, wanted):
    return float((found.float() - wanted.float()).square().mean().sqrt() / wanted.float().std())


def test_features_in_bf16_are_those_in_fp32_to_a_few_per_cent_and_positions_stay_exact(
    backbone, backbone_folder
):
    section = Model(backbone=str(backbone_folder), layers=[1, 3], num_classes=3)
    rounded = build_backbone(section, describe_backbone(section)).compute_in("bf16")
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        wanted, found = backbone(pixels), rounded(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            again = rounded(pixels)
    assert [level.dtype for level in found] == [torch.float16] * 2
    assert all(0 < relative_rms(a, b) < 0.05 for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert rounded.rope.inv_freq.dtype == torch.float32
    assert torch.equal(rounded.rope.inv_freq, backbone.rope.inv_freq)
    assert rounded.weights_hash == backbone.weights_hash


@pytest.mark.parametrize("name", HEADS)
def test_a_head_whose_weights_are_rounded_once_answers_as_under_autocast_bit_for_bit(
    name, backbone_folder
):
    section = Model(backbone=str(backbone_folder), num_classes=3)
    answers = []
    for once in (False, True):
        torch.manual_seed(0)
        backbone = build_backbone(section, describe_backbone(section))
        head = build_head(name, backbone.spec.channels, len(backbone.spec.layers), 3)
        segmenter = Segmenter(backbone, head).eval()
        if once:
            segmenter.compute_in("bf16")
        else:
            backbone.compute_in("bf16")
        torch.manual_seed(1)
        pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            answers.append(segmenter(pixels))
    assert torch.equal(*answers)
