"""Which file of a folder has which tensor: one file has all, or shards have them, and an index of these.

Split by the rule of transformers' `save_pretrained`, and named as it names them but for the first word: whoever reads
float models is not to find them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory

from lobcq_fx.errors import CheckpointError, ConfigError
from lobcq_fx.storage.files import json_object
from lobcq_fx.storage.index import TensorDigest
from lobcq_fx.storage.weights_file import size_of

WEIGHTS, SHARD_INDEX = "lobcq.safetensors", "lobcq.safetensors.index.json"

MAX_SHARD_SIZE = "50GB"
"""As transformers' `save_pretrained` has it."""

_NAMES = "lobcq{suffix}.safetensors"
_SHARD = re.compile(r"lobcq-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Shards:
    """files: the names of the tensors of each file, by its name."""

    files: Mapping[str, tuple[str, ...]]

    @classmethod
    def split(cls, tensors: Mapping[str, TensorDigest], max_shard_size: int | str | None = None) -> Shards:
        """Tensors in their order, as many in a file as it has room for; one that is larger is alone in its own.

        Args:
            tensors: dtypes and shapes, by name.
            max_shard_size: of a file's tensors, in bytes or with a unit (KB, MB, GB, TB); None means `MAX_SHARD_SIZE`.

        Raises:
            ConfigError: it is no size.
        """
        size = MAX_SHARD_SIZE if max_shard_size is None else max_shard_size
        try:
            if not isinstance(size, (int, str)) or (isinstance(size, int) and size < 1):
                raise ValueError("a file holds at least a byte.")
            found = split_state_dict_into_shards_factory(
                dict(tensors), get_storage_size=size_of, filename_pattern=_NAMES, max_shard_size=size
            )
        except ValueError as error:
            raise ConfigError(
                f"max_shard_size={max_shard_size!r} is no size: {error} Remedy: a number of bytes, or a text as '5GB'"
            ) from None
        return cls({name: tuple(one) for name, one in found.filename_to_tensors.items()} or {WEIGHTS: ()})

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Shards:
        """What `index` gives, of a folder that may come from anyone.

        Raises:
            CheckpointError: it is damaged, or names other files than all shards beside itself.
        """
        found = json_object(content, path).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise CheckpointError(f"{path} has no weight_map: get the folder again")
        files: dict[str, tuple[str, ...]] = {}
        for tensor, name in found.items():
            if not isinstance(name, str) or not is_shard(name):
                raise CheckpointError(f"{path}: {tensor} is in {name!r}, which is no file of weights beside it")
            files[name] = (*files.get(name, ()), tensor)
        whole = _NAMES.format(suffix=f"-{{:05d}}-of-{len(files):05d}")
        missing = sorted({whole.format(place + 1) for place in range(len(files))} - files.keys())
        if missing:
            raise CheckpointError(f"{path} names {len(files)} shards, and {missing[0]} is not among them")
        return cls({name: files[name] for name in sorted(files)})

    @property
    def entry(self) -> str:
        """The file that leads to every tensor."""
        return SHARD_INDEX if len(self.files) > 1 else WEIGHTS

    def index(self, tensors: Mapping[str, TensorDigest]) -> dict[str, bytes]:
        """The index by its name, as transformers writes and reads it; nothing where there is but one file."""
        if self.entry == WEIGHTS:
            return {}
        weight_map = {tensor: file for file, names in self.files.items() for tensor in names}
        values = {"metadata": {"total_size": sum(map(size_of, tensors.values()))}, "weight_map": weight_map}
        return {SHARD_INDEX: (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()}


def is_shard(name: str) -> bool:
    """Whether a file of this name is one of several with a model's weights."""
    return _SHARD.fullmatch(name) is not None
