"""The collector: settings → the features of a batch. It holds no state of a run."""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from dmin.collect.described import as_found, describe
from dmin.collect.encodings_cache import Encoded, EncodingsCache
from dmin.collect.features import Features
from dmin.collect.networks import Networks
from dmin.collect.options import CollectOptions
from dmin.collect.peak_memory import PeakMemory
from dmin.data.base import Dataset
from dmin.diffusion.inputs import NoisedBatch, NoisedExamples
from dmin.diffusion.noise import Noise, SharedNoise
from dmin.diffusion.timesteps import Schedule, Stratified
from dmin.gradients.capture import Capture
from dmin.gradients.groups import Grouping, grouped
from dmin.gradients.ownership import Ownership
from dmin.gradients.parameters import Parameters, choose_parameters
from dmin.models.base import READOUTS, Condition, DiffusionModel, weights_digest
from dmin.models.contract import check_model, predicted, require_values
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint
from dmin.sketches import Auto, Sketch
from dmin.sketches.backends import Kernels, check_kernels
from dmin.store import Layout, Manifest, Store

# Raised whenever the numbers that land in a store change for unchanged settings.
FEATURE_SCHEMA = 2
# Pairs a pass where microbatch=auto has not found a size.
UNTRIED = 64


class Collector:
    """Computes sketches of the per-timestep loss gradients of examples.

    A row is ``S g_t / ‖g_t‖`` with ``g_t = ∇_θ L(θ; x, ε_t, t)`` over all attributed parameters
    (DMin, arXiv 2412.08637), for each readout, noise draw and timestep.

    Args:
        model: the diffusion model. It is not changed.
        sketch: the random linear map S; :class:`dmin.sketches.Auto` if none.
        timesteps: where gradients are computed.
        noise: of examples and queries; shared by all if None.
        readouts: what is differentiated, names from ``dmin.models.READOUTS``; each costs one more
            backward pass.
        params: which parameters are attributed: ``all`` or a regular expression of their names.
        groups: parameters with their own k dimensions, so that scores can be split between them:
            ``block``, ``layer``, or names with regular expressions; see
            :func:`dmin.sketches.grouped`. Rows have unit length over all groups together.
        microbatch: (example, timestep) pairs in one forward pass; more is faster until memory runs
            out. Results for different sizes agree up to rounding, for the same size to the bit.
            ``auto`` tries sizes on the first block and saves the result next to the store: one size
            for the whole store, all processes and all resumed runs on such a device.
        memory: for ``auto``: bytes that one pass may take beyond the weights, activations included.
            None: on a GPU most of what is free, on a CPU no limit.
        budget: bytes that per-example gradients may take at once; None chooses by device.
        gradient_checkpointing: recompute activations in backward, to save memory at the cost of
            time, in networks with ``enable_gradient_checkpointing``.
        kernels: how the sketch is evaluated, with equal results up to rounding: ``auto`` by
            compiled loops on a CPU and by Triton on a GPU where it is installed, ``triton``, or
            ``torch``: plain operations.

    Raises:
        DminError: unknown readout, no such parameters, or a layer that cannot be differentiated.
    """

    def __init__(
        self,
        model: DiffusionModel,
        sketch: Sketch | None = None,
        timesteps: Schedule | None = None,
        noise: Noise | None = None,
        readouts: Sequence[str] = ("loss",),
        params: str = "all",
        groups: Grouping | None = None,
        microbatch: int | Literal["auto"] = 64,
        memory: int | None = None,
        budget: int | None = None,
        gradient_checkpointing: bool = False,
        kernels: Kernels = "auto",
    ) -> None:
        unknown = [name for name in readouts if name not in READOUTS]
        if unknown or not readouts:
            raise DminError(
                f"collect.readouts={list(readouts)}: name one or more of {', '.join(READOUTS)}."
            )
        if microbatch != "auto" and (isinstance(microbatch, str) or microbatch < 1):
            raise DminError(
                f"collect.microbatch={microbatch}: give auto, or a number of pairs, 1 or more."
            )
        check_model(model)
        self.model = model
        self.attributed: Parameters = grouped(choose_parameters(model.network, params), groups)
        check_kernels(kernels)
        self.sketch: Sketch = (sketch or Auto()).bind(self.attributed)
        self.sketch.kernels = kernels
        schedule = (timesteps or Stratified()).bind(getattr(model, "log_snr", None))
        self.timesteps: tuple[float, ...] = schedule(model.timesteps)
        self.networks: Networks = Networks(model, self.attributed, self.timesteps)
        self.noise: Noise = noise or SharedNoise()
        self.readouts: tuple[str, ...] = tuple(readouts)
        self.microbatch = microbatch
        self.pairs: int = UNTRIED if isinstance(microbatch, str) else microbatch  # in one pass
        self.memory = memory
        self.budget = budget
        self.gradient_checkpointing = gradient_checkpointing
        self.ownership: Ownership = Ownership()

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The model's image and text encoders, by name; empty for a pixel-space model."""
        return getattr(self.model, "encoders", {})

    def with_model(self, model: DiffusionModel) -> Self:
        """Return a collector of the same settings for a model of the same parameters."""
        other = copy.copy(self)
        other.model = model
        return other

    def losses_only(self) -> Self:
        """Return a collector of losses only, without gradients."""
        other = copy.copy(self)
        other.readouts = ()
        return other

    def features(
        self,
        x0: Tensor,
        condition: Condition,
        ids: Sequence[str],
        peak: PeakMemory | None = None,
    ) -> Features:
        """Return the features of encoded examples, after waiting for the GPU.

        Args:
            x0: ``[rows, ...]`` from ``model.encode``.
            condition: from ``model.encode``.
            ids: names of the examples.
            peak: records the memory of the passes.

        Raises:
            DminError: a gradient is NaN or infinite; the example and timestep are named. Or the
                GPU's memory ran out.
        """
        found = self.passes(
            self.inputs(x0, condition, ids), self.pairs, lambda batch: self.run(batch, peak=peak)
        )
        found.check_finite(ids, self.timesteps)
        return found

    def inputs(self, x0: Tensor, condition: Condition, ids: Sequence[str]) -> NoisedExamples:
        """Return encoded examples at every timestep and draw; arguments as for :meth:`features`."""
        return NoisedExamples(self.noise, self.timesteps, x0, condition, ids)

    def passes(
        self, inputs: NoisedExamples, size: int, run: Callable[[NoisedBatch], Features]
    ) -> Features:
        """Return the features of examples, computed in several passes, without waiting for a GPU.

        Args:
            inputs: the examples.
            size: pairs of example and point in one pass.
            run: computes one pass, by default :meth:`run`.

        Raises:
            DminError: the GPU's memory ran out.
        """
        groups = self.networks.together(inputs)
        try:
            parts = [run(inputs.at(pairs)) for group in groups for pairs in group.split(size)]
        except torch.OutOfMemoryError as error:
            raise DminError(
                f"a pass of {size} pairs of example and timestep ran out of GPU memory. Set "
                f"collect.microbatch, collect.memory or collect.budget lower, or "
                f"collect.gradient_checkpointing=true. Finished blocks are kept."
            ) from error
        order = torch.cat(groups).argsort() if len(groups) > 1 else None
        shape = inputs.examples, self.noise.draws, len(self.timesteps)
        return Features.joined(parts, shape, order)

    def run(
        self,
        batch: NoisedBatch,
        ownership: Ownership | None = None,
        peak: PeakMemory | None = None,
        scale: Tensor | float = 1.0,
    ) -> Features:
        """Return the features of pairs, their leading axis.

        One forward pass, and one backward pass for each readout, without waiting for a GPU. Passes
        of a new kind are run a few more times to find which example each row belongs to.

        Args:
            batch: the pairs.
            ownership: known orders of the network's rows; the collector's own if None.
            peak: records the memory of the pass.
            scale: factors of the readouts before they are differentiated, ``[pairs]``.
        """
        if not self.differentiates(batch):
            return self._losses(batch, peak)
        ownership = ownership or self.ownership
        ownership.expect(len(batch.t), batch.x0.shape[1:])
        return ownership.settle(lambda: self._pass(batch, ownership, peak, scale))

    def _pass(
        self,
        batch: NoisedBatch,
        ownership: Ownership,
        peak: PeakMemory | None,
        scale: Tensor | float,
    ) -> Features:
        values, norms = {}, {}
        data = [batch.x0, batch.noise, batch.t, *batch.condition.values()]
        hooks = Capture(self.model.network, self.sketch, self.budget, ownership, data)
        with torch.enable_grad(), hooks as capture:
            prediction = predicted(self.model, batch)
            if peak is not None:
                peak.forward_done()
            for name in self.readouts:
                last = name == self.readouts[-1]
                rows = capture.backward(READOUTS[name](prediction) * scale, keep_graph=not last)
                norm = rows.squared_norm.sum(1).sqrt()
                # A gradient of exactly zero (a saturated loss) stays a row of zeros.
                values[name] = rows.values / torch.where(norm > 0, norm, 1)[:, None, None]
                norms[name] = rows.squared_norm.sqrt()
            if peak is not None:
                peak.backward_done()
            losses = READOUTS["loss"](prediction).detach()
        return Features(values, norms, losses)

    def differentiates(self, batch: NoisedBatch) -> bool:
        """Return whether a pass uses any attributed parameter, and so has gradients."""
        return bool(self.readouts) and self.networks.reached(batch.t)

    def _losses(self, batch: NoisedBatch, peak: PeakMemory | None) -> Features:
        if peak is not None:
            peak.forward_done()  # all that follows counts
        with torch.no_grad():
            losses = READOUTS["loss"](predicted(self.model, batch))
        if peak is not None:
            peak.backward_done()
        norms = losses.new_zeros(len(losses), len(self.attributed.groups))
        rows = norms[..., None].expand(-1, -1, self.sketch.dim)
        return Features(
            dict.fromkeys(self.readouts, rows), dict.fromkeys(self.readouts, norms), losses
        )

    def describe(self) -> dict[str, Any]:
        """Return everything that must match between a training and a query store, as JSON."""
        entries = [list(entry) for entry in self.attributed.entries]
        loss = self.model.describe()
        network = self.model.network
        require_values([name for name, p in network.named_parameters() if p.is_meta])
        digests = {} if "encoders" in loss else self._encoder_digests
        found = {
            "schema": FEATURE_SCHEMA,
            "weights": weights_digest(network),
            **({"encoders": digests} if digests else {}),
            "parameters": {
                "count": self.attributed.count,
                "names": fingerprint({"entries": entries}),
            },
            "loss": loss,
            "noise": self.noise.describe(),
            "sketch": self.sketch.describe(),
        }
        of_gradients = () if self.readouts else ("parameters", "sketch")
        return {name: each for name, each in found.items() if name not in of_gradients}

    def manifest(
        self,
        dataset: Dataset,
        block_size: int = CollectOptions.block_size,
        dtype: str = CollectOptions.dtype,
        as_queries: bool = False,
        path: Path | None = None,
    ) -> Manifest:
        """Return the manifest of this collector's store of a dataset, as found at a path."""
        # Beside the examples, not among the features: the store is there to be compared.
        beside = self.model.describe_query() if as_queries else {}
        described = {**describe(dataset, self.model.metadata_columns), **beside}
        layout, features = self.layout(dtype), self.describe()
        found = Manifest(layout, features, described, len(dataset), block_size)
        return found if path is None else as_found(found, dataset, path, beside)

    def layout(self, dtype: str = CollectOptions.dtype) -> Layout:
        """Return the axes of this collector's features."""
        return Layout(
            readouts=self.readouts,
            draws=self.noise.draws,
            timesteps=self.timesteps,
            groups=self.attributed.groups if self.readouts else ("none",),
            dim=self.sketch.dim if self.readouts else 1,
            dtype=dtype,
        )

    def cached_encodings(
        self, store: Store, ids: Sequence[str], root: str | Path | None = None
    ) -> Encoded | None:
        """Return examples' encodings as collecting kept them, None if it did not.

        Those of a store that grew or lost examples are not looked for.

        Args:
            store: that they were cached for.
            ids: of the examples; None is returned if one is not in the store.
            root: as ``encodings`` in :class:`CollectOptions`.
        """
        manifest = store.manifest
        folder = self.encodings_cache(manifest, store.path, root)
        changed = manifest.revisions or store.removed
        if folder is None or changed or not set(store.ids).issuperset(ids):
            return None
        return folder.of_rows([store.index(id) for id in ids], manifest.num_examples)

    @cached_property
    def _encoder_digests(self) -> dict[str, str]:
        return {name: weights_digest(encoder) for name, encoder in self.encoders.items()}

    def encodings_cache(
        self, manifest: Manifest, path: Path, root: str | Path | None = None
    ) -> EncodingsCache | None:
        """Return the cache of the encodings of a store's examples.

        Args:
            manifest: of the store.
            path: its folder.
            root: as ``encodings`` in :class:`CollectOptions`.

        Returns:
            None for a model without encoders.
        """
        if not self.encoders:
            return None
        root = root or path.with_name(f"{path.name}.encodings")
        return EncodingsCache(root, manifest.encodings_key, manifest.block_size)
