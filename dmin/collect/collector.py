"""The collector: a Lightning predict loop that turns blocks of examples into rows of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn

from dmin.collect.background import Arriving
from dmin.collect.completion import finished, wait_for_others
from dmin.collect.encodings import Encoded, Encodings
from dmin.collect.features import Features, Passes
from dmin.collect.fsdp import LockstepPasses, is_sharded, shard
from dmin.collect.microbatch import PeakMemory
from dmin.collect.session import Work, predict, predict_trainer
from dmin.data.base import Dataset, describe_dataset
from dmin.data.module import CollectData
from dmin.diffusion.noise import Noise, SharedNoise
from dmin.diffusion.timesteps import Schedule, Stratified
from dmin.gradients.capture import Capture
from dmin.gradients.groups import Grouping, grouped
from dmin.gradients.parameters import choose_parameters
from dmin.models.base import READOUTS, Condition, DiffusionModel, weights_digest
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint
from dmin.runtime.signals import Stopped, StopSignals
from dmin.runtime.transfer import to_device
from dmin.sketches import Auto, Sketch
from dmin.sketches.backends import Kernels, check_kernels
from dmin.store import Layout, Manifest, Rows, Store, StoreWriter
from dmin.workers.heartbeat import Heartbeat
from dmin.workers.lock import claim
from dmin.workers.shard import Shard

# Raised whenever the numbers that land in a store change for unchanged settings.
FEATURE_SCHEMA = 2
# What processes that were told to stop have to seal what is finished, while others wait for them.
SECONDS_TO_STOP = 30.0
# Pairs a pass of a collector with microbatch=auto that did not try any yet.
UNTRIED = 64


Block = Sequence[Mapping[str, Any]]
"""The examples of a block: a batch for each shape, with the examples' ``position``s."""


class GradientCollector(lightning.LightningModule):
    """Turns examples into sketches of their per-timestep loss gradients.

    A row is ``S g_t / ‖g_t‖`` with ``g_t = ∇_θ L(θ; x, ε_t, t)`` over all attributed parameters
    (DMin, arXiv 2412.08637), for each readout, noise draw and timestep.

    Args:
        model: the diffusion model. It is not changed.
        sketch: the random linear map S; :class:`dmin.sketches.Auto` if none.
        timesteps: where gradients are taken.
        noise: at which examples and queries are noised; shared by all of them if not given.
        readouts: what is differentiated, names from ``dmin.models.READOUTS``; each costs one more
            backward pass.
        params: which parameters are attributed: ``all`` or a regular expression of their names.
        groups: parameters that get k numbers of their own, so that scores can be split between
            them: ``block``, ``layer``, or names with regular expressions; see
            :func:`dmin.sketches.grouped`. Rows have unit length over all groups together.
        microbatch: pairs of example and timestep in one forward pass; more is faster until memory
            ends. Results agree to rounding whatever it is, and to the bit only for the same one.
            ``auto`` tries sizes on the first block and notes what it found beside the store: one
            size for the whole store, all its processes and all that resume it on such a device.
        memory: for ``auto``: bytes that one pass may take beyond the weights, activations included.
            None: on a GPU most of what is free, on a CPU no limit.
        budget: bytes that per-example gradients may take at once; None chooses by device.
        gradient_checkpointing: recompute activations in backward, for less memory and more time,
            in networks that offer ``enable_gradient_checkpointing``.
        kernels: how the sketch is evaluated, to the same numbers but for rounding: ``auto`` by
            compiled loops on a CPU and by Triton on a GPU where it is installed, ``triton``, or
            ``torch``: plain operations.

    Attributes:
        peak: the memory that the last collection took in this process.
        between_passes: called before each pass; whatever it raises ends the work.

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
        super().__init__()
        unknown = [name for name in readouts if name not in READOUTS]
        if unknown or not readouts:
            raise DminError(
                f"collect.readouts={list(readouts)}: name one or more of {', '.join(READOUTS)}."
            )
        if microbatch != "auto" and (isinstance(microbatch, str) or microbatch < 1):
            raise DminError(
                f"collect.microbatch={microbatch}: give auto, or a number of pairs from 1 up."
            )
        self.model = model
        self.attributed = grouped(choose_parameters(model.network, params), groups)
        check_kernels(kernels)
        self.sketch = (sketch or Auto()).bind(self.attributed)
        self.sketch.kernels = kernels
        schedule = (timesteps or Stratified()).bind(getattr(model, "log_snr", None))
        self.timesteps = schedule(model.ladder)
        self.noise = noise or SharedNoise()
        self.readouts = tuple(readouts)
        self.microbatch = microbatch
        self.pairs = UNTRIED if isinstance(microbatch, str) else microbatch
        self.memory = memory
        self.budget = budget
        self.gradient_checkpointing = gradient_checkpointing
        # Fewer blocks may be left to do than there are processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.encodings: Encodings | None = None
        self.in_step: LockstepPasses | None = None  # with the other processes of a sharded network
        self._first: tuple[list[int], str] | None = None  # shape and name of the first example
        self.peak = PeakMemory(torch.device("cpu"))
        self.between_passes: Callable[[], None] = lambda: None

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The model's image and text encoders, by name; none for a model of pixels."""
        return getattr(self.model, "encoders", {})

    def collect(
        self,
        dataset: Dataset,
        path: str | Path,
        *,
        block_size: int = 32,
        dtype: str = "float16",
        segment_bytes: int = 64 << 20,
        seal_seconds: float = 60.0,
        workers: int = 0,
        encodings: str | Path | None = None,
        keep_encodings: bool = False,
        shard: int = 0,
        shards: int = 1,
        as_queries: bool = False,
        trainer: lightning.Trainer | None = None,
        stop: StopSignals | None = None,
        wait: float = 0.0,
    ) -> Store:
        """Collect the features of a dataset into a store, or the rest of them if some are there.

        The work is cut into blocks of consecutive examples. A killed run loses the blocks that were
        not sealed yet; the same call computes exactly what is missing, to the same bits on a CPU.

        A model with encoders is collected in two phases: each process first encodes its blocks into
        files, then its encoders leave the device, and the gradients start from the files. They are
        encoded in the encoders' own precision, whatever the trainer's is.

        Args:
            dataset: examples with stable ids.
            path: the store's folder; made, or resumed if its manifest is the same.
            block_size: examples a block.
            dtype: of the stored rows: ``float32``, ``float16``, ``bfloat16`` or ``int8`` (with a
                scale for each row and timestep).
            segment_bytes: rows are sealed into a file when they take this many bytes …
            seal_seconds: … or when this much time has passed: the most that a kill can cost.
            workers: processes that load examples.
            encodings: folder for the encodings; ``<path>.encodings`` if none.
            keep_encodings: leave them there for other stores of the same data; otherwise those of
                the shard are deleted when its rows are sealed.
            shard: do only this one of …
            shards: … so many parts of the dataset. Others may do the others at any time, and
                anywhere this folder is seen: all write into the one store.
            as_queries: the examples are queries, which some models differentiate another way
                (``query_guidance``); it makes no difference for the others.
            trainer: any Lightning trainer; :func:`predict_trainer` if none.
            stop: signals heard so far; if none, they are heard from here on.
            wait: seconds to let another process finish that is at work on the same blocks.

        Returns:
            The store, with all blocks of the shard. Complete, it is verified.

        Raises:
            DminError: bad data, a NaN gradient, a store of something else at that path, another
                process at the same blocks, or a process of this job that was lost.
            Stopped: a signal came; the block at hand was finished, and all is sealed.
        """
        path = Path(path)
        trainer = trainer or predict_trainer()
        share = Shard(shard, shards, trainer.global_rank, trainer.world_size)
        manifest = self.manifest(dataset, block_size, dtype, as_queries)
        encoded = self._encodings(manifest, encodings or path.with_name(f"{path.name}.encodings"))
        lost: dict[Shard, str] = {}
        with (
            stop or StopSignals() as stop,
            StoreWriter(
                path,
                manifest,
                segment_bytes=segment_bytes,
                seal_seconds=seal_seconds,
                verify=share == Shard(ranks=share.ranks),  # once is enough: the end verifies all
            ) as writer,
        ):
            pending = share.pending(writer.pending(), manifest.num_blocks)
            if pending:
                progress = Heartbeat(path, share)
                claim(progress, manifest.num_blocks, wait)
                pending = share.pending(writer.pending(), manifest.num_blocks)
                data = CollectData(dataset, pending, block_size, workers, is_sharded(trainer))
                work = Work(data, writer, progress, stop)
                self.encodings, self._first = encoded, None
                model = self.model
                try:
                    self.model = model.for_queries() if as_queries else model
                    lost = self._together(work, trainer)
                finally:
                    self.encodings, self.model = None, model
        store = finished(path, share, lost)
        if encoded is not None and not keep_encodings:
            if store.complete:
                encoded.remove()
            elif share.is_first:
                encoded.remove(share.range(manifest.num_blocks))
        return store

    def _together(self, work: Work, trainer: lightning.Trainer) -> dict[Shard, str]:
        """Do this process's blocks, and wait for the other processes; return who was lost."""
        with work.progress as progress:
            try:
                work.stop.between_blocks()
                predict(self, work, trainer)
                progress.say(state="waiting")
                return wait_for_others(progress, work.stop)
            except Stopped as stopped:
                stopped.gained = progress.gained
                progress.say(state="waiting")
                wait_for_others(progress, limit=SECONDS_TO_STOP)
                raise

    def configure_model(self) -> None:
        """Shard the network, where that is the trainer's strategy."""
        if self.device_mesh is not None:
            offload = getattr(self.trainer.strategy, "offload", False)
            mesh = self.device_mesh["data_parallel"]
            shard(self.model.network, mesh, offload, self.model.externally_called)

    def predict_step(self, block: Block, batch_idx: int) -> tuple[int, Arriving | None]:
        """Return the store rows of one block, with its first position in the dataset.

        A GPU may still be at them: nothing here waits for it. None for rows if the block is
        another process's, and was done to keep step with it.
        """
        if self.in_step is not None:
            points = self.noise.draws * len(self.timesteps)
            self.in_step.begin_block([len(batch["id"]) * points for batch in block])
        groups = zip(self.encode(block), block, strict=True)
        parts = [self._features(*encoded, batch["id"]) for encoded, batch in groups]
        if self.in_step is not None and not self.in_step.end_block(batch_idx):
            return min(block[0]["position"]), None
        positions = torch.tensor([place for batch in block for place in batch["position"]])
        order = positions.argsort()
        facts = [fact for b in block for fact in zip(b["id"], b["metadata"], strict=True)]
        ids, metadata = zip(*(facts[i] for i in order.tolist()), strict=True)
        arriving = [part.to_host() for part in parts]

        def joined(tensors: Sequence[Tensor]) -> Any:
            return torch.cat(list(tensors))[order].numpy()

        def rows() -> Rows:
            found = [wait() for wait in arriving]
            for part, batch in zip(found, block, strict=True):
                part.check_finite(batch["id"], self.timesteps)
            values = {name: joined([part.values[name] for part in found]) for name in self.readouts}
            norms = {name: joined([part.norms[name] for part in found]) for name in self.readouts}
            losses = joined([part.losses for part in found])
            return Rows(list(ids), list(metadata), values, norms, losses)

        return int(positions.min()), Arriving(list(ids), rows)

    def encode(self, block: Block) -> list[Encoded]:
        """Return a block's encodings: from their file while there are such, else from the model."""
        if self.encodings is None:
            return self.encode_anew(block)
        number = min(block[0]["position"]) // self.encodings.block_size
        loaded = self.encodings.load(number, self.device)
        found: list[Encoded] = self.trainer.precision_plugin.convert_input(loaded)
        self._check_shapes(found, block)
        return found

    def encode_anew(self, block: Block) -> list[Encoded]:
        """Return a block's encodings from the model."""
        with torch.no_grad():
            found = [self.model.encode(batch) for batch in block]
        self._check_shapes(found, block)
        return found

    def _check_shapes(self, encoded: Sequence[Encoded], block: Block) -> None:
        """Refuse a second shape while it is not said what the shapes share of the noise."""
        for (x0, _), batch in zip(encoded, block, strict=True):
            shape, name = list(x0.shape[1:]), batch["id"][0]
            self._first = self._first or (shape, name)
            if self.noise.shapes == "one" and shape != self._first[0]:
                raise DminError(
                    f"the examples have several shapes where they are noised: {self._first[1]!r} "
                    f"is {self._first[0]}, {name!r} {shape}. Say what they share of the noise: "
                    f"noise.shapes=field is one noise at each place, so that scores across shapes "
                    f"mean something; noise.shapes=own draws another for each shape. Or bring all "
                    f"to one size: data.size=<pixels> data.aspect=square."
                )

    def features(self, x0: Tensor, condition: Condition, ids: Sequence[str]) -> Features:
        """Return the features of encoded examples, once a GPU is done with them.

        Args:
            x0: ``[rows, ...]`` from ``model.encode``.
            condition: from ``model.encode``.
            ids: names of the examples.

        Raises:
            DminError: a gradient is NaN or infinite; the example and timestep are named. Or the
                GPU's memory ran out.
        """
        found = self._features(x0, condition, ids)
        found.check_finite(ids, self.timesteps)
        return found

    def _features(self, x0: Tensor, condition: Condition, ids: Sequence[str]) -> Features:
        passes = self.passes(x0, condition, ids)
        parts = []
        try:
            for pairs in torch.arange(passes.total).split(self.pairs):
                self.between_passes()
                parts.append(passes.run(pairs))
        except torch.OutOfMemoryError as error:
            raise DminError(
                f"a pass of {self.pairs} pairs of example and timestep ran out of GPU memory. Set "
                f"collect.microbatch, collect.memory or collect.budget lower, or "
                f"collect.gradient_checkpointing=true. Blocks finished before are kept."
            ) from error
        return Features.joined(parts, (len(x0), self.noise.draws, len(self.timesteps)))

    def passes(self, x0: Tensor, condition: Condition, ids: Sequence[str]) -> Passes:
        """Return the work on encoded examples, to be done in passes of any size.

        Args:
            x0: ``[rows, ...]`` from ``model.encode``.
            condition: from ``model.encode``.
            ids: names of the examples.
        """
        # Encoders leave strides of their own, with which kernels round differently.
        x0 = x0.contiguous()
        condition = {name: value.contiguous() for name, value in condition.items()}
        points = [(t, draw) for draw in range(self.noise.draws) for t in self.timesteps]
        names = ids if self.noise.per_example else [""]
        noise = torch.stack(
            [self.noise(x0.shape[1:], *point, name) for name in names for point in points]
        ).unflatten(0, (len(names), len(points)))
        noise = to_device(noise.to(x0.dtype), x0.device)
        t = to_device(torch.tensor([t for t, _ in points]), x0.device)

        def run(pairs: Tensor) -> Features:
            pairs = to_device(pairs, x0.device)
            row, point = pairs // len(points), pairs % len(points)
            drawn = noise[row if self.noise.per_example else torch.zeros_like(row), point]
            chosen = {name: value[row] for name, value in condition.items()}
            return self._pass(x0[row], drawn, t[point], chosen)

        in_step = run if self.in_step is None else self.in_step.padded(run)
        return Passes(len(x0) * len(points), in_step)

    def _pass(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Features:
        """One forward pass and one backward pass a readout; leading axis: pairs."""
        values, norms = {}, {}
        with (
            torch.enable_grad(),
            Capture(self.model.network, self.sketch, self.budget) as capture,
        ):
            prediction = self.model.predict(x0, noise, t, condition)
            self.peak.forward_done()
            for name in self.readouts:
                last = name == self.readouts[-1]
                rows = capture.backward(READOUTS[name](prediction), keep_graph=not last)
                norm = rows.squared_norm.sum(1).sqrt()
                # A gradient of exactly zero (a saturated loss) stays a row of zeros.
                scale = torch.where(norm > 0, norm, 1)[:, None, None]
                values[name] = rows.values / scale
                norms[name] = rows.squared_norm.sqrt()
            self.peak.backward_done()
            losses = READOUTS["loss"](prediction).detach()
        return Features(values, norms, losses)

    def describe(self) -> dict[str, Any]:
        """Return everything that must match between a training and a query store, as JSON."""
        entries = [list(entry) for entry in self.attributed.entries]
        loss = self.model.describe()
        digests = {} if "encoders" in loss else self._encoder_digests
        return {
            "schema": FEATURE_SCHEMA,
            "weights": weights_digest(self.model.network),
            **({"encoders": digests} if digests else {}),
            "parameters": {
                "count": self.attributed.count,
                "names": fingerprint({"entries": entries}),
            },
            "loss": loss,
            "noise": self.noise.describe(),
            "sketch": self.sketch.describe(),
        }

    def manifest(
        self,
        dataset: Dataset,
        block_size: int = 32,
        dtype: str = "float16",
        as_queries: bool = False,
    ) -> Manifest:
        """Return the manifest of this collector's store of a dataset."""
        described = describe_dataset(dataset)
        if as_queries:
            # Beside the examples, not among the features: the store is there to be compared.
            described.update(self.model.describe_query())
        return Manifest(self.layout(dtype), self.describe(), described, len(dataset), block_size)

    def layout(self, dtype: str = "float16") -> Layout:
        """Return the axes of this collector's features."""
        return Layout(
            readouts=self.readouts,
            draws=self.noise.draws,
            timesteps=self.timesteps,
            groups=self.attributed.groups,
            dim=self.sketch.dim,
            dtype=dtype,
        )

    def cached_encodings(
        self, store: Store, ids: Sequence[str], root: str | Path | None = None
    ) -> Encoded | None:
        """Return examples' encodings as :meth:`collect` kept them, None if it did not.

        Those of a store that grew or lost examples are not looked for.

        Args:
            store: that they were kept for.
            ids: of the examples; None is returned if one is not the store's.
            root: as ``encodings`` in :meth:`collect`.
        """
        path, manifest = store.path.with_name(f"{store.path.name}.encodings"), store.manifest
        folder = self._encodings(manifest, root or path)
        changed = manifest.revisions or store.removed
        if folder is None or changed or not set(store.ids).issuperset(ids):
            return None
        return folder.of_rows([store.index(id) for id in ids], manifest.num_examples)

    @cached_property
    def _encoder_digests(self) -> dict[str, str]:
        return {name: weights_digest(encoder) for name, encoder in self.encoders.items()}

    def _encodings(self, manifest: Manifest, root: str | Path) -> Encodings | None:
        """Return where the encodings of a dataset are kept; None for a model without encoders."""
        if not self.encoders:
            return None
        made_of = {
            "model": [manifest.features["loss"], manifest.features.get("encoders")],
            "dataset": manifest.dataset_fingerprint,
            "block_size": manifest.block_size,
        }
        return Encodings(root, fingerprint(made_of), manifest.block_size)
