"""Read adapter files: their tensors, by module and role."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmin.models.adapters.formulas import KINDS, MAGNITUDE, rank
from dmin.models.adapters.words import BUNDLE, Word, bundled
from dmin.runtime.errors import DminError

_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# End of a key → the tensor's name in KINDS.
_ENDS = (
    (r"\.(?:lora_down|lora_A|lora\.down|lora_linear_layer\.down)(?:\.default)?\.weight", "lora_A"),
    (r"\.(?:lora_up|lora_B|lora\.up|lora_linear_layer\.up)(?:\.default)?\.weight", "lora_B"),
    (r"\.lora_mid\.weight", "lora_mid"),
    (r"\.(?:lora_magnitude_vector(?:\.default)?(?:\.weight)?|magnitude|dora_scale)", MAGNITUDE),
    (r"\.(?:diff|w_norm)", "lora_diff"),
    (r"\.(?:diff_b|b_norm)", "lora_diff_b"),
    (r"(?:\.lora)?\.alpha", "alpha"),
    (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.default)?", r"\1"),
)
# Start of a key → the index of its text encoder among the pipeline's.
_TEXT = (
    (r"lora_te1?_", 0),
    (r"lora_te2_", 1),
    (r"lora_te3_", -1),
    (r"text_encoder\.", 0),
    (r"text_encoder_2\.", 1),
    (r"text_encoder_3\.", 2),
    (r"text_encoders\.clip_l\.transformer\.", 0),
    (r"text_encoders\.clip_g\.transformer\.", 1),
    (r"text_encoders\.t5xxl\.transformer\.", -1),
)
_NETWORK = re.compile(
    r"lora_(?:unet|transformer|prior)_|lycoris_|(?:base_model\.model\.)?"
    r"(?:unet\.|transformer\.|(?:model\.)?diffusion_model\.)?"
)
_REFUSED = {
    "oft_": "of an OFT adapter, which rotates weights",
    "on_input": "of an IA³ adapter, which scales weights",
    "lora_B.bias": "a bias of the adapter itself",
}


@dataclass
class FileModule:
    """The tensors of one module in a file.

    Args:
        key: the common start of the keys of its tensors.
        name: name of the module in the file, without the prefix for the network or encoder.
        text: index of its text encoder among the pipeline's; None for the network.
        tensors: tensors by the names of :data:`KINDS`.
        keys: keys in the file, by the same names.
    """

    key: str
    name: str
    text: int | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, Tensor]:
        """Return the tensors that form ΔW."""
        return {k: v for k, v in self.tensors.items() if k not in (MAGNITUDE, "alpha")}


@dataclass
class AdapterFile:
    """An adapter file.

    Args:
        path: path of the file.
        state: all its tensors.
        header: its metadata.
        config: peft's ``adapter_config.json`` in its folder; empty if there is none.
    """

    path: Path
    state: dict[str, Tensor]
    header: dict[str, str]
    config: dict[str, Any]

    def modules(self) -> list[FileModule]:
        """Return all tensors by their modules.

        Raises:
            DminError: a tensor does not belong to a supported kind of adapter, or one is missing.
        """
        found: dict[str, FileModule] = {}
        for key, tensor in self.state.items():
            if key.startswith(BUNDLE):
                continue
            # Earlier names of diffusers, when LoRA layers were part of attention processors.
            plain = re.sub(r"\.processor\.(to_\w+?)_lora\.", r".\1.lora.", key)
            plain = plain.replace(".to_out.lora", ".to_out.0.lora")
            ends = ((re.search(f"{end}$", plain), name) for end, name in _ENDS)
            match, name = next((pair for pair in ends if pair[0]), (None, ""))
            if match is None:
                raise self.error(f"{key} is {_what(key)}")
            start, name = plain[: match.start()], match.expand(name)
            entry = found.setdefault(start, _module(start))
            if name in entry.tensors:
                raise self.error(f"{key} and {entry.keys[name]} are the same tensor of one module")
            entry.tensors[name], entry.keys[name] = tensor, key
        for entry in found.values():
            if frozenset(entry.factors) not in KINDS:
                raise self.error(
                    f"{entry.key} has {', '.join(sorted(entry.tensors))}, which is not a supported "
                    "set of tensors"
                )
        if not found and not self.words():
            raise self.error("it has no tensors")
        return list(found.values())

    def words(self) -> list[Word]:
        """Return the learned words among its tensors."""
        return bundled(self.state, f"model.adapter={self.path}")

    def scale(self, module: FileModule) -> float:
        """Return s of ``W + s ΔW``: α/r, or α/√r with rank-stabilised LoRA in peft's config.

        α is taken from the module's tensors, else from peft's config, else from the header (of
        files with peft's names). Without any α, s is 1.
        """
        if "lora_diff" in module.tensors:
            return 1.0
        told = self._config(module)
        r = rank(module.factors)
        if r is None and "alpha" not in told:
            return 1.0  # α is not used
        pattern = told.get("alpha_pattern") or {}
        alpha = next(
            (a for k, a in pattern.items() if re.match(rf"(.*\.)?({k})$", module.key)), None
        )
        if "alpha" in module.tensors:
            alpha = float(module.tensors["alpha"])
        elif alpha is None:
            alpha = told.get("lora_alpha", told.get("alpha"))
        r = r or told.get("r", 1)
        root = told.get("use_rslora") and "alpha" not in module.tensors
        return 1.0 if alpha is None else float(alpha) / (r**0.5 if root else r)

    def _config(self, module: FileModule) -> dict[str, Any]:
        """Return peft's config of a module, or else the entries of the header."""
        if self.config:
            return self.config
        is_text = module.text is not None
        whole = json.loads(self.header.get("lora_adapter_metadata") or "{}")
        named = {
            key.rpartition(".")[2]: value
            for key, value in whole.items()
            if key.startswith("text_encoder") == is_text
        }
        if "lora_A" in module.keys.get("lora_A", ""):
            values = (self.header.get(key) for key in _ALPHAS)
            alpha = next((v for v in values if v not in (None, "", "None")), None)
            if alpha is not None:
                named.setdefault("lora_alpha", float(alpha))
        return named

    def error(self, what: str) -> DminError:
        """Return an error that names the file."""
        return DminError(f"model.adapter={self.path}: {what}.")


# Header entries in which trainers write the α of files with peft's names.
_ALPHAS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")


def read(path: Path) -> AdapterFile:
    """Read an adapter: a file, or a folder with one.

    Raises:
        DminError: there is none, it is a pickle, it is damaged, or it needs changed base weights.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    files = [file for file in files if file.name in _NAMES] or files
    pickles = [f for f in ([path] if path.is_file() else path.glob("*")) if f.suffix in _PICKLES]
    if pickles and (not files or files == pickles):
        raise DminError(
            f"model.adapter={pickles[0]}: a pickle, which can run code when it is opened. Convert "
            f'it: python -c "import torch; from safetensors.torch import save_file; '
            f"save_file(torch.load('{pickles[0].name}', weights_only=True), "
            f"'{pickles[0].stem}.safetensors')\""
        )
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise DminError(
            f"model.adapter={path}: expected a .safetensors file, or a folder with exactly one; "
            f"found {', '.join(f.name for f in files) or 'none'}. An adapter on the Hub must be "
            f"downloaded first."
        )
    file = files[0]
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        beside = file.parent / "adapter_config.json"
        config = json.loads(beside.read_text()) if beside.is_file() else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise DminError(f"model.adapter={file}: it cannot be read: {error}") from error
    found = AdapterFile(file, state, header, config)
    bad = [k for k, v in state.items() if not torch.isfinite(v.float()).all() and "alpha" not in k]
    if bad:
        raise found.error(f"{bad[0]} has infinite or NaN values")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(("pissa", "olora", "corda", "eva", "loftq", "lora_ga")):
        raise found.error(
            f"it starts from {start}, which changed the weights of the base model. Save it as a "
            "plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    return found


def _module(key: str) -> FileModule:
    for start, text in _TEXT:
        match = re.match(start, key)
        if match:
            return FileModule(key, key[match.end() :], text)
    match = _NETWORK.match(key)
    assert match is not None
    return FileModule(key, key[match.end() :], None)


def _what(key: str) -> str:
    known = next((what for part, what in _REFUSED.items() if part in key), "not an adapter tensor")
    return (
        f"{known}. dmin supports LoRA, LoCon, LoHa, LoKr, their Tucker forms, DoRA, and whole "
        "differences"
    )
