"""Presets: every network of the table, small but built alike, against its definition written out."""

import dataclasses
import functools

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sit_atconv.errors import InputError
from sit_atconv.evaluation.features import networks
from sit_atconv.evaluation.features.inception import InceptionFeatures
from sit_atconv.evaluation.features.kinds import PixelFeatures, create_features
from sit_atconv.evaluation.features.networks import NetworkFeatures, Preset, centre_square, model_options
from sit_atconv.evaluation.features.presets import FDR_DIVISORS, GROUPS, PRESETS, expand

# name: (dimensions, side shown to the network, patches)
TABLE = {
    "dinov2": (1024, 224, (16, 16)),
    "cmmd": (768, 336, (24, 24)),
    "fdr-convnext": (1024, 224, (7, 7)),
    "fdr-dinov2": (1024, 256, (19, 19)),
    "fdr-mae": (1024, 224, (14, 14)),
    "fdr-siglip2": (1152, 224, (14, 14)),
    "fdr-clip": (1024, 256, (19, 19)),
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def small(name: str) -> dict[str, object]:
    """Options with which timm builds a preset's network in miniature."""
    if name == "fdr-convnext":
        return {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    return {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A function of a preset's name: its features from a file of random weights, in miniature, and these weights."""
    create = timm.create_model

    def make(name: str, fast: bool = False) -> tuple[NetworkFeatures, dict[str, Tensor]]:
        options = model_options(PRESETS[name])
        head = {key: value for key, value in options.items() if key == "num_classes"}
        model = create(PRESETS[name].model, **small(name), **head)
        for parameter in model.parameters():  # else norms are the identity and layer scales hide the blocks
            nn.init.normal_(parameter, std=0.2)
        if "num_classes" not in head:
            nn.init.zeros_(model.head.bias)  # CLIP's projection has none
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        monkeypatch.setattr(networks.timm, "create_model", functools.partial(create, **small(name)))
        features = create_features(name, tmp_path / "weights.pth", fast=fast)
        monkeypatch.undo()
        return features, model.state_dict()

    return make


def pictures(height: int, width: int, count: int = 3) -> Tensor:
    """Waves with some noise and hard borders, uint8 (count, 3, height, width)."""
    generator = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width] / 17
    waves = 128 + 110 * np.sin(y + np.arange(count * 3)[:, None, None] * (1 + x))
    noisy = np.clip(waves + generator.normal(0, 10, waves.shape), 0, 255)
    noisy[:, : height // 3, : width // 4] = 255 * (np.arange(count * 3) % 2)[:, None, None]
    return torch.from_numpy(noisy.astype(np.uint8).reshape(count, 3, height, width))


def normalised(x: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (x - mean) / std


def by_pil(images: Tensor, size: int) -> Tensor:
    """Squares resized by Pillow, in [0, 1]."""
    pils = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.BICUBIC) for image in images]
    return torch.stack([torch.from_numpy(np.array(pil)).permute(2, 0, 1) for pil in pils]).float() / 255


# --- the published networks, without their weights


@pytest.mark.parametrize("name", TABLE)
def test_the_table_names_networks_of_the_published_shapes(name, monkeypatch):
    dimensions, side, patches = TABLE[name]
    preset = PRESETS[name]
    with torch.device("meta"):
        torch.empty(0)  # torch looks up once, at the first use, which functions take a device
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))  # older timm reads numbers
    with torch.device("meta"):
        model = timm.create_model(preset.model, **model_options(preset)).eval()
        tokens = model.forward_features(torch.empty(1, 3, side, side))
        pooled = model.forward_head(tokens, pre_logits=preset.features == "pooled")
    assert (preset.size or model.pretrained_cfg["input_size"][-1]) == side
    assert pooled.shape == (1, dimensions)
    if name == "fdr-convnext":
        assert tokens.shape == (1, dimensions, *patches)
    else:
        prefix = 0 if name == "fdr-siglip2" else 1  # the class token
        assert tokens.shape[1] == prefix + patches[0] * patches[1]
    restricted = name in ("fdr-convnext", "fdr-mae")
    assert ("nc" in str(model.pretrained_cfg.get("license"))) == restricted  # older timm does not know all


def test_the_divisors_are_those_of_the_paper_and_each_has_a_space():
    assert tuple(FDR_DIVISORS.values()) == (1.68, 56.87, 14.19, 0.04, 0.60, 5.60)
    assert GROUPS["fdr6"] == tuple(FDR_DIVISORS)
    assert set(FDR_DIVISORS) == {"inception", *(name for name in PRESETS if name.startswith("fdr-"))}


# --- what a network is shown, and what is taken


@pytest.mark.parametrize(
    ("name", "size", "padded_to", "statistics"),
    [
        ("fdr-dinov2", 256, 266, IMAGENET),
        ("fdr-clip", 256, 266, CLIP),
        ("fdr-mae", 224, 224, IMAGENET),
        ("fdr-siglip2", 224, 224, HALF),
    ],
)
def test_transformers_of_fdr6(published, name, size, padded_to, statistics):
    features, state = published(name)
    images = pictures(100, 100)
    x = interpolate(images / 255, (size, size), mode="bicubic", align_corners=False, antialias=True)
    assert x.min() < 0 and x.max() > 1  # not clamped
    x = nn.functional.pad(normalised(x, statistics), (0, padded_to - size, 0, padded_to - size))

    # A network for the padded size, whose position embeddings are resampled as the file is loaded
    model = timm.create_model(PRESETS[name].model, img_size=padded_to, num_classes=0, **small(name)).eval()
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(state), model))
    with torch.no_grad():
        tokens = model.forward_features(x)
        expected = model.attn_pool(tokens) if name == "fdr-siglip2" else tokens[:, 0]
    torch.testing.assert_close(features(images)["pool"], expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.05


def test_convnext_of_fdr6_is_a_mean_without_the_norm(published):
    features, state = published("fdr-convnext")
    images = pictures(100, 100)
    x = interpolate(images / 255, (224, 224), mode="bicubic", align_corners=False, antialias=True)
    model = timm.create_model(PRESETS["fdr-convnext"].model, num_classes=0, **small("fdr-convnext")).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        maps = model.stages(model.stem(normalised(x, IMAGENET)))
        normed = model.forward_head(maps, pre_logits=True)
    expected = maps.sum((2, 3)) / 49
    torch.testing.assert_close(features(images)["pool"], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(normed, expected, rtol=0.1)


def test_dinov2_is_timms_on_bytes_resized_to_224(published):
    features, state = published("dinov2")
    model = timm.create_model(PRESETS["dinov2"].model, img_size=224, **small("dinov2")).eval()
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(state), model))
    images = pictures(100, 100)
    with torch.no_grad():
        expected = model.forward_features(normalised(by_pil(images, 224), IMAGENET))[:, 0]
    found = features(images)["pool"]
    assert (found - expected).norm() < 0.02 * expected.norm()  # torch's bytes are within 2 of Pillow's
    assert (features.neighbours, features.neighbour_limit) == (5, 10_000)


def test_cmmd_is_the_clip_of_its_port(published):
    transformers = pytest.importorskip("transformers")
    features, state = published("cmmd")
    images = pictures(101, 150)
    square = images[:, :, :, 24:125]  # cropped before it is resized
    with torch.no_grad():
        model = clip_of_transformers(transformers, state)

        def embed(pixels: Tensor) -> Tensor:
            embeds = model(pixel_values=pixels).image_embeds
            return embeds / torch.linalg.norm(embeds, dim=-1, keepdim=True)

        shown = features._input(images)
        torch.testing.assert_close(features(images)["pool"], embed(shown), rtol=0, atol=1e-5)
        port = normalised(by_pil(square, 336), CLIP)
    assert (shown - port).abs().max() < 2.5 / 255 / min(CLIP[1])
    assert (shown - port).abs().mean() < 0.02 / 255 / min(CLIP[1])
    assert torch.nn.functional.cosine_similarity(embed(port), features(images)["pool"]).min() > 0.999


def clip_of_transformers(transformers, state: dict[str, Tensor]) -> nn.Module:
    """The CLIP that the port uses, of the miniature's shape, with the weights of a timm network."""
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        projection_dim=768,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    renamed = {
        "embeddings.class_embedding": state["cls_token"].flatten(),
        "embeddings.patch_embedding.weight": state["patch_embed.proj.weight"],
        "embeddings.position_embedding.weight": state["pos_embed"][0],
    }
    norms = {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
    for block in range(2):
        theirs = f"encoder.layers.{block}"
        norms |= {f"blocks.{block}.norm{i}": f"{theirs}.layer_norm{i}" for i in (1, 2)}
        norms |= {f"blocks.{block}.mlp.fc{i}": f"{theirs}.mlp.fc{i}" for i in (1, 2)}
        norms[f"blocks.{block}.attn.proj"] = f"{theirs}.self_attn.out_proj"
        for part in ("weight", "bias"):
            rows = state[f"blocks.{block}.attn.qkv.{part}"].chunk(3)
            renamed |= {f"{theirs}.self_attn.{k}_proj.{part}": row for k, row in zip("qkv", rows, strict=True)}
    renamed |= {f"{new}.{part}": state[f"{old}.{part}"] for old, new in norms.items() for part in ("weight", "bias")}
    prefix = "vision_model."
    found = {prefix + key: value for key, value in renamed.items()} | {"visual_projection.weight": state["head.weight"]}
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert not unexpected and all("position_ids" in key for key in missing)
    return model


@pytest.mark.parametrize(("height", "width", "box"), [(5, 8, (0, 1)), (8, 5, (1, 0)), (6, 6, (0, 0)), (4, 7, (0, 1))])
def test_the_square_in_the_centre(height, width, box):
    image = torch.arange(height * width).view(1, 1, height, width)
    side, (top, left) = min(height, width), box
    assert torch.equal(centre_square(image), image[:, :, top : top + side, left : left + side])


@pytest.mark.parametrize("name", ["fdr-clip", "cmmd"])
def test_features_do_not_depend_on_the_batch(published, name):
    features, _ = published(name)
    images = pictures(40, 40, count=9)
    assert torch.equal(features(images[:2])["pool"], features(images)["pool"][:2])


# --- names, keys, remarks


def test_metrics_and_cache_keys_differ_wherever_numbers_do(tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "weights.pth")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "head.pth")
    plain = Preset("test_vit", "_plain")
    others = [
        dataclasses.replace(plain, **change)
        for change in (
            {"size": 96},
            {"size": 112},
            {"crop": True},
            {"resize": "floats"},
            {"size": 96, "padded": True},
            {"features": "mean"},
            {"resize": "floats", "crop": True},
        )
    ]
    made = [NetworkFeatures("x", preset, tmp_path / "weights.pth", "cpu") for preset in (plain, *others)]
    made.append(NetworkFeatures("x", plain, tmp_path / "weights.pth", "cpu", fast=True))
    projected = dataclasses.replace(plain, features="projection")
    made.append(NetworkFeatures("x", projected, tmp_path / "head.pth", "cpu"))
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "others.pth")
    made.append(NetworkFeatures("x", plain, tmp_path / "others.pth", "cpu"))
    assert len({features.identity for features in made}) == len(made)
    assert len({preset.suffix for preset in PRESETS.values()}) == len(PRESETS)


def test_any_timm_model_keeps_its_cache_key(tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "weights.pth")
    features = create_features("timm:test_vit", tmp_path / "weights.pth")
    assert features.identity == f"timm:test_vit {features.weights_sha256} (160, 160) fp32"
    assert (features.name, features.title, features.suffix) == ("timm:test_vit", "timm test_vit", "_test_vit")
    assert features.remarks == ()


def test_remarks_say_what_is_not_comparable(published):
    assert PixelFeatures.remarks == InceptionFeatures.remarks == ()
    found = {name: " ".join(published(name)[0].remarks) for name in PRESETS}
    assert "with its own filter" in found["dinov2"]
    assert "not compared with the original weights" in found["cmmd"]
    assert all("bfloat16" in found[name] for name in PRESETS if name.startswith("fdr-"))
    assert {name for name in PRESETS if "non-commercial" in found[name]} == {"fdr-convnext", "fdr-mae"}


def test_bfloat16_is_an_approximation_with_a_key_of_its_own(published):
    torch.manual_seed(1)
    exact, state = published("fdr-mae")
    torch.manual_seed(1)
    fast, same = published("fdr-mae", fast=True)
    assert all(torch.equal(state[key], same[key]) for key in state)
    assert exact.identity.replace("fp32", "bf16") == fast.identity
    images = pictures(40, 40)
    a, b = exact(images)["pool"], fast(images)["pool"]
    assert 0 < (a - b).norm() < 0.1 * a.norm()


def test_expand_replaces_groups_and_nothing_else():
    assert expand(["dinov2", "fdr6", "pixels"]) == ["dinov2", *FDR_DIVISORS, "pixels"]
    assert expand(["timm:resnet18", "inception"]) == ["timm:resnet18", "inception"]
    assert expand([]) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cmmd", "cmmd"], "Features 'cmmd' are given twice: give them once"),
        (["inception", "fdr6"], r"'inception' are given twice \('fdr6' stands for inception, fdr-convnext"),
        (["fdr6", "fdr6"], "'inception' are given twice"),
        (
            ["dinov2", "timm:vit_small_patch14_dinov2"],
            r"Metrics on 'dinov2' and on 'timm:vit_.*same names \(…_dinov2\)",
        ),
        (["fdr-dino"], "Unknown features 'fdr-dino': did you mean 'fdr-dinov2'"),
        (["quite-another"], "allowed: inception, pixels, dinov2, cmmd"),
        (["timm:nonesuch"], "timm has no model 'nonesuch'"),
    ],
)
def test_names_that_cannot_be_expanded(names, message):
    with pytest.raises(InputError, match=message):
        expand(names)


# --- weights


def test_a_published_file_may_have_its_head(tmp_path):
    model = timm.create_model("test_vit").eval()  # with a classifier of 1,000 classes
    torch.save(model.state_dict(), tmp_path / "head.pth")
    torch.save({k: v for k, v in model.state_dict().items() if "head" not in k}, tmp_path / "none.pth")
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with_head, without = (create_features("timm:test_vit", tmp_path / f"{name}.pth") for name in ("head", "none"))
    assert torch.equal(with_head(images)["pool"], without(images)["pool"])


def test_files_that_are_not_a_presets(published, tmp_path, monkeypatch):
    create = timm.create_model
    path = tmp_path / "weights.pth"

    def refused(name: str, content: nn.Module, message: str) -> None:
        torch.save(content.state_dict(), path)
        with monkeypatch.context() as patch, pytest.raises(InputError, match=message):
            patch.setattr(networks.timm, "create_model", functools.partial(create, **small(name)))
            create_features(name, path)

    clip = functools.partial(create, PRESETS["cmmd"].model, **small("cmmd"))
    refused("cmmd", clip(num_classes=0), r"lacks 2 of .*head\.weight.*with its head, the projection, with --weights")
    refused("cmmd", clip(num_classes=512), r"another model's weights: size mismatch for head\.bias")
    deeper = create(PRESETS["fdr-clip"].model, **{**small("fdr-clip"), "depth": 3})
    refused("fdr-clip", deeper, r"does not have 12 .*blocks\.2")
    refused("fdr-mae", create("resnet10t", num_classes=0), "vit_large_patch16_224.mae: .*lacks .* of the model's")
    with pytest.raises(InputError, match=r"There is no weights file absent\.pth"):
        create_features("cmmd", "absent.pth")
    with pytest.raises(InputError, match=r"'fdr6' stands for several features \(inception, .*\): name one"):
        create_features("fdr6")
