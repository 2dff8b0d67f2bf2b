"""A device that isn't there: the CPU in disguise, on which every wait for the device shows with its place in our code.

torch's private device, here "absent", behind tensors that hold their numbers on the CPU. So what runs on it gives the
numbers of a CPU, but torch sees another device: a tensor that stays behind on the CPU is an error, as on a GPU, and so
is anything that only the device knows and Python asks for. What a GPU would wait at is counted, not refused:

    copies without `non_blocking`, or from memory that is not pinned; a Python list made a tensor on the device
    `.item()`, `.tolist()`, `bool(tensor)`, `.cpu()`
    results whose size depends on numbers: boolean masks, `nonzero`, `unique`, `bincount`, `repeat_interleave`

A copy to the CPU that does not block holds NaN until an event recorded after it has been waited for. Streams have no
meaning here. Importing this module registers the device for the whole process: use it in a process of its own.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import hymate

NAME = "absent"
PACKAGE = Path(hymate.__file__).parent
aten = torch.ops.aten
SIZED_BY_NUMBERS = {
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "masked_select",
    "equal",
    "is_nonzero",
    "_local_scalar_dense",
}
# what CUDA's autocast lowers and widens, as far as our models use it
LOWERED = ("matmul", "linear", "mm", "bmm", "addmm", "baddbmm", "conv1d", "einsum", "scaled_dot_product_attention")
WIDENED = ("exp", "expm1", "log", "log1p", "pow", "rsqrt", "softplus", "rms_norm", "huber_loss", "sum", "cumsum")
WIDENED += ("prod", "softmax", "log_softmax", "binary_cross_entropy_with_logits", "nll_loss", "reciprocal", "norm")


class AbsentTensor(Tensor):
    """Says that it is on the absent device; `held` has the numbers."""

    held: Tensor
    is_cuda = True  # it stands for one
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> AbsentTensor:
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, **shape, dtype=held.dtype, device=torch.device(NAME, 0), requires_grad=False
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"AbsentTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        _watches[-1].wait("tolist")
        return self.held.tolist()

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError("numpy cannot read a tensor on the absent device: copy it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the absent device outside of `watch`")


class Watch(TorchDispatchMode):
    """Runs everything that concerns the device, and counts the waits by place: {"model.py:107 nonzero": 2}."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.pinned: dict[int, Tensor] = {}
        self.under_way: list[tuple[Tensor, Tensor]] = []

    def wait(self, reason: str) -> None:
        """Count one."""
        frames = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_stack(None)]
        file, line = next(((path, line) for path, line in frames if path.is_relative_to(PACKAGE)), (Path("none"), 0))
        self.waits[f"{file.name}:{line} {reason}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().removeprefix("aten::").split(".")[0]
        there: list[Tensor] = []
        here: list[Tensor] = []
        for tensor in _tensors(*args, *kwargs.values()):
            (there if isinstance(tensor, AbsentTensor) else here).append(tensor)
        device = kwargs.get("device")
        to_it = device is not None and torch.device(device).type == NAME
        if name in ("is_pinned", "_pin_memory"):
            return self._pinning(name, *args)
        if func is torch.ops.prim.device.default:
            return torch.device(NAME, 0) if there else func(*args, **kwargs)
        if not there and not to_it:
            return func(*args, **kwargs)
        if name == "_fused_sdp_choice":
            return 0  # plain attention
        if name == "_to_copy":
            return self._copied(args[0], kwargs, to_it, device)
        self._judge(func, name, args, kwargs, there, here)
        if to_it:
            kwargs["device"] = torch.device("cpu")
        out = STAND_INS.get(name, func)(*_mapped(_held, args), **_mapped(_held, kwargs))
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():
                func(*args, **kwargs)  # the disguise has a shape, too
        return self._returned(args, out)

    def _judge(self, func: Any, name: str, args: Any, kwargs: Any, there: list[Any], here: list[Tensor]) -> None:
        if name in SIZED_BY_NUMBERS:
            self.wait(name.strip("_"))
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait(name)
        elif name in ("index", "index_put", "index_put_", "_unsafe_index"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.wait("boolean mask")
            elif any(not isinstance(index, AbsentTensor) for index in indices):
                self.wait("index from the CPU")
            here = [each for each in here if not any(each is index for index in indices)]
        elif name == "copy_":
            if not isinstance(args[0], AbsentTensor) or (here and here[0].ndim):
                self.wait("copy")
            return
        elif name == "where" and here:
            self.wait("number from the CPU")
        spread = torch.Tag.pointwise in func.tags or name in ("where", "index_put", "index_put_", "fill_")
        left = [each for each in here if each.ndim or not spread]
        if left and there:
            raise RuntimeError(f"{func}: {[tuple(each.shape) for each in left]} stayed on the CPU")

    def _copied(self, x: Tensor, kwargs: dict[str, Any], to_it: bool, device: Any) -> Tensor:
        leaving = isinstance(x, AbsentTensor) and device is not None and not to_it
        blocking = not kwargs.get("non_blocking", False)
        out = aten._to_copy(_held(x), **{**kwargs, "device": torch.device("cpu")})
        if leaving:
            if blocking:
                self.wait("copy to the CPU")
            else:
                self.under_way.append((out, out.clone()))
                out.fill_(torch.nan if out.is_floating_point() else 77)
            return out
        if not isinstance(x, AbsentTensor) and (blocking or not self._pinning("is_pinned", x)):
            self.wait("copy from the CPU")
        return AbsentTensor(out)

    def arrive(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        """These copies to the CPU are done."""
        for out, numbers in copies:
            out.copy_(numbers)

    def _pinning(self, name: str, x: Tensor, *_: Any) -> Any:
        if name == "is_pinned":
            return x.untyped_storage().data_ptr() in self.pinned
        out = x.clone()
        self.pinned[out.untyped_storage().data_ptr()] = out  # kept, lest its place be reused
        return out

    def _returned(self, args: Any, out: Any) -> Any:
        """What came out, on the device; what was written in place is the argument itself."""
        written = {id(_held(each)): each for each in _tensors(*args) if isinstance(each, AbsentTensor)}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return written.get(id(x)) if id(x) in written else AbsentTensor(x)

        return _mapped(wrapped, out)


def _gru_cell(
    inputs: Tensor, hidden: Tensor, h: Tensor, input_bias: Tensor, hidden_bias: Tensor
) -> tuple[Tensor, Tensor]:
    ir, iz, i_n = (inputs + input_bias).chunk(3, 1)
    hr, hz, hn = (hidden + hidden_bias).chunk(3, 1)
    r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    n = torch.tanh(i_n + r * hn)
    return n + z * (h - n), torch.cat([r, z, n, h, hn], dim=1)


def _gru_cell_backward(grad: Tensor, workspace: Tensor, has_bias: bool) -> tuple[Tensor, ...]:
    r, z, n, h, hn = workspace.chunk(5, 1)
    dn = grad * (1 - z) * (1 - n * n)
    dr, dz = dn * hn * r * (1 - r), grad * (h - n) * z * (1 - z)
    inputs, hidden = torch.cat([dr, dz, dn], dim=1), torch.cat([dr, dz, dn * r], dim=1)
    return inputs, hidden, grad * z, inputs.sum(0), hidden.sum(0)


# kernels that torch has for accelerators only
STAND_INS: dict[str, Callable[..., Any]] = {
    "_thnn_fused_gru_cell": _gru_cell,
    "_thnn_fused_gru_cell_backward": _gru_cell_backward,
}


def _held(x: Any) -> Any:
    return x.held if isinstance(x, AbsentTensor) else x


# operators take and give tuples and lists: torch's trees, which know more, would take most of a step's time


def _tensors(*given: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for x in given:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list)):
            found += _tensors(*x)
    return found


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)([_mapped(function, each) for each in x])
    if isinstance(x, dict):
        return {key: _mapped(function, value) for key, value in x.items()}
    return function(x)


# ------------------------------------------------------------------------------------- what torch asks of a device

_watches: list[Watch] = []


class Event:
    """Of a copy: once waited for, what was copied before is there."""

    def __init__(self, **_: Any) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def record(self, *_: Any) -> None:
        self._copies, _watches[-1].under_way = _watches[-1].under_way, []

    def synchronize(self) -> None:
        _watches[-1].arrive(self._copies)
        self._copies = []


class Stream:
    """One stream is like another here."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> Event:
        event = Event()
        event.record()
        return event


class Device:
    """The module torch.absent."""

    Event, Stream = Event, Stream

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The CPU's generator draws."""

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self, *_: Any) -> Stream:
        return Stream()

    def device(self, *_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def stream(self, *_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _autocast(name: str, lowered: bool) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        def cast(x: Any) -> Any:
            if isinstance(x, Tensor) and x.is_floating_point() and x.device.type == NAME and x.dtype != torch.float64:
                return x.to(torch.get_autocast_dtype(NAME) if lowered else torch.float32)
            return x

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return getattr(aten, name)(*_mapped(cast, args), **_mapped(cast, kwargs))

    return kernel


def _register() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend(NAME, Device())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    operators = torch.library.Library("aten", "IMPL")
    for names, lowered in ((LOWERED, True), (WIDENED, False)):
        for name in names:
            for overload in getattr(aten, name).overloads():
                if overload != "out" and not overload.endswith("_out"):
                    operators.impl(
                        getattr(getattr(aten, name), overload), _autocast(name, lowered), "AutocastPrivateUse1"
                    )
    return [everything, operators]


_libraries = _register()


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """The device is there inside; give what waits there were."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) copies where the mode sees it
    with torch.autograd.set_multithreading_enabled(False), Watch() as seen:  # the backward in this thread, too
        _watches.append(seen)
        try:
            yield seen
        finally:
            _watches.pop()
