"""How often a computation makes the host wait for an accelerator."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for an accelerator.

    On a CPU nothing waits, so the causes are counted: operators whose result or whose output's shape the host must
    see (`.item()`, `bool()`, `nonzero`, boolean indexing, `repeat_interleave` without `output_size`), which all pass
    the dispatcher, and `Tensor.tolist`, `.cpu` and `.numpy`, which on a CPU do not and are patched. `unique_dim` and
    `bincount` are left out: equal questions, and the length of a greedy loop, are looked for on a CPU alone.
    """

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = []
        for name in ("tolist", "cpu", "numpy"):
            self._patch(monkeypatch, name, getattr(torch.Tensor, name))

    def _patch(self, monkeypatch, name, original):
        def counted(tensor, *args, **kwargs):
            self.seen.append(name)
            with torch.utils._python_dispatch._disable_current_modes():  # one read, however many elements
                return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        open_ended = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.OPERATORS or by_mask or open_ended:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
