"""Where each model family keeps its decoder layers, image tokens and embeddings: a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from prereg_kernels._util import private

Layout = Literal["crop", "tiles", "blocks"]
"""How the checkup finds the place of each visual token in its image; see
`prereg_kernels.checkup.images.layouts`."""


@dataclass(frozen=True)
class Family:
    """The few facts that PRe and the checkup need about a family of multimodal models.

    For a model outside of the table, spell them out and pass them to `apply_pre(model, family=)`.
    Paths are names of registered submodules, dotted, from the model that `apply_pre` gets. As
    those of transformers do, it needs a `config` and `get_input_embeddings`.

    Example:
        >>> family = Family("mine", projector="model.multi_modal_projector")
        >>> family.language_model, family.visual_tokens
        ('model.language_model', ('image_token_id',))
        >>> len(family.layers_of(model))
        4

    Attributes:
        name: as people call it.
        model_types: the `config.model_type` values that belong to it.
        language_model: path of the module whose forward gets the merged `inputs_embeds`.
        layers: path of the decoder layers, an `nn.ModuleList`. A layer returns its hidden states,
            or a tuple that begins with them.
        visual_tokens: names of the config attributes that hold visual token ids.
        projector: path of the module that takes the vision encoder's rows, one for each visual
            token in the order of `input_ids`, as its first argument: the source of the anchor
            "pre_projector". None: there is no such module,
        regroups: and this is why; it follows the family's name in an error.
        images: how `level="global"` tells images apart, "runs" or "equal" (see
            `prereg_kernels.attach.image_spans`). None: a batch does not say.
        counted_by: names of those arguments of the model's forward that have an entry for each
            image or video. cut_by: of those that have a (t, h, w) for each video which is laid out
            as t runs of tokens, each of them an image.

    What follows is for the checkup of image files. PRe needs none of it.

    Attributes:
        layout: where an image's tokens lie. "crop": a token a patch of the resized and cropped
            image, row by row. "tiles": LLaVA-NeXT's. "blocks": a token a block of merged patches
            of the image at its own size. Or a function of the model's config, its image processor,
            the (height, width) of an image and what the processor made of it, to a `TokenGrid`.
            None: not known, and image files cannot be measured.
        towers: `model_type`s of the vision encoders that the layout was tested with; empty: any.
        processor: from the model's config to the name and the settings of the image processor that
            the family usually has, for directories without one.
        markers: names of the config attributes with the ids before and after an image's tokens.
        token_types: name of the argument of the model's forward that is 1 at image tokens.
    """

    name: str
    model_types: tuple[str, ...] = ()
    language_model: str = "model.language_model"
    layers: str = "model.language_model.layers"
    visual_tokens: tuple[str, ...] = ("image_token_id",)
    projector: str | None = None
    regroups: str = "was given no projector"
    images: Literal["runs", "equal"] | None = "runs"
    counted_by: tuple[str, ...] = ()
    cut_by: tuple[str, ...] = ()
    layout: Layout | Callable[..., Any] | None = None
    towers: tuple[str, ...] = ()
    processor: Callable[[Any], tuple[str, dict[str, Any]]] | None = None
    markers: tuple[str, ...] = ()
    token_types: str | None = None

    def __post_init__(self) -> None:
        for field in ("language_model", "layers", "projector"):
            path = getattr(self, field)
            if not isinstance(path, str) and not (field == "projector" and path is None):
                raise TypeError(f"{field}: expected the path of a submodule, got {path!r}")
        for field, what in (
            ("visual_tokens", "config attributes"),
            ("counted_by", "arguments"),
            ("cut_by", "arguments"),
            ("towers", "vision encoders"),
            ("markers", "config attributes"),
        ):
            names = getattr(self, field)
            are_names = isinstance(names, tuple) and all(isinstance(n, str) for n in names)
            if not are_names or (field == "visual_tokens" and not names):
                raise TypeError(f"{field}: expected a tuple of names of {what}, got {names!r}")
        if self.images not in ("runs", "equal", None):
            raise ValueError(f"images: expected 'runs', 'equal' or None, got {self.images!r}")
        if self.images == "equal" and not self.counted_by:
            raise ValueError("counted_by: images='equal' needs the arguments that count them")
        layouts = get_args(Layout)
        if self.layout not in (*layouts, None) and not callable(self.layout):
            expected = ", ".join(map(repr, layouts))
            raise ValueError(
                f"layout: expected {expected}, a function or None, got {self.layout!r}"
            )
        if len(self.markers) not in (0, 2):
            raise ValueError(f"markers: expected one before and one after, got {self.markers!r}")

    def language_model_of(self, model: nn.Module) -> nn.Module:
        """The module whose forward gets the merged embeddings.

        Raises:
            ValueError: there is none at that path.
        """
        return self._follow(model, "language_model")

    def parts_around_language_model(self, model: nn.Module) -> list[nn.Module]:
        """The modules between the model and the language model, outermost first."""
        parts, module = [], model
        for name in self.language_model.split(".")[:-1]:
            module = module.get_submodule(name)
            parts.append(module)
        return parts

    def layers_of(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers.

        Raises:
            ValueError: there are none at that path.
        """
        layers = self._follow(model, "layers")
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise ValueError(
                f"family.layers: expected an nn.ModuleList of decoder layers at {self.layers!r}, "
                f"got {type(layers).__name__} with {_names(layers)}"
            )
        return layers

    def projector_of(self, model: nn.Module) -> nn.Module:
        """The module whose input is the anchor "pre_projector".

        Raises:
            ValueError: there is none at that path, or the family has none.
        """
        if self.projector is None:
            raise ValueError(
                "anchor: 'pre_projector' needs a row of the vision encoder for each visual token, "
                f"but {self.name} {self.regroups}; expected 'pre_llm' or a function"
            )
        return self._follow(model, "projector")

    def visual_token_ids(self, model: nn.Module) -> tuple[int, ...]:
        """The ids that mark visual positions in `input_ids`.

        Raises:
            ValueError: the model's config lacks one.
        """
        config: Any = getattr(model, "config", None)
        ids = []
        for name in self.visual_tokens:
            token = getattr(config, name, None)
            if isinstance(token, bool) or not isinstance(token, int):
                came = repr(token) if hasattr(config, name) else "no such attribute"
                raise ValueError(
                    f"family.visual_tokens: expected the id of a visual token at "
                    f"model.config.{name}, got {came} in {type(config).__name__}"
                )
            ids.append(token)
        return tuple(ids)

    def _follow(self, model: nn.Module, field: str) -> Any:
        path = getattr(self, field)
        module: Any = model
        for depth, name in enumerate(path.split(".")):
            # Not getattr: a wrapper may pass on the names of what it wraps.
            inner = private.submodules(module).get(name)
            if inner is None:
                here = ".".join(["model", *path.split(".")[:depth]])
                raise ValueError(
                    f"family.{field}: there is no {path!r} in {type(model).__name__}: {here}, a "
                    f"{type(module).__name__}, has no submodule {name!r}; it has {_names(module)}"
                )
            module = inner
        return module


_IMAGE_AND_VIDEO = ("image_token_id", "video_token_id")
_PROJECTOR = "model.multi_modal_projector"
_MERGES = "merges 2 x 2 patches into a token"
_SHUFFLES = "shuffles several patches into a token"
_TILES = "puts the patches of tiles together again, crops them and adds newlines"

_TOWERS = ("clip_vision_model", "siglip_vision_model")


def _tower_processor(config: Any) -> tuple[str, dict[str, Any]]:
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    if config.vision_config.model_type == "siglip_vision_model":
        return "SiglipImageProcessor", {"size": square}
    return "CLIPImageProcessor", {"size": {"shortest_edge": side}, "crop_size": square}


def _qwen_processor(config: Any) -> tuple[str, dict[str, Any]]:
    vision = config.vision_config
    return "Qwen2VLImageProcessor", {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }


_QWEN_IMAGES: dict[str, Any] = {
    "layout": "blocks",
    "processor": _qwen_processor,
    "markers": ("vision_start_token_id", "vision_end_token_id"),
    "token_types": "mm_token_type_ids",
}

# Where a family has no token for video, frames are images to it.
FAMILIES = (
    Family(
        "LLaVA",
        ("llava",),
        projector=_PROJECTOR,
        images="equal",
        counted_by=("pixel_values",),
        layout="crop",
        towers=_TOWERS,
        processor=_tower_processor,
    ),
    Family(
        "LLaVA-NeXT",
        ("llava_next",),
        regroups=_TILES,
        counted_by=("image_sizes",),
        layout="tiles",
        towers=_TOWERS,
        processor=_tower_processor,
    ),
    Family(
        "LLaVA-OneVision",
        ("llava_onevision",),
        visual_tokens=_IMAGE_AND_VIDEO,
        regroups=_TILES,
        counted_by=("image_sizes", "pixel_values_videos"),
    ),
    Family(
        "Qwen2-VL",
        ("qwen2_vl",),
        visual_tokens=_IMAGE_AND_VIDEO,
        regroups=_MERGES,
        counted_by=("image_grid_thw", "video_grid_thw"),
        **_QWEN_IMAGES,
    ),
    Family(
        "Qwen2.5-VL",
        ("qwen2_5_vl",),
        visual_tokens=_IMAGE_AND_VIDEO,
        regroups=_MERGES,
        counted_by=("image_grid_thw", "video_grid_thw"),
        **_QWEN_IMAGES,
    ),
    Family(
        "Qwen3-VL",
        ("qwen3_vl",),
        visual_tokens=_IMAGE_AND_VIDEO,
        regroups=_MERGES,
        counted_by=("image_grid_thw",),
        cut_by=("video_grid_thw",),
        **_QWEN_IMAGES,
    ),
    # A batch counts only tiles; its processor writes <img> and </img> around each image's, always.
    Family("InternVL", ("internvl",), regroups=_SHUFFLES),
    # An image is several runs of tokens, one for each of its tiles, and a batch counts only tiles.
    Family(
        "SmolVLM and Idefics3",
        ("smolvlm", "idefics3"),
        language_model="model.text_model",
        layers="model.text_model.layers",
        regroups=_SHUFFLES,
        images=None,
    ),
    Family(
        "Gemma 3",
        ("gemma3",),
        regroups="averages several patches into a token",
        counted_by=("pixel_values",),
    ),
    Family(
        "PaliGemma",
        ("paligemma",),
        projector=_PROJECTOR,
        images="equal",
        counted_by=("pixel_values",),
    ),
)


def find_family(model: nn.Module) -> Family:
    """The family of a Hugging Face model.

    Raises:
        ValueError: the model belongs to no supported family, or wraps one that does; the message
            says what to do.
    """
    family = _match(model)
    if family is not None:
        return family
    name = type(model).__name__
    for path, inner in model.named_modules():
        if _match(inner) is not None:
            inside = type(inner).__name__
            raise ValueError(
                f"model: expected the {inside} itself, got a {name} around it; call "
                f"apply_pre(model.{path}), and do so before DistributedDataParallel, FSDP or "
                f"torch.compile wrap it: they look at its parameters and hooks only once"
            )
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    supported = "; ".join(f"{f.name} (model_type {', '.join(f.model_types)})" for f in FAMILIES)
    raise ValueError(
        f"model: {name} (model_type {model_type!r}) is not supported; expected a "
        f"conditional-generation model of one of these families: {supported}. For another one, say "
        "where things are: from prereg_kernels.attach.families import Family; apply_pre(model, "
        'family=Family("MyVLM", language_model="model.language_model", '
        'layers="model.language_model.layers", visual_tokens=("image_token_id",)))'
    )


def _match(model: nn.Module) -> Family | None:
    """By the model's own submodules: a wrapper passes on attributes of what it wraps."""
    if "lm_head" not in private.submodules(model):
        return None
    return family_of_type(getattr(getattr(model, "config", None), "model_type", None))


def family_of_type(model_type: str | None) -> Family | None:
    """The family that a `config.model_type` belongs to; None if it is in no entry of the table."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def _names(module: nn.Module) -> str:
    names = list(private.submodules(module))
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return shown or "no submodules"
