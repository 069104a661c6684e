"""The architectures that can be built."""

from typing import Any


def archs() -> list[dict[str, Any]]:
    """timm's ViTs and Swins: name, family, the image size of their definition, and the published weights (timm's tags)."""
    import timm
    from timm.models import get_pretrained_cfg, list_pretrained

    tags: dict[str, list[str]] = {}
    for full_name in list_pretrained():
        name, _, tag = full_name.partition(".")
        tags.setdefault(name, []).append(tag)
    rows = []
    for module, family in (("vision_transformer", "ViT"), ("swin_transformer", "Swin")):
        for name in timm.list_models(module=module):
            config = get_pretrained_cfg(name)
            size = config.input_size[-1] if config else None
            rows.append({"name": name, "family": family, "image size": size, "weights": ", ".join(tags.get(name, []))})
    return rows
