"""Checkpoints: what is kept of a pre-training, written so that anyone's timm loads it, and read from many sources.

``open_checkpoint`` takes whatever a command's CKPT may be:

- ``RUN``: a run folder of ``pretrain``; or its ``encoder.safetensors``; ``RUN/snapshots/epoch-0004`` is the run at that epoch
- ``FILE``, ``FILE#PART``: another project's file (``families.py``); PART is e.g. ``student`` or ``momentum_encoder``
- ``timm:NAME``: pre-trained weights through timm
- ``random:NAME``, ``random:RUN``: untrained, drawn as pre-training draws its start; ``?seed=N`` chooses the draw

Each may end in ``?option=value&...``: settings of ``EncoderSpec`` (``image_size``, also ``[height, width]``, ``patch_size``,
``mean``, ``std``, ``resize_positions``) or further arguments of the timm model. Nothing is ever unpickled that could run code.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from mte_bench.encoders.encoder import Encoder, EncoderSpec, build_encoder
from mte_bench.encoders.families import METHODS, Found, classifier_of, first_few, read_foreign
from mte_bench.encoders.heads import Prototypes, StackedMLP
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.encoders.positions import resized_positions
from mte_bench.encoders.tokens import AuxiliarySettings, AuxiliaryTokens, MultiToken, TokenHeads
from mte_bench.encoders.weight_files import read_metadata, read_pickle, read_safetensors, write_safetensors
from mte_bench.errors import UserError
from mte_bench.records import Subject

ENCODER_NAME = "encoder.safetensors"
AUXILIARY_NAME = "auxiliary.safetensors"
CLASSIFIER_NAME = "classifier.safetensors"
ENCODER_FORMAT = "mte-bench-encoder/1"
AUXILIARY_FORMAT = "mte-bench-auxiliary/1"


@dataclass
class Checkpoint:
    """An encoder in evaluation mode on the CPU, and where it comes from."""

    encoder: Encoder
    subject: Subject
    folder: Path | None = None
    """The run folder, if the checkpoint is one."""
    matched: list[str] = field(default_factory=list)
    """timm's names of the weights that were found."""
    dropped: list[str] = field(default_factory=list)
    """Names in the file that the encoder has no use for (heads, decoders, the other network)."""
    missing: list[str] = field(default_factory=list)
    """timm's names of the weights that were not found and so keep their random start; only with ``allow_partial``."""
    metadata: dict[str, Any] = field(default_factory=dict)
    auxiliary: Path | None = None
    """The file with the auxiliary tokens of the pre-training, if there is one."""
    classifier: Path | None = None
    """The file with the classifier of a supervised or fine-tuned run, if there is one."""
    head: Callable[[], dict[str, Tensor]] = dict
    """The classifier that another project's weights hold (``families.CLASSIFIER``); read when it is asked for."""

    @property
    def family(self) -> str:
        """Whose layout it is: ``mte-bench``, one of ``families.py``, ``timm`` or ``random``."""
        return self.subject.family

    @property
    def sha256(self) -> str:
        """The hash of the encoder's weights (see ``weights_hash``)."""
        return self.subject.sha256

    def multi_token(self) -> MultiToken | None:
        """The encoder with the auxiliary tokens that it was pre-trained with; None if there were none."""
        if self.auxiliary is None:
            return None
        tensors, metadata = self.read_beside(self.auxiliary, AUXILIARY_FORMAT)
        settings = AuxiliarySettings.check(json.loads(metadata["settings"]), str(self.auxiliary))
        tokens = AuxiliaryTokens(self.encoder, settings)
        own = {name.removeprefix("tokens."): tensor for name, tensor in tensors.items() if name.startswith("tokens.")}
        try:
            tokens.load_state_dict(own)
        except RuntimeError as error:
            raise UserError(f"{self.auxiliary}: does not fit its own settings ({' '.join(str(error).split())[:200]})") from error
        return MultiToken(self.encoder, tokens).eval()

    def token_heads(self) -> TokenHeads | None:
        """The heads of all tokens and their prototypes; None where there are no auxiliary tokens or no prototypes.

        Raises ``UserError`` for prototypes that tokens do not share (``mte.tails=each``), which name different things, and
        for heads of another version.
        """
        if self.auxiliary is None:
            return None
        tensors, _ = self.read_beside(self.auxiliary, AUXILIARY_FORMAT)

        def of(part: str) -> dict[str, Tensor]:
            start = f"heads.{part}."
            return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

        tail, own = of("tail"), of("auxiliary")
        if set(tail) != {"weight_g", "weight_v"}:
            return None
        if of("fused_tails"):
            raise UserError(f"{self.auxiliary}: its tokens do not share their prototypes (mte.tails)")
        prototypes = Prototypes(tail["weight_v"].shape[1], len(tail["weight_v"]), frozen_norm=False)
        prototypes.load_state_dict(tail)
        try:
            shared = StackedMLP.like(of("global"), "gelu")
            return TokenHeads(shared, StackedMLP.like(own, "gelu") if own else shared, prototypes).eval()
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{self.auxiliary}: its heads are not as this version writes them; pre-train again") from error

    def read_beside(self, path: Path, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a file beside the encoder's; ``UserError`` if it is of another format, or of another run."""
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != file_format:
            raise UserError(f"{path}: format {metadata.get('format')}, this version reads {file_format}")
        for key in ("recipe_hash", "seed", "epoch"):
            if metadata.get(key) != self.metadata.get(key):
                raise UserError(f"{path}: is of another {key} than the encoder beside it; let `pretrain` finish")
        return tensors, metadata


def open_checkpoint(text: str, *, allow_partial: bool = False, image_size: int | None = None) -> Checkpoint:
    """The encoder that ``text`` stands for (see this module's docstring).

    ``image_size`` builds it for another size than it was trained on; its position tables are interpolated as the project does
    that made the file (``positions.py``).
    Raises ``UserError`` for what is no checkpoint, would run code, cannot be reached, or matches the encoder only in
    part; with ``allow_partial`` what is missing keeps its random start (seed 0).
    """
    kind, place, part, options = _parse(text)
    if kind == "file":
        return _open_file(text, Path(place), part, options, image_size, allow_partial)
    if image_size is not None:
        options["image_size"] = image_size
    return (_open_random if kind == "random" else _open_timm)(text, place, options)


def save_encoder(path: str | Path, encoder: Encoder, metadata: Mapping[str, Any]) -> None:
    """Write the timm model's state dict, with what built it and ``metadata`` in the header; the same bytes every time.

    With the spec's ``token_learner``, the dict also holds ``token_learner.*``, which timm's model has no place for.

    Metadata values that are no strings are written as JSON, None not at all. Known keys are ``method``, ``mte``,
    ``recipe``, ``recipe_hash``, ``epoch`` (done), ``epochs`` (planned), ``seed``, ``data``. Raises ``UserError`` if it
    cannot be written; an earlier file is then left whole.
    """
    own = {"format": ENCODER_FORMAT, "spec": encoder.spec.model_dump(mode="json")}
    write_safetensors(path, encoder.model.state_dict(), {**metadata, **own})


def save_auxiliary(
    path: str | Path, auxiliary: AuxiliaryTokens, heads: Mapping[str, nn.Module], metadata: Mapping[str, Any]
) -> None:
    """Write auxiliary tokens (``tokens.*``) and heads (``heads.NAME.*``), with the auxiliary settings in the header."""
    tensors = {f"tokens.{name}": tensor for name, tensor in auxiliary.state_dict().items()}
    for head, module in heads.items():
        tensors |= {f"heads.{head}.{name}": tensor for name, tensor in module.state_dict().items()}
    settings = auxiliary.settings.model_dump(mode="json", include=set(AuxiliarySettings.model_fields))
    write_safetensors(path, tensors, {**metadata, "format": AUXILIARY_FORMAT, "settings": settings})


def weights_hash(encoder: Encoder) -> str:
    """SHA-256 over the weights' names, types, shapes and bytes, and the number of heads, which no shape shows.

    The same weights have the same hash whatever file they came in.
    """
    digest = hashlib.sha256(f"heads {encoder.num_heads}".encode())
    if encoder.spec.token_learner is not None:  # nor where tokens are learned
        digest.update(json.dumps(encoder.spec.token_learner.model_dump(mode="json"), sort_keys=True).encode())
    for name, tensor in sorted(encoder.model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _parse(text: str) -> tuple[str, str, str | None, dict[str, Any]]:
    """``kind:place#part?key=value&...`` in its pieces; a file that exists under the whole text is only a place."""
    if Path(text).exists():
        return "file", text, None, {}
    place, _, query = text.partition("?")
    options: dict[str, Any] = {}
    for assignment in filter(None, query.split("&")):
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"{text}: '{assignment}' after the ? must be option=value")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{text}: the value of {key} is not valid YAML") from error
    kind, colon, rest = place.partition(":")
    if colon and kind in ("timm", "random"):
        return kind, rest, None, options
    place, _, part = place.partition("#")
    return "file", place, part or None, options


def _with(spec: EncoderSpec, options: Mapping[str, Any], where: str) -> EncoderSpec:
    """``spec`` changed by ``options``: its own settings, everything else goes to timm."""
    own = {key: value for key, value in options.items() if key in EncoderSpec.model_fields and key != "options"}
    others = {key: value for key, value in options.items() if key not in own}
    return EncoderSpec.check({**spec.model_dump(), **own, "options": {**spec.options, **others}}, where)


def _open_random(text: str, place: str, options: dict[str, Any]) -> Checkpoint:
    seed = options.pop("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"{text}: seed must be a whole number, got {seed!r}")
    if Path(place).exists():
        file = _encoder_file(Path(place), text)
        spec = _spec_of(read_metadata(file), file)
    else:
        spec = EncoderSpec(arch=place)
    encoder = fresh_encoder(_with(spec, options, text), seed).eval()
    return Checkpoint(encoder, _subject(text, "random", encoder, {"seed": seed}), metadata={"seed": seed})


def _open_timm(text: str, name: str, options: dict[str, Any]) -> Checkpoint:
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"{text}: {error}; `mte-bench list archs` shows each architecture's weights") from error
    published = {} if config is None else {"image_size": config.input_size[-1], "mean": config.mean, "std": config.std}
    spec = _with(EncoderSpec(arch=name), {**published, **options}, text)
    if spec.token_learner is not None:
        raise UserError(f"{text}: timm has no weights for token_learner; only pre-training with it makes them")
    with torch.device("meta"):  # refuses what cannot be built before the network is asked
        build_encoder(spec)
    if config is None or not config.has_weights:
        raise UserError(f"{text}: timm has no pre-trained weights of this name; `mte-bench list archs` shows what it has")
    try:
        encoder = build_encoder(spec, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # whatever the network, the hub or the file system says
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{text}: the weights could not be had ({reason}); connect to the network once, or fetch the file and give its path"
        ) from error
    encoder.spec = spec.model_copy(update={"arch": name.partition(".")[0]})
    return Checkpoint(
        encoder.eval(),
        _subject(text, "timm", encoder, {}),
        matched=list(encoder.model.state_dict()),
        head=lambda: classifier_of(timm.create_model(name, pretrained=True).state_dict()),
    )


def _open_file(
    text: str, path: Path, part: str | None, options: dict[str, Any], image_size: int | None, allow_partial: bool
) -> Checkpoint:
    file = _encoder_file(path, text)
    content, header = read_safetensors(file) if file.suffix == ".safetensors" else (read_pickle(file), {})
    if header.get("format", "").startswith("mte-bench"):
        if part is not None:
            raise UserError(f"{text}: {file.name} holds one encoder and no part '{part}'")
        found = Found(header.get("family", "mte-bench"), dict(content), [], {}, _spec_of(header, file), header)
    else:
        found = read_foreign(content, text, part, options.get("num_heads"), options.get("image_size"))
    family, weights, dropped, head, spec, metadata = found
    encoder = fresh_encoder(_with(spec, options if image_size is None else {**options, "image_size": image_size}, text))
    fitted, unfit = _fit(encoder, weights, spec)
    missing = [name for name in encoder.model.state_dict() if name not in fitted]
    if not fitted or ((missing or unfit) and not allow_partial):
        raise UserError(
            f"{text}: matches {encoder.spec.arch} only in part: missing {first_few(missing)}; not expected {first_few(unfit)}; "
            "if that is meant, add --allow-partial"
        )
    encoder.model.load_state_dict(fitted, strict=False)
    auxiliary, classifier = (file.with_name(name) for name in (AUXILIARY_NAME, CLASSIFIER_NAME))
    return Checkpoint(
        encoder=encoder.eval(),
        subject=_subject(text, family, encoder, metadata),
        folder=path if path.is_dir() else None,
        matched=list(fitted),
        dropped=[*dropped, *unfit],
        missing=missing,
        metadata=metadata,
        auxiliary=auxiliary if file.name == ENCODER_NAME and auxiliary.exists() else None,
        classifier=classifier if file.name == ENCODER_NAME and classifier.exists() else None,
        head=lambda: head,
    )


def _encoder_file(path: Path, text: str) -> Path:
    """The file that holds the encoder at ``path``."""
    if path.is_dir():
        if (path / ENCODER_NAME).is_file():
            return path / ENCODER_NAME
        raise UserError(f"{text}: has no {ENCODER_NAME}; give a run folder of `pretrain` that has finished an epoch, or a file")
    if path.is_file():
        return path
    hint = f"; did you mean timm:{text} or random:{text}?" if timm.is_model(text.partition("?")[0]) else ""
    raise UserError(f"{text}: no such checkpoint{hint or '; give a run folder, a file, timm:NAME or random:NAME'}")


def _fit(encoder: Encoder, weights: Mapping[str, Tensor], made_for: EncoderSpec) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that ``encoder`` has a place for, position tables resized to it, and the names of the others."""
    own = encoder.model.state_dict()
    fitted, unfit = {}, []
    for name, tensor in weights.items():
        if name not in own:
            unfit.append(name)
            continue
        tensor = _resized(encoder, name, tensor, made_for)
        if tensor.shape == own[name].shape:
            fitted[name] = tensor
        else:
            unfit.append(f"{name} of shape {'x'.join(map(str, tensor.shape))}, not {'x'.join(map(str, own[name].shape))}")
    return fitted, unfit


def _resized(encoder: Encoder, name: str, tensor: Tensor, made_for: EncoderSpec) -> Tensor:
    """A position table, absolute or relative, for the size of ``encoder``; anything else as it is."""
    model: Any = encoder.model
    if name == "pos_embed" and tensor.ndim == 3 and tensor.shape[2] == model.embed_dim:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        patch = made_for.patch_size or model.patch_embed.patch_size[0]
        old, new = ((height // patch, width // patch) for height, width in (made_for.size, encoder.spec.size))
        if tensor.shape[1] == prefix + old[0] * old[1]:
            return resized_positions(tensor, old, new, prefix, encoder.spec.resize_positions)
    if name.endswith("relative_position_bias_table"):
        attention = model.get_submodule(name.rpartition(".")[0])
        shape = attention.relative_position_bias_table.shape
        if tensor.shape != shape:
            return resize_rel_pos_bias_table(tensor, new_window_size=attention.window_size, new_bias_shape=shape)
    return tensor


def _subject(text: str, family: str, encoder: Encoder, metadata: Mapping[str, Any]) -> Subject:
    """The subject of records on this encoder; our own metadata are strings, which the settings turn into numbers."""
    keys = ("method", "mte", "seed", "recipe", "recipe_hash")
    known = {key: metadata[key] for key in keys if key in metadata}
    if family in METHODS:
        known["method"] = family
    if "epoch" in metadata and family in ("mte-bench", "dino", "ibot"):  # others store the index of the last epoch
        known["epochs"] = metadata["epoch"]
    if "data" in metadata:
        known["pretrain_data"] = metadata["data"]
    return Subject.check(
        {
            "checkpoint": text,
            "sha256": weights_hash(encoder),
            "family": family,
            "arch": encoder.spec.arch,
            "image_size": encoder.spec.image_size if isinstance(encoder.spec.image_size, int) else None,
            "patch_size": encoder.spec.patch_size,
            "arch_options": encoder.spec.options | _further(encoder.spec),
            **known,
        },
        f"{text}: metadata",
    )


def _further(spec: EncoderSpec) -> dict[str, Any]:
    """What of an architecture no other field of a subject says."""
    learned = {} if spec.token_learner is None else {"token_learner": spec.token_learner.title}
    return learned if isinstance(spec.image_size, int) else learned | {"image_size": list(spec.image_size)}


def _spec_of(metadata: Mapping[str, str], path: Path) -> EncoderSpec:
    if metadata.get("format") != ENCODER_FORMAT:
        raise UserError(f"{path}: format {metadata.get('format')}, this version reads {ENCODER_FORMAT}")
    try:
        return EncoderSpec.check(json.loads(metadata["spec"]), str(path))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: its header does not say how to build the encoder ({error})") from error
