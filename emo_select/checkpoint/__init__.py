"""Safetensors on disk: resolve a name to a folder, read tensors or rows lazily, write shards as a stream.

No import here needs torch; `Checkpoint.read` and `ShardedWriter.write` import it when called.
"""

from emo_select.checkpoint.header import TensorInfo
from emo_select.checkpoint.reader import Checkpoint, open_checkpoint, read_config
from emo_select.checkpoint.sources import PUBLISHED, at_revision, demo_names, here, is_whole, resolve, split_revision
from emo_select.checkpoint.writer import ShardedWriter, TensorSpec, assign_shards

__all__ = ["PUBLISHED", "Checkpoint", "ShardedWriter", "TensorInfo", "TensorSpec", "assign_shards", "at_revision",
           "demo_names", "here", "is_whole", "open_checkpoint", "read_config", "resolve", "split_revision"]
