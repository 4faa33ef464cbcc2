"""Topic 08 - Hugging Face folders: load and save models in the layout that the whole field reads.

A folder holds config.json (the shape of the model), model.safetensors (its tensors, or several files with an index) and
perhaps a tokenizer. The names in it are Hugging Face's, not ours: every model of the course describes them once, as a
`Layout`, and this module does the rest, for this topic and later ones. Nothing here can run code from a folder.

from gpt2 import GPT2
model = GPT2.from_pretrained("path/to/folder")
model.save_pretrained("path/to/another")
"""

import json
import re
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from optimizers import shapes_alone
from workbench import read_object, shown, write_atomically

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
MOST_NAMED = 6  # names that one error message lists
MOST_LAYERS = 10_000  # more than any model has; blocks that no weights can fill would be built until memory ends
MOST = 10**9  # of any whole number in a config.json: no model has as many of anything, and an id is below that


# What a folder looks like


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file: its name there, and which parameters of ours it holds, joined along their first axis.

    `transposed` turns the joined matrix: GPT-2's files hold (in, out) where nn.Linear holds (out, in).
    """

    key: str
    parts: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """How the files of one kind of model name what we name otherwise.

    `tied` maps a name that files may repeat to the name under which the same tensor stands once; a file in which the
    two differ is refused. `ignored` are patterns of names that hold no weights. `prefix` stands before every name in
    the files of a model with a head, and is absent from those of the bare model. `optional` are names of `tensors` that
    a bare model's files lack; ours then keeps its starting value.
    """

    tensors: tuple[FileTensor, ...]
    tied: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    optional: tuple[str, ...] = ()


def file_tensors(pairs: dict[str, str], names: tuple[str, ...] = ("weight", "bias")) -> list[FileTensor]:
    """Entries for whole layers: {"file.name.of.a.layer": "our.name"}, one entry for each of `names`."""
    return [FileTensor(f"{key}.{name}", (f"{ours}.{name}",)) for key, ours in pairs.items() for name in names]


# Reading


def read_json(path: Path) -> dict:
    if not path.exists():
        raise ValueError(f"{shown(path.parent)} has no {path.name}; give a folder in Hugging Face's layout")
    return read_object(path)


def read_config(folder: Path | str, model_type: str = "") -> dict:
    """config.json of a folder. Raises ValueError for one that is missing, malformed, of another kind, or absurd."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{shown(folder)} is not a folder; give one that holds {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    found = config.get("model_type")
    if model_type and found != model_type:
        raise ValueError(f"{shown(folder / CONFIG)} has model_type {found!r}, expected {model_type!r}")
    check_sizes(config, folder / CONFIG)
    return config


def check_sizes(config: dict, path: Path) -> None:
    """Raise ValueError for a whole number that no size or id of a model can be, before anything is made of it."""
    for name, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, path)
        elif isinstance(value, int) and value > MOST:
            told = value if value < 10**20 else f"a number of {len(str(value))} digits"
            raise ValueError(f"{shown(path)} has {name}={told}, above {MOST:,}; it is damaged, write it again")


def read_weights(folder: Path | str) -> dict[str, Tensor]:
    """Every tensor of a folder by its name there, from one safetensors file or from those that an index names.

    Raises ValueError for a missing, truncated or malformed file, and for an index that points outside the folder.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        other = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))]
        advice = f"; {other[0]} may run code when it is opened: convert it to safetensors first" if other else ""
        raise ValueError(f"{shown(folder)} has neither {WEIGHTS} nor {INDEX}{advice}")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{shown(folder / INDEX)} has no weight_map from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{shown(folder / INDEX)} names {name!r}, which is not a safetensors file of this folder")
        tensors |= read_safetensors(folder / name)
    lost = sorted(key for key in places if key not in tensors)
    if lost:
        raise ValueError(f"{shown(folder)}: the index promises {some(lost)}, which no file holds")
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{shown(path)} does not exist, but the index names it") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shown(path)} is not a whole safetensors file: {error}") from None


def read_folder(folder: Path | str, model_type: str = "") -> tuple[dict, dict[str, Tensor]]:
    """config.json and the tensors of a folder, before any of it reaches a model; see read_config and read_weights."""
    return read_config(folder, model_type), read_weights(folder)


def write_folder(folder: Path | str, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write model.safetensors and config.json, each whole or not at all."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{shown(folder)} is a file; choose another folder to save to")
    plain = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    write_atomically(folder / WEIGHTS, safetensors_bytes(plain, metadata={"format": "pt"}))  # their loader asks for it
    write_atomically(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def current_name(key: str, layout: Layout, wanted: set[str]) -> str:
    """The name that a tensor has in files of today: those of 2018 say gamma and beta, bare models lack the prefix."""
    key = re.sub(r"(LayerNorm|layer_norm)\.gamma$", r"\1.weight", key)
    key = re.sub(r"(LayerNorm|layer_norm)\.beta$", r"\1.bias", key)
    known = layout.prefix + key in wanted or layout.prefix + key in layout.tied
    return layout.prefix + key if key not in wanted and known else key


@torch.no_grad()
def load_weights(model: nn.Module, tensors: dict[str, Tensor], layout: Layout) -> None:
    """Copy the tensors of a folder into our parameters and buffers, in the dtype that these have.

    All names and shapes are compared first: a ValueError names what is missing, unexpected or of another shape, and
    leaves the model as it was.
    """
    ours, found = our_tensors(model), check_fit(model, tensors, layout)
    for entry in layout.tensors:
        if entry.key not in found:  # an optional one
            continue
        joint = found[entry.key].t() if entry.transposed else found[entry.key]
        sizes = [ours[name].shape[0] for name in entry.parts]
        for name, part in zip(entry.parts, joint.split(sizes) if len(sizes) > 1 else [joint], strict=True):
            ours[name].copy_(part)


def check_fit(model: nn.Module, tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The tensors under the names of today. Raises ValueError unless the model, which may be on meta, can take them."""
    wanted = {entry.key: entry for entry in layout.tensors}
    ours = our_tensors(model)
    found = {current_name(key, layout, set(wanted)): tensor for key, tensor in tensors.items()}
    shapes = {key: joined([ours[name] for name in entry.parts], entry).shape for key, entry in wanted.items()}
    problems = []
    missing = [key for key in wanted if key not in found and key not in layout.optional]
    if missing:
        problems.append(f"missing {some(missing)}")
    known = (*map(re.escape, layout.tied), *layout.ignored)
    extra = [key for key in found if key not in wanted and not any(re.fullmatch(name, key) for name in known)]
    if extra:
        problems.append(f"unexpected {some(sorted(extra))}")
    for key, shape in shapes.items():
        if key in found and found[key].shape != shape:
            problems.append(f"{key} has shape {tuple(found[key].shape)}, expected {tuple(shape)}")
    for copy, original in layout.tied.items():
        if copy in found and original in found and not torch.equal(found[copy], found[original].to(found[copy].dtype)):
            problems.append(f"{copy} differs from {original}, which this model ties to it")
    if problems:
        raise ValueError(f"the weights do not fit {type(model).__name__}: {'; '.join(problems[:MOST_NAMED])}")
    return found


def our_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that several modules share stands under its first name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def joined(parts: list[Tensor], entry: FileTensor) -> Tensor:
    """Our parameters as the file holds them."""
    joint = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joint.t() if entry.transposed else joint


# Configs: the same facts under two vocabularies


def config_from_file(cls: type, config: dict, names: dict[str, str], fixed: dict[str, tuple]) -> Any:
    """Build one of our configs. `names` maps our fields to Hugging Face's; a value that is absent or null is ours.

    `fixed` maps further names to the values that our model knows, the first of which it has: anything else is refused,
    for it would load and then compute something different. Raises ValueError with the name and the value.
    """
    for name, allowed in fixed.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(
                f"{CONFIG} has {name}={config[name]!r}; this model supports {', '.join(map(repr, allowed))}"
            )
    kinds, values = get_type_hints(cls), {}
    for ours, theirs in names.items():
        value = config.get(theirs)
        if value is None:
            continue
        kind = kinds[ours]
        if type(kind) is types.UnionType:  # `int | None`
            kind = next(arm for arm in get_args(kind) if arm is not type(None))
        elif get_origin(kind) is Literal:
            kind = type(get_args(kind)[0])
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            raise ValueError(f"{CONFIG} has {theirs}={value!r}; it must be of type {kind.__name__}")
        values[ours] = value
    return cls(**values)


def config_to_file(config: Any, names: dict[str, str], fixed: dict[str, tuple]) -> dict:
    """The same facts in Hugging Face's words, the way back of `config_from_file`."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()} | {
        name: allowed[0] for name, allowed in fixed.items()
    }


# Models that have such a folder


class FolderModel(nn.Module):
    """A model with from_pretrained and save_pretrained; a subclass says how its files name things.

    `config_names`, `fixed`: see config_from_file. `absent`: what a folder means that leaves a setting out, where this
    is not our default. `aliases`: second names of settings in files, which count where both are given, as they do for
    Hugging Face. `layout(config)`: the tensors. Dropout rates that a folder gives separately for attention and for the
    rest become the one rate of our configs.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]  # the Hugging Face class of the same model
    config_class: ClassVar[type]
    config_names: ClassVar[dict[str, str]]
    fixed: ClassVar[dict[str, tuple]] = {}
    absent: ClassVar[dict[str, Any]] = {}
    aliases: ClassVar[dict[str, str]] = {}

    @classmethod
    def layout(cls, config: Any) -> Layout:
        raise TypeError(f"{cls.__name__} describes no file layout")

    @classmethod
    def config_of(cls, config: dict, tensors: dict[str, Tensor]) -> Any:
        """Our config from the contents of a folder."""
        return config_from_file(cls.config_class, {**cls.absent, **config}, cls.config_names, cls.fixed)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """The model of a folder, in float32 and ready to evaluate (no dropout), as Hugging Face's method gives it.

        Raises ValueError for another kind of model and for tensors that do not fit, naming them.
        """
        file_config, tensors = read_folder(folder, cls.model_type)
        file_config |= {cls.aliases[name]: value for name, value in file_config.items() if name in cls.aliases}
        config = cls.config_of(file_config | cls.generation_ids(Path(folder)), tensors)
        layers = {name: value for name, value in vars(config).items() if name.startswith("n_") and "layers" in name}
        if max(layers.values()) > MOST_LAYERS:
            raise ValueError(f"{shown(Path(folder) / CONFIG)} asks for {layers}; at most {MOST_LAYERS:,} can be right")
        layout = cls.layout(config)
        with shapes_alone():  # sizes that no weights fill are refused before they take memory
            check_fit(cls(config), tensors, layout)
        model = cls(config)
        load_weights(model, tensors, layout)
        return model.eval()

    @classmethod
    def generation_ids(cls, folder: Path) -> dict[str, int]:
        """The ids of generation_config.json, which count more for a model that writes, as they do for Hugging Face."""
        writes = hasattr(cls, "generate") and (folder / GENERATION).exists()
        found = read_json(folder / GENERATION) if writes else {}
        ours = {theirs for theirs in cls.config_names.values() if theirs.endswith("token_id")}
        ids = {name: found[name] for name in sorted(ours) if found.get(name) is not None}
        for name, value in ids.items():
            if type(value) is not int:
                raise ValueError(f"{GENERATION} has {name}={value!r}; this model knows one such id, a whole number")
        return ids

    def file_config(self) -> dict:
        """What config.json says."""
        kind = str(next(self.parameters()).dtype).removeprefix("torch.")
        head = {"model_type": self.model_type, "architectures": [self.architecture], "dtype": kind, "torch_dtype": kind}
        return head | config_to_file(self.config, self.config_names, self.fixed)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the folder, tied weights once. Raises ValueError if it is a file."""
        ours = our_tensors(self)
        entries = self.layout(self.config).tensors
        tensors = {entry.key: joined([ours[name] for name in entry.parts], entry) for entry in entries}
        write_folder(folder, self.file_config(), tensors)
