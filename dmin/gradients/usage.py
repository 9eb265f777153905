"""Record which module of a network uses which parameters, call by call.

While watched, parameters report every operation that computes with them, and modules report when
their forward begins and ends. A use belongs to the innermost module that was running.
"""

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, register_module_forward_hook
from torch.utils import _pytree as pytree

from dmin.gradients.parameters import plain_name
from dmin.gradients.reporting import reporting_class
from dmin.runtime.errors import DminError

Token = TypeVar("Token")


@dataclass
class Use(Generic[Token]):
    """One call of a module that uses parameters itself.

    Args:
        name: the module's dotted name.
        module: the module.
        used: names of the parameters.
        within: tokens that ``report`` returned for calls inside this one.
        args: the call's positional arguments.
        kwargs: its keyword arguments.
        output: its output.
    """

    name: str
    module: nn.Module
    used: set[str] = field(default_factory=set)
    within: list[Token] = field(default_factory=list)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None


class ParameterUsage(Generic[Token]):
    """Context in which the uses of some parameters are reported.

    Inside, all parameters of the network are frozen. On exit, they and the hooks are restored.

    Args:
        network: the network.
        chosen: the parameters to report, by name.
        report: called for each use when the module's forward ends. Returns the output with which
            to replace the module's, and a token of the call. None: the use counts as one of the
            module around.
        by_network: names of parameters whose uses count as uses of the whole network.
        changing: names of modules that may change their arguments, which are copied for the report.

    Attributes:
        lost: parameters whose use no module could report, with the reason.
        batch: number of examples, according to the network's arguments; None before its call.
        scalars: the integers, flags and strings among these arguments, over all calls.
    """

    def __init__(
        self,
        network: nn.Module,
        chosen: Mapping[str, nn.Parameter],
        report: Callable[[Use[Token]], tuple[Any, Token] | None],
        by_network: Collection[str] = (),
        changing: Collection[str] = (),
    ) -> None:
        self.network = network
        self._by_network, self._changing = by_network, changing
        self._name_of = {id(p): name for name, p in chosen.items()}
        # By module and name, not by identity: a sharded module replaces its parameters in forward.
        self._held: dict[int, dict[str, str]] = {}
        self._holders: dict[str, tuple[nn.Module, str]] = {}
        self._names: dict[int, str] = {}  # of the modules with hooks
        for module in network.modules():
            held = {
                local: self._name_of[id(parameter)]
                for local, parameter in module._parameters.items()
                if id(parameter) in self._name_of
            }
            self._held[id(module)] = held
            self._holders |= {name: (module, local) for local, name in held.items()}
        self._report = report
        self._chosen = chosen
        self._reporting = reporting_class(self._note)
        self._undo = ExitStack()
        self._ignore = self._replay = False
        self.forget()

    def forget(self) -> None:
        """Forget the forward passes so far."""
        self.lost: dict[str, str] = {}
        self.batch: int | None = None
        self.scalars: list[int | str] = []
        self._arguments: set[int] = set()  # memory addresses of the network's arguments
        self._running: list[Use[Token]] = []

    def __enter__(self) -> Self:
        """Freeze the parameters, have them report, and hook the modules that hold them."""
        holding: dict[int, bool] = {}
        with ExitStack() as undo:
            for name, module in self.network.named_modules():
                if self._holds(module, holding):
                    self._watch(plain_name(name), module, undo)
            if _global_forward_hooks:  # of others, which run before a module's own
                end = register_module_forward_hook(self._ended, with_kwargs=True, always_call=True)
                cast(OrderedDict, _global_forward_hooks).move_to_end(end.id, last=False)
                undo.callback(end.remove)
            for parameter in self.network.parameters():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            self._undo = undo.pop_all()
        self._have_report(self._chosen)
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the network."""
        self._undo.close()
        self.forget()

    def replaying(self) -> AbstractContextManager[None]:
        """Context for recomputation by a checkpoint: report uses, but do not record lost ones."""
        return self._with("_replay")

    def off(self) -> AbstractContextManager[None]:
        """Context in which uses are ignored."""
        return self._with("_ignore")

    @contextmanager
    def _with(self, flag: str) -> Iterator[None]:
        setattr(self, flag, True)
        try:
            yield
        finally:
            setattr(self, flag, False)

    def own(self, module: nn.Module) -> dict[str, str]:
        """Return the names of the chosen parameters that a module holds itself, by local name."""
        return self._held.get(id(module), {})

    def now(self, names: Collection[str]) -> dict[str, nn.Parameter]:
        """Return the current parameters of their modules: whole ones, while a sharded module runs.

        Raises:
            DminError: a parameter is sharded at the moment.
        """
        found = {}
        for name in sorted(names):
            module, local = self._holders[name]
            found[name] = cast(nn.Parameter, module._parameters[local])
            _require_whole(name, found[name])
        return found

    def _holds(self, module: nn.Module, known: dict[int, bool]) -> bool:
        """Return whether a module or one of its submodules holds a chosen parameter."""
        if id(module) not in known:
            within = [self._holds(x, known) for x in module._modules.values() if x is not None]
            known[id(module)] = any(within) or bool(self.own(module))
        return known[id(module)]

    def sees_examples(self, x: Tensor) -> bool:
        """Return whether a tensor is assumed to have rows of the examples.

        It is if it has ``batch`` rows, or comes from a layer or from the network's arguments.
        Others may be constants, such as a table, whose size is by chance a multiple of the batch.
        (A constant with exactly ``batch`` rows is not recognised.)
        """
        known = x.requires_grad or (x.ndim > 0 and len(x) == self.batch)
        return self.batch is None or known or _place(x) in self._arguments

    def _watch(self, name: str, module: nn.Module, undo: ExitStack) -> None:
        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._begin(Use(name, module), args, kwargs)

        self._names[id(module)] = name
        undo.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
        if _global_forward_hooks:
            return
        # First at the end: a sharded module gives its parameters back in a hook of its own, and
        # hooks of others may make something else of the output.
        end = module.register_forward_hook(
            self._ended, prepend=True, with_kwargs=True, always_call=True
        )
        undo.callback(end.remove)

    def _ended(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        name = self._names.get(id(module))
        return output if name is None else self._end(name, args, kwargs, output)

    def _note(self, parameter: nn.Parameter) -> None:
        """Record that an operation used a parameter."""
        name = self._name_of[id(parameter)]
        if self._ignore:
            return
        if self._running:
            self._running[-1].used.add(name)
        elif torch.is_grad_enabled():
            self._lose({name}, "used outside the network's forward")

    def _have_report(self, parameters: Mapping[str, nn.Parameter | None]) -> None:
        """Have parameters report their uses. Of sharded ones, the gathered copies report."""
        for name, parameter in parameters.items():
            if type(parameter) is nn.Parameter:
                self._undo.callback(setattr, parameter, "__class__", nn.Parameter)
                parameter.__class__ = self._reporting
                self._name_of[id(parameter)] = name

    def _begin(self, use: Use[Token], args: tuple, kwargs: dict) -> None:
        """Record that a module's forward begins."""
        if _shards(use.module):
            for module in use.module.modules():
                own = self.own(module).items()
                self._have_report({name: module._parameters.get(local) for local, name in own})
        if self._ignore:
            return
        if use.module is self.network:
            leaves = pytree.tree_leaves((args, kwargs))
            tensors = [x for x in leaves if isinstance(x, Tensor)]
            self.scalars += [x for x in leaves if isinstance(x, int | str)]
            sizes = Counter(len(x) for x in tensors if x.ndim)
            self.batch = sizes.most_common(1)[0][0] if sizes else None
            self._arguments = {_place(x) for x in tensors if x.ndim and len(x) == self.batch}
        for local, name in self.own(use.module).items():
            parameter = use.module._parameters.get(local)
            if parameter is None:
                continue
            _require_whole(name, parameter)
            if not isinstance(parameter, self._reporting):
                use.used.add(name)  # it cannot report: assume that it is used
        if use.name in self._changing:
            use.args, use.kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        self._running.append(use)

    def _end(self, name: str, args: tuple, kwargs: dict, output: Any) -> Any:
        """Report the uses of a module whose forward has ended."""
        if self._ignore or not any(use.name == name for use in reversed(self._running)):
            return output
        while (use := self._running.pop()).name != name:
            pass  # a module whose forward ended without calling the hook
        if output is None and sys.exc_info()[0] is not None:
            return output  # an exception ended the forward
        around = self._running[-1] if self._running else None
        if around is not None:
            around.within += use.within
        use.used.difference_update(self._by_network)
        if use.module is self.network:
            use.used.update(self._chosen.keys() & self._by_network)
        if not use.used:
            return output
        if name not in self._changing:
            use.args, use.kwargs = args, kwargs
        use.output = output
        reported = self._report(use)
        if reported is not None:
            output, token = reported
            if around is not None:
                around.within.append(token)
        elif around is not None:
            around.used |= use.used
        else:
            self._lose(use.used, f"{name or 'the network'} has no row for each example")
        return output

    def _lose(self, names: set[str], reason: str) -> None:
        if not self._replay:
            self.lost |= dict.fromkeys(names, reason)


def _shards(module: nn.Module) -> bool:
    """Return whether a module gathers its parameters when it runs (FSDP2)."""
    return hasattr(type(module), "reshard")


def _require_whole(name: str, parameter: nn.Parameter) -> None:
    """Refuse a parameter of which this process has only a shard."""
    if hasattr(parameter, "full_tensor"):
        raise DminError(
            f"{name} was used outside of the block that contains it, where it is sharded over "
            f"processes (trainer=fsdp, trainer=offload). List the module that is called there in "
            f"the model's `externally_called`, or leave the parameter out with params=<regex>."
        )


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
