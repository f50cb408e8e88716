"""Modules that are copied, but not pickled."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, Self, SupportsIndex

from torch import nn

from lobcq_fx.errors import LobcqError


class NotPickled(nn.Module):
    """Its graphs call operators, which have no pickled form, and whoever unpickles runs code from the file."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise LobcqError(
            f"a {type(self).__name__} is not pickled, by torch.save neither: save_pretrained(folder) writes it,"
            " lobcq_fx.load(folder) opens it, in another process too"
        )

    # copy goes by __reduce_ex__ where these are missing.
    def __copy__(self) -> Self:
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin
