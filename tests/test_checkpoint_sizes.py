"""Encoders at sizes that they were not made for: positions are resized as each project does."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from layouts import agrees, dino_head, features, plain, prefixed, run_folder, save, swin, tiny
from mte_bench.encoders.checkpoint import open_checkpoint, save_encoder
from mte_bench.encoders.commands import export, inspect
from mte_bench.encoders.encoder import EncoderSpec
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.errors import UserError


@pytest.mark.parametrize("layout", ["ours", "dino", "swin"])
def test_other_image_size(tmp_path: Path, layout: str):
    """Built for another size it gives what the encoder gives that meets this size on the way."""
    if layout == "ours":
        run_folder(tmp_path)
        text = str(tmp_path)
    else:
        weights = tiny().state_dict() if layout == "dino" else swin().state_dict()
        text = save(weights, tmp_path / "x.pth")
    own = open_checkpoint(text)
    size = 2 * own.encoder.spec.image_size
    resized = open_checkpoint(text, image_size=size)
    assert resized.subject.image_size == resized.encoder.spec.image_size == size
    assert torch.allclose(features(resized.encoder, size), features(own.encoder, size), atol=1e-5)
    same = open_checkpoint(f"{text}?image_size={size}")
    assert same.sha256 == resized.sha256
    if layout != "swin":
        assert resized.sha256 != own.sha256
        exported = timm.create_model(resized.encoder.spec.arch, **resized.encoder.spec.timm_arguments).eval()
        exported.load_state_dict(resized.encoder.model.state_dict(), strict=True)
        assert agrees(resized, exported)
    with pytest.raises(UserError, match="multiple of"):
        open_checkpoint(text, image_size=33)


def test_positions_are_resized_as_each_project_does(tmp_path: Path):
    """Against the projects' formulas; at the trained size none of them touches the table."""
    model = tiny()
    table = model.pos_embed.detach()
    square = table[:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    interpolate = torch.nn.functional.interpolate
    resized = {  # to 3 rows and 7 columns
        "dino": interpolate(square, scale_factor=(3.1 / 4, 7.1 / 4), mode="bicubic"),
        "mae": interpolate(square, size=(3, 7), mode="bicubic", align_corners=False),
        "timm": interpolate(square, size=(3, 7), mode="bicubic", antialias=True),
    }
    contents = {
        "dino": {"teacher": prefixed("backbone.", model.state_dict()) | dino_head(192)},
        "mae": {"model": model.state_dict() | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}},
        "timm": model.state_dict(),
    }
    images = torch.randn(2, 3, 48, 112)
    for family, patches in resized.items():
        file = save(contents[family], tmp_path / f"{family}.pth")
        own, built = open_checkpoint(file), open_checkpoint(f"{file}?image_size=[48,112]")
        assert own.family == family
        expected = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
        torch.testing.assert_close(built.encoder.model.pos_embed, expected)
        assert torch.equal(own.encoder.model.pos_embed, table)  # type: ignore[arg-type]
        with torch.no_grad():
            reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(48, 112)).eval()
            reference.load_state_dict({**model.state_dict(), "pos_embed": expected})
            for opened in (own, built):
                tokens = opened.encoder(images)
                torch.testing.assert_close(tokens.global_token, reference(images), rtol=0, atol=1e-5)
                assert tokens.grid == (3, 7)
    bare = open_checkpoint(f"{tmp_path}/timm.pth?resize_positions=dino", image_size=80)
    assert torch.equal(
        bare.encoder.model.pos_embed, open_checkpoint(f"{tmp_path}/dino.pth", image_size=80).encoder.model.pos_embed
    )  # type: ignore[arg-type]
    with pytest.raises(UserError, match="resize_positions"):
        open_checkpoint(f"{tmp_path}/timm.pth?resize_positions=nearest")


@pytest.mark.parametrize("layout", ["reg4", "no position for CLS", "distilled"])
def test_tokens_besides_the_patches_keep_their_positions(tmp_path: Path, layout: str):
    """Whatever tokens there are, images of another size get the same from the encoder that meets them and one built for them."""
    options: dict[str, Any] = {"reg4": {"reg_tokens": 4}, "no position for CLS": {"no_embed_class": True}, "distilled": {}}[
        layout
    ]
    arch = "deit_tiny_distilled_patch16_224" if layout == "distilled" else "vit_tiny_patch16_224"
    spec = EncoderSpec(arch=arch, image_size=64, options=options, resize_positions="deit")
    encoder = fresh_encoder(spec, 1).eval()
    save_encoder(tmp_path / "x.safetensors", encoder, {})
    built = open_checkpoint(str(tmp_path / "x.safetensors"), image_size=96)
    assert built.encoder.model.pos_embed.shape[1] - encoder.model.pos_embed.shape[1] == 36 - 16  # type: ignore[union-attr, index, operator]
    torch.testing.assert_close(features(built.encoder, 96), features(encoder, 96))
    antialiased = open_checkpoint(f"{tmp_path}/x.safetensors?resize_positions=timm", image_size=96)
    assert not torch.allclose(features(antialiased.encoder, 96), features(encoder, 96), atol=1e-5)


def test_encoders_of_images_that_are_no_squares(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The table alone does not say how it is cut; with the size it runs, resizes, inspects, exports and is hashed as any."""
    model = plain("vit_tiny_patch16_224", img_size=(96, 32))
    file = save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"12 patches of 16 pixels, which are no square.*FILE\?image_size=\[HEIGHT,WIDTH\]"):
        open_checkpoint(file)
    with pytest.raises(UserError, match="no square"):
        open_checkpoint(f"{file}?image_size=[96,48]")
    opened = open_checkpoint(f"{file}?image_size=[96,32]")
    images = torch.randn(2, 3, 96, 32)
    with torch.no_grad():
        assert torch.equal(opened.encoder(images).global_token, model(images))
    assert opened.subject.image_size is None and opened.subject.arch_options == {"image_size": [96, 32]}
    with pytest.raises(UserError, match=r"images of 96 x 32 pixels.*choose their side, image_size=N"):
        _ = opened.encoder.spec.side
    square = open_checkpoint(f"{file}?image_size=[96,32]", image_size=64)  # what a protocol's image_size does
    assert square.subject.image_size == 64
    torch.testing.assert_close(features(square.encoder, 64), features(opened.encoder, 64))
    turned = open_checkpoint(f"{file}?image_size=[96,32]", image_size=64).encoder.model.pos_embed
    assert turned.shape == (1, 17, 192)  # type: ignore[comparison-overlap]
    inspect(f"{file}?image_size=[96,32]")
    assert "96 x 32" in capsys.readouterr().out
    export(f"{file}?image_size=[96,32]", tmp_path / "out.safetensors")
    line = capsys.readouterr().out.strip()
    with torch.no_grad():
        assert torch.equal(eval(line, {"timm": timm}).eval()(images), model(images))
    again = open_checkpoint(str(tmp_path / "out.safetensors"))
    assert again.sha256 == opened.sha256 and again.encoder.spec.size == (96, 32)
    swapped = open_checkpoint(f"{tmp_path}/out.safetensors?image_size=[32,96]")  # as many patches, lying otherwise
    with torch.no_grad():
        images = images.transpose(2, 3)
        torch.testing.assert_close(swapped.encoder(images).global_token, again.encoder(images).global_token)
