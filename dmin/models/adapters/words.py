"""Learned words (textual inversion): tokens whose vectors are added to a text encoder."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmin.runtime.errors import DminError

Embeddings = str | Path | Sequence[str | Path]
"""Files of learned words; ``WORD=FILE`` if the file does not name the word, or by another name."""

BUNDLE = "bundle_emb."  # prefix of learned words in adapter files
# Trainers' name of an encoder → its index among the pipeline's; None: the first of its width.
_KINDS = {
    **{"clip_l": 0, "clip_g": 1, "t5": -1, "t5xxl": -1},
    **{"text_encoder": 0, "text_encoder_2": 1, "text_encoder_3": 2},
    **{"emb_params": None, "string_to_param.*": None},
}


class Word(NamedTuple):
    """A learned word: its token, and its vectors ``[n, d]`` in one encoder."""

    token: str
    place: int | None  # index of the encoder among the pipeline's
    vectors: Tensor
    source: str  # setting and file, for messages

    @property
    def tokens(self) -> list[str]:
        """Return a token for each vector, with diffusers' names."""
        return [self.token, *(f"{self.token}_{n}" for n in range(1, len(self.vectors)))]


class WithWords(nn.Module):
    """An embedding with learned words after its own tokens.

    Args:
        base_layer: the embedding.
        words: the learned words of this encoder.
        first: token id of the first vector; the other vectors follow.
        tokenizer: the tokenizer without these words.
    """

    def __init__(self, base_layer: Any, words: Sequence[Word], first: int, tokenizer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        vectors = torch.cat([word.vectors for word in words]).to(base_layer.weight)
        own = nn.Embedding.from_pretrained(vectors, freeze=False)
        self.learned = nn.ModuleDict({"default": own})
        self.words, self.first, self.tokenizer = words, first, tokenizer

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the base embedding, such as its width."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors of tokens, ``[..., d]``."""
        own: Any = self.learned["default"]
        row = ids - self.first
        inside = (row >= 0) & (row < own.num_embeddings)
        base: Any = self.base_layer
        known = base(ids.masked_fill(inside, 0))
        return torch.where(inside[..., None], own(row.masked_fill(~inside, 0)), known)


def read_words(given: Embeddings) -> list[Word]:
    """Read files of learned words.

    Every tensor is a word. Its token is the tensor's name in diffusers' files; the name of the file
    for ``emb_params`` (A1111, kohya), ``clip_l``, ``clip_g`` and ``t5``; and WORD for
    ``bundle_emb.WORD.clip_l``, as in adapters.

    Raises:
        DminError: there is no such file, it is a pickle, or a tensor is not a word.
    """
    several = [given] if isinstance(given, str | Path) else given
    found: list[Word] = []
    for each in several:
        token, said, path = str(each).rpartition("=")
        named = said and not Path(each).exists()
        found += _read(token, Path(path)) if named else _read(None, Path(each))
    return found


def _read(token: str | None, path: Path) -> list[Word]:
    source = f"model.embeddings={path}"
    if path.suffix in (".pt", ".bin", ".ckpt", ".pth"):
        what = f"torch.load('{path.name}', weights_only=True)"
        if path.suffix == ".pt":  # A1111's
            what = f"{{'emb_params': {what}['string_to_param']['*']}}"
        raise DminError(
            f"{source}: a pickle, which can run code when it is opened. Convert it: python -c "
            f'"import torch; from safetensors.torch import save_file; '
            f"save_file({what}, '{path.stem}.safetensors')\""
        )
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DminError(f"{source} cannot be read as a .safetensors file: {error}") from error
    ends = (*_KINDS, *(f"{kind}_out" for kind in _KINDS))
    own = {key for key in state if key not in ends and not key.startswith(BUNDLE)}
    if token is not None and len(own) > 1:
        raise DminError(
            f"{source} has {len(own)} words ({', '.join(sorted(own))}): use one of these."
        )
    named = {
        key if key.startswith(BUNDLE) else f"{BUNDLE}{token or path.stem}.{key}": value
        for key, value in state.items()
        if key not in own
    }
    found = bundled(named, source)
    return found + [_word(token or key, None, state[key], source) for key in sorted(own)]


def bundled(state: Mapping[str, Tensor], source: str) -> list[Word]:
    """Return the words among the tensors of a file, named ``bundle_emb.WORD.ENCODER``.

    Raises:
        DminError: the encoder is unknown, or the tensor does not consist of vectors.
    """
    found = []
    for key, value in state.items():
        if key.startswith(BUNDLE):
            whole = key.removeprefix(BUNDLE)
            end = next((kind for kind in _KINDS if whole.endswith(f".{kind}")), None)
            if end is None:
                raise DminError(
                    f"{source}: {key} belongs to none of the supported encoders "
                    f"{', '.join(_KINDS)} (vectors added "
                    f"to the output of an encoder, such as OneTrainer's *_out, are not supported)."
                )
            found.append(_word(whole.removesuffix(f".{end}"), _KINDS[end], value, source))
    return found


def _word(token: str, place: int | None, vectors: Tensor, source: str) -> Word:
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    whole = vectors.ndim == 2 and vectors.is_floating_point() and vectors.numel()
    if not whole or not torch.isfinite(vectors).all():
        raise DminError(
            f"{source}: {token} is {vectors.dtype} {list(vectors.shape)}, or not finite, so it "
            f"is not a learned word. Give a file of textual inversion."
        )
    return Word(token, place, vectors, source)


def add_words(pipeline: Any, words: Iterable[Word]) -> None:
    """Put learned words into the tokenizers and text encoders of a pipeline.

    Args:
        pipeline: a diffusers pipeline; its tokenizers are replaced by copies.
        words: words of all files, each once for an encoder.

    Raises:
        DminError: a word fits no encoder, or the tokenizer already has that token.
    """
    parts = dict(getattr(pipeline, "components", {}))
    encoders = {
        name: part.get_input_embeddings()
        for name, part in parts.items()
        if name.startswith("text_encoder") and part is not None
    }
    own: dict[str, list[Word]] = {name: [] for name in encoders}
    for word in words:
        own[_encoder(word, encoders, own)].append(word)
        if len(word.vectors) > 1 and not hasattr(pipeline, "maybe_convert_prompt"):
            raise DminError(
                f"{word.source}: {word.token} has {len(word.vectors)} vectors, and "
                f"{type(pipeline).__name__} supports one for each word. Give each vector its own "
                f"word in the captions and in the file."
            )
    for name, those in own.items():
        if those:
            _add(pipeline, name, encoders[name], those)


def _encoder(word: Word, encoders: Mapping[str, Any], own: Mapping[str, list[Word]]) -> str:
    """Return the name of the encoder to which a word belongs."""
    names, width = list(encoders), word.vectors.shape[1]
    if word.place is None or len(names) == 1:
        fits = [n for n in names if encoders[n].embedding_dim == width]
        fits = [n for n in fits if word.token not in {other.token for other in own[n]}] or fits
    else:
        fits = names[word.place :][:1]
    if not fits or encoders[fits[0]].embedding_dim != width:
        have = ", ".join(f"{n} has {e.embedding_dim}" for n, e in encoders.items())
        raise DminError(
            f"{word.source}: {word.token} has vectors of {width} dimensions, but this model's "
            f"encoders have {have or 'none'}. Give words that were learned for this model."
        )
    return fits[0]


def _add(pipeline: Any, name: str, embedding: Any, words: list[Word]) -> None:
    key = name.replace("text_encoder", "tokenizer")
    plain, encoder = pipeline.components[key], pipeline.components[name]
    if isinstance(embedding, WithWords):
        words, plain = [*embedding.words, *words], embedding.tokenizer
        embedding = embedding.base_layer
    tokens, known = [token for word in words for token in word.tokens], set(plain.get_vocab())
    for word in words:
        if known & set(word.tokens) or any(tokens.count(token) > 1 for token in word.tokens):
            raise DminError(
                f"{word.source}: the {key} already has {word.token}, or another of these words has "
                "the same name. Rename it (model.embeddings=NAME=FILE), in the captions too."
            )
    end = plain.eos_token_id
    if name in _pooled(pipeline) and encoder.config.eos_token_id == 2 != end:
        raise DminError(
            f"{words[0].source}: eos_token_id=2 in {name}/config.json, so the caption is pooled at "
            f"the highest token id, which would be the learned word. Set eos_token_id={end} there, "
            f"the end token of its tokenizer."
        )
    tokenizer = copy.deepcopy(plain)
    tokenizer.add_tokens(tokens)
    first = tokenizer.convert_tokens_to_ids(tokens[0])
    encoder.set_input_embeddings(WithWords(embedding, words, first, plain))
    setattr(pipeline, key, tokenizer)


def _pooled(pipeline: Any) -> list[str]:
    """Return the encoders that give the network one pooled vector per caption."""
    parts = pipeline.components.items()
    names = [n for n, part in parts if n.startswith("text_encoder") and part is not None]
    projected = [n for n in names if "Projection" in type(pipeline.components[n]).__name__]
    return projected or names[: len(names) > 1]


def words_of(pipeline: Any) -> dict[str, Sequence[Word]]:
    """Return the learned words in a pipeline, by encoder."""
    layers = {
        name: next((m for m in part.modules() if isinstance(m, WithWords)), None)
        for name, part in pipeline.components.items()
        if isinstance(part, nn.Module)
    }
    return {name: layer.words for name, layer in layers.items() if layer is not None}


def plain_tokenizers(pipeline: Any) -> dict[str, Any]:
    """Return the original tokenizers, by name, of encoders with learned words."""
    return {
        name.replace("text_encoder", "tokenizer"): module.tokenizer
        for name in words_of(pipeline)
        for module in pipeline.components[name].modules()
        if isinstance(module, WithWords)
    }


def save_words(pipeline: Any, file: Path) -> None:
    """Save the learned words of a pipeline, if it has any, for ``model.embeddings``."""
    state = {
        f"{BUNDLE}{word.token}.{name}": word.vectors.contiguous()
        for name, words in words_of(pipeline).items()
        for word in words
    }
    if state:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, file)
