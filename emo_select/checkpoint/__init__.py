"""Safetensors on disk: resolve a name to a folder, read tensors or rows lazily, write shards as a stream.

No import here needs torch; `Checkpoint.read` and `ShardedWriter.write` import it when called.
"""

from emo_select.checkpoint.header import TensorInfo
from emo_select.checkpoint.reader import Checkpoint, open_checkpoint, read_config
from emo_select.checkpoint.sources import PUBLISHED, demo_names, resolve
from emo_select.checkpoint.writer import ShardedWriter, TensorSpec, assign_shards

__all__ = ["PUBLISHED", "Checkpoint", "ShardedWriter", "TensorInfo", "TensorSpec", "assign_shards", "demo_names",
           "open_checkpoint", "read_config", "resolve"]
