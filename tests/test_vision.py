"""prospect/vision/tower.py and preprocess.py against an independent implementation (fixtures/make_vision_fixtures.py).

Only torch is needed: the reference numbers are stored in tests/fixtures/vision.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from prospect.errors import ProspectError
from prospect.vision.preprocess import Preprocessing, prepare, resampling_weights, resize
from prospect.vision.tower import (
    ACTIVATIONS,
    Connector,
    VisionConfig,
    VisionEncoder,
    checkpoint_revision,
    grid_means,
    load_vision_encoder,
    read_config,
    tensor_names,
    weights_sha256,
)

FIXTURES = Path(__file__).parent / "fixtures" / "vision"
SIGLIP, CLIP, SMOLVLM = FIXTURES / "siglip", FIXTURES / "clip", FIXTURES / "smolvlm"
N_PICTURES = 3
TOLERANCE = 1e-4  # of numbers of about 1


def drawn(height: int, width: int) -> torch.Tensor:
    """The picture by formula that processed.json was made from, [3, H, W] uint8."""
    y, x = np.mgrid[0:height, 0:width]
    return torch.from_numpy(np.stack([(x * 7 + y * 13 + 50 * c) ^ ((x * y) >> 3) for c in range(3)]).astype(np.uint8))


def copy_checkpoint(source: Path, target: Path, file: str = "", **changes: object) -> Path:
    """A copy of a checkpoint with keys of one of its JSON files changed (None: removed)."""
    shutil.copytree(source, target)
    if file:
        content = json.loads((target / file).read_text())
        content = {name: value for name, value in (content | changes).items() if value is not None}
        (target / file).write_text(json.dumps(content))
    return target


# ---- The towers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(N_PICTURES))
def test_siglip_equals_the_reference(i):
    reference = load_file(SIGLIP / "reference.safetensors")
    encoder = load_vision_encoder(SIGLIP)
    hidden = encoder.tower(reference[f"pixels.{i}"][None])[0]
    torch.testing.assert_close(hidden, reference[f"last_hidden_state.{i}"], atol=TOLERANCE, rtol=0)
    # From the picture to the pooled vector in one go: [B, I, D] = [1, 1, 32].
    vectors = encoder([reference[f"picture.{i}"]])
    assert vectors.shape == (1, 1, 32)
    torch.testing.assert_close(vectors[0, 0], reference[f"pooled.{i}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("i", range(N_PICTURES))
def test_clip_equals_the_reference(i):
    reference = load_file(CLIP / "reference.safetensors")
    encoder = load_vision_encoder(CLIP)
    hidden = encoder.tower(reference[f"pixels.{i}"][None])[0]  # the class token, normed, and 5 x 5 patches
    torch.testing.assert_close(hidden[1:], reference[f"last_hidden_state.{i}"][1:], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(hidden[0], reference[f"pooled.{i}"], atol=TOLERANCE, rtol=0)
    # From the picture to one vector: the class token [1, 1, 24], or what CLIP compares with texts [1, 1, 20].
    for pool, width in (("pooled", 24), ("projected", 20)):
        encoder = load_vision_encoder(CLIP, pool)
        vectors = encoder([reference[f"picture.{i}"]])
        assert vectors.shape == (1, 1, width) and encoder.width == width and encoder.vectors_per_frame == 1
        torch.testing.assert_close(vectors[0, 0], reference[f"{pool}.{i}"], atol=TOLERANCE, rtol=0)


def test_quick_gelu_by_hand():
    """x times the logistic function of 1.702 x (arXiv 1606.08415): at 1, 1 / (1 + e^-1.702) = 1 / 1.18232."""
    activation = ACTIVATIONS["quick_gelu"]
    torch.testing.assert_close(activation(torch.tensor([0.0, 1.0, -1.0])), torch.tensor([0.0, 0.845796, -0.154204]))


@pytest.mark.parametrize("i", range(N_PICTURES))
@pytest.mark.parametrize("name", ["whole", "tile"])
def test_smolvlm_equals_the_reference(i, name):
    reference = load_file(SMOLVLM / "reference.safetensors")
    encoder = load_vision_encoder(SMOLVLM, pool="all")
    hidden = encoder.tower(reference[f"{name}.pixels.{i}"][None])
    torch.testing.assert_close(hidden[0], reference[f"{name}.last_hidden_state.{i}"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(encoder.connector(hidden)[0], reference[f"{name}.vectors.{i}"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("i", range(N_PICTURES))
def test_smolvlm_poolings(i):
    reference = load_file(SMOLVLM / "reference.safetensors")
    picture, whole = [reference[f"picture.{i}"]], reference[f"whole.vectors.{i}"]  # [4, 20]
    every = load_vision_encoder(SMOLVLM, pool="all")(picture)
    assert every.shape == (1, 4, 20)
    torch.testing.assert_close(every[0], whole, atol=TOLERANCE, rtol=0)
    mean = load_vision_encoder(SMOLVLM)(picture)
    assert mean.shape == (1, 1, 20)
    torch.testing.assert_close(mean[0, 0], (whole[0] + whole[1] + whole[2] + whole[3]) / 4, atol=TOLERANCE, rtol=0)
    corner = load_vision_encoder(SMOLVLM, pool="top-left-tile")(picture)
    assert corner.shape == (1, 1, 20)
    torch.testing.assert_close(corner[0, 0], reference[f"tile.vectors.{i}"][0], atol=TOLERANCE, rtol=0)


def test_top_left_tile_does_not_see_the_rest_of_the_picture():
    """The file names what it is: change everything outside the top left sixteenth, and the vector stays the same."""
    reference = load_file(SMOLVLM / "reference.safetensors")
    before = torch.zeros(3, 200, 200, dtype=torch.uint8)
    before[:, :44, :44] = reference["picture.2"][:, :1, :1]
    after = before.clone()
    after[:, 60:, :] = 255  # the tile is the first 50 of 200 rows and columns, and the kernel reaches a little further
    after[:, :, 60:] = 255
    corner, mean = load_vision_encoder(SMOLVLM, pool="top-left-tile"), load_vision_encoder(SMOLVLM)
    assert torch.equal(corner([before]), corner([after]))
    assert (mean([before]) - mean([after])).abs().max() > 0.1


def test_siglip_tokens_are_the_pooled_vector_then_means_row_by_row():
    reference = load_file(SIGLIP / "reference.safetensors")
    hidden = reference["last_hidden_state.1"].view(5, 5, 32)
    five = load_vision_encoder(SIGLIP, tokens=5)([reference["picture.1"]])
    ten = load_vision_encoder(SIGLIP, tokens=10)([reference["picture.1"]])
    assert five.shape == (1, 5, 32) and ten.shape == (1, 10, 32)
    for vectors in (five, ten):
        torch.testing.assert_close(vectors[0, 0], reference["pooled.1"], atol=TOLERANCE, rtol=0)
    # A grid of 5 in two: rows 0..2 and 2..4. In three: 0..1, 1..3, 3..4.
    torch.testing.assert_close(five[0, 2], hidden[0:3, 2:5].mean((0, 1)), atol=TOLERANCE, rtol=0)  # top right
    torch.testing.assert_close(five[0, 3], hidden[2:5, 0:3].mean((0, 1)), atol=TOLERANCE, rtol=0)  # bottom left
    torch.testing.assert_close(ten[0, 6], hidden[1:4, 3:5].mean((0, 1)), atol=TOLERANCE, rtol=0)  # middle row, right


def test_26_tokens_are_the_pooled_vector_then_five_rows_of_five():
    """On a grid of 5 every mean is of one patch. CLIP's class token is not among them."""
    for folder, skipped in ((SIGLIP, 0), (CLIP, 1)):
        reference = load_file(folder / "reference.safetensors")
        vectors = load_vision_encoder(folder, tokens=26)([reference["picture.0"]])[0]
        torch.testing.assert_close(vectors[0], reference["pooled.0"], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(vectors[1:], reference["last_hidden_state.0"][skipped:], atol=TOLERANCE, rtol=0)
    five = load_vision_encoder(CLIP, tokens=5)([reference["picture.0"]])[0]
    patches = reference["last_hidden_state.0"][1:].view(5, 5, 24)
    torch.testing.assert_close(five[2], patches[0:3, 2:5].mean((0, 1)), atol=TOLERANCE, rtol=0)  # top right


def test_grid_means_of_a_small_drawing():
    x = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]).view(1, 16, 1)
    assert grid_means(x, 2).flatten().tolist() == [3.5, 5.5, 11.5, 13.5]


def test_connector_folds_neighbours_in_the_order_of_the_drawing():
    config = VisionConfig("smolvlm", 1, 1, 1, 1, 4, 1, 1e-6, "gelu", 2, 4)
    connector = Connector(config)
    connector.proj.weight.data = torch.eye(4)  # what comes out is what was folded
    vectors = connector(torch.arange(16.0).view(1, 16, 1))
    assert vectors.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


def test_a_batch_of_mixed_sizes_equals_one_by_one():
    reference = load_file(SMOLVLM / "reference.safetensors")
    pictures = [reference[f"picture.{i}"] for i in (0, 1, 0, 2)]
    encoder = load_vision_encoder(SMOLVLM)
    together = encoder(pictures)
    for i, picture in enumerate(pictures):
        torch.testing.assert_close(together[i], encoder([picture])[0], atol=1e-5, rtol=0)


# ---- Preparing pictures --------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(N_PICTURES))
def test_pixels_equal_the_reference_processors(i):
    siglip, smolvlm = load_file(SIGLIP / "reference.safetensors"), load_file(SMOLVLM / "reference.safetensors")
    settings = load_vision_encoder(SIGLIP).preprocessing
    torch.testing.assert_close(prepare([siglip[f"picture.{i}"]], settings)[0], siglip[f"pixels.{i}"], atol=1e-5, rtol=0)
    clip, settings = load_file(CLIP / "reference.safetensors"), load_vision_encoder(CLIP).preprocessing
    torch.testing.assert_close(prepare([clip[f"picture.{i}"]], settings)[0], clip[f"pixels.{i}"], atol=1e-5, rtol=0)
    settings = load_vision_encoder(SMOLVLM).preprocessing
    for name, tile in (("whole", False), ("tile", True)):
        pixels = prepare([smolvlm[f"picture.{i}"]], settings, tile=tile)[0]
        torch.testing.assert_close(pixels, smolvlm[f"{name}.pixels.{i}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("i", range(N_PICTURES))
def test_pixels_without_splitting(i, tmp_path):
    """A processor that is told not to split makes the picture small in one step less; and so do we."""
    reference = load_file(SMOLVLM / "reference.safetensors")
    folder = copy_checkpoint(SMOLVLM, tmp_path / "unsplit", "preprocessor_config.json", do_image_splitting=False)
    pixels = prepare([reference[f"picture.{i}"]], load_vision_encoder(folder).preprocessing)[0]
    torch.testing.assert_close(pixels, reference[f"unsplit_pixels.{i}"], atol=1e-5, rtol=0)


def test_clip_keeps_the_middle_or_squeezes_all_of_it(tmp_path):
    """12 x 24 pixels: a shorter side of 37 makes 37 x 74, of which columns 18..54 are kept; the outer ones are lost."""
    picture = torch.zeros(3, 12, 24, dtype=torch.uint8)
    picture[:, :, :3], picture[:, :, -3:] = 255, 255
    published = json.loads((CLIP / "preprocessor_config.json").read_text())
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    old = copy_checkpoint(CLIP, tmp_path / "old", "preprocessor_config.json", size=37, crop_size=37, **plain)
    new = copy_checkpoint(CLIP, tmp_path / "new", "preprocessor_config.json", size={"shortest_edge": 37}, **plain)
    assert published["crop_size"] == {"height": 37, "width": 37}
    for folder in (old, new):
        assert prepare([picture], load_vision_encoder(folder).preprocessing).count_nonzero() == 0
    square = {"do_center_crop": False, "size": {"height": 37, "width": 37}}
    squeezed = copy_checkpoint(CLIP, tmp_path / "all", "preprocessor_config.json", **square, **plain)
    pixels = prepare([picture], load_vision_encoder(squeezed).preprocessing)
    assert pixels.shape == (1, 3, 37, 37) and pixels[..., 0].min() > 0.9 and pixels[..., -1].min() > 0.9


@pytest.mark.parametrize(
    "case", json.loads((FIXTURES / "processed.json").read_text()), ids=lambda c: f"{c['width']}x{c['height']}"
)
def test_real_sizes_are_bit_for_bit_the_reference(case):
    """384 (CLIP: 336) pixels, published settings: landscape, portrait and square video sizes."""
    plain = dict(splits=False, kernel="bicubic", rescale=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    siglip = Preprocessing(384, shortest_edge=None, longest_edge=None, **plain)
    clip = Preprocessing(336, shortest_edge=336, longest_edge=None, **plain)
    smolvlm = Preprocessing(384, shortest_edge=None, longest_edge=1536, **plain | {"splits": True, "kernel": "lanczos"})
    picture = [drawn(case["height"], case["width"])]
    results = {
        "siglip": prepare(picture, siglip),
        "clip": prepare(picture, clip),
        "whole": prepare(picture, smolvlm),
        "tile": prepare(picture, smolvlm, tile=True),
    }
    for name, pixels in results.items():
        array = pixels[0].to(torch.uint8).contiguous().numpy()
        assert hashlib.sha256(array.tobytes()).hexdigest() == case["sha256"][name], name


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(17, 23), (96, 128), (130, 50), (384, 384)])
def test_resize_equals_torch_up_to_rounding(kernel, size):
    """torch's antialiased resize in floating point never rounds; ours does twice (1/2, times at most 1.3, plus 1/2)."""
    # Levels 90..165: bicubic overshoots, and what leaves 0..255 between the two passes is cut off here, not in torch.
    pictures = torch.randint(90, 166, (2, 3, 90, 121), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    other = F.interpolate(pictures.double(), size=size, mode=kernel, antialias=True)
    assert (resize(pictures, *size, kernel).double() - other).abs().max() <= 1.15


def test_resampling_weights_by_hand():
    index, weights = resampling_weights(4, 2, "bilinear")
    # Output 0 lies at 1.0 in the input, the triangle reaches 2 on both sides: pixels 0, 1, 2 (centres 0.5, 1.5, 2.5)
    # have 1 - 0.25, 1 - 0.25, 1 - 0.75, that is 3 : 3 : 1 of 7. Output 1 is its mirror image, pixels 1, 2, 3.
    assert index[:3, 0].tolist() == [0, 1, 2] and index[:3, 1].tolist() == [1, 2, 3]
    torch.testing.assert_close(
        weights[:3].double() / 2**22, torch.tensor([[3, 1], [3, 3], [1, 3]]).double() / 7, atol=1e-6, rtol=0
    )


# ---- Reading checkpoints -------------------------------------------------------------------------


def test_shards_and_a_tower_saved_by_itself(tmp_path):
    whole = weights_sha256(load_vision_encoder(SIGLIP))
    tensors = load_file(SIGLIP / "model.safetensors")
    shards = copy_checkpoint(SIGLIP, tmp_path / "shards")
    (shards / "model.safetensors").unlink()
    parts = {
        "model-1.safetensors": dict(list(tensors.items())[::2]),
        "model-2.safetensors": dict(list(tensors.items())[1::2]),
    }
    for file, part in parts.items():
        save_file(part, shards / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert weights_sha256(load_vision_encoder(shards)) == whole

    alone = copy_checkpoint(SIGLIP, tmp_path / "alone")
    vision = {name.removeprefix("vision_model."): t for name, t in tensors.items() if name.startswith("vision_model.")}
    save_file(vision, alone / "model.safetensors")
    config = json.loads((SIGLIP / "config.json").read_text())["vision_config"]
    (alone / "config.json").write_text(json.dumps(config))
    assert weights_sha256(load_vision_encoder(alone)) == whole


def test_clips_tower_saved_by_itself(tmp_path):
    """CLIPVisionModelWithProjection writes the projection too; CLIPVisionModel does not, and then it is missing."""
    tensors = load_file(CLIP / "model.safetensors")
    config = json.loads((CLIP / "config.json").read_text())["vision_config"]
    for folder, left_out in (("with", ("text_",)), ("without", ("text_", "visual_projection"))):
        copy_checkpoint(CLIP, tmp_path / folder)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}
        save_file(kept, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        assert weights_sha256(load_vision_encoder(tmp_path / folder)) == weights_sha256(load_vision_encoder(CLIP))
    projected = weights_sha256(load_vision_encoder(CLIP, "projected"))
    assert weights_sha256(load_vision_encoder(tmp_path / "with", "projected")) == projected
    with pytest.raises(ProspectError, match="visual_projection.weight is missing"):
        load_vision_encoder(tmp_path / "without", "projected")


def test_settings_in_processor_config(tmp_path):
    """Newer checkpoints keep the picture's settings in processor_config.json, under image_processor."""
    folder = copy_checkpoint(SIGLIP, tmp_path / "new")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert load_vision_encoder(folder).preprocessing == load_vision_encoder(SIGLIP).preprocessing


def test_every_name_is_used_and_the_published_sizes_come_out():
    square = Preprocessing(384, None, None, False, "bicubic", 1.0, (0.0,) * 3, (1.0,) * 3)
    siglip = VisionConfig("siglip", 1152, 4304, 27, 16, 384, 14, 1e-6, "gelu_pytorch_tanh", 1, 1152)
    clip = VisionConfig("clip", 1024, 4096, 24, 16, 336, 14, 1e-5, "quick_gelu", 1, 768)
    smolvlm = VisionConfig("smolvlm", 1152, 4304, 27, 16, 384, 14, 1e-6, "gelu_pytorch_tanh", 3, 2048)
    assert (siglip.grid, clip.grid) == (27, 24)
    for config, pool, names_wanted in (
        (siglip, "pooled", 3 + 2 + 27 * 16 + 11),  # 3 embeddings, 2 last norm, 16 a block, and the head: probe, 2 in,
        # 2 out, 2 norm, 4 mlp. CLIP: the class token, a bias less, two norms of 2, the projection
        (clip, "pooled", 3 + 4 + 24 * 16),
        (clip, "projected", 3 + 4 + 24 * 16 + 1),
        (smolvlm, "all", 3 + 2 + 27 * 16 + 1),
    ):
        with torch.device("meta"):
            encoder = VisionEncoder(config, square, pool, 1)
        names = [name.partition("#")[0] for several in tensor_names(encoder).values() for name in several]
        assert len(set(names)) == names_wanted
    with torch.device("meta"):
        assert Connector(smolvlm)(torch.empty(2, 729, 1152)).shape == (2, 81, 2048)


@pytest.mark.parametrize("model_type, config", [
    ("siglip_vision_model", VisionConfig("siglip", 768, 3072, 12, 12, 224, 16, 1e-6, "gelu_pytorch_tanh", 1, 768)),
    ("clip_vision_model", VisionConfig("clip", 768, 3072, 12, 12, 224, 32, 1e-5, "quick_gelu", 1, 512)),
])  # fmt: skip
def test_what_a_file_leaves_out(tmp_path, model_type, config):
    """The sizes of google/siglip-base-patch16-224 and openai/clip-vit-base-patch32, taken for granted."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("change, message", [
    ({"model_type": "siglip2"}, "model_type 'siglip2'"),
    ({"model_type": "clip_text_model"}, "model_type 'clip_text_model'"),
    ({"vision_config": {"hidden_act": "relu"}}, "activation 'relu'"),
    ({"vision_config": {"vision_use_head": False}}, "no pooling head"),
    ({"vision_config": {"hidden_size": "32"}}, "hidden_size is '32'"),
    ({"vision_config": {"hidden_size": 30, "image_size": 37, "patch_size": 7}}, "does not divide"),
])  # fmt: skip
def test_other_architectures_are_refused_by_name(tmp_path, change, message):
    folder = copy_checkpoint(SIGLIP, tmp_path / "other", "config.json", **change)
    with pytest.raises(ProspectError, match=re.escape(message)) as caught:
        load_vision_encoder(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("change, message", [
    ({"size": {"height": 37, "width": 36}}, "37 x 36 pixels, the tower has positions for 37"),
    ({"size": 37}, "None x None"),
    ({"resample": 5}, "resample 5"),
    ({"do_center_crop": True}, "do_center_crop"),
    ({"do_normalize": False}, "do_normalize"),
    ({"image_std": [0.5, 0.5]}, "not three numbers"),
])  # fmt: skip
def test_other_preprocessing_is_refused(tmp_path, change, message):
    folder = copy_checkpoint(SIGLIP, tmp_path / "other", "preprocessor_config.json", **change)
    with pytest.raises(ProspectError, match=re.escape(message)):
        load_vision_encoder(folder)


def test_broken_directories_are_named(tmp_path):
    with pytest.raises(ProspectError, match="config.json.*No such file"):
        load_vision_encoder(tmp_path)
    folder = copy_checkpoint(SIGLIP, tmp_path / "missing")
    tensors = load_file(SIGLIP / "model.safetensors")
    del tensors["vision_model.post_layernorm.bias"]
    tensors["vision_model.head.mlp.fc1.bias"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ProspectError, match="2 tensors") as caught:
        load_vision_encoder(folder)
    assert "vision_model.post_layernorm.bias is missing" in str(caught.value)
    assert "vision_model.head.mlp.fc1.bias has shape [3], wanted [44]" in str(caught.value)
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ProspectError, match="cannot be read"):
        load_vision_encoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ProspectError, match="is not JSON"):
        load_vision_encoder(folder)


@pytest.mark.parametrize("change, message", [
    ({"crop_size": {"height": 36, "width": 37}}, "36 x 37 pixels, the tower has positions for 37"),
    ({"size": {"shortest_edge": 36}}, "size {'shortest_edge': 36}"),
    ({"size": {"height": 37, "width": 37}}, "size {'height': 37, 'width': 37}"),
    ({"do_center_crop": False}, "None x None"),
])  # fmt: skip
def test_other_preprocessing_of_clip_is_refused(tmp_path, change, message):
    folder = copy_checkpoint(CLIP, tmp_path / "other", "preprocessor_config.json", **change)
    with pytest.raises(ProspectError, match=re.escape(message)):
        load_vision_encoder(folder)


@pytest.mark.parametrize("folder, pool, tokens", [
    (SIGLIP, "mean", None), (SIGLIP, None, 4), (SMOLVLM, "pooled", None), (SMOLVLM, None, 5),
    (SIGLIP, "projected", None), (CLIP, "projected", 5), (CLIP, "all", None),
])  # fmt: skip
def test_a_pooling_the_family_does_not_have(folder, pool, tokens):
    with pytest.raises(ProspectError, match="pooled: SigLIP and CLIP, 1, 5, 10 or 26 tokens"):
        load_vision_encoder(folder, pool, tokens)


def test_revision_is_read_from_where_downloads_leave_it(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert checkpoint_revision(SIGLIP) is None
    (tmp_path / "snapshots" / commit).mkdir(parents=True)
    assert checkpoint_revision(tmp_path / "snapshots" / commit) == commit
    notes = tmp_path / "local" / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text(f"{commit}\netag\n1700000000.0\n")
    assert checkpoint_revision(tmp_path / "local") == commit
