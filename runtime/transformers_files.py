"""Has Transformers say what is wrong with the files of a converted model; see ``damaged``."""

from transformers import modeling_utils

from omni_convert.runtime.damaged import explain

explain(modeling_utils, "get_checkpoint_shard_files", 1)
