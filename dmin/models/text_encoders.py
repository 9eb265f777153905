"""Text encoders that were trained with the network: captions are encoded within each pass."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from dmin.models.adapters import is_adapted, words_of
from dmin.models.base import Condition
from dmin.models.latent import LatentDiffusion
from dmin.runtime.errors import DminError

TOKENS = "tokens."  # name prefix of conditions that are tokens, encoded in each pass


class WithTextEncoders(nn.Module):
    """A network and its text encoders, whose parameters are attributed together.

    Other attributes are those of the network.

    Args:
        network: the network, which receives the encoders' outputs.
        encoders: text encoders by their names in the pipeline.
    """

    def __init__(self, network: nn.Module, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.network = network
        for name, encoder in encoders.items():
            self.add_module(name, encoder)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders, by name."""
        return {name: part for name, part in self.named_children() if name != "network"}

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the network, such as its config."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Call a function that calls the parts, so that their uses are within this module."""
        return run(*inputs)


class TextConditioned(LatentDiffusion):
    """Conditioned on texts, by encoders that may have been trained with the network.

    Args:
        pipeline: a diffusers pipeline with all its components.
        text_encoders: ``trained`` with the network: captions are encoded inside each pass, and the
            encoders' gradients are part of each row. ``frozen``: captions are encoded once.
            ``auto``: trained if one of them has an adapter or learned words.
        settings: settings of the base classes.
    """

    # Encoder that alone determines one condition → the name of that condition. If it was not
    # trained, the condition is encoded once. All others run in each pass if one was trained.
    made_apart: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        pipeline: Any,
        *args: Any,
        text_encoders: Literal["auto", "trained", "frozen"] = "auto",
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, *args, **settings)
        if text_encoders not in ("auto", "trained", "frozen"):
            raise DminError(
                f"model.text_encoders={text_encoders!r}: allowed are auto, trained and frozen."
            )
        encoders = {n: e for n, e in self.encoders.items() if n.startswith("text_encoder")}
        changed = {name for name, encoder in encoders.items() if is_adapted(encoder)}
        if text_encoders == "trained" or (changed and text_encoders == "auto"):
            idle = self.made_apart.keys() - changed
            inside = {n: e.requires_grad_(True) for n, e in encoders.items() if n not in idle}
            self.network = WithTextEncoders(self.network, inside)

    @property
    def denoiser(self) -> Any:
        """The network without text encoders that are attributed with it."""
        return self.network.network if self.encodes_inside else self.network

    @property
    def encodes_inside(self) -> bool:
        """Whether captions are encoded inside each pass."""
        return isinstance(self.network, WithTextEncoders)

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss, including trained text encoders."""
        trained = {"text_encoders": list(self.network.encoders)} if self.encodes_inside else {}
        named = {n: [word.tokens for word in own] for n, own in words_of(self.pipeline).items()}
        return {**super().describe(), **trained, **({"words": named} if named else {})}

    def _embedded(self, prompts: Sequence[Any] | None) -> Condition:
        return self._tokenised(prompts) if self.encodes_inside else super()._embedded(prompts)

    @torch.no_grad()
    def _tokenised(self, prompts: Sequence[Any] | None) -> Condition:
        """Return the tokens of prompts, and the conditions that no encoder computes in a pass."""
        tokens: dict[str, Tensor] = {}
        recorders = {
            name: _Recorder(getattr(self.pipeline, name), f"{TOKENS}{name}.", tokens)
            for name, part in self.pipeline.components.items()
            if name.startswith("tokenizer") and part is not None
        }
        whole = super(TextConditioned, self._with_parts(recorders))._embedded(prompts)
        if not tokens or any(
            len(each) != len(next(iter(whole.values()))) for each in tokens.values()
        ):
            raise DminError(
                f"model.text_encoders: {type(self.pipeline).__name__} tokenises captions one at a "
                f"time, or as a chat, which is not supported within a pass. Set "
                f"model.text_encoders="
                f"frozen: the gradient then does not include the text encoder."
            )
        known = [made for name, made in self.made_apart.items() if name not in self._inside]
        # Some pipelines use zeros for no prompt, without an encoder.
        found = {
            name: value
            for name, value in whole.items()
            if name in known or not value.is_floating_point() or not value.any()
        }
        device = next(iter(whole.values())).device
        found |= {name: ids.to(device) for name, ids in tokens.items()}
        again = self._encoded(found)
        for name, value in whole.items():
            if not torch.allclose(again[name], value, rtol=0, atol=1e-2 * float(value.abs().max())):
                raise DminError(
                    f"model.text_encoders: {type(self.pipeline).__name__} encodes the tokens of "
                    f"a caption to another {name} than the caption itself. Set "
                    f"model.text_encoders=frozen."
                )
        return found

    def _encoded(self, condition: Condition) -> Condition:
        """Return the condition with encoded captions, differentiable in the text encoders."""
        tokens = {k: v for k, v in condition.items() if k.startswith(TOKENS)}
        rest = {k: v for k, v in condition.items() if k not in tokens}
        parts, first = self._inside, next(iter(tokens.values()))
        parts |= {name: _Idle(first.device) for name in self.made_apart if name not in parts}
        for name in {key.split(".")[1] for key in tokens}:
            of = f"{TOKENS}{name}."
            own = {k.removeprefix(of): v for k, v in tokens.items() if k.startswith(of)}
            parts[name] = _Replay(getattr(self.pipeline, name), own)
        return {**self._with_parts(parts)._embed([""] * len(first)), **rest}

    @property
    def _inside(self) -> dict[str, Any]:
        return dict(self.network.encoders)

    def _with_parts(self, parts: Mapping[str, Any]) -> Self:
        """Return a copy of the model with some components of the pipeline replaced."""
        other = copy.copy(self)
        other.pipeline = copy.copy(self.pipeline)
        vars(other.pipeline).update(parts)
        return other

    def _predict(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        plain = super()._predict
        if not self.encodes_inside:
            return plain(noised, t, condition)

        def run(noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
            whole = self._encoded(condition).items()
            like = noised.dtype
            return plain(
                noised, t, {k: v.to(like) if v.is_floating_point() else v for k, v in whole}
            )

        found: Tensor = self.network(run, noised, t, condition)
        return found


class _Tokenizer:
    """A proxy of a tokenizer with another ``__call__``."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class _Recorder(_Tokenizer):
    """Records the tokens of captions, except those that pipelines compute only for a warning."""

    def __init__(self, tokenizer: Any, start: str, kept: dict[str, Tensor]) -> None:
        super().__init__(tokenizer)
        self.start, self.kept = start, kept

    def __call__(self, *args: Any, **told: Any) -> Any:
        found = self.tokenizer(*args, **told)
        if told.get("padding") == "max_length":
            self.kept.update({self.start + name: torch.as_tensor(x) for name, x in found.items()})
        return found


class _Replay(_Tokenizer):
    """Returns recorded tokens for any input."""

    def __init__(self, tokenizer: Any, tokens: dict[str, Tensor]) -> None:
        super().__init__(tokenizer)
        self.tokens = tokens

    def __call__(self, *args: Any, **told: Any) -> Any:
        return BatchEncoding(self.tokens)


class _Idle(nn.Module):
    """A placeholder for an encoder whose output is known."""

    dtype = torch.float32

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def forward(self, ids: Tensor, **told: Any) -> tuple[Tensor]:
        """Return zeros with the right number of tokens."""
        return (torch.zeros(*ids.shape, 1, device=ids.device),)
