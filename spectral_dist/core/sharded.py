"""The base class of all optimizers: parameters under any layout, stepped alike on all ranks."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spectral_dist._error_help import explained
from spectral_dist.core import agreement as agreeing
from spectral_dist.core.agreed_steps import AgreedSteps
from spectral_dist.core.agreement import Agreement, Grads
from spectral_dist.core.matrix_ops import Observer
from spectral_dist.core.monitor import Monitor, Watch, add_up
from spectral_dist.core.precision import without_autocast
from spectral_dist.core.unique_names import with_unique_names
from spectral_dist.core.units import Unit
from spectral_dist.core.written_options import WrittenOptions
from spectral_dist.params.param_groups import split_by_kind
from spectral_dist.params.spec import WRONG_KIND, ParamSpec
from spectral_dist.placement.base import ParamGroup, Placement
from spectral_dist.placement.dtensor import MeshPlacement
from spectral_dist.rules import adamw
from spectral_dist.rules.adamw import AdamWOptions
from spectral_dist.rules.backends import BACKENDS
from spectral_dist.rules.fields import plain
from spectral_dist.rules.group_options import RULE, group_options
from spectral_dist.rules.options import BaseOptions
from spectral_dist.sharding import collectives
from spectral_dist.sharding.collectives import Group, Meter
from spectral_dist.sharding.layout import Located


class ShardedOptimizer(AgreedSteps):
    """An optimizer with the same numbers under every layout of its parameters.

    In plain torch a group is stepped with its ``lr``: ``scalar_lr`` is that of AdamW's groups, and
    schedulers multiply or write each group's own. Under DeepSpeed and Megatron, whose schedulers
    write one lr into all groups, it is multiplied by the group's ``lr_ratio``; likewise in groups
    that older releases have saved in plain torch.

    Args:
        params: ``spectral_dist.param_groups(model)``; or parameters, or groups of them, that
            ``spectral_dist.tag(model)`` has tagged.
        lr: learning rate.
        process_group: the ranks that hold replicas of plain parameters. None: those of the
            DistributedDataParallel that ``param_groups`` was given, or this process alone.
        placement: where parameters live, from a framework's integration. None: plain tensors and
            DTensors (FSDP2, HSDP, tensor parallelism), as torch has them.
        options: of ``options_type``.

    Attributes:
        observers: called with names and values (k, m, n) of what this rank orthogonalizes.
        monitor: see ``spectral_dist.monitor``; on every rank, or on rank 0 alone.
        after_load: called on every rank when a checkpoint has been loaded.
        checks: called before every step; a ValueError that one raises, all ranks raise.
        meter: calls and bytes of this rank's exchanges; ``comm_bytes`` is their sum.

    Raises:
        ValueError: unknown or bad options, frozen or untagged parameters.
    """

    meter: Meter

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        *,
        process_group: Group = None,
        placement: Placement | None = None,
        **options: Any,
    ) -> None:
        if lr is not None:
            options = {"lr": lr, **options}
        self.options = self.options_type.from_user(options, type(self).__name__)
        if placement is not None and process_group is not None:
            raise ValueError(
                "process_group is given beside placement, which knows the groups; leave it out"
            )
        self.begin(placement or self._placement(process_group))
        self._has_one_lr = placement is not None
        self._built_rates = {}
        self.routes: list[list[ParamSpec]] = []
        self._warned: set[str] = set()
        self._agreement = Agreement()
        scheduled = ("lr", "weight_decay", "betas", "momentum")  # what schedulers look for
        defaults = {n: getattr(self.options, n) for n in scheduled if hasattr(self.options, n)}
        if isinstance(options.get("lr"), Tensor):  # as torch's, for those who write into it
            defaults["lr"] = options["lr"]
        super().__init__(split_by_kind(params, options=self.options_type), defaults)

    def begin(self, placement: Placement | None) -> None:
        """Set all attributes that are not copied, as before the first step."""
        self.placement = placement or self._placement(None)
        self._has_one_lr = False
        self.meter = Meter()
        self.observers: list[Observer] = []
        self.monitor: Monitor | None = None
        self.after_load: list[Callable[[], None]] = []
        self.checks: list[Callable[[], None]] = []
        self._units: dict[object, list[Unit]] = {}
        self._written = WrittenOptions()
        self._scalar_update = BACKENDS[self.options.scalar_backend]()
        self._last_step = None
        self._is_failing = False

    def _placement(self, group: Group) -> Placement:
        """Return the placement for plain torch, which reads it off the parameters."""
        return MeshPlacement(group, getattr(self.options, "replicate_momentum", False))

    @explained
    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add parameters; a group of both kinds becomes two."""
        for group in split_by_kind([param_group], options=self.options_type):
            group = {**group, "routes": with_unique_names(group["routes"], self.all_routes)}
            if group["kind"] not in self.options_type.kinds():
                raise ValueError(WRONG_KIND[group["kind"]])
            group_values = group_options(group, self.options, self._has_one_lr)
            carried = self.finalize_group(group_values, group["routes"])
            carried["id"], carried[RULE] = len(self.routes), self.rule_name
            self.rate(carried)
            self.routes.append(group["routes"])
            super().add_param_group({**carried, "params": group["params"]})
            for name in self.defaults.keys() - carried.keys():
                del self.param_groups[-1][name]  # torch gives every group all defaults

    def finalize_group(self, carried: ParamGroup, routes: Sequence[ParamSpec]) -> ParamGroup:
        """Return a new group's options, with those that depend on its parameters."""
        return carried

    @property
    def comm_bytes(self) -> int:
        """Return the bytes that this rank has sent to other ranks in the optimizer's exchanges."""
        return sum(self.meter.bytes.values())

    @property
    def all_routes(self) -> list[ParamSpec]:
        """Return the spec of every parameter in the optimizer."""
        return [route for routes in self.routes for route in routes]

    @property
    def all_units(self) -> list[Unit]:
        """Return all units that have been located."""
        return [unit for units in self._units.values() for unit in units]

    @property
    def device(self) -> torch.device:
        """Return the device on which matrices are computed and collectives run."""
        if self.all_units:
            return self.all_units[0].located.device
        groups = [g for g in self.placement.world_groups() if collectives.size(g) > 1]
        return collectives.device_of(groups[0]) if groups else torch.device("cpu")

    @property
    def is_monitored(self) -> bool:
        """Return whether any rank has a monitor, as of the last step."""
        return self._agreement.monitor_every > 0

    def move_to(self, placement: Placement) -> None:
        """Replace the placement, after a framework has taken over the parameters.

        Raises:
            ValueError: parameters have been located already.
        """
        if self._units:
            raise ValueError(
                "this optimizer has taken steps, or a checkpoint, where its parameters lived"
                " before; build a new one"
            )
        self.share_one_lr()
        self.placement = placement

    def steps_taken(self) -> int:
        """Return the largest number of steps in this rank's states."""
        counts = [s["step"] for s in self.state.values() if isinstance(s, dict) and "step" in s]
        return int(max(map(float, counts), default=0.0))

    @explained
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimizer step on the current gradients.

        A collective call of the ranks that train the model together. On GPUs it does not wait for
        the device, but in the first step, in steps that the monitor reports, and where a rule, an
        option or a framework says so. A flag on the device keeps a step that must not be taken
        from changing anything, and the call after that raises the error (see ``check_last_step``).
        With check_finite=False ranks agree in the first step only, and a rank raises by itself for
        an error in its options.

        Raises:
            ValueError: on every rank and before anything has changed, if a gradient is NaN or
                infinite, if ranks differ in which parameters have one, or if a scheduler has
                written a bad option: in this step, or on GPUs in the one before.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.prepare_placement()
        if not self.placement.is_ready:
            return loss
        work = [(group, unit) for group in self.param_groups for unit in self.units(group)]
        tensors = [[group["params"][i] for i in unit.tensors] for group, unit in work]
        grads: list[Grads] = [[self.placement.gradient(p) for p in params] for params in tensors]
        with without_autocast(self.device):
            if not self._agree(work, grads):
                return loss
            absent = agreeing.without_gradient([unit for _, unit in work], grads)
            if self._is_failing:
                grads = [[None] * len(params) for params in tensors]
            for name in (name for name in absent if name not in self._warned):
                self._warned.add(name)
                what = f"{name} has no gradient, so it is left as it is in this step"
                warnings.warn(what, stacklevel=2)
            self._take_step(list(zip(work, tensors, grads, strict=True)))
        return loss

    def _take_step(
        self, work: Sequence[tuple[tuple[ParamGroup, Unit], Sequence[Tensor], Grads]]
    ) -> None:
        every = self._agreement.monitor_every
        number = self.steps_taken() + 1 if every else 0
        watches: list[Watch] | None = [] if every and number % every == 0 else None
        self.begin_step(watches)
        for (group, unit), tensors, grads in work:
            if group["kind"] == "matrix":
                self.step_matrices(group, unit, tensors, grads)
            else:
                self.step_scalars(group, tensors, grads)
        self.end_step()
        if watches is not None:
            report, error = add_up(watches, self.meter), None
            if self.monitor is not None and watches:
                try:
                    self.monitor.write(number, report)
                except Exception as raised:
                    error = raised
            collectives.raise_together(error, self.placement.world_groups())

    def begin_step(self, watches: list[Watch] | None) -> None:
        """Begin a step; a step that is reported appends its watches to ``watches``."""

    def end_step(self) -> None:
        """End a step; a collective call."""

    @abstractmethod
    def step_matrices(
        self, group: ParamGroup, unit: Unit, tensors: Sequence[Tensor], grads: Grads
    ) -> None:
        """Take the rule's step on a unit of matrices; a collective call."""

    def step_scalars(self, group: ParamGroup, tensors: Sequence[Tensor], grads: Grads) -> None:
        """Take AdamW's step, elementwise, on parameters of one unit."""
        present = [(p, g) for p, g in zip(tensors, grads, strict=True) if g is not None]
        if not present:
            return
        states = [self.state[p] for p, _ in present]
        self.count_step(states, 0)
        local = self.placement.local
        self._scalar_update(
            self.scalar_options(group),
            self.lr_of(group),
            [local(p) for p, _ in present],
            [g for _, g in present],
            [{name: local(value) for name, value in state.items()} for state in states],
            **self.skip_argument,
        )

    @property
    def skip_argument(self) -> dict[str, Tensor]:
        """Return the argument ``skip`` of what writes, if the device decides on this step."""
        return {} if self._last_step is None else {"skip": self._last_step.skip}

    def count_step(self, states: Sequence[dict[str, Tensor]], count: int = 1) -> None:
        """Add to the step counts of parameters; it is taken back if the device skips the step.

        Each gets a new tensor on the CPU: a universal checkpoint shares the count, torch.load may
        have moved it to a GPU, and a state dict may hold it.

        Args:
            states: of the parameters.
            count: to add; 0 where the update itself adds 1.
        """
        before = [state["step"] for state in states]
        counts = torch._foreach_add([c.cpu() for c in before], count) if before else ()
        for state, value in zip(states, counts, strict=True):
            state["step"] = value
        if self._last_step is not None:
            self._last_step.undo.append(partial(_restore_counts, states, before))

    def scalar_options(self, group: ParamGroup) -> AdamWOptions:
        """Return the options of AdamW's step of a group."""
        beta1, beta2 = map(plain, group["betas"])
        return AdamWOptions((beta1, beta2), plain(group["eps"]), plain(group["weight_decay"]))

    def check_group(self, group: ParamGroup) -> None:
        """Raise a ValueError for a bad option that something has written into a group."""
        self._written.check(self.options, group, self.take_over)

    def take_over(self, group: ParamGroup, options: BaseOptions) -> None:
        """Update what depends on a group's options, after they have changed."""

    def can_skip(self) -> bool:
        """Return whether a flag on the device can keep a step from changing anything."""
        return self._scalar_update is adamw.update

    @explained
    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does.

        Raises:
            ValueError: on a GPU, if the last step was not applied and its error not yet raised.
        """
        self.refuse_skipped_step()
        return super().state_dict()

    def prepare_placement(self) -> None:
        """Bring the placement up to date with the parameter groups."""
        self.placement.prepare(self, self.all_routes, self.meter)

    def initialize_state(self) -> None:
        """Locate all parameters and create their states; a collective call the first time."""
        self.prepare_placement()
        for group, tensors in self.placement.param_batches(self):
            self.units(group, tensors)

    def units(self, group: ParamGroup, tensors: Sequence[Tensor] | None = None) -> list[Unit]:
        """Return a group's units, and create their states; a collective call the first time.

        Args:
            group: the parameter group.
            tensors: what the framework steps on, in place of the group's "params".

        Raises:
            ValueError: on every rank, if parameters of any cannot be located.
        """
        tensors = list(group["params"] if tensors is None else tensors)
        routes = self.routes[group["id"]]
        if not tensors and not (self.placement.may_lack_params and routes):
            return []
        self.prepare_placement()
        key = self.placement.cache_key(group, tensors)
        if key not in self._units:
            self._units[key] = self._locate(group, routes, tensors)
        for unit in self._units[key]:
            for index, i in enumerate(unit.tensors):
                self.ensure_state(group, unit, index, tensors[i])
        return self._units[key]

    def _locate(
        self, group: ParamGroup, routes: Sequence[ParamSpec], tensors: Sequence[Tensor]
    ) -> list[Unit]:
        groups = self.placement.world_groups()
        error: Exception | None = None
        try:
            self.placement.check(routes, tensors)
        except (ValueError, RuntimeError) as raised:
            error = raised
        collectives.raise_together(error, groups)
        located: list[Located] = []
        try:
            located = self.placement.locate(group, routes, tensors)
        except (ValueError, RuntimeError) as raised:
            error = raised
        collectives.raise_together(error, groups)
        units = [self._agreed(group, place, tensors) for place in located]
        self._written.keep_shaping(self.options, group)
        return units

    def _agreed(self, group: ParamGroup, located: Located, tensors: Sequence[Tensor]) -> Unit:
        """Build a unit, after checking that its ranks have the same optimizer and options."""
        lines = agreeing.option_lines(type(self).__name__, self.options, group)
        groups, what = (located.group, located.replicas), "on the optimizer's options"
        collectives.assert_same(lines, groups, located.device, what)
        return self.make_unit(group, located, tensors)

    def make_unit(self, group: ParamGroup, located: Located, tensors: Sequence[Tensor]) -> Unit:
        """Build a unit of parameters that are sharded alike; a collective call."""
        return Unit(located)

    def ensure_state(self, group: ParamGroup, unit: Unit, index: int, p: Tensor) -> None:
        """Create a parameter's state, before the first step, so that all ranks have equal keys."""
        if "exp_avg" not in self.state[p]:
            self.state[p].update(adamw.new_state(p))

    def check_observers(self) -> None:
        """Raise a ValueError if there are observers, but no whole matrices to show them."""


def _restore_counts(states: Sequence[dict[str, Tensor]], counts: Sequence[Tensor]) -> None:
    """Write the step counts of parameters back."""
    for state, count in zip(states, counts, strict=True):
        state["step"] = count
