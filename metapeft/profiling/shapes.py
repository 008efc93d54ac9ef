"""The sizes of a backbone that decide what tuning it costs. Plain data: predicting a cost needs no loaded model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metapeft.runtime import nn


@dataclass(frozen=True)
class Layers:
    """`count` consecutive layers with the same linear layers: name within the layer -> (outputs, inputs)."""

    count: int
    linear: dict[str, tuple[int, int]]
    parameters: int  # of one layer, the norms and experts included


@dataclass(frozen=True)
class Shapes:
    """`root` is the path of the list of layers, such as `model.layers`. Widths are numbers of elements."""

    root: str
    layers: tuple[Layers, ...]
    width: int
    kv_heads: int
    head_width: int
    vocabulary: int
    weight_bytes: int
    alike: bool = True  # whether keys and values have one shape in all layers, which prefix tuning needs

    @property
    def depth(self) -> int:
        return sum(group.count for group in self.layers)

    def each(self) -> list[Layers]:
        """One entry per layer, bottom first."""
        return [group for group in self.layers for _ in range(group.count)]

    def takes(self, method: str) -> bool:
        """Whether the backbone can be tuned by this method at all."""
        return self.alike or method != "prefix"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Shapes:
        groups = tuple(
            Layers(g["count"], {k: (v[0], v[1]) for k, v in g["linear"].items()}, g["parameters"])
            for g in record["layers"]
        )
        return cls(**{**record, "layers": groups})


def shapes(model: nn.Module) -> Shapes:
    """The sizes of a loaded backbone. Raises UserError for an architecture that cannot be tuned."""
    from metapeft.backbones.forward import anatomy, keys_values, width
    from metapeft.peft.matrices import layer_index, linear_layers, shape
    from metapeft.runtime import mx, tree_flatten

    parts = anatomy(model)
    found: list[dict[str, tuple[int, int]]] = [{} for _ in range(parts.depth)]
    root = ""
    for path, linear in linear_layers(model).items():
        root, _, rest = path.partition(f".{layer_index(path)}.")
        found[layer_index(path)][rest] = shape(linear)
    groups: list[Layers] = []
    for layer, linear_shapes in zip(getattr(parts.body, parts.layers), found, strict=True):
        known = {path: outputs * inputs for path, (outputs, inputs) in linear_shapes.items()}
        # Quantized weights are packed: the weights of linear layers are counted by their shapes, the rest as it is.
        every: list[tuple[str, Any]] = tree_flatten(layer.parameters())  # type: ignore[assignment]
        packed = {f"{path}.{part}" for path in known for part in ("weight", "scales", "biases")}
        others = [v.size for name, v in every if name not in packed]
        parameters = int(sum(known.values()) + sum(others))
        if groups and (groups[-1].linear, groups[-1].parameters) == (linear_shapes, parameters):
            groups[-1] = Layers(groups[-1].count + 1, linear_shapes, parameters)
        else:
            groups.append(Layers(1, linear_shapes, parameters))
    weights: list[tuple[str, Any]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    cached = keys_values(model, mx.array([[0]]))
    keys = cached[0][0]
    embedding = getattr(parts.body, parts.embed)
    return Shapes(
        root=root,
        layers=tuple(groups),
        width=width(model),
        kv_heads=int(keys.shape[1]),
        head_width=int(keys.shape[3]),
        vocabulary=int(embedding.weight.shape[0]),
        weight_bytes=int(sum(v.nbytes for _, v in weights)),
        alike=len({(part.shape[1], part.shape[3]) for pair in cached for part in pair}) == 1,
    )
